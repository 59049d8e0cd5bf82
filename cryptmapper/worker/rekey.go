package worker

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Giving a volume that Constellation made to a DEK of ours changes its header
// and nothing else. The keyslot area has one place, so the new key material must
// overwrite the old, and while it does neither header opens anything. So the
// new header is put aside first, whole, into a part of the header area that no
// header names; from then on there is always one that is whole: the old one
// until the record is Formatted, the new one, aside or in its place, after.
// Formatted before the old header is touched means that whatever a crash
// leaves, or a host makes of it, nothing may format the device.

// asideOffset is where a header waits within the header area: behind every
// keyslot area and behind where any reader of LUKS2 looks for a lost header
// (4 MiB at most).
const asideOffset = 8 << 20

// asideSize covers a header with its key material.
const asideSize = 2 << 20

// disk is what a device is when its header is replaced.
type disk interface {
	io.ReaderAt
	luks2.Device
}

// aside is a disk whose header area begins at asideOffset.
type aside struct{ disk }

func (a aside) ReadAt(p []byte, off int64) (int, error) { return a.disk.ReadAt(p, asideOffset+off) }
func (a aside) WriteAt(p []byte, off int64) (int, error) {
	return a.disk.WriteAt(p, asideOffset+off)
}

// validRekey checks what only Rekey is told.
func (o *operation) validRekey() error {
	switch {
	case o.State != dek.Prepared && o.State != dek.Formatted, o.Spec.Layout != "":
		return errdefs.Errorf(errdefs.ErrState, "DEK %s is in state %s with layout %q: a volume can only be given to a new DEK of ours", o.ID, o.State, o.Spec.Layout)
	case o.State == dek.Formatted: // nothing of the old header is needed
		return nil
	case o.old.Len() != dek.Size:
		return errdefs.Errorf(errdefs.ErrInvalid, "the old key of %s has %d bytes, not %d", o.From, o.old.Len(), dek.Size)
	}
	if err := dek.CheckUUID(string(o.From)); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "the old header: %w", err)
	}
	return nil
}

// rekey is Mapper.Rekey.
func (o *operation) rekey() (dek.HeaderID, error) {
	dev, err := openDevice(o.Volume.Device, true)
	if err != nil {
		return dek.HeaderID{}, err
	}
	defer dev.close()
	if err := o.notOpen(dev); err != nil {
		return dek.HeaderID{}, err
	}
	var h *luks2.Header
	if o.State == dek.Prepared {
		h, err = o.prepareRekey(dev)
	} else {
		h, err = o.finishRekey(dev, dev)
	}
	if err != nil {
		return dek.HeaderID{}, err
	}
	return h.ID(), nil
}

// trialPrefix begins the names of mappings that volumes are tried as.
const trialPrefix = cryptmapper.Prefix + "trial-"

func (o *operation) trialName() string {
	return trialPrefix + strings.TrimPrefix(o.Volume.Name, cryptmapper.Prefix)
}

// notOpen makes sure that nothing uses the device.
func (o *operation) notOpen(dev *device) error {
	if _, err := dm.Status(o.Volume.Name); err == nil {
		return errdefs.Errorf(errdefs.ErrState, "the volume is open as mapping %s: stop what uses it first", o.Volume.Name)
	}
	if err := o.removeTrials(dev.number); err != nil {
		return err
	}
	return dev.exclusive()
}

// removeTrials removes what a killed trial has left on a device: it would keep
// the volume from being opened in any way.
func (o *operation) removeTrials(n dm.Number) error {
	left, err := leftOn(n, trialPrefix)
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := o.remove(strings.TrimSuffix(name, cryptmapper.IntegrityName(""))); err != nil {
			return err
		}
	}
	return nil
}

