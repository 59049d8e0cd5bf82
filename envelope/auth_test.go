package envelope_test

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

const rsaMechanism = kms.PublicKeyPrefix + "oaep-256"

// rsaBackend is a KMS whose key anybody can wrap with, and which knows no
// associated data.
type rsaBackend struct{ key *rsa.PrivateKey }

func newRSABackend(t *testing.T) rsaBackend {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return rsaBackend{key}
}

func (b rsaBackend) Wrap(_ context.Context, plaintext, _ []byte) (kms.Wrapped, error) {
	c, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, &b.key.PublicKey, plaintext, nil)
	return kms.Wrapped{Ciphertext: c, KeyID: "rsa/1", Mechanism: rsaMechanism}, err
}

func (b rsaBackend) Unwrap(_ context.Context, w kms.Wrapped, _ []byte) ([]byte, error) {
	if w.Mechanism != rsaMechanism || w.KeyID != "rsa/1" {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %q of key %q is not ours", w.Mechanism, w.KeyID)
	}
	plaintext, err := rsa.DecryptOAEP(sha256.New(), nil, b.key, w.Ciphertext, nil)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "does not decrypt")
	}
	return plaintext, nil
}

func (b rsaBackend) CurrentKeyID(context.Context) (string, error) { return "rsa/1", nil }
func (b rsaBackend) Close() error                                 { return nil }

func rsaKEK(b kms.Backend) *kms.KEK { return kms.New("azurekeyvault", b, kms.Options{}) }

// attacker writes the store and knows the public key and how records are made.
// He has no other secret.
type attacker struct {
	*testing.T
	public rsaBackend
	key    []byte // a DEK of his own
}

func (a attacker) wrap(id dek.ID) map[string]any {
	digest := sha256.Sum256([]byte(id))
	w, err := a.public.Wrap(a.Context(), append(digest[:], a.key...), nil)
	if err != nil {
		a.Fatal(err)
	}
	return map[string]any{"scheme": "azurekeyvault", "key_id": w.KeyID, "mechanism": w.Mechanism, "ciphertext": w.Ciphertext}
}

// record makes a record with his key and the right MAC under it; edit changes
// it before.
func (a attacker) record(id dek.ID, edit map[string]any) string {
	r := map[string]any{
		"version": 1, "id": id, "state": "prepared", "spec": map[string]any{"name": spec().Name, "cipher": spec().Cipher, "integrity": spec().Integrity},
		"wrapped": a.wrap(id), "created": "2026-01-02T03:04:05Z", "updated": "2026-01-02T03:04:05Z",
	}
	maps.Copy(r, edit)
	return a.sign(r)
}

// sign computes the MAC under his key.
func (a attacker) sign(r map[string]any) string {
	delete(r, "mac")
	auth := r["auth"]
	delete(r, "auth")
	macKey, err := hkdf.Key(sha256.New, a.key, nil, "record", 32)
	if err != nil {
		a.Fatal(err)
	}
	h := hmac.New(sha256.New, macKey)
	fields := map[string]string{}
	data, err := json.Marshal(r)
	if err != nil {
		a.Fatal(err)
	}
	var plain map[string]any
	if err := json.Unmarshal(data, &plain); err != nil {
		a.Fatal(err)
	}
	flat("", plain, fields)
	for _, path := range slices.Sorted(maps.Keys(fields)) {
		for _, s := range []string{path, fields[path]} {
			_ = binary.Write(h, binary.BigEndian, uint32(len(s)))
			h.Write([]byte(s))
		}
	}
	r["mac"] = h.Sum(nil)
	if auth != nil {
		r["auth"] = auth
	}
	data, err = json.Marshal(r)
	if err != nil {
		a.Fatal(err)
	}
	return string(data)
}

func flat(path string, v any, fields map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for name, inner := range v {
			flat(strings.TrimPrefix(path+"/"+name, "/"), inner, fields)
		}
	case string:
		fields[path] = "s" + v
	default:
		fields[path] = fmt.Sprintf("n%v", v)
	}
}

