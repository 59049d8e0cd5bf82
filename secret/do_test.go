// Copying leaves a key in vector registers on amd64; on arm64 it goes through
// others, which hold it for a few instructions, so that there nothing is found.

//go:build amd64

package secret_test

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/secret"
)

// TestDoLeavesNothing copies a key while signals arrive all the time, and then
// looks for it in all memory of this process. Without Do it is found.
func TestDoLeavesNothing(t *testing.T) {
	key := secret.Random(32)
	defer key.Wipe()
	own := secret.New(32)
	defer own.Wipe()
	bare := func() { copy(own.Expose(), key.Expose()) }

	found := 0
	for began := time.Now(); found == 0 && time.Since(began) < time.Minute; {
		stormed(100*time.Millisecond, bare)
		found = places(t, key, own)
	}
	if found == 0 {
		t.Error("copied without Do the key was nowhere: this test cannot tell")
	}
	for range 10 {
		stormed(100*time.Millisecond, func() { secret.Do(bare) })
		if n := places(t, key, own); n > 0 {
			t.Fatalf("copied by Do the key was found %d times", n)
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

// places counts where in this process's memory key is, but for key itself and
// the others that it may be in.
func places(t *testing.T, key secret.Bytes, others ...secret.Bytes) (n int) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	const piece = 1 << 20
	buf := secret.New(piece + 32) // wiped: what it found must not be found again
	defer buf.Wipe()
	skip := []secret.Bytes{key, buf}
	skip = append(skip, others...)
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var access string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &access); err != nil || !strings.HasPrefix(access, "rw") {
			continue
		}
		for at := from; at < to; at += piece {
			got, _ := mem.ReadAt(buf.Expose()[:min(piece+32, to-at)], at)
			for _, s := range skip {
				blank(buf.Expose()[:got], at, s.Expose())
			}
			secret.Do(func() { n += bytes.Count(buf.Expose()[:got], key.Expose()) })
		}
	}
	return n
}

// blank clears in buf, which was read from address at, what was own memory.
func blank(buf []byte, at int64, own []byte) {
	start := int64(uintptr(unsafe.Pointer(unsafe.SliceData(own)))) - at
	end := start + int64(len(own))
	if start < int64(len(buf)) && end > 0 {
		clear(buf[max(0, start):min(int64(len(buf)), end)])
	}
}
