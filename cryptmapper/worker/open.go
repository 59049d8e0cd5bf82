package worker

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// endsSize is how much of each end of a volume that is not made yet is wiped.
const endsSize = 1 << 20

// open is Mapper.Open.
func (o *operation) open(l *lock) (cryptmapper.Mapping, error) {
	began := time.Now()
	// Writable even for a read-only volume with integrity: its journal is
	// replayed when it opens.
	dev, err := openDevice(o.Volume.Device, !o.Volume.ReadOnly || o.Spec.Integrity != dek.IntegrityNone)
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	defer dev.close()
	if err := o.clearRemains(dev); err != nil {
		return cryptmapper.Mapping{}, err
	}
	h, err := o.header(l, dev)
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	o.headerTook = time.Since(began)
	if h, err = o.bring(l, dev, h); err != nil {
		return cryptmapper.Mapping{}, err
	}
	if !h.Token.Made && !o.Volume.ReadOnly {
		if err := o.wipeEnds(); err != nil {
			return cryptmapper.Mapping{}, err
		}
	}
	return o.describe(dev, h)
}

// bring makes sure that the mapping is up, initialised and exactly what the
// header says.
func (o *operation) bring(l *lock, dev *device, h *luks2.Header) (*luks2.Header, error) {
	up, err := o.existing(l, dev, h)
	if err != nil {
		return nil, err
	}
	if up {
		if h, err = o.settle(dev, h); err != nil {
			return nil, err
		}
	}
	// A try that was cut short may have left a mapping on the way to what it
	// must be, for example one without a journal; where that is what it must be,
	// one through which the volume was being wiped.
	if up && !h.Token.Made && (o.verify(dev, h) != nil || !o.cloned() && !o.initialised(h)) {
		if err := o.remove(o.Volume.Name); err != nil {
			return nil, err
		}
		up = false
	}
	if !up {
		if h, err = o.raise(l, dev, h); err != nil {
			return nil, err
		}
	}
	err = o.verify(dev, h)
	if err == nil && !up {
		err = o.obeyed()
	}
	if err != nil {
		if !up { // never leave a mapping that is not what it must be
			_ = o.remove(o.Volume.Name)
		}
		return nil, err
	}
	return h, nil
}

// raise makes the mapping, which is not there.
func (o *operation) raise(l *lock, dev *device, h *luks2.Header) (*luks2.Header, error) {
	if o.cloned() {
		return o.build(l, dev, h)
	}
	if !o.initialised(h) {
		var err error
		if h, err = o.initialise(l, dev, h); err != nil {
			return nil, err
		}
	}
	return h, o.activate(l, dev, h, 0)
}

// header returns the header to open the device with: the one on it if it
// verifies, else a new one where the rules allow to format.
func (o *operation) header(l *lock, dev *device) (*luks2.Header, error) {
	if o.State == dek.Rotating {
		return o.rotated(dev, dev)
	}
	found, err := o.read(dev)
	if err != nil {
		return nil, err
	}
	if found.Header == nil {
		if err := o.mayFormat(dev, found); err != nil {
			return nil, err
		}
		if err := o.noteFormat(l, dev); err != nil {
			return nil, err
		}
		return o.format(dev)
	}
	if err := o.acceptable(dev, found.Header); err != nil {
		return nil, err
	}
	return found.Header, o.repair(dev, found)
}

// repair makes both copies of the header the one that counts, where one is torn
// or older. It comes before everything that changes the header: an update writes
// the second copy, then the first, so what it begins with must be whole in the
// first. An update that was cut within the first copy left the second alone good,
// and the next one, cut within that, would leave none. A repair writes only what
// does not count. A header found aside has no place to be repaired in, and is put
// there by finishAside, with its key material.
func (o *operation) repair(dev *device, found luks2.Found) error {
	if o.Volume.ReadOnly || o.constellation() {
		return nil
	}
	return found.Repair(dev, o.step)
}

// noteFormat lets close find what a format that is killed leaves on the device. A
// mapping that is there keeps the note of its own.
func (o *operation) noteFormat(l *lock, dev *device) error {
	if _, err := dm.Status(o.Volume.Name); err == nil {
		return nil
	}
	return l.remember(dev)
}

// want is what the header on the device must say.
func (o *operation) want(dev *device) luks2.Want {
	spec := o.Spec
	if o.constellation() {
		spec.Layout = "" // ReadConstellation knows
	}
	return luks2.Want{ID: o.ID, Spec: spec, SectorSize: o.sectorSize(dev)}
}

// acceptable compares a header that verifies with what the record says.
func (o *operation) acceptable(dev *device, h *luks2.Header) error {
	t := h.Token
	switch {
	case o.Header.UUID != "" && o.Header.UUID != h.Copy.UUID():
		return errdefs.Errorf(errdefs.ErrState, "device %s carries header %s of this volume, but header %s was confirmed: an older disk was put in its place", dev.number, h.Copy.UUID(), o.Header.UUID)
	case o.State == dek.Prepared && o.Claim.UUID != "" && o.Claim.UUID != h.Copy.UUID():
		return errdefs.Errorf(errdefs.ErrState, "device %s carries header %s of this volume, but the claim is for %s: an earlier try was put in its place", dev.number, h.Copy.UUID(), o.Claim.UUID)
	case t.Sequence < o.Header.Sequence:
		return errdefs.Errorf(errdefs.ErrState, "the header on device %s has sequence %d, but %d was confirmed: the disk was rolled back", dev.number, t.Sequence, o.Header.Sequence)
	case o.State != dek.Prepared && !t.Made:
		return errdefs.Errorf(errdefs.ErrState, "the record says that the volume was finished, the header on device %s says that it was not: the disk was rolled back", dev.number)
	case o.Volume.ReadOnly && !t.Made:
		return errdefs.Errorf(errdefs.ErrState, "the volume was never finished and is asked for read-only: use it writable once")
	case o.Spec.Integrity == dek.IntegrityNone && luks2.DataOffset+t.Size > dev.size:
		return errdefs.Errorf(errdefs.ErrState, "device %s has %d bytes, the volume needs %d: it was shrunk or another one was put in its place", dev.number, dev.size, luks2.DataOffset+t.Size)
	}
	return nil
}

