package kubernetes_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/cryptcsi/cryptcsi/kube"
)

// byHand is what manifests refer to and must not hold, because keys and
// certificates are in it. README.md says how each is made.
func byHand() []string {
	return []string{"Secret cryptcsi-master-secret", "Secret key-service-tls", "ConfigMap key-service-ca"}
}

// TestReferences: whatever an object names exists, or is made by hand.
func TestReferences(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, dir := range []string{keyed, demo} {
		objects := build(t, dir)
		names := map[string]bool{}
		add := func(kind string, o metav1.Object) { names[kind+" "+o.GetName()] = true }
		for _, o := range of[*corev1.ConfigMap](objects) {
			add("ConfigMap", o)
		}
		for _, o := range of[*corev1.ServiceAccount](objects) {
			add("ServiceAccount", o)
		}
		for _, o := range of[*rbacv1.Role](objects) {
			add("Role", o)
		}
		for _, o := range of[*rbacv1.ClusterRole](objects) {
			add("ClusterRole", o)
		}
		for _, reference := range references(objects) {
			named[reference] = true
			if names[reference] {
				continue
			}
			if !slices.Contains(byHand(), reference) {
				t.Errorf("%s: there is no %s", dir, reference)
			}
			if _, name, _ := strings.Cut(reference, " "); !strings.Contains(string(readme), name) {
				t.Errorf("README.md does not say how %s is made", reference)
			}
		}
	}
	for _, made := range byHand() {
		if !named[made] {
			t.Errorf("nothing refers to %s", made)
		}
	}
}

// references are "KIND NAME" of all that pods and bindings name.
func references(objects []any) []string {
	var all []string
	for _, pod := range pods(objects) {
		all = append(all, "ServiceAccount "+pod.Spec.ServiceAccountName)
		for _, v := range pod.Spec.Volumes {
			all = append(all, ofVolume(v)...)
		}
	}
	binding := func(ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
		all = append(all, ref.Kind+" "+ref.Name)
		for _, s := range subjects {
			all = append(all, s.Kind+" "+s.Name)
		}
	}
	for _, b := range of[*rbacv1.RoleBinding](objects) {
		binding(b.RoleRef, b.Subjects)
	}
	for _, b := range of[*rbacv1.ClusterRoleBinding](objects) {
		binding(b.RoleRef, b.Subjects)
	}
	return all
}

func ofVolume(v corev1.Volume) []string {
	switch {
	case v.Secret != nil:
		return []string{"Secret " + v.Secret.SecretName}
	case v.ConfigMap != nil:
		return []string{"ConfigMap " + v.ConfigMap.Name}
	case v.Projected == nil:
		return nil
	}
	var all []string
	for _, s := range v.Projected.Sources {
		if s.ConfigMap != nil {
			all = append(all, "ConfigMap "+s.ConfigMap.Name)
		}
		if s.Secret != nil {
			all = append(all, "Secret "+s.Secret.Name)
		}
	}
	return all
}

func keyService(t *testing.T, objects []any) *appsv1.Deployment {
	t.Helper()
	return deployment(t, objects, "key-service")
}

// TestKeyServiceIsConfined: no privilege, nothing writable, spread over nodes,
// and never all away at once.
func TestKeyServiceIsConfined(t *testing.T) {
	objects := build(t, keyed)
	d := keyService(t, objects)
	pod := d.Spec.Template.Spec
	s, c := pod.SecurityContext, container(t, pod, "key-service").SecurityContext
	if !*s.RunAsNonRoot || *s.RunAsUser == 0 || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("the pod's security context: %+v", s)
	}
	if !*c.ReadOnlyRootFilesystem || *c.AllowPrivilegeEscalation || c.Privileged != nil || c.Capabilities.Add != nil ||
		!slices.Equal(c.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("the container's security context: %+v", c)
	}
	for _, v := range pod.Volumes {
		if v.HostPath != nil || v.Secret != nil && *v.Secret.DefaultMode&0o077 != 0 {
			t.Errorf("volume %s is the node's, or a Secret that others can read", v.Name)
		}
	}
	if pod.HostNetwork || pod.HostPID || pod.HostIPC || *d.Spec.Replicas < 2 || d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue() != 0 {
		t.Error("the pod shares the node's namespaces, or is all that there is at times")
	}
	var keys []string
	for _, spread := range pod.TopologySpreadConstraints {
		keys = append(keys, spread.TopologyKey)
		selects(t, "topology spread", spread.LabelSelector, d.Spec.Template.Labels)
	}
	if !slices.Equal(keys, []string{"kubernetes.io/hostname", "topology.kubernetes.io/zone"}) {
		t.Errorf("spread over %v", keys)
	}
	selects(t, "Deployment", d.Spec.Selector, d.Spec.Template.Labels)
	for _, b := range of[*policyv1.PodDisruptionBudget](objects) {
		of := deployment(t, objects, b.Name)
		selects(t, "PodDisruptionBudget", b.Spec.Selector, of.Spec.Template.Labels)
		if b.Spec.MaxUnavailable.IntValue() != 1 || b.Namespace != of.Namespace {
			t.Errorf("PodDisruptionBudget: %+v", b.Spec)
		}
	}
	for _, c := range pod.Containers {
		checkMounts(t, pod, c)
		checkProbes(t, c)
	}
}

