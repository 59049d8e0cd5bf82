package drivertest_test

import (
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
)

func TestMapper(t *testing.T) {
	k := drivertest.NewKernel()
	fail := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	drivertest.RunMapper(t, drivertest.MapperHarness{
		Mapper:    drivertest.Mapper{Kernel: k},
		Hydration: drivertest.Mapper{Kernel: k},
		Specs: []dek.Spec{
			{Cipher: dek.CipherXTS},
			{Cipher: dek.CipherXTS, Discard: true, KEK: "gold"},
			{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
			{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: dek.ModeDirect},
			{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone},
		},
		NewDevice: func(_ *testing.T, size int64) string { return k.AddDisk(size) },
		Number: func(t *testing.T, path string) string {
			dev, err := k.Device(path)
			fail(t, err)
			return dev.Number
		},
		Grow: func(t *testing.T, device string, size int64) {
			k.GrowDisk(device, size)
			fail(t, k.Rescan(t.Context(), device))
		},
		ReadAt:  func(t *testing.T, path string, p []byte, off int64) { t.Helper(); fail(t, k.ReadAt(path, p, off)) },
		WriteAt: func(t *testing.T, path string, p []byte, off int64) { t.Helper(); fail(t, k.WriteAt(path, p, off)) },
		CannotWrite: func(_ *testing.T, path string) bool {
			return k.WriteAt(path, make([]byte, 4096), 8<<20) != nil
		},
		Hold: func(t *testing.T, path string) func() {
			release, err := k.Hold(path)
			fail(t, err)
			return release
		},
	})
}

func hostHarness(k *drivertest.Kernel) drivertest.HostHarness {
	return drivertest.HostHarness{
		Host:      k,
		NewDevice: func(_ *testing.T, size int64) string { return k.AddDisk(size) },
		Grow:      func(_ *testing.T, device string, size int64) { k.GrowDisk(device, size) },
		Reuse: func(t *testing.T, device string) {
			dev, err := k.Device(device)
			if err != nil {
				t.Fatal(err)
			}
			k.Reattach(device, dev.Number)
		},
		Unlink: k.Unlink,
		Use: func(t *testing.T, device string) {
			if err := k.WriteAt(device, []byte("used"), 0); err != nil {
				t.Fatal(err)
			}
		},
		Types: driver.FSTypes(),
	}
}

func TestMounts(t *testing.T) { drivertest.RunMounts(t, hostHarness(drivertest.NewKernel())) }

func TestFilesystems(t *testing.T) { drivertest.RunFilesystems(t, hostHarness(drivertest.NewKernel())) }
