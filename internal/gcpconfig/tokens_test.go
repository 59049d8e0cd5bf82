package gcpconfig_test

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/gcpconfig"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

func selfSigned() gcpconfig.Need { return needs()[0] }
func exchanged() gcpconfig.Need  { return needs()[1] }

// publicKey returns that of a service account's file.
func publicKey(t *testing.T, account string) *rsa.PublicKey {
	t.Helper()
	block, _ := pem.Decode([]byte(fieldsOf(t, account)["private_key"]))
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return &key.(*rsa.PrivateKey).PublicKey
}

// bearer returns the token of a call.
func bearer(t *testing.T, from *gcpconfig.Tokens) string {
	t.Helper()
	headers, err := from.Headers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	token, ok := strings.CutPrefix(headers["authorization"], "Bearer ")
	if !ok {
		t.Errorf("headers %v", headers)
	}
	return token
}

// checkJWT checks a JWT's signature by the account's key and the words in it.
func checkJWT(t *testing.T, token, account string, words ...string) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("a JWT of %d parts", len(parts))
	}
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if err := rsa.VerifyPKCS1v15(publicKey(t, account), crypto.SHA256, sum[:], signature); err != nil {
		t.Errorf("the signature: %v", err)
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	for _, word := range words {
		if err != nil || !strings.Contains(string(claims), word) {
			t.Errorf("claims %s, %v, want %s in them", claims, err, word)
		}
	}
}

// TestSelfSigned: what the account's key signs is the token, nobody is asked
// for it, and after Forget the key is the one that the file holds by then.
func TestSelfSigned(t *testing.T) {
	one, two := gcpfake.ServiceAccount(t, "https://nobody.invalid/token"), gcpfake.ServiceAccount(t, "https://nobody.invalid/token")
	file := write(t, one)
	from := mustTokens(t, file, selfSigned())
	token := bearer(t, from)
	checkJWT(t, token, one, gcpfake.Account, "the-scope")
	rewrite(t, file, two)
	if bearer(t, from) != token {
		t.Error("the token is not kept")
	}
	from.Forget()
	checkJWT(t, bearer(t, from), two, gcpfake.Account)
}

// TestExchanged: what the account's key signs is exchanged for the token.
func TestExchanged(t *testing.T) {
	server := gcpfake.StartTokens(t)
	account := gcpfake.ServiceAccount(t, server.URL+"/token")
	file := write(t, account)
	from := mustTokens(t, file, exchanged())
	if len(server.Asked) != 0 {
		t.Error("it was asked for a token before there was a call")
	}
	for range 2 {
		if token := bearer(t, from); token != "token-1" {
			t.Errorf("token %q, want the first one", token)
		}
	}
	path, body, _ := strings.Cut(<-server.Asked, " ")
	form, err := url.ParseQuery(body)
	if err != nil || path != "/token" {
		t.Errorf("asked %s for %s, %v", path, body, err)
	}
	checkJWT(t, form.Get("assertion"), account, gcpfake.Account, "the-scope", server.URL)

	rotated := gcpfake.ServiceAccount(t, server.URL+"/rotated")
	rewrite(t, file, rotated)
	from.Forget()
	if token := bearer(t, from); token != "token-2" {
		t.Errorf("after rotation: token %q", token)
	}
	if asked := <-server.Asked; !strings.HasPrefix(asked, "/rotated ") {
		t.Errorf("asked for %q", asked)
	}
}

// TestWorkloadIdentity: a token from a file is exchanged, and read again.
func TestWorkloadIdentity(t *testing.T) {
	server := gcpfake.StartTokens(t)
	subject := write(t, "SUBJ3CT-1")
	from := mustTokens(t, write(t, server.Federated(subject, "payer")), selfSigned())
	if len(server.Asked) != 0 {
		t.Error("it was asked for a token before there was a call")
	}
	headers, err := from.Headers(t.Context())
	if err != nil || headers["authorization"] != "Bearer token-1" || headers["x-goog-user-project"] != "payer" || len(headers) != 2 {
		t.Errorf("headers %v, %v", headers, err)
	}
	if asked := <-server.Asked; !strings.Contains(asked, "subject_token=SUBJ3CT-1") {
		t.Errorf("exchanged %q", asked)
	}
	rewrite(t, subject, "SUBJ3CT-2")
	from.Forget()
	bearer(t, from)
	if asked := <-server.Asked; !strings.Contains(asked, "subject_token=SUBJ3CT-2") {
		t.Errorf("exchanged %q", asked)
	}
}

