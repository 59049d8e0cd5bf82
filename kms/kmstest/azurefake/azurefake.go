// Package azurefake is a Key Vault or a Managed HSM on loopback, with the token
// service that guards it: HTTPS, authentication challenges, real cryptography,
// small pages, and the errors that Azure documents. It holds what tests need to
// get in its way: permissions taken away, throttling, silence.
package azurefake

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	// Tenant is where tokens are asked for.
	Tenant = "11111111-2222-3333-4444-555555555555"
	// Client is who may ask for them.
	Client = "66666666-7777-8888-9999-000000000000"
	// retention is how long a deleted key can be recovered.
	retention = 90 * 24 * time.Hour
)

// Server is one vault. Its methods may be called concurrently with requests.
type Server struct {
	server *httptest.Server
	hsm    bool
	files  string
	ended  chan struct{} // closed with the test

	mu        sync.Mutex
	moduli    map[int]*rsa.PrivateKey // by their bits
	exponent  int
	keys      map[string]*key
	deleted   map[string]*key
	denied    map[string]bool
	hanging   map[string]bool
	failures  []failure
	calls     []string
	secret    string
	federated string
	trusted   *x509.Certificate
	tokens    map[string]time.Time // when each expires
	lifetime  time.Duration
}

// failure is an answer to be given instead of the right one.
type failure struct {
	status     int
	retryAfter string
}

// Start starts a Key Vault or a Managed HSM without keys. It ends with the test.
func Start(t testing.TB, hsm bool) *Server {
	t.Helper()
	s := &Server{
		hsm: hsm, files: t.TempDir(), ended: make(chan struct{}), lifetime: time.Hour, moduli: map[int]*rsa.PrivateKey{}, exponent: 1 << 16,
		keys: map[string]*key{}, deleted: map[string]*key{}, denied: map[string]bool{}, hanging: map[string]bool{}, tokens: map[string]time.Time{},
	}
	s.server = httptest.NewTLSServer(s)
	t.Cleanup(func() {
		close(s.ended)
		s.server.CloseClientConnections()
		s.server.Close()
	})
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.server.Certificate().Raw})
	if err := os.WriteFile(s.CAFile(), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	s.RotateSecret(t)
	return s
}

// Host is the vault's host and port.
func (s *Server) Host() string { return strings.TrimPrefix(s.server.URL, "https://") }

// CAFile is the file of the certificate to trust.
func (s *Server) CAFile() string { return filepath.Join(s.files, "ca.pem") }

// SecretFile is the file of the client secret.
func (s *Server) SecretFile() string { return filepath.Join(s.files, "client-secret") }

// Resource is the audience of the vault's tokens.
func (s *Server) Resource() string {
	if s.hsm {
		return "https://managedhsm.azure.net"
	}
	return "https://vault.azure.net"
}

// URI returns the URI of a key, which need not exist, with all that is needed
// to open it.
func (s *Server) URI(key string) string {
	return s.URIWith(key, "tenant-id", Tenant, "client-id", Client, "client-secret-file", s.SecretFile())
}

// URIWith is URI with other credentials: pairs of parameter and value.
func (s *Server) URIWith(key string, pairs ...string) string {
	pairs = append(pairs, "ca-file", s.CAFile(), "authority-host", s.server.URL, "resource", s.Resource())
	var params []string
	for pair := range slices.Chunk(pairs, 2) {
		params = append(params, pair[0]+"="+strings.ReplaceAll(url.PathEscape(pair[1]), "&", "%26"))
	}
	return "azurekeyvault://" + s.Host() + "/keys/" + key + "?" + strings.Join(params, "&")
}

// CreateKey makes a key, or a new version of it, with the key operations that
// serving needs: RSA of 2048 bits, or oct-HSM in a Managed HSM.
func (s *Server) CreateKey(t testing.TB, name string) {
	t.Helper()
	n := newKey{Kty: "RSA", KeySize: 2048}
	if s.hsm {
		n = newKey{Kty: "oct-HSM", KeySize: 256}
	}
	s.create(t, name, n)
}

