// Package envelope keeps data encryption keys (DEKs): it makes them, wraps
// them under a KEK (package kms), and stores them as records, one per DEK, in
// a [Store] that is trusted with nothing but keeping bytes.
//
// A [Keyring] is what callers use. Its life cycle for one ID:
//
//	(none) ──CreateDEK──→ prepared ──ConfirmDEK──→ formatted
//	                         └────────DeleteDEK────────┴──→ deleted, for ever
//
// # What holds whatever fails
//
// Creating is create-only, every change is a compare-and-swap, and a key that
// is handed out is one that was read back from the store. So no two callers
// ever hold different keys for one ID, whoever races and whatever write's
// answer is lost; and no change ever replaces a DEK.
//
// # What the store can do
//
// It can lose, withhold and roll back records. It cannot read keys, move a
// record to another ID (the wrap is bound to it), or change a record in any
// field (its MAC is keyed by the DEK). A rolled-back record is not
// noticed here: the header's sequence number is, by whoever remembers a floor.
package envelope

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// A DEK has one size, which kms cannot take from dek.
var _ [kms.KeySize]byte = [dek.Size]byte{}

// Options of a Keyring. The zero value is good.
type Options struct {
	// Attempts bounds how often a method tries in all while KMS or store
	// are ErrUnavailable; 0 is 4, 1 never tries again.
	Attempts int
	// Backoff is the longest pause before the second attempt; it doubles
	// with each further one. 0 is 200 ms.
	Backoff time.Duration
	// Now gives the times in records; nil is time.Now.
	Now func() time.Time
}

// Keyring is DEKs behind one KEK and one store. Methods are idempotent and may
// be called concurrently, also by several processes over one store. Errors are
// of errdefs' classes or ctx's; ErrUnavailable means that the change may have
// happened, and calling again finds out.
type Keyring struct {
	kek      *kms.KEK
	store    Store
	attempts int
	backoff  time.Duration
	now      func() time.Time
}

// New returns a Keyring and takes kek and store over: Close closes both (the
// store if it is an io.Closer). ErrInvalid without a store; then both stay the
// caller's.
func New(kek *kms.KEK, store Store, o Options) (*Keyring, error) {
	switch {
	case kek == nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a keyring needs a KEK: configure a KMS URI")
	case store == nil && kek.CanDerive():
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a keyring needs a store, also where the KEK (%s) could derive keys: configure a storage URI", kek.Name())
	case store == nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a keyring needs a store: the KEK (%s) cannot derive keys; configure a storage URI", kek.Name())
	}
	k := &Keyring{kek: kek, store: store, attempts: o.Attempts, backoff: o.Backoff, now: o.Now}
	if k.attempts <= 0 {
		k.attempts = 4
	}
	if k.backoff <= 0 {
		k.backoff = 200 * time.Millisecond
	}
	if k.now == nil {
		k.now = time.Now
	}
	return k, nil
}

// Close closes KEK and store. Calls under way may fail.
func (k *Keyring) Close() error { return errors.Join(k.kek.Close(), closeStore(k.store)) }

// CreateDEK returns the DEK of that ID, made now or before; the caller wipes
// its Key. ErrExists where it exists with another spec, the name included, and
// where it was deleted: an ID never gets a second key.
func (k *Keyring) CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error) {
	var d dek.DEK
	err := k.try(ctx, id, func() error {
		if err := validSpec(spec); err != nil {
			return errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
		}
		r, _, err := k.load(ctx, id)
		if errors.Is(err, errdefs.ErrNotFound) {
			if err = k.create(ctx, id, spec); err == nil {
				r, _, err = k.load(ctx, id)
			}
		}
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			return errdefs.Errorf(errdefs.ErrUnavailable, "the store does not show the record that was just created")
		case err != nil:
			return err
		case r.State == dek.Deleted:
			return errdefs.Errorf(errdefs.ErrExists, "the DEK was deleted at %s and its ID never gets another: if the volume is really new, an operator has to forget the old one", r.Updated)
		}
		key, err := k.open(ctx, r)
		if err != nil {
			return err
		}
		if dek.Spec(r.Spec) != spec {
			key.Wipe()
			return errdefs.Errorf(errdefs.ErrExists, "a DEK exists with another spec: %+v is stored, %+v was asked for", dek.Spec(r.Spec), spec)
		}
		d = r.dek(key)
		return nil
	})
	return d, err
}

