package transit_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/kms/transit"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const id = "driver.example.com/vol-1"

func mux() kms.Mux { return kms.Mux{transit.Scheme: transit.Open} }

func open(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	kek, err := mux().Open(t.Context(), uri)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { _ = kek.Close() })
	return kek
}

func write(t *testing.T, path, data string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func dek(t *testing.T) secret.Bytes {
	t.Helper()
	k := secret.Take([]byte(strings.Repeat("k", kms.KeySize)))
	t.Cleanup(k.Wipe)
	return k
}

func wrap(t *testing.T, kek *kms.KEK) kms.Wrapped {
	t.Helper()
	w, err := kek.Wrap(t.Context(), id, dek(t))
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	return w
}

func unwrap(ctx context.Context, kek *kms.KEK, w kms.Wrapped) error {
	k, err := kek.Unwrap(ctx, id, w)
	k.Wipe()
	return err
}

// wants checks an error's class and that its message holds all the words.
func wants(t *testing.T, what string, err, class error, words ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want class %v", what, err, class)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v does not say %q", what, err, word)
		}
	}
}

// conformance runs kmstest against a server.
func conformance(t *testing.T, v *peers.Vault, uri func(key string) string, h kmstest.Harness) {
	t.Helper()
	v.CreateKey(t, "kek", nil)
	v.CreateKey(t, "other", nil)
	h.Open = func(t *testing.T) *kms.KEK { return open(t, uri("kek")) }
	h.OpenOther = func(t *testing.T) *kms.KEK { return open(t, uri("other")) }
	h.Rotate = func(t *testing.T) *kms.KEK {
		v.RotateKey(t, "kek")
		return open(t, uri("kek"))
	}
	h.Disable = func(t *testing.T) func() {
		v.Call(t, "DELETE", "/v1/transit/keys/kek/soft-delete", nil)
		return func() { v.Call(t, "PUT", "/v1/transit/keys/kek/soft-delete-restore", nil) }
	}
	h.Unreachable = func(t *testing.T) *kms.KEK {
		return open(t, strings.Replace(uri("kek"), v.Addr, peers.Addr(t), 1))
	}
	h.Secrets = [][]byte{[]byte(v.Token)}
	kmstest.Run(t, h)
}

