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
	"errors"
	"fmt"

	"github.com/cryptcsi/cryptcsi/dek"
)

// The layout that every header of ours has, in bytes.
const (
	CopySize   = 16 << 10 // one metadata copy: binary header and JSON area
	binarySize = 4 << 10
	areaStart  = 2 * CopySize // the keyslot area
	DataOffset = 16 << 20     // where the data (or the dm-integrity superblock) begins
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
	json value
}

// Header is a whole header area: the metadata copy that counts and the key
// material that it lists.
type Header struct {
	Copy       *Copy
	area       []byte // of keyslot 0, at areaStart
	Token      Token
	sectorSize int
	want       Want // what it was checked against
}

// magicOf tells whether raw starts like a LUKS header copy, and the UUID that
// it claims. It trusts nothing else.
func magicOf(raw []byte) (uuid string, ok bool) {
	if len(raw) < binarySize || !bytes.HasPrefix(raw, magicPrimary) && !bytes.HasPrefix(raw, magicSecondary) {
		return "", false
	}
	return cString(raw[offUUID : offUUID+40]), true
}

// parseCopy checks the form of a copy that should lie at offset: the binary
// header, of which only salt, UUID and sequence number are free, and that the
// JSON area is readable. LUKS2's checksum is unkeyed: it finds damage, not
// forgery, and is looked at first so that damage is not taken for forgery.
func parseCopy(raw []byte, offset int64) (*Copy, error) {
	if err := checkBinary(raw, offset); err != nil {
		return nil, err
	}
	text, rest, ok := bytes.Cut(raw[binarySize:], []byte{0})
	if !ok {
		return nil, errors.New("the JSON has no end")
	}
	if !isZero(rest) {
		return nil, errors.New("there is something behind the JSON's end")
	}
	json, err := readJSON(string(text))
	if err != nil {
		return nil, err
	}
	return &Copy{raw: raw, json: json}, nil
}

func checkBinary(raw []byte, offset int64) error {
	magic := magicPrimary
	if offset != 0 {
		magic = magicSecondary
	}
	sum := checksum(raw)
	number := binary.BigEndian.Uint64
	switch {
	case !bytes.HasPrefix(raw, magic):
		return errors.New("there is no LUKS2 magic")
	case binary.BigEndian.Uint16(raw[offVersion:]) != 2:
		return fmt.Errorf("LUKS version is %d and must be 2", binary.BigEndian.Uint16(raw[offVersion:]))
	case !bytes.Equal(raw[offChecksum:offChecksum+lenChecksum], append(sum[:], make([]byte, lenChecksum-len(sum))...)):
		return errors.New("it fails its checksum")
	case number(raw[offSize:]) != CopySize:
		return fmt.Errorf("header size is %d and must be %d", number(raw[offSize:]), CopySize)
	case number(raw[offOffset:]) != uint64(offset):
		return fmt.Errorf("it says that it lies at offset %d", number(raw[offOffset:]))
	case !bytes.Equal(raw[offAlg:offSalt], fixed("sha256", offSalt-offAlg)):
		return fmt.Errorf("checksum algorithm is %.32q and must be \"sha256\"", raw[offAlg:offSalt])
	case !isZero(raw[offLabel:offAlg]):
		return errors.New("label is there and must be empty")
	case !isZero(raw[offSubsystem:offOffset]):
		return errors.New("subsystem is there and must be empty")
	case !isZero(raw[offOffset+8 : offChecksum]), !isZero(raw[offChecksum+lenChecksum : binarySize]):
		return errors.New("padding is not zero")
	}
	uuid := raw[offUUID:offSubsystem]
	if err := dek.CheckUUID(cString(uuid)); err != nil || !bytes.Equal(uuid, fixed(cString(uuid), len(uuid))) {
		return fmt.Errorf("UUID is %.40q and must be 36 characters of lower-case hex and dashes", uuid)
	}
	return nil
}

// fixed is s in a field of n bytes.
func fixed(s string, n int) []byte { return append([]byte(s), make([]byte, n-len(s))...) }

func isZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

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
