package cluster_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// limited is how GKE's API server is configured: critical pods by quota only.
const limited = `apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
  - name: ResourceQuota
    configuration:
      apiVersion: apiserver.config.k8s.io/v1
      kind: ResourceQuotaConfiguration
      limitedResources:
        - resource: pods
          matchScopes:
            - scopeName: PriorityClass
              operator: In
              values: [system-node-critical, system-cluster-critical]
`

// TestCriticalPods: all of our pods are created where that takes a quota.
func TestCriticalPods(t *testing.T) {
	config := filepath.Join(t.TempDir(), "admission.yaml")
	must(t, "configuration", os.WriteFile(config, []byte(limited), 0o600))
	c := start(t, "--admission-control-config-file="+config)
	objects := c.apply(t, "../examples/azuredisk-kms")
	objects = append(objects, c.apply(t, example)...)
	quotas := c.count(t)
	create := func(o *unstructured.Unstructured) error {
		_, err := c.Client.CoreV1().Pods(o.GetNamespace()).Create(t.Context(), podOf(t, o), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool { return podOf(t, o) == nil })
	for _, o := range objects {
		eventually(t, "pod of "+o.GetKind()+" "+o.GetName(), func() error { return create(o) })
	}
	for _, q := range quotas {
		must(t, "delete "+q.Name, c.Client.CoreV1().ResourceQuotas(q.Namespace).Delete(t.Context(), q.Name, metav1.DeleteOptions{}))
	}
	for _, o := range objects {
		eventually(t, "refusal of "+o.GetKind()+" "+o.GetName(), func() error {
			if err := create(o); err == nil || !strings.Contains(err.Error(), "insufficient quota to match these scopes") {
				return fmt.Errorf("without the quota: %w", err)
			}
			return nil
		})
	}
	if len(objects) < 7 {
		t.Errorf("only %d make pods", len(objects))
	}
}

// count gives all quotas a status, which is a controller's work; none admits a pod
// before.
func (c *cluster) count(t *testing.T) []corev1.ResourceQuota {
	t.Helper()
	quotas, err := c.Client.CoreV1().ResourceQuotas("").List(t.Context(), metav1.ListOptions{})
	must(t, "quotas", err)
	for _, q := range quotas.Items {
		q.Status = corev1.ResourceQuotaStatus{Hard: q.Spec.Hard, Used: corev1.ResourceList{}}
		for name := range q.Spec.Hard {
			q.Status.Used[name] = resource.MustParse("0")
		}
		_, err = c.Client.CoreV1().ResourceQuotas(q.Namespace).UpdateStatus(t.Context(), &q, metav1.UpdateOptions{})
		must(t, "quota "+q.Name, err)
	}
	return quotas.Items
}

// podOf is the pod that controllers make of an object, nil if they make none.
func podOf(t *testing.T, o *unstructured.Unstructured) *corev1.Pod {
	t.Helper()
	path := []string{"spec", "template", "spec"}
	if o.GetKind() == "CronJob" {
		path = []string{"spec", "jobTemplate", "spec", "template", "spec"}
	}
	spec, found, err := unstructured.NestedMap(o.Object, path...)
	must(t, o.GetName(), err)
	if !found {
		return nil
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "pod"}}
	must(t, o.GetName(), runtime.DefaultUnstructuredConverter.FromUnstructured(spec, &pod.Spec))
	return pod
}
