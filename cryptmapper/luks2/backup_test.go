package luks2_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// The vectors of docs/header-format.md, made with Python's cryptography: of the
// volume key 00 to 5f, under the DEK 01…01. Two are of the versions that earlier
// releases made and that records still have.
const (
	backupVector    = "BAQEBAQEBAQEBAQE1erFaObqFayI2zJlA3Pmwo2lq5Izo6r1kUtajh5WCost4sTKUU6BoKgMM4IF6qh99zwabS5eCDIjlj/DNRHkMo89lpCI0Iwm/JAM0r5ml4Gvi3Uh20Gex6l5Fvsk/OBJPe1o2cfC+TDEWEFamJ/De3made5MjgLQL3j7vlBrr5G6NQJkaChtmUKFRJHHDpj+5kGED/NwvK5kt3s5wu23hXl5IDSjv7fAiA=="
	firstVector     = "AgICAgICAgICAgIC9gxO6HkAp9ZCEePDmAJuMl2fdAVVqRAOzWUbvhfg8VHHPwLEgJR7qPNSOtl7nHkv+k8Qhf4RPVWVw5N7VOlsO0M5TwPBh43psW/oYV/4LcK+ZaVP0T7v+2LudD37zooHxodfTw3I+xnAl9Hqdc+5/W8IzuzHV8NWVZQ4WydGAONOmXUZkwspl8cm9J50iwj9hVK5eHI="
	hydratingVector = "AwMDAwMDAwMDAwMD//zUZ9Q06pAOzoAzJHZk5mBNB5+BzQbcNSYxuBvcVfEZNClg7hfnOH6TSR1zPM9OJQHMVMLmI/3p/ZIqaMri80SBetaEvPr7Y1UtaRmDbMZBlfB0njnGixoIvzeO2XrCmVU4z8p0HfDhba1AAu+mu1R38Rzzk0PxT9R5JhfCPsY1ECkq8+mZG7VIzmQsmVrigDFNAn1W9/wisV4YO7bcSBM="
)

func protected() luks2.Want {
	w := want
	w.Spec.Integrity = dek.IntegrityHMAC
	return w
}

func countUp(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func TestBackupVectors(t *testing.T) {
	doc, err := os.ReadFile("../../docs/header-format.md")
	if err != nil {
		t.Fatal(err)
	}
	geometry := luks2.Geometry{Sectors: 81920, TagSize: 32, JournalSectors: 704, Interleave: 32768}
	hydration := luks2.Hydration{Start: 4194304, Region: 4096}
	for _, tt := range []struct {
		name, text string
		layout     string
		want       luks2.Backup
		// Of the token that is made from it.
		initialised, reserved int64
	}{
		{"version 3", backupVector, dek.LayoutClone, luks2.Backup{Sequence: 7, Size: 39841792, Hydration: &hydration}, 4194304, 2101248},
		{"version 2", hydratingVector, dek.LayoutClone, luks2.Backup{Size: 39841792, Hydration: &hydration}, 4194304, 2101248},
		{"version 1", firstVector, "", luks2.Backup{Size: 41943040}, 41943040, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if !strings.Contains(string(doc), "`"+tt.text+"`") {
				t.Error("docs/header-format.md does not have the vector")
			}
			w := protected()
			if _, err := luks2.OpenBackup(tt.text, uuid, w, newKey(1)); tt.layout != "" && !errors.Is(err, errdefs.ErrCorrupt) {
				t.Errorf("for a volume without the layout: %v", err)
			}
			w.Spec.Layout = tt.layout
			b, err := luks2.OpenBackup(tt.text, uuid, w, newKey(1))
			if err != nil {
				t.Fatal(err)
			}
			defer b.VolumeKey.Wipe()
			if b.SectorSize != 4096 || b.Sequence != tt.want.Sequence || b.Size != tt.want.Size || *b.Integrity != geometry ||
				(b.Hydration == nil) != (tt.want.Hydration == nil) || b.Hydration != nil && *b.Hydration != hydration ||
				!bytes.Equal(b.VolumeKey.Expose(), countUp(96)) {
				t.Errorf("it holds %+v", b)
			}
			token := b.Token(w, 9)
			if !token.Made || token.Initialised != tt.initialised || token.Reserved != tt.reserved || token.Size != b.Size ||
				token.Hydration != b.Hydration || token.Sequence != 9 || token.DEKID != string(id) || token.Version != luks2.TokenVersion(w.Spec) {
				t.Errorf("the token is %+v", token)
			}
		})
	}
}

