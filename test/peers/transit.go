package peers

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Vault is a server that speaks the HTTP API of Vault and OpenBao.
type Vault struct {
	// Addr is host:port, CA signed the server's certificate.
	Addr string
	CA   *CA
	// Token is the root token, TokenFile holds it.
	Token, TokenFile string

	client *http.Client
	scheme string
}

// TransitServer is OpenBao's transit engine behind a small server of ours, in
// memory. Transit engines are mounted at transit and team/kms, and in the
// namespace team-a at transit.
type TransitServer struct{ Vault }

// Transit starts one, with TLS.
func Transit(t testing.TB) *TransitServer {
	t.Helper()
	s := &TransitServer{newVault(t, "https")}
	cert, key := s.CA.Issue(t, "transit")
	s.start(t, "-cert", cert, "-key", key, "-client-ca", s.CA.File)
	return s
}

// PlainTransit starts one without TLS.
func PlainTransit(t testing.TB) *TransitServer {
	t.Helper()
	s := &TransitServer{newVault(t, "http")}
	s.start(t)
	return s
}

func (s *TransitServer) start(t testing.TB, args ...string) {
	t.Helper()
	s.Token = "root-token-of-a-test"
	s.TokenFile = tokenFile(t, s.Token)
	args = append(args, "-addr", s.Addr, "-mount", "transit", "-mount", "team/kms", "-mount", "team-a=transit")
	cmd := exec.Command(Program(t, "transit"), args...)
	cmd.Env = append(os.Environ(), "ROOT_TOKEN="+s.Token)
	Start(t, s.Addr, cmd)
}

// Deny refuses a path, such as transit/encrypt/kek, to every token, or no more.
func (s *TransitServer) Deny(t testing.TB, path string, on bool) {
	t.Helper()
	s.Call(t, "PUT", "/test/deny", map[string]any{"name": path, "on": on})
}

// Seal seals the server, or unseals it.
func (s *TransitServer) Seal(t testing.TB, on bool) {
	t.Helper()
	s.Call(t, "PUT", "/test/seal", map[string]any{"on": on})
}

// AddToken makes a token that may do everything, or takes it away.
func (s *TransitServer) AddToken(t testing.TB, token string, on bool) {
	t.Helper()
	s.Call(t, "PUT", "/test/token", map[string]any{"name": token, "on": on})
}

// RevokeTokens makes all tokens but the root token worthless.
func (s *TransitServer) RevokeTokens(t testing.TB) {
	t.Helper()
	s.Call(t, "PUT", "/test/revoke", map[string]any{})
}

// TransitLogin is what an auth mount accepts, and the tokens that it gives.
type TransitLogin struct {
	Kind             string // approle, kubernetes, jwt, cert
	Namespace        string
	RoleID, SecretID string // approle
	Role             string // kubernetes, jwt; cert: the common name
	JWT              string // kubernetes, jwt
	TTL              int    // seconds; 0 is for ever
	RenewTTL         int    // seconds that a renewal gives; 0: tokens cannot be renewed
}

// Login mounts an auth method, or changes it.
func (s *TransitServer) Login(t testing.TB, mount string, l TransitLogin) {
	t.Helper()
	s.Call(t, "PUT", "/test/login", map[string]any{"name": mount, "login": l})
}

// Count returns how many requests there were for a path.
func (s *TransitServer) Count(t testing.TB, path string) int {
	t.Helper()
	n, _ := s.Call(t, "GET", "/test/counts", nil)[path].(float64)
	return int(n)
}

func newVault(t testing.TB, scheme string) Vault {
	t.Helper()
	v := Vault{Addr: Addr(t), CA: NewCA(t), scheme: scheme}
	pem, err := os.ReadFile(v.CA.File)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	v.client = &http.Client{Transport: transport, Timeout: 30 * time.Second}
	return v
}

func tokenFile(t testing.TB, token string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// URI opens a key of the engine mounted at transit, with the root token.
func (v *Vault) URI(key string) string {
	return v.Bare("transit/"+key) + "&token-file=" + v.TokenFile
}

// Bare is the URI of a path without credentials.
func (v *Vault) Bare(path string) string {
	if v.scheme == "http" {
		return fmt.Sprintf("transit://%s/%s?plaintext=true", v.Addr, path)
	}
	return fmt.Sprintf("transit://%s/%s?ca-file=%s", v.Addr, path, v.CA.File)
}

// CreateKey makes a transit key, with parameters or nil.
func (v *Vault) CreateKey(t testing.TB, key string, params map[string]any) {
	t.Helper()
	v.Call(t, "PUT", "/v1/transit/keys/"+key, params)
}

// RotateKey makes a new version of a transit key.
func (v *Vault) RotateKey(t testing.TB, key string) {
	t.Helper()
	v.Call(t, "PUT", "/v1/transit/keys/"+key+"/rotate", nil)
}

// Call sends a request with the root token and returns the answer's data; the
// whole answer where it has none.
func (v *Vault) Call(t testing.TB, method, path string, in map[string]any) map[string]any {
	t.Helper()
	status, out := v.Try(t, method, path, in)
	if status >= 300 {
		t.Fatalf("%s %s: status %d: %v", method, path, status, out["errors"])
	}
	if data, ok := out["data"].(map[string]any); ok {
		return data
	}
	return out
}

// Try is Call for what may fail: it returns the status and the whole answer.
func (v *Vault) Try(t testing.TB, method, path string, in map[string]any) (int, map[string]any) {
	t.Helper()
	var body io.Reader = http.NoBody
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, v.scheme+"://"+v.Addr+path, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Vault-Token", v.Token)
	resp, err := v.client.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	out := map[string]any{}
	if err := json.NewDecoder(resp.Body).Decode(&out); err != nil && err != io.EOF {
		t.Fatalf("%s %s: status %d: %v", method, path, resp.StatusCode, err)
	}
	return resp.StatusCode, out
}
