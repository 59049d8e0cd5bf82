package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// served is a key-service that runs.
type served struct {
	mu   sync.Mutex
	out  bytes.Buffer
	stop context.CancelFunc
	code chan int
}

func (s *served) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}

func (s *served) said() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

// start runs `key-service serve` until the test ends, and waits until it serves.
func start(t *testing.T, args ...string) *served {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	s := &served{stop: cancel, code: make(chan int, 1)}
	go func() { s.code <- run(ctx, append([]string{"serve", "--drain-timeout=5s"}, args...), s, s) }()
	t.Cleanup(func() {
		cancel()
		if code := <-s.code; code != 0 {
			t.Errorf("key-service serve ended with %d", code)
		}
		if t.Failed() {
			t.Log(s.said())
		}
	})
	for end := time.Now().Add(30 * time.Second); !strings.Contains(s.said(), `"serving"`); time.Sleep(5 * time.Millisecond) {
		select {
		case code := <-s.code:
			s.code <- code
			t.Fatalf("key-service serve ended at once with %d:\n%s", code, s.said())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("key-service does not serve:\n%s", s.said())
		}
	}
	return s
}

func client(t *testing.T, c keyclient.Config) *keyclient.Client {
	t.Helper()
	k, err := keyclient.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ks")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return "unix://" + filepath.Join(dir, "key.sock")
}

func wants(t *testing.T, what string, err, class error) {
	t.Helper()
	if class == nil && err != nil || class != nil && !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
	}
}

func xts() dek.Spec { return dek.Spec{Cipher: dek.CipherXTS} }

