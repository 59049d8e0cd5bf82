package keyclient_test

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/secret"
)

const uuid = "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"

// hostile answers GetDEK, CreateDEK and ClaimFormat with what a test puts in.
type hostile struct {
	keyservicev1.UnimplementedKeyServiceServer
	dek   func(recipient []byte) *keyservicev1.DEK
	claim *keyservicev1.Claim
}

func (h *hostile) GetDEK(_ context.Context, r *keyservicev1.GetDEKRequest) (*keyservicev1.DEK, error) {
	return h.dek(r.Recipient), nil
}

func (h *hostile) CreateDEK(_ context.Context, r *keyservicev1.CreateDEKRequest) (*keyservicev1.DEK, error) {
	return h.dek(r.Recipient), nil
}

func (h *hostile) ClaimFormat(context.Context, *keyservicev1.ClaimFormatRequest) (*keyservicev1.Claim, error) {
	return h.claim, nil
}

// key returns 32 bytes of that value.
func key(b byte) secret.Bytes {
	return secret.Take([]byte(strings.Repeat(string(rune(b)), dek.Size)))
}

// rotating is a good answer with all fields.
func rotating(to []byte) *keyservicev1.DEK {
	a, _ := answer(to)(dek.DEK{
		ID: id, State: dek.Rotating, Spec: spec(), Source: "driver.example.com/vol-0",
		Claim: dek.Claim{Node: "node-a", UUID: uuid}, Header: dek.HeaderID{UUID: uuid, Sequence: 5},
		Key: key('k'), Previous: key('p'),
	}, nil)
	return a
}

func prepared(to []byte) *keyservicev1.DEK {
	a, _ := answer(to)(dek.DEK{ID: id, State: dek.Prepared, Spec: spec(), Key: key('k')}, nil)
	return a
}

func TestGoodAnswer(t *testing.T) {
	h := &hostile{dek: rotating}
	c := open(t, keyclient.Config{Address: newServer(t, "unix", nil, h).start().address()})
	d, err := c.GetDEK(t.Context(), id)
	must(t, "GetDEK", err)
	if !d.Key.Equal(key('k')) || !d.Previous.Equal(key('p')) {
		t.Error("other keys")
	}
	d.Wipe()
	h.dek = func(to []byte) *keyservicev1.DEK {
		a := rotating(to)
		a.Claim.Node = "" // it was released
		return a
	}
	d, err = c.GetDEK(t.Context(), id)
	must(t, "GetDEK with a released claim", err)
	d.Wipe()
}

