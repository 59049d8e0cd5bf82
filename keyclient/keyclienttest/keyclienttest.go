// Package keyclienttest is the contract of everything that hands out DEKs, as
// a test suite: envelope.Keyring passes it, and so does every client of a
// Keyring elsewhere, so that callers cannot tell one from the other.
package keyclienttest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// NodeKeys is what a node calls.
type NodeKeys interface {
	GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error)
	ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error)
	ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error
}

// AdminKeys is what a controller and an operator call.
type AdminKeys interface {
	CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error)
	CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (dek.DEK, error)
	RotateDEK(ctx context.Context, id dek.ID) (dek.DEK, error)
	RewrapDEK(ctx context.Context, id dek.ID) error
	DeleteDEK(ctx context.Context, id dek.ID) error
}

// Keys is both ends of one set of DEKs.
type Keys struct {
	NodeKeys
	AdminKeys
}

const id = dek.ID("driver.example.com/vol-1")

func spec() dek.Spec {
	return dek.Spec{Name: "pvc-1 äöü <&>", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC}
}

// KEK is the name of one of the KEKs behind every set of DEKs that Run opens.
const KEK = "gold"

// Run runs the suite. open opens an empty set of DEKs that lives until t ends,
// whose KEKs are one named KEK and no other with a name.
func Run(t *testing.T, open func(t *testing.T) Keys) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Keys)
	}{
		{"CreateThenGet", createThenGet},
		{"CreateTwice", createTwice},
		{"OneKeyPerID", oneKeyPerID},
		{"GetNeverCreates", getNeverCreates},
		{"BadArguments", badArguments},
		{"LongestID", longestID},
		{"LifeCycle", lifeCycle},
		{"Claim", claim},
		{"ConfirmRaisesTheFloor", confirmRaises},
		{"Backup", backup},
		{"ConfirmOtherHeader", confirmOther},
		{"Rotate", rotate},
		{"RotateOnlyFormatted", rotateOnlyFormatted},
		{"Clone", clone},
		{"CloneOfWhat", cloneOfWhat},
		{"CloneOfASnapshot", cloneOfSnapshot},
		{"Rewrap", rewrap},
		{"KEKByName", kekByName},
		{"Delete", deletes},
		{"Cancelled", cancelled},
		{"CreateRace", createRace},
		{"ClaimRace", claimRace},
		{"ConfirmRace", confirmRace},
		{"RotateRace", rotateRace},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// create creates the DEK of id and leaves its wiping to the test's end.
func create(t *testing.T, k Keys, id dek.ID) dek.DEK {
	t.Helper()
	d, err := k.CreateDEK(t.Context(), id, spec())
	if err != nil {
		t.Fatalf("CreateDEK(%q): %v", id, err)
	}
	t.Cleanup(d.Wipe)
	return d
}

// get is create's counterpart.
func get(t *testing.T, k Keys, id dek.ID) dek.DEK {
	t.Helper()
	d, err := k.GetDEK(t.Context(), id)
	if err != nil {
		t.Fatalf("GetDEK(%q): %v", id, err)
	}
	t.Cleanup(d.Wipe)
	return d
}

// same compares all but the keys' places in memory.
func same(t *testing.T, what string, got, want dek.DEK) {
	t.Helper()
	if !got.Key.Equal(want.Key) {
		t.Errorf("%s: another key", what)
	}
	if !got.Previous.Equal(want.Previous) {
		t.Errorf("%s: another previous key (%d bytes, want %d)", what, got.Previous.Len(), want.Previous.Len())
	}
	got.Key, want.Key = secret.Bytes{}, secret.Bytes{}
	got.Previous, want.Previous = secret.Bytes{}, secret.Bytes{}
	if diff := cmp.Diff(want, got, cmp.Comparer(secret.Bytes.Equal)); diff != "" {
		t.Errorf("%s: (-want +got)\n%s", what, diff)
	}
}

func mustBe(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func createThenGet(t *testing.T, k Keys) {
	made := create(t, k, id)
	if made.Key.Len() != dek.Size {
		t.Errorf("a key of %d bytes", made.Key.Len())
	}
	same(t, "CreateDEK", made, dek.DEK{ID: id, State: dek.Prepared, Spec: spec(), Key: made.Key})
	same(t, "GetDEK", get(t, k, id), made)
}

func createTwice(t *testing.T, k Keys) {
	made := create(t, k, id)
	same(t, "the second CreateDEK", create(t, k, id), made)
	for name, other := range map[string]dek.Spec{
		"another name":      {Name: "pvc-2", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
		"no name":           {Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
		"another integrity": {Name: spec().Name, Cipher: dek.CipherXTS},
	} {
		d, err := k.CreateDEK(t.Context(), id, other)
		mustBe(t, "CreateDEK with "+name, err, errdefs.ErrExists)
		if d.Key.Len() != 0 {
			t.Errorf("CreateDEK with %s gave a key with its error", name)
		}
	}
	same(t, "after the refusals", get(t, k, id), made)
}

func kekByName(t *testing.T, k Keys) {
	named := spec()
	named.KEK = "silver"
	_, err := k.CreateDEK(t.Context(), id, named)
	mustBe(t, "CreateDEK under a KEK that there is not", err, errdefs.ErrInvalid)
	if text := fmt.Sprint(err); !strings.Contains(text, `"silver"`) || !strings.Contains(text, KEK) {
		t.Errorf("%v does not say which KEKs there are", err)
	}
	_, err = k.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK after that", err, errdefs.ErrNotFound)

	named.KEK = KEK
	made, err := k.CreateDEK(t.Context(), id, named)
	must(t, "CreateDEK", err)
	t.Cleanup(made.Wipe)
	same(t, "CreateDEK", made, dek.DEK{ID: id, State: dek.Prepared, Spec: named, Key: made.Key})
	same(t, "GetDEK", get(t, k, id), made)
	_, err = k.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK without the name", err, errdefs.ErrExists)
	must(t, "RewrapDEK", k.RewrapDEK(t.Context(), id))
	same(t, "GetDEK after RewrapDEK", get(t, k, id), made)

	copied, err := k.CloneDEK(t.Context(), id+"0", spec(), id)
	must(t, "CloneDEK under another KEK than its source", err)
	t.Cleanup(copied.Wipe)
	same(t, "CloneDEK", copied, dek.DEK{ID: id + "0", State: dek.Prepared, Spec: spec(), Source: id, Key: copied.Key})
}

func oneKeyPerID(t *testing.T, k Keys) {
	a, b := create(t, k, id), create(t, k, id+"0")
	if a.Key.Equal(b.Key) {
		t.Error("two IDs have one key")
	}
	if a.Key.Equal(secret.New(dek.Size)) {
		t.Error("the key is zero")
	}
	// The caller owns its copy: wiping it takes nothing from others.
	again := create(t, k, id)
	again.Key.Wipe()
	same(t, "after another caller's wipe", get(t, k, id), a)
}

func getNeverCreates(t *testing.T, k Keys) {
	for range 2 {
		_, err := k.GetDEK(t.Context(), id)
		mustBe(t, "GetDEK without a record", err, errdefs.ErrNotFound)
	}
	_, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "n", UUID: dek.NewUUID()})
	mustBe(t, "ClaimFormat without a record", err, errdefs.ErrNotFound)
	mustBe(t, "ConfirmDEK without a record", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: dek.NewUUID()}), errdefs.ErrNotFound)
	mustBe(t, "RewrapDEK without a record", k.RewrapDEK(t.Context(), id), errdefs.ErrNotFound)
	mustBe(t, "DeleteDEK without a record", k.DeleteDEK(t.Context(), id), errdefs.ErrNotFound)
	_, err = k.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK after all that", err, errdefs.ErrNotFound)
}

