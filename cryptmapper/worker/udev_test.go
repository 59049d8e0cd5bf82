package worker_test

import (
	"errors"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelUdevStaysAway: whatever a pod writes onto a block volume, LVM for
// example, the host's udev must not build something on it that would keep the
// mapping from being closed. So each mapping, the layers below and those that are
// there for a moment, is announced with the flags that say so (libdevmapper.h), and
// with no cookie that somebody would have to wait for.
func TestKernelUdevStaysAway(t *testing.T) {
	const primarySource, noSubsystem, noDisk, noOther = 0x40, 0x02, 0x04, 0x08
	for name, spec := range map[string]dek.Spec{
		"encryption only": {Cipher: dek.CipherXTS},
		"integrity":       {Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
		"clone":           {Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, 64*mib, spec.Integrity)
			f.d.Spec = spec
			if spec.Layout != "" {
				kernel.Need(t, "dm-clone", "dm-zero")
			}
			events := uevents(t)
			f.made(t, "LABELONE")
			f.close(t)
			f.open(t)
			f.close(t)
			resumed := 0
			for _, e := range events() {
				if e["ACTION"] != "change" || !strings.HasPrefix(e["DEVNAME"], "dm-") {
					continue
				}
				resumed++
				cookie, err := strconv.ParseUint(e["DM_COOKIE"], 10, 32)
				if want := uint64(primarySource | noSubsystem | noDisk | noOther); err != nil || cookie != want<<16 {
					t.Errorf("udev is told of %s with cookie %q, want %d", e["DEVNAME"], e["DM_COOKIE"], want<<16)
				}
			}
			if resumed < 2 {
				t.Errorf("udev was told of %d mappings", resumed)
			}
		})
	}
}

// uevents returns a function that returns what the kernel has told udev since.
func uevents(t *testing.T) func() []map[string]string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		t.Fatal(err)
	}
	return func() (all []map[string]string) {
		buf := make([]byte, 64<<10)
		for {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if errors.Is(err, unix.EAGAIN) {
				return all
			}
			if err != nil {
				t.Fatal(err)
			}
			e := map[string]string{}
			for field := range strings.SplitSeq(string(buf[:n]), "\x00") {
				if key, value, ok := strings.Cut(field, "="); ok {
					e[key] = value
				}
			}
			all = append(all, e)
		}
	}
}
