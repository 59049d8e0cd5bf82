// Package static is a KEK that something else puts into a file: an agent of an
// HSM, a TPM that was unsealed, a secret store's sidecar.
//
// # URI
//
//	static:///run/keys/kek?previous-key-file=/run/keys/kek-before
//
// The path is a file of exactly 32 random bytes, an AES-256 key, read when the
// KEK is opened. previous-key-file names the key that was used before it.
//
// # Wrapping
//
// AES-256-GCM with a random 96-bit nonce: at most 2^32 wraps under one key (NIST
// SP 800-38D). A ciphertext is nonce ‖ encrypted ‖ tag; a key ID the first half
// of HMAC-SHA-256(key, "cryptcsi static key id v1"), in hex.
//
// # Credentials, Permissions
//
// None but the right to read the files: whoever reads them has every key.
//
// # Rotation
//
// Put the new key into the path and the old one into previous-key-file,
// restart, rewrap every DEK, then take the old key away.
//
// # Audit
//
// No call leaves a trace outside this process.
package static

import (
	"context"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/url"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// The URI's scheme, and the mechanism of every wrapped key.
const (
	Scheme       = "static"
	Mechanism    = "aes-256-gcm"
	previousFile = "previous-key-file"
	labelKeyID   = "cryptcsi static key id v1"
)

// Backend is a kms.Backend.
type Backend struct {
	keys map[string]secret.Bytes // by key ID
	now  string                  // the key ID of the one that wraps
}

// Open is the kms.Opener. It reads the files.
func Open(_ context.Context, u *url.URL) (kms.Backend, error) {
	params, err := kms.Params(u, previousFile)
	if err != nil {
		return nil, err
	}
	if u.Host != "" || u.Opaque != "" || u.Path == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name the file of the key by its absolute path: static:///path/of/key")
	}
	b := &Backend{keys: map[string]secret.Bytes{}}
	for _, path := range []string{params[previousFile], u.Path} { // the current one last
		if path == "" {
			continue
		}
		if err := b.add(path); err != nil {
			_ = b.Close()
			return nil, err
		}
	}
	return b, nil
}

// add reads a key, which wraps from now on.
func (b *Backend) add(path string) error {
	key, err := secret.ReadFile(path, kms.KeySize, kms.KeySize)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "the file of the key (head -c %d /dev/urandom makes one): %w", kms.KeySize, err)
	}
	h := hmac.New(sha256.New, key.Expose())
	h.Write([]byte(labelKeyID))
	b.now = hex.EncodeToString(h.Sum(nil)[:16])
	if _, twice := b.keys[b.now]; twice {
		key.Wipe()
		return errdefs.Errorf(errdefs.ErrInvalid, "%s holds the same key as %s", previousFile, path)
	}
	b.keys[b.now] = key
	return nil
}

// aead returns the cipher of a key.
func (b *Backend) aead(keyID string) (cipher.AEAD, error) {
	key, ok := b.keys[keyID]
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.64q and this one is %s: give the older one as %s", keyID, b.now, previousFile)
	}
	return secret.AEAD(key, cipher.NewGCMWithRandomNonce)
}

// Wrap wraps under the current key.
func (b *Backend) Wrap(_ context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	aead, err := b.aead(b.now)
	if err != nil {
		return kms.Wrapped{}, err
	}
	return kms.Wrapped{Ciphertext: aead.Seal(nil, nil, plaintext, aad), KeyID: b.now, Mechanism: Mechanism}, nil
}

// Unwrap unwraps with the key that w's key ID names.
func (b *Backend) Unwrap(_ context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	if w.Mechanism != Mechanism {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.64q is not %s", w.Mechanism, Mechanism)
	}
	aead, err := b.aead(w.KeyID)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, nil, w.Ciphertext, aad)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key does not verify for this ID: it was damaged, or moved from another ID")
	}
	return plaintext, nil
}

// CurrentKeyID returns the key's fingerprint.
func (b *Backend) CurrentKeyID(context.Context) (string, error) { return b.now, nil }

// Close wipes the keys.
func (b *Backend) Close() error {
	for _, key := range b.keys {
		key.Wipe()
	}
	return nil
}