func TestHostileAnswers(t *testing.T) {
	h := &hostile{}
	var seen calls
	c := open(t, keyclient.Config{Address: newServer(t, "unix", nil, h).start().address(), Observe: seen.observe})
	otherKey, err := ecdh.X25519().GenerateKey(rand.Reader)
	must(t, "GenerateKey", err)
	for name, edit := range map[string]func(a *keyservicev1.DEK, to []byte){
		"nothing":           func(a *keyservicev1.DEK, _ []byte) { proto.Reset(a) },
		"another ID":        func(a *keyservicev1.DEK, _ []byte) { a.Id += "0" },
		"no ID":             func(a *keyservicev1.DEK, _ []byte) { a.Id = "" },
		"no state":          func(a *keyservicev1.DEK, _ []byte) { a.State = "" },
		"deleted":           func(a *keyservicev1.DEK, _ []byte) { a.State = "deleted" },
		"unknown state":     func(a *keyservicev1.DEK, _ []byte) { a.State = strings.Repeat("x", 10000) },
		"other state":       func(a *keyservicev1.DEK, _ []byte) { a.State = "formatted" },
		"prepared, header":  func(a *keyservicev1.DEK, _ []byte) { a.State, a.SealedPrevious = "prepared", nil },
		"no spec":           func(a *keyservicev1.DEK, _ []byte) { a.Spec = nil },
		"no cipher":         func(a *keyservicev1.DEK, _ []byte) { a.Spec.Cipher = "cipher_null-ecb" },
		"integrity":         func(a *keyservicev1.DEK, _ []byte) { a.Spec.Integrity = "crc32c" },
		"layout":            func(a *keyservicev1.DEK, _ []byte) { a.Spec.Layout = "x" },
		"long name":         func(a *keyservicev1.DEK, _ []byte) { a.Spec.Name = strings.Repeat("x", 257) },
		"source is itself":  func(a *keyservicev1.DEK, _ []byte) { a.Source = string(id) },
		"bad source":        func(a *keyservicev1.DEK, _ []byte) { a.Source = "a\nb" },
		"claim of nothing":  func(a *keyservicev1.DEK, _ []byte) { a.Claim.Uuid = "" },
		"claim's UUID":      func(a *keyservicev1.DEK, _ []byte) { a.Claim.Uuid = strings.ToUpper(uuid) },
		"claim's node":      func(a *keyservicev1.DEK, _ []byte) { a.Claim.Node = strings.Repeat("x", 257) },
		"no header":         func(a *keyservicev1.DEK, _ []byte) { a.Header = nil },
		"header's UUID":     func(a *keyservicev1.DEK, _ []byte) { a.Header.Uuid = "../" + uuid[3:] },
		"fingerprint":       func(a *keyservicev1.DEK, _ []byte) { a.Header.Fingerprint = "00" },
		"no key":            func(a *keyservicev1.DEK, _ []byte) { a.SealedKey = nil },
		"no previous":       func(a *keyservicev1.DEK, _ []byte) { a.SealedPrevious = nil },
		"short key":         func(a *keyservicev1.DEK, to []byte) { a.SealedKey = seal(to, "key", id, secret.Take(make([]byte, 31))) },
		"long key":          func(a *keyservicev1.DEK, to []byte) { a.SealedKey = seal(to, "key", id, secret.Take(make([]byte, 33))) },
		"short previous":    func(a *keyservicev1.DEK, to []byte) { a.SealedPrevious = seal(to, "previous", id, secret.Bytes{}) },
		"plain key":         func(a *keyservicev1.DEK, _ []byte) { a.SealedKey = make([]byte, 32) },
		"keys swapped":      func(a *keyservicev1.DEK, _ []byte) { a.SealedKey, a.SealedPrevious = a.SealedPrevious, a.SealedKey },
		"key twice":         func(a *keyservicev1.DEK, _ []byte) { a.SealedPrevious = a.SealedKey },
		"flipped bit":       func(a *keyservicev1.DEK, _ []byte) { a.SealedKey[79] ^= 1 },
		"flipped first bit": func(a *keyservicev1.DEK, _ []byte) { a.SealedKey[0] ^= 1 },
		"flipped previous":  func(a *keyservicev1.DEK, _ []byte) { a.SealedPrevious[40] ^= 1 },
		"zero point":        func(a *keyservicev1.DEK, _ []byte) { clear(a.SealedKey[:32]) },
		"of another ID":     func(a *keyservicev1.DEK, to []byte) { a.SealedKey = seal(to, "key", id+"0", key('k')) },
		"to somebody else": func(a *keyservicev1.DEK, _ []byte) {
			a.SealedKey = seal(otherKey.PublicKey().Bytes(), "key", id, key('k'))
		},
	} {
		h.dek = func(to []byte) *keyservicev1.DEK {
			a := rotating(to)
			edit(a, to)
			return a
		}
		d, err := c.GetDEK(t.Context(), id)
		mustBe(t, name, err, errdefs.ErrCorrupt, "key service at unix://", "GetDEK")
		if d.Key.Len() != 0 || d.Previous.Len() != 0 || d.ID != "" {
			t.Errorf("%s: an error came with %+v", name, d)
		}
		if len(err.Error()) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
		if got := seen.codes(); !slices.Equal(got, []string{"DataLoss"}) {
			t.Errorf("%s: attempts %v", name, got)
		}
	}
	h.dek = func(to []byte) *keyservicev1.DEK {
		a := prepared(to)
		a.SealedPrevious = seal(to, "previous", id, key('p'))
		return a
	}
	_, err = c.GetDEK(t.Context(), id)
	mustBe(t, "prepared with a previous key", err, errdefs.ErrCorrupt)
	h.dek = func(to []byte) *keyservicev1.DEK {
		a := rotating(to)
		a.Spec.Name = strings.Repeat("x", 2<<20)
		return a
	}
	_, err = c.GetDEK(t.Context(), id)
	mustBe(t, "a huge answer", err, errdefs.ErrUnavailable, "larger than max")
}

