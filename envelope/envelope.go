// Package envelope keeps data encryption keys (DEKs): it makes them, wraps
// them under a KEK (package kms), and stores them as records, one per DEK, in
// a [Store] that is trusted with nothing but keeping bytes.
//
// A [Keyring] is what callers use. Its life cycle for one ID:
//
//	(none) ──CreateDEK──→ prepared ──ConfirmDEK──→ formatted
//	                                               │       ↑
//	                                          RotateDEK  ConfirmDEK of a header
//	                                               ↓       │  with the new key
//	(none) ──CloneDEK───────────────────────────→ rotating
//
//	any of these ──DeleteDEK──→ deleted ──Prune──→ deleted for good ──Forget──→ (none)
//
// Within its grace what was deleted comes back by RestoreDEK as it was.
//
// # What holds whatever fails
//
// Creating is create-only, every change is a compare-and-swap, and a key that
// is handed out is one that was read back from the store. So no two callers
// ever hold different keys for one ID, whoever races and whatever write's
// answer is lost. A wrap is unwrapped once before it is stored. The one change
// that replaces a DEK, RotateDEK, keeps the old one beside the new until a
// header was confirmed that opens with the new one.
//
// # What the store can do
//
// It can lose, withhold and roll back records. It cannot read keys, move a
// record to another ID (the wrap is bound to it), or change a record in any
// field (its MAC is keyed by the DEK). A rolled-back record is not
// noticed here: the header's sequence number is, by whoever remembers a floor.
//
// Where wrapping is a public-key operation, whoever writes to the store could
// also wrap a key that he knows and write a record that verifies under it. So
// a record with such a wrap needs an authenticator under a secret that only
// the cluster has (Options.RecordAuth), and is refused without. Everything
// else gets one too once the secret is there, and it is checked wherever it
// is: that shows a planted tombstone. Taking it away from a record without a
// public-key wrap gains nothing: such a record is proven by its MAC, under a
// key that nobody can wrap but who may use the KEK.
package envelope

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// A DEK has one size, which kms cannot take from dek.
var _ [kms.KeySize]byte = [dek.Size]byte{}

// Options of a Keyring. The zero value is good, except for a KEK that wraps
// with a public key.
type Options struct {
	// Attempts bounds how often a method tries in all while KMS or store
	// are ErrUnavailable; 0 is 4, 1 never tries again.
	Attempts int
	// Backoff is the longest pause before the second attempt; it doubles
	// with each further one. 0 is 200 ms.
	Backoff time.Duration
	// Now gives the times in records; nil is time.Now.
	Now func() time.Time
	// RecordAuth is a random secret of the cluster, of 32 bytes or more, that
	// authenticates records; see the package comment. All keyrings over the
	// same stores need the same one. New takes it over. Empty is none.
	RecordAuth secret.Bytes
	// Grace is how long DeleteDEK keeps the wrapped key for RestoreDEK; 0
	// destroys it at once.
	Grace time.Duration
	// Survives, if set, is told when a key was destroyed but a lock or a
	// retention rule of the store keeps earlier versions of its record: until
	// then whoever may use the KEK could unwrap it from them. It is called
	// concurrently.
	Survives func(id dek.ID, until time.Time)
	// KEKNames are the names of the KEKs, in their order, by which specs choose
	// one; "", and none at the end, is a KEK without a name.
	KEKNames []string
	// CacheFor is how long GetDEK may use an unwrapped key again without asking
	// the KMS; 0 is never. The record is read from the store at every call all
	// the same, and the key is used only if the wrapped bytes in it are those
	// that the KMS unwrapped. Kept keys lie in locked memory and are wiped when
	// their time is over, when this Keyring changes their record or finds them
	// deleted, and by Close.
	CacheFor time.Duration
	// CacheSize bounds the keys that are kept; the oldest goes first. A DEK that
	// is being rotated has two. At least 1 where CacheFor is set.
	CacheSize int
}

// Keyring is DEKs behind KEKs and stores. Methods are idempotent and may be
// called concurrently, also by several processes over the same stores. Errors
// are of errdefs' classes or ctx's; ErrUnavailable means that the change may
// have happened, and calling again finds out.
//
// The KEK that the spec names wraps, the first one where it names none; a
// wrapped key is unwrapped by the KEKs of the scheme that its record names,
// tried in their order. New records go to the first
// store; a record is looked for in all of them, in their order, and changed
// where it is. Processes that create over the same stores must agree which is
// the first: none of them sees what another creates elsewhere at that moment.
type Keyring struct {
	keks     []*kms.KEK
	names    []string // the KEKs', in their order
	stores   []Store
	auth     *authenticator // nil: none
	grace    time.Duration
	attempts int
	backoff  time.Duration
	now      func() time.Time
	survives func(id dek.ID, until time.Time)
	cache    *cache // nil: none
}

