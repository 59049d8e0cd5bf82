//go:build !race

// The library's own server, which these tests run, has a data race of its own
// when a client goes away; kmip_test.go is for the race detector.

package kmip_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	protocol "github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/kmipserver"
	"github.com/ovh/kmip-go/payloads"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmip"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// server is a KMIP server with faults, for what PyKMIP cannot be brought to
// do. Its keys are named by identifiers.
type server struct {
	addr string
	ca   *peers.CA

	mu    sync.Mutex
	keys  map[string][]byte
	state protocol.State
	asked map[string]bool // identifiers that were seen

	// What the operations fail with, or wait for, before they do anything.
	encrypt, decrypt, get func(ctx context.Context, aad []byte) error
}

func serve(t *testing.T) *server {
	t.Helper()
	s := &server{ca: peers.NewCA(t), keys: map[string][]byte{}, asked: map[string]bool{}, state: protocol.StateActive}
	for _, id := range []string{"one", "two"} {
		s.keys[id] = make([]byte, 32)
		_, _ = rand.Read(s.keys[id])
	}
	l := listen(t, s.ca)
	s.addr = l.Addr().String()
	router := kmipserver.NewBatchExecutor()
	router.Route(protocol.OperationEncrypt, kmipserver.HandleFunc(s.onEncrypt))
	router.Route(protocol.OperationDecrypt, kmipserver.HandleFunc(s.onDecrypt))
	router.Route(protocol.OperationGet, kmipserver.HandleFunc(s.onGet))
	router.Route(protocol.OperationGetAttributes, kmipserver.HandleFunc(s.onGetAttributes))
	srv := kmipserver.NewServer(l, router)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = srv.Serve() }()
	t.Cleanup(func() { _ = srv.Shutdown(); <-ended })
	return s
}