// TestServeLocally: a single node with its key service beside it.
func TestServeLocally(t *testing.T) {
	addr, metrics := socket(t), peers.Addr(t)
	s := start(t, with(append(localStore(t), localKEK(t)...), "--listen="+addr, "--volume-policy=any", "--metrics-address="+metrics)...)
	c := client(t, keyclient.Config{Address: addr})
	made, err := c.CreateDEK(t.Context(), "d/one", xts())
	wants(t, "CreateDEK", err, nil)
	got, err := c.GetDEK(t.Context(), "d/one")
	wants(t, "GetDEK", err, nil)
	if !got.Key.Equal(made.Key) {
		t.Error("another key")
	}
	made.Wipe()
	got.Wipe()
	_, err = c.GetDEK(t.Context(), "d/two")
	wants(t, "GetDEK of nothing", err, errdefs.ErrNotFound)
	must(t, []string{"status", "--address", addr}, `sealed +false`, `records +1\n`, `KEK +static://`)
	for path, want := range map[string]string{"/metrics": `cryptcsi_key_decisions_total\{allowed="true",code="OK",method="CreateDEK"\} 1`, "/healthz": "ok", "/readyz": "ok"} {
		r, err := http.Get("http://" + metrics + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(r.Body)
		_ = r.Body.Close()
		if !regexp.MustCompile(want).Match(body) {
			t.Errorf("%s has no %s:\n%s", path, want, body)
		}
	}
	if !strings.Contains(s.said(), "every caller may have every key") {
		t.Error("the open policy is not said aloud")
	}
}

// TestKeptKeys: with a cache a key is had while its KMS is away, and without one
// it is not.
func TestKeptKeys(t *testing.T) {
	v := peers.Transit(t)
	v.CreateKey(t, "kek", nil)
	store := localStore(t)
	for _, cached := range []bool{true, false} {
		addr, metrics := socket(t), peers.Addr(t)
		args := with(store, "--kms-uri="+v.URI("kek"), "--listen="+addr, "--volume-policy=any", "--metrics-address="+metrics, "--kms-timeout=1s")
		if cached {
			args = append(args, "--dek-cache-ttl=1h", "--dek-cache-size=100")
		}
		start(t, args...)
		c := client(t, keyclient.Config{Address: addr, Attempts: 1})
		_, err := c.CreateDEK(t.Context(), "d/one", xts())
		wants(t, "CreateDEK", err, nil)
		first, err := c.GetDEK(t.Context(), "d/one")
		wants(t, "GetDEK", err, nil)
		v.Deny(t, "transit/decrypt/kek", true)
		again, err := c.GetDEK(t.Context(), "d/one")
		v.Deny(t, "transit/decrypt/kek", false)
		page := fetch(t, "http://"+metrics+"/metrics")
		if !cached {
			wants(t, "GetDEK without a KMS and a cache", err, errdefs.ErrDenied)
			if strings.Contains(page, "cryptcsi_dek_cache") {
				t.Error("there are metrics of no cache")
			}
			continue
		}
		wants(t, "GetDEK without a KMS", err, nil)
		if !again.Key.Equal(first.Key) {
			t.Error("another key")
		}
		for _, line := range []string{"cryptcsi_dek_cache_hits_total 1", "cryptcsi_dek_cache_misses_total 1", "cryptcsi_dek_cache_entries 1"} {
			if !strings.Contains(page, "\n"+line+"\n") {
				t.Errorf("no line %q in\n%s", line, page)
			}
		}
	}
	for _, bad := range []string{"--dek-cache-ttl=-1s", "--dek-cache-ttl=25h", "--dek-cache-size=0"} {
		code, said := keyService(t, with(store, "serve", "--kms-uri="+v.URI("kek"), "--listen="+socket(t), "--volume-policy=any", bad)...)
		if code != 2 || !strings.Contains(said, "--dek-cache-ttl must be") {
			t.Errorf("%s: exit code %d: %s", bad, code, said)
		}
	}
}

func fetch(t *testing.T, url string) string {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// TestSealed: nothing is served before an operator has given KMS and store; a
// wrong secret changes nothing.
func TestSealed(t *testing.T) {
	ca := peers.NewCA(t)
	cert, key := ca.Issue(t, "key-service")
	operatorCert, operatorKey := ca.Issue(t, "operator")
	nodeCert, nodeKey := ca.Issue(t, "system:node:a")
	prefixes := write(t, "system:node:a: [\"d/*\"]\n")
	addr := peers.Addr(t)
	start(t, "--listen="+addr, "--sealed", "--volume-policy=prefix", "--prefix-file="+prefixes,
		"--tls-cert-file="+cert, "--tls-key-file="+key, "--client-ca-file="+ca.File,
		"--operator-identity=operator", "--controller-identity=controller", "--delete-grace=1h")
	node := client(t, keyclient.Config{Address: "dns:///" + addr, CAFile: ca.File, CertFile: nodeCert, KeyFile: nodeKey, Attempts: 1})
	_, err := node.GetDEK(t.Context(), "d/one")
	wants(t, "GetDEK while sealed", err, errdefs.ErrUnavailable)
	if err == nil || !strings.Contains(err.Error(), "sealed") {
		t.Errorf("no word about the seal: %v", err)
	}

	master, salt, wrong := write(t, strings.Repeat("m", 32)), write(t, strings.Repeat("s", 32)), write(t, strings.Repeat("w", 32))
	dir := t.TempDir()
	must(t, []string{"dek", "create", "--kms-uri", "cluster://" + master + "?salt-file=" + salt, "--storage-uri", "file://" + dir, "d/one"}, "prepared")
	as := func(cert, key string) []string {
		return []string{"--address=dns:///" + addr, "--ca-file=" + ca.File, "--cert-file=" + cert, "--key-file=" + key}
	}
	uris := []string{"--kms-uri=cluster://{0}?salt-file={1}", "--storage-uri=file://" + dir, "--server-key-sha256=" + pin(t, cert)}
	unseal := func(cert, key, master string, more ...string) []string {
		return append(append(append([]string{"unseal"}, as(cert, key)...), append(uris, more...)...), "--file="+master, "--file="+salt)
	}
	mustFail(t, unseal(nodeCert, nodeKey, master), "denied|may not")
	mustFail(t, unseal(operatorCert, operatorKey, master, "--server-key-sha256="+strings.Repeat("0", 64)), "nothing was sent")
	mustFail(t, unseal(operatorCert, operatorKey, master, "--verify-command=grep -q CERTIFICATE && false"), "nothing was sent")
	mustFail(t, unseal(operatorCert, operatorKey, wrong), "tried and not taken, nothing has changed")
	must(t, append([]string{"status"}, as(operatorCert, operatorKey)...), `sealed +true`)
	_, err = node.GetDEK(t.Context(), "d/one")
	wants(t, "GetDEK after a wrong secret", err, errdefs.ErrUnavailable)

	must(t, unseal(operatorCert, operatorKey, master, "--verify-command=grep -q CERTIFICATE"), `sealed +false`, `records +2\n`, `KEK +cluster://`)
	got, err := node.GetDEK(t.Context(), "d/one")
	wants(t, "GetDEK after unsealing", err, nil)
	got.Wipe()
	_, err = node.GetDEK(t.Context(), "e/one")
	wants(t, "GetDEK of what the node may not have", err, errdefs.ErrDenied)
	_, err = node.GetDEK(t.Context(), "d/none")
	wants(t, "GetDEK of what there is not, by who may have it", err, errdefs.ErrNotFound)
	_, err = node.GetDEK(t.Context(), "e/none")
	wants(t, "GetDEK of what there is not, by who may not", err, errdefs.ErrDenied)
	wants(t, "DeleteDEK by a node", node.DeleteDEK(t.Context(), "d/one"), errdefs.ErrDenied)

	// What serve was told counts after unsealing too.
	controllerCert, controllerKey := ca.Issue(t, "controller")
	controller := client(t, keyclient.Config{Address: "dns:///" + addr, CAFile: ca.File, CertFile: controllerCert, KeyFile: controllerKey, WithoutKeys: true})
	wants(t, "DeleteDEK", controller.DeleteDEK(t.Context(), "d/one"), nil)
	must(t, []string{"dek", "restore", "--kms-uri", "cluster://" + master + "?salt-file=" + salt, "--storage-uri", "file://" + dir, "d/one"}, "restored")
}

// TestUnsealWithAWrongRecordSecret: it is refused, and the right one is taken afterwards.
func TestUnsealWithAWrongRecordSecret(t *testing.T) {
	addr, dir := socket(t), t.TempDir()
	kek, right, wrong := localKEK(t), write(t, strings.Repeat("r", 32)), write(t, strings.Repeat("w", 32))
	must(t, append([]string{"dek", "create", "--storage-uri=file://" + dir, "--record-auth-secret-file=" + right}, append(kek, "d/one")...), "prepared")
	start(t, "--listen="+addr, "--sealed", "--volume-policy=any")
	unseal := append([]string{"unseal", "--address=" + addr, "--storage-uri=file://" + dir}, kek...)
	mustFail(t, append(slices.Clip(unseal), "--record-auth-secret-file="+wrong), "no record in the store could be opened")
	must(t, append(slices.Clip(unseal), "--record-auth-secret-file="+right), "sealed +false")
}

// TestTokensOfNodes: a token's node counts only for accounts that are named.
func TestTokensOfNodes(t *testing.T) {
	ctx, k := t.Context(), peers.Kube(t)
	namespace := k.Namespace(t)
	token := func(account string) string {
		_, err := k.Client.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}, metav1.CreateOptions{})
		wants(t, "account", err, nil)
		pod, err := k.Client.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: account}, Spec: corev1.PodSpec{
			NodeName: "a", ServiceAccountName: account, Containers: []corev1.Container{{Name: "c", Image: "i"}},
		}}, metav1.CreateOptions{})
		wants(t, "pod", err, nil)
		r, err := k.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, account, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			Audiences: []string{"keys"}, BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
		}}, metav1.CreateOptions{})
		wants(t, "token", err, nil)
		return write(t, r.Status.Token)
	}
	_, err := k.Client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a"}}, metav1.CreateOptions{})
	wants(t, "node", err, nil)
	config, err := kube.Config(k.Kubeconfig(t, peers.KubeAdmin), "")
	wants(t, "Config", err, nil)
	tokens, err := kube.NewTokens(config, kube.TokensOptions{Audiences: []string{"keys"}})
	wants(t, "NewTokens", err, nil)
	r := reviewer{tokens, []string{"system:serviceaccount:" + namespace + ":plugin"}}
	for account, node := range map[string]string{"plugin": "a", "stranger": ""} {
		text, err := os.ReadFile(token(account))
		wants(t, "token", err, nil)
		id, err := r.Review(ctx, string(text))
		if err != nil || id.Node != node || !strings.HasSuffix(id.Name, ":"+account) {
			t.Errorf("%s is %+v, %v; want node %q", account, id, err, node)
		}
	}
}

