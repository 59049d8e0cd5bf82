package gcpckms_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

func mask(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// noAccount takes the machine's own application default credentials away: no
// file, and a metadata server that is not there.
func noAccount(t *testing.T) {
	t.Helper()
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("GCE_METADATA_HOST", peers.Addr(t))
}

// serviceAccount returns a service account file with a key that nobody else has.
func serviceAccount(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]string{
		"type": "service_account", "client_email": gcpfake.Account, "private_key_id": "1",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"token_uri":   "https://nobody.invalid/token",
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// secure is a service over TLS, with the URI of a key in it but for its
// credentials, and what it is sent as authorization.
type secure struct {
	*gcpfake.Server
	uri string

	mu   sync.Mutex
	sent []metadata.MD
}

func startSecure(t *testing.T) *secure {
	t.Helper()
	ca := peers.NewCA(t)
	cert, certKey := ca.Issue(t, "localhost")
	s := &secure{Server: gcpfake.StartTLS(t, cert, certKey)}
	s.CreateKey("one")
	s.uri = "gcpckms://" + s.KeyName("one") + "?endpoint=" + s.Endpoint + "&ca-file=" + url.PathEscape(ca.File)
	s.Intercept(func(ctx context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		s.mu.Lock()
		s.sent = append(s.sent, md)
		s.mu.Unlock()
		return serve()
	})
	return s
}

// last returns a header of the last call.
func (s *secure) last(t *testing.T, name string) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.sent) == 0 {
		t.Fatal("no call came through")
	}
	return strings.Join(s.sent[len(s.sent)-1].Get(name), "")
}

// tokenServer answers tokens, one after the other, and says who asked how.
type tokenServer struct {
	*httptest.Server
	n      atomic.Int32
	life   atomic.Int32 // of a token, in seconds
	status atomic.Int32 // instead of a token, if not 0
	bodies chan string  // of the requests
}

func startTokens(t *testing.T) *tokenServer {
	t.Helper()
	s := &tokenServer{bodies: make(chan string, 100)}
	s.life.Store(3600)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.bodies <- r.URL.Path + " " + string(body)
		if code := int(s.status.Load()); code != 0 {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, `{"error": "invalid_grant", "error_description": "the service's words"}`)
			return
		}
		if strings.HasSuffix(r.URL.Path, "/email") {
			_, _ = io.WriteString(w, "vm@fake-project.iam.gserviceaccount.com\n")
			return
		}
		_, _ = fmt.Fprintf(w, `{"access_token": "token-%d", "expires_in": %d, "token_type": "Bearer", "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}`, s.n.Add(1), s.life.Load())
	}))
	t.Cleanup(s.Close)
	return s
}

// TestServiceAccount: a JWT signed by the account's key is the token; nobody
// is called for it, and a new key in the file is used when the old is refused.
func TestServiceAccount(t *testing.T) {
	s := startSecure(t)
	file := write(t, serviceAccount(t))
	kek := opened(t, s.uri+"&credentials-file="+file)
	mustUnwrap(t, kek, mustWrap(t, kek))
	token := s.last(t, "authorization")
	parts := strings.Split(strings.TrimPrefix(token, "Bearer "), ".")
	if len(parts) != 3 {
		t.Fatalf("authorization with %d parts", len(parts))
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || !strings.Contains(string(claims), gcpfake.Account) || !strings.Contains(string(claims), "auth/cloudkms") {
		t.Errorf("claims %s, %v", claims, err)
	}
	mustWrap(t, kek)
	if again := s.last(t, "authorization"); again != token {
		t.Error("the token is not kept")
	}

	if err := os.WriteFile(file, []byte(serviceAccount(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := s.Intercept(func(ctx context.Context, _ string, _ proto.Message, serve func() (proto.Message, error)) (proto.Message, error) {
		if md, _ := metadata.FromIncomingContext(ctx); md.Get("authorization")[0] == token {
			return nil, status.Error(codes.Unauthenticated, "the key was deleted")
		}
		return serve()
	})
	defer stop()
	if _, err := kek.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), file) {
		t.Errorf("a token that is refused: %v, want ErrDenied that names the file", err)
	}
	mustWrap(t, kek)
}

// TestWorkloadIdentity: a token from a file is exchanged, and read again.
func TestWorkloadIdentity(t *testing.T) {
	s, sts := startSecure(t), startTokens(t)
	subject := write(t, "SUBJ3CT-1")
	file := write(t, fmt.Sprintf(`{"type": "external_account", "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k",
		"subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "token_url": %q, "credential_source": {"file": %q}, "quota_project_id": "payer"}`, sts.URL+"/sts", subject))
	kek := opened(t, s.uri+"&credentials-file="+file)
	if len(sts.bodies) != 0 {
		t.Error("opening asked for a token")
	}
	mustWrap(t, kek)
	if got, payer := s.last(t, "authorization"), s.last(t, "x-goog-user-project"); got != "Bearer token-1" || payer != "payer" {
		t.Errorf("authorization %q, quota project %q", got, payer)
	}
	if body := <-sts.bodies; !strings.Contains(body, "subject_token=SUBJ3CT-1") {
		t.Errorf("exchanged %q", body)
	}

	// Another process finds the next token in the file.
	if err := os.WriteFile(subject, []byte("SUBJ3CT-2"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustWrap(t, opened(t, s.uri+"&credentials-file="+file))
	if body := <-sts.bodies; !strings.Contains(body, "subject_token=SUBJ3CT-2") {
		t.Errorf("exchanged %q", body)
	}
}

// TestNoToken: who refuses is told from who is not there, and no token shows.
func TestNoToken(t *testing.T) {
	noAccount(t)
	s, sts := startSecure(t), startTokens(t)
	account := func(tokenURL, subject string) string {
		return write(t, fmt.Sprintf(`{"type": "external_account", "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k",
			"subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "token_url": %q, "credential_source": {"file": %q}}`, tokenURL, subject))
	}
	subject := write(t, "S3CR3T")
	for _, tt := range []struct {
		name, query string
		status      int
		want        error
		text        string
	}{
		{"refused", "&credentials-file=" + account(sts.URL, subject), 400, errdefs.ErrDenied, "the service's words"},
		{"overloaded", "&credentials-file=" + account(sts.URL, subject), 429, errdefs.ErrUnavailable, "429"},
		{"broken", "&credentials-file=" + account(sts.URL, subject), 500, errdefs.ErrUnavailable, "500"},
		{"redirected", "&credentials-file=" + account(sts.URL, subject), 307, errdefs.ErrDenied, "307"},
		{"not there", "&credentials-file=" + account("http://"+peers.Addr(t), subject), 0, errdefs.ErrUnavailable, "refused"},
		{"silent", "&credentials-file=" + account("http://"+peers.Silent(t), subject), 0, errdefs.ErrUnavailable, "no answer within"},
		{"no subject token", "&credentials-file=" + account(sts.URL, "/nowhere/token"), 0, errdefs.ErrDenied, "/nowhere/token"},
		{"no metadata server", "", 0, errdefs.ErrUnavailable, "GOOGLE_APPLICATION_CREDENTIALS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sts.status.Store(int32(tt.status))
			kek := openWith(t, s.uri+tt.query, kms.Options{Timeout: 500 * time.Millisecond})
			defer kek.Close()
			_, err := kek.Wrap(t.Context(), id, random(t))
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("Wrap: %v, want %v with %q", err, tt.want, tt.text)
			}
			if err != nil && strings.Contains(err.Error(), "S3CR3T") {
				t.Errorf("shows a token: %v", err)
			}
		})
	}
}

// TestMetadataServer: without any file the VM's account is used, and a
// metadata server that is late is waited for by trying again.
func TestMetadataServer(t *testing.T) {
	noAccount(t)
	s, server := startSecure(t), startTokens(t)
	kek := opened(t, s.uri)
	if _, err := kek.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatalf("nobody there: %v", err)
	}
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(server.URL, "http://"))
	mustWrap(t, kek)
	mustWrap(t, kek)
	if got := s.last(t, "authorization"); got != "Bearer token-1" {
		t.Errorf("authorization %q", got)
	}
	if asked := <-server.bodies; !strings.HasPrefix(asked, "/computeMetadata/v1/instance/service-accounts/default/token") {
		t.Errorf("asked for %q", asked)
	}
	server.status.Store(404)
	other := opened(t, s.uri)
	if _, err := other.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("a VM without an account: %v, want ErrDenied", err)
	}
}

