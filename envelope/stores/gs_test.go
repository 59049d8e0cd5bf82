package stores_test

import (
	"context"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/envelope/stores"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

func writeFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// TestGSCredentials: what is refused is refused when the store is opened, at
// once and without a word of the file.
func TestGSCredentials(t *testing.T) {
	gcpfake.NoAccount(t)
	pipe := filepath.Join(t.TempDir(), "pipe")
	must(t, syscall.Mkfifo(pipe, 0o600))
	const program = `{"type": "external_account", "credential_source": {"executable": {"command": "/bin/S3CR3T"}}}`
	for _, tt := range []struct{ file, want string }{
		{pipe, "regular file"},
		{writeFile(t, "S3CR3T"), "is no JSON"},
		{writeFile(t, program), "run a program"},
		{writeFile(t, `{"type": "impersonated_service_account", "source_credentials": `+program+`}`), "run a program"},
		{writeFile(t, `{"type": "service_account", "client_email": "a@b", "private_key": "MIIS3CR3T"}`), "private_key does not parse"},
	} {
		_, err := stores.Mux().Open(t.Context(), "gs://bucket?credentials-file="+tt.file)
		mustBe(t, err, errdefs.ErrInvalid, tt.want, tt.file)
		if err != nil && strings.Contains(err.Error(), "S3CR3T") {
			t.Errorf("shows a secret: %v", err)
		}
	}

	// Nothing but the file that is named is looked at, and nobody is asked.
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", pipe)
	server := gcpfake.StartTokens(t)
	t.Setenv("GCE_METADATA_HOST", server.MetadataHost())
	open(t, "gs://bucket?credentials-file="+writeFile(t, gcpfake.ServiceAccount(t, server.URL)))
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	open(t, "gs://bucket")
	if n := len(server.Asked); n != 0 {
		t.Errorf("opening asked %d times", n)
	}
}

// TestGSNoToken: without a token nothing is sent, and the error has the class
// of what the token service said.
func TestGSNoToken(t *testing.T) {
	gcpfake.NoAccount(t)
	server := gcpfake.StartTokens(t)
	account := writeFile(t, gcpfake.ServiceAccount(t, server.URL))
	for _, tt := range []struct {
		status int
		want   error
	}{{400, errdefs.ErrDenied}, {307, errdefs.ErrDenied}, {429, errdefs.ErrUnavailable}, {500, errdefs.ErrUnavailable}} {
		server.Status.Store(int32(tt.status))
		store := open(t, "gs://bucket?credentials-file="+account)
		_, _, err := store.Read(t.Context(), "one")
		mustBe(t, err, tt.want, account, "the service's words")
		mustBe(t, store.Create(t.Context(), "one", []byte("x")), tt.want, account)
	}
	t.Setenv("GCE_METADATA_HOST", server.MetadataHost())
	_, _, err := open(t, "gs://bucket").Read(t.Context(), "one")
	mustBe(t, err, errdefs.ErrUnavailable, "GOOGLE_APPLICATION_CREDENTIALS")

	t.Setenv("GCE_METADATA_HOST", peers.Silent(t))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, _, err = open(t, "gs://bucket").Read(ctx, "one")
	mustBe(t, err, context.DeadlineExceeded)
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// google is a bucket as Google serves it: over TLS and to those who bring the
// token that is good. It is behind a proxy.
type google struct {
	*gcpfake.Proxy
	tokens  *gcpfake.TokenServer
	bucket  string
	storage http.Handler

	mu   sync.Mutex
	seen []http.Header
	good func(authorization string) bool
}

func startGoogle(t *testing.T) *google {
	t.Helper()
	peer := peers.FakeGCS(t)
	to, err := url.Parse(peer.URL)
	must(t, err)
	g := &google{tokens: gcpfake.StartTokens(t), bucket: peer.Bucket(t)}
	g.storage = &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }}
	g.Proxy = gcpfake.StartProxy(t, g)
	return g
}

// ServeHTTP is the storage API.
func (g *google) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.seen = append(g.seen, r.Header.Clone())
	good := g.good(r.Header.Get("Authorization"))
	g.mu.Unlock()
	if !good {
		http.Error(w, `{"error": {"code": 401, "message": "Invalid Credentials"}}`, http.StatusUnauthorized)
		return
	}
	g.storage.ServeHTTP(w, r)
}