// listen listens for clients with certificates of ca.
func listen(t *testing.T, ca *peers.CA) net.Listener {
	t.Helper()
	certFile, keyFile := ca.Issue(t, "server")
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(pem)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func uri(t *testing.T, addr string, ca *peers.CA, key string) string {
	t.Helper()
	cert, certKey := ca.Issue(t, "client")
	return fmt.Sprintf("kmip://%s/%s?ca-file=%s&cert-file=%s&key-file=%s", addr, key, ca.File, cert, certKey)
}

func (s *server) uri(t *testing.T, key string) string { return uri(t, s.addr, s.ca, key) }

func (s *server) find(id string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[id] = true
	if key, ok := s.keys[id]; ok {
		return key, nil
	}
	return nil, kmipserver.ErrItemNotFound
}

func (s *server) gcm(ctx context.Context, id string, fault func(context.Context, []byte) error, aad []byte) (cipher.AEAD, error) {
	if fault != nil {
		if err := fault(ctx, aad); err != nil {
			return nil, err
		}
	}
	key, err := s.find(id)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (s *server) onEncrypt(ctx context.Context, r *payloads.EncryptRequestPayload) (*payloads.EncryptResponsePayload, error) {
	gcm, err := s.gcm(ctx, r.UniqueIdentifier, s.encrypt, r.AuthenticatedEncryptionAdditionalData)
	if err != nil {
		return nil, err
	}
	c := gcm.Seal(nil, r.IVCounterNonce, r.Data, r.AuthenticatedEncryptionAdditionalData)
	return &payloads.EncryptResponsePayload{
		UniqueIdentifier: r.UniqueIdentifier, Data: c[:len(r.Data)], AuthenticatedEncryptionTag: c[len(r.Data):]}, nil
}

func (s *server) onDecrypt(ctx context.Context, r *payloads.DecryptRequestPayload) (*payloads.DecryptResponsePayload, error) {
	gcm, err := s.gcm(ctx, r.UniqueIdentifier, s.decrypt, r.AuthenticatedEncryptionAdditionalData)
	if err != nil {
		return nil, err
	}
	p, err := gcm.Open(nil, r.IVCounterNonce, append(r.Data, r.AuthenticatedEncryptionTag...), r.AuthenticatedEncryptionAdditionalData)
	if err != nil {
		return nil, kmipserver.Errorf(protocol.ResultReasonCryptographicFailure, "tag mismatch")
	}
	return &payloads.DecryptResponsePayload{UniqueIdentifier: r.UniqueIdentifier, Data: p}, nil
}

func (s *server) onGet(ctx context.Context, r *payloads.GetRequestPayload) (*payloads.GetResponsePayload, error) {
	if s.get != nil {
		if err := s.get(ctx, nil); err != nil {
			return nil, err
		}
	}
	key, err := s.find(r.UniqueIdentifier)
	if err != nil {
		return nil, err
	}
	key = bytes.Clone(key)
	return &payloads.GetResponsePayload{ObjectType: protocol.ObjectTypeSymmetricKey, UniqueIdentifier: r.UniqueIdentifier,
		Object: &protocol.SymmetricKey{KeyBlock: protocol.KeyBlock{
			KeyFormatType: protocol.KeyFormatTypeRaw, CryptographicAlgorithm: protocol.CryptographicAlgorithmAES, CryptographicLength: 256,
			KeyValue: &protocol.KeyValue{Plain: &protocol.PlainKeyValue{KeyMaterial: protocol.KeyMaterial{Bytes: &key}}}}}}, nil
}

func (s *server) onGetAttributes(_ context.Context, r *payloads.GetAttributesRequestPayload) (*payloads.GetAttributesResponsePayload, error) {
	if _, err := s.find(r.UniqueIdentifier); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return &payloads.GetAttributesResponsePayload{UniqueIdentifier: r.UniqueIdentifier, Attribute: []protocol.Attribute{
		{AttributeName: protocol.AttributeNameState, AttributeValue: s.state},
		{AttributeName: protocol.AttributeNameCryptographicAlgorithm, AttributeValue: protocol.CryptographicAlgorithmAES},
		{AttributeName: protocol.AttributeNameCryptographicLength, AttributeValue: int32(256)},
	}}, nil
}

func fails(reason protocol.ResultReason) func(context.Context, []byte) error {
	return func(context.Context, []byte) error { return kmipserver.Errorf(reason, "as asked for") }
}

// TestExport: a KEK whose server does not encrypt passes the suite too, where
// that is allowed, and gives a refused, revoked or odd key no chance.
func TestExport(t *testing.T) {
	s := serve(t)
	s.encrypt, s.decrypt = fails(protocol.ResultReasonOperationNotSupported), fails(protocol.ResultReasonOperationNotSupported)
	const allowed = "&allow-kek-export=true"
	one, two := s.uri(t, "one"), s.uri(t, "two")
	set := func(state protocol.State) func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		was := s.state
		s.state = state
		return func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.state = was
		}
	}
	kmstest.Run(t, kmstest.Harness{
		Open:      func(t *testing.T) *kms.KEK { return open(t, one+allowed) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, two+allowed) },
		Disable:   func(*testing.T) func() { return set(protocol.StateDeactivated) },
		Deny: func(*testing.T) func() {
			s.get = fails(protocol.ResultReasonSensitive)
			return func() { s.get = nil }
		},
		Secrets: [][]byte{s.keys["one"], s.keys["two"]},
	})
	if w := works(t, open(t, one+allowed)); w.Mechanism != kmip.MechanismExport {
		t.Errorf("wrapped by %s", w.Mechanism)
	}
	refused(t, open(t, one), errdefs.ErrInvalid, "allow-kek-export=true")
	s.keys["one"] = s.keys["one"][:16]
	refused(t, open(t, one+allowed), errdefs.ErrState, "raw AES-256")
}

