// Package kmstest tells whether a kms.Backend is right: a conformance suite
// that every backend passes, and a KMS in memory, which passes it too and
// serves the tests of others.
package kmstest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// Harness tells the suite how to reach a backend. The suite closes what it opens.
type Harness struct {
	// Open opens the same KEK every time.
	Open func(t *testing.T) *kms.KEK
	// OpenOther opens a KEK of the same scheme with another key.
	OpenOther func(t *testing.T) *kms.KEK
	// Rotate makes a new version of Open's key and returns a KEK that wraps
	// under it and still unwraps the older ones. It runs last. nil where the
	// service cannot rotate.
	Rotate func(t *testing.T) *kms.KEK
	// Disable disables Open's key, or takes the permission to use it away
	// (Deny), and returns how to undo that. nil where the service cannot.
	Disable, Deny func(t *testing.T) (undo func())
	// Unreachable opens a KEK whose service nobody serves, and Slow one whose
	// service accepts connections and never answers. nil without a network.
	Unreachable, Slow func(t *testing.T) *kms.KEK
	// PublicKey says that the service wraps with a public key.
	PublicKey bool
	// Deterministic says that a wrap of one key for one ID never changes (AES-KW).
	Deterministic bool
	// Stride looks at each so-many-th bit and length of a ciphertext only,
	// for services that answer slowly; 0 is 1.
	Stride int
	// Secrets are the bytes (credentials, master secrets) that no error may show.
	Secrets [][]byte
}

const (
	id    = "driver.example.com/vol-0123456789abcdef0"
	other = "driver.example.com/vol-0123456789abcdef1"
)

// Run runs the suite. It proves what kms.KEK promises to its callers, which
// includes everything that kms.Backend asks of its implementers.
func Run(t *testing.T, h Harness) {
	s := &suite{Harness: h}
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"RoundTrip", s.roundTrip},
		{"FreshCiphertexts", s.freshCiphertexts},
		{"BitFlips", s.bitFlips},
		{"Truncations", s.truncations},
		{"OtherID", s.otherID},
		{"OtherKey", s.otherKey},
		{"BadArguments", s.badArguments},
		{"Cancelled", s.cancelled},
		{"Concurrent", s.concurrent},
		{"Disabled", s.disabled},
		{"Denied", s.denied},
		{"Unreachable", s.unreachable},
		{"Derive", s.derive},
		{"Closed", s.closed},
		{"Rotation", s.rotation},
		{"NoSecretInErrors", s.noSecretInErrors}, // looks at the errors of all others
	} {
		t.Run(test.name, test.run)
	}
}

type suite struct {
	Harness
	mu   sync.Mutex
	errs []error  // all that were seen
	keys [][]byte // all that must not be in them
}

func (s *suite) open(t *testing.T) *kms.KEK {
	t.Helper()
	kek := s.Open(t)
	t.Cleanup(func() {
		if err := kek.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return kek
}

// key returns a random DEK, wiped when the test ends.
func (s *suite) key(t *testing.T) secret.Bytes {
	t.Helper()
	k := secret.New(kms.KeySize)
	_, _ = rand.Read(k.Expose())
	t.Cleanup(k.Wipe)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, bytes.Clone(k.Expose()))
	return k
}

func (s *suite) saw(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.errs = append(s.errs, err)
	}
}

func (s *suite) wrap(t *testing.T, kek *kms.KEK, id string, key secret.Bytes) kms.Wrapped {
	t.Helper()
	w, err := kek.Wrap(t.Context(), id, key)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	return w
}

// mustUnwrap checks that w gives key.
func (s *suite) mustUnwrap(t *testing.T, kek *kms.KEK, id string, w kms.Wrapped, key secret.Bytes) {
	t.Helper()
	got, err := kek.Unwrap(t.Context(), id, w)
	if err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	defer got.Wipe()
	if !got.Equal(key) {
		t.Fatal("Unwrap gave another key than was wrapped")
	}
}

