package envelope

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// recordVersion is the version of every record that this package writes.
const recordVersion = 1

// labelRecord is the HKDF label of the key of the record's MAC.
const labelRecord = "record"

// timeFormat of created and updated: UTC, whole seconds.
const timeFormat = "2006-01-02T15:04:05Z"

// record is what a store holds for one DEK, as JSON. Version 1 is final: a
// record that was once written stays readable, with testdata as witness.
//
// Decoding is strict: every field is known, in its exact spelling, once, and
// in the form in which it is written; absent is the only way to be empty.
// Only space between tokens and escapes within strings are free.
//
// The MAC is HMAC-SHA-256 under HKDF-SHA-256(DEK, no salt, "record"), over
// each field but "mac" in ascending order of its path. A path is the names
// from the outside in, joined by '/'. A field counts as
//
//	len(path) path len(value) value
//
// with lengths as 4 bytes, big-endian, and as value 's' with the string, or
// 'n' with the number as it is written. So a field that a later build adds to
// version 1 does not change the MAC of a record without it.
//
// A tombstone (state "deleted") has no wrapped key, so no MAC either: nobody
// could check it.
type record struct {
	Version int       `json:"version"`
	ID      dek.ID    `json:"id"`
	State   dek.State `json:"state"`
	Spec    specV1    `json:"spec"`
	Wrapped wrappedV1 `json:"wrapped,omitzero"`
	Claim   claimV1   `json:"claim,omitzero"`
	Header  headerV1  `json:"header,omitzero"`
	Created string    `json:"created"`
	Updated string    `json:"updated"`
	MAC     []byte    `json:"mac,omitempty"`
}

// The parts are declared here, and converted, so that a change to the types
// of package dek does not compile before somebody has thought of the format.
type (
	specV1 struct {
		Name      string        `json:"name,omitempty"`
		Cipher    string        `json:"cipher"`
		Integrity dek.Integrity `json:"integrity,omitempty"`
		Layout    string        `json:"layout,omitempty"`
	}
	wrappedV1 struct {
		Scheme     string `json:"scheme"`
		KeyID      string `json:"key_id"`
		Mechanism  string `json:"mechanism"`
		Ciphertext []byte `json:"ciphertext"` // nil only in a tombstone
	}
	claimV1 struct {
		Node string `json:"node,omitempty"`
		UUID string `json:"uuid,omitempty"`
	}
	headerV1 struct {
		UUID     string `json:"uuid,omitempty"`
		Sequence uint64 `json:"sequence,omitempty"`
	}
)

// IsZero makes omitzero work on a struct with a slice.
func (w wrappedV1) IsZero() bool {
	return w.Scheme == "" && w.KeyID == "" && w.Mechanism == "" && w.Ciphertext == nil
}

func (r *record) wrappedKey() kms.Wrapped {
	return kms.Wrapped{Ciphertext: r.Wrapped.Ciphertext, KeyID: r.Wrapped.KeyID, Mechanism: r.Wrapped.Mechanism}
}

func (r *record) setWrapped(scheme string, w kms.Wrapped) {
	r.Wrapped = wrappedV1{Scheme: scheme, KeyID: w.KeyID, Mechanism: w.Mechanism, Ciphertext: w.Ciphertext}
}

// dek returns what the record says, with key as its key.
func (r *record) dek(key secret.Bytes) dek.DEK {
	return dek.DEK{
		ID:     r.ID,
		State:  r.State,
		Spec:   dek.Spec(r.Spec),
		Claim:  dek.Claim(r.Claim),
		Header: dek.HeaderID(r.Header),
		Key:    key,
	}
}