// longest is an ID as long as there can be one, of all its characters.
func longest(prefix string) dek.ID {
	var all strings.Builder
	for c := byte('!'); c <= '~'; c++ {
		all.WriteByte(c)
	}
	return dek.ID(prefix + strings.Repeat(all.String(), dek.MaxID)[:dek.MaxID-len(prefix)])
}

// longestID goes through a life with everything as long as it can be.
func longestID(t *testing.T, k Keys) {
	source, id := longest("driver.example.com/"), longest("snap:driver.example.com/")
	spec, node, uuid := spec(), strings.Repeat("n", 253), dek.NewUUID()
	spec.Name = strings.Repeat("p", 256)
	made, err := k.CreateDEK(t.Context(), source, spec)
	must(t, "CreateDEK", err)
	t.Cleanup(made.Wipe)
	_, err = k.ClaimFormat(t.Context(), source, dek.Claim{Node: node, UUID: uuid})
	must(t, "ClaimFormat", err)
	h := dek.HeaderID{UUID: uuid, Sequence: 1<<64 - 1, Backup: strings.Repeat("/+09", 128), Fingerprint: dek.Fingerprint(made.Key)}
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), source, h))
	cloned, err := k.CloneDEK(t.Context(), id, spec, source)
	must(t, "CloneDEK", err)
	t.Cleanup(cloned.Wipe)
	must(t, "RewrapDEK", k.RewrapDEK(t.Context(), id))
	got := get(t, k, id)
	same(t, "the copy", got, cloned)
	if got.Source != source || !got.Previous.Equal(made.Key) || got.ID != id {
		t.Errorf("the copy is %+v", got)
	}
	if d := get(t, k, source); !d.Key.Equal(made.Key) || d.Header.Backup != h.Backup || d.Spec != spec {
		t.Errorf("its source is %+v", d)
	}
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), source))
}

