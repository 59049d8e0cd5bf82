package gcpckms_test

import (
	"bytes"
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/gcpckms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const (
	id  = "driver.example.com/vol-1"
	key = "gcpckms://projects/p-1/locations/global/keyRings/r/cryptoKeys/k"
)

func mux() kms.Mux { return kms.Mux{gcpckms.Scheme: gcpckms.Open} }

func open(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	return openWith(t, uri, kms.Options{})
}

func openWith(t *testing.T, uri string, o kms.Options) *kms.KEK {
	t.Helper()
	kek, err := mux().OpenWith(t.Context(), uri, o)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return kek
}

// opened is open for a test that does not close it.
func opened(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	kek := open(t, uri)
	t.Cleanup(func() {
		if err := kek.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return kek
}

func random(t *testing.T) secret.Bytes {
	t.Helper()
	k := secret.Take(bytes.Repeat([]byte("k"), kms.KeySize))
	t.Cleanup(k.Wipe)
	return k
}

func mustWrap(t *testing.T, kek *kms.KEK) kms.Wrapped {
	t.Helper()
	w, err := kek.Wrap(t.Context(), id, random(t))
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	return w
}

func mustUnwrap(t *testing.T, kek *kms.KEK, w kms.Wrapped) {
	t.Helper()
	k, err := kek.Unwrap(t.Context(), id, w)
	if err != nil || !k.Equal(random(t)) {
		t.Errorf("Unwrap: another key, or %v", err)
	}
	k.Wipe()
}

// at is a URI whose service is at a plaintext endpoint.
func at(s *gcpfake.Server, addr string) string {
	return strings.ReplaceAll(s.URI("one"), url.PathEscape(s.Endpoint), "http://"+addr)
}

func TestConformance(t *testing.T) {
	s := gcpfake.Start(t)
	one, two := s.CreateKey("one"), s.CreateKey("two")
	short := kms.Options{Timeout: time.Second}
	off := func(t *testing.T, state kms.VersionState) {
		kek := opened(t, one)
		if err := kek.SetVersion(t.Context(), "", state); err != nil {
			t.Fatalf("SetVersion(%s): %v", state, err)
		}
	}
	kmstest.Run(t, kmstest.Harness{
		Open:      func(t *testing.T) *kms.KEK { return open(t, one) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, two) },
		Rotate: func(t *testing.T) *kms.KEK {
			s.Rotate("one")
			return open(t, one)
		},
		Disable: func(t *testing.T) func() {
			off(t, kms.Disabled)
			return func() { off(t, kms.Enabled) }
		},
		Deny: func(*testing.T) func() {
			return s.Deny("cloudkms.cryptoKeyVersions.useToEncrypt", "cloudkms.cryptoKeyVersions.useToDecrypt")
		},
		Unreachable: func(t *testing.T) *kms.KEK { return openWith(t, at(s, peers.Addr(t)), short) },
		Slow:        func(t *testing.T) *kms.KEK { return openWith(t, at(s, peers.Silent(t)), short) },
	})
}

// TestReal runs the suite against a key of Google's that can be used and
// rotated with application default credentials.
func TestReal(t *testing.T) {
	uri := os.Getenv("TEST_KEK_URI_GCPCKMS")
	if uri == "" {
		t.Skip("TEST_KEK_URI_GCPCKMS names no key")
	}
	s := gcpfake.Start(t)
	s.CreateKey("two")
	short := kms.Options{Timeout: time.Second}
	kmstest.Run(t, kmstest.Harness{
		Open:        func(t *testing.T) *kms.KEK { return open(t, uri) },
		OpenOther:   func(t *testing.T) *kms.KEK { return open(t, s.URI("two")) },
		Unreachable: func(t *testing.T) *kms.KEK { return openWith(t, at(s, peers.Addr(t)), short) },
		Slow:        func(t *testing.T) *kms.KEK { return openWith(t, at(s, peers.Silent(t)), short) },
		Stride:      61,
	})
}

// TestDisabledPrimary: what the service documents of a primary version that is
// switched off: it wraps and unwraps nothing, older versions still unwrap.
func TestDisabledPrimary(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	old := mustWrap(t, kek)
	s.Rotate("one")
	renewed := mustWrap(t, kek)
	undo := disableVersion(t, s, renewed.KeyID)
	mustUnwrap(t, kek, old)
	_, wrapErr := kek.Wrap(t.Context(), id, random(t))
	_, unwrapErr := kek.Unwrap(t.Context(), id, renewed)
	_, idErr := kek.CurrentKeyID(t.Context())
	for op, err := range map[string]error{"Wrap": wrapErr, "Unwrap": unwrapErr, "CurrentKeyID": idErr} {
		if !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "DISABLED") {
			t.Errorf("%s: %v, want ErrDenied that says DISABLED", op, err)
		}
	}
	undo()
	mustUnwrap(t, kek, renewed)
}

// disableVersion is what an operator may do to a primary version by other tools.
func disableVersion(t *testing.T, s *gcpfake.Server, name string) (undo func()) {
	t.Helper()
	set := func(state kmspb.CryptoKeyVersion_CryptoKeyVersionState) {
		r := &kmspb.UpdateCryptoKeyVersionRequest{CryptoKeyVersion: &kmspb.CryptoKeyVersion{Name: name, State: state}}
		r.UpdateMask = mask("state")
		if _, err := s.UpdateCryptoKeyVersion(context.Background(), r); err != nil {
			t.Error(err)
		}
	}
	set(kmspb.CryptoKeyVersion_DISABLED)
	return func() { set(kmspb.CryptoKeyVersion_ENABLED) }
}

// TestChecksums: whatever is damaged on the way is ErrUnavailable, used by
// nobody, and the next call works.
func TestChecksums(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	w := mustWrap(t, kek)
	request := func(damage func(proto.Message)) func() (undo func()) {
		return func() func() {
			return s.Intercept(func(_ context.Context, _ string, r proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
				damage(r)
				return serve()
			})
		}
	}
	answer := func(damage func(proto.Message)) func() (undo func()) {
		return func() func() {
			return s.Intercept(func(_ context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
				a, err := serve()
				if err == nil {
					damage(a)
				}
				return a, err
			})
		}
	}
	for _, tt := range []struct {
		name         string
		damage       func() (undo func())
		wrap, unwrap bool // fails
	}{
		{"answers", s.CorruptAnswers, true, true},
		{"lost checksums of requests", s.DropChecksums, true, false},
		{"sent bytes", request(func(m proto.Message) {
			switch r := m.(type) {
			case *kmspb.EncryptRequest:
				r.Plaintext[40] ^= 4
			case *kmspb.DecryptRequest:
				r.Ciphertext[20] ^= 4
			}
		}), true, true},
		{"sent associated data", request(func(m proto.Message) {
			switch r := m.(type) {
			case *kmspb.EncryptRequest:
				r.AdditionalAuthenticatedData[0] ^= 4
			case *kmspb.DecryptRequest:
				r.AdditionalAuthenticatedData[0] ^= 4
			}
		}), true, true},
		{"only associated data verified", answer(func(m proto.Message) {
			if a, ok := m.(*kmspb.EncryptResponse); ok {
				a.VerifiedPlaintextCrc32C = false
			}
		}), true, false},
		{"only plaintext verified", answer(func(m proto.Message) {
			if a, ok := m.(*kmspb.EncryptResponse); ok {
				a.VerifiedAdditionalAuthenticatedDataCrc32C = false
			}
		}), true, false},
		{"answers without checksums", answer(func(m proto.Message) {
			switch a := m.(type) {
			case *kmspb.EncryptResponse:
				a.CiphertextCrc32C = nil
			case *kmspb.DecryptResponse:
				a.PlaintextCrc32C = nil
			}
		}), true, true},
		{"answered checksums", answer(func(m proto.Message) {
			switch a := m.(type) {
			case *kmspb.EncryptResponse:
				a.CiphertextCrc32C = wrapperspb.Int64(a.CiphertextCrc32C.GetValue() + 1<<32)
			case *kmspb.DecryptResponse:
				a.PlaintextCrc32C = wrapperspb.Int64(a.PlaintextCrc32C.GetValue() + 1<<32)
			}
		}), true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			undo := tt.damage()
			_, wrapErr := kek.Wrap(t.Context(), id, random(t))
			k, unwrapErr := kek.Unwrap(t.Context(), id, w)
			k.Wipe()
			undo()
			for op, c := range map[string]struct {
				err   error
				fails bool
			}{"Wrap": {wrapErr, tt.wrap}, "Unwrap": {unwrapErr, tt.unwrap}} {
				if c.fails != errors.Is(c.err, errdefs.ErrUnavailable) || c.fails != (c.err != nil) || c.fails && !strings.Contains(strings.ToLower(c.err.Error()), "crc32c") {
					t.Errorf("%s: %v, want ErrUnavailable that names the checksum: %v", op, c.err, c.fails)
				}
			}
			mustUnwrap(t, kek, mustWrap(t, kek))
		})
	}
}

