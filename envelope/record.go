package envelope

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strconv"
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

// The HKDF labels of the keys of a record's MAC and of its authenticator.
const (
	labelRecord = "record"
	labelAuth   = "record-auth"
)

// timeFormat of all times: UTC, whole seconds.
const timeFormat = "2006-01-02T15:04:05Z"

// record is what a store holds for one DEK, as JSON. Version 1 is final: a
// record that was once written stays readable, with testdata as witness.
//
// Decoding is strict: every field is known, in its exact spelling, once, and
// in the form in which it is written; absent is the only way to be empty.
// Only space between tokens and escapes within strings are free.
//
// The MAC is HMAC-SHA-256 under HKDF-SHA-256(DEK, no salt, "record"), over
// each field but "mac" and "auth" in ascending order of its path. A path is
// the names from the outside in, joined by '/'. A field counts as
//
//	len(path) path len(value) value
//
// with lengths as 4 bytes, big-endian, and as value 's' with the string,
// 'n' with the number as it is written, or 'b' with "true". So a field that a later build adds to
// version 1 does not change the MAC of a record without it.
//
// The authenticator is the same over the same fields, under
// HKDF-SHA-256(record-auth secret, no salt, "record-auth"); see authenticator.
//
// A tombstone (state "deleted") is bare: it has no wrapped key, so no MAC
// either, because nobody could check it. Within its grace, which "expires"
// ends, it still has all that the record had, the MAC as it stood included,
// and in "was" the two fields that deleting changed: former puts the record
// together again, and the MAC tells whether that is what was deleted.
type record struct {
	Version  int       `json:"version"`
	ID       dek.ID    `json:"id"`
	State    dek.State `json:"state"`
	Spec     specV1    `json:"spec"`
	Wrapped  wrappedV1 `json:"wrapped,omitzero"`
	Previous wrappedV1 `json:"previous,omitzero"` // what the header may still open with, while rotating
	Source   dek.ID    `json:"source,omitempty"`  // what it is a clone of
	Claim    claimV1   `json:"claim,omitzero"`
	Header   headerV1  `json:"header,omitzero"`
	Created  string    `json:"created"`
	Updated  string    `json:"updated"`
	Expires  string    `json:"expires,omitempty"` // of a tombstone with a key: when that may be destroyed
	Was      wasV1     `json:"was,omitzero"`
	MAC      []byte    `json:"mac,omitempty"`
	Auth     []byte    `json:"auth,omitempty"`
}

// The parts are declared here, and converted, so that a change to the types
// of package dek does not compile before somebody has thought of the format.
type (
	specV1 struct {
		Name      string        `json:"name,omitempty"`
		Cipher    string        `json:"cipher"`
		Integrity dek.Integrity `json:"integrity,omitempty"`
		Layout    string        `json:"layout,omitempty"`
		Discard   bool          `json:"discard,omitempty"`

		IntegrityMode string `json:"integrity_mode,omitempty"`
		KEK           string `json:"kek,omitempty"`
	}
	wrappedV1 struct {
		Scheme     string `json:"scheme"`
		KeyID      string `json:"key_id"`
		Mechanism  string `json:"mechanism"`
		Ciphertext []byte `json:"ciphertext"` // nil only in a tombstone
	}
	claimV1 struct {
		Node string `json:"node,omitempty"` // "" once the claim was released
		UUID string `json:"uuid,omitempty"`
	}
	headerV1 struct {
		UUID     string `json:"uuid,omitempty"`
		Sequence uint64 `json:"sequence,omitempty"`
		Backup   string `json:"backup,omitempty"` // see dek.HeaderID; absent where nobody asked for one
	}
	wasV1 struct {
		State   dek.State `json:"state,omitempty"`
		Updated string    `json:"updated,omitempty"`
	}
)

// IsZero makes omitzero work on a struct with a slice.
func (w wrappedV1) IsZero() bool {
	return w.Scheme == "" && w.KeyID == "" && w.Mechanism == "" && w.Ciphertext == nil
}

// complete says whether there is all that unwrapping takes.
func (w wrappedV1) complete() bool {
	return w.Scheme != "" && w.KeyID != "" && w.Mechanism != "" && len(w.Ciphertext) > 0
}

func (w wrappedV1) kms() kms.Wrapped {
	return kms.Wrapped{Ciphertext: w.Ciphertext, KeyID: w.KeyID, Mechanism: w.Mechanism}
}

// publicKey says whether anybody could have made one of r's wraps.
func (r *record) publicKey() bool {
	return r.Wrapped.kms().PublicKey() || r.Previous.kms().PublicKey()
}

