package worker_test

import (
	"bytes"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// A volume with integrity grows while it is open, several times; what was
// written stays, what is new reads as zeros and can be written.
func TestKernelGrow(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityHMAC)
	m := f.made(t, "grows")
	if same, err := f.Resize(t.Context(), f.v, f.d); err != nil || same != m {
		t.Fatalf("Resize without growth: %+v, %v", same, err)
	}
	marks := map[int64]string{0: "grows"}
	for _, size := range []int64{41 * mib, 64 * mib, 101*mib + 512} {
		kernel.Grow(t, f.v.Device, size)
		grown := f.resize(t)
		if grown.Size <= m.Size || grown.Header.Sequence <= m.Header.Sequence || grown.Path != m.Path {
			t.Fatalf("Resize to a device of %d bytes = %+v, was %+v", size, grown, m)
		}
		if !bytes.Equal(readAt(t, m.Path, m.Size, int(grown.Size-m.Size)), make([]byte, grown.Size-m.Size)) {
			t.Errorf("the new space of %d bytes is not zero", grown.Size-m.Size)
		}
		marks[m.Size-4], marks[grown.Size-99] = "across the old end", "new end"
		for at, text := range marks {
			writeAt(t, m.Path, at, []byte(text))
		}
		m = grown
	}
	for range 2 {
		f.holds(t, marks)
		f.close(t)
		if again := f.open(t); again.Size != m.Size || again.Header != m.Header {
			t.Errorf("reopened: %+v, was %+v", again, m)
		}
	}
	f.close(t)
	f.plain(t, m.Size, marks)
}

// resize resizes and confirms.
func (f *fixture) resize(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	m, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil {
		t.Fatalf("Resize: %v", err)
	}
	f.confirm(m)
	return m
}

// holds reads what was written into the open volume.
func (f *fixture) holds(t *testing.T, marks map[int64]string) {
	t.Helper()
	m := f.open(t)
	for at, want := range marks {
		if got := string(readAt(t, m.Path, at, len(want))); got != want {
			t.Errorf("at %d: %q, want %q", at, got, want)
		}
	}
	readAt(t, m.Path, 0, int(m.Size)) // no sector without a tag
}

// plain opens the closed volume by an ordinary cryptsetup, and reads all of it.
func (f *fixture) plain(t *testing.T, size int64, marks map[int64]string) {
	t.Helper()
	kernel.Need(t, "exec:cryptsetup")
	run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
	path := "/dev/mapper/" + f.v.Name
	for at, want := range marks {
		if got := string(readAt(t, path, at, len(want))); got != want {
			t.Errorf("cryptsetup reads %q at %d, want %q", got, at, want)
		}
	}
	readAt(t, path, 0, int(size))
	run(t, nil, "cryptsetup", "close", f.v.Name)
}
