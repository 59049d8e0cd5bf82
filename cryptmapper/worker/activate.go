package worker

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// activate maps the device with the header h, given to libcryptsetup as a file
// in memory that the host cannot change.
func (o *operation) activate(l *lock, dev *device, h *luks2.Header, extra uint32) error {
	if err := o.checkIntegrity(dev, h); err != nil {
		return err
	}
	if err := l.remember(dev); err != nil {
		return err
	}
	integrity := o.Spec.Integrity != dek.IntegrityNone
	if !integrity && luks2.DataOffset+o.dataSize(dev, h) != dev.size {
		return o.activatePart(dev, h)
	}
	d, done, err := o.load(dev, h)
	if err != nil {
		return err
	}
	defer done()
	flags := flagPrivate | flagKeyring | flagIgnorePersistent | extra
	if o.Volume.ReadOnly && !integrity {
		flags |= flagReadOnly
	}
	if o.Spec.Discard {
		flags |= flagDiscard
	}
	if o.direct() {
		flags |= flagNoJournal
	}
	for i, option := range cryptmapper.PerformanceOptions() {
		if slices.Contains(o.performance(), option) {
			flags |= performanceFlags()[i]
		}
	}
	name := o.lower()
	if err := d.activate(name, o.key, flags); err != nil {
		return classify(err, fmt.Sprintf("opening device %s", dev.number))
	}
	o.step("mapping activated")
	info, err := dm.Status(name)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	if err := dm.MakeNode(name, info.Number); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	if o.Volume.ReadOnly && integrity && !o.cloned() {
		return o.makeReadOnly(d, h)
	}
	return nil
}

// activatePart maps a device that has grown by a part of a sector of ours, which
// libcryptsetup would map in full and the kernel refuses.
func (o *operation) activatePart(dev *device, h *luks2.Header) error {
	name := o.Volume.Name
	err := o.makeCrypt(dev, h, name, func() error {
		return dm.Load(name, []dm.Target{{Length: uint64(o.dataSize(dev, h) / 512), Type: "crypt", Params: o.cryptParams(dev, h)}}, o.Volume.ReadOnly)
	})
	if err != nil {
		_ = dm.Remove(name)
		return unavailable(fmt.Errorf("opening device %s: %w", dev.number, err))
	}
	o.step("mapping activated")
	return nil
}

// cryptParams is the table line that libcryptsetup would load for a volume without
// integrity; verify compares it with what the volume must be.
func (o *operation) cryptParams(dev *device, h *luks2.Header) string {
	options := append(o.performance(), o.cryptOptions(h)...)
	return fmt.Sprintf("%s :64:logon:cryptsetup:%s-d0 0 %s %d %d %s", o.Spec.Cipher, h.Copy.UUID(), dev.number, luks2.DataOffset/512, len(options), strings.Join(options, " "))
}

// cryptOptions are those in the table that are the same with integrity and without.
func (o *operation) cryptOptions(h *luks2.Header) []string {
	var options []string
	if h.SectorSize() == 4096 {
		options = append(options, "sector_size:4096")
	}
	if o.Spec.Discard {
		options = append(options, cryptmapper.DiscardOption)
	}
	return options
}

// makeCrypt makes a dm-crypt mapping of the volume, with the table that load loads
// into it while the volume key is in the keyring.
func (o *operation) makeCrypt(dev *device, h *luks2.Header, name string, load func() error) error {
	number, err := dm.Create(name, cryptUUID(h)+name)
	if err == nil {
		err = o.keyed(dev, h, load)
	}
	if err == nil {
		err = swap(name)
	}
	if err == nil {
		err = dm.MakeNode(name, number)
	}
	return unavailable(err)
}

// cryptUUID begins the UUIDs that libcryptsetup gives to mappings of a header; their
// names follow.
func cryptUUID(h *luks2.Header) string {
	return "CRYPT-LUKS2-" + strings.ReplaceAll(h.Copy.UUID(), "-", "") + "-"
}

// direct tells whether dm-integrity is to work without its journal.
func (o *operation) direct() bool { return o.Spec.IntegrityMode == dek.ModeDirect }

// performance is what the volume asks for, sorted.
func (o *operation) performance() []string {
	asked := strings.FieldsFunc(o.Volume.Performance, func(r rune) bool { return r == ',' })
	slices.Sort(asked)
	return asked
}

// obeyed fails where the new mapping has not the performance options that were
// asked for: libcryptsetup leaves out what the kernel refuses.
func (o *operation) obeyed() error {
	s, err := cryptmapper.ReadLower(o.lower())
	if err != nil {
		return err
	}
	if !slices.Equal(s.Crypt.Performance, o.performance()) {
		return errdefs.Errorf(errdefs.ErrInvalid, "dm-crypt on this node was asked for the performance options %q and has %q", o.performance(), s.Crypt.Performance)
	}
	return nil
}