// New returns a Keyring and takes KEKs, stores and Options.RecordAuth over:
// Close closes them all (a store if it is an io.Closer). ErrInvalid without a
// KEK or a store, for bad names, or for a short secret, ErrState where a cache is asked for and
// memory cannot be locked; then all stay the caller's.
func New(keks []*kms.KEK, stores []Store, o Options) (*Keyring, error) {
	switch {
	case len(keks) == 0 || slices.Contains(keks, nil):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a keyring needs a KEK: configure a KMS URI")
	case (len(stores) == 0 || slices.Contains(stores, nil)) && keks[0].CanDerive():
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a keyring needs a store, also where the KEK (%s) could derive keys: configure a storage URI", keks[0].Name())
	case len(stores) == 0 || slices.Contains(stores, nil):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a keyring needs a store: the KEK (%s) cannot derive keys; configure a storage URI", keks[0].Name())
	case o.Grace < 0:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a grace of %v is below zero", o.Grace)
	}
	if err := checkNames(o.KEKNames, len(keks)); err != nil {
		return nil, err
	}
	cache, err := newCache(o.CacheFor, o.CacheSize)
	if err != nil {
		return nil, err
	}
	auth, err := newAuthenticator(o.RecordAuth)
	if err != nil {
		cache.close()
		return nil, err
	}
	k := &Keyring{
		keks: slices.Clone(keks), names: slices.Clone(o.KEKNames), stores: slices.Clone(stores), auth: auth, grace: o.Grace,
		attempts: o.Attempts, backoff: o.Backoff, now: o.Now, survives: o.Survives, cache: cache,
	}
	if k.attempts <= 0 {
		k.attempts = 4
	}
	if k.backoff <= 0 {
		k.backoff = 200 * time.Millisecond
	}
	if k.now == nil {
		k.now = time.Now
	}
	if k.survives == nil {
		k.survives = func(dek.ID, time.Time) {}
	}
	return k, nil
}

// Close closes KEKs and stores. Calls under way may fail.
func (k *Keyring) Close() error {
	var errs []error
	for _, kek := range k.keks {
		errs = append(errs, kek.Close())
	}
	for _, s := range k.stores {
		errs = append(errs, closeStore(s))
	}
	k.auth.wipe()
	k.cache.close()
	return errors.Join(errs...)
}

// CreateDEK returns the DEK of that ID, made now or before; the caller wipes
// it. ErrExists where it exists with another spec, the name included, or as a
// clone, and where it was deleted: an ID never gets a second key. ErrInvalid
// where no KEK has the name in the spec.
func (k *Keyring) CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error) {
	return k.make(ctx, id, spec, "")
}

// CloneDEK is CreateDEK for a volume or snapshot whose disk is a copy of
// source's: it has a key of its own, and the key that opens the copy as its
// previous one, wrapped for its own ID, so that no node ever asks for another
// volume's. It begins as Rotating, with the UUID of source's header and no
// floor, because the copy may be older than what was confirmed of source since;
// as Prepared where source's disk was never formatted.
//
// A copy that was cut before source was first used, or before the end of a
// rotation of it, and is recorded after that, is refused when it is opened: it
// gets no key that source has no longer, because that is what a rotation is for.
//
// The spec must be source's but for the name, Discard and KEK (ErrInvalid). ErrExists where a
// DEK exists that is no clone of source. ErrConflict while source is being
// rotated, because nobody knows then which key the copy has; not for a
// snapshot, which nobody opens. Once the clone exists, source is not looked at.
func (k *Keyring) CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (dek.DEK, error) {
	if _, err := dek.ParseID(string(source)); err != nil || source == id {
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrInvalid, "DEK %.300q cannot be a clone of %.300q", id, source)
	}
	return k.make(ctx, id, spec, source)
}

