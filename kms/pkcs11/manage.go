//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/rand"
	"math/big"

	p11 "github.com/miekg/pkcs11"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Create generates the first version in the token. What exists under its label
// is returned as it is: tokens keep no labels of ours that could tell whose it is.
func (b *Backend) Create(ctx context.Context, n kms.NewKey) (kms.Key, error) {
	switch {
	case n.Policy != nil:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a PKCS#11 token takes no policy: whoever logs in may use its keys")
	case n.RotationPeriod != 0:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "a PKCS#11 token does not rotate by itself: rotate the key when it is time")
	}
	return call(ctx, b, p11.CKF_RW_SESSION, func(s session) (kms.Key, error) {
		all, err := b.versions(s)
		if err == nil && len(all) == 0 {
			err = b.generate(s, all)
		}
		if err != nil {
			return kms.Key{}, err
		}
		return b.describe(s)
	})
}

// Describe lists the versions.
func (b *Backend) Describe(ctx context.Context) (kms.Key, error) {
	return call(ctx, b, 0, b.describe)
}

// Rotate generates a version with a higher CKA_ID.
func (b *Backend) Rotate(ctx context.Context) (kms.Key, error) {
	if b.id != nil {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "the URI pins one version of %s (id=…): without that attribute it can be rotated", &b.target)
	}
	return call(ctx, b, p11.CKF_RW_SESSION, func(s session) (kms.Key, error) {
		all, err := b.versions(s)
		if err == nil && len(all) == 0 {
			err = b.errNothing()
		}
		if err == nil {
			err = b.generate(s, all)
		}
		if err != nil {
			return kms.Key{}, err
		}
		return b.describe(s)
	})
}

// SetVersion lets one version, or the whole key, unwrap or not, or destroys it.
func (b *Backend) SetVersion(ctx context.Context, keyID string, state kms.VersionState) error {
	var id []byte
	if keyID != "" {
		var err error
		if id, err = b.versionOf(keyID); err != nil {
			return err
		}
	}
	if state != kms.Enabled && state != kms.Disabled && state != kms.Destroyed {
		return errdefs.Errorf(errdefs.ErrInvalid, "a version in a token can be enabled, disabled or destroyed, not %q", state)
	}
	_, err := call(ctx, b, p11.CKF_RW_SESSION, func(s session) (struct{}, error) {
		return struct{}{}, b.setVersion(s, keyID == "", id, state)
	})
	return err
}

func (b *Backend) setVersion(s session, whole bool, id []byte, state kms.VersionState) error {
	all, err := b.versions(s)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return b.errNothing()
	}
	newest, found := all[len(all)-1], false
	for _, v := range all {
		if !whole && !bytes.Equal(v.id, id) {
			continue
		}
		if !whole && state != kms.Enabled && v.number().Cmp(newest.number()) == 0 {
			return errdefs.Errorf(errdefs.ErrState, "version %x of %s is the current one: rotate first", id, &b.target)
		}
		if err := b.set(s, v, state); err != nil {
			return err
		}
		found = true
	}
	if !found {
		return errdefs.Errorf(errdefs.ErrNotFound, "%s has no version %x: it was destroyed, or there never was one", &b.target, id)
	}
	return nil
}

func (b *Backend) set(s session, v version, state kms.VersionState) error {
	if state == kms.Destroyed {
		return s.DestroyObject(s.handle, v.handle)
	}
	// What a key was made for is told by what it does the other way.
	a, err := s.GetAttributeValue(s.handle, v.handle, []*p11.Attribute{p11.NewAttribute(p11.CKA_ENCRYPT, nil), p11.NewAttribute(p11.CKA_WRAP, nil)})
	if err != nil {
		return err
	}
	return s.SetAttributeValue(s.handle, v.handle, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_DECRYPT, state == kms.Enabled && isTrue(a[0])),
		p11.NewAttribute(p11.CKA_UNWRAP, state == kms.Enabled && isTrue(a[1])),
	})
}

// generate makes the version after all.
func (b *Backend) generate(s session, all []version) error {
	id := b.id
	if id == nil {
		id = nextID(all)
	}
	kwp := b.mechanism == MechanismKWP
	_, err := s.GenerateKey(s.handle, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_GEN, nil)}, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, p11.CKO_SECRET_KEY),
		p11.NewAttribute(p11.CKA_KEY_TYPE, p11.CKK_AES),
		p11.NewAttribute(p11.CKA_VALUE_LEN, keySize),
		p11.NewAttribute(p11.CKA_LABEL, b.object),
		p11.NewAttribute(p11.CKA_ID, id),
		p11.NewAttribute(p11.CKA_TOKEN, true),
		p11.NewAttribute(p11.CKA_PRIVATE, true),
		p11.NewAttribute(p11.CKA_SENSITIVE, true),
		p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
		p11.NewAttribute(p11.CKA_ENCRYPT, !kwp),
		p11.NewAttribute(p11.CKA_DECRYPT, !kwp),
		p11.NewAttribute(p11.CKA_WRAP, kwp),
		p11.NewAttribute(p11.CKA_UNWRAP, kwp),
	})
	return err
}

// nextID returns a CKA_ID, of 8 bytes at least, that is higher than all: the
// last one without its last 32 bits, plus one, then 32 random bits.
func nextID(all []version) []byte {
	next := new(big.Int)
	if len(all) > 0 {
		next = all[len(all)-1].number()
	}
	next.Add(next.Rsh(next, 32), big.NewInt(1))
	random := make([]byte, 4)
	_, _ = rand.Read(random) // never fails, see crypto/rand
	next.Or(next.Lsh(next, 32), new(big.Int).SetBytes(random))
	return next.FillBytes(make([]byte, max(8, (next.BitLen()+7)/8)))
}

func (b *Backend) describe(s session) (kms.Key, error) {
	all, err := b.versions(s)
	if err != nil {
		return kms.Key{}, err
	}
	if len(all) == 0 {
		return kms.Key{}, b.errNothing()
	}
	newest, err := b.last(all)
	if err != nil {
		return kms.Key{}, err
	}
	k := kms.Key{URI: b.uri()}
	for _, v := range all {
		a, err := s.GetAttributeValue(s.handle, v.handle, []*p11.Attribute{p11.NewAttribute(p11.CKA_DECRYPT, nil), p11.NewAttribute(p11.CKA_UNWRAP, nil)})
		if err != nil {
			return kms.Key{}, err
		}
		state := kms.Disabled
		if isTrue(a[0]) || isTrue(a[1]) {
			state = kms.Enabled
		}
		k.Versions = append(k.Versions, kms.Version{KeyID: b.keyID(v.id), State: state, Current: v.handle == newest.handle})
	}
	return k, nil
}

func (b *Backend) errNothing() error {
	return errdefs.Errorf(errdefs.ErrNotFound, "%s: there is no such AES key", &b.target)
}