func TestHostileCreateAndClaim(t *testing.T) {
	h := &hostile{dek: prepared}
	address := newServer(t, "unix", nil, h).start().address()
	c := open(t, keyclient.Config{Address: address})
	d, err := c.CreateDEK(t.Context(), id, spec())
	must(t, "CreateDEK", err)
	d.Wipe()
	other := spec()
	other.Name = "pvc-2"
	d, err = c.CreateDEK(t.Context(), id, other)
	mustBe(t, "CreateDEK with another spec", err, errdefs.ErrCorrupt, "pvc-2")
	if d.Key.Len() != 0 {
		t.Error("a key came with an error")
	}
	h.dek = rotating
	_, err = c.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK that gives a clone", err, errdefs.ErrCorrupt)

	// Who wants no key gets none, and takes none.
	keyless := open(t, keyclient.Config{Address: address, WithoutKeys: true})
	h.dek = func([]byte) *keyservicev1.DEK {
		a := prepared(nil)
		a.SealedKey = seal(fuzzRecipient(t).Public(), "key", id, key('k'))
		return a
	}
	_, err = keyless.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK with an unwanted key", err, errdefs.ErrCorrupt, "none was asked for")
	h.dek = func([]byte) *keyservicev1.DEK { return prepared(nil) }
	d, err = keyless.CreateDEK(t.Context(), id, spec())
	must(t, "CreateDEK without a key", err)
	if d.Key.Len() != 0 || d.ID != id || d.State != dek.Prepared || d.Spec != spec() {
		t.Errorf("CreateDEK without a key = %+v", d)
	}
	_, err = keyless.CreateDEK(t.Context(), id, other)
	mustBe(t, "CreateDEK without a key, of another spec", err, errdefs.ErrCorrupt)
	_, err = c.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK of who wants a key and gets none", err, errdefs.ErrCorrupt)

	mine := dek.Claim{Node: "node-a", UUID: dek.NewUUID()}
	h.claim = &keyservicev1.Claim{Node: "node-a", Uuid: uuid}
	got, err := c.ClaimFormat(t.Context(), id, mine)
	must(t, "ClaimFormat", err)
	if got != (dek.Claim{Node: "node-a", UUID: uuid}) {
		t.Errorf("ClaimFormat = %+v", got)
	}
	for _, bad := range []*keyservicev1.Claim{{}, {Node: "node-a"}, {Uuid: uuid}, {Node: "node-b", Uuid: uuid}, {Node: "node-a", Uuid: uuid + "0"}} {
		h.claim = bad
		got, err := c.ClaimFormat(t.Context(), id, mine)
		mustBe(t, "ClaimFormat with a bad answer", err, errdefs.ErrCorrupt)
		if got != (dek.Claim{}) {
			t.Errorf("an error came with %+v", got)
		}
	}
}

// fuzzRecipient is a recipient whose key is always the same, so that inputs
// can hold sealed keys.
func fuzzRecipient(t testing.TB) keyclient.Recipient {
	t.Helper()
	private := sha256.Sum256([]byte("fuzz"))
	k, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		t.Fatal(err)
	}
	r, err := keyclient.NewRecipient(k)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestSealedVector: an answer that was sealed once opens for ever.
func TestSealedVector(t *testing.T) {
	sealed, err := hex.DecodeString(sealedVector)
	must(t, "DecodeString", err)
	a := prepared(fuzzRecipient(t).Public())
	a.SealedKey = sealed
	d, err := fuzzRecipient(t).OpenDEK(a, id)
	must(t, "OpenDEK", err)
	defer d.Wipe()
	if !d.Key.Equal(key('k')) {
		t.Error("another key")
	}
}

const sealedVector = "a076b6e97cf8baa616adfff076593ff08c4d7043e5df4df27e4eb1872e0b7a2f7eddd46f386149b0f0babf53ab3b1cd1d5a74cf4f089f32c09071b8537d6c6fcb062279a6f50175a8ce3cdd973545070"

func FuzzAnswer(f *testing.F) {
	to := fuzzRecipient(f)
	for _, a := range []*keyservicev1.DEK{rotating(to.Public()), prepared(to.Public()), {}} {
		wire, err := proto.Marshal(a)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		a := &keyservicev1.DEK{}
		if proto.Unmarshal(wire, a) != nil {
			return
		}
		d, err := to.OpenDEK(a, id)
		defer d.Wipe()
		if err != nil {
			mustBe(t, "OpenDEK", err, errdefs.ErrCorrupt)
			if d.ID != "" || d.Key.Len()+d.Previous.Len() != 0 {
				t.Errorf("an error came with %+v", d)
			}
			return
		}
		hasPrevious := d.State == dek.Rotating
		switch {
		case d.ID != id, d.Spec.Validate() != nil, d.Key.Len() != dek.Size, hasPrevious != (d.Previous.Len() == dek.Size),
			d.State != dek.Prepared && d.State != dek.Formatted && !hasPrevious,
			(d.State == dek.Prepared) != (d.Header == dek.HeaderID{}),
			d.Claim != dek.Claim{} && len(d.Claim.UUID) != len(uuid):
			t.Errorf("accepted %+v", d)
		}
	})
}
