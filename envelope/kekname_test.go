package envelope_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// named is one store, and KEKs by name; "" is the one without.
type named struct {
	t       *testing.T
	store   envelope.Store
	service map[string]*kmstest.Backend
}

func newNamed(t *testing.T) *named {
	return &named{t, openStore(t, "mem://"), map[string]*kmstest.Backend{
		"": kmstest.NewBackend(), "gold": kmstest.NewBackend(), "lead": kmstest.NewBackend(),
	}}
}

// ring is a keyring with those KEKs, in that order, under those names.
func (n *named) ring(names ...string) *envelope.Keyring {
	n.t.Helper()
	var keks []*kms.KEK
	for _, name := range names {
		keks = append(keks, kms.New("fake", n.service[name], kms.Options{Name: "the " + name + " one"}))
	}
	k, err := envelope.New(keks, []envelope.Store{n.store}, envelope.Options{Attempts: 1, KEKNames: names})
	must(n.t, "New", err)
	return k
}

// only is a keyring with that one KEK, which has no name here.
func (n *named) only(name string) *envelope.Keyring {
	n.t.Helper()
	return newKeyring(n.t, fakeKEK(n.service[name]), n.store, fast(1))
}

// under checks that one KEK alone opens all keys of a record, and no other does.
func (n *named) under(what string, id dek.ID, want string) {
	n.t.Helper()
	for name := range n.service {
		d, err := n.only(name).GetDEK(n.t.Context(), id)
		d.Wipe()
		if (err == nil) != (name == want) {
			n.t.Errorf("%s: by the KEK %q: %v, and it should be under %q", what, name, err, want)
		}
	}
}

func withKEK(name string) dek.Spec {
	s := spec()
	s.KEK = name
	return s
}

// TestKEKByName: whatever wraps a key wraps it under the KEK of its record's
// name, whatever the order of KEKs.
func TestKEKByName(t *testing.T) {
	n := newNamed(t)
	k := n.ring("", "gold", "lead")
	if got := k.KEKNames(); !slices.Equal(got, []string{"gold", "lead"}) {
		t.Errorf("KEKNames = %q", got)
	}
	const plain, copied, snapshot = dek.ID("d/plain"), dek.ID("d/copied"), dek.ID("snap:d/s")
	d, err := k.CreateDEK(t.Context(), id, withKEK("gold"))
	must(t, "CreateDEK", err)
	d.Wipe()
	if d.Spec.KEK != "gold" {
		t.Errorf("created: %+v", d.Spec)
	}
	n.under("created", id, "gold")
	_, err = k.CreateDEK(t.Context(), id, spec())
	mustBe(t, "created again without the name", err, errdefs.ErrExists)
	d, err = k.CreateDEK(t.Context(), plain, spec())
	must(t, "CreateDEK", err)
	d.Wipe()
	n.under("created without a name", plain, "")

	claim := dek.Claim{Node: "node-a", UUID: dek.NewUUID()}
	_, err = k.ClaimFormat(t.Context(), id, claim)
	must(t, "ClaimFormat", err)
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: claim.UUID, Sequence: 1}))
	n.under("confirmed", id, "gold")

	// A snapshot and a copy have their own, the source's key along with it.
	d, err = k.CloneDEK(t.Context(), snapshot, withKEK("gold"), id)
	must(t, "CloneDEK of a snapshot", err)
	d.Wipe()
	n.under("a snapshot", snapshot, "gold")
	d, err = k.CloneDEK(t.Context(), copied, withKEK("lead"), snapshot)
	must(t, "CloneDEK with another KEK", err)
	d.Wipe()
	n.under("a copy", copied, "lead")

	d, err = k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	d.Wipe()
	n.under("rotated", id, "gold")
}

// TestRewrapByName: records go to the KEK of their name, not to the first; what
// is there already stays as it is.
func TestRewrapByName(t *testing.T) {
	n := newNamed(t)
	gold := n.ring("gold") // the first, and so the default too
	const rotating = dek.ID("d/rotating")
	for id, name := range map[dek.ID]string{id: "gold", "d/plain": ""} {
		d, err := gold.CreateDEK(t.Context(), id, withKEK(name))
		must(t, "CreateDEK", err)
		d.Wipe()
		n.under("at first", id, "gold")
	}
	format(t, gold, rotating)
	d, err := gold.RotateDEK(t.Context(), rotating)
	must(t, "RotateDEK", err)
	d.Wipe()
	before, _ := stored(t, n.store, id)
	all := n.ring("lead", "gold", "")
	for _, id := range []dek.ID{id, "d/plain", rotating} {
		must(t, "RewrapDEK", all.RewrapDEK(t.Context(), id))
	}
	n.under("rewrapped", id, "gold")
	n.under("rewrapped without a name", "d/plain", "lead")
	n.under("rewrapped while rotating", rotating, "lead")
	if after, _ := stored(t, n.store, id); after != before {
		t.Error("a record under its KEK's current key was changed")
	}
	must(t, "RewrapDEKAlways", all.RewrapDEKAlways(t.Context(), id))
	n.under("rewrapped always", id, "gold")

	// The name is what counts, not the key that it stood for.
	former := n.service["gold"]
	n.service["gold"] = kmstest.NewBackend()
	n.service["former"] = former
	must(t, "RewrapDEK", n.ring("former", "gold").RewrapDEK(t.Context(), id))
	n.under("its name on another key", id, "gold")
}

// TestUnknownKEK: nothing is made or changed under a name that no KEK has, and
// what there is opens all the same.
func TestUnknownKEK(t *testing.T) {
	n := newNamed(t)
	_, err := n.ring("", "gold", "lead").CreateDEK(t.Context(), id, withKEK("silver"))
	mustBe(t, "CreateDEK", err, errdefs.ErrInvalid)
	if text := err.Error(); !strings.Contains(text, `"silver"`) || !strings.Contains(text, "gold, lead") {
		t.Errorf("%v does not say what there is", err)
	}
	_, err = n.only("gold").CreateDEK(t.Context(), id, withKEK("gold"))
	mustBe(t, "CreateDEK where none has a name", err, errdefs.ErrInvalid)
	if _, err := n.only("").GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("something was made: %v", err)
	}

	want := format(t, n.ring("gold"), "d/old")
	d, err := n.ring("gold").CloneDEK(t.Context(), id, withKEK("gold"), "d/old")
	must(t, "CloneDEK", err)
	d.Wipe()
	before, _ := stored(t, n.store, id)
	k := n.only("gold") // its KEK, but not its name
	got, err := k.GetDEK(t.Context(), id)
	must(t, "GetDEK", err)
	defer got.Wipe()
	if !got.Previous.Equal(want.Key) {
		t.Error("another key")
	}
	mustBe(t, "RewrapDEK", k.RewrapDEK(t.Context(), id), errdefs.ErrInvalid)
	_, err = k.CloneDEK(t.Context(), "d/copy", withKEK("silver"), "d/old")
	mustBe(t, "CloneDEK", err, errdefs.ErrInvalid)
	if after, _ := stored(t, n.store, id); after != before {
		t.Error("the record was changed")
	}
	must(t, "ConfirmDEK, which wraps nothing", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: got.Header.UUID, Sequence: 9, Fingerprint: dek.Fingerprint(got.Key)}))
	_, err = k.RotateDEK(t.Context(), id)
	mustBe(t, "RotateDEK", err, errdefs.ErrInvalid)
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
}
