package kubernetes_test

import (
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// byHand is what manifests refer to and must not hold, because it is the user's.
// README.md, docs/install.md and docs/operations.md say how each is made.
func byHand() []string {
	return []string{
		"Secret cryptcsi-master-secret", // of the demo
		"Secret cryptcsi-master-secret-previous",
		"Secret cloud-config", "Secret cloud-sa", "Secret key-service-kmip", "Secret key-service-pkcs11", "ConfigMap key-service-transit", "ConfigMap cryptcsi-plaintext",
	}
}

// TestReferences: whatever an object names exists, or is made by hand. Secrets
// are empty here: what is in them is made in the cluster.
func TestReferences(t *testing.T) {
	var texts []byte
	for _, name := range []string{"README.md", "../../docs/install.md", "../../docs/operations.md"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, text...)
	}
	missing := map[string]bool{}
	for _, dir := range kustomizations(t) {
		if !chosen(dir) {
			continue
		}
		objects := build(t, dir)
		names := existing(objects)
		for _, s := range of[*corev1.Secret](objects) {
			if len(s.Data) > 0 || len(s.StringData) > 0 {
				t.Errorf("%s: Secret %s has something in it", dir, s.Name)
			}
		}
		for _, reference := range references(objects) {
			if names[reference] {
				continue
			}
			missing[reference] = true
			if !slices.Contains(byHand(), reference) {
				t.Errorf("%s: there is no %s", dir, reference)
			}
			if _, name, _ := strings.Cut(reference, " "); !strings.Contains(string(texts), name) {
				t.Errorf("nobody says how %s is made", reference)
			}
		}
	}
	for _, made := range byHand() {
		if !missing[made] {
			t.Errorf("nothing needs %s", made)
		}
	}
}

// TestInstallByHand: the documents make the namespace before what is made in it by
// hand, and name all manifests in one version, that of the images.
func TestInstallByHand(t *testing.T) {
	inside := regexp.MustCompile(`-n cryptcsi create (secret|configmap)|namespace: cryptcsi/`)
	manifests := regexp.MustCompile(`https://github.com/cryptcsi/cryptcsi//\S+`)
	for _, name := range []string{"README.md", "../../docs/install.md"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for section := range strings.SplitSeq(string(text), "\n## ") {
			title, _, _ := strings.Cut(section, "\n")
			first, made := inside.FindStringIndex(section), strings.Index(section, "kubectl create namespace cryptcsi")
			if first != nil && (made < 0 || made > first[0]) {
				t.Errorf("%s, %s: there is no namespace yet for %q", name, title, section[first[0]:first[1]])
			}
		}
		for _, url := range manifests.FindAllString(string(text), -1) {
			if !strings.HasSuffix(url, "?ref=VERSION") {
				t.Errorf("%s: manifests of another version than the images: %s", name, url)
			}
		}
	}
}

// existing are "KIND NAME" of all objects that others name.
func existing(objects []any) map[string]bool {
	names := map[string]bool{}
	add := func(kind string, o metav1.Object) { names[kind+" "+o.GetName()] = true }
	for _, o := range objects {
		switch o := o.(type) {
		case *corev1.ConfigMap:
			add("ConfigMap", o)
		case *corev1.Secret:
			add("Secret", o)
		case *corev1.ServiceAccount:
			add("ServiceAccount", o)
		case *rbacv1.Role:
			add("Role", o)
		case *rbacv1.ClusterRole:
			add("ClusterRole", o)
		case *issuer:
			add("Issuer", o)
		case *managedCertificate:
			names["Secret "+o.Spec.SecretName] = true
		}
	}
	return names
}

