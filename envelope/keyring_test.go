package envelope_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

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

// mustHave checks that GetDEK gives that key.
func mustHave(t *testing.T, what string, k *envelope.Keyring, want dek.DEK) {
	t.Helper()
	d, err := k.GetDEK(t.Context(), want.ID)
	must(t, what+": GetDEK", err)
	defer d.Wipe()
	if !d.Key.Equal(want.Key) || d.State != want.State || d.Header != want.Header || d.Claim != want.Claim || d.Spec != want.Spec {
		t.Errorf("%s: the DEK is %+v, want %+v", what, d, want)
	}
}

func TestSeveralKEKs(t *testing.T) {
	store := openStore(t, "mem://")
	one, two, three := kmstest.NewBackend(), kmstest.NewBackend(), kmstest.NewBackend()
	ring := func(services ...*kmstest.Backend) *envelope.Keyring {
		var keks []*kms.KEK
		for i, s := range services {
			keks = append(keks, kms.New("fake", s, kms.Options{Name: fmt.Sprintf("kek-%d", i)}))
		}
		k, err := envelope.New(keks, []envelope.Store{store}, fast(1))
		must(t, "New", err)
		return k
	}
	want := format(t, ring(one), id)
	mustHave(t, "as the second of its scheme", ring(two, one), want)
	_, err := ring(two, three).GetDEK(t.Context(), id)
	mustBe(t, "with others only", err, errdefs.ErrDenied)
	for _, name := range []string{"kek-0", "kek-1"} {
		if !strings.Contains(fmt.Sprint(err), name) {
			t.Errorf("%v does not name %s", err, name)
		}
	}
	// As long as one of them cannot be asked, nobody knows.
	for _, order := range [][]*kmstest.Backend{{two, three}, {three, two}} {
		two.SetFault(func(string) error { return errors.New("connection refused") })
		_, err = ring(order...).GetDEK(t.Context(), id)
		mustBe(t, "with one of them out of reach", err, errdefs.ErrUnavailable)
		two.SetFault(nil)
	}
	one.SetFault(func(string) error { return errdefs.Errorf(errdefs.ErrCorrupt, "damaged") })
	_, err = ring(two, one).GetDEK(t.Context(), id)
	mustBe(t, "refused by one, corrupt for the other", err, errdefs.ErrDenied)
	one.SetFault(nil)

	// RewrapDEK moves to the first one, the previous key too.
	d, err := ring(one).RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	defer d.Wipe()
	must(t, "RewrapDEK", ring(two, one).RewrapDEK(t.Context(), id))
	got, err := ring(two).GetDEK(t.Context(), id)
	must(t, "GetDEK by the new KEK alone", err)
	defer got.Wipe()
	if !got.Key.Equal(d.Key) || !got.Previous.Equal(want.Key) {
		t.Error("RewrapDEK changed the keys")
	}
	_, err = ring(one).GetDEK(t.Context(), id)
	mustBe(t, "by the old KEK alone", err, errdefs.ErrDenied)
}

// sameName is a service whose key keeps its ID when it is rotated.
type sameName struct{ *kmstest.Backend }

func (s sameName) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	w, err := s.Backend.Wrap(ctx, plaintext, aad)
	w.Ciphertext = append([]byte(w.KeyID[len(w.KeyID)-1:]), w.Ciphertext...)
	w.KeyID = "the key"
	return w, err
}

func (s sameName) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	current, _ := s.Backend.CurrentKeyID(ctx)
	w.KeyID = current[:len(current)-1] + string(w.Ciphertext[:1])
	w.Ciphertext = w.Ciphertext[1:]
	return s.Backend.Unwrap(ctx, w, aad)
}

func (s sameName) CurrentKeyID(context.Context) (string, error) { return "the key", nil }

func TestRewrapAlways(t *testing.T) {
	store, service := openStore(t, "mem://"), sameName{kmstest.NewBackend()}
	k := newKeyring(t, fakeKEK(service), store, fast(1))
	want := format(t, k, id)
	before, _ := stored(t, store, id)
	service.Rotate()
	must(t, "RewrapDEK", k.RewrapDEK(t.Context(), id))
	if after, _ := stored(t, store, id); after != before {
		t.Error("RewrapDEK wrapped anew under the same key ID")
	}
	must(t, "RewrapDEKAlways", k.RewrapDEKAlways(t.Context(), id))
	if after, _ := stored(t, store, id); after == before {
		t.Error("RewrapDEKAlways changed nothing")
	}
	mustHave(t, "rewrapped", k, want)
}

