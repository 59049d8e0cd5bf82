package cluster_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"

	"github.com/cryptcsi/cryptcsi/internal/authority"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

func find(t *testing.T, objects []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	for _, o := range objects {
		if o.GetKind() == kind && o.GetName() == name {
			return o
		}
	}
	t.Fatalf("there is no %s %s", kind, name)
	return nil
}

// TestJobsFill: the Jobs fill what is empty, again and again with the same, also
// after the manifests were applied once more; what was lost or is somebody
// else's they leave alone and say so.
func TestJobsFill(t *testing.T) {
	c := start(t)
	objects := c.apply(t, example)
	c.jobs(t, objects)
	served, public := c.secret(t, "key-service-tls", t.TempDir()), c.configMap(t, "key-service-ca", t.TempDir())
	master, held := c.secret(t, "cryptcsi-master-secret", t.TempDir()), c.secret(t, "key-service-authority", t.TempDir())
	if len(master["master-secret"]) != 32 || len(master["salt"]) != 32 || bytes.Equal(master["salt"], master["master-secret"]) {
		t.Errorf("a master secret of %d and %d bytes", len(master["master-secret"]), len(master["salt"]))
	}
	if len(public) != 1 || strings.Contains(fmt.Sprint(public), "PRIVATE") {
		t.Errorf("the ConfigMap has %v", public)
	}
	trusts(t, public["ca.crt"], served)
	c.apply(t, example)
	c.jobs(t, objects)
	for name, was := range map[string]map[string][]byte{"key-service-tls": served, "cryptcsi-master-secret": master, "key-service-authority": held} {
		if !reflect.DeepEqual(c.secret(t, name, t.TempDir()), was) {
			t.Errorf("Secret %s is another one after the manifests were applied again", name)
		}
	}

	certificate, secret := find(t, objects, "Job", "key-service-certificate"), find(t, objects, "Job", "cryptcsi-master-secret")
	refuses := func(job *unstructured.Unstructured, words string) {
		t.Helper()
		if out, err := c.job(t, job); err == nil || !strings.Contains(out, words) {
			t.Errorf("%s: %v, %s; want %q", job.GetName(), err, out, words)
		}
	}
	renew, _, _ := strings.Cut(documented(t, "### CryptcsiCertificateExpires", 1)[0], "\n") // the log is of a pod, and there are none
	operator{c, t.TempDir()}.does(t, renew)
	c.set(t, "cryptcsi-master-secret", nil)
	refuses(secret, "Restore it from its backup")
	c.set(t, "cryptcsi-master-secret", map[string][]byte{"master-secret": []byte("other"), "salt": master["salt"]})
	refuses(secret, "is not the one that records were made with")
	c.set(t, "cryptcsi-master-secret", map[string][]byte{"salt": master["salt"]})
	refuses(secret, "has not all of the files")
	c.set(t, "key-service-authority", nil)
	refuses(certificate, "certificates-elsewhere")
	if !reflect.DeepEqual(c.secret(t, "key-service-tls", t.TempDir()), served) || len(c.secret(t, "cryptcsi-master-secret", t.TempDir())) != 1 {
		t.Error("a Job that refused has changed something")
	}
	commands, rest, _ := strings.Cut(documented(t, "## Upgrade", 1)[0], "kubectl apply") // apply is tried above
	operator{c, t.TempDir()}.does(t, commands)
	if out, err := c.job(t, certificate); err != nil || rest == "" {
		t.Errorf("the Job, after both objects were emptied: %v, %s", err, out)
	}
	trusts(t, c.configMap(t, "key-service-ca", t.TempDir())["ca.crt"], c.secret(t, "key-service-tls", t.TempDir()))
}

// set makes a Secret have these files and no others.
func (c *cluster) set(t *testing.T, name string, data map[string][]byte) {
	t.Helper()
	s, err := c.Client.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
	must(t, "Secret", err)
	s.Data = data
	_, err = c.Client.CoreV1().Secrets(namespace).Update(t.Context(), s, metav1.UpdateOptions{})
	must(t, "Secret", err)
}

func trusts(t *testing.T, authorities string, served map[string][]byte) {
	t.Helper()
	pair, err := tls.X509KeyPair(served["tls.crt"], served["tls.key"])
	must(t, "certificate", err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(authorities))
	_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: server})
	must(t, "certificate", err)
}

