package worker_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// node is one of two that have a volume open: each has a device, and a page
// cache, of its own over one disk.
type node struct {
	*fixture
	t *testing.T
}

// newNodes returns a volume that is made and open on both.
func newNodes(t *testing.T) (a, b *node) {
	t.Helper()
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	f.made(t, "shared")
	other := *f
	other.v.Device, other.v.Name = again(t, f.v.Device), f.v.Name+"b"
	t.Cleanup(func() {
		if err := f.Close(context.Background(), other.v.Name); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	a, b = &node{f, t}, &node{&other, t}
	a.sees(a.open(t))
	b.sees(b.open(t))
	return a, b
}

// again is another loop device over the file of that one.
func again(t *testing.T, device string) string {
	t.Helper()
	path, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(strings.TrimSpace(string(path)), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	other, err := kernel.Attach(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := kernel.Detach(other); err != nil {
			t.Errorf("detaching: %v", err)
		}
	})
	return other
}

func (n *node) sees(m cryptmapper.Mapping) {
	n.t.Helper()
	if got := string(readAt(n.t, m.Path, 0, 6)); got != "shared" {
		n.t.Errorf("%s holds %q", n.v.Name, got)
	}
}

// One node grows a volume and confirms that; the other, which has it open, finds
// the new header on the disk whatever it has of the old one in memory.
func TestKernelSharedDiskGrows(t *testing.T) {
	for name, find := range map[string]func(n *node) (cryptmapper.Mapping, error){
		"expanded": func(n *node) (cryptmapper.Mapping, error) { return n.Resize(n.t.Context(), n.v, n.d) },
		"staged":   func(n *node) (cryptmapper.Mapping, error) { return n.Open(n.t.Context(), n.v, n.d) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newNodes(t)
			kernel.Grow(t, a.v.Device, 80*mib)
			kernel.Grow(t, b.v.Device, 80*mib)
			m, err := b.Resize(t.Context(), b.v, b.d)
			if err != nil || m.Size != 64*mib {
				t.Fatalf("Resize there = %+v, %v", m, err)
			}
			b.confirm(m)
			a.d.Header = b.d.Header // what it gets from the record
			m, err = find(a)
			if err != nil || m.Size != 64*mib || m.Header != b.d.Header {
				t.Errorf("here = %+v, %v", m, err)
			}
			a.sees(m)
		})
	}
}

// The same where the other one only reads.
func TestKernelSharedDiskGrowsUnderAReader(t *testing.T) {
	a, b := newNodes(t)
	a.close(t)
	a.v.ReadOnly = true
	a.sees(a.open(t))
	kernel.Grow(t, a.v.Device, 80*mib)
	kernel.Grow(t, b.v.Device, 80*mib)
	m, err := b.Resize(t.Context(), b.v, b.d)
	if err != nil {
		t.Fatal(err)
	}
	b.confirm(m)
	a.d.Header = b.d.Header
	if m = a.open(t); !m.ReadOnly || m.Size != 64*mib {
		t.Errorf("here = %+v", m)
	}
	a.sees(m)
}

// One node gives the volume another key while the other has it open.
func TestKernelSharedDiskGetsAnotherKey(t *testing.T) {
	a, b := newNodes(t)
	b.asCopy()
	m := b.open(t)
	if m.Header.Fingerprint != dek.Fingerprint(b.d.Key) {
		t.Fatalf("not under the new key: %+v", m)
	}
	b.confirm(m)
	b.d.Header.Fingerprint = ""
	a.d = b.d
	m = a.open(t)
	if m.Header != b.d.Header {
		t.Errorf("the header is %+v, confirmed is %+v", m.Header, b.d.Header)
	}
	a.sees(m)
	if m, err := a.Resize(t.Context(), a.v, a.d); err != nil || m.Header != b.d.Header {
		t.Errorf("Resize = %+v, %v", m, err)
	}
}