// TestSameKeyID: two services that give their keys one name.
func TestSameKeyID(t *testing.T) {
	store := openStore(t, "mem://")
	older, newer := fakeKEK(sameName{kmstest.NewBackend()}), fakeKEK(sameName{kmstest.NewBackend()})
	want := format(t, newKeyring(t, older, store, fast(1)), id)
	both, err := envelope.New([]*kms.KEK{newer, older}, []envelope.Store{store}, fast(1))
	must(t, "New", err)
	must(t, "RewrapDEK", both.RewrapDEK(t.Context(), id))
	mustHave(t, "with the newer one alone", newKeyring(t, newer, store, fast(1)), want)
}

// TestRestoreChecks: a tombstone that was changed brings nothing back.
func TestRestoreChecks(t *testing.T) {
	store := openStore(t, "mem://")
	o := newClock().options()
	o.Grace = time.Hour
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), store, o)
	want := format(t, k, id)
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	good, _ := stored(t, store, id)
	blank := parse(t, good)
	blank["was"].(map[string]any)["state"] = "prepared"
	delete(blank, "header")
	data, err := json.Marshal(blank)
	must(t, "Marshal", err)
	for what, bad := range map[string]string{
		"prepared instead of formatted": string(data),
		"a lower floor":                 strings.Replace(good, `"sequence": 7`, `"sequence": 6`, 1),
	} {
		overwrite(t, store, id, bad)
		mustBe(t, "RestoreDEK of "+what, k.RestoreDEK(t.Context(), id), errdefs.ErrCorrupt)
	}
	overwrite(t, store, id, good)
	must(t, "RestoreDEK", k.RestoreDEK(t.Context(), id))
	mustHave(t, "restored", k, want)
}

// TestRewrapWithinGrace: a deleted key moves to the KEK's next version, and comes
// back without the former one; it stays as deleted as it was.
func TestRewrapWithinGrace(t *testing.T) {
	for name, auth := range map[string]secret.Bytes{"": {}, " with an authenticator": secret.Random(32)} {
		store, c := openStore(t, "mem://"), newClock()
		older, newer := kmstest.NewBackend(), kmstest.NewBackend()
		ring := func(keks ...kms.Backend) *envelope.Keyring {
			o := c.options()
			o.Grace, o.RecordAuth = 24*time.Hour, auth.Clone()
			var all []*kms.KEK
			for _, b := range keks {
				all = append(all, fakeKEK(b))
			}
			k, err := envelope.New(all, []envelope.Store{store}, o)
			must(t, "New"+name, err)
			t.Cleanup(func() { _ = k.Close() })
			return k
		}
		want := format(t, ring(older), id)
		rotating, err := ring(older).RotateDEK(t.Context(), id)
		must(t, "RotateDEK"+name, err)
		must(t, "DeleteDEK"+name, ring(older).DeleteDEK(t.Context(), id))
		data, _ := stored(t, store, id)
		deleted := parse(t, data)

		c.advance(time.Hour)
		must(t, "RewrapDEK"+name, ring(newer, older).RewrapDEK(t.Context(), id))
		data, version := stored(t, store, id)
		rewrapped := parse(t, data)
		for _, field := range []string{"state", "updated", "expires"} {
			if rewrapped[field] != deleted[field] {
				t.Errorf("rewrapped%s, %q is %v, was %v", name, field, rewrapped[field], deleted[field])
			}
		}
		must(t, "RewrapDEK again"+name, ring(newer, older).RewrapDEK(t.Context(), id))
		if _, again := stored(t, store, id); again != version {
			t.Errorf("wrapped%s once more for nothing", name)
		}
		_, err = ring(newer, older).GetDEK(t.Context(), id)
		mustBe(t, "GetDEK of what is deleted"+name, err, errdefs.ErrNotFound)

		must(t, "RestoreDEK with the new KEK alone"+name, ring(newer).RestoreDEK(t.Context(), id))
		got, err := ring(newer).GetDEK(t.Context(), id)
		must(t, "GetDEK"+name, err)
		if !got.Key.Equal(rotating.Key) || !got.Previous.Equal(want.Key) || got.State != dek.Rotating {
			t.Errorf("restored%s it has other keys, or is %s", name, got.State)
		}
	}
}

