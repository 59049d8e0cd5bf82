package kmstest_test

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// TestFaultBackend: without faults the wrapper is a backend like any other.
func TestFaultBackend(t *testing.T) {
	calm := func(int, string) kmstest.Fault { return kmstest.None }
	service := kmstest.NewFaultBackend(kmstest.NewBackend(), calm)
	kmstest.Run(t, kmstest.Harness{
		Open: func(*testing.T) *kms.KEK { return kms.New("fake", service, kms.Options{}) },
		OpenOther: func(*testing.T) *kms.KEK {
			return kms.New("fake", kmstest.NewFaultBackend(kmstest.NewBackend(), calm), kms.Options{})
		},
	})
}

func TestFaults(t *testing.T) {
	fake := kmstest.NewBackend()
	fault := kmstest.None
	var ops []string
	b := kmstest.NewFaultBackend(fake, func(call int, op string) kmstest.Fault {
		if call != len(ops) {
			t.Errorf("call %d after %d", call, len(ops))
		}
		ops = append(ops, op)
		return fault
	})
	ctx := t.Context()
	good, err := b.Wrap(ctx, []byte("plain"), nil)
	if err != nil {
		t.Fatal(err)
	}
	fake.Rotate()
	current, err := b.CurrentKeyID(ctx)
	if err != nil || current == good.KeyID {
		t.Fatalf("CurrentKeyID = %q, %v", current, err)
	}

	for _, fault = range []kmstest.Fault{kmstest.Fail, kmstest.Lose} {
		_, wrapErr := b.Wrap(ctx, []byte("plain"), nil)
		_, unwrapErr := b.Unwrap(ctx, good, nil)
		_, idErr := b.CurrentKeyID(ctx)
		for _, err := range []error{wrapErr, unwrapErr, idErr} {
			if !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("fault %d: %v", fault, err)
			}
		}
	}

	fault = kmstest.Nonsense
	if id, err := b.CurrentKeyID(ctx); err != nil || id == current || id == good.KeyID {
		t.Errorf("Nonsense: CurrentKeyID = %q, %v", id, err)
	}
	if p, err := b.Unwrap(ctx, good, nil); err != nil || bytes.Equal(p, []byte("plain")) {
		t.Errorf("Nonsense: Unwrap = %q, %v", p, err)
	}
	w, err := b.Wrap(ctx, []byte("plain"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fake.Unwrap(ctx, w, nil); !errors.Is(err, errdefs.ErrCorrupt) {
		t.Errorf("Nonsense: what it wrapped unwraps: %v", err)
	}

	fault = kmstest.Stale
	if id, err := b.CurrentKeyID(ctx); err != nil || id != good.KeyID {
		t.Errorf("Stale: CurrentKeyID = %q, %v, want the one before", id, err)
	}
	if w, err := b.Wrap(ctx, []byte("plain"), nil); err != nil || w.KeyID != good.KeyID {
		t.Errorf("Stale: Wrap names %q, %v, want the one before", w.KeyID, err)
	}

	fault = kmstest.Delay
	start := time.Now()
	if p, err := b.Unwrap(ctx, good, nil); err != nil || string(p) != "plain" || time.Since(start) < kmstest.FaultDelay {
		t.Errorf("Delay: Unwrap = %q, %v after %v", p, err, time.Since(start))
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := b.Unwrap(short, good, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Delay after its context: %v", err)
	}
	if b.Calls() != len(ops) || ops[0] != kms.OpWrap || ops[1] != kms.OpCurrentKeyID {
		t.Errorf("%d calls, %q", b.Calls(), ops)
	}
}
