package main

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// startupTaint is what component startup-taint wants nodes to join with.
const startupTaint = "cryptcsi.io/agent-not-ready"

// taintAway looks whether a pod of somebody else has waited for the plugin on a node that joined
// with the taint, and whether the node says that it is ready.
func (t *tester) taintAway(ctx context.Context) (string, error) {
	var said string
	err := t.await(ctx, patience, "the node's condition", func(ctx context.Context) error {
		n, err := t.client.CoreV1().Nodes().Get(ctx, nodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, taint := range n.Spec.Taints {
			if taint.Key == startupTaint {
				return errors.New("the node has its taint still")
			}
		}
		for _, condition := range n.Status.Conditions {
			if condition.Type == "EncryptedVolumesReady" && condition.Status == corev1.ConditionTrue {
				said = condition.Message
				return nil
			}
		}
		return fmt.Errorf("the node does not say that it is ready: %v", n.Status.Conditions)
	})
	if err != nil {
		return "", err
	}
	plugin, err := t.component(ctx, "node")
	if err != nil {
		return "", err
	}
	other, err := t.client.CoreV1().Pods("kube-system").Get(ctx, "disks", metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	began := plugin.Status.ContainerStatuses[0].State.Running.StartedAt
	for _, condition := range other.Status.Conditions {
		if condition.Type == corev1.PodScheduled && condition.LastTransitionTime.Before(&began) {
			return "", fmt.Errorf("pod %s was given to the node at %v, and the plugin started at %v", other.Name, condition.LastTransitionTime, began)
		}
	}
	return said, nil
}

// component is the pod of one of our components, of which there is one.
func (t *tester) component(ctx context.Context, name string) (*corev1.Pod, error) {
	pods, err := t.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + name})
	if err != nil {
		return nil, err
	}
	if len(pods.Items) != 1 {
		return nil, fmt.Errorf("%d pods of component %s, want 1", len(pods.Items), name)
	}
	return &pods.Items[0], nil
}
