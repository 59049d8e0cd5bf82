package luks2

import (
	"bytes"
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

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
	return read(device, func(raw []byte, offset int64) (*Header, error) {
		return verify(device, raw, offset, want, key)
	})
}

// ReadConstellation is Read for a volume that Constellation made: it has no
// token and no MAC, so nothing vouches for the header but its form. Whether the
// DEK belongs to it is for libcryptsetup to find out. The header's Token is
// zero, and so is its ID's sequence. Of two good copies the one with the higher
// LUKS2 sequence number counts.
func ReadConstellation(device io.ReaderAt, want Want) (Found, error) {
	return read(device, func(raw []byte, offset int64) (*Header, error) {
		return match(device, raw, offset, want)
	})
}

func read(device io.ReaderAt, check func(raw []byte, offset int64) (*Header, error)) (Found, error) {
	both := make([]byte, 2*CopySize)
	if _, err := device.ReadAt(both, 0); err != nil {
		return Found{}, errdefs.Errorf(errdefs.ErrUnavailable, "reading the header area: %w", err)
	}
	var f Found
	var reasons []error
	verified := 0
	for _, offset := range []int64{0, CopySize} {
		raw := both[offset : offset+CopySize : offset+CopySize]
		uuid, ok := magicOf(raw)
		if !ok {
			reasons = append(reasons, fmt.Errorf("no LUKS2 header at offset %d", offset))
			continue
		}
		f.UUIDs = append(f.UUIDs, uuid)
		h, err := check(raw, offset)
		if err != nil {
			reasons = append(reasons, err)
			continue
		}
		verified++
		if f.Header == nil || h.newer(f.Header) {
			f.Header = h
		}
	}
	if f.Header == nil {
		f.Reason = errors.Join(reasons...)
		return f, nil
	}
	f.Whole = verified == 2 && bytes.Equal(primary(both[:CopySize]), primary(both[CopySize:]))
	f.Header.Copy.raw = primary(f.Header.Copy.raw)
	return f, nil
}

// newer tells whether h replaces other, both having passed.
func (h *Header) newer(other *Header) bool {
	if h.Token.Sequence != other.Token.Sequence {
		return h.Token.Sequence > other.Token.Sequence
	}
	return h.Token.Sequence == 0 && h.Copy.Sequence() > other.Copy.Sequence()
}

// match checks one copy of a Constellation header.
func match(device io.ReaderAt, raw []byte, offset int64, want Want) (*Header, error) {
	c, err := parseCopy(raw, offset)
	if err != nil {
		return nil, err
	}
	if c.UUID() != string(want.ID) {
		return nil, fmt.Errorf("header at offset %d has the UUID %q, not %q", offset, c.UUID(), want.ID)
	}
	areas, err := c.readAreas(device)
	if err != nil {
		return nil, err
	}
	return &Header{Copy: c, areas: areas}, nil
}

// verify checks one copy: form, token, DEK ID, MAC.
func verify(device io.ReaderAt, raw []byte, offset int64, want Want, key secret.Bytes) (*Header, error) {
	c, err := parseCopy(raw, offset)
	if err != nil {
		return nil, err
	}
	t, err := c.findToken()
	if err != nil {
		return nil, err
	}
	if t.DEKID != string(want.ID) {
		return nil, fmt.Errorf("header at offset %d belongs to %q, not to %s", offset, t.DEKID, want.ID)
	}
	areas, err := c.readAreas(device)
	if err != nil {
		return nil, err
	}
	mac, err := sum(raw, t.MAC, areas, key)
	if err != nil {
		return nil, err
	}
	if got, err := base64.StdEncoding.DecodeString(t.MAC); err != nil || !hmac.Equal(got, mac) {
		return nil, fmt.Errorf("header at offset %d does not verify under the DEK of %s", offset, want.ID)
	}
	return &Header{Copy: c, areas: areas, Token: t}, nil
}

// Seal reads the header that libcryptsetup has written into file, computes its
// MAC and returns it complete. The file is only read.
func Seal(file io.ReaderAt, key secret.Bytes) (*Header, error) {
	raw := make([]byte, CopySize)
	if _, err := file.ReadAt(raw, 0); err != nil {
		return nil, fmt.Errorf("reading the new header: %w", err)
	}
	c, err := parseCopy(raw, 0)
	if err != nil {
		return nil, err
	}
	areas, err := c.readAreas(file)
	if err != nil {
		return nil, err
	}
	return seal(raw, areas, key)
}

// seal fills the MAC into a primary copy.
func seal(raw []byte, areas []area, key secret.Bytes) (*Header, error) {
	mac, err := sum(raw, noMAC, areas, key)
	if err != nil {
		return nil, err
	}
	raw = bytes.Replace(raw, []byte(noMAC), []byte(base64.StdEncoding.EncodeToString(mac)), 1)
	c, err := parseCopy(primary(raw), 0)
	if err != nil {
		return nil, err
	}
	t, err := c.findToken()
	if err != nil {
		return nil, err
	}
	return &Header{Copy: c, areas: areas, Token: t}, nil
}

// With returns a copy of h whose token is t with the next sequence number,
// sealed. Nothing else of the header changes.
func (h *Header) With(t Token, key secret.Bytes) (*Header, error) {
	t.Sequence = h.Token.Sequence + 1
	old := []byte(nil)
	for _, raw := range h.Copy.json.Tokens {
		if bytes.Contains(raw, []byte(h.Token.MAC)) {
			old = raw
		}
	}
	text := h.Copy.raw[binarySize:]
	text = text[:bytes.IndexByte(text, 0)]
	if old == nil || bytes.Count(text, old) != 1 {
		return nil, fmt.Errorf("the header's token cannot be found again in its JSON")
	}
	text = bytes.Replace(text, old, []byte(t.Unsealed()), 1)
	if len(text) >= CopySize-binarySize {
		return nil, fmt.Errorf("the header's JSON area is full")
	}
	raw := make([]byte, CopySize)
	copy(raw, h.Copy.raw[:binarySize])
	binary.BigEndian.PutUint64(raw[offSequence:], h.Copy.Sequence()+1)
	copy(raw[binarySize:], text)
	return seal(primary(raw), h.areas, key)
}

// ID returns the header's identity.
func (h *Header) ID() dek.HeaderID {
	return dek.HeaderID{UUID: h.Copy.UUID(), Sequence: h.Token.Sequence}
}

// Bare returns the UUID and our token of the copies on a device without
// checking them against any key: for showing, never for deciding.
func Bare(device io.ReaderAt) ([]Header, error) {
	both := make([]byte, 2*CopySize)
	if _, err := device.ReadAt(both, 0); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "reading the header area: %w", err)
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
	for _, a := range h.areas {
		if err := writeSync(device, a.data, a.offset); err != nil {
			return err
		}
	}
	step("keyslot area written")
	return h.WriteCopies(device, step)
}

// WriteCopies is Write without the key material, for a change of the token.
func (h *Header) WriteCopies(device Device, step func(string)) error {
	raw := h.Copy.raw
	if err := writeSync(device, secondary(raw), CopySize); err != nil {
		return err
	}
	step("secondary copy written")
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
	parts := append([]area{{0, h.Copy.raw}, {CopySize, secondary(h.Copy.raw)}}, h.areas...)
	for _, p := range parts {
		if _, err := file.WriteAt(p.data, p.offset); err != nil {
			return err
		}
	}
	return nil
}

// Sequence returns LUKS2's own sequence number, which libcryptsetup raises with
// every write.
func (c *Copy) Sequence() uint64 { return binary.BigEndian.Uint64(c.raw[offSequence:]) }