func TestConformance(t *testing.T) {
	s := peers.Transit(t)
	conformance(t, &s.Vault, s.URI, kmstest.Harness{
		Deny: func(t *testing.T) func() {
			set := func(on bool) {
				s.Deny(t, "transit/encrypt/kek", on)
				s.Deny(t, "transit/decrypt/kek", on)
			}
			set(true)
			return func() { set(false) }
		},
		Slow: func(t *testing.T) *kms.KEK {
			uri := strings.Replace(s.URI("kek"), s.Addr, peers.Silent(t), 1)
			kek, err := mux().OpenWith(t.Context(), uri, kms.Options{Timeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			return kek
		},
	})
}

// TestReal runs the suite against a server that TEST_KEK_URI_TRANSIT names; its
// key must exist, and beside it one with "-other" at the end of its name.
func TestReal(t *testing.T) {
	uri := os.Getenv("TEST_KEK_URI_TRANSIT")
	if uri == "" {
		t.Skip("TEST_KEK_URI_TRANSIT is not set")
	}
	path, query, _ := strings.Cut(uri, "?")
	kmstest.Run(t, kmstest.Harness{
		Open:      func(t *testing.T) *kms.KEK { return open(t, uri) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, path+"-other?"+query) },
		Stride:    8,
	})
}

func TestManager(t *testing.T) {
	s := peers.Transit(t)
	n := 0
	kmstest.RunManager(t, kmstest.Abilities{Rotation: true, Disable: true, Destroy: true}, func(t *testing.T) (a, b *kms.KEK) {
		n++
		uri := s.URI(fmt.Sprintf("managed-%d", n))
		return open(t, uri), open(t, uri)
	})
}

// TestPaths: mounts of several elements, and namespaces.
func TestPaths(t *testing.T) {
	s := peers.Transit(t)
	credentials := "&token-file=" + s.TokenFile
	var sealed []kms.Wrapped
	for _, uri := range []string{
		s.Bare("transit/kek") + credentials,
		s.Bare("team/kms/kek") + credentials,
		s.Bare("transit/kek") + credentials + "&namespace=team-a",
	} {
		kek := open(t, uri)
		k, err := kek.CreateKey(t.Context(), kms.NewKey{})
		if err != nil {
			t.Fatalf("CreateKey: %v", err)
		}
		if bare, query, _ := strings.Cut(k.URI, "?"); !strings.HasPrefix(uri, bare+"?") || query != "" && query != "namespace=team-a" {
			t.Errorf("%s calls itself %s", uri, k.URI)
		}
		for _, foreign := range sealed {
			wants(t, "another mount's key", unwrap(t.Context(), kek, foreign), errdefs.ErrCorrupt, "another one")
		}
		w := wrap(t, kek)
		if err := unwrap(t.Context(), kek, w); err != nil {
			t.Errorf("Unwrap: %v", err)
		}
		sealed = append(sealed, w)
	}
	for what, uri := range map[string]string{
		"no such mount":     s.Bare("nothing/kek") + credentials,
		"no such namespace": s.Bare("transit/kek") + credentials + "&namespace=team-b",
	} {
		_, err := open(t, uri).CurrentKeyID(t.Context())
		wants(t, what, err, errdefs.ErrDenied, "no transit engine is mounted")
	}
}

// TestNeverCreates: a token that may everything makes no key by wrapping.
func TestNeverCreates(t *testing.T) {
	s := peers.Transit(t)
	kek := open(t, s.URI("missing"))
	_, err := kek.Wrap(t.Context(), id, dek(t))
	wants(t, "Wrap", err, errdefs.ErrDenied, "has no key missing")
	_, err = kek.CurrentKeyID(t.Context())
	wants(t, "CurrentKeyID", err, errdefs.ErrDenied, "has no key missing")
	_, err = kek.RotateKey(t.Context())
	wants(t, "RotateKey", err, errdefs.ErrNotFound)
	if status, _ := s.Try(t, "GET", "/v1/transit/keys/missing", nil); status != http.StatusNotFound {
		t.Errorf("the key is there now: status %d", status)
	}
	if n := s.Count(t, "transit/encrypt/missing"); n != 0 {
		t.Errorf("%d requests to encrypt", n)
	}
}

func TestKeyTypes(t *testing.T) {
	s := peers.Transit(t)
	for _, tt := range []struct {
		name   string
		params map[string]any
		want   string // of the refusal; empty where it can be used
	}{
		{"aes256-gcm96", map[string]any{"type": "aes256-gcm96"}, ""},
		{"chacha20-poly1305", map[string]any{"type": "chacha20-poly1305"}, ""},
		{"xchacha20-poly1305", map[string]any{"type": "xchacha20-poly1305"}, ""},
		{"aes128", map[string]any{"type": "aes128-gcm96"}, "aes128-gcm96"},
		{"rsa", map[string]any{"type": "rsa-2048"}, "rsa-2048"},
		{"derived", map[string]any{"derived": true}, "derived"},
		{"convergent", map[string]any{"derived": true, "convergent_encryption": true}, "derived"},
	} {
		s.CreateKey(t, tt.name, tt.params)
		kek := open(t, s.URI(tt.name))
		if tt.want == "" {
			w := wrap(t, kek)
			if err := unwrap(t.Context(), kek, w); err != nil || w.Mechanism != tt.name {
				t.Errorf("%s: mechanism %q, %v", tt.name, w.Mechanism, err)
			}
			continue
		}
		_, err := kek.Wrap(t.Context(), id, dek(t))
		wants(t, tt.name, err, errdefs.ErrInvalid, tt.want)
		_, err = kek.CurrentKeyID(t.Context())
		wants(t, tt.name, err, errdefs.ErrInvalid, tt.want)
		if tt.name == "aes128" {
			continue // the server would take it, Create would not have made it
		}
		_, err = kek.CreateKey(t.Context(), kms.NewKey{})
		wants(t, tt.name, err, errdefs.ErrExists)
	}
}

// TestRecords: what a record claims is checked before the server sees it.
func TestRecords(t *testing.T) {
	s := peers.Transit(t)
	s.CreateKey(t, "kek", nil)
	s.RotateKey(t, "kek")
	kek := open(t, s.URI("kek"))
	good := wrap(t, kek)
	if good.KeyID != "kek:v2" {
		t.Fatalf("key ID %q", good.KeyID)
	}
	c := string(good.Ciphertext)
	spelled := c[:len(c)-4] + "\n" + c[len(c)-4:] // the server's base64 skips it
	for _, tt := range []struct {
		name  string
		w     kms.Wrapped
		class error
	}{
		{"another key", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "other:v2", Mechanism: good.Mechanism}, errdefs.ErrDenied},
		{"another name's beginning", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "ke:v2", Mechanism: good.Mechanism}, errdefs.ErrDenied},
		{"no version", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "kek", Mechanism: good.Mechanism}, errdefs.ErrDenied},
		{"another spelling of the version", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "kek:v02", Mechanism: good.Mechanism}, errdefs.ErrDenied},
		{"version 0", kms.Wrapped{Ciphertext: []byte("vault:v0" + c[8:]), KeyID: "kek:v0", Mechanism: good.Mechanism}, errdefs.ErrDenied},
		{"another version", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "kek:v1", Mechanism: good.Mechanism}, errdefs.ErrCorrupt},
		{"another version in the ciphertext", kms.Wrapped{Ciphertext: []byte("vault:v1" + c[8:]), KeyID: "kek:v2", Mechanism: good.Mechanism}, errdefs.ErrCorrupt},
		{"a newline in the ciphertext", kms.Wrapped{Ciphertext: []byte(spelled), KeyID: "kek:v2", Mechanism: good.Mechanism}, errdefs.ErrCorrupt},
		{"no prefix", kms.Wrapped{Ciphertext: []byte(c[9:]), KeyID: "kek:v2", Mechanism: good.Mechanism}, errdefs.ErrCorrupt},
		{"a public-key mechanism", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "kek:v2", Mechanism: "rsa-2048"}, errdefs.ErrCorrupt},
		{"an unknown mechanism", kms.Wrapped{Ciphertext: good.Ciphertext, KeyID: "kek:v2", Mechanism: "aes"}, errdefs.ErrCorrupt},
	} {
		wants(t, tt.name, unwrap(t.Context(), kek, tt.w), tt.class)
	}
	if n := s.Count(t, "transit/decrypt/kek") + s.Count(t, "transit/decrypt/other"); n != 0 {
		t.Errorf("%d requests to decrypt", n)
	}
	both := kms.Wrapped{Ciphertext: []byte("vault:v1" + c[8:]), KeyID: "kek:v1", Mechanism: good.Mechanism}
	wants(t, "both versions changed", unwrap(t.Context(), kek, both), errdefs.ErrCorrupt, "does not verify")
	newer := kms.Wrapped{Ciphertext: []byte("vault:v9" + c[8:]), KeyID: "kek:v9", Mechanism: good.Mechanism}
	wants(t, "a version the server lacks", unwrap(t.Context(), kek, newer), errdefs.ErrDenied, "older backup")
	if err := unwrap(t.Context(), kek, good); err != nil {
		t.Errorf("Unwrap: %v", err)
	}
}

