package luks2

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

// TokenType is the type of our LUKS2 token.
const TokenType = "cryptcsi"

// tokenVersion is the version of Token, and cloneVersion that of volumes with
// the layout dek.LayoutClone, and of every volume while it grows with integrity.
// The MAC's input is the same.
const (
	tokenVersion = 1
	cloneVersion = 2
)

// TokenVersion returns the version of the token of a volume with that spec.
func TokenVersion(spec dek.Spec) int {
	if spec.Layout == dek.LayoutClone {
		return cloneVersion
	}
	return tokenVersion
}

// Token is what a volume's header says about the volume beyond what LUKS2 has
// fields for. It is authenticated together with the whole header by MAC.
// Fields are only ever added with a new version. All sizes are in bytes unless
// the name says sectors, which have 512 bytes.
type Token struct {
	Type     string   `json:"type"`
	Keyslots []string `json:"keyslots"`
	Version  int      `json:"version"`
	// DEKID is the ID of the DEK that opens this volume.
	DEKID string `json:"dek_id"`
	// Sequence rises by one with every change of the token. A header whose
	// number is below the record's floor is a rolled-back one.
	Sequence uint64 `json:"sequence"`
	// Made: the filesystem, or the raw volume, was finished and synced once.
	// Such a volume is never formatted again, whatever a record says.
	Made bool `json:"made"`
	// Size of the volume as last seen; a smaller device is refused.
	Size int64 `json:"size"`
	// Initialised bytes from the start of an integrity volume: beyond them
	// sectors may have no tags yet and fail to read. Equal to Size when done.
	Initialised int64 `json:"initialised,omitempty"`
	// Reserved bytes behind Size, of a volume with the layout clone: they hold
	// dm-clone's metadata while Hydration is there. The volume never shows them.
	Reserved int64 `json:"reserved,omitempty"`
	// Hydration tells, of a volume with the layout clone, that dm-clone stands
	// in front of what is not initialised; nil when there is nothing left to
	// do, or the volume is being wiped instead.
	Hydration *Hydration `json:"hydration,omitempty"`
	// Integrity holds the dm-integrity geometry, which the unauthenticated
	// superblock on the disk must agree with.
	Integrity *Geometry `json:"integrity,omitempty"`
	// Growing is what an integrity volume is growing to; nil otherwise. Size
	// and Integrity stay what they were until all of it can be used.
	Growing *Growth `json:"growing,omitempty"`
	// MAC is the base64 of HMAC-SHA-256 over the header, see sum.
	MAC string `json:"mac"`
}

// Hydration is what dm-clone is loaded with.
type Hydration struct {
	Start  int64 `json:"start"`  // the first byte behind it, equal to Token.Initialised
	Region int   `json:"region"` // bytes that it copies at once
}

// Geometry of a dm-integrity layer, as its table and status show it.
type Geometry struct {
	Sectors        int64 `json:"sectors"` // provided data sectors
	TagSize        int   `json:"tag_size"`
	JournalSectors int64 `json:"journal_sectors"`
	Interleave     int   `json:"interleave_sectors"`
}

// Growth is an integrity volume's growth under way.
type Growth struct {
	Sectors int64 `json:"sectors"` // that the dm-integrity layer is to provide
	Size    int64 `json:"size"`    // of the volume then
	// Done bytes behind the volume's present size have their tags.
	Done int64 `json:"done,omitempty"`
}

// macSize is the length of the MAC in bytes.
const macSize = sha256.Size

// noMAC has the length of a MAC and stands in its place while it is computed.
var noMAC = base64.StdEncoding.EncodeToString(make([]byte, macSize))

// NewToken returns the token of a volume that is being formatted.
func NewToken(id dek.ID) Token {
	return Token{Type: TokenType, Keyslots: []string{"0"}, Version: tokenVersion, DEKID: string(id), Sequence: 1, MAC: noMAC}
}

// Unsealed returns the token's JSON with room for a MAC, to be given to
// libcryptsetup; Seal then fills it in.
func (t Token) Unsealed() string {
	t.MAC = noMAC
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(t) // a struct of plain fields always encodes
	return strings.TrimSuffix(text.String(), "\n")
}

// findToken returns our token from a copy's JSON, for showing.
func (c *Copy) findToken() (Token, error) {
	var t Token
	tokens := c.json.member("tokens")
	if tokens == nil {
		return t, errors.New("tokens is missing")
	}
	anyone := Want{Spec: dek.Spec{Integrity: dek.IntegrityHMAC}}
	if object(must("0", anyone.token(&t)))("tokens", tokens) == nil {
		return t, nil
	}
	t, anyone.Spec.Layout = Token{}, dek.LayoutClone
	return t, object(must("0", anyone.token(&t)))("tokens", tokens)
}

// sum computes the MAC over a header: every byte of the binary header but its
// magic, place, sequence number and checksum (which differ between two equal
// copies, or are covered by Token.Sequence), the whole JSON area with the MAC's
// own value replaced by noMAC, and offset and content of the keyslot area.
// Each part is preceded by its length, 8 bytes, big endian. The key is
// HKDF-SHA-256(DEK, no salt, "cryptcsi luks2 header v1").
func sum(raw []byte, mac string, area []byte, key secret.Bytes) ([]byte, error) {
	if strings.Count(string(raw[binarySize:]), mac) != 1 {
		return nil, fmt.Errorf("the MAC does not stand exactly once in the header")
	}
	head := bytes.Clone(raw[:binarySize])
	clear(head[:len(magicPrimary)])
	clear(head[offSequence : offSequence+8])
	clear(head[offOffset : offOffset+8])
	clear(head[offChecksum : offChecksum+lenChecksum])
	text := bytes.Replace(raw[binarySize:], []byte(mac), []byte(noMAC), 1)

	macKey, err := secret.Derive(key, nil, "cryptcsi luks2 header v1", sha256.Size)
	if err != nil {
		return nil, err
	}
	defer clear(macKey)
	h := hmac.New(sha256.New, macKey)
	part := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	part(head)
	part(text)
	part(binary.BigEndian.AppendUint64(nil, areaStart))
	part(area)
	return h.Sum(nil), nil
}
