package cluster_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

func mux() kms.Mux { return kms.Mux{cluster.Scheme: cluster.Open} }

// run returns n bytes that count up from first.
func run(first byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

func write(t *testing.T, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, uri string) *kms.KEK {
	t.Helper()
	kek, err := mux().Open(t.Context(), uri)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return kek
}

func TestConformance(t *testing.T) {
	oldSecret, oldSalt := run('A', 32), run('a', 32)
	newSecret, newSalt := run('0', 32), run('K', 48)
	one, oneSalt, two, twoSalt := write(t, oldSecret), write(t, oldSalt), write(t, newSecret), write(t, newSalt)
	kmstest.Run(t, kmstest.Harness{
		Open: func(t *testing.T) *kms.KEK { return open(t, "cluster://"+one+"?salt-file="+oneSalt) },
		OpenOther: func(t *testing.T) *kms.KEK { // differs in the salt alone
			return open(t, "cluster://"+one+"?salt-file="+twoSalt)
		},
		Rotate: func(t *testing.T) *kms.KEK {
			return open(t, "cluster://"+two+"?salt-file="+twoSalt+"&previous-secret-file="+one+"&previous-salt-file="+oneSalt)
		},
		Secrets: [][]byte{oldSecret, oldSalt, newSecret, newSalt},
	})
}

// TestConstellationVectors: what the key service of Constellation derives.
func TestConstellationVectors(t *testing.T) {
	for _, v := range []struct {
		secret, salt []byte
		id, want     string
	}{
		{make([]byte, 32), make([]byte, 32), "00000000-0000-0000-0000-000000000000", "2b5c829f691bfd4232f8aac464bccc07e605c7c8e82cbca09837e86d0b6d0665"},
		{bytes.Repeat([]byte{0xff}, 32), bytes.Repeat([]byte{0xff}, 32), "ffffffff-ffff-ffff-ffff-ffffffffffff", "1484aa39d3415e906e07940ff215d8b1eee705d3027dba93306af4abff4f70be"},
		{run(0x00, 32), run(0x20, 32), "clusterID", "128c164378fe8767f998fbdfe4b4d6463ec5ae1b664ea5999bc27417607ae9b6"},
		{run(0x40, 32), run(0x60, 32), "measurementSecret", "4790578891f3fe6cc22cb661ecdc1b7e33121b1287546a52ba33a9136719c213"},
	} {
		kek := open(t, "cluster://"+write(t, v.secret)+"?salt-file="+write(t, v.salt))
		key, err := kek.Derive(t.Context(), v.id)
		if err != nil {
			t.Fatalf("Derive(%q): %v", v.id, err)
		}
		if got := hex.EncodeToString(key.Expose()); got != v.want {
			t.Errorf("Derive(%q) = %s, want %s", v.id, got, v.want)
		}
		key.Wipe()
		kek.Close()
	}
}

// TestWrapVector: made with another implementation of HKDF and AES-GCM
// (Python's cryptography). It must unwrap for ever.
func TestWrapVector(t *testing.T) {
	kek := open(t, "cluster://"+write(t, run(0x00, 32))+"?salt-file="+write(t, run(0x20, 32)))
	defer kek.Close()
	const keyID = "a67554ccc07df33c5662f145f82c7238"
	if got, err := kek.CurrentKeyID(t.Context()); got != keyID || err != nil {
		t.Errorf("CurrentKeyID = %s, %v, want %s", got, err, keyID)
	}
	ciphertext, err := hex.DecodeString("c8c9cacbcccdcecfd0d1d2d3863a8da1ee311b2816d79b77f7e03aeef9e7fd91bd1cf176b86f49975c1c793fe491a7d8d3e8df13013aab4571b1d53b51427818b7ac261b7b17de3bfa6e8d69ebb088273f549b56bbee7ab8ea67e0ac")
	if err != nil {
		t.Fatal(err)
	}
	key, err := kek.Unwrap(t.Context(), "ebs.csi.aws.com/vol-1", kms.Wrapped{Ciphertext: ciphertext, KeyID: keyID, Mechanism: cluster.Mechanism})
	if err != nil {
		t.Fatalf("Unwrap: %v", err)
	}
	defer key.Wipe()
	if !bytes.Equal(key.Expose(), run(0x80, 32)) {
		t.Errorf("Unwrap gave %x", key.Expose())
	}
}

func TestOpenRefuses(t *testing.T) {
	good, salt := write(t, run('A', 32)), write(t, run('a', 32))
	short, shortSalt := write(t, run('A', 15)), write(t, run('a', 31))
	long, empty, dir := write(t, make([]byte, 5000)), write(t, nil), t.TempDir()
	for _, tt := range []struct{ uri, want string }{
		{"cluster://" + good, `"salt-file" is missing`},
		{"cluster://" + good + "?salt-file=", `"salt-file" is missing`},
		{"cluster://" + good + "?salt-file=" + salt + "&size=32", `"size" is not known`},
		{"cluster://" + good + "?salt-file=" + salt + "&salt-file=" + salt, `"salt-file" is given twice`},
		{"cluster://" + good + "?salt-file=" + salt + "&previous-secret-file=" + good, "go together"},
		{"cluster://" + good + "?salt-file=" + salt + "&previous-salt-file=" + salt, "go together"},
		{"cluster://etc/secret?salt-file=" + salt, "absolute path"},
		{"cluster:etc/secret?salt-file=" + salt, "absolute path"},
		{"cluster://?salt-file=" + salt, "absolute path"},
		{"cluster://" + short + "?salt-file=" + salt, "has 15 bytes"},
		{"cluster://" + good + "?salt-file=" + shortSalt, "the salt 31"},
		{"cluster://" + long + "?salt-file=" + salt, "regular file"},
		{"cluster://" + empty + "?salt-file=" + salt, "regular file"},
		{"cluster://" + dir + "?salt-file=" + salt, "regular file"},
		{"cluster://" + good + "?salt-file=/nowhere/salt", "/nowhere/salt"},
		{"cluster:///nowhere/secret?salt-file=" + salt, "/nowhere/secret"},
		{"cluster://" + good + "?salt-file=" + salt + "&previous-secret-file=" + short + "&previous-salt-file=" + salt, "has 15 bytes"},
	} {
		_, err := mux().Open(t.Context(), tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Open(%q) = %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
	}
}

func TestTheShortestAreAccepted(t *testing.T) {
	kek := open(t, "cluster://"+write(t, run('A', cluster.MinSecret))+"?salt-file="+write(t, run('a', cluster.MinSalt)))
	kek.Close()
}

// TestFilesAreBinary: a newline at the end is part of the secret.
func TestFilesAreBinary(t *testing.T) {
	salt := write(t, run('a', 32))
	ids := map[string]bool{}
	for _, content := range []string{strings.Repeat("x", 32), strings.Repeat("x", 32) + "\n"} {
		kek := open(t, "cluster://"+write(t, []byte(content))+"?salt-file="+salt)
		id, err := kek.CurrentKeyID(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ids[id] = true
		kek.Close()
	}
	if len(ids) != 2 {
		t.Error("a newline was stripped")
	}
}

// TestNoPreviousPair: without it the older key is refused by name.
func TestNoPreviousPair(t *testing.T) {
	salt := write(t, run('a', 32))
	older := open(t, "cluster://"+write(t, run('A', 32))+"?salt-file="+salt)
	defer older.Close()
	newer := open(t, "cluster://"+write(t, run('B', 32))+"?salt-file="+salt)
	defer newer.Close()
	key := secret.New(kms.KeySize)
	defer key.Wipe()
	w, err := older.Wrap(t.Context(), "id", key)
	if err != nil {
		t.Fatal(err)
	}
	_, err = newer.Unwrap(t.Context(), "id", w)
	if !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), w.KeyID) || !strings.Contains(err.Error(), "previous-secret-file") {
		t.Errorf("Unwrap = %v, want ErrDenied that names %s and says what to do", err, w.KeyID)
	}
	w.Mechanism = "aes-256-cbc"
	if _, err := older.Unwrap(t.Context(), "id", w); !errors.Is(err, errdefs.ErrCorrupt) {
		t.Errorf("Unwrap with another mechanism: %v, want ErrCorrupt", err)
	}
}

// TestClosedBackend: the backend itself, without a KEK around it, has nothing left.
func TestClosedBackend(t *testing.T) {
	master, salt := secret.Take(run('A', 32)), secret.Take(run('a', 32))
	b, err := cluster.New(master, salt)
	if err != nil {
		t.Fatal(err)
	}
	w, err := b.Wrap(t.Context(), make([]byte, 64), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if master.Len() != 0 || salt.Len() != 0 {
		t.Error("Close left the master secret or the salt")
	}
	if _, err := b.Wrap(t.Context(), make([]byte, 64), nil); err == nil {
		t.Error("Wrap works after Close")
	}
	if _, err := b.Unwrap(t.Context(), w, nil); err == nil {
		t.Error("Unwrap works after Close")
	}
	if _, err := b.Derive(t.Context(), "id"); err == nil {
		t.Error("Derive works after Close")
	}
	if _, err := cluster.New(secret.New(1), secret.New(32)); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("New with a secret of one byte: %v", err)
	}
}

func TestOpenIgnoresNothing(t *testing.T) {
	u, err := url.Parse("cluster:///a?salt-file=%zz")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.Open(t.Context(), u); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("parameters that do not parse: %v, want ErrInvalid", err)
	}
}