// pin is the SHA-256 of a certificate's public key, as openssl would give it.
func pin(t *testing.T, certFile string) string {
	t.Helper()
	text, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// volume makes a PersistentVolume "<driver>/<handle>" and returns its DEK ID.
func volume(t *testing.T, k *peers.APIServer, name, handle string) dek.ID {
	t.Helper()
	_, err := k.Client.CoreV1().PersistentVolumes().Create(t.Context(), &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "d.example.com", VolumeHandle: handle}},
		},
	}, metav1.CreateOptions{})
	wants(t, "PersistentVolume", err, nil)
	return dek.ID("d.example.com/" + handle)
}

// attach joins a PersistentVolume and a node, and returns what undoes it.
func attach(t *testing.T, k *peers.APIServer, volume, node string) (detach func()) {
	t.Helper()
	attachments := k.Client.StorageV1().VolumeAttachments()
	a, err := attachments.Create(t.Context(), &storagev1.VolumeAttachment{
		ObjectMeta: metav1.ObjectMeta{Name: "attach-" + volume + "-" + node},
		Spec:       storagev1.VolumeAttachmentSpec{Attacher: "d.example.com", NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &volume}},
	}, metav1.CreateOptions{})
	wants(t, "VolumeAttachment", err, nil)
	a.Status.Attached = true
	_, err = attachments.UpdateStatus(t.Context(), a, metav1.UpdateOptions{})
	wants(t, "attached", err, nil)
	return func() {
		t.Helper()
		wants(t, "detaching", attachments.Delete(t.Context(), a.Name, metav1.DeleteOptions{}), nil)
	}
}

