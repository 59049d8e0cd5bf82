package envelope

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"sync"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// minRecordAuth is the shortest Options.RecordAuth, in bytes.
const minRecordAuth = 32

// authenticator signs records with the cluster's own secret: HMAC-SHA-256 over
// the same fields as the MAC, under HKDF-SHA-256(secret, no salt,
// "record-auth"). A nil *authenticator has no secret.
type authenticator struct {
	mu  sync.RWMutex // wiping waits for the calls under way
	key secret.Bytes
}

// newAuthenticator takes the secret over, unless it is too short.
func newAuthenticator(s secret.Bytes) (*authenticator, error) {
	if s.Len() == 0 {
		return nil, nil
	}
	if s.Len() < minRecordAuth {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the record-auth secret has %d bytes, at least %d random ones are needed", s.Len(), minRecordAuth)
	}
	key, err := secret.Derive(s, nil, labelAuth, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("HKDF: %w", err)
	}
	s.Wipe()
	return &authenticator{key: secret.Take(key)}, nil
}

func (a *authenticator) sum(r *record) ([]byte, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.key.Len() == 0 {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "the record-auth secret was wiped: the keyring is closed")
	}
	return r.sum(a.key.Expose()), nil
}

// check says whether r may be believed as far as the secret goes. It comes
// before everything else that is done with a record, deleting included: what
// was not checked must never be signed anew.
func (a *authenticator) check(r *record) error {
	const flag = "--record-auth-secret-file"
	switch {
	case a == nil && r.publicKey():
		return errdefs.Errorf(errdefs.ErrInvalid, "its key was wrapped with a public key, so the record must be authenticated: give the secret of %s", flag)
	case a == nil:
		return nil
	case r.Auth == nil && r.publicKey():
		return errdefs.Errorf(errdefs.ErrCorrupt, "its key was wrapped with a public key and the record has no authenticator: whoever writes to the store could have planted it")
	case r.Auth == nil:
		return nil
	}
	want, err := a.sum(r)
	if err != nil {
		return err
	}
	if !hmac.Equal(r.Auth, want) {
		return errdefs.Errorf(errdefs.ErrCorrupt, "the record does not verify under the secret of %s: something other than cryptcsi changed it, or the secret is not the one it was written with", flag)
	}
	return nil
}

// proven says whether a tombstone, which has no MAC of its own, may be the
// reason to destroy what the store still has. Without a secret there is nothing
// to tell by; with one, only a tombstone of ours may.
func (a *authenticator) proven(r *record) error {
	if a != nil && r.State == dek.Deleted && r.Auth == nil {
		return errdefs.Errorf(errdefs.ErrState, "its tombstone has no authenticator: it was written before the secret of --record-auth-secret-file was there, or planted; nothing was destroyed")
	}
	return nil
}

func (a *authenticator) wipe() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.key.Wipe()
}
