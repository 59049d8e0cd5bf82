// Package kubernetes_test checks the manifests: that every kustomization
// builds, that every object has only fields which the API knows, and that the
// parts of the DaemonSet fit each other and the programs' flags.
package kubernetes_test

import (
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/types"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const (
	namespace = "cryptcsi"
	demo      = "overlays/loopdriver-demo"
	keyed     = "examples/key-service" // all that the key service needs, for nodes that ask it
	kubelet   = "/var/lib/kubelet"
)

// beside are the overlays that stand beside a vendor's driver, each with keys.
func beside() []string {
	return []string{"examples/aws-ebs", "examples/azuredisk", "examples/cinder", "examples/gcp-pd", "examples/hostpath"}
}

// newObject returns an empty object of the kind, nil where we do not use it.
func newObject(kind string) any {
	switch kind {
	case "v1/Namespace":
		return &corev1.Namespace{}
	case "v1/ResourceQuota":
		return &corev1.ResourceQuota{}
	case "v1/ServiceAccount":
		return &corev1.ServiceAccount{}
	case "v1/PersistentVolumeClaim":
		return &corev1.PersistentVolumeClaim{}
	case "v1/Pod":
		return &corev1.Pod{}
	case "v1/Secret":
		return &corev1.Secret{} // TestReferences wants it empty
	case "batch/v1/Job":
		return &batchv1.Job{}
	case "batch/v1/CronJob":
		return &batchv1.CronJob{}
	case "v1/ConfigMap":
		return &corev1.ConfigMap{}
	case "v1/Service":
		return &corev1.Service{}
	case "apps/v1/DaemonSet":
		return &appsv1.DaemonSet{}
	case "apps/v1/Deployment":
		return &appsv1.Deployment{}
	case "networking.k8s.io/v1/NetworkPolicy":
		return &networkingv1.NetworkPolicy{}
	case "policy/v1/PodDisruptionBudget":
		return &policyv1.PodDisruptionBudget{}
	case "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy":
		return &admissionv1.ValidatingAdmissionPolicy{}
	case "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicyBinding":
		return &admissionv1.ValidatingAdmissionPolicyBinding{}
	case "rbac.authorization.k8s.io/v1/Role":
		return &rbacv1.Role{}
	case "rbac.authorization.k8s.io/v1/RoleBinding":
		return &rbacv1.RoleBinding{}
	case "rbac.authorization.k8s.io/v1/ClusterRole":
		return &rbacv1.ClusterRole{}
	case "rbac.authorization.k8s.io/v1/ClusterRoleBinding":
		return &rbacv1.ClusterRoleBinding{}
	case "storage.k8s.io/v1/CSIDriver":
		return &storagev1.CSIDriver{}
	case "storage.k8s.io/v1/StorageClass":
		return &storagev1.StorageClass{}
	}
	if kind == "monitoring.coreos.com/v1/PodMonitor" {
		return &podMonitor{}
	}
	if kind == "monitoring.coreos.com/v1/PrometheusRule" {
		return &map[string]any{} // components/monitoring looks into it
	}
	if kind == "snapshot.storage.k8s.io/v1/VolumeSnapshotClass" {
		return &snapshotClass{}
	}
	if kind == "cert-manager.io/v1/Issuer" {
		return &issuer{}
	}
	if kind == "cert-manager.io/v1/Certificate" {
		return &managedCertificate{}
	}
	return nil
}

// podMonitor is the part of the Prometheus operator's type that we use.
type podMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Selector            metav1.LabelSelector `json:"selector"`
		JobLabel            string               `json:"jobLabel"`
		PodMetricsEndpoints []struct {
			Port     string `json:"port"`
			Interval string `json:"interval"`
		} `json:"podMetricsEndpoints"`
	} `json:"spec"`
}

// snapshotClass is the snapshot controller's VolumeSnapshotClass.
type snapshotClass struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Driver            string            `json:"driver"`
	DeletionPolicy    string            `json:"deletionPolicy"`
	Parameters        map[string]string `json:"parameters"`
}

// issuer is the part of cert-manager's type that we use.
type issuer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		SelfSigned *struct{} `json:"selfSigned"`
		CA         *struct {
			SecretName string `json:"secretName"`
		} `json:"ca"`
	} `json:"spec"`
}