// TestAttached: in Kubernetes a node gets the keys of volumes attached to it
// and no others, and what it confirms is noted on the PersistentVolume.
func TestAttached(t *testing.T) {
	k := peers.Kube(t)
	ctx := t.Context()
	id := volume(t, k, "pv-1", "vol-1")

	ca := peers.NewCA(t)
	cert, key := ca.Issue(t, "key-service")
	addr := peers.Addr(t)
	k.AllowCluster(t, "key-service", rules()...)
	start(t, with(append(localStore(t), localKEK(t)...), "--listen="+addr, "--kubeconfig="+k.Kubeconfig(t, "key-service"),
		"--tls-cert-file="+cert, "--tls-key-file="+key, "--client-ca-file="+ca.File, "--controller-identity=controller")...)
	as := func(name string, without bool) *keyclient.Client {
		cert, key := ca.Issue(t, name)
		return client(t, keyclient.Config{Address: "dns:///" + addr, CAFile: ca.File, CertFile: cert, KeyFile: key, WithoutKeys: without})
	}
	controller, a, b := as("controller", true), as("system:node:a", false), as("system:node:b", false)

	_, err := controller.CreateDEK(ctx, id, xts())
	wants(t, "CreateDEK", err, nil)
	told, err := controller.GetDEK(ctx, id)
	wants(t, "GetDEK by the controller", err, nil)
	if told.Key.Len() != 0 {
		t.Error("the controller was given a key")
	}
	_, err = as("controller", false).GetDEK(ctx, id)
	wants(t, "GetDEK by a controller that wants the key", err, errdefs.ErrDenied)
	_, err = a.GetDEK(ctx, id)
	wants(t, "GetDEK before it is attached", err, errdefs.ErrDenied)
	detach := attach(t, k, "pv-1", "a")
	got, err := a.GetDEK(ctx, id)
	wants(t, "GetDEK by the node", err, nil)
	got.Wipe()
	_, err = b.GetDEK(ctx, id)
	wants(t, "GetDEK by another node", err, errdefs.ErrDenied)

	uuid := dek.NewUUID()
	_, err = a.ClaimFormat(ctx, id, dek.Claim{Node: "a", UUID: uuid})
	wants(t, "ClaimFormat", err, nil)
	_, err = a.ClaimFormat(ctx, id, dek.Claim{Node: "b", UUID: uuid})
	wants(t, "ClaimFormat in another's name", err, errdefs.ErrDenied)
	wants(t, "ConfirmDEK", a.ConfirmDEK(ctx, id, dek.HeaderID{UUID: uuid, Sequence: 3}), nil)
	pv, err := k.Client.CoreV1().PersistentVolumes().Get(ctx, "pv-1", metav1.GetOptions{})
	if want := fmt.Sprintf("%s:3", uuid); err != nil || pv.Annotations["cryptcsi.io/formatted"] != want {
		t.Errorf("the PersistentVolume's note is %v, %v; want %s", pv.Annotations, err, want)
	}

	detach()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) { // until the watch has it
		got, err := a.GetDEK(ctx, id)
		if errors.Is(err, errdefs.ErrDenied) {
			break
		}
		got.Wipe()
		if time.Now().After(end) {
			t.Fatalf("long after it was detached the node still gets the key: %v", err)
		}
	}
	takeOver(t, k, controller, a, b)
}

