package worker_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
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

// A filesystem in use grows with its volume.
func TestKernelGrowFilesystems(t *testing.T) {
	for name, tools := range map[string]struct{ mkfs, grow, fsck []string }{
		"ext4": {[]string{"mkfs.ext4", "-q"}, []string{"resize2fs", "DEVICE"}, []string{"e2fsck", "-fn"}},
		"xfs":  {[]string{"mkfs.xfs", "-q", "-f", "-K"}, []string{"xfs_growfs", "DIR"}, []string{"xfs_repair", "-n"}},
	} {
		for _, sort := range sorts[:2] {
			t.Run(name+", "+sort.name, func(t *testing.T) {
				kernel.Need(t, name, "exec:"+tools.mkfs[0], "exec:"+tools.grow[0], "exec:"+tools.fsck[0])
				f, m := newSealed(t, 400*mib, sort.layout, sort.without)
				errorsBefore := authErrors(t)
				run(t, nil, tools.mkfs[0], append(tools.mkfs[1:], m.Path)...)
				dir := t.TempDir()
				run(t, nil, "mount", "-t", name, m.Path, dir)
				before := room(t, dir)
				files := map[string][]byte{}
				stop, done := make(chan struct{}), make(chan struct{})
				go func() { // keeps writing while everything below changes
					defer close(done)
					for i := 0; ; i++ {
						select {
						case <-stop:
							return
						default:
							file := fmt.Sprint("during-", i%16)
							files[file] = noise(256 << 10)
							writeFile(t, filepath.Join(dir, file), files[file])
						}
					}
				}()
				kernel.Grow(t, f.v.Device, 440*mib)
				m = f.resize(t)
				to := strings.NewReplacer("DEVICE", m.Path, "DIR", dir).Replace(tools.grow[1])
				run(t, nil, tools.grow[0], to)
				close(stop)
				<-done
				if after := room(t, dir); after < before+30*mib {
					t.Errorf("the filesystem has %d bytes after %d", after, before)
				}
				for i := range 2 { // before and after it is hydrated
					for file, want := range files {
						if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || !bytes.Equal(got, want) {
							t.Errorf("%s is %d other bytes, %v", file, len(got), err)
						}
					}
					run(t, nil, "umount", dir)
					run(t, nil, tools.fsck[0], append(tools.fsck[1:], m.Path)...)
					if i == 0 {
						m = f.settled(t)
						f.close(t)
						f.open(t)
						run(t, nil, "mount", "-t", name, m.Path, dir)
					}
				}
				if n := authErrors(t) - errorsBefore; n != 0 {
					t.Errorf("%d sectors were not authentic", n)
				}
			})
		}
	}
}

func room(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks) * st.Bsize
}

// halfGrown is a volume of a sort, on a disk of 48 MiB after 32, whose growth was
// cut when the token told of it and the integrity layer was longer, and that is
// closed. steps is how many of Resize's were done.
func halfGrown(t *testing.T, i, steps int) (*fixture, cryptmapper.Mapping) {
	t.Helper()
	f, m := newSealed(t, 32*mib, sorts[i].layout, sorts[i].without)
	kernel.Grow(t, f.v.Device, 48*mib)
	if err := (&killing{fixture: f}).at(t, i, steps)(&killing{fixture: f}); err == nil {
		t.Fatal("Resize was not killed")
	}
	return f, m
}