// mustFail checks that w is refused with one of the classes.
func (s *suite) mustFail(t *testing.T, what string, kek *kms.KEK, id string, w kms.Wrapped, classes ...error) {
	t.Helper()
	got, err := kek.Unwrap(t.Context(), id, w)
	defer got.Wipe()
	s.saw(err)
	for _, class := range classes {
		if errors.Is(err, class) {
			return
		}
	}
	t.Errorf("Unwrap of %s: %v, want one of %v", what, err, classes)
}

func (s *suite) roundTrip(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	before := key.Clone()
	defer before.Wipe()
	w := s.wrap(t, kek, id, key)
	if !key.Equal(before) {
		t.Error("Wrap changed the key")
	}
	s.mustUnwrap(t, kek, id, w, key)
	s.mustUnwrap(t, s.open(t), id, w, key) // as after a restart
	current, err := kek.CurrentKeyID(t.Context())
	if err != nil || current != w.KeyID {
		t.Errorf("CurrentKeyID = %q, %v; Wrap said %q", current, err, w.KeyID)
	}
	if bytes.Contains(w.Ciphertext, key.Expose()) {
		t.Error("the ciphertext holds the key in the clear")
	}
	longest := strings.Repeat("i", kms.MaxID)
	s.mustUnwrap(t, kek, longest, s.wrap(t, kek, longest, key), key)
}

func (s *suite) freshCiphertexts(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	a, b := s.wrap(t, kek, id, key), s.wrap(t, kek, id, key)
	if bytes.Equal(a.Ciphertext, b.Ciphertext) != s.Deterministic {
		t.Errorf("two wraps gave the same ciphertext: %v", !s.Deterministic)
	}
	if a.PublicKey() != s.PublicKey {
		t.Errorf("mechanism %q says public key: %v, which is wrong", a.Mechanism, a.PublicKey())
	}
	s.mustUnwrap(t, kek, id, a, key)
	s.mustUnwrap(t, kek, id, b, key)
}

func (s *suite) bitFlips(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	for bit := 0; bit < 8*len(w.Ciphertext); bit += max(s.Stride, 1) {
		flipped := w
		flipped.Ciphertext = bytes.Clone(w.Ciphertext)
		flipped.Ciphertext[bit/8] ^= 1 << (bit % 8)
		s.mustFail(t, fmt.Sprintf("a ciphertext with bit %d flipped", bit), kek, id, flipped, errdefs.ErrCorrupt)
	}
	s.mustUnwrap(t, kek, id, w, key)
}

func (s *suite) truncations(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	for n := 0; n < len(w.Ciphertext); n += max(s.Stride, 1) {
		cut := w
		cut.Ciphertext = w.Ciphertext[:n:n]
		s.mustFail(t, fmt.Sprintf("the first %d bytes of %d", n, len(w.Ciphertext)), kek, id, cut, errdefs.ErrCorrupt)
	}
	for _, tail := range []int{1, 16, kms.MaxCiphertext} {
		long := w
		long.Ciphertext = append(bytes.Clone(w.Ciphertext), make([]byte, tail)...)
		s.mustFail(t, fmt.Sprintf("a ciphertext with %d bytes more", tail), kek, id, long, errdefs.ErrCorrupt)
	}
}

func (s *suite) otherID(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	for _, wrong := range []string{other, id[:len(id)-1], id + "0", strings.ToUpper(id)} {
		s.mustFail(t, "a key of another ID", kek, wrong, w, errdefs.ErrCorrupt)
	}
}

func (s *suite) otherKey(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	stranger := s.OpenOther(t)
	defer stranger.Close()
	w := s.wrap(t, kek, id, key)
	s.mustFail(t, "another KEK's key", stranger, id, w, errdefs.ErrCorrupt, errdefs.ErrDenied)

	// And where the record pretends that it was this KEK's.
	current, err := stranger.CurrentKeyID(t.Context())
	if err != nil {
		t.Fatalf("CurrentKeyID: %v", err)
	}
	if current == w.KeyID {
		t.Fatalf("two keys have the key ID %q", current)
	}
	w.KeyID = current
	s.mustFail(t, "another KEK's key under a forged key ID", stranger, id, w, errdefs.ErrCorrupt, errdefs.ErrDenied)
}

