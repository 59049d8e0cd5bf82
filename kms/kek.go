package kms

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// DefaultTimeout bounds one call to a service where Options do not.
const DefaultTimeout = 10 * time.Second

// Options of a KEK. The zero value is good.
type Options struct {
	// Name stands for the KEK in messages: its URI without parameters, or
	// its scheme where it was not opened by URI.
	Name string
	// Timeout bounds each call to the service; 0 is DefaultTimeout.
	Timeout time.Duration
	// Observe, if set, is told of every call when it has ended. It is
	// called concurrently and must be quick.
	Observe func(Call)
}

// Call is one call to a service.
type Call struct {
	Scheme   string
	Op       string // one of the Op constants
	Duration time.Duration
	Err      error // as the caller gets it
}

// KEK is a key-encryption key. Its methods may be called concurrently, Close
// included. Every call ends within Options.Timeout (ErrUnavailable) or with
// ctx (its error). Errors are of errdefs' classes, and never ErrNotFound,
// ErrExists or ErrConflict: those speak of DEKs, and a KMS knows none.
type KEK struct {
	scheme  string
	name    string
	backend Backend
	timeout time.Duration
	observe func(Call)
	hide    *strings.Replacer // nil: nothing to hide

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup
}

// New returns a KEK over b and takes b over: Close closes it. scheme is what
// records store, so that a later process knows which kind of KEK they need.
func New(scheme string, b Backend, o Options) *KEK {
	k := &KEK{scheme: scheme, name: o.Name, backend: b, timeout: o.Timeout, observe: o.Observe}
	if k.name == "" {
		k.name = scheme
	}
	if k.timeout <= 0 {
		k.timeout = DefaultTimeout
	}
	if k.observe == nil {
		k.observe = func(Call) {}
	}
	return k
}

// Scheme returns the URI scheme, which is the backend's name.
func (k *KEK) Scheme() string { return k.scheme }

// Name returns the name that stands for the KEK in messages.
func (k *KEK) Name() string { return k.name }

// CurrentKeyID returns the key ID that Wrap would use now.
func (k *KEK) CurrentKeyID(ctx context.Context) (string, error) {
	var id string
	err := k.call(ctx, OpCurrentKeyID, func(ctx context.Context) (err error) {
		id, err = k.backend.CurrentKeyID(ctx)
		if err == nil && (id == "" || len(id) > MaxName) {
			err = errdefs.Errorf(errdefs.ErrState, "the service answered a key ID of %d bytes, must be 1 to %d", len(id), MaxName)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return id, nil
}

// Wrap wraps key, of KeySize bytes, for the DEK of that ID (1 to MaxID bytes).
func (k *KEK) Wrap(ctx context.Context, id string, key secret.Bytes) (Wrapped, error) {
	if err := k.check(id); err != nil {
		return Wrapped{}, err
	}
	if key.Len() != KeySize {
		return Wrapped{}, errdefs.Errorf(errdefs.ErrInvalid, "KEK %s: a key to wrap has %d bytes, must be %d", k.name, key.Len(), KeySize)
	}
	bound := secret.New(sha256.Size + KeySize)
	defer bound.Wipe()
	digest := sha256.Sum256([]byte(id))
	secret.Do(func() {
		copy(bound.Expose(), digest[:])
		copy(bound.Expose()[sha256.Size:], key.Expose())
	})

	var w Wrapped
	err := k.call(ctx, OpWrap, func(ctx context.Context) (err error) {
		w, err = k.backend.Wrap(ctx, bound.Expose(), []byte(id))
		if err == nil {
			err = w.check(errdefs.ErrState)
		}
		return err
	})
	if err != nil {
		return Wrapped{}, err
	}
	return w, nil
}

// Unwrap returns the key that w holds for the DEK of that ID; the caller wipes
// it. ErrCorrupt where w is damaged or belongs to another ID.
func (k *KEK) Unwrap(ctx context.Context, id string, w Wrapped) (secret.Bytes, error) {
	if err := k.check(id); err != nil {
		return secret.Bytes{}, err
	}
	var key secret.Bytes
	err := k.call(ctx, OpUnwrap, func(ctx context.Context) error {
		if err := w.check(errdefs.ErrCorrupt); err != nil {
			return err
		}
		bound, err := k.backend.Unwrap(ctx, w, []byte(id))
		defer clear(bound)
		if err != nil {
			return err
		}
		key, err = unbind(id, bound)
		return err
	})
	return key, err
}

// unbind returns a copy of the key in bound if it is bound to that ID.
func unbind(id string, bound []byte) (secret.Bytes, error) {
	if len(bound) != sha256.Size+KeySize {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrCorrupt, "what was wrapped has %d bytes, must be %d: it is no DEK of ours",
			len(bound), sha256.Size+KeySize)
	}
	digest := sha256.Sum256([]byte(id))
	if subtle.ConstantTimeCompare(bound[:sha256.Size], digest[:]) != 1 {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key belongs to another ID: was a record moved or copied?")
	}
	return secret.Take(bound[sha256.Size:]), nil
}

// CanDerive says whether Derive works.
func (k *KEK) CanDerive() bool {
	_, ok := k.backend.(Deriver)
	return ok
}

// Derive computes the key of an ID; the caller wipes it. ErrInvalid where
// the backend cannot derive.
func (k *KEK) Derive(ctx context.Context, id string) (secret.Bytes, error) {
	if err := k.check(id); err != nil {
		return secret.Bytes{}, err
	}
	d, ok := k.backend.(Deriver)
	if !ok {
		return secret.Bytes{}, errdefs.Errorf(errdefs.ErrInvalid, "KEK %s: scheme %s cannot derive keys: configure a store for wrapped ones", k.name, k.scheme)
	}
	var key secret.Bytes
	err := k.call(ctx, OpDerive, func(ctx context.Context) (err error) {
		key, err = d.Derive(ctx, id)
		if err == nil && key.Len() != KeySize {
			n := key.Len()
			key.Wipe()
			err = errdefs.Errorf(errdefs.ErrState, "the backend derived %d bytes, must be %d", n, KeySize)
		}
		return err
	})
	if err != nil {
		return secret.Bytes{}, err
	}
	return key, nil
}

// Close waits for the calls under way, then closes the backend. Every later
// call fails; a second Close does nothing.
func (k *KEK) Close() error {
	k.mu.Lock()
	was := k.closed
	k.closed = true
	k.mu.Unlock()
	if was {
		return nil
	}
	k.calls.Wait()
	return k.fail(context.Background(), "closing", k.backend.Close())
}

func (k *KEK) check(id string) error {
	if id == "" || len(id) > MaxID {
		return errdefs.Errorf(errdefs.ErrInvalid, "KEK %s: DEK ID of %d bytes, must be 1 to %d", k.name, len(id), MaxID)
	}
	return nil
}

// check bounds w. class is what a violation means: a service that answers
// nonsense when wrapping, a damaged record when unwrapping.
func (w Wrapped) check(class error) error {
	switch {
	case len(w.Ciphertext) == 0 || len(w.Ciphertext) > MaxCiphertext:
		return errdefs.Errorf(class, "wrapped key of %d bytes, must be 1 to %d", len(w.Ciphertext), MaxCiphertext)
	case w.KeyID == "" || len(w.KeyID) > MaxName:
		return errdefs.Errorf(class, "wrapped key with a key ID of %d bytes, must be 1 to %d", len(w.KeyID), MaxName)
	case w.Mechanism == "" || len(w.Mechanism) > MaxName:
		return errdefs.Errorf(class, "wrapped key with a mechanism of %d bytes, must be 1 to %d", len(w.Mechanism), MaxName)
	}
	return nil
}

// call runs f with a deadline, unless the KEK is closed.
func (k *KEK) call(ctx context.Context, op string, f func(context.Context) error) error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return errdefs.Errorf(errdefs.ErrUnavailable, "KEK %s: %s: the KEK is closed: this process is shutting down", k.name, op)
	}
	k.calls.Add(1)
	k.mu.Unlock()
	defer k.calls.Done()

	start := time.Now()
	limited, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	err := ctx.Err()
	if err == nil {
		err = f(limited)
	}
	err = k.fail(ctx, op, err)
	k.observe(Call{Scheme: k.scheme, Op: op, Duration: time.Since(start), Err: err})
	return err
}

