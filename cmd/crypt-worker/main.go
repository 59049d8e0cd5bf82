// Command crypt-worker opens one encrypted volume for csi-plugin and exits.
//
// It is started by csi-plugin with one end of a socket pair as file descriptor
// 3, over which it gets one request and the key, and it is the only program of
// the project that links libcryptsetup. A person runs it for its version only.
package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/worker"
)

// Set by the linker, see Makefile.
var (
	version = "dev"
	commit  = "unknown"
)

const usage = `crypt-worker is started by csi-plugin; a person has no use for it.

  crypt-worker            serve one request on file descriptor 3
  crypt-worker version    print version, commit and the libcryptsetup in use
`

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	switch {
	case len(args) == 0:
		return serve(stderr)
	case args[0] == "version" || args[0] == "--version" || args[0] == "-version":
		library, err := worker.LibraryVersion()
		if err != nil {
			fmt.Fprintf(stderr, "crypt-worker: libcryptsetup does not work here: %v\n", err)
			return 1
		}
		fmt.Fprintf(stdout, "crypt-worker %s, commit %s, libcryptsetup %s\n", version, commit, library)
		return 0
	case args[0] == "help" || args[0] == "--help" || args[0] == "-h" || args[0] == "-help":
		fmt.Fprint(stdout, usage)
		return 0
	default:
		fmt.Fprintf(stderr, "crypt-worker: unknown argument %q\n%s", args[0], usage)
		return 2
	}
}

func serve(stderr io.Writer) int {
	var st unix.Stat_t
	if err := unix.Fstat(cryptmapper.WorkerFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		fmt.Fprintf(stderr, "crypt-worker: file descriptor %d is no socket: this program is started by csi-plugin\n", cryptmapper.WorkerFD)
		return 2
	}
	unix.CloseOnExec(cryptmapper.WorkerFD)
	if err := worker.Serve(os.NewFile(cryptmapper.WorkerFD, "csi-plugin"), nil); err != nil {
		fmt.Fprintf(stderr, "crypt-worker: %v\n", err)
		return 1
	}
	return 0
}