// TestRewrapUnproven: a tombstone that may be planted is not made one of ours.
func TestRewrapUnproven(t *testing.T) {
	store, service := openStore(t, "mem://"), kmstest.NewBackend()
	o := newClock().options()
	o.Grace = time.Hour
	must(t, "DeleteDEK", func() error {
		k := newKeyring(t, fakeKEK(service), store, o)
		format(t, k, id)
		return k.DeleteDEK(t.Context(), id)
	}())
	service.Rotate()
	before, _ := stored(t, store, id)
	o.RecordAuth = secret.Random(32)
	k := newKeyring(t, fakeKEK(service), store, o)
	err := k.RewrapDEK(t.Context(), id)
	mustBe(t, "RewrapDEK", err, errdefs.ErrState)
	if !strings.Contains(fmt.Sprint(err), "restore it") {
		t.Errorf("%v does not say what to do", err)
	}
	if after, _ := stored(t, store, id); after != before {
		t.Error("it was changed")
	}
	must(t, "RestoreDEK", k.RestoreDEK(t.Context(), id))
	must(t, "RewrapDEK", k.RewrapDEK(t.Context(), id))
}

func TestSeveralStores(t *testing.T) {
	service := kmstest.NewBackend()
	old := openStore(t, "mem://")
	want := format(t, newKeyring(t, fakeKEK(service), old, fast(1)), id)
	fault := envelopetest.None
	front := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault { return fault })
	ring := func(stores ...envelope.Store) *envelope.Keyring {
		k, err := envelope.New([]*kms.KEK{fakeKEK(service)}, stores, fast(1))
		must(t, "New", err)
		return k
	}
	k := ring(front, old)
	mustHave(t, "in the second store", k, want)
	mustHave(t, "CreateDEK of it", k, create(t, ring(front, old), id))

	// Changes stay where the record is; new ones go to the first.
	want.Header.Sequence = 8
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, want.Header))
	mustHave(t, "after a change", ring(old), want)
	_, err := ring(front).GetDEK(t.Context(), id)
	mustBe(t, "in the first store", err, errdefs.ErrNotFound)
	made := create(t, k, id+"0")
	mustHave(t, "a new one, in the first store", ring(front), made)
	_, err = ring(old).GetDEK(t.Context(), id+"0")
	mustBe(t, "a new one, in the second store", err, errdefs.ErrNotFound)

	// Never "not found" on doubt.
	for _, stores := range [][]envelope.Store{{front, old}, {old, front}} {
		k := ring(stores...)
		missing := id + "-missing"
		fault = envelopetest.Fail
		_, err := k.GetDEK(t.Context(), missing)
		mustBe(t, "GetDEK with one store out of reach", err, errdefs.ErrUnavailable)
		_, err = k.CreateDEK(t.Context(), missing, spec())
		mustBe(t, "CreateDEK with one store out of reach", err, errdefs.ErrUnavailable)
		fault = envelopetest.None
		_, err = k.GetDEK(t.Context(), missing)
		mustBe(t, "GetDEK afterwards", err, errdefs.ErrNotFound)
	}
	must(t, "Create", front.Create(t.Context(), envelope.ObjectName(id), []byte("junk")))
	_, err = k.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK with junk in the first store", err, errdefs.ErrCorrupt)
	if !strings.Contains(fmt.Sprint(err), "store 1 of 2") {
		t.Errorf("%v does not say which store", err)
	}
}

// clock is a time that tests move.
type clock struct{ now time.Time }

func newClock() *clock                     { return &clock{time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)} }
func (c *clock) read() time.Time           { return c.now }
func (c *clock) advance(d time.Duration)   { c.now = c.now.Add(d) }
func (c *clock) options() envelope.Options { return envelope.Options{Attempts: 1, Now: c.read} }

