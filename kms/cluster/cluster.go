// Package cluster is a KEK inside the cluster: a master secret and a salt in
// files, as a mounted Kubernetes Secret gives them.
//
// # URI
//
//	cluster:///etc/cryptcsi/master-secret?salt-file=/etc/cryptcsi/salt
//
// The path is the file of the master secret (16 bytes at least, 32
// recommended), salt-file that of the salt (32 bytes at least). Files are
// binary and taken whole: a newline at the end belongs to the secret. Both are
// read once, when the KEK is opened. previous-secret-file and
// previous-salt-file, only together, name the pair that was used before.
//
// # Wrapping
//
// HKDF-SHA-256 over master secret and salt gives an AES-256 key under a label
// of its own, which wraps with AES-GCM and a random 96-bit nonce. NIST SP
// 800-38D allows 2^32 wraps under one such key: a million a day for eleven
// years. A ciphertext is nonce ‖ encrypted ‖ tag, 28 bytes longer than its
// plaintext. The key ID is a fingerprint (16 bytes in hex, from the same HKDF
// under another label), which tells nothing about the key.
//
// # Deriving
//
// Derive gives HKDF-SHA-256(master secret, salt, info = "key-" + ID), 32
// bytes: what Edgeless Constellation's key service gives for the same ID. No
// ID reaches the labels above, which do not begin with "key-".
//
// # Rotation
//
// Put the new pair into the URI's path and salt-file, the old pair into the
// previous ones, restart, rewrap every DEK, then take the old pair away. Wrap
// and Derive use the new pair, Unwrap the one that the key ID names. Derived
// keys cannot be rotated: they change with the pair.
//
// # Credentials, permissions
//
// None but the right to read the files: whoever reads them has every key.
//
// # Audit
//
// No call leaves a trace outside this process.
package cluster

import (
	"context"
	"crypto/cipher"
	"encoding/hex"
	"net/url"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	// Scheme of the URI.
	Scheme = "cluster"
	// Mechanism of every wrapped key.
	Mechanism = "hkdf-sha256+aes-256-gcm"

	// MinSecret is the shortest master secret that is accepted, in bytes.
	MinSecret = 16
	// MinSalt is the shortest salt that is accepted, in bytes.
	MinSalt = 32
	// maxFile bounds both.
	maxFile = 4 << 10

	// The HKDF labels ("info"). Changing one loses every key.
	labelWrap   = "cryptcsi cluster wrap v1"
	labelKeyID  = "cryptcsi cluster key id v1"
	labelDerive = "key-" // followed by the ID
)

// Backend is a kms.Backend and a kms.Deriver.
type Backend struct {
	current  *pair
	previous *pair // nil where there is none
}

// pair is a master secret with its salt, and what comes from them.
type pair struct {
	secret  secret.Bytes
	salt    secret.Bytes
	wrapKey secret.Bytes
	keyID   string
}

// Open is the kms.Opener. It reads the files.
func Open(_ context.Context, u *url.URL) (kms.Backend, error) {
	const salt, previousSecret, previousSalt = "salt-file", "previous-secret-file", "previous-salt-file"
	params, err := kms.Params(u, salt, previousSecret, previousSalt)
	if err != nil {
		return nil, err
	}
	switch {
	case u.Host != "" || u.Opaque != "" || u.Path == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name the file of the master secret by its absolute path: cluster:///path/of/master-secret?%s=/path/of/salt", salt)
	case params[salt] == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is missing: the file of the salt", salt)
	case (params[previousSecret] == "") != (params[previousSalt] == ""):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameters %q and %q go together", previousSecret, previousSalt)
	}
	b := &Backend{}
	if b.current, err = readPair(u.Path, params[salt]); err != nil {
		return nil, err
	}
	if params[previousSecret] != "" {
		if b.previous, err = readPair(params[previousSecret], params[previousSalt]); err != nil {
			b.current.wipe()
			return nil, err
		}
	}
	return b, nil
}

