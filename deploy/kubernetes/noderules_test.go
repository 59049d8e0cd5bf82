package kubernetes_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestNodeRules: a node talks to the API server only with the components that
// say so, and may then do what package kube says that it needs, and nothing else.
func TestNodeRules(t *testing.T) {
	const account = "cryptcsi-node"
	for dir, want := range map[string]map[string][]rbacv1.PolicyRule{
		keyed:                    {},
		"examples/hostpath":      {"cryptcsi-node-events": peers.DocumentedRules(t, "../../kube/events.go", "Events")},
		"examples/startup-taint": {"cryptcsi-node-events": peers.DocumentedRules(t, "../../kube/events.go", "Events"), "cryptcsi-node-startup": peers.DocumentedRules(t, "../../kube/node.go", "Node")},
	} {
		objects := build(t, dir)
		if got := *daemonSet(t, dir).Spec.Template.Spec.AutomountServiceAccountToken; got != (len(want) > 0) {
			t.Errorf("%s: the node has a token for the API server: %v", dir, got)
		}
		bound := map[string]bool{}
		for _, b := range of[*rbacv1.ClusterRoleBinding](objects) {
			if b.Subjects[0].Name == account {
				bound[b.RoleRef.Name] = len(b.Subjects) == 1
			}
		}
		for _, b := range of[*rbacv1.RoleBinding](objects) {
			for _, s := range b.Subjects {
				if s.Name == account {
					t.Errorf("%s: the node has the Role %s in %s", dir, b.RoleRef.Name, b.Namespace)
				}
			}
		}
		for name, rules := range want {
			if !bound[name] {
				t.Errorf("%s: the node has no %s", dir, name)
			}
			delete(bound, name)
			for _, r := range of[*rbacv1.ClusterRole](objects) {
				if r.Name == name && !reflect.DeepEqual(r.Rules, rules) {
					t.Errorf("%s: %s may %+v, package kube says %+v", dir, name, r.Rules, rules)
				}
			}
		}
		if len(bound) > 0 {
			t.Errorf("%s: the node also has %v", dir, bound)
		}
		for _, d := range of[*storagev1.CSIDriver](objects) {
			if d.Spec.PodInfoOnMount == nil || !*d.Spec.PodInfoOnMount {
				t.Errorf("%s: events do not reach pods of %s", dir, d.Name)
			}
		}
	}
}

// TestEvents: every example with a wrapped driver tells users about their volumes.
func TestEvents(t *testing.T) {
	for _, dir := range kustomizations(t) {
		if !strings.HasPrefix(dir, "examples/") || len(of[*storagev1.CSIDriver](build(t, dir))) == 0 {
			continue
		}
		if plugin := container(t, daemonSet(t, dir).Spec.Template.Spec, "csi-plugin"); !slices.Contains(plugin.Args, "--kubernetes-events") {
			t.Errorf("%s is without components/events", dir)
		}
	}
}

// TestStartupTaint: where every node has the taint, what removes it starts
// nevertheless, and what that waits for.
func TestStartupTaint(t *testing.T) {
	const dir = "examples/startup-taint"
	taint := flag(t, container(t, daemonSet(t, dir).Spec.Template.Spec, "csi-plugin"), "startup-taint")
	tolerated := func(to corev1.Toleration) bool {
		return to.Operator == corev1.TolerationOpExists && (to.Key == "" || to.Key == taint) && (to.Effect == "" || to.Effect == corev1.TaintEffectNoSchedule)
	}
	objects := build(t, dir)
	all := map[string]corev1.PodSpec{}
	for _, o := range of[*appsv1.Deployment](objects) {
		all["Deployment "+o.Name] = o.Spec.Template.Spec
	}
	for _, o := range of[*appsv1.DaemonSet](objects) {
		all["DaemonSet "+o.Name] = o.Spec.Template.Spec
	}
	for _, o := range of[*batchv1.Job](objects) {
		all["Job "+o.Name] = o.Spec.Template.Spec
	}
	if len(all) < 4 {
		t.Errorf("found only %d: a DaemonSet, two Deployments and a Job belong to it", len(all))
	}
	for name, pod := range all {
		if !slices.ContainsFunc(pod.Tolerations, tolerated) {
			t.Errorf("%s does not start on a node with the taint %s", name, taint)
		}
	}
}