// decodeRecord reads a record and checks everything but its MAC. ErrCorrupt,
// except for a version or a state that only a later build knows: ErrState.
func decodeRecord(data []byte) (*record, error) {
	if len(data) > MaxObject {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record has %d bytes, at most %d", len(data), MaxObject)
	}
	var header struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &header); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record is not JSON of ours: %.200s", err)
	}
	if header.Version > recordVersion {
		return nil, errdefs.Errorf(errdefs.ErrState, "the record has version %d and this build reads up to %d: a later release wrote it, upgrade this one", header.Version, recordVersion)
	}
	r := &record{}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(r); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record does not decode: %.200s", err)
	}
	if err := r.sameFields(data); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record is not in its one form: %w", err)
	}
	if r.State == dek.Rotating {
		return nil, errdefs.Errorf(errdefs.ErrState, "the DEK is being rotated, which this build cannot: upgrade it")
	}
	if err := r.validate(); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record contradicts itself: %w", err)
	}
	return r, nil
}

// encode returns the record with a MAC under key (or without, for a
// tombstone). ErrInvalid where a decoder would refuse it.
func (r *record) encode(key secret.Bytes) ([]byte, error) {
	r.MAC = nil
	if r.State != dek.Deleted {
		mac, err := r.mac(key)
		if err != nil {
			return nil, err
		}
		r.MAC = mac
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding the record: %w", err)
	}
	data = append(data, '\n')
	if _, err := decodeRecord(data); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the record cannot be stored: %v", err)
	}
	return data, nil
}

// verify checks the MAC.
func (r *record) verify(key secret.Bytes) error {
	want, err := r.mac(key)
	if err != nil {
		return err
	}
	if !hmac.Equal(r.MAC, want) {
		return errdefs.Errorf(errdefs.ErrCorrupt, "the record does not verify under its own key: something other than cryptcsi changed it; restore it from a backup of the store")
	}
	return nil
}

// mac computes the record's MAC.
func (r *record) mac(key secret.Bytes) ([]byte, error) {
	bare := *r
	bare.MAC = nil
	data, err := json.Marshal(&bare)
	if err != nil {
		return nil, fmt.Errorf("encoding the record: %w", err)
	}
	fields, err := flatten(data)
	if err != nil {
		return nil, fmt.Errorf("encoding the record: %w", err)
	}
	macKey, err := hkdf.Key(sha256.New, key.Expose(), nil, labelRecord, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("HKDF: %w", err)
	}
	defer clear(macKey)
	h := hmac.New(sha256.New, macKey)
	for _, path := range slices.Sorted(maps.Keys(fields)) {
		for _, part := range []string{path, fields[path]} {
			_ = binary.Write(h, binary.BigEndian, uint32(len(part)))
			_, _ = io.WriteString(h, part)
		}
	}
	return h.Sum(nil), nil
}

// sameFields compares the fields of data with those of what was read from
// it: what encoding/json overlooks (names in another case, duplicates, nulls,
// explicit zeros, sloppy base64) makes a difference.
func (r *record) sameFields(data []byte) error {
	got, err := flatten(data)
	if err != nil {
		return err
	}
	again, err := json.Marshal(r)
	if err != nil {
		return err
	}
	want, err := flatten(again)
	if err != nil {
		return err
	}
	for path := range got {
		if got[path] != want[path] {
			return fmt.Errorf("field %.100q", path)
		}
	}
	for path := range want {
		if _, ok := got[path]; !ok {
			return fmt.Errorf("field %q is missing", path)
		}
	}
	return nil
}

// validate says where the fields contradict each other or what may be.
func (r *record) validate() error {
	if r.Version != recordVersion {
		return fmt.Errorf("version %d", r.Version)
	}
	if _, err := dek.ParseID(string(r.ID)); err != nil {
		return err
	}
	if err := validSpec(dek.Spec(r.Spec)); err != nil {
		return err
	}
	for _, t := range []string{r.Created, r.Updated} {
		if parsed, err := time.Parse(timeFormat, t); err != nil || parsed.Format(timeFormat) != t {
			return fmt.Errorf("time %.40q is not like %s", t, timeFormat)
		}
	}
	switch r.State {
	case dek.Prepared:
		if r.Header != (headerV1{}) {
			return fmt.Errorf("prepared, but with a header")
		}
	case dek.Formatted:
		if err := validUUID(r.Header.UUID); err != nil {
			return fmt.Errorf("header: %w", err)
		}
	case dek.Deleted:
		if !r.Wrapped.IsZero() || r.Claim != (claimV1{}) || r.Header != (headerV1{}) || r.MAC != nil {
			return fmt.Errorf("deleted, but not empty")
		}
		return nil
	default:
		return fmt.Errorf("state %.40q is not known", r.State)
	}
	if r.Claim != (claimV1{}) {
		if err := validClaim(dek.Claim(r.Claim)); err != nil {
			return fmt.Errorf("claim: %w", err)
		}
	}
	w := r.Wrapped
	if w.Scheme == "" || w.KeyID == "" || w.Mechanism == "" || len(w.Ciphertext) == 0 || len(r.MAC) != sha256.Size {
		return fmt.Errorf("an incomplete wrapped key, or a MAC of %d bytes", len(r.MAC))
	}
	return nil
}