func TestSealed(t *testing.T) {
	s := peers.Transit(t)
	s.CreateKey(t, "kek", nil)
	kek := open(t, s.URI("kek"))
	w := wrap(t, kek)
	s.Seal(t, true)
	_, err := kek.Wrap(t.Context(), id, dek(t))
	wants(t, "Wrap", err, errdefs.ErrUnavailable, "sealed")
	wants(t, "Unwrap", unwrap(t.Context(), kek, w), errdefs.ErrUnavailable, "sealed")
	s.Seal(t, false)
	if err := unwrap(t.Context(), kek, w); err != nil {
		t.Errorf("Unwrap: %v", err)
	}
}

func TestTokenFile(t *testing.T) {
	s := peers.Transit(t)
	s.CreateKey(t, "kek", nil)
	s.AddToken(t, "first", true)
	file := write(t, filepath.Join(t.TempDir(), "token"), "first\n")
	kek := open(t, s.Bare("transit/kek")+"&token-file="+file)
	w := wrap(t, kek)

	s.AddToken(t, "second", true)
	s.AddToken(t, "first", false)
	err := unwrap(t.Context(), kek, w)
	wants(t, "a token that is no more", err, errdefs.ErrDenied, "needs update on transit/decrypt/kek")
	write(t, file, "second")
	if err := unwrap(t.Context(), kek, w); err != nil {
		t.Errorf("with the new token: %v", err)
	}
	for what, damage := range map[string]func() error{
		"empty": func() error { return os.WriteFile(file, nil, 0o600) },
		"gone":  func() error { return os.Remove(file) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		wants(t, what, unwrap(t.Context(), kek, w), errdefs.ErrDenied, file)
	}
}

// TestEnvironment: a token for want of another one, and nothing else.
func TestEnvironment(t *testing.T) {
	s := peers.Transit(t)
	s.CreateKey(t, "kek", nil)
	for _, prefix := range []string{"VAULT_", "BAO_"} {
		t.Setenv(prefix+"ADDR", "https://127.0.0.1:1")
		t.Setenv(prefix+"AGENT_ADDR", "https://127.0.0.1:1")
		t.Setenv(prefix+"NAMESPACE", "team-a")
		t.Setenv(prefix+"CACERT", "/nonexistent")
		t.Setenv(prefix+"MAX_RETRIES", "nonsense")
		t.Setenv(prefix+"TOKEN", "")
	}
	_, err := mux().Open(t.Context(), s.Bare("transit/kek"))
	wants(t, "no credentials", err, errdefs.ErrInvalid, "token-file", "VAULT_TOKEN")
	t.Setenv("VAULT_TOKEN", s.Token)
	wrap(t, open(t, s.Bare("transit/kek")))
	t.Setenv("BAO_TOKEN", "wrong")
	wrap(t, open(t, s.URI("kek")))
	_, err = open(t, s.Bare("transit/kek")).CurrentKeyID(t.Context())
	wants(t, "BAO_TOKEN", err, errdefs.ErrDenied)
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	t.Setenv("BAO_SKIP_VERIFY", "true")
	strange := fmt.Sprintf("transit://%s/transit/kek?token-file=%s", s.Addr, s.TokenFile)
	_, err = open(t, strange).CurrentKeyID(t.Context())
	wants(t, "a certificate of another CA", err, errdefs.ErrUnavailable, "certificate")
}

func TestPlaintext(t *testing.T) {
	s := peers.PlainTransit(t)
	s.CreateKey(t, "kek", nil)
	wrap(t, open(t, s.URI("kek")))
	t.Setenv("VAULT_TOKEN", "")
	t.Setenv("BAO_TOKEN", "")
	_, err := open(t, s.Bare("transit/kek")).CurrentKeyID(t.Context())
	wants(t, "without a token", err, errdefs.ErrDenied)
}

func TestURIs(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "file"), "x")
	empty := write(t, filepath.Join(dir, "empty"), "\n")
	big := write(t, filepath.Join(dir, "big"), strings.Repeat("x", 65<<10))
	cert, key := peers.NewCA(t).Issue(t, "client")
	token := "?token-file=" + file
	for _, tt := range []struct{ uri, want string }{
		{"transit://host/kek" + token, "mount and key"},
		{"transit:///transit/kek" + token, "server"},
		{"transit://host/transit/" + token, "mount and key"},
		{"transit://host/transit//kek" + token, "mount and key"},
		{"transit://host/transit/../kek" + token, "mount and key"},
		{"transit://host/transit/a%20b" + token, "mount and key"},
		{"transit://host/transit/k%2Fk%2F" + token, "mount and key"},
		{"transit://host/transit/kek", "no credentials"},
		{"transit://host/transit/kek?token-file=/nonexistent", "token-file"},
		{"transit://host/transit/kek?token-file=" + dir, "regular file"},
		{"transit://host/transit/kek?token-file=" + empty, "must hold"},
		{"transit://host/transit/kek?token-file=" + big, "must hold"},
		{"transit://host/transit/kek" + token + "&ca-file=" + file, "no certificate"},
		{"transit://host/transit/kek" + token + "&cert-file=" + cert, "go together"},
		{"transit://host/transit/kek" + token + "&cert-file=" + file + "&key-file=" + key, "cert-file"},
		{"transit://host/transit/kek" + token + "&plaintext=true", "loopback"},
		{"transit://10.0.0.1/transit/kek" + token + "&plaintext=true", "loopback"},
		{"transit://localhost/transit/kek" + token + "&plaintext=yes", "true or false"},
		{"transit://localhost/transit/kek" + token + "&plaintext=true&ca-file=" + file, "excludes"},
		{"transit://host/transit/kek" + token + "&auth=approle", "exclude each other"},
		{"transit://host/transit/kek" + token + "&role=x", `needs "auth"`},
		{"transit://host/transit/kek?auth=ldap", "approle, kubernetes, jwt or cert"},
		{"transit://host/transit/kek?auth=approle", "role-id-file"},
		{"transit://host/transit/kek?auth=approle&role-id-file=/nonexistent", "role_id"},
		{"transit://host/transit/kek?auth=approle&role-id-file=" + file + "&role=x", `no URI parameter "role"`},
		{"transit://host/transit/kek?auth=kubernetes&jwt-file=" + file, `needs URI parameter "role"`},
		{"transit://host/transit/kek?auth=kubernetes&role=x", "/var/run/secrets/kubernetes.io/serviceaccount/token"},
		{"transit://host/transit/kek?auth=jwt&jwt-file=" + file + "&secret-id-file=" + file, `no URI parameter "secret-id-file"`},
		{"transit://host/transit/kek?auth=cert&role=x", "cert-file"},
		{"transit://host/transit/kek?token=x", `"token" is not known`},
	} {
		t.Setenv("VAULT_TOKEN", "")
		t.Setenv("BAO_TOKEN", "")
		_, err := mux().Open(t.Context(), tt.uri)
		wants(t, tt.uri, err, errdefs.ErrInvalid, tt.want)
	}
	for _, uri := range []string{
		"transit://host/transit/kek" + token,
		"transit://[::1]:1234/a/b/c.d/k-e_k" + token + "&plaintext=true",
		"transit://host/transit/kek?auth=jwt&jwt-file=" + file,
		"transit://host/transit/kek?auth=cert&cert-file=" + cert + "&key-file=" + key,
		"transit://host/transit/kek?auth=approle&role-id-file=" + file,
	} {
		open(t, uri) // nobody answers there, and nobody is asked
	}
}

