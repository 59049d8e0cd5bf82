//go:build cgo

package pkcs11

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"math/big"
	"slices"
	"sync"
	"time"

	p11 "github.com/miekg/pkcs11"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	ivSize, tagSize = 12, 16
	// maxVersions bounds what a token may list.
	maxVersions = 1 << 10
	keySize     = 32
)

// Backend is a kms.Backend and a kms.Manager.
type Backend struct {
	target
	m *module

	mu     sync.Mutex
	idle   []session // for reading, logged in
	closed bool
	next   time.Time // when the module may be initialised anew for us
	pause  time.Duration
}

// Wrap encrypts under the newest version.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	if err := b.m.enter(ctx); err != nil {
		return kms.Wrapped{}, err
	}
	// The call may go on after we have returned and our caller has wiped its bytes.
	own := secret.Take(bytes.Clone(plaintext))
	aad = bytes.Clone(aad)
	return run(ctx, b.m, func() (w kms.Wrapped, err error) {
		defer own.Wipe()
		err = b.with(0, func(s session) error {
			w, err = b.wrap(s, own.Expose(), aad)
			return err
		})
		return w, err
	})
}

func (b *Backend) wrap(s session, plaintext, aad []byte) (kms.Wrapped, error) {
	k, err := b.current(s)
	if err != nil {
		return kms.Wrapped{}, err
	}
	if err := b.checkKey(s, k); err != nil {
		return kms.Wrapped{}, err
	}
	w := kms.Wrapped{KeyID: b.keyID(k.id), Mechanism: b.mechanism}
	if b.mechanism == MechanismKWP {
		w.Ciphertext, err = s.wrapKWP(k, plaintext)
	} else {
		w.Ciphertext, err = s.seal(k, plaintext, aad)
	}
	return w, err
}

// Unwrap decrypts with the version that w names.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	id, err := b.versionOf(w.KeyID)
	if err != nil {
		return nil, err
	}
	if w.Mechanism != MechanismGCM && w.Mechanism != MechanismKWP {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.100q is neither %s nor %s", w.Mechanism, MechanismGCM, MechanismKWP)
	}
	ciphertext, aad := bytes.Clone(w.Ciphertext), bytes.Clone(aad)
	if err := b.m.enter(ctx); err != nil {
		return nil, err
	}
	return run(ctx, b.m, func() (plaintext []byte, err error) {
		err = b.with(0, func(s session) error {
			plaintext, err = b.unwrap(s, id, w.Mechanism, ciphertext, aad)
			return err
		})
		return plaintext, err
	})
}

// unwrap tries every key with that ID. There is one, unless somebody made
// another one later.
func (b *Backend) unwrap(s session, id []byte, mechanism string, ciphertext, aad []byte) (plaintext []byte, err error) {
	keys, err := b.versions(s)
	if err != nil {
		return nil, err
	}
	if len(keys) == 0 {
		return nil, b.errNoKey()
	}
	err = errdefs.Errorf(errdefs.ErrDenied, "%s has no version %x: was it destroyed, or is this another token of the same name?", b, id)
	for _, k := range keys {
		if !bytes.Equal(k.id, id) {
			continue
		}
		if mechanism == MechanismKWP {
			plaintext, err = s.unwrapKWP(k, ciphertext)
		} else {
			plaintext, err = s.open(k, ciphertext, aad)
		}
		if err == nil {
			return plaintext, nil
		}
	}
	return nil, err
}

// CurrentKeyID looks up the newest version.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	return call(ctx, b, 0, func(s session) (string, error) {
		k, err := b.current(s)
		return b.keyID(k.id), err
	})
}

// Close closes the sessions, as far as the module lets it within a second.
func (b *Backend) Close() error {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if b.m.enter(ctx) != nil {
		return nil // a module that hangs: its sessions end with the process
	}
	_, _ = run(ctx, b.m, func() (struct{}, error) {
		b.m.use.RLock()
		defer b.m.use.RUnlock()
		b.forget()
		return struct{}{}, nil
	})
	return nil
}

