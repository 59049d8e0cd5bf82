package kmstest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"sync"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Backend is a KMS in memory with one KEK: AES-256-GCM, a random key per
// version. It does not derive. It stands for the service as much as for the
// client: Close does not lose its keys, and several KEKs may share one.
type Backend struct {
	mu       sync.Mutex
	name     string
	versions map[string]cipher.AEAD
	current  string
	fault    func(op string) error
}

var _ kms.Backend = (*Backend)(nil)

// NewBackend returns a service with a key that no other has.
func NewBackend() *Backend {
	b := &Backend{name: rand.Text(), versions: map[string]cipher.AEAD{}}
	b.Rotate()
	return b
}

// Rotate makes a new version of the key, which wraps from now on. Older
// versions still unwrap.
func (b *Backend) Rotate() {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails, see crypto/rand
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.current = fmt.Sprintf("%s/%d", b.name, len(b.versions)+1)
	b.versions[b.current] = aead
}

// SetFault makes every call ask fault first, by the name of its method, and
// fail with what that returns unless it is nil. A nil fault ends it.
func (b *Backend) SetFault(fault func(op string) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fault = fault
}

// Wrap is part of kms.Backend.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	if err := b.check(ctx, "Wrap"); err != nil {
		return kms.Wrapped{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return kms.Wrapped{
		Ciphertext: b.versions[b.current].Seal(nil, nil, plaintext, aad),
		KeyID:      b.current,
		Mechanism:  "fake",
	}, nil
}

// Unwrap is part of kms.Backend.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	if err := b.check(ctx, "Unwrap"); err != nil {
		return nil, err
	}
	b.mu.Lock()
	aead, ok := b.versions[w.KeyID]
	b.mu.Unlock()
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "there is no key %q here", w.KeyID)
	}
	plaintext, err := aead.Open(nil, nil, w.Ciphertext, aad)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the ciphertext does not verify")
	}
	return plaintext, nil
}

// CurrentKeyID is part of kms.Backend.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	if err := b.check(ctx, "CurrentKeyID"); err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.current, nil
}

// Close is part of kms.Backend.
func (b *Backend) Close() error { return nil }

func (b *Backend) check(ctx context.Context, op string) error {
	b.mu.Lock()
	fault := b.fault
	b.mu.Unlock()
	if fault != nil {
		if err := fault(op); err != nil {
			return err
		}
	}
	return ctx.Err()
}
