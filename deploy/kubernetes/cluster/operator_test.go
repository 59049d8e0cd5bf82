package cluster_test

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestVerbsInThePod: the commands of docs/operations.md need no flags about keys,
// because they are as the Deployment's.
func TestVerbsInThePod(t *testing.T) {
	o := operator{start(t), t.TempDir()}
	objects := o.apply(t, example)
	o.jobs(t, objects)
	if out, err := o.verb(t, "dek create", "d.example.com/vol-1"); err != nil {
		t.Fatal(out)
	}
	_, _, pid := o.serve(t, objects, o.as(t, account))
	// There are no pods here, and the service is another process of this machine.
	out := o.does(t, documented(t, "## Looking", 2)[1], "kubectl -n cryptcsi exec deployment/key-service -- key-service", o.keyService(t),
		"--like-process 1", fmt.Sprint("--like-process ", pid))
	for _, words := range []string{"all 15 steps are right", "k8s://cryptcsi-keys", "d.example.com/vol-1  prepared"} {
		if !strings.Contains(out, words) {
			t.Errorf("there is no %q in\n%s", words, out)
		}
	}
}

// TestUnseal: a sealed service of the manifests is unsealed with what the commands of
// docs/operations.md get from the cluster, and not with another pin or token.
func TestUnseal(t *testing.T) {
	o := operator{start(t), t.TempDir()}
	objects := o.apply(t, "../examples/cinder-sealed")
	o.jobs(t, objects)
	addr, _, _ := o.serve(t, objects, o.as(t, account))
	for _, file := range []string{"master-secret", "salt"} {
		write(t, filepath.Join(o.dir, file), strings.Repeat(file[:1], 32))
	}
	commands := documented(t, "## Unseal", 2)
	o.does(t, commands[0])
	unseal := func(instead ...string) (string, error) {
		return o.try(t, commands[1], append(instead, "key-service unseal", o.keyService(t)+" unseal", "localhost:7443", addr,
			"s3://bucket?region=eu-central-1", "file://"+t.TempDir())...)
	}
	for words, instead := range map[string][]string{
		"nothing was sent":    {"$(cat pin)", strings.Repeat("0", 64)},
		"may not call Unseal": {"--token-file token", "--token-file " + o.token(t, "cryptcsi-controller", "")},
	} {
		if out, err := unseal(instead...); err == nil || !strings.Contains(out, words) {
			t.Errorf("with %v: %v, %s; want %q", instead, err, out, words)
		}
	}
	if out, err := unseal(); err != nil || !regexp.MustCompile(`(?m)^sealed +false$`).MatchString(out) {
		t.Errorf("unseal: %v, %s", err, out)
	}
}

// TestCopiedSecrets: what the vendor's controller has of credentials comes to ours by the
// commands of docs/install.md, and a second time when it is another.
func TestCopiedSecrets(t *testing.T) {
	o := operator{start(t), t.TempDir()}
	openstack := documentedIn(t, "install.md", "## OpenStack, and on the machine itself", 1)[0]
	google := documentedIn(t, "install.md", "## In the driver's place", 2)[1]
	o.does(t, "kubectl create namespace gce-pd-csi-driver")
	for i, content := range []string{"first", "second"} {
		for from, name := range map[string]string{"kube-system": "cloud-config", "gce-pd-csi-driver": "cloud-sa"} {
			o.does(t, "kubectl -n "+from+" create secret generic "+name+" --from-literal=file="+content+" --dry-run=client -o yaml | kubectl apply -f -")
		}
		if i > 0 {
			openstack = strings.Replace(openstack, "kubectl create namespace cryptcsi\n", "", 1)
		}
		o.does(t, openstack)
		o.does(t, google)
		for _, name := range []string{"cloud-config", "cloud-sa"} {
			if got := o.secret(t, name, t.TempDir())["file"]; string(got) != content {
				t.Errorf("ours is %q, want the %s", got, content)
			}
		}
	}
}
