package azurekeyvault_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/azurekeyvault"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/azurefake"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const id = "driver.example.com/vol-1"

func open(t *testing.T, uri string, o kms.Options) *kms.KEK {
	t.Helper()
	kek, err := kms.Mux{azurekeyvault.Scheme: azurekeyvault.Open}.OpenWith(t.Context(), uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kek.Close() })
	return kek
}

func newKey(t *testing.T) secret.Bytes {
	key := secret.New(kms.KeySize)
	_, _ = rand.Read(key.Expose())
	t.Cleanup(key.Wipe)
	return key
}

func wrap(t *testing.T, kek *kms.KEK, key secret.Bytes) kms.Wrapped {
	t.Helper()
	w, err := kek.Wrap(t.Context(), id, key)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	return w
}

func mustUnwrap(t *testing.T, kek *kms.KEK, w kms.Wrapped, key secret.Bytes) {
	t.Helper()
	got, err := kek.Unwrap(t.Context(), id, w)
	if err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	defer got.Wipe()
	if !got.Equal(key) {
		t.Fatal("Unwrap gave another key")
	}
}

// refused checks an error's class, and that it holds the words and no secret.
func refused(t *testing.T, what string, err, class error, s *azurefake.Server, words ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %v does not say %q", what, err, w)
		}
	}
	if strings.Contains(err.Error(), s.Secret()) {
		t.Errorf("%s: the error shows the client secret", what)
	}
}

func harness(t *testing.T, s *azurefake.Server, denials ...string) kmstest.Harness {
	return kmstest.Harness{
		Open:      func(t *testing.T) *kms.KEK { return open(t, s.URI("kek"), kms.Options{}) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, s.URI("other"), kms.Options{}) },
		Rotate: func(t *testing.T) *kms.KEK {
			s.Rotate(t, "kek")
			return open(t, s.URI("kek"), kms.Options{})
		},
		Disable: func(*testing.T) func() {
			s.SetEnabled("kek", false)
			return func() { s.SetEnabled("kek", true) }
		},
		Deny: func(*testing.T) func() {
			var undo []func()
			for _, permission := range denials {
				undo = append(undo, s.Deny(permission))
			}
			return func() {
				for _, u := range undo {
					u()
				}
			}
		},
		Unreachable: func(t *testing.T) *kms.KEK {
			return open(t, strings.ReplaceAll(s.URI("kek"), s.Host(), peers.Addr(t)), kms.Options{})
		},
		Slow: func(t *testing.T) *kms.KEK {
			return open(t, strings.ReplaceAll(s.URI("kek"), s.Host(), peers.Silent(t)), kms.Options{Timeout: 300 * time.Millisecond})
		},
		Secrets: [][]byte{[]byte(s.Secret())},
	}
}

func TestRSA(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	s.CreateKey(t, "other")
	h := harness(t, s, "keys/wrapKey", "keys/unwrapKey")
	h.PublicKey, h.Stride = true, 5
	kmstest.Run(t, h)
	mechanism(t, s, azurekeyvault.MechanismRSA)
}

func TestGCM(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, true)
	s.CreateKey(t, "kek")
	s.CreateKey(t, "other")
	kmstest.Run(t, harness(t, s, "keys/encrypt", "keys/decrypt"))
	mechanism(t, s, azurekeyvault.MechanismGCM)
}

func TestKW(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, true)
	s.CreateKeyFor(t, "kek", "wrapKey", "unwrapKey")
	s.CreateKeyFor(t, "other", "wrapKey", "unwrapKey")
	h := harness(t, s, "keys/wrapKey", "keys/unwrapKey")
	h.Deterministic = true
	kmstest.Run(t, h)
	mechanism(t, s, azurekeyvault.MechanismKW)
}

func mechanism(t *testing.T, s *azurefake.Server, want string) {
	t.Helper()
	if w := wrap(t, open(t, s.URI("kek"), kms.Options{}), newKey(t)); w.Mechanism != want {
		t.Errorf("mechanism %q, want %q", w.Mechanism, want)
	}
}