// validSpec is dek.Spec's own check, and that JSON keeps the name as it is.
func validSpec(s dek.Spec) error {
	if !utf8.ValidString(s.Name) {
		return fmt.Errorf("the name in the spec is not UTF-8")
	}
	return s.Validate()
}

func validClaim(c dek.Claim) error {
	if c.Node == "" || len(c.Node) > 256 || !utf8.ValidString(c.Node) {
		return fmt.Errorf("node name of %d bytes: must be 1 to 256 of UTF-8", len(c.Node))
	}
	return validUUID(c.UUID)
}

// validUUID checks the form in which LUKS headers and dek.NewUUID write one.
func validUUID(s string) error {
	ok := len(s) == 36
	for i := 0; ok && i < len(s); i++ {
		if i == 8 || i == 13 || i == 18 || i == 23 {
			ok = s[i] == '-'
		} else {
			ok = s[i] >= '0' && s[i] <= '9' || s[i] >= 'a' && s[i] <= 'f'
		}
	}
	if !ok {
		return fmt.Errorf("UUID %.40q is not 36 characters of lower-case hex and dashes", s)
	}
	return nil
}

// flatten returns the fields of a JSON object by path, strings as 's' with
// the string, numbers as 'n' with their text, and every other thing that a
// record never holds under another letter. An error for what is not one
// object of at most three levels, for duplicates and for arrays.
func flatten(data []byte) (map[string]string, error) {
	if !utf8.Valid(data) {
		return nil, fmt.Errorf("not UTF-8")
	}
	if !json.Valid(data) {
		return nil, fmt.Errorf("not JSON, or followed by something")
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if open, err := d.Token(); err != nil || open != json.Delim('{') {
		return nil, fmt.Errorf("not an object")
	}
	fields := map[string]string{}
	return fields, flattenObject(d, nil, fields)
}

// flattenObject reads the rest of an object whose brace was read.
func flattenObject(d *json.Decoder, path []string, fields map[string]string) error {
	if len(path) > 2 {
		return fmt.Errorf("nested too deep")
	}
	seen := map[string]bool{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return err
		}
		key := name.(string) // the decoder lets nothing else stand there
		if seen[key] || key == "" || strings.Contains(key, "/") {
			return fmt.Errorf("field name %.100q is bad or comes twice", key)
		}
		seen[key] = true
		if err := flattenValue(d, append(slices.Clip(path), key), fields); err != nil {
			return err
		}
	}
	if len(seen) == 0 {
		fields[strings.Join(path, "/")] = "{"
	}
	_, err := d.Token() // the closing brace
	return err
}

func flattenValue(d *json.Decoder, path []string, fields map[string]string) error {
	token, err := d.Token()
	if err != nil {
		return err
	}
	var value string
	switch v := token.(type) {
	case string:
		value = "s" + v
	case json.Number:
		value = "n" + v.String()
	case bool:
		value = fmt.Sprintf("b%v", v)
	case nil:
		value = "z"
	default:
		if token != json.Delim('{') {
			return fmt.Errorf("field %.100q is an array", strings.Join(path, "/"))
		}
		return flattenObject(d, path, fields)
	}
	fields[strings.Join(path, "/")] = value
	return nil
}