func badArguments(t *testing.T, k Keys) {
	for _, bad := range []dek.ID{"", "a b", "a\nb", "ü", longest("driver.example.com/") + "0"} {
		_, err := k.CreateDEK(t.Context(), bad, spec())
		mustBe(t, fmt.Sprintf("CreateDEK(%q)", bad), err, errdefs.ErrInvalid)
		_, err = k.GetDEK(t.Context(), bad)
		mustBe(t, fmt.Sprintf("GetDEK(%q)", bad), err, errdefs.ErrInvalid)
		mustBe(t, fmt.Sprintf("DeleteDEK(%q)", bad), k.DeleteDEK(t.Context(), bad), errdefs.ErrInvalid)
	}
	for _, bad := range []dek.Spec{{}, {Cipher: "null"}, {Cipher: dek.CipherXTS, Layout: "x"}} {
		_, err := k.CreateDEK(t.Context(), id, bad)
		mustBe(t, fmt.Sprintf("CreateDEK with %+v", bad), err, errdefs.ErrInvalid)
	}
	create(t, k, id)
	uuid := dek.NewUUID()
	for _, bad := range []dek.Claim{{}, {Node: "n"}, {UUID: uuid}, {Node: "n", UUID: "x" + uuid[1:]}, {Node: "n", UUID: uuid + "0"}} {
		_, err := k.ClaimFormat(t.Context(), id, bad)
		mustBe(t, fmt.Sprintf("ClaimFormat with %+v", bad), err, errdefs.ErrInvalid)
	}
	for _, bad := range []dek.HeaderID{{}, {Sequence: 1}, {UUID: "x"}, {UUID: uuid, Backup: "no base64"}, {UUID: uuid, Backup: strings.Repeat("AAAA", 129)}} {
		mustBe(t, fmt.Sprintf("ConfirmDEK with %+v", bad), k.ConfirmDEK(t.Context(), id, bad), errdefs.ErrInvalid)
	}
}

func lifeCycle(t *testing.T, k Keys) {
	want := create(t, k, id)
	want.Claim = dek.Claim{Node: "node-a", UUID: dek.NewUUID()}
	got, err := k.ClaimFormat(t.Context(), id, want.Claim)
	must(t, "ClaimFormat", err)
	if got != want.Claim {
		t.Errorf("ClaimFormat = %+v, want %+v", got, want.Claim)
	}
	same(t, "claimed", get(t, k, id), want)

	want.State, want.Header = dek.Formatted, dek.HeaderID{UUID: want.Claim.UUID, Sequence: 3}
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, want.Header))
	same(t, "formatted", get(t, k, id), want)
	same(t, "CreateDEK of a formatted one", create(t, k, id), want)

	_, err = k.ClaimFormat(t.Context(), id, want.Claim)
	mustBe(t, "ClaimFormat of a formatted one", err, errdefs.ErrState)
	same(t, "after that", get(t, k, id), want)
}