func (s *suite) badArguments(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	for _, bad := range []string{"", strings.Repeat("i", kms.MaxID+1)} {
		_, err := kek.Wrap(t.Context(), bad, key)
		s.saw(err)
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("Wrap for an ID of %d bytes: %v, want ErrInvalid", len(bad), err)
		}
		s.mustFail(t, "an impossible ID", kek, bad, w, errdefs.ErrInvalid)
	}
	for _, n := range []int{0, kms.KeySize - 1, kms.KeySize + 1} {
		short := secret.New(n)
		_, err := kek.Wrap(t.Context(), id, short)
		short.Wipe()
		s.saw(err)
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("Wrap of %d bytes: %v, want ErrInvalid", n, err)
		}
	}
	s.mustFail(t, "nothing", kek, id, kms.Wrapped{}, errdefs.ErrCorrupt)
}

func (s *suite) cancelled(t *testing.T) {
	kek, key := s.open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, wrapErr := kek.Wrap(ctx, id, key)
	_, unwrapErr := kek.Unwrap(ctx, id, w)
	_, idErr := kek.CurrentKeyID(ctx)
	for op, err := range map[string]error{"Wrap": wrapErr, "Unwrap": unwrapErr, "CurrentKeyID": idErr} {
		s.saw(err)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a cancelled context: %v, want context.Canceled", op, err)
		}
	}
	s.mustUnwrap(t, kek, id, w, key) // no harm done
}

func (s *suite) concurrent(t *testing.T) {
	kek := s.open(t)
	var wg sync.WaitGroup
	for n := range 16 {
		key, name := s.key(t), fmt.Sprintf("%s-%d", id, n)
		wg.Go(func() {
			for range 4 {
				w, err := kek.Wrap(t.Context(), name, key)
				if err != nil {
					t.Errorf("Wrap: %v", err)
					return
				}
				got, err := kek.Unwrap(t.Context(), name, w)
				if err != nil || !got.Equal(key) {
					t.Errorf("Unwrap: another key, or %v", err)
				}
				got.Wipe()
			}
		})
	}
	wg.Wait()
}

func (s *suite) derive(t *testing.T) {
	kek := s.open(t)
	if !kek.CanDerive() {
		_, err := kek.Derive(t.Context(), id)
		s.saw(err)
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("Derive where there is none: %v, want ErrInvalid", err)
		}
		return
	}
	derive := func(kek *kms.KEK, id string) secret.Bytes {
		k, err := kek.Derive(t.Context(), id)
		if err != nil {
			t.Fatalf("Derive(%q): %v", id, err)
		}
		t.Cleanup(k.Wipe)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.keys = append(s.keys, bytes.Clone(k.Expose()))
		return k
	}
	stranger := s.OpenOther(t)
	defer stranger.Close()
	first := derive(kek, id)
	if first.Len() != kms.KeySize {
		t.Errorf("Derive gave %d bytes", first.Len())
	}
	if !first.Equal(derive(kek, id)) || !first.Equal(derive(s.open(t), id)) {
		t.Error("Derive gave two keys for one ID")
	}
	if first.Equal(derive(kek, other)) {
		t.Error("Derive gave one key for two IDs")
	}
	if first.Equal(derive(stranger, id)) {
		t.Error("two KEKs derive the same key")
	}
}

