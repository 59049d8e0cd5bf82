package transit_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// full starts a whole OpenBao server, where FULL=1 asks for it.
func full(t *testing.T) *peers.OpenBaoServer {
	t.Helper()
	if os.Getenv("FULL") != "1" {
		t.Skip("runs with FULL=1 (make test-keys-full)")
	}
	return peers.OpenBao(t)
}

// serving is the policy that the package documentation gives.
func serving(s *peers.OpenBaoServer, t *testing.T) {
	t.Helper()
	s.Policy(t, "serving", map[string]string{
		"transit/keys/kek": `"read"`, "transit/encrypt/kek": `"update"`, "transit/decrypt/kek": `"update"`,
		"transit/keys/other": `"read"`, "transit/encrypt/other": `"update"`, "transit/decrypt/other": `"update"`,
	})
}

// approle makes a role with a policy and returns the URI parameters to log in by.
func approle(s *peers.OpenBaoServer, t *testing.T, role string, params map[string]any) string {
	t.Helper()
	if status, _ := s.Try(t, "GET", "/v1/auth/approle/role?list=true", nil); status == http.StatusNotFound {
		s.Try(t, "PUT", "/v1/sys/auth/approle", map[string]any{"type": "approle"})
	}
	s.Call(t, "PUT", "/v1/auth/approle/role/"+role, params)
	roleID, _ := s.Call(t, "GET", "/v1/auth/approle/role/"+role+"/role-id", nil)["role_id"].(string)
	secretID, _ := s.Call(t, "PUT", "/v1/auth/approle/role/"+role+"/secret-id", map[string]any{})["secret_id"].(string)
	dir := t.TempDir()
	return "&auth=approle&role-id-file=" + write(t, filepath.Join(dir, "role-id"), roleID) +
		"&secret-id-file=" + write(t, filepath.Join(dir, "secret-id"), secretID)
}

// TestFullConformance runs with no more than the documented policy.
func TestFullConformance(t *testing.T) {
	s := full(t)
	serving(s, t)
	params := approle(s, t, "serving", map[string]any{"token_policies": "serving", "token_ttl": "1h"})
	conformance(t, &s.Vault, func(key string) string { return s.Bare("transit/"+key) + params }, kmstest.Harness{
		Deny: func(t *testing.T) func() {
			s.Policy(t, "serving", map[string]string{"transit/keys/kek": `"read"`})
			return func() { serving(s, t) }
		},
	})
}

// TestFullManager runs with no more than the documented policy for operators.
func TestFullManager(t *testing.T) {
	s := full(t)
	paths := map[string]string{}
	for n := range 2 {
		key := fmt.Sprintf("managed-%d", n)
		paths["transit/encrypt/"+key], paths["transit/decrypt/"+key] = `"update"`, `"update"`
		paths["transit/keys/"+key] = `"read", "update", "delete"`
		for _, sub := range []string{"/rotate", "/config", "/trim", "/soft-delete-restore"} {
			paths["transit/keys/"+key+sub] = `"update"`
		}
		paths["transit/keys/"+key+"/soft-delete"] = `"delete"`
	}
	s.Policy(t, "operator", paths)
	params := approle(s, t, "operator", map[string]any{"token_policies": "operator", "token_ttl": "1h"})
	n := -1
	kmstest.RunManager(t, kmstest.Abilities{Rotation: true, Disable: true, Destroy: true}, func(t *testing.T) (a, b *kms.KEK) {
		n++
		uri := s.Bare(fmt.Sprintf("transit/managed-%d", n)) + params
		return open(t, uri), open(t, uri)
	})
	kek := open(t, s.Bare("transit/managed-0")+params)
	for _, state := range []kms.VersionState{kms.Disabled, kms.Enabled} {
		if err := kek.SetVersion(t.Context(), "", state); err != nil {
			t.Errorf("the whole key to %s: %v", state, err)
		}
	}
	wants(t, "deleting", kek.SetVersion(t.Context(), "", kms.Destroyed), errdefs.ErrState, "deletion_allowed")
	s.Call(t, "PUT", "/v1/transit/keys/managed-0/config", map[string]any{"deletion_allowed": true})
	if err := kek.SetVersion(t.Context(), "", kms.Destroyed); err != nil {
		t.Errorf("deleting: %v", err)
	}
}

