package envelope_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient/keyclienttest"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

const id = dek.ID("driver.example.com/vol-1")

func spec() dek.Spec {
	return dek.Spec{Name: "pvc-1", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC}
}

func fakeKEK(b kms.Backend) *kms.KEK { return kms.New("fake", b, kms.Options{}) }

// clusterKEK opens a cluster KEK whose secret and salt are counted up from the
// numbers given; a second pair is the previous one.
func clusterKEK(t *testing.T, numbers ...byte) *kms.KEK {
	t.Helper()
	var files []string
	for _, first := range numbers {
		data := make([]byte, 32)
		for i := range data {
			data[i] = first + byte(i)
		}
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		files = append(files, path)
	}
	uri := "cluster://" + files[0] + "?salt-file=" + files[1]
	if len(files) > 2 {
		uri += "&previous-secret-file=" + files[2] + "&previous-salt-file=" + files[3]
	}
	kek, err := (kms.Mux{cluster.Scheme: cluster.Open}).Open(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	return kek
}

func newKeyring(t *testing.T, kek *kms.KEK, s envelope.Store, o envelope.Options) *envelope.Keyring {
	t.Helper()
	k, err := envelope.New([]*kms.KEK{kek}, []envelope.Store{s}, o)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// fast is for tests in which stores fail in real time.
func fast(attempts int) envelope.Options {
	return envelope.Options{Attempts: attempts, Backoff: time.Microsecond}
}

func TestContract(t *testing.T) {
	for name, open := range map[string]func(t *testing.T) (*kms.KEK, envelope.Store){
		"fake+mem": func(t *testing.T) (*kms.KEK, envelope.Store) {
			return fakeKEK(kmstest.NewBackend()), openStore(t, "mem://")
		},
		"cluster+file": func(t *testing.T) (*kms.KEK, envelope.Store) {
			return clusterKEK(t, 0, 32), openStore(t, "file://"+t.TempDir())
		},
	} {
		t.Run(name, func(t *testing.T) {
			keyclienttest.Run(t, func(t *testing.T) keyclienttest.Keys {
				kek, store := open(t)
				k := newKeyring(t, kek, store, envelope.Options{KEKNames: []string{keyclienttest.KEK}})
				t.Cleanup(func() {
					if err := k.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				})
				return keyclienttest.Keys{NodeKeys: k, AdminKeys: k}
			})
		})
	}
}

// TestVectors: records of version 1, made by another implementation, with
// known keys. They must give these keys for ever.
func TestVectors(t *testing.T) {
	const uuid = "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"
	store := openStore(t, "mem://")
	k := newKeyring(t, clusterKEK(t, 0, 32), store, envelope.Options{RecordAuth: countUp(64)})
	defer k.Close()
	for _, v := range []struct {
		file string
		n    int // of its key
		want dek.DEK
	}{
		{"prepared", 1, dek.DEK{ID: "ebs.csi.aws.com/vol-1", State: dek.Prepared, Spec: dek.Spec{Cipher: dek.CipherXTS}}},
		{"claimed", 2, dek.DEK{
			ID: "pd.csi.storage.gke.io/projects/p/zones/z/disks/d", State: dek.Prepared,
			Spec:  dek.Spec{Name: "pvc-2", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
			Claim: dek.Claim{Node: "node-a", UUID: uuid},
		}},
		{"formatted", 3, dek.DEK{
			ID: "disk.csi.azure.com/subscriptions/s/disks/d", State: dek.Formatted,
			Spec:  dek.Spec{Name: "päth <&> \u2028 \\ \"q\"\t😀", Cipher: dek.CipherXTS},
			Claim: dek.Claim{Node: "node-b.example.com", UUID: uuid}, Header: dek.HeaderID{UUID: uuid, Sequence: 1<<64 - 1},
		}},
		{"formatted-no-sequence", 4, dek.DEK{
			ID: dek.ID("v/" + strings.Repeat("~", 254)), State: dek.Formatted,
			Spec:  dek.Spec{Name: "n", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
			Claim: dek.Claim{Node: "n", UUID: uuid}, Header: dek.HeaderID{UUID: uuid},
		}},
		{"formatted-backup", 11, dek.DEK{
			ID: "ebs.csi.aws.com/vol-11", State: dek.Formatted, Spec: dek.Spec{Name: "pvc-11", Cipher: dek.CipherXTS},
			Claim: dek.Claim{Node: "node-e", UUID: uuid}, Header: dek.HeaderID{UUID: uuid, Sequence: 2,
				Backup: "DAwMDAwMDAwMDAwM7kvwmSo7gYe/ZK5dpeUSKNGjN6PachRAQGoHnSIcE6/Gu88LxVMxbIvQD2mJkkGkkD2g/k6qny7b8a/v5dVhjuxR4QQyS9QTh8zJ/U+SdnFtpP+Q02tVK+xx07ZASIGA2H7O7tAIfSyo0UOGdODKHumEYARm"},
		}},
		{"rotating", 6, dek.DEK{
			ID: "ebs.csi.aws.com/vol-6", State: dek.Rotating, Spec: dek.Spec{Name: "pvc-6", Cipher: dek.CipherXTS},
			Claim: dek.Claim{Node: "node-c", UUID: uuid}, Header: dek.HeaderID{UUID: uuid, Sequence: 9},
		}},
		{"clone-authenticated", 7, dek.DEK{
			ID: "ebs.csi.aws.com/vol-7", State: dek.Rotating, Source: "snap:ebs.csi.aws.com/snap-1",
			Spec:   dek.Spec{Name: "pvc-7", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
			Header: dek.HeaderID{UUID: uuid, Sequence: 2},
		}},
		{"released", 8, dek.DEK{
			ID: "ebs.csi.aws.com/vol-8", State: dek.Prepared, Spec: dek.Spec{Cipher: dek.CipherXTS},
			Claim: dek.Claim{UUID: uuid},
		}},
		{"prepared-discard", 12, dek.DEK{
			ID: "ebs.csi.aws.com/vol-12", State: dek.Prepared, Spec: dek.Spec{Name: "pvc-12", Cipher: dek.CipherXTS, Discard: true},
		}},
		{"prepared-direct", 13, dek.DEK{
			ID: "ebs.csi.aws.com/vol-13", State: dek.Prepared,
			Spec: dek.Spec{Name: "pvc-13", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: dek.ModeDirect},
		}},
		{"prepared-kek", 14, dek.DEK{ // no KEK here has that name: opening asks for none
			ID: "ebs.csi.aws.com/vol-14", State: dek.Prepared, Spec: dek.Spec{Name: "pvc-14", Cipher: dek.CipherXTS, KEK: "gold-1"},
		}},
		{"deleted-with-grace", 9, dek.DEK{
			ID: "ebs.csi.aws.com/vol-9", State: dek.Rotating, Source: "ebs.csi.aws.com/vol-1",
			Spec:  dek.Spec{Name: "pvc-9", Cipher: dek.CipherXTS},
			Claim: dek.Claim{Node: "node-d", UUID: uuid}, Header: dek.HeaderID{UUID: uuid, Sequence: 3},
		}},
	} {
		putVector(t, store, v.file, v.want.ID)
		if strings.HasPrefix(v.file, "deleted") {
			if _, err := k.GetDEK(t.Context(), v.want.ID); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "2026-04-03T05:06:07Z") {
				t.Errorf("%s: %v, want ErrNotFound that says how long it can be restored", v.file, err)
			}
			if err := k.RestoreDEK(t.Context(), v.want.ID); err != nil {
				t.Errorf("%s: RestoreDEK: %v", v.file, err)
			}
		}
		got, err := k.GetDEK(t.Context(), v.want.ID)
		if err != nil {
			t.Errorf("%s: %v", v.file, err)
			continue
		}
		v.want.Key = countUp(byte(32 * v.n))
		if v.want.State == dek.Rotating {
			v.want.Previous = countUp(byte(32 * v.n))
			for i := range v.want.Previous.Expose() {
				v.want.Previous.Expose()[i] ^= 0xff
			}
		}
		if diff := cmp.Diff(v.want, got, cmp.Comparer(secret.Bytes.Equal)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", v.file, diff)
		}
		got.Wipe()
		v.want.Wipe()
	}
	for file, id := range map[string]dek.ID{"deleted": "ebs.csi.aws.com/vol-5", "deleted-authenticated": "ebs.csi.aws.com/vol-10"} {
		putVector(t, store, file, id)
		if _, err := k.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "2026-02-03T04:05:06Z") {
			t.Errorf("%s: %v, want ErrNotFound with the time", file, err)
		}
	}
}

// countUp returns 32 bytes that count up from the first.
func countUp(first byte) secret.Bytes {
	s := secret.New(32)
	for i := range s.Expose() {
		s.Expose()[i] = first + byte(i)
	}
	return s
}

func putVector(t *testing.T, store envelope.Store, file string, id dek.ID) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "record-v1", file+".json"))
	if err == nil {
		err = store.Create(t.Context(), envelope.ObjectName(id), data)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// create, claim and confirm as far as a test needs, and return the DEK.
func create(t *testing.T, k *envelope.Keyring, id dek.ID) dek.DEK {
	t.Helper()
	d, err := k.CreateDEK(t.Context(), id, spec())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Wipe)
	return d
}

func format(t *testing.T, k *envelope.Keyring, id dek.ID) dek.DEK {
	t.Helper()
	d := create(t, k, id)
	d.Claim = dek.Claim{Node: "node-a", UUID: dek.NewUUID()}
	d.Header = dek.HeaderID{UUID: d.Claim.UUID, Sequence: 7}
	d.State = dek.Formatted
	if _, err := k.ClaimFormat(t.Context(), id, d.Claim); err != nil {
		t.Fatal(err)
	}
	if err := k.ConfirmDEK(t.Context(), id, d.Header); err != nil {
		t.Fatal(err)
	}
	return d
}

func stored(t *testing.T, s envelope.Store, id dek.ID) (data, version string) {
	t.Helper()
	b, version, err := s.Read(t.Context(), envelope.ObjectName(id))
	if err != nil {
		t.Fatal(err)
	}
	return string(b), version
}

func overwrite(t *testing.T, s envelope.Store, id dek.ID, data string) {
	t.Helper()
	_, version := stored(t, s, id)
	if err := s.Replace(t.Context(), envelope.ObjectName(id), []byte(data), version); err != nil {
		t.Fatal(err)
	}
}

// TestHostileStore: what a store may try with a record, and what comes of it.
func TestHostileStore(t *testing.T) {
	store := openStore(t, "mem://")
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), store, fast(1))
	defer k.Close()
	d := format(t, k, id)
	const victim = dek.ID("driver.example.com/vol-2")
	create(t, k, victim)
	good, _ := stored(t, store, id)
	swap := func(old, new string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q is not in the record once:\n%s", old, good)
		}
		return strings.Replace(good, old, new, 1)
	}
	asVictim := swap(string(id), string(victim))
	blank := strings.Replace(swap(`"formatted"`, `"prepared"`), good[strings.Index(good, `  "header"`):strings.Index(good, `  "created"`)], "", 1)
	for _, tt := range []struct {
		name  string
		id    dek.ID
		data  string
		class error
	}{
		{"a record in another's place", victim, good, errdefs.ErrCorrupt},
		{"a record under another's ID", victim, asVictim, errdefs.ErrCorrupt},
		{"formatted made prepared", id, blank, errdefs.ErrCorrupt},
		{"integrity taken away", id, swap(",\n    \"integrity\": \"hmac-sha256\"", ""), errdefs.ErrCorrupt},
		{"another name", id, swap("pvc-1", "pvc-2"), errdefs.ErrCorrupt},
		{"a lower floor", id, swap(`"sequence": 7`, `"sequence": 6`), errdefs.ErrCorrupt},
		{"no floor", id, swap(",\n    \"sequence\": 7", ""), errdefs.ErrCorrupt},
		{"another claim", id, swap("node-a", "node-b"), errdefs.ErrCorrupt},
		{"another mechanism", id, swap(`"mechanism": "fake"`, `"mechanism": "none"`), errdefs.ErrCorrupt},
		{"another time", id, strings.Replace(good, `"created": "20`, `"created": "19`, 1), errdefs.ErrCorrupt},
		{"another scheme", id, swap(`"scheme": "fake"`, `"scheme": "awskms"`), errdefs.ErrState},
		{"a later version", id, swap(`"version": 1`, `"version": 2`), errdefs.ErrState},
		{"half a record", id, good[:len(good)/2], errdefs.ErrCorrupt},
		{"nothing", id, "", errdefs.ErrCorrupt},
	} {
		before, _ := stored(t, store, tt.id)
		overwrite(t, store, tt.id, tt.data)
		got, getErr := k.GetDEK(t.Context(), tt.id)
		made, createErr := k.CreateDEK(t.Context(), tt.id, spec())
		_, claimErr := k.ClaimFormat(t.Context(), tt.id, dek.Claim{Node: "n", UUID: dek.NewUUID()})
		for op, err := range map[string]error{
			"GetDEK": getErr, "CreateDEK": createErr, "ClaimFormat": claimErr,
			"ConfirmDEK": k.ConfirmDEK(t.Context(), tt.id, dek.HeaderID{UUID: d.Header.UUID, Sequence: 8}),
			"RewrapDEK":  k.RewrapDEK(t.Context(), tt.id),
		} {
			if !errors.Is(err, tt.class) {
				t.Errorf("%s: %s: %v, want %v", tt.name, op, err, tt.class)
			}
		}
		if got.Key.Len() != 0 || made.Key.Len() != 0 {
			t.Errorf("%s: a key came with the error", tt.name)
		}
		if after, _ := stored(t, store, tt.id); after != tt.data {
			t.Errorf("%s: the record was changed:\n%s", tt.name, after)
		}
		overwrite(t, store, tt.id, before)
	}
}

