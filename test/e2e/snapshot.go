package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// snapshot takes a snapshot of the claim files, waits until it can be used and
// looks for its own record.
func (t *tester) snapshot(ctx context.Context) (string, error) {
	group := schema.GroupVersion{Group: "snapshot.storage.k8s.io", Version: "v1"}
	object := func(kind, name string, more map[string]any) *unstructured.Unstructured {
		o := &unstructured.Unstructured{Object: more}
		o.SetGroupVersionKind(group.WithKind(kind))
		o.SetName(name)
		return o
	}
	snapshots := t.dynamic.Resource(group.WithResource("volumesnapshots")).Namespace(user)
	taken := object("VolumeSnapshot", "files", map[string]any{"spec": map[string]any{
		"volumeSnapshotClassName": "encrypted", "source": map[string]any{"persistentVolumeClaimName": "files"},
	}})
	if _, err := snapshots.Create(ctx, taken, metav1.CreateOptions{}); err != nil {
		return "", err
	}
	var content string
	err := t.await(ctx, patience, "the snapshot", func(ctx context.Context) error {
		s, err := snapshots.Get(ctx, "files", metav1.GetOptions{})
		if err != nil {
			return err
		}
		ready, _, _ := unstructured.NestedBool(s.Object, "status", "readyToUse")
		content, _, _ = unstructured.NestedString(s.Object, "status", "boundVolumeSnapshotContentName")
		if !ready {
			return fmt.Errorf("it is not ready: %v", s.Object["status"])
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	c, err := t.dynamic.Resource(group.WithResource("volumesnapshotcontents")).Get(ctx, content, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	handle, _, _ := unstructured.NestedString(c.Object, "status", "snapshotHandle")
	secrets, err := t.client.CoreV1().Secrets(records).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	id := `"snap:` + driverName + "/" + handle + `"`
	for _, s := range secrets.Items {
		for _, data := range s.Data {
			if strings.Contains(string(data), `"id": `+id) {
				return "its record is " + id, nil
			}
		}
	}
	return "", errors.New("there is no record of " + id)
}
