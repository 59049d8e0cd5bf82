package worker_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
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
			f, m := newSealed(t, 24*mib, sort.layout, sort.without)
			if same, err := f.Resize(t.Context(), f.v, f.d); err != nil || same != m {
				t.Fatalf("Resize without growth: %+v, %v", same, err)
			}
			marks := map[int64]string{0: "grows"}
			for _, size := range []int64{25 * mib, 32 * mib, 49*mib + 512} {
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
			f, m := newSealed(t, 24*mib, sort.layout, false)
			marks := map[int64]string{0: "grows", m.Size - 8: "old end."}
			writeAt(t, m.Path, m.Size-8, []byte("old end."))
			f.close(t)
			for _, size := range []int64{32 * mib, 56 * mib} {
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
		"xfs":  {[]string{"mkfs.xfs", "--unsupported", "-q", "-f", "-K"}, []string{"xfs_growfs", "DIR"}, []string{"xfs_repair", "-n"}},
	} {
		for _, sort := range sorts[:2] {
			t.Run(name+", "+sort.name, func(t *testing.T) {
				kernel.Need(t, name, "exec:"+tools.mkfs[0], "exec:"+tools.grow[0], "exec:"+tools.fsck[0])
				f, m := newSealed(t, 112*mib, sort.layout, sort.without)
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
				kernel.Grow(t, f.v.Device, 152*mib)
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

// attacked is a volume whose growth is cut again and again, and that a host then
// does something to.
type attacked struct {
	*fixture
	i    int // of sorts
	disk int64
}

func newAttacked(t *testing.T, i int) *attacked {
	t.Helper()
	f, _ := newSealed(t, 24*mib, sorts[i].layout, sorts[i].without)
	return &attacked{f, i, 24 * mib}
}

// half lets the disk grow by 8 MiB and cuts the volume's growth after so many of
// Resize's steps. It returns the mapping as it was before.
func (a *attacked) half(t *testing.T, steps int) cryptmapper.Mapping {
	t.Helper()
	before := a.settled(t)
	a.disk += 8 * mib
	kernel.Grow(t, a.v.Device, a.disk)
	k := &killing{fixture: a.fixture}
	if err := k.at(t, a.i, steps)(k); err == nil {
		t.Fatal("Resize was not killed")
	}
	return before
}

// grows lets the growth go on, and finishes it.
func (a *attacked) grows(t *testing.T, before cryptmapper.Mapping) {
	t.Helper()
	if now := a.resize(t); now.Size < before.Size+7*mib {
		t.Errorf("%d bytes after %d", now.Size, before.Size)
	}
	a.holds(t, map[int64]string{0: "grows"})
}

// longer is the step of Resize after which the integrity layer is longer, and the
// token tells of the growth.
const longer = 5

// What a host does to the disk in the middle of a growth: to what says how long
// the integrity layer is, to the header, to the disk's length.
func TestKernelGrowAttacked(t *testing.T) {
	for i, sort := range sorts[:2] {
		t.Run(sort.name, func(t *testing.T) {
			a := newAttacked(t, i)
			for name, number := range map[string]func(uint64) uint64{
				"lowered": func(uint64) uint64 { return 2048 },
				"raised":  func(old uint64) uint64 { return old + 8 },
			} {
				t.Run("sectors "+name+", open", func(t *testing.T) { a.sectorsWhileOpen(t, number) })
				t.Run("sectors "+name+", closed", func(t *testing.T) { a.sectorsWhileClosed(t, number) })
			}
			t.Run("superblock changed while open", a.superblockWhileOpen)
			t.Run("header rolled back", a.headerRolledBack)
			t.Run("disk cut", a.diskCut) // the last: nothing grows after it
		})
	}
}

// sectors changes the number of sectors in dm-integrity's superblock.
func (a *attacked) sectors(t *testing.T, change func(old uint64) uint64) {
	t.Helper()
	b := readAt(t, a.v.Device, 16*mib+16, 8)
	writeAt(t, a.v.Device, 16*mib+16, binary.LittleEndian.AppendUint64(nil, change(binary.LittleEndian.Uint64(b))))
}

func (a *attacked) sectorsWhileOpen(t *testing.T, number func(uint64) uint64) {
	before := a.half(t, longer)
	was := readAt(t, a.v.Device, 16*mib, 4096)
	a.sectors(t, number)
	a.grows(t, before) // the kernel does not read it again
	writeAt(t, a.v.Device, 16*mib, was)
}

func (a *attacked) sectorsWhileClosed(t *testing.T, number func(uint64) uint64) {
	before := a.half(t, longer)
	a.close(t)
	was := readAt(t, a.v.Device, 16*mib, 4096)
	a.sectors(t, number)
	a.refused(t, errdefs.ErrState, "superblock of device")
	writeAt(t, a.v.Device, 16*mib, was)
	if now := a.open(t); now.Size != before.Size {
		t.Errorf("reopened with %d bytes, had %d", now.Size, before.Size)
	}
	a.grows(t, before)
}

// superblockWhileOpen: the kernel reads the superblock again when it is given the
// longer table. With another one the volume would be looked for elsewhere.
func (a *attacked) superblockWhileOpen(t *testing.T) {
	const noted = 3 // the step of Resize after which the token tells of the growth
	before := a.half(t, noted)
	was := readAt(t, a.v.Device, 16*mib, 4096)
	for what, change := range map[string]struct {
		at int64
		to []byte
	}{
		"interleaving": {9, []byte{12}}, "journal": {12, []byte{2, 0}}, "no superblock": {0, []byte("x")}, "flags": {24, []byte{8 | 2}},
	} {
		writeAt(t, a.v.Device, 16*mib+change.at, change.to)
		if m, err := a.Resize(t.Context(), a.v, a.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "superblock of device") {
			t.Errorf("%s: Resize = %+v, %v", what, m, err)
		}
		a.holds(t, map[int64]string{0: "grows"}) // it is as it was, and can be used
		writeAt(t, a.v.Device, 16*mib, was)
	}
	a.grows(t, before)
}

func (a *attacked) headerRolledBack(t *testing.T) {
	a.settled(t)
	old := map[string][]byte{"before": readAt(t, a.v.Device, 0, 16*mib)}
	before := a.half(t, longer)
	a.close(t)
	old["during"] = readAt(t, a.v.Device, 0, 16*mib)
	writeAt(t, a.v.Device, 0, old["before"])
	if now := a.open(t); now.Size != before.Size {
		t.Errorf("%d bytes after %d", now.Size, before.Size)
	}
	a.grows(t, before)
	a.settled(t)
	a.close(t)
	newest := readAt(t, a.v.Device, 0, 16*mib)
	for name, header := range old {
		t.Log(name)
		writeAt(t, a.v.Device, 0, header)
		a.refused(t, errdefs.ErrState, "rolled back")
	}
	writeAt(t, a.v.Device, 0, newest)
	a.open(t)
}

func (a *attacked) diskCut(t *testing.T) {
	before := a.half(t, longer)
	kernel.Grow(t, a.v.Device, a.disk-8*mib)
	if _, err := a.Resize(t.Context(), a.v, a.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "it was shrunk again") {
		t.Errorf("growing on a disk that was shrunk: %v", err)
	}
	a.holds(t, map[int64]string{0: "grows", before.Size - 1: "\x00"})
	a.close(t)
	a.refused(t, errdefs.ErrState, "superblock of device")
	kernel.Grow(t, a.v.Device, a.disk)
	a.open(t)
	a.grows(t, before)
	a.settled(t)
	a.close(t)
	kernel.Grow(t, a.v.Device, a.disk-8*mib)
	a.refused(t, errdefs.ErrState, "it was shrunk or another one was put in its place")
}

// Mappings that something left suspended in the middle of a growth go on with
// the next call, whichever it is.
func TestKernelGrowSuspended(t *testing.T) {
	const loaded = 4 // the step of Resize after which the longer table is loaded
	for i, sort := range sorts[:2] {
		t.Run(sort.name, func(t *testing.T) {
			a := newAttacked(t, i)
			for name, call := range map[string]func() error{
				"Open":   func() error { _, err := a.Open(t.Context(), a.v, a.d); return err },
				"Resize": func() error { _, err := a.Resize(t.Context(), a.v, a.d); return err },
				"Close":  func() error { return a.Close(t.Context(), a.v.Name) },
				"Resume": func() error { return a.Mapper.Resume(t.Context(), a.v.Name) },
			} {
				before := a.half(t, loaded)
				for suffix := range strings.FieldsSeq(a.layers(t)) {
					if err := dm.Suspend(a.v.Name + suffix); err != nil {
						t.Fatal(err)
					}
				}
				if err := dm.Suspend(a.v.Name); err != nil {
					t.Fatal(err)
				}
				if err := call(); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if list, err := a.List(); err != nil || slices.ContainsFunc(list, func(m cryptmapper.Mapping) bool { return m.Suspended }) {
					t.Errorf("after %s: %+v, %v", name, list, err)
				}
				a.open(t)
				a.grows(t, before)
			}
		})
	}
}