func TestGrace(t *testing.T) {
	store := &historic{Store: openStore(t, "mem://")}
	service, c := kmstest.NewBackend(), newClock()
	o := c.options()
	o.Grace = 24 * time.Hour
	var told []string
	o.Survives = func(id dek.ID, until time.Time) { told = append(told, fmt.Sprint(id, " ", until.Year())) }
	k := newKeyring(t, fakeKEK(service), store, o)
	want := format(t, k, id)

	// Deleting needs no KMS, restoring does.
	service.SetFault(func(string) error { return errors.New("sealed") })
	for range 2 {
		must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	}
	mustBe(t, "RestoreDEK while the KMS is sealed", k.RestoreDEK(t.Context(), id), errdefs.ErrUnavailable)
	service.SetFault(nil)
	_, err := k.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK within the grace", err, errdefs.ErrNotFound)
	if !strings.Contains(fmt.Sprint(err), "2026-03-02T12:00:00Z") {
		t.Errorf("%v does not say until when it can be restored", err)
	}
	_, err = k.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK within the grace", err, errdefs.ErrExists)
	mustBe(t, "ConfirmDEK within the grace", k.ConfirmDEK(t.Context(), id, want.Header), errdefs.ErrState)
	_, err = k.Prune(t.Context(), id)
	mustBe(t, "Prune within the grace", err, errdefs.ErrState)
	mustBe(t, "Forget within the grace", k.Forget(t.Context(), id), errdefs.ErrState)
	if store.erased != 0 {
		t.Error("earlier versions were destroyed within the grace")
	}
	for range 2 {
		must(t, "RestoreDEK", k.RestoreDEK(t.Context(), id))
	}
	mustHave(t, "restored", k, want)

	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	c.advance(24 * time.Hour)
	store.until = time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC)
	for range 2 {
		until, err := k.Prune(t.Context(), id)
		must(t, "Prune", err)
		if !until.Equal(store.until) {
			t.Errorf("Prune says the key survives until %v", until)
		}
	}
	if len(told) != 2 || told[0] != string(id)+" 2031" || store.erased != 2 {
		t.Errorf("Survives was told %q, %d times erased", told, store.erased)
	}
	record, _ := stored(t, store, id)
	for _, gone := range []string{`"wrapped"`, `"ciphertext"`, `"mac"`, `"claim"`, `"header"`, `"expires"`, `"was"`} {
		if strings.Contains(record, gone) {
			t.Errorf("after Prune the tombstone has %s:\n%s", gone, record)
		}
	}
	mustBe(t, "RestoreDEK after Prune", k.RestoreDEK(t.Context(), id), errdefs.ErrState)
	_, err = k.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK after Prune", err, errdefs.ErrExists)
	must(t, "Forget", k.Forget(t.Context(), id))
	mustBe(t, "Forget again", k.Forget(t.Context(), id), errdefs.ErrNotFound)
	if again := create(t, k, id); again.Key.Equal(want.Key) {
		t.Error("a forgotten ID got its old key")
	}
}

// TestForgetPrunes: one step for an operator in a hurry.
func TestForgetPrunes(t *testing.T) {
	store, c := &historic{Store: openStore(t, "mem://")}, newClock()
	o := c.options()
	o.Grace = time.Hour
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), store, o)
	create(t, k, id)
	mustBe(t, "Forget of one that lives", k.Forget(t.Context(), id), errdefs.ErrState)
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	c.advance(time.Hour)
	must(t, "Forget", k.Forget(t.Context(), id))
	if store.erased != 1 {
		t.Errorf("%d times erased, want 1", store.erased)
	}
	_, _, err := store.Read(t.Context(), envelope.ObjectName(id))
	mustBe(t, "Read", err, errdefs.ErrNotFound)
}

// TestErasing: without a grace DeleteDEK destroys earlier versions, and does
// not claim it where it could not.
func TestErasing(t *testing.T) {
	store := &historic{Store: openStore(t, "mem://"), err: errdefs.Errorf(errdefs.ErrDenied, "no s3:DeleteObjectVersion")}
	survived := 0
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), store, envelope.Options{Attempts: 1, Survives: func(dek.ID, time.Time) { survived++ }})
	format(t, k, id)
	for range 2 {
		err := k.DeleteDEK(t.Context(), id)
		mustBe(t, "DeleteDEK", err, errdefs.ErrDenied)
		if !strings.Contains(fmt.Sprint(err), "DeleteObjectVersion") {
			t.Errorf("%v does not say why", err)
		}
	}
	store.err = nil
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	if store.erased != 1 || survived != 0 {
		t.Errorf("%d times erased, told of %d survivals", store.erased, survived)
	}
	store.until = time.Now().Add(time.Hour)
	must(t, "DeleteDEK", k.DeleteDEK(t.Context(), id))
	if survived != 1 {
		t.Error("nobody was told that the key survives")
	}
}

