package kmip_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmip"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const id = "driver.example.com/vol-1"

func open(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	return openWith(t, uri, kms.Options{})
}

func openWith(t *testing.T, uri string, o kms.Options) *kms.KEK {
	t.Helper()
	kek, err := kms.Mux{kmip.Scheme: kmip.Open}.OpenWith(t.Context(), uri, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kek.Close() })
	return kek
}

func dek(t *testing.T) secret.Bytes {
	t.Helper()
	k := secret.New(kms.KeySize)
	_, _ = rand.Read(k.Expose())
	t.Cleanup(k.Wipe)
	return k
}

// works checks that a key makes the way there and back, and returns it wrapped.
func works(t *testing.T, kek *kms.KEK) kms.Wrapped {
	t.Helper()
	key := dek(t)
	w, err := kek.Wrap(t.Context(), id, key)
	if err != nil {
		t.Fatalf("Wrap: %v", err)
	}
	got, err := kek.Unwrap(t.Context(), id, w)
	if err != nil || !got.Equal(key) {
		t.Fatalf("Unwrap: another key, or %v", err)
	}
	got.Wipe()
	return w
}

// refused checks that a wrap fails with that class and these words.
func refused(t *testing.T, kek *kms.KEK, class error, words string) {
	t.Helper()
	_, err := kek.Wrap(t.Context(), id, dek(t))
	if !errors.Is(err, class) || !strings.Contains(err.Error(), words) {
		t.Errorf("Wrap: %v, want %v with %q", err, class, words)
	}
}

// TestPyKMIP talks to a server that shares no code with ours.
func TestPyKMIP(t *testing.T) {
	server := peers.PyKMIP(t)
	t.Run("ByName", func(t *testing.T) { conformance(t, server) })
	t.Run("ByIdentifier", func(t *testing.T) {
		one, two := server.URI(server.CreateKey(t, "first")), server.URI(server.CreateKey(t, "second"))
		kmstest.Run(t, kmstest.Harness{
			Stride:    61,
			Open:      func(t *testing.T) *kms.KEK { return open(t, one) },
			OpenOther: func(t *testing.T) *kms.KEK { return open(t, two) },
		})
	})
	t.Run("Manager", func(t *testing.T) {
		kmstest.RunManager(t, kmstest.Abilities{Labels: true, Destroy: true, List: true}, func(t *testing.T) (a, b *kms.KEK) {
			return open(t, server.NameURI("managed")), open(t, server.NameURI("managed"))
		})
	})
	t.Run("Guarded", func(t *testing.T) { guarded(t, server) })
	t.Run("Ciphertext", func(t *testing.T) { ciphertext(t, server) })
	t.Run("Versions", func(t *testing.T) { protocolVersions(t, server) })
	t.Run("Certificates", func(t *testing.T) { certificates(t, server) })
	t.Run("LostAnswers", func(t *testing.T) { lostAnswers(t, server) })
	t.Run("Racers", func(t *testing.T) { racers(t, server) })
	t.Run("Refusals", func(t *testing.T) { refusals(t, server) })
}

