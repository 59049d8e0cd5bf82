package kmstest

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Fault is what goes wrong with one call.
type Fault int

// The faults. Each but None is something that real services do.
const (
	None     Fault = iota
	Fail           // nothing happens: ErrUnavailable
	Lose           // it happens, and the answer is ErrUnavailable
	Delay          // it happens after FaultDelay; an error where ctx ends first
	Nonsense       // it happens, and the answer is random bytes or a name that nobody knows
	Stale          // CurrentKeyID answers, and Wrap names, the key of before the last change; Unwrap as None
)

// FaultDelay is how long a Delay takes.
const FaultDelay = 50 * time.Millisecond

// FaultBackend passes calls on to a backend, with faults. Several KEKs may
// share it.
type FaultBackend struct {
	kms.Backend
	plan func(call int, op string) Fault

	mu           sync.Mutex
	calls        int
	last, before string // key IDs that were answered
}

// NewFaultBackend returns a FaultBackend over b. plan is asked before each call
// of Wrap, Unwrap and CurrentKeyID, by its number (the first is 0) and its kms.Op.
func NewFaultBackend(b kms.Backend, plan func(call int, op string) Fault) *FaultBackend {
	return &FaultBackend{Backend: b, plan: plan}
}

// Calls returns how many calls there were.
func (f *FaultBackend) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// Wrap is part of kms.Backend.
func (f *FaultBackend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	fault, err := f.begin(ctx, kms.OpWrap)
	if err != nil {
		return kms.Wrapped{}, err
	}
	w, err := f.Backend.Wrap(ctx, plaintext, aad)
	if err != nil || fault == Lose {
		return kms.Wrapped{}, lost(fault, err)
	}
	older := f.seen(w.KeyID)
	switch fault {
	case Nonsense:
		_, _ = rand.Read(w.Ciphertext) // never fails, see crypto/rand
	case Stale:
		w.KeyID = older
	}
	return w, nil
}

// Unwrap is part of kms.Backend.
func (f *FaultBackend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	fault, err := f.begin(ctx, kms.OpUnwrap)
	if err != nil {
		return nil, err
	}
	plaintext, err := f.Backend.Unwrap(ctx, w, aad)
	if err != nil || fault == Lose {
		clear(plaintext)
		return nil, lost(fault, err)
	}
	if fault == Nonsense {
		_, _ = rand.Read(plaintext) // never fails, see crypto/rand
	}
	return plaintext, nil
}

// CurrentKeyID is part of kms.Backend.
func (f *FaultBackend) CurrentKeyID(ctx context.Context) (string, error) {
	fault, err := f.begin(ctx, kms.OpCurrentKeyID)
	if err != nil {
		return "", err
	}
	id, err := f.Backend.CurrentKeyID(ctx)
	if err != nil || fault == Lose {
		return "", lost(fault, err)
	}
	older := f.seen(id)
	switch fault {
	case Nonsense:
		return rand.Text(), nil
	case Stale:
		return older, nil
	}
	return id, nil
}

// begin asks the plan and does what comes before the call.
func (f *FaultBackend) begin(ctx context.Context, op string) (Fault, error) {
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

// seen notes a key ID that the service named and returns the one before it.
func (f *FaultBackend) seen(id string) (before string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.last != id {
		f.last, f.before = id, f.last
	}
	if f.before == "" {
		return id
	}
	return f.before
}

func lost(fault Fault, err error) error {
	if fault == Lose {
		return errFault()
	}
	return err
}

func errFault() error {
	return errdefs.Errorf(errdefs.ErrUnavailable, "the KMS does not answer")
}
