//go:build cgo

package pkcs11_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/kms/pkcs11"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const id = "driver.example.com/vol-1"

// mux is that of the process, as Opener asks for.
var mux = kms.Mux{pkcs11.Scheme: pkcs11.NewOpener().Open}

func open(t *testing.T, uri string) *kms.KEK { return openWith(t, uri, kms.Options{}) }

func openWith(t *testing.T, uri string, o kms.Options) *kms.KEK {
	t.Helper()
	kek, err := mux.OpenWith(t.Context(), uri, o)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return kek
}

func closing(t *testing.T, kek *kms.KEK) *kms.KEK {
	t.Helper()
	t.Cleanup(func() {
		if err := kek.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return kek
}

func randomKey(t *testing.T) secret.Bytes {
	t.Helper()
	k := secret.New(kms.KeySize)
	_, _ = rand.Read(k.Expose())
	t.Cleanup(k.Wipe)
	return k
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
	if err != nil || !got.Equal(key) {
		t.Errorf("Unwrap: another key, or %v", err)
	}
	got.Wipe()
}

func mustFail(t *testing.T, what string, err, class error, words string) {
	t.Helper()
	if !errors.Is(err, class) || !strings.Contains(err.Error(), words) {
		t.Errorf("%s: %v, want %v with %q", what, err, class, words)
	}
}

func TestConformance(t *testing.T) {
	for _, mechanism := range []string{"aes-gcm", "aes-kwp"} {
		t.Run(mechanism, func(t *testing.T) {
			hsm := peers.SoftHSM(t)
			slow, misbehave := shim(t, hsm)
			uri := hsm.URI("a kek") + "&mechanism=" + mechanism
			create(t, uri)
			create(t, hsm.URI("other")+"&mechanism="+mechanism)
			kmstest.Run(t, kmstest.Harness{
				Open:      func(t *testing.T) *kms.KEK { return open(t, uri) },
				OpenOther: func(t *testing.T) *kms.KEK { return open(t, hsm.URI("other")+"&mechanism="+mechanism) },
				Rotate: func(t *testing.T) *kms.KEK {
					kek := open(t, uri)
					if _, err := kek.RotateKey(t.Context()); err != nil {
						t.Fatal(err)
					}
					return kek
				},
				Disable: func(t *testing.T) func() {
					kek := closing(t, open(t, uri))
					set := func(state kms.VersionState) {
						if err := kek.SetVersion(t.Context(), "", state); err != nil {
							t.Fatal(err)
						}
					}
					set(kms.Disabled)
					return func() { set(kms.Enabled) }
				},
				Unreachable: func(t *testing.T) *kms.KEK { return open(t, strings.Replace(uri, "token=", "token=no", 1)) },
				Slow: func(t *testing.T) *kms.KEK {
					misbehave(t, "hang")
					return openWith(t, slow.URI("a kek"), kms.Options{Timeout: 200 * time.Millisecond})
				},
				Deterministic: mechanism == "aes-kwp",
				Secrets:       [][]byte{[]byte(hsm.PIN)},
			})
		})
	}
}

func create(t *testing.T, uri string) {
	t.Helper()
	kek := open(t, uri)
	defer kek.Close()
	if _, err := kek.CreateKey(t.Context(), kms.NewKey{}); err != nil {
		t.Fatal(err)
	}
}

func TestManager(t *testing.T) {
	hsm := peers.SoftHSM(t)
	for _, mechanism := range []string{"aes-gcm", "aes-kwp"} {
		t.Run(mechanism, func(t *testing.T) {
			kmstest.RunManager(t, kmstest.Abilities{Disable: true, Destroy: true}, func(t *testing.T) (a, b *kms.KEK) {
				uri := hsm.URI("kek; of "+rand.Text()) + "&mechanism=" + mechanism
				return open(t, uri), open(t, uri)
			})
		})
	}
	kek := closing(t, open(t, hsm.URI("labelled")))
	made, err := kek.CreateKey(t.Context(), kms.NewKey{Labels: map[string]string{kms.LabelCluster: "one"}})
	if err != nil || made.Labels != nil {
		t.Errorf("CreateKey with labels: %v, %v; want a key that says it has none", made.Labels, err)
	}
	_, err = kek.CreateKey(t.Context(), kms.NewKey{Policy: []byte("{}")})
	mustFail(t, "CreateKey with a policy", err, errdefs.ErrInvalid, "policy")
	_, err = kek.CreateKey(t.Context(), kms.NewKey{RotationPeriod: time.Hour})
	mustFail(t, "CreateKey with rotation", err, errdefs.ErrInvalid, "rotate")
}

// What describes a key opens it again.
func TestDescribedURI(t *testing.T) {
	hsm := peers.SoftHSM(t)
	uri := hsm.URI("100% a+b;c&d/ä")
	create(t, uri)
	kek := closing(t, open(t, uri))
	made, err := kek.DescribeKey(t.Context())
	if err != nil || strings.Contains(made.URI, "pin-source") {
		t.Fatalf("%+v, %v", made, err)
	}
	again := closing(t, open(t, made.URI+"&pin-source="+hsm.PINFile))
	key := randomKey(t)
	mustUnwrap(t, again, wrap(t, kek, key), key)
}

// Versions that another tool made: the highest number wraps, whatever its length.
func TestVersionsOfOthers(t *testing.T) {
	hsm := peers.SoftHSM(t)
	kek, key := closing(t, open(t, hsm.URI("kek"))), randomKey(t)
	_, err := kek.Wrap(t.Context(), id, key)
	mustFail(t, "Wrap without a key", err, errdefs.ErrDenied, `"kek"`)

	var old []kms.Wrapped
	for _, v := range []string{"02", "0a", "000b", "0100"} {
		hsm.CreateKey(t, "kek", v)
		w := wrap(t, kek, key)
		if w.KeyID != "kek/"+v {
			t.Errorf("wrapped under %s, want kek/%s", w.KeyID, v)
		}
		old = append(old, w)
	}
	hsm.CreateKey(t, "kek", "01")
	hsm.CreateKey(t, "kek of another", "ff")
	if current, err := kek.CurrentKeyID(t.Context()); err != nil || current != "kek/0100" {
		t.Errorf("current key %s, %v", current, err)
	}
	for _, w := range old {
		mustUnwrap(t, kek, w, key)
	}

	pinned := closing(t, open(t, strings.Replace(hsm.URI("kek"), "?", ";id=%0a?", 1)))
	mustUnwrap(t, pinned, old[1], key)
	_, err = pinned.Unwrap(t.Context(), id, old[0])
	mustFail(t, "Unwrap of another version", err, errdefs.ErrDenied, "kek/02")
	if w := wrap(t, pinned, key); w.KeyID != "kek/0a" {
		t.Errorf("wrapped under %s, want kek/0a", w.KeyID)
	}
	_, err = pinned.RotateKey(t.Context())
	mustFail(t, "RotateKey of a pinned version", err, errdefs.ErrInvalid, "id=")

	hsm.CreateKey(t, "kek", "000100")
	_, err = kek.Wrap(t.Context(), id, key)
	mustFail(t, "Wrap with two newest keys", err, errdefs.ErrState, "two keys")
	mustUnwrap(t, kek, old[3], key) // what is there can still be read
}

// A record cannot choose the key.
func TestPinned(t *testing.T) {
	hsm := peers.SoftHSM(t)
	create(t, hsm.URI("kek"))
	create(t, hsm.URI("kek/2"))
	kek, other, key := closing(t, open(t, hsm.URI("kek"))), closing(t, open(t, hsm.URI("kek/2"))), randomKey(t)
	w := wrap(t, other, key)
	_, err := kek.Unwrap(t.Context(), id, w)
	mustFail(t, "Unwrap of another's key", err, errdefs.ErrDenied, "not the URI's")
	for _, keyID := range []string{"", "kek", "kek/zz", "kek/0", strings.ToUpper(w.KeyID), "/" + w.KeyID} {
		forged := w
		forged.KeyID = keyID
		if _, err := kek.Unwrap(t.Context(), id, forged); !errors.Is(err, errdefs.ErrDenied) && !errors.Is(err, errdefs.ErrCorrupt) {
			t.Errorf("Unwrap with key ID %q: %v", keyID, err)
		}
	}
	w = wrap(t, kek, key)
	w.Mechanism = "rsa-oaep"
	_, err = kek.Unwrap(t.Context(), id, w)
	mustFail(t, "Unwrap with another mechanism", err, errdefs.ErrCorrupt, "rsa-oaep")
	w.Mechanism = pkcs11.MechanismKWP
	if _, err := kek.Unwrap(t.Context(), id, w); err == nil {
		t.Error("a GCM ciphertext was unwrapped by KWP")
	}
}

// A key that can be read out of the token wraps nothing.
func TestWeakKeys(t *testing.T) {
	hsm := peers.SoftHSM(t)
	for name, options := range map[string][]string{
		"can be read out": {"--key-type", "AES:32", "--sensitive", "--extractable", "--usage-decrypt"},
		"read out":        {"--key-type", "AES:32", "--usage-decrypt", "--extractable"},
		"32 bytes":        {"--key-type", "AES:16", "--sensitive", "--usage-decrypt"},
	} {
		hsm.Tool(t, append([]string{"--keygen", "--label", name, "--id", "01"}, options...)...)
		_, err := closing(t, open(t, hsm.URI(name))).Wrap(t.Context(), id, randomKey(t))
		mustFail(t, "Wrap", err, errdefs.ErrState, name)
	}
}

// TestInterop: what we wrap is AES-GCM and RFC 5649 as others have them.
func TestInterop(t *testing.T) {
	hsm := peers.SoftHSM(t)
	kek, dek := randomKey(t), randomKey(t)
	hsm.ImportKey(t, "gcm", "01", kek.Expose())
	block, err := aes.NewCipher(kek.Expose())
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	token := closing(t, open(t, hsm.URI("gcm")))
	w := wrap(t, token, dek)
	plaintext, err := aead.Open(nil, w.Ciphertext[:12], w.Ciphertext[12:], []byte(id))
	if err != nil || len(plaintext) != 64 || string(plaintext[32:]) != string(dek.Expose()) {
		t.Fatalf("Go's AES-GCM opens %d bytes, %v", len(plaintext), err)
	}
	w.Ciphertext = aead.Seal(w.Ciphertext[:12:12], w.Ciphertext[:12], plaintext, []byte(id))
	mustUnwrap(t, token, w, dek)

	// pkcs11-tool gives an imported key one usage: this one may only wrap.
	create(t, hsm.URI("kwp")+"&mechanism=aes-kwp")
	token = closing(t, open(t, hsm.URI("kwp")+"&mechanism=aes-kwp"))
	w = wrap(t, token, dek)
	if len(w.Ciphertext) != 64+8 {
		t.Errorf("AES-KWP of 64 bytes has %d, want 72", len(w.Ciphertext))
	}
	hsm.Tool(t, "--write-object", writeKey(t, kek), "--type", "secrkey", "--key-type", "AES:32", "--label", "wrap", "--id", "01", "--sensitive", "--usage-wrap")
	w, err = closing(t, open(t, hsm.URI("wrap")+"&mechanism=aes-kwp")).Wrap(t.Context(), id, dek)
	if err != nil {
		t.Fatal(err)
	}
	if want := keyWrapPadded(block, plaintext); string(w.Ciphertext) != string(want) {
		t.Errorf("AES-KWP gives %x, RFC 5649 %x", w.Ciphertext, want)
	}
}

func writeKey(t *testing.T, key secret.Bytes) string { return write(t, "key", string(key.Expose())) }

// keyWrapPadded is RFC 5649 for 9 bytes and more.
func keyWrapPadded(block cipher.Block, plaintext []byte) []byte {
	a := binary.BigEndian.AppendUint32([]byte{0xa6, 0x59, 0x59, 0xa6}, uint32(len(plaintext)))
	r := append(append([]byte{}, plaintext...), make([]byte, -len(plaintext)&7)...)
	var b [16]byte
	for j := range 6 {
		for i := 0; i < len(r); i += 8 {
			copy(b[:], a)
			copy(b[8:], r[i:i+8])
			block.Encrypt(b[:], b[:])
			binary.BigEndian.PutUint64(a, binary.BigEndian.Uint64(b[:])^uint64(j*len(r)/8+i/8+1))
			copy(r[i:], b[8:])
		}
	}
	return append(a, r...)
}

// shim builds a module that passes everything on to SoftHSM, and returns the
// token as it is seen through that, and how to make the module misbehave until
// the test ends or the function that it returns is called. See testdata/shim.c.
func shim(t *testing.T, hsm *peers.HSM) (*peers.HSM, func(t *testing.T, how string) (stop func())) {
	t.Helper()
	headers, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatal(err)
	}
	through := *hsm
	dir := t.TempDir()
	through.Module = filepath.Join(dir, "shim.so")
	gcc := exec.Command(peers.Program(t, "gcc"), "-shared", "-fPIC", "-I", strings.TrimSpace(string(headers)),
		"-DMODULE=\""+hsm.Module+"\"", "-o", through.Module, "testdata/shim.c", "-ldl")
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return &through, func(t *testing.T, how string) func() {
		t.Helper()
		file := filepath.Join(dir, how)
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		stop := func() { _ = os.Remove(file) }
		t.Cleanup(stop)
		return stop
	}
}

func logins(t *testing.T, hsm *peers.HSM) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(filepath.Dir(hsm.Module), "logins"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return len(b)
}

// TestWrongPIN: a wrong PIN is tried once, by however many KEKs and calls.
func TestWrongPIN(t *testing.T) {
	hsm := peers.SoftHSM(t)
	hsm.CreateKey(t, "kek", "01")
	through, misbehave := shim(t, hsm)
	right := hsm.PIN
	hsm.SetPIN(t, "wr0ng-"+right)
	kek, second, key := closing(t, open(t, through.URI("kek"))), closing(t, open(t, through.URI("kek"))), randomKey(t)

	var wg sync.WaitGroup
	for n := range 32 {
		wg.Go(func() {
			_, err := []*kms.KEK{kek, second}[n%2].Wrap(t.Context(), id, key)
			mustFail(t, "Wrap with a wrong PIN", err, errdefs.ErrDenied, hsm.PINFile)
			if err != nil && strings.Contains(err.Error(), right) {
				t.Errorf("the error shows the PIN: %v", err)
			}
		})
	}
	wg.Wait()
	if n := logins(t, through); n != 1 {
		t.Errorf("%d logins with a wrong PIN, want 1", n)
	}
	if flags := hsm.Flags(t); !strings.Contains(flags, "user PIN count low") {
		t.Errorf("the token saw no wrong PIN: %s", flags)
	}
	hsm.Tool(t, "--list-objects") // a right login clears that
	_, err := kek.Wrap(t.Context(), id, key)
	mustFail(t, "Wrap again", err, errdefs.ErrDenied, "not tried again")
	if flags := hsm.Flags(t); strings.Contains(flags, "user PIN count low") {
		t.Errorf("the wrong PIN was tried again: %s", flags)
	}

	for how, words := range map[string]string{"final-try": "one more wrong PIN", "locked": "is locked"} {
		stop := misbehave(t, how)
		hsm.SetPIN(t, right)
		_, err := kek.Wrap(t.Context(), id, key)
		mustFail(t, how, err, errdefs.ErrDenied, words)
		stop()
	}
	if n := logins(t, through); n != 1 {
		t.Errorf("%d logins, want still 1", n)
	}
	mustUnwrap(t, second, wrap(t, kek, key), key)
	if n := logins(t, through); n != 2 {
		t.Errorf("%d logins, want 2: one wrong, and one right for all", n)
	}
	if err := os.Remove(hsm.PINFile); err != nil {
		t.Fatal(err)
	}
	mustUnwrap(t, second, wrap(t, kek, key), key) // logged in as we are
}

// TestTokenRemoved: a token that goes is ErrUnavailable, one that is back works,
// with its key or another.
func TestTokenRemoved(t *testing.T) {
	hsm := peers.SoftHSM(t)
	secretKey, key := randomKey(t), randomKey(t)
	hsm.ImportKey(t, "kek", "01", secretKey.Expose())
	kek := closing(t, open(t, hsm.URI("kek")))
	w := wrap(t, kek, key)
	for _, restored := range []bool{true, false} {
		hsm.Remove(t)
		_, err := kek.Unwrap(t.Context(), id, w)
		mustFail(t, "Unwrap without the token", err, errdefs.ErrUnavailable, hsm.Token)
		hsm.Insert(t)
		if restored {
			hsm.ImportKey(t, "kek", "01", secretKey.Expose())
			eventually(t, func() error { return unwraps(t, kek, w, key) })
		} else {
			hsm.CreateKey(t, "kek", "01")
			eventually(t, func() error { _, err := kek.CurrentKeyID(t.Context()); return err })
			_, err := kek.Unwrap(t.Context(), id, w)
			mustFail(t, "Unwrap with another key of the same name", err, errdefs.ErrCorrupt, "")
		}
	}
}

func unwraps(t *testing.T, kek *kms.KEK, w kms.Wrapped, key secret.Bytes) error {
	got, err := kek.Unwrap(t.Context(), id, w)
	defer got.Wipe()
	if err == nil && !got.Equal(key) {
		t.Error("Unwrap gave another key")
	}
	return err
}

// eventually waits for a module to be initialised anew, which is not done at
// every call. Nothing but ErrUnavailable may happen until then.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		if !errors.Is(err, errdefs.ErrUnavailable) || ctx.Err() != nil {
			t.Fatalf("the token is back: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestHanging: a module that hangs costs callers their deadline and the process
// a bounded number of goroutines, and works when it does again.
func TestHanging(t *testing.T) {
	hsm := peers.SoftHSM(t)
	hsm.CreateKey(t, "kek", "01")
	through, misbehave := shim(t, hsm)
	kek := openWith(t, through.URI("kek"), kms.Options{Timeout: 100 * time.Millisecond})
	key := randomKey(t)
	w := wrap(t, closing(t, open(t, through.URI("kek"))), key)

	before := runtime.NumGoroutine()
	stop := misbehave(t, "hang")
	for range 4 {
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				start := time.Now()
				_, err := kek.Wrap(t.Context(), id, key)
				mustFail(t, "Wrap", err, errdefs.ErrUnavailable, "does not answer")
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("took %v", took)
				}
			})
		}
		wg.Wait()
	}
	if n := runtime.NumGoroutine() - before; n > 16 {
		t.Errorf("%d goroutines hang, want at most 16", n)
	}
	start := time.Now()
	if err := kek.Close(); err != nil || time.Since(start) > 5*time.Second {
		t.Errorf("Close while calls hang: %v after %v", err, time.Since(start))
	}
	stop()
	eventually(t, func() error { return unwraps(t, closing(t, open(t, through.URI("kek"))), w, key) })
	eventually(t, func() error {
		if n := runtime.NumGoroutine() - before; n > 2 {
			return errdefs.Errorf(errdefs.ErrUnavailable, "%d goroutines are left", n)
		}
		return nil
	})
}