func conformance(t *testing.T, server *peers.KMIPServer) {
	server.CreateKey(t, "one")
	other := server.URI(server.CreateKey(t, "other"))
	key, err := os.ReadFile(server.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	uri := server.NameURI("one")
	at := func(addr string) func(*testing.T) *kms.KEK {
		return func(t *testing.T) *kms.KEK {
			return openWith(t, strings.Replace(uri, server.Addr, addr, 1), kms.Options{Timeout: 300 * time.Millisecond})
		}
	}
	kmstest.Run(t, kmstest.Harness{
		Stride:      37,
		Open:        func(t *testing.T) *kms.KEK { return open(t, uri) },
		OpenOther:   func(t *testing.T) *kms.KEK { return open(t, other) },
		Deny:        func(t *testing.T) func() { return server.Deny(t, "GET") },
		Unreachable: at(peers.Addr(t)),
		Slow:        at(peers.Silent(t)),
		Rotate: func(t *testing.T) *kms.KEK {
			kek := open(t, uri)
			if _, err := kek.RotateKey(t.Context()); err != nil {
				t.Fatal(err)
			}
			return kek
		},
		Secrets: [][]byte{key},
	})
}

// guarded: a key that we make is one that the server keeps to itself.
func guarded(t *testing.T, server *peers.KMIPServer) {
	for uri, want := range map[string]string{server.NameURI("guarded"): "True", server.NameURI("exported") + "&allow-kek-export=true": "False"} {
		k, err := open(t, uri).CreateKey(t.Context(), kms.NewKey{})
		if err != nil {
			t.Fatal(err)
		}
		got := server.Client(t, fmt.Sprintf(`
client.kmip_version = enums.KMIPVersion.KMIP_1_4
print(client.get_attributes(%q, ["Sensitive"])[1][0].attribute_value.value)`, k.Versions[0].KeyID))
		if got != want {
			t.Errorf("a new key is sensitive: %s, want %s", got, want)
		}
	}
}

// ciphertext: what the server made is what the package says, computed here
// with the KEK that PyKMIP's own client fetched.
func ciphertext(t *testing.T, server *peers.KMIPServer) {
	keyID := server.CreateKey(t, "format")
	raw, err := hex.DecodeString(server.Client(t, fmt.Sprintf("print(client.get(%q).value.hex())", keyID)))
	if err != nil || len(raw) != 32 {
		t.Fatalf("the KEK has %d bytes, %v", len(raw), err)
	}
	key := dek(t)
	w, err := open(t, server.URI(keyID)).Wrap(t.Context(), id, key)
	if err != nil || w.KeyID != keyID || w.Mechanism != kmip.Mechanism {
		t.Fatalf("Wrap = key %s, %s, %v", w.KeyID, w.Mechanism, err)
	}
	block, err := aes.NewCipher(raw)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	plaintext, err := gcm.Open(nil, w.Ciphertext[:12], w.Ciphertext[12:], []byte(id))
	if err != nil || !bytes.HasSuffix(plaintext, key.Expose()) {
		t.Errorf("the ciphertext is not AES-GCM with the ID as additional data: %v", err)
	}
}

// protocolVersions: 1.4 encrypts; what is older has to hand out the KEK, which
// needs permission.
func protocolVersions(t *testing.T, server *peers.KMIPServer) {
	uri := server.URI(server.CreateKey(t, "versions"))
	if w := works(t, open(t, uri)); w.Mechanism != kmip.Mechanism {
		t.Errorf("the negotiated version wraps by %s", w.Mechanism)
	}
	for _, version := range []string{"1.0", "1.1", "1.2", "1.3", "1.4"} {
		kek := open(t, uri+"&protocol-version="+version)
		export := open(t, uri+"&allow-kek-export=true&protocol-version="+version)
		w := works(t, export)
		if version == "1.4" {
			works(t, kek)
			if w.Mechanism != kmip.Mechanism {
				t.Errorf("the KEK was fetched though the server encrypts: %s", w.Mechanism)
			}
			continue
		}
		refused(t, kek, errdefs.ErrInvalid, "allow-kek-export=true")
		if _, err := kek.Unwrap(t.Context(), id, w); w.Mechanism != kmip.MechanismExport || !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("%s: unwrapping %s without leave: %v, want ErrDenied", version, w.Mechanism, err)
		}
		made := open(t, server.NameURI("made-by-"+version)+"&allow-kek-export=true&protocol-version="+version)
		if _, err := made.CreateKey(t.Context(), kms.NewKey{}); err != nil {
			t.Errorf("%s: CreateKey: %v", version, err)
		}
		works(t, made)
	}
}

