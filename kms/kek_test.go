package kms_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

const id = "driver.example.com/vol-1"

// backend is made of what a test gives it.
type backend struct {
	wrap   func(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error)
	unwrap func(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error)
	id     func(ctx context.Context) (string, error)
	close  func() error
}

func (b backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	return b.wrap(ctx, plaintext, aad)
}
func (b backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	return b.unwrap(ctx, w, aad)
}
func (b backend) CurrentKeyID(ctx context.Context) (string, error) { return b.id(ctx) }
func (b backend) Close() error                                     { return b.close() }

func wrapped(ciphertext []byte) kms.Wrapped {
	return kms.Wrapped{Ciphertext: ciphertext, KeyID: "k", Mechanism: "m"}
}

// TestBinding: what a backend is given, and what it may give back.
func TestBinding(t *testing.T) {
	key := secret.Take([]byte(strings.Repeat("k", kms.KeySize)))
	defer key.Wipe()
	digest := sha256.Sum256([]byte(id))
	bound := string(digest[:]) + strings.Repeat("k", kms.KeySize)
	var got, gotAAD string
	kek := kms.New("x", backend{wrap: func(_ context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
		got, gotAAD = string(plaintext), string(aad)
		return wrapped([]byte("c")), nil
	}}, kms.Options{})
	if _, err := kek.Wrap(t.Context(), id, key); err != nil {
		t.Fatal(err)
	}
	if got != bound || gotAAD != id {
		t.Errorf("the backend wraps %x with %q, want %x with %q", got, gotAAD, bound, id)
	}

	otherDigest := sha256.Sum256([]byte("other"))
	for _, tt := range []struct {
		name, unwrapped string
		ok              bool
	}{
		{"what was wrapped", bound, true},
		{"bound to another ID", string(otherDigest[:]) + bound[32:], false},
		{"the key alone", bound[32:], false},
		{"a byte less", bound[:63], false},
		{"a byte more", bound + "k", false},
		{"nothing", "", false},
	} {
		given := []byte(tt.unwrapped)
		kek := kms.New("x", backend{unwrap: func(context.Context, kms.Wrapped, []byte) ([]byte, error) { return given, nil }}, kms.Options{})
		k, err := kek.Unwrap(t.Context(), id, wrapped([]byte("c")))
		switch {
		case tt.ok && (err != nil || !k.Equal(key)):
			t.Errorf("%s: another key, or %v", tt.name, err)
		case !tt.ok && !errors.Is(err, errdefs.ErrCorrupt):
			t.Errorf("%s: %v, want ErrCorrupt", tt.name, err)
		}
		k.Wipe()
		if strings.Trim(string(given), "\x00") != "" {
			t.Errorf("%s: the backend's answer was not wiped", tt.name)
		}
	}
}

func TestErrorClasses(t *testing.T) {
	for _, tt := range []struct {
		name       string
		from, want error
		text       string
	}{
		{"invalid", errdefs.ErrInvalid, errdefs.ErrInvalid, ""},
		{"denied", errdefs.Errorf(errdefs.ErrDenied, "disabled"), errdefs.ErrDenied, "disabled"},
		{"state", errdefs.ErrState, errdefs.ErrState, ""},
		{"corrupt", errdefs.ErrCorrupt, errdefs.ErrCorrupt, ""},
		{"unavailable", errdefs.ErrUnavailable, errdefs.ErrUnavailable, ""},
		{"a key that is gone is no missing DEK", errdefs.Errorf(errdefs.ErrNotFound, "no key"), errdefs.ErrDenied, "no key"},
		{"exists", errdefs.ErrExists, errdefs.ErrUnavailable, ""},
		{"conflict", errdefs.ErrConflict, errdefs.ErrUnavailable, ""},
		{"no class", io.ErrUnexpectedEOF, errdefs.ErrUnavailable, "unexpected EOF"},
		{"an SDK's status", status.Error(codes.NotFound, "gone"), errdefs.ErrUnavailable, "gone"},
		{"an SDK's own context", context.Canceled, errdefs.ErrUnavailable, ""},
	} {
		fake := kmstest.NewBackend()
		fake.SetFault(func(string) error { return tt.from })
		_, err := kms.New("x", fake, kms.Options{Name: "x://name"}).CurrentKeyID(t.Context())
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), "x://name") {
			t.Errorf("%s: %v, want class %v", tt.name, err, tt.want)
		}
		for _, never := range []error{errdefs.ErrNotFound, errdefs.ErrExists, errdefs.ErrConflict, context.Canceled} {
			if errors.Is(err, never) {
				t.Errorf("%s: came through as %v", tt.name, never)
			}
		}
		if got, want := status.Code(errgrpc.ToGRPC(err)), status.Code(errgrpc.ToGRPC(tt.want)); got != want {
			t.Errorf("%s: code %v on the wire, want %v", tt.name, got, want)
		}
	}
}