// TestErrors: a sick token is not a corrupt key.
func TestErrors(t *testing.T) {
	hsm := peers.SoftHSM(t)
	hsm.CreateKey(t, "kek", "01")
	nopin, _, _ := strings.Cut(hsm.URI("kek"), "&")
	_, err := closing(t, open(t, nopin)).CurrentKeyID(t.Context())
	mustFail(t, "CurrentKeyID without a PIN", err, errdefs.ErrInvalid, "pin-source")

	through, misbehave := shim(t, hsm)
	kek, key := closing(t, open(t, through.URI("kek"))), randomKey(t)
	w := wrap(t, kek, key)
	for _, how := range []string{"general-error", "device-error"} {
		stop := misbehave(t, how)
		_, err := kek.Unwrap(t.Context(), id, w)
		mustFail(t, how, err, errdefs.ErrUnavailable, "CKR_"+strings.ToUpper(strings.ReplaceAll(how, "-", "_")))
		stop()
		mustUnwrap(t, kek, w, key)
	}

	_, err = kms.Mux{pkcs11.Scheme: pkcs11.NewOpener().Open}.Open(t.Context(), "pkcs11:token=a;object=b?module-path="+write(t, "module.so", "no library"))
	mustFail(t, "Open of no module", err, errdefs.ErrInvalid, "cannot be loaded")
}

