package envelope

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// RotateDEK gives a formatted volume a new DEK and returns it, with the old
// one as Previous; the caller wipes both. The state is Rotating until a header
// that opens with the new key is confirmed; until then RotateDEK returns the
// same keys again. It changes no disk: the next node to open the volume does.
// The volume key below, which encrypts the data, stays. ErrState while the
// volume is Prepared.
func (k *Keyring) RotateDEK(ctx context.Context, id dek.ID) (d dek.DEK, err error) {
	err = k.try(ctx, id, func() error {
		r, at, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		if r.State == dek.Formatted {
			if err := k.startRotation(ctx, r, at); err != nil {
				return err
			}
			if r, _, err = k.load(ctx, id); err != nil {
				return seen(err)
			}
		}
		switch r.State {
		case dek.Prepared:
			return errdefs.Errorf(errdefs.ErrState, "the volume is not formatted yet: there is no key to rotate")
		case dek.Deleted:
			return errdefs.Errorf(errdefs.ErrState, "it %s", r.deletion())
		case dek.Formatted:
			return errdefs.Errorf(errdefs.ErrUnavailable, "the store does not show the change that was just made")
		}
		d, err = k.dek(ctx, r)
		return err
	})
	return d, err
}

// startRotation stores a formatted record with a new key.
func (k *Keyring) startRotation(ctx context.Context, r *record, at place) error {
	old, err := k.open(ctx, r) // proves the record
	if err != nil {
		return err
	}
	old.key.Wipe()
	key := secret.Random(dek.Size)
	defer key.Wipe()
	r.Previous = r.Wrapped
	if r.Wrapped, err = k.wrap(ctx, r, key); err != nil {
		return err
	}
	r.State, r.Updated = dek.Rotating, k.stamp(k.now())
	r.Header.Backup = "" // it opens under the old key
	r.Claim.Node = ""    // whoever replaces the header claims it anew
	return k.replace(ctx, r, key, at)
}

// inherit makes r, a new record, one of a clone of r.Source.
func (k *Keyring) inherit(ctx context.Context, r *record) error {
	s, _, err := k.load(ctx, r.Source)
	if err != nil {
		return err
	}
	d, err := k.dek(ctx, s)
	if err != nil {
		return err
	}
	defer d.Wipe()
	spec := d.Spec
	spec.Name, spec.Discard, spec.KEK = r.Spec.Name, r.Spec.Discard, r.Spec.KEK // no disk says them
	old := d.Key
	switch {
	case spec != dek.Spec(r.Spec):
		return errdefs.Errorf(errdefs.ErrInvalid, "its spec is %+v, and a copy of its disk cannot be %+v", d.Spec, dek.Spec(r.Spec))
	case d.State == dek.Prepared:
		return nil // nothing was ever on the disk
	case d.State == dek.Rotating && r.Source.Snapshot():
		old = d.Previous
	case d.State == dek.Rotating:
		return errdefs.Errorf(errdefs.ErrConflict, "its key is being rotated, or it is a clone that no node has opened yet: mount it once, then clone it")
	}
	r.State, r.Header = dek.Rotating, headerV1{UUID: s.Header.UUID}
	r.Previous, err = k.wrap(ctx, r, old)
	return err
}

// RewrapDEK wraps the DEK, and the previous one while there is one, under the
// current key of the KEK that its spec names (the first one where it names
// none), unless they are already, and authenticates the record if it should be
// and is not. The DEK itself stays. What was deleted is wrapped anew as long as
// it can be restored, and stays deleted. ErrState where its key is gone,
// ErrInvalid where no KEK has that name.
func (k *Keyring) RewrapDEK(ctx context.Context, id dek.ID) error { return k.rewrap(ctx, id, false) }

// RewrapDEKAlways is RewrapDEK that wraps anew in any case: for services whose
// key ID stays the same when the key is rotated.
func (k *Keyring) RewrapDEKAlways(ctx context.Context, id dek.ID) error {
	return k.rewrap(ctx, id, true)
}

func (k *Keyring) rewrap(ctx context.Context, id dek.ID, always bool) error {
	return k.try(ctx, id, func() error {
		stored, at, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		if stored.State == dek.Deleted {
			if err := k.restorable(stored); err != nil {
				return err
			}
		}
		due := k.auth != nil && stored.Auth == nil
		return k.edit(ctx, stored, at, func(r *record, main opened) (bool, error) {
			changed, err := k.wrapAnew(ctx, r, main, always)
			return changed || due, err
		})
	})
}