// managedCertificate is the part of cert-manager's type that we use.
type managedCertificate struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		IsCA        bool            `json:"isCA"`
		CommonName  string          `json:"commonName"`
		DNSNames    []string        `json:"dnsNames"`
		SecretName  string          `json:"secretName"`
		Usages      []string        `json:"usages"`
		Duration    metav1.Duration `json:"duration"`
		RenewBefore metav1.Duration `json:"renewBefore"`
		PrivateKey  struct {
			Algorithm      string `json:"algorithm"`
			Size           int    `json:"size"`
			RotationPolicy string `json:"rotationPolicy"`
		} `json:"privateKey"`
		IssuerRef struct {
			Name string `json:"name"`
		} `json:"issuerRef"`
	} `json:"spec"`
}

// build returns the decoded objects of a kustomization.
func build(t *testing.T, dir string) []any {
	t.Helper()
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	var objects []any
	for _, r := range resources.Resources() {
		kind := r.GetApiVersion() + "/" + r.GetKind()
		object := newObject(kind)
		if object == nil {
			t.Errorf("%s: a %s is not expected here (keys, for one, do not belong into manifests)", dir, kind)
			continue
		}
		text, err := r.AsYAML()
		if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		if err := yaml.UnmarshalStrict(text, object); err != nil {
			t.Errorf("%s: %s %s: %v", dir, kind, r.GetName(), err)
		}
		objects = append(objects, object)
	}
	return objects
}

// of returns the objects that are of type T.
func of[T any](objects []any) []T {
	var found []T
	for _, o := range objects {
		if o, ok := o.(T); ok {
			found = append(found, o)
		}
	}
	return found
}

func daemonSet(t *testing.T, dir string) *appsv1.DaemonSet {
	t.Helper()
	sets := of[*appsv1.DaemonSet](build(t, dir))
	if len(sets) != 1 {
		t.Fatalf("%s has %d DaemonSets, want 1", dir, len(sets))
	}
	return sets[0]
}

func container(t *testing.T, pod corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	containers := pod.Containers
	i := slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == name })
	if i < 0 {
		t.Fatalf("there is no container %s", name)
	}
	return containers[i]
}

// kustomizations are all folders with a kustomization.yaml that can be built:
// all but components, each of which must be part of one that can.
func kustomizations(t *testing.T) []string {
	t.Helper()
	var dirs []string
	components := map[string]bool{} // used or not
	err := filepath.WalkDir(".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil || path.Base(name) != "kustomization.yaml" {
			return err
		}
		k := kustomization(t, name)
		for _, c := range k.Components {
			components[path.Join(path.Dir(name), c)] = true
		}
		if k.Kind == types.ComponentKind {
			components[path.Dir(name)] = components[path.Dir(name)]
			return nil
		}
		dirs = append(dirs, path.Dir(name))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir, used := range components {
		if !used {
			t.Errorf("nothing uses %s, so nothing checks it", dir)
		}
	}
	for _, dir := range []string{demo, keyed} {
		if !slices.Contains(dirs, dir) {
			t.Fatalf("%s is not among %v", dir, dirs)
		}
	}
	return dirs
}

func kustomization(t *testing.T, name string) types.Kustomization {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var k types.Kustomization
	if err := yaml.UnmarshalStrict(text, &k); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	return k
}

// flag returns the value of --name=value among a container's arguments.
func flag(t *testing.T, c corev1.Container, name string) string {
	t.Helper()
	for _, arg := range c.Args {
		if value, ok := strings.CutPrefix(arg, "--"+name+"="); ok {
			return value
		}
	}
	t.Fatalf("container %s has no flag --%s", c.Name, name)
	return ""
}

func TestEveryObjectDecodes(t *testing.T) {
	for _, dir := range kustomizations(t) {
		t.Run(dir, func(t *testing.T) {
			if len(build(t, dir)) == 0 {
				t.Error("nothing is built")
			}
		})
	}
}

func TestDecodingIsStrict(t *testing.T) {
	err := yaml.UnmarshalStrict([]byte("spec: {template: {spec: {hostpid: false, nodeNme: x}}}"), newObject("apps/v1/DaemonSet"))
	if err == nil {
		t.Error("an unknown field was accepted")
	}
}

