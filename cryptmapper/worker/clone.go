package worker

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// A volume with the layout clone has a linear mapping on top, which goes to
// dm-crypt where sectors have their tags, and through dm-clone where they may
// have none. dm-clone remembers in its metadata which regions were written, and
// reads all others from a device of zeros. Its metadata lies behind the volume's
// end and is authentic, but not fresh: a host can bring an older state of it
// back. The worst of these is the one before it was written, because over zeros
// dm-clone makes new metadata, in which nothing was ever written. So that is
// allowed only for a volume that is not made yet.

// layerUUID begins the device-mapper UUIDs of the layers that are not
// libcryptsetup's.
const layerUUID = "CRYPTCSI-"

// cloneBlock is dm-clone's unit of metadata; the first one is its superblock.
const cloneBlock = 4096

// What background hydration copies at once, and has under way at most: little,
// to be over soon when the pod wants the disk. It is enough for a slow disk too,
// because dm-integrity has done a write when it is in its journal's memory.
const (
	hydrationBatch = 64 << 10
	hydrationLimit = 256 << 10
)

func (o *operation) cloned() bool { return o.Spec.Layout == dek.LayoutClone }

// lower is the name of the mapping that libcryptsetup makes.
func (o *operation) lower() string {
	if o.cloned() {
		return cryptmapper.CryptName(o.Volume.Name)
	}
	return o.Volume.Name
}

// build makes all layers of a volume with the layout clone, or leaves none.
func (o *operation) build(l *lock, dev *device, h *luks2.Header) (_ *luks2.Header, err error) {
	fresh, err := o.fresh(h)
	if err != nil {
		return nil, err
	}
	if !o.initialised(h) {
		clone := o.hasClone()
		switch {
		case clone != nil && !fresh:
			return nil, errdefs.Errorf(errdefs.ErrState, "the volume is hydrating by dm-clone, and this node cannot go on with that (%w): use it on a node with dm-clone until it is done", clone)
		case clone != nil:
			if h, err = o.initialise(l, dev, h); err != nil {
				return nil, err
			}
			fresh = false
		}
	}
	defer func() {
		if err != nil {
			_ = o.remove(o.Volume.Name)
		}
	}()
	if err := o.activate(l, dev, h, 0); err != nil {
		return nil, err
	}
	if fresh {
		if h, err = o.prepare(dev, h); err != nil {
			return nil, err
		}
	}
	if h.Token.Hydration != nil {
		if err := o.makeClone(h.Token, fresh); err != nil {
			return nil, err
		}
	}
	return h, o.setTop(h.Token)
}

// hasClone returns nil where dm-clone can be used.
func (o *operation) hasClone() error {
	if o.WithoutClone {
		return errors.New("it was told to do without")
	}
	return cryptmapper.KernelHasClone()
}

// fresh tells whether nothing of the volume was ever used, so that all of it may
// become zeros again.
func (o *operation) fresh(h *luks2.Header) (bool, error) {
	if o.State != dek.Prepared || h.Token.Made || o.initialised(h) {
		return false, nil
	}
	if o.Claim.UUID != h.Copy.UUID() {
		return false, errdefs.Errorf(errdefs.ErrInvalid, "the volume is new, but no node has claimed to format it as %s", h.Copy.UUID())
	}
	return true, nil
}

// prepare notes the sizes of a new volume and makes its metadata area zeros.
func (o *operation) prepare(dev *device, h *luks2.Header) (*luks2.Header, error) {
	h, err := o.plan(dev, h, true)
	if err != nil {
		return nil, err
	}
	return h, o.zeroArea(h.Token)
}

// plan notes in the token of a new volume what dm-integrity gives it and how it
// gets its tags: by dm-clone, or by being wiped from the start.
func (o *operation) plan(dev *device, h *luks2.Header, clone bool) (*luks2.Header, error) {
	s, err := cryptmapper.ReadLower(o.lower())
	if err != nil {
		return nil, err
	}
	if s.Integrity == nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "device %s has no integrity layer, its record asks for one", dev.number)
	}
	t, g, length := h.Token, geometry(s.Integrity), s.Crypt.Length*512
	if t.Integrity != nil && (*t.Integrity != g || t.Size+t.Reserved != length) {
		return nil, errdefs.Errorf(errdefs.ErrState, "the dm-integrity superblock of device %s was changed: it says %+v, the header %+v", dev.number, g, *t.Integrity)
	}
	if t.Integrity != nil && (t.Hydration != nil) == clone {
		return h, nil
	}
	t.Integrity, t.Initialised, t.Hydration = &g, 0, nil
	var region int
	if o.cloned() {
		region, t.Reserved = cryptmapper.CloneArea(length)
	}
	t.Size = length - t.Reserved
	if t.Size < endsSize {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "device %s has %d bytes: too small for a volume with integrity", dev.number, dev.size)
	}
	if clone {
		t.Hydration = &luks2.Hydration{Region: region}
	}
	return o.update(dev, h, func(into *luks2.Token) { *into = t })
}