func parse(t *testing.T, data string) map[string]any {
	t.Helper()
	var r map[string]any
	if err := json.Unmarshal([]byte(data), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func recordSecret() secret.Bytes { return countUp(64) }

// TestPublicKeyNeedsASecret: without one nothing is made under such a KEK, and
// nothing is read.
func TestPublicKeyNeedsASecret(t *testing.T) {
	store, b := openStore(t, "mem://"), newRSABackend(t)
	without := newKeyring(t, rsaKEK(b), store, fast(1))
	with := newKeyring(t, rsaKEK(b), store, envelope.Options{RecordAuth: recordSecret()})
	refused := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "--record-auth-secret-file") {
			t.Errorf("%s: %v, want ErrInvalid that names the flag", what, err)
		}
	}
	_, err := without.CreateDEK(t.Context(), id, spec())
	refused("CreateDEK", err)
	if _, _, err := store.Read(t.Context(), envelope.ObjectName(id)); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("something was stored: %v", err)
	}
	create(t, with, id)
	_, err = without.GetDEK(t.Context(), id)
	refused("GetDEK", err)
	refused("DeleteDEK", without.DeleteDEK(t.Context(), id))

	const symmetric = dek.ID("driver.example.com/vol-2")
	fake := kmstest.NewBackend()
	create(t, newKeyring(t, fakeKEK(fake), store, fast(1)), symmetric)
	both, err := envelope.New([]*kms.KEK{rsaKEK(b), fakeKEK(fake)}, []envelope.Store{store}, fast(1))
	if err != nil {
		t.Fatal(err)
	}
	before, _ := stored(t, store, symmetric)
	refused("RewrapDEK", both.RewrapDEK(t.Context(), symmetric))
	if after, _ := stored(t, store, symmetric); after != before {
		t.Error("RewrapDEK changed the record")
	}
}

// TestAuthLife: the whole life under a public key.
func TestAuthLife(t *testing.T) {
	store, b := openStore(t, "mem://"), newRSABackend(t)
	k := newKeyring(t, rsaKEK(b), store, envelope.Options{RecordAuth: recordSecret(), Grace: time.Hour})
	want := format(t, k, id)
	d, err := k.RotateDEK(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Wipe()
	for _, step := range []func(context.Context, dek.ID) error{k.RewrapDEKAlways, k.DeleteDEK, k.RestoreDEK} {
		if err := step(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	got, err := k.GetDEK(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Key.Equal(d.Key) || !got.Previous.Equal(want.Key) {
		t.Error("other keys at the end")
	}
	if r := parse(t, first(stored(t, store, id))); r["auth"] == nil {
		t.Error("the record has no authenticator")
	}
	other := newKeyring(t, rsaKEK(b), store, envelope.Options{RecordAuth: countUp(65)})
	if _, err := other.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrCorrupt) || !strings.Contains(err.Error(), "secret") {
		t.Errorf("with another secret: %v, want ErrCorrupt about the secret", err)
	}
}

func first(a, _ string) string { return a }

// TestPlanting: whoever writes the store and has the public key gets no key
// that he knows accepted, by no way in.
func TestPlanting(t *testing.T) {
	const (
		uuid   = "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"
		victim = dek.ID("driver.example.com/victim")
	)
	b, fake := newRSABackend(t), kmstest.NewBackend()
	a := attacker{T: t, public: rsaBackend{&rsa.PrivateKey{PublicKey: b.key.PublicKey}}, key: []byte(strings.Repeat("k", dek.Size))}
	store := openStore(t, "mem://")
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	options := func() envelope.Options {
		return envelope.Options{Attempts: 1, RecordAuth: recordSecret(), Grace: time.Hour, Now: func() time.Time { return now }}
	}
	// The victim's cluster: an RSA KEK now, a symmetric one before.
	k, err := envelope.New([]*kms.KEK{rsaKEK(b), fakeKEK(fake)}, []envelope.Store{store}, options())
	if err != nil {
		t.Fatal(err)
	}
	format(t, k, victim)
	signed := parse(t, first(stored(t, store, victim)))
	before := newKeyring(t, fakeKEK(fake), store, fast(1))
	const symmetric = dek.ID("driver.example.com/symmetric")
	format(t, before, symmetric)
	symmetricRecord := parse(t, first(stored(t, store, symmetric)))

	formatted := map[string]any{"state": "formatted", "header": map[string]any{"uuid": uuid, "sequence": 1}}
	renamed := func(mechanism string) map[string]any {
		w := a.wrap(victim)
		w["mechanism"] = mechanism
		return map[string]any{"wrapped": w}
	}
	asFake := a.wrap(victim)
	asFake["scheme"] = "fake"
	asSymmetric := a.wrap(symmetric)
	asSymmetric["scheme"], asSymmetric["mechanism"] = "fake", "fake"
	rotating := maps.Clone(signed)
	rotating["state"], rotating["previous"] = "rotating", a.wrap(victim)
	previousOfSymmetric := maps.Clone(symmetricRecord)
	previousOfSymmetric["state"], previousOfSymmetric["previous"] = "rotating", a.wrap(symmetric)
	swapped := maps.Clone(signed)
	swapped["wrapped"] = a.wrap(victim)
	tombstone := map[string]any{
		"state": "deleted", "expires": "2099-01-01T00:00:00Z", "was": map[string]any{"state": "prepared", "updated": "2026-01-02T03:04:05Z"},
	}
	plain := func(r map[string]any) string {
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for _, tt := range []struct {
		name, data string
		id         dek.ID
	}{
		{"a new record", a.record(victim, nil), victim},
		{"a formatted one", a.record(victim, formatted), victim},
		{"with an authenticator of zeros", a.record(victim, map[string]any{"auth": make([]byte, 32)}), victim},
		{"with the authenticator of the good record", a.record(victim, map[string]any{"auth": signed["auth"]}), victim},
		{"with the good record's fields and his key", a.sign(swapped), victim},
		{"the mechanism in capitals", a.record(victim, renamed("RSA-OAEP-256")), victim},
		{"the mechanism of a symmetric key", a.record(victim, renamed("fake")), victim},
		{"the mechanism with a space", a.record(victim, renamed(" "+rsaMechanism)), victim},
		{"the scheme of the symmetric KEK", a.record(victim, map[string]any{"wrapped": asFake}), victim},
		{"scheme and mechanism of the symmetric KEK", a.record(symmetric, map[string]any{"wrapped": asSymmetric}), symmetric},
		{"his key as previous", plain(rotating), victim},
		{"his key as previous, signed with it", a.sign(maps.Clone(rotating)), victim},
		{"his key as previous of a symmetric record", plain(previousOfSymmetric), symmetric},
		{"his key as previous of a symmetric record, signed with it", a.sign(previousOfSymmetric), symmetric},
		{"a tombstone to restore", a.record(victim, tombstone), victim},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, version := stored(t, store, tt.id)
			good, _ := stored(t, store, tt.id)
			if err := store.Replace(t.Context(), envelope.ObjectName(tt.id), []byte(tt.data), version); err != nil {
				t.Fatal(err)
			}
			defer func() { overwrite(t, store, tt.id, good) }()
			a.attack(t, k, tt.id)
			// Nor does deleting and restoring make the record a good one.
			if err := k.DeleteDEK(t.Context(), tt.id); err == nil {
				if err := k.RestoreDEK(t.Context(), tt.id); err == nil && tt.id == victim {
					t.Error("RestoreDEK took a planted record")
				}
				a.attack(t, k, tt.id)
			}
		})
	}
}

// attack calls everything and looks for his key in what comes back.
func (a attacker) attack(t *testing.T, k *envelope.Keyring, id dek.ID) {
	t.Helper()
	check := func(what string, d dek.DEK, err error) {
		t.Helper()
		if err == nil {
			t.Errorf("%s works", what)
		}
		for _, key := range []secret.Bytes{d.Key, d.Previous} {
			if string(key.Expose()) == string(a.key) {
				t.Errorf("%s gives the attacker's key", what)
			}
		}
		d.Wipe()
	}
	d, err := k.GetDEK(t.Context(), id)
	check("GetDEK", d, err)
	d, err = k.CreateDEK(t.Context(), id, spec())
	check("CreateDEK", d, err)
	d, err = k.RotateDEK(t.Context(), id)
	check("RotateDEK", d, err)
	d, err = k.CloneDEK(t.Context(), id+"-clone", spec(), id)
	check("CloneDEK", d, err)
	_, err = k.ClaimFormat(t.Context(), id, dek.Claim{Node: "n", UUID: dek.NewUUID()})
	check("ClaimFormat", dek.DEK{}, err)
	check("ConfirmDEK", dek.DEK{}, k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: dek.NewUUID(), Sequence: 99}))
	check("RewrapDEK", dek.DEK{}, k.RewrapDEKAlways(t.Context(), id))
	_, err = k.Prune(t.Context(), id)
	check("Prune", dek.DEK{}, err)
	check("Forget", dek.DEK{}, k.Forget(t.Context(), id))
}

