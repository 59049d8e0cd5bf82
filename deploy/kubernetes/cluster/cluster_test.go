// Package cluster_test applies the manifests to a real API server, and lets
// the key service work with what they give it.
package cluster_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const (
	namespace = "cryptcsi"
	records   = "cryptcsi-keys"
	audience  = "cryptcsi-key-service"
	account   = "cryptcsi-key-service"
	driver    = "d.example.com"
	server    = "key-service.cryptcsi.svc" // in the certificate that docs/key-service.md makes
	example   = "../examples/key-service"
)

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func wants(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
	}
}

// cluster is an API server that manifests are applied to.
type cluster struct {
	*peers.APIServer
	dynamic dynamic.Interface
	kinds   meta.RESTMapper
	program string // key-service, once it is built
}

func start(t *testing.T, flags ...string) *cluster {
	t.Helper()
	k := peers.Kube(t, flags...)
	d, err := dynamic.NewForConfig(k.Config(t, peers.KubeAdmin))
	must(t, "dynamic client", err)
	c := &cluster{APIServer: k, dynamic: d}
	c.snapshotClasses(t)
	return c
}

// snapshotClasses teaches the API server what the snapshot controller's CRD does, and
// asks what it knows then.
func (c *cluster) snapshotClasses(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile("../testdata/volumesnapshotclass-crd.yaml")
	must(t, "CRD", err)
	o := &unstructured.Unstructured{}
	must(t, "CRD", yaml.Unmarshal(text, &o.Object))
	crds := schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	_, err = c.dynamic.Resource(crds).Create(t.Context(), o, metav1.CreateOptions{})
	must(t, "CRD", err)
	eventually(t, "VolumeSnapshotClass", func() error {
		groups, err := restmapper.GetAPIGroupResources(c.Client.Discovery())
		if err != nil {
			return err
		}
		c.kinds = restmapper.NewDiscoveryRESTMapper(groups)
		_, err = c.kinds.RESTMapping(schema.GroupKind{Group: "snapshot.storage.k8s.io", Kind: "VolumeSnapshotClass"}, "v1")
		return err
	})
}

// apply applies a kustomization as `kubectl apply --server-side -k` would, with
// what the API server does not know an error, and returns its objects.
func (c *cluster) apply(t *testing.T, dir string) []*unstructured.Unstructured {
	t.Helper()
	all := build(t, dir)
	for _, o := range all {
		text, err := o.MarshalJSON()
		must(t, o.GetName(), err)
		_, err = c.to(t, o).Patch(t.Context(), o.GetName(), types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: "test", FieldValidation: "Strict"})
		must(t, fmt.Sprintf("%s: apply %s %s", dir, o.GetKind(), o.GetName()), err)
	}
	return all
}

// build returns the objects of a kustomization.
func build(t *testing.T, dir string) []*unstructured.Unstructured {
	t.Helper()
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	must(t, dir, err)
	var all []*unstructured.Unstructured
	for _, r := range built.Resources() {
		text, err := r.MarshalJSON()
		must(t, r.GetName(), err)
		o := &unstructured.Unstructured{}
		must(t, r.GetName(), o.UnmarshalJSON(text))
		all = append(all, o)
	}
	return all
}

// to is where objects of that kind and namespace are.
func (c *cluster) to(t *testing.T, o *unstructured.Unstructured) dynamic.ResourceInterface {
	t.Helper()
	kind := o.GroupVersionKind()
	known, err := c.kinds.RESTMapping(kind.GroupKind(), kind.Version)
	must(t, o.GetName(), err)
	if known.Scope.Name() != meta.RESTScopeNameNamespace {
		return c.dynamic.Resource(known.Resource)
	}
	// Examples have none and go where the user is.
	return c.dynamic.Resource(known.Resource).Namespace(cmp.Or(o.GetNamespace(), metav1.NamespaceDefault))
}

// TestApply: the API server takes every object, knows every field, and takes
// all of it once more.
func TestApply(t *testing.T) {
	c := start(t)
	// Controllers would make this account.
	_, err := c.Client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	must(t, "default account", err)
	dirs, err := filepath.Glob("../examples/*")
	must(t, "examples", err)
	dirs = append(dirs, "../overlays/loopdriver-demo", "../testdata/drop-in-aws-ebs", "../testdata/drop-in-gcp-pd")
	for _, dir := range append([]string{example}, dirs...) {
		if others := []string{"../examples/cert-manager", "../examples/key-service-monitored"}; slices.Contains(others, dir) {
			continue // kinds of others, which this API server does not know
		}
		if len(c.apply(t, dir)) == 0 {
			t.Errorf("%s is empty", dir)
		}
		// A cluster has one of the overlays, and their classes have one name.
		must(t, "classes", c.Client.StorageV1().StorageClasses().DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}))
		// Jobs cannot be changed, and go by themselves when they are done.
		must(t, "jobs", c.Client.BatchV1().Jobs(namespace).DeleteCollection(t.Context(), metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationBackground)}, metav1.ListOptions{}))
	}
}