// TestPinned: a record cannot make us use, or even ask for, another key.
func TestPinned(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	w := mustWrap(t, kek)
	before := s.Calls("Decrypt")
	for _, name := range []string{
		s.KeyName("two") + "/cryptoKeyVersions/1", s.KeyName("one"), s.KeyName("one") + "/cryptoKeyVersions/", s.KeyName("one") + "1/cryptoKeyVersions/1",
		s.KeyName("one") + "/cryptoKeyVersions/1/../../two", s.KeyName("one") + "/cryptoKeyVersions/1 ", "1", "projects/" + w.KeyID,
	} {
		forged := w
		forged.KeyID = name
		if _, err := kek.Unwrap(t.Context(), id, forged); !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("%q: %v, want ErrDenied", name, err)
		}
	}
	forged := w
	forged.Mechanism = "rsa-oaep-256"
	if _, err := kek.Unwrap(t.Context(), id, forged); !errors.Is(err, errdefs.ErrCorrupt) {
		t.Errorf("another mechanism: %v, want ErrCorrupt", err)
	}
	if n := s.Calls("Decrypt") - before; n != 0 {
		t.Errorf("the service was asked %d times", n)
	}

	stop := s.Intercept(func(_ context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		a, err := serve()
		switch a := a.(type) {
		case *kmspb.EncryptResponse:
			a.Name = s.KeyName("two") + "/cryptoKeyVersions/1"
		case *kmspb.CryptoKey:
			a.Primary.Name = s.KeyName("two") + "/cryptoKeyVersions/1"
		}
		return a, err
	})
	defer stop()
	_, wrapErr := kek.Wrap(t.Context(), id, random(t))
	_, idErr := kek.CurrentKeyID(t.Context())
	for op, err := range map[string]error{"Wrap": wrapErr, "CurrentKeyID": idErr} {
		if !errors.Is(err, errdefs.ErrState) {
			t.Errorf("%s of a service that uses another key: %v, want ErrState", op, err)
		}
	}
}

