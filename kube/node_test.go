package kube_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kube"
)

func (f fixture) ofNode(t *testing.T, name string) *kube.Node {
	t.Helper()
	n, err := kube.NewNode(f.configOf(t, "node"), name)
	must(t, "NewNode", err)
	return n
}

func (f fixture) node(t *testing.T, name string) *corev1.Node {
	t.Helper()
	n, err := f.Client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	must(t, "get node", err)
	return n
}

// taint: ours goes, others stay, though others change the node all the time.
func (f fixture) taint(t *testing.T) {
	const key = "cryptcsi.io/agent-not-ready"
	other := corev1.Taint{Key: "other", Value: "x", Effect: corev1.TaintEffectNoSchedule}
	_, err := f.Client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "tainted"}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{
		{Key: key, Effect: corev1.TaintEffectNoSchedule}, other, {Key: key, Effect: corev1.TaintEffectNoExecute},
	}}}, metav1.CreateOptions{})
	must(t, "create node", err)
	n := f.ofNode(t, "tainted")
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 30 {
			patch := fmt.Appendf(nil, `{"metadata":{"labels":{"n":"%d"}}}`, i)
			if _, err := f.Client.CoreV1().Nodes().Patch(t.Context(), "tainted", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
				t.Error(err)
			}
		}
	})
	removed, err := n.RemoveTaint(t.Context(), key)
	wg.Wait()
	got := f.node(t, "tainted")
	got.Spec.Taints = slices.DeleteFunc(got.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeNotReady }) // admission's
	if diff := cmp.Diff([]corev1.Taint{other}, got.Spec.Taints); err != nil || !removed || diff != "" || got.Labels["n"] != "29" {
		t.Errorf("removed %v, %v, labels %v, taints (-want +got)\n%s", removed, err, got.Labels, diff)
	}
	if removed, err := n.RemoveTaint(t.Context(), key); err != nil || removed {
		t.Errorf("the second time: %v, %v", removed, err)
	}
}

// condition: it is set beside the kubelet's, and its transition is that of its status.
func (f fixture) condition(t *testing.T) {
	made, err := f.Client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "conditioned"}}, metav1.CreateOptions{})
	must(t, "create node", err)
	made.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	_, err = f.Client.CoreV1().Nodes().UpdateStatus(t.Context(), made, metav1.UpdateOptions{})
	must(t, "update status", err)
	n := f.ofNode(t, "conditioned")
	ours := func() corev1.NodeCondition {
		t.Helper()
		conditions := f.node(t, "conditioned").Status.Conditions
		if len(conditions) != 2 {
			t.Fatalf("the node has %v", conditions)
		}
		for _, c := range conditions {
			if c.Type == kube.ConditionReady {
				return c
			}
		}
		t.Fatal("the condition is not there")
		return corev1.NodeCondition{}
	}
	must(t, "SetReady", n.SetReady(t.Context(), false, "KernelLacks", "no dm-crypt"))
	bad := ours()
	if bad.Status != corev1.ConditionFalse || bad.Reason != "KernelLacks" || bad.Message != "no dm-crypt" {
		t.Errorf("the condition is %+v", bad)
	}
	must(t, "SetReady", n.SetReady(t.Context(), false, "KernelLacks", "no dm-crypt, still"))
	if c := ours(); c.LastTransitionTime != bad.LastTransitionTime || c.Message != "no dm-crypt, still" {
		t.Errorf("the condition is %+v", c)
	}
	must(t, "SetReady", n.SetReady(t.Context(), true, "Serving", ""))
	if c := ours(); c.Status != corev1.ConditionTrue {
		t.Errorf("the condition is %+v", c)
	}
	mustBe(t, "a node that is none", f.ofNode(t, "nowhere").SetReady(t.Context(), true, "Serving", ""), errdefs.ErrNotFound, "nowhere")
}