// TestKeyService runs the key service with the configuration of the manifests
// as the account that they make: it can do all that it has to, and no more.
func TestKeyService(t *testing.T) {
	c := start(t)
	objects := c.apply(t, example)
	c.jobs(t, objects)
	config := c.as(t, account)
	addr, tls, _ := c.serve(t, objects, config)
	c.node(t, "node-1")
	c.node(t, "node-2")

	client := func(token string, withoutKeys bool) *keyclient.Client {
		k, err := keyclient.New(keyclient.Config{Address: "dns:///" + addr, CAFile: filepath.Join(tls, "ca.crt"), ServerName: server,
			TokenFile: token, WithoutKeys: withoutKeys, Attempts: 1})
		must(t, "client", err)
		t.Cleanup(func() { _ = k.Close() })
		return k
	}
	ctx := t.Context()
	controller := client(c.token(t, "cryptcsi-controller", ""), true)
	one, two := client(c.token(t, "cryptcsi-node", "node-1"), false), client(c.token(t, "cryptcsi-node", "node-2"), false)
	id := c.attached(t, "pv-1", "vol-1", "node-1")

	_, err := controller.CreateDEK(ctx, id, dek.Spec{Cipher: dek.CipherXTS})
	wants(t, "CreateDEK by the controller", err, nil)
	_, err = one.CreateDEK(ctx, id, dek.Spec{Cipher: dek.CipherXTS})
	wants(t, "CreateDEK by a node", err, errdefs.ErrDenied)
	got, err := one.GetDEK(ctx, id)
	wants(t, "GetDEK by the node", err, nil)
	got.Wipe()
	_, err = two.GetDEK(ctx, id)
	wants(t, "GetDEK by another node", err, errdefs.ErrDenied)
	_, err = client(c.token(t, "cryptcsi-controller", "node-1"), false).GetDEK(ctx, id)
	wants(t, "GetDEK by an account on the node that is no node's", err, errdefs.ErrDenied)
	claim, err := one.ClaimFormat(ctx, id, dek.Claim{Node: "node-1", UUID: dek.NewUUID()})
	wants(t, "ClaimFormat", err, nil)
	wants(t, "ConfirmDEK", one.ConfirmDEK(ctx, id, dek.HeaderID{UUID: claim.UUID, Sequence: 1}), nil)
	pv, err := c.Client.CoreV1().PersistentVolumes().Get(ctx, "pv-1", metav1.GetOptions{})
	if err != nil || pv.Annotations["cryptcsi.io/formatted"] != claim.UUID+":1" {
		t.Errorf("the PersistentVolume's note is %v, %v", pv.Annotations, err)
	}
	secrets, err := c.Client.CoreV1().Secrets(records).List(ctx, metav1.ListOptions{})
	if err != nil || len(secrets.Items) != 1 || secrets.Items[0].Type != "cryptcsi.io/record" {
		t.Errorf("%d records in %s, %v; want 1", len(secrets.Items), records, err)
	}
	wants(t, "DeleteDEK by the controller", controller.DeleteDEK(ctx, id), nil)

	operator, err := keyclient.New(keyclient.Config{Address: "dns:///" + addr, CAFile: filepath.Join(tls, "ca.crt"), ServerName: server,
		TokenFile: c.token(t, "cryptcsi-operator", "")})
	must(t, "operator", err)
	defer func() { _ = operator.Close() }()
	if s, err := operator.Status(ctx); err != nil || s.Sealed || s.RecordsError != "" {
		t.Errorf("Status for the operator: %+v, %v", s, err)
	}
	_, err = one.Status(ctx)
	wants(t, "Status for a node", err, errdefs.ErrDenied)

	c.denied(t, config)
}

