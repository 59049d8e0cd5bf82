package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// keyService calls the program.
func keyService(t *testing.T, args ...string) (code int, out string) {
	t.Helper()
	var buf bytes.Buffer
	code = run(t.Context(), args, &buf, &buf)
	return code, buf.String()
}

// must calls it, and expects it to succeed and to say each of the words.
func must(t *testing.T, args []string, words ...string) string {
	t.Helper()
	code, out := keyService(t, args...)
	if code != 0 {
		t.Fatalf("key-service %s: exit code %d:\n%s", strings.Join(args, " "), code, out)
	}
	for _, w := range words {
		if !regexp.MustCompile(w).MatchString(out) {
			t.Errorf("key-service %s does not say %q:\n%s", strings.Join(args, " "), w, out)
		}
	}
	return out
}

// mustFail calls it, and expects code 1 and the words.
func mustFail(t *testing.T, args []string, words ...string) {
	t.Helper()
	code, out := keyService(t, args...)
	if code != 1 {
		t.Errorf("key-service %s: exit code %d, want 1:\n%s", strings.Join(args, " "), code, out)
	}
	for _, w := range words {
		if !regexp.MustCompile(w).MatchString(out) {
			t.Errorf("key-service %s does not say %q:\n%s", strings.Join(args, " "), w, out)
		}
	}
}

// with adds flags to a verb and its arguments.
func with(flags []string, args ...string) []string {
	return append(strings.Split(args[0], " "), append(slices.Clip(flags), args[1:]...)...)
}

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCommandLines(t *testing.T) {
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"", 2, "key-service check"},
		{"help", 0, "key-service check"},
		{"--help", 0, "key-service rewrap"},
		{"chek", 2, `unknown verb "chek"`},
		{"kek", 2, `unknown verb "kek"`},
		{"kek destroy", 2, `unknown verb "kek destroy"`},
		{"check --help", 0, "-kms-uri"},
		{"check --bogus", 2, "bogus"},
		{"check", 2, "--kms-uri"},
		{"check extra", 2, "1 arguments, 0 to 0"},
		{"check --config /does/not/exist", 2, "--config"},
		{"check --logging-format=xml --kms-uri=mem://", 2, "--logging-format"},
		{"store create", 2, "--storage-uri"},
		{"dek create --kms-uri=x", 2, "0 arguments, 1 to 1"},
		{"version", 0, "key-service " + version + ", commit " + commit + ", KMS: awskms, "},
		{"--version", 0, "stores: "},
	} {
		code, out := keyService(t, strings.Fields(tt.args)...)
		if code != tt.code || !strings.Contains(out, tt.says) {
			t.Errorf("key-service %s: exit code %d, want %d; it should say %q:\n%s", tt.args, code, tt.code, tt.says, out)
		}
	}
}