func TestDaemonSets(t *testing.T) {
	for _, dir := range append([]string{"base", keyed, demo}, beside()...) {
		t.Run(dir, func(t *testing.T) {
			set := daemonSet(t, dir)
			pod := set.Spec.Template.Spec
			if set.Namespace != namespace {
				t.Errorf("namespace %q, want %q", set.Namespace, namespace)
			}
			for key, value := range set.Spec.Selector.MatchLabels {
				if got := set.Spec.Template.Labels[key]; got != value {
					t.Errorf("label %s of the pod is %q, its selector wants %q", key, got, value)
				}
			}
			if pod.HostPID || pod.HostIPC || pod.HostNetwork {
				t.Error("the pod shares a namespace of the host")
			}
			if pod.PriorityClassName != "system-node-critical" {
				t.Errorf("priority class %q: pods with volumes would outlive their driver", pod.PriorityClassName)
			}
			for _, c := range pod.Containers {
				checkMounts(t, pod, c)
				checkProbes(t, c)
			}
			checkPlugin(t, pod, container(t, set.Spec.Template.Spec, "csi-plugin"))
		})
	}
}

// TestCriticalPodsHaveAQuota: without one of their namespace some clusters, GKE among
// them, create no pod of these classes. The quota itself limits nothing.
func TestCriticalPodsHaveAQuota(t *testing.T) {
	for _, dir := range kustomizations(t) {
		if strings.HasPrefix(dir, "base/") {
			continue // a part, which is nowhere without the namespace
		}
		objects := build(t, dir)
		admitted := map[string][]string{} // by namespace
		for _, q := range of[*corev1.ResourceQuota](objects) {
			if n := q.Spec.Hard.Pods().Value(); n < 1e9 || len(q.Spec.Hard) != 1 || q.Spec.ScopeSelector == nil || len(q.Spec.ScopeSelector.MatchExpressions) != 1 {
				t.Fatalf("%s: quota %s: %+v", dir, q.Name, q.Spec)
			}
			admitted[q.Namespace] = q.Spec.ScopeSelector.MatchExpressions[0].Values
		}
		for _, o := range objects {
			for _, pod := range pods([]any{o}) {
				class, namespace := pod.Spec.PriorityClassName, o.(metav1.Object).GetNamespace()
				if strings.HasPrefix(class, "system-") && !slices.Contains(admitted[namespace], class) {
					t.Errorf("%s: no quota of namespace %s has pods of %s", dir, namespace, class)
				}
			}
		}
	}
}

// checkMounts: each mount has its volume, and what is mounted below kubelet's
// directory in one container is seen in the others and by kubelet.
func checkMounts(t *testing.T, pod corev1.PodSpec, c corev1.Container) {
	t.Helper()
	for _, m := range c.VolumeMounts {
		v := volume(pod, m.Name)
		if v == nil {
			t.Errorf("%s mounts %s, which is no volume of the pod", c.Name, m.Name)
			continue
		}
		if v.HostPath == nil || v.HostPath.Path != kubelet {
			continue
		}
		if m.MountPath != kubelet {
			t.Errorf("%s has kubelet's directory at %s; paths in calls would not be found", c.Name, m.MountPath)
		}
		if m.MountPropagation == nil || *m.MountPropagation != corev1.MountPropagationBidirectional {
			t.Errorf("%s: mounts below %s would not leave the container", c.Name, kubelet)
		}
	}
}

func volume(pod corev1.PodSpec, name string) *corev1.Volume {
	i := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == name })
	if i < 0 {
		return nil
	}
	return &pod.Volumes[i]
}

func checkProbes(t *testing.T, c corev1.Container) {
	t.Helper()
	for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe} {
		if probe == nil {
			continue
		}
		if !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == probe.HTTPGet.Port.StrVal }) {
			t.Errorf("%s is probed at port %q, which it does not have", c.Name, probe.HTTPGet.Port.StrVal)
		}
	}
}