// TestKeyIsNotInTheStore in any form, before and after deletion, and the
// wrapped one is gone after it.
func TestKeyIsNotInTheStore(t *testing.T) {
	dir := t.TempDir()
	store, fake := openStore(t, "file://"+dir), kmstest.NewBackend()
	k := newKeyring(t, fakeKEK(fake), store, fast(1))
	defer k.Close()
	key := format(t, k, id).Key.Expose()
	record, _ := stored(t, store, id)
	for _, form := range []string{string(key), hex.EncodeToString(key), base64.RawStdEncoding.EncodeToString(key)} {
		if strings.Contains(record, form) {
			t.Error("the record holds the key")
		}
	}
	// Deleting needs no KMS.
	fake.SetFault(func(string) error { return errdefs.Errorf(errdefs.ErrUnavailable, "sealed") })
	if err := k.DeleteDEK(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	record, _ = stored(t, store, id)
	for _, gone := range []string{`"wrapped"`, `"ciphertext"`, `"mac"`, `"claim"`, `"header"`} {
		if strings.Contains(record, gone) {
			t.Errorf("the tombstone has %s:\n%s", gone, record)
		}
	}
	fake.SetFault(nil)
	_, err := k.CreateDEK(t.Context(), id, spec())
	if !errors.Is(err, errdefs.ErrExists) || !strings.Contains(err.Error(), "never") {
		t.Errorf("CreateDEK after DeleteDEK: %v, want ErrExists that says never", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 { // the tombstone and .lock
		t.Errorf("the directory has %v, %v", files, err)
	}
}

// TestMasterSecretRotation: the whole way from one pair to the next.
func TestMasterSecretRotation(t *testing.T) {
	store := openStore(t, "mem://")
	older := newKeyring(t, clusterKEK(t, 0, 32), store, fast(1))
	want := format(t, older, id)
	newer := newKeyring(t, clusterKEK(t, 64, 96), store, fast(1))
	if _, err := newer.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("the new pair alone, before the rewrap: %v, want ErrDenied", err)
	}
	both := newKeyring(t, clusterKEK(t, 64, 96, 0, 32), store, fast(1))
	before, _ := stored(t, store, id)
	if err := both.RewrapDEK(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	after, _ := stored(t, store, id)
	if before == after {
		t.Error("RewrapDEK changed nothing")
	}
	got, err := newer.GetDEK(t.Context(), id)
	if err != nil {
		t.Fatalf("the new pair alone, after the rewrap: %v", err)
	}
	defer got.Key.Wipe()
	if !got.Key.Equal(want.Key) || got.State != want.State || got.Header != want.Header || got.Claim != want.Claim || got.Spec != want.Spec {
		t.Errorf("RewrapDEK changed the DEK: %+v, want %+v", got, want)
	}
	if _, err := older.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("the old pair alone, after the rewrap: %v, want ErrDenied", err)
	}
	if err := both.RewrapDEK(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if again, _ := stored(t, store, id); again != after {
		t.Error("a second RewrapDEK wrote the record again")
	}
}

// liar unwraps to a key with one bit changed once it lies.
type liar struct {
	*kmstest.Backend
	lies bool
}

func (l *liar) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	bound, err := l.Backend.Unwrap(ctx, w, aad)
	current, _ := l.CurrentKeyID(ctx)
	if l.lies && err == nil && w.KeyID == current {
		bound[len(bound)-1] ^= 1
	}
	return bound, err
}

// TestRewrapChecksTheNewWrap: a KMS that wraps badly costs no key.
func TestRewrapChecksTheNewWrap(t *testing.T) {
	store, l := openStore(t, "mem://"), &liar{Backend: kmstest.NewBackend()}
	k := newKeyring(t, fakeKEK(l), store, fast(1))
	defer k.Close()
	create(t, k, id)
	before, _ := stored(t, store, id)
	l.Rotate()
	l.lies = true
	if err := k.RewrapDEK(t.Context(), id); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("RewrapDEK: %v, want ErrState", err)
	}
	if after, _ := stored(t, store, id); after != before {
		t.Error("the record was changed")
	}
}

func TestNewRefuses(t *testing.T) {
	store := openStore(t, "mem://")
	fake := fakeKEK(kmstest.NewBackend())
	for name, tt := range map[string]struct {
		keks   []*kms.KEK
		stores []envelope.Store
		o      envelope.Options
		want   string
	}{
		"no KEK":                        {nil, []envelope.Store{store}, envelope.Options{}, "KMS URI"},
		"a KEK and no KEK":              {[]*kms.KEK{fake, nil}, []envelope.Store{store}, envelope.Options{}, "KMS URI"},
		"no store":                      {[]*kms.KEK{fake}, nil, envelope.Options{}, "cannot derive"},
		"a store and no store":          {[]*kms.KEK{fake}, []envelope.Store{store, nil}, envelope.Options{}, "cannot derive"},
		"no store, a KEK that derives":  {[]*kms.KEK{clusterKEK(t, 0, 32)}, nil, envelope.Options{}, "also where the KEK"},
		"neither, which is about a KEK": {nil, nil, envelope.Options{}, "KMS URI"},
		"a short secret":                {[]*kms.KEK{fake}, []envelope.Store{store}, envelope.Options{RecordAuth: secret.New(31)}, "31 bytes, at least 32"},
		"a bad name of a KEK":           {[]*kms.KEK{fake}, []envelope.Store{store}, envelope.Options{KEKNames: []string{"Gold"}}, "KEK name"},
		"two KEKs of one name":          {[]*kms.KEK{fake, fake}, []envelope.Store{store}, envelope.Options{KEKNames: []string{"gold", "gold"}}, "two KEKs"},
		"more names than KEKs":          {[]*kms.KEK{fake}, []envelope.Store{store}, envelope.Options{KEKNames: []string{"", "gold"}}, "2 names for 1 KEKs"},
		"a grace below zero":            {[]*kms.KEK{fake}, []envelope.Store{store}, envelope.Options{Grace: -1}, "below zero"},
	} {
		_, err := envelope.New(tt.keks, tt.stores, tt.o)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ErrInvalid with %q", name, err, tt.want)
		}
	}
}