// prepareRekey makes the new header and puts it aside. Until it returns, and
// after, the volume opens as before.
func (o *operation) prepareRekey(dev *device) (*luks2.Header, error) {
	found, err := luks2.Read(dev, o.want(dev), o.key)
	if err != nil {
		return nil, err
	}
	if found.Header != nil { // done, and the record does not know it
		return found.Header, o.acceptable(dev, found.Header)
	}
	switch {
	case o.Claim.UUID == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "nobody has claimed the header that %s is to get", o.ID)
	case o.Claim.UUID == string(o.From):
		return nil, errdefs.Errorf(errdefs.ErrState, "the record of %s is claimed for the UUID that is on device %s already: with it the volume would count as the remains of a format", o.ID, dev.number)
	}
	theirs := o.asTheirs()
	old, err := theirs.read(dev)
	if err != nil {
		return nil, err
	}
	if old.Header == nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "device %s carries no header that Constellation made with UUID %s and integrity %q (%s); nothing was changed", dev.number, o.From, o.Spec.Integrity, oneLine(old.Reason))
	}
	token, err := theirs.try(dev, old.Header)
	if err != nil {
		return nil, err
	}
	token.DEKID = string(o.ID)
	h, err := o.newHeader(dev, old.Header, o.Claim.UUID, token)
	if err != nil {
		return nil, err
	}
	return h, o.putAside(dev, dev, h)
}

// asTheirs is the operation that would open the volume as it is.
func (o *operation) asTheirs() *operation {
	return &operation{Request: cryptmapper.Request{
		Op: cryptmapper.OpOpen, Volume: cryptmapper.Volume{Name: o.trialName(), Device: o.Volume.Device, ReadOnly: true},
		ID: o.From, State: dek.Formatted, Header: dek.HeaderID{UUID: string(o.From)},
		Spec: dek.Spec{Cipher: o.Spec.Cipher, Integrity: o.Spec.Integrity, Layout: dek.LayoutConstellation},
	}, key: o.old, step: o.step, log: o.log}
}

// try opens the volume as it is, all layers read-only, and returns what a token
// of ours says of it. Constellation initialises a volume when it formats it.
func (o *operation) try(dev *device, h *luks2.Header) (luks2.Token, error) {
	if err := o.checkIntegrity(dev, h); err != nil {
		return luks2.Token{}, err
	}
	d, done, err := o.load(dev, h)
	if err != nil {
		return luks2.Token{}, err
	}
	defer done()
	defer func() { _ = o.remove(o.Volume.Name) }()
	if err := d.activate(o.Volume.Name, o.key, flagReadOnly|flagPrivate|flagKeyring|flagIgnorePersistent); err != nil {
		return luks2.Token{}, classify(err, fmt.Sprintf("trying the old key on device %s", dev.number))
	}
	o.step("old header tried")
	if err := o.verify(dev, h); err != nil {
		return luks2.Token{}, err
	}
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil {
		return luks2.Token{}, err
	}
	t := luks2.NewToken("")
	t.Made, t.Size = true, s.Crypt.Length*512
	if s.Integrity != nil {
		g := geometry(s.Integrity)
		t.Integrity, t.Initialised = &g, t.Size
	}
	return t, o.remove(o.Volume.Name)
}

// newHeader makes, in memory, the header that the volume gets: the old one's
// segment and volume key, that UUID, one keyslot under the new key, our token.
// It must give the same volume key as the old one.
func (o *operation) newHeader(dev *device, old *luks2.Header, uuid string, token luks2.Token) (*luks2.Header, error) {
	was, err := o.volumeKey(dev, old, o.old)
	if err != nil {
		return nil, err
	}
	defer was.Wipe()
	h, err := o.underNewKey(dev, old, was, uuid, token)
	if err != nil {
		return nil, err
	}
	is, err := o.volumeKey(dev, h, o.key)
	if err != nil {
		return nil, err
	}
	defer is.Wipe()
	if !is.Equal(was) {
		return nil, errdefs.Errorf(errdefs.ErrState, "the new header of device %s gives another volume key than the old one; nothing was changed", dev.number)
	}
	return h, nil
}

