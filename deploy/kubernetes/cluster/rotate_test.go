package cluster_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// kustomization makes one of one's own over the example.
func kustomization(t *testing.T, more string) string {
	t.Helper()
	dir := t.TempDir()
	there, err := filepath.Abs(example)
	must(t, "example", err)
	up, err := filepath.Rel(dir, there)
	must(t, "example", err)
	write(t, filepath.Join(dir, "kustomization.yaml"), "kind: Kustomization\nresources: ["+up+"]\n"+more)
	return dir
}

// rewraps runs a block of commands with a key service as the manifests have it then, in
// the place of pods, which are not here.
func (o operator) rewraps(t *testing.T, commands, dir string) {
	t.Helper()
	objects := build(t, dir)
	before, after, ok := strings.Cut(commands, "kubectl -n cryptcsi rollout status deployment key-service\n")
	if !ok {
		t.Fatalf("nothing waits for the pods in %s", commands)
	}
	there, err := filepath.Abs(dir)
	must(t, dir, err)
	o.does(t, before, "EXAMPLE", there)
	o.jobs(t, objects)
	_, _, pid := o.serve(t, objects, o.as(t, account))
	out := o.does(t, after, "kubectl -n cryptcsi exec deployment/key-service -- key-service", o.keyService(t), "--like-process 1", fmt.Sprint("--like-process ", pid))
	if strings.Contains(after, "rewrap") && !strings.Contains(out, "rewrapped 1 of 1") {
		t.Errorf("not all is rewrapped: %s", out)
	}
}

// TestExchangeMasterSecret: by the commands of docs/operations.md the cluster gets another
// master secret, which at the end alone opens the key.
func TestExchangeMasterSecret(t *testing.T) {
	const id = "d.example.com/vol-1"
	o := operator{start(t), t.TempDir()}
	o.does(t, "kubectl apply -k EXAMPLE")
	o.jobs(t, build(t, example))
	if out, err := o.verb(t, "dek create", id); err != nil {
		t.Fatal(out)
	}
	steps := documented(t, "## Another version of the KEK, another KEK", 3)
	o.does(t, steps[0])
	o.rewraps(t, steps[1], "../testdata/cluster-kek-previous")
	o.rewraps(t, steps[2], example)
	must(t, "the new one", o.opens(t, id))

	o.does(t, `grep -E '^(data:|  (master-secret|salt):)' previous-master-secret.yaml | kubectl -n cryptcsi patch secret cryptcsi-master-secret --patch-file /dev/stdin`)
	if err := o.opens(t, id); err == nil {
		t.Error("the old one still opens the key")
	}
}

// TestAnotherKEK: a patch as in docs/operations.md puts a KEK before the one of the manifests.
func TestAnotherKEK(t *testing.T) {
	o := operator{start(t), t.TempDir()}
	o.does(t, "kubectl apply -k EXAMPLE")
	o.jobs(t, build(t, example))
	if out, err := o.verb(t, "dek create", "d.example.com/vol-1"); err != nil {
		t.Fatal(out)
	}
	text, err := os.ReadFile("../../../docs/operations.md")
	must(t, "operations.md", err)
	_, patch, _ := strings.Cut(string(text), "```yaml\npatches:\n")
	patch, _, _ = strings.Cut(patch, "```")
	kek := filepath.Join(t.TempDir(), "kek")
	write(t, kek, strings.Repeat("k", 32))
	patch = strings.ReplaceAll(patch, "awskms:///alias/cryptcsi?region=eu-central-1", "static://"+kek)
	commands := documented(t, "## Another version of the KEK, another KEK", 3)[1]
	o.rewraps(t, commands, kustomization(t, "patches:\n"+patch))
	if err := o.opens(t, "d.example.com/vol-1"); err == nil {
		t.Error("the master secret still opens the key")
	}
}