// TestJobsAreConfined: the accounts may read and change what they fill, and
// nothing else.
func TestJobsAreConfined(t *testing.T) {
	c := start(t)
	c.apply(t, example)
	may := map[string][]string{
		"cryptcsi-certificates":  {"key-service-authority", "key-service-tls"},
		"cryptcsi-master-secret": {"cryptcsi-master-secret"},
		"cryptcsi-key-service":   {}, "cryptcsi-controller": {}, "cryptcsi-node": {}, "cryptcsi-operator": {},
	}
	for account, names := range may {
		k, err := kubernetes.NewForConfig(c.as(t, account))
		must(t, "client", err)
		for _, name := range []string{"key-service-authority", "key-service-tls", "cryptcsi-master-secret"} {
			_, err := k.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
			allowed := false
			for _, n := range names {
				allowed = allowed || n == name
			}
			if allowed != (err == nil) {
				t.Errorf("%s reads Secret %s: %v", account, name, err)
			}
		}
		_, err = k.CoreV1().Secrets(namespace).List(t.Context(), metav1.ListOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s lists Secrets: %v", account, err)
		}
		_, err = k.CoreV1().Secrets(namespace).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "x"}}, metav1.CreateOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s creates Secrets: %v", account, err)
		}
		if err := k.CoreV1().Secrets(namespace).Delete(t.Context(), "key-service-tls", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("%s deletes Secrets: %v", account, err)
		}
	}
}

// TestRenewedWhileServing: the certificate is renewed under another authority
// while the key service serves: a client that has the new authority's
// certificate beside the old one's notices nothing, and no process is restarted.
func TestRenewedWhileServing(t *testing.T) {
	c := start(t)
	objects := c.apply(t, example)
	job := find(t, objects, "Job", "key-service-certificate")
	renew := func(args ...string) {
		t.Helper()
		if out, err := c.job(t, job, args...); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	// An authority of some years ago, of whose life less than a third is left.
	const day = 24 * time.Hour
	old, _, err := authority.Plan{Names: []string{server}, AuthorityLife: 5 * 365 * day, Life: 90 * day}.Renew(authority.Files{}, time.Now().Add(-1250*day))
	must(t, "old authority", err)
	c.set(t, "key-service-authority", map[string][]byte{"ca.crt": old.Authorities, "ca.key": old.Keys})
	renew()
	c.jobs(t, []*unstructured.Unstructured{find(t, objects, "Job", "cryptcsi-master-secret")})
	addr, files, _ := c.serve(t, objects, c.as(t, account))
	onlyOld := filepath.Join(t.TempDir(), "ca.crt")
	write(t, onlyOld, string(old.Authorities))
	status := func(ca string) error {
		client, err := keyclient.New(keyclient.Config{Address: "dns:///" + addr, CAFile: ca, ServerName: server, TokenFile: c.token(t, "cryptcsi-operator", ""), Attempts: 1})
		must(t, "client", err)
		defer func() { _ = client.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = client.Status(ctx)
		return err
	}
	both := filepath.Join(t.TempDir(), "ca.crt")
	write(t, both, c.configMap(t, "key-service-ca", t.TempDir())["ca.crt"])
	if text, err := os.ReadFile(both); err != nil || bytes.Count(text, []byte("BEGIN CERTIFICATE")) != 2 || !bytes.HasPrefix(text, old.Authorities) {
		t.Fatalf("nodes have %s, %v; want the old authority and the next", text, err)
	}
	wants(t, "the old authority still signs", status(onlyOld), nil)
	first := presented(t, addr)

	renew("--settle=0s") // which is a day later
	c.secret(t, "key-service-tls", files)
	wants(t, "nodes with both authorities", status(both), nil)
	if now := presented(t, addr); now.Equal(first) || bytes.Equal(now.RawIssuer, first.RawIssuer) {
		t.Error("the service shows the certificate of before")
	}
	if err := status(onlyOld); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("nodes that never learned of the new authority: %v", err)
	}
}

// presented is the certificate that the server shows now.
func presented(t *testing.T, addr string) *x509.Certificate {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}) //nolint:gosec // only looks
	must(t, "dial", err)
	defer func() { _ = conn.Close() }()
	return conn.ConnectionState().PeerCertificates[0]
}