func TestCreateRefusesNamesThatJSONCannotKeep(t *testing.T) {
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), openStore(t, "mem://"), fast(1))
	defer k.Close()
	_, err := k.CreateDEK(t.Context(), id, dek.Spec{Name: "pvc-\xff", Cipher: dek.CipherXTS})
	if !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("CreateDEK: %v, want ErrInvalid", err)
	}
}

func TestClose(t *testing.T) {
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), openStore(t, "mem://"), fast(1))
	create(t, k, id)
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := k.GetDEK(t.Context(), id); err == nil {
		t.Error("GetDEK works after Close")
	}
}

// TestTimes: in UTC, whole seconds, created kept.
func TestTimes(t *testing.T) {
	store := openStore(t, "mem://")
	now := time.Date(2026, 3, 4, 5, 6, 7, 999, time.FixedZone("", 3600))
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), store, envelope.Options{Now: func() time.Time { return now }})
	defer k.Close()
	create(t, k, id)
	now = now.Add(time.Hour)
	if _, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "n", UUID: dek.NewUUID()}); err != nil {
		t.Fatal(err)
	}
	record, _ := stored(t, store, id)
	for _, want := range []string{`"created": "2026-03-04T04:06:07Z"`, `"updated": "2026-03-04T05:06:07Z"`} {
		if !strings.Contains(record, want) {
			t.Errorf("no %s in\n%s", want, record)
		}
	}
}