func (s *suite) closed(t *testing.T) {
	kek, key := s.Open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	for range 2 {
		if err := kek.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	_, wrapErr := kek.Wrap(t.Context(), id, key)
	_, unwrapErr := kek.Unwrap(t.Context(), id, w)
	_, idErr := kek.CurrentKeyID(t.Context())
	_, deriveErr := kek.Derive(t.Context(), id)
	for op, err := range map[string]error{"Wrap": wrapErr, "Unwrap": unwrapErr, "CurrentKeyID": idErr, "Derive": deriveErr} {
		s.saw(err)
		if err == nil {
			t.Errorf("%s works after Close", op)
		}
	}
}

// disabled: a key that the service has switched off is a refusal, and no harm.
func (s *suite) disabled(t *testing.T) { s.switchedOff(t, s.Disable) }

// denied: so is a permission that was taken away, and it is named.
func (s *suite) denied(t *testing.T) { s.switchedOff(t, s.Deny) }

func (s *suite) switchedOff(t *testing.T, off func(*testing.T) func()) {
	if off == nil {
		return // a property of the service, said by its harness
	}
	kek, key := s.open(t), s.key(t)
	w := s.wrap(t, kek, id, key)
	undo := off(t)
	_, err := kek.Wrap(t.Context(), id, key)
	s.saw(err)
	if !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("Wrap: %v, want ErrDenied", err)
	}
	if name := kek.Permissions()[kms.OpWrap]; err != nil && !strings.Contains(err.Error(), name) {
		t.Errorf("Wrap: %v does not name %s", err, name)
	}
	s.mustFail(t, "a key that was wrapped before", kek, id, w, errdefs.ErrDenied)
	undo()
	s.mustUnwrap(t, kek, id, w, key)
}

// unreachable: a service that is gone or hangs is ErrUnavailable in time.
func (s *suite) unreachable(t *testing.T) {
	for what, open := range map[string]func(*testing.T) *kms.KEK{"nobody there": s.Unreachable, "no answer": s.Slow} {
		if open == nil {
			continue
		}
		kek, key := open(t), s.key(t)
		for op, call := range map[string]func() error{
			"Wrap":         func() error { _, err := kek.Wrap(t.Context(), id, key); return err },
			"CurrentKeyID": func() error { _, err := kek.CurrentKeyID(t.Context()); return err },
		} {
			start := time.Now()
			err := call()
			s.saw(err)
			if !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("%s, %s: %v, want ErrUnavailable", what, op, err)
			}
			if took := time.Since(start); took > kms.DefaultTimeout+5*time.Second {
				t.Errorf("%s, %s: took %v", what, op, took)
			}
		}
		if err := kek.Close(); err != nil {
			t.Errorf("%s: Close: %v", what, err)
		}
	}
}

func (s *suite) rotation(t *testing.T) {
	if s.Rotate == nil {
		return // a property of the service, said by its harness
	}
	kek, key := s.open(t), s.key(t)
	old := s.wrap(t, kek, id, key)
	rotated := s.Rotate(t)
	defer rotated.Close()
	s.mustUnwrap(t, rotated, id, old, key)
	renewed := s.wrap(t, rotated, id, key)
	if renewed.KeyID == old.KeyID {
		t.Errorf("rotation kept the key ID %q", old.KeyID)
	}
	if current, err := rotated.CurrentKeyID(t.Context()); err != nil || current != renewed.KeyID {
		t.Errorf("CurrentKeyID after rotation = %q, %v; Wrap said %q", current, err, renewed.KeyID)
	}
	s.mustUnwrap(t, rotated, id, renewed, key)
	s.mustFail(t, "an older key of another ID", rotated, other, old, errdefs.ErrCorrupt)
}

// noSecretInErrors looks for every secret in every error of the run, as it is
// and as the usual verbs and encodings would show it.
func (s *suite) noSecretInErrors(t *testing.T) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.errs) == 0 {
		t.Fatal("no error was seen: the other tests did not run")
	}
	var all strings.Builder
	for _, err := range s.errs {
		fmt.Fprintf(&all, "%v\n%+v\n%#v\n", err, err, err)
	}
	text := all.String()
	for i, key := range append(s.keys, s.Secrets...) {
		decimal := strings.Trim(fmt.Sprint(key), "[]")
		for _, form := range []string{
			string(key), hex.EncodeToString(key), strings.ToUpper(hex.EncodeToString(key)), decimal,
			base64.RawStdEncoding.EncodeToString(key), base64.RawURLEncoding.EncodeToString(key),
		} {
			if strings.Contains(text, form) {
				t.Errorf("an error shows secret number %d", i)
			}
		}
	}
}