func claim(t *testing.T, k Keys) {
	create(t, k, id)
	first := dek.Claim{Node: "node-a", UUID: dek.NewUUID()}
	for _, c := range []dek.Claim{first, first, {Node: "node-a", UUID: dek.NewUUID()}} {
		got, err := k.ClaimFormat(t.Context(), id, c)
		must(t, "ClaimFormat", err)
		if got != first {
			t.Errorf("ClaimFormat(%+v) = %+v, want the first claim %+v", c, got, first)
		}
	}
	got, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "node-b", UUID: first.UUID})
	mustBe(t, "ClaimFormat by another node", err, errdefs.ErrConflict)
	if got != (dek.Claim{}) {
		t.Errorf("ClaimFormat gave %+v with its error", got)
	}
	if d := get(t, k, id); d.Claim != first || d.State != dek.Prepared {
		t.Errorf("the claim is %+v in state %s, want %+v", d.Claim, d.State, first)
	}
}

// format brings a new DEK to state formatted with sequence 5.
func format(t *testing.T, k Keys, id dek.ID) dek.DEK {
	t.Helper()
	create(t, k, id)
	uuid := dek.NewUUID()
	_, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "node-a", UUID: uuid})
	must(t, "ClaimFormat", err)
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: uuid, Sequence: 5}))
	return get(t, k, id)
}

func confirmRaises(t *testing.T, k Keys) {
	want := format(t, k, id)
	for _, step := range []struct{ confirm, floor uint64 }{{5, 5}, {4, 5}, {0, 5}, {6, 6}, {5, 6}, {1<<64 - 1, 1<<64 - 1}, {7, 1<<64 - 1}} {
		must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: want.Header.UUID, Sequence: step.confirm}))
		want.Header.Sequence = step.floor
		same(t, fmt.Sprintf("after confirming %d", step.confirm), get(t, k, id), want)
	}
}

// backup stays with the header until another one comes, at the floor or above.
func backup(t *testing.T, k Keys) {
	want := format(t, k, id)
	for _, step := range []struct {
		sequence      uint64
		backup, holds string
	}{
		{5, "", ""}, {4, "AAAA", ""}, {5, "AAAA", "AAAA"}, {5, "AAAA", "AAAA"}, {5, "", "AAAA"}, {6, "", "AAAA"},
		{5, "BBBB", "AAAA"}, {7, "Y2FudA==", "Y2FudA=="}, {7, strings.Repeat("/+09", 128), strings.Repeat("/+09", 128)},
	} {
		must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: want.Header.UUID, Sequence: step.sequence, Backup: step.backup}))
		want.Header.Sequence, want.Header.Backup = max(want.Header.Sequence, step.sequence), step.holds
		same(t, fmt.Sprintf("after confirming %d with backup %q", step.sequence, step.backup), get(t, k, id), want)
	}

	// It is under the old key: neither a new one nor a copy has it.
	next, err := k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	t.Cleanup(next.Wipe)
	if next.Header.Backup != "" {
		t.Error("a rotated key has the old one's backup")
	}
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: want.Header.UUID, Sequence: 8, Backup: "AAAA"}))
	if d := get(t, k, id); d.Header.Backup != "" || d.Header.Sequence != 8 {
		t.Errorf("while rotating a backup was taken: %+v", d.Header)
	}
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: want.Header.UUID, Sequence: 9, Backup: "BBBB", Fingerprint: dek.Fingerprint(next.Key)}))
	if d := get(t, k, id); d.Header.Backup != "BBBB" || d.State != dek.Formatted {
		t.Errorf("rotated: %s with %+v", d.State, d.Header)
	}
	made, err := k.CloneDEK(t.Context(), id+"-copy", spec(), id)
	must(t, "CloneDEK", err)
	t.Cleanup(made.Wipe)
	if made.Header != (dek.HeaderID{UUID: want.Header.UUID}) {
		t.Errorf("a clone has %+v", made.Header)
	}
}

