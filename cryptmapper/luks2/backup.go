package luks2

import (
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Backup is what a finished volume's header can be made again from. Everything
// else in a header is the same for all, or new salts.
type Backup struct {
	// Sequence of the token that it was made of; 0 where it is of version 1 or 2,
	// which do not say.
	Sequence   uint64
	SectorSize int
	Size       int64      // as the token says
	Integrity  *Geometry  // nil without integrity
	Hydration  *Hydration // nil where nothing hydrates
	VolumeKey  secret.Bytes
}

// The backup's form, version 3: base64 of a nonce (12 bytes) and the AES-256-GCM
// ciphertext, with its tag, of
//
//	version (1 byte, 3), sector size (4), size (8),
//	the integrity geometry's sectors (8), tag size (4), journal sectors (8) and
//	interleave sectors (4), all 0 without integrity,
//	the token's sequence (8),
//	where hydration starts (8), its region (4), both 0 where nothing hydrates,
//	volume key (64, with integrity 96)
//
// with all numbers big endian. Versions 1 and 2 are read and not made any more:
// they have no sequence, and version 1 has no hydration. The key is
// HKDF-SHA-256(DEK, no salt, "cryptcsi luks2 backup v1"), the associated data the
// LUKS UUID and the DEK ID.
const (
	backupVersion = 3
	backupCommon  = 37                // bytes that each version begins with
	backupSecond  = backupCommon + 12 // bytes before the volume key in version 2
	backupFixed   = backupSecond + 8  // and in version 3
	backupLabel   = "cryptcsi luks2 backup v1"
)

// versionOf is the version of a backup that has so many bytes before the volume
// key, 0 for none that we read.
func versionOf(fixed int) byte {
	switch fixed {
	case backupCommon:
		return 1
	case backupSecond:
		return 2
	case backupFixed:
		return backupVersion
	}
	return 0
}

// SealBackup returns b as text for the record of h's DEK.
func (h *Header) SealBackup(vk, key secret.Bytes) (string, error) {
	if int64(vk.Len()) != h.want.keySize() {
		return "", fmt.Errorf("the volume key has %d bytes", vk.Len())
	}
	var g Geometry
	if h.Token.Integrity != nil {
		g = *h.Token.Integrity
	}
	var hydration Hydration
	if h.Token.Hydration != nil {
		hydration = *h.Token.Hydration
	}
	plain := secret.New(backupFixed + vk.Len())
	defer plain.Wipe()
	b, big := plain.Expose(), binary.BigEndian
	b[0] = backupVersion
	big.PutUint32(b[1:], uint32(h.sectorSize))
	big.PutUint64(b[5:], uint64(h.Token.Size))
	big.PutUint64(b[13:], uint64(g.Sectors))
	big.PutUint32(b[21:], uint32(g.TagSize))
	big.PutUint64(b[25:], uint64(g.JournalSectors))
	big.PutUint32(b[33:], uint32(g.Interleave))
	big.PutUint64(b[backupCommon:], h.Token.Sequence)
	big.PutUint64(b[backupCommon+8:], uint64(hydration.Start))
	big.PutUint32(b[backupCommon+16:], uint32(hydration.Region))
	copy(b[backupFixed:], vk.Expose())
	aead, err := backupCipher(key)
	if err != nil {
		return "", err
	}
	nonce := make([]byte, aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	return base64.StdEncoding.EncodeToString(aead.Seal(nonce, nonce, b, backupData(h.want.ID, h.Copy.UUID()))), nil
}

// OpenBackup returns what SealBackup made of the header of that UUID; the
// caller wipes its volume key. ErrCorrupt where text is nothing of the kind:
// another volume's, another header's, under another key, or changed.
func OpenBackup(text, uuid string, want Want, key secret.Bytes) (Backup, error) {
	corrupt := func(format string, args ...any) (Backup, error) {
		return Backup{}, errdefs.Errorf(errdefs.ErrCorrupt, "the header backup of %s: %w", want.ID, fmt.Errorf(format, args...))
	}
	if err := dek.CheckBackup(text); err != nil {
		return corrupt("%w", err)
	}
	sealed, _ := base64.StdEncoding.DecodeString(text)
	aead, err := backupCipher(key)
	if err != nil {
		return Backup{}, err
	}
	n := aead.NonceSize()
	fixed := len(sealed) - n - int(want.keySize()) - aead.Overhead()
	version := versionOf(fixed)
	if version == 0 {
		return corrupt("it has %d bytes, not those of a volume with integrity %q, or a later release made it", len(sealed), want.Spec.Integrity)
	}
	plain := secret.New(len(sealed) - n - aead.Overhead())
	defer plain.Wipe()
	b, big := plain.Expose(), binary.BigEndian
	if _, err := aead.Open(b[:0], sealed[:n], sealed[n:], backupData(want.ID, uuid)); err != nil {
		return corrupt("it does not open under its DEK for header %s: it was changed, or is another volume's", uuid)
	}
	if b[0] != version {
		return corrupt("it has version %d and the length of version %d: upgrade this build", b[0], version)
	}
	got := Backup{SectorSize: int(big.Uint32(b[1:])), Size: int64(big.Uint64(b[5:]))}
	g := Geometry{Sectors: int64(big.Uint64(b[13:])), TagSize: int(big.Uint32(b[21:])), JournalSectors: int64(big.Uint64(b[25:])), Interleave: int(big.Uint32(b[33:]))}
	if want.Spec.Integrity != dek.IntegrityNone {
		got.Integrity = &g
	} else if g != (Geometry{}) {
		return corrupt("it has an integrity geometry, and the volume has no integrity")
	}
	rest := b[backupCommon:fixed]
	if version >= 3 {
		got.Sequence, rest = big.Uint64(rest), rest[8:]
	}
	if version >= 2 {
		got.Hydration = &Hydration{Start: int64(big.Uint64(rest)), Region: int(big.Uint32(rest[8:]))}
	}
	if version >= 3 && *got.Hydration == (Hydration{}) {
		got.Hydration = nil
	}
	if got.Hydration != nil && want.Spec.Layout != dek.LayoutClone {
		return corrupt("it hydrates, and the volume has the layout %q", want.Spec.Layout)
	}
	got.VolumeKey = secret.New(int(want.keySize()))
	copy(got.VolumeKey.Expose(), b[fixed:])
	return got, nil
}

// Of tells whether b is what SealBackup makes of h: nothing of what it holds has
// changed since. One of version 1 or 2, which cannot tell, is none.
func (b Backup) Of(h *Header) bool {
	t := h.Token
	return b.Sequence == t.Sequence && b.SectorSize == h.sectorSize && b.Size == t.Size && same(b.Integrity, t.Integrity) && same(b.Hydration, t.Hydration)
}

// same compares what may be absent.
func same[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func backupData(id dek.ID, uuid string) []byte { return []byte(uuid + string(id)) }

func backupCipher(key secret.Bytes) (cipher.AEAD, error) {
	derived, err := secret.Derive(key, nil, backupLabel, 32)
	if err != nil {
		return nil, err
	}
	own := secret.Take(derived)
	defer own.Wipe()
	return secret.AEAD(own, cipher.NewGCM)
}

// Token returns the token of the header that is made from b: that of a finished
// volume.
func (b Backup) Token(want Want, sequence uint64) Token {
	t := NewToken(want.ID)
	t.Version = TokenVersion(want.Spec)
	t.Sequence, t.Made, t.Size, t.Integrity = sequence, true, b.Size, b.Integrity
	if b.Integrity != nil {
		t.Initialised = b.Size
	}
	if b.Hydration != nil {
		t.Hydration, t.Initialised = b.Hydration, b.Hydration.Start
	}
	if want.Spec.Layout == dek.LayoutClone {
		t.Reserved = b.Integrity.Sectors*512 - b.Size
	}
	return t
}

// Blank writes a header with b's segment, and the digest of its volume key, but
// without keyslot and token, into an empty file: libcryptsetup then adds the
// keyslot. Its own way to make a header would make a dm-integrity superblock on
// the disk too.
func (b Backup) Blank(file *os.File, uuid string, want Want) error {
	salt, digest := make([]byte, saltSize), make([]byte, digestSize)
	_, _ = rand.Read(salt)
	pbkdf2(digest, b.VolumeKey, salt)
	integrity := ""
	if b.Integrity != nil {
		integrity = `,"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`
	}
	text := fmt.Sprintf(`{"keyslots":{},"tokens":{},"segments":{"0":{"type":"crypt","offset":"%s","size":"dynamic","iv_tweak":"0","encryption":"%s","sector_size":%d%s}},`+
		`"digests":{"0":{"type":"pbkdf2","keyslots":[],"segments":["0"],"hash":"sha256","iterations":%d,"salt":"%s","digest":"%s"}},`+
		`"config":{"json_size":"%s","keyslots_size":"%s"}}`,
		dataOffset, want.Spec.Cipher, b.SectorSize, integrity, minPBKDF2,
		base64.StdEncoding.EncodeToString(salt), base64.StdEncoding.EncodeToString(digest), jsonSize, keyslotsSize)
	raw := make([]byte, CopySize)
	if copy(raw[binarySize:], text) != len(text) {
		return errors.New("the header's JSON area is full")
	}
	binary.BigEndian.PutUint16(raw[offVersion:], 2)
	binary.BigEndian.PutUint64(raw[offSize:], CopySize)
	binary.BigEndian.PutUint64(raw[offSequence:], 1)
	copy(raw[offAlg:], "sha256")
	_, _ = rand.Read(raw[offSalt:offUUID])
	copy(raw[offUUID:], uuid)
	return (&Header{Copy: &Copy{raw: primary(raw)}}).Materialise(file)
}

// pbkdf2 fills out, of one SHA-256's length, with PBKDF2-HMAC-SHA-256 of key and
// salt, minPBKDF2 iterations. crypto/pbkdf2 wants the key in a string.
func pbkdf2(out []byte, key secret.Bytes, salt []byte) {
	h := hmac.New(sha256.New, key.Expose())
	h.Write(salt)
	h.Write([]byte{0, 0, 0, 1})
	u := h.Sum(nil)
	copy(out, u)
	for range minPBKDF2 - 1 {
		h.Reset()
		h.Write(u)
		u = h.Sum(u[:0])
		for i := range out {
			out[i] ^= u[i]
		}
	}
}
