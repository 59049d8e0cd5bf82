package luks2_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	id   = dek.ID("test.cryptcsi.io/vol-1")
	uuid = "01234567-89ab-4cde-8f01-23456789abcd"
	// that of the volumes in testdata which Constellation could have made
	constellationUUID = "5a1ef0ad-1b2c-4d3e-8f40-616263646566"
)

var want = luks2.Want{ID: id, Spec: dek.Spec{Cipher: dek.CipherXTS}, SectorSize: 4096}

func newKey(fill byte) secret.Bytes { return secret.Take(bytes.Repeat([]byte{fill}, dek.Size)) }

// fixture is a header that Read or ReadConstellation takes.
type fixture struct {
	name string
	head []byte // both copies; of ours without MAC
	want luks2.Want
	ours bool
}

// load returns a header of testdata.
func load(t testing.TB, name string) []byte {
	t.Helper()
	file, err := os.Open("testdata/" + name + ".gz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unzipped, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	head, err := io.ReadAll(unzipped)
	if err != nil || len(head) != 2*luks2.CopySize {
		t.Fatalf("%s: %d bytes, %v", name, len(head), err)
	}
	return head
}

func constellation(t testing.TB) []fixture {
	w := luks2.Want{ID: constellationUUID, Spec: dek.Spec{Cipher: dek.CipherXTS}, SectorSize: 4096}
	protected := w
	protected.Spec.Integrity = dek.IntegrityHMAC
	return []fixture{
		{"Constellation", load(t, "constellation"), w, false},
		{"Constellation with integrity", load(t, "constellation-integrity"), protected, false},
	}
}

// ours are a plain volume, one with integrity, put together from a real header
// with integrity and from a real token, and that one with an area for dm-clone,
// which it uses since it grew.
func ours(t testing.TB) []fixture {
	plain := load(t, "ours")
	protected := bytes.Clone(load(t, "constellation-integrity")[:luks2.CopySize])
	text := jsonOf(protected)
	from, to := strings.Index(text, `"kdf":`), strings.Index(text, `}}},"tokens"`)
	text = text[:from] + `"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"Zf/m4C9/RRy3nI/YlBT4+HZmpt7E91wnfBvesLshjrg="` + text[to:]
	text = strings.Replace(text, `"tokens":{}`, `"tokens":{"0":{"type":"cryptcsi","keyslots":["0"],"version":1,"dek_id":"test.cryptcsi.io/vol-1","sequence":7,"made":true,"size":41943040,"initialised":41943040,"integrity":{"sectors":81920,"tag_size":32,"journal_sectors":704,"interleave_sectors":32768},"mac":"`+noMAC+`"}}`, 1)
	setJSON(protected, text)
	w := want
	w.Spec.Integrity = dek.IntegrityHMAC
	hydrating, cloned := bytes.Clone(protected), w
	cloned.Spec.Layout = dek.LayoutClone
	text = strings.Replace(text, `"version":1`, `"version":2`, 1)
	text = strings.Replace(text, `"size":41943040,"initialised":41943040`, `"size":39841792,"initialised":8192,"reserved":2101248,"hydration":{"start":8192,"region":4096}`, 1)
	setJSON(hydrating, text)
	return []fixture{
		{"ours", twice(plain), want, true},
		{"ours with integrity", twice(protected), w, true},
		{"ours, hydrating", twice(hydrating), cloned, true},
	}
}

func all(t testing.TB) []fixture { return append(ours(t), constellation(t)...) }

const noMAC = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

func jsonOf(raw []byte) string {
	text, _, _ := bytes.Cut(raw[4096:luks2.CopySize], []byte{0})
	return string(text)
}

func setJSON(raw []byte, text string) {
	clear(raw[4096:luks2.CopySize])
	copy(raw[4096:luks2.CopySize], text)
	setChecksum(raw[:luks2.CopySize])
}

func setChecksum(raw []byte) {
	clear(raw[448:512])
	sum := sha256.Sum256(raw)
	copy(raw[448:], sum[:])
}

// twice returns a primary copy with the secondary one that belongs to it, both
// with right checksums.
func twice(first []byte) []byte {
	head := append(bytes.Clone(first[:luks2.CopySize]), first[:luks2.CopySize]...)
	second := head[luks2.CopySize:]
	copy(second, "SKUL")
	binary.BigEndian.PutUint64(second[256:], luks2.CopySize)
	setChecksum(head[:luks2.CopySize])
	setChecksum(second)
	return head
}

// pattern is what stands for key material.
func pattern(size int) []byte {
	period := make([]byte, 256)
	for i := range period {
		period[i] = byte(i * 7)
	}
	return bytes.Repeat(period, size/len(period))
}

// areaSize is that of the keyslot area with this volume key.
func (f fixture) areaSize() int {
	if f.want.Spec.Integrity == dek.IntegrityHMAC {
		return 385024
	}
	return 258048
}

// disk returns a device with the fixture's header. What is ours is sealed with
// the right key by the implementation of the document, whatever the header says:
// so what refuses it is not the MAC.
func (f fixture) disk(t testing.TB, key secret.Bytes) *disk {
	t.Helper()
	d := &disk{data: make([]byte, 512<<10), writes: -1}
	copy(d.data[32768:], pattern(f.areaSize()))
	copy(d.data, f.head)
	if f.ours {
		d.reseal(key)
	}
	return d
}

// reseal puts the right MAC and checksum into every copy that has room for it.
func (d *disk) reseal(key secret.Bytes) {
	for _, at := range []int{0, luks2.CopySize} {
		raw := d.data[at : at+luks2.CopySize]
		dump := append(bytes.Clone(raw), d.data[luks2.CopySize:]...)
		if stored, computed, err := documentMAC(dump, key.Expose()); err == nil {
			copy(raw[4096:], bytes.Replace(raw[4096:], []byte(stored), []byte(computed), 1))
		}
		setChecksum(raw)
	}
}

// with returns the fixture with another JSON in both copies.
func (f fixture) with(text string) fixture {
	first := bytes.Clone(f.head[:luks2.CopySize])
	setJSON(first, text)
	f.head = twice(first)
	return f
}

// read is Read or ReadConstellation.
func (f fixture) read(t testing.TB, key secret.Bytes) luks2.Found {
	t.Helper()
	return f.readDisk(t, f.disk(t, key), key)
}

func (f fixture) readDisk(t testing.TB, d *disk, key secret.Bytes) luks2.Found {
	t.Helper()
	found, err := luks2.ReadConstellation(d, f.want)
	if f.ours {
		found, err = luks2.Read(d, f.want, key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func random(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*37 + n)
	}
	return base64.StdEncoding.EncodeToString(b)
}