// TestRace: KEKs, rotation and many callers at once.
func TestRace(t *testing.T) {
	hsm := peers.SoftHSM(t)
	create(t, hsm.URI("kek"))
	var wg sync.WaitGroup
	for n := range 8 {
		kek, key := closing(t, open(t, hsm.URI("kek"))), randomKey(t)
		wg.Go(func() {
			for range 8 {
				if n < 2 {
					if _, err := kek.RotateKey(t.Context()); err != nil {
						t.Errorf("RotateKey: %v", err)
					}
				}
				mustUnwrap(t, kek, wrap(t, kek, key), key)
			}
		})
	}
	wg.Wait()
	made, err := closing(t, open(t, hsm.URI("kek"))).DescribeKey(t.Context())
	if err != nil || len(made.Versions) != 1+2*8 {
		t.Errorf("%d versions, %v; want one of each rotation", len(made.Versions), err)
	}
}

// TestReal runs on any PKCS#11 token, with a key that exists.
func TestReal(t *testing.T) {
	uri := os.Getenv("TEST_KEK_URI_PKCS11")
	if uri == "" {
		t.Skip("set TEST_KEK_URI_PKCS11 to the URI of a key in a real token")
	}
	kek, key := closing(t, open(t, uri)), randomKey(t)
	w := wrap(t, kek, key)
	mustUnwrap(t, kek, w, key)
	w.Ciphertext[20] ^= 1
	_, err := kek.Unwrap(t.Context(), id, w)
	mustFail(t, "Unwrap of a damaged key", err, errdefs.ErrCorrupt, "")
}