// TestAssociatedData: the service sees the ID, and not only inside the plaintext.
func TestAssociatedData(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	var got []string
	stop := s.Intercept(func(_ context.Context, _ string, r proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		if r, ok := r.(interface{ GetAdditionalAuthenticatedData() []byte }); ok {
			got = append(got, string(r.GetAdditionalAuthenticatedData()))
		}
		return serve()
	})
	defer stop()
	mustUnwrap(t, kek, mustWrap(t, kek))
	if len(got) != 2 || got[0] != id || got[1] != id {
		t.Errorf("associated data %q, want the ID twice", got)
	}
}

func TestErrorClasses(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	w := mustWrap(t, kek)
	for _, tt := range []struct {
		code         codes.Code
		wrap, unwrap error
	}{
		{codes.InvalidArgument, errdefs.ErrInvalid, errdefs.ErrCorrupt},
		{codes.FailedPrecondition, errdefs.ErrDenied, errdefs.ErrDenied},
		{codes.PermissionDenied, errdefs.ErrDenied, errdefs.ErrDenied},
		{codes.Unauthenticated, errdefs.ErrDenied, errdefs.ErrDenied},
		{codes.NotFound, errdefs.ErrDenied, errdefs.ErrDenied},
		{codes.ResourceExhausted, errdefs.ErrUnavailable, errdefs.ErrUnavailable},
		{codes.Unavailable, errdefs.ErrUnavailable, errdefs.ErrUnavailable},
		{codes.Internal, errdefs.ErrUnavailable, errdefs.ErrUnavailable},
		{codes.DeadlineExceeded, errdefs.ErrUnavailable, errdefs.ErrUnavailable},
		{codes.Aborted, errdefs.ErrUnavailable, errdefs.ErrUnavailable},
		{codes.Unknown, errdefs.ErrUnavailable, errdefs.ErrUnavailable},
	} {
		before := s.Calls("Encrypt")
		stop := s.Intercept(func(context.Context, string, proto.Message, func() (proto.Message, error)) (proto.Message, error) {
			return nil, status.Error(tt.code, strings.Repeat("the service's\nwords ", 1000))
		})
		_, wrapErr := kek.Wrap(t.Context(), id, random(t))
		_, unwrapErr := kek.Unwrap(t.Context(), id, w)
		stop()
		for op, c := range map[string][2]error{"Wrap": {wrapErr, tt.wrap}, "Unwrap": {unwrapErr, tt.unwrap}} {
			if !errors.Is(c[0], c[1]) || !strings.Contains(c[0].Error(), "the service's words") || len(c[0].Error()) > 1000 {
				t.Errorf("%v, %s: %v, want %v in bounded words", tt.code, op, c[0], c[1])
			}
		}
		if n := s.Calls("Encrypt") - before; n != 1 {
			t.Errorf("%v: %d calls, want 1: the caller retries", tt.code, n)
		}
	}
	missing := opened(t, s.URI("missing"))
	if _, err := missing.CurrentKeyID(t.Context()); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a key that is not there: %v, want ErrDenied", err)
	}
}