// TestExportOnlyWhereUnsupported: no other failure brings the KEK out.
func TestExportOnlyWhereUnsupported(t *testing.T) {
	s := serve(t)
	s.get = func(context.Context, []byte) error { t.Error("the KEK was fetched"); return nil }
	kek := open(t, s.uri(t, "one")+"&allow-kek-export=true")
	w := works(t, kek)
	for _, reason := range []protocol.ResultReason{protocol.ResultReasonGeneralFailure, protocol.ResultReasonPermissionDenied, protocol.ResultReasonCryptographicFailure, protocol.ResultReasonInvalidField} {
		s.encrypt, s.decrypt = fails(reason), fails(reason)
		if _, err := kek.Wrap(t.Context(), id, dek(t)); err == nil {
			t.Error("Wrap works though Encrypt fails")
		}
		if _, err := kek.Unwrap(t.Context(), id, w); err == nil {
			t.Error("Unwrap works though Decrypt fails")
		}
	}
	s.decrypt = fails(protocol.ResultReasonOperationNotSupported)
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("Unwrap by another mechanism than the record's: %v", err)
	}
}

// TestFailures: what a server's reason means.
func TestFailures(t *testing.T) {
	works := func(context.Context, []byte) error { return nil }
	broken := func(reason protocol.ResultReason) func(context.Context, []byte) error {
		return func(_ context.Context, aad []byte) error {
			if string(aad) == id {
				return kmipserver.Errorf(reason, "as asked for")
			}
			return nil // the probe works
		}
	}
	for _, tt := range []struct {
		what             string
		encrypt, decrypt func(context.Context, []byte) error
		wrap, unwrap     error
	}{
		{"works", works, works, nil, nil},
		{"says corrupt", works, fails(protocol.ResultReasonCryptographicFailure), nil, errdefs.ErrCorrupt},
		{"fails for this ciphertext", works, broken(protocol.ResultReasonGeneralFailure), nil, errdefs.ErrCorrupt},
		{"finds this ciphertext invalid", works, broken(protocol.ResultReasonInvalidField), nil, errdefs.ErrCorrupt},
		{"fails for all ciphertexts", works, fails(protocol.ResultReasonGeneralFailure), nil, errdefs.ErrUnavailable},
		{"fails", fails(protocol.ResultReasonGeneralFailure), fails(protocol.ResultReasonGeneralFailure), errdefs.ErrUnavailable, errdefs.ErrUnavailable},
		{"fails and does not encrypt", fails(protocol.ResultReasonPermissionDenied), fails(protocol.ResultReasonGeneralFailure), errdefs.ErrDenied, errdefs.ErrCorrupt},
		{"has trouble with cryptography", fails(protocol.ResultReasonCryptographicFailure), works, errdefs.ErrUnavailable, nil},
		{"denies", fails(protocol.ResultReasonPermissionDenied), fails(protocol.ResultReasonPermissionDenied), errdefs.ErrDenied, errdefs.ErrDenied},
		{"does not know us", fails(protocol.ResultReasonAuthenticationNotSuccessful), fails(protocol.ResultReasonAuthenticationNotSuccessful), errdefs.ErrDenied, errdefs.ErrDenied},
		{"has no such key", fails(protocol.ResultReasonItemNotFound), fails(protocol.ResultReasonItemNotFound), errdefs.ErrDenied, errdefs.ErrDenied},
		{"lacks both", fails(protocol.ResultReasonOperationNotSupported), fails(protocol.ResultReasonOperationNotSupported), errdefs.ErrInvalid, errdefs.ErrInvalid},
	} {
		t.Run(tt.what, func(t *testing.T) {
			s := serve(t)
			kek := open(t, s.uri(t, "one"))
			key := dek(t)
			w, err := kek.Wrap(t.Context(), id, key)
			if err != nil {
				t.Fatal(err)
			}
			s.encrypt, s.decrypt = tt.encrypt, tt.decrypt
			if _, err := kek.Wrap(t.Context(), id, key); !errors.Is(err, tt.wrap) {
				t.Errorf("Wrap: %v, want %v", err, tt.wrap)
			}
			got, err := kek.Unwrap(t.Context(), id, w)
			got.Wipe()
			if !errors.Is(err, tt.unwrap) {
				t.Errorf("Unwrap: %v, want %v", err, tt.unwrap)
			}
		})
	}
}

