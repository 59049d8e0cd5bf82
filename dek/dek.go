// Package dek holds the values about data encryption keys that cross package
// borders: which key (ID), what is known about it (State, Spec, Claim,
// HeaderID), and the key itself.
package dek

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/cryptcsi/cryptcsi/secret"
)

// Size is the length of every DEK in bytes.
const Size = 32

// MaxID bounds an ID, in bytes. The CSI specification lets a driver's name have
// 63 and a volume's ID 128, which clouds exceed: a snapshot of Azure's is a path
// of up to 276, with a resource group's name of up to 90 and a snapshot's of 80.
// With our prefix and a driver's name that makes 345. Stores see a hash of it.
// KMS take it as associated data, of which an HSM of Cloud KMS, the narrowest
// that says so, takes 8 KiB.
const MaxID = 512

// maxName bounds the name of the request that a volume was made by, in bytes.
const maxName = 256

// snapshotPrefix begins the IDs of snapshots and of no volume.
const snapshotPrefix = "snap:"

// ID names one DEK: "<driver name>/<volume ID>" for a volume,
// "snap:<driver name>/<snapshot ID>" for a snapshot.
type ID string

// Snapshot says whether id is that of a snapshot: a disk that nobody opens and
// that never changes.
func (id ID) Snapshot() bool { return strings.HasPrefix(string(id), snapshotPrefix) }

// VolumeID returns the DEK ID of a volume. The error says which part is bad.
func VolumeID(driver, volume string) (ID, error) {
	return join("", driver, "volume", volume)
}

// SnapshotID returns the DEK ID of a snapshot, likewise.
func SnapshotID(driver, snapshot string) (ID, error) {
	return join(snapshotPrefix, driver, "snapshot", snapshot)
}

func join(prefix, driver, what, id string) (ID, error) {
	if driver == "" || strings.ContainsAny(driver, "/:") {
		return "", fmt.Errorf("driver name %q: must not be empty or hold a slash or colon", driver)
	}
	if id == "" {
		return "", fmt.Errorf("%s ID is empty", what)
	}
	return ParseID(prefix + driver + "/" + id)
}

// ParseID checks s: 1 to MaxID bytes of printable ASCII without space, as every
// volume ID of a known driver is, so that an ID can stand in a log line, in
// an object's name (encoded) and in a KMS's associated data.
func ParseID(s string) (ID, error) {
	if s == "" || len(s) > MaxID {
		return "", fmt.Errorf("DEK ID of %d bytes: must be 1 to %d", len(s), MaxID)
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return "", fmt.Errorf("DEK ID %q: byte %d is not printable ASCII", s, i)
		}
	}
	return ID(s), nil
}

// State is where a DEK stands in its life.
type State string

// The states, in their order. A node formats a device only for a DEK that is
// Prepared (and then only where the device agrees); once it is Formatted,
// nothing on the disk can make it blank again. Rotating is formatted, with a
// header that opens with Key or still with Previous: after RotateDEK, and for a
// clone, whose disk begins as a copy of its source's.
const (
	Prepared  State = "prepared"
	Formatted State = "formatted"
	Rotating  State = "rotating"
	Deleted   State = "deleted"
)

// Integrity says whether sectors are authenticated and how.
type Integrity string

// The integrity modes that a volume can have.
const (
	IntegrityNone Integrity = ""            // dm-crypt alone
	IntegrityHMAC Integrity = "hmac-sha256" // dm-crypt over dm-integrity, journal mode
)