// TestAttackerIsReal: without the check for an authenticator his records would
// be taken, so the tests above try something.
func TestAttackerIsReal(t *testing.T) {
	b, store := newRSABackend(t), openStore(t, "mem://")
	a := attacker{T: t, public: b, key: []byte(strings.Repeat("k", dek.Size))}
	k := newKeyring(t, kms.New("azurekeyvault", unmarked{b}, kms.Options{}), store, fast(1))
	data := strings.Replace(a.record(id, nil), rsaMechanism, "oaep", 1)
	r := parse(t, data)
	if err := store.Create(t.Context(), envelope.ObjectName(id), []byte(a.sign(r))); err != nil {
		t.Fatal(err)
	}
	d, err := k.GetDEK(t.Context(), id)
	if err != nil || string(d.Key.Expose()) != string(a.key) {
		t.Errorf("the attacker makes no good records: %v", err)
	}
	d.Wipe()
}

// unmarked wraps with a public key and does not say so, which no backend may.
type unmarked struct{ rsaBackend }

func (u unmarked) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	w.Mechanism = rsaMechanism
	return u.rsaBackend.Unwrap(ctx, w, aad)
}

// TestAuthOnTheWay: a secret that comes later is taken up by RewrapDEK; taking
// an authenticator from a symmetric record gains nothing and costs nothing; a
// changed record is found by it or by the MAC.
func TestAuthOnTheWay(t *testing.T) {
	store, fake := openStore(t, "mem://"), kmstest.NewBackend()
	without := newKeyring(t, fakeKEK(fake), store, fast(1))
	want := format(t, without, id)
	with := newKeyring(t, fakeKEK(fake), store, envelope.Options{RecordAuth: recordSecret()})
	bare, _ := stored(t, store, id)
	for _, k := range []*envelope.Keyring{with, without, with} {
		if k == with {
			if err := k.RewrapDEK(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
		d, err := k.GetDEK(t.Context(), id)
		if err != nil || !d.Key.Equal(want.Key) {
			t.Errorf("GetDEK: %v", err)
		}
		d.Wipe()
	}
	r := parse(t, first(stored(t, store, id)))
	if r["auth"] == nil {
		t.Fatal("RewrapDEK did not authenticate the record")
	}
	if parse(t, bare)["wrapped"].(map[string]any)["ciphertext"] != r["wrapped"].(map[string]any)["ciphertext"] {
		t.Error("RewrapDEK wrapped anew for no reason")
	}
	delete(r, "auth")
	data, _ := json.Marshal(r)
	overwrite(t, store, id, string(data))
	d, err := with.GetDEK(t.Context(), id)
	if err != nil || !d.Key.Equal(want.Key) {
		t.Errorf("GetDEK without the authenticator: %v", err)
	}
	d.Wipe()
	r["claim"].(map[string]any)["node"] = "node-b"
	data, _ = json.Marshal(r)
	overwrite(t, store, id, string(data))
	if _, err := with.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrCorrupt) {
		t.Errorf("GetDEK of a changed record without authenticator: %v, want ErrCorrupt", err)
	}
}

// TestPlantedTombstone: with a secret, nothing is destroyed on the word of a
// tombstone that has no authenticator.
func TestPlantedTombstone(t *testing.T) {
	store := &historic{Store: openStore(t, "mem://")}
	fake := kmstest.NewBackend()
	with := newKeyring(t, fakeKEK(fake), store, envelope.Options{RecordAuth: recordSecret(), Attempts: 1})
	without := newKeyring(t, fakeKEK(fake), store, fast(1))
	want := format(t, with, id)
	good, _ := stored(t, store, id)
	planted := fmt.Sprintf(`{"version":1,"id":%q,"state":"deleted","spec":{"cipher":"aes-xts-plain64"},"created":"2026-01-02T03:04:05Z","updated":"2026-02-03T04:05:06Z"}`, id)
	overwrite(t, store, id, planted)
	if _, err := with.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("GetDEK: %v", err)
	}
	if err := with.DeleteDEK(t.Context(), id); err != nil {
		t.Errorf("DeleteDEK: %v", err)
	}
	_, pruneErr := with.Prune(t.Context(), id)
	for what, err := range map[string]error{"Prune": pruneErr, "Forget": with.Forget(t.Context(), id)} {
		if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "planted") {
			t.Errorf("%s: %v, want ErrState", what, err)
		}
	}
	if store.erased != 0 {
		t.Error("earlier versions were destroyed")
	}
	if now, _ := stored(t, store, id); now != planted {
		t.Errorf("the tombstone was changed:\n%s", now)
	}
	// The operator brings the earlier version back.
	overwrite(t, store, id, good)
	d, err := with.GetDEK(t.Context(), id)
	if err != nil || !d.Key.Equal(want.Key) {
		t.Errorf("GetDEK: %v", err)
	}
	d.Wipe()
	// Without a secret there is nothing to tell by.
	overwrite(t, store, id, planted)
	if _, err := without.Prune(t.Context(), id); err != nil || store.erased != 1 {
		t.Errorf("Prune without a secret: %v, %d erased", err, store.erased)
	}
	// Our own are taken.
	overwrite(t, store, id, good)
	if err := with.DeleteDEK(t.Context(), id); err != nil || store.erased != 2 {
		t.Errorf("DeleteDEK: %v, %d erased", err, store.erased)
	}
	if err := with.Forget(t.Context(), id); err != nil || store.erased != 3 {
		t.Errorf("Forget: %v, %d erased", err, store.erased)
	}
}

// historic counts how often it is asked to destroy earlier versions.
type historic struct {
	envelope.Store
	erased int
	until  time.Time
	err    error
}

func (h *historic) EraseHistory(context.Context, string) (time.Time, error) {
	if h.err != nil {
		return time.Time{}, h.err
	}
	h.erased++
	return h.until, nil
}