// begin says what the service accepts from now on, and returns the headers of
// what it was asked until now.
func (g *google) begin(good func(string) bool) []http.Header {
	g.mu.Lock()
	defer g.mu.Unlock()
	seen := g.seen
	g.seen, g.good = nil, good
	return seen
}

const childURI = "STORES_TEST_URI"

// TestGSBehindProxy: another process finds the service through HTTPS_PROXY,
// with tokens, in the universe that the credentials belong to.
func TestGSBehindProxy(t *testing.T) {
	if uri := os.Getenv(childURI); uri != "" {
		store := open(t, uri)
		must(t, store.Create(t.Context(), "one", []byte("first")))
		data, version, err := store.Read(t.Context(), "one")
		if err != nil || string(data) != "first" {
			t.Fatalf("%q, %v", data, err)
		}
		must(t, store.Replace(t.Context(), "one", []byte("second"), version))
		_, version, err = store.Read(t.Context(), "one")
		must(t, err)
		must(t, store.Delete(t.Context(), "one", version))
		return
	}
	g := startGoogle(t)
	elsewhere := strings.Replace(gcpfake.ServiceAccount(t, g.tokens.URL), "{", `{"universe_domain": "example.com",`, 1)
	for name, tt := range map[string]struct {
		query, project string
		good           func(string) bool
	}{
		"endpoint": {
			"?endpoint=https://storage.example.com&credentials-file=" + writeFile(t, g.tokens.Federated(writeFile(t, "SUBJ3CT"), "payer")), "payer",
			func(token string) bool { return token == "Bearer token-1" },
		},
		"universe": {
			"?credentials-file=" + writeFile(t, elsewhere), "",
			func(token string) bool { return strings.Count(token, ".") == 2 }, // signed by the account: there is no other way
		},
	} {
		t.Run(name, func(t *testing.T) {
			g.begin(tt.good)
			if out, err := child(t, g, "^TestGSBehindProxy$", tt.query); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			seen := g.begin(nil)
			for _, header := range seen {
				if got := header.Get("x-goog-user-project"); got != tt.project {
					t.Errorf("quota project %q, want %q", got, tt.project)
				}
			}
			if hosts := g.Hosts(); len(seen) < 5 || slices.ContainsFunc(hosts, func(h string) bool { return h != "storage.example.com:443" }) {
				t.Errorf("%d requests by way of %v", len(seen), hosts)
			}
		})
	}
}

// child runs a test in another process, which opens the bucket behind g.
func child(t *testing.T, g *google, test, query string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run="+test)
	// Nothing in the environment takes requests, and tokens, elsewhere.
	cmd.Env = slices.Concat(os.Environ(), g.Env, []string{"STORAGE_EMULATOR_HOST=127.0.0.1:1", childURI + "=gs://" + g.bucket + query})
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestGSRotation: after a token was refused the credentials file is read again.
func TestGSRotation(t *testing.T) {
	if uri := os.Getenv(childURI); uri != "" {
		u, err := url.Parse(uri)
		must(t, err)
		store := open(t, uri)
		must(t, store.Create(t.Context(), "kept", []byte("x")))
		must(t, os.Rename(u.Query().Get("credentials-file")+".next", u.Query().Get("credentials-file")))
		_, _, err = store.Read(t.Context(), "kept")
		mustBe(t, err, errdefs.ErrDenied, "not accepted")
		_, _, err = store.Read(t.Context(), "kept")
		must(t, err)
		return
	}
	g := startGoogle(t)
	file := writeFile(t, gcpfake.ServiceAccount(t, g.tokens.URL+"/old"))
	must(t, os.WriteFile(file+".next", []byte(gcpfake.ServiceAccount(t, g.tokens.URL+"/new")), 0o600))
	asked := 0
	g.begin(func(token string) bool {
		asked++
		return asked == 1 && token == "Bearer token-1" || token == "Bearer token-2"
	})
	if out, err := child(t, g, "^TestGSRotation$", "?endpoint=https://storage.example.com&credentials-file="+file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"/old ", "/new "} {
		if got := <-g.tokens.Asked; !strings.HasPrefix(got, want) {
			t.Errorf("a token from %.20q, want %s", got, want)
		}
	}
}