// make is CreateDEK and CloneDEK.
func (k *Keyring) make(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (d dek.DEK, err error) {
	err = k.try(ctx, id, func() error {
		if err := validSpec(spec); err != nil {
			return errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
		}
		r, _, err := k.load(ctx, id)
		if errors.Is(err, errdefs.ErrNotFound) {
			if err := k.create(ctx, id, spec, source); err != nil {
				return err
			}
			r, _, err = k.load(ctx, id)
			err = seen(err)
		}
		switch {
		case err != nil:
			return err
		case r.State == dek.Deleted:
			return errdefs.Errorf(errdefs.ErrExists, "the DEK %s and its ID never gets another: if the volume is really new, an operator has to forget the old one", r.deletion())
		}
		got, err := k.dek(ctx, r)
		if err != nil {
			return err
		}
		if got.Spec != spec || got.Source != source {
			got.Wipe()
			return errdefs.Errorf(errdefs.ErrExists, "a DEK exists with another spec: %+v%s is stored, %+v%s was asked for", got.Spec, ofSource(got.Source), spec, ofSource(source))
		}
		d = got
		return nil
	})
	return d, err
}

func ofSource(source dek.ID) string {
	if source == "" {
		return ""
	}
	return " as a clone of " + string(source)
}

// seen turns a record that is missing right after it was written into what can
// be tried again.
func seen(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the store does not show the record that was just created")
	}
	return err
}

// create stores a new DEK. nil where somebody else was faster: reading tells.
func (k *Keyring) create(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) error {
	now := k.stamp(k.now())
	r := &record{Version: recordVersion, ID: id, State: dek.Prepared, Spec: specV1(spec), Source: source, Created: now, Updated: now}
	if source != "" {
		if err := k.inherit(ctx, r); err != nil {
			return fmt.Errorf("its source, DEK %s: %w", source, err)
		}
	}
	key := secret.Random(dek.Size)
	defer key.Wipe()
	wrapped, err := k.wrap(ctx, r, key)
	if err != nil {
		return err
	}
	r.Wrapped = wrapped
	data, err := r.encode(key, k.auth)
	if err != nil {
		return err
	}
	err = k.stores[0].Create(ctx, ObjectName(id), data)
	if errors.Is(err, errdefs.ErrExists) {
		return nil
	}
	return err
}

// GetDEK returns the DEK of that ID; the caller wipes it. ErrNotFound where
// there is none or it was deleted; it never creates one.
func (k *Keyring) GetDEK(ctx context.Context, id dek.ID) (d dek.DEK, err error) {
	err = k.try(ctx, id, func() error {
		r, _, err := k.load(ctx, id)
		if errors.Is(err, errdefs.ErrNotFound) || err == nil && r.State == dek.Deleted {
			k.cache.forget(id)
		}
		if err != nil {
			return err
		}
		d, err = k.dekBy(ctx, r, k.recall)
		return err
	})
	return d, err
}

// ClaimFormat records that a node is about to format with a LUKS UUID, and
// returns the claim that holds: the node's earlier one, if any, and the UUID
// of one that was released, because the disk may carry its remains. While
// Rotating it records that the node is about to give the volume a header under
// its own key, whose UUID stays the confirmed one's. ErrConflict while another
// node holds the claim; ErrState where the DEK is Formatted.
func (k *Keyring) ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error) {
	if err := claim.Validate(false); err != nil {
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrInvalid, "DEK %s: claim: %w", id, err)
	}
	var holds dek.Claim
	err := k.change(ctx, id, func(r *record, _ opened) (bool, error) {
		free := r.Claim.Node == ""
		switch {
		case r.State == dek.Formatted:
			return false, errdefs.Errorf(errdefs.ErrState, "the volume is %s: it must not be formatted again", r.State)
		case free && r.State == dek.Rotating:
			r.Claim = claimV1{Node: claim.Node, UUID: r.Header.UUID}
		case free && r.Claim.UUID != "":
			r.Claim.Node = claim.Node
		case free:
			r.Claim = claimV1(claim)
		case r.Claim.Node != claim.Node:
			return false, errdefs.Errorf(errdefs.ErrConflict, "node %q is making the volume's header; it has to finish there, or an operator to release its claim", r.Claim.Node)
		}
		holds = dek.Claim(r.Claim)
		return free, nil
	})
	if err != nil {
		return dek.Claim{}, err
	}
	return holds, nil
}

