package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// uninstall tries to delete cryptcsi with volumes and without.
func (t *tester) uninstall(ctx context.Context, o options) (string, error) {
	dir := "test/e2e/cluster"
	if o.upgrades() {
		dir = "test/e2e/upgraded" // what was applied last
	}
	remove := []string{"delete", "-k", t.site.source(dir), "--ignore-not-found"}
	var said string
	for range 2 { // policies do not guard themselves
		_, err := t.kubectl(ctx, remove...)
		if said, err = refusals(err); err != nil {
			return "", err
		}
	}
	if !strings.Contains(said, "PersistentVolume pvc-") { // one of several
		return "", fmt.Errorf("no volume is named: %s", said)
	}
	if err := errors.Join(t.reads(ctx, filesystem()), t.installed(ctx, namespace, 3)); err != nil {
		return "", fmt.Errorf("after the refusal: %w", err)
	}
	begin := time.Now()
	if err := t.noVolumes(ctx); err != nil {
		return "", err
	}
	empty := time.Since(begin)
	begin = time.Now()
	if _, err := t.kubectl(ctx, remove...); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s\nwithout volumes, %.0f s later: all is gone in %.0f s", said, empty.Seconds(), time.Since(begin).Seconds()), t.nothingLeft(ctx)
}

// refusals counts those that kubectl has printed, and quotes one.
func refusals(err error) (string, error) {
	if err == nil {
		return "", errors.New("nothing was refused")
	}
	n, one := 0, ""
	for line := range strings.Lines(err.Error()) {
		_, refused, ok := strings.Cut(line, `daemonsets.apps "cryptcsi-node" is forbidden: `)
		if ok {
			one = strings.TrimSpace(refused)
		}
		if strings.Contains(line, " is forbidden: ValidatingAdmissionPolicy 'cryptcsi-uninstall'") {
			n++
		}
	}
	if n < 25 || one == "" {
		return "", fmt.Errorf("%d refusals: %w", n, err)
	}
	return fmt.Sprintf("%d refusals: %s", n, one), nil
}

// noVolumes deletes what users have, and waits until no volume of ours is left and
// the policy that was deleted is gone with the last.
func (t *tester) noVolumes(ctx context.Context) error {
	for _, what := range []string{"volumesnapshots", "pods", "pvc"} {
		if _, err := t.kubectl(ctx, "delete", what, "--all", "-n", user); err != nil {
			return err
		}
	}
	return t.await(ctx, patience, "the end of the volumes", func(ctx context.Context) error {
		volumes, err := t.client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, v := range volumes.Items {
			if v.Spec.CSI != nil && v.Spec.CSI.VolumeAttributes["cryptcsi.io/encrypted"] != "" {
				return fmt.Errorf("PersistentVolume %s is there, %s", v.Name, v.Status.Phase)
			}
		}
		_, err = t.client.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(ctx, "cryptcsi-uninstall", metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("the policy is still there, %w", err)
		}
		return nil
	})
}

// ours matches the names of our objects among all.
var ours = regexp.MustCompile(`/cryptcsi|` + regexp.QuoteMeta(driverName))

// nothingLeft looks through all objects that there are.
func (t *tester) nothingLeft(ctx context.Context) error {
	kinds, err := t.kubectl(ctx, "api-resources", "--verbs=list", "-o", "name")
	if err != nil {
		return err
	}
	all := strings.Fields(kinds)
	all = slices.DeleteFunc(all, func(kind string) bool { // kubectl warns of these
		return kind == "componentstatuses" || kind == "endpoints"
	})
	list := []string{"get", strings.Join(all, ","), "-A", "-o", "name", "--ignore-not-found"}
	named, err := t.kubectl(ctx, list...)
	if err != nil {
		return err
	}
	left, err := t.kubectl(ctx, append(list, "-l", "app.kubernetes.io/part-of=cryptcsi")...)
	if err != nil {
		return err
	}
	for name := range strings.Lines(named) {
		if ours.MatchString(name) && !strings.HasPrefix(name, "event") { // which go by themselves
			left += name
		}
	}
	if left != "" || !strings.Contains(named, "/"+nodeName) {
		return fmt.Errorf("of %d objects these are left: %s", strings.Count(named, "\n"), left)
	}
	n, err := t.client.StorageV1().CSINodes().Get(ctx, nodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, d := range n.Spec.Drivers {
		if d.Name == driverName {
			return errors.New("kubelet still knows the driver")
		}
	}
	return nil
}
