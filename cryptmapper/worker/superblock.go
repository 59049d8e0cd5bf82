package worker

import (
	"encoding/binary"
	"fmt"
	"sort"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The superblock of dm-integrity (struct superblock in the kernel's
// drivers/md/dm-integrity.c), which stands where the data would begin. Nothing
// authenticates it, and the kernel obeys it and writes to the disk before a
// mapping can be looked at. So it is compared with the header's token before,
// and the kernel's table after: a host that changes it in between finds a
// closed mapping too.

const (
	superblockMagic     = "integrt\x00"
	superblockFixedPads = 8 // the one flag that ours have
	superblockSectors   = 8

	lengthUnit       = 8        // the kernel rounds the volume's length down to so many sectors
	metadataRunUnit  = 128 << 9 // tags are read and written in buffers of 128 sectors
	entriesPerSector = 512 - 8  // bytes for entries in a sector of the journal
)

// checkSuperblock fails where the superblock is not the one that g tells of, or
// the device is too short for it. On a device that has grown the kernel writes
// the larger number of sectors into the superblock, as often as it is loaded; it
// takes the number from the device and uses it for nothing. The number counts
// for libcryptsetup alone, which makes the mapping so long: see pinSuperblock.
func checkSuperblock(dev *device, g luks2.Geometry) error {
	b, err := readSuperblock(dev)
	if err != nil {
		return err
	}
	changed := func(format string, args ...any) error {
		return errdefs.Errorf(errdefs.ErrState, "the dm-integrity superblock of device %s was changed: %s", dev.number, fmt.Sprintf(format, args...))
	}
	little := binary.LittleEndian
	tag, sections, sectors := little.Uint16(b[10:]), little.Uint32(b[12:]), little.Uint64(b[16:])
	flags, perBlock := little.Uint32(b[24:]), b[28]
	switch {
	case string(b[:8]) != superblockMagic:
		return changed("it is none")
	case b[8] == 0 || b[8] > 5:
		return changed("it has version %d", b[8])
	case flags != superblockFixedPads:
		return changed("it has the flags %#x and must have %#x", flags, superblockFixedPads)
	case perBlock != 0 && perBlock != 3:
		return changed("its blocks have 2^%d sectors", perBlock)
	case int(tag) != g.TagSize:
		return changed("its tags have %d bytes and must have %d", tag, g.TagSize)
	case b[9] > 31 || 1<<b[9] != g.Interleave:
		return changed("it interleaves 2^%d sectors, must be %d", b[9], g.Interleave)
	case int64(sections)*journalSection(g, perBlock) != g.JournalSectors:
		return changed("its journal has %d sections, must have %d sectors", sections, g.JournalSectors)
	}
	if need := lastSector(g, perBlock, g.Sectors-1); need >= dev.area() {
		return errdefs.Errorf(errdefs.ErrState, "device %s has %d bytes, the volume needs %d: it was shrunk or another one was put in its place", dev.number, dev.size, luks2.DataOffset+(need+1)*512)
	}
	if most := provided(dev, g, perBlock); sectors < uint64(g.Sectors) || sectors > uint64(most) {
		return changed("it provides %d sectors and must provide %d", sectors, g.Sectors)
	}
	return nil
}

// area is what dm-integrity has of the device, in sectors.
func (d *device) area() int64 { return d.size/512 - luks2.DataOffset/512 }

// provided is how many sectors the kernel makes of the device as it is now.
func provided(dev *device, g luks2.Geometry, perBlock byte) int64 {
	units := sort.Search(int(dev.area()/lengthUnit), func(n int) bool {
		return lastSector(g, perBlock, int64(n+1)*lengthUnit-1) >= dev.area()
	})
	return int64(units) * lengthUnit
}

// pinSuperblock puts g's number of sectors into a superblock that was checked
// and has a larger one, so that libcryptsetup makes the mapping no longer than
// the token says, however much the device has grown.
func pinSuperblock(dev *device, g luks2.Geometry) error {
	b, err := readSuperblock(dev)
	if err != nil || binary.LittleEndian.Uint64(b[16:]) == uint64(g.Sectors) {
		return err
	}
	binary.LittleEndian.PutUint64(b[16:], uint64(g.Sectors))
	if _, err = dev.WriteAt(b, luks2.DataOffset); err == nil {
		err = dev.Sync()
	}
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "writing the dm-integrity superblock of device %s: %w", dev.number, err)
	}
	return nil
}

func readSuperblock(dev *device) ([]byte, error) {
	b := make([]byte, superblockSectors*512)
	if _, err := dev.ReadAt(b, luks2.DataOffset); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "reading the dm-integrity superblock of device %s: %w", dev.number, err)
	}
	return b, nil
}

// journalSection is the length of one section of the journal, in sectors: a
// block of eight with entries, and what the entries are for.
func journalSection(g luks2.Geometry, perBlock byte) int64 {
	entry := (8 + 8<<perBlock + int64(g.TagSize) + 7) / 8 * 8
	return entriesPerSector/entry*8<<perBlock + 8
}

// lastSector is where the kernel keeps a sector of the volume, counted from the
// superblock: runs of tags and runs of data take turns.
func lastSector(g luks2.Geometry, perBlock byte, sector int64) int64 {
	interleave := int64(g.Interleave)
	tags := interleave >> perBlock * int64(g.TagSize)
	tags = (tags + metadataRunUnit - 1) / metadataRunUnit * metadataRunUnit / 512
	return superblockSectors + g.JournalSectors + (sector/interleave+1)*tags + sector
}
