// Package pkcs11 is a KEK in a token (an HSM, a smart card, a software token)
// behind a PKCS#11 module.
//
// # URI
//
// As RFC 7512 writes it:
//
//	pkcs11:token=prod;object=kek?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/cryptcsi/pin
//
// In the path, separated by ';', values percent-encoded:
//
//	token          the token's label, needed unless serial is given
//	serial, model, manufacturer
//	               of the token, where a label does not name one
//	object         the key's CKA_LABEL, needed
//	id             its CKA_ID, which pins one version: then there is no rotation
//	type           "secret-key", may be left out
//
// Slots cannot be named: their numbers change. After the '?':
//
//	module-path    the module, an absolute path, needed
//	pin-source     the file of the user PIN (file:/path or /path); needed where
//	               the token requires a login
//	mechanism      aes-gcm (default) or aes-kwp, see Wrapping
//
// # Credentials
//
// The user PIN, from its file, without a newline at its end; it is read at
// every login. A PIN that the token has refused is not tried again until the
// file holds another one, and none is tried while the token says that one more
// wrong PIN locks it: a typing error must not lock a token, however often the
// process is restarted. A login belongs to the process and not to the KEK: a
// second KEK of the same process on the same token needs none.
//
// The module is a shared library that gets loaded into this process and may do
// whatever it may. It reads its own configuration, usually through environment
// variables (SOFTHSM2_CONF). This works in builds with cgo only.
//
// # Wrapping
//
// aes-gcm is CKM_AES_GCM with a random 96-bit IV and the DEK's ID as
// associated data; a ciphertext is IV ‖ encrypted ‖ 128-bit tag. NIST SP
// 800-38D allows 2^32 wraps under one key. Tokens that insist on an IV of their
// own may write it where we gave ours. aes-kwp is CKM_AES_KEY_WRAP_PAD (0x210A,
// RFC 5649) for tokens that offer no GCM or none with our IV (FIPS modes): it
// is deterministic and knows no associated data; what is wrapped begins with
// the ID's hash all the same. Keys are unwrapped by the mechanism that wrapped them.
//
// Keys must be AES-256, CKA_SENSITIVE and not CKA_EXTRACTABLE, with CKA_ENCRYPT
// and CKA_DECRYPT (aes-gcm), or CKA_WRAP and CKA_UNWRAP (aes-kwp). A key should
// not have both pairs: with CKA_WRAP and CKA_DECRYPT anybody logged in can read
// every key that is extractable.
//
// # Rotation
//
// The versions of a KEK are the AES keys with its label; they differ in their
// CKA_ID. The one whose CKA_ID is the highest as a big-endian number is current
// and wraps; two that are equal are an error. So a version may be made with any
// tool, under a higher ID. Rotate makes one: the ID is the last one's upper part
// plus one, then 32 random bits, so that two rotations at once make two
// versions and never one ID twice. A key ID is "<CKA_LABEL>/<CKA_ID in hex>".
// A version is disabled by CKA_DECRYPT and CKA_UNWRAP = false, and destroyed by
// C_DestroyObject, at once and for ever. Tokens keep no labels and no policy
// with a key: labels given to Create have no effect, so give every cluster a
// token, or an object label, of its own.
//
// # Permissions
//
// PKCS#11 has none but the login: the user of a token may use, make and destroy
// every key in it. Give the KEK a token (a partition) of its own.
//
// # Audit
//
// Whatever the HSM logs; it sees the associated data at best.
//
// # Limits
//
// A call into a module cannot be cancelled. It runs aside, so that callers get
// their answer in time; at most 16 such calls per module are under way, hanging
// ones included, and whoever finds no place waits until its deadline.
package pkcs11

import (
	"bytes"
	"context"
	"encoding/hex"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	// Scheme of the URI.
	Scheme = "pkcs11"
	// MechanismGCM is the mechanism of keys that were wrapped by AES-GCM.
	MechanismGCM = "aes-256-gcm"
	// MechanismKWP is that of keys that were wrapped by AES key wrap with padding.
	MechanismKWP = "aes-256-kwp"

	maxPIN   = 255 // bytes
	maxLabel = 255 // bytes
)

// target is what a URI names.
type target struct {
	token, serial, model, manufacturer string // empty: any

	object string // CKA_LABEL
	id     []byte // CKA_ID; nil: all

	module    string // path
	pinFile   string // may be empty
	mechanism string // MechanismGCM or MechanismKWP
}

// parse reads a URI and looks whether its files are there.
func parse(u *url.URL) (target, error) {
	t, err := parsePath(u)
	if err != nil {
		return target{}, err
	}
	if err := t.parseQuery(u); err != nil {
		return target{}, err
	}
	if info, err := os.Stat(t.module); err != nil || !info.Mode().IsRegular() {
		return target{}, errdefs.Errorf(errdefs.ErrInvalid, "the PKCS#11 module %s is not there, or is no regular file", t.module)
	}
	if t.pinFile != "" {
		pin, err := readPIN(t.pinFile)
		if err != nil {
			return target{}, err
		}
		pin.Wipe()
	}
	return t, nil
}