// TestRetries: ErrUnavailable alone is tried again, a bounded number of times,
// with growing pauses, and no longer than ctx allows.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := kmstest.NewBackend()
		store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault { return envelopetest.Fail })
		k := newKeyring(t, fakeKEK(fake), store, envelope.Options{})
		start := time.Now()
		_, err := k.GetDEK(t.Context(), id)
		if !errors.Is(err, errdefs.ErrUnavailable) || store.Calls() != 4 {
			t.Errorf("GetDEK: %v after %d calls, want ErrUnavailable after 4", err, store.Calls())
		}
		if took := time.Since(start); took < 700*time.Millisecond || took > 1400*time.Millisecond {
			t.Errorf("four attempts took %v, want 0.7 to 1.4 s of pauses", took)
		}

		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start = time.Now()
		_, err = k.GetDEK(ctx, id)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 300*time.Millisecond {
			t.Errorf("GetDEK with a deadline: %v after %v", err, time.Since(start))
		}

		calls := 0
		fake.SetFault(func(string) error { calls++; return errdefs.Errorf(errdefs.ErrDenied, "disabled") })
		k = newKeyring(t, fakeKEK(fake), openStore(t, "mem://"), envelope.Options{})
		if _, err = k.CreateDEK(t.Context(), id, spec()); !errors.Is(err, errdefs.ErrDenied) || calls != 1 {
			t.Errorf("CreateDEK: %v after %d calls, want ErrDenied after 1", err, calls)
		}
	})
}

