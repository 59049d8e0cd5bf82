package worker

import (
	"fmt"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// How a volume with integrity grows, while it is in use. libcryptsetup refuses
// to, the kernel takes the longer tables. In this order, each step durable
// before the next:
//
//  1. the token says what the volume grows to;
//  2. the layers below the mapping get their longer tables;
//  3. the new area gets its tags by being wiped; or, where the layout and the
//     kernel allow, dm-clone is put in front of it, with its metadata behind the
//     new end;
//  4. the token says that the volume has its new size;
//  5. the mapping gets its longer table.
//
// Up to the fourth step the volume opens at its old size, and the next Resize
// goes on; after it, whoever finds the mapping too short does the fifth. So
// nothing is ever seen, let alone written, that the token does not know of.

// growSealed is Resize of a volume with integrity. One that is not made yet
// keeps its size until it is.
func (o *operation) growSealed(dev *device, h *luks2.Header) (_ *luks2.Header, err error) {
	switch {
	case o.constellation():
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a volume that Constellation made with integrity cannot grow: copy the data to a larger one")
	case o.Volume.ReadOnly:
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s is read-only: the volume grows when it is open writable", o.Volume.Name)
	case !h.Token.Made:
		return h, nil
	}
	for {
		to := target(dev, h)
		if h.Token.Growing == nil && to.Size <= h.Token.Size {
			return h, nil
		}
		if h.Token.Hydration != nil {
			return nil, o.stillHydrating()
		}
		if h.Token.Growing == nil {
			if h, err = o.update(dev, h, func(t *luks2.Token) { t.Growing = &to }); err != nil {
				return nil, err
			}
		}
		if h, err = o.growOn(dev, h); err != nil || h.Token.Hydration != nil {
			return h, err
		}
	}
}

// stillHydrating tells how far the volume is, which must not grow before it is
// all hydrated: dm-clone's metadata lies where it would.
func (o *operation) stillHydrating() error {
	err := o.hydrated()
	if err == nil {
		err = errdefs.Errorf(errdefs.ErrUnavailable, "the volume is hydrating, 100 %% done")
	}
	return fmt.Errorf("%w; it grows when that is done", err)
}

// target is what the volume can be on the device as it is now.
func target(dev *device, h *luks2.Header) luks2.Growth {
	sectors := provided(dev, *h.Token.Integrity, h.PerBlock())
	var reserved int64
	if h.Token.Reserved > 0 {
		_, reserved = cryptmapper.CloneArea(sectors * 512)
	}
	return luks2.Growth{Sectors: sectors, Size: (sectors*512 - reserved) &^ 4095}
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
	if err := o.lengthen(dev, h, to.Sectors); err != nil {
		return nil, err
	}
	t, g := h.Token, grown(h.Token)
	t.Size, t.Initialised, t.Integrity, t.Growing = to.Size, to.Size, &g, nil
	var err error
	if o.cloned() {
		h, err = o.cloneNew(dev, h, &t)
	} else {
		h, err = o.wipeAside(dev, h)
	}
	if err != nil {
		return nil, err
	}
	if h, err = o.update(dev, h, func(now *luks2.Token) { *now = t }); err != nil {
		return nil, err
	}
	return o.settle(dev, h)
}

// cloneNew prepares the new area of a volume with the layout clone, for the
// token that it will have: dm-clone goes in front of what has no tags yet, or all
// of it is wiped. Nothing of it is seen or used yet, so that each try begins
// anew but for what was wiped.
func (o *operation) cloneNew(dev *device, h *luks2.Header, t *luks2.Token) (*luks2.Header, error) {
	old, to := h.Token.Size, h.Token.Growing
	t.Reserved = to.Sectors*512 - to.Size
	if err := o.removeClone(); err != nil {
		return nil, err
	}
	// What dm-clone left behind the old end. A volume that grows by less than
	// that has nothing of it inside.
	if err := o.zeroes(old, min(h.Token.Reserved, to.Size-old)); err != nil {
		return nil, err
	}
	if err := o.zeroArea(*t); err != nil {
		return nil, err
	}
	done := to.Done
	if o.hasClone() != nil || done == to.Size-old {
		return o.wipeNew(dev, h, o.lower())
	}
	region, _ := cryptmapper.CloneArea(to.Sectors * 512)
	t.Initialised = old + done
	t.Hydration = &luks2.Hydration{Start: old + done, Region: region}
	return h, o.makeClone(*t, true)
}

// lengthen lets the layers below the mapping provide so many sectors.
func (o *operation) lengthen(dev *device, h *luks2.Header, sectors int64) error {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil {
		return err
	}
	if s.Integrity.Length < sectors {
		g := *h.Token.Integrity
		if err := o.reload(s.Integrity.Info.Name, func() error { return longerIntegrity(dev, g, s.Integrity.Info.Name, sectors) }); err != nil {
			return err
		}
	}
	if o.cloned() && s.Crypt.Length < sectors {
		if err := o.lengthenCrypt(dev, h, o.lower(), sectors); err != nil {
			return err
		}
	}
	s, err = cryptmapper.ReadStack(o.Volume.Name)
	if err == nil && (s.Integrity.Length != sectors || s.Integrity.Provided < sectors) {
		err = errdefs.Errorf(errdefs.ErrState, "mapping %s was to provide %d sectors and provides %d of %d", s.Integrity.Info.Name, sectors, s.Integrity.Length, s.Integrity.Provided)
	}
	return err
}

// longerIntegrity loads the longer table of the integrity layer, whose geometry is
// g. The kernel takes that from the superblock again, which a host may have
// changed since it was opened: with another one it would look for what is live
// elsewhere, and we would wipe it. So the loaded table is held against g before
// anything goes through it.
func longerIntegrity(dev *device, g luks2.Geometry, name string, sectors int64) error {
	if err := longer(name, name, sectors); err != nil {
		if changed := checkSuperblock(dev, g); changed != nil {
			return changed // which says why the kernel does not take the table
		}
		return err
	}
	t, err := cryptmapper.LoadedIntegrity(name)
	g.Sectors = sectors
	if got := geometry(&t); err == nil && got != g {
		err = errdefs.Errorf(errdefs.ErrState, "the dm-integrity superblock of device %s was changed: it says %+v, the header %+v", dev.number, got, g)
	}
	if err != nil {
		_ = dm.Clear(name)
	}
	return unavailable(err)
}

// lengthenCrypt lets a dm-crypt mapping have so many sectors.
func (o *operation) lengthenCrypt(dev *device, h *luks2.Header, name string, sectors int64) error {
	return o.reload(name, func() error {
		return o.keyed(dev, h, func() error { return longer(name, name, sectors) })
	})
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
	return unavailable(err)
}

// wipeAside gives every sector of the new area its tag, through a mapping of all
// that the integrity layer provides: where a sector lies is part of what is
// authenticated.
func (o *operation) wipeAside(dev *device, h *luks2.Header) (*luks2.Header, error) {
	name := cryptmapper.CryptName(o.Volume.Name)
	if err := removeOne(name); err != nil {
		return nil, err
	}
	defer func() { _ = removeOne(name) }()
	if err := o.second(dev, h, name); err != nil {
		return nil, err
	}
	o.step("second mapping made")
	h, err := o.wipeNew(dev, h, name)
	if err != nil {
		return nil, err
	}
	if err := removeOne(name); err != nil {
		return nil, err
	}
	o.step("second mapping removed")
	return h, nil
}

// wipeNew wipes the new area through a mapping, and notes how far it came.
func (o *operation) wipeNew(dev *device, h *luks2.Header, through string) (*luks2.Header, error) {
	old, to := h.Token.Size, *h.Token.Growing
	err := o.inPieces(to.Done, to.Size-old, "growing: initialising the integrity tags of the new space", func(from, end int64) error {
		if err := wipe(dm.Path(through), old+from, end-from); err != nil {
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
	return h, err
}

// second makes a mapping like the volume's own, but of all that the integrity
// layer provides.
func (o *operation) second(dev *device, h *luks2.Header, name string) error {
	return o.makeCrypt(dev, h, name, func() error { return longer(o.Volume.Name, name, h.Token.Growing.Sectors) })
}

// catchUp lets a mapping without dm-clone that is shorter than the token says
// have its size: a growth was cut short before its last step, or, without
// integrity, another node that has the volume open let it grow.
func (o *operation) catchUp(dev *device, h *luks2.Header) error {
	s, err := cryptmapper.ReadStack(o.Volume.Name)
	if err != nil || s.Crypt.Length*512 >= h.Token.Size {
		return err
	}
	if s.Integrity == nil && o.Spec.Integrity == dek.IntegrityNone {
		return o.grow(dev, h, h.Token.Size)
	}
	if s.Integrity == nil || h.Token.Integrity == nil {
		return nil // for verify to refuse
	}
	if err := removeOne(cryptmapper.CryptName(o.Volume.Name)); err != nil {
		return err
	}
	if err := o.lengthen(dev, h, h.Token.Integrity.Sectors); err != nil {
		return err
	}
	return o.lengthenCrypt(dev, h, o.Volume.Name, h.Token.Size/512)
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