// setUp makes a login of each kind and returns the rest of the URI and a
// function that replaces what it logs in with, on both sides.
func setUp(t *testing.T, s *peers.TransitServer, l peers.TransitLogin) (params string, change func()) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	n := 0
	set := func() {
		n++
		l.RoleID, l.SecretID, l.JWT, l.Role = "role-id", fmt.Sprintf("secret-id-%d", n), fmt.Sprintf("jwt-%d", n), fmt.Sprintf("role-%d", n)
		if l.Kind != "cert" {
			l.Role = "role"
		}
		write(t, file("role-id"), l.RoleID)
		write(t, file("secret-id"), l.SecretID+"\n")
		write(t, file("jwt"), l.JWT)
		cert, key := s.CA.Issue(t, l.Role)
		for from, to := range map[string]string{cert: file("cert"), key: file("key")} {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
		s.Login(t, "m-"+l.Kind, l)
	}
	set()
	params = "&auth=" + l.Kind + "&auth-mount=m-" + l.Kind
	switch l.Kind {
	case "approle":
		params += "&role-id-file=" + file("role-id") + "&secret-id-file=" + file("secret-id")
	case "kubernetes", "jwt":
		params += "&role=role&jwt-file=" + file("jwt")
	case "cert":
		params += "&cert-file=" + file("cert") + "&key-file=" + file("key")
	}
	if l.Namespace != "" {
		params += "&namespace=" + l.Namespace
	}
	return params, set
}