// former returns the record that a tombstone within its grace was made of.
func (r *record) former() *record {
	f := *r
	f.State, f.Updated = r.Was.State, r.Was.Updated
	f.Expires, f.Was, f.Auth = "", wasV1{}, nil
	return &f
}

// tombstone returns what takes the place of r: with r's key until then if
// expires is not "".
func (r *record) tombstone(now, expires string) *record {
	if expires == "" {
		return &record{Version: recordVersion, ID: r.ID, State: dek.Deleted, Spec: r.Spec, Created: r.Created, Updated: now}
	}
	t := *r
	t.State, t.Updated = dek.Deleted, now
	t.Expires, t.Was = expires, wasV1{State: r.State, Updated: r.Updated}
	return &t
}

// decodeRecord reads a record and checks everything but MAC and authenticator.
// ErrCorrupt, except for a version that only a later build knows: ErrState.
func decodeRecord(data []byte) (*record, error) {
	if len(data) > MaxObject {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record has %d bytes, at most %d", len(data), MaxObject)
	}
	if r := decodeCanonical(data); r != nil {
		return r, r.checked()
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
		hint := ""
		if strings.Contains(err.Error(), "unknown field") {
			hint = ": if a later release wrote it, go back to that one"
		}
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record does not decode: %.200s%s", err, hint)
	}
	if err := r.sameFields(data); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the record is not in its one form: %w", err)
	}
	return r, r.checked()
}

// decodeCanonical reads a record that is byte by byte as canonical writes it,
// which proves more than sameFields in a fraction of the time; nil for any other.
func decodeCanonical(data []byte) *record {
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil || r.Version != recordVersion {
		return nil
	}
	if again, err := r.canonical(); err != nil || !bytes.Equal(again, data) {
		return nil
	}
	return r
}

// canonical is how a record is written.
func (r *record) canonical() ([]byte, error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding the record: %w", err)
	}
	return append(data, '\n'), nil
}

// checked is validate's error with its class.
func (r *record) checked() error {
	if err := r.validate(); err != nil {
		return errdefs.Errorf(errdefs.ErrCorrupt, "the record contradicts itself: %w", err)
	}
	return nil
}

// encode returns the record with a MAC under key (a tombstone keeps what it
// has) and, unless a is nil, with an authenticator. ErrInvalid where a decoder
// would refuse it.
func (r *record) encode(key secret.Bytes, a *authenticator) ([]byte, error) {
	var err error
	if r.State != dek.Deleted {
		if r.MAC, err = r.mac(key); err != nil {
			return nil, err
		}
	}
	r.Auth = nil
	if a != nil {
		if r.Auth, err = a.sum(r); err != nil {
			return nil, err
		}
	}
	data, err := r.canonical()
	if err != nil {
		return nil, err
	}
	again, err := decodeRecord(data)
	if err == nil && !reflect.DeepEqual(again, r) {
		err = fmt.Errorf("JSON does not keep it as it is: is all its text UTF-8?")
	}
	if err != nil {
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
	macKey, err := secret.Derive(key, nil, labelRecord, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("HKDF: %w", err)
	}
	defer clear(macKey)
	return r.sum(macKey), nil
}

// sum is HMAC-SHA-256 over the fields.
func (r *record) sum(macKey []byte) []byte {
	h := hmac.New(sha256.New, macKey)
	h.Write(r.fields())
	return h.Sum(nil)
}

// fields is what the MAC is over: the fields that flatten finds in the record
// as it is written, but mac and auth. It takes no detour by JSON, because it is
// needed for every key that is handed out.
func (r *record) fields() []byte {
	in := make(macInput, 0, 1<<10)
	in.optional("claim/node", r.Claim.Node)
	in.optional("claim/uuid", r.Claim.UUID)
	in.text("created", r.Created)
	in.optional("expires", r.Expires)
	in.optional("header/backup", r.Header.Backup)
	if r.Header.Sequence != 0 {
		in.field("header/sequence", 'n', strconv.FormatUint(r.Header.Sequence, 10))
	}
	in.optional("header/uuid", r.Header.UUID)
	in.text("id", string(r.ID))
	in.wrapped("previous", r.Previous)
	in.optional("source", string(r.Source))
	in.text("spec/cipher", r.Spec.Cipher)
	if r.Spec.Discard {
		in.field("spec/discard", 'b', "true")
	}
	in.optional("spec/integrity", string(r.Spec.Integrity))
	in.optional("spec/integrity_mode", r.Spec.IntegrityMode)
	in.optional("spec/kek", r.Spec.KEK)
	in.optional("spec/layout", r.Spec.Layout)
	in.optional("spec/name", r.Spec.Name)
	in.text("state", string(r.State))
	in.text("updated", r.Updated)
	in.field("version", 'n', strconv.Itoa(r.Version))
	in.optional("was/state", string(r.Was.State))
	in.optional("was/updated", r.Was.Updated)
	in.wrapped("wrapped", r.Wrapped)
	return in
}

// macInput is fields in the form in which they are signed.
type macInput []byte

func (in *macInput) field(path string, kind byte, value string) {
	b := append(binary.BigEndian.AppendUint32(*in, uint32(len(path))), path...)
	*in = append(append(binary.BigEndian.AppendUint32(b, uint32(1+len(value))), kind), value...)
}

func (in *macInput) text(path, value string) { in.field(path, 's', value) }

func (in *macInput) optional(path, value string) {
	if value != "" {
		in.text(path, value)
	}
}

func (in *macInput) wrapped(path string, w wrappedV1) {
	if w.IsZero() {
		return
	}
	in.text(path+"/ciphertext", base64.StdEncoding.EncodeToString(w.Ciphertext))
	in.text(path+"/key_id", w.KeyID)
	in.text(path+"/mechanism", w.Mechanism)
	in.text(path+"/scheme", w.Scheme)
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
		if err := validTime(t); err != nil {
			return err
		}
	}
	if r.Auth != nil && len(r.Auth) != sha256.Size {
		return fmt.Errorf("an authenticator of %d bytes", len(r.Auth))
	}
	if r.State == dek.Deleted {
		return r.validateTombstone()
	}
	return r.validateLive()
}

