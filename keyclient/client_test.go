package keyclient_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/keyclient/keyclienttest"
	"github.com/cryptcsi/cryptcsi/secret"
)

var (
	_ driver.Keys    = (*keyclient.Client)(nil)
	_ driver.Creator = (*keyclient.Client)(nil)
)

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// mustBe checks an error's class and words.
func mustBe(t *testing.T, what string, err, class error, words ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q says nothing of %q", what, err, w)
		}
	}
}

// beyond are the methods that the API does not have, taken from the keyring
// behind it.
type beyond interface {
	RotateDEK(ctx context.Context, id dek.ID) (dek.DEK, error)
}

type adminKeys struct {
	*keyclient.Client
	beyond
}

func TestContract(t *testing.T) {
	for name, connect := range map[string]func(*testing.T, *envelope.Keyring) keyclient.Config{
		"unix": func(t *testing.T, ring *envelope.Keyring) keyclient.Config {
			return keyclient.Config{Address: newServer(t, "unix", nil, &service{ring: ring}).start().address()}
		},
		"mTLS": func(t *testing.T, ring *envelope.Keyring) keyclient.Config {
			ca := newAuthority(t)
			return ca.clientConfig(newServer(t, "tcp", ca.serverConfig("localhost"), &service{ring: ring}).start().address())
		},
	} {
		t.Run(name, func(t *testing.T) {
			keyclienttest.Run(t, func(t *testing.T) keyclienttest.Keys {
				ring := newRing(t)
				c := open(t, connect(t, ring))
				return keyclienttest.Keys{NodeKeys: c, AdminKeys: adminKeys{c, ring}}
			})
		})
	}
}

// unixClient is a client of a plain key service on a socket.
func unixClient(t *testing.T, cfg keyclient.Config) (*keyclient.Client, *server, *service) {
	t.Helper()
	service := &service{ring: newRing(t)}
	s := newServer(t, "unix", nil, service)
	cfg.Address = s.address()
	return open(t, cfg), s, service
}

func TestOneConnection(t *testing.T) {
	c, s, _ := unixClient(t, keyclient.Config{})
	s.start()
	if got := c.State(); got != "idle" {
		t.Errorf("state %q before the first call", got)
	}
	made, err := c.CreateDEK(t.Context(), id, spec())
	must(t, "CreateDEK", err)
	defer made.Wipe()
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			d, err := c.GetDEK(t.Context(), id)
			if err != nil || !d.Key.Equal(made.Key) {
				t.Errorf("GetDEK: %v, or another key", err)
			}
			d.Wipe()
		})
	}
	wg.Wait()
	if got := s.accepted.Load(); got != 1 {
		t.Errorf("%d connections, want 1", got)
	}
	if got := c.State(); got != "ready" {
		t.Errorf("state %q after calls", got)
	}
}

func TestNothingIsAskedWithBadArguments(t *testing.T) {
	c, _, _ := unixClient(t, keyclient.Config{}) // whose server does not run
	ctx, uuid, bad := t.Context(), dek.NewUUID(), "\xff"
	for what, call := range map[string]func() error{
		"GetDEK of a bad ID":        func() error { _, err := c.GetDEK(ctx, "a b"); return err },
		"CreateDEK of a bad name":   func() error { _, err := c.CreateDEK(ctx, id, dek.Spec{Cipher: dek.CipherXTS, Name: bad}); return err },
		"ClaimFormat of a bad node": func() error { _, err := c.ClaimFormat(ctx, id, dek.Claim{Node: bad, UUID: uuid}); return err },
		"ClaimFormat of a long node": func() error {
			_, err := c.ClaimFormat(ctx, id, dek.Claim{Node: strings.Repeat("n", 257), UUID: uuid})
			return err
		},
		"ClaimFormat of a bad UUID": func() error {
			_, err := c.ClaimFormat(ctx, id, dek.Claim{Node: "n", UUID: strings.ToUpper(uuid)})
			return err
		},
		"ConfirmDEK of a bad UUID": func() error { return c.ConfirmDEK(ctx, id, dek.HeaderID{UUID: bad}) },
		"RewrapDEK of no ID":       func() error { return c.RewrapDEK(ctx, "") },
	} {
		mustBe(t, what, call(), errdefs.ErrInvalid)
	}
	_, err := c.CreateDEK(ctx, "a b\n", dek.Spec{})
	mustBe(t, "CreateDEK of nothing good", err, errdefs.ErrInvalid)
}

