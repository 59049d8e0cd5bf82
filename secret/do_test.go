// Copying leaves a key in vector registers on amd64; on arm64 it goes through
// others, which hold it for a few instructions, so that there nothing is found.

//go:build amd64

package secret_test

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/secret"
)

// TestDoLeavesNothing copies a key and has a signal come before anything else is
// in the registers, and others all the time, and then looks for the key in all
// memory of this process. Without Do it is found.
func TestDoLeavesNothing(t *testing.T) {
	key, mask := maskedKey()
	defer key.Wipe()
	own := secret.New(32)
	defer own.Wipe()
	interrupted := func() {
		copy(own.Expose(), key.Expose())
		interrupt()
	}

	const known = 2 // key and own
	for range 10 {
		n := 0
		stormed(100*time.Millisecond, func() { secret.Do(interrupted) }, func() { n = copies(t, mask) })
		if n != known {
			t.Fatalf("copied by Do the key is in memory %d times, want %d", n, known)
		}
	}
	n := known
	for range 10 { // another signal may have come right after it, on a busy machine
		if n == known {
			onThread(interrupted, func() { n = copies(t, mask) })
		}
	}
	if n == known {
		t.Errorf("copied without Do the key was in memory %d times, with itself: this test cannot tell", n)
	}
}

// interrupt sends its thread the signal by which Go interrupts goroutines. It
// comes before the next instruction, with the registers as they were; so nothing
// here may use them, nor call the race detector.
//
//go:norace
func interrupt() {
	pid, _, _ := syscall.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
	tid, _, _ := syscall.RawSyscall(unix.SYS_GETTID, 0, 0, 0)
	_, _, _ = syscall.RawSyscall(unix.SYS_TGKILL, pid, tid, uintptr(unix.SIGURG))
}

// onThread calls f, and then look elsewhere, while f's thread does nothing: it
// gets no signal, which would overwrite what the last one left behind.
func onThread(f, look func()) {
	ran, looked := make(chan struct{}), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		f()
		close(ran)
		<-looked
	}()
	<-ran
	look()
	close(looked)
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

// stormed is onThread with f again and again for that long, while signals come as
// fast as they can be sent.
func stormed(long time.Duration, f, look func()) {
	onThread(func() {
		tid, stop, stopped := unix.Gettid(), make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
					_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG)
				}
			}
		}()
		for began := time.Now(); time.Since(began) < long; {
			for range 100 {
				f()
			}
		}
		close(stop)
		<-stopped
	}, look)
}
