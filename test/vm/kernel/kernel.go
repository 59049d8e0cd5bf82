// Package kernel is for tests that need a kernel with device-mapper: it decides
// whether the one that runs will do, and gives them block devices.
//
// Such tests are named TestKernel… and begin with Need. Where the kernel lacks
// something they are skipped; with REQUIRE_ALL=1 in the environment, which the
// guests of test/vm have, they fail instead, unless VM_LACKS (separated by
// commas) says that the guest's kernel was built without it.
package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var errUnknown = errors.New("no feature")

// Need skips the test, or fails it (see the package comment), unless the kernel
// and the machine have every one of the features. Features are
//
//	root                 the right to administer the system
//	loop                 loop devices
//	dm-crypt, dm-zero, … a device-mapper target; dm-thin stands for both of its own
//	keyring              add_key is allowed
//	ext4, xfs, btrfs     a file system in the kernel
//	exec:mkfs.xfs        a program in the PATH
//
// An unknown feature fails the test.
func Need(t testing.TB, features ...string) {
	t.Helper()
	for _, feature := range features {
		err := Missing(feature)
		switch {
		case err == nil:
		case errors.Is(err, errUnknown):
			t.Fatalf("Need: %v", err)
		case slices.Contains(strings.Split(os.Getenv("VM_LACKS"), ","), feature):
			t.Skipf("this guest's kernel was built without %s: %v", feature, err)
		case os.Getenv("REQUIRE_ALL") == "1":
			t.Fatalf("this test needs %s, and REQUIRE_ALL=1 forbids to skip it: %v", feature, err)
		default:
			t.Skipf("this test needs %s: %v (bin/vm, built from test/vm, has it: go test -exec)", feature, err)
		}
	}
}

// Missing returns nil where the feature (see Need) is there, and otherwise what
// is in the way. It asks the kernel, after an attempt to load the module.
func Missing(feature string) error {
	if program, ok := strings.CutPrefix(feature, "exec:"); ok {
		_, err := exec.LookPath(program)
		return err
	}
	if target, ok := strings.CutPrefix(feature, "dm-"); ok {
		return missingTarget(target)
	}
	switch feature {
	case "root":
		return missingRoot()
	case "loop":
		return missingLoop()
	case "keyring":
		return missingKeyring()
	case "ext4", "xfs", "btrfs":
		return missingFilesystem(feature)
	}
	return fmt.Errorf("%w is called %q", errUnknown, feature)
}

// modprobe tries to load a module. Whether it could shows in what follows.
func modprobe(module string) {
	if os.Geteuid() == 0 {
		_ = exec.Command("modprobe", "-q", module).Run()
	}
}

func missingTarget(name string) error {
	want := []string{name}
	module := "dm-" + name
	if name == "thin" {
		want, module = []string{"thin", "thin-pool"}, "dm-thin-pool"
	}
	missing := func() error {
		have, err := dmTargets()
		if err != nil {
			return err
		}
		for _, w := range want {
			if !slices.Contains(have, w) {
				return fmt.Errorf("device-mapper has no target %q", w)
			}
		}
		return nil
	}
	if missing() == nil {
		return nil
	}
	modprobe(module)
	return missing()
}

func missingRoot() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	if os.Geteuid() != 0 || data[0].Effective&(1<<unix.CAP_SYS_ADMIN) == 0 {
		return fmt.Errorf("user %d lacks CAP_SYS_ADMIN or is not root", os.Geteuid())
	}
	return nil
}

func missingLoop() error {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		modprobe("loop")
		if control, err = os.OpenFile("/dev/loop-control", os.O_RDWR, 0); err != nil {
			return err
		}
	}
	defer control.Close()
	if _, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE); err != nil {
		return fmt.Errorf("ask for a free loop device: %w", err)
	}
	return nil
}

func missingKeyring() error {
	// Keyrings belong to threads, a goroutine may move between two calls.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := unix.AddKey("user", "cryptcsi-probe", []byte("probe"), unix.KEY_SPEC_THREAD_KEYRING)
	if err != nil {
		return fmt.Errorf("add_key: %w", err)
	}
	_, err = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_THREAD_KEYRING, 0, 0)
	return err
}

func missingFilesystem(name string) error {
	missing := func() error {
		list, err := os.ReadFile("/proc/filesystems")
		if err != nil {
			return err
		}
		if !slices.Contains(strings.Fields(string(list)), name) {
			return fmt.Errorf("the kernel has no %s", name)
		}
		return nil
	}
	if missing() == nil {
		return nil
	}
	modprobe(name)
	return missing()
}