// TestCodes: each code becomes its class, and only what may pass is tried again.
func TestCodes(t *testing.T) {
	var seen calls
	c, s, _ := unixClient(t, keyclient.Config{Attempts: 3, Observe: seen.observe})
	var code codes.Code
	s.intercept = func(context.Context, string, func(context.Context) (any, error)) (any, error) {
		return nil, status.Error(code, "the server's words")
	}
	s.start()
	for _, tt := range []struct {
		code     codes.Code
		class    error
		attempts int
	}{
		{codes.InvalidArgument, errdefs.ErrInvalid, 1},
		{codes.NotFound, errdefs.ErrNotFound, 1},
		{codes.AlreadyExists, errdefs.ErrExists, 1},
		{codes.PermissionDenied, errdefs.ErrDenied, 1},
		{codes.Aborted, errdefs.ErrConflict, 1},
		{codes.FailedPrecondition, errdefs.ErrState, 1},
		{codes.DataLoss, errdefs.ErrCorrupt, 1},
		{codes.Unauthenticated, errdefs.ErrDenied, 1},
		{codes.Unimplemented, errdefs.ErrInvalid, 1},
		{codes.Internal, nil, 1},
		{codes.Unavailable, errdefs.ErrUnavailable, 3},
		{codes.ResourceExhausted, errdefs.ErrUnavailable, 3},
		// The caller still waits, so it is the server's own trouble.
		{codes.Canceled, errdefs.ErrUnavailable, 3},
		{codes.DeadlineExceeded, errdefs.ErrUnavailable, 3},
	} {
		code = tt.code
		d, err := c.GetDEK(t.Context(), id)
		if got := errdefs.Class(errors.Unwrap(err)); !errors.Is(got, tt.class) {
			t.Errorf("%v became %v of class %v, want %v", tt.code, err, got, tt.class)
		}
		mustBe(t, tt.code.String(), err, err, s.address(), "GetDEK", "the server's words")
		if d.Key.Len() != 0 {
			t.Errorf("%v: a key came with an error", tt.code)
		}
		want := slices.Repeat([]string{tt.code.String()}, tt.attempts)
		if got := seen.codes(); !slices.Equal(got, want) {
			t.Errorf("%v: attempts %v, want %v", tt.code, got, want)
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v looks like the caller's own end: %v", tt.code, err)
		}
	}
	code = codes.Unauthenticated
	mustBe(t, "without an identity", c.RewrapDEK(t.Context(), id), errdefs.ErrDenied, "neither a certificate nor a token")
}

func TestObserve(t *testing.T) {
	var seen calls
	c, s, _ := unixClient(t, keyclient.Config{Observe: seen.observe})
	fail := true
	s.intercept = func(ctx context.Context, _ string, call func(context.Context) (any, error)) (any, error) {
		if fail {
			fail = false
			return nil, status.Error(codes.Unavailable, "sealed: an operator has to unseal it")
		}
		return call(ctx)
	}
	s.start()
	mustBe(t, "RewrapDEK", c.RewrapDEK(t.Context(), id), errdefs.ErrNotFound)
	want := []keyclient.Call{{Method: "RewrapDEK", Code: "Unavailable", Attempt: 1}, {Method: "RewrapDEK", Code: "NotFound", Attempt: 2}}
	for i := range seen.all {
		if seen.all[i].Duration <= 0 {
			t.Errorf("attempt %d took %v", i+1, seen.all[i].Duration)
		}
		seen.all[i].Duration = 0
	}
	if !slices.Equal(seen.all, want) {
		t.Errorf("observed %+v, want %+v", seen.all, want)
	}
}