// Spec is what a volume must be. It is fixed when the DEK is created, stored
// authenticated beside it, and never taken from the disk.
type Spec struct {
	// Name is the CreateVolume request's name where a controller made the
	// record. It tells apart two volumes for which the cloud gave one ID.
	Name string `json:"name,omitempty"`
	// Cipher in dm-crypt's notation, without the mode's IV variations of
	// other ciphers: "aes-xts-plain64" is the only value so far.
	Cipher string `json:"cipher"`
	// Integrity of the sectors.
	Integrity Integrity `json:"integrity,omitempty"`
	// Layout names what lies in the mapping beside the data; "" is nothing.
	Layout string `json:"layout,omitempty"`
	// Discard lets who uses the volume give blocks back to the device, whose
	// owner then sees which are unused. Without integrity only. No disk says
	// it, so a copy may have it otherwise.
	Discard bool `json:"discard,omitempty"`
	// IntegrityMode says how dm-integrity writes: "" with its journal, so that
	// a sector and its tag are one after a crash, or ModeDirect.
	IntegrityMode string `json:"integrity_mode,omitempty"`
	// KEK names the KEK that wraps the DEK, among those that are configured; ""
	// is their first. No disk says it, so a copy may have another.
	KEK string `json:"kek,omitempty"`
}

// ModeDirect is dm-integrity without its journal. What was written and not
// flushed before a crash may be unreadable after it, until it is written again.
// Not with LayoutClone: dm-clone's metadata lies within the authenticated device
// and is written all the time, and one unreadable sector of it is the volume.
const ModeDirect = "direct"

// LayoutConstellation is a volume that Constellation made, opened as it is: no
// header of ours, never formatted, never written to but for its data. No record
// has it, so Validate refuses it; a client of Constellation's key service
// answers with it.
const LayoutConstellation = "constellation"

// LayoutClone is a volume with integrity behind whose end, on the authenticated
// device, lies an area for dm-clone's metadata: sectors without a tag read as
// zeros from the start, and get their tags while the volume is in use.
const LayoutClone = "clone"

// CipherXTS is AES-256 in XTS mode (a 512-bit volume key), dm-crypt's default.
const CipherXTS = "aes-xts-plain64"

// Validate says what is wrong with s, if anything.
func (s Spec) Validate() error {
	switch {
	case s.Cipher != CipherXTS:
		return fmt.Errorf("cipher %q: only %s is offered", s.Cipher, CipherXTS)
	case s.Integrity != IntegrityNone && s.Integrity != IntegrityHMAC:
		return fmt.Errorf("integrity %q: must be empty or %s", s.Integrity, IntegrityHMAC)
	case s.Layout != "" && s.Layout != LayoutClone:
		return fmt.Errorf("layout %q is not known", s.Layout)
	case s.Layout == LayoutClone && s.Integrity == IntegrityNone:
		return fmt.Errorf("layout %q is for volumes with integrity", s.Layout)
	case s.Discard && s.Integrity != IntegrityNone:
		return fmt.Errorf("discard: a volume with integrity cannot: a discarded sector has no tag and is unreadable")
	case s.IntegrityMode != "" && s.IntegrityMode != ModeDirect:
		return fmt.Errorf("integrity mode %q: must be empty or %s", s.IntegrityMode, ModeDirect)
	case s.IntegrityMode != "" && s.Integrity == IntegrityNone:
		return fmt.Errorf("integrity mode %q is for volumes with integrity", s.IntegrityMode)
	case s.IntegrityMode != "" && s.Layout != "":
		return fmt.Errorf("integrity mode %q cannot be with layout %q: a crash could leave dm-clone's metadata unreadable", s.IntegrityMode, s.Layout)
	case len(s.Name) > maxName:
		return fmt.Errorf("name of %d bytes: at most %d", len(s.Name), maxName)
	case s.KEK != "":
		return CheckKEK(s.KEK)
	}
	return nil
}

// CheckKEK checks the form of a KEK's name: 1 to 63 lower-case letters, digits
// and '-', no '-' at the beginning.
func CheckKEK(name string) error {
	ok := len(name) >= 1 && len(name) <= 63 && name[0] != '-'
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c == '-' || c >= '0' && c <= '9' || c >= 'a' && c <= 'z'
	}
	if !ok {
		return fmt.Errorf("KEK name %.70q: must be 1 to 63 lower-case letters, digits and '-', and not begin with '-'", name)
	}
	return nil
}

