package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// many is how many volumes one pod has when the power is cut.
const many = 20

// manyVolumes makes a pod with so many volumes, and waits for it.
func (t *tester) manyVolumes(ctx context.Context) (string, error) {
	begin := time.Now()
	class := "encrypted"
	grace := int64(1)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "many"}, Spec: corev1.PodSpec{
		TerminationGracePeriodSeconds: &grace, HostNetwork: true, AutomountServiceAccountToken: new(bool),
		Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Containers:  []corev1.Container{{Name: "c", Image: userImage, Command: []string{"sh", "-c", "trap exit TERM; sleep 1000000 & wait"}}},
	}}
	for i := range many {
		name := fmt.Sprintf("many-%d", i)
		_, err := t.client.CoreV1().PersistentVolumeClaims(user).Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: &class,
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("16Mi")}},
		}}, metav1.CreateOptions{})
		if err != nil {
			return "", err
		}
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}})
		pod.Spec.Containers[0].VolumeMounts = append(pod.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: name, MountPath: "/data/" + name})
	}
	if _, err := t.client.CoreV1().Pods(user).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return "", err
	}
	if err := t.running(ctx, "many"); err != nil {
		return "", err
	}
	took := time.Since(begin)
	_, err := t.sh(ctx, "many", "for d in /data/*; do echo $d > $d/file; done; sync")
	return fmt.Sprintf("made, staged and in the pod after %.1f s", took.Seconds()), err
}

// powerCut cuts the power of everything, control plane included, and gives it
// back. What is outside of the cluster stays: a KMS and its store.
func (t *tester) powerCut(ctx context.Context) (string, error) {
	pods, err := t.client.CoreV1().Pods(user).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	pods.Items = slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool { return p.DeletionTimestamp != nil })
	t.node.crash()
	t.lose()
	begin := time.Now()
	if err := t.restart(ctx); err != nil {
		return "", err
	}
	plane := time.Since(begin)
	if err := errors.Join(t.node.boot(), t.node.ready(ctx, begin)); err != nil {
		return "", err
	}
	detail := fmt.Sprintf("after the power came back: API server %.1f s, node ready %.1f s", plane.Seconds(), time.Since(begin).Seconds())
	for _, p := range pods.Items {
		if err := t.restarted(ctx, p.Name, begin); err != nil {
			return detail, err
		}
		if p.Name == "many" {
			detail += fmt.Sprintf(", pod with %d volumes %.1f s", many, time.Since(begin).Seconds())
		}
	}
	detail += fmt.Sprintf(", all %d pods %.1f s", len(pods.Items), time.Since(begin).Seconds())
	for _, p := range pods.Items {
		if p.Name == "many" {
			err = errors.Join(err, t.readsMany(ctx))
			continue
		}
		err = errors.Join(err, t.reads(ctx, want{name: p.Name, block: len(p.Spec.Containers[0].VolumeDevices) > 0}))
	}
	return detail, err
}

func (t *tester) readsMany(ctx context.Context) error {
	got, err := t.sh(ctx, "many", "for d in /data/*; do [ $(cat $d/file) = $d ] && grep -c \"^/dev/mapper/cryptcsi-[0-9a-f]* $d \" /proc/mounts; done | wc -l")
	if err == nil && strings.TrimSpace(got) != fmt.Sprint(many) {
		err = fmt.Errorf("%s of %d volumes have what was written", got, many)
	}
	return err
}

// restarted waits until a pod's container has started since a time.
func (t *tester) restarted(ctx context.Context, name string, since time.Time) error {
	// kubelet asks for a volume again after up to two minutes, more than once
	// where everything starts at once.
	return t.await(ctx, 2*patience, "pod "+name, func(ctx context.Context) error {
		p, err := t.client.CoreV1().Pods(user).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, s := range p.Status.ContainerStatuses {
			if r := s.State.Running; r != nil && r.StartedAt.After(since.Truncate(time.Second)) {
				return podReady(p)
			}
		}
		return fmt.Errorf("it has not started again\n%s", t.events(ctx, name))
	})
}