// restorable is nil for a tombstone that may be written anew with its key. One
// that is not proven to be ours would be, once we have written it.
func (k *Keyring) restorable(t *record) error {
	if t.Expires == "" {
		return errdefs.Errorf(errdefs.ErrState, "it %s", t.deletion())
	}
	if err := k.auth.proven(t); err != nil {
		return fmt.Errorf("%w: restore it, and delete it again if it should be", err)
	}
	return nil
}

// wrapAnew wraps r's keys under the current key of its KEK, where they are not or
// always, and says whether one was.
func (k *Keyring) wrapAnew(ctx context.Context, r *record, main opened, always bool) (changed bool, err error) {
	own, err := k.kekOf(r)
	if err != nil {
		return false, err
	}
	current, err := k.keks[own].CurrentKeyID(ctx)
	if err != nil {
		return false, err
	}
	due := func(w wrappedV1, kek int) bool { return always || kek != own || w.KeyID != current }
	if due(r.Wrapped, main.kek) {
		if r.Wrapped, err = k.wrap(ctx, r, main.key); err != nil {
			return false, err
		}
		changed = true
	}
	if r.Previous.IsZero() {
		return changed, nil
	}
	previous, err := k.unwrap(ctx, r.ID, r.Previous)
	if err != nil {
		return false, fmt.Errorf("the previous key: %w", err)
	}
	defer previous.key.Wipe()
	if due(r.Previous, previous.kek) {
		if r.Previous, err = k.wrap(ctx, r, previous.key); err != nil {
			return false, err
		}
		changed = true
	}
	return changed, nil
}

// wrap wraps key under the KEK of r. What it returns may become the only copy
// of a key: it was unwrapped once to see that it can be.
func (k *Keyring) wrap(ctx context.Context, r *record, key secret.Bytes) (wrappedV1, error) {
	own, err := k.kekOf(r)
	if err != nil {
		return wrappedV1{}, err
	}
	kek := k.keks[own]
	w, err := kek.Wrap(ctx, string(r.ID), key)
	if err != nil {
		return wrappedV1{}, err
	}
	if w.PublicKey() && k.auth == nil {
		return wrappedV1{}, errdefs.Errorf(errdefs.ErrInvalid, "KEK %s wraps with a public key, so that whoever writes to the store could plant keys: records need an authenticator, give --record-auth-secret-file", kek.Name())
	}
	again, err := kek.Unwrap(ctx, string(r.ID), w)
	if errors.Is(err, errdefs.ErrCorrupt) {
		return wrappedV1{}, errdefs.Errorf(errdefs.ErrState, "the KMS does not unwrap what it has just wrapped, nothing was changed: %s", err.Error())
	}
	if err != nil {
		return wrappedV1{}, err
	}
	defer again.Wipe()
	if !again.Equal(key) {
		return wrappedV1{}, errdefs.Errorf(errdefs.ErrState, "KEK %s gave back another key than it had wrapped: nothing was changed", kek.Name())
	}
	return wrappedV1{Scheme: kek.Scheme(), KeyID: w.KeyID, Mechanism: w.Mechanism, Ciphertext: w.Ciphertext}, nil
}

// unwrap asks the KEKs of w's scheme, in their order; the caller wipes the key.
func (k *Keyring) unwrap(ctx context.Context, id dek.ID, w wrappedV1) (opened, error) {
	var failed []error
	var names []string
	for i, kek := range k.keks {
		names = append(names, kek.Name())
		if kek.Scheme() != w.Scheme {
			continue
		}
		key, err := kek.Unwrap(ctx, string(id), w.kms())
		if err == nil {
			return opened{key, i}, nil
		}
		if ctx.Err() != nil {
			return opened{}, err
		}
		failed = append(failed, err)
	}
	if len(failed) == 0 {
		return opened{}, errdefs.Errorf(errdefs.ErrState, "it is wrapped under a KEK of scheme %.100q and this process has %s: configure the other KMS", w.Scheme, strings.Join(names, ", "))
	}
	return opened{}, gravest(failed)
}

// gravest joins what several KEKs answered, under the class that says least of
// the key: as long as one of them could not be asked, nothing is known; a
// refusal can be lifted; and a KEK often calls corrupt what another has wrapped.
func gravest(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	var texts []string
	for _, err := range errs {
		texts = append(texts, err.Error())
	}
	joined := errors.Join(errs...)
	class := errdefs.ErrUnavailable
	for _, c := range []error{errdefs.ErrUnavailable, errdefs.ErrState, errdefs.ErrDenied, errdefs.ErrCorrupt, errdefs.ErrInvalid} {
		if errors.Is(joined, c) {
			class = c
			break
		}
	}
	return errdefs.Errorf(class, "no KEK unwraps it: %s", strings.Join(texts, "; "))
}