// CheckUUID checks the form in which LUKS headers and NewUUID write one.
func CheckUUID(s string) error {
	ok := len(s) == 36
	for i := 0; ok && i < len(s); i++ {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			ok = s[i] == '-'
		} else {
			ok = s[i] >= '0' && s[i] <= '9' || s[i] >= 'a' && s[i] <= 'f'
		}
	}
	if !ok {
		return fmt.Errorf("UUID %.40q is not 36 characters of lower-case hex and dashes", s)
	}
	return nil
}

// HeaderID identifies a state of a volume's LUKS2 header: which header, and how
// far its own authenticated sequence number had risen. The highest one ever
// confirmed is the floor below which a header is a rolled-back one.
type HeaderID struct {
	UUID     string `json:"uuid,omitempty"`
	Sequence uint64 `json:"sequence,omitempty"`
	// Fingerprint is that of the DEK which the header was found or made to
	// open with; see Fingerprint. Only what is confirmed with the new DEK's
	// ends a rotation: a sequence alone may come from a node that had read
	// the record before, and the old DEK would be lost. Not stored.
	Fingerprint string `json:"fingerprint,omitempty"`
	// Backup is what the header can be made again from, where there is one:
	// base64 of what only the DEK decrypts. See CheckBackup.
	Backup string `json:"backup,omitempty"`
}

// maxBackup bounds a header's backup, in bytes of its text.
const maxBackup = 512

// CheckBackup checks the form of a header's backup: empty, or base64 in the one
// way in which it is written, of at most 512 characters.
func CheckBackup(s string) error {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil || len(s) > maxBackup || base64.StdEncoding.EncodeToString(b) != s {
		return fmt.Errorf("header backup of %d characters: must be at most %d of base64", len(s), maxBackup)
	}
	return nil
}

// Fingerprint names a DEK without telling anything about it: 16 bytes of
// HKDF-SHA-256(key, no salt, "fingerprint") in hex.
func Fingerprint(key secret.Bytes) string {
	sum, err := secret.Derive(key, nil, "fingerprint", 16)
	if err != nil {
		panic(err) // only for a length that HKDF cannot give
	}
	return hex.EncodeToString(sum)
}

// Claim is a node's announcement that it is about to format, or while Rotating
// to give the volume a header under its own key: who, and with which LUKS UUID,
// so that the remains of an interrupted format are known.
type Claim struct {
	Node string `json:"node,omitempty"`
	UUID string `json:"uuid,omitempty"`
}

// maxNode bounds a node's name, in bytes.
const maxNode = 256

// Validate says what is wrong with c, if anything. One that was released has a
// UUID and no node.
func (c Claim) Validate(released bool) error {
	if c.Node == "" && !released || len(c.Node) > maxNode || !utf8.ValidString(c.Node) {
		return fmt.Errorf("node name of %d bytes: must be 1 to %d of UTF-8", len(c.Node), maxNode)
	}
	return CheckUUID(c.UUID)
}

// DEK is one data encryption key and what the record says about it. Whoever
// got it calls Wipe.
type DEK struct {
	ID     ID
	State  State
	Spec   Spec
	Source ID       // what it is a clone of; "" where it is none
	Claim  Claim    // zero until the first ClaimFormat; without a node once it was released
	Header HeaderID // zero until the first ConfirmDEK; then the floor
	Key    secret.Bytes
	// Previous is empty unless State is Rotating: then it is what the header
	// may still have to be opened with, to give it Key and then be confirmed.
	Previous secret.Bytes
}

// Wipe wipes Key and Previous.
func (d DEK) Wipe() {
	d.Key.Wipe()
	d.Previous.Wipe()
}

// NewUUID returns a random (version 4) UUID for a header that is to be made.
func NewUUID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // never fails, see crypto/rand
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