func TestClose(t *testing.T) {
	c, s, _ := unixClient(t, keyclient.Config{})
	entered := make(chan struct{})
	s.intercept = func(ctx context.Context, _ string, _ func(context.Context) (any, error)) (any, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	s.start()
	answer := make(chan error, 1)
	go func() { answer <- c.RewrapDEK(context.Background(), id) }()
	<-entered
	for range 2 {
		must(t, "Close", c.Close())
	}
	mustBe(t, "a call under way", <-answer, errdefs.ErrUnavailable, "closed")
	mustBe(t, "a call after Close", c.RewrapDEK(t.Context(), id), errdefs.ErrUnavailable, "closed")
	if got := c.State(); got != "shutdown" {
		t.Errorf("state %q after Close", got)
	}
}

// admin answers Admin's methods.
type admin struct {
	keyservicev1.UnimplementedAdminServer
	asked *keyservicev1.UnsealRequest
	err   error
}

func (a *admin) Unseal(_ context.Context, r *keyservicev1.UnsealRequest) (*keyservicev1.StatusResponse, error) {
	a.asked = r
	return &keyservicev1.StatusResponse{Version: "v1", Records: 7}, a.err
}

func (a *admin) Status(context.Context, *keyservicev1.StatusRequest) (*keyservicev1.StatusResponse, error) {
	return &keyservicev1.StatusResponse{
		Sealed: true, Version: "v1", Records: -1, RecordsError: "no store",
		Keks: []*keyservicev1.Kek{{Name: "transit://x", KeyId: "k/1"}, {Name: "cluster://", Error: "gone"}},
	}, a.err
}

func TestAdmin(t *testing.T) {
	service, seen := &admin{}, &calls{}
	c := open(t, keyclient.Config{Address: newServer(t, "unix", nil, service).start().address(), Observe: seen.observe})
	s, err := c.Status(t.Context())
	must(t, "Status", err)
	if !s.Sealed || s.Version != "v1" || s.Records != -1 || s.RecordsError != "no store" ||
		!slices.Equal(s.KEKs, []keyclient.KEKStatus{{Name: "transit://x", KeyID: "k/1"}, {Name: "cluster://", Error: "gone"}}) {
		t.Errorf("Status = %+v", s)
	}
	u := keyclient.Given{
		KMSURIs: []string{"cluster://{0}"}, StorageURIs: []string{"mem://"},
		Files: []secret.Bytes{secret.Take([]byte("master")), {}}, RecordAuthSecret: secret.Take([]byte("auth")),
	}
	s, err = c.Unseal(t.Context(), u)
	must(t, "Unseal", err)
	if s.Sealed || s.Records != 7 {
		t.Errorf("Unseal = %+v", s)
	}
	if r := service.asked; !slices.Equal(r.KmsUris, u.KMSURIs) || !slices.Equal(r.StorageUris, u.StorageURIs) || len(r.Files) != 2 ||
		string(r.Files[0]) != "master" || len(r.Files[1]) != 0 || string(r.RecordAuthSecret) != "auth" {
		t.Errorf("Unseal asked %+v", r)
	}
	service.err = status.Error(codes.Unavailable, "the KMS does not answer")
	_, err = c.Unseal(t.Context(), u)
	mustBe(t, "a refused Unseal", err, errdefs.ErrUnavailable, "Unseal", "the KMS does not answer")
	if got := seen.codes(); !slices.Equal(got, []string{"OK", "OK", "Unavailable"}) {
		t.Errorf("attempts %v", got)
	}
	_, err = c.Recover(t.Context(), u)
	mustBe(t, "Recover of what is no node that waits", err, errdefs.ErrInvalid, "Recover")
	_, err = c.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK of what is no key service", err, errdefs.ErrInvalid, "is it a key service")
}

func TestWaitsForReady(t *testing.T) {
	var seen calls
	c, s, _ := unixClient(t, keyclient.Config{Observe: seen.observe})
	answer := make(chan error, 1)
	go func() { answer <- c.RewrapDEK(context.Background(), id) }()
	for c.State() != "transient_failure" {
		time.Sleep(time.Millisecond) // there is no event to wait for
	}
	s.start()
	mustBe(t, "RewrapDEK", <-answer, errdefs.ErrNotFound)
	if got := seen.codes(); !slices.Equal(got, []string{"NotFound"}) {
		t.Errorf("attempts %v", got)
	}
}

// TestStates: a state of gRPC's that States lacks would be 0 everywhere.
func TestStates(t *testing.T) {
	for s := connectivity.Idle; s <= connectivity.Shutdown; s++ {
		if name := strings.ToLower(s.String()); !slices.Contains(keyclient.States(), name) {
			t.Errorf("no state %q", name)
		}
	}
	if n := len(keyclient.States()); n != int(connectivity.Shutdown)+1 {
		t.Errorf("%d states", n)
	}
}
