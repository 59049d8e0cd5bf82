package kernel_test

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// The guests are there to have all of this.
func TestKernelFeatures(t *testing.T) {
	for _, feature := range []string{
		"root", "loop", "keyring",
		"dm-crypt", "dm-integrity", "dm-clone", "dm-flakey", "dm-delay", "dm-thin", "dm-zero",
		"ext4", "xfs", "btrfs",
		"exec:mkfs.ext4", "exec:mkfs.xfs",
	} {
		t.Run(feature, func(t *testing.T) { kernel.Need(t, feature) })
	}
}

func TestMissing(t *testing.T) {
	for feature, want := range map[string]string{
		"exec:no-such-program": "executable file not found",
		"dm-nosuchtarget":      "", // "no target" or "no device-mapper", as the kernel has it
		"teleport":             `no feature is called "teleport"`,
	} {
		err := kernel.Missing(feature)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Missing(%q) = %v, want an error with %q", feature, err, want)
		}
	}
}

// recorder is a test that is told to stop, and says how.
type recorder struct {
	testing.TB
	how      string
	cleanups []func()
}

func (r *recorder) Helper()               {}
func (r *recorder) Cleanup(f func())      { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Skipf(string, ...any)  { r.how = "skip"; runtime.Goexit() }
func (r *recorder) Fatalf(string, ...any) { r.how = "fatal"; runtime.Goexit() }
func (r *recorder) Fatal(...any)          { r.how = "fatal"; runtime.Goexit() }
func (r *recorder) Error(...any)          { r.how = "error" }
func (r *recorder) Errorf(string, ...any) { r.how = "error" }
func (r *recorder) run(f func(testing.TB)) { // with its cleanups, last first
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, c := range slices.Backward(r.cleanups) {
				c()
			}
		}()
		f(r)
	}()
	<-done
}

func TestNeed(t *testing.T) {
	tests := []struct {
		feature, require, lacks string
		want                    string
	}{
		{"exec:sh", "", "", ""},
		{"exec:sh", "1", "", ""},
		{"exec:no-such-program", "", "", "skip"},
		{"exec:no-such-program", "0", "", "skip"},
		{"exec:no-such-program", "1", "", "fatal"},
		{"exec:no-such-program", "1", "dm-dust,exec:no-such-program", "skip"},
		{"exec:no-such-program", "1", "dm-dust", "fatal"},
		{"teleport", "1", "", "fatal"},
		{"teleport", "", "", "fatal"},
	}
	for _, tt := range tests {
		t.Setenv("REQUIRE_ALL", tt.require)
		t.Setenv("VM_LACKS", tt.lacks)
		r := recorder{TB: t}
		r.run(func(t testing.TB) { kernel.Need(t, "exec:sh", tt.feature) })
		if r.how != tt.want {
			t.Errorf("Need(%q), REQUIRE_ALL=%q, VM_LACKS=%q: %q, want %q", tt.feature, tt.require, tt.lacks, r.how, tt.want)
		}
	}
}

// NoLeaks must see each kind of thing that can be left behind.
func TestKernelNoLeaks(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-zero", "exec:dmsetup")
	kernel.NoLeaks(t)
	dir := t.TempDir()
	const mapping = "cryptcsi-leak"
	tests := []struct {
		name  string
		leak  func() error
		clean func() error
	}{
		{"nothing", func() error { return nil }, func() error { return nil }},
		{"mount", func() error { return unix.Mount("leak", dir, "tmpfs", 0, "") }, func() error { return unix.Unmount(dir, 0) }},
		{
			"mapping",
			func() error { return exec.Command("dmsetup", "create", mapping, "--table", "0 8 zero").Run() },
			func() error { return exec.Command("dmsetup", "remove", mapping).Run() },
		},
	}
	for _, tt := range tests {
		r := recorder{TB: t}
		r.run(func(t testing.TB) {
			kernel.NoLeaks(t)
			if err := tt.leak(); err != nil {
				t.Fatal(err)
			}
		})
		want := "error"
		if tt.name == "nothing" {
			want = ""
		}
		if r.how != want {
			t.Errorf("a test that leaves behind a %s: %q, want %q", tt.name, r.how, want)
		}
		if err := tt.clean(); err != nil {
			t.Errorf("clean up the %s: %v", tt.name, err)
		}
	}
	var held recorder
	held.TB = t
	loop := recorder{TB: t}
	loop.run(func(t testing.TB) {
		kernel.NoLeaks(t)
		kernel.Loop(&leaking{TB: t, dir: dir, into: &held}, 1<<20)
	})
	if loop.how != "error" {
		t.Errorf("a test that leaves behind a loop device: %q, want %q", loop.how, "error")
	}
	held.run(func(testing.TB) {})
}

// leaking is a test whose cleanups are another's.
type leaking struct {
	testing.TB
	dir  string
	into *recorder
}

func (l *leaking) TempDir() string  { return l.dir }
func (l *leaking) Cleanup(f func()) { l.into.Cleanup(f) }

func TestKernelLoop(t *testing.T) {
	kernel.Need(t, "root", "loop")
	kernel.NoLeaks(t)
	const size = 8 << 20
	path := kernel.Loop(t, size)
	device, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	if end, err := device.Seek(0, 2); err != nil || end != size {
		t.Errorf("size of %s = %d, %v, want %d", path, end, err, size)
	}
	sector := bytes.Repeat([]byte("cryptcsi"), 64)
	if _, err := device.WriteAt(sector, size-512); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1024)
	if _, err := device.ReadAt(got, size-1024); err != nil {
		t.Fatal(err)
	}
	if want := append(make([]byte, 512), sector...); !bytes.Equal(got, want) {
		t.Errorf("the last 1024 bytes are not what was written")
	}
}
