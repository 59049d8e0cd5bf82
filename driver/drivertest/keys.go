package drivertest

import (
	"cmp"
	"context"
	"crypto/rand"
	"sync"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Keys is a key side in memory: driver.Keys and driver.ControllerKeys, but that a
// deleted ID can be used again.
type Keys struct {
	mu      sync.Mutex
	records map[dek.ID]*dek.DEK
	given   []secret.Bytes
}

var (
	_ driver.Keys           = (*Keys)(nil)
	_ driver.ControllerKeys = (*Keys)(nil)
)

// NewKeys returns a key side without records.
func NewKeys() *Keys { return &Keys{records: map[dek.ID]*dek.DEK{}} }

// NewDEK returns a DEK as it is after CreateDEK.
func NewDEK(id dek.ID, spec dek.Spec) dek.DEK {
	raw := make([]byte, dek.Size)
	_, _ = rand.Read(raw)
	return dek.DEK{ID: id, State: dek.Prepared, Spec: spec, Key: secret.Take(raw)}
}

// Record returns what is recorded of id, without the key.
func (k *Keys) Record(id dek.ID) (dek.DEK, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r, ok := k.records[id]
	if !ok {
		return dek.DEK{}, false
	}
	d := *r
	d.Key, d.Previous = secret.Bytes{}, secret.Bytes{}
	return d, true
}

// Lose removes a record.
func (k *Keys) Lose(id dek.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.records, id)
}

// Rotate gives a formatted record a new key.
func (k *Keys) Rotate(id dek.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.records[id]
	r.Previous, r.Key, r.State = r.Key, NewDEK(id, r.Spec).Key, dek.Rotating
	r.Claim.Node = ""
}

// CloneDEK is driver.ControllerKeys'.
func (k *Keys) CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (dek.DEK, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if r := k.records[id]; r != nil {
		if r.Spec != spec || r.Source != source {
			return dek.DEK{}, errdefs.Errorf(errdefs.ErrExists, "%s exists as another one", id)
		}
		return k.copyOf(r), ctx.Err()
	}
	s, err := k.get(ctx, source)
	if err != nil {
		return dek.DEK{}, err
	}
	d := NewDEK(id, spec)
	d.Source = source
	switch {
	case s.State == dek.Rotating && !source.Snapshot():
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrConflict, "%s is being rotated", source)
	case s.State == dek.Rotating:
		d.State, d.Previous = dek.Rotating, s.Previous
	case s.State == dek.Formatted:
		d.State, d.Previous = dek.Rotating, s.Key
	}
	d.Previous = d.Previous.Clone()
	d.Header.UUID = s.Header.UUID
	k.records[id] = &d
	return k.copyOf(&d), nil
}

// DeleteDEK is driver.ControllerKeys'.
func (k *Keys) DeleteDEK(ctx context.Context, id dek.ID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	r, err := k.get(ctx, id)
	if err != nil {
		return err
	}
	r.Wipe()
	delete(k.records, id)
	return nil
}

// Seize makes another node the one that formats.
func (k *Keys) Seize(id dek.ID, claim dek.Claim) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.records[id].Claim = claim
}

// CreateDEK is driver.Creator's.
func (k *Keys) CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return dek.DEK{}, err
	}
	r := k.records[id]
	if r == nil {
		d := NewDEK(id, spec)
		r = &d
		k.records[id] = r
	}
	if r.Spec != spec {
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrExists, "%s exists with another spec", id)
	}
	return k.copyOf(r), nil
}

func (k *Keys) copyOf(r *dek.DEK) dek.DEK {
	d := *r
	d.Key, d.Previous = r.Key.Clone(), r.Previous.Clone()
	k.given = append(k.given, d.Key, d.Previous)
	return d
}

// Unwiped counts the keys that were given out and not wiped.
func (k *Keys) Unwiped() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for _, key := range k.given {
		if key.Len() > 0 {
			n++
		}
	}
	return n
}

// GetDEK is driver.Keys'.
func (k *Keys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r, err := k.get(ctx, id)
	if err != nil {
		return dek.DEK{}, err
	}
	return k.copyOf(r), nil
}

func (k *Keys) get(ctx context.Context, id dek.ID) (*dek.DEK, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r, ok := k.records[id]
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "there is no DEK %s", id)
	}
	return r, nil
}

// ClaimFormat is driver.Keys'.
func (k *Keys) ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r, err := k.get(ctx, id)
	switch {
	case err != nil:
		return dek.Claim{}, err
	case r.State == dek.Formatted:
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrState, "%s is %s already", id, r.State)
	case r.Claim.Node == "" && r.State == dek.Rotating:
		r.Claim = dek.Claim{Node: claim.Node, UUID: r.Header.UUID}
	case r.Claim.Node == "":
		r.Claim = claim
	case r.Claim.Node != claim.Node:
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrConflict, "node %s is formatting %s", r.Claim.Node, id)
	}
	return r.Claim, nil
}

// ConfirmDEK is driver.Keys'.
func (k *Keys) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	r, err := k.get(ctx, id)
	if err != nil {
		return err
	}
	if r.Header.UUID != "" && r.Header.UUID != h.UUID {
		return errdefs.Errorf(errdefs.ErrState, "%s has header %s, not %s", id, r.Header.UUID, h.UUID)
	}
	if h.Sequence < r.Header.Sequence {
		return nil
	}
	if r.State == dek.Rotating && h.Fingerprint == dek.Fingerprint(r.Key) {
		r.Previous.Wipe()
		r.Previous, r.State = secret.Bytes{}, dek.Formatted
	} else if r.State == dek.Prepared {
		r.State = dek.Formatted
	}
	r.Header = dek.HeaderID{UUID: h.UUID, Sequence: h.Sequence, Backup: cmp.Or(h.Backup, r.Header.Backup)}
	return nil
}
