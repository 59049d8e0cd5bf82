package luks2_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// disk is a device in memory. It can lose everything after n writes.
type disk struct {
	data   []byte
	writes int   // -1: no limit
	bad    int64 // from here on nothing can be read; 0: all can
}

var errCut = errors.New("power cut")

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if d.bad != 0 && off >= d.bad {
		return 0, errCut
	}
	return copy(p, d.data[off:]), nil
}

func (d *disk) Sync() error { return nil }

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if d.writes == 0 {
		n := copy(d.data[off:], p[:len(p)/2]) // torn
		return n, errCut
	}
	d.writes--
	return copy(d.data[off:], p), nil
}

// unsealed is what libcryptsetup writes: one copy and 252 KiB of key material.
func unsealed(t testing.TB, token string) *disk {
	t.Helper()
	f := ours(t)[0]
	raw := bytes.Clone(f.head[:luks2.CopySize])
	text := jsonOf(raw)
	from, to := strings.Index(text, `{"type":"cryptcsi"`), strings.Index(text, `},"segments"`)
	setJSON(raw, text[:from]+token+text[to:])
	f.head, f.ours = raw, false
	return f.disk(t, secret.Bytes{})
}

// written returns a disk with a sealed header of the given key.
func written(t testing.TB, key secret.Bytes) (*disk, *luks2.Header) {
	t.Helper()
	token := luks2.NewToken(id)
	token.Size = 12345 * 4096
	h, err := luks2.Seal(unsealed(t, token.Unsealed()), want, key)
	if err != nil {
		t.Fatal(err)
	}
	d := &disk{data: make([]byte, luks2.DataOffset), writes: -1}
	if err := h.Write(d, func(string) {}); err != nil {
		t.Fatal(err)
	}
	return d, h
}

