package driver_test

import (
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"k8s.io/mount-utils"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// linux is the real kernel with loop devices.
func linux(t *testing.T) drivertest.HostHarness {
	t.Helper()
	kernel.Need(t, "root", "loop", "exec:e2fsck", "exec:resize2fs", "exec:xfs_growfs", "exec:btrfs")
	for _, fstype := range driver.FSTypes() {
		kernel.Need(t, fstype, "exec:mkfs."+fstype)
	}
	return drivertest.HostHarness{
		Host:      driver.Linux{},
		NewDevice: func(t *testing.T, size int64) string { return kernel.Loop(t, size) },
		Grow:      growLoop,
		Reuse:     reuseLoop,
		Unlink:    os.Remove,
		Use: func(t *testing.T, device string) {
			f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.Write(make([]byte, 4096)); err != nil {
				t.Fatal(err)
			}
		},
		Types: driver.FSTypes(),
	}
}

// growLoop enlarges the file behind a loop device.
func growLoop(t *testing.T, device string, size int64) {
	t.Helper()
	file, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(strings.TrimSpace(string(file)), size); err != nil {
		t.Fatal(err)
	}
}

// reuseLoop detaches a loop device and attaches it anew.
func reuseLoop(t *testing.T, device string) {
	t.Helper()
	file, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := kernel.Detach(device); err != nil {
		t.Fatal(err)
	}
	backing, err := os.OpenFile(strings.TrimSpace(string(file)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	again, err := kernel.Attach(backing) // the first that is free
	if err != nil || again != device {
		t.Fatalf("attached %s anew as %s, %v", device, again, err)
	}
}

func TestKernelMounts(t *testing.T) { drivertest.RunMounts(t, linux(t)) }

func TestKernelFilesystems(t *testing.T) { drivertest.RunFilesystems(t, linux(t)) }

func TestReadMount(t *testing.T) {
	for _, tt := range []struct {
		line, source, root string
		want               driver.Mount
	}{
		// The lines are from proc(5) and from running systems.
		{
			`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`, "/dev/root", "/mnt1",
			driver.Mount{Target: "/mnt2", Device: "98:0", FSType: "ext3"},
		}, {
			`98 28 0:6 /loop0 /var/lib/kubelet/plugins/dev ro,nosuid shared:2 master:1 - devtmpfs udev rw,size=8k`, "udev", "/loop0",
			driver.Mount{Target: "/var/lib/kubelet/plugins/dev", Device: "0:6", FSType: "devtmpfs", ReadOnly: true},
		}, {
			`98 28 0:6 /sdb//deleted /var/lib/kubelet/plugins/dev rw - devtmpfs udev rw`, "udev", "/sdb//deleted",
			driver.Mount{Target: "/var/lib/kubelet/plugins/dev", Device: "0:6", FSType: "devtmpfs", Stale: true},
		}, {
			`99 28 254:0 / /mnt/a\040b\134c rw - xfs /dev/mapper/x ro`, "/dev/mapper/x", "/",
			driver.Mount{Target: `/mnt/a b\c`, Device: "254:0", FSType: "xfs", ReadOnly: true},
		},
	} {
		path := filepath.Join(t.TempDir(), "mountinfo")
		if err := os.WriteFile(path, []byte(tt.line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		table, err := mount.ParseMountInfo(path)
		if err != nil || len(table) != 1 {
			t.Fatalf("%s: %v, %v", tt.line, table, err)
		}
		got, source, root := driver.ReadMount(table[0])
		if source != tt.source || root != tt.root {
			t.Errorf("%s: source %q, root %q", tt.line, source, root)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", tt.line, diff)
		}
	}
}

// The superblocks were made by mke2fs 1.47, mkfs.xfs 6.1 and mkfs.btrfs 6.2.
func TestReadSuperblock(t *testing.T) {
	at := func(parts map[int]string) []byte {
		area := make([]byte, driver.SuperArea)
		for off, text := range parts {
			b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			copy(area[off:], b)
		}
		return area
	}
	const ext = 1024
	ext4 := map[int]string{
		ext + 0x04: "00000200", ext + 0x18: "02000000", ext + 0x38: "53ef0100", ext + 0x5c: "3c000000", ext + 0x60: "c2020000",
	}
	with := func(base map[int]string, off int, text string) map[int]string {
		out := map[int]string{off: text}
		for k, v := range base {
			if k != off {
				out[k] = v
			}
		}
		return out
	}
	for name, tt := range map[string]struct {
		area []byte
		want driver.FSInfo
	}{
		"blank":               {at(nil), driver.FSInfo{}},
		"ext4":                {at(ext4), driver.FSInfo{Type: "ext4", Size: 512 << 20, Clean: true}},
		"ext4, 16 TiB":        {at(with(with(ext4, ext+0x04, "00000000"), ext+0x150, "01000000")), driver.FSInfo{Type: "ext4", Size: 16 << 40, Clean: true}},
		"ext4, not unmounted": {at(with(ext4, ext+0x60, "c6020000")), driver.FSInfo{Type: "ext4", Size: 512 << 20}},
		"ext4, with errors":   {at(with(ext4, ext+0x38, "53ef0300")), driver.FSInfo{Type: "ext4", Size: 512 << 20}},
		"ext3":                {at(with(ext4, ext+0x60, "02000000")), driver.FSInfo{Type: "ext3", Size: 512 << 20, Clean: true}},
		"ext2":                {at(with(with(ext4, ext+0x60, "02000000"), ext+0x5c, "38000000")), driver.FSInfo{Type: "ext2", Size: 512 << 20, Clean: true}},
		"xfs":                 {at(map[int]string{0: "58465342 00001000 0000000000020000"}), driver.FSInfo{Type: "xfs", Size: 512 << 20, Clean: true}},
		"btrfs":               {at(map[int]string{0x10040: "5f42485266535f4d", 0x10070: "0000002000000000"}), driver.FSInfo{Type: "btrfs", Size: 512 << 20, Clean: true}},
	} {
		if got := driver.ReadSuperblock(tt.area); got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}

func FuzzReadSuperblock(f *testing.F) {
	f.Add([]byte("XFSB"))
	f.Fuzz(func(t *testing.T, head []byte) {
		area := make([]byte, driver.SuperArea)
		copy(area[1024:], head)
		copy(area, head)
		info := driver.ReadSuperblock(area)
		if info.Type == "" && info != (driver.FSInfo{}) {
			t.Errorf("nothing there, and yet %+v", info)
		}
	})
}

// TestProgramsEnd: a program has ended when it has, whoever still holds its
// pipe; how is what it says.
func TestProgramsEnd(t *testing.T) {
	for script, wrong := range map[string]string{
		"sleep 2 & exit 0":           "",
		"echo bad; sleep 2 & exit 3": "exit status 3: bad",
	} {
		t.Run(script, func(t *testing.T) {
			t.Parallel()
			err := driver.Run(t.Context(), "sh", "-c", script)
			if (err == nil) != (wrong == "") || err != nil && !strings.Contains(err.Error(), wrong) {
				t.Errorf("got %v, want %q", err, wrong)
			}
		})
	}
}

// TestProgramsSayWhy: of what mkfs prints about a volume that is too small, a
// person sees the reason and not how mkfs is called.
func TestProgramsSayWhy(t *testing.T) {
	for fstype, want := range map[string]string{"xfs": "must be larger than 300MB", "btrfs": "too small"} {
		kernel.Need(t, "exec:mkfs."+fstype)
		file := filepath.Join(t.TempDir(), fstype)
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 32<<20)); err != nil {
			t.Fatal(err)
		}
		err := driver.Linux{}.Make(t.Context(), file, fstype, nil, false)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "sectlog") || len(err.Error()) > 450 {
			t.Errorf("%s: %v; want %q", fstype, err, want)
		}
	}
	long := strings.Repeat("a", 301) + strings.Repeat("ü", 300)
	err := driver.Run(t.Context(), "sh", "-c", "echo begin "+long+" end; exit 1")
	if text := err.Error(); !strings.Contains(text, "begin") || !strings.Contains(text, "end") || len(text) > 450 || !utf8.ValidString(text) {
		t.Errorf("of much it says %q", text)
	}
}