// call runs f with a session.
func call[T any](ctx context.Context, b *Backend, flags uint, f func(session) (T, error)) (T, error) {
	if err := b.m.enter(ctx); err != nil {
		var none T
		return none, err
	}
	return run(ctx, b.m, func() (value T, err error) {
		err = b.with(flags, func(s session) error {
			value, err = f(s)
			return err
		})
		return value, err
	})
}

// with calls f with a session: first with an idle one, where that is stale with
// a new one, and where the token cannot be had once more after the module was
// initialised anew. f may be called again only because a session was broken.
func (b *Backend) with(flags uint, f func(session) error) error {
	if err := b.m.start(); err != nil {
		return b.explain(err)
	}
	for attempt := 1; ; attempt++ {
		generation, err := b.attempt(flags, f)
		b.mu.Lock()
		if !broken(err) {
			b.next, b.pause = time.Time{}, 0
		}
		b.mu.Unlock()
		if err == nil || attempt == 3 || !broken(err) {
			return b.explain(err)
		}
		if attempt == 2 && !(lost(err) && b.mayRestart() && b.m.restart(generation)) {
			return b.explain(err)
		}
	}
}

// mayRestart keeps a KEK whose token is away from disturbing the others of its
// module all the time.
func (b *Backend) mayRestart() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if now.Before(b.next) {
		return false
	}
	b.pause = min(max(2*b.pause, minPause), maxPause)
	b.next = now.Add(b.pause)
	return true
}

func (b *Backend) attempt(flags uint, f func(session) error) (generation int, err error) {
	b.m.use.RLock()
	defer b.m.use.RUnlock()
	s, err := b.take(flags)
	if err != nil {
		b.forget()
		return b.m.generation, err
	}
	err = f(s)
	switch {
	case broken(err):
		_ = s.CloseSession(s.handle)
		b.forget()
	case flags != 0 || errors.As(err, new(p11.Error)) || !b.give(s):
		_ = s.CloseSession(s.handle) // in whatever state the error left it
	}
	return b.m.generation, err
}

// take returns an idle session or a new one.
func (b *Backend) take(flags uint) (session, error) {
	if flags == 0 {
		b.mu.Lock()
		for len(b.idle) > 0 {
			s := b.idle[len(b.idle)-1]
			b.idle = b.idle[:len(b.idle)-1]
			if s.generation == b.m.generation {
				b.mu.Unlock()
				return s, nil
			}
		}
		b.mu.Unlock()
	}
	return b.m.connect(&b.target, flags)
}

// give keeps a session for the next call, unless the backend is closed.
func (b *Backend) give(s session) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.idle = append(b.idle, s) // no more than there are calls
	}
	return !b.closed
}

// forget closes the idle sessions.
func (b *Backend) forget() {
	b.mu.Lock()
	idle := b.idle
	b.idle = nil
	b.mu.Unlock()
	for _, s := range idle {
		if s.generation == b.m.generation { // else the handle may be another's by now
			_ = s.CloseSession(s.handle)
		}
	}
}

// version is one version of the key.
type version struct {
	handle p11.ObjectHandle
	id     []byte
}

func (v version) number() *big.Int { return new(big.Int).SetBytes(v.id) }

// versions returns the AES keys with our label (and our ID, where the URI has
// one), the oldest first.
func (b *Backend) versions(s session) ([]version, error) {
	template := []*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, p11.CKO_SECRET_KEY),
		p11.NewAttribute(p11.CKA_KEY_TYPE, p11.CKK_AES),
		p11.NewAttribute(p11.CKA_LABEL, b.object),
	}
	if b.id != nil {
		template = append(template, p11.NewAttribute(p11.CKA_ID, b.id))
	}
	handles, err := s.search(template)
	if err != nil {
		return nil, err
	}
	var found []version
	for _, h := range handles {
		a, err := s.GetAttributeValue(s.handle, h, []*p11.Attribute{p11.NewAttribute(p11.CKA_ID, nil)})
		if errors.Is(err, p11.Error(p11.CKR_OBJECT_HANDLE_INVALID)) {
			continue // destroyed meanwhile
		}
		if err != nil {
			return nil, err
		}
		found = append(found, version{h, a[0].Value})
	}
	slices.SortStableFunc(found, func(x, y version) int { return x.number().Cmp(y.number()) })
	return found, nil
}