// TestNoToken: who refuses is told from who is not there, and no token shows.
func TestNoToken(t *testing.T) {
	gcpfake.NoAccount(t)
	server := gcpfake.StartTokens(t)
	subject := write(t, "S3CR3T")
	federated := write(t, server.Federated(subject, ""))
	account := write(t, gcpfake.ServiceAccount(t, server.URL+"/S3CR3T?key=S3CR3T"))
	elsewhere := func(tokenURL, subject string) string { return write(t, gcpfake.Federated(tokenURL, subject, "")) }
	for _, tt := range []struct {
		name, file string
		status     int
		want       error
		text       string
	}{
		{"refused", federated, 400, errdefs.ErrDenied, "the service's words"},
		{"overloaded", federated, 429, errdefs.ErrUnavailable, "429"},
		{"too slow", federated, 408, errdefs.ErrUnavailable, "408"},
		{"broken", federated, 500, errdefs.ErrUnavailable, "500"},
		{"redirected", federated, 307, errdefs.ErrDenied, "307"},
		{"account refused", account, 401, errdefs.ErrDenied, "the service's words"},
		{"account overloaded", account, 429, errdefs.ErrUnavailable, "429"},
		{"account broken", account, 502, errdefs.ErrUnavailable, "502"},
		{"account redirected", account, 302, errdefs.ErrDenied, "302"},
		{"not there", elsewhere("http://"+peers.Addr(t), subject), 0, errdefs.ErrUnavailable, "refused"},
		{"silent", elsewhere("http://"+peers.Silent(t), subject), 0, errdefs.ErrUnavailable, "deadline"},
		{"no URL", elsewhere("http://%zz/S3CR3T", subject), 0, errdefs.ErrUnavailable, "escape"},
		{"no subject token", elsewhere(server.URL, "/nowhere/token"), 0, errdefs.ErrDenied, "/nowhere/token"},
		{"subject token in a pipe", elsewhere(server.URL, pipe(t)), 0, errdefs.ErrDenied, "regular file"},
		{"no metadata server", "", 0, errdefs.ErrUnavailable, "GOOGLE_APPLICATION_CREDENTIALS"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server.Status.Store(int32(tt.status))
			from := mustTokens(t, tt.file, exchanged())
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, err := from.Headers(ctx)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), tt.file) {
				t.Errorf("%v, want %v with %q and the file", err, tt.want, tt.text)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			if err != nil && strings.Contains(err.Error(), "S3CR3T") {
				t.Errorf("shows a secret: %v", err)
			}
		})
	}
	for len(server.Asked) > 0 {
		if asked := <-server.Asked; strings.HasPrefix(asked, "/elsewhere") {
			t.Errorf("followed the redirect with %.40q", asked)
		}
	}
}

// TestGone: a file that was there when the program started.
func TestGone(t *testing.T) {
	for _, need := range needs() {
		file := write(t, gcpfake.ServiceAccount(t, "https://nobody.invalid/token"))
		from := mustTokens(t, file, need)
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if _, err := from.Headers(t.Context()); !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), file) {
			t.Errorf("%v, want ErrDenied that names the file", err)
		}
	}
}

// TestEndlessAnswer: an answer without end does not fill the memory.
func TestEndlessAnswer(t *testing.T) {
	for name, tt := range map[string]struct {
		status int
		text   string
	}{"a token": {200, "longer than"}, "a refusal": {500, "HTTP status 500"}} {
		var sent atomic.Int64
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(tt.status)
			for _, err := io.WriteString(w, `{"access_token": "`); err == nil && r.Context().Err() == nil; {
				var n int
				n, err = io.WriteString(w, strings.Repeat("x", 64<<10))
				sent.Add(int64(n))
			}
		}))
		from := mustTokens(t, write(t, gcpfake.ServiceAccount(t, server.URL)), exchanged())
		start := time.Now()
		_, err := from.Headers(t.Context())
		if !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), tt.text) || len(err.Error()) > 1000 {
			t.Errorf("%s: %v, want a short ErrUnavailable with %q", name, err, tt.text)
		}
		server.Close()
		if n := sent.Load(); n > 32<<20 || time.Since(start) > 5*time.Second {
			t.Errorf("%s: %d bytes were sent in %v", name, n, time.Since(start))
		}
	}
}

