package secret

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Do calls f, which handles key bytes, and keeps them from where nobody could
// wipe them: while f runs no signal reaches its thread, and then the vector
// registers, through which copying and ciphers move bytes, are cleared. A
// signal's frame, and what Go's scheduler puts aside when it takes a goroutine
// off its thread by one, would hold those registers until the next.
//
// f must be short and must not wait for anything: the garbage collector may
// wait for it. What f leaves in memory is its own affair. A panic passes
// through. The registers are cleared on amd64 and arm64.
//
// runtime/secret of Go 1.26 wants to do this and more; it is an experiment whose
// zeroing has overwritten memory in use (golang/go issue 76865).
func Do(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before unix.Sigset_t
	all := asynchronous()
	// Neither call can fail: both sets are ours.
	_ = unix.PthreadSigmask(unix.SIG_BLOCK, &all, &before)
	defer func() {
		clearRegisters()
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil)
	}()
	f()
}

// asynchronous are the signals that can come at any moment: all but those that
// an instruction causes, which must arrive (Go makes panics of them).
func asynchronous() (all unix.Sigset_t) {
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	const bits = 8 * int(unsafe.Sizeof(all.Val[0]))
	for _, s := range []syscall.Signal{unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP, unix.SIGSYS} {
		all.Val[int(s-1)/bits] &^= 1 << (int(s-1) % bits)
	}
	return all
}