func TestLogins(t *testing.T) {
	s := peers.Transit(t)
	s.CreateKey(t, "kek", nil)
	for _, kind := range []string{"approle", "kubernetes", "jwt", "cert"} {
		t.Run(kind, func(t *testing.T) {
			params, change := setUp(t, s, peers.TransitLogin{Kind: kind, TTL: 3600})
			path := "auth/m-" + kind + "/login"
			kek := open(t, s.Bare("transit/kek")+params)
			if n := s.Count(t, path); n != 0 {
				t.Errorf("%d logins before the first call", n)
			}
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					if _, err := kek.CurrentKeyID(t.Context()); err != nil {
						t.Errorf("CurrentKeyID: %v", err)
					}
				})
			}
			wg.Wait()
			if n := s.Count(t, path); n != 1 {
				t.Errorf("%d logins for 16 calls, want 1", n)
			}

			s.RevokeTokens(t)
			change() // what the files hold now is what counts
			w := wrap(t, kek)
			if n := s.Count(t, path); n != 2 {
				t.Errorf("%d logins, want a second one", n)
			}

			s.RevokeTokens(t)
			s.Login(t, "m-"+kind, peers.TransitLogin{Kind: kind, RoleID: "another", Role: "another", JWT: "another", TTL: 3600})
			wants(t, "refused", unwrap(t.Context(), kek, w), errdefs.ErrDenied, "refuses the login", "credentials: ", "-file /")
			s.Seal(t, true)
			wants(t, "sealed", unwrap(t.Context(), kek, w), errdefs.ErrUnavailable, "sealed")
			s.Seal(t, false)
		})
	}
}