// certificates are taken from the files as they are now.
func certificates(t *testing.T, server *peers.KMIPServer) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	install := func(certFile, keyFile string) {
		t.Helper()
		for from, to := range map[string]string{certFile: cert, keyFile: key} {
			b, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(to, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	install(server.CertFile, server.KeyFile)
	kek := open(t, server.As(server.URI(server.CreateKey(t, "certificates")), cert, key))
	w := works(t, kek)

	stranger, strangerKey := server.CA.Issue(t, "stranger")
	install(stranger, strangerKey)
	refused(t, kek, errdefs.ErrDenied, "PermissionDenied")
	if _, err := kek.Unwrap(t.Context(), id, w); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("a stranger's Unwrap: %v, want ErrDenied", err)
	}
	renewed, renewedKey := server.CA.Issue(t, "owner")
	install(renewed, renewedKey)
	works(t, kek)
	install(renewed, strangerKey)
	refused(t, kek, errdefs.ErrDenied, "does not match")
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	refused(t, kek, errdefs.ErrDenied, cert)
	install(peers.NewCA(t).Issue(t, "owner"))
	refused(t, kek, errdefs.ErrDenied, "certificate")
	install(renewed, renewedKey)
	works(t, kek)

	wrongCA := open(t, strings.Replace(server.URI("1"), server.CA.File, peers.NewCA(t).File, 1))
	refused(t, wrongCA, errdefs.ErrUnavailable, "unknown authority")
}

// lostAnswers: the connection breaks after every answer that one may wait for;
// whoever tries again finds what was made, and no key is made twice.
func lostAnswers(t *testing.T, server *peers.KMIPServer) {
	proxy := newCutter(t, server.Addr)
	lost, halfMade := map[string]int{}, 0
	again := func(what string, call func() error) {
		t.Helper()
		err := call()
		if err != nil {
			lost[what]++
			if !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("%s with a lost answer: %v, want ErrUnavailable", what, err)
			}
			proxy.cutAfter(-1)
			err = call()
		}
		if err != nil {
			t.Fatalf("%s again: %v", what, err)
		}
	}
	for n := 3; n < 9; n++ { // less only cuts the handshake
		name := fmt.Sprintf("lost-%d", n)
		through := open(t, strings.Replace(server.NameURI(name), server.Addr, proxy.addr, 1))
		direct := open(t, server.NameURI(name))
		proxy.cutAfter(n)
		again("CreateKey", func() error {
			_, err := through.CreateKey(t.Context(), kms.NewKey{})
			if k, _ := direct.DescribeKey(t.Context()); len(k.Versions) == 1 && k.Versions[0].State == kms.Disabled {
				halfMade++
			}
			return err
		})
		k, err := direct.DescribeKey(t.Context())
		if err != nil || len(k.Versions) != 1 || k.Versions[0].State != kms.Enabled {
			t.Fatalf("cut after %d: %+v, %v", n, k, err)
		}
		proxy.cutAfter(n)
		again("RotateKey", func() error { _, err := through.RotateKey(t.Context()); return err })
		k, err = direct.DescribeKey(t.Context())
		if err != nil || len(k.Versions) < 2 || len(k.Versions) > 3 || !k.Versions[len(k.Versions)-1].Current {
			t.Fatalf("cut after %d: %+v, %v", n, k.Versions, err)
		}
		for _, v := range k.Versions {
			if v.State != kms.Enabled {
				t.Errorf("cut after %d: version %s was left half made", n, v.KeyID)
			}
		}
		proxy.cutAfter(-1)
		works(t, through)
	}
	for n := 4; n < 8; n++ { // the next connection works at once: nothing must be sent twice
		name := fmt.Sprintf("lost-once-%d", n)
		proxy.once.Store(true)
		proxy.cutAfter(n)
		_, failed := open(t, strings.Replace(server.NameURI(name), server.Addr, proxy.addr, 1)).CreateKey(t.Context(), kms.NewKey{})
		if k, err := open(t, server.NameURI(name)).DescribeKey(t.Context()); failed == nil && err != nil || len(k.Versions) > 1 {
			t.Errorf("cut once after %d (%v): %+v, %v", n, failed, k.Versions, err)
		}
	}
	if lost["CreateKey"] == 0 || lost["RotateKey"] == 0 || halfMade == 0 {
		t.Errorf("the connection was not cut where it matters: %v, %d keys half made", lost, halfMade)
	}
}