func checkPlugin(t *testing.T, pod corev1.PodSpec, c corev1.Container) {
	t.Helper()
	if c.SecurityContext == nil || c.SecurityContext.Privileged == nil || !*c.SecurityContext.Privileged {
		t.Error("csi-plugin is not privileged and could not make mappings")
	}
	if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "DM_DISABLE_UDEV" && e.Value == "1" }) {
		t.Error("DM_DISABLE_UDEV=1 is missing: creating a mapping would wait for a udev that does not answer")
	}
	for _, mountPath := range []string{kubelet, "/dev", "/sys", "/run/cryptsetup"} {
		i := slices.IndexFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == mountPath })
		if i < 0 {
			t.Errorf("csi-plugin has no %s", mountPath)
			continue
		}
		v := volume(pod, c.VolumeMounts[i].Name)
		if mountPath == "/run/cryptsetup" && v.EmptyDir == nil {
			t.Error("/run/cryptsetup is shared with others")
		}
		if mountPath != "/run/cryptsetup" && (v.HostPath == nil || v.HostPath.Path != mountPath) {
			t.Errorf("%s is not the node's", mountPath)
		}
	}
	if c.LivenessProbe == nil || c.LivenessProbe.HTTPGet.Path != "/healthz" || c.ReadinessProbe == nil || c.ReadinessProbe.HTTPGet.Path != "/readyz" {
		t.Error("csi-plugin is not probed at /healthz and /readyz")
	}
	if got, want := flag(t, c, "metrics-address"), fmt.Sprintf(":%d", c.Ports[0].ContainerPort); got != want {
		t.Errorf("csi-plugin listens on %s and is probed on %s", got, want)
	}
}

// nodePath translates a path in a container to one in the pod's volume:
// "<volume>:<rest>".
func nodePath(t *testing.T, c corev1.Container, name string) string {
	t.Helper()
	for _, m := range c.VolumeMounts {
		if rest, ok := strings.CutPrefix(name, m.MountPath+"/"); ok {
			return m.Name + ":" + rest
		}
	}
	t.Fatalf("%s of container %s is in none of its mounts", name, c.Name)
	return ""
}

func socket(t *testing.T, c corev1.Container, name string) string {
	t.Helper()
	u, err := url.Parse(flag(t, c, name))
	if err != nil || u.Scheme != "unix" {
		t.Fatalf("--%s=%s of %s is no unix socket: %v", name, flag(t, c, name), c.Name, err)
	}
	return nodePath(t, c, u.Path)
}

func TestSocketsMeet(t *testing.T) {
	set := daemonSet(t, demo)
	plugin := container(t, set.Spec.Template.Spec, "csi-plugin")
	provisioner := container(t, set.Spec.Template.Spec, "csi-provisioner")

	if got, want := socket(t, plugin, "wrapped-endpoint"), socket(t, container(t, set.Spec.Template.Spec, "loopdriver"), "endpoint"); got != want {
		t.Errorf("csi-plugin looks for the wrapped driver at %s, which serves at %s", got, want)
	}
	serves := socket(t, plugin, "endpoint")
	if got := nodePath(t, provisioner, flag(t, provisioner, "csi-address")); got != serves {
		t.Errorf("csi-provisioner looks for csi-plugin at %s, which serves at %s", got, serves)
	}
	name, file, _ := strings.Cut(serves, ":")
	v := volume(set.Spec.Template.Spec, name)
	if v == nil || v.HostPath == nil {
		t.Fatalf("csi-plugin's socket is not on the node")
	}
	if got, want := flag(t, plugin, "kubelet-registration-path"), path.Join(v.HostPath.Path, file); got != want {
		t.Errorf("kubelet is told %s, the socket is %s", got, want)
	}
}