func confirmOther(t *testing.T, k Keys) {
	create(t, k, id)
	mustBe(t, "ConfirmDEK without a claim", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: dek.NewUUID()}), errdefs.ErrState)
	_, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "node-a", UUID: dek.NewUUID()})
	must(t, "ClaimFormat", err)
	mustBe(t, "ConfirmDEK of a header that was not claimed", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: dek.NewUUID()}), errdefs.ErrState)
	if d := get(t, k, id); d.State != dek.Prepared {
		t.Errorf("state %s after a refused ConfirmDEK", d.State)
	}
	want := format(t, k, id+"0")
	mustBe(t, "ConfirmDEK of another header", k.ConfirmDEK(t.Context(), id+"0", dek.HeaderID{UUID: dek.NewUUID(), Sequence: 99}), errdefs.ErrState)
	same(t, "after that", get(t, k, id+"0"), want)
}

// rotated brings a new DEK to state rotating and returns it as it was before
// and as it is.
func rotated(t *testing.T, k Keys, id dek.ID) (before, now dek.DEK) {
	t.Helper()
	before = format(t, k, id)
	now, err := k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	t.Cleanup(now.Wipe)
	return before, now
}

func rotate(t *testing.T, k Keys) {
	before, want := rotated(t, k, id)
	if want.Key.Equal(before.Key) || want.Key.Len() != dek.Size {
		t.Error("RotateDEK gave no new key")
	}
	same(t, "RotateDEK", want, dek.DEK{ID: id, State: dek.Rotating, Spec: spec(), Claim: dek.Claim{UUID: before.Claim.UUID}, Header: before.Header, Key: want.Key, Previous: before.Key})
	again, err := k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	t.Cleanup(again.Wipe)
	same(t, "the second RotateDEK", again, want)
	same(t, "GetDEK while rotating", get(t, k, id), want)
	same(t, "CreateDEK while rotating", create(t, k, id), want)
	// Whoever replaces the header claims that; its UUID stays.
	want.Claim = dek.Claim{Node: "node-b", UUID: want.Header.UUID}
	for range 2 {
		got, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "node-b", UUID: dek.NewUUID()})
		must(t, "ClaimFormat while rotating", err)
		if got != want.Claim {
			t.Errorf("ClaimFormat while rotating = %+v, want %+v", got, want.Claim)
		}
	}
	_, err = k.ClaimFormat(t.Context(), id, dek.Claim{Node: "node-a", UUID: want.Header.UUID})
	mustBe(t, "ClaimFormat by another node while rotating", err, errdefs.ErrConflict)
	same(t, "claimed while rotating", get(t, k, id), want)

	// What does not open with the new key ends nothing.
	for _, h := range []dek.HeaderID{
		{Sequence: 6},
		{Sequence: 7, Fingerprint: dek.Fingerprint(before.Key)},
		{Sequence: 3, Fingerprint: dek.Fingerprint(want.Key)},
	} {
		h.UUID = want.Header.UUID
		must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, h))
		want.Header.Sequence = max(want.Header.Sequence, h.Sequence)
		same(t, fmt.Sprintf("after confirming %+v", h), get(t, k, id), want)
	}
	mustBe(t, "ConfirmDEK of another header", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: dek.NewUUID(), Sequence: 99, Fingerprint: dek.Fingerprint(want.Key)}), errdefs.ErrState)
	same(t, "after the refusal", get(t, k, id), want)

	end := dek.HeaderID{UUID: want.Header.UUID, Sequence: 8, Fingerprint: dek.Fingerprint(want.Key)}
	want = dek.DEK{ID: id, State: dek.Formatted, Spec: spec(), Claim: want.Claim, Header: dek.HeaderID{UUID: end.UUID, Sequence: 8}, Key: want.Key}
	for range 2 {
		must(t, "ConfirmDEK with the new key", k.ConfirmDEK(t.Context(), id, end))
		same(t, "rotated", get(t, k, id), want)
	}
	// However old the copy is: the key that was replaced opens nothing any more.
	late, err := k.CloneDEK(t.Context(), id+"-late", spec(), id)
	must(t, "CloneDEK after a rotation", err)
	t.Cleanup(late.Wipe)
	if !late.Previous.Equal(want.Key) {
		t.Error("a clone that is recorded after its source's rotation has not the new key as its previous one")
	}
	next, err := k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	t.Cleanup(next.Wipe)
	if next.Key.Equal(want.Key) || next.Key.Equal(before.Key) || !next.Previous.Equal(want.Key) {
		t.Error("the next rotation does not go from the new key to a newer one")
	}
}