// TestAssociatedData: the ID reaches the service as associated data, which the
// KEK's own binding would hide.
func TestAssociatedData(t *testing.T) {
	s := azurefake.Start(t, true)
	s.CreateKey(t, "kek")
	u, err := kms.ParseURI(s.URI("kek"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := azurekeyvault.Open(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	plaintext := make([]byte, 64)
	w, err := b.Wrap(t.Context(), plaintext, []byte("one"))
	if err != nil || len(w.Ciphertext) != 12+64+16 {
		t.Fatalf("Wrap: %d bytes, %v", len(w.Ciphertext), err)
	}
	if got, err := b.Unwrap(t.Context(), w, []byte("one")); err != nil || !slices.Equal(got, plaintext) {
		t.Errorf("Unwrap: %x, %v", got, err)
	}
	_, err = b.Unwrap(t.Context(), w, []byte("two"))
	refused(t, "another ID", err, errdefs.ErrCorrupt, s)
}

// TestReal runs the suite against a vault of yours. The URIs name two keys.
func TestReal(t *testing.T) {
	const env, otherEnv = "TEST_KEK_URI_AZUREKEYVAULT", "TEST_KEK_URI_AZUREKEYVAULT_OTHER"
	uri, other := os.Getenv(env), os.Getenv(otherEnv)
	if uri == "" || other == "" {
		t.Skipf("%s and %s name no keys", env, otherEnv)
	}
	w := wrap(t, open(t, uri, kms.Options{}), newKey(t))
	kmstest.Run(t, kmstest.Harness{
		Open:          func(t *testing.T) *kms.KEK { return open(t, uri, kms.Options{}) },
		OpenOther:     func(t *testing.T) *kms.KEK { return open(t, other, kms.Options{}) },
		PublicKey:     w.PublicKey(),
		Deterministic: w.Mechanism == azurekeyvault.MechanismKW,
		Stride:        101,
	})
}

// TestOpen: what a URI may say; nothing is called.
func TestOpen(t *testing.T) {
	s := azurefake.Start(t, false)
	for uri, want := range map[string]string{
		"azurekeyvault://v.vault.azure.net/keys/kek":                                      "",
		"azurekeyvault://v.managedhsm.azure.net/keys/kek?algorithm=A256KW":                "",
		"azurekeyvault://v.vault.azure.cn/keys/kek":                                       "",
		"azurekeyvault://v.managedhsm.usgovcloudapi.net/keys/kek":                         "",
		"azurekeyvault://10.0.0.1/keys/kek?resource=https://vault.azure.net":              "",
		"azurekeyvault://10.0.0.1/keys/kek":                                               "resource",
		"azurekeyvault://vault.azure.net/keys/kek":                                        "resource",
		"azurekeyvault://v.vault.azure.net.example.com/keys/kek":                          "resource",
		"azurekeyvault://a.v.vault.azure.net/keys/kek":                                    "resource",
		"azurekeyvault://10.0.0.1/keys/kek?resource=vault.azure.net":                      "resource",
		"azurekeyvault://10.0.0.1/keys/kek?resource=https://vault.azure.net/x":            "resource",
		"azurekeyvault:///keys/kek":                                                       "must name a vault",
		"azurekeyvault://v.vault.azure.net/kek":                                           "must name a vault",
		"azurekeyvault://v.vault.azure.net/keys/":                                         "must name a vault",
		"azurekeyvault://v.vault.azure.net/keys/kek/0123":                                 "must name a vault",
		"azurekeyvault://v.vault.azure.net/keys/k%2fk":                                    "must name a vault",
		"azurekeyvault://v.vault.azure.net/keys/kek?algorithm=RSA1_5":                     "algorithm",
		"azurekeyvault://v.vault.azure.net/keys/kek?key-type=EC":                          "key-type",
		"azurekeyvault://v.vault.azure.net/keys/kek?key-type=RSA&algorithm=A256GCM":       "does not go with",
		"azurekeyvault://v.vault.azure.net/keys/kek?cloud=germany":                        "cloud",
		"azurekeyvault://v.vault.azure.net/keys/kek?token=x":                              `"token" is not known`,
		"azurekeyvault://v.vault.azure.net/keys/kek?client-secret-file=/none":             "tenant-id",
		s.URIWith("kek", "tenant-id", "t", "client-id", "c", "client-secret-file", "/no"): "/no",
	} {
		kek, err := kms.Mux{azurekeyvault.Scheme: azurekeyvault.Open}.Open(t.Context(), uri)
		if err == nil {
			_ = kek.Close()
		}
		if want == "" && err != nil || want != "" && (!errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want ErrInvalid with %q", uri, err, want)
		}
	}
	if calls := s.Calls(); len(calls) != 0 {
		t.Errorf("Open called the service: %v", calls)
	}
}

// TestPinned: a record that names another key is refused without asking the
// service, whatever it claims.
func TestPinned(t *testing.T) {
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
	w := wrap(t, kek, key)
	before := len(s.Calls())
	version := w.KeyID[strings.LastIndexByte(w.KeyID, '/')+1:]
	for _, tt := range []struct {
		kid   string
		class error
	}{
		{"https://" + s.Host() + "/keys/other/" + version, errdefs.ErrDenied},
		{"https://evil.example.com/keys/kek/" + version, errdefs.ErrDenied},
		{"https://evilvault.azure.net/keys/kek/" + version, errdefs.ErrDenied},
		{"https://" + s.Host() + "/keys/kek/", errdefs.ErrCorrupt},
		{"https://" + s.Host() + "/keys/kek/..%2f..%2fother", errdefs.ErrCorrupt},
		{"https://" + s.Host() + "/secrets/kek/" + version, errdefs.ErrCorrupt},
		{version, errdefs.ErrCorrupt},
	} {
		forged := w
		forged.KeyID = tt.kid
		_, err := kek.Unwrap(t.Context(), id, forged)
		refused(t, tt.kid, err, tt.class, s)
	}
	for _, m := range []string{"rsa-oaep", "RSA-OAEP-256", "a256gcm", "fake", "rsa-1_5"} {
		forged := w
		forged.Mechanism = m
		_, err := kek.Unwrap(t.Context(), id, forged)
		refused(t, "mechanism "+m, err, errdefs.ErrCorrupt, s)
	}
	if calls := s.Calls()[before:]; len(calls) > 1 || len(calls) == 1 && !strings.HasSuffix(calls[0], "/decrypt") { // a256gcm is one of the service's
		t.Errorf("the service was asked: %v", calls)
	}
	mustUnwrap(t, kek, w, key)
	if call := s.Calls()[len(s.Calls())-1]; call != "POST /keys/kek/"+version+"/unwrapkey" {
		t.Errorf("unwrapped by %s, want the version that the record names", call)
	}
}

// TestRestored: a vault that was restored from a backup unwraps what the former
// one wrapped, when told so.
func TestRestored(t *testing.T) {
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
	w := wrap(t, kek, key)
	w.KeyID = strings.Replace(w.KeyID, s.Host(), "old.example.com", 1)
	_, err := kek.Unwrap(t.Context(), id, w)
	refused(t, "a former vault's key", err, errdefs.ErrDenied, s, "former-host")
	mustUnwrap(t, open(t, s.URI("kek")+"&former-host=old.example.com", kms.Options{}), w, key)

	// Behind another's name, the vault names itself by its own.
	w.KeyID = strings.Replace(w.KeyID, "old.example.com", "own.vault.azure.net", 1)
	mustUnwrap(t, kek, w, key)
}

// TestOtherType: a key made anew with another type wraps after one failure.
func TestOtherType(t *testing.T) {
	s := azurefake.Start(t, true)
	s.CreateKeyFor(t, "kek", "wrapKey", "unwrapKey")
	kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
	old := wrap(t, kek, key)
	s.CreateKeyFor(t, "kek", "encrypt", "decrypt")
	_, err := kek.Wrap(t.Context(), id, key)
	refused(t, "the first wrap", err, errdefs.ErrDenied, s, "not permitted on this key")
	renewed := wrap(t, kek, key)
	if old.Mechanism != azurekeyvault.MechanismKW || renewed.Mechanism != azurekeyvault.MechanismGCM {
		t.Errorf("mechanisms %s and %s", old.Mechanism, renewed.Mechanism)
	}
	mustUnwrap(t, kek, old, key)
	mustUnwrap(t, kek, renewed, key)
	_, err = open(t, s.URI("kek")+"&algorithm=A256KW", kms.Options{}).Wrap(t.Context(), id, key)
	refused(t, "the URI's algorithm", err, errdefs.ErrDenied, s)
}

// TestTokens: expiry, rotation of the secret, and what cannot be repaired here.
func TestTokens(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
	w := wrap(t, kek, key)
	s.RevokeTokens(time.Hour)
	mustUnwrap(t, kek, w, key)
	s.RotateSecret(t)
	s.RevokeTokens(time.Second) // each call needs a new one soon
	mustUnwrap(t, kek, w, key)

	unwrap := func() error { _, err := kek.Unwrap(t.Context(), id, w); return err }
	good := s.Secret()
	for what, break_ := range map[string]func() error{
		"a wrong secret": func() error { return os.WriteFile(s.SecretFile(), []byte("wrong"), 0o600) },
		"no secret":      func() error { return os.WriteFile(s.SecretFile(), nil, 0o600) },
		"no file":        func() error { return os.Remove(s.SecretFile()) },
	} {
		s.RevokeTokens(time.Hour)
		if err := break_(); err != nil {
			t.Fatal(err)
		}
		refused(t, what, unwrap(), errdefs.ErrDenied, s, s.SecretFile())
		if err := os.WriteFile(s.SecretFile(), []byte(good), 0o600); err != nil {
			t.Fatal(err)
		}
		mustUnwrap(t, kek, w, key)
	}

	gone := strings.Replace(s.URI("kek"), "%2F"+s.Host(), "%2F"+peers.Addr(t), 1)
	_, err := open(t, gone, kms.Options{}).Unwrap(t.Context(), id, w)
	refused(t, "no token service", err, errdefs.ErrUnavailable, s)
	stranger := s.URIWith("kek", "tenant-id", "another-tenant", "client-id", azurefake.Client, "client-secret-file", s.SecretFile())
	_, err = open(t, stranger, kms.Options{}).Unwrap(t.Context(), id, w)
	refused(t, "another tenant", err, errdefs.ErrDenied, s, "tenant")
}

// TestAudience: a server that asks for tokens of another audience gets none.
func TestAudience(t *testing.T) {
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	uri := strings.Replace(s.URI("kek"), "vault.azure.net", "vault.azure.cn", 1)
	_, err := open(t, uri, kms.Options{}).CurrentKeyID(t.Context())
	refused(t, "another audience", err, errdefs.ErrDenied, s, "vault.azure.net", "resource")
	if calls := s.Calls(); len(calls) != 0 {
		t.Errorf("authorised calls: %v", calls)
	}
}

// TestPermissions: the missing one is named, by the service and by us.
func TestPermissions(t *testing.T) {
	for _, hsm := range []bool{false, true} {
		s := azurefake.Start(t, hsm)
		s.CreateKey(t, "kek")
		kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
		undo := s.Deny("keys/get")
		_, err := kek.Wrap(t.Context(), id, key)
		refused(t, "no get", err, errdefs.ErrDenied, s, kek.Permissions()[kms.OpCurrentKeyID], "needs")
		_, err = kek.CurrentKeyID(t.Context())
		refused(t, "no get", err, errdefs.ErrDenied, s, kek.Permissions()[kms.OpCurrentKeyID])
		undo()
		wrap(t, kek, key)
		for _, permission := range []string{"keys/wrapKey", "keys/encrypt"} {
			s.Deny(permission)
		}
		_, err = kek.Wrap(t.Context(), id, key)
		words := map[bool]string{false: "does not have keys wrapKey permission", true: "Microsoft.KeyVault/managedHsm/keys/encrypt/action"}
		refused(t, "no wrap", err, errdefs.ErrDenied, s, words[hsm], kek.Permissions()[kms.OpWrap])
	}
	s := azurefake.Start(t, false)
	_, err := open(t, s.URI("none"), kms.Options{}).CurrentKeyID(t.Context())
	refused(t, "no key", err, errdefs.ErrDenied, s, "kek create")
}

// TestThrottled: a short refusal is waited out, a long one is said at once.
func TestThrottled(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
	w := wrap(t, kek, key)
	s.Fail(2, http.StatusServiceUnavailable, "")
	mustUnwrap(t, kek, w, key)
	start := time.Now()
	s.Fail(1, http.StatusTooManyRequests, "60")
	_, err := kek.Unwrap(t.Context(), id, w)
	refused(t, "throttled", err, errdefs.ErrUnavailable, s, "429", "too many requests")
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("waited %v", took)
	}
	s.Fail(3, http.StatusInternalServerError, "")
	_, err = kek.Unwrap(t.Context(), id, w)
	refused(t, "broken", err, errdefs.ErrUnavailable, s, "500")
	mustUnwrap(t, kek, w, key)
}

// TestHanging: who waits for a token that another call asks for still ends with
// a context of its own.
func TestHanging(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, false)
	s.CreateKey(t, "kek")
	for _, part := range []string{"/", "/token"} {
		kek := open(t, s.URI("kek"), kms.Options{Timeout: 2 * time.Second})
		undo := s.Hang(part)
		first := make(chan error)
		go func() {
			_, err := kek.CurrentKeyID(t.Context())
			first <- err
		}()
		time.Sleep(100 * time.Millisecond) // so that the other is inside; nothing breaks if it is not
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		start := time.Now()
		_, err := kek.CurrentKeyID(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 1300*time.Millisecond {
			t.Errorf("%s: %v after %v, want the deadline after 200 ms", part, err, time.Since(start))
		}
		refused(t, "no answer", <-first, errdefs.ErrUnavailable, s, "no answer within 2s")
		undo()
		if _, err := kek.CurrentKeyID(t.Context()); err != nil {
			t.Errorf("%s: afterwards: %v", part, err)
		}
	}
}

func TestManager(t *testing.T) {
	t.Parallel()
	for name, hsm := range map[string]bool{"vault": false, "hsm": true} {
		t.Run(name, func(t *testing.T) {
			s := azurefake.Start(t, hsm)
			n := 0
			kmstest.RunManager(t, kmstest.Abilities{Labels: true, Rotation: true, Disable: true, List: true}, func(t *testing.T) (a, b *kms.KEK) {
				n++
				key := fmt.Sprintf("kek-%d", n)
				patient := kms.Options{Timeout: time.Minute} // making an RSA key takes its time
				return open(t, s.URI(key), patient), open(t, s.URI(key), patient)
			})
		})
	}
}

func create(t *testing.T, kek *kms.KEK, period time.Duration) kms.Key {
	t.Helper()
	key, err := kek.CreateKey(t.Context(), kms.NewKey{
		Labels: map[string]string{kms.LabelCluster: "one", kms.LabelPurpose: "kek"}, RotationPeriod: period,
	})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestCreate: what cannot be made, and what an interrupted Create left out.
func TestCreate(t *testing.T) {
	s := azurefake.Start(t, true)
	kek := open(t, s.URI("kek"), kms.Options{})
	for what, n := range map[string]kms.NewKey{
		"policy":       {Policy: []byte("{}")},
		"short period": {RotationPeriod: 24 * time.Hour},
		"odd period":   {RotationPeriod: 10*24*time.Hour + 1},
	} {
		_, err := kek.CreateKey(t.Context(), n)
		refused(t, what, err, errdefs.ErrInvalid, s)
	}
	undo := s.Deny("keys/setrotationpolicy")
	n := kms.NewKey{Labels: map[string]string{kms.LabelCluster: "one", kms.LabelPurpose: "kek"}, RotationPeriod: 30 * 24 * time.Hour}
	_, err := kek.CreateKey(t.Context(), n)
	refused(t, "no right to set the policy", err, errdefs.ErrDenied, s, "write/action")
	undo()
	if key := create(t, kek, n.RotationPeriod); key.RotationPeriod != n.RotationPeriod || len(key.Versions) != 1 {
		t.Errorf("the second Create made %+v", key)
	}
	_, err = kek.CreateKey(t.Context(), kms.NewKey{})
	refused(t, "without labels", err, errdefs.ErrExists, s, "one")
	if w := wrap(t, kek, newKey(t)); w.Mechanism != azurekeyvault.MechanismGCM {
		t.Errorf("mechanism %s", w.Mechanism)
	}

	kw := open(t, s.URI("kw")+"&algorithm=A256KW", kms.Options{})
	create(t, kw, 0)
	if w := wrap(t, kw, newKey(t)); w.Mechanism != azurekeyvault.MechanismKW {
		t.Errorf("mechanism %s", w.Mechanism)
	}
	created := slices.DeleteFunc(s.Calls(), func(c string) bool { return !strings.HasSuffix(c, "/create") })
	if !slices.Equal(created, []string{"POST /keys/kek/create", "POST /keys/kw/create"}) {
		t.Errorf("created by %v", created)
	}
}

// TestRotateOnce: what makes a version is not tried again, or there would be two.
func TestRotateOnce(t *testing.T) {
	s := azurefake.Start(t, true)
	s.CreateKey(t, "kek")
	kek := open(t, s.URI("kek"), kms.Options{})
	wrap(t, kek, newKey(t))
	s.Fail(1, http.StatusInternalServerError, "")
	_, err := kek.RotateKey(t.Context())
	refused(t, "a lost rotation", err, errdefs.ErrUnavailable, s, "500")
}

// TestWholeKey: all versions at once, deletion with its date, and the way back.
func TestWholeKey(t *testing.T) {
	s := azurefake.Start(t, true)
	kek, key := open(t, s.URI("kek"), kms.Options{}), newKey(t)
	create(t, kek, 0)
	w := wrap(t, kek, key)
	for range 3 {
		s.Rotate(t, "kek")
	}
	renewed := wrap(t, kek, key)
	set := func(state kms.VersionState) {
		t.Helper()
		if err := kek.SetVersion(t.Context(), "", state); err != nil {
			t.Fatalf("SetVersion(%s): %v", state, err)
		}
	}
	unusable := func(what string) {
		t.Helper()
		for _, w := range []kms.Wrapped{w, renewed} {
			_, err := kek.Unwrap(t.Context(), id, w)
			refused(t, what, err, errdefs.ErrDenied, s)
		}
	}
	usable := func() {
		t.Helper()
		mustUnwrap(t, kek, w, key)
		mustUnwrap(t, kek, renewed, key)
	}
	set(kms.Disabled)
	unusable("disabled")
	set(kms.Enabled)
	usable()
	set(kms.Destroyed)
	set(kms.Destroyed) // no error
	unusable("deleted")
	gone, err := kek.DescribeKey(t.Context())
	if err != nil || len(gone.Versions) != 1 || gone.Versions[0].State != kms.Destroying || gone.Labels[kms.LabelCluster] != "one" {
		t.Fatalf("a deleted key: %+v, %v", gone, err)
	}
	if left := time.Until(gone.Versions[0].Until); left < 80*24*time.Hour || left > 91*24*time.Hour {
		t.Errorf("gone for good in %v", left)
	}
	_, err = kek.CreateKey(t.Context(), kms.NewKey{Labels: gone.Labels})
	refused(t, "creating a deleted key", err, errdefs.ErrExists, s, "recovered or purged")
	set(kms.Enabled)
	usable()
	if err := open(t, s.URI("none"), kms.Options{}).SetVersion(t.Context(), "", kms.Destroyed); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("destroying nothing: %v", err)
	}
	if calls := strings.Join(s.Calls(), "\n"); strings.Contains(calls, "DELETE /deletedkeys") {
		t.Error("something was purged")
	}
}

// TestLabels: foreign tags stay, and keys without our tags are not ours.
func TestLabels(t *testing.T) {
	t.Parallel()
	s := azurefake.Start(t, false)
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		s.CreateKey(t, name)
	}
	s.SetTags("c", map[string]string{"owner": "somebody", kms.LabelCluster: "one"})
	c := open(t, s.URI("c"), kms.Options{})
	if err := c.LabelKey(t.Context(), map[string]string{kms.LabelActive: "1"}); err != nil {
		t.Fatal(err)
	}
	if tags := s.Tags("c"); tags["owner"] != "somebody" || tags[kms.LabelActive] != "1" || tags[kms.LabelCluster] != "one" {
		t.Errorf("tags %v", tags)
	}
	if err := open(t, s.URI("e"), kms.Options{}).LabelKey(t.Context(), map[string]string{kms.LabelActive: "2"}); err != nil {
		t.Fatal(err)
	}
	keys, err := c.ListKeys(t.Context())
	if err != nil || len(keys) != 2 || keys[0].Labels["owner"] != "" || keys[1].Labels[kms.LabelActive] != "2" {
		t.Errorf("ListKeys = %+v, %v", keys, err)
	}
}
