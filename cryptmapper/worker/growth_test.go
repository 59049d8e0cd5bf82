package worker_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// sorts of volumes that grow with integrity.
var sorts = []struct {
	name, layout string
	without      bool // dm-clone in the kernel
}{
	{"wiped", "", false},
	{"clone", dek.LayoutClone, false},
	{"clone without dm-clone", dek.LayoutClone, true},
}

// newSealed is a finished volume of a sort; what was to hydrate is hydrated.
func newSealed(t *testing.T, size int64, layout string, without bool) (*fixture, cryptmapper.Mapping) {
	t.Helper()
	f := newFixture(t, size, dek.IntegrityHMAC)
	if f.d.Spec.Layout = layout; layout == dek.LayoutClone && !without {
		kernel.Need(t, "dm-clone", "dm-zero")
	}
	f.Mapper = cryptmapper.New(cryptmapper.Options{Worker: []string{"../../bin/crypt-worker"}, LockDir: "/run/cryptcsi-test", WithoutClone: without})
	t.Cleanup(f.Shutdown)
	f.made(t, "grows")
	return f, f.settled(t)
}

// settled hydrates and finishes the open volume, if there is anything to.
func (f *fixture) settled(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	if f.listed(t).Regions > 0 {
		f.hydrate(t)
	}
	m := f.finish(t)
	f.confirm(m)
	return m
}

// A volume with integrity grows while it is open, several times; what was
// written stays, what is new reads as zeros and can be written.
func TestKernelGrow(t *testing.T) {
	for _, sort := range sorts {
		t.Run(sort.name, func(t *testing.T) {
			f, m := newSealed(t, 40*mib, sort.layout, sort.without)
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
				if hydrates := sort.name == "clone"; (grown.Regions > 0) != hydrates {
					t.Errorf("hydrates: %+v", grown)
				}
				if !bytes.Equal(readAt(t, m.Path, m.Size, int(grown.Size-m.Size)), make([]byte, grown.Size-m.Size)) {
					t.Errorf("the new space of %d bytes is not zero", grown.Size-m.Size)
				}
				marks[m.Size-4], marks[grown.Size-99] = "across the old end", "new end"
				for at, text := range marks {
					writeAt(t, m.Path, at, []byte(text))
				}
				f.holds(t, marks)
				if grown.Regions > 0 {
					kernel.Grow(t, f.v.Device, size+mib)
					if _, err := f.Resize(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "% done; it grows when that is done") {
						t.Errorf("growing while it hydrates: %v", err)
					}
				}
				m = f.settled(t)
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
		})
	}
}

// A volume whose disk has grown opens at its size, whatever the kernel has noted
// on the disk, and has no more than the sectors that it had.
func TestKernelDiskHasGrown(t *testing.T) {
	for _, sort := range sorts[:2] {
		t.Run(sort.name, func(t *testing.T) {
			f, m := newSealed(t, 40*mib, sort.layout, false)
			marks := map[int64]string{0: "grows", m.Size - 8: "old end."}
			writeAt(t, m.Path, m.Size-8, []byte("old end."))
			f.close(t)
			for _, size := range []int64{48 * mib, 80 * mib} {
				kernel.Grow(t, f.v.Device, size)
				for _, f.v.ReadOnly = range []bool{false, true} {
					if now := f.open(t); now.Size != m.Size || now.Header != m.Header {
						t.Errorf("on a disk of %d: %+v, was %+v", size, now, m)
					}
					f.holds(t, marks)
					f.close(t)
				}
				f.plain(t, m.Size, marks) // after which the superblock has the larger number
			}
			f.v.ReadOnly = true
			f.open(t)
			if _, err := f.Resize(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "read-only") {
				t.Errorf("growing read-only: %v", err)
			}
			f.close(t)
			f.v.ReadOnly = false
			f.open(t)
			if grown := f.resize(t); grown.Size < m.Size+30*mib {
				t.Errorf("grown at last: %+v", grown)
			}
			f.holds(t, marks)
		})
	}
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