// zeroArea makes the metadata area zeros, with tags.
func (o *operation) zeroArea(t luks2.Token) error { return o.zeroes(t.Size, t.Reserved) }

// zeroes writes zeros, with tags, where no volume is or shows them.
func (o *operation) zeroes(offset, length int64) error {
	file, err := os.OpenFile(dm.Path(o.lower()), os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "wiping the metadata area: %w", err)
	}
	defer func() { _ = file.Close() }()
	if err := zero(file, offset, length); err != nil {
		return err
	}
	o.step("metadata area wiped")
	return nil
}

// makeClone makes dm-clone and what it lies on, as t says, with hydration off.
// fresh says that the metadata area was just zeroed, and everything behind
// Hydration.Start is to read as zeros; else dm-clone goes on where it was.
func (o *operation) makeClone(t luks2.Token, fresh bool) error {
	name := o.Volume.Name
	if err := o.removeClone(); err != nil {
		return err
	}
	if !fresh {
		if err := o.checkArea(t); err != nil {
			return err
		}
	}
	length := t.Size - t.Hydration.Start
	if err := o.pieces(t, length); err != nil {
		return err
	}
	target, err := cloneTarget(name, length, t.Hydration.Region)
	if err != nil {
		return err
	}
	clone := cryptmapper.CloneName(name)
	// A sector that is not authentic, a checksum that is wrong, a block of
	// another kind than it should be.
	if err := o.layer(clone, target); errors.Is(err, unix.EILSEQ) || errors.Is(err, unix.ENOTBLK) {
		return o.unreadable()
	} else if err != nil {
		return err
	}
	if err := noDiscard(clone); err != nil {
		return err
	}
	if fresh {
		return o.seed(min(int64(t.Hydration.Region), length))
	}
	return o.checkHydrated()
}

// pieces makes what dm-clone lies on: its metadata, what it writes to, what it
// reads from.
func (o *operation) pieces(t luks2.Token, length int64) error {
	name := o.Volume.Name
	lower, err := dm.Status(o.lower())
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	if err := o.layer(cryptmapper.MetaName(name), linear(0, t.Reserved, lower.Number, t.Size)); err != nil {
		return err
	}
	if err := o.layer(cryptmapper.DataName(name), linear(0, length, lower.Number, t.Hydration.Start)); err != nil {
		return err
	}
	return o.layer(cryptmapper.ZeroName(name), dm.Target{Length: uint64(length / 512), Type: "zero"})
}

// cloneTarget is the table of dm-clone: discards would mark regions that were
// never written.
func cloneTarget(name string, length int64, region int) (dm.Target, error) {
	var devices []string
	for _, n := range []string{cryptmapper.MetaName(name), cryptmapper.DataName(name), cryptmapper.ZeroName(name)} {
		info, err := dm.Status(n)
		if err != nil {
			return dm.Target{}, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
		}
		devices = append(devices, info.Number.String())
	}
	params := fmt.Sprintf("%s %d 2 no_hydration no_discard_passdown 4 hydration_threshold %d hydration_batch_size %d",
		strings.Join(devices, " "), region/512, max(1, hydrationLimit/region), max(1, hydrationBatch/region))
	return dm.Target{Length: uint64(length / 512), Type: "clone", Params: params}, nil
}

// linear is one line of a linear mapping; start, length and offset are bytes.
func linear(start, length int64, device dm.Number, offset int64) dm.Target {
	return dm.Target{Start: uint64(start / 512), Length: uint64(length / 512), Type: "linear", Params: fmt.Sprintf("%s %d", device, offset/512)}
}

// layer makes a mapping of one line.
func (o *operation) layer(name string, t dm.Target) error {
	if err := o.makeLayer(name, []dm.Target{t}, false); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	return nil
}