// TestPruneOfTheLiving destroys history only if the current record opens.
func TestPruneOfTheLiving(t *testing.T) {
	store, service := &historic{Store: openStore(t, "mem://")}, kmstest.NewBackend()
	k := newKeyring(t, fakeKEK(service), store, fast(1))
	want := format(t, k, id)
	if until, err := k.Prune(t.Context(), id); err != nil || !until.IsZero() || store.erased != 1 {
		t.Errorf("Prune = %v, %v, %d times erased", until, err, store.erased)
	}
	mustHave(t, "pruned", k, want)
	good, _ := stored(t, store, id)
	overwrite(t, store, id, strings.Replace(good, "node-a", "node-b", 1))
	_, err := k.Prune(t.Context(), id)
	mustBe(t, "Prune of a damaged record", err, errdefs.ErrCorrupt)
	overwrite(t, store, id, good)
	service.SetFault(func(string) error { return errdefs.Errorf(errdefs.ErrDenied, "disabled") })
	_, err = k.Prune(t.Context(), id)
	mustBe(t, "Prune without the KEK", err, errdefs.ErrDenied)
	_, err = k.Prune(t.Context(), id+"0")
	mustBe(t, "Prune of nothing", err, errdefs.ErrNotFound)
	if store.erased != 1 {
		t.Error("history was destroyed though the record does not open")
	}
}

func TestReleaseClaim(t *testing.T) {
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), openStore(t, "mem://"), fast(1))
	create(t, k, id)
	must(t, "ReleaseClaim of none", k.ReleaseClaim(t.Context(), id, "node-a"))
	a := dek.Claim{Node: "node-a", UUID: dek.NewUUID()}
	_, err := k.ClaimFormat(t.Context(), id, a)
	must(t, "ClaimFormat", err)
	mustBe(t, "ReleaseClaim of another node's", k.ReleaseClaim(t.Context(), id, "node-b"), errdefs.ErrConflict)
	for range 2 {
		must(t, "ReleaseClaim", k.ReleaseClaim(t.Context(), id, "node-a"))
	}
	d, err := k.GetDEK(t.Context(), id)
	must(t, "GetDEK", err)
	defer d.Wipe()
	if d.Claim != (dek.Claim{UUID: a.UUID}) {
		t.Errorf("after the release the claim is %+v", d.Claim)
	}
	got, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "node-b", UUID: dek.NewUUID()})
	must(t, "ClaimFormat by another node", err)
	if got != (dek.Claim{Node: "node-b", UUID: a.UUID}) {
		t.Errorf("node-b got %+v: the remains on the disk have %s", got, a.UUID)
	}
	must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: a.UUID, Sequence: 1}))
	must(t, "ReleaseClaim of a formatted one", k.ReleaseClaim(t.Context(), id, "node-b"))

	rotating, err := k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	rotating.Wipe()
	for _, node := range []string{"node-a", "node-b"} {
		got, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: node, UUID: dek.NewUUID()})
		must(t, "ClaimFormat while rotating", err)
		if got != (dek.Claim{Node: node, UUID: a.UUID}) {
			t.Errorf("%s got %+v while rotating", node, got)
		}
		must(t, "ReleaseClaim while rotating", k.ReleaseClaim(t.Context(), id, node))
	}
}

