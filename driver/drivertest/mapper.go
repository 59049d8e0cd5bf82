package drivertest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Mapper is a driver.Mapper on a Kernel. It has no state of its own: another
// one on the same Kernel goes on where it stopped.
type Mapper struct{ Kernel *Kernel }

var (
	_ driver.Mapper    = Mapper{}
	_ driver.Hydration = Mapper{}
)

// header is what a formatted disk of this machine begins with. The MAC binds
// it to the DEK.
type header struct {
	ID       dek.ID
	UUID     string
	Sequence uint64
	Made     bool
	Size     int64
	Spec     dek.Spec
	Hydrates bool // not all of it was written once
	MAC      []byte
}

// Where the header and the data lie.
const (
	headerMagic  = "fakeluks:"
	headerLength = 64 << 10
	dataOffset   = 16 << 20
	endLength    = 1 << 20
)

func (h header) sum(key secret.Bytes) []byte {
	h.MAC = nil
	text, _ := json.Marshal(h)
	mac := hmac.New(sha256.New, key.Expose())
	mac.Write(text)
	return mac.Sum(nil)
}

func (h header) id() dek.HeaderID { return dek.HeaderID{UUID: h.UUID, Sequence: h.Sequence} }

// under returns the key of d that h verifies under, if one does: while d is
// Rotating the previous one too, for whatever volume that was.
func (h header) under(d dek.DEK) (key secret.Bytes, ok bool) {
	switch {
	case h.ID == d.ID && hmac.Equal(h.MAC, h.sum(d.Key)):
		return d.Key, true
	case d.State == dek.Rotating && hmac.Equal(h.MAC, h.sum(d.Previous)):
		return d.Previous, true
	}
	return secret.Bytes{}, false
}

// readHeader returns the header on a disk: found tells whether there is
// anything that looks like one.
func (d *disk) readHeader() (h header, found bool) {
	buf := make([]byte, headerLength)
	d.readAt(buf, 0)
	buf, _, _ = bytes.Cut(buf, []byte{0})
	text, ok := strings.CutPrefix(string(buf), headerMagic)
	if !ok {
		return header{}, false
	}
	if json.Unmarshal([]byte(text), &h) != nil {
		return header{}, true
	}
	return h, true
}

func (d *disk) writeHeader(h header, key secret.Bytes) {
	h.MAC = h.sum(key)
	text, _ := json.Marshal(h)
	buf := make([]byte, headerLength)
	copy(buf, headerMagic+string(text))
	d.writeAt(buf, 0)
}

func (d *disk) made() bool {
	h, _ := d.readHeader()
	return h.Made
}

// Open is driver.Mapper's.
func (m Mapper) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	k := m.Kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	disk, err := k.rawDisk(ctx, v.Device)
	if err != nil {
		return driver.Mapping{}, err
	}
	if _, err := disk.open(v, d); err != nil {
		return driver.Mapping{}, err
	}
	h, _ := disk.readHeader()
	t, err := k.activate(v, disk, h, d.Spec)
	if err != nil {
		return driver.Mapping{}, err
	}
	if !h.Made {
		if k.users(t.Number) > 0 {
			return driver.Mapping{}, errdefs.Errorf(errdefs.ErrUnavailable, "the new mapping %s is in use", v.Name)
		}
		disk.zero(dataOffset, endLength)
		disk.zero(dataOffset+t.Size-endLength, endLength)
	}
	return describe(t, h, d), nil
}

func (k *Kernel) rawDisk(ctx context.Context, path string) (*disk, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	number, err := k.resolve(path)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	d, ok := k.disks[number]
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrState, "%s is not a disk", path)
	}
	return d, nil
}

func describe(t *table, h header, d dek.DEK) driver.Mapping {
	m := t.Mapping
	m.Made, m.Header = h.Made, h.id()
	if key, ok := h.under(d); ok && d.State == dek.Rotating {
		m.Header.Fingerprint = dek.Fingerprint(key)
	}
	return m
}