func (o *operation) makeLayer(name string, table []dm.Target, readOnly bool) error {
	if _, err := dm.Create(name, layerUUID+name); err != nil {
		return err
	}
	o.step("layer created")
	if err := dm.Load(name, table, readOnly); err != nil {
		return err
	}
	if err := dm.Resume(name); err != nil {
		return err
	}
	o.step("layer made")
	return nil
}

// checkArea fails where the metadata area begins with zeros, or is not
// authentic: dm-clone would take the whole volume for one never written.
func (o *operation) checkArea(t luks2.Token) error {
	file, err := os.OpenFile(dm.Path(o.lower()), os.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "reading the metadata area: %w", err)
	}
	defer func() { _ = file.Close() }()
	block := aligned(cloneBlock)
	_, err = file.ReadAt(block, t.Size)
	switch {
	case errors.Is(err, unix.EILSEQ), errors.Is(err, unix.EIO):
		return o.unreadable()
	case err != nil:
		return errdefs.Errorf(errdefs.ErrUnavailable, "reading the metadata area: %w", err)
	case bytes.Equal(block, make([]byte, cloneBlock)):
		return o.rolledBack()
	}
	return nil
}

func (o *operation) rolledBack() error {
	return errdefs.Errorf(errdefs.ErrState, "dm-clone's metadata on device %s says that nothing was ever written to the volume, which was used: the disk was rolled back", o.Volume.Device)
}

func (o *operation) unreadable() error {
	return errdefs.Errorf(errdefs.ErrState, "dm-clone's metadata on device %s cannot be read: it was changed, or the device is damaged", o.Volume.Device)
}

// seed writes zeros to the first region, so that from now on metadata in which
// nothing was ever written is older than the volume. The flush commits it.
func (o *operation) seed(length int64) error {
	clone := cryptmapper.CloneName(o.Volume.Name)
	file, err := o.node(clone)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if err := zero(file, 0, length); err != nil {
		return err
	}
	o.step("first region written")
	return nil
}

// checkHydrated is checkArea once dm-clone has read the metadata itself: the
// host may have changed it in between.
func (o *operation) checkHydrated() error {
	c, err := cryptmapper.ReadClone(o.Volume.Name)
	switch {
	case err != nil:
		return err
	case c == nil || !c.Sound:
		return errdefs.Errorf(errdefs.ErrUnavailable, "dm-clone cannot use its metadata on device %s", o.Volume.Device)
	case c.Hydrated == 0:
		return o.rolledBack()
	}
	return nil
}

// node opens the device node of a layer for writing.
func (o *operation) node(name string) (*os.File, error) {
	info, err := dm.Status(name)
	if err == nil {
		err = dm.MakeNode(name, info.Number)
	}
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	file, err := os.OpenFile(dm.Path(name), os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "opening layer %s: %w", name, err)
	}
	return file, nil
}

// noDiscard switches discards off. What lies above takes that over when its
// table is made, so that nobody can open a mapping that still has them.
func noDiscard(name string) error {
	info, err := dm.Status(name)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	if err := os.WriteFile(discardPath(info.Number), []byte("0"), 0); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "switching off discards of mapping %s: %w", name, err)
	}
	return nil
}

// discards returns how many bytes a mapping discards at once, "0" for never.
func discards(n dm.Number) string {
	b, err := os.ReadFile(discardPath(n))
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b))
}

func discardPath(n dm.Number) string {
	return fmt.Sprintf("/sys/dev/block/%s/queue/discard_max_bytes", n)
}

// removeClone takes dm-clone away, if it is there. It commits its metadata.
func (o *operation) removeClone() error {
	name := o.Volume.Name
	return o.removeAll(cryptmapper.CloneName(name), cryptmapper.DataName(name), cryptmapper.MetaName(name), cryptmapper.ZeroName(name))
}

// topLines is what the top mapping of a volume with the layout clone must be.
func (o *operation) topLines(t luks2.Token) ([]cryptmapper.Line, error) {
	lower, err := dm.Status(o.lower())
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	start, size := t.Size/512, t.Size/512
	if t.Hydration != nil {
		start = t.Hydration.Start / 512
	}
	var lines []cryptmapper.Line
	if start > 0 {
		lines = append(lines, cryptmapper.Line{Length: start, Device: lower.Number})
	}
	if start < size {
		clone, err := dm.Status(cryptmapper.CloneName(o.Volume.Name))
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrState, "the volume is hydrating, and mapping %s has no dm-clone below it: %w", o.Volume.Name, err)
		}
		lines = append(lines, cryptmapper.Line{Start: start, Length: size - start, Device: clone.Number})
	}
	return lines, nil
}

