// Command csi-plugin stands in front of another CSI driver and encrypts its
// volumes. This package only wires: flags, then values, then Serve.
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
	"path/filepath"
	"strings"
	"syscall"

	"github.com/cryptcsi/cryptcsi/kms/all"
)

// Set by the linker, see Makefile.
var (
	version = "dev"
	commit  = "unknown"
)

const usage = `csi-plugin encrypts the volumes of another CSI driver.

  csi-plugin node      serve CSI on the node, in front of the wrapped driver's node socket
  csi-plugin controller  serve CSI's controller, in front of the wrapped driver's
  csi-plugin rekey     give a volume that Constellation made to a key of its own
  csi-plugin restore-header  make a volume's destroyed header again from the backup in its record
  csi-plugin open      open one encrypted device that is no CSI volume, and print its path
  csi-plugin close     close it
  csi-plugin inspect   list the encrypted volumes of this node
  csi-plugin plaintext-list  list the unencrypted volumes that a driver has, for --plaintext-volumes-file
  csi-plugin version   print version, commit, libcryptsetup and the KMS that this build knows
  csi-plugin <verb> --help   list the flags of a verb
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run picks the verb and the exit code: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	var err error
	switch verb, rest := strings.TrimLeft(args[0], "-"), args[1:]; verb {
	case "node":
		err = node(ctx, rest, stderr)
	case "controller":
		err = controller(ctx, rest, stderr)
	case "open":
		err = openDevice(ctx, rest, stdout, stderr)
	case "close":
		err = closeDevice(ctx, rest, stderr)
	case "inspect":
		err = inspect(ctx, rest, stdout, stderr)
	case "rekey":
		err = rekey(ctx, rest, stdout, stderr)
	case "restore-header":
		err = restoreHeader(ctx, rest, stdout, stderr)
	case "plaintext-list":
		err = plaintextList(rest, os.Stdin, stdout, stderr)
	case "version":
		err = printVersion(ctx, rest, stdout, stderr)
	case "help", "h":
		fmt.Fprint(stdout, usage)
	default:
		err = usageError(fmt.Sprintf("unknown verb %q", args[0]))
		fmt.Fprint(stderr, usage)
	}
	var wrong usageError
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "csi-plugin: %v\n", err)
		return 2
	default:
		fmt.Fprintf(stderr, "csi-plugin: %v\n", err)
		return 1
	}
}

// usageError is a command line that cannot be.
type usageError string

func (e usageError) Error() string { return string(e) }

// parse parses a verb's flags; no verb takes other arguments.
func parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError(fs.Name() + ": " + err.Error())
	}
	if fs.NArg() > 0 {
		return usageError(fmt.Sprintf("%s: unexpected argument %q", fs.Name(), fs.Arg(0)))
	}
	return nil
}

func newFlags(name string, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprintf(stderr, "Usage of csi-plugin %s:\n", name)
		fs.PrintDefaults()
	}
	return fs
}

// workerFlag adds the flag that says where the crypt-worker is.
func workerFlag(fs *flag.FlagSet) *string {
	return fs.String("crypt-worker", besides("crypt-worker"), "program that opens one volume and exits")
}

// besides returns the path of a program in this program's folder.
func besides(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	return filepath.Join(filepath.Dir(self), name)
}

func printVersion(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	fs := newFlags("version", stderr)
	worker := workerFlag(fs)
	if err := parse(fs, args); err != nil {
		return err
	}
	library, err := libcryptsetup(ctx, *worker)
	if err != nil {
		library = "unknown (" + err.Error() + ")"
	}
	fmt.Fprintf(stdout, "csi-plugin %s, commit %s, libcryptsetup %s, KMS: %s\n", version, commit, library, strings.Join(all.Usable(), ", "))
	return nil
}

// libcryptsetup asks the worker which library it runs with: a worker that
// cannot run is found out before a volume needs it. Both programs must come
// from one build, because they speak an unversioned protocol.
func libcryptsetup(ctx context.Context, worker string) (string, error) {
	out, err := exec.CommandContext(ctx, worker, "version").CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return "", fmt.Errorf("crypt-worker %s does not run: %w %s", worker, err, text)
	}
	var v, c, library string
	if _, err := fmt.Sscanf(strings.ReplaceAll(text, ",", ""), "crypt-worker %s commit %s libcryptsetup %s", &v, &c, &library); err != nil {
		return "", fmt.Errorf("crypt-worker %s answers %q, which is no version", worker, text)
	}
	if v != version || c != commit {
		return "", fmt.Errorf("crypt-worker %s is version %s (commit %s), this csi-plugin is %s (%s): install both from one build", worker, v, c, version, commit)
	}
	return library, nil
}
