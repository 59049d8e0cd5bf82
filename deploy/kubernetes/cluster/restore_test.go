package cluster_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/test/peers"
)

// documented returns the commands of a section of docs/operations.md, block by block.
func documented(t *testing.T, section string, blocks int) []string {
	t.Helper()
	return documentedIn(t, "operations.md", section, blocks)
}

func documentedIn(t *testing.T, document, section string, blocks int) []string {
	t.Helper()
	text, err := os.ReadFile("../../../docs/" + document)
	must(t, document, err)
	_, rest, ok := strings.Cut(string(text), "\n"+section+"\n")
	if !ok {
		t.Fatalf("docs/%s has no section %s", document, section)
	}
	level, _, _ := strings.Cut(section, " ")
	rest, _, _ = strings.Cut(rest, "\n"+level+" ")
	var all []string
	for _, m := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(rest, -1) {
		all = append(all, m[1])
	}
	if len(all) != blocks {
		t.Fatalf("section %s has %d blocks of commands, want %d", section, len(all), blocks)
	}
	return all
}

// operator is a person with kubectl, and a folder where files are kept.
type operator struct {
	*cluster
	dir string
}

func (o operator) in(c *cluster) operator { return operator{c, o.dir} }

// try runs commands in the cluster as they are written, EXAMPLE aside.
func (o operator) try(t *testing.T, commands string, instead ...string) (string, error) {
	t.Helper()
	dir, err := filepath.Abs(example)
	must(t, "example", err)
	bin := t.TempDir()
	write(t, filepath.Join(bin, "kubectl"), fmt.Sprintf("#!/bin/sh\nexec %s kubectl --kubeconfig=%s \"$@\"\n",
		peers.Program(t, "kube"), kubeconfig(t, o.Config(t, peers.KubeAdmin))))
	must(t, "kubectl", os.Chmod(filepath.Join(bin, "kubectl"), 0o700)) //nolint:gosec // it is to be run
	commands = strings.NewReplacer(append(instead, "EXAMPLE", dir)...).Replace(commands)
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", commands)
	cmd.Dir, cmd.Env = o.dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (o operator) does(t *testing.T, commands string, instead ...string) string {
	t.Helper()
	out, err := o.try(t, commands, instead...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	return out
}

// verb calls a verb of key-service with KEK and store of the component cluster-kek.
func (o operator) verb(t *testing.T, verb string, args ...string) (string, error) {
	t.Helper()
	dir := t.TempDir()
	o.secret(t, "cryptcsi-master-secret", dir)
	args = append(append(strings.Fields(verb), "--kms-uri=cluster://"+dir+"/master-secret?salt-file="+dir+"/salt",
		"--storage-uri=k8s://"+records+"?kubeconfig="+kubeconfig(t, o.as(t, account))), args...)
	out, err := exec.CommandContext(t.Context(), o.keyService(t), args...).CombinedOutput()
	return string(out), err
}

// opens says whether the cluster's master secret opens a record's key.
func (o operator) opens(t *testing.T, id string) error {
	t.Helper()
	out, err := o.verb(t, "dek delete", id) // which without --yes opens it and deletes nothing
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// TestRestore: what docs/operations.md backs up is restored by its commands: in the same
// cluster, in a new one, and in one that has made a master secret of its own before.
// Applying the manifests again leaves what was restored.
func TestRestore(t *testing.T) {
	const id = "d.example.com/vol-1"
	backup, restore := documented(t, "## What to back up", 1)[0], documented(t, "## Restore", 3)
	o := operator{start(t), t.TempDir()}
	jobs := build(t, example)
	install := func(o operator) {
		t.Helper()
		o.does(t, "kubectl apply -k EXAMPLE")
		o.jobs(t, jobs)
	}
	install(o)
	if out, err := o.verb(t, "dek create", id); err != nil {
		t.Fatal(out)
	}
	o.does(t, backup)
	right := o.secret(t, "cryptcsi-master-secret", t.TempDir())
	restored := func(o operator) {
		t.Helper()
		for range 2 {
			install(o)
			must(t, "the key of before", o.opens(t, id))
			if got := o.secret(t, "cryptcsi-master-secret", t.TempDir()); !reflect.DeepEqual(got, right) {
				t.Fatal("the master secret is another one")
			}
		}
	}

	for what, data := range map[string]string{"nothing": "null", "another": `{"master-secret":"` + strings.Repeat("QUJD", 8) + `","salt":"` + strings.Repeat("REVG", 11) + `"}`} {
		t.Run("SameCluster with "+what, func(t *testing.T) {
			o.does(t, `kubectl -n cryptcsi patch secret cryptcsi-master-secret -p '{"data":`+data+`}'`)
			job := find(t, jobs, "Job", "cryptcsi-master-secret")
			if out, err := o.job(t, job); err == nil || !strings.Contains(out, "estore") {
				t.Errorf("the Job: %v, %s", err, out)
			}
			o.does(t, restore[0])
			restored(o)
		})
	}
	t.Run("Records", func(t *testing.T) {
		o.does(t, "kubectl -n cryptcsi-keys delete secrets --all")
		if err := o.opens(t, id); err == nil {
			t.Error("a key without its record")
		}
		o.does(t, "kubectl create -f records.yaml")
		restored(o)
	})
	t.Run("NewCluster", func(t *testing.T) {
		another := o.in(start(t))
		another.does(t, restore[1])
		restored(another)
	})
	t.Run("NewClusterThatWasFirst", func(t *testing.T) {
		another := o.in(start(t))
		install(another)
		if err := another.opens(t, id); err == nil {
			t.Error("a key that another master secret has wrapped")
		}
		another.does(t, restore[2])
		restored(another)
	})
}