// TestPolicyRefusal: a token that works, and is not let somewhere, is not
// replaced again and again.
func TestPolicyRefusal(t *testing.T) {
	s := peers.Transit(t)
	s.CreateKey(t, "kek", nil)
	params, _ := setUp(t, s, peers.TransitLogin{Kind: "approle", TTL: 3600})
	kek := open(t, s.Bare("transit/kek")+params)
	s.Deny(t, "transit/keys/kek", true)
	for range 3 {
		_, err := kek.CurrentKeyID(t.Context())
		wants(t, "CurrentKeyID", err, errdefs.ErrDenied, "needs read on transit/keys/kek")
	}
	if n := s.Count(t, "auth/m-approle/login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// clocked opens a KEK whose backend has the clock that is returned.
func clocked(t *testing.T, uri string) (*kms.KEK, *clock) {
	t.Helper()
	u, err := kms.ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	b, err := transit.Open(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	c := &clock{now: time.Now()}
	transit.SetClock(b, c.read)
	kek := kms.New(transit.Scheme, b, kms.Options{})
	t.Cleanup(func() { _ = kek.Close() })
	return kek, c
}

type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) read() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// TestExpiry: when a token is renewed, and when another one is got.
func TestExpiry(t *testing.T) {
	const hour = 3600
	type step struct {
		pass             time.Duration // on our clock; the server's stands still
		dead             bool          // the server forgets all tokens
		broken           bool          // neither login nor renewal works, from here on
		logins, renewals int           // so far
	}
	for _, tt := range []struct {
		name  string
		login peers.TransitLogin
		steps []step
	}{
		{"not renewable", peers.TransitLogin{TTL: hour}, []step{
			{pass: 0, logins: 1}, {pass: 39 * time.Minute, logins: 1}, {pass: 2 * time.Minute, logins: 2},
			{pass: time.Minute, logins: 2}, {pass: 2 * time.Hour, dead: true, logins: 3},
		}},
		{"renewable", peers.TransitLogin{TTL: hour, RenewTTL: hour}, []step{
			{pass: 0, logins: 1}, {pass: 41 * time.Minute, logins: 1, renewals: 1}, {pass: 39 * time.Minute, logins: 1, renewals: 1},
			{pass: 2 * time.Minute, logins: 1, renewals: 2}, {pass: 2 * time.Hour, dead: true, logins: 2, renewals: 2},
		}},
		{"near its longest life", peers.TransitLogin{TTL: hour, RenewTTL: hour / 3}, []step{
			{logins: 1}, {pass: 41 * time.Minute, logins: 2, renewals: 1}, {pass: 39 * time.Minute, logins: 2, renewals: 1},
		}},
		{"refused while still good", peers.TransitLogin{TTL: hour, RenewTTL: hour}, []step{
			{pass: 0, logins: 1}, {pass: 41 * time.Minute, broken: true, logins: 2, renewals: 1},
			{pass: time.Minute, logins: 2, renewals: 1}, {pass: 10 * time.Minute, logins: 3, renewals: 2},
		}},
		{"revoked at once", peers.TransitLogin{TTL: hour}, []step{{logins: 1}, {dead: true, logins: 2}, {dead: true, logins: 3}}},
		{"without end", peers.TransitLogin{TTL: 0}, []step{{logins: 1}, {pass: 10000 * time.Hour, logins: 1}, {dead: true, logins: 2}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := peers.Transit(t)
			s.CreateKey(t, "kek", nil)
			tt.login.Kind = "approle"
			params, _ := setUp(t, s, tt.login)
			kek, c := clocked(t, s.Bare("transit/kek")+params)
			for i, step := range tt.steps {
				c.pass(step.pass)
				if step.dead {
					s.RevokeTokens(t)
				}
				if step.broken {
					s.Login(t, "m-approle", peers.TransitLogin{Kind: "approle", RoleID: "another", TTL: hour})
					s.Deny(t, "auth/token/renew-self", true)
				}
				if _, err := kek.CurrentKeyID(t.Context()); err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				logins, renewals := s.Count(t, "auth/m-approle/login"), s.Count(t, "auth/token/renew-self")
				if logins != step.logins || renewals != step.renewals {
					t.Errorf("step %d: %d logins and %d renewals, want %d and %d", i, logins, renewals, step.logins, step.renewals)
				}
			}
		})
	}
}

// TestLoginWaits: a call that waits for another one's login ends with its own context.
func TestLoginWaits(t *testing.T) {
	file := write(t, filepath.Join(t.TempDir(), "id"), "x")
	kek := open(t, fmt.Sprintf("transit://%s/transit/kek?plaintext=true&auth=approle&role-id-file=%s", peers.Silent(t), file))
	first, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := kek.CurrentKeyID(first)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the first: %v", err)
		}
	})
	second, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := kek.CurrentKeyID(second)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second: %v", err)
	}
	stop()
	wg.Wait()
}

func TestNamespaceLogin(t *testing.T) {
	s := peers.Transit(t)
	params, _ := setUp(t, s, peers.TransitLogin{Kind: "jwt", TTL: 3600, Namespace: "team-a"})
	kek := open(t, s.Bare("transit/kek")+params)
	if _, err := kek.CreateKey(t.Context(), kms.NewKey{}); err != nil {
		t.Fatal(err)
	}
	wrap(t, kek)
	_, err := open(t, s.Bare("transit/kek")+strings.Replace(params, "&namespace=team-a", "", 1)).CurrentKeyID(t.Context())
	wants(t, "outside its namespace", err, errdefs.ErrDenied, "refuses the login")
}

func TestCreate(t *testing.T) {
	s := peers.Transit(t)
	kek := open(t, s.URI("kek"))
	_, err := kek.CreateKey(t.Context(), kms.NewKey{Policy: []byte("x")})
	wants(t, "a policy", err, errdefs.ErrInvalid, "ACL policy")
	_, err = kek.CreateKey(t.Context(), kms.NewKey{RotationPeriod: time.Minute})
	wants(t, "a minute", err, errdefs.ErrInvalid, "an hour")
	before := time.Now().Add(-time.Minute)
	k, err := kek.CreateKey(t.Context(), kms.NewKey{RotationPeriod: time.Hour, Labels: map[string]string{kms.LabelPurpose: "kek"}})
	if err != nil || k.RotationPeriod != time.Hour || k.Labels != nil || k.Created.Before(before) || k.Created.After(time.Now()) {
		t.Errorf("%+v, %v", k, err)
	}
	info := s.Call(t, "GET", "/v1/transit/keys/kek", nil)
	for name, want := range map[string]any{"type": "aes256-gcm96", "exportable": false, "allow_plaintext_backup": false, "deletion_allowed": false, "derived": false} {
		if info[name] != want {
			t.Errorf("%s is %v, want %v", name, info[name], want)
		}
	}
	s.CreateKey(t, "leaky", map[string]any{"exportable": true})
	_, err = open(t, s.URI("leaky")).CreateKey(t.Context(), kms.NewKey{})
	wants(t, "an exportable key", err, errdefs.ErrExists, "exportable true")
}

