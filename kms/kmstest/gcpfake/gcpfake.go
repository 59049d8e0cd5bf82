// Package gcpfake is a Google Cloud KMS in memory, spoken to over gRPC on
// loopback: the calls that a symmetric KEK and its life cycle need, with the
// states, limits, checksums and errors that Cloud KMS documents. Nothing is
// authorised by IAM policies; Deny takes permissions away instead.
package gcpfake

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/iam/apiv1/iampb"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Ring is the key ring that is there from the start.
const Ring = "projects/fake-project/locations/europe-west3/keyRings/cryptcsi"

// Account is the service account in the file of credentials.
const Account = "cryptcsi@fake-project.iam.gserviceaccount.com"

// Server is one service, ended by the test that started it. Its methods may be
// called concurrently.
type Server struct {
	// Endpoint is what the URI's parameter of that name says.
	Endpoint string
	// CredentialsFile names a service account. It holds no key.
	CredentialsFile string

	kmspb.UnimplementedKeyManagementServiceServer
	iampb.UnimplementedIAMPolicyServer

	t   testing.TB
	tls bool

	mu        sync.Mutex
	rings     map[string]bool
	keys      map[string]*key
	policies  map[string]*iampb.Policy
	denied    map[string]int // permission: how often
	intercept Interceptor
	calls     map[string]int
}

// Interceptor stands between client and service: serve answers the request,
// which may be changed before, and what it answers may be changed after.
type Interceptor func(ctx context.Context, method string, request proto.Message, serve func() (proto.Message, error)) (proto.Message, error)

// Start starts a service that speaks plaintext. A call that brings credentials
// fails the test.
func Start(t testing.TB) *Server {
	t.Helper()
	return start(t, nil)
}

// StartTLS starts one that demands an access token, of whatever kind, over TLS.
func StartTLS(t testing.TB, certFile, keyFile string) *Server {
	t.Helper()
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	return start(t, &cert)
}