func (o *operation) underNewKey(dev *device, old *luks2.Header, vk secret.Bytes, uuid string, token luks2.Token) (*luks2.Header, error) {
	file, err := memory("new-header")
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	if err := old.Materialise(file); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	d, err := openLUKS(fdPath(file), dev.path(), o.log)
	if err != nil {
		return nil, classify(err, "preparing the new header")
	}
	defer d.free()
	if err := d.load(); err != nil {
		return nil, classify(err, "loading the old header")
	}
	if err := d.replaceKey(uuid, vk, o.key); err != nil {
		return nil, classify(err, "putting the volume key under the new key")
	}
	if err := d.setToken(token.Unsealed()); err != nil {
		return nil, classify(err, "adding the token")
	}
	h, err := luks2.Seal(file, o.want(dev), o.key)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "sealing the new header: %w", err)
	}
	return h, nil
}

// volumeKey returns what a header gives under a key; the caller wipes it.
func (o *operation) volumeKey(dev *device, h *luks2.Header, key secret.Bytes) (secret.Bytes, error) {
	d, done, err := o.load(dev, h)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer done()
	vk, err := d.volumeKey(key)
	if err != nil {
		return secret.Bytes{}, classify(err, "fetching the volume key")
	}
	return vk, nil
}

// putAside writes h aside, if it passes as a header of ours, and reads it back.
func (o *operation) putAside(dev *device, d disk, h *luks2.Header) error {
	file, err := memory("new-header")
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	if err := h.Materialise(file); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	if err := o.expect(file, dev, "the new header"); err != nil {
		return err
	}
	if err := h.Write(aside{d}, o.step); err != nil {
		return err
	}
	return o.expect(aside{d}, dev, "what was put aside")
}

// expect fails unless a whole header of ours is to be read from r.
func (o *operation) expect(r io.ReaderAt, dev *device, what string) error {
	found, err := luks2.Read(r, o.want(dev), o.key)
	if err != nil {
		return err
	}
	if found.Header == nil || !found.Whole {
		return errdefs.Errorf(errdefs.ErrState, "%s of device %s does not pass: %s", what, dev.number, oneLine(found.Reason))
	}
	return o.acceptable(dev, found.Header)
}

// finishRekey puts the header that waits aside in its place.
func (o *operation) finishRekey(dev *device, d disk) (*luks2.Header, error) {
	h, reason, err := o.finishAside(dev, d)
	if err == nil && h == nil {
		err = errdefs.Errorf(errdefs.ErrState, "the record of %s says that the volume has its header, but device %s has none of it (%s): this is another disk, or an older state of it; nothing was changed", o.ID, dev.number, oneLine(reason))
	}
	return h, err
}

// finishAside puts the header that waits aside in its place, unless it is there
// already, and wipes the place where it waited. Where there is none in either
// place it returns nil with the reason, and has written nothing.
func (o *operation) finishAside(dev *device, d disk) (h *luks2.Header, reason, err error) {
	found, err := luks2.Read(d, o.want(dev), o.key)
	if err != nil {
		return nil, nil, err
	}
	if h = found.Header; h == nil {
		waiting, err := luks2.Read(aside{d}, o.want(dev), o.key)
		if err != nil || waiting.Header == nil {
			return nil, found.Reason, err
		}
		h = waiting.Header
	}
	if err := o.acceptable(dev, h); err != nil {
		return nil, nil, err
	}
	switch {
	case found.Header == nil:
		err = h.Write(d, o.step)
	case !found.Whole:
		err = found.Repair(d, o.step)
	}
	if err != nil {
		return nil, nil, err
	}
	return h, nil, o.clearAside(d)
}

// clearAside wipes what was put aside, if anything was.
func (o *operation) clearAside(d disk) error {
	b := make([]byte, asideSize)
	if _, err := d.ReadAt(b, asideOffset); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "reading the header area: %w", err)
	}
	if !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) {
		return nil
	}
	clear(b)
	if _, err := d.WriteAt(b, asideOffset); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "wiping what was put aside: %w", err)
	}
	if err := d.Sync(); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "wiping what was put aside: %w", err)
	}
	o.step("what was put aside wiped")
	return nil
}