func selects(t *testing.T, what string, selector *metav1.LabelSelector, pod map[string]string) {
	t.Helper()
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil || s.Empty() || !s.Matches(labels.Set(pod)) {
		t.Errorf("%s selects %v, which %v are not: %v", what, s, pod, err)
	}
}

// TestKeyServiceIsReached: by the address that nodes have, and by nobody else
// than who has business with it.
func TestKeyServiceIsReached(t *testing.T) {
	objects := build(t, keyed)
	d := keyService(t, objects)
	services := of[*corev1.Service](objects)
	if len(services) != 1 {
		t.Fatalf("%d Services", len(services))
	}
	s := services[0]
	selects(t, "Service", &metav1.LabelSelector{MatchLabels: s.Spec.Selector}, d.Spec.Template.Labels)
	ports := map[string]int32{}
	for _, p := range container(t, d.Spec.Template.Spec, "key-service").Ports {
		ports[p.Name] = p.ContainerPort
	}
	node := of[*appsv1.DaemonSet](objects)[0].Spec.Template
	want := fmt.Sprintf("dns:///%s.%s.svc:%d", s.Name, s.Namespace, s.Spec.Ports[0].Port)
	if got := flag(t, container(t, node.Spec, "csi-plugin"), "key-service"); got != want || ports[s.Spec.Ports[0].TargetPort.StrVal] == 0 {
		t.Errorf("nodes ask %s, the Service is %s to port %q", got, want, s.Spec.Ports[0].TargetPort.StrVal)
	}
	var cfg map[string]any
	text := of[*corev1.ConfigMap](objects)[0].Data["config.yaml"]
	if err := yaml.UnmarshalStrict([]byte(text), &cfg); err != nil {
		t.Fatal(err)
	}
	if cfg["listen"] != fmt.Sprintf("0.0.0.0:%d", ports["grpc"]) || cfg["metrics-address"] != fmt.Sprintf(":%d", ports["metrics"]) {
		t.Errorf("it listens on %v and %v, its ports are %v", cfg["listen"], cfg["metrics-address"], ports)
	}

	policies := of[*networkingv1.NetworkPolicy](objects)
	if len(policies) != 1 {
		t.Fatalf("%d NetworkPolicies", len(policies))
	}
	selects(t, "NetworkPolicy", &policies[0].Spec.PodSelector, d.Spec.Template.Labels)
	component := func(name string) map[string]string {
		return map[string]string{"app.kubernetes.io/name": "cryptcsi", "app.kubernetes.io/component": name}
	}
	for _, tt := range []struct {
		port int32
		from map[string]string
		want bool
	}{
		{ports["grpc"], node.Labels, true}, {ports["grpc"], component("controller"), true}, {ports["grpc"], component("operator"), true},
		{ports["grpc"], component("key-service"), false}, {ports["grpc"], map[string]string{"app": "x"}, false}, {ports["metrics"], node.Labels, false},
	} {
		if got := admits(t, policies[0], tt.port, tt.from); got != tt.want {
			t.Errorf("pods with %v reach port %d: %v, want %v", tt.from, tt.port, got, tt.want)
		}
	}
}

// admits says whether a policy lets a pod of its own namespace in.
func admits(t *testing.T, p *networkingv1.NetworkPolicy, port int32, from map[string]string) bool {
	t.Helper()
	if !slices.Contains(p.Spec.PolicyTypes, networkingv1.PolicyTypeIngress) {
		return true
	}
	for _, rule := range p.Spec.Ingress {
		if len(rule.Ports) == 0 || len(rule.From) == 0 {
			return true
		}
		for _, peer := range rule.From {
			if peer.NamespaceSelector != nil || peer.IPBlock != nil {
				continue
			}
			s, err := metav1.LabelSelectorAsSelector(peer.PodSelector)
			if err != nil {
				t.Fatal(err)
			}
			if s.Matches(labels.Set(from)) && slices.ContainsFunc(rule.Ports, func(p networkingv1.NetworkPolicyPort) bool { return p.Port.IntVal == port }) {
				return true
			}
		}
	}
	return false
}

