package kubernetes_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestUninstallGuard: whatever is chosen, the policy guards all of our objects that
// are not replaced in everyday life, and csi-plugin keeps that policy, with the
// rights that package kube says.
func TestUninstallGuard(t *testing.T) {
	const name = "cryptcsi-uninstall"
	for _, dir := range kustomizations(t) {
		if !chosen(dir) || dir == demo || strings.HasSuffix(dir, "/claims") || strings.HasSuffix(dir, "/loopdriver-demo") {
			continue // the demo is without controller and key service
		}
		t.Run(dir, func(t *testing.T) {
			objects := build(t, dir)
			policies := of[*admissionv1.ValidatingAdmissionPolicy](objects)
			i := slices.IndexFunc(policies, func(p *admissionv1.ValidatingAdmissionPolicy) bool { return p.Name == name })
			if i < 0 {
				t.Fatalf("there is no policy %s", name)
			}
			guards := kindsOf(policies[i])
			for _, o := range objects {
				object, ok := o.(metav1.Object)
				if !ok {
					continue // a kind of others
				}
				kind := reflect.TypeOf(o).Elem().Name()
				labelled := object.GetLabels()["app.kubernetes.io/part-of"] == "cryptcsi"
				if labelled && !guards[kind] {
					t.Errorf("the policy does not know %s %s", kind, object.GetName())
				}
				// A right that a policy narrows goes when that does, which nothing guards.
				narrowed := object.GetName() == "cryptcsi-node-startup"
				if guards[kind] && !labelled && !replaced(o) && !narrowed && ours(object) {
					t.Errorf("%s %s is not guarded", kind, object.GetName())
				}
				if narrowed && labelled {
					t.Errorf("%s %s stays where its policy is deleted", kind, object.GetName())
				}
			}
			controller := container(t, deployment(t, objects, "cryptcsi-controller").Spec.Template.Spec, "csi-plugin")
			if got := flag(t, controller, "uninstall-guard"); got != name {
				t.Errorf("csi-plugin guards %s", got)
			}
			for _, r := range of[*rbacv1.ClusterRole](objects) {
				if want := peers.DocumentedRules(t, "../../kube/guard.go", "Guard"); r.Name == name && !reflect.DeepEqual(r.Rules, want) {
					t.Errorf("the guard may %+v, package kube says %+v", r.Rules, want)
				}
			}
		})
	}
}

// kindsOf are those whose deletion a policy sees.
func kindsOf(p *admissionv1.ValidatingAdmissionPolicy) map[string]bool {
	kinds := map[string]string{
		"namespaces": "Namespace", "resourcequotas": "ResourceQuota", "secrets": "Secret", "configmaps": "ConfigMap", "serviceaccounts": "ServiceAccount", "services": "Service",
		"daemonsets": "DaemonSet", "deployments": "Deployment", "cronjobs": "CronJob", "networkpolicies": "NetworkPolicy",
		"poddisruptionbudgets": "PodDisruptionBudget", "csidrivers": "CSIDriver",
		"roles": "Role", "rolebindings": "RoleBinding", "clusterroles": "ClusterRole", "clusterrolebindings": "ClusterRoleBinding",
	}
	guards := map[string]bool{}
	for _, rule := range p.Spec.MatchConstraints.ResourceRules {
		for _, resource := range rule.Resources {
			guards[kinds[resource]] = true
		}
	}
	return guards
}

// replaced says whether an upgrade deletes such an object: the ConfigMap with the
// configuration has another name where its content is another.
func replaced(o any) bool {
	c, ok := o.(*corev1.ConfigMap)
	return ok && (strings.HasPrefix(c.Name, "key-service-") && c.Name != "key-service-ca" || c.Name == "cryptcsi-dashboard")
}

// ours says whether an object is not one of the vendor's, whose node plugin and
// CSIDriver are needed where csi-plugin is in its place.
func ours(o metav1.Object) bool {
	vendors := []string{"ebs-csi-node", "csi-gce-pd-node", "ebs.csi.aws.com", "pd.csi.storage.gke.io"}
	return strings.HasPrefix(o.GetNamespace(), "cryptcsi") || strings.HasPrefix(o.GetName(), "cryptcsi") ||
		strings.HasPrefix(o.GetName(), "encrypted.") || slices.Contains(vendors, o.GetName())
}