// A backup is of the header that it was made from until anything changes that it holds.
func TestBackupOf(t *testing.T) {
	for _, f := range ours(t) {
		t.Run(f.name, func(t *testing.T) {
			key := newKey(1)
			defer key.Wipe()
			h := f.read(t, key).Header
			n := 64
			if f.want.Spec.Integrity != dek.IntegrityNone {
				n = 96
			}
			text, err := h.SealBackup(secret.Take(countUp(n)), key)
			if err != nil {
				t.Fatal(err)
			}
			b, err := luks2.OpenBackup(text, uuidOf(h), f.want, key)
			if err != nil {
				t.Fatal(err)
			}
			defer b.VolumeKey.Wipe()
			if !b.Of(h) {
				t.Error("it is not of its own header")
			}
			next, err := h.With(h.Token, key)
			if err != nil {
				t.Fatal(err)
			}
			if b.Of(next) {
				t.Error("it is of a header with a later sequence")
			}
			for what, change := range map[string]func(b *luks2.Backup){
				"an earlier version":  func(b *luks2.Backup) { b.Sequence = 0 },
				"another size":        func(b *luks2.Backup) { b.Size += 4096 },
				"another sector size": func(b *luks2.Backup) { b.SectorSize /= 8 },
				"another geometry":    func(b *luks2.Backup) { b.Integrity = &luks2.Geometry{Sectors: 8} },
				"another hydration":   func(b *luks2.Backup) { b.Hydration = &luks2.Hydration{Region: 8192} },
				"geometry or none":    func(b *luks2.Backup) { b.Integrity = swapped(b.Integrity) },
				"hydration or none":   func(b *luks2.Backup) { b.Hydration = swapped(b.Hydration) },
			} {
				other := b
				if change(&other); other.Of(h) {
					t.Errorf("%s: still of it", what)
				}
			}
		})
	}
}

// swapped is nil of something, and something of nil.
func swapped[T any](p *T) *T {
	if p != nil {
		return nil
	}
	return new(T)
}

// What is sealed opens by the description alone, and by OpenBackup only as it was.
func TestBackup(t *testing.T) {
	for _, f := range ours(t) {
		t.Run(f.name, func(t *testing.T) {
			key, n := newKey(1), 64
			defer key.Wipe()
			if f.want.Spec.Integrity != dek.IntegrityNone {
				n = 96
			}
			h := f.read(t, key).Header
			vk := secret.Take(countUp(n))
			text, err := h.SealBackup(vk, key)
			if err != nil {
				t.Fatal(err)
			}
			if plain := documentBackup(t, text); plain[0] != 3 || binary.BigEndian.Uint64(plain[37:]) != h.Token.Sequence || !bytes.Equal(plain[57:], countUp(n)) || len(text) > 300 {
				t.Errorf("%d characters hold %x", len(text), plain)
			}
			b, err := luks2.OpenBackup(text, uuidOf(h), f.want, key)
			if err != nil || !b.VolumeKey.Equal(vk) || b.Sequence != h.Token.Sequence || b.Size != h.Token.Size || b.SectorSize != h.SectorSize() ||
				(b.Integrity == nil) != (h.Token.Integrity == nil) || b.Integrity != nil && *b.Integrity != *h.Token.Integrity {
				t.Fatalf("OpenBackup = %+v, %v", b, err)
			}
			if again, err := h.SealBackup(vk, key); err != nil || again == text {
				t.Errorf("sealed twice with one nonce (%v)", err)
			}
			if _, err := h.SealBackup(key, key); err == nil {
				t.Error("a volume key of 32 bytes was sealed")
			}
			f.otherBackups(t, text, uuidOf(h), key)
		})
	}
}