// New returns a Backend for a master secret and a salt and takes both over:
// Close wipes them. ErrInvalid (and both wiped) where one is too short.
func New(master, salt secret.Bytes) (*Backend, error) {
	p, err := newPair(master, salt)
	if err != nil {
		return nil, err
	}
	return &Backend{current: p}, nil
}

func readPair(secretFile, saltFile string) (*pair, error) {
	master, err := readFile("master secret", secretFile)
	if err != nil {
		return nil, err
	}
	salt, err := readFile("salt", saltFile)
	if err != nil {
		master.Wipe()
		return nil, err
	}
	return newPair(master, salt)
}

// readFile reads a whole file into a secret.
func readFile(what, path string) (secret.Bytes, error) {
	s, err := secret.ReadFile(path, 1, maxFile)
	if err != nil {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrInvalid, "the file of the %s: %w", what, err)
	}
	return s, nil
}

func newPair(master, salt secret.Bytes) (*pair, error) {
	p := &pair{secret: master, salt: salt}
	if master.Len() < MinSecret || salt.Len() < MinSalt {
		defer p.wipe()
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the master secret has %d bytes and the salt %d: at least %d (32 is right) and %d are needed",
			master.Len(), salt.Len(), MinSecret, MinSalt)
	}
	wrapKey, err := p.expand(labelWrap, kms.KeySize)
	if err != nil {
		p.wipe()
		return nil, err
	}
	p.wrapKey = wrapKey
	fingerprint, err := p.expand(labelKeyID, 16)
	if err != nil {
		p.wipe()
		return nil, err
	}
	defer fingerprint.Wipe()
	p.keyID = hex.EncodeToString(fingerprint.Expose())
	return p, nil
}

// expand is HKDF-SHA-256 over the pair.
func (p *pair) expand(info string, n int) (secret.Bytes, error) {
	if p.secret.Len() == 0 {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrUnavailable, "the master secret was wiped: the KEK is closed")
	}
	out, err := secret.Derive(p.secret, p.salt.Expose(), info, n)
	if err != nil {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrInvalid, "HKDF: %w", err)
	}
	return secret.Take(out), nil
}

// aead is made for every call, so that no expanded key outlives it for longer
// than the garbage collector takes.
func (p *pair) aead() (cipher.AEAD, error) {
	if p.wrapKey.Len() == 0 {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "the wrapping key was wiped: the KEK is closed")
	}
	return secret.AEAD(p.wrapKey, cipher.NewGCMWithRandomNonce)
}

func (p *pair) wipe() {
	p.secret.Wipe()
	p.salt.Wipe()
	p.wrapKey.Wipe()
}

// Wrap wraps under the current pair.
func (b *Backend) Wrap(_ context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	aead, err := b.current.aead()
	if err != nil {
		return kms.Wrapped{}, err
	}
	return kms.Wrapped{
		Ciphertext: aead.Seal(nil, nil, plaintext, aad),
		KeyID:      b.current.keyID,
		Mechanism:  Mechanism,
	}, nil
}

// Unwrap unwraps with the pair that w's key ID names.
func (b *Backend) Unwrap(_ context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	if w.Mechanism != Mechanism {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %q is not %s", w.Mechanism, Mechanism)
	}
	p := b.current
	if b.previous != nil && w.KeyID == b.previous.keyID {
		p = b.previous
	}
	if w.KeyID != p.keyID {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under master secret %.64q and this one is %s: give the older pair as previous-secret-file and previous-salt-file", w.KeyID, p.keyID)
	}
	aead, err := p.aead()
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, nil, w.Ciphertext, aad)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key does not verify for this ID: it was damaged, or moved from another ID")
	}
	return plaintext, nil
}

// CurrentKeyID returns the fingerprint of the current pair.
func (b *Backend) CurrentKeyID(context.Context) (string, error) { return b.current.keyID, nil }

// Derive returns the key that Constellation's key service gives for id.
func (b *Backend) Derive(_ context.Context, id string) (secret.Bytes, error) {
	return b.current.expand(labelDerive+id, kms.KeySize)
}

// Close wipes both pairs.
func (b *Backend) Close() error {
	b.current.wipe()
	if b.previous != nil {
		b.previous.wipe()
	}
	return nil
}