func read(t testing.TB, d *disk, key secret.Bytes) luks2.Found {
	t.Helper()
	f, err := luks2.Read(d, want, key)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestSealWriteRead(t *testing.T) {
	key := newKey(1)
	d, h := written(t, key)
	f := read(t, d, key)
	if f.Header == nil || !f.Whole || f.Header.ID() != h.ID() || f.Header.ID() != (dek.HeaderID{UUID: uuid, Sequence: 1}) || f.Header.Token.Size != 12345*4096 {
		t.Fatalf("read %+v (%v)", f, f.Reason)
	}
	list, err := luks2.Bare(d)
	if err != nil || len(list) != 2 || list[0].Token.DEKID != string(id) {
		t.Errorf("Bare = %v, %v", list, err)
	}
}

func TestOtherKeysAndIDs(t *testing.T) {
	key := newKey(1)
	d, _ := written(t, key)
	if f := read(t, d, newKey(2)); f.Header != nil || !strings.Contains(f.Reason.Error(), "does not verify") || f.UUIDs[0] != uuid {
		t.Errorf("another key: %+v", f)
	}
	if f, err := luks2.Read(d, luks2.Want{ID: "test.cryptcsi.io/vol-2", Spec: want.Spec, SectorSize: 4096}, key); err != nil || f.Header != nil || !strings.Contains(f.Reason.Error(), "belongs to") {
		t.Errorf("another ID: %+v, %v", f, err)
	}
	blank := &disk{data: make([]byte, luks2.DataOffset)}
	if f := read(t, blank, key); f.Header != nil || len(f.UUIDs) != 0 || f.Reason == nil {
		t.Errorf("blank: %+v", f)
	}
}

// A device that cannot be read is not one with a bad header: where a bad one may
// be formatted again, this one may not.
func TestReadErrors(t *testing.T) {
	for _, f := range all(t) {
		for _, bad := range []int64{-1, 32768} {
			d := f.disk(t, newKey(1))
			d.bad = bad
			found, err := luks2.ReadConstellation(d, f.want)
			if f.ours {
				found, err = luks2.Read(d, f.want, newKey(1))
			}
			if !errors.Is(err, errdefs.ErrUnavailable) || !errors.Is(err, errCut) || found.Header != nil {
				t.Errorf("%s, unreadable from %d: %+v, %v", f.name, bad, found, err)
			}
		}
	}
}

// Whatever byte changes in both copies, with the unkeyed checksums put right
// again, or in the key material: nothing verifies. Only LUKS2's own sequence
// number is free, because the token's counts.
func TestEveryByteCounts(t *testing.T) {
	key := newKey(1)
	good, _ := written(t, key)
	flip := func(d *disk, at int) {
		d.data[at] ^= byte(1 + rand.IntN(255))
		for _, c := range []int{0, luks2.CopySize} {
			setChecksum(d.data[c : c+luks2.CopySize])
		}
	}
	for at := range luks2.CopySize {
		if at >= 16 && at < 24 || at >= 448 && at < 512 || (at < 4096 && at > 512 || at > 5000) && at%61 != 0 {
			continue // free fields; of the padding a sample
		}
		d := &disk{data: bytes.Clone(good.data[:512<<10])}
		flip(d, at)
		d.data[luks2.CopySize+at] = d.data[at]
		if at < 6 || at >= 256 && at < 264 { // magic and place differ between the copies
			copy(d.data[luks2.CopySize:], make([]byte, 6))
		}
		setChecksum(d.data[luks2.CopySize : 2*luks2.CopySize])
		if f := read(t, d, key); f.Header != nil {
			t.Fatalf("byte %d changed and the header still verifies", at)
		}
	}
	for at := 32768; at < 32768+258048; at += 397 {
		d := &disk{data: bytes.Clone(good.data[:512<<10])}
		d.data[at] ^= 0x10
		if f := read(t, d, key); f.Header != nil {
			t.Fatalf("key material byte %d changed and the header still verifies", at)
		}
	}
}

func TestTheHigherSequenceCounts(t *testing.T) {
	key := newKey(1)
	d, h := written(t, key)
	token := h.Token
	token.Made = true
	next, err := h.With(token, key)
	if err != nil {
		t.Fatal(err)
	}
	if h.Token.Made || next.Token.Sequence != 2 || !next.Token.Made {
		t.Fatalf("With changed %+v into %+v", h.Token, next.Token)
	}
	old := bytes.Clone(d.data)
	if err := next.WriteCopies(d, func(string) {}); err != nil {
		t.Fatal(err)
	}
	for _, copyAt := range []int{0, luks2.CopySize} {
		mixed := &disk{data: bytes.Clone(d.data)}
		copy(mixed.data[copyAt:copyAt+luks2.CopySize], old[copyAt:])
		f := read(t, mixed, key)
		if f.Header == nil || f.Header.Token.Sequence != 2 || f.Whole {
			t.Errorf("with the older copy at %d: %+v", copyAt, f)
		}
	}
}

// spoiling is a disk that loses what it is about to overwrite when it is cut.
type spoiling struct{ *disk }

func (d spoiling) WriteAt(p []byte, off int64) (int, error) {
	if d.writes == 0 {
		return copy(d.data[off:], bytes.Repeat([]byte{0xff}, len(p))), errCut
	}
	return d.disk.WriteAt(p, off)
}

// Repair makes a header whole and, wherever it is cut, does not touch the copy
// that counts.
func TestRepair(t *testing.T) {
	key := newKey(1)
	d, h := written(t, key)
	next, err := h.With(h.Token, key)
	if err != nil {
		t.Fatal(err)
	}
	older := bytes.Clone(d.data)
	if err := next.WriteCopies(d, func(string) {}); err != nil {
		t.Fatal(err)
	}
	for what, other := range map[string][]byte{"older": older, "blank": make([]byte, len(older))} {
		for _, at := range []int{0, luks2.CopySize} {
			good := luks2.CopySize - at
			for n := range 4 { // the last one is not cut
				m := &disk{data: bytes.Clone(d.data), writes: n}
				copy(m.data[at:at+luks2.CopySize], other[at:])
				err := read(t, m, key).Repair(spoiling{m}, func(string) {})
				if err != nil && !errors.Is(err, errCut) || err == nil && n == 0 {
					t.Fatalf("copy at %d %s, cut after %d writes: %v", at, what, n, err)
				}
				if !bytes.Equal(m.data[good:good+luks2.CopySize], d.data[good:good+luks2.CopySize]) {
					t.Errorf("copy at %d %s, cut after %d writes: the good copy was written to", at, what, n)
				}
				if f := read(t, m, key); f.Header == nil || f.Header.ID() != next.ID() || err == nil && !f.Whole {
					t.Errorf("copy at %d %s, cut after %d writes: %+v", at, what, n, f)
				}
			}
		}
	}
	m := &disk{data: bytes.Clone(d.data)}
	if err := read(t, m, key).Repair(m, func(string) {}); err != nil {
		t.Errorf("a whole header: %v", err)
	}
}

// Cut anywhere, with a torn last write, a first write of a header leaves
// nothing that verifies, or this header; remains carry its UUID. A change
// leaves the old or the new one.
func TestWriteCutAnywhere(t *testing.T) {
	key := newKey(1)
	_, h := written(t, key)
	for n := range 4 {
		d := &disk{data: make([]byte, luks2.DataOffset), writes: n}
		if err := h.Write(d, func(string) {}); !errors.Is(err, errCut) || !errors.Is(err, errdefs.ErrUnavailable) {
			t.Fatalf("cut after %d writes: %v", n, err)
		}
		f := read(t, d, key)
		for _, u := range f.UUIDs {
			if u != uuid {
				t.Errorf("cut after %d writes: remains carry %q", n, u)
			}
		}
		if f.Header != nil && f.Header.ID() != h.ID() {
			t.Errorf("cut after %d writes: another header %+v", n, f.Header.ID())
		}
	}
	for n := range 3 {
		d, h := written(t, key)
		next, err := h.With(h.Token, key)
		if err != nil {
			t.Fatal(err)
		}
		d.writes = n
		_ = next.WriteCopies(d, func(string) {})
		if f := read(t, d, key); f.Header == nil {
			t.Errorf("a change cut after %d writes lost the header: %v", n, f.Reason)
		}
	}
}

func TestMaterialise(t *testing.T) {
	key := newKey(1)
	_, h := written(t, key)
	file, err := os.Create(filepath.Join(t.TempDir(), "header"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := h.Materialise(file); err != nil {
		t.Fatal(err)
	}
	f, err := luks2.Read(file, want, key)
	if err != nil || f.Header == nil || !f.Whole {
		t.Errorf("read back: %+v, %v", f, err)
	}
}

func FuzzRead(f *testing.F) {
	key := newKey(1)
	d, _ := written(f, key)
	f.Add(d.data[:luks2.CopySize], uint32(4096))
	f.Add([]byte("LUKS\xba\xbe\x00\x02"), uint32(0))
	f.Fuzz(func(t *testing.T, head []byte, at uint32) {
		fuzzed := &disk{data: bytes.Clone(d.data[:512<<10])}
		for _, c := range []int{0, luks2.CopySize} {
			raw := fuzzed.data[c : c+luks2.CopySize]
			if at%2 == 0 { // a whole header, or an area within a good one
				copy(raw, head)
			} else {
				copy(raw[at%luks2.CopySize:], head)
			}
			setChecksum(raw)
		}
		found := read(t, fuzzed, key)
		if found.Header != nil && found.Header.Token.MAC != read(t, d, key).Header.Token.MAC {
			t.Errorf("accepted %+v", found.Header.Token)
		}
	})
}
