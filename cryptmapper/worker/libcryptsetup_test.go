package worker_test

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// suite is a Debian release whose cryptsetup `test/install.sh cryptsetup-next`
// has unpacked; the empty one is the machine's own.
type suite string

const (
	machine suite = ""
	newest  suite = "forky"
	// oldest cannot start our worker, which needs libcryptsetup 2.4, and so only
	// reads with its own cryptsetup.
	oldest suite = "bullseye"
)

// command is how a program is started with the suite's dynamic loader and
// libraries.
func (s suite) command(program string) []string {
	if s == machine {
		return []string{program}
	}
	return []string{s.path("ld.so"), "--library-path", s.path("lib"), program}
}

func (s suite) path(name string) string {
	return "../../.cache/cryptsetup-next/" + string(s) + "/" + name
}

// need skips the test, or fails it, where the suite's files are not there.
func (s suite) need(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(s.path("")); err != nil {
		t.Log("`test/install.sh cryptsetup-next` unpacks what this test needs")
	}
	kernel.Need(t, "exec:"+s.path("ld.so"), "exec:"+s.path("cryptsetup"))
}

// mapper returns one whose workers use the suite's libcryptsetup.
func (s suite) mapper(t *testing.T) *cryptmapper.Mapper {
	m := cryptmapper.New(cryptmapper.Options{Worker: s.command("../../bin/crypt-worker"), LockDir: "/run/cryptcsi-test"})
	t.Cleanup(m.Shutdown)
	return m
}

// version is what the worker says of the library that it runs with.
func (s suite) version(t *testing.T) string {
	t.Helper()
	command := append(s.command("../../bin/crypt-worker"), "version")
	_, version, _ := strings.Cut(run(t, nil, command[0], command[1:]...), "libcryptsetup ")
	return strings.TrimSpace(version)
}

// cryptsetup runs the suite's program.
func (s suite) cryptsetup(t *testing.T, stdin []byte, args ...string) string {
	t.Helper()
	program := "cryptsetup"
	if s != machine {
		program = s.path("cryptsetup")
	}
	command := append(s.command(program), args...)
	return run(t, stdin, command[0], command[1:]...)
}

// A node's libcryptsetup is replaced by a newer one, or a volume moves to a node
// with an older one: it opens there, and nobody rewrites its header.
func TestKernelOtherLibcryptsetup(t *testing.T) {
	newest.need(t)
	oldest.need(t)
	ours, theirs := machine.version(t), newest.version(t)
	t.Logf("the machine's libcryptsetup is %s, the newest %s, the oldest %s", ours, theirs, oldest.cryptsetup(t, nil, "--version"))
	if ours == theirs || ours == "" || theirs == "" {
		t.Fatalf("the two libraries to compare are %q and %q", ours, theirs)
	}
	for _, integrity := range modes {
		forms := map[suite]string{}
		t.Run("integrity="+string(integrity)+"/from "+ours+" to "+theirs, func(t *testing.T) {
			forms[machine] = moves(t, integrity, machine, newest)
		})
		t.Run("integrity="+string(integrity)+"/from "+theirs+" to "+ours, func(t *testing.T) {
			forms[newest] = moves(t, integrity, newest, machine)
		})
		if forms[machine] == "" || forms[machine] != forms[newest] {
			t.Errorf("integrity=%s: %s writes %s\n%s writes %s", integrity, ours, forms[machine], theirs, forms[newest])
		}
	}
}

// The newest opens what Constellation made, whose key derivation it leaves to
// another library than the machine's does, and re-keys it for the machine's.
func TestKernelOtherLibcryptsetupConstellation(t *testing.T) {
	newest.need(t)
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newTheirs(t, integrity, cheapPBKDF)
			before, own := headerDigest(t, f.v.Device), f.Mapper
			f.Mapper = newest.mapper(t)
			hasTheirWords(t, f.open(t).Path)
			f.close(t)
			if headerDigest(t, f.v.Device) != before {
				t.Error("something was written to the header area")
			}
			if err := f.rekey(t, f.Mapper); err != nil {
				t.Fatalf("Rekey: %v", err)
			}
			f.Mapper = own
			f.done(t)
		})
	}
}