// ReleaseClaim takes back a node's claim, for an operator who knows that the
// node does not format any more. Another node can then claim, and gets the
// same UUID. nil where nobody holds a claim or the volume is Formatted;
// ErrConflict where another node holds it.
func (k *Keyring) ReleaseClaim(ctx context.Context, id dek.ID, node string) error {
	return k.change(ctx, id, func(r *record, _ opened) (bool, error) {
		switch {
		case r.State == dek.Formatted || r.Claim.Node == "":
			return false, nil
		case r.Claim.Node != node:
			return false, errdefs.Errorf(errdefs.ErrConflict, "the claim is node %q's, not node %q's: it was left as it is", r.Claim.Node, node)
		}
		r.Claim.Node = ""
		return true, nil
	})
}

// ConfirmDEK records that the volume is formatted and raises the header floor
// to h; a sequence below the floor changes nothing. ErrState where h is another
// header than the one that was claimed or confirmed, or nothing was claimed.
//
// While Rotating, a header at or above the floor whose Fingerprint is the new
// key's ends the rotation: the previous key is dropped. Any other only raises
// the floor.
//
// A backup that comes with a header at or above the floor takes the place of
// the one in the record; without one the record keeps what it has. While the
// key is Rotating none is taken: nobody knows under which key it is.
func (k *Keyring) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	if err := dek.CheckUUID(h.UUID); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "DEK %s: header: %w", id, err)
	}
	if err := dek.CheckBackup(h.Backup); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "DEK %s: %w", id, err)
	}
	return k.change(ctx, id, func(r *record, main opened) (bool, error) {
		known := r.Header.UUID
		if r.State == dek.Prepared {
			known = r.Claim.UUID
		}
		before := r.State
		rotated := r.State == dek.Rotating && h.Fingerprint == dek.Fingerprint(main.key) && h.Sequence >= r.Header.Sequence
		switch {
		case known == "":
			return false, errdefs.Errorf(errdefs.ErrState, "header %s cannot be confirmed: no node has claimed the format", h.UUID)
		case known != h.UUID:
			return false, errdefs.Errorf(errdefs.ErrState, "header %s cannot be confirmed: the volume's header is %s; is this another disk?", h.UUID, known)
		case rotated:
			r.State, r.Previous = dek.Formatted, wrappedV1{}
		case r.State == dek.Prepared:
			r.State = dek.Formatted
		}
		next := headerV1{UUID: h.UUID, Sequence: h.Sequence, Backup: r.Header.Backup}
		if h.Backup != "" && r.State == dek.Formatted {
			next.Backup = h.Backup
		}
		if r.Header.UUID != "" && h.Sequence < r.Header.Sequence {
			next = r.Header
		}
		changed := before != r.State || next != r.Header
		r.Header = next
		return changed, nil
	})
}

// change applies edit, which says whether it changed something, to the record
// as it is stored; ErrState for a tombstone. edit may run several times, each
// time on a fresh record. It leaves r.Wrapped a wrap of main.key.
func (k *Keyring) change(ctx context.Context, id dek.ID, edit func(r *record, main opened) (bool, error)) error {
	return k.try(ctx, id, func() error {
		r, at, err := k.load(ctx, id)
		if err != nil {
			return err
		}
		if r.State == dek.Deleted {
			return errdefs.Errorf(errdefs.ErrState, "it %s", r.deletion())
		}
		return k.edit(ctx, r, at, edit)
	})
}

// edit applies edit to a record that was loaded. Of a tombstone with a key that is
// the record that it keeps, and it stays a tombstone, deleted when it was.
func (k *Keyring) edit(ctx context.Context, stored *record, at place, edit func(r *record, main opened) (bool, error)) error {
	r := stored
	if stored.State == dek.Deleted {
		r = stored.former()
	}
	main, err := k.open(ctx, r)
	if err != nil {
		return err
	}
	defer main.key.Wipe()
	changed, err := edit(r, main)
	if err != nil || !changed {
		return err
	}
	r.Updated = k.stamp(k.now())
	if stored.State == dek.Deleted {
		if r.MAC, err = r.mac(main.key); err != nil {
			return err
		}
		r = r.tombstone(stored.Updated, stored.Expires)
	}
	return k.replace(ctx, r, main.key, at)
}

// place is where a record was read, and which version of it.
type place struct {
	store   Store
	version string
}