// open returns the disk's header, made now where that is allowed.
func (d *disk) open(v driver.Volume, key dek.DEK) (header, error) {
	refuse := func(format string, args ...any) (header, error) {
		return header{}, errdefs.Errorf(errdefs.ErrState, format, args...)
	}
	h, found := d.readHeader()
	under, verified := h.under(key)
	verified = verified && found
	h.Spec.Name, h.Spec.Discard, h.Spec.KEK = key.Spec.Name, key.Spec.Discard, key.Spec.KEK // no disk says them
	switch {
	case verified && h.Spec != key.Spec:
		return refuse("the header says %+v, the record %+v", h.Spec, key.Spec)
	case verified && key.Header.UUID != "" && key.Header.UUID != h.UUID, verified && h.Sequence < key.Header.Sequence:
		return refuse("the header %s/%d is not the one that was confirmed", h.UUID, h.Sequence)
	case verified && !h.Made && key.State != dek.Prepared:
		return refuse("the record says that the volume was finished, the header says that it was not")
	case verified && dataOffset+h.Size > d.size:
		return refuse("%d bytes of %d: the disk was shrunk", d.size, dataOffset+h.Size)
	case verified && !h.Made && v.ReadOnly:
		return refuse("never finished, and read-only")
	case verified && key.State == dek.Rotating && !v.ReadOnly && !under.Equal(key.Key):
		h.ID, h.Sequence, h.Spec = key.ID, h.Sequence+1, onDisk(key.Spec)
		d.writeHeader(h, key.Key)
		return h, nil
	case verified && (h.Made || h.UUID == key.Claim.UUID):
		return h, nil
	case found && h.UUID != key.Claim.UUID, found && verified:
		return refuse("a header that is not ours")
	case key.State != dek.Prepared || v.ReadOnly || key.Claim.UUID == "":
		return refuse("not to be formatted (state %s, claim %+v)", key.State, key.Claim)
	}
	if found { // our own remains
		d.zero(0, dataOffset)
	}
	if !d.blank() {
		return refuse("foreign data")
	}
	h = header{ID: key.ID, UUID: key.Claim.UUID, Sequence: 1, Size: d.size - dataOffset, Spec: onDisk(key.Spec)}
	if h.Spec.Layout == dek.LayoutClone {
		h.Size -= driver.CloneArea(h.Size)
		h.Hydrates, d.hydrated = true, 0
	}
	d.writeHeader(h, key.Key)
	return h, nil
}

// onDisk is what a disk says of a spec.
func onDisk(s dek.Spec) dek.Spec {
	s.Name, s.Discard, s.KEK = "", false, ""
	return s
}

// activate returns the mapping of that name, made now if there is none.
func (k *Kernel) activate(v driver.Volume, d *disk, h header, spec dek.Spec) (*table, error) {
	if t := k.tables[v.Name]; t != nil {
		switch {
		case t.disk == d && t.ReadOnly == v.ReadOnly && t.Discard == spec.Discard:
			return t, nil
		case k.users(t.Number) > 0 || t.disk == d:
			return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s is there already, on device %s", v.Name, t.Backing)
		}
		k.drop(t) // its device is gone, and nobody uses it
	}
	k.count++
	t := &table{disk: d, offset: dataOffset, Mapping: driver.Mapping{
		Name: v.Name, Path: "/dev/mapper/" + v.Name, Number: fmt.Sprintf("254:%d", k.count), Backing: d.number,
		Size: h.Size, ReadOnly: v.ReadOnly, Cipher: h.Spec.Cipher, Integrity: h.Spec.Integrity, Discard: spec.Discard, Direct: h.Spec.IntegrityMode == dek.ModeDirect, Performance: v.Performance,
	}}
	if h.Hydrates {
		t.Regions, t.Hydrated = uint64(h.Size/regionSize), d.hydrated
	}
	k.tables[t.Name], k.nodes[t.Path] = t, t.Number
	return t, nil
}

func (k *Kernel) drop(t *table) {
	delete(k.tables, t.Name)
	delete(k.nodes, t.Path)
}

// MarkMade is driver.Mapper's.
func (m Mapper) MarkMade(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return m.update(ctx, v, d, func(_ *table, h *header) error {
		if !h.Made {
			h.Made = true
			h.Sequence++
		}
		return nil
	})
}

// Resize is driver.Mapper's.
func (m Mapper) Resize(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return m.update(ctx, v, d, func(t *table, h *header) error {
		size := t.disk.size - dataOffset
		if h.Spec.Layout == dek.LayoutClone {
			size -= driver.CloneArea(size)
		}
		if size > h.Size {
			h.Size = size
			h.Sequence++
		}
		t.Size = h.Size
		return nil
	})
}