// fail translates a backend's error. Of the backend's own error only the text
// survives, without the URI: a class or a gRPC status further down its chain
// would mean something else to our caller.
func (k *KEK) fail(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	class := classOf(err)
	unavailable := errors.Is(class, errdefs.ErrUnavailable)
	if ended := over(ctx); unavailable && ended != nil {
		return fmt.Errorf("KEK %s: %s: %w", k.name, op, ended)
	}
	text := k.redact(err)
	if unavailable && errors.Is(err, context.DeadlineExceeded) && k.timeout > 0 {
		text = fmt.Sprintf("no answer within %v (%s)", k.timeout, text)
	}
	return errdefs.Errorf(class, "KEK %s: %s: %s%s", k.name, op, text, k.needs(op, err))
}

// over is ctx.Err, also in the moment in which the deadline has come and ctx does
// not say so yet: a server that was told of it may be quicker.
func over(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// redact is err's text without what its URI must not show.
func (k *KEK) redact(err error) string {
	if k.hide == nil {
		return err.Error()
	}
	return k.hide.Replace(err.Error())
}

// needs names the permission that a refused call was for.
func (k *KEK) needs(op string, err error) string {
	if name := k.Permissions()[op]; name != "" && errors.Is(err, errdefs.ErrDenied) {
		return " (needs " + name + ")"
	}
	return ""
}

// Permissions returns what the service calls the permission behind each
// operation; empty where it has no names for them.
func (k *KEK) Permissions() map[string]string {
	if p, ok := k.backend.(Permitter); ok {
		return p.Permissions()
	}
	return nil
}

// classOf returns what a backend's error means to a KEK's caller. A KEK that
// the service cannot find is a refusal: ErrNotFound is kept for DEKs.
func classOf(err error) error {
	for _, class := range []error{errdefs.ErrInvalid, errdefs.ErrDenied, errdefs.ErrState, errdefs.ErrCorrupt} {
		if errors.Is(err, class) {
			return class
		}
	}
	if errors.Is(err, errdefs.ErrNotFound) {
		return errdefs.ErrDenied
	}
	return errdefs.ErrUnavailable
}
