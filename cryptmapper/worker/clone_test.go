package worker_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// newCloned is a volume with the layout clone.
func newCloned(t *testing.T, size int64) *fixture {
	t.Helper()
	f := newFixture(t, size, dek.IntegrityHMAC)
	kernel.Need(t, "dm-clone", "dm-zero")
	f.d.Spec.Layout = dek.LayoutClone
	return f
}

// hydrate lets the open volume hydrate and waits until it is done.
func (f *fixture) hydrate(t *testing.T) {
	t.Helper()
	if err := f.Hydrate(f.v.Name, true); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		m := f.listed(t)
		if m.Regions > 0 && m.Hydrated == m.Regions {
			return
		}
		if !m.Hydrating || time.Now().After(deadline) {
			t.Fatalf("not hydrated: %+v", m)
		}
	}
}

// listed is the volume's mapping as List has it.
func (f *fixture) listed(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	list, err := f.List()
	if err != nil || len(list) != 1 || list[0].Name != f.v.Name {
		t.Fatalf("List = %+v, %v", list, err)
	}
	return list[0]
}

func (f *fixture) finish(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	m, err := f.Finish(t.Context(), f.v, f.d)
	if err != nil {
		t.Fatalf("Finish: %v", err)
	}
	return m
}

// layers are the names of all mappings that begin with the volume's.
func (f *fixture) layers(t *testing.T) string {
	t.Helper()
	all, err := dm.List()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range all {
		if suffix, ok := strings.CutPrefix(m.Name, f.v.Name); ok {
			names = append(names, suffix)
		}
	}
	return strings.Join(names, " ")
}

// zeros fails unless the whole device reads as zeros.
func zeros(t *testing.T, path string) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	b, none := make([]byte, mib), make([]byte, mib)
	for at := int64(0); ; at += mib {
		n, err := file.ReadAt(b, at)
		if !bytes.Equal(b[:n], none[:n]) {
			t.Fatalf("%s is not zeros at %d", path, at)
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("reading %s at %d: %v", path, at, err)
		}
	}
}

// A new volume is ready without a wipe, reads as zeros, and is an ordinary one
// when all of it was written once.
func TestKernelClone(t *testing.T) {
	f := newCloned(t, 300*mib)
	kernel.Need(t, "exec:cryptsetup")
	writeAt(t, f.v.Device, 16*mib, bytes.Repeat([]byte("old "), 8*mib/4))
	m := f.open(t)
	if m.Made || m.Integrity != dek.IntegrityHMAC || m.Regions == 0 || m.Hydrating || m.Hydrated == m.Regions || m.Backing == "" {
		t.Errorf("a new mapping is %+v", m)
	}
	if f.layers(t) == "" {
		t.Error("no layers")
	}
	zeros(t, m.Path)
	made := f.made(t, "hello")
	if made.Size != m.Size {
		t.Errorf("made is %+v, was %+v", made, m)
	}
	if _, err := f.Finish(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "% done") {
		t.Errorf("Finish before it is hydrated: %v", err)
	}
	f.close(t)
	if left := f.layers(t); left != "" {
		t.Errorf("Close left %s", left)
	}
	m = f.open(t)
	if m.Header != made.Header || string(readAt(t, m.Path, 0, 5)) != "hello" {
		t.Errorf("reopened: %+v", m)
	}
	began := time.Now()
	f.hydrate(t)
	t.Logf("hydrated %d MiB in %v", m.Size/mib, time.Since(began))
	done := f.finish(t)
	if done.Header.Sequence != made.Header.Sequence+1 || done.Regions != 0 || done.Size != m.Size || !done.Made {
		t.Errorf("finished: %+v", done)
	}
	f.confirm(done)
	if again := f.finish(t); again != done {
		t.Errorf("Finish again: %+v, want %+v", again, done)
	}
	if again := f.open(t); again != done {
		t.Errorf("opened again: %+v, want %+v", again, done)
	}
	f.close(t)
	run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
	if got := string(readAt(t, dm.Path(f.v.Name), 0, 5)); got != "hello" {
		t.Errorf("cryptsetup reads %q", got)
	}
	run(t, nil, "cryptsetup", "close", f.v.Name)
	m = f.open(t)
	if m.Regions != 0 || string(readAt(t, m.Path, 0, 5)) != "hello" {
		t.Errorf("reopened after it was finished: %+v", m)
	}
	writeAt(t, m.Path, 0, make([]byte, 5))
	f.close(t)
	zeros(t, f.open(t).Path)
}