// What a host does to the disk in the middle of a growth: to what says how long
// the integrity layer is, to the disk's length, to the header.
func TestKernelGrowAttacked(t *testing.T) {
	const grown = 5 // the step of Resize after which the integrity layer is longer
	for i, sort := range sorts[:2] {
		sectors := func(t *testing.T, f *fixture, change func(old uint64) uint64) {
			b := readAt(t, f.v.Device, 16*mib+16, 8)
			writeAt(t, f.v.Device, 16*mib+16, binary.LittleEndian.AppendUint64(nil, change(binary.LittleEndian.Uint64(b))))
		}
		for name, number := range map[string]func(uint64) uint64{
			"lowered": func(uint64) uint64 { return 2048 },
			"raised":  func(old uint64) uint64 { return old + 8 },
		} {
			t.Run(sort.name+", sectors "+name, func(t *testing.T) {
				f, m := halfGrown(t, i, grown)
				sectors(t, f, number)
				now := f.resize(t) // the kernel does not read it again
				if now.Size < m.Size+14*mib-8192 {
					t.Errorf("%d bytes after %d", now.Size, m.Size)
				}
				f.holds(t, map[int64]string{0: "grows"})
				f.close(t)

				f, m = halfGrown(t, i, grown)
				f.close(t)
				was := readAt(t, f.v.Device, 16*mib, 4096)
				sectors(t, f, number)
				f.refused(t, errdefs.ErrState, "superblock of device")
				writeAt(t, f.v.Device, 16*mib, was)
				if now := f.open(t); now.Size != m.Size {
					t.Errorf("reopened with %d bytes, had %d", now.Size, m.Size)
				}
				f.resize(t)
				f.holds(t, map[int64]string{0: "grows"})
			})
		}
		t.Run(sort.name+", disk cut", func(t *testing.T) {
			f, m := halfGrown(t, i, grown)
			kernel.Grow(t, f.v.Device, 32*mib)
			if _, err := f.Resize(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "it was shrunk again") {
				t.Errorf("growing on a disk that was shrunk: %v", err)
			}
			f.holds(t, map[int64]string{0: "grows", m.Size - 1: "\x00"})
			f.close(t)
			f.refused(t, errdefs.ErrState, "superblock of device")
			kernel.Grow(t, f.v.Device, 48*mib)
			f.open(t)
			f.resize(t)
			f.settled(t)
			f.close(t)
			kernel.Grow(t, f.v.Device, 32*mib)
			f.refused(t, errdefs.ErrState, "it was shrunk or another one was put in its place")
		})
		t.Run(sort.name+", header rolled back", func(t *testing.T) {
			f, m := newSealed(t, 32*mib, sort.layout, sort.without)
			before := readAt(t, f.v.Device, 0, 16*mib)
			kernel.Grow(t, f.v.Device, 48*mib)
			_ = (&killing{fixture: f}).at(t, i, grown)(&killing{fixture: f})
			f.close(t)
			during := readAt(t, f.v.Device, 0, 16*mib)
			writeAt(t, f.v.Device, 0, before)
			if now := f.open(t); now.Size != m.Size {
				t.Errorf("%d bytes after %d", now.Size, m.Size)
			}
			f.resize(t)
			f.settled(t)
			f.close(t)
			for name, old := range map[string][]byte{"before": before, "during": during} {
				writeAt(t, f.v.Device, 0, old)
				f.refused(t, errdefs.ErrState, "rolled back")
				t.Log(name)
			}
		})
	}
}

// Mappings that something left suspended in the middle of a growth go on with
// the next call, whichever it is.
func TestKernelGrowSuspended(t *testing.T) {
	for i, sort := range sorts[:2] {
		for name, call := range map[string]func(f *fixture) error{
			"Open":   func(f *fixture) error { _, err := f.Open(t.Context(), f.v, f.d); return err },
			"Resize": func(f *fixture) error { _, err := f.Resize(t.Context(), f.v, f.d); return err },
			"Close":  func(f *fixture) error { return f.Close(t.Context(), f.v.Name) },
		} {
			t.Run(sort.name+", "+name, func(t *testing.T) {
				f, _ := halfGrown(t, i, 4) // the longer table is loaded
				for suffix := range strings.FieldsSeq(f.layers(t)) {
					if err := dm.Suspend(f.v.Name + suffix); err != nil {
						t.Fatal(err)
					}
				}
				if err := dm.Suspend(f.v.Name); err != nil {
					t.Fatal(err)
				}
				if err := call(f); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				f.open(t)
				f.resize(t)
				f.holds(t, map[int64]string{0: "grows"})
			})
		}
	}
}