func states(t *testing.T, kek *kms.KEK) string {
	t.Helper()
	k, err := kek.DescribeKey(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, v := range k.Versions {
		all = append(all, string(v.State))
	}
	return strings.Join(all, " ")
}

// TestVersions: the order that the server's two floors force.
func TestVersions(t *testing.T) {
	s := peers.Transit(t)
	kek := open(t, s.URI("kek"))
	if _, err := kek.CreateKey(t.Context(), kms.NewKey{}); err != nil {
		t.Fatal(err)
	}
	sealed := []kms.Wrapped{wrap(t, kek)}
	for range 3 {
		if _, err := kek.RotateKey(t.Context()); err != nil {
			t.Fatal(err)
		}
		sealed = append(sealed, wrap(t, kek))
	}
	for _, step := range []struct {
		version string
		to      kms.VersionState
		class   error
		want    string
	}{
		{"kek:v2", kms.Disabled, errdefs.ErrInvalid, "enabled enabled enabled enabled"},
		{"kek:v4", kms.Disabled, errdefs.ErrState, "enabled enabled enabled enabled"},
		{"kek:v4", kms.Enabled, nil, "enabled enabled enabled enabled"},
		{"kek:v5", kms.Disabled, errdefs.ErrNotFound, "enabled enabled enabled enabled"},
		{"other:v1", kms.Disabled, errdefs.ErrInvalid, "enabled enabled enabled enabled"},
		{"kek:v1", "asleep", errdefs.ErrInvalid, "enabled enabled enabled enabled"},
		{"kek:v1", kms.Disabled, nil, "disabled enabled enabled enabled"},
		{"kek:v1", kms.Disabled, nil, "disabled enabled enabled enabled"},
		{"kek:v2", kms.Disabled, nil, "disabled disabled enabled enabled"},
		{"kek:v1", kms.Enabled, errdefs.ErrInvalid, "disabled disabled enabled enabled"},
		{"kek:v2", kms.Destroyed, errdefs.ErrInvalid, "disabled disabled enabled enabled"},
		{"kek:v2", kms.Enabled, nil, "disabled enabled enabled enabled"},
		{"kek:v1", kms.Destroyed, nil, "destroyed enabled enabled enabled"},
		{"kek:v1", kms.Destroyed, nil, "destroyed enabled enabled enabled"},
		{"kek:v1", kms.Enabled, errdefs.ErrState, "destroyed enabled enabled enabled"},
		{"kek:v2", kms.Disabled, nil, "destroyed disabled enabled enabled"},
		{"kek:v3", kms.Disabled, nil, "destroyed disabled disabled enabled"},
		{"kek:v2", kms.Destroyed, nil, "destroyed destroyed disabled enabled"},
		{"", kms.Disabled, nil, "destroyed destroyed disabled disabled"},
		{"", kms.Disabled, nil, "destroyed destroyed disabled disabled"},
		{"", kms.Enabled, nil, "destroyed destroyed disabled enabled"},
		{"", kms.Destroyed, errdefs.ErrState, "destroyed destroyed disabled enabled"},
	} {
		err := kek.SetVersion(t.Context(), step.version, step.to)
		if step.class == nil && err != nil || step.class != nil && !errors.Is(err, step.class) {
			t.Errorf("%q to %s: %v, want %v", step.version, step.to, err, step.class)
		}
		now := states(t, kek)
		if now != step.want {
			t.Fatalf("%q to %s: %s, want %s", step.version, step.to, now, step.want)
		}
		for i, state := range strings.Fields(now) {
			err := unwrap(t.Context(), kek, sealed[i])
			if (err == nil) != (state == "enabled") || err != nil && !errors.Is(err, errdefs.ErrDenied) {
				t.Errorf("%q to %s: unwrapping by version %d, which is %s: %v", step.version, step.to, i+1, state, err)
			}
		}
	}
	s.Call(t, "PUT", "/v1/transit/keys/kek/config", map[string]any{"deletion_allowed": true})
	for range 2 {
		if err := kek.SetVersion(t.Context(), "", kms.Destroyed); err != nil {
			t.Errorf("destroying the key: %v", err)
		}
	}
	wants(t, "a deleted key", unwrap(t.Context(), kek, sealed[3]), errdefs.ErrDenied, "has no key kek")
}

// TestStrangeServers: servers of which no engine is part, or that lie.
func TestStrangeServers(t *testing.T) {
	keyInfo := `{"data":{"type":"aes256-gcm96","latest_version":3,"keys":{"3":1}}}`
	ciphertext := "vault:v2:" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("c"), 92))
	sealedBy2 := fmt.Sprintf(`{"data":{"ciphertext":%q}}`, ciphertext)
	for _, tt := range []struct {
		name, keys, encrypt string
		status              int
		class               error
		want                string
	}{
		{"an older version than a moment ago", keyInfo, sealedBy2, 200, errdefs.ErrState, "made anew"},
		{"no ciphertext", keyInfo, `{"data":{"ciphertext":"c"}}`, 200, errdefs.ErrState, "vault:v1:"},
		{"nothing", keyInfo, "", 200, errdefs.ErrUnavailable, "answered nothing"},
		{"a web page", "<html>", "", 200, errdefs.ErrUnavailable, ""},
		{"another form", `{"data":{"latest_version":"three"}}`, "", 200, errdefs.ErrUnavailable, "form"},
		{"a billion versions", `{"data":{"type":"aes256-gcm96","latest_version":1000000000}}`, "", 200, errdefs.ErrState, "versions"},
		{"no version", `{"data":{"type":"aes256-gcm96"}}`, "", 200, errdefs.ErrState, "versions"},
		{"without end", "", "", 200, errdefs.ErrUnavailable, "too large"},
		{"an error without end", "", "", 400, errdefs.ErrUnavailable, "too large"},
		{"a long error", `{"errors":["` + strings.Repeat("long ", 2000) + `"]}`, "", 400, errdefs.ErrInvalid, "…"},
		{"an empty error", `{"errors":[]}`, "", 403, errdefs.ErrDenied, "Forbidden"},
		{"too many requests", `{"errors":["request path \"x\": rate limit quota exceeded"]}`, "", 429, errdefs.ErrUnavailable, "rate limit"},
		{"a standby without an active one", `{"errors":["local node not active but active cluster node not found"]}`, "", 500, errdefs.ErrUnavailable, "active"},
		{"a proxy", "Bad gateway", "", 502, errdefs.ErrUnavailable, "502"},
		{"not offered", `{"errors":["1 error occurred: unsupported operation"]}`, "", 405, errdefs.ErrInvalid, "unsupported"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(tt.status)
				answer := map[bool]string{true: tt.keys, false: tt.encrypt}[strings.Contains(r.URL.Path, "/keys/")]
				_, _ = w.Write([]byte(answer))
				for strings.Contains(tt.name, "without end") {
					if _, err := w.Write(bytes.Repeat([]byte(" "), 1<<16)); err != nil {
						return
					}
				}
			}))
			defer web.Close()
			file := write(t, filepath.Join(t.TempDir(), "token"), "token")
			kek := open(t, "transit://"+web.Listener.Addr().String()+"/transit/kek?plaintext=true&token-file="+file)
			_, err := kek.Wrap(t.Context(), id, dek(t))
			wants(t, "Wrap", err, tt.class, tt.want)
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}

