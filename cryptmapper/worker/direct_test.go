package worker_test

import (
	"bytes"
	"context"
	"errors"
	"io"
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

func newDirect(t *testing.T, size int64) *fixture {
	t.Helper()
	f := newFixture(t, size, dek.IntegrityHMAC)
	f.d.Spec.IntegrityMode = dek.ModeDirect
	return f
}

// TestKernelDirect: the kernel's table says what the record says, whatever else
// happens to the volume.
func TestKernelDirect(t *testing.T) {
	f := newDirect(t, 40*mib)
	if m := f.made(t, "content"); !m.Direct || m.Integrity != dek.IntegrityHMAC {
		t.Errorf("made: %+v", m)
	}
	journal := *f
	journal.d.Spec.IntegrityMode = ""
	if _, err := journal.Open(t.Context(), f.v, journal.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "integrity mode is D and must be J") {
		t.Errorf("open, and the record says journal: %v", err)
	}
	f.close(t)
	m := f.open(t)
	if got := string(readAt(t, m.Path, 0, 7)); !m.Direct || got != "content" {
		t.Errorf("opened again: %+v, %q", m, got)
	}
	kernel.Grow(t, f.v.Device, 72*mib)
	grown, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil || grown.Size < m.Size+24*mib || !grown.Direct {
		t.Fatalf("Resize = %+v, %v", grown, err)
	}
	f.confirm(grown)
	f.close(t)
	f.v.ReadOnly = true
	if m = f.open(t); !m.Direct || !m.ReadOnly {
		t.Errorf("read-only: %+v", m)
	}
	if all := readAt(t, m.Path, 0, int(m.Size)); string(all[:7]) != "content" || !bytes.Equal(all[7:], make([]byte, m.Size-7)) {
		t.Error("the volume does not read as it was written")
	}
}

// A worker that dies while it wipes the volume leaves a mapping with the very
// table that the finished one has: what it had not wiped must not be taken for
// wiped.
func TestKernelDirectKilledAtSteps(t *testing.T) {
	stride := 4
	if os.Getenv("CRASH_EVERY") == "1" {
		stride = 1
	}
	for step := 1; ; step += stride {
		f := newDirect(t, 24*mib)
		_, killed := newMapper(t, step).Open(t.Context(), f.v, f.d)
		m := f.open(t)
		if got := readAt(t, m.Path, 0, int(m.Size)); !bytes.Equal(got, make([]byte, m.Size)) {
			t.Fatalf("step %d: the new volume is not zeros", step)
		}
		f.close(t)
		if killed == nil {
			t.Logf("up to step %d", step-stride)
			return
		}
	}
}

// TestKernelCrashWithoutJournal measures what the direct mode costs: the disk is
// copied at an instant when something was written and not flushed, which is
// what a crash of the node leaves.
func TestKernelCrashWithoutJournal(t *testing.T) {
	for name, mode := range map[string]string{"journal": "", "direct": dek.ModeDirect} {
		t.Run(name, func(t *testing.T) {
			f := newDirect(t, 64*mib)
			f.d.Spec.IntegrityMode = mode
			m := f.made(t, "")
			const blocks = 64
			unflushed(t, m.Path, 8*mib, bytes.Repeat([]byte("new."), blocks*1024))
			copied := f.crashed(t)
			after := dm.Path(copied.v.Name)
			bad := 0
			for i := range int64(blocks) {
				if !readable(t, after, 8*mib+i*4096) {
					bad++
				}
			}
			if (bad > 0) != (mode == dek.ModeDirect) {
				t.Errorf("%d of %d blocks are unreadable after a crash", bad, blocks)
			}
			t.Logf("%d of %d blocks are unreadable after a crash", bad, blocks)
			for off := int64(0); off < m.Size; off += mib {
				if (off < 8*mib || off >= 9*mib) && !readable(t, after, off) {
					t.Errorf("what was written and flushed before is unreadable at %d", off)
				}
			}
			unflushed(t, after, 8*mib, bytes.Repeat([]byte("then"), blocks*1024))
			if got := string(readAt(t, after, 8*mib, 4)); got != "then" {
				t.Errorf("written again it reads %q", got)
			}
		})
	}
}

// crashed opens a copy of the disk as it is now, while f is in use.
func (f *fixture) crashed(t *testing.T) *fixture {
	t.Helper()
	name, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(f.v.Device), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(strings.TrimSpace(string(name)))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil {
		t.Fatal(err)
	}
	g := *f
	g.v.Name, g.v.Device = cryptmapper.Prefix+"t"+dek.NewUUID(), kernel.Loop(t, info.Size())
	to, err := os.OpenFile(g.v.Device, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	b := make([]byte, mib)
	for off := int64(0); off < info.Size(); off += mib {
		n, err := from.ReadAt(b, off)
		if err == nil || errors.Is(err, io.EOF) {
			if err = nil; !bytes.Equal(b[:n], make([]byte, n)) { // the rest is zeros
				_, err = to.WriteAt(b[:n], off)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = g.Close(context.Background(), g.v.Name) })
	g.open(t)
	return &g
}

// unflushed writes past the page cache, and flushes nothing.
func unflushed(t *testing.T, path string, offset int64, b []byte) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt(alignedCopy(b), offset); err != nil {
		t.Fatal(err)
	}
}

// alignedCopy is b where direct I/O can use it.
func alignedCopy(b []byte) []byte {
	page, err := unix.Mmap(-1, 0, len(b), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	copy(page, b)
	return page
}

// readable tells whether a block reads without an error.
func readable(t *testing.T, path string, offset int64) bool {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_, err = file.ReadAt(alignedCopy(make([]byte, 4096)), offset)
	return err == nil
}
