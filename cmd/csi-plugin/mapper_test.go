package main

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelMapper holds the real mapper, with real workers and a real kernel,
// to the promises that the in-memory one of the driver's tests keeps too.
func TestKernelMapper(t *testing.T) {
	worker, err := filepath.Abs("../../bin/crypt-worker")
	if err != nil {
		t.Fatal(err)
	}
	kernel.Need(t, "root", "loop", "dm-crypt", "dm-integrity", "keyring", "exec:blkid", "exec:"+worker)
	kernel.NoLeaks(t)
	m := cryptmapper.New(cryptmapper.Options{Worker: []string{worker}, LockDir: t.TempDir()})
	t.Cleanup(m.Shutdown)
	drivertest.RunMapper(t, drivertest.MapperHarness{
		Mapper: mapper{m}, Hydration: mapper{m},
		Specs: []dek.Spec{
			{Cipher: dek.CipherXTS},
			{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
			{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone},
		},
		NewDevice: func(t *testing.T, size int64) string {
			return kernel.Loop(t, size)
		},
		Number: func(t *testing.T, device string) string {
			var st unix.Stat_t
			if err := unix.Stat(device, &st); err != nil {
				t.Fatal(err)
			}
			return dm.NumberOf(st.Rdev).String()
		},
		Grow: func(t *testing.T, device string, size int64) { kernel.Grow(t, device, size) },
		ReadAt: func(t *testing.T, path string, p []byte, off int64) {
			t.Helper()
			f := open(t, path, os.O_RDONLY)
			defer f.Close()
			if _, err := f.ReadAt(p, off); err != nil {
				t.Fatal(err)
			}
		},
		WriteAt: func(t *testing.T, path string, p []byte, off int64) {
			t.Helper()
			f := open(t, path, os.O_RDWR)
			defer f.Close()
			if _, err := f.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		},
		CannotWrite: func(t *testing.T, path string) bool {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return true
			}
			defer f.Close()
			if _, err = f.WriteAt(make([]byte, 4096), 0); err == nil {
				err = f.Sync()
			}
			return err != nil
		},
		Hold: func(t *testing.T, path string) func() {
			f := open(t, path, os.O_RDONLY)
			return func() { f.Close() }
		},
	})
}

// open opens a device without what its page cache holds.
func open(t *testing.T, path string, mode int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	return f
}

// TestCloneArea: the controller, which knows no mapper, leaves as much room for
// dm-clone's metadata as the mapper takes.
func TestCloneArea(t *testing.T) {
	for length := int64(4 << 20); length < 1<<50; length = length*5/4 + 4096 {
		for _, at := range []int64{length, length &^ 4095, 256 << 30, 256<<30 + 4096, 1 << 40, 1<<40 + 4096} {
			if _, want := cryptmapper.CloneArea(at); driver.CloneArea(at) != want {
				t.Fatalf("of %d bytes driver reserves %d, cryptmapper %d", at, driver.CloneArea(at), want)
			}
		}
	}
}