// TestBeside: node and controller serve under one name, which CSIDriver and
// StorageClasses have too and which is not the vendor's; the sidecars find
// csi-plugin, and csi-plugin the wrapped driver.
func TestBeside(t *testing.T) {
	for _, dir := range beside() {
		t.Run(dir, func(t *testing.T) {
			objects := build(t, dir)
			node := container(t, daemonSet(t, dir).Spec.Template.Spec, "csi-plugin")
			pod := deployment(t, objects, "cryptcsi-controller").Spec.Template.Spec
			controller := container(t, pod, "csi-plugin")
			name := flag(t, node, "driver-name")
			if got := flag(t, controller, "driver-name"); got != name {
				t.Errorf("the controller serves %s, the nodes %s", got, name)
			}
			drivers, classes := of[*storagev1.CSIDriver](objects), of[*storagev1.StorageClass](objects)
			if len(drivers) != 1 || drivers[0].Name != name || len(classes) != 2 {
				t.Errorf("CSIDriver objects %v and %d StorageClasses, want one called %s and 2", drivers, len(classes), name)
			}
			for _, class := range classes {
				if class.Provisioner != name {
					t.Errorf("StorageClass %s has provisioner %s, the driver is %s", class.Name, class.Provisioner, name)
				}
			}
			vendor := strings.TrimPrefix(name, "encrypted.")
			socketDir := volume(daemonSet(t, dir).Spec.Template.Spec, "wrapped").HostPath
			if vendor == name || socketDir == nil || !strings.HasPrefix(socketDir.Path, kubelet+"/plugins/") {
				t.Errorf("%s is not beside the vendor's driver: socket in %v", name, socketDir)
			}
			serves, wrapped := socket(t, controller, "endpoint"), socket(t, controller, "wrapped-endpoint")
			for _, c := range pod.Containers {
				checkMounts(t, pod, c)
				checkProbes(t, c)
				switch {
				case c.Name == "csi-plugin":
				case strings.HasPrefix(c.Image, "registry.k8s.io/sig-storage/"):
					if got := nodePath(t, c, flag(t, c, "csi-address")); got != serves {
						t.Errorf("%s looks for csi-plugin at %s, which serves at %s", c.Name, got, serves)
					}
				default:
					if got := socket(t, c, "endpoint"); got != wrapped {
						t.Errorf("the vendor's %s serves at %s, csi-plugin looks at %s", c.Name, got, wrapped)
					}
				}
			}
		})
	}
}

// TestNodeOfTheController: EBS's controller, where it cannot ask the instance,
// learns its region from its Node, and may read that.
func TestNodeOfTheController(t *testing.T) {
	objects := build(t, "examples/aws-ebs")
	env := container(t, deployment(t, objects, "cryptcsi-controller").Spec.Template.Spec, "ebs-plugin").Env
	if !slices.ContainsFunc(env, func(e corev1.EnvVar) bool {
		return e.Name == "CSI_NODE_NAME" && e.ValueFrom != nil && e.ValueFrom.FieldRef.FieldPath == "spec.nodeName"
	}) {
		t.Errorf("CSI_NODE_NAME is not the Node's name: %+v", env)
	}
	if !slices.ContainsFunc(of[*rbacv1.ClusterRole](objects), func(r *rbacv1.ClusterRole) bool {
		return r.Name == "cryptcsi-controller" && slices.ContainsFunc(r.Rules, func(rule rbacv1.PolicyRule) bool {
			return slices.Contains(rule.Resources, "nodes") && slices.Contains(rule.Verbs, "get")
		})
	}) {
		t.Error("it may not get nodes")
	}
}

// TestNodesWithoutTheVendor: csi-plugin is not put where the vendor's node plugin is
// not either, and would wait for its folder for ever.
func TestNodesWithoutTheVendor(t *testing.T) {
	for _, tt := range []struct {
		dir, key, value string
		want            bool
	}{
		{"examples/aws-ebs", "eks.amazonaws.com/compute-type", "fargate", false},
		{"examples/aws-ebs", "eks.amazonaws.com/compute-type", "auto", false},
		{"examples/aws-ebs", "eks.amazonaws.com/compute-type", "hybrid", false},
		{"examples/aws-ebs", "eks.amazonaws.com/compute-type", "ec2", true},
		{"examples/aws-ebs", "kubernetes.io/os", "linux", true},
		{"testdata/drop-in-aws-ebs", "eks.amazonaws.com/compute-type", "hybrid", false},
		{"examples/azuredisk", "type", "virtual-kubelet", false},
		{"examples/azuredisk", "kubernetes.io/os", "linux", true},
	} {
		if got := runsOn(t, plugin(t, tt.dir).Spec.Template.Spec, labels.Set{tt.key: tt.value}); got != tt.want {
			t.Errorf("%s: csi-plugin is put on nodes with %s=%s: %v", tt.dir, tt.key, tt.value, got)
		}
	}
}

// plugin is our DaemonSet, also beside the vendor's.
func plugin(t *testing.T, dir string) *appsv1.DaemonSet {
	t.Helper()
	sets := of[*appsv1.DaemonSet](build(t, dir))
	i := slices.IndexFunc(sets, func(s *appsv1.DaemonSet) bool { return s.Name == "cryptcsi-node" })
	if i < 0 {
		t.Fatalf("%s has no DaemonSet cryptcsi-node", dir)
	}
	return sets[i]
}