// create stores a new DEK. nil where somebody else was faster: reading tells.
func (k *Keyring) create(ctx context.Context, id dek.ID, spec dek.Spec) error {
	key, err := secret.Read(rand.Reader, dek.Size)
	if err != nil {
		return err
	}
	defer key.Wipe()
	w, err := k.kek.Wrap(ctx, string(id), key)
	if err != nil {
		return err
	}
	now := k.stamp()
	r := &record{Version: recordVersion, ID: id, State: dek.Prepared, Spec: specV1(spec), Created: now, Updated: now}
	r.setWrapped(k.kek.Scheme(), w)
	data, err := r.encode(key)
	if err != nil {
		return err
	}
	err = k.store.Create(ctx, ObjectName(id), data)
	if errors.Is(err, errdefs.ErrExists) {
		return nil
	}
	return err
}

// GetDEK returns the DEK of that ID; the caller wipes its Key. ErrNotFound
// where there is none or it was deleted; it never creates one.
func (k *Keyring) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	var d dek.DEK
	err := k.try(ctx, id, func() error {
		r, _, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		key, err := k.open(ctx, r)
		if err != nil {
			return err
		}
		d = r.dek(key)
		return nil
	})
	return d, err
}

// ClaimFormat records that a node is about to format with a LUKS UUID, and
// returns the claim that holds: the node's earlier one, if any. ErrConflict
// while another node holds the claim; ErrState unless the DEK is Prepared.
func (k *Keyring) ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error) {
	if err := validClaim(claim); err != nil {
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrInvalid, "DEK %s: claim: %w", id, err)
	}
	var holds dek.Claim
	err := k.change(ctx, id, func(r *record, _ secret.Bytes) (bool, error) {
		free := r.Claim == claimV1{}
		switch {
		case r.State != dek.Prepared:
			return false, errdefs.Errorf(errdefs.ErrState, "the volume is %s: it must not be formatted again", r.State)
		case free:
			r.Claim = claimV1(claim)
		case r.Claim.Node != claim.Node:
			return false, errdefs.Errorf(errdefs.ErrConflict, "node %q is formatting the volume; it has to finish there, or an operator to release its claim", r.Claim.Node)
		}
		holds = dek.Claim(r.Claim)
		return free, nil
	})
	if err != nil {
		return dek.Claim{}, err
	}
	return holds, nil
}

// ConfirmDEK records that the volume is formatted and raises the header floor
// to h; a sequence below the floor changes nothing. ErrState where h is another
// header than the one that was claimed or confirmed, or nothing was claimed.
func (k *Keyring) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	if err := validUUID(h.UUID); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "DEK %s: header: %w", id, err)
	}
	return k.change(ctx, id, func(r *record, _ secret.Bytes) (bool, error) {
		known := r.Header.UUID
		if r.State == dek.Prepared {
			known = r.Claim.UUID
		}
		switch {
		case known == "":
			return false, errdefs.Errorf(errdefs.ErrState, "header %s cannot be confirmed: no node has claimed the format", h.UUID)
		case known != h.UUID:
			return false, errdefs.Errorf(errdefs.ErrState, "header %s cannot be confirmed: the volume's header is %s; is this another disk?", h.UUID, known)
		case r.State == dek.Formatted && h.Sequence <= r.Header.Sequence:
			return false, nil
		}
		r.State, r.Header = dek.Formatted, headerV1(h)
		return true, nil
	})
}