// contrary refuses every Replace, as if others always were faster.
type contrary struct{ envelope.Store }

func (contrary) Replace(context.Context, string, []byte, string) error {
	return errdefs.Errorf(errdefs.ErrConflict, "changed")
}

func TestRacesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newKeyring(t, fakeKEK(kmstest.NewBackend()), contrary{openStore(t, "mem://")}, envelope.Options{})
		create(t, k, id)
		_, err := k.ClaimFormat(t.Context(), id, dek.Claim{Node: "n", UUID: dek.NewUUID()})
		if !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("ClaimFormat: %v, want ErrConflict in the end", err)
		}
	})
}

// TestErrorsNameTheDEK, so that an event on a pod says which volume it was.
func TestErrorsNameTheDEK(t *testing.T) {
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), openStore(t, "mem://"), fast(1))
	defer k.Close()
	_, err := k.GetDEK(t.Context(), id)
	if want := fmt.Sprintf("DEK %s: there is no record", id); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("error %q, want %q…", err, want)
	}
}

// What a DEK's ID may be, every KEK takes.
func TestKEKsTakeTheLongestID(t *testing.T) {
	if kms.MaxID != dek.MaxID {
		t.Errorf("KEKs take IDs of %d bytes, DEKs have up to %d", kms.MaxID, dek.MaxID)
	}
}