// runsOn says whether a pod's affinity allows nodes with these labels.
func runsOn(t *testing.T, pod corev1.PodSpec, node labels.Set) bool {
	t.Helper()
	if pod.Affinity == nil {
		return true
	}
	for _, term := range pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		all := true
		for _, e := range term.MatchExpressions {
			operator := map[corev1.NodeSelectorOperator]selection.Operator{corev1.NodeSelectorOpIn: selection.In, corev1.NodeSelectorOpNotIn: selection.NotIn}[e.Operator]
			r, err := labels.NewRequirement(e.Key, operator, e.Values)
			if err != nil {
				t.Fatal(err)
			}
			all = all && r.Matches(node)
		}
		if all {
			return true
		}
	}
	return false
}

// TestVolumesGrow: a claim of any class can be enlarged where a sidecar does that.
func TestVolumesGrow(t *testing.T) {
	for _, dir := range append(beside(), "testdata/drop-in-aws-ebs", "testdata/drop-in-gcp-pd") {
		objects := build(t, dir)
		container(t, deployment(t, objects, "cryptcsi-controller").Spec.Template.Spec, "csi-resizer")
		for _, class := range of[*storagev1.StorageClass](objects) {
			if class.AllowVolumeExpansion == nil || !*class.AllowVolumeExpansion {
				t.Errorf("%s: volumes of class %s cannot grow", dir, class.Name)
			}
		}
	}
}

// TestSnapshotClass: whoever takes snapshots by it reaches csi-plugin, under whatever
// name that serves; wherever the component stands among others.
func TestSnapshotClass(t *testing.T) {
	for _, dir := range append(beside(), "testdata/drop-in-aws-ebs", "testdata/drop-in-gcp-pd") {
		objects := build(t, dir)
		classes := of[*snapshotClass](objects)
		args := container(t, deployment(t, objects, "cryptcsi-controller").Spec.Template.Spec, "csi-plugin").Args
		var serves string // the last one counts
		for _, a := range args {
			if name, ok := strings.CutPrefix(a, "--driver-name="); ok {
				serves = name
			}
		}
		if len(classes) != 1 {
			t.Fatalf("%s has %d VolumeSnapshotClasses", dir, len(classes))
		}
		if c := classes[0]; c.Driver != serves || c.DeletionPolicy != "Delete" {
			t.Errorf("%s: VolumeSnapshotClass %s is of %s with %s, the driver is %s", dir, c.Name, c.Driver, c.DeletionPolicy, serves)
		}
	}
}

// TestDropIn: under the vendor's name kubelet finds csi-plugin and nobody else,
// one controller works, and it and the nodes pass the listed volumes through.
func TestDropIn(t *testing.T) {
	for dir, vendor := range map[string]struct{ driver, set, controller, namespace string }{
		"testdata/drop-in-aws-ebs": {"ebs.csi.aws.com", "ebs-csi-node", "ebs-csi-controller", "kube-system"},
		"testdata/drop-in-gcp-pd":  {"pd.csi.storage.gke.io", "csi-gce-pd-node", "csi-gce-pd-controller", "gce-pd-csi-driver"},
	} {
		t.Run(vendor.driver, func(t *testing.T) {
			objects := build(t, dir)
			drivers := of[*storagev1.CSIDriver](objects)
			if len(drivers) != 1 || drivers[0].Name != vendor.driver {
				t.Errorf("CSIDriver objects %v, want the vendor's", drivers)
			}
			for _, class := range of[*storagev1.StorageClass](objects) {
				if class.Provisioner != vendor.driver {
					t.Errorf("class %s is of %s", class.Name, class.Provisioner)
				}
			}
			if d := deployment(t, objects, vendor.controller); *d.Spec.Replicas != 0 {
				t.Errorf("the vendor's controller works, too: %d replicas", *d.Spec.Replicas)
			}
			sets := of[*appsv1.DaemonSet](objects)
			i := slices.IndexFunc(sets, func(s *appsv1.DaemonSet) bool { return s.Name == vendor.set && s.Namespace == vendor.namespace })
			if i < 0 || len(sets) != 2 || len(sets[i].Spec.Template.Spec.Containers) != 1 {
				t.Fatalf("DaemonSets %v: want ours and the vendor's without its registrar", sets)
			}
			ours := sets[1-i].Spec.Template.Spec
			if theirs := volume(sets[i].Spec.Template.Spec, "plugin-dir"); path.Clean(theirs.HostPath.Path) != volume(ours, "wrapped").HostPath.Path {
				t.Errorf("the vendor's socket is in %s, csi-plugin looks in %s", theirs.HostPath.Path, volume(ours, "wrapped").HostPath.Path)
			}
			for _, pod := range []corev1.PodSpec{ours, deployment(t, objects, "cryptcsi-controller").Spec.Template.Spec} {
				c := container(t, pod, "csi-plugin")
				names := slices.DeleteFunc(slices.Clone(c.Args), func(a string) bool { return !strings.HasPrefix(a, "--driver-name=") })
				if len(names) == 0 || names[len(names)-1] != "--driver-name="+vendor.driver {
					t.Errorf("csi-plugin has %v; the last counts", names)
				}
				name, file, _ := strings.Cut(nodePath(t, c, flag(t, c, "plaintext-volumes-file")), ":")
				if v := volume(pod, name); v.ConfigMap == nil || v.ConfigMap.Name != "cryptcsi-plaintext" || file != "volumes" {
					t.Errorf("the list of unencrypted volumes is %s in %+v", file, v)
				}
			}
		})
	}
}

