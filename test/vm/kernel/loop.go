package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Loop returns the path of a loop device of size bytes, a multiple of 512, that
// reads as zeros. It lies on a sparse file in a temporary directory of the test,
// and is detached at the test's end; whatever holds it must have let go by then.
func Loop(t testing.TB, size int64) string {
	t.Helper()
	if size <= 0 || size%512 != 0 {
		t.Fatalf("loop device of %d bytes: want a multiple of 512", size)
	}
	backing, err := os.Create(filepath.Join(t.TempDir(), "loop.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	if err := backing.Truncate(size); err != nil {
		t.Fatal(err)
	}
	device, err := Attach(backing)
	if err != nil {
		t.Fatalf("attach a loop device: %v", err)
	}
	t.Cleanup(func() {
		if err := Detach(device); err != nil {
			t.Errorf("detach %s: %v", device, err)
		}
	})
	return device
}

// Attach puts a free loop device onto a file, which may be closed afterwards,
// and returns the device's path.
func Attach(backing *os.File) (string, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer control.Close()
	for range 64 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("ask for a free one: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		device, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		config := unix.LoopConfig{Fd: uint32(backing.Fd())}
		copy(config.Info.File_name[:len(config.Info.File_name)-1], backing.Name())
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		_ = device.Close()
		if errors.Is(err, unix.EBUSY) {
			continue // another process was faster
		}
		return path, err
	}
	return "", errors.New("others take every free device first")
}

// Detach frees a loop device once nothing has it open.
func Detach(path string) error {
	device, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer device.Close()
	return unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
}

// Grow makes the file behind a loop device larger, and the device with it.
func Grow(t testing.TB, device string, size int64) {
	t.Helper()
	backing, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(strings.TrimSpace(string(backing)), size); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.IoctlSetInt(int(file.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		t.Fatal(err)
	}
}
