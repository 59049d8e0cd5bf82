package luks2

import (
	"bytes"
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Found is what Read saw on a device.
type Found struct {
	// Header is the one that verified under the DEK; nil where none did.
	Header *Header
	// Whole tells that both copies on the device are the one in Header.
	Whole bool
	// UUIDs that LUKS magics on the device claim, whatever else is wrong with them.
	UUIDs []string
	// Reason says why there is no Header, for a person.
	Reason error

	second bool // Header was read from the second copy
}

// Want is what a volume's header must say. It comes from the record or the
// node's policy, never from the disk.
type Want struct {
	// ID of the DEK, which the token must name; for ReadConstellation the LUKS
	// UUID, which is the key ID there.
	ID dek.ID
	// Spec: cipher and integrity.
	Spec dek.Spec
	// SectorSize is 512 or 4096. ReadConstellation demands it. Read accepts
	// either value whatever it is: the MAC vouches for the one that the volume
	// was formatted with, and a device that grew or moved may not suggest it any
	// more.
	SectorSize int
}

// Read reads the two metadata copies and the key material that they list from
// device, once, and checks them. This function is the seam between "read" and
// "open": whatever it does not return as Found.Header never reaches
// libcryptsetup. Of two copies that verify the one with the higher token
// sequence counts. The error tells of a device that cannot be read; bad
// content is told by Found.Reason.
func Read(device io.ReaderAt, want Want, key secret.Bytes) (Found, error) {
	return read(device, want, want.ours, func(h *Header) error { return h.verify(key) })
}

// ReadConstellation is Read for a volume that Constellation made: it has no
// token and no MAC, so nothing vouches for the header but its form. Whether the
// DEK belongs to it is for libcryptsetup to find out. The header's Token is
// zero, and so is its ID's sequence. Of two good copies the one with the higher
// LUKS2 sequence number counts.
func ReadConstellation(device io.ReaderAt, want Want) (Found, error) {
	return read(device, want, want.constellation, func(h *Header) error {
		if uuid := h.Copy.UUID(); uuid != string(want.ID) {
			return fmt.Errorf("UUID is %q and must be %q", uuid, want.ID)
		}
		return nil
	})
}

// read takes of the copies that match the template and that vouch has nothing
// against the one that counts.
func read(device io.ReaderAt, want Want, template func(*Header) form, vouch func(*Header) error) (Found, error) {
	both := make([]byte, 2*CopySize)
	if err := readAt(device, both, 0); err != nil {
		return Found{}, err
	}
	var f Found
	var reasons []error
	var area []byte // both copies list it at one place
	verified := 0
	for _, offset := range []int64{0, CopySize} {
		raw := both[offset : offset+CopySize : offset+CopySize]
		uuid, ok := magicOf(raw)
		if !ok {
			reasons = append(reasons, fmt.Errorf("no LUKS2 header at offset %d", offset))
			continue
		}
		f.UUIDs = append(f.UUIDs, uuid)
		h, err := want.match(raw, offset, template)
		if err == nil && area == nil {
			area = make([]byte, want.areaSize())
			if err := readAt(device, area, areaStart); err != nil {
				return Found{}, err
			}
		}
		if err == nil {
			h.area = area
			err = vouch(h)
		}
		if err != nil {
			reasons = append(reasons, fmt.Errorf("header at offset %d: %w", offset, err))
			continue
		}
		verified++
		if f.Header == nil || h.newer(f.Header) {
			f.Header, f.second = h, offset != 0
		}
	}
	if f.Header == nil {
		f.Reason = errors.Join(reasons...)
		return f, nil
	}
	f.Whole = verified == 2 && sameCopies(both, f.Header)
	f.Header.Copy.raw = primary(f.Header.Copy.raw)
	return f, nil
}

func readAt(device io.ReaderAt, b []byte, offset int64) error {
	if _, err := device.ReadAt(b, offset); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "reading the header area, %d bytes at offset %d: %w", len(b), offset, err)
	}
	return nil
}