// CreateKeyFor makes an oct-HSM key that allows only those operations.
func (s *Server) CreateKeyFor(t testing.TB, name string, operations ...string) {
	t.Helper()
	s.create(t, name, newKey{Kty: "oct-HSM", KeySize: 256, KeyOps: operations})
}

func (s *Server) create(t testing.TB, name string, n newKey) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.version(n)
	if err != nil {
		t.Fatal(err)
	}
	s.add(name, v)
}

// Rotate makes a new version of a key.
func (s *Server) Rotate(t testing.TB, name string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.rotate(name); err != nil {
		t.Fatal(err)
	}
}

// SetEnabled enables or disables all versions of a key.
func (s *Server) SetEnabled(name string, enabled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.keys[name].versions {
		v.enabled = enabled
	}
}

// Tags returns those of a key's current version.
func (s *Server) Tags(name string) map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.keys[name].current().tags)
}

// SetTags replaces those of a key's current version.
func (s *Server) SetTags(name string, tags map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[name].current().tags = maps.Clone(tags)
}

// Deny takes a permission away, by its name in access policies: "keys/wrapKey".
func (s *Server) Deny(permission string) (undo func()) {
	if _, ok := actions[permission]; !ok {
		panic("no such permission: " + permission)
	}
	return s.set(func() { s.denied[permission] = true }, func() { delete(s.denied, permission) })
}

// Hang leaves requests without an answer whose path contains part: all for "/",
// those for tokens for "/token".
func (s *Server) Hang(part string) (undo func()) {
	return s.set(func() { s.hanging[part] = true }, func() { delete(s.hanging, part) })
}

func (s *Server) hangs(path string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for part := range s.hanging {
		if strings.Contains(path, part) {
			return true
		}
	}
	return false
}

func (s *Server) set(do, undo func()) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	do()
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		undo()
	}
}

// Fail answers the next n authorised requests with a status; retryAfter, in
// seconds, goes along unless it is empty.
func (s *Server) Fail(n, status int, retryAfter string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range n {
		s.failures = append(s.failures, failure{status, retryAfter})
	}
}

// Calls returns the authorised requests so far, as "POST /keys/name/…", without
// their query.
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Secret returns the client secret.
func (s *Server) Secret() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.secret
}

// RotateSecret replaces the client secret, in the token service and in its file.
func (s *Server) RotateSecret(t testing.TB) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secret = "secret+" + rand.Text()
	if err := os.WriteFile(s.SecretFile(), []byte(s.secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// RevokeTokens makes all tokens expire at once. Tokens that are issued later
// live for lifetime.
func (s *Server) RevokeTokens(lifetime time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
	s.lifetime = lifetime
}

// Trust accepts assertions signed with a certificate's key, and a federated token.
func (s *Server) Trust(cert *x509.Certificate, federated string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trusted, s.federated = cert, federated
}

// ServeHTTP is part of http.Handler. It takes paths as they come: clients send
// empty elements where they mean the current version.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.hangs(r.URL.Path) {
		select {
		case <-r.Context().Done():
		case <-s.ended: // a client that goes away is not noticed before its request is read
		}
		return
	}
	switch path := r.URL.Path; {
	case strings.HasSuffix(path, "/v2.0/.well-known/openid-configuration"):
		s.discovery(w)
	case strings.HasSuffix(path, "/oauth2/v2.0/token") && r.Method == http.MethodPost:
		s.token(w, r)
	case !s.authorised(r):
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer authorization="%s/%s", resource="%s"`, s.server.URL, Tenant, s.Resource()))
		answerError(w, problem{http.StatusUnauthorized, "Unauthorized", "AKV10000: Request is missing a Bearer or PoP token.", ""})
	default:
		s.vault(w, r)
	}
}

// newID returns 128 random bits in hex.
func newID() string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails, see crypto/rand
	return hex.EncodeToString(id)
}
