package worker_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelDiscard: what a pod trims is given back by the device where the
// record says so, and is refused where it does not.
func TestKernelDiscard(t *testing.T) {
	for name, discard := range map[string]bool{"allowed": true, "not allowed": false} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, 96*mib, dek.IntegrityNone)
			kernel.Need(t, "ext4", "exec:mkfs.ext4", "exec:fstrim", "exec:mount")
			f.d.Spec.Discard = discard
			m := f.made(t, "")
			if m.Discard != discard {
				t.Errorf("the mapping's Discard is %v", m.Discard)
			}
			if got, err := os.ReadFile("/sys/block/" + filepath.Base(realPath(t, m.Path)) + "/queue/discard_max_bytes"); err != nil || (strings.TrimSpace(string(got)) != "0") != discard {
				t.Errorf("discard_max_bytes = %s, %v", got, err)
			}
			tree := mounted(t, m.Path)
			writeFile(t, filepath.Join(tree, "ballast"), bytes.Repeat([]byte("ballast."), 32*mib/8))
			syscall.Sync()
			full := allocated(t, f.v.Device)
			if err := os.Remove(filepath.Join(tree, "ballast")); err != nil {
				t.Fatal(err)
			}
			syscall.Sync()
			out, err := exec.Command("fstrim", "-v", tree).CombinedOutput()
			if (err == nil) != discard {
				t.Errorf("fstrim: %v: %s", err, out)
			}
			if freed := full - allocated(t, f.v.Device); discard && freed < 30*mib || !discard && freed > 0 {
				t.Errorf("of %d bytes of the backing file %d were given back", full, freed)
			}
		})
	}
}

// TestKernelDiscardMustMatch: a mapping that lets discards through, or not, is
// refused where the record says otherwise.
func TestKernelDiscardMustMatch(t *testing.T) {
	f := newFixture(t, 32*mib, dek.IntegrityNone)
	f.made(t, "content")
	f.d.Spec.Discard = true
	_, err := f.Open(t.Context(), f.v, f.d)
	if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), cryptmapper.DiscardOption) {
		t.Errorf("Open: %v, want ErrState that names the option", err)
	}
	f.close(t)
	if m := f.open(t); !m.Discard {
		t.Error("opened anew it lets no discards through")
	}
}

// mounted makes ext4 on a device and mounts it.
func mounted(t *testing.T, device string) string {
	t.Helper()
	dir := t.TempDir()
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-F", "-E", "nodiscard", device}, {"mount", "-o", "discard", device, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// allocated is what the file behind a loop device takes.
func allocated(t *testing.T, device string) int64 {
	t.Helper()
	file, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(strings.TrimSpace(string(file)), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// realPath is the kernel's own name of a mapping's node.
func realPath(t *testing.T, path string) string {
	t.Helper()
	info, err := dm.Status(filepath.Base(path))
	if err != nil {
		t.Fatal(err)
	}
	link, err := os.Readlink("/sys/dev/block/" + info.Number.String())
	if err != nil {
		t.Fatal(err)
	}
	return link
}