// TestIdentities: whom the key service takes for nodes and controller is whom
// the manifests make, with the audience that their tokens have.
func TestIdentities(t *testing.T) {
	objects := build(t, keyed)
	var cfg struct {
		Audience    string   `json:"token-audience"`
		Nodes       []string `json:"node-identity"`
		Controllers []string `json:"controller-identity"`
		Policy      string   `json:"volume-policy"`
	}
	if err := yaml.Unmarshal([]byte(of[*corev1.ConfigMap](objects)[0].Data["config.yaml"]), &cfg); err != nil {
		t.Fatal(err)
	}
	set := of[*appsv1.DaemonSet](objects)[0]
	pod := set.Spec.Template.Spec
	if want := "system:serviceaccount:" + set.Namespace + ":" + pod.ServiceAccountName; !slices.Equal(cfg.Nodes, []string{want}) || cfg.Policy != "attached" {
		t.Errorf("nodes are %v under policy %s, want %s", cfg.Nodes, cfg.Policy, want)
	}
	for _, name := range cfg.Controllers {
		if !slices.ContainsFunc(of[*corev1.ServiceAccount](objects), func(a *corev1.ServiceAccount) bool {
			return name == "system:serviceaccount:"+a.Namespace+":"+a.Name
		}) {
			t.Errorf("there is no account %s", name)
		}
	}
	plugin := container(t, pod, "csi-plugin")
	name, file, _ := strings.Cut(nodePath(t, plugin, flag(t, plugin, "key-service-token-file")), ":")
	found := false
	for _, s := range volume(pod, name).Projected.Sources {
		if p := s.ServiceAccountToken; p != nil {
			found = p.Audience == cfg.Audience && p.Path == file && p.Audience != ""
		}
	}
	if !found || *pod.AutomountServiceAccountToken {
		t.Errorf("csi-plugin has no token for audience %s in %s, or one for the API server", cfg.Audience, file)
	}
}

// TestRules: the key service may do what package kube says that it needs, in
// the cluster and in its store's namespace, and nothing else.
func TestRules(t *testing.T) {
	objects := build(t, keyed)
	roles := slices.DeleteFunc(of[*rbacv1.ClusterRole](objects), func(r *rbacv1.ClusterRole) bool { return r.Name != "cryptcsi-key-service" })
	if len(roles) != 1 || !reflect.DeepEqual(roles[0].Rules, documented(t)) {
		t.Errorf("ClusterRoles %+v, want the one that go doc ./kube shows", roles)
	}
	store, err := kube.NewSecrets(&rest.Config{Host: "https://127.0.0.1:1"}, "cryptcsi-keys", "")
	if err != nil {
		t.Fatal(err)
	}
	needs := store.Permissions()
	delete(needs, "make") // the namespace is in the manifests
	want := map[string]bool{}
	for _, list := range needs {
		for need := range strings.SplitSeq(list, ", ") {
			want[need] = true
		}
	}
	got := map[string]bool{}
	for _, r := range of[*rbacv1.Role](objects) {
		if r.Name != "cryptcsi-key-service" {
			continue
		}
		if r.Namespace != "cryptcsi-keys" {
			t.Errorf("a Role in namespace %s", r.Namespace)
		}
		for _, rule := range r.Rules {
			for _, verb := range rule.Verbs {
				got[verb+" "+rule.Resources[0]] = len(rule.Resources) == 1 && slices.Equal(rule.APIGroups, []string{""})
			}
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("in the store's namespace it may %v, want %v", got, want)
	}
}

// TestControllerIsConfined: its containers have no privilege and nothing
// writable, and may read no Secret.
func TestControllerIsConfined(t *testing.T) {
	objects := build(t, "examples/aws-ebs")
	d := deployment(t, objects, "cryptcsi-controller")
	for _, c := range d.Spec.Template.Spec.Containers {
		s := c.SecurityContext
		if !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || s.Privileged != nil || s.RunAsUser != nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
			t.Errorf("%s: security context %+v", c.Name, s)
		}
	}
	if s := d.Spec.Template.Spec.SecurityContext; !*s.RunAsNonRoot || *s.RunAsUser == 0 {
		t.Errorf("the pod's security context: %+v", s)
	}
	for _, r := range of[*rbacv1.ClusterRole](objects) {
		for _, rule := range r.Rules {
			for _, resource := range rule.Resources {
				if resource == "secrets" || resource == "*" || slices.Contains(rule.Verbs, "*") {
					t.Errorf("%s may %v %v", r.Name, rule.Verbs, rule.Resources)
				}
			}
		}
	}
	selects(t, "Deployment", d.Spec.Selector, d.Spec.Template.Labels)
}

// TestMonitored: Prometheus finds the metrics of all that show some.
func TestMonitored(t *testing.T) {
	objects := build(t, "examples/key-service-monitored")
	monitors := of[*podMonitor](objects)
	if len(monitors) != 1 {
		t.Fatalf("%d PodMonitors", len(monitors))
	}
	for _, pod := range pods(objects) {
		selects(t, "PodMonitor", &monitors[0].Spec.Selector, pod.Labels)
		port := monitors[0].Spec.PodMetricsEndpoints[0].Port
		if c := pod.Spec.Containers[0]; !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == port }) {
			t.Errorf("%s has no port %s", c.Name, port)
		}
	}
}

// documented are the rules in package kube's comment.
func documented(t *testing.T) []rbacv1.PolicyRule {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../../kube/kube.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(file.Doc.Text()) {
		if code, ok := strings.CutPrefix(line, "\t"); ok {
			lines = append(lines, code)
		}
	}
	var role rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict([]byte(strings.Join(lines, "")), &role); err != nil || len(role.Rules) == 0 {
		t.Fatalf("package kube's ClusterRole: %v", err)
	}
	return role.Rules
}
