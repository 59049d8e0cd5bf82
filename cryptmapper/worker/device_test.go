package worker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// A device gives back what was written, at any place and of any length, and
// leaves alone what is beside it, whatever its sectors; the page cache shows the
// same.
func TestKernelDevice(t *testing.T) {
	for _, tt := range []struct {
		sector int
		size   int64
	}{{512, 1<<20 + 512}, {4096, 1 << 20}} {
		t.Run(fmt.Sprint(tt.sector), func(t *testing.T) {
			kernel.Need(t, "root", "loop")
			path := kernel.Loop(t, tt.size)
			sectors(t, path, tt.sector)
			d, err := openDevice(path, true)
			if err != nil {
				t.Fatal(err)
			}
			defer d.close()
			if d.sector != tt.sector || d.size != tt.size {
				t.Fatalf("sectors of %d and %d bytes", d.sector, d.size)
			}
			want := make([]byte, tt.size)
			if _, err := io.ReadFull(io.NewSectionReader(d.file, 0, tt.size), make([]byte, tt.size)); err != nil { // into the page cache
				t.Fatal(err)
			}
			r := rand.New(rand.NewPCG(1, 2))
			for range 200 {
				n := 1 + r.Int64N(20000)
				off := r.Int64N(tt.size - n + 1)
				for i := off; i < off+n; i++ {
					want[i] = byte(r.Uint32())
				}
				if done, err := d.WriteAt(want[off:off+n], off); err != nil || int64(done) != n {
					t.Fatalf("writing %d bytes at %d: %d, %v", n, off, done, err)
				}
				n = 1 + r.Int64N(20000)
				off = r.Int64N(tt.size - n + 1)
				got := make([]byte, n)
				if done, err := d.ReadAt(got, off); err != nil || int64(done) != n || !bytes.Equal(got, want[off:off+n]) {
					t.Fatalf("reading %d bytes at %d: %d, %v", n, off, done, err)
				}
			}
			if err := d.Sync(); err != nil {
				t.Error(err)
			}
			got := make([]byte, tt.size)
			if _, err := d.file.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("through the page cache it is something else (%v)", err)
			}
			if n, err := d.ReadAt(make([]byte, 1000), tt.size-700); n != 700 || !errors.Is(err, io.EOF) {
				t.Errorf("over the end: %d, %v", n, err)
			}
		})
	}
}

// sectors gives a loop device that is not in use sectors of that size.
func sectors(t *testing.T, path string, size int) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := unix.IoctlSetInt(int(file.Fd()), unix.LOOP_SET_BLOCK_SIZE, size); err != nil {
		t.Fatal(err)
	}
}
