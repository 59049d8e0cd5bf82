package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	none := testOutputs{}
	tests := []struct {
		name string
		args string
		env  map[string]string
		want *options
	}{
		{"defaults", "true", nil, &options{mem: "2G", timeout: 10 * time.Minute, args: []string{"true"}, outputs: none}},
		{
			"flags", "-mem 512M -timeout 3s -rw /a -rw /b -disk /d -kill-on X -- sh -c true", map[string]string{"VM": "uml"},
			&options{mode: "uml", mem: "512M", timeout: 3 * time.Second, rw: []string{"/a", "/b"}, disks: []string{"/d"}, killOn: "X", args: []string{"sh", "-c", "true"}, outputs: none},
		},
		{
			"environment", "sh -x", map[string]string{"VM_MEM": "3G", "VM_TIMEOUT": "1h", "VM_RW": "/a:/b", "VM_DISK": "/d:/e"},
			&options{mem: "3G", timeout: time.Hour, rw: []string{"/a", "/b"}, disks: []string{"/d", "/e"}, args: []string{"sh", "-x"}, outputs: none},
		},
		{"a flag beats the environment", "-mem 1G -timeout 0 sh", map[string]string{"VM_MEM": "3G", "VM_TIMEOUT": "1h"}, &options{mem: "1G", args: []string{"sh"}, outputs: none}},
		{
			"a test binary", "p.test -test.timeout=2m0s -test.v -test.coverprofile=/w/c -test.testlogfile /w/l -test.gocoverdir=/w/g", nil,
			&options{
				mem: "2G", timeout: 2*time.Minute + 45*time.Second,
				args:    []string{"p.test", "-test.timeout=2m0s", "-test.v", "-test.coverprofile=/w/c", "-test.testlogfile", "/w/l", "-test.gocoverdir=/w/g"},
				outputs: testOutputs{files: []string{"/w/c", "/w/l"}, dirs: []string{"/w/g"}},
			},
		},
		{
			"profiles go to the output directory", "p.test --test.outputdir=/o --test.cpuprofile=c --test.trace=/w/t", nil,
			&options{
				mem: "2G", timeout: 10 * time.Minute, args: []string{"p.test", "--test.outputdir=/o", "--test.cpuprofile=c", "--test.trace=/w/t"},
				outputs: testOutputs{files: []string{"/o/c", "/w/t"}},
			},
		},
		{"no limit for the test, none for the guest", "p.test -test.timeout=0s", nil, &options{mem: "2G", args: []string{"p.test", "-test.timeout=0s"}, outputs: none}},
		{
			"our own limit counts", "p.test -test.timeout=1s", map[string]string{"VM_TIMEOUT": "5s"},
			&options{mem: "2G", timeout: 5 * time.Second, args: []string{"p.test", "-test.timeout=1s"}, outputs: none},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parse(strings.Fields(tt.args), func(name string) string { return tt.env[name] }, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(options{}, testOutputs{})); diff != "" {
				t.Errorf("parse(%q) (-want +got):\n%s", tt.args, diff)
			}
		})
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct{ args, vm, want string }{
		{"", "", "no command"},
		{"-mem 2 sh", "", "-mem"},
		{"-mem 0G sh", "", "-mem"},
		{"-timeout -1s sh", "", "-timeout"},
		{"sh", "xen", "VM="},
		{"-disk /d sh", "native", "need a guest"},
		{"-kill-on X sh", "native", "need a guest"},
		{"-tap tap0 sh", "native", "user-mode Linux"},
		{"-tap tap0 sh", "qemu", "user-mode Linux"},
		{"-tap tap0,x sh", "", "-tap"},
		{"-nonsense sh", "", "usage"},
	} {
		_, err := parse(strings.Fields(tt.args), func(name string) string { return map[string]string{"VM": tt.vm}[name] }, io.Discard)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("parse(%q) with VM=%q: %v, want an error with %q", tt.args, tt.vm, err, tt.want)
		}
	}
}

func TestGuestEnviron(t *testing.T) {
	got := guestEnviron([]string{
		"PATH=/p", "HOME=/h", "GOFLAGS=-v", "TEST_X=1", "VM_ENV=A,B", "REQUIRE_Y=2", "A=a=a", "B=b", "AB=no", "SECRET=no", "TMPDIR=/no", guestEnv + "=/no",
	})
	want := []string{
		"HOME=/h", "GOFLAGS=-v", "TEST_X=1", "VM_ENV=A,B", "REQUIRE_Y=2", "A=a=a", "B=b",
		"PATH=/p:/usr/sbin:/sbin", "DM_DISABLE_UDEV=1", "REQUIRE_ALL=1",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("guestEnviron (-want +got):\n%s", diff)
	}
}

func TestWatcher(t *testing.T) {
	tests := []struct {
		want   string
		writes []string
		out    string
		hit    bool
	}{
		{"", []string{"abc", "def"}, "abcdef", false},
		{"END", []string{"abc", "def"}, "abcdef", false},
		{"END", []string{"abENDcd", "ef"}, "abEND", true},
		{"END", []string{"abE", "N", "Dcd"}, "abEND", true},
		{"END", []string{"EN", "EN", "EEND."}, "ENENEEND", true},
		{"END", []string{"END", "END"}, "END", true},
	}
	for _, tt := range tests {
		var out bytes.Buffer
		found := 0
		w := &watcher{w: &out, want: []byte(tt.want), found: func() { found++ }}
		for _, s := range tt.writes {
			if n, err := w.Write([]byte(s)); n != len(s) || err != nil {
				t.Errorf("Write(%q) = %d, %v", s, n, err)
			}
		}
		if out.String() != tt.out || w.hit != tt.hit || (found == 1) != tt.hit {
			t.Errorf("watching %q for %q: wrote %q, hit %v, found %d times, want %q, %v", tt.writes, tt.want, out.String(), w.hit, found, tt.out, tt.hit)
		}
	}
}

func TestTail(t *testing.T) {
	last := &tail{max: 8}
	for _, s := range []string{"first\n", "second\r\n", "x", "\n"} {
		if n, err := last.Write([]byte(s)); n != len(s) || err != nil {
			t.Errorf("Write(%q) = %d, %v", s, n, err)
		}
	}
	if got, want := string(last.data), "cond\r\nx\n"; got != want {
		t.Errorf("tail holds %q, want the last 8 bytes, %q", got, want)
	}
	if got := last.words(); !strings.Contains(got, "cond\nx\n") || strings.Contains(got, "\r") {
		t.Errorf("words() = %q", got)
	}
}

func TestModuleOrder(t *testing.T) {
	dir := t.TempDir()
	dep := "a/dm-mod.ko:\na/dm-crypt.ko: b/keys.ko.xz a/dm-mod.ko\nb/keys.ko.xz:\n"
	if err := os.WriteFile(filepath.Join(dir, "modules.dep"), []byte(dep), 0o644); err != nil {
		t.Fatal(err)
	}
	tree, err := readModuleTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"dm-crypt": {"a/dm-mod.ko", "b/keys.ko.xz", "a/dm-crypt.ko"},
		"dm_mod":   {"a/dm-mod.ko"},
		"keys":     {"b/keys.ko.xz"},
		"built-in": nil,
	} {
		if diff := cmp.Diff(want, tree.order(name)); diff != "" {
			t.Errorf("order(%q) (-want +got):\n%s", name, diff)
		}
	}
}