// moves makes a volume with one library, uses it with the other and returns the
// JSON of its header without what is random.
func moves(t *testing.T, integrity dek.Integrity, maker, other suite) string {
	f := newFixture(t, 40*mib, integrity)
	f.Mapper = maker.mapper(t)
	made := f.made(t, "made by one")

	// The mapping that one opened is the other's to go on with.
	f.Mapper = other.mapper(t)
	if m := f.open(t); m != made {
		t.Errorf("the other sees the open mapping as %+v, was %+v", m, made)
	}
	f.close(t)
	before := headerDigest(t, f.v.Device)
	if m := f.open(t); m != made || string(readAt(t, m.Path, 0, 11)) != "made by one" {
		t.Errorf("the other opened %+v with %q, was %+v", m, readAt(t, m.Path, 0, 11), made)
	}
	writeAt(t, made.Path, 0, []byte("the other's"))
	f.Mapper = maker.mapper(t)
	f.close(t)
	f.readBy(t, oldest, "the other's")
	f.readBy(t, newest, "the other's")
	if m := f.open(t); m != made {
		t.Errorf("reopened as %+v, was %+v", m, made)
	}
	if headerDigest(t, f.v.Device) != before {
		t.Error("the header area was written to by opening")
	}
	if integrity == dek.IntegrityNone {
		f.Mapper = other.mapper(t)
		f.grow(t)
		f.Mapper = maker.mapper(t)
		f.open(t)
	}
	f.close(t)
	return f.form(t)
}

// readBy opens the volume with the suite's cryptsetup.
func (f *fixture) readBy(t *testing.T, s suite, content string) {
	t.Helper()
	s.cryptsetup(t, f.d.Key.Expose(), "open", "--key-file=-", f.v.Device, f.v.Name)
	if got := string(readAt(t, dm.Path(f.v.Name), 0, len(content))); got != content {
		t.Errorf("cryptsetup of %q reads %q", s, got)
	}
	s.cryptsetup(t, nil, "close", f.v.Name)
	dump := s.cryptsetup(t, nil, "luksDump", f.v.Device)
	for _, want := range []string{f.d.Claim.UUID, "pbkdf2", "Iterations: 1000", "aes-xts-plain64", "16777216 [bytes]", "sector: 4096", "cryptcsi"} {
		if !strings.Contains(dump, want) {
			t.Errorf("luksDump of %q has no %q:\n%s", s, want, dump)
		}
	}
}

// grow gives the open volume 40 MiB more.
func (f *fixture) grow(t *testing.T) {
	t.Helper()
	kernel.Grow(t, f.v.Device, 80*mib)
	m, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil || m.Size != 64*mib {
		t.Fatalf("Resize = %+v, %v", m, err)
	}
	f.confirm(m)
	f.close(t)
	if m := f.open(t); m.Size != 64*mib {
		t.Errorf("reopened after growth: %+v", m)
	}
	f.close(t)
}

var randomFields = regexp.MustCompile(`"(salt|digest|mac|dek_id)":"[^"]*"`)

// form checks that both copies of the header pass, and returns their JSON
// without what is different in every volume.
func (f *fixture) form(t *testing.T) string {
	t.Helper()
	area := readAt(t, f.v.Device, 0, 16*mib)
	found, err := luks2.Read(bytes.NewReader(area), luks2.Want{ID: f.d.ID, Spec: f.d.Spec}, f.d.Key)
	if err != nil || found.Header == nil || !found.Whole {
		t.Fatalf("the header: %v, %v", found.Reason, err)
	}
	text := string(bytes.TrimRight(area[4096:luks2.CopySize], "\x00"))
	if !json.Valid([]byte(text)) {
		t.Fatalf("the header's JSON area holds %q", text)
	}
	return randomFields.ReplaceAllString(text, `"$1":"…"`)
}
