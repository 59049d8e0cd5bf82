//go:build cgo

package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	p11 "github.com/miekg/pkcs11"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	// maxCalls bounds the calls into one module that are under way.
	maxCalls = 16
	// Where a token or the key is away, a KEK has the module initialised anew,
	// at once and then after minPause, twice as long, and so on up to maxPause.
	minPause = time.Second
	maxPause = time.Minute
)

// Built is whether this build can load modules: it was made with cgo.
const Built = true

// shared is what all KEKs of a process have in common.
type shared struct {
	mu      sync.Mutex
	modules map[string]*module // by path
}

func newShared() *shared { return &shared{modules: map[string]*module{}} }

func (s *shared) open(t target) (kms.Backend, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.modules[t.module]
	if m == nil {
		library := p11.New(t.module)
		if library == nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s cannot be loaded: it is no PKCS#11 module, or not for this machine, or a library that it needs is missing (see ldd)", t.module)
		}
		m = &module{path: t.module, Ctx: library, calls: make(chan struct{}, maxCalls), refused: map[string]secret.Bytes{}}
		s.modules[t.module] = m
	}
	return &Backend{target: t, m: m}, nil
}

// module is a loaded PKCS#11 module. It is never unloaded and never finalised
// for good: a call may hang in it, and others may use it.
type module struct {
	*p11.Ctx
	path  string
	calls chan struct{} // holds one element per call under way

	// use is held for reading by whoever calls the module, and for writing
	// while it is initialised.
	use        sync.RWMutex
	generation int  // 0: not initialised; sessions of an earlier one are gone
	owner      bool // it was we who initialised it

	login   sync.Mutex              // one login at a time
	refused map[string]secret.Bytes // the PIN that a token did not take, by token
}

// enter waits for a place among the calls under way; leave gives it back.
func (m *module) enter(ctx context.Context) error {
	if ctx.Err() == nil {
		select {
		case m.calls <- struct{}{}:
			return nil
		case <-ctx.Done():
		}
	}
	return m.errSilent(ctx)
}

func (m *module) leave() { <-m.calls }

func (m *module) errSilent(ctx context.Context) error {
	return errdefs.Errorf(errdefs.ErrUnavailable, "the PKCS#11 module %s does not answer: %w", m.path, ctx.Err())
}

// run calls f aside, having entered, and leaves when f has returned. A caller
// whose ctx ends goes away before that; the bytes that f gives are then wiped.
func run[T any](ctx context.Context, m *module, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result)
	go func() {
		defer m.leave()
		value, err := f()
		select {
		case done <- result{value, err}:
		case <-ctx.Done():
			if b, ok := any(value).([]byte); ok {
				clear(b)
			}
		}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, m.errSilent(ctx)
	}
}

// start initialises the module unless that has been done.
func (m *module) start() error {
	m.use.Lock()
	defer m.use.Unlock()
	if m.generation > 0 {
		return nil
	}
	return m.initialize()
}

func (m *module) initialize() error {
	err := m.Initialize()
	if err != nil && !errors.Is(err, p11.Error(p11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		return fmt.Errorf("initialising the PKCS#11 module %s: %w", m.path, err)
	}
	m.owner = err == nil
	m.generation++
	return nil
}

// restart initialises the module anew, unless that was done since the
// generation seen, because many modules see a token that came or came back only
// then. It says whether that is worth another attempt. A module in which a call
// hangs, or that somebody else has initialised, is not torn down.
func (m *module) restart(seen int) bool {
	if !m.use.TryLock() {
		return false
	}
	defer m.use.Unlock()
	if m.generation != seen {
		return true
	}
	if m.owner {
		_ = m.Finalize() // what counts is what Initialize says
	}
	return m.initialize() == nil
}

// In the chain of errors for want of the token, or of every version of the key.
var (
	errNoToken = errors.New("no such token")
	errNoKey   = errors.New("no such AES key")
)

// find returns the slot and the state of the token.
func (m *module) find(t *target) (uint, p11.TokenInfo, error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return 0, p11.TokenInfo{}, err
	}
	var at []uint
	var found p11.TokenInfo
	var others []string
	for _, slot := range slots {
		info, err := m.GetTokenInfo(slot)
		if err != nil || info.Flags&p11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		if t.is(info) {
			at, found = append(at, slot), info
		} else {
			others = append(others, quote(info.Label))
		}
	}
	switch len(at) {
	case 1:
		return at[0], found, nil
	case 0:
		return 0, p11.TokenInfo{}, errdefs.Errorf(errdefs.ErrUnavailable, "%w: %s is not in module %s, which has %s", errNoToken, t.tokenName(), m.path, few(others))
	}
	return 0, p11.TokenInfo{}, errdefs.Errorf(errdefs.ErrState, "%d tokens are %s: add the serial number to the URI (serial=…)", len(at), t.tokenName())
}