// denied: what the key service has no need for, its account may not.
func (c *cluster) denied(t *testing.T, config *rest.Config) {
	t.Helper()
	k, err := kubernetes.NewForConfig(config)
	must(t, "client", err)
	ctx, list, create := t.Context(), metav1.ListOptions{}, metav1.CreateOptions{}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
	tries := map[string]func() error{
		"list secrets of its own namespace": func() error { _, err := k.CoreV1().Secrets(namespace).List(ctx, list); return err },
		"list secrets of kube-system":       func() error { _, err := k.CoreV1().Secrets("kube-system").List(ctx, list); return err },
		"list secrets everywhere":           func() error { _, err := k.CoreV1().Secrets("").List(ctx, list); return err },
		"watch secrets":                     func() error { _, err := k.CoreV1().Secrets(records).Watch(ctx, list); return err },
		"list pods":                         func() error { _, err := k.CoreV1().Pods(namespace).List(ctx, list); return err },
		"create pods":                       func() error { _, err := k.CoreV1().Pods(namespace).Create(ctx, pod, create); return err },
		"create pods beside the records":    func() error { _, err := k.CoreV1().Pods(records).Create(ctx, pod, create); return err },
		"delete persistentvolumes":          func() error { return k.CoreV1().PersistentVolumes().Delete(ctx, "pv-1", metav1.DeleteOptions{}) },
		"delete nodes":                      func() error { return k.CoreV1().Nodes().Delete(ctx, "node-1", metav1.DeleteOptions{}) },
		"create volumeattachments": func() error {
			_, err := k.StorageV1().VolumeAttachments().Create(ctx, attachment("x", "pv-1", "node-2"), create)
			return err
		},
		"create tokens of nodes": func() error {
			_, err := k.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "cryptcsi-node", &authenticationv1.TokenRequest{}, create)
			return err
		},
		"delete its namespace": func() error { return k.CoreV1().Namespaces().Delete(ctx, records, metav1.DeleteOptions{}) },
	}
	for what, try := range tries {
		if err := try(); !apierrors.IsForbidden(err) {
			t.Errorf("it may %s: %v", what, err)
		}
	}
}

// as is how one of the namespace's accounts reaches the API server: by a token.
func (c *cluster) as(t *testing.T, name string) *rest.Config {
	t.Helper()
	r, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	must(t, "token for the API server", err)
	return &rest.Config{Host: c.URL, BearerToken: r.Status.Token, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile}, QPS: -1}
}

// token is a file as a pod of an account gets it, on a node if one is named.
func (c *cluster) token(t *testing.T, name, node string) string {
	t.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}
	if node != "" {
		no := false
		pod, err := c.Client.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-"}, Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: name, AutomountServiceAccountToken: &no, Containers: []corev1.Container{{Name: "c", Image: "i"}},
		}}, metav1.CreateOptions{})
		must(t, "pod", err)
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
	}
	r, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, request, metav1.CreateOptions{})
	must(t, "token", err)
	file := filepath.Join(t.TempDir(), "token")
	must(t, "token", os.WriteFile(file, []byte(r.Status.Token), 0o600))
	return file
}

func (c *cluster) node(t *testing.T, name string) {
	t.Helper()
	_, err := c.Client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	must(t, "Node", err)
}

func attachment(name, volume, node string) *storagev1.VolumeAttachment {
	return &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: storagev1.VolumeAttachmentSpec{
		Attacher: driver, NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &volume},
	}}
}

// attached makes a volume that is attached to a node, and returns its DEK's ID.
func (c *cluster) attached(t *testing.T, volume, handle, node string) dek.ID {
	t.Helper()
	_, err := c.Client.CoreV1().PersistentVolumes().Create(t.Context(), &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: volume}, Spec: corev1.PersistentVolumeSpec{
		Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle}},
	}}, metav1.CreateOptions{})
	must(t, "PersistentVolume", err)
	a, err := c.Client.StorageV1().VolumeAttachments().Create(t.Context(), attachment("a", volume, node), metav1.CreateOptions{})
	must(t, "VolumeAttachment", err)
	a.Status.Attached = true
	_, err = c.Client.StorageV1().VolumeAttachments().UpdateStatus(t.Context(), a, metav1.UpdateOptions{})
	must(t, "attached", err)
	return dek.ID(driver + "/" + handle)
}

// serve runs key-service with the arguments of the Deployment and the file of
// the ConfigMap, but on free ports of this machine, until the test ends. It
// returns its address, the folder with the certificates, and its process ID.
func (c *cluster) serve(t *testing.T, objects []*unstructured.Unstructured, account *rest.Config) (addr, tls string, pid int) {
	t.Helper()
	root, metrics := t.TempDir(), peers.Addr(t)
	addr = peers.Addr(t)
	etc := filepath.Join(root, "etc/key-service")
	tls = filepath.Join(etc, "tls")
	kubeconfig := kubeconfig(t, account)
	c.configMap(t, "key-service-ca", tls)
	here := strings.NewReplacer("/etc/key-service", etc, "0.0.0.0:7443", addr, ":9808", metrics)
	var args []string
	for _, o := range objects {
		switch {
		case o.GetKind() == "ConfigMap":
			text, found, _ := unstructured.NestedString(o.Object, "data", "config.yaml")
			if !found {
				continue
			}
			write(t, filepath.Join(etc, "config/config.yaml"), here.Replace(text))
		case o.GetKind() == "Deployment" && o.GetName() == "key-service":
			containers, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
			args, _, _ = unstructured.NestedStringSlice(containers[0].(map[string]any), "args")
			c.mounted(t, o, here)
		}
	}
	for i, arg := range args {
		if args[i] = here.Replace(arg); strings.HasPrefix(arg, "--storage-uri=k8s://") {
			args[i] += "?kubeconfig=" + kubeconfig
		}
	}
	cmd := exec.Command(c.keyService(t), append(args, "--kubeconfig="+kubeconfig)...)
	peers.Start(t, addr, cmd)
	if !slices.Contains(args, "--sealed") {
		ready(t, "http://"+metrics+"/readyz")
	}
	return addr, tls, cmd.Process.Pid
}

