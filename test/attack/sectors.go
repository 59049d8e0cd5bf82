package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
)

// layout is where dm-integrity keeps things on the device of a small volume of
// ours, in bytes; see the kernel's drivers/md/dm-integrity.c. Nothing of it is
// authenticated but the sectors with their tags.
type layout struct{ journal, tags, data int64 }

const tagSize = 32

func (v *volume) layout() (layout, error) {
	_, rest, _ := strings.Cut(v.ours.integrity, "journal_sectors:")
	number, _, _ := strings.Cut(rest, " ")
	sectors, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		return layout{}, fmt.Errorf("no journal in the table %q", v.ours.integrity)
	}
	l := layout{journal: dataOffset + 4096}
	l.tags = l.journal + sectors*512
	l.data = l.tags + 128<<10 // the tags of 32768 interleaved sectors
	return l, nil
}

func little(n uint64, size int) []byte { return binary.LittleEndian.AppendUint64(nil, n)[:size] }

// superblocks attacks the unauthenticated superblock of dm-integrity.
func (s *suite) superblocks() {
	field := func(offset int64, b []byte) func(*target) error { return put(dataOffset+offset, b) }
	sectors := func(t *target) (uint64, error) {
		b, err := read(t.disk, dataOffset+16, 8)
		return binary.LittleEndian.Uint64(b), err
	}
	provided := func(change int64) func(*target) error {
		return func(t *target) error {
			n, err := sectors(t)
			if err != nil {
				return err
			}
			return field(16, little(n+uint64(change), 8))(t)
		}
	}
	s.section("the superblock of dm-integrity, which nothing authenticates")
	changed := func(words string) outcome { return forged("superblock of device 7:0 was changed: " + words) }
	s.try([]attack{
		{"provided sectors lowered by 1 MiB", s.sealed, provided(-2048), "other size", changed("it provides 13808 sectors")},
		{"provided sectors raised by 1 MiB", s.sealed, provided(2048), "refused", changed("it provides 17904 sectors")},
		{"tag size 16", s.sealed, field(10, little(16, 2)), "refused", changed("its tags have 16 bytes")},
		{"tag size 64", s.sealed, field(10, little(64, 2)), "refused", changed("its tags have 64 bytes")},
		{"journal of two sections", s.sealed, field(12, little(2, 4)), "refused", changed("its journal has 2 sections")},
		{"journal of 2^31 sections", s.sealed, field(12, little(1<<31, 4)), "refused", changed("its journal has 2147483648 sections")},
		{"interleave of 2^14 sectors", s.sealed, field(9, []byte{14}), "integrity layer differs, data unreadable", changed("it interleaves 2^14")},
		{"interleave of 2^31 sectors", s.sealed, field(9, []byte{31}), "refused", changed("it interleaves 2^31")},
		{"blocks of 512 bytes", s.sealed, field(28, []byte{0}), "refused", changed("its journal has")},
		{"blocks of 2^20 sectors", s.sealed, field(28, []byte{20}), "refused", changed("its blocks have")},
		{"flag: the journal is authenticated", s.sealed, field(24, []byte{9}), "refused", changed("it has the flags 0x9")},
		{"flag: tags are being recalculated", s.sealed, field(24, []byte{10}), "refused", changed("it has the flags 0xa")},
		{"flag: bitmap in place of the journal", s.sealed, field(24, []byte{12}), "opens", changed("it has the flags 0xc")},
		{"flag of the padding removed", s.sealed, field(24, []byte{0}), "integrity layer differs", changed("it has the flags 0x0")},
		{"flags that nobody knows", s.sealed, field(24, little(0xffffffff, 4)), "refused", changed("it has the flags 0xffffffff")},
		{"version 200", s.sealed, field(8, []byte{200}), "refused", changed("it has version 200")},
		{"noise", s.sealed, field(0, noise(512)), "refused", changed("it is none")},
		{"zeros", s.sealed, field(0, make([]byte, 4096)), "refused", changed("it is none")},
	})
}

