package gcpfake

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

// VM is the service account of the metadata server.
const VM = "vm@fake-project.iam.gserviceaccount.com"

// TokenServer stands for all that hand out access tokens: the metadata server,
// the security token service, OAuth 2.0. The tokens are token-1, token-2, …
type TokenServer struct {
	// URL is http://127.0.0.1:PORT.
	URL string
	// Life is a token's, in seconds; Status is answered instead of one, if not 0.
	Life, Status atomic.Int32
	// Asked is what was asked for, path and body.
	Asked chan string

	n atomic.Int32
}

// StartTokens starts a TokenServer; tokens live for an hour.
func StartTokens(t testing.TB) *TokenServer {
	t.Helper()
	s := &TokenServer{Asked: make(chan string, 100)}
	s.Life.Store(3600)
	server := httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(server.Close)
	s.URL = server.URL
	return s
}

func (s *TokenServer) serve(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.Asked <- r.URL.Path + " " + string(body)
	w.Header().Set("Content-Type", "application/json")
	if code := int(s.Status.Load()); code != 0 {
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, `{"error": "invalid_grant", "error_description": "the service's words"}`)
		return
	}
	if strings.HasSuffix(r.URL.Path, "/email") {
		_, _ = io.WriteString(w, VM+"\n")
		return
	}
	_, _ = fmt.Fprintf(w, `{"access_token": "token-%d", "expires_in": %d, "token_type": "Bearer", "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"}`, s.n.Add(1), s.Life.Load())
}

// MetadataHost is what GCE_METADATA_HOST says of it.
func (s *TokenServer) MetadataHost() string { return strings.TrimPrefix(s.URL, "http://") }

// Federated is a credentials file for workload identity: the token in
// subjectFile is exchanged here. quotaProject may be empty.
func (s *TokenServer) Federated(subjectFile, quotaProject string) string {
	return Federated(s.URL, subjectFile, quotaProject)
}

// Federated is one whose tokens are exchanged at tokenURL.
func Federated(tokenURL, subjectFile, quotaProject string) string {
	return fmt.Sprintf(`{"type": "external_account", "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k",
		"subject_token_type": "urn:ietf:params:oauth:token-type:jwt", "token_url": %q, "credential_source": {"file": %q}, "quota_project_id": %q}`, tokenURL, subjectFile, quotaProject)
}

// ServiceAccount is a service account's credentials file, with a key that
// nobody else has and tokens from tokenURL.
func ServiceAccount(t testing.TB, tokenURL string) string {
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
		"type": "service_account", "client_email": Account, "private_key_id": "1",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
		"token_uri":   tokenURL,
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// NoAccount takes the machine's own application default credentials away: no
// file, and a metadata server that is not there.
func NoAccount(t *testing.T) {
	t.Helper()
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("GCE_METADATA_HOST", "127.0.0.1:1")
}
