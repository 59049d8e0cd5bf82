package worker

import (
	"bytes"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// tornCopy is a copy of a finished volume on its way to a key of its own.
type tornCopy struct {
	*testing.T
	*operation
	source *operation // who may open it until then
	dev    *device    // stands for the device where libcryptsetup wants one
	area   []byte     // the header area as the source's header made it
	vk     secret.Bytes
}

func newTornCopy(t *testing.T) *tornCopy {
	t.Helper()
	key := func() secret.Bytes {
		k := secret.New(dek.Size)
		_, _ = rand.Read(k.Expose())
		t.Cleanup(k.Wipe)
		return k
	}
	path := filepath.Join(t.TempDir(), "disk")
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	if err := file.Truncate(32 << 20); err != nil {
		t.Fatal(err)
	}
	log := newLog()
	source := &operation{
		Request: cryptmapper.Request{ID: "test.cryptcsi.io/source", State: dek.Prepared, Spec: dek.Spec{Cipher: dek.CipherXTS}, Claim: dek.Claim{Node: "n", UUID: dek.NewUUID()}},
		key:     key(), step: func(string) {}, log: log,
	}
	c := &tornCopy{T: t, source: source, dev: &device{file: file, raw: file, size: 32 << 20, sector: 512}, area: make([]byte, luks2.DataOffset)}
	h, err := source.format(c.dev)
	if err == nil {
		h, err = source.update(c.dev, h, func(t *luks2.Token) { t.Made = true })
	}
	if err != nil {
		t.Fatal(err)
	}
	if c.vk, err = source.volumeKey(c.dev, h, source.key); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.vk.Wipe)
	if _, err := file.ReadAt(c.area, 0); err != nil {
		t.Fatal(err)
	}
	source.State, source.Header = dek.Formatted, h.ID()
	c.operation = &operation{
		Request: cryptmapper.Request{ID: "test.cryptcsi.io/copy", State: dek.Rotating, Spec: source.Spec, Header: dek.HeaderID{UUID: h.Copy.UUID()}},
		key:     key(), old: source.key, step: func(string) {}, log: log,
	}
	return c
}

func (c *tornCopy) start(left int, part func(int) int) *tornDisk {
	return &tornDisk{data: bytes.Clone(c.area), left: left, part: part}
}

// opens tells whether a header on area gives the volume key to o.
func (c *tornCopy) opens(o *operation, area []byte) bool {
	c.Helper()
	found, err := luks2.Read(bytes.NewReader(area), o.want(c.dev), o.key)
	if err != nil {
		c.Fatal(err)
	}
	if found.Header == nil || o.acceptable(c.dev, found.Header) != nil {
		return false
	}
	vk, err := o.volumeKey(c.dev, found.Header, o.key)
	defer vk.Wipe()
	return err == nil && vk.Equal(c.vk)
}

// finished fails unless the volume opens with its own key alone.
func (c *tornCopy) finished(d *tornDisk) {
	c.Helper()
	found, err := luks2.Read(d, c.want(c.dev), c.key)
	if err != nil || found.Header == nil || !found.Whole || !c.opens(c.operation, d.data) {
		c.Fatalf("not finished: %+v, %v", found, err)
	}
	t := found.Header.Token
	if t.DEKID != string(c.ID) || t.Sequence != c.source.Header.Sequence+1 || !t.Made || t.Size != c.dev.size-luks2.DataOffset || found.Header.Copy.UUID() != c.source.Header.UUID {
		c.Errorf("the header is %s with %+v", found.Header.Copy.UUID(), t)
	}
	if c.opens(c.source, d.data) {
		c.Error("it still opens with the source's key")
	}
	if !bytes.Equal(d.data[asideOffset:asideOffset+asideSize], make([]byte, asideSize)) {
		c.Error("what was put aside is still there")
	}
}

// reads fails unless a read-only stage opens the volume, and writes nothing.
func (c *tornCopy) reads(d *tornDisk) {
	c.Helper()
	o := *c.operation
	o.Volume.ReadOnly = true
	before := bytes.Clone(d.data)
	h, err := o.rotated(c.dev, d)
	if err != nil {
		c.Fatalf("read-only: %v", err)
	}
	vk, err := o.volumeKey(c.dev, h, o.key)
	defer vk.Wipe()
	if err != nil || !vk.Equal(c.vk) {
		c.Errorf("read-only: another volume key, %v", err)
	}
	if !bytes.Equal(d.data, before) {
		c.Error("a read-only stage wrote")
	}
}