// TestFullTokens: revoked, expired, and with a policy that comes later.
func TestFullTokens(t *testing.T) {
	s := full(t)
	serving(s, t)
	s.CreateKey(t, "kek", nil)
	kek := open(t, s.Bare("transit/kek")+approle(s, t, "short", map[string]any{"token_policies": "serving", "token_ttl": "1s", "token_max_ttl": "1h"}))
	w := wrap(t, kek)
	time.Sleep(700 * time.Millisecond)
	if err := unwrap(t.Context(), kek, w); err != nil { // renews
		t.Error(err)
	}
	time.Sleep(700 * time.Millisecond)
	if err := unwrap(t.Context(), kek, w); err != nil {
		t.Error(err)
	}
	time.Sleep(1500 * time.Millisecond)
	if err := unwrap(t.Context(), kek, w); err != nil { // logs in
		t.Error(err)
	}

	long := open(t, s.Bare("transit/kek")+approle(s, t, "long", map[string]any{"token_policies": "serving", "token_ttl": "1h"}))
	if err := unwrap(t.Context(), long, w); err != nil {
		t.Error(err)
	}
	s.Call(t, "PUT", "/v1/sys/leases/revoke-prefix/auth/approle/login", map[string]any{})
	if err := unwrap(t.Context(), long, w); err != nil {
		t.Errorf("after its token was revoked: %v", err)
	}

	wrong := approle(s, t, "wrong", map[string]any{"token_policies": "default"})
	_, err := open(t, s.Bare("transit/kek")+wrong).CurrentKeyID(t.Context())
	wants(t, "no policy", err, errdefs.ErrDenied, "needs read on transit/keys/kek", "permission denied")
	s.Call(t, "DELETE", "/v1/auth/approle/role/wrong", nil)
	_, err = open(t, s.Bare("transit/kek")+wrong).CurrentKeyID(t.Context())
	wants(t, "no role", err, errdefs.ErrDenied, "refuses the login", "role-id-file")
	_, err = open(t, s.Bare("transit/kek")+wrong+"&auth-mount=nowhere").CurrentKeyID(t.Context())
	wants(t, "no auth mount", err, errdefs.ErrDenied, "auth/nowhere/login refuses")
	_, err = open(t, s.Bare("nowhere/kek")+"&token-file="+s.TokenFile).CurrentKeyID(t.Context())
	wants(t, "no mount", err, errdefs.ErrDenied, "no transit engine is mounted")

	s.Seal(t, true)
	wants(t, "sealed", unwrap(t.Context(), long, w), errdefs.ErrUnavailable, "sealed")
	_, err = open(t, s.Bare("transit/kek")+wrong).CurrentKeyID(t.Context())
	wants(t, "logging in while sealed", err, errdefs.ErrUnavailable, "sealed")
	s.Seal(t, false)
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) { // unsealing goes on in the background
		err := unwrap(t.Context(), long, w)
		if err == nil {
			break
		}
		if time.Since(start) > 30*time.Second {
			t.Fatalf("after unsealing: %v", err)
		}
	}
}

// TestFullNeverCreates: neither with every capability nor with the documented ones.
func TestFullNeverCreates(t *testing.T) {
	s := full(t)
	_, err := open(t, s.URI("missing")).Wrap(t.Context(), id, dek(t))
	wants(t, "Wrap", err, errdefs.ErrDenied, "has no key missing")
	s.Policy(t, "p", map[string]string{"transit/keys/missing": `"read"`, "transit/encrypt/missing": `"update"`})
	params := approle(s, t, "r", map[string]any{"token_policies": "p"})
	_, err = open(t, s.Bare("transit/missing")+params).Wrap(t.Context(), id, dek(t))
	wants(t, "Wrap", err, errdefs.ErrDenied, "has no key missing")
	if status, _ := s.Try(t, "GET", "/v1/transit/keys/missing", nil); status != http.StatusNotFound {
		t.Errorf("the key is there now: status %d", status)
	}
}

func TestFullNamespace(t *testing.T) {
	s := full(t)
	s.Call(t, "PUT", "/v1/sys/namespaces/team-a", map[string]any{})
	s.Call(t, "PUT", "/v1/team-a/sys/mounts/deep/transit", map[string]any{"type": "transit"})
	kek := open(t, s.Bare("deep/transit/kek")+"&namespace=team-a&token-file="+s.TokenFile)
	if _, err := kek.CreateKey(t.Context(), kms.NewKey{}); err != nil {
		t.Fatal(err)
	}
	if err := unwrap(t.Context(), kek, wrap(t, kek)); err != nil {
		t.Error(err)
	}
	for what, uri := range map[string]string{
		"outside":      s.Bare("deep/transit/kek") + "&token-file=" + s.TokenFile,
		"no namespace": s.Bare("deep/transit/kek") + "&namespace=team-b&token-file=" + s.TokenFile,
	} {
		_, err := open(t, uri).CurrentKeyID(t.Context())
		wants(t, what, err, errdefs.ErrDenied)
	}
}

