package kube

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// ConditionReady of a Node says whether encrypted volumes can be used there.
const ConditionReady corev1.NodeConditionType = "EncryptedVolumesReady"

const nodeTimeout = 15 * time.Second // of one request

// Node changes what the API server shows of one node: a taint that keeps pods
// away until the plugin is there, and ConditionReady. The first needs the first
// of these rules, the second both:
//
//	rules:
//	- apiGroups: [""]
//	  resources: [nodes]
//	  verbs: [get, patch]
//	- apiGroups: [""]
//	  resources: [nodes/status]
//	  verbs: [patch]
//
// RBAC cannot say "its own node only": without the admission policy that
// deploy/kubernetes has, whoever has the account may change all of them, labels
// too. Errors are of errdefs' classes; every method can be called
// again after any of them.
type Node struct {
	nodes corev1client.NodeInterface
	name  string
}

// NewNode returns the Node of that name. It calls nobody.
func NewNode(config *rest.Config, name string) (*Node, error) {
	config = rest.CopyConfig(config)
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.Timeout = nodeTimeout
	core, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	return &Node{nodes: core.Nodes(), name: name}, nil
}

// RemoveTaint removes every taint with that key, and no other. False where there
// was none.
func (n *Node) RemoveTaint(ctx context.Context, key string) (bool, error) {
	return settled(ctx, "node "+n.name, func() (bool, error) { return n.tryRemove(ctx, key) })
}

// tryRemove is ErrConflict where the node was changed between reading and writing.
func (n *Node) tryRemove(ctx context.Context, key string) (bool, error) {
	node, err := n.get(ctx)
	if err != nil {
		return false, err
	}
	kept := slices.DeleteFunc(slices.Clone(node.Spec.Taints), func(t corev1.Taint) bool { return t.Key == key })
	if len(kept) == len(node.Spec.Taints) {
		return false, nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": node.UID, "resourceVersion": node.ResourceVersion}, // only if it still is that
		"spec":     map[string]any{"taints": kept},
	})
	if err != nil {
		return false, err
	}
	_, err = n.nodes.Patch(ctx, n.name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: ManagedBy})
	switch {
	case apierrors.IsConflict(err):
		return false, errdefs.Errorf(errdefs.ErrConflict, "node %s was changed", n.name)
	case err != nil:
		return false, asked(ctx, "patch nodes", err)
	}
	return true, nil
}

// SetReady sets ConditionReady, with a reason in one word and a message for people.
func (n *Node) SetReady(ctx context.Context, ready bool, reason, message string) error {
	node, err := n.get(ctx)
	if err != nil {
		return err
	}
	now := metav1.Now()
	c := corev1.NodeCondition{Type: ConditionReady, Status: corev1.ConditionFalse, Reason: reason, Message: message, LastHeartbeatTime: now, LastTransitionTime: now}
	if ready {
		c.Status = corev1.ConditionTrue
	}
	for _, old := range node.Status.Conditions {
		if old.Type == c.Type && old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{c}}})
	if err != nil {
		return err
	}
	if _, err := n.nodes.PatchStatus(ctx, n.name, patch); err != nil {
		return asked(ctx, "patch nodes/status", err)
	}
	return nil
}

func (n *Node) get(ctx context.Context) (*corev1.Node, error) {
	node, err := n.nodes.Get(ctx, n.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "there is no node %s in the cluster: is --node-name right?", n.name)
	}
	if err != nil {
		return nil, asked(ctx, "get nodes", err)
	}
	return node, nil
}