func rotateOnlyFormatted(t *testing.T, k Keys) {
	_, err := k.RotateDEK(t.Context(), id)
	mustBe(t, "RotateDEK without a record", err, errdefs.ErrNotFound)
	want := create(t, k, id)
	d, err := k.RotateDEK(t.Context(), id)
	mustBe(t, "RotateDEK of a prepared one", err, errdefs.ErrState)
	if d.Key.Len() != 0 {
		t.Error("RotateDEK gave a key with its error")
	}
	same(t, "after that", get(t, k, id), want)
}

func clone(t *testing.T, k Keys) {
	const copyID = id + "-copy"
	source := format(t, k, id)
	copySpec := spec()
	copySpec.Name = "pvc-copy"
	made, err := k.CloneDEK(t.Context(), copyID, copySpec, id)
	must(t, "CloneDEK", err)
	t.Cleanup(made.Wipe)
	if made.Key.Equal(source.Key) || made.Key.Len() != dek.Size {
		t.Error("the clone has no key of its own")
	}
	// The copy may be older than the source's floor, and has none.
	want := dek.DEK{ID: copyID, State: dek.Rotating, Spec: copySpec, Source: id, Header: dek.HeaderID{UUID: source.Header.UUID}, Key: made.Key, Previous: source.Key}
	same(t, "CloneDEK", made, want)
	same(t, "GetDEK of the clone", get(t, k, copyID), want)
	same(t, "GetDEK of its source", get(t, k, id), source)

	_, err = k.CreateDEK(t.Context(), copyID, copySpec)
	mustBe(t, "CreateDEK of a clone", err, errdefs.ErrExists)
	_, err = k.CloneDEK(t.Context(), copyID, copySpec, id+"0")
	mustBe(t, "CloneDEK of another source", err, errdefs.ErrExists)
	_, err = k.CloneDEK(t.Context(), copyID, spec(), id)
	mustBe(t, "CloneDEK under another name", err, errdefs.ErrExists)
	create(t, k, id+"1")
	_, err = k.CloneDEK(t.Context(), id+"1", spec(), id)
	mustBe(t, "CloneDEK of what was created", err, errdefs.ErrExists)

	// The clone goes on without its source.
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	again, err := k.CloneDEK(t.Context(), copyID, copySpec, id)
	must(t, "CloneDEK once the source is gone", err)
	t.Cleanup(again.Wipe)
	same(t, "CloneDEK once the source is gone", again, want)
	want.Claim, err = k.ClaimFormat(t.Context(), copyID, dek.Claim{Node: "node-a", UUID: dek.NewUUID()})
	must(t, "ClaimFormat of the clone", err)
	if want.Claim != (dek.Claim{Node: "node-a", UUID: source.Header.UUID}) {
		t.Errorf("ClaimFormat of the clone = %+v", want.Claim)
	}
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), copyID, dek.HeaderID{UUID: source.Header.UUID, Sequence: 6, Fingerprint: dek.Fingerprint(made.Key)}))
	want.State, want.Header.Sequence, want.Previous = dek.Formatted, 6, secret.Bytes{}
	same(t, "the clone with its own key", get(t, k, copyID), want)
}