// TestDropInCredentials: GCE PD's controller in our Deployment finds the same file of
// the same Secret as in the vendor's.
func TestDropInCredentials(t *testing.T) {
	objects := build(t, "testdata/drop-in-gcp-pd")
	credentials := func(name string) string {
		pod := deployment(t, objects, name).Spec.Template.Spec
		c := container(t, pod, "gce-pd-driver")
		for _, e := range c.Env {
			if e.Name == "GOOGLE_APPLICATION_CREDENTIALS" {
				from, file, _ := strings.Cut(nodePath(t, c, e.Value), ":")
				return volume(pod, from).Secret.SecretName + "/" + file
			}
		}
		return ""
	}
	if got, want := credentials("cryptcsi-controller"), credentials("csi-gce-pd-controller"); got != want || want == "" {
		t.Errorf("ours are %q, the vendor's %q", got, want)
	}
}

func deployment(t *testing.T, objects []any, name string) *appsv1.Deployment {
	t.Helper()
	all := of[*appsv1.Deployment](objects)
	i := slices.IndexFunc(all, func(d *appsv1.Deployment) bool { return d.Name == name })
	if i < 0 {
		t.Fatalf("there is no Deployment %s", name)
	}
	return all[i]
}

func TestDemoNames(t *testing.T) {
	objects := build(t, demo)
	name := flag(t, container(t, daemonSet(t, demo).Spec.Template.Spec, "loopdriver"), "driver-name")
	drivers, classes := of[*storagev1.CSIDriver](objects), of[*storagev1.StorageClass](objects)
	if len(drivers) != 1 || drivers[0].Name != name {
		t.Errorf("CSIDriver objects %v, want one called %s", drivers, name)
	}
	known := map[string]bool{}
	for _, class := range classes {
		known[class.Name] = true
		if class.Provisioner != name {
			t.Errorf("StorageClass %s has provisioner %s, the driver is %s", class.Name, class.Provisioner, name)
		}
	}
	for _, claim := range of[*corev1.PersistentVolumeClaim](build(t, "examples/loopdriver-demo")) {
		if claim.Spec.StorageClassName == nil || !known[*claim.Spec.StorageClassName] {
			t.Errorf("claim %s is of no class of the demo", claim.Name)
		}
	}
}

// TestDemoKeys: the files that the key URI names come from a Secret, and the
// records lie on the node, where a restart of the pod leaves them.
func TestDemoKeys(t *testing.T) {
	set := daemonSet(t, demo)
	plugin := container(t, set.Spec.Template.Spec, "csi-plugin")
	source := func(file string) *corev1.Volume {
		name, _, _ := strings.Cut(nodePath(t, plugin, file), ":")
		return volume(set.Spec.Template.Spec, name)
	}
	kms, err := url.Parse(flag(t, plugin, "kms-uri"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{kms.Path, kms.Query().Get("salt-file")} {
		if source(file).Secret == nil {
			t.Errorf("%s does not come from a Secret", file)
		}
	}
	storage, err := url.Parse(flag(t, plugin, "storage-uri"))
	if err != nil {
		t.Fatal(err)
	}
	if source(storage.Path+"/record").HostPath == nil {
		t.Errorf("records in %s go away with the pod", storage.Path)
	}
}
