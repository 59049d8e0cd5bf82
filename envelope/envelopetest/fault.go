package envelopetest

import (
	"bytes"
	"context"
	"sync"
	"time"

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
	Delay       // it happens after FaultDelay; an error where ctx ends first
)

// FaultDelay is how long a Delay takes.
const FaultDelay = 50 * time.Millisecond

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
// Create, Read, Replace, Delete and EraseHistory, by its number (the first is 0)
// and name.
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

// EraseHistory is envelope.Eraser's, and does nothing where the store is none.
func (f *FaultStore) EraseHistory(ctx context.Context, name string) (until time.Time, err error) {
	fault, err := f.next(ctx, "EraseHistory")
	if err != nil {
		return time.Time{}, err
	}
	if e, ok := f.Store.(envelope.Eraser); ok {
		until, err = e.EraseHistory(ctx, name)
	}
	if fault == Lose {
		return time.Time{}, errFault()
	}
	return until, err
}

// Read is part of envelope.Store.
func (f *FaultStore) Read(ctx context.Context, name string) ([]byte, string, error) {
	fault, err := f.next(ctx, "Read")
	if err != nil {
		return nil, "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch fault {
	case Lose:
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
	fault, err := f.next(ctx, op)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	data, version, readErr := f.Store.Read(ctx, name)
	if err = do(); err == nil {
		f.past[name] = object{data, version, readErr}
	}
	if fault == Lose {
		return errFault()
	}
	return err
}

// next asks the plan, and does what comes before the call.
func (f *FaultStore) next(ctx context.Context, op string) (Fault, error) {
	f.mu.Lock()
	fault := f.plan(f.calls, op)
	f.calls++
	f.mu.Unlock()
	switch fault {
	case Fail:
		return fault, errFault()
	case Delay:
		timer := time.NewTimer(FaultDelay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return fault, ctx.Err()
		}
	}
	return fault, nil
}

func errFault() error {
	return errdefs.Errorf(errdefs.ErrUnavailable, "the store does not answer")
}