func TestNonsenseFromTheService(t *testing.T) {
	key := secret.New(kms.KeySize)
	defer key.Wipe()
	for _, w := range []kms.Wrapped{
		{},
		{Ciphertext: []byte("c"), KeyID: "k"},
		{Ciphertext: []byte("c"), Mechanism: "m"},
		{KeyID: "k", Mechanism: "m"},
		{Ciphertext: make([]byte, kms.MaxCiphertext+1), KeyID: "k", Mechanism: "m"},
		{Ciphertext: []byte("c"), KeyID: strings.Repeat("k", kms.MaxName+1), Mechanism: "m"},
		{Ciphertext: []byte("c"), KeyID: "k", Mechanism: strings.Repeat("m", kms.MaxName+1)},
	} {
		kek := kms.New("x", backend{wrap: func(context.Context, []byte, []byte) (kms.Wrapped, error) { return w, nil }}, kms.Options{})
		if _, err := kek.Wrap(t.Context(), id, key); !errors.Is(err, errdefs.ErrState) {
			t.Errorf("Wrap with an answer of %d, %d, %d bytes: %v, want ErrState", len(w.Ciphertext), len(w.KeyID), len(w.Mechanism), err)
		}
	}
	kek := kms.New("x", backend{id: func(context.Context) (string, error) { return "", nil }}, kms.Options{})
	if _, err := kek.CurrentKeyID(t.Context()); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("CurrentKeyID with an empty answer: %v, want ErrState", err)
	}
}

// TestDeadline: a service that hangs costs Options.Timeout, and the caller's
// own cancellation is told apart from it.
func TestDeadline(t *testing.T) {
	hang := backend{id: func(ctx context.Context) (string, error) { <-ctx.Done(); return "", ctx.Err() }}
	synctest.Test(t, func(t *testing.T) {
		for _, timeout := range []time.Duration{0, time.Second} {
			want := timeout
			if want == 0 {
				want = kms.DefaultTimeout
			}
			var seen kms.Call
			kek := kms.New("x", hang, kms.Options{Timeout: timeout, Observe: func(c kms.Call) { seen = c }})
			start := time.Now()
			_, err := kek.CurrentKeyID(t.Context())
			if !errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a service that hangs: %v, want ErrUnavailable", err)
			}
			if took := time.Since(start); took != want {
				t.Errorf("took %v, want %v", took, want)
			}
			if seen.Scheme != "x" || seen.Op != "current-key-id" || seen.Duration != want || !errors.Is(seen.Err, err) {
				t.Errorf("observed %+v", seen)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := kms.New("x", hang, kms.Options{}).CurrentKeyID(ctx); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("the caller's deadline: %v, want context.DeadlineExceeded", err)
		}
	})
}

// TestCloseWaits: a backend is closed once, and never under a call.
func TestCloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release, closes := make(chan struct{}), 0
		kek := kms.New("x", backend{
			id:    func(context.Context) (string, error) { <-release; return "k", nil },
			close: func() error { closes++; return nil },
		}, kms.Options{})
		called, closed := make(chan error, 1), make(chan error, 1)
		go func() { _, err := kek.CurrentKeyID(t.Context()); called <- err }()
		synctest.Wait()
		go func() { closed <- kek.Close() }()
		synctest.Wait()
		if closes != 0 {
			t.Error("closed under a call")
		}
		if _, err := kek.CurrentKeyID(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("a call while closing: %v, want ErrUnavailable", err)
		}
		close(release)
		if err := <-called; err != nil {
			t.Errorf("the call under way: %v", err)
		}
		if err := errors.Join(<-closed, kek.Close()); err != nil || closes != 1 {
			t.Errorf("Close: %v, closed %d times", err, closes)
		}
	})
}