// references are "KIND NAME" of all that pods and bindings name.
func references(objects []any) []string {
	var all []string
	for _, pod := range pods(objects) {
		all = append(all, "ServiceAccount "+pod.Spec.ServiceAccountName)
		if pod.Spec.ServiceAccountName == "" {
			all = all[:len(all)-1] // a pod of the user's
		}
		for _, v := range pod.Spec.Volumes {
			all = append(all, ofVolume(v)...)
		}
	}
	for _, c := range of[*managedCertificate](objects) {
		all = append(all, "Issuer "+c.Spec.IssuerRef.Name)
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

// configFile is the key service's.
func configFile(t *testing.T, objects []any) []byte {
	t.Helper()
	for _, m := range of[*corev1.ConfigMap](objects) {
		if text, ok := m.Data["config.yaml"]; ok {
			return []byte(text)
		}
	}
	t.Fatal("there is no config.yaml")
	return nil
}

// TestFilledByJobs: a Job and the CronJob that repeats it run the same pod, under
// an account that may read and change a few objects by name and nothing else;
// what it fills is there, and no pod starts before it is filled.
func TestFilledByJobs(t *testing.T) {
	for _, dir := range []string{keyed, "examples/azuredisk-kms"} {
		objects := build(t, dir)
		jobs, names := of[*batchv1.Job](objects), existing(objects)
		if len(jobs) != 2 {
			t.Errorf("%s: %d Jobs, want 2", dir, len(jobs))
		}
		for _, cron := range of[*batchv1.CronJob](objects) {
			i := slices.IndexFunc(jobs, func(j *batchv1.Job) bool { return j.Name == cron.Name })
			if i < 0 || !reflect.DeepEqual(jobs[i].Spec.Template, cron.Spec.JobTemplate.Spec.Template) {
				t.Errorf("%s: no Job does at once what CronJob %s does later", dir, cron.Name)
			}
		}
		for _, j := range jobs {
			if j.Spec.TTLSecondsAfterFinished == nil {
				t.Errorf("%s stays, and another version of it could not be applied", j.Name)
			}
			account := j.Spec.Template.Spec.ServiceAccountName
			rules := 0
			for _, r := range of[*rbacv1.Role](objects) {
				if r.Name != account {
					continue
				}
				for _, rule := range r.Rules {
					rules++
					if !slices.Equal(rule.Verbs, []string{"get", "update"}) || len(rule.ResourceNames) == 0 {
						t.Errorf("%s may %v all %v", account, rule.Verbs, rule.Resources)
					}
					for _, name := range rule.ResourceNames {
						kind := map[string]string{"secrets": "Secret ", "configmaps": "ConfigMap "}[rule.Resources[0]]
						if len(rule.Resources) != 1 || !names[kind+name] {
							t.Errorf("%s may change %v %s, which is not there", account, rule.Resources, name)
						}
					}
				}
			}
			if rules != 2 {
				t.Errorf("%s has %d rules, want 2", account, rules)
			}
		}
		for _, b := range of[*rbacv1.ClusterRoleBinding](objects) {
			for _, s := range b.Subjects {
				if slices.ContainsFunc(jobs, func(j *batchv1.Job) bool { return j.Spec.Template.Spec.ServiceAccountName == s.Name }) {
					t.Errorf("%s has a ClusterRole", s.Name)
				}
			}
		}
		for _, v := range keyService(t, objects).Spec.Template.Spec.Volumes {
			if v.Secret != nil && len(v.Secret.Items) == 0 {
				t.Errorf("%s: the key service starts while Secret %s is empty", dir, v.Secret.SecretName)
			}
		}
	}
}

// TestAuthorityIsTheJobs: no pod but the Job's names the Secret with the
// authority's private key, and nodes see none that has the service's.
func TestAuthorityIsTheJobs(t *testing.T) {
	for _, dir := range append(beside(), "examples/cert-manager") {
		for _, pod := range pods(build(t, dir)) {
			for _, v := range pod.Spec.Volumes {
				for _, reference := range ofVolume(v) {
					if reference == "Secret key-service-authority" || reference == "Secret key-service-tls" && pod.Spec.ServiceAccountName != "cryptcsi-key-service" {
						t.Errorf("%s: pods of %s mount %s", dir, pod.Spec.ServiceAccountName, reference)
					}
				}
			}
		}
	}
}

// TestCertificatesElsewhere: our CronJob rests where the certificate is not its own,
// also in a cluster that has it from before, and works where it is.
func TestCertificatesElsewhere(t *testing.T) {
	for dir, elsewhere := range map[string]bool{keyed: false, "examples/cert-manager": true, "../../test/e2e/upgraded": true} {
		objects := build(t, dir)
		jobs := of[*batchv1.CronJob](objects)
		if len(jobs) != 1 || jobs[0].Name != "key-service-certificate" {
			t.Fatalf("%s: CronJobs %v, want one that apply changes", dir, jobs)
		}
		if suspended := jobs[0].Spec.Suspend != nil && *jobs[0].Spec.Suspend; suspended != elsewhere {
			t.Errorf("%s: the CronJob is suspended: %v, want %v", dir, suspended, elsewhere)
		}
		once := slices.ContainsFunc(of[*batchv1.Job](objects), func(j *batchv1.Job) bool { return j.Name == "key-service-certificate" })
		if once == elsewhere {
			t.Errorf("%s: there is the Job: %v, want %v", dir, once, !elsewhere)
		}
	}
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
	if err := yaml.UnmarshalStrict(configFile(t, objects), &cfg); err != nil {
		t.Fatal(err)
	}
	if cfg["listen"] != fmt.Sprintf("0.0.0.0:%d", ports["grpc"]) || cfg["metrics-address"] != fmt.Sprintf(":%d", ports["metrics"]) {
		t.Errorf("it listens on %v and %v, its ports are %v", cfg["listen"], cfg["metrics-address"], ports)
	}

	policy := networkPolicy(t, objects, d.Spec.Template.Labels)
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
		if got := admits(t, policy, tt.port, tt.from); got != tt.want {
			t.Errorf("pods with %v reach port %d: %v, want %v", tt.from, tt.port, got, tt.want)
		}
	}
}

// networkPolicy is the one that selects a pod.
func networkPolicy(t *testing.T, objects []any, pod map[string]string) *networkingv1.NetworkPolicy {
	t.Helper()
	var found []*networkingv1.NetworkPolicy
	for _, p := range of[*networkingv1.NetworkPolicy](objects) {
		if s, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector); err == nil && s.Matches(labels.Set(pod)) {
			found = append(found, p)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d NetworkPolicies select pods with %v, want 1", len(found), pod)
	}
	return found[0]
}

// TestOthersAreNotReached: every pod has a policy, and nobody in the namespace
// has business with any but the key service's.
func TestOthersAreNotReached(t *testing.T) {
	objects := build(t, "examples/aws-ebs")
	for _, pod := range pods(objects) {
		p := networkPolicy(t, objects, pod.Labels)
		if p.Name == "key-service" {
			continue
		}
		for _, from := range pods(objects) {
			for _, port := range []int32{9808, 7443} {
				if admits(t, p, port, from.Labels) {
					t.Errorf("pods with %v reach port %d of %v", from.Labels, port, pod.Labels)
				}
			}
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
	if err := yaml.Unmarshal(configFile(t, objects), &cfg); err != nil {
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
	if len(roles) != 1 || !reflect.DeepEqual(roles[0].Rules, peers.DocumentedRules(t, "../../kube/kube.go", "")) {
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
		if pod.Spec.RestartPolicy == corev1.RestartPolicyOnFailure {
			continue // of a Job, which is gone before it could be asked
		}
		selects(t, "PodMonitor", &monitors[0].Spec.Selector, pod.Labels)
		port := monitors[0].Spec.PodMetricsEndpoints[0].Port
		if c := pod.Spec.Containers[0]; !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == port }) {
			t.Errorf("%s has no port %s", c.Name, port)
		}
	}
}