// mounted writes what a Deployment's pod has of Secrets.
func (c *cluster) mounted(t *testing.T, o *unstructured.Unstructured, here *strings.Replacer) {
	t.Helper()
	var d appsv1.Deployment
	must(t, o.GetName(), runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &d))
	secrets := map[string]string{}
	for _, v := range d.Spec.Template.Spec.Volumes {
		if v.Secret != nil {
			secrets[v.Name] = v.Secret.SecretName
		}
	}
	for _, m := range d.Spec.Template.Spec.Containers[0].VolumeMounts {
		if secrets[m.Name] != "" {
			c.secret(t, secrets[m.Name], here.Replace(m.MountPath))
		}
	}
}

// ready waits until the key service has seen the cluster.
func ready(t *testing.T, url string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		must(t, "request", err)
		r, err := http.DefaultClient.Do(req)
		if err == nil {
			_ = r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-ctx.Done():
			t.Fatalf("key-service is not ready: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// keyService is the program.
func (c *cluster) keyService(t *testing.T) string {
	t.Helper()
	if c.program == "" {
		c.program = filepath.Join(t.TempDir(), "key-service")
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", c.program, "github.com/cryptcsi/cryptcsi/cmd/key-service").CombinedOutput(); err != nil {
			t.Fatalf("building key-service: %v\n%s", err, out)
		}
	}
	return c.program
}

// jobs runs what the Jobs among the objects run, each as its own account.
func (c *cluster) jobs(t *testing.T, objects []*unstructured.Unstructured) {
	t.Helper()
	n := 0
	for _, o := range objects {
		if o.GetKind() == "Job" {
			n++
			if out, err := c.job(t, o); err != nil {
				t.Fatalf("%s: %v\n%s", o.GetName(), err, out)
			}
		}
	}
	if n == 0 {
		t.Fatal("there are no Jobs")
	}
}

func (c *cluster) job(t *testing.T, o *unstructured.Unstructured, more ...string) (output string, err error) {
	t.Helper()
	pod, _, _ := unstructured.NestedMap(o.Object, "spec", "template", "spec")
	account, _, _ := unstructured.NestedString(pod, "serviceAccountName")
	containers, _, _ := unstructured.NestedSlice(pod, "containers")
	args, _, _ := unstructured.NestedStringSlice(containers[0].(map[string]any), "args")
	args = append(append(args, "--kubeconfig="+kubeconfig(t, c.as(t, account))), more...)
	out, err := exec.CommandContext(t.Context(), c.keyService(t), args...).CombinedOutput()
	return string(out), err
}

func kubeconfig(t *testing.T, as *rest.Config) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, "kubeconfig", clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: as.Host, CertificateAuthority: as.CAFile}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"a": {Token: as.BearerToken}},
		Contexts:       map[string]*clientcmdapi.Context{"c": {Cluster: "c", AuthInfo: "a"}},
		CurrentContext: "c",
	}, file))
	return file
}

// secret writes a Secret's files into a folder, as a pod has them.
func (c *cluster) secret(t *testing.T, name, dir string) map[string][]byte {
	t.Helper()
	s, err := c.Client.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
	must(t, "Secret", err)
	for file, content := range s.Data {
		write(t, filepath.Join(dir, file), string(content))
	}
	return s.Data
}

func (c *cluster) configMap(t *testing.T, name, dir string) map[string]string {
	t.Helper()
	m, err := c.Client.CoreV1().ConfigMaps(namespace).Get(t.Context(), name, metav1.GetOptions{})
	must(t, "ConfigMap", err)
	for file, content := range m.Data {
		write(t, filepath.Join(dir, file), content)
	}
	return m.Data
}

func write(t *testing.T, file, content string) {
	t.Helper()
	must(t, "folder", os.MkdirAll(filepath.Dir(file), 0o700))
	must(t, "file", os.WriteFile(file, []byte(content), 0o600))
}

// eventually tries until there is no error, for half a minute.
func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("there is no %s: %v", what, err)
		}
	}
}
