package worker

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelSuperblock: what cryptsetup and the kernel make of devices of many
// lengths passes; on one that has grown it passes whatever of the larger size the
// kernel has noted, and can be pinned to the old one.
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
			format(t, device, sector)
			g := geometry(kernelSays(t, device))
			check := func(g luks2.Geometry, words string) {
				t.Helper()
				dev, err := openDevice(device, true)
				if err != nil {
					t.Fatal(err)
				}
				defer dev.close()
				err = checkSuperblock(dev, g)
				if words == "" && err != nil || words != "" && (!errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), words)) {
					t.Errorf("%+v: %v, want %q", g, err, words)
				}
			}
			check(g, "")
			less, more := g, g
			less.Sectors -= 8
			more.Sectors += 8
			check(less, "") // as after the device has grown
			check(more, "it was shrunk")

			kernel.Grow(t, device, size+mib)
			check(g, "")
			check(more, "must provide")
			dev, err := openDevice(device, true)
			if err != nil {
				t.Fatal(err)
			}
			defer dev.close()
			perBlock := map[string]byte{"4096": 3, "512": 0}[sector]
			most := provided(dev, g, perBlock)
			if s := kernelSays(t, device); s.Provided != most || s.Length != g.Sectors {
				t.Errorf("the kernel provides %d sectors of %d, not %d", s.Provided, s.Length, most)
			}
			if s := kernelSays(t, device); s.Length != most {
				t.Errorf("cryptsetup maps %d sectors of %d", s.Length, most)
			}
			check(g, "")
			if err := pinSuperblock(dev, g); err != nil {
				t.Fatal(err)
			}
			if s := kernelSays(t, device); s.Provided != most || s.Length != g.Sectors {
				t.Errorf("pinned to %d, the kernel provides %d sectors of %d", g.Sectors, s.Provided, s.Length)
			}
			g.Sectors = most + 8
			if err := pinSuperblock(dev, g); err != nil {
				t.Fatal(err)
			}
			g.Sectors = most
			check(g, "must provide")
		})
	}
}

// format formats a device with cryptsetup, without a wipe.
func format(t *testing.T, device, sector string) {
	t.Helper()
	program(t, "luksFormat", "--type=luks2", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--integrity=hmac-sha256", "--integrity-no-wipe", "--sector-size="+sector, device)
}

// kernelSays opens a device with cryptsetup and returns what the kernel says.
func kernelSays(t *testing.T, device string) *cryptmapper.IntegrityTable {
	t.Helper()
	name := cryptmapper.Prefix + "superblock"
	program(t, "open", device, name)
	s, err := cryptmapper.ReadStack(name)
	program(t, "close", name)
	if err != nil || s.Integrity == nil {
		t.Fatalf("%+v, %v", s, err)
	}
	return s.Integrity
}

func program(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("cryptsetup", append(args, "--batch-mode", "--key-file=-")...)
	cmd.Stdin = bytes.NewReader(make([]byte, 32))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup %v: %v: %s", args, err, out)
	}
}
