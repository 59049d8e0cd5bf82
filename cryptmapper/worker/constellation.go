package worker

import (
	"encoding/binary"
	"fmt"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// A volume that Constellation made is opened as it is. Its header has a strict
// form and nothing that vouches for it; whether the DEK belongs to it shows when
// the keyslot opens. It is never formatted and its header never written: update
// and format are the only writers, the one does nothing for such a volume, and
// the other is out of reach because its DEK is never Prepared (see validSpec).

func (o *operation) constellation() bool { return o.Spec.Layout == dek.LayoutConstellation }

// read reads the header in the form that the volume must have.
func (o *operation) read(dev *device) (luks2.Found, error) {
	switch {
	case o.State == dek.Rotating:
		return o.readEither(dev, dev)
	case !o.constellation():
		return luks2.Read(dev, o.want(dev), o.key)
	}
	found, err := luks2.ReadConstellation(dev, o.want(dev))
	if found.Header != nil {
		found.Header.Token.Made = true // there is nothing left to make
	}
	return found, err
}

// validSpec says what is wrong with the spec and what belongs to it.
func (o *operation) validSpec() error {
	spec := o.Spec
	if o.constellation() {
		if o.State != dek.Formatted || o.Claim != (dek.Claim{}) {
			return fmt.Errorf("state %s and claim %+v: a volume that Constellation made is never formatted", o.State, o.Claim)
		}
		spec.Layout = ""
	}
	return spec.Validate()
}

// checkIntegrity looks at the superblock of dm-integrity before the kernel
// obeys it. Of a volume that Constellation made it can only be held against
// itself and the device.
func (o *operation) checkIntegrity(dev *device, h *luks2.Header) error {
	g := h.Token.Integrity
	if g == nil && o.constellation() && o.Spec.Integrity != dek.IntegrityNone {
		claimed, err := claimedGeometry(dev)
		if err != nil {
			return err
		}
		g = &claimed
	}
	if g == nil {
		return nil
	}
	if err := checkSuperblock(dev, *g); err != nil {
		return err
	}
	if o.constellation() {
		return o.notGrown(dev, *g)
	}
	return pinSuperblock(dev, *g)
}

// notGrown refuses a grown device of a volume that has no token of ours: after
// the kernel had looked at it nothing would tell how long the volume was.
func (o *operation) notGrown(dev *device, g luks2.Geometry) error {
	if provided(dev, g, 3) > g.Sectors {
		return errdefs.Errorf(errdefs.ErrState, "device %s has grown to %d bytes: a volume that Constellation made with integrity cannot grow, and nothing was changed on it; give it back its size, or copy the data", dev.number, dev.size)
	}
	return nil
}

// claimedGeometry is what the superblock says.
func claimedGeometry(dev *device) (luks2.Geometry, error) {
	b, err := readSuperblock(dev)
	if err != nil {
		return luks2.Geometry{}, err
	}
	little := binary.LittleEndian
	g := luks2.Geometry{TagSize: int(little.Uint16(b[10:])), Interleave: 1 << min(b[9], 31), Sectors: int64(little.Uint64(b[16:]))}
	perBlock := b[28]
	area := dev.size/512 - luks2.DataOffset/512
	if g.TagSize != tagSize || perBlock != 3 || g.Sectors <= 0 || g.Sectors > area {
		return g, errdefs.Errorf(errdefs.ErrState, "the dm-integrity superblock of device %s cannot be that of a volume that Constellation made: tags of %d bytes, blocks of 2^%d sectors, %d sectors of %d", dev.number, g.TagSize, perBlock, g.Sectors, area)
	}
	g.JournalSectors = int64(little.Uint32(b[12:])) * journalSection(g, perBlock)
	return g, nil
}

// tagSize is what HMAC-SHA-256 gives for each sector.
const tagSize = 32

// possible tells whether the geometry of a Constellation volume's integrity
// layer, as the kernel has it, fits a device of this size. It comes from a
// superblock that nothing authenticates and that no token describes.
func possible(i *cryptmapper.IntegrityTable, deviceSize int64) bool {
	area := (deviceSize - luks2.DataOffset) / 512
	tags := i.Provided / 8 * tagSize / 512
	return i.TagSize == tagSize && i.Provided > 0 && i.Provided <= area && i.Provided%8 == 0 && i.JournalSectors > 0 && i.Provided+tags+i.JournalSectors <= area
}