func (r *record) validateTombstone() error {
	if r.Expires == "" {
		bare := record{Version: r.Version, ID: r.ID, State: r.State, Spec: r.Spec, Created: r.Created, Updated: r.Updated}
		if !reflect.DeepEqual(bare, *r.unsigned()) || r.MAC != nil {
			return fmt.Errorf("deleted without a grace, but not empty")
		}
		return nil
	}
	if err := validTime(r.Expires); err != nil {
		return err
	}
	if r.Was.State == dek.Deleted {
		return fmt.Errorf("deleted twice")
	}
	if err := r.former().validate(); err != nil {
		return fmt.Errorf("what was deleted: %w", err)
	}
	return nil
}

func (r *record) validateLive() error {
	if r.Expires != "" || r.Was != (wasV1{}) {
		return fmt.Errorf("it is not deleted, but says when")
	}
	switch r.State {
	case dek.Prepared:
		if r.Header != (headerV1{}) {
			return fmt.Errorf("prepared, but with a header")
		}
	case dek.Formatted, dek.Rotating:
		if err := dek.CheckUUID(r.Header.UUID); err != nil {
			return fmt.Errorf("header: %w", err)
		}
		if err := dek.CheckBackup(r.Header.Backup); err != nil {
			return err
		}
	default:
		return fmt.Errorf("state %.40q is not known", r.State)
	}
	if r.Claim != (claimV1{}) {
		if err := dek.Claim(r.Claim).Validate(true); err != nil {
			return fmt.Errorf("claim: %w", err)
		}
	}
	if r.Source != "" {
		if _, err := dek.ParseID(string(r.Source)); err != nil || r.Source == r.ID {
			return fmt.Errorf("source %.300q", r.Source)
		}
	}
	if !r.Wrapped.complete() || len(r.MAC) != sha256.Size {
		return fmt.Errorf("an incomplete wrapped key, or a MAC of %d bytes", len(r.MAC))
	}
	if (r.State == dek.Rotating) != r.Previous.complete() || !r.Previous.complete() && !r.Previous.IsZero() {
		return fmt.Errorf("a previous key goes with state %s, and with no other", dek.Rotating)
	}
	return nil
}

// unsigned returns r without MAC and authenticator.
func (r *record) unsigned() *record {
	u := *r
	u.MAC, u.Auth = nil, nil
	return &u
}

func validTime(t string) error {
	if parsed, err := time.Parse(timeFormat, t); err != nil || parsed.Format(timeFormat) != t {
		return fmt.Errorf("time %.40q is not like %s", t, timeFormat)
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

// flatten returns the fields of a JSON object by path, strings as 's' with
// the string, numbers as 'n' with their text, truth values as 'b' with theirs,
// and every other thing that a record never holds under another letter. An error for what is not one
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
