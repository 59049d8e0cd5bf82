package kubernetes_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/cryptcsi/cryptcsi/test/peers"
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

// chosen says whether in a kustomization all is chosen, KMS and store, too.
func chosen(dir string) bool {
	return strings.HasPrefix(dir, "examples/") || strings.HasPrefix(dir, "testdata/") || dir == demo
}

// pods are those of all DaemonSets, Deployments, Jobs and CronJobs.
func pods(objects []any) []corev1.PodTemplateSpec {
	var all []corev1.PodTemplateSpec
	for _, d := range of[*appsv1.DaemonSet](objects) {
		all = append(all, d.Spec.Template)
	}
	for _, d := range of[*appsv1.Deployment](objects) {
		all = append(all, d.Spec.Template)
	}
	for _, j := range of[*batchv1.Job](objects) {
		all = append(all, j.Spec.Template)
	}
	for _, j := range of[*batchv1.CronJob](objects) {
		all = append(all, j.Spec.JobTemplate.Spec.Template)
	}
	return all
}

// TestPrograms asks the programs themselves whether they have the flags and
// take the values: with --check-config, where they have that, and files as the
// pods have them.
func TestPrograms(t *testing.T) {
	program := programs(t)
	asked, same := map[string]bool{}, map[string]bool{}
	for _, dir := range kustomizations(t) {
		if !chosen(dir) {
			continue
		}
		objects := build(t, dir)
		for _, pod := range pods(objects) {
			for _, c := range pod.Spec.Containers {
				path := program(c.Image)
				if path == "" {
					continue
				}
				// A ConfigMap's name is another one where its content is.
				as := fmt.Sprint(c.Image, c.Args, references([]any{&batchv1.Job{Spec: batchv1.JobSpec{Template: pod}}}))
				if same[as] {
					continue
				}
				same[as] = true
				if filepath.Base(path) == "loopdriver" {
					asked["loopdriver"] = true
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
				if asked[filepath.Base(path)] {
					continue
				}
				asked[filepath.Base(path)] = true
				if out, err := exec.CommandContext(t.Context(), path, append(args, "--no-such-flag")...).CombinedOutput(); err == nil {
					t.Errorf("%s takes every flag: %s", path, out)
				}
			}
		}
	}
	if len(asked) != 3 {
		t.Errorf("asked %v, want all three programs", asked)
	}
	letsItStart(t, program("cryptcsi/csi-plugin:dev"))
}

// letsItStart: kubelet does not kill a csi-plugin that waits for the wrapped driver.
// It answers nobody until then, would seem to hang, and could not say what it lacks.
func letsItStart(t *testing.T, plugin string) {
	t.Helper()
	help, err := exec.CommandContext(t.Context(), plugin, "controller", "--help").CombinedOutput()
	found := regexp.MustCompile(`-start-timeout duration\n.*\(default (.*)\)`).FindSubmatch(help)
	if err != nil || found == nil {
		t.Fatalf("there is no --start-timeout: %v\n%s", err, help)
	}
	waits, err := time.ParseDuration(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range beside() {
		for _, pod := range pods(build(t, dir)) {
			for _, c := range pod.Spec.Containers {
				if c.Name != "csi-plugin" {
					continue
				}
				p := c.LivenessProbe
				if killed := time.Duration(p.InitialDelaySeconds+(p.FailureThreshold-1)*p.PeriodSeconds) * time.Second; killed < waits+10*time.Second {
					t.Errorf("%s: csi-plugin %s is killed after %v, and waits %v for the wrapped driver", dir, c.Args[0], killed, waits)
				}
			}
		}
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
		"record-auth": []byte(strings.Repeat("r", 32)), "pin": []byte("1234"),
		"volumes": []byte("ebs.csi.aws.com/vol-1\n"),
	}
	for _, m := range c.VolumeMounts {
		v := volume(pod, m.Name)
		if err := os.MkdirAll(filepath.Join(root, m.MountPath), 0o700); err != nil {
			t.Fatal(err)
		}
		data := map[string][]byte{}
		switch {
		case v.ConfigMap != nil && v.ConfigMap.Name == "cryptcsi-plaintext":
			data = contents // by hand
		case v.ConfigMap != nil:
			for _, o := range of[*corev1.ConfigMap](objects) {
				if o.Name == v.ConfigMap.Name {
					for name, text := range o.Data {
						text = strings.NewReplacer("/etc/", root+"/etc/", "=/module/", "="+root+"/module/").Replace(text)
						if strings.HasPrefix(text, "k8s://") {
							text += "?kubeconfig=" + kubeconfig(t)
						}
						data[name] = []byte(text)
					}
				}
			}
		case v.Secret != nil || v.Projected != nil:
			data = contents
		case m.Name == "pkcs11-module":
			peers.Program(t, "softhsm2-util") // comes with it
			module, err := os.ReadFile("/usr/lib/softhsm/libsofthsm2.so")
			if err != nil {
				t.Fatal(err)
			}
			data["libsofthsm2.so"] = module
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
	file := kubeconfig(t)
	for i, arg := range args {
		if strings.HasPrefix(arg, "--storage-uri=k8s://") {
			args[i] = arg + "?kubeconfig=" + file
		}
	}
	return append(args, "--kubeconfig="+file)
}

// kubeconfig is one of no cluster.
func kubeconfig(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c"}}],"clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1"}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
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
