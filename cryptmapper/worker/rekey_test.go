package worker

import (
	"bytes"
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// tornDisk is a header area in memory that loses power: of the write after so
// many it takes a part.
type tornDisk struct {
	data []byte
	left int // writes; below zero: no end
	part func(n int) int
}

var errPower = errors.New("power cut")

func (d *tornDisk) ReadAt(p []byte, off int64) (int, error) { return copy(p, d.data[off:]), nil }

func (d *tornDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.left == 0 {
		return copy(d.data[off:], p[:d.part(len(p))]), errPower
	}
	d.left--
	return copy(d.data[off:], p), nil
}

func (d *tornDisk) Sync() error { return nil }

// parts of a torn write: what reached the disk of n bytes.
var parts = map[string]func(n int) int{
	"a sector":             func(int) int { return 512 },
	"half":                 func(n int) int { return n / 2 },
	"all but the last one": func(n int) int { return n - 512 },
	"all, unacknowledged":  func(n int) int { return n },
}

// tornRekey is one volume on its way, and what decides about it.
type tornRekey struct {
	*testing.T
	*operation
	dev    *device // stands for the device where libcryptsetup wants one
	area   []byte  // the header area as Constellation made it
	vk     secret.Bytes
	first  *luks2.Header // what the first try makes of it
	second *luks2.Header // and the next one: other salts, the same key
}

func newTornRekey(t *testing.T) *tornRekey {
	t.Helper()
	kernel.Need(t, "exec:cryptsetup")
	key := func() secret.Bytes {
		k := secret.New(dek.Size)
		_, _ = rand.Read(k.Expose())
		t.Cleanup(k.Wipe)
		return k
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 32<<20); err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	r := &tornRekey{T: t, dev: &device{file: file, raw: file, size: 32 << 20, sector: 512}, operation: &operation{
		Request: cryptmapper.Request{
			Op: cryptmapper.OpRekey, Volume: cryptmapper.Volume{Name: cryptmapper.Prefix + "torn"}, ID: "test.cryptcsi.io/torn", State: dek.Prepared,
			Spec: dek.Spec{Cipher: dek.CipherXTS}, Claim: dek.Claim{Node: "n", UUID: dek.NewUUID()}, From: dek.ID(dek.NewUUID()),
		},
		key: key(), old: key(), step: func(string) {}, log: newLog(),
	}}
	cmd := exec.Command("cryptsetup", "luksFormat", "--batch-mode", "--type=luks2", "--cipher=aes-xts-plain64", "--key-size=512", "--sector-size=4096",
		"--pbkdf=argon2id", "--pbkdf-force-iterations=4", "--pbkdf-memory=65536", "--pbkdf-parallel=4", "--uuid="+string(r.From), "--key-file=-", path)
	cmd.Stdin = bytes.NewReader(r.old.Expose())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("luksFormat: %v: %s", err, out)
	}
	r.area = make([]byte, luks2.DataOffset)
	if _, err := file.ReadAt(r.area, 0); err != nil {
		t.Fatal(err)
	}
	found, err := luks2.ReadConstellation(bytes.NewReader(r.area), r.asTheirs().want(r.dev))
	if err != nil || found.Header == nil {
		t.Fatalf("reading the old header: %+v, %v", found, err)
	}
	if r.vk, err = r.volumeKey(r.dev, found.Header, r.old); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.vk.Wipe)
	for _, h := range []**luks2.Header{&r.first, &r.second} {
		token := luks2.NewToken(r.ID)
		token.Made, token.Size = true, r.dev.size-luks2.DataOffset
		if *h, err = r.newHeader(r.dev, found.Header, r.Claim.UUID, token); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// opensAsBefore tells whether nothing of the old header has changed.
func (r *tornRekey) opensAsBefore(d *tornDisk) bool {
	return bytes.Equal(d.data[:asideOffset], r.area[:asideOffset])
}

// ours returns what a stage with the new DEK would open; where that is nothing,
// it must not be allowed to format, whatever the record says.
func (r *tornRekey) ours(area []byte) *luks2.Header {
	r.Helper()
	found, err := luks2.Read(bytes.NewReader(area), r.want(r.dev), r.key)
	if err != nil {
		r.Fatal(err)
	}
	if found.Header != nil {
		return found.Header
	}
	state := r.State
	defer func() { r.State = state }()
	for _, r.State = range []dek.State{dek.Prepared, dek.Formatted} {
		if err := r.mayFormat(r.dev, found); !errors.Is(err, errdefs.ErrState) {
			r.Fatalf("state %s: to be formatted: %v", r.State, err)
		}
	}
	return nil
}

// gives tells whether a header gives the volume key.
func (r *tornRekey) gives(h *luks2.Header, key secret.Bytes) bool {
	r.Helper()
	if h == nil {
		return false
	}
	vk, err := r.volumeKey(r.dev, h, key)
	defer vk.Wipe()
	return err == nil && vk.Equal(r.vk)
}

// prepare is the writing part of prepareRekey.
func (r *tornRekey) prepare(d *tornDisk, h *luks2.Header) error {
	if err := r.putAside(r.dev, d, h); err != nil {
		return err
	}
	r.Header, r.State = h.ID(), dek.Formatted // ConfirmDEK
	return nil
}

// start is a disk whose next writes are cut.
func (r *tornRekey) start(left int, part func(int) int) *tornDisk {
	r.State, r.Header = dek.Prepared, dek.HeaderID{}
	return &tornDisk{data: bytes.Clone(r.area), left: left, part: part}
}

// finished fails unless the volume is ours and nothing else.
func (r *tornRekey) finished(area []byte) {
	r.Helper()
	found, err := luks2.Read(bytes.NewReader(area), r.want(r.dev), r.key)
	if err != nil || found.Header == nil || !found.Whole || !r.gives(found.Header, r.key) {
		r.Fatalf("not finished: %+v, %v", found, err)
	}
	if !bytes.Equal(area[asideOffset:asideOffset+asideSize], make([]byte, asideSize)) {
		r.Error("what was put aside is still there")
	}
	path := filepath.Join(r.TempDir(), "finished")
	if err := os.WriteFile(path, slices.Concat(area, make([]byte, 16<<20)), 0o600); err != nil {
		r.Fatal(err)
	}
	defer func() { _ = os.Remove(path) }() // those of all cuts would take a gigabyte
	for _, k := range []struct {
		key   secret.Bytes
		opens bool
	}{{r.old, false}, {r.key, true}} {
		cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file=-", path)
		cmd.Stdin = bytes.NewReader(k.key.Expose())
		if out, err := cmd.CombinedOutput(); (err == nil) != k.opens {
			r.Errorf("cryptsetup with that key: %v: %s; should open: %v", err, out, k.opens)
		}
	}
}

// The write sequence cut at every step, with the last write torn: the volume
// key is never lost, nothing may format the device, and the same calls finish.
func TestRekeyCutAnywhere(t *testing.T) {
	r := newTornRekey(t)
	for name, part := range parts {
		for n := 0; ; n++ {
			d := r.start(n, part)
			err := r.prepare(d, r.first)
			if !r.opensAsBefore(d) || r.ours(d.data) != nil {
				t.Fatalf("preparing, write %d torn (%s): the volume does not open as before", n, name)
			}
			if err == nil {
				if n != 4 {
					t.Errorf("preparing takes %d writes", n)
				}
				break
			}
			r.converge(d)
		}
		for n := 0; ; n++ {
			d := r.start(-1, part)
			if err := r.prepare(d, r.first); err != nil {
				t.Fatal(err)
			}
			d.left = n
			_, err := r.finishRekey(r.dev, d)
			old, new := r.opensAsBefore(d), r.gives(r.ours(d.data), r.key)
			waiting, readErr := luks2.Read(aside{d}, r.want(r.dev), r.key)
			if readErr != nil || !old && !new && !r.gives(waiting.Header, r.key) {
				t.Fatalf("finishing, write %d torn (%s): no header gives the volume key (%v)", n, name, readErr)
			}
			t.Logf("finishing, write %d torn (%s): opens the old way %v, the new way %v", n, name, old, new)
			r.converge(d)
			if err == nil {
				if n != 5 {
					t.Errorf("finishing takes %d writes", n)
				}
				break
			}
		}
	}
}

// converge calls again what was cut.
func (r *tornRekey) converge(d *tornDisk) {
	r.Helper()
	d.left = -1
	if r.State == dek.Prepared {
		if err := r.prepare(d, r.second); err != nil {
			r.Fatalf("preparing again: %v", err)
		}
	}
	for range 2 {
		if h, err := r.finishRekey(r.dev, d); err != nil || h.ID() != r.Header {
			r.Fatalf("finishing again: %v", err)
		}
	}
	r.finished(d.data)
}