// load gives libcryptsetup a copy of the header in memory and the device.
func (o *operation) load(dev *device, h *luks2.Header) (*luks, func(), error) {
	file, err := memory("header")
	if err != nil {
		return nil, nil, err
	}
	if err := h.Materialise(file); err != nil {
		_ = file.Close()
		return nil, nil, errdefs.Errorf(errdefs.ErrUnavailable, "memory for the header: %w", err)
	}
	d, err := openLUKS(fdPath(file), dev.path(), o.log)
	if err == nil {
		if err = d.load(); err != nil {
			d.free()
		}
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, classify(err, "loading the header")
	}
	return d, func() { d.free(); _ = file.Close() }, nil
}

// makeReadOnly turns the top mapping of an integrity volume read-only. The
// layer below stays writable, because it has a journal to replay: opened
// read-only as a whole, every read would fail. dm-crypt takes the volume key
// out of this thread's keyring when the table is loaded.
func (o *operation) makeReadOnly(d *luks, h *luks2.Header) error {
	name := o.Volume.Name
	table, err := dm.Table(name)
	if err != nil || len(table) != 1 {
		return errdefs.Errorf(errdefs.ErrUnavailable, "table of mapping %s: %w", name, err)
	}
	err = o.withVolumeKey(d, h, func() error { return dm.Load(name, table, true) })
	if err == nil {
		err = dm.Resume(name)
	}
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "making mapping %s read-only: %w", name, err)
	}
	return nil
}

// withVolumeKey does something while the volume key is in this thread's keyring,
// where dm-crypt takes it from when a table is loaded.
func (o *operation) withVolumeKey(d *luks, h *luks2.Header, do func() error) error {
	vk, err := d.volumeKey(o.key)
	if err != nil {
		return classify(err, "fetching the volume key")
	}
	defer vk.Wipe()
	description := fmt.Sprintf("cryptsetup:%s-d0", h.Copy.UUID())
	id, err := unix.AddKey("logon", description, vk.Expose(), unix.KEY_SPEC_THREAD_KEYRING)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "putting the volume key into the keyring: %w", err)
	}
	defer func() { _, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_THREAD_KEYRING, 0, 0) }()
	return do()
}

// markMade is Mapper.MarkMade.
func (o *operation) markMade(l *lock) (cryptmapper.Mapping, error) {
	dev, h, err := o.opened(l)
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	defer dev.close()
	if !h.Token.Made {
		if err := flush(dm.Path(o.Volume.Name)); err != nil {
			return cryptmapper.Mapping{}, err
		}
		o.step("mapping flushed")
		if h, err = o.update(dev, h, func(t *luks2.Token) { t.Made = true }); err != nil {
			return cryptmapper.Mapping{}, err
		}
	}
	return o.describe(dev, h)
}

// resize is Mapper.Resize.
func (o *operation) resize(l *lock) (cryptmapper.Mapping, error) {
	dev, h, err := o.opened(l)
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	defer dev.close()
	if o.Spec.Integrity == dek.IntegrityNone {
		h, err = o.fill(dev, h)
	} else {
		h, err = o.growSealed(dev, h)
	}
	if err != nil {
		return cryptmapper.Mapping{}, err
	}
	return o.describe(dev, h)
}

// fill lets a volume without integrity fill its device.
func (o *operation) fill(dev *device, h *luks2.Header) (*luks2.Header, error) {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil {
		return nil, err
	}
	size := o.dataSize(dev, h)
	if s.Crypt.Length*512 < size {
		if err := o.grow(dev, h, size); err != nil {
			return nil, err
		}
		o.step("mapping grown")
	}
	if h.Token.Size >= size || o.Volume.ReadOnly {
		return h, nil
	}
	return o.update(dev, h, func(t *luks2.Token) { t.Size = size })
}

// dataSize is what a volume without integrity can have of its device: whole sectors.
func (o *operation) dataSize(dev *device, h *luks2.Header) int64 {
	sector := int64(h.SectorSize())
	return (dev.size - luks2.DataOffset) / sector * sector
}

// grow lets libcryptsetup reload the table. The key has to be in this thread's
// keyring again for that.
func (o *operation) grow(dev *device, h *luks2.Header, size int64) error {
	d, done, err := o.load(dev, h)
	if err != nil {
		return err
	}
	defer done()
	if err := d.activate("", o.key, flagKeyring); err != nil {
		return classify(err, "fetching the volume key")
	}
	if err := d.resize(o.Volume.Name, size); err != nil {
		return classify(err, fmt.Sprintf("growing mapping %s", o.Volume.Name))
	}
	return nil
}

// opened returns device and header of a mapping that is up and checked.
func (o *operation) opened(l *lock) (*device, *luks2.Header, error) {
	dev, err := openDevice(o.Volume.Device, true)
	if err != nil {
		return nil, nil, err
	}
	h, err := o.openedHeader(l, dev)
	if err != nil {
		dev.close()
		return nil, nil, err
	}
	return dev, h, nil
}