// TestRedirect: a standby server sends us to the active one; TLS stays TLS.
func TestRedirect(t *testing.T) {
	s := peers.PlainTransit(t)
	s.CreateKey(t, "kek", nil)
	standby := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+s.Addr+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	defer standby.Close()
	kek := open(t, strings.Replace(s.URI("kek"), s.Addr, standby.Listener.Addr().String(), 1))
	if err := unwrap(t.Context(), kek, wrap(t, kek)); err != nil {
		t.Error(err)
	}
}

// TestSpoken: what goes over the wire, since servers log it: the ID as
// associated data, and nothing of ours beside.
func TestSpoken(t *testing.T) {
	var mu sync.Mutex
	var bodies []map[string]any
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		_ = json.NewDecoder(r.Body).Decode(&body)
		mu.Lock()
		bodies = append(bodies, body)
		mu.Unlock()
		_, _ = w.Write([]byte(`{"data":{"type":"aes256-gcm96","latest_version":1}}`))
	}))
	defer web.Close()
	file := write(t, filepath.Join(t.TempDir(), "token"), "token")
	kek := open(t, "transit://"+web.Listener.Addr().String()+"/transit/kek?plaintext=true&token-file="+file)
	_, err := kek.Wrap(t.Context(), id, dek(t))
	wants(t, "Wrap", err, errdefs.ErrState)
	mu.Lock()
	defer mu.Unlock()
	want := base64.StdEncoding.EncodeToString([]byte(id))
	if !slices.ContainsFunc(bodies, func(b map[string]any) bool { return b["associated_data"] == want && len(b) == 2 }) {
		t.Errorf("no request with associated_data %s and plaintext alone among %v", want, bodies)
	}
}