// TestMetadataServer: without any file the VM's account is used, and a
// metadata server that is late is waited for by trying again.
func TestMetadataServer(t *testing.T) {
	gcpfake.NoAccount(t)
	server := gcpfake.StartTokens(t)
	from := mustTokens(t, "", selfSigned())
	if _, err := from.Headers(t.Context()); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatalf("nobody there: %v", err)
	}
	t.Setenv("GCE_METADATA_HOST", server.MetadataHost())
	for range 2 {
		if token := bearer(t, from); token != "token-1" {
			t.Errorf("token %q", token)
		}
	}
	if asked := <-server.Asked; !strings.HasPrefix(asked, "/computeMetadata/v1/instance/service-accounts/default/token") {
		t.Errorf("asked for %q", asked)
	}
	server.Status.Store(404)
	if _, err := mustTokens(t, "", selfSigned()).Headers(t.Context()); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("a VM without an account: %v, want ErrDenied", err)
	}
}

// TestRenewal: a token is renewed minutes before it expires, and used for as
// long as it is good where that fails.
func TestRenewal(t *testing.T) {
	gcpfake.NoAccount(t)
	server := gcpfake.StartTokens(t)
	t.Setenv("GCE_METADATA_HOST", server.MetadataHost())
	server.Life.Store(100)
	from := mustTokens(t, "", selfSigned())
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
		server.Status.Store(tt.status)
		if token := bearer(t, from); token != tt.want || len(server.Asked) != tt.asked {
			t.Errorf("token %q after %d requests, want %s after %d", token, len(server.Asked), tt.want, tt.asked)
		}
	}

	server.Status.Store(0)
	server.Life.Store(1)
	other := mustTokens(t, "", selfSigned())
	bearer(t, other)
	server.Status.Store(404)
	time.Sleep(1100 * time.Millisecond) // until it has expired
	if _, err := other.Headers(t.Context()); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("with an expired token: %v, want ErrDenied", err)
	}
}

// TestPatience: one call fetches the token, and those that wait for it wait no
// longer than they may.
func TestPatience(t *testing.T) {
	asked, answer := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-answer
		_, _ = io.WriteString(w, `{"access_token": "late", "expires_in": 3600}`)
	}))
	defer server.Close()
	from := mustTokens(t, write(t, gcpfake.ServiceAccount(t, server.URL)), exchanged())
	first := make(chan error, 1)
	go func() {
		_, err := from.Headers(context.Background())
		first <- err
	}()
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := from.Headers(ctx); !errors.Is(err, errdefs.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("who waits in vain: %v", err)
	}
	close(answer)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if token := bearer(t, from); token != "late" {
		t.Errorf("token %q", token)
	}
}

// TestProxy: a process in whose environment HTTPS_PROXY is asks for tokens
// that way.
func TestProxy(t *testing.T) {
	const childFile = "GCPCONFIG_TEST_FILE"
	if file := os.Getenv(childFile); file != "" {
		if token := bearer(t, mustTokens(t, file, exchanged())); token != "by-proxy" {
			t.Errorf("token %q", token)
		}
		return
	}
	proxy := gcpfake.StartProxy(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"access_token": "by-proxy", "expires_in": 3600}`)
	}))
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestProxy$")
	child.Env = slices.Concat(os.Environ(), proxy.Env, []string{
		childFile + "=" + write(t, gcpfake.ServiceAccount(t, "https://tokens.example.com/token")),
	})
	out, err := child.CombinedOutput()
	if err != nil || !slices.Equal(proxy.Hosts(), []string{"tokens.example.com:443"}) {
		t.Errorf("%v, by way of %v\n%s", err, proxy.Hosts(), out)
	}
}
