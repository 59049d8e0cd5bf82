package keyconfig_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
)

// open opens what args name; log is what was logged.
func open(t *testing.T, args ...string) (keys *keyconfig.Keys, log string, err error) {
	t.Helper()
	fs := flag.NewFlagSet("test", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var f keyconfig.Flags
	f.Add(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	keys, err = f.Open(t.Context(), keyconfig.Options{}, slog.New(slog.NewTextHandler(&out, nil)))
	if err == nil {
		t.Cleanup(func() { _ = keys.Close() })
	}
	return keys, out.String(), err
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// create makes a DEK in the Keyring of a configuration, or gets it.
func create(t *testing.T, args ...string) dek.DEK {
	t.Helper()
	keys, _, err := open(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	keyring, err := keys.Keyring(envelope.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer keyring.Close()
	d, err := keyring.CreateDEK(t.Context(), "driver.example.com/vol", dek.Spec{Cipher: dek.CipherXTS})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Key.Wipe)
	return d
}

// TestOrder: of several KEKs and stores the first is the default and the
// others are read, whichever flag they come from.
func TestOrder(t *testing.T) {
	first, second := file(t, strings.Repeat("1", 32)), file(t, strings.Repeat("2", 32))
	dir, other := t.TempDir(), t.TempDir()
	uriFile := file(t, "static://"+first+"\n")

	before := create(t, "--kms-uri-file", uriFile, "--storage-uri", "file://"+dir)
	after := create(t, "--kms-uri", "static://"+second, "--kms-uri-file", uriFile, "--storage-uri", "file://"+other, "--storage-uri", "file://"+dir)
	if !before.Key.Equal(after.Key) {
		t.Error("the DEK of the older configuration was not found")
	}
	keys, _, err := open(t, "--kms-uri", "static://"+second, "--storage-uri", "file://"+dir)
	if err != nil {
		t.Fatal(err)
	}
	keyring, err := keys.Keyring(envelope.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer keyring.Close()
	if d, err := keyring.GetDEK(t.Context(), before.ID); err == nil {
		d.Key.Wipe()
		t.Error("a KEK that is not configured unwraps")
	}
}

// TestNames: a name stands before the URI wherever a URI can stand, and decides
// which KEK wraps; the first is the default whether it has one or not.
func TestNames(t *testing.T) {
	first, second := file(t, strings.Repeat("1", 32)), file(t, strings.Repeat("2", 32))
	dir := t.TempDir()
	ring := func(args ...string) *envelope.Keyring {
		t.Helper()
		keys, _, err := open(t, append(args, "--storage-uri", "file://"+dir)...)
		if err != nil {
			t.Fatal(err)
		}
		k, err := keys.Keyring(envelope.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = k.Close() })
		return k
	}
	both := ring("--kms-uri", "lead=static://"+first, "--kms-uri-file", file(t, "gold=static://"+second+"\n"))
	if got := both.KEKNames(); !slices.Equal(got, []string{"gold", "lead"}) {
		t.Errorf("KEKNames = %q", got)
	}
	for id, under := range map[dek.ID]string{"d/": first, "d/lead": first, "d/gold": second} {
		_, name, _ := strings.Cut(string(id), "/")
		d, err := both.CreateDEK(t.Context(), id+"-1", dek.Spec{Cipher: dek.CipherXTS, KEK: name})
		if err != nil {
			t.Fatal(err)
		}
		d.Wipe()
		for _, secret := range []string{first, second} {
			d, err := ring("--kms-uri", "static://"+secret).GetDEK(t.Context(), id+"-1")
			d.Wipe()
			if (err == nil) != (secret == under) {
				t.Errorf("KEK %q: by %s: %v", name, secret, err)
			}
		}
	}
}

// TestGivenNames: names come along where a process is given its KEKs later.
func TestGivenNames(t *testing.T) {
	key := []byte(strings.Repeat("1", 32))
	keys, err := new(keyconfig.Flags).OpenGiven(t.Context(), []string{"static://{0}", "gold=static://{0}"}, []string{"mem://"}, [][]byte{key}, nil, keyconfig.Options{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	k, err := keys.Keyring(envelope.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if got := k.KEKNames(); !slices.Equal(got, []string{"gold"}) {
		t.Errorf("KEKNames = %q", got)
	}
}

func TestConstellationURIs(t *testing.T) {
	const master = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	uri := "kms://cluster-kms?key=" + master + "&salt=ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="
	dir := t.TempDir()
	d := create(t, "--kms-uri", uri, "--storage-uri", "file://"+dir)
	again := create(t, "--kms-uri-file", file(t, uri), "--storage-uri", "file://"+dir)
	if !d.Key.Equal(again.Key) {
		t.Error("another key")
	}
	keys, log, err := open(t, "--kms-uri", uri, "--storage-uri", "storage://no-store")
	if err != nil || keys.Err() != nil || len(keys.Stores) != 0 {
		t.Fatalf("%v, %v, %d stores", err, keys.Err(), len(keys.Stores))
	}
	if strings.Count(log, "the URI holds a secret") != 2 || strings.Contains(log, master) {
		t.Errorf("logged: %s", log)
	}
}

func TestRefuses(t *testing.T) {
	const s = "S3CR3T"
	kek := "static://" + file(t, strings.Repeat("1", 32))
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--kms-uri", kek, "--storage-uri", "mem://", "--record-auth-secret-file", file(t, s)}, "at least 32 random ones"},
		{[]string{"--kms-uri", kek, "--storage-uri", "mem://", "--record-auth-secret-file", "/does/not/exist"}, "--record-auth-secret-file"},
		{[]string{"--kms-uri", kek, "--storage-uri", "mem://", "--record-auth-secret-file", file(t, strings.Repeat("s", 65<<10))}, "longer than"},
		{[]string{"--kms-uri", kek, "--storage-uri-file", file(t, "mem://\nmem://")}, "one URI on one line"},
		{[]string{"--kms-uri", kek, "--storage-uri-file", file(t, " \n")}, "one URI on one line"},
		{[]string{"--kms-uri-file", "/does/not/exist", "--storage-uri", "mem://"}, "/does/not/exist"},
		{[]string{"--kms-uri", "kms://aws?accessKey=" + s, "--storage-uri", "mem://"}, "is missing"},
		{[]string{"--kms-uri", "nothing://x?y=" + s, "--storage-uri", "mem://"}, `"nothing" is not known`},
		{[]string{"--kms-uri", kek, "--storage-uri", "nothing://x?y=" + s}, `"nothing" is not known`},
		{[]string{"--kms-uri", kek}, "store"},
		{[]string{"--storage-uri", "mem://", "--kms-uri", s + "=" + kek}, "no name of a KEK"},
		{[]string{"--storage-uri", "mem://", "--kms-uri", "=" + kek}, "no name of a KEK"},
		{[]string{"--storage-uri", "mem://", "--kms-uri", "gold=" + s}, "has no scheme"},
		{[]string{"--storage-uri", "mem://", "--kms-uri", "gold=lead=" + kek}, "does not parse"},
		{[]string{"--storage-uri", "mem://", "--kms-uri", "gold=" + kek, "--kms-uri-file", file(t, "gold="+kek)}, `another KEK is named "gold"`},
		{[]string{"--kms-uri", kek, "--storage-uri", "gold=mem://"}, "does not parse"},
		{[]string{"--storage-uri", "mem://"}, "KEK"},
	} {
		keys, _, err := open(t, tt.args...)
		if err == nil {
			_, err = keys.Keyring(envelope.Options{})
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v, want an error with %q and no secret", tt.args[len(tt.args)-1], err, tt.want)
		}
	}
}

// deaf is a store that overwrites on Create, as some imitations of S3 do.
type deaf struct{ envelope.Store }

func (d deaf) Create(ctx context.Context, name string, data []byte) error {
	if _, version, err := d.Read(ctx, name); err == nil {
		return d.Replace(ctx, name, data, version)
	}
	return d.Store.Create(ctx, name, data)
}

// TestDeafStore: no object is made in a store that ignores conditions.
func TestDeafStore(t *testing.T) {
	inner, err := envelope.LocalStores().Open(t.Context(), "mem://")
	if err != nil {
		t.Fatal(err)
	}
	s := keyconfig.Probed(deaf{inner})
	for range 2 {
		if err := s.Create(t.Context(), "dek-1", []byte("x")); err == nil || !strings.Contains(err.Error(), "ignores") {
			t.Errorf("Create in a store that overwrites: %v", err)
		}
	}
	names, _, err := inner.List(t.Context(), "", 10)
	if err != nil || len(names) != 0 {
		t.Errorf("left in it: %v, %v", names, err)
	}
	good := keyconfig.Probed(inner)
	if err := errors.Join(good.Create(t.Context(), "dek-1", []byte("x")), good.Create(t.Context(), "dek-2", []byte("x"))); err != nil {
		t.Error(err)
	}
}

// TestStoreCallsAreObserved: each call once, with the store's scheme and how it
// ended; looking whether the store keeps conditions is none.
func TestStoreCallsAreObserved(t *testing.T) {
	var f keyconfig.Flags
	flags := flag.NewFlagSet("test", flag.ContinueOnError)
	f.Add(flags)
	if err := flags.Parse([]string{"--kms-uri=cluster://" + file(t, strings.Repeat("m", 32)) + "?salt-file=" + file(t, strings.Repeat("s", 32)), "--storage-uri=mem://"}); err != nil {
		t.Fatal(err)
	}
	var seen []string
	keys, err := f.Open(t.Context(), keyconfig.Options{Store: func(scheme, operation string, _ time.Duration, err error) {
		seen = append(seen, fmt.Sprintf("%s %s %t", scheme, operation, err == nil))
	}}, slog.New(slog.DiscardHandler))
	if err != nil || keys.Err() != nil {
		t.Fatal(err, keys.Err())
	}
	ring, err := keys.Keyring(envelope.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ring.GetDEK(t.Context(), "d/v"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatalf("GetDEK: %v", err)
	}
	d, err := ring.CreateDEK(t.Context(), "d/v", dek.Spec{Cipher: dek.CipherXTS})
	if err != nil {
		t.Fatal(err)
	}
	d.Wipe()
	if err := errors.Join(ring.DeleteDEK(t.Context(), "d/v"), ring.Close(), keys.Close()); err != nil {
		t.Fatal(err)
	}
	if len(seen) == 0 || seen[0] != "mem read false" || !slices.Contains(seen, "mem create true") || !slices.Contains(seen, "mem replace true") {
		t.Errorf("observed: %q", seen)
	}
}