func (s session) search(template []*p11.Attribute) ([]p11.ObjectHandle, error) {
	if err := s.FindObjectsInit(s.handle, template); err != nil {
		return nil, err
	}
	var all []p11.ObjectHandle
	for {
		some, _, err := s.FindObjects(s.handle, 64)
		all = append(all, some...)
		if err == nil && len(some) > 0 && len(all) <= maxVersions {
			continue
		}
		if final := s.FindObjectsFinal(s.handle); err == nil {
			err = final
		}
		if err == nil && len(all) > maxVersions {
			err = errdefs.Errorf(errdefs.ErrState, "the token has more than %d keys of one label", maxVersions)
		}
		return all, err
	}
}

// current returns the newest version.
func (b *Backend) current(s session) (version, error) {
	all, err := b.versions(s)
	if err != nil {
		return version{}, err
	}
	if len(all) == 0 {
		return version{}, b.errNoKey()
	}
	return b.last(all)
}

func (b *Backend) errNoKey() error {
	return errdefs.Errorf(errdefs.ErrDenied, "%s: %w: create it, or correct the URI", b, errNoKey)
}

func (b *Backend) last(all []version) (version, error) {
	newest := all[len(all)-1]
	if len(all) > 1 && all[len(all)-2].number().Cmp(newest.number()) == 0 {
		return version{}, errdefs.Errorf(errdefs.ErrState, "%s: two keys have the CKA_ID %x, so that nobody can say which of them wraps: give the right one a higher CKA_ID", b, newest.id)
	}
	return newest, nil
}

// attributes that a key must have to wrap.
func (b *Backend) usage() (encrypt, decrypt uint) {
	if b.mechanism == MechanismKWP {
		return p11.CKA_WRAP, p11.CKA_UNWRAP
	}
	return p11.CKA_ENCRYPT, p11.CKA_DECRYPT
}

// checkKey says whether a new DEK may be wrapped under k: by a key that stays
// in the token, and that will unwrap it too.
func (b *Backend) checkKey(s session, k version) error {
	encrypt, decrypt := b.usage()
	a, err := s.GetAttributeValue(s.handle, k.handle, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_SENSITIVE, nil), p11.NewAttribute(p11.CKA_EXTRACTABLE, nil),
		p11.NewAttribute(p11.CKA_VALUE_LEN, nil), p11.NewAttribute(encrypt, nil), p11.NewAttribute(decrypt, nil),
	})
	if err != nil {
		return err
	}
	switch {
	case !isTrue(a[0]) || isTrue(a[1]):
		return errdefs.Errorf(errdefs.ErrState, "%s, version %x can be read out of the token (it must be CKA_SENSITIVE and not CKA_EXTRACTABLE): rotate to one that cannot", b, k.id)
	case !bytes.Equal(a[2].Value, binary.NativeEndian.AppendUint64(nil, keySize)):
		return errdefs.Errorf(errdefs.ErrState, "%s, version %x is not an AES key of %d bytes: rotate to one that is", b, k.id, keySize)
	case !isTrue(a[4]):
		return errdefs.Errorf(errdefs.ErrDenied, "%s, version %x is disabled, or is not for %s (it may not unwrap)", b, k.id, b.mechanism)
	case !isTrue(a[3]):
		return errdefs.Errorf(errdefs.ErrDenied, "%s, version %x is not for %s (it may not wrap)", b, k.id, b.mechanism)
	}
	return nil
}

func isTrue(a *p11.Attribute) bool { return len(a.Value) == 1 && a.Value[0] != 0 }