// Cut at every write, with the last one torn: the volume key is never lost, a
// read-only stage opens what is there, and the next stage finishes it.
func TestRotateCutAnywhere(t *testing.T) {
	c := newTornCopy(t)
	for name, part := range parts {
		for n := 0; ; n++ {
			d := c.start(n, part)
			_, err := c.rotated(c.dev, d)
			if err != nil && !errors.Is(err, errPower) {
				t.Fatalf("write %d (%s): %v", n, name, err)
			}
			c.reads(d)
			t.Logf("write %d torn (%s): opens with the source's key %v, its own %v", n, name, c.opens(c.source, d.data), c.opens(c.operation, d.data))
			d.left = -1
			for range 2 {
				if _, err := c.rotated(c.dev, d); err != nil {
					t.Fatalf("write %d torn (%s), again: %v", n, name, err)
				}
			}
			c.finished(d)
			if err == nil {
				if n != 9 {
					t.Errorf("it takes %d writes", n)
				}
				break
			}
		}
	}
}

// Cut anywhere while the volume is open, and then changed, as by growing: the
// change is there, and the volume key is not lost.
func TestRotateCutThenChanged(t *testing.T) {
	c := newTornCopy(t)
	for name, part := range parts {
		for n := range 10 {
			d := c.start(n, part)
			if _, err := c.rotated(c.dev, d); err != nil && !errors.Is(err, errPower) {
				t.Fatal(err)
			}
			if _, err := c.dev.WriteAt(d.data, 0); err != nil {
				t.Fatal(err)
			}
			o := *c.operation
			h, err := o.wholeHeader(c.dev)
			if err != nil {
				t.Fatalf("write %d torn (%s): %v", n, name, err)
			}
			changed, err := o.update(c.dev, h, func(t *luks2.Token) { t.Size -= 4096 })
			if err != nil {
				t.Fatalf("write %d torn (%s): %v", n, name, err)
			}
			o = *c.operation
			found, err := o.readEither(c.dev, c.dev)
			if err != nil || found.Header == nil || !found.Whole || found.Header.Token.MAC != changed.Token.MAC {
				t.Fatalf("write %d torn (%s), changed to %+v: %+v, %v", n, name, changed.Token, found, err)
			}
			vk, err := o.volumeKey(c.dev, found.Header, o.key)
			if err != nil || !vk.Equal(c.vk) {
				t.Errorf("write %d torn (%s): another volume key, %v", n, name, err)
			}
			vk.Wipe()
		}
	}
}

// A copy that was cut while its source changed its header, so that one of the
// header's copies is torn.
func TestRotateTornSource(t *testing.T) {
	c := newTornCopy(t)
	for n := range 3 {
		for name, part := range parts {
			d := c.start(n, part)
			found, err := luks2.Read(d, c.source.want(c.dev), c.source.key)
			if err != nil {
				t.Fatal(err)
			}
			next, err := found.Header.With(found.Header.Token, c.source.key)
			if err != nil {
				t.Fatal(err)
			}
			if err := next.WriteCopies(d, func(string) {}); !errors.Is(err, errPower) {
				t.Fatal(err)
			}
			d.left = -1
			c.reads(d)
			h, err := c.rotated(c.dev, d)
			if err != nil || h.Token.Sequence <= c.source.Header.Sequence || !c.opens(c.operation, d.data) {
				t.Errorf("write %d torn (%s): %+v, %v", n, name, h, err)
			}
		}
	}
}

// What is neither the copy nor on its way is refused, and not written to.
func TestRotateRefuses(t *testing.T) {
	c := newTornCopy(t)
	other := newTornCopy(t)
	done := c.start(-1, nil)
	if _, err := c.rotated(c.dev, done); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		area  []byte
		as    func(o *operation)
		words string
	}{
		"a blank disk":          {make([]byte, luks2.DataOffset), nil, "no header"},
		"another volume's disk": {other.area, nil, "no header"},
		"another header":        {c.area, func(o *operation) { o.Header.UUID = dek.NewUUID() }, "older disk"},
		"below the floor":       {c.area, func(o *operation) { o.Header.Sequence = 9 }, "rolled back"},
		"confirmed, and older": {c.area, func(o *operation) {
			o.Header = dek.HeaderID{UUID: o.Header.UUID, Sequence: c.source.Header.Sequence + 1}
		}, "rolled back"},
		"another key before": {c.area, func(o *operation) { o.old = other.old }, "no header"},
		"another copy of it": {done.data, func(o *operation) { o.key = other.key }, "no header"},
		"under another ID":   {done.data, func(o *operation) { o.ID = "test.cryptcsi.io/second" }, "no header"},
	} {
		for _, readOnly := range []bool{false, true} {
			o := *c.operation
			o.Volume.ReadOnly = readOnly
			if tt.as != nil {
				tt.as(&o)
			}
			d := &tornDisk{data: bytes.Clone(tt.area), left: -1}
			_, err := o.rotated(c.dev, d)
			if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), tt.words) {
				t.Errorf("%s, read-only %v: %v", name, readOnly, err)
			}
			if !bytes.Equal(d.data, tt.area) {
				t.Errorf("%s: something was written", name)
			}
		}
	}
}