// mayFormat is the only place that gives permission to format. A blank device
// is necessary and never sufficient.
func (o *operation) mayFormat(dev *device, found luks2.Found) error {
	switch {
	case o.State != dek.Prepared:
		return errdefs.Errorf(errdefs.ErrState, "the volume was formatted before, but no header on device %s verifies (%s): the disk was blanked, swapped or damaged; it will not be formatted", dev.number, oneLine(found.Reason))
	case o.Volume.ReadOnly:
		return errdefs.Errorf(errdefs.ErrState, "the volume was never formatted and is asked for read-only: use it writable once")
	case o.Claim.UUID == "":
		return errdefs.Errorf(errdefs.ErrInvalid, "the volume is new, but no node has claimed to format it")
	}
	for _, uuid := range found.UUIDs {
		if uuid != o.Claim.UUID {
			return errdefs.Errorf(errdefs.ErrState, "device %s is to be formatted, but carries the LUKS header %q that is not the remains of our own try (%s); wipe the device by hand if it is the right one and holds nothing", dev.number, uuid, oneLine(found.Reason))
		}
	}
	if err := dev.exclusive(); err != nil {
		return err
	}
	if len(found.UUIDs) > 0 { // our own remains
		if err := zero(dev, 0, 2*luks2.CopySize); err != nil {
			return err
		}
		o.step("remains wiped")
	}
	return dev.probe()
}

// initialised tells whether every sector of an integrity volume has its tag. Of
// a volume that Constellation made it has: it is initialised when it is formatted.
func (o *operation) initialised(h *luks2.Header) bool {
	return o.Spec.Integrity == dek.IntegrityNone || o.constellation() ||
		h.Token.Integrity != nil && h.Token.Initialised == h.Token.Size
}

// wipeEnds zeroes the first and last MiB of the mapping: no old signature can
// be taken for a filesystem.
func (o *operation) wipeEnds() error {
	file, err := os.OpenFile(dm.Path(o.Volume.Name), os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the new mapping is in use already: %w", err)
	}
	defer func() { _ = file.Close() }()
	size, err := file.Seek(0, 2)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "size of the new mapping: %w", err)
	}
	if err := zero(file, 0, min(endsSize, size)); err != nil {
		return err
	}
	return zero(file, max(0, size-endsSize), min(endsSize, size))
}

// existing tells whether the mapping is up on this device with this header. One
// on another device is removed if nobody has it open: its device is gone.
func (o *operation) existing(l *lock, dev *device, h *luks2.Header) (bool, error) {
	name := o.Volume.Name
	info, err := dm.Status(name)
	if err != nil {
		return false, nil
	}
	s, err := cryptmapper.ReadStack(name)
	if err != nil {
		return false, err
	}
	was := l.recall()
	switch {
	case s.Bottom() != dev.number, was.Seq != 0 && was.Seq != dev.seq:
		if info.OpenCount > 0 {
			return false, errdefs.Errorf(errdefs.ErrState, "mapping %s sits on device %s, the volume is now %s, and something still uses the mapping: end its users first", name, s.Bottom(), dev.number)
		}
		if !o.drivers() {
			return false, errdefs.Errorf(errdefs.ErrState, "mapping %s exists and sits on device %s, which is not %s or was replaced: close it, or take another name", name, s.Bottom(), dev.number)
		}
		return false, o.remove(name)
	case !strings.HasPrefix(s.Lower.UUID, cryptUUID(h)):
		return false, errdefs.Errorf(errdefs.ErrState, "mapping %s on device %s was made from another header (%s)", name, dev.number, s.Lower.UUID)
	case s.Top.ReadOnly != o.Volume.ReadOnly:
		return false, errdefs.Errorf(errdefs.ErrState, "mapping %s exists and its read-only state differs: unstage the volume first", name)
	}
	return true, dm.MakeNode(name, info.Number)
}

// drivers tells whether the mapping's name is one that only the driver gives.
func (o *operation) drivers() bool { return strings.HasPrefix(o.Volume.Name, cryptmapper.Prefix) }

// notOthers refuses a mapping that something else than libcryptsetup made: under
// a name that a person chose any mapping of the system may stand.
func (o *operation) notOthers() error {
	if o.drivers() {
		return nil
	}
	for _, name := range append(cryptmapper.Layers(o.Volume.Name), o.Volume.Name) {
		info, err := dm.Status(name)
		if err == nil && !strings.HasPrefix(info.UUID, "CRYPT-") && !strings.HasPrefix(info.UUID, layerUUID) {
			return errdefs.Errorf(errdefs.ErrState, "mapping %s exists and is no encrypted device of ours (%q): take another name", name, info.UUID)
		}
	}
	return nil
}

// describe returns the mapping as Mapper's callers see it.
func (o *operation) describe(dev *device, h *luks2.Header) (cryptmapper.Mapping, error) {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	m := s.Mapping()
	m.Made, m.Header = h.Token.Made, h.ID()
	if o.State == dek.Rotating {
		m.Header.Fingerprint = dek.Fingerprint(o.key)
	}
	m.Header.Backup, err = o.backup(dev, h)
	return m, err
}

func oneLine(err error) string {
	if err == nil {
		return ""
	}
	return strings.ReplaceAll(err.Error(), "\n", "; ")
}