// RewrapDEK wraps the DEK under the KEK's current key, unless it is already.
// The DEK itself stays. ErrState where it was deleted.
func (k *Keyring) RewrapDEK(ctx context.Context, id dek.ID) error {
	return k.change(ctx, id, func(r *record, key secret.Bytes) (bool, error) {
		current, err := k.kek.CurrentKeyID(ctx)
		if err != nil || r.Wrapped.KeyID == current {
			return false, err
		}
		w, err := k.kek.Wrap(ctx, string(id), key)
		if err != nil {
			return false, err
		}
		// The old wrap is about to go: the new one must be good.
		again, err := k.kek.Unwrap(ctx, string(id), w)
		if err != nil {
			return false, err
		}
		defer again.Wipe()
		if !again.Equal(key) {
			return false, errdefs.Errorf(errdefs.ErrState, "the KMS gave back another key than it had wrapped: the record was left as it is")
		}
		r.setWrapped(k.kek.Scheme(), w)
		return true, nil
	})
}

// DeleteDEK destroys the wrapped key and leaves a tombstone, which keeps the
// ID from ever getting another key. It needs no KMS. nil where it was deleted
// before; ErrNotFound where there never was one.
func (k *Keyring) DeleteDEK(ctx context.Context, id dek.ID) error {
	return k.try(ctx, id, func() error {
		r, version, err := k.load(ctx, id)
		if err != nil || r.State == dek.Deleted {
			return err
		}
		tombstone := &record{Version: recordVersion, ID: id, State: dek.Deleted, Spec: r.Spec, Created: r.Created, Updated: k.stamp()}
		return k.replace(ctx, tombstone, secret.Bytes{}, version)
	})
}

// change applies edit, which says whether it changed something, to the record
// as it is stored; ErrState for a tombstone. edit may run several times, each time on a fresh record.
func (k *Keyring) change(ctx context.Context, id dek.ID, edit func(r *record, key secret.Bytes) (bool, error)) error {
	return k.try(ctx, id, func() error {
		r, version, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		if r.State == dek.Deleted {
			return errdefs.Errorf(errdefs.ErrState, "it was deleted at %s; what it encrypted is gone", r.Updated)
		}
		key, err := k.open(ctx, r)
		if err != nil {
			return err
		}
		defer key.Wipe()
		changed, err := edit(r, key)
		if err != nil || !changed {
			return err
		}
		r.Updated = k.stamp()
		return k.replace(ctx, r, key, version)
	})
}

// load reads the record of id. Its fields are checked, its MAC is not.
func (k *Keyring) load(ctx context.Context, id dek.ID) (*record, string, error) {
	data, version, err := k.store.Read(ctx, ObjectName(id))
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, "", errdefs.Errorf(errdefs.ErrNotFound, "there is no record of this DEK in the store")
	}
	if err != nil {
		return nil, "", err
	}
	r, err := decodeRecord(data)
	if err != nil {
		return nil, "", err
	}
	if r.ID != id {
		return nil, "", errdefs.Errorf(errdefs.ErrCorrupt, "the record in its place is that of %s", r.ID)
	}
	return r, version, nil
}

// open unwraps the key of r and checks r's MAC; the caller wipes the key.
func (k *Keyring) open(ctx context.Context, r *record) (secret.Bytes, error) {
	if r.State == dek.Deleted {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrNotFound, "it was deleted at %s; what it encrypted is gone", r.Updated)
	}
	if r.Wrapped.Scheme != k.kek.Scheme() {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrState, "it is wrapped under a KEK of scheme %.100q and this process has %s: configure the other KMS", r.Wrapped.Scheme, k.kek.Name())
	}
	key, err := k.kek.Unwrap(ctx, string(r.ID), r.wrappedKey())
	if err != nil {
		return secret.Bytes{}, err
	}
	if err := r.verify(key); err != nil {
		key.Wipe()
		return secret.Bytes{}, err
	}
	return key, nil
}

// replace stores r in place of the version that was read: errRaced where
// that is no longer there.
func (k *Keyring) replace(ctx context.Context, r *record, key secret.Bytes, version string) error {
	data, err := r.encode(key)
	if err != nil {
		return err
	}
	err = k.store.Replace(ctx, ObjectName(r.ID), data, version)
	if errors.Is(err, errdefs.ErrConflict) {
		return errdefs.Errorf(errdefs.ErrConflict, "its record keeps being changed by others: %w", errRaced)
	}
	return err
}

func (k *Keyring) stamp() string { return k.now().UTC().Format(timeFormat) }