func cloneOfWhat(t *testing.T, k Keys) {
	prepared, rotating, deleted := id+"-prepared", id+"-rotating", id+"-deleted"
	create(t, k, prepared)
	rotated(t, k, rotating)
	format(t, k, deleted)
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), deleted))
	other := spec()
	other.Integrity = dek.IntegrityNone
	for _, tt := range []struct {
		what   string
		source dek.ID
		spec   dek.Spec
		class  error
	}{
		{"nothing", id + "-none", spec(), errdefs.ErrNotFound},
		{"what was deleted", deleted, spec(), errdefs.ErrNotFound},
		{"what is being rotated", rotating, spec(), errdefs.ErrConflict},
		{"another spec", prepared, other, errdefs.ErrInvalid},
		{"itself", id, spec(), errdefs.ErrInvalid},
		{"no ID", "a b", spec(), errdefs.ErrInvalid},
		{"the empty ID", "", spec(), errdefs.ErrInvalid},
	} {
		d, err := k.CloneDEK(t.Context(), id, tt.spec, tt.source)
		mustBe(t, "CloneDEK of "+tt.what, err, tt.class)
		if d.Key.Len() != 0 {
			t.Errorf("CloneDEK of %s gave a key with its error", tt.what)
		}
		_, err = k.GetDEK(t.Context(), id)
		mustBe(t, "GetDEK after CloneDEK of "+tt.what, err, errdefs.ErrNotFound)
	}
	// Nothing is on the disk of a prepared one, so its copy is new as well.
	made, err := k.CloneDEK(t.Context(), id, spec(), prepared)
	must(t, "CloneDEK of a prepared one", err)
	t.Cleanup(made.Wipe)
	same(t, "CloneDEK of a prepared one", made, dek.DEK{ID: id, State: dek.Prepared, Spec: spec(), Source: prepared, Key: made.Key})
}

// cloneOfSnapshot: volume, snapshot, volume. The last one's disk still has the
// first one's key, because nobody opens a snapshot.
func cloneOfSnapshot(t *testing.T, k Keys) {
	source := format(t, k, id)
	snapshot, err := dek.SnapshotID("driver.example.com", "snap-1")
	must(t, "SnapshotID", err)
	middle, err := k.CloneDEK(t.Context(), snapshot, spec(), id)
	must(t, "CloneDEK", err)
	t.Cleanup(middle.Wipe)
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	restored, err := k.CloneDEK(t.Context(), id+"0", spec(), snapshot)
	must(t, "CloneDEK of the snapshot", err)
	t.Cleanup(restored.Wipe)
	same(t, "the restored volume", restored, dek.DEK{ID: id + "0", State: dek.Rotating, Spec: spec(), Source: snapshot, Header: dek.HeaderID{UUID: source.Header.UUID}, Key: restored.Key, Previous: source.Key})
	if restored.Key.Equal(middle.Key) {
		t.Error("the restored volume has the snapshot's key")
	}
}

func rewrap(t *testing.T, k Keys) {
	want := format(t, k, id)
	_, rotating := rotated(t, k, id+"0")
	for range 2 {
		must(t, "RewrapDEK", k.RewrapDEK(t.Context(), id))
		same(t, "after RewrapDEK", get(t, k, id), want)
		must(t, "RewrapDEK", k.RewrapDEK(t.Context(), id+"0"))
		same(t, "after RewrapDEK while rotating", get(t, k, id+"0"), rotating)
	}
}

func deletes(t *testing.T, k Keys) {
	format(t, k, id)
	kept := format(t, k, id+"0")
	for range 2 {
		must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	}
	_, err := k.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK of a deleted one", err, errdefs.ErrNotFound)
	_, err = k.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK of a deleted one", err, errdefs.ErrExists)
	_, err = k.ClaimFormat(t.Context(), id, dek.Claim{Node: "n", UUID: dek.NewUUID()})
	mustBe(t, "ClaimFormat of a deleted one", err, errdefs.ErrState)
	mustBe(t, "ConfirmDEK of a deleted one", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: dek.NewUUID()}), errdefs.ErrState)
	mustBe(t, "RewrapDEK of a deleted one", k.RewrapDEK(t.Context(), id), errdefs.ErrState)
	_, err = k.RotateDEK(t.Context(), id)
	mustBe(t, "RotateDEK of a deleted one", err, errdefs.ErrState)
	_, err = k.CloneDEK(t.Context(), id, spec(), id+"0")
	mustBe(t, "CloneDEK to a deleted one", err, errdefs.ErrExists)
	rotated(t, k, id+"1")
	must(t, "DeleteDEK while rotating", k.DeleteDEK(t.Context(), id+"1"))
	_, err = k.GetDEK(t.Context(), id+"1")
	mustBe(t, "GetDEK of one deleted while rotating", err, errdefs.ErrNotFound)
	same(t, "the other DEK", get(t, k, id+"0"), kept)
}