// takeOver: a claim stays its node's while anything attaches the volume there,
// and then goes to the node that has the volume, with the UUID as it was.
func takeOver(t *testing.T, k *peers.APIServer, controller, a, b *keyclient.Client) {
	ctx, id := t.Context(), volume(t, k, "pv-2", "vol-2")
	_, err := controller.CreateDEK(ctx, id, xts())
	wants(t, "CreateDEK", err, nil)
	claim := func(c *keyclient.Client, node string) (dek.Claim, error) {
		return c.ClaimFormat(ctx, id, dek.Claim{Node: node, UUID: dek.NewUUID()})
	}
	detachA := attach(t, k, "pv-2", "a")
	first, err := claim(a, "a")
	wants(t, "the first claim", err, nil)
	attach(t, k, "pv-2", "b")
	_, err = claim(b, "b")
	wants(t, "a claim while the volume is attached to the first node", err, errdefs.ErrConflict)
	detachA()
	var got dek.Claim
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) { // until the watch has it
		if got, err = claim(b, "b"); err == nil || !errors.Is(err, errdefs.ErrConflict) || time.Now().After(end) {
			break
		}
	}
	if want := (dek.Claim{Node: "b", UUID: first.UUID}); err != nil || got != want {
		t.Fatalf("taking over: %v, %v; want %v", got, err, want)
	}
	attach(t, k, "pv-2", "a")
	_, err = claim(a, "a")
	wants(t, "a claim of the first node, which comes back", err, errdefs.ErrConflict)
}

// rules are what the key service needs of the API server.
func rules() []rbacv1.PolicyRule {
	rule := func(group, resource string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: verbs}
	}
	return []rbacv1.PolicyRule{
		rule("storage.k8s.io", "volumeattachments", "get", "list", "watch"),
		rule("storage.k8s.io", "csidrivers", "get", "list", "watch"),
		rule("", "persistentvolumes", "get", "list", "watch", "patch"),
		rule("", "nodes", "get", "list", "watch"),
		rule("authentication.k8s.io", "tokenreviews", "create"),
	}
}
