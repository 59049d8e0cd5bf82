// Package kms wraps data encryption keys (DEKs) under a key-encryption key
// (KEK) that a key management service holds.
//
// A [KEK] is what everybody uses. It does once what every service needs:
// binding a wrapped key to its ID, deadlines, checks, classes of errors. A
// [Backend] is what one service needs: a thin adapter, one folder below this
// one. A [Mux] is the explicit list of URI schemes that a binary knows; the
// full list is in kms/all. kms/kmstest tells when a backend is right.
//
// # Binding
//
// What is wrapped is SHA-256(ID) ‖ DEK, 64 bytes, and the ID goes along as
// associated data. So a wrapped key that was moved to another ID fails to
// unwrap, even where the service knows no associated data; where it does, its
// audit log and its policy see which volume a call was for.
package kms

import (
	"context"
	"strings"

	"github.com/cryptcsi/cryptcsi/secret"
)

// Sizes and limits.
const (
	// KeySize is the length of every DEK in bytes.
	KeySize = 32
	// MaxID is the longest ID in bytes, that of a DEK.
	MaxID = 512
	// MaxCiphertext and MaxName bound what a service may answer, in bytes:
	// the ciphertext, and each of key ID and mechanism.
	MaxCiphertext = 16 << 10
	MaxName       = 1 << 10
)

// Wrapped is a wrapped DEK with all that is needed to unwrap it later,
// whatever the KEK's current version is by then. Nothing in it is secret.
type Wrapped struct {
	Ciphertext []byte
	// KeyID is the service's exact name of the key that wrapped, its version included.
	KeyID string
	// Mechanism says how, for example "aes-256-gcm". It begins with
	// PublicKeyPrefix exactly where wrapping needs no secret.
	Mechanism string
}

// PublicKeyPrefix begins every mechanism that wraps with a public key.
const PublicKeyPrefix = "rsa-"

// PublicKey says whether w was made, or pretends to have been made, with a
// public key: then anybody can have made it, and what it is found in needs an
// authenticator of its own. A backend unwraps by the mechanism that w names and
// no other, so this cannot be lied about.
func (w Wrapped) PublicKey() bool { return strings.HasPrefix(w.Mechanism, PublicKeyPrefix) }

// Backend is one KEK in one service, without policy. Its methods may also be
// those of Deriver, Manager, Fleet and Permitter. A KEK calls it: IDs and
// sizes are checked, ctx has a deadline, Close is called once and after every
// other call has returned. The other methods are called concurrently.
//
// Errors: ErrCorrupt for a ciphertext that does not verify, ErrDenied for a
// refusal (a key that is disabled, deleted or not ours included), ErrInvalid
// for a request that can never work, ErrState for what a person must look at,
// ErrUnavailable for the rest; an error without a class counts as
// ErrUnavailable. Messages hold no secret and no plaintext.
type Backend interface {
	// Wrap encrypts plaintext (at most 64 bytes) under the current version
	// of the key, with aad as associated data where the service has such a
	// thing. Two calls give two ciphertexts where the mechanism is randomised.
	Wrap(ctx context.Context, plaintext, aad []byte) (Wrapped, error)
	// Unwrap decrypts with exactly the key that w names and no other. The
	// caller wipes what it gets.
	Unwrap(ctx context.Context, w Wrapped, aad []byte) ([]byte, error)
	// CurrentKeyID is the KeyID that Wrap would answer now: asked of the
	// service, not remembered.
	CurrentKeyID(ctx context.Context) (string, error)
	// Close wipes and releases what the backend holds.
	Close() error
}

// Deriver is a Backend that can also compute keys from their IDs.
type Deriver interface {
	// Derive returns the same KeySize bytes for an ID every time. The
	// caller wipes them.
	Derive(ctx context.Context, id string) (secret.Bytes, error)
}
