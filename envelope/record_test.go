package envelope

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// vectors returns the records in testdata by name.
func vectors(t testing.TB) map[string][]byte {
	t.Helper()
	paths, err := filepath.Glob("testdata/record-v1/*.json")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no vectors: %v", err)
	}
	all := map[string][]byte{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(filepath.Base(path), ".json")] = data
	}
	return all
}

// TestDecodeNamesTheNewer: what a later release may have written names itself and
// says what to do.
func TestDecodeNamesTheNewer(t *testing.T) {
	newer := strings.Replace(string(vectors(t)["claimed"]), `"version": 1,`, `"version": 1, "colour": "blue",`, 1)
	_, err := decodeRecord([]byte(newer))
	if err == nil || !strings.Contains(err.Error(), `"colour"`) || !strings.Contains(err.Error(), "a later release") {
		t.Errorf("it says %v", err)
	}
}

// TestDecodeIsStrict changes one thing in a good record at a time.
func TestDecodeIsStrict(t *testing.T) {
	good := string(vectors(t)["claimed"])
	if _, err := decodeRecord([]byte(good)); err != nil {
		t.Fatal(err)
	}
	swap := func(old, new string) string {
		if strings.Count(good, old) != 1 {
			t.Fatalf("%q is not in the record once", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	formatted := strings.ReplaceAll(swap(`"prepared"`, `"formatted"`), "\n", " ")
	for name, bad := range map[string]string{
		"unknown field":          swap(`"version": 1,`, `"version": 1, "extra": 1,`),
		"unknown inner field":    swap(`"node": `, `"extra": {"a": "b"}, "node": `),
		"duplicate":              swap(`"version": 1,`, `"version": 1, "version": 1,`),
		"duplicate with escapes": swap(`"version": 1,`, `"version": 1, "\u0076ersion": 1,`),
		"duplicate object":       swap(`"claim": {`, `"claim": {}, "claim": {`),
		"wrong case":             swap(`"state"`, `"State"`),
		"wrong inner case":       swap(`"key_id"`, `"Key_ID"`),
		"path as a name":         swap(`"version": 1,`, `"version": 1, "claim/node": "node-a",`),
		"empty name":             swap(`"version": 1,`, `"version": 1, "": 1,`),
		"null":                   swap(`"version": 1,`, `"version": 1, "header": null,`),
		"empty object":           swap(`"version": 1,`, `"version": 1, "header": {},`),
		"explicit zero":          swap(`"node": `, `"uuid": "", "node": `),
		"discard that is false":  swap(`"cipher": `, `"discard": false, "cipher": `),
		"discard as a string":    swap(`"cipher": `, `"discard": "true", "cipher": `),
		"discard and integrity":  swap(`"cipher": `, `"discard": true, "cipher": `),
		"another mode":           swap(`"cipher": `, `"integrity_mode": "bitmap", "cipher": `),
		"empty KEK":              swap(`"cipher": `, `"kek": "", "cipher": `),
		"bad name of a KEK":      swap(`"cipher": `, `"kek": "Gold", "cipher": `),
		"empty layout":           swap(`"cipher": `, `"layout": "", "cipher": `),
		"number as 1.0":          swap(`"version": 1,`, `"version": 1.0,`),
		"number as string":       swap(`"version": 1,`, `"version": "1",`),
		"array":                  swap(`"version": 1,`, `"version": [1],`),
		"no version":             swap(`"version": 1,`, ``),
		"version 0":              swap(`"version": 1,`, `"version": 0,`),
		"negative version":       swap(`"version": 1,`, `"version": -1,`),
		"trailing data":          good + "{}",
		"trailing text":          good + "x",
		"second record":          good + good,
		"an array of it":         "[" + good + "]",
		"cut":                    good[:len(good)-3],
		"not UTF-8":              swap(`"pvc-2"`, "\"pvc-\xff\""),
		"oversize":               good + strings.Repeat(" ", MaxObject),
		"empty":                  "",
		"nothing":                "null",
		"a string":               `"record"`,
		"deep":                   strings.Repeat(`{"a":`, 5000) + "1" + strings.Repeat("}", 5000),
		"base64 with a newline":  swap(`"mac": "`, `"mac": "\n`),
		"short MAC":              swap(good[strings.Index(good, `"mac": "`):], `"mac": "AAAA"}`),
		"no MAC":                 swap(good[strings.Index(good, `,`+"\n  "+`"mac"`):], "}"),
		"bad ID":                 swap(`"pd.csi.storage.gke.io/projects`, `"pd csi`),
		"bad cipher":             swap(`aes-xts-plain64`, `null`),
		"bad integrity":          swap(`"hmac-sha256"`, `"crc32"`),
		"bad state":              swap(`"prepared"`, `"blank"`),
		"formatted, no header":   formatted,
		"prepared, a header":     swap(`"version": 1,`, `"version": 1, "header": {"uuid": "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"},`),
		"claim without a UUID":   strings.Replace(swap(`"node": "node-a",`, `"node": "node-a"`), `"uuid": "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"`, ``, 1),
		"claim with a bad UUID":  swap(`0b9c1a52`, `0B9C1A52`),
		"deleted, but not empty": swap(`"prepared"`, `"deleted"`),
		"time with an offset":    swap(`2026-01-02T03:04:06Z`, `2026-01-02T03:04:06+00:00`),
		"time with a fraction":   swap(`2026-01-02T03:04:06Z`, `2026-01-02T03:04:06.0Z`),
		"impossible time":        swap(`2026-01-02T03:04:06Z`, `2026-02-30T03:04:06Z`),
		"no scheme":              swap(`"scheme": "cluster",`, ``),
		"empty scheme":           swap(`"scheme": "cluster"`, `"scheme": ""`),
		"empty mechanism":        swap(`"mechanism": "hkdf-sha256+aes-256-gcm"`, `"mechanism": ""`),
		"null ciphertext":        swap(good[strings.Index(good, `"ciphertext"`):strings.Index(good, "\n  },\n  \"claim\"")], `"ciphertext": null`),
	} {
		r, err := decodeRecord([]byte(bad))
		if !errors.Is(err, errdefs.ErrCorrupt) {
			t.Errorf("%s: %+v, %v, want ErrCorrupt", name, r, err)
		}
		if err != nil && len(err.Error()) > 600 {
			t.Errorf("%s: an error of %d bytes", name, len(err.Error()))
		}
	}
	for name, bad := range moreBadRecords(t) {
		if r, err := decodeRecord([]byte(bad)); !errors.Is(err, errdefs.ErrCorrupt) {
			t.Errorf("%s: %+v, %v, want ErrCorrupt", name, r, err)
		}
	}
	later := swap(`"version": 1,`, `"version": 2, "what": ["ever"],`)
	if _, err := decodeRecord([]byte(later)); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "upgrade") {
		t.Errorf("version 2: %v, want ErrState that says to upgrade", err)
	}
}

// moreBadRecords are changes to records with later fields.
func moreBadRecords(t *testing.T) map[string]string {
	all := vectors(t)
	change := func(file string, set map[string]any) string {
		fields := map[string]any{}
		if err := json.Unmarshal(all[file], &fields); err != nil {
			t.Fatal(err)
		}
		for name, value := range set {
			if value == nil {
				delete(fields, name)
			} else {
				fields[name] = value
			}
		}
		data, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	wrap := map[string]any{"scheme": "cluster", "key_id": "k", "mechanism": "m", "ciphertext": "AAAA"}
	was := map[string]any{"state": "formatted", "updated": "2026-01-02T03:04:06Z"}
	const uuid = "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"
	const later, short = "2027-01-02T03:04:06Z", "AAAA"
	return map[string]string{
		"rotating without a previous key": change("rotating", map[string]any{"previous": nil}),
		"rotating without a header":       change("rotating", map[string]any{"header": nil}),
		"formatted with a previous key":   change("rotating", map[string]any{"state": "formatted"}),
		"prepared with a previous key":    change("claimed", map[string]any{"previous": wrap}),
		"half a previous key":             change("rotating", map[string]any{"previous": map[string]any{"scheme": "cluster"}}),
		"half a previous key, formatted":  change("formatted", map[string]any{"previous": map[string]any{"scheme": "cluster"}}),
		"a clone of itself":               change("released", map[string]any{"source": "ebs.csi.aws.com/vol-8"}),
		"a clone of a bad ID":             change("released", map[string]any{"source": "a b"}),
		"a backup that is no base64":      change("formatted-backup", map[string]any{"header": map[string]any{"uuid": uuid, "sequence": 2, "backup": "AAA"}}),
		"a backup that is too long":       change("formatted-backup", map[string]any{"header": map[string]any{"uuid": uuid, "sequence": 2, "backup": strings.Repeat("AAAA", 129)}}),
		"an empty backup":                 change("formatted-backup", map[string]any{"header": map[string]any{"uuid": uuid, "sequence": 2, "backup": ""}}),
		"a short authenticator":           change("rotating", map[string]any{"auth": short}),
		"an empty authenticator":          change("rotating", map[string]any{"auth": ""}),
		"alive, but expires":              change("rotating", map[string]any{"expires": later}),
		"alive, but was":                  change("rotating", map[string]any{"was": was}),
		"a grace without a key":           change("deleted", map[string]any{"expires": later}),
		"a grace that was nothing":        change("deleted-with-grace", map[string]any{"was": nil}),
		"a grace of something else":       change("deleted-with-grace", map[string]any{"was": was}),
		"deleted twice":                   change("deleted-with-grace", map[string]any{"was": map[string]any{"state": "deleted", "updated": later}}),
		"a grace without an end":          change("deleted-with-grace", map[string]any{"expires": nil}),
		"a grace with a bad end":          change("deleted-with-grace", map[string]any{"expires": "tomorrow"}),
		"a grace without a MAC":           change("deleted-with-grace", map[string]any{"mac": nil}),
		"a bare tombstone with a MAC":     change("deleted", map[string]any{"mac": short}),
		"a bare tombstone with a source":  change("deleted", map[string]any{"source": "a/b"}),
		"a bare tombstone with a key":     change("deleted", map[string]any{"previous": wrap}),
	}
}

// TestMACCoversEverything changes every value of every vector: decoding or
// verifying must fail. It checks first that the record verifies as it is.
func TestMACCoversEverything(t *testing.T) {
	changed := 0
	for name, n := range map[string]byte{
		"prepared": 1, "claimed": 2, "formatted": 3, "formatted-no-sequence": 4,
		"rotating": 6, "clone-authenticated": 7, "released": 8, "deleted-with-grace": 9, "formatted-backup": 11, "prepared-kek": 14,
	} {
		key := countUp(32*n, 32)
		defer key.Wipe()
		check := func(data []byte) error {
			r, err := decodeRecord(data)
			if err != nil {
				return err
			}
			if r.State == dek.Deleted {
				r = r.former()
			}
			return r.verify(key)
		}
		good := vectors(t)[name]
		if err := check(good); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		other := countUp(99, 32)
		if r, err := decodeRecord(good); err != nil || !errors.Is(r.verify(other), errdefs.ErrCorrupt) {
			t.Errorf("%s verifies under another key", name)
		}
		other.Wipe()
		if name != "claimed" && name != "formatted" && name != "formatted-backup" && name != "prepared-kek" && name != "clone-authenticated" {
			continue // these have every field
		}
		from := 0
		if name == "clone-authenticated" { // the first part is like the others
			from = bytes.Index(good, []byte(`"previous"`))
		}
		auth := bytes.Index(good, []byte(`"auth"`)) // not the MAC's business
		for i, c := range good {
			if i < from || auth >= 0 && i > auth {
				continue
			}
			bad := bytes.Clone(good)
			if bad[i] = '1'; c == '1' {
				bad[i] = '2'
			}
			if strings.ContainsRune(" \n{}:,\"\\", rune(c)) || !json.Valid(bad) {
				continue
			}
			changed++
			if check(bad) == nil {
				t.Errorf("%s: byte %d changed from %q to %q goes unnoticed", name, i, c, bad[i])
			}
		}
	}
	if changed < 1000 {
		t.Errorf("only %d changes were tried", changed)
	}
}

// TestAuthenticatorCoversEverything likewise, tombstones included; all but the
// MAC, which is a key's own business.
func TestAuthenticatorCoversEverything(t *testing.T) {
	a, err := newAuthenticator(countUp(64, 32))
	if err != nil {
		t.Fatal(err)
	}
	defer a.wipe()
	changed := 0
	for _, name := range []string{"deleted-with-grace", "deleted-authenticated"} { // all fields, and the least
		good := vectors(t)[name]
		check := func(data []byte) error {
			r, err := decodeRecord(data)
			if err != nil {
				return err
			}
			return a.check(r)
		}
		if err := check(good); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		mac := bytes.Index(good, []byte(`"mac"`))
		auth := bytes.Index(good, []byte(`"auth"`))
		for i, c := range good {
			bad := bytes.Clone(good)
			if bad[i] = '1'; c == '1' {
				bad[i] = '2'
			}
			if mac >= 0 && i > mac && i < auth || strings.ContainsRune(" \n{}:,\"\\", rune(c)) || !json.Valid(bad) {
				continue
			}
			changed++
			if check(bad) == nil {
				t.Errorf("%s: byte %d changed from %q to %q goes unnoticed", name, i, c, bad[i])
			}
		}
	}
	if changed < 800 {
		t.Errorf("only %d changes were tried", changed)
	}
}

// TestOptionalFieldsCanCome: a field more changes the MAC, a field that is
// absent does not count, so version 1 can grow.
func TestOptionalFieldsCanCome(t *testing.T) {
	got, err := flatten([]byte(`{"a":"1","b":{"c":2,"d":{"e":true}},"f":null,"g":{}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"a": "s1", "b/c": "n2", "b/d/e": "btrue", "f": "z", "g": "{"}
	for path := range want {
		if got[path] != want[path] {
			t.Errorf("%s is %q, want %q", path, got[path], want[path])
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
}

func countUp(first byte, n int) secret.Bytes {
	s := secret.New(n)
	for i := range s.Expose() {
		s.Expose()[i] = first + byte(i)
	}
	return s
}

// FuzzRecord: what decodes is encoded again to the same record, with a MAC
// that verifies; what it decodes to obeys the rules that callers rely on.
func FuzzRecord(f *testing.F) {
	for _, data := range vectors(f) {
		f.Add(data)
	}
	f.Add([]byte(`{"version":2}`))
	key := countUp(1, 32)
	a, err := newAuthenticator(countUp(2, 32))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err != nil {
			if !errors.Is(err, errdefs.ErrCorrupt) && !errors.Is(err, errdefs.ErrState) {
				t.Errorf("error without a class: %v", err)
			}
			return
		}
		if len(data) > MaxObject || r.Version != 1 || r.Created == "" {
			t.Errorf("accepted %+v", r)
		}
		if _, err := dek.ParseID(string(r.ID)); err != nil || dek.Spec(r.Spec).Validate() != nil {
			t.Errorf("accepted %+v", r)
		}
		live := r
		if r.State == dek.Deleted && r.Expires != "" {
			live = r.former()
		}
		hasHeader := live.State == dek.Formatted || live.State == dek.Rotating
		if hasHeader != (live.Header.UUID != "") || (live.State == dek.Rotating) != live.Previous.complete() ||
			(live.State == dek.Deleted) != (len(live.Wrapped.Ciphertext) == 0) || live.State != dek.Deleted && live.Expires != "" {
			t.Errorf("accepted %+v", r)
		}
		before := *r
		again, err := r.encode(key, a)
		if err != nil {
			if len(data) > MaxObject/8 {
				return // escapes and indentation may make it too large
			}
			t.Fatalf("what was read cannot be written: %v", err)
		}
		second, err := decodeRecord(again)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if second.State != dek.Deleted {
			if err := second.verify(key); err != nil {
				t.Error(err)
			}
			before.MAC, second.MAC = nil, nil // that of a tombstone stays
		}
		if err := a.check(second); err != nil {
			t.Error(err)
		}
		before.Auth, second.Auth = nil, nil
		a, _ := json.Marshal(before)
		b, _ := json.Marshal(second)
		if !bytes.Equal(a, b) {
			t.Errorf("%s became %s", a, b)
		}
	})
}

// TestFieldsAreTheRecords: what is signed is what flatten finds in the record as
// it is written, whichever of its fields are there.
func TestFieldsAreTheRecords(t *testing.T) {
	var paths [][]int // of all that is no struct, by reflect's index
	var walk func(of reflect.Type, at []int)
	walk = func(of reflect.Type, at []int) {
		for i := range of.NumField() {
			if path := append(slices.Clip(at), i); of.Field(i).Type.Kind() == reflect.Struct {
				walk(of.Field(i).Type, path)
			} else {
				paths = append(paths, path)
			}
		}
	}
	walk(reflect.TypeFor[record](), nil)
	random := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		r := &record{}
		for i, path := range paths {
			if random.IntN(3) == 0 {
				continue
			}
			switch f := reflect.ValueOf(r).Elem().FieldByIndex(path); f.Kind() {
			case reflect.String:
				f.SetString(fmt.Sprintf("<%d>\"\u2028 %d", i, random.IntN(1000)))
			case reflect.Int:
				f.SetInt(random.Int64N(100))
			case reflect.Uint64:
				f.SetUint(random.Uint64())
			case reflect.Bool:
				f.SetBool(true)
			case reflect.Slice:
				f.SetBytes([]byte{byte(i), byte(random.IntN(256))})
			default:
				t.Fatalf("no value for a %v", f.Type())
			}
		}
		for _, w := range []*wrappedV1{&r.Wrapped, &r.Previous} {
			if !w.IsZero() && w.Ciphertext == nil {
				w.Ciphertext = []byte{1} // no record has it otherwise
			}
		}
		data, err := json.Marshal(r.unsigned())
		if err != nil {
			t.Fatal(err)
		}
		fields, err := flatten(data)
		if err != nil {
			t.Fatal(err)
		}
		var want []byte
		for _, path := range slices.Sorted(maps.Keys(fields)) {
			for _, part := range []string{path, fields[path]} {
				want = append(binary.BigEndian.AppendUint32(want, uint32(len(part))), part...)
			}
		}
		if got := r.fields(); !bytes.Equal(got, want) {
			t.Fatalf("%s is signed as\n%q, want\n%q", data, got, want)
		}
	}
}

// TestOneFormTwoWays: what is written as we write is read the short way, and
// anything else the long way, to the same record.
func TestOneFormTwoWays(t *testing.T) {
	for name, data := range vectors(t) {
		var compact bytes.Buffer
		if err := json.Compact(&compact, data); err != nil {
			t.Fatal(err)
		}
		if decodeCanonical(compact.Bytes()) != nil {
			t.Errorf("%s is read the short way though it is not as we write", name)
		}
		long, err := decodeRecord(compact.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		written, err := long.canonical()
		if err != nil {
			t.Fatal(err)
		}
		if short := decodeCanonical(written); !reflect.DeepEqual(short, long) {
			t.Errorf("%s: the short way gives %+v, the long one %+v", name, short, long)
		}
	}
}

// TestOnlyUTF8IsStored: JSON would change anything else, and the MAC not fit.
func TestOnlyUTF8IsStored(t *testing.T) {
	r, err := decodeRecord(vectors(t)["prepared"])
	if err != nil {
		t.Fatal(err)
	}
	key := countUp(32, 32)
	defer key.Wipe()
	if _, err := r.encode(key, nil); err != nil {
		t.Fatal(err)
	}
	r.Wrapped.KeyID = "key-\xff"
	if _, err := r.encode(key, nil); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("a key ID that is no UTF-8: %v", err)
	}
}
