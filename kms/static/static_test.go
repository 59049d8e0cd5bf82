package static_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/kms/static"
)

func keyFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	kek, err := kms.Mux{static.Scheme: static.Open}.Open(t.Context(), uri)
	must(t, err)
	return kek
}

func mustParse(t *testing.T, uri string) *url.URL {
	t.Helper()
	u, err := kms.ParseURI(uri)
	must(t, err)
	return u
}

func TestConformance(t *testing.T) {
	one, two, three := strings.Repeat("1", 32), strings.Repeat("2", 32), strings.Repeat("3", 32)
	first := keyFile(t, one)
	kmstest.Run(t, kmstest.Harness{
		Open:      func(t *testing.T) *kms.KEK { return open(t, "static://"+first) },
		OpenOther: func(t *testing.T) *kms.KEK { return open(t, "static://"+keyFile(t, two)) },
		Rotate: func(t *testing.T) *kms.KEK {
			return open(t, "static://"+keyFile(t, three)+"?previous-key-file="+first)
		},
		Secrets: [][]byte{[]byte(one), []byte(two), []byte(three)},
	})
}

// TestVector: AES-256-GCM of another implementation (Python's cryptography
// 48.0, key 32 × '1', nonce 12 × 'n', plaintext 64 × 'p', aad "id").
func TestVector(t *testing.T) {
	const keyID = "f0e5a24be12d9af2f8a8948fda40cd44"
	ciphertext, err := hex.DecodeString("6e6e6e6e6e6e6e6e6e6e6e6ee22eba552a7111c2d3408d3f55f2e48a32fe69690aa488375906992f78048c2c4d22e1f12bfdcdd71951c9e2194be206fc221413b98dabc679049a08d221ca1c8f7401d98e99ba8cee7a6e61311b5667")
	must(t, err)
	b, err := static.Open(t.Context(), mustParse(t, "static://"+keyFile(t, strings.Repeat("1", 32))))
	must(t, err)
	defer b.Close()
	id, err := b.CurrentKeyID(t.Context())
	if err != nil || id != keyID {
		t.Errorf("key ID %q, %v; want %s", id, err, keyID)
	}
	got, err := b.Unwrap(t.Context(), kms.Wrapped{Ciphertext: ciphertext, KeyID: keyID, Mechanism: "aes-256-gcm"}, []byte("id"))
	if want := bytes.Repeat([]byte("p"), 64); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func TestOpenRefuses(t *testing.T) {
	good := keyFile(t, strings.Repeat("1", 32))
	for _, tt := range []struct{ uri, want string }{
		{"static://host" + good, "absolute path"},
		{"static:///does/not/exist", "the file of the key"},
		{"static:///dev/null", "regular file of 32 bytes"},
		{"static://" + keyFile(t, strings.Repeat("1", 31)), "regular file of 32 bytes"},
		{"static://" + good + "?previous-key-file=" + good, "the same key"},
		{"static://" + good + "?previous-key-file=/does/not/exist", "the file of the key"},
		{"static://" + good + "?key=x", `"key" is not known`},
	} {
		if _, err := static.Open(t.Context(), mustParse(t, tt.uri)); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
	}
}