func uuidOf(h *luks2.Header) string { return h.Copy.UUID() }

func (f fixture) otherBackups(t *testing.T, text, uuid string, key secret.Bytes) {
	refused := func(what, text, uuid string, w luks2.Want, key secret.Bytes) {
		t.Helper()
		if _, err := luks2.OpenBackup(text, uuid, w, key); !errors.Is(err, errdefs.ErrCorrupt) {
			t.Errorf("%s: %v, want ErrCorrupt", what, err)
		}
	}
	other := f.want
	other.ID += "x"
	refused("another DEK", text, uuid, f.want, newKey(2))
	refused("another ID", text, uuid, other, key)
	refused("another UUID", text, dek.NewUUID(), f.want, key)
	other = f.want
	if other.Spec.Integrity = dek.IntegrityHMAC; f.want.Spec.Integrity != "" {
		other.Spec.Integrity = dek.IntegrityNone
	}
	refused("another integrity", text, uuid, other, key)
	refused("nothing", "", uuid, f.want, key)
	refused("no base64", text[1:], uuid, f.want, key)
	refused("cut", text[:len(text)-4], uuid, f.want, key)
	raw, _ := base64.StdEncoding.DecodeString(text)
	for i := range raw {
		flipped := bytes.Clone(raw)
		flipped[i] ^= 1
		refused("a flipped bit", base64.StdEncoding.EncodeToString(flipped), uuid, f.want, key)
	}
}

// documentBackup opens a backup under newKey(1) as docs/header-format.md says.
func documentBackup(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	key, err := hkdf.Key(sha256.New, bytes.Repeat([]byte{1}, 32), nil, "cryptcsi luks2 backup v1", 32)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := aes.NewCipher(key)
	aead, _ := cipher.NewGCM(block)
	for _, u := range []string{uuid, constellationUUID} { // of the headers in testdata
		if plain, err := aead.Open(nil, raw[:12], raw[12:], []byte(u+string(id))); err == nil {
			return plain
		}
	}
	t.Fatalf("%s does not open", hex.EncodeToString(raw))
	return nil
}

// A blank header is one to cryptsetup, and its digest is that of the volume
// key: cryptsetup adds a keyslot with this key and with no other.
func TestBlankHeader(t *testing.T) {
	kernel.Need(t, "root", "exec:cryptsetup")
	for _, f := range ours(t) {
		t.Run(f.name, func(t *testing.T) {
			b := luks2.Backup{SectorSize: 4096, Size: 16 << 20, VolumeKey: secret.Take(countUp(64))}
			if f.want.Spec.Integrity != dek.IntegrityNone {
				b.VolumeKey, b.Integrity = secret.Take(countUp(96)), &luks2.Geometry{Sectors: 8}
			}
			file, err := os.Create(filepath.Join(t.TempDir(), "header"))
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if err := b.Blank(file, uuid, f.want); err != nil {
				t.Fatal(err)
			}
			right, wrong, pass := filepath.Join(t.TempDir(), "right"), filepath.Join(t.TempDir(), "wrong"), filepath.Join(t.TempDir(), "pass")
			bad := bytes.Clone(b.VolumeKey.Expose())
			bad[len(bad)-1] ^= 1
			for path, content := range map[string][]byte{right: b.VolumeKey.Expose(), wrong: bad, pass: []byte("passphrase")} {
				if err := os.WriteFile(path, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			add := func(volumeKey string) error {
				out, err := exec.Command("cryptsetup", "luksAddKey", "--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", fmt.Sprint("--key-size=", 8*b.VolumeKey.Len()), "--volume-key-file="+volumeKey, file.Name(), pass).CombinedOutput()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
				return err
			}
			if err := add(wrong); err == nil || !strings.Contains(err.Error(), "Volume key does not match") {
				t.Errorf("another volume key: %v", err)
			}
			if err := add(right); err != nil {
				t.Error(err)
			}
		})
	}
}