func (m Mapper) update(ctx context.Context, v driver.Volume, d dek.DEK, do func(*table, *header) error) (driver.Mapping, error) {
	k := m.Kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	disk, err := k.rawDisk(ctx, v.Device)
	if err != nil {
		return driver.Mapping{}, err
	}
	t := k.tables[v.Name]
	if t == nil || t.disk != disk {
		return driver.Mapping{}, errdefs.Errorf(errdefs.ErrState, "mapping %s is not open on this device", v.Name)
	}
	h, _ := disk.readHeader()
	under, ok := h.under(d)
	if !ok {
		return driver.Mapping{}, errdefs.Errorf(errdefs.ErrState, "the header does not verify")
	}
	before := h.id()
	if err := do(t, &h); err != nil {
		return driver.Mapping{}, err
	}
	if h.Spec.Layout == dek.LayoutConstellation { // not ours to write
		h.Sequence = before.Sequence
	}
	if h.id() != before {
		disk.writeHeader(h, under)
		h, _ = disk.readHeader()
	}
	return describe(t, h, d), nil
}

// How a volume hydrates on this machine: regions of that size, so many a second.
const (
	regionSize  = 4096
	regionsRate = 4096
)

// hydrate makes up for the time since the table was last looked at.
func (t *table) hydrate() {
	now := time.Now()
	if t.Hydrating {
		t.disk.hydrated = min(t.Regions, t.disk.hydrated+uint64(now.Sub(t.since).Seconds()*regionsRate))
		t.Hydrated = t.disk.hydrated
	}
	t.since = now
}

// Hydrate makes a mapping fully hydrated at once.
func (k *Kernel) Hydrate(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	t := k.tables[name]
	t.Hydrated, t.disk.hydrated = t.Regions, t.Regions
}

// Hydrate is driver.Hydration's.
func (m Mapper) Hydrate(name string, on bool) error {
	k := m.Kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	if t := k.tables[name]; t != nil && t.Regions > 0 {
		t.hydrate()
		t.Hydrating = on
	}
	return nil
}

// Finish is driver.Hydration's.
func (m Mapper) Finish(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	return m.update(ctx, v, d, func(t *table, h *header) error {
		t.hydrate()
		if t.Hydrated < t.Regions {
			return errdefs.Errorf(errdefs.ErrUnavailable, "%d regions of %d are hydrated", t.Hydrated, t.Regions)
		}
		t.Hydrated, t.Regions, t.Hydrating = 0, 0, false
		if h.Hydrates {
			h.Hydrates = false
			h.Sequence++
		}
		return nil
	})
}

// Fail has a mapping hydrate no more, nor say how far it came.
func (k *Kernel) Fail(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	t := k.tables[name]
	t.Failed, t.Hydrated, t.Regions, t.Hydrating = true, 0, 0, false
}

// Suspend has I/O to a mapping wait.
func (k *Kernel) Suspend(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tables[name].Suspended = true
}

// Resume is driver.Config's.
func (m Mapper) Resume(ctx context.Context, name string) error {
	k := m.Kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	if t := k.tables[name]; t != nil {
		t.Suspended = false
	}
	return ctx.Err()
}

// Close is driver.Mapper's.
func (m Mapper) Close(ctx context.Context, name string) error {
	k := m.Kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	t := k.tables[name]
	if t == nil {
		return nil
	}
	if k.users(t.Number) > 0 {
		return errdefs.Errorf(errdefs.ErrUnavailable, "mapping %s is in use", name)
	}
	t.hydrate()
	k.drop(t)
	return nil
}

// List is driver.Mapper's.
func (m Mapper) List() ([]driver.Mapping, error) {
	k := m.Kernel
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []driver.Mapping
	for name, t := range k.tables {
		if strings.HasPrefix(name, driver.MappingPrefix) {
			t.hydrate()
			all = append(all, t.Mapping)
		}
	}
	slices.SortFunc(all, func(a, b driver.Mapping) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// OpensWith tells whether the header on a disk is one of that key.
func (k *Kernel) OpensWith(path string, key secret.Bytes) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	h, found := k.disks[k.nodes[path]].readHeader()
	return found && hmac.Equal(h.MAC, h.sum(key))
}

// Finished tells whether the header on a disk says that the volume was finished.
func (k *Kernel) Finished(path string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.disks[k.nodes[path]].made()
}
