// Copying leaves a key in vector registers on amd64; on arm64 it goes through
// others, which hold it for a few instructions, so that there nothing is found.

//go:build amd64

package secret_test

import (
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/secret"
)

// TestDoLeavesNothing copies a key while signals arrive all the time, and then
// looks for it in all memory of this process. Without Do it is found.
func TestDoLeavesNothing(t *testing.T) {
	key, mask := maskedKey()
	defer key.Wipe()
	own := secret.New(32)
	defer own.Wipe()
	bare := func() { copy(own.Expose(), key.Expose()) }

	const known = 2 // key and own
	found := known
	for began := time.Now(); found == known && time.Since(began) < time.Minute; {
		stormed(100*time.Millisecond, bare)
		found = copies(t, mask)
	}
	if found <= known {
		t.Errorf("copied without Do the key was in memory %d times, with itself: this test cannot tell", found)
	}
	for range 10 {
		stormed(100*time.Millisecond, func() { secret.Do(bare) })
		if n := copies(t, mask); n != known {
			t.Fatalf("copied by Do the key is in memory %d times, want %d", n, known)
		}
	}
}

// TestDoPanics: a panic passes, a fault is a panic, and signals arrive again.
func TestDoPanics(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := mask(t)
	for _, f := range []func(){
		func() { panic("x") },
		func() { fmt.Fprint(nil, "x") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic was lost")
				}
			}()
			secret.Do(f)
		}()
	}
	secret.Do(func() {
		secret.Do(func() {})
		if mask(t) == before {
			t.Error("an inner Do lets signals in")
		}
	})
	if after := mask(t); after != before {
		t.Errorf("blocked are %x, before %x", after, before)
	}
}

// mask is what the thread blocks.
func mask(t *testing.T) unix.Sigset_t {
	t.Helper()
	var set unix.Sigset_t
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, nil, &set); err != nil {
		t.Fatal(err)
	}
	return set
}

// stormed calls f for that long, on a thread that gets signals as fast as they
// can be sent.
func stormed(long time.Duration, f func()) {
	thread, done := make(chan int), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		for began := time.Now(); time.Since(began) < long; {
			for range 1000 {
				f()
			}
		}
	}()
	tid := <-thread
	for {
		select {
		case <-done:
			return
		default:
			_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG) // what Go itself interrupts goroutines with
		}
	}
}