// racers create one name at once: PyKMIP lets them make several keys, and each
// unwraps what the others wrapped.
func racers(t *testing.T, server *peers.KMIPServer) {
	const n = 4
	var wg sync.WaitGroup
	var keks [n]*kms.KEK
	var wrapped [n]kms.Wrapped
	key := dek(t)
	for i := range n {
		keks[i] = open(t, server.NameURI("raced"))
		wg.Go(func() {
			_, err := keks[i].CreateKey(t.Context(), kms.NewKey{})
			if err == nil {
				wrapped[i], err = keks[i].Wrap(t.Context(), id, key)
			}
			if err != nil {
				t.Errorf("racer %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	for i, kek := range keks {
		for j, w := range wrapped {
			got, err := kek.Unwrap(t.Context(), id, w)
			if err != nil || !got.Equal(key) {
				t.Errorf("racer %d unwraps what %d wrapped: %v", i, j, err)
			}
			got.Wipe()
		}
	}
}

// refusals are named, each by its permission.
func refusals(t *testing.T, server *peers.KMIPServer) {
	keyID := server.CreateKey(t, "refused")
	kek := open(t, server.NameURI("refused"))
	works(t, kek)
	undo := server.Deny(t, "LOCATE")
	refused(t, kek, errdefs.ErrDenied, "needs Locate, Get Attributes, Encrypt") // as if it was not there
	undo()
	undo = server.Deny(t, "GET_ATTRIBUTES")
	refused(t, kek, errdefs.ErrDenied, "needs Locate, Get Attributes, Encrypt")
	undo()

	unusable := server.Client(t, `
from kmip.pie import objects
id = client.register(objects.SymmetricKey(enums.CryptographicAlgorithm.AES, 256, bytes(32), masks=[enums.CryptographicUsageMask.DECRYPT]))
client.activate(id)
short = client.create(enums.CryptographicAlgorithm.AES, 128, cryptographic_usage_mask=[enums.CryptographicUsageMask.ENCRYPT])
client.activate(short)
sleeping = client.create(enums.CryptographicAlgorithm.AES, 256, cryptographic_usage_mask=[enums.CryptographicUsageMask.ENCRYPT])
client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, "`+keyID+`")
print(id, short, sleeping)`)
	ids := strings.Fields(unusable)
	refused(t, open(t, server.URI(ids[0])), errdefs.ErrDenied, "Encrypt bit")
	refused(t, open(t, server.URI(ids[1])), errdefs.ErrState, "no AES-256 key")
	refused(t, open(t, server.URI(ids[2])), errdefs.ErrDenied, "PreActive")
	refused(t, open(t, server.URI("4711")), errdefs.ErrDenied, "no key 4711")
	refused(t, kek, errdefs.ErrDenied, "Deactivated")
	for _, n := range []kms.NewKey{{Policy: []byte("{}")}, {RotationPeriod: time.Hour}} {
		if _, err := open(t, server.NameURI("new")).CreateKey(t.Context(), n); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("CreateKey(%+v): %v, want ErrInvalid", n, err)
		}
	}
	if _, err := open(t, server.NameURI("refused-v2")).CreateKey(t.Context(), kms.NewKey{}); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("CreateKey of a version's name: %v, want ErrInvalid", err)
	}
	if _, err := kek.CreateKey(t.Context(), kms.NewKey{}); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("CreateKey of a revoked key: %v, want ErrExists", err)
	}
	if _, err := open(t, server.URI(keyID)).RotateKey(t.Context()); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("RotateKey by identifier: %v, want ErrInvalid", err)
	}
}