// few names some of the tokens that there are.
func few(tokens []string) string {
	const some = 8
	switch n := len(tokens); {
	case n == 0:
		return "none"
	case n > some:
		return strings.Join(tokens[:some], ", ") + fmt.Sprintf(" and %d more", n-some)
	}
	return strings.Join(tokens, ", ")
}

func (t *target) is(info p11.TokenInfo) bool {
	for _, a := range [][2]string{
		{t.token, info.Label}, {t.serial, info.SerialNumber}, {t.model, info.Model}, {t.manufacturer, info.ManufacturerID},
	} {
		if a[0] != "" && a[0] != a[1] {
			return false
		}
	}
	return true
}

// session is one connection to a token, logged in.
type session struct {
	*module
	handle     p11.SessionHandle
	generation int // of the module
}

// connect opens a session. Its flags are those of C_OpenSession.
func (m *module) connect(t *target, flags uint) (session, error) {
	slot, info, err := m.find(t)
	if err != nil {
		return session{}, err
	}
	handle, err := m.OpenSession(slot, p11.CKF_SERIAL_SESSION|flags)
	if err != nil {
		return session{}, err
	}
	if err := m.logIn(t, handle, info); err != nil {
		_ = m.CloseSession(handle)
		return session{}, err
	}
	return session{m, handle, m.generation}, nil
}

// logIn logs the process in where it is not. It gives a token no PIN that the
// token has refused, and none that could be the last.
func (m *module) logIn(t *target, handle p11.SessionHandle, info p11.TokenInfo) error {
	if info.Flags&p11.CKF_LOGIN_REQUIRED == 0 {
		return nil
	}
	m.login.Lock()
	defer m.login.Unlock()
	state, err := m.GetSessionInfo(handle)
	if err != nil {
		return err
	}
	if state.State == p11.CKS_RO_USER_FUNCTIONS || state.State == p11.CKS_RW_USER_FUNCTIONS {
		return nil
	}
	switch {
	case t.pinFile == "":
		return errdefs.Errorf(errdefs.ErrInvalid, "%s requires a login: name the file of its user PIN in the URI (pin-source=file:/…)", t.tokenName())
	case info.Flags&p11.CKF_USER_PIN_LOCKED != 0:
		return errdefs.Errorf(errdefs.ErrDenied, "the user PIN of %s is locked after too many wrong ones: its security officer has to set a new one", t.tokenName())
	case info.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0:
		return errdefs.Errorf(errdefs.ErrDenied, "one more wrong PIN locks %s, so none is tried: log in once with the HSM's own tool, which clears that, and correct %s", t.tokenName(), t.pinFile)
	}
	pin, err := readPIN(t.pinFile)
	if err != nil {
		return err
	}
	token := strings.Join([]string{info.ManufacturerID, info.Model, info.SerialNumber, info.Label}, "\x00")
	if was := m.refused[token]; was.Len() > 0 && was.Equal(pin) {
		pin.Wipe()
		return errdefs.Errorf(errdefs.ErrDenied, "%s has refused the PIN in %s, which is not tried again, for that could lock the token: correct the file", t.tokenName(), t.pinFile)
	}
	err = m.Login(handle, p11.CKU_USER, string(pin.Expose()))
	switch code := p11.Error(0); {
	case err == nil, errors.Is(err, p11.Error(p11.CKR_USER_ALREADY_LOGGED_IN)):
		pin.Wipe()
		return nil
	case errors.As(err, &code) && pinRefused(code):
		m.refused[token].Wipe()
		m.refused[token] = pin
		return errdefs.Errorf(errdefs.ErrDenied, "%s refuses the user PIN in %s: %w", t.tokenName(), t.pinFile, err)
	}
	pin.Wipe()
	return err
}

func pinRefused(code p11.Error) bool {
	switch code {
	case p11.CKR_PIN_INCORRECT, p11.CKR_PIN_INVALID, p11.CKR_PIN_LEN_RANGE, p11.CKR_PIN_EXPIRED, p11.CKR_PIN_LOCKED:
		return true
	}
	return false
}