// load reads the record of id from the first store that has it. ErrNotFound
// only where every store says so. Its fields and its authenticator are
// checked, its MAC is not.
func (k *Keyring) load(ctx context.Context, id dek.ID) (*record, place, error) {
	for i, store := range k.stores {
		r, version, err := k.read(ctx, store, ObjectName(id))
		switch {
		case errors.Is(err, errdefs.ErrNotFound):
			continue
		case err == nil && r.ID != id:
			err = errdefs.Errorf(errdefs.ErrCorrupt, "the record in its place is that of %s", r.ID)
		}
		if err != nil && len(k.stores) > 1 {
			err = fmt.Errorf("store %d of %d: %w", i+1, len(k.stores), err)
		}
		if err != nil {
			return nil, place{}, err
		}
		return r, place{store, version}, nil
	}
	return nil, place{}, errdefs.Errorf(errdefs.ErrNotFound, "there is no record of this DEK in the store")
}

// read is load for one object of one store.
func (k *Keyring) read(ctx context.Context, store Store, name string) (*record, string, error) {
	data, version, err := store.Read(ctx, name)
	if err != nil {
		return nil, "", err
	}
	r, err := decodeRecord(data)
	if err != nil {
		return nil, "", err
	}
	return r, version, k.auth.check(r)
}

// opened is an unwrapped key, and the index of the KEK that did it.
type opened struct {
	key secret.Bytes
	kek int
}

// unwrapper is where the key of a wrap comes from.
type unwrapper func(ctx context.Context, of wrapOf, w wrappedV1) (opened, error)

// ask is the unwrapper that asks a KEK: what proves that a wrap opens.
func (k *Keyring) ask(ctx context.Context, of wrapOf, w wrappedV1) (opened, error) {
	return k.unwrap(ctx, of.id, w)
}

// open unwraps the key of r and checks r's MAC; the caller wipes the key.
func (k *Keyring) open(ctx context.Context, r *record) (opened, error) {
	return k.openBy(ctx, r, k.ask)
}

func (k *Keyring) openBy(ctx context.Context, r *record, unwrap unwrapper) (opened, error) {
	if r.State == dek.Deleted {
		return opened{}, errdefs.Errorf(errdefs.ErrNotFound, "it %s", r.deletion())
	}
	main, err := unwrap(ctx, wrapOf{id: r.ID}, r.Wrapped)
	if err != nil {
		return opened{}, err
	}
	if err := r.verify(main.key); err != nil {
		main.key.Wipe()
		return opened{}, err
	}
	return main, nil
}

// dek opens r and returns what it says, with its keys; the caller wipes them.
func (k *Keyring) dek(ctx context.Context, r *record) (dek.DEK, error) {
	return k.dekBy(ctx, r, k.ask)
}

func (k *Keyring) dekBy(ctx context.Context, r *record, unwrap unwrapper) (dek.DEK, error) {
	main, err := k.openBy(ctx, r, unwrap)
	if err != nil {
		return dek.DEK{}, err
	}
	var previous opened
	if !r.Previous.IsZero() {
		if previous, err = unwrap(ctx, wrapOf{r.ID, true}, r.Previous); err != nil {
			main.key.Wipe()
			return dek.DEK{}, fmt.Errorf("the previous key: %w", err)
		}
	}
	return dek.DEK{
		ID:       r.ID,
		State:    r.State,
		Spec:     dek.Spec(r.Spec),
		Source:   r.Source,
		Claim:    dek.Claim(r.Claim),
		Header:   dek.HeaderID{UUID: r.Header.UUID, Sequence: r.Header.Sequence, Backup: r.Header.Backup},
		Key:      main.key,
		Previous: previous.key,
	}, nil
}

// replace stores r in place of the version that was read: errRaced where
// that is no longer there.
func (k *Keyring) replace(ctx context.Context, r *record, key secret.Bytes, at place) error {
	data, err := r.encode(key, k.auth)
	if err != nil {
		return err
	}
	defer k.cache.forget(r.ID) // whatever came of it: the answer may be lost
	return raced(at.store.Replace(ctx, ObjectName(r.ID), data, at.version))
}

// raced marks a lost compare-and-swap.
func raced(err error) error {
	if errors.Is(err, errdefs.ErrConflict) {
		return errdefs.Errorf(errdefs.ErrConflict, "its record keeps being changed by others: %w", errRaced)
	}
	return err
}

func (k *Keyring) stamp(t time.Time) string { return t.UTC().Format(timeFormat) }

// deletion says in words what became of a tombstone's DEK.
func (r *record) deletion() string {
	if r.Expires != "" {
		return fmt.Sprintf("was deleted at %s; until its key is destroyed, after %s, an operator can restore it", r.Updated, r.Expires)
	}
	return fmt.Sprintf("was deleted at %s; what it encrypted is gone", r.Updated)
}