// TestReal runs against the server that TEST_KEK_URI_KMIP names, with another
// key of its in TEST_KEK_URI_KMIP_OTHER.
func TestReal(t *testing.T) {
	uri, other := os.Getenv("TEST_KEK_URI_KMIP"), os.Getenv("TEST_KEK_URI_KMIP_OTHER")
	if uri == "" || other == "" {
		t.Skip("TEST_KEK_URI_KMIP and TEST_KEK_URI_KMIP_OTHER are not set")
	}
	kmstest.Run(t, kmstest.Harness{
		Stride:    37,
		Open:      func(t *testing.T) *kms.KEK { return open(t, uri) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, other) },
	})
}

// TestOpen: what cannot work is said at once, without asking a server.
func TestOpen(t *testing.T) {
	ca := peers.NewCA(t)
	cert, key := ca.Issue(t, "owner")
	files := "cert-file=" + cert + "&key-file=" + key
	for _, tt := range []struct{ uri, want string }{
		{"kmip://host/1?" + files, ""},
		{"kmip://host:5697/?name=a%26b&ca-file=" + ca.File + "&" + files, ""},
		{"kmip://[::1]/1?server-name=kms.example.com&allow-kek-export=false&protocol-version=1.2&" + files, ""},
		{"kmip:///1?" + files, "must name the server"},
		{"kmip:opaque?" + files, "must name the server"},
		{"kmip://host?" + files, "must name the key"},
		{"kmip://host/1?name=one&" + files, "must name the key"},
		{"kmip://host/?name=" + strings.Repeat("n", 201) + "&" + files, "too long"},
		{"kmip://host/1?cert-file=" + cert, "required"},
		{"kmip://host/1?allow-kek-export=yes&" + files, "true or false"},
		{"kmip://host/1?protocol-version=2.0&" + files, "must be 1.0"},
		{"kmip://host/1?cert-file=/nowhere/tls.crt&key-file=" + key, "/nowhere/tls.crt"},
		{"kmip://host/1?ca-file=" + key + "&" + files, "no certificate"},
		{"kmip://host/1?cert-file=" + t.TempDir() + "&key-file=" + key, "regular file"},
		{"kmip://host/1?password=x&" + files, `"password" is not known`},
	} {
		kek, err := kms.Mux{kmip.Scheme: kmip.Open}.Open(t.Context(), tt.uri)
		if tt.want == "" && err == nil {
			_ = kek.Close()
			continue
		}
		if tt.want == "" || !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%s) = %v, want %q", tt.uri, err, tt.want)
		}
	}
}

// cutter is a TCP proxy that breaks a connection in the middle.
type cutter struct {
	addr   string
	target string
	left   atomic.Int64 // pieces that come back, nothing after them; negative: no cut
	once   atomic.Bool  // only the next piece is held back
}

func newCutter(t *testing.T, target string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{addr: l.Addr().String(), target: target}
	c.cutAfter(-1)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go c.serve(t.Context(), client)
		}
	}()
	return c
}

func (c *cutter) cutAfter(n int) { c.left.Store(int64(n)) }

// serve drops the piece that is one too many, when the server has sent it: so
// the server did what it was asked for, and nobody hears of it.
func (c *cutter) serve(ctx context.Context, client net.Conn) {
	defer client.Close()
	server, err := (&net.Dialer{}).DialContext(ctx, "tcp", c.target)
	if err != nil {
		return
	}
	defer server.Close()
	go pipe(server, client, func() bool { return true })
	pipe(client, server, func() bool {
		left := c.left.Load()
		if left > 0 || c.once.Load() {
			c.left.Store(left - 1)
		}
		return left != 0
	})
}

func pipe(to, from net.Conn, pass func() bool) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil || !pass() {
			_ = to.Close()
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}