func cancelled(t *testing.T, k Keys) {
	want := create(t, k, id)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, createErr := k.CreateDEK(ctx, id+"0", spec())
	_, getErr := k.GetDEK(ctx, id)
	_, claimErr := k.ClaimFormat(ctx, id, dek.Claim{Node: "n", UUID: dek.NewUUID()})
	_, rotateErr := k.RotateDEK(ctx, id)
	_, cloneErr := k.CloneDEK(ctx, id+"0", spec(), id)
	for op, err := range map[string]error{
		"CreateDEK": createErr, "GetDEK": getErr, "ClaimFormat": claimErr, "RotateDEK": rotateErr, "CloneDEK": cloneErr,
		"ConfirmDEK": k.ConfirmDEK(ctx, id, dek.HeaderID{UUID: dek.NewUUID()}),
		"RewrapDEK":  k.RewrapDEK(ctx, id), "DeleteDEK": k.DeleteDEK(ctx, id),
	} {
		mustBe(t, op+" with a cancelled context", err, context.Canceled)
	}
	same(t, "after that", get(t, k, id), want)
}

// racers is how many callers meet in the races.
const racers = 64

// race runs f concurrently, as many times as there are racers.
func race(f func(n int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for n := range racers {
		wg.Go(func() { <-start; f(n) })
	}
	close(start)
	wg.Wait()
}

func createRace(t *testing.T, k Keys) {
	got := make([]dek.DEK, racers)
	race(func(n int) {
		d, err := k.CreateDEK(t.Context(), id, spec())
		if err != nil {
			t.Errorf("CreateDEK: %v", err)
		}
		got[n] = d
	})
	stored := get(t, k, id)
	for _, d := range got {
		if !d.Key.Equal(stored.Key) {
			t.Error("a racer got another key than the stored one")
		}
		d.Key.Wipe()
	}
}

func claimRace(t *testing.T, k Keys) {
	create(t, k, id)
	won := make([]dek.Claim, racers)
	race(func(n int) {
		mine := dek.Claim{Node: fmt.Sprintf("node-%d", n), UUID: dek.NewUUID()}
		got, err := k.ClaimFormat(t.Context(), id, mine)
		switch {
		case err == nil && got == mine:
			won[n] = mine
		case !errors.Is(err, errdefs.ErrConflict):
			t.Errorf("ClaimFormat = %+v, %v", got, err)
		}
	})
	stored, winners := get(t, k, id).Claim, 0
	for _, c := range won {
		if c != (dek.Claim{}) {
			winners++
			if c != stored {
				t.Errorf("%+v won, %+v is stored", c, stored)
			}
		}
	}
	if winners != 1 {
		t.Errorf("%d racers won the claim", winners)
	}
}

func confirmRace(t *testing.T, k Keys) {
	uuid := format(t, k, id).Header.UUID
	race(func(n int) {
		if err := k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: uuid, Sequence: uint64(100 + n)}); err != nil {
			t.Errorf("ConfirmDEK: %v", err)
		}
	})
	if got, want := get(t, k, id).Header, (dek.HeaderID{UUID: uuid, Sequence: 100 + racers - 1}); got != want {
		t.Errorf("the floor is %+v, want %+v", got, want)
	}
}

func rotateRace(t *testing.T, k Keys) {
	before := format(t, k, id)
	got := make([]dek.DEK, racers)
	race(func(n int) {
		d, err := k.RotateDEK(t.Context(), id)
		if err != nil {
			t.Errorf("RotateDEK: %v", err)
		}
		got[n] = d
	})
	stored := get(t, k, id)
	if !stored.Previous.Equal(before.Key) {
		t.Error("the old key is lost")
	}
	for _, d := range got {
		if !d.Key.Equal(stored.Key) || !d.Previous.Equal(before.Key) {
			t.Error("a racer got other keys than the stored ones")
		}
		d.Wipe()
	}
}