// seal is AES-GCM with a random IV, or the one that the token chose.
func (s session) seal(k version, plaintext, aad []byte) ([]byte, error) {
	iv := make([]byte, ivSize)
	_, _ = rand.Read(iv) // never fails, see crypto/rand
	params := p11.NewGCMParams(iv, aad, 8*tagSize)
	defer params.Free()
	if err := s.EncryptInit(s.handle, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_GCM, params)}, k.handle); err != nil {
		return nil, err
	}
	out, err := s.Encrypt(s.handle, plaintext)
	if err != nil {
		return nil, err
	}
	iv = params.IV()
	if len(iv) != ivSize || len(out) != len(plaintext)+tagSize {
		return nil, errdefs.Errorf(errdefs.ErrState, "the token answered an IV of %d and a ciphertext of %d bytes, must be %d and %d: this is not AES-GCM as it should be",
			len(iv), len(out), ivSize, len(plaintext)+tagSize)
	}
	return append(iv, out...), nil
}

// open reverses seal.
func (s session) open(k version, ciphertext, aad []byte) ([]byte, error) {
	if len(ciphertext) <= ivSize+tagSize {
		return nil, errCorrupt()
	}
	params := p11.NewGCMParams(ciphertext[:ivSize], aad, 8*tagSize)
	defer params.Free()
	if err := s.DecryptInit(s.handle, []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_GCM, params)}, k.handle); err != nil {
		return nil, err
	}
	plaintext, err := s.Decrypt(s.handle, ciphertext[ivSize:])
	return plaintext, verdict(err, func() error {
		sample, err := s.seal(k, make([]byte, keySize), nil)
		if err == nil {
			_, err = s.open(k, sample, nil)
		}
		return err
	})
}

// wrapKWP is AES key wrap with padding. Tokens wrap objects and not bytes, so
// plaintext becomes one for as long as that takes.
func (s session) wrapKWP(k version, plaintext []byte) ([]byte, error) {
	object, err := s.CreateObject(s.handle, append(passing(), p11.NewAttribute(p11.CKA_VALUE, plaintext)))
	if err != nil {
		return nil, err
	}
	out, err := s.WrapKey(s.handle, kwp(), k.handle, object)
	if destroyed := s.DestroyObject(s.handle, object); err == nil {
		err = destroyed
	}
	return out, err
}

