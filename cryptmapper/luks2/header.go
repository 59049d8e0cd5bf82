// Package luks2 reads, authenticates and writes the header area of a LUKS2
// device as raw bytes, before and without libcryptsetup. Everything it reads is
// input from a hostile disk.
//
// Format: LUKS2 On-Disk Format Specification 1.1.x. A device starts with two
// copies of the metadata (a 4 KiB binary header and a JSON area each), then the
// keyslot areas; data begins at 16 MiB. On top of that format our own token
// (type "cryptcsi", see Token) carries what the volume is and a MAC, keyed from
// the DEK, over all of it.
package luks2

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
)

// The layout that every header of ours has, in bytes.
const (
	CopySize   = 16 << 10 // one metadata copy: binary header and JSON area
	binarySize = 4 << 10
	areaStart  = 2 * CopySize // the first keyslot area
	DataOffset = 16 << 20     // where the data (or the dm-integrity superblock) begins
	maxAreas   = 1 << 20      // all keyslot areas together
)

// Offsets within the binary header (specification, section 2.1).
const (
	offVersion   = 6
	offSize      = 8
	offSequence  = 16
	offLabel     = 24
	offAlg       = 72
	offSalt      = 104
	offUUID      = 168
	offSubsystem = 208
	offOffset    = 256
	offChecksum  = 448
	lenChecksum  = 64
)

var (
	magicPrimary   = []byte("LUKS\xba\xbe")
	magicSecondary = []byte("SKUL\xba\xbe")
)

// Copy is one of the two metadata copies, as read.
type Copy struct {
	raw  []byte // CopySize bytes
	json metadata
}

// metadata is the part of the JSON area that is needed before the MAC is
// checked: where the key material lies and our own token.
type metadata struct {
	Keyslots map[string]struct {
		Area struct {
			Offset string `json:"offset"`
			Size   string `json:"size"`
		} `json:"area"`
	} `json:"keyslots"`
	Tokens map[string]json.RawMessage `json:"tokens"`
}

// Header is a whole header area: the metadata copy that counts and the key
// material that it lists.
type Header struct {
	Copy  *Copy
	areas []area
	Token Token
}

type area struct {
	offset int64
	data   []byte
}

// magicOf tells whether raw starts like a LUKS header copy, and the UUID that
// it claims. It trusts nothing else.
func magicOf(raw []byte) (uuid string, ok bool) {
	if len(raw) < binarySize || !bytes.HasPrefix(raw, magicPrimary) && !bytes.HasPrefix(raw, magicSecondary) {
		return "", false
	}
	return cString(raw[offUUID : offUUID+40]), true
}

// parseCopy checks the binary header of a copy that should lie at offset: its
// magic, version, size, place and checksum. LUKS2's checksum is unkeyed: it
// finds damage, not forgery.
func parseCopy(raw []byte, offset int64) (*Copy, error) {
	magic := magicPrimary
	if offset != 0 {
		magic = magicSecondary
	}
	switch {
	case !bytes.HasPrefix(raw, magic):
		return nil, fmt.Errorf("no LUKS2 header at offset %d", offset)
	case binary.BigEndian.Uint16(raw[offVersion:]) != 2:
		return nil, fmt.Errorf("header at offset %d has LUKS version %d, not 2", offset, binary.BigEndian.Uint16(raw[offVersion:]))
	case binary.BigEndian.Uint64(raw[offSize:]) != CopySize:
		return nil, fmt.Errorf("header at offset %d has a size of %d bytes, not %d", offset, binary.BigEndian.Uint64(raw[offSize:]), CopySize)
	case binary.BigEndian.Uint64(raw[offOffset:]) != uint64(offset):
		return nil, fmt.Errorf("header at offset %d says it lies elsewhere", offset)
	case cString(raw[offAlg:offAlg+32]) != "sha256":
		return nil, fmt.Errorf("header at offset %d has a checksum other than sha256", offset)
	}
	if sum := checksum(raw); !bytes.Equal(sum[:], raw[offChecksum:offChecksum+sha256.Size]) {
		return nil, fmt.Errorf("header at offset %d fails its checksum", offset)
	}
	text := raw[binarySize:]
	before, _, ok := bytes.Cut(text, []byte{0})
	if !ok {
		return nil, fmt.Errorf("JSON area at offset %d has no end", offset)
	}
	c := &Copy{raw: raw}
	if err := json.Unmarshal(before, &c.json); err != nil {
		return nil, fmt.Errorf("JSON area at offset %d: %w", offset, err)
	}
	return c, nil
}

// UUID returns the LUKS UUID.
func (c *Copy) UUID() string { return cString(c.raw[offUUID : offUUID+40]) }

// checksum is SHA-256 over the copy with its checksum field zeroed.
func checksum(raw []byte) [sha256.Size]byte {
	h := sha256.New()
	h.Write(raw[:offChecksum])
	h.Write(make([]byte, lenChecksum))
	h.Write(raw[offChecksum+lenChecksum:])
	return [sha256.Size]byte(h.Sum(nil))
}

// readAreas reads the key material that c lists, within bounds.
func (c *Copy) readAreas(device io.ReaderAt) ([]area, error) {
	if len(c.json.Keyslots) == 0 || len(c.json.Keyslots) > 2 {
		return nil, fmt.Errorf("header lists %d keyslots: 1 or 2 are expected", len(c.json.Keyslots))
	}
	var areas []area
	total := int64(0)
	for _, slot := range []string{"0", "1"} {
		k, ok := c.json.Keyslots[slot]
		if !ok {
			continue
		}
		offset, err1 := strconv.ParseInt(k.Area.Offset, 10, 64)
		size, err2 := strconv.ParseInt(k.Area.Size, 10, 64)
		if err1 != nil || err2 != nil || offset < areaStart || size <= 0 || size > maxAreas || offset > DataOffset-size {
			return nil, fmt.Errorf("keyslot %s names an area that is not possible", slot)
		}
		if total += size; total > maxAreas {
			return nil, fmt.Errorf("keyslot areas of more than %d bytes", maxAreas)
		}
		data := make([]byte, size)
		if _, err := device.ReadAt(data, offset); err != nil {
			return nil, fmt.Errorf("reading the area of keyslot %s: %w", slot, err)
		}
		areas = append(areas, area{offset, data})
	}
	if len(areas) != len(c.json.Keyslots) {
		return nil, fmt.Errorf("header lists a keyslot other than 0 and 1")
	}
	return areas, nil
}

// secondary returns the second copy that belongs to the primary raw.
func secondary(raw []byte) []byte {
	s := bytes.Clone(raw)
	copy(s, magicSecondary)
	binary.BigEndian.PutUint64(s[offOffset:], CopySize)
	sum := checksum(s)
	copy(s[offChecksum:], sum[:])
	return s
}

// primary returns the first copy that belongs to the copy raw of either kind.
func primary(raw []byte) []byte {
	p := bytes.Clone(raw)
	copy(p, magicPrimary)
	binary.BigEndian.PutUint64(p[offOffset:], 0)
	clear(p[offChecksum : offChecksum+lenChecksum])
	sum := checksum(p)
	copy(p[offChecksum:], sum[:])
	return p
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
