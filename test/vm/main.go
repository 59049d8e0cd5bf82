// Command vm runs a Go test binary, or any command, on a kernel that has
// device-mapper.
//
//	go build -o bin/vm ./test/vm
//	go test -exec "$PWD/bin/vm" ./cryptmapper -run '^TestKernel'
//	bin/vm [flags] -- command [argument…]
//
// On a machine where it is root and the kernel has dm-crypt the command is
// simply executed. Elsewhere a guest is booted for it: user-mode Linux from
// Debian's packages, or QEMU with the distribution's kernel. VM=native, VM=uml
// and VM=qemu choose.
//
// The guest sees the host's files at their places, as they are at that moment,
// through an overlay: what it writes stays in its memory and dies with it.
// Exceptions are the directories given by -rw, the disks given by -disk, and
// the files that the flags of a test binary name (-test.coverprofile and its
// like). /tmp, /run and /dev/shm are empty, but for the directory of the
// command and the working directory. Of the environment the guest sees PATH,
// HOME, LANG, TERM, TZ, USER, whatever begins with GO, TEST_, VM_ or REQUIRE_, and
// what VM_ENV names (separated by commas); DM_DISABLE_UDEV=1 and REQUIRE_ALL=1
// are added.
//
// Standard output and standard error come out as two streams, byte by byte, as
// they are written; standard input is empty. The exit code is the command's,
// 128 plus the signal's number for a command that a signal ended, and
//
//	124  the guest was stopped at the timeout
//	125  the guest did not start, broke or died (its last words follow on standard error)
//	127  there is no such command
//	137  -kill-on has killed the guest
//
// Two things to know: the go command does not see VM, so use -count=1 when it
// changes; and test binaries built with -race do not run in user-mode Linux,
// whose processes have too small an address space.
//
// SIGINT, SIGTERM, SIGHUP and SIGQUIT stop the guest. Any number of guests run at
// once, and nothing is left behind by one that has ended.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// The exit codes of our own; see the package comment.
const (
	exitTimeout   = 124
	exitBroken    = 125
	exitNoCommand = 127
	exitKilled    = 137
)

func main() {
	if dir := os.Getenv(guestEnv); dir != "" && os.Getpid() == 1 {
		guestMain(dir) // does not return
	}
	if os.Getenv(minderEnv) != "" && os.Getpid() == 1 {
		os.Exit(mind(os.Args[1:]))
	}
	// A guest dies with the thread that started it (see supervise): stay on it.
	runtime.LockOSThread()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run does everything for one command and returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	opts, err := parse(args, os.Getenv, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return exitBroken
	case err != nil:
		fmt.Fprintln(stderr, "vm:", err)
		return exitBroken
	}
	if opts.args[0], err = exec.LookPath(opts.args[0]); err != nil {
		fmt.Fprintln(stderr, "vm:", err)
		return exitNoCommand
	}
	if opts.mode == "" {
		opts.mode = choose(opts)
	}
	if opts.mode == "native" {
		err := unix.Exec(opts.args[0], opts.args, os.Environ())
		fmt.Fprintf(stderr, "vm: exec %s: %v\n", opts.args[0], err)
		return exitBroken
	}

	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	go func() {
		stop(&stopped{code: 128 + int((<-signals).(unix.Signal)), why: "stopped by a signal"})
	}()
	if opts.timeout > 0 {
		timer := time.AfterFunc(opts.timeout, func() {
			stop(&stopped{code: exitTimeout, why: fmt.Sprintf("stopped: not done after %v", opts.timeout)})
		})
		defer timer.Stop()
	}
	code, err := runGuest(ctx, opts, stdout, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "vm:", err)
	}
	return code
}

// choose says how to run where nobody has chosen: on this kernel if it can do
// what is asked, else in a guest.
func choose(o *options) string {
	if len(o.disks) == 0 && o.killOn == "" && o.tap == "" && kernel.Missing("root") == nil && kernel.Missing("dm-crypt") == nil {
		return "native"
	}
	return "uml"
}
