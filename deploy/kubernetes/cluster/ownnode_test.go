package cluster_test

import (
	"errors"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/kube"
)

// TestOwnNode: with the startup taint a node's account does what package kube does
// with its own Node, and nothing else with any.
func TestOwnNode(t *testing.T) {
	const taint, account = "cryptcsi.io/agent-not-ready", "cryptcsi-node"
	c := start(t)
	c.apply(t, "../examples/startup-taint")
	nodes, ctx := c.Client.CoreV1().Nodes(), t.Context()
	for _, name := range []string{"node-1", "node-2"} {
		c.node(t, name)
		_, err := nodes.Patch(ctx, name, types.MergePatchType, []byte(`{"metadata":{"labels":{"zone":"a"}},
			"spec":{"taints":[{"key":"`+taint+`","effect":"NoSchedule"},{"key":"quarantine","effect":"NoExecute"}]}}`), metav1.PatchOptions{})
		must(t, "Node", err)
	}
	one := c.onNode(t, account, "node-1")
	k, err := kubernetes.NewForConfig(one)
	must(t, "client", err)
	patch := func(as kubernetes.Interface, name, text string) error {
		_, err := as.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, []byte(text), metav1.PatchOptions{})
		return err
	}
	// The API server takes a moment to know a policy.
	eventually(t, "policy at work", func() error {
		if err := patch(k, "node-2", `{"metadata":{"annotations":{"a":"b"}}}`); !policyDenied(err) {
			return errors.Join(errors.New("another node is not protected"), err)
		}
		return nil
	})

	unbound, err := kubernetes.NewForConfig(c.as(t, account))
	must(t, "client", err)
	for what, err := range map[string]error{
		"another's taint":            patch(k, "node-2", `{"spec":{"taints":null}}`),
		"a label of its own":         patch(k, "node-1", `{"metadata":{"labels":{"node-restriction.kubernetes.io/trusted":"yes"}}}`),
		"a label changed":            patch(k, "node-1", `{"metadata":{"labels":{"zone":"b"}}}`),
		"its quarantine":             patch(k, "node-1", `{"spec":{"taints":null}}`),
		"its quarantine alone":       patch(k, "node-1", `{"spec":{"taints":[{"key":"`+taint+`","effect":"NoSchedule"}]}}`),
		"a weaker quarantine":        patch(k, "node-1", `{"spec":{"taints":[{"key":"quarantine","effect":"PreferNoSchedule"}]}}`),
		"a taint more":               patch(k, "node-1", `{"spec":{"taints":[{"key":"quarantine","effect":"NoExecute"},{"key":"x","effect":"NoExecute"}]}}`),
		"cordon":                     patch(k, "node-1", `{"spec":{"unschedulable":true}}`),
		"by a token without a node":  patch(unbound, "node-1", `{"metadata":{"annotations":{"a":"b"}}}`),
		"the status of another node": condition(t, k, "node-2"),
	} {
		if !policyDenied(err) {
			t.Errorf("%s: %v", what, err)
		}
	}

	for name, own := range map[string]bool{"node-1": true, "node-2": false} {
		n, err := kube.NewNode(one, name)
		must(t, "NewNode", err)
		ready := n.SetReady(ctx, true, "Serving", "x")
		_, removed := n.RemoveTaint(ctx, taint)
		for _, err := range []error{ready, removed} {
			if own != (err == nil) || err != nil && !strings.Contains(err.Error(), "cryptcsi-own-node") {
				t.Errorf("%s: %v", name, err)
			}
		}
		got, err := nodes.Get(ctx, name, metav1.GetOptions{})
		must(t, "Node", err)
		if kept := got.Spec.Taints; own != (len(kept) == 1) || kept[len(kept)-1].Key != "quarantine" {
			t.Errorf("%s has the taints %v", name, kept)
		}
	}
	if err := patch(c.Client, "node-2", `{"metadata":{"labels":{"zone":"c"}},"spec":{"taints":null}}`); err != nil {
		t.Errorf("an administrator: %v", err)
	}
}

// policyDenied says whether it was the policy that refused.
func policyDenied(err error) bool {
	return apierrors.IsForbidden(err) && strings.Contains(err.Error(), "cryptcsi-own-node")
}

func condition(t *testing.T, k kubernetes.Interface, name string) error {
	t.Helper()
	_, err := k.CoreV1().Nodes().PatchStatus(t.Context(), name, []byte(`{"status":{"conditions":[{"type":"Ready","status":"False"}]}}`))
	return err
}

// onNode is how a pod of an account reaches the API server from a node.
func (c *cluster) onNode(t *testing.T, account, node string) *rest.Config {
	t.Helper()
	pod, err := c.Client.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-"}, Spec: corev1.PodSpec{
		NodeName: node, ServiceAccountName: account, Containers: []corev1.Container{{Name: "c", Image: "i"}},
	}}, metav1.CreateOptions{})
	must(t, "pod", err)
	r, err := c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}, metav1.CreateOptions{})
	must(t, "token", err)
	return &rest.Config{Host: c.URL, BearerToken: r.Status.Token, TLSClientConfig: rest.TLSClientConfig{CAFile: c.CAFile}, QPS: -1}
}