func parsePath(u *url.URL) (target, error) {
	const known = "pkcs11: takes token, serial, model, manufacturer, object, id and type"
	if u.Opaque == "" {
		return target{}, errdefs.Errorf(errdefs.ErrInvalid, "the URI must be like pkcs11:token=…;object=…?module-path=…, without slashes after the scheme")
	}
	var t target
	seen := map[string]bool{}
	for pair := range strings.SplitSeq(u.Opaque, ";") {
		name, raw, _ := strings.Cut(pair, "=")
		value, err := url.PathUnescape(raw)
		if err != nil {
			return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q is not percent-encoded as it should be", name)
		}
		if seen[name] {
			return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q is given twice", name)
		}
		seen[name] = true
		switch name {
		case "token":
			t.token = value
		case "serial":
			t.serial = value
		case "model":
			t.model = value
		case "manufacturer":
			t.manufacturer = value
		case "object":
			t.object = value
		case "id":
			t.id = []byte(value)
		case "type":
			if value != "secret-key" {
				return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q must be secret-key: a KEK is an AES key", name)
			}
		case "slot-id", "slot-description", "slot-manufacturer":
			return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q: slots change their numbers; name the token by its label (token=…) or serial number", name)
		case "pin-value":
			return target{}, errPINValue()
		default:
			return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q is not known; %s", name, known)
		}
	}
	switch {
	case t.token == "" && t.serial == "":
		return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q is missing: the token's label", "token")
	case t.object == "" || len(t.object) > maxLabel || !utf8.ValidString(t.object):
		return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q must be the key's label, 1 to %d bytes of UTF-8", "object", maxLabel)
	case seen["id"] && (len(t.id) == 0 || len(t.id) > maxLabel):
		return target{}, errdefs.Errorf(errdefs.ErrInvalid, "URI attribute %q must be 1 to %d percent-encoded bytes", "id", maxLabel)
	}
	return t, nil
}

func (t *target) parseQuery(u *url.URL) error {
	const module, pin, mechanism = "module-path", "pin-source", "mechanism"
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		switch name, _, _ := strings.Cut(pair, "="); name {
		case "pin-value":
			return errPINValue()
		case "module-name":
			return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q: where it would be searched is not defined; give %s, an absolute path", name, module)
		}
	}
	params, err := kms.Params(u, module, pin, mechanism)
	if err != nil {
		return err
	}
	t.module = params[module]
	if !filepath.IsAbs(t.module) {
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be the absolute path of a PKCS#11 module, a shared library", module)
	}
	if source, given := params[pin]; given {
		t.pinFile = strings.TrimPrefix(strings.TrimPrefix(source, "file:"), "//")
		if !filepath.IsAbs(t.pinFile) {
			return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be an absolute path or file: and one: nothing else is asked for a PIN", pin)
		}
	}
	switch params[mechanism] {
	case "", "aes-gcm":
		t.mechanism = MechanismGCM
	case "aes-kwp":
		t.mechanism = MechanismKWP
	default:
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be aes-gcm or aes-kwp", mechanism)
	}
	return nil
}

func errPINValue() error {
	return errdefs.Errorf(errdefs.ErrInvalid, "the URI holds a PIN (pin-value): a URI never authenticates; put the PIN into a file and name that with pin-source")
}

// String names token and key in messages.
func (t *target) String() string { return t.tokenName() + ", key " + quote(t.object) }

func (t *target) tokenName() string {
	if t.token == "" {
		return "token with serial number " + quote(t.serial)
	}
	return "token " + quote(t.token)
}

// quote is for what stands in messages and may be anything.
func quote(s string) string { return strings.ToValidUTF8(`"`+s+`"`, "?") }

// uri is the URI of what t names, without where credentials are.
func (t *target) uri() string {
	var path []string
	for _, a := range [][2]string{
		{"token", t.token}, {"serial", t.serial}, {"model", t.model}, {"manufacturer", t.manufacturer}, {"object", t.object}, {"id", string(t.id)},
	} {
		if a[1] != "" {
			path = append(path, a[0]+"="+url.QueryEscape(a[1]))
		}
	}
	uri := Scheme + ":" + strings.Join(path, ";") + "?module-path=" + url.QueryEscape(t.module)
	if t.mechanism == MechanismKWP {
		uri += "&mechanism=aes-kwp"
	}
	// QueryEscape writes a space as '+', which would be a plus here.
	return strings.NewReplacer("+", "%20", "%2F", "/").Replace(uri)
}

// keyID names a version of the key.
func (t *target) keyID(id []byte) string { return t.object + "/" + hex.EncodeToString(id) }

// versionOf returns the CKA_ID that a key ID names, if it is a version of our
// key: a record cannot choose another.
func (t *target) versionOf(keyID string) ([]byte, error) {
	version, ours := strings.CutPrefix(keyID, t.object+"/")
	id, err := hex.DecodeString(version)
	if !ours || err != nil || t.keyID(id) != keyID || t.id != nil && !bytes.Equal(id, t.id) {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "wrapped under key %.300q, which is not the URI's (%s): open that one for it", keyID, t)
	}
	return id, nil
}

// readPIN reads the file of a PIN.
func readPIN(path string) (secret.Bytes, error) {
	whole, err := secret.ReadFile(path, 1, maxPIN)
	if err != nil {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrInvalid, "the file of the PIN: %w", err)
	}
	defer whole.Wipe()
	line := bytes.TrimSuffix(bytes.TrimSuffix(whole.Expose(), []byte("\n")), []byte("\r"))
	if len(line) == 0 || bytes.ContainsAny(line, "\x00\r\n") {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrInvalid, "the file of the PIN, %s, must hold one line, the PIN", path)
	}
	pin := secret.New(len(line))
	copy(pin.Expose(), line)
	return pin, nil
}

// Opener opens KEKs. A process needs one, and no other code that uses the same
// modules: what KEKs share (a loaded module, its logins, which PIN a token has
// refused) is kept in it, for as long as the process lives.
type Opener struct{ *shared }

// NewOpener returns an Opener. It loads nothing yet.
func NewOpener() *Opener { return &Opener{newShared()} }

// Open is the kms.Opener. It reads the files and loads the module, but does
// not initialise it: that may ask an HSM.
func (o *Opener) Open(_ context.Context, u *url.URL) (kms.Backend, error) {
	t, err := parse(u)
	if err != nil {
		return nil, err
	}
	return o.open(t)
}
