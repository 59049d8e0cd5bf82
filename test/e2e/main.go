// Command e2e tries cryptcsi in a real Kubernetes: etcd, API server, controller
// manager and scheduler on this machine, kubelet and containerd in a guest whose
// kernel has device-mapper, and in it the plugin, its controller with the
// upstream sidecars, and the key service, as deploy/kubernetes installs them.
//
//	make e2e
//	bin/e2e [-short] [-full] [-only REGEXP] [-keep]
//
// Everything runs in namespaces of its own and listens there: nothing is left
// when the program ends, however it ends, but a folder with logs where
// something failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// insideEnv holds, in the namespaces, the folder to work in.
const insideEnv = "CRYPTCSI_E2E"

func main() {
	var err error
	switch dir := os.Getenv(insideEnv); {
	case len(os.Args) == 4 && os.Args[1] == "node":
		err = runNode(os.Args[2], os.Args[3])
	case len(os.Args) == 4 && os.Args[1] == "registrar":
		err = runRegistrar(os.Args[2], os.Args[3])
	case dir != "":
		err = inside(dir)
	default:
		err = outside()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
}

// options are the command line's.
type options struct {
	only        *regexp.Regexp
	keep, short bool
	full        bool
}

// upgrades says whether the story begins with the build before this one.
func (o options) upgrades() bool {
	return !o.short && !o.full && (o.only.MatchString(upgradeText) || o.only.MatchString(downgradeText))
}

// withSuite says whether Kubernetes' own tests run.
func (o options) withSuite() bool { return o.full || o.only.MatchString(suiteText) }

func parseOptions() (options, error) {
	only := flag.String("only", "", "run the scenarios whose text this `expression` matches; what they need runs anyway")
	var o options
	flag.BoolVar(&o.short, "short", false, "leave out what takes long")
	flag.BoolVar(&o.full, "full", false, "run nothing but all of Kubernetes' own storage tests")
	flag.BoolVar(&o.keep, "keep", false, "when all is done, wait for an interrupt; the message says how to look around")
	flag.Parse()
	var err error
	o.only, err = regexp.Compile(*only)
	return o, err
}

// outside makes the folder and starts this program once more, in namespaces
// that end with it.
func outside() error {
	o, err := parseOptions()
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("it makes namespaces, a tap device and loop devices: run it as root")
	}
	dir, err := os.MkdirTemp("", "cryptcsi-e2e-")
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// What is killed with this process hangs on this thread.
	runtime.LockOSThread()
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
		Setpgid:    true, // an interrupt reaches it by us alone
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	if err := cmd.Start(); err != nil {
		return err
	}
	if o.keep {
		fmt.Printf("the namespaces: nsenter -a -t %d\n", cmd.Process.Pid)
	}
	go func() {
		for range signals {
			_ = cmd.Process.Signal(unix.SIGTERM)
		}
	}()
	err = cmd.Wait()
	if err != nil {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.Name() != "log" {
				_ = os.RemoveAll(filepath.Join(dir, e.Name()))
			}
		}
		return fmt.Errorf("%w; logs are in %s", err, filepath.Join(dir, "log"))
	}
	return os.RemoveAll(dir)
}

// inside is the first process of the namespaces.
func inside(dir string) error {
	o, err := parseOptions()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	// Mounts must not reach the machine; /proc must be that of these processes.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts of our own: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("proc: %w", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("/run: %w", err)
	}
	return run(ctx, dir, o)
}
