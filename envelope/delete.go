package envelope

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// DeleteDEK leaves a tombstone, which keeps the ID from ever getting another
// key. It needs no KMS. Without a grace the wrapped key is destroyed, in every
// earlier version that the store keeps of the record too; Options.Survives is
// told where a lock forbids that. With a grace that is left to Prune. nil where
// it was deleted before; ErrNotFound where there never was one.
func (k *Keyring) DeleteDEK(ctx context.Context, id dek.ID) error {
	return k.try(ctx, id, func() error {
		r, at, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		if r.State != dek.Deleted {
			now, expires := k.now(), ""
			if k.grace > 0 {
				expires = k.stamp(now.Add(k.grace))
			}
			t := r.tombstone(k.stamp(now), expires)
			if err := k.replace(ctx, t, secret.Bytes{}, at); err != nil {
				return err
			}
			r = t
		}
		if r.Expires != "" || k.auth.proven(r) != nil {
			return nil
		}
		_, err = k.eraseHistory(ctx, at.store, id)
		return err
	})
}

// RestoreDEK undoes DeleteDEK as long as the key was not destroyed. nil where
// the DEK is not deleted; ErrState where its key is gone.
func (k *Keyring) RestoreDEK(ctx context.Context, id dek.ID) error {
	return k.try(ctx, id, func() error {
		t, at, err := k.load(ctx, id)
		if err != nil || t.State != dek.Deleted {
			return err
		}
		if t.Expires == "" {
			return errdefs.Errorf(errdefs.ErrState, "it cannot be restored: it %s", t.deletion())
		}
		r := t.former()
		main, err := k.open(ctx, r)
		if err != nil {
			return err
		}
		defer main.key.Wipe()
		r.Updated = k.stamp(k.now())
		return k.replace(ctx, r, main.key, at)
	})
}

// Prune destroys what DeleteDEK kept for the grace, once that is over, and
// every earlier version that the store keeps of the record: with them go the
// wraps that rewrapping and rotating replaced. until is when the last of them
// can go where a lock forbids it now, else zero; Options.Survives is told too.
// ErrState before the grace is over.
//
// For a DEK that is not deleted Prune destroys earlier versions alone, after it
// has made sure that the current one opens.
func (k *Keyring) Prune(ctx context.Context, id dek.ID) (until time.Time, err error) {
	return k.prune(ctx, id, false)
}

func (k *Keyring) prune(ctx context.Context, id dek.ID, deletedOnly bool) (until time.Time, err error) {
	err = k.try(ctx, id, func() error {
		r, at, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		switch {
		case r.State == dek.Deleted:
			err = k.bury(ctx, r, at)
		case deletedOnly:
			err = errdefs.Errorf(errdefs.ErrState, "it is %s: only what was deleted can be forgotten", r.State)
		default:
			var d dek.DEK
			d, err = k.dek(ctx, r)
			d.Wipe()
		}
		if err != nil {
			return err
		}
		until, err = k.eraseHistory(ctx, at.store, id)
		return err
	})
	return until, err
}

// bury makes a tombstone bare, if its grace is over.
func (k *Keyring) bury(ctx context.Context, t *record, at place) error {
	if err := k.auth.proven(t); err != nil {
		return err
	}
	switch {
	case t.Expires == "":
		return nil
	case k.now().Before(parseTime(t.Expires)):
		return errdefs.Errorf(errdefs.ErrState, "it can be restored until %s: its key was not destroyed", t.Expires)
	}
	return k.replace(ctx, t.tombstone(t.Updated, ""), secret.Bytes{}, at)
}

// Forget removes a tombstone whose grace is over, and with it the only thing
// that keeps the ID from getting a new key: for an operator who knows that the
// volume and all its copies are gone. It prunes first. ErrState where the DEK
// is not deleted, or can still be restored; ErrNotFound where there is none.
func (k *Keyring) Forget(ctx context.Context, id dek.ID) error {
	if _, err := k.prune(ctx, id, true); err != nil {
		return err
	}
	return k.try(ctx, id, func() error {
		r, at, err := k.load(ctx, id)
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			return nil // by a Delete whose answer was lost, or another's
		case err != nil:
			return err
		case r.State != dek.Deleted || r.Expires != "":
			return errdefs.Errorf(errdefs.ErrState, "it is in use again: it was left as it is")
		}
		if err := k.auth.proven(r); err != nil {
			return err
		}
		return raced(at.store.Delete(ctx, ObjectName(id), at.version))
	})
}

// eraseHistory destroys every version but the current one, where the store
// keeps others.
func (k *Keyring) eraseHistory(ctx context.Context, s Store, id dek.ID) (until time.Time, err error) {
	e, ok := s.(Eraser)
	if !ok {
		return time.Time{}, nil
	}
	if until, err = e.EraseHistory(ctx, ObjectName(id)); err != nil {
		return time.Time{}, fmt.Errorf("destroying the earlier versions of its record, which hold wrapped keys: %w", err)
	}
	if !until.IsZero() {
		k.survives(id, until)
	}
	return until, nil
}