// TestLifeOfKeys goes through the verbs with KEKs and a store that need no service.
func TestLifeOfKeys(t *testing.T) {
	dir := t.TempDir()
	older, newer := write(t, strings.Repeat("1", 32)), write(t, strings.Repeat("2", 32))
	first := []string{"--kms-uri", "static://" + older, "--storage-uri", "file://" + dir}

	must(t, with(first, "check"), `static://\S+ +wrap +ok`, `file://\S+ +create refuses an existing object +ok`, `all \d+ steps are right`)
	must(t, with(first, "dek create", "d/one", "d/two")[:len(with(first, "dek create", "d/one"))], "d/one: prepared")
	must(t, with(first, "dek create", "--integrity=hmac-sha256", "d/two"), "d/two: prepared")
	mustFail(t, with(first, "dek create", "d/two"), "another spec")
	must(t, with(first, "dek list"), `d/one +prepared +- `, `d/two +prepared +hmac-sha256 `)

	// Another KEK takes over.
	moved := []string{"--kms-uri", "static://" + newer, "--kms-uri", "static://" + older, "--storage-uri", "file://" + dir}
	must(t, with(moved, "rewrap"), "rewrapped 2 of 2")
	last := []string{"--kms-uri", "static://" + newer, "--storage-uri", "file://" + dir}
	must(t, with(last, "rewrap", "d/one"), "rewrapped 1 of 1")
	mustFail(t, with(first, "rewrap", "d/one"), "rewrapped 0 of 1", "wrapped under")
	mustFail(t, with(first, "kek rotate"), "not offered for scheme static")

	// Deleted, restored, deleted for good, forgotten.
	grace := append(slices.Clip(last), "--delete-grace", "1h")
	must(t, with(last, "dek delete", "d/one"), "would be deleted: d/one")
	must(t, with(grace, "dek delete", "--yes", "d/one"), "deleted +d/one")
	must(t, with(last, "dek list"), "d/one +deleted until 2")
	must(t, with(last, "prune", "--yes"), "0 deleted keys are past their grace")
	back := []string{"--kms-uri", "static://" + older, "--kms-uri", "static://" + newer, "--storage-uri", "file://" + dir}
	must(t, with(back, "rewrap"), "rewrapped 2 of 2") // the deleted one too
	must(t, with(moved, "rewrap", "d/two"), "rewrapped 1 of 1")
	must(t, with(first, "dek restore", "d/one"), "restored +d/one")
	must(t, with(moved, "rewrap"), "rewrapped 2 of 2")
	must(t, with(last, "dek delete", "--yes", "d/one"), "deleted +d/one")
	mustFail(t, with(last, "dek restore", "d/one"), "cannot be restored")
	mustFail(t, with(last, "dek create", "d/one"), "deleted")
	must(t, with(last, "prune", "--forget", "d/one"), "would be forgotten")
	mustFail(t, with(last, "prune", "--forget", "d/two", "--yes"), "only what was deleted can be forgotten")
	must(t, with(last, "prune", "--forget", "d/one", "--yes"), "forgotten d/one")
	must(t, with(last, "dek create", "d/one"), "d/one: prepared")

	// A volume of which there is no PersistentVolume any more.
	must(t, with(last, "dek create", "snap:d/two"), "snap:d/two: prepared")
	must(t, with(last, "dek create", "other/one"), "other/one: prepared")
	there := write(t, `{"kind": "List", "items": [{"kind": "PersistentVolume", "spec": {"csi": {"driver": "d", "volumeHandle": "one"}}},
		{"kind": "PersistentVolume", "spec": {"hostPath": {"path": "/x"}}}]}`)
	gone := []string{"--volumes", there, "--driver-name", "d"}
	must(t, append(with(last, "prune"), gone...), "0 of 2 volumes of d are gone") // they are young
	old := append(gone, "--older-than", "0s")
	if out := must(t, append(with(last, "prune"), old...), `would be deleted: d/two \(prepared, made 2`, "1 of 2 volumes of d are gone"); strings.Contains(out, "snap:") || strings.Contains(out, "other") {
		t.Errorf("too much is gone:\n%s", out)
	}
	must(t, append(with(grace, "prune", "--yes"), old...), "deleted +d/two")
	must(t, with(last, "dek restore", "d/two"), "restored +d/two")
	for content, says := range map[string]string{
		`{"kind": "List", "items": []}`: "right cluster", `{"kind": "PodList"}`: "PodList", "": "kubectl get pv",
	} {
		mustFail(t, with(last, "prune", "--yes", "--driver-name", "d", "--older-than", "0s", "--volumes", write(t, content)), says)
	}
	for _, args := range [][]string{{"--volumes", there}, {"--driver-name", "d"}, append(gone, "--forget", "d/one")} {
		if code, out := keyService(t, append(with(last, "prune"), args...)...); code != 2 {
			t.Errorf("%v: exit code %d:\n%s", args, code, out)
		}
	}
	must(t, with(last, "dek list"), "d/one +prepared", "d/two +prepared", "snap:d/two +prepared", "other/one +prepared")
	for _, id := range []string{"snap:d/two", "other/one"} {
		must(t, with(last, "dek delete", "--yes", id))
	}

	// Something in the store that is no record is told and harms nothing else.
	object := filepath.Join(dir, "dek-"+strings.Repeat("0", 64))
	if err := os.WriteFile(object, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustFail(t, with(last, "dek list"), "unreadable", "d/one +prepared", "1 objects in the store are no records")
	mustFail(t, with(last, "rewrap"), "rewrapped 2 of 2", "do not retire old versions")
	mustFail(t, []string{"check", "--kms-uri", "storage://no-store", "--storage-uri", "mem://"}, "names no KEK")
}

func TestConfigFile(t *testing.T) {
	kek := "static://" + write(t, strings.Repeat("1", 32))
	good := write(t, "kms-uri: ["+kek+"]\nstorage-uri: file://"+t.TempDir()+"\nv: 1\n")
	must(t, []string{"check", "--config", good}, "all .* steps are right")
	must(t, []string{"check", "--config", good, "--check-config"}, "the configuration is right")
	mustFail(t, []string{"check", "--config", good, "--kms-uri", "static:///does/not/exist", "--check-config"}, "the file of the key")
	if code, out := keyService(t, "check", "--config", write(t, "kms-urri: x")); code != 2 || !strings.Contains(out, `"kms-urri"`) {
		t.Errorf("a name that is none: exit code %d:\n%s", code, out)
	}
}
