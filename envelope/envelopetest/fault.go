package envelopetest

import (
	"bytes"
	"context"
	"sync"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Fault is what goes wrong with one call.
type Fault int

// The faults. Each but None is something that real stores do.
const (
	None  Fault = iota
	Fail        // nothing happens: ErrUnavailable
	Lose        // it happens, and the answer is ErrUnavailable
	Stale       // Read answers as before the object's last change; other calls as None
)

// FaultStore passes calls on to a store, with faults. It may be shared by
// several keyrings; all changes must go through it for Stale to be true.
type FaultStore struct {
	envelope.Store
	plan func(call int, op string) Fault

	mu    sync.Mutex
	calls int
	past  map[string]object // before the last change of each name
}

// object is what a Read answered.
type object struct {
	data    []byte
	version string
	err     error
}

// NewFaultStore returns a FaultStore over s. plan is asked before each call of
// Create, Read, Replace and Delete, by its number (the first is 0) and name.
func NewFaultStore(s envelope.Store, plan func(call int, op string) Fault) *FaultStore {
	return &FaultStore{Store: s, plan: plan, past: map[string]object{}}
}

// Calls returns how many calls there were.
func (f *FaultStore) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// Create is part of envelope.Store.
func (f *FaultStore) Create(ctx context.Context, name string, data []byte) error {
	return f.write(ctx, "Create", name, func() error { return f.Store.Create(ctx, name, data) })
}

// Replace is part of envelope.Store.
func (f *FaultStore) Replace(ctx context.Context, name string, data []byte, version string) error {
	return f.write(ctx, "Replace", name, func() error { return f.Store.Replace(ctx, name, data, version) })
}

// Delete is part of envelope.Store.
func (f *FaultStore) Delete(ctx context.Context, name, version string) error {
	return f.write(ctx, "Delete", name, func() error { return f.Store.Delete(ctx, name, version) })
}

// Read is part of envelope.Store.
func (f *FaultStore) Read(ctx context.Context, name string) ([]byte, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch f.next("Read") {
	case Fail, Lose:
		return nil, "", errFault()
	case Stale:
		if old, ok := f.past[name]; ok {
			return bytes.Clone(old.data), old.version, old.err
		}
	}
	return f.Store.Read(ctx, name)
}

// write does one change at a time, so that it knows what was there before.
func (f *FaultStore) write(ctx context.Context, op, name string, do func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	fault := f.next(op)
	if fault == Fail {
		return errFault()
	}
	data, version, readErr := f.Store.Read(ctx, name)
	err := do()
	if err == nil {
		f.past[name] = object{data, version, readErr}
	}
	if fault == Lose {
		return errFault()
	}
	return err
}

// next asks the plan. The caller holds the lock.
func (f *FaultStore) next(op string) Fault {
	fault := f.plan(f.calls, op)
	f.calls++
	return fault
}

func errFault() error {
	return errdefs.Errorf(errdefs.ErrUnavailable, "the store does not answer")
}
