package secret_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/secret"
)

const plain = "correct horse battery staple 123"

func TestNeverPrinted(t *testing.T) {
	s := secret.Take([]byte(plain))
	defer s.Wipe()
	holder := struct {
		Key secret.Bytes
		P   *secret.Bytes
	}{s, &s}
	var out strings.Builder
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%X", "%q", "%d", "%T"} {
		fmt.Fprintf(&out, verb+" "+verb+"\n", s, holder)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "key", s, "holder", holder)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "key", s, "holder", holder)
	for _, form := range []string{plain, fmt.Sprintf("%x", plain), fmt.Sprintf("%X", plain), fmt.Sprintf("%d", []byte(plain)), fmt.Sprintf("%v", []byte(plain))[1:40]} {
		if strings.Contains(out.String(), form) {
			t.Errorf("printed the secret as %q in:\n%s", form, &out)
		}
	}
	if _, err := json.Marshal(holder); err == nil {
		t.Error("JSON encoded a secret")
	}
}

func TestTakeWipesItsSource(t *testing.T) {
	src := []byte(plain)
	s := secret.Take(src)
	defer s.Wipe()
	if string(s.Expose()) != plain {
		t.Errorf("Take kept %q", s.Expose())
	}
	if !bytes.Equal(src, make([]byte, len(plain))) {
		t.Error("Take left the source")
	}
}

func TestCloneHasItsOwnLife(t *testing.T) {
	s := secret.Take([]byte(plain))
	c := s.Clone()
	defer c.Wipe()
	if !s.Equal(c) {
		t.Error("a clone differs")
	}
	s.Wipe()
	s.Wipe()
	if s.Len() != 0 || string(c.Expose()) != plain {
		t.Errorf("after Wipe the original has %d bytes and the clone %q", s.Len(), c.Expose())
	}
	if s.Equal(c) {
		t.Error("a wiped secret equals a full one")
	}
}

func TestReadShort(t *testing.T) {
	if _, err := secret.Read(strings.NewReader("abc"), 4); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("short read gave %v", err)
	}
	s, err := secret.Read(strings.NewReader(plain+"more"), len(plain))
	if err != nil || string(s.Expose()) != plain {
		t.Errorf("Read = %q, %v", s.Expose(), err)
	}
	s.Wipe()
}

func TestZeroValue(t *testing.T) {
	var s secret.Bytes
	s.Wipe()
	if s.Len() != 0 || s.Clone().Len() != 0 || secret.New(0).Len() != 0 {
		t.Error("the zero value is not empty")
	}
}

// TestNewLocked: where memory cannot be locked, who needs it locked is told, and
// everybody else goes on.
func TestNewLocked(t *testing.T) {
	s, err := secret.NewLocked(5000)
	if err != nil || s.Len() != 5000 {
		t.Fatalf("NewLocked: %d bytes, %v", s.Len(), err)
	}
	s.Wipe()
	done := make(chan struct{})
	go func() { // on a thread of its own, which ends with it
		defer close(done)
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		var limit unix.Rlimit
		if err := errors.Join(unix.Capget(&header, &data[0]), unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit)); err != nil {
			t.Error(err)
			return
		}
		data[0].Effective &^= 1 << unix.CAP_IPC_LOCK
		if err := errors.Join(unix.Capset(&header, &data[0]), unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Max: limit.Max})); err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit) }()
		if s, err := secret.NewLocked(32); err == nil || s.Len() != 0 {
			t.Errorf("NewLocked without the right to lock: %d bytes, %v", s.Len(), err)
		}
		if err := secret.CheckLocking(); err == nil {
			t.Error("CheckLocking sees no trouble")
		}
		s := secret.New(32)
		defer s.Wipe()
		if s.Len() != 32 {
			t.Error("New gave nothing")
		}
	}()
	<-done
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.WriteFile(path("four"), []byte("abcd"), 0o600), os.WriteFile(path("empty"), nil, 0o600), unix.Mkfifo(path("pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, size := range [][2]int64{{4, 4}, {1, 4}, {4, 9}} {
		s, err := secret.ReadFile(path("four"), size[0], size[1])
		if err != nil || string(s.Expose()) != "abcd" {
			t.Errorf("%v: %q, %v", size, s.Expose(), err)
		}
		s.Wipe()
	}
	for _, tt := range []struct {
		name        string
		least, most int64
		says        string
	}{
		{"four", 5, 9, "regular file of 5 to 9 bytes"}, {"four", 1, 3, "regular file of 1 to 3 bytes"}, {"four", 32, 32, "regular file of 32 bytes"},
		{"empty", 1, 9, "regular file"}, {"pipe", 0, 9, "regular file"}, {".", 0, 1 << 20, "regular file"}, {"none", 1, 9, "no such file"},
	} {
		s, err := secret.ReadFile(path(tt.name), tt.least, tt.most)
		if err == nil || s.Len() != 0 || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), path(tt.name)) {
			t.Errorf("%s: %d bytes, %v", tt.name, s.Len(), err)
		}
	}
}

func TestRandom(t *testing.T) {
	a, b := secret.Random(32), secret.Random(32)
	defer a.Wipe()
	defer b.Wipe()
	if a.Len() != 32 || a.Equal(b) || bytes.Count(a.Expose(), []byte{0}) == 32 {
		t.Error("not random")
	}
}
