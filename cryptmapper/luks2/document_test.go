package luks2_test

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
)

// A second implementation of the token's MAC, written from
// docs/header-format.md, without anything of the package.

// documentMAC returns the MAC that stands in a dump of a device's beginning,
// and the one that belongs there.
func documentMAC(dump, key []byte) (stored, computed string, err error) {
	header := bytes.Clone(dump[:4096])
	for _, field := range [][2]int{{0, 6}, {16, 24}, {256, 264}, {448, 512}} {
		clear(header[field[0]:field[1]])
	}
	text, _, _ := bytes.Cut(dump[4096:16384], []byte{0})
	var fields struct {
		Keyslots map[string]struct {
			Area struct{ Offset, Size string }
		}
		Tokens map[string]struct{ MAC string }
	}
	if err := json.Unmarshal(text, &fields); err != nil {
		return "", "", err
	}
	stored = fields.Tokens["0"].MAC
	blank := strings.Repeat("A", 43) + "="
	area := bytes.Replace(dump[4096:16384], []byte(stored), []byte(blank), 1)
	place := fields.Keyslots["0"].Area
	offset, err1 := strconv.Atoi(place.Offset)
	size, err2 := strconv.Atoi(place.Size)
	if len(stored) != len(blank) || err1 != nil || err2 != nil || offset < 0 || size < 0 || size > len(dump) || offset > len(dump)-size {
		return "", "", fmt.Errorf("no token, or no keyslot area within the dump")
	}
	macKey, err := hkdf.Key(sha256.New, key, nil, "cryptcsi luks2 header v1", 32)
	if err != nil {
		return "", "", err
	}
	mac := hmac.New(sha256.New, macKey)
	for _, part := range [][]byte{header, area, binary.BigEndian.AppendUint64(nil, uint64(offset)), dump[offset : offset+size]} {
		_ = binary.Write(mac, binary.BigEndian, uint64(len(part)))
		mac.Write(part)
	}
	return stored, base64.StdEncoding.EncodeToString(mac.Sum(nil)), nil
}

// vector is the one in the document.
func vector(t testing.TB) (dump, key []byte, macKey, mac string) {
	text, err := os.ReadFile("../../docs/header-format.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "## Vector")
	if !found {
		t.Fatal("docs/header-format.md has no vector")
	}
	row := func(name string) string {
		m := regexp.MustCompile("(?m)^\\| " + name + " \\| `(.*)` \\|$").FindStringSubmatch(rest)
		if m == nil {
			t.Fatalf("the vector has no row %q", name)
		}
		return m[1]
	}
	unhex := func(name string) []byte {
		b, err := hex.DecodeString(row(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	dump = make([]byte, 32768+258048)
	copy(dump, unhex("binary header, bytes 0 to 511"))
	copy(dump[4096:], row("JSON"))
	copy(dump[32768:], pattern(258048))
	return dump, unhex("DEK"), row("MAC key"), row("MAC")
}

// The document's vector, the second implementation and the package agree.
func TestDocument(t *testing.T) {
	dump, key, macKeyRow, mac := vector(t)
	stored, computed, err := documentMAC(dump, key)
	if err != nil || stored != mac || computed != mac {
		t.Errorf("from the document: stored %s, computed %s, %v; the vector says %s", stored, computed, err, mac)
	}
	if macKey, err := hkdf.Key(sha256.New, key, nil, "cryptcsi luks2 header v1", 32); err != nil || hex.EncodeToString(macKey) != macKeyRow {
		t.Errorf("MAC key %x, %v; the vector says %s", macKey, err, macKeyRow)
	}
	f := read(t, &disk{data: dump}, newKey(1))
	if f.Header == nil || f.Header.Token.MAC != mac {
		t.Errorf("the package reads %+v, %v", f.Header, f.Reason)
	}
	if !bytes.Equal(key, newKey(1).Expose()) {
		t.Error("the vector has another key")
	}
}

// Whatever the package seals, the second implementation verifies.
func TestDocumentVerifiesOurs(t *testing.T) {
	key := newKey(3)
	for _, f := range ours(t) {
		d := f.disk(t, key)
		stored, computed, err := documentMAC(d.data, key.Expose())
		if err != nil || stored != computed {
			t.Errorf("%s: stored %s, computed %s, %v", f.name, stored, computed, err)
		}
		if found, err := luks2.Read(d, f.want, key); err != nil || found.Header == nil {
			t.Errorf("%s: %v, %v", f.name, found.Reason, err)
		}
	}
}

// TestFirstVector: the MAC's definition must never change by accident. This
// one was computed by the first version that had a MAC, over a header with
// next to nothing in it.
func TestFirstVector(t *testing.T) {
	dump := make([]byte, 32768+65536)
	copy(dump, "LUKS\xba\xbe\x00\x02")
	binary.BigEndian.PutUint64(dump[8:], 16384)
	copy(dump[72:], "sha256")
	copy(dump[104:168], bytes.Repeat([]byte{0xa5}, 64))
	copy(dump[168:], uuid)
	copy(dump[4096:], `{"keyslots":{"0":{"type":"luks2","key_size":64,"area":{"type":"raw","offset":"32768","size":"65536"}}},"tokens":{"0":{"type":"cryptcsi","keyslots":["0"],"version":1,"dek_id":"test.cryptcsi.io/vol-1","sequence":1,"made":false,"size":50565120,"mac":"2qHdUrw3888IG+B9WqwhlxgvIooQ4hjYFUUlU4dcEAU="}},"segments":{},"digests":{},"config":{}}`)
	copy(dump[32768:], pattern(65536))
	stored, computed, err := documentMAC(dump, newKey(1).Expose())
	if err != nil || stored != computed {
		t.Errorf("stored %s, computed %s, %v", stored, computed, err)
	}
}
