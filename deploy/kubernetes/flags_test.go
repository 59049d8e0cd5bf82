package kubernetes_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// programs builds those of our images' programs.
func programs(t *testing.T) (path func(image string) string) {
	t.Helper()
	dir := t.TempDir()
	sources := map[string]string{"csi-plugin": "./cmd/csi-plugin", "key-service": "./cmd/key-service", "loopdriver": "./test/loopdriver/cmd/loopdriver"}
	for name, source := range sources {
		build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, name), source)
		build.Dir = "../.."
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("building %s: %v\n%s", source, err, out)
		}
	}
	return func(image string) string {
		name, _, _ := strings.Cut(strings.TrimPrefix(image, "cryptcsi/"), ":")
		if sources[name] == "" {
			return ""
		}
		return filepath.Join(dir, name)
	}
}

// pods are those of all DaemonSets and Deployments.
func pods(objects []any) []corev1.PodTemplateSpec {
	var all []corev1.PodTemplateSpec
	for _, d := range of[*appsv1.DaemonSet](objects) {
		all = append(all, d.Spec.Template)
	}
	for _, d := range of[*appsv1.Deployment](objects) {
		all = append(all, d.Spec.Template)
	}
	return all
}

// TestPrograms asks the programs themselves whether they have the flags and
// take the values: with --check-config, where they have that, and files as the
// pods have them.
func TestPrograms(t *testing.T) {
	program := programs(t)
	asked := map[string]bool{}
	for _, dir := range []string{keyed, demo} {
		objects := build(t, dir)
		for _, pod := range pods(objects) {
			for _, c := range pod.Spec.Containers {
				path := program(c.Image)
				if path == "" {
					continue
				}
				asked[filepath.Base(path)] = true
				if filepath.Base(path) == "loopdriver" {
					hasFlags(t, path, c.Args)
					continue
				}
				root := files(t, objects, pod.Spec, c)
				args := append(rooted(root, c), "--check-config")
				if filepath.Base(path) == "key-service" {
					args = inNoCluster(t, args)
				}
				if out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput(); err != nil {
					t.Errorf("%s: %s %v: %v\n%s", dir, filepath.Base(path), args, err, out)
				}
				if out, err := exec.CommandContext(t.Context(), path, append(args, "--no-such-flag")...).CombinedOutput(); err == nil {
					t.Errorf("%s takes every flag: %s", path, out)
				}
			}
		}
	}
	if len(asked) != 3 {
		t.Errorf("asked %v, want all three programs", asked)
	}
}

// hasFlags looks for flags in a program's --help.
func hasFlags(t *testing.T, path string, args []string) {
	t.Helper()
	help, err := exec.CommandContext(t.Context(), path, "--help").CombinedOutput()
	if err != nil {
		t.Errorf("%s --help: %v\n%s", path, err, help)
	}
	for _, arg := range args {
		name, _, _ := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if words := strings.Fields(string(help)); !slices.Contains(words, "-"+name) {
			t.Errorf("%s has no flag --%s", path, name)
		}
	}
}

// files makes what a container has mounted of ConfigMaps, Secrets and
// projections below a folder, with content that could be what is meant.
func files(t *testing.T, objects []any, pod corev1.PodSpec, c corev1.Container) (root string) {
	t.Helper()
	root = t.TempDir()
	certificate, key := selfSigned(t)
	contents := map[string][]byte{
		"tls.crt": certificate, "tls.key": key, "ca.crt": certificate, "token": []byte("a.b.c"),
		"master-secret": []byte(strings.Repeat("m", 32)), "salt": []byte(strings.Repeat("s", 32)),
	}
	for _, m := range c.VolumeMounts {
		v := volume(pod, m.Name)
		if err := os.MkdirAll(filepath.Join(root, m.MountPath), 0o700); err != nil {
			t.Fatal(err)
		}
		data := map[string][]byte{}
		switch {
		case v.ConfigMap != nil:
			for _, o := range of[*corev1.ConfigMap](objects) {
				if o.Name == v.ConfigMap.Name {
					for name, text := range o.Data {
						data[name] = []byte(strings.ReplaceAll(text, "/etc/", root+"/etc/"))
					}
				}
			}
		case v.Secret != nil || v.Projected != nil:
			data = contents
		}
		for name, content := range data {
			if err := os.WriteFile(filepath.Join(root, m.MountPath, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}

// rooted returns a container's arguments with its files below a folder.
func rooted(root string, c corev1.Container) []string {
	var args []string
	for _, arg := range c.Args {
		arg = strings.ReplaceAll(arg, "$(NODE_NAME)", "node-1")
		for _, m := range c.VolumeMounts {
			arg = strings.ReplaceAll(arg, m.MountPath+"/", root+m.MountPath+"/")
			if rest, ok := strings.CutSuffix(arg, m.MountPath); ok {
				arg = rest + root + m.MountPath
			}
		}
		args = append(args, arg)
	}
	return args
}

// inNoCluster names a kubeconfig where the pod would have its own account.
func inNoCluster(t *testing.T, args []string) []string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],"clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1"}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, arg := range args {
		if strings.HasPrefix(arg, "--storage-uri=k8s://") {
			args[i] = arg + "?kubeconfig=" + file
		}
	}
	return append(args, "--kubeconfig="+file)
}

func selfSigned(t *testing.T) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}