// TestFullLogins: the other kinds, by what really issues their credentials.
func TestFullLogins(t *testing.T) {
	s := full(t)
	serving(s, t)
	s.CreateKey(t, "kek", nil)
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	jwt := write(t, filepath.Join(dir, "jwt"), signJWT(t, signer, map[string]any{
		"sub": "system:serviceaccount:kube-system:cryptcsi", "aud": []string{"vault"}, "iss": "https://kubernetes.default.svc",
		"exp": time.Now().Add(time.Hour).Unix(), "nbf": time.Now().Add(-time.Hour).Unix(), "iat": time.Now().Add(-time.Hour).Unix(),
		"kubernetes.io": map[string]any{"namespace": "kube-system", "serviceaccount": map[string]any{"name": "cryptcsi", "uid": "uid"}},
	}))
	bad := write(t, filepath.Join(dir, "bad"), "a.b.c")
	cert, key := s.CA.Issue(t, "client")
	otherCert, otherKey := peers.NewCA(t).Issue(t, "client")

	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		t.Fatal(err)
	}
	s.Call(t, "PUT", "/v1/sys/auth/jwt", map[string]any{"type": "jwt"})
	s.Call(t, "PUT", "/v1/auth/jwt/config", map[string]any{
		"jwt_validation_pubkeys": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), "default_role": "r",
	})
	s.Call(t, "PUT", "/v1/auth/jwt/role/r", map[string]any{
		"role_type": "jwt", "bound_audiences": []string{"vault"}, "user_claim": "sub", "token_policies": "serving", "token_ttl": "1h",
	})
	kube(t, s)
	pemCA, err := os.ReadFile(s.CA.File)
	if err != nil {
		t.Fatal(err)
	}
	s.Call(t, "PUT", "/v1/sys/auth/cert", map[string]any{"type": "cert"})
	s.Call(t, "PUT", "/v1/auth/cert/certs/r", map[string]any{"certificate": string(pemCA), "token_policies": "serving", "token_ttl": "1h"})

	for good, wrong := range map[string]string{
		"&auth=jwt&jwt-file=" + jwt:                                  "&auth=jwt&jwt-file=" + bad,
		"&auth=jwt&role=r&jwt-file=" + jwt:                           "&auth=jwt&role=s&jwt-file=" + jwt,
		"&auth=kubernetes&auth-mount=k8s/one&role=r&jwt-file=" + jwt: "&auth=kubernetes&auth-mount=k8s/one&role=r&jwt-file=" + bad,
		"&auth=cert&cert-file=" + cert + "&key-file=" + key:          "&auth=cert&cert-file=" + otherCert + "&key-file=" + otherKey,
		"&auth=cert&role=r&cert-file=" + cert + "&key-file=" + key:   "&auth=cert&role=s&cert-file=" + cert + "&key-file=" + key,
	} {
		kek := open(t, s.Bare("transit/kek")+good)
		if err := unwrap(t.Context(), kek, wrap(t, kek)); err != nil {
			t.Errorf("%s: %v", good, err)
		}
		_, err := open(t, s.Bare("transit/kek")+wrong).CurrentKeyID(t.Context())
		wants(t, wrong, err, errdefs.ErrDenied, "refuses the login")
	}
}

// kube mounts the kubernetes method at k8s/one, with an API server that
// reviews tokens.
func kube(t *testing.T, s *peers.OpenBaoServer) {
	t.Helper()
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review map[string]any
		if r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews" || json.NewDecoder(r.Body).Decode(&review) != nil {
			http.NotFound(w, r)
			return
		}
		review["status"] = map[string]any{
			"authenticated": true, "audiences": []string{"vault"},
			"user": map[string]any{"username": "system:serviceaccount:kube-system:cryptcsi", "uid": "uid", "groups": []string{"system:serviceaccounts"}},
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(review)
	}))
	t.Cleanup(api.Close)
	s.Call(t, "PUT", "/v1/sys/auth/k8s/one", map[string]any{"type": "kubernetes"})
	s.Call(t, "PUT", "/v1/auth/k8s/one/config", map[string]any{
		"kubernetes_host":    api.URL,
		"kubernetes_ca_cert": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw})),
		"token_reviewer_jwt": "reviewer", "disable_local_ca_jwt": true,
	})
	s.Call(t, "PUT", "/v1/auth/k8s/one/role/r", map[string]any{
		"bound_service_account_names": "cryptcsi", "bound_service_account_namespaces": "kube-system",
		"token_policies": "serving", "token_ttl": "1h",
	})
}

// signJWT makes an ES256 token.
func signJWT(t *testing.T, key *ecdsa.PrivateKey, claims map[string]any) string {
	t.Helper()
	raw, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	text := encode([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + encode(raw)
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + encode(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}