func TestList(t *testing.T) {
	service, c := kmstest.NewBackend(), newClock()
	stores := []envelope.Store{openStore(t, "mem://"), openStore(t, "file://"+t.TempDir()), openStore(t, "mem://")}
	o := c.options()
	o.Grace = time.Hour
	second := newKeyring(t, fakeKEK(service), stores[1], o)
	o.RecordAuth = recordSecret()
	k, err := envelope.New([]*kms.KEK{fakeKEK(service)}, stores, o)
	must(t, "New", err)
	keyID, err := service.CurrentKeyID(t.Context())
	must(t, "CurrentKeyID", err)
	wrap := envelope.Wrap{Scheme: "fake", KeyID: keyID, Mechanism: "fake"}
	one := []envelope.Wrap{wrap}

	made := c.now
	info := func(store int, id dek.ID, state dek.State) envelope.Info {
		return envelope.Info{Store: store, Object: envelope.ObjectName(id), ID: id, State: state, Spec: spec(), Created: made, Updated: made, Authenticated: store == 0}
	}
	var want []envelope.Info
	create(t, k, "d/prepared")
	w := info(0, "d/prepared", dek.Prepared)
	w.Wraps = one
	want = append(want, w)

	format(t, k, "d/rotating")
	c.advance(time.Minute)
	d, err := k.RotateDEK(t.Context(), "d/rotating")
	must(t, "RotateDEK", err)
	d.Wipe()
	w = info(0, "d/rotating", dek.Rotating)
	w.Updated, w.Wraps = c.now, []envelope.Wrap{wrap, wrap}
	want = append(want, w)

	format(t, second, "d/deleted")
	must(t, "DeleteDEK", second.DeleteDEK(t.Context(), "d/deleted"))
	w = info(1, "d/deleted", dek.Deleted)
	w.Created, w.Node, w.Updated, w.Expires, w.Wraps = c.now, "node-a", c.now, c.now.Add(time.Hour), one
	want = append(want, w)

	bad := map[dek.ID]string{"d/junk": "junk", "d/moved": first(stored(t, stores[0], "d/prepared"))}
	for id, data := range bad {
		must(t, "Create", stores[1].Create(t.Context(), envelope.ObjectName(id), []byte(data)))
	}
	for _, foreign := range []string{"probe-abc", "dek-abc", "dek", "dex" + envelope.ObjectName("x")[3:], envelope.ObjectName("x") + "0"} {
		must(t, "Create", stores[0].Create(t.Context(), foreign, []byte("junk")))
	}

	for _, limit := range []int{0, 1, 2, 5, 100} {
		var got []envelope.Info
		token, unreadable := "", 0
		for range 100 {
			page, next, err := k.List(t.Context(), token, limit)
			must(t, "List", err)
			if len(page) > max(limit, 1) {
				t.Errorf("a page of %d, the limit is %d", len(page), limit)
			}
			for _, i := range page {
				if i.Err != nil {
					unreadable++
					mustBe(t, "an unreadable object", i.Err, errdefs.ErrCorrupt)
					if i.Store != 1 || i.ID != "" || i.Object == "" {
						t.Errorf("an unreadable object is %+v", i)
					}
					continue
				}
				got = append(got, i)
			}
			if token = next; next == "" {
				break
			}
		}
		if unreadable != len(bad) {
			t.Errorf("%d unreadable objects, want %d", unreadable, len(bad))
		}
		byID := func(a, b envelope.Info) int { return strings.Compare(string(a.ID), string(b.ID)) }
		slices.SortFunc(got, byID)
		slices.SortFunc(want, byID)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("by %d: (-want +got)\n%s", limit, diff)
		}
	}
	for _, token := range []string{"x", "3/", "-1/", "/", "0"} {
		_, _, err := k.List(t.Context(), token, 10)
		mustBe(t, fmt.Sprintf("List(%q)", token), err, errdefs.ErrInvalid)
	}
}

// TestListIsComplete: what cannot be read now is no gap, but an error.
func TestListIsComplete(t *testing.T) {
	fail := false
	store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(_ int, op string) envelopetest.Fault {
		if fail && op == "Read" {
			return envelopetest.Fail
		}
		return envelopetest.None
	})
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), store, fast(2))
	create(t, k, id)
	fail = true
	infos, _, err := k.List(t.Context(), "", 10)
	mustBe(t, "List", err, errdefs.ErrUnavailable)
	if len(infos) != 0 {
		t.Error("List gave records with its error")
	}
}

func TestRaces(t *testing.T) {
	t.Run("mem", func(t *testing.T) {
		s := openStore(t, "mem://")
		envelopetest.RunRace(t, func(*testing.T) []envelope.Store { return []envelope.Store{s, s, s} }, 20)
	})
	t.Run("file", func(t *testing.T) {
		dir := t.TempDir()
		envelopetest.RunRace(t, func(t *testing.T) []envelope.Store {
			return []envelope.Store{openStore(t, "file://"+dir), openStore(t, "file://"+dir)}
		}, 3)
	})
}

// TestSecretIsTakenOver: it is wiped, and after Close nothing can be signed.
func TestSecretIsTakenOver(t *testing.T) {
	s := recordSecret()
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), openStore(t, "mem://"), envelope.Options{RecordAuth: s, Attempts: 1})
	create(t, k, id)
	if s.Len() != 0 {
		t.Error("New left the secret with its caller")
	}
	must(t, "Close", k.Close())
	if err := k.DeleteDEK(t.Context(), id); err == nil {
		t.Error("DeleteDEK works after Close")
	}
	var d dek.DEK
	d.Wipe()
	d = dek.DEK{Key: secret.New(32), Previous: secret.New(32)}
	d.Wipe()
	if d.Key.Len()+d.Previous.Len() != 0 {
		t.Error("Wipe leaves keys")
	}
}