// sectors attacks what is stored.
func (s *suite) sectors() {
	bare := func(at int64) int64 { return dataOffset + at }
	l, err := s.sealed.layout()
	if err != nil {
		s.row("layout of dm-integrity", "", "", "", err)
		return
	}
	data := func(at int64) int64 { return l.data + at }
	tag := func(at int64) int64 { return l.tags + at/blockSize*tagSize }
	before := func(t *target) string { return t.older }
	sealedBack := steps(part(before, data(firstAt), data(firstAt)+blockSize), part(before, tag(firstAt), tag(firstAt)+tagSize))

	s.section("stored sectors, without integrity")
	s.try([]attack{
		{"a bit flipped", s.bare, flip(bare(firstAt+100), 1), "other data", limit(sixteenBytes)},
		{"two sectors exchanged", s.bare, exchange(bare(firstAt), bare(secondAt), blockSize), "other data", limit(garbled)},
		{"a sector zeroed", s.bare, put(bare(firstAt), make([]byte, blockSize)), "other data", limit(garbled)},
		{"a sector as it was earlier", s.bare, part(before, bare(firstAt), bare(firstAt)+blockSize), "older data", limit(olderData)},
	})
	s.section("stored sectors, with integrity")
	s.try([]attack{
		{"a bit flipped in a sector", s.sealed, flip(data(firstAt+100), 1), "data unreadable", ioError(1)},
		{"a bit flipped in a tag", s.sealed, flip(tag(firstAt)+3, 1), "data unreadable", ioError(1)},
		{"two sectors exchanged, with their tags", s.sealed, steps(exchange(data(firstAt), data(secondAt), blockSize), exchange(tag(firstAt), tag(secondAt), tagSize)), "data unreadable", ioError(0)},
		{"a sector zeroed", s.sealed, put(data(firstAt), make([]byte, blockSize)), "data unreadable", ioError(1)},
		{"a sector as it was earlier, without its tag", s.sealed, part(before, data(firstAt), data(firstAt)+blockSize), "data unreadable", ioError(1)},
		{"a sector as it was earlier, with its tag", s.sealed, sealedBack, "older data", limit(olderData)},
		{"the journal of an earlier moment", s.sealed, oldJournal(l, false), "older data", limit(olderData)},
		{"the journal of an earlier moment, its sector moved", s.sealed, oldJournal(l, true), "data unreadable", ioError(1)},
		{"the journal is noise", s.sealed, put(l.journal, noise(int(l.tags-l.journal))), "data unreadable", ioError(0)},
	})
}

// exchange swaps two runs of bytes of the disk.
func exchange(a, b int64, size int) func(*target) error {
	return func(t *target) error {
		x, y := make([]byte, size), make([]byte, size)
		if _, err := t.file.ReadAt(x, a); err != nil {
			return err
		}
		if _, err := t.file.ReadAt(y, b); err != nil {
			return err
		}
		return errors.Join(put(a, y)(t), put(b, x)(t))
	}
}

// oldJournal puts back the journal as it was when the older block had been
// written and had not yet left it; moved gives its entry the place of another block.
func oldJournal(l layout, moved bool) func(*target) error {
	return func(t *target) error {
		j, err := read(t.live, l.journal, int(l.tags-l.journal))
		if err != nil {
			return err
		}
		const entry = 8 + 8*8 + tagSize // place, the ends of eight sectors, tag
		found := 0
		for sector := 0; sector < len(j); sector += 512 {
			for e := sector; e+entry <= sector+512-16; e += entry {
				if binary.LittleEndian.Uint64(j[e:]) != firstAt/512 {
					continue
				}
				found++
				if moved {
					copy(j[e:], little(secondAt/512, 8))
				}
			}
		}
		if found == 0 {
			return errors.New("the journal holds no entry of the block")
		}
		return put(l.journal, j)(t)
	}
}

// ioError: the volume opens as it must, and what was changed gives an I/O error
// while the rest is there.
func ioError(readable int) outcome {
	return outcome{word: "I/O error", open: func(t *target, m cryptmapper.Mapping) (string, error) {
		got, err := readTable(m.Name)
		if err == nil && got != t.ours {
			err = fmt.Errorf("the mapping is %+v", got)
		}
		n, e := intact(m.Path)
		if err = errors.Join(err, e); err == nil && n != readable {
			err = fmt.Errorf("%d of 2 blocks are readable, not %d", n, readable)
		}
		return fmt.Sprintf("the mapping is as it must be; %d of the 2 blocks can be read", n), err
	}}
}

// sixteenBytes: one 16-byte block of AES is noise, all others are as they were.
func sixteenBytes(_ *target, m cryptmapper.Mapping) (string, error) {
	got, err := read(m.Path, firstAt, blockSize)
	if err != nil {
		return "", err
	}
	const at = 100 / 16 * 16
	was := first()
	if bytes.Equal(got[at:at+16], was[at:at+16]) || !bytes.Equal(got[:at], was[:at]) || !bytes.Equal(got[at+16:], was[at+16:]) {
		return "", errors.New("not exactly 16 bytes differ")
	}
	return "16 bytes are noise, the others are as they were: not noticed without integrity", nil
}

// garbled: noise, and never what stands elsewhere.
func garbled(_ *target, m cryptmapper.Mapping) (string, error) {
	got, err := read(m.Path, firstAt, blockSize)
	if err != nil {
		return "", err
	}
	for _, known := range [][]byte{first(), second(), older(), make([]byte, blockSize)} {
		if bytes.Contains(got, known[:32]) {
			return "", fmt.Errorf("the block reads as %.12q…", got)
		}
	}
	return "the sector is noise: not noticed without integrity", nil
}