// TestRenewal: a token is renewed minutes before it expires, and used for as
// long as it is good where that fails.
func TestRenewal(t *testing.T) {
	noAccount(t)
	s, server := startSecure(t), startTokens(t)
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(server.URL, "http://"))
	server.life.Store(100)
	kek := opened(t, s.uri)
	for _, tt := range []struct {
		status int32
		want   string
		asked  int
	}{
		{0, "token-1", 1},
		{0, "token-2", 2},
		{503, "token-2", 3},
		{503, "token-2", 3}, // not at every call
	} {
		server.status.Store(tt.status)
		mustWrap(t, kek)
		if got := s.last(t, "authorization"); got != "Bearer "+tt.want || len(server.bodies) != tt.asked {
			t.Errorf("authorization %q after %d requests, want %s after %d", got, len(server.bodies), tt.want, tt.asked)
		}
	}

	server.status.Store(0)
	server.life.Store(1)
	other := opened(t, s.uri)
	mustWrap(t, other)
	server.status.Store(404)
	time.Sleep(1100 * time.Millisecond) // until it has expired
	if _, err := other.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("with an expired token: %v, want ErrDenied", err)
	}
}

// TestEnvironmentFile: application default credentials in a file.
func TestEnvironmentFile(t *testing.T) {
	noAccount(t)
	s := startSecure(t)
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", write(t, serviceAccount(t)))
	mustWrap(t, opened(t, s.uri))

	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	home := filepath.Join(os.Getenv("HOME"), ".config", "gcloud")
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "application_default_credentials.json"), []byte(serviceAccount(t)), 0o600); err != nil {
		t.Fatal(err)
	}
	mustWrap(t, opened(t, s.uri))
}

// TestWrongCA: a server that the CA file does not vouch for gets no token.
func TestWrongCA(t *testing.T) {
	s := startSecure(t)
	uri := "gcpckms://" + s.KeyName("one") + "?endpoint=" + s.Endpoint + "&credentials-file=" + write(t, serviceAccount(t))
	for _, ca := range []string{"", "&ca-file=" + peers.NewCA(t).File} {
		kek := opened(t, uri+ca)
		if _, err := kek.Wrap(t.Context(), id, random(t)); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("%q: %v, want ErrUnavailable for the certificate", ca, err)
		}
	}
	if len(s.sent) != 0 {
		t.Errorf("%d calls came through", len(s.sent))
	}
}

// forward serves an address by passing connections on to another.
func forward(t *testing.T, from, to string) {
	t.Helper()
	l, err := net.Listen("tcp", from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				return
			}
			context.AfterFunc(ctx, func() { a.Close(); b.Close() })
			wg.Go(func() { _, _ = io.Copy(a, b) })
			wg.Go(func() { _, _ = io.Copy(b, a) })
		}
	})
}