func (o *operation) openedHeader(l *lock, dev *device) (*luks2.Header, error) {
	if err := resumeAll(o.Volume.Name); err != nil {
		return nil, err
	}
	h, err := o.wholeHeader(dev)
	if err != nil {
		return nil, err
	}
	up, err := o.existing(l, dev, h)
	if err != nil {
		return nil, err
	}
	if !up {
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s is not open on device %s", o.Volume.Name, dev.number)
	}
	if h, err = o.settle(dev, h); err != nil {
		return nil, err
	}
	return h, o.verify(dev, h)
}

// wholeHeader returns the header of a volume that is open, fit to be changed: in
// its place, with its key material, in both copies. Its key may be Rotating since
// it was opened, and an Open that gave it another header may have been cut.
func (o *operation) wholeHeader(dev *device) (*luks2.Header, error) {
	if o.State == dek.Rotating && !o.Volume.ReadOnly {
		if h, _, err := o.finishAside(dev, dev); err != nil || h != nil {
			return h, err
		}
	}
	found, err := o.read(dev)
	if err != nil {
		return nil, err
	}
	if found.Header == nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "no header on device %s verifies (%s)", dev.number, oneLine(found.Reason))
	}
	if err := o.acceptable(dev, found.Header); err != nil {
		return nil, err
	}
	return found.Header, o.repair(dev, found)
}

// close is Mapper.Close.
func (o *operation) close(l *lock) error {
	name := o.Volume.Name
	if err := resumeAll(name); err != nil {
		return err
	}
	if err := o.remove(name); err != nil {
		return err
	}
	if n, err := dm.ParseNumber(l.recall().Number); err == nil {
		return removeTemporary(n)
	}
	return nil
}

// clearRemains removes what a killed worker left on the way: layers without a
// top, mappings without a table, libcryptsetup's temporary mappings; and lets
// I/O to a suspended mapping of ours go on, because it would hang for ever.
func (o *operation) clearRemains(dev *device) error {
	if err := removeTemporary(dev.number); err != nil {
		return err
	}
	if err := o.removeTrials(dev.number); err != nil {
		return err
	}
	name := o.Volume.Name
	if err := resumeAll(name); err != nil {
		return err
	}
	top, err := dm.Status(name)
	if err == nil && top.Live {
		return nil
	}
	return o.remove(name)
}

// resumeAll resumes a mapping and its layers, the lowest first.
func resumeAll(name string) error {
	all := append([]string{name}, cryptmapper.Layers(name)...)
	slices.Reverse(all)
	for _, n := range all {
		info, err := dm.Status(n)
		if err != nil || !info.Suspended {
			continue
		}
		if err := swap(n); err != nil {
			if info, _ := dm.Status(n); info.Suspended {
				return err
			}
		}
	}
	return nil
}

// remove takes a mapping and the layers below it away.
func (o *operation) remove(name string) error {
	return o.removeAll(append([]string{name}, cryptmapper.Layers(name)...)...)
}

// removeAll removes those of the mappings that are there, in their order.
func (o *operation) removeAll(names ...string) error {
	for _, n := range names {
		if _, err := dm.Status(n); errors.Is(err, dm.ErrNotFound) {
			continue
		}
		if err := removeOne(n); err != nil {
			return err
		}
		o.step("mapping removed")
	}
	return nil
}

// removeOne removes one mapping, nil where there is none. A host's udev may
// have it open for an instant to look at it, which no event tells us of: so
// EBUSY is tried again for two seconds.
func removeOne(name string) error {
	for until := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := dm.Remove(name)
		switch {
		case err == nil, errors.Is(err, dm.ErrNotFound):
			return nil
		case errors.Is(err, unix.EBUSY) && time.Now().Before(until):
			continue
		case errors.Is(err, unix.EBUSY):
			return errdefs.Errorf(errdefs.ErrUnavailable, "mapping %s is still in use: a mount, a process or another mapping has it open", name)
		default:
			return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
		}
	}
}

// removeTemporary removes the mapping that libcryptsetup makes for a moment
// while it formats an integrity device, if one was left on this device.
func removeTemporary(n dm.Number) error {
	left, err := leftOn(n, cryptmapper.TemporaryPrefix)
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := removeOne(name); err != nil {
			return err
		}
	}
	return nil
}

// leftOn lists the mappings whose names begin like that and that hold the device,
// be it by a table that was loaded and never became the active one.
func leftOn(n dm.Number, prefix string) ([]string, error) {
	all, err := dm.List()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	var left []string
	for _, m := range all {
		if !strings.HasPrefix(m.Name, prefix) {
			continue
		}
		active, _ := dm.Table(m.Name) // what is gone by now holds nothing
		loaded, _ := dm.LoadedTable(m.Name)
		if slices.ContainsFunc(append(active, loaded...), func(t dm.Target) bool { return slices.Contains(strings.Fields(t.Params), n.String()) }) {
			left = append(left, m.Name)
		}
	}
	return left, nil
}