func start(t testing.TB, cert *tls.Certificate) *Server {
	t.Helper()
	s := &Server{
		t: t, tls: cert != nil, rings: map[string]bool{Ring: true}, keys: map[string]*key{},
		policies: map[string]*iampb.Policy{}, denied: map[string]int{}, calls: map[string]int{},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	options := []grpc.ServerOption{grpc.UnaryInterceptor(s.handle)}
	s.Endpoint = "http://" + l.Addr().String()
	if s.tls {
		options = append(options, grpc.Creds(credentials.NewServerTLSFromCert(cert)))
		s.Endpoint = l.Addr().String()
	}
	server := grpc.NewServer(options...)
	kmspb.RegisterKeyManagementServiceServer(server, s)
	iampb.RegisterIAMPolicyServer(server, s)
	ended := make(chan struct{})
	go func() { _ = server.Serve(l); close(ended) }()
	t.Cleanup(func() { server.Stop(); <-ended })

	s.CredentialsFile = filepath.Join(t.TempDir(), "credentials.json")
	data, err := json.Marshal(map[string]string{"type": "service_account", "project_id": "fake-project", "client_email": Account})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.CredentialsFile, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// KeyName returns the resource name of a key in Ring.
func (s *Server) KeyName(id string) string { return Ring + "/cryptoKeys/" + id }

// URI returns the URI of a key in Ring, whether it exists or not.
func (s *Server) URI(id string) string {
	return "gcpckms://" + s.KeyName(id) + "?credentials-file=" + url.PathEscape(s.CredentialsFile) + "&endpoint=" + url.PathEscape(s.Endpoint)
}

// CreateKey makes a key in Ring, with one version and no labels, unless it is
// there, and returns its URI.
func (s *Server) CreateKey(id string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys[s.KeyName(id)] == nil {
		s.keys[s.KeyName(id)] = newKey(s.KeyName(id), &kmspb.CryptoKey{Purpose: kmspb.CryptoKey_ENCRYPT_DECRYPT})
	}
	return s.URI(id)
}

// Rotate makes a new version and makes it the primary one, as the service does
// by itself when the next rotation time has come.
func (s *Server) Rotate(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keys[s.KeyName(id)]
	k.primary = k.add()
}

// Deny takes permissions, like "cloudkms.cryptoKeys.get", away until undo is called.
func (s *Server) Deny(permissions ...string) (undo func()) {
	change := func(by int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, p := range permissions {
			s.denied[p] += by
		}
	}
	change(1)
	return sync.OnceFunc(func() { change(-1) })
}

// Intercept sets the interceptor, until undo is called; nil is none. There is
// one at a time: Hang, CorruptAnswers and DropChecksums set it too.
func (s *Server) Intercept(f Interceptor) (undo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intercept = f
	return func() { s.Intercept(nil) }
}

// Hang makes calls hang until undo is called; they end when the client gives up.
func (s *Server) Hang() (undo func()) {
	return s.Intercept(func(ctx context.Context, _ string, _ proto.Message, _ func() (proto.Message, error)) (proto.Message, error) {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	})
}

// CorruptAnswers flips a bit of every ciphertext and plaintext that is
// answered, behind the checksum's back, until undo is called.
func (s *Server) CorruptAnswers() (undo func()) {
	return s.Intercept(func(_ context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		answer, err := serve()
		switch a := answer.(type) {
		case *kmspb.EncryptResponse:
			a.Ciphertext[0] ^= 1
		case *kmspb.DecryptResponse:
			a.Plaintext[0] ^= 1
		}
		return answer, err
	})
}

// DropChecksums loses the checksums of requests on their way, so that nothing
// is verified, until undo is called.
func (s *Server) DropChecksums() (undo func()) {
	return s.Intercept(func(_ context.Context, _ string, request proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		if r, ok := request.(*kmspb.EncryptRequest); ok {
			r.PlaintextCrc32C, r.AdditionalAuthenticatedDataCrc32C = nil, nil
		}
		return serve()
	})
}

// Calls returns how often a method, like "Encrypt", was called.
func (s *Server) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Policy returns a copy of the IAM policy of a key in Ring.
func (s *Server) Policy(id string) *iampb.Policy {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.policy(s.KeyName(id))
}

// handle is around every call.
func (s *Server) handle(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	method := path.Base(info.FullMethod)
	s.mu.Lock()
	s.calls[method]++
	intercept := s.intercept
	s.mu.Unlock()
	if err := s.authenticate(ctx); err != nil {
		return nil, err
	}
	message, ok := request.(proto.Message)
	if !ok {
		return nil, status.Error(codes.Internal, "no message")
	}
	serve := func() (proto.Message, error) {
		if err := s.authorize(method, resource(message)); err != nil {
			return nil, err
		}
		answer, err := handler(ctx, request)
		if err != nil {
			return nil, err
		}
		return answer.(proto.Message), nil
	}
	if intercept != nil {
		return intercept(ctx, method, message, serve)
	}
	return serve()
}

func (s *Server) authenticate(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	token := strings.Join(md.Get("authorization"), "")
	if !s.tls && token != "" {
		s.t.Error("credentials were sent over plaintext")
	}
	if secret, ok := strings.CutPrefix(token, "Bearer "); s.tls && (!ok || secret == "") {
		return status.Error(codes.Unauthenticated, "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid authentication credential.")
	}
	return nil
}

// permission is what a method asks for.
func permission(method, resource string) string {
	kind := "cloudkms.keyRings."
	if strings.Contains(resource, "/cryptoKeys/") {
		kind = "cloudkms.cryptoKeys."
	}
	return map[string]string{
		"CreateKeyRing":                 "cloudkms.keyRings.create",
		"ListCryptoKeys":                "cloudkms.cryptoKeys.list",
		"GetCryptoKey":                  "cloudkms.cryptoKeys.get",
		"CreateCryptoKey":               "cloudkms.cryptoKeys.create",
		"UpdateCryptoKey":               "cloudkms.cryptoKeys.update",
		"UpdateCryptoKeyPrimaryVersion": "cloudkms.cryptoKeys.update",
		"ListCryptoKeyVersions":         "cloudkms.cryptoKeyVersions.list",
		"GetCryptoKeyVersion":           "cloudkms.cryptoKeyVersions.get",
		"CreateCryptoKeyVersion":        "cloudkms.cryptoKeyVersions.create",
		"UpdateCryptoKeyVersion":        "cloudkms.cryptoKeyVersions.update",
		"DestroyCryptoKeyVersion":       "cloudkms.cryptoKeyVersions.destroy",
		"RestoreCryptoKeyVersion":       "cloudkms.cryptoKeyVersions.restore",
		"Encrypt":                       "cloudkms.cryptoKeyVersions.useToEncrypt",
		"Decrypt":                       "cloudkms.cryptoKeyVersions.useToDecrypt",
		"GetIamPolicy":                  kind + "getIamPolicy",
		"SetIamPolicy":                  kind + "setIamPolicy",
	}[method]
}

// resource returns what a request is about.
func resource(request proto.Message) string {
	switch r := request.(type) {
	case interface{ GetParent() string }:
		return r.GetParent()
	case interface{ GetResource() string }:
		return r.GetResource()
	case interface{ GetName() string }:
		return r.GetName()
	case *kmspb.UpdateCryptoKeyRequest:
		return r.GetCryptoKey().GetName()
	case *kmspb.UpdateCryptoKeyVersionRequest:
		return r.GetCryptoKeyVersion().GetName()
	}
	return ""
}

func (s *Server) authorize(method, resource string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := permission(method, resource)
	if s.denied[p] > 0 {
		return status.Errorf(codes.PermissionDenied, "Permission '%s' denied on resource '%s' (or it may not exist).", p, resource)
	}
	return nil
}

func notFound(kind, name string) error {
	return status.Errorf(codes.NotFound, "%s %s not found.", kind, name)
}

func invalid(format string, args ...any) error {
	return status.Error(codes.InvalidArgument, fmt.Sprintf(format, args...))
}

// verify checks what came against its checksum and says whether there was one.
func verify(field string, data []byte, sum *wrapperspb.Int64Value) (verified bool, err error) {
	if sum == nil {
		return false, nil
	}
	if sum.GetValue() != checksum(data).GetValue() {
		return false, invalid("The checksum in field %s_crc32c did not match the data in field %s.", field, field)
	}
	return true, nil
}
