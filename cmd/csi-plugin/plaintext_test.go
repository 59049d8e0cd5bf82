package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/driver"
)

// What kubectl prints, shortened: an old volume, one of another driver, one that
// a controller of ours made, one of an in-tree plugin, and the old one again.
const persistentVolumes = `{"apiVersion":"v1","kind":"List","items":[
	{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":"old"},"spec":{"capacity":{"storage":"1Gi"},"csi":{"driver":"ebs.csi.aws.com","volumeHandle":"vol-1","volumeAttributes":{"storage.kubernetes.io/csiProvisionerIdentity":"1"}}}},
	{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":"theirs"},"spec":{"csi":{"driver":"efs.csi.aws.com","volumeHandle":"vol-2"}}},
	{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":"ours"},"spec":{"csi":{"driver":"ebs.csi.aws.com","volumeHandle":"vol-3","volumeAttributes":{"cryptcsi.io/encrypted":"1"}}}},
	{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":"in-tree"},"spec":{"awsElasticBlockStore":{"volumeID":"vol-4"}}},
	{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":"again"},"spec":{"csi":{"driver":"ebs.csi.aws.com","volumeHandle":"vol-1"}}},
	{"apiVersion":"v1","kind":"PersistentVolume","metadata":{"name":"old0"},"spec":{"csi":{"driver":"ebs.csi.aws.com","volumeHandle":"vol-0"}}}
]}`

// The list that the verb writes is the one that the flag reads.
func TestPlaintextList(t *testing.T) {
	var out, told bytes.Buffer
	if err := plaintextList([]string{"--driver-name=ebs.csi.aws.com"}, strings.NewReader(persistentVolumes), &out, &told); err != nil {
		t.Fatal(err)
	}
	if want := "2 volumes of ebs.csi.aws.com are listed; left out: 1 that are encrypted, 2 that are not this driver's\n"; told.String() != want {
		t.Errorf("told %q, want %q", &told, want)
	}
	path := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := (&plaintextFlags{plaintextPass, path}).read()
	if err != nil || len(list) != 2 || !list["ebs.csi.aws.com/vol-0"] || !list["ebs.csi.aws.com/vol-1"] {
		t.Errorf("read %v, %v", list, err)
	}
	for name, input := range map[string]string{
		"empty":        "",
		"no JSON":      "NAME CAPACITY\n",
		"no list":      `{"kind":"PersistentVolume","spec":{}}`,
		"other things": `{"kind":"List","items":[{"kind":"Pod"}]}`,
		"no handle":    `{"kind":"List","items":[{"kind":"PersistentVolume","metadata":{"name":"x"},"spec":{"csi":{"driver":"d"}}}]}`,
		"two lines":    `{"kind":"List","items":[{"kind":"PersistentVolume","metadata":{"name":"x"},"spec":{"csi":{"driver":"d","volumeHandle":"a\nd/b"}}}]}`,
	} {
		out.Reset()
		if err := plaintextList([]string{"--driver-name=d"}, strings.NewReader(input), &out, &told); err == nil || out.Len() > 0 {
			t.Errorf("%s: %v, printed %q", name, err, &out)
		}
	}
}

func TestPlaintextFlags(t *testing.T) {
	dir := t.TempDir()
	good, bad := filepath.Join(dir, "good"), filepath.Join(dir, "bad")
	for path, text := range map[string]string{good: "# old\n\nd/vol-1\n", bad: "d/vol-1\nvol-2\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const pass = " --plaintext-volumes=pass-through --plaintext-volumes-file="
	for _, tt := range []struct {
		flags string
		code  int
		says  string
	}{
		{" --check-config", 0, "the configuration is right"},
		{pass + good + " --check-config", 0, "the configuration is right"},
		{pass + bad + " --check-config", 1, "line 2"},
		{pass + "/nowhere --check-config", 1, "/nowhere"},
		{" --plaintext-volumes=pass-through", 2, "needs --plaintext-volumes-file"},
		{" --plaintext-volumes=allow", 2, `must be "refuse" or "pass-through"`},
		{" --plaintext-volumes-file=" + good, 2, "one of them is a mistake"},
	} {
		for _, verb := range []string{"node", "controller"} {
			args := verb + " --key-service=unix:///k --wrapped-endpoint=unix:///a" + tt.flags
			var out bytes.Buffer
			if code := run(t.Context(), strings.Fields(args), &out, &out); code != tt.code || !strings.Contains(out.String(), tt.says) {
				t.Errorf("%s: exit code %d, want %d; it should say %q:\n%s", args, code, tt.code, tt.says, &out)
			}
		}
	}
	var out bytes.Buffer
	if code := run(t.Context(), strings.Fields("node --create-keys --key-service=unix:///k --wrapped-endpoint=unix:///a"+pass+good), &out, &out); code != 2 || !strings.Contains(out.String(), "excludes") {
		t.Errorf("with --create-keys: %d, %s", code, &out)
	}
	list, err := driver.ParsePlaintext([]byte("d/a/b\n"))
	if err != nil || !list["d/a/b"] {
		t.Errorf("a handle with a slash: %v, %v", list, err)
	}
}