// unwrapKWP reverses wrapKWP.
func (s session) unwrapKWP(k version, ciphertext []byte) ([]byte, error) {
	object, err := s.UnwrapKey(s.handle, kwp(), k.handle, ciphertext, passing())
	err = verdict(err, func() error {
		sample, err := s.wrapKWP(k, make([]byte, keySize))
		if err == nil {
			_, err = s.unwrapKWP(k, sample)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	a, err := s.GetAttributeValue(s.handle, object, []*p11.Attribute{p11.NewAttribute(p11.CKA_VALUE, nil)})
	if destroyed := s.DestroyObject(s.handle, object); err == nil {
		err = destroyed
	}
	if err != nil {
		return nil, err
	}
	return a[0].Value, nil
}

func kwp() []*p11.Mechanism {
	return []*p11.Mechanism{p11.NewMechanism(p11.CKM_AES_KEY_WRAP_PAD, nil)}
}

// passing is the template of an object that lives for one call and shows its value.
func passing() []*p11.Attribute {
	return []*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, p11.CKO_SECRET_KEY),
		p11.NewAttribute(p11.CKA_KEY_TYPE, p11.CKK_GENERIC_SECRET),
		p11.NewAttribute(p11.CKA_TOKEN, false),
		p11.NewAttribute(p11.CKA_SENSITIVE, false),
		p11.NewAttribute(p11.CKA_EXTRACTABLE, true),
	}
}

// verdict says what the error of a decryption means. Modules differ: some have
// a code of their own for a ciphertext that does not verify, others say that
// something went wrong. Then a sample tells: where that works, it was the
// ciphertext.
func verdict(err error, sample func() error) error {
	code := p11.Error(0)
	if !errors.As(err, &code) {
		return err
	}
	const aeadDecryptFailed = 0x42 // of PKCS#11 3.0
	switch code {
	case p11.CKR_ENCRYPTED_DATA_INVALID, p11.CKR_ENCRYPTED_DATA_LEN_RANGE, p11.CKR_WRAPPED_KEY_INVALID, p11.CKR_WRAPPED_KEY_LEN_RANGE, aeadDecryptFailed:
		return errCorrupt()
	case p11.CKR_GENERAL_ERROR, p11.CKR_FUNCTION_FAILED, p11.CKR_DATA_INVALID, p11.CKR_DATA_LEN_RANGE, p11.CKR_ARGUMENTS_BAD:
		if sample() == nil {
			return errCorrupt()
		}
	}
	return err
}

func errCorrupt() error {
	return errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key does not verify for this ID: it was damaged, or moved from another ID")
}

// broken says whether a new session may help.
func broken(err error) bool {
	code := p11.Error(0)
	if errors.As(err, &code) {
		switch code {
		case p11.CKR_SESSION_HANDLE_INVALID, p11.CKR_SESSION_CLOSED, p11.CKR_USER_NOT_LOGGED_IN, p11.CKR_OBJECT_HANDLE_INVALID, p11.CKR_KEY_HANDLE_INVALID:
			return true
		}
	}
	return lost(err)
}

// lost says whether the token or its key is away, as far as the module knows.
// A token that was taken away may still show, without what was in it.
func lost(err error) bool {
	code := p11.Error(0)
	if !errors.As(err, &code) {
		return errors.Is(err, errNoToken) || errors.Is(err, errNoKey)
	}
	switch code {
	case p11.CKR_DEVICE_REMOVED, p11.CKR_DEVICE_ERROR, p11.CKR_TOKEN_NOT_PRESENT, p11.CKR_TOKEN_NOT_RECOGNIZED,
		p11.CKR_SLOT_ID_INVALID, p11.CKR_CRYPTOKI_NOT_INITIALIZED:
		return true
	}
	return false
}

// explain gives an error of the module its class and says what it was about.
func (b *Backend) explain(err error) error {
	code := p11.Error(0)
	if err == nil || errdefs.Class(err) != nil || !errors.As(err, &code) {
		return err
	}
	switch code {
	case p11.CKR_KEY_FUNCTION_NOT_PERMITTED, p11.CKR_KEY_HANDLE_INVALID, p11.CKR_KEY_TYPE_INCONSISTENT, p11.CKR_UNWRAPPING_KEY_HANDLE_INVALID,
		p11.CKR_WRAPPING_KEY_HANDLE_INVALID, p11.CKR_USER_PIN_NOT_INITIALIZED, p11.CKR_USER_TYPE_INVALID, p11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN,
		p11.CKR_TOKEN_WRITE_PROTECTED, p11.CKR_ACTION_PROHIBITED, p11.CKR_FUNCTION_REJECTED:
		return errdefs.Errorf(errdefs.ErrDenied, "%s: the token refuses: %w", b, err)
	case p11.CKR_MECHANISM_INVALID, p11.CKR_MECHANISM_PARAM_INVALID:
		return errdefs.Errorf(errdefs.ErrInvalid, "%s: the token cannot do %s as we need it (URI parameter mechanism): %w", b, b.mechanism, err)
	case p11.CKR_TEMPLATE_INCONSISTENT, p11.CKR_TEMPLATE_INCOMPLETE, p11.CKR_ATTRIBUTE_READ_ONLY, p11.CKR_ATTRIBUTE_TYPE_INVALID,
		p11.CKR_ATTRIBUTE_VALUE_INVALID, p11.CKR_ATTRIBUTE_SENSITIVE, p11.CKR_FUNCTION_NOT_SUPPORTED:
		return errdefs.Errorf(errdefs.ErrInvalid, "%s: the token does not take that: %w", b, err)
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s: %w", b, err)
}
