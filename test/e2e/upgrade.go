package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	storagev1 "k8s.io/api/storage/v1"
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

// newer is a claim for what the build before this one does not know: a volume
// that gives back to the disk what is discarded.
func newer() want { return want{name: "newer", class: "encrypted-discard", size: "64Mi"} }

// downgrade goes back to the previous build while pods write, and forward
// again. What that build knows it serves; what it does not know it refuses, and
// touches nothing of it.
func (t *tester) downgrade(ctx context.Context) (string, error) {
	_, err := t.client.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{
		ObjectMeta: metav1.ObjectMeta{Name: newer().class}, Provisioner: driverName, Parameters: map[string]string{"cryptcsi.io/discard": "true"},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	if err := t.up(ctx, newer()); err != nil {
		return "", err
	}
	if _, err := t.sh(ctx, newer().name, "echo '"+marker+"' > /data/file && sync"); err != nil {
		return "", err
	}
	stop, err := t.writes(ctx, "files")
	if err != nil {
		return "", err
	}
	if err := errors.Join(t.applyPrevious(ctx), t.rolledOut(ctx)); err != nil {
		return "", err
	}
	var said string
	err = together(
		func() error { return t.returns(ctx, block()) },
		func() (err error) {
			said, err = t.refused(ctx, newer())
			return err
		})
	if err := errors.Join(err, t.apply(ctx, t.site.source("test/e2e/upgraded")), t.rolledOut(ctx)); err != nil {
		return said, err
	}
	if err := errors.Join(t.running(ctx, newer().name), t.reads(ctx, newer())); err != nil {
		return said, err
	}
	wrote, err := stop(ctx)
	return said + wrote, err
}

// refused makes a pod anew and returns the event that says why it does not get
// its volume. The volume's record must be as it was.
func (t *tester) refused(ctx context.Context, w want) (said string, err error) {
	v, err := t.volume(ctx, w.name)
	if err != nil {
		return "", err
	}
	before, err := t.record(ctx, v.Spec.CSI.VolumeHandle)
	if err != nil {
		return "", err
	}
	if err := errors.Join(t.down(ctx, w.name), t.pod(ctx, w)); err != nil {
		return "", err
	}
	said, err = t.says(ctx, w.name, "FailedMount", "record")
	if err != nil {
		return "", err
	}
	after, err := t.record(ctx, v.Spec.CSI.VolumeHandle)
	if err == nil && (before == "" || after != before) {
		err = fmt.Errorf("the record was %s and is %s", before, after)
	}
	return said, err
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