// sameCopies tells whether the second copy is the first. libcryptsetup gives
// each a salt of its own, ours have one, which the MAC covers.
func sameCopies(both []byte, h *Header) bool {
	first, second := bytes.Clone(both[:CopySize]), bytes.Clone(both[CopySize:])
	if h.Token.MAC == "" {
		copy(second[offSalt:offUUID], first[offSalt:offUUID])
	}
	return bytes.Equal(primary(first), primary(second))
}

// newer tells whether h replaces other, both having passed.
func (h *Header) newer(other *Header) bool {
	if h.Token.Sequence != other.Token.Sequence {
		return h.Token.Sequence > other.Token.Sequence
	}
	return h.Token.Sequence == 0 && h.Copy.Sequence() > other.Copy.Sequence()
}

// parse checks the form of one copy of a header of ours, without its MAC.
func (w Want) parse(raw []byte, offset int64) (*Header, error) {
	return w.match(raw, offset, w.ours)
}

// match checks one copy against a template.
func (w Want) match(raw []byte, offset int64, template func(*Header) form) (*Header, error) {
	if err := w.Spec.Validate(); err != nil {
		return nil, fmt.Errorf("what the volume must be is not known: %w", err)
	}
	c, err := parseCopy(raw, offset)
	if err != nil {
		return nil, err
	}
	h := &Header{Copy: c, want: w}
	if err := template(h)("", &c.json); err != nil {
		return nil, err
	}
	return h, nil
}

// verify checks the MAC of a header of ours.
func (h *Header) verify(key secret.Bytes) error {
	mac, err := sum(h.Copy.raw, h.Token.MAC, h.area, key)
	if err != nil {
		return err
	}
	if got, err := base64.StdEncoding.DecodeString(h.Token.MAC); err != nil || !hmac.Equal(got, mac) {
		return fmt.Errorf("it does not verify under the DEK of %s", h.want.ID)
	}
	return nil
}

// Seal reads the header that libcryptsetup has written into file, computes its
// MAC and returns it complete. A header that Read would not take back is an
// error: nothing of it is on a device yet. The file is only read.
func Seal(file io.ReaderAt, want Want, key secret.Bytes) (*Header, error) {
	raw := make([]byte, CopySize)
	if err := readAt(file, raw, 0); err != nil {
		return nil, err
	}
	h, err := want.parse(raw, 0)
	if err != nil {
		return nil, fmt.Errorf("libcryptsetup wrote another header than expected: %w", err)
	}
	h.area = make([]byte, want.areaSize())
	if err := readAt(file, h.area, areaStart); err != nil {
		return nil, err
	}
	return h.seal(raw, key)
}

// seal returns the header that a primary copy without MAC and h's key material
// make.
func (h *Header) seal(raw []byte, key secret.Bytes) (*Header, error) {
	mac, err := sum(raw, noMAC, h.area, key)
	if err != nil {
		return nil, err
	}
	raw = bytes.Replace(raw, []byte(noMAC), []byte(base64.StdEncoding.EncodeToString(mac)), 1)
	sealed, err := h.want.parse(primary(raw), 0)
	if err != nil {
		return nil, err
	}
	sealed.area = h.area
	return sealed, nil
}

// With returns a copy of h whose token is t with the next sequence number,
// sealed. Nothing else of the header changes.
func (h *Header) With(t Token, key secret.Bytes) (*Header, error) {
	t.Sequence, t.Version = h.Token.Sequence+1, h.want.version(t)
	old := h.Copy.json.member("tokens").member("0")
	if old == nil {
		return nil, errors.New("the header has no token")
	}
	text := h.Copy.raw[binarySize:]
	text = slices.Concat(text[:old.from], []byte(t.Unsealed()), bytes.TrimRight(text[old.to:], "\x00"))
	if len(text) >= CopySize-binarySize {
		return nil, errors.New("the header's JSON area is full")
	}
	raw := make([]byte, CopySize)
	copy(raw, h.Copy.raw[:binarySize])
	binary.BigEndian.PutUint64(raw[offSequence:], h.Copy.Sequence()+1)
	copy(raw[binarySize:], text)
	return h.seal(primary(raw), key)
}

