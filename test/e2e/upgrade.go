package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// previousTag is the tag of the images of the build before this one.
const previousTag = "previous"

// previous is a folder with the tree of the build before this one, and its
// programs in bin; test/install.sh e2e-previous makes it.
func (s site) previous() string { return filepath.Join(s.bin, "../.tools/previous") }

// upgrade replaces the previous build by this one while pods write.
func (t *tester) upgrade(ctx context.Context) (string, error) {
	stop, err := t.writes(ctx, "files")
	if err != nil {
		return "", err
	}
	if err := errors.Join(t.apply(ctx, t.site.source("test/e2e/upgraded")), t.rolledOut(ctx)); err != nil {
		return "", err
	}
	return stop(ctx)
}

// rolledOut waits until all pods of cryptcsi are of what was applied last.
func (t *tester) rolledOut(ctx context.Context) error {
	err := t.await(ctx, patience, "the new pods", func(ctx context.Context) error {
		deployments, err := t.client.AppsV1().Deployments(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, d := range deployments.Items {
			if s := d.Status; s.ObservedGeneration < d.Generation || s.UpdatedReplicas != *d.Spec.Replicas || s.AvailableReplicas != *d.Spec.Replicas || s.Replicas != *d.Spec.Replicas {
				return fmt.Errorf("%s: %d pods, %d of them new, %d available; want %d", d.Name, s.Replicas, s.UpdatedReplicas, s.AvailableReplicas, *d.Spec.Replicas)
			}
		}
		sets, err := t.client.AppsV1().DaemonSets(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, d := range sets.Items {
			if s := d.Status; s.ObservedGeneration < d.Generation || s.UpdatedNumberScheduled != s.DesiredNumberScheduled || s.NumberAvailable != s.DesiredNumberScheduled {
				return fmt.Errorf("%s: %d of %d pods are new, %d available", d.Name, s.UpdatedNumberScheduled, s.DesiredNumberScheduled, s.NumberAvailable)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return errors.Join(t.installed(ctx, namespace, 3), t.registered(ctx, driverName))
}