// setTop makes the top mapping what t says; its layers are there. A mapping in
// use is changed between two of its I/Os. Where nothing differs nothing is done.
func (o *operation) setTop(t luks2.Token) error {
	name := o.Volume.Name
	lines, err := o.topLines(t)
	if err != nil {
		return err
	}
	var table []dm.Target
	for _, l := range lines {
		table = append(table, linear(l.Start*512, l.Length*512, l.Device, l.Offset*512))
	}
	has, err := cryptmapper.ReadLines(name)
	switch {
	case errors.Is(err, dm.ErrNotFound):
		err = o.makeLayer(name, table, o.Volume.ReadOnly)
	case err != nil:
		return err
	case fmt.Sprint(has) != fmt.Sprint(lines):
		err = o.reload(name, func() error { return dm.Load(name, table, o.Volume.ReadOnly) })
	}
	if err != nil {
		return unavailable(err)
	}
	info, err := dm.Status(name)
	if err == nil {
		err = dm.MakeNode(name, info.Number)
	}
	return unavailable(err)
}

// settle brings an open mapping to what its header says, where an operation was
// cut on the way there.
func (o *operation) settle(dev *device, h *luks2.Header) (*luks2.Header, error) {
	if !o.cloned() {
		return h, o.catchUp(dev, h)
	}
	if h.Token.Hydration == nil {
		if err := o.setTop(h.Token); err != nil {
			return nil, err
		}
		return h, o.removeClone()
	}
	has, err := cryptmapper.ReadLines(o.Volume.Name)
	if err != nil {
		return nil, err
	}
	done, err := o.topLines(finished(h.Token))
	if err != nil {
		return nil, err
	}
	if fmt.Sprint(has) == fmt.Sprint(done) {
		return o.complete(dev, h)
	}
	return h, o.setTop(h.Token)
}

// finished is the token of the volume when it is hydrated.
func finished(t luks2.Token) luks2.Token {
	t.Hydration, t.Initialised = nil, t.Size
	return t
}

// finish is Mapper.Finish.
func (o *operation) finish(l *lock) (cryptmapper.Mapping, error) {
	dev, h, err := o.opened(l)
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	defer dev.close()
	if h.Token.Hydration != nil {
		if h, err = o.complete(dev, h); err != nil {
			return cryptmapper.Mapping{}, err
		}
	}
	return o.describe(dev, h)
}

// complete ends a hydration. dm-clone's metadata must say for good that
// everything is hydrated before the first write goes past dm-clone: a crash
// after it would bring dm-clone back, and that write must not read as zeros.
func (o *operation) complete(dev *device, h *luks2.Header) (*luks2.Header, error) {
	name := o.Volume.Name
	if err := o.hydrated(); err != nil {
		return nil, err
	}
	if err := o.sync(cryptmapper.CloneName(name)); err != nil {
		return nil, err
	}
	o.step("metadata committed")
	if err := o.hydrated(); err != nil {
		return nil, err
	}
	if err := o.setTop(finished(h.Token)); err != nil {
		return nil, err
	}
	if err := o.sync(o.lower()); err != nil {
		return nil, err
	}
	h, err := o.update(dev, h, func(t *luks2.Token) { *t = finished(*t) })
	if err != nil {
		return nil, err
	}
	return h, o.removeClone()
}

// hydrated fails where regions are missing.
func (o *operation) hydrated() error {
	c, err := cryptmapper.ReadClone(o.Volume.Name)
	switch {
	case err != nil:
		return err
	case c == nil:
		return errdefs.Errorf(errdefs.ErrState, "the volume is hydrating, and mapping %s has no dm-clone below it", o.Volume.Name)
	case !c.Sound:
		return errdefs.Errorf(errdefs.ErrUnavailable, "dm-clone below mapping %s cannot write its metadata any more: look at the kernel's log and at the device", o.Volume.Name)
	case c.Hydrated < c.Regions:
		return errdefs.Errorf(errdefs.ErrUnavailable, "the volume is hydrating, %d %% done", 100*c.Hydrated/c.Regions)
	}
	return nil
}

// sync makes what was written through a layer durable, and dm-clone commit.
func (o *operation) sync(name string) error {
	file, err := o.node(name)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if err := file.Sync(); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "flushing: %w", err)
	}
	return nil
}