// TestHangs: a service that goes silent in the middle ends with the caller's patience.
func TestHangs(t *testing.T) {
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	mustWrap(t, kek)
	defer s.Hang()()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := kek.Wrap(ctx, id, random(t)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wrap: %v, want DeadlineExceeded", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestReconnects: a service that was away is used again without a restart.
func TestReconnects(t *testing.T) {
	s := gcpfake.Start(t)
	addr := peers.Addr(t)
	kek := opened(t, at(s, addr))
	if _, err := kek.CurrentKeyID(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatalf("nobody there: %v", err)
	}
	s.CreateKey("one")
	forward(t, addr, strings.TrimPrefix(s.Endpoint, "http://"))
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if _, err := kek.CurrentKeyID(t.Context()); err == nil {
			return
		} else if time.Since(start) > 10*time.Second {
			t.Fatalf("still %v", err)
		}
	}
}

// TestNoPlaintextInLogs: the SDK has a logger that the environment switches on
// and that prints whole requests.
func TestNoPlaintextInLogs(t *testing.T) {
	t.Setenv("GOOGLE_SDK_GO_LOGGING_LEVEL", "debug")
	file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stderr := os.Stderr
	os.Stderr = file
	defer func() { os.Stderr = stderr }()
	s := gcpfake.Start(t)
	kek := opened(t, s.CreateKey("one"))
	mustUnwrap(t, kek, mustWrap(t, kek))
	logged, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(logged, []byte("laintext")) {
		t.Errorf("logged: %.300s", logged)
	}
}

func TestOpenRefuses(t *testing.T) {
	gcpfake.NoAccount(t)
	account := write(t, gcpfake.ServiceAccount(t, "https://nobody.invalid/token"))
	for _, tt := range []struct{ uri, want string }{
		{"gcpckms://projects/p/locations/l/keyRings/r", "must name a CryptoKey"},
		{key + "/cryptoKeyVersions/1", "without a version"},
		{key + "/", "must name a CryptoKey"},
		{"gcpckms:///projects/p/locations/l/keyRings/r/cryptoKeys/k", "must name a CryptoKey"},
		{"gcpckms://host/p/locations/l/keyRings/r/cryptoKeys/k", "must name a CryptoKey"},
		{"gcpckms://projects/123456/locations/l/keyRings/r/cryptoKeys/k", "by ID"},
		{"gcpckms://projects/p/locations/l/keyRings/r/cryptoKeys/a%2Fb", "must name a CryptoKey"},
		{key + "?location=here", `"location" is not known`},
		{key + "?endpoint=host", "host:port"},
		{key + "?endpoint=https://host:443", "host:port"},
		{key + "?endpoint=host:443/path", "host:port"},
		{key + "?endpoint=:443", "host:port"},
		{key + "?endpoint=http://192.0.2.1:80", "loopback"},
		{key + "?endpoint=http://localhost:80", "loopback"},
		{key + "?endpoint=http://127.0.0.1", "loopback"},
		{key + "?endpoint=http://127.0.0.1:80/x", "loopback"},
		{key + "?endpoint=http://127.0.0.1:80&ca-file=/nowhere", "makes no sense"},
		{key + "?ca-file=/nowhere/ca.pem", "/nowhere/ca.pem"},
		{key + "?ca-file=" + account, "no certificate"},
		{key + "?credentials-file=/nowhere/account.json", "/nowhere/account.json"},
		{key + "?credentials-file=" + write(t, `{"type": "service_account", "private_key": "S3CR3T"}`), "private_key does not parse"},
		{key + "?credentials-file=" + write(t, `{"type": "external_account", "credential_source": {"executable": {"command": "/bin/S3CR3T"}}}`), "run a program"},
	} {
		_, err := mux().Open(t.Context(), tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%q) = %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "S3CR3T") {
			t.Errorf("Open(%q) shows a secret: %v", tt.uri, err)
		}
	}
	for _, uri := range []string{
		key + "?credentials-file=" + account,
		key + "?credentials-file=" + account + "&endpoint=kms.example.com:443",
		"gcpckms://projects/example.com:p/locations/europe-west3/keyRings/R_1/cryptoKeys/K-1?endpoint=http://[::1]:80",
		key, // the metadata server's account, which nobody asks for yet
	} {
		opened(t, uri)
	}
}