// SectorSize is that of the encryption, 512 or 4096 bytes.
func (h *Header) SectorSize() int { return h.sectorSize }

// PerBlock is how many sectors of 512 bytes such a sector has, as a power of two.
func (h *Header) PerBlock() byte { return byte(bits.TrailingZeros(uint(h.sectorSize / 512))) }

// ID returns the header's identity.
func (h *Header) ID() dek.HeaderID {
	return dek.HeaderID{UUID: h.Copy.UUID(), Sequence: h.Token.Sequence}
}

// Bare returns the UUID and our token of the copies on a device without
// checking them against any key: for showing, never for deciding.
func Bare(device io.ReaderAt) ([]Header, error) {
	both := make([]byte, 2*CopySize)
	if err := readAt(device, both, 0); err != nil {
		return nil, err
	}
	var list []Header
	for _, offset := range []int64{0, CopySize} {
		c, err := parseCopy(both[offset:offset+CopySize], offset)
		if err != nil {
			continue
		}
		if t, err := c.findToken(); err == nil {
			list = append(list, Header{Copy: c, Token: t})
		}
	}
	return list, nil
}

// Device is where a header is written.
type Device interface {
	io.WriterAt
	Sync() error
}

// Write puts h on a device so that a crash at any instant leaves either the
// header that was there, this one, or (on a blank device) remains that carry
// its UUID or no magic at all: key material, secondary copy, primary copy
// without its first 4 KiB, those 4 KiB, each synced before the next. step is
// called after each, for tests that crash there.
func (h *Header) Write(device Device, step func(string)) error {
	if err := writeSync(device, h.area, areaStart); err != nil {
		return err
	}
	step("keyslot area written")
	return h.WriteCopies(device, step)
}

// WriteCopies is Write without the key material, for a change of the token. It
// overwrites the second copy while the first may be all that there is: a header
// that was not found Whole is repaired before.
func (h *Header) WriteCopies(device Device, step func(string)) error {
	if err := h.writeSecond(device, step); err != nil {
		return err
	}
	return h.writeFirst(device, step)
}

// Repair makes both copies on a device the one in Header, by writing the other
// place alone: whatever a crash leaves there, the copy that counts is not touched.
func (f Found) Repair(device Device, step func(string)) error {
	switch {
	case f.Whole:
		return nil
	case f.second:
		return f.Header.writeFirst(device, step)
	}
	return f.Header.writeSecond(device, step)
}

func (h *Header) writeSecond(device Device, step func(string)) error {
	if err := writeSync(device, secondary(h.Copy.raw), CopySize); err != nil {
		return err
	}
	step("secondary copy written")
	return nil
}

func (h *Header) writeFirst(device Device, step func(string)) error {
	raw := h.Copy.raw
	if err := writeSync(device, raw[binarySize:], binarySize); err != nil {
		return err
	}
	step("primary JSON written")
	if err := writeSync(device, raw[:binarySize], 0); err != nil {
		return err
	}
	step("primary copy written")
	return nil
}

func writeSync(device Device, data []byte, offset int64) error {
	if _, err := device.WriteAt(data, offset); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "writing the header: %w", err)
	}
	if err := device.Sync(); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "syncing the header: %w", err)
	}
	return nil
}

// Materialise writes h into an empty file that libcryptsetup then takes for the
// device's header. The host cannot change the file.
func (h *Header) Materialise(file *os.File) error {
	if err := file.Truncate(DataOffset); err != nil {
		return err
	}
	for _, part := range []struct {
		offset int64
		data   []byte
	}{{areaStart, h.area}, {CopySize, secondary(h.Copy.raw)}, {0, h.Copy.raw}} {
		if _, err := file.WriteAt(part.data, part.offset); err != nil {
			return err
		}
	}
	return nil
}

// Sequence returns LUKS2's own sequence number, which libcryptsetup raises with
// every write.
func (c *Copy) Sequence() uint64 { return binary.BigEndian.Uint64(c.raw[offSequence:]) }
