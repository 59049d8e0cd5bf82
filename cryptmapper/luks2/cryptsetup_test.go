package luks2_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// cryptsetup runs Debian's, which needs no device-mapper for what is asked of
// it here.
func cryptsetup(t *testing.T, stdin []byte, args ...string) []byte {
	t.Helper()
	kernel.Need(t, "root", "exec:cryptsetup")
	cmd := exec.Command("cryptsetup", args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("cryptsetup %v: %v\n%s", args, err, stderr.Bytes())
	}
	return out
}

// formatted returns a file that cryptsetup has made a volume of.
func formatted(t *testing.T, key secret.Bytes, uuid string, args ...string) *os.File {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(t.TempDir(), "volume"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	if err := file.Truncate(luks2.DataOffset + 1<<20); err != nil {
		t.Fatal(err)
	}
	args = append([]string{
		"luksFormat", "-q", "--type=luks2", "--cipher=aes-xts-plain64", "--key-size=512", "--sector-size=4096",
		"--uuid=" + uuid, "--key-file=-",
	}, append(args, file.Name())...)
	cryptsetup(t, key.Expose(), args...)
	return file
}

// unlocks tells cryptsetup to try the key on a header as libcryptsetup would
// get it from us.
func unlocks(t *testing.T, h *luks2.Header, key secret.Bytes) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "header"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := h.Materialise(file); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, key.Expose(), "open", "--test-passphrase", "--key-file=-", file.Name())
}

// What cryptsetup formats as Constellation does, or as we do, passes, and what
// passed opens with the key.
func TestCryptsetupFormats(t *testing.T) {
	key := newKey(9)
	theirs := formatted(t, key, constellationUUID, "--pbkdf=argon2id", "--pbkdf-force-iterations=4", "--pbkdf-memory=65536", "--pbkdf-parallel=4")
	found, err := luks2.ReadConstellation(theirs, constellation(t)[0].want)
	if err != nil || found.Header == nil || !found.Whole {
		t.Fatalf("Constellation's: %v, %v", found.Reason, err)
	}
	unlocks(t, found.Header, key)

	own := formatted(t, key, uuid, "--pbkdf=pbkdf2", "--hash=sha256", "--pbkdf-force-iterations=1000")
	w := want
	w.ID += `<&>"\`
	cryptsetup(t, []byte(luks2.NewToken(w.ID).Unsealed()), "token", "import", "--token-id=0", own.Name())
	h, err := luks2.Seal(own, w, key)
	if err != nil {
		t.Fatal(err)
	}
	if h, err = h.With(h.Token, key); err != nil { // our own JSON of the token in place of libcryptsetup's
		t.Fatal(err)
	}
	if err := h.Write(own, func(string) {}); err != nil {
		t.Fatal(err)
	}
	found, err = luks2.Read(own, w, key)
	if err != nil || found.Header == nil || !found.Whole || found.Header.Token.DEKID != string(w.ID) {
		t.Fatalf("ours: %v, %v", found.Reason, err)
	}
	unlocks(t, found.Header, key)
}

// Whatever is accepted, libcryptsetup reads as exactly that: real headers with
// everything that may vary varied, and members in any order.
func TestLibcryptsetupReadsTheSame(t *testing.T) {
	for _, f := range all(t) {
		for range 8 {
			g := f.with(shuffled(varied(jsonOf(f.head))))
			found := g.read(t, newKey(1))
			if found.Header == nil {
				t.Fatalf("%s: %v\n%s", f.name, found.Reason, jsonOf(g.head))
			}
			file, err := os.Create(filepath.Join(t.TempDir(), "header"))
			if err != nil {
				t.Fatal(err)
			}
			if err := found.Header.Materialise(file); err != nil {
				t.Fatal(err)
			}
			sameReading(t, file.Name(), string(bytes.TrimRight(jsonArea(t, found.Header), "\x00")))
			_ = file.Close()
		}
	}
}

// sameReading compares libcryptsetup's reading of a header with its text.
func sameReading(t *testing.T, path, text string) {
	t.Helper()
	var theirs, ours any
	if err := json.Unmarshal(cryptsetup(t, nil, "luksDump", "--dump-json-metadata", path), &theirs); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(text), &ours); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(theirs, ours) {
		t.Errorf("libcryptsetup reads\n%v, the header says\n%v", theirs, ours)
	}
	dump := string(cryptsetup(t, nil, "luksDump", path))
	for _, line := range []string{"offset: 16777216 [bytes]", "cipher: aes-xts-plain64", "Area offset:32768 [bytes]", "Flags:       \t(no flags)"} {
		if !strings.Contains(dump, line) {
			t.Errorf("luksDump has no %q:\n%s", line, dump)
		}
	}
}

// varied gives what may vary in a header's JSON other values.
func varied(text string) string {
	number := func(low, high int) func(string) string {
		return func(string) string { return fmt.Sprint(low + rand.IntN(high-low+1)) }
	}
	bytes32 := func(string) string {
		b := make([]byte, 32)
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		return `"` + base64.StdEncoding.EncodeToString(b) + `"`
	}
	for name, value := range map[string]func(string) string{
		"iterations": number(1000, 2_000_000), "time": number(4, 16), "memory": number(65536, 1<<20), "cpus": number(1, 4),
		"salt": bytes32, "digest": bytes32, "sequence": number(1, 1<<52),
	} {
		at := regexp.MustCompile(`"` + name + `":([0-9]+|"[^"]*")`)
		text = at.ReplaceAllStringFunc(text, func(old string) string { return `"` + name + `":` + value(old) })
	}
	return text
}
