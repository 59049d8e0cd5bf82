package worker

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelSuperblock: what cryptsetup and the kernel make of devices of many
// lengths passes, and no longer does when the length changes by more than the
// kernel rounds away.
func TestKernelSuperblock(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-crypt", "dm-integrity", "keyring", "exec:cryptsetup")
	kernel.NoLeaks(t)
	const mib = 1 << 20
	for _, size := range []int64{20 * mib, 24 * mib, 24*mib + 512, 63*mib - 4096, 300 * mib, 1001*mib + 512*3, 20 << 30, 500<<30 + 4096*5} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			device := kernel.Loop(t, size)
			sector := "4096"
			if size%4096 != 0 {
				sector = "512"
			}
			g := made(t, device, sector)
			check := func() error {
				dev, err := openDevice(device, true)
				if err != nil {
					t.Fatal(err)
				}
				defer dev.close()
				return checkSuperblock(dev, geometry(g))
			}
			if err := check(); err != nil {
				t.Errorf("as it was made: %v", err)
			}
			kernel.Grow(t, device, size+mib)
			if err := check(); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "has grown") {
				t.Errorf("grown by a MiB: %v", err)
			}
			g.Provided += 8
			if err := check(); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "must provide") {
				t.Errorf("another length in the token: %v", err)
			}
		})
	}
}

// made formats a device with cryptsetup, without a wipe, and returns what the
// kernel says of it.
func made(t *testing.T, device, sector string) *cryptmapper.IntegrityTable {
	t.Helper()
	name := cryptmapper.Prefix + "superblock"
	cryptsetup := func(args ...string) {
		t.Helper()
		cmd := exec.Command("cryptsetup", append(args, "--batch-mode", "--key-file=-")...)
		cmd.Stdin = bytes.NewReader(make([]byte, 32))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cryptsetup %v: %v: %s", args, err, out)
		}
	}
	cryptsetup("luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--integrity=hmac-sha256", "--integrity-no-wipe", "--sector-size="+sector, device)
	cryptsetup("open", device, name)
	s, err := cryptmapper.ReadStack(name)
	if out, closeErr := exec.Command("cryptsetup", "close", name).CombinedOutput(); closeErr != nil {
		t.Fatalf("cryptsetup close: %v: %s", closeErr, out)
	}
	if err != nil || s.Integrity == nil {
		t.Fatalf("%+v, %v", s, err)
	}
	return s.Integrity
}
