package worker

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// How a volume with integrity grows, while it is in use. libcryptsetup refuses
// to, the kernel takes the longer tables. In this order, each step durable
// before the next:
//
//  1. the token says what the volume grows to;
//  2. the layers below the mapping get their longer tables;
//  3. the new area gets its tags through a mapping of its own;
//  4. the token says that the volume has its new size;
//  5. the mapping gets its longer table.
//
// Up to the fourth step the volume opens at its old size, and the next Resize
// goes on; after it, whoever finds the mapping too short does the fifth. So
// nothing is ever seen that the token does not know of.

// growSealed is Resize of a volume with integrity.
func (o *operation) growSealed(dev *device, h *luks2.Header) (_ *luks2.Header, err error) {
	switch {
	case o.constellation():
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a volume that Constellation made with integrity cannot grow: copy the data to a larger one")
	case o.Volume.ReadOnly:
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s is read-only: the volume grows when it is open writable", o.Volume.Name)
	}
	for {
		if h.Token.Growing == nil {
			to := target(dev, h)
			if to.Size <= h.Token.Size {
				return h, nil
			}
			if h, err = o.update(dev, h, func(t *luks2.Token) { t.Growing = &to }); err != nil {
				return nil, err
			}
		}
		if h, err = o.growOn(dev, h); err != nil {
			return nil, err
		}
	}
}

// target is what the volume can be on the device as it is now.
func target(dev *device, h *luks2.Header) luks2.Growth {
	sectors := provided(dev, *h.Token.Integrity, h.PerBlock())
	return luks2.Growth{Sectors: sectors, Size: sectors * 512}
}

// grown is the geometry that a volume grows to.
func grown(t luks2.Token) luks2.Geometry {
	g := *t.Integrity
	g.Sectors = t.Growing.Sectors
	return g
}

// growOn brings the growth that the token tells of to its end.
func (o *operation) growOn(dev *device, h *luks2.Header) (*luks2.Header, error) {
	to := h.Token.Growing
	if need := lastSector(*h.Token.Integrity, h.PerBlock(), to.Sectors-1); need >= dev.area() {
		return nil, errdefs.Errorf(errdefs.ErrState, "device %s has %d bytes, and the volume is growing to what needs %d: it was shrunk again; the volume still has its old size", dev.number, dev.size, luks2.DataOffset+(need+1)*512)
	}
	if err := o.lengthen(to.Sectors); err != nil {
		return nil, err
	}
	h, err := o.initialiseNew(dev, h)
	if err != nil {
		return nil, err
	}
	g := grown(h.Token)
	h, err = o.update(dev, h, func(t *luks2.Token) {
		t.Size, t.Initialised, t.Integrity, t.Growing = to.Size, to.Size, &g, nil
	})
	if err != nil {
		return nil, err
	}
	return h, o.catchUp(dev, h)
}

// lengthen lets the integrity layer provide so many sectors.
func (o *operation) lengthen(sectors int64) error {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil || s.Integrity.Length >= sectors {
		return err
	}
	name := s.Integrity.Info.Name
	if err := longer(name, name, sectors); err != nil {
		return err
	}
	o.step("longer table of the integrity layer loaded")
	if err := swap(name); err != nil {
		return err
	}
	o.step("integrity layer grown")
	s, err = cryptmapper.ReadStack(o.Volume.Name)
	if err == nil && (s.Integrity.Length != sectors || s.Integrity.Provided < sectors) {
		err = errdefs.Errorf(errdefs.ErrState, "mapping %s was to provide %d sectors and provides %d of %d", name, sectors, s.Integrity.Length, s.Integrity.Provided)
	}
	return err
}

// longer loads the table of one mapping, with another length, into the same or
// another one.
func longer(from, into string, sectors int64) error {
	table, err := dm.Table(from)
	if err == nil && len(table) != 1 {
		err = fmt.Errorf("mapping %s has %d targets", from, len(table))
	}
	if err == nil {
		table[0].Length = uint64(sectors)
		err = dm.Load(into, table, false)
	}
	return growing(err)
}

// initialiseNew gives every sector of the new area its tag. It is written
// through a mapping of all that the integrity layer provides, because where a
// sector lies is part of what is authenticated.
func (o *operation) initialiseNew(dev *device, h *luks2.Header) (*luks2.Header, error) {
	name := cryptmapper.CryptName(o.Volume.Name)
	if err := removeOne(name); err != nil {
		return nil, err
	}
	defer func() { _ = removeOne(name) }()
	if err := o.second(dev, h, name); err != nil {
		return nil, err
	}
	o.step("second mapping made")
	old, to := h.Token.Size, *h.Token.Growing
	err := o.inPieces(to.Done, to.Size-old, "growing: initialising the integrity tags of the new space", func(from, end int64) error {
		if err := wipe(dm.Path(name), old+from, end-from); err != nil {
			return err
		}
		o.step("chunk initialised")
		next, err := o.update(dev, h, func(t *luks2.Token) {
			t.Growing = &luks2.Growth{Sectors: to.Sectors, Size: to.Size, Done: end}
		})
		if err == nil {
			h = next
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := removeOne(name); err != nil {
		return nil, err
	}
	o.step("second mapping removed")
	return h, nil
}

// second makes a mapping like the volume's own, but of all that the integrity
// layer provides.
func (o *operation) second(dev *device, h *luks2.Header, name string) error {
	number, err := dm.Create(name, "CRYPT-LUKS2-"+strings.ReplaceAll(h.Copy.UUID(), "-", "")+"-"+name)
	if err == nil {
		err = o.keyed(dev, h, func() error { return longer(o.Volume.Name, name, h.Token.Growing.Sectors) })
	}
	if err == nil {
		err = swap(name)
	}
	if err == nil {
		err = dm.MakeNode(name, number)
	}
	return growing(err)
}

// catchUp lets a mapping that is shorter than the token says have its size: a
// growth was cut short before its last step.
func (o *operation) catchUp(dev *device, h *luks2.Header) error {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil || o.constellation() || h.Token.Integrity == nil || s.Integrity == nil || s.Crypt.Length*512 >= h.Token.Size {
		return err
	}
	name := o.Volume.Name
	if err := removeOne(cryptmapper.CryptName(name)); err != nil {
		return err
	}
	if err := o.lengthen(h.Token.Integrity.Sectors); err != nil {
		return err
	}
	if err := o.keyed(dev, h, func() error { return longer(name, name, h.Token.Size/512) }); err != nil {
		return err
	}
	o.step("longer table loaded")
	if err := swap(name); err != nil {
		return err
	}
	o.step("mapping grown")
	return nil
}

// keyed does something with the volume key in the keyring.
func (o *operation) keyed(dev *device, h *luks2.Header, do func() error) error {
	d, done, err := o.load(dev, h)
	if err != nil {
		return err
	}
	defer done()
	return o.withVolumeKey(d, h, do)
}

// swap makes the table that was loaded the active one, or lets the I/O of a
// suspended mapping go on. The kernel suspends and resumes within the one call,
// so that nothing can kill us in between; and it does not try to make room by
// writing to the volume whose I/O waits. A table that does not fit is gone when
// it was tried once: then the mapping goes on as it was.
func swap(name string) error {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return growing(err)
	}
	err := dm.Resume(name)
	if err == nil {
		return nil
	}
	if info, e := dm.Status(name); e == nil && info.Suspended {
		_ = dm.Resume(name)
	}
	return growing(err)
}

// growing gives what the device-mapper says a class.
func growing(err error) error {
	if err == nil {
		return nil
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
}