// TestPinned: a record that names another key never makes the server use it.
func TestPinned(t *testing.T) {
	s := serve(t)
	kek, other := open(t, s.uri(t, "one")), open(t, s.uri(t, "two"))
	key := dek(t)
	w, err := other.Wrap(t.Context(), id, key)
	if err != nil {
		t.Fatal(err)
	}
	clear(s.asked)
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrDenied) || s.asked["two"] {
		t.Errorf("Unwrap with another KEK's key: %v, and the server was asked: %v", err, s.asked)
	}
	w = works(t, kek)
	w.Mechanism = "rsa-oaep"
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrCorrupt) {
		t.Errorf("Unwrap by a mechanism of somebody else: %v, want ErrCorrupt", err)
	}
}

// TestHanging: calls that get no answer hold up no other beyond its deadline,
// and leave nothing behind that a later call could take for its answer.
func TestHanging(t *testing.T) {
	s := serve(t)
	release := make(chan struct{})
	s.encrypt = func(_ context.Context, aad []byte) error {
		if strings.HasPrefix(string(aad), "hang") {
			<-release
		}
		return nil
	}
	kek := openWith(t, s.uri(t, "one"), kms.Options{Timeout: 2 * time.Second})
	works(t, kek)
	key := dek(t)

	ctx, cancel := context.WithCancel(t.Context())
	asking := make(chan error)
	go func() { _, err := kek.Wrap(ctx, "hang", key); asking <- err }()
	works(t, kek) // on another connection
	cancel()
	if err := <-asking; !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v, want context.Canceled", err)
	}
	works(t, kek)

	var wg sync.WaitGroup
	for n := range 12 { // more than there are connections
		wg.Go(func() {
			start := time.Now()
			_, err := kek.Wrap(t.Context(), fmt.Sprintf("hang-%d", n), key)
			if took := time.Since(start); !errors.Is(err, errdefs.ErrUnavailable) || took > 6*time.Second {
				t.Errorf("a call without answer: %v after %v, want ErrUnavailable within 2 s", err, took)
			}
		})
	}
	wg.Wait()
	close(release)
	for range 8 {
		works(t, kek)
	}
}

// TestNonsense: a peer that does not speak KMIP is out of order, no more.
func TestNonsense(t *testing.T) {
	ca := peers.NewCA(t)
	for what, tt := range map[string]struct {
		says []byte
		want string
	}{
		"nothing":              {nil, "EOF"},
		"HTTP":                 {[]byte("HTTP/1.1 400 Bad Request\r\n\r\nAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), "at most"},
		"a huge message":       {[]byte{0x42, 0, 0x7b, 1, 0xff, 0xff, 0xff, 0xf0}, "at most"},
		"an empty message":     {[]byte{0x42, 0, 0x7b, 1, 0, 0, 0, 0}, "no KMIP message"},
		"a message cut off":    {[]byte{0x42, 0, 0x7b, 1, 0, 0, 0, 64, 1, 2, 3}, "EOF"},
		"a short integer":      {[]byte{0x42, 0, 0x7b, 1, 0, 0, 0, 24, 0x42, 0, 0x7a, 1, 0, 0, 0, 16, 0x42, 0, 0x69, 1, 0, 0, 0, 8, 0x42, 0, 0x6a, 2, 0, 0, 0, 0}, "no KMIP message"},
		"lengths that exceed":  {[]byte{0x42, 0, 0x7b, 1, 0, 0, 0, 16, 0x42, 0, 0x7a, 1, 0, 0, 0, 8, 0x42, 0, 0x69, 1, 0xff, 0, 0, 8}, "no KMIP message"},
		"something like bytes": {bytes.Repeat([]byte{0x42}, 2<<20), "at most"},
	} {
		t.Run(what, func(t *testing.T) {
			l := listen(t, ca)
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer conn.Close()
						_, _ = conn.Read(make([]byte, 4096))
						_, _ = conn.Write(tt.says)
					}()
				}
			}()
			refused(t, open(t, uri(t, l.Addr().String(), ca, "one")), errdefs.ErrUnavailable, tt.want)
		})
	}
}
