package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	user     = metav1.NamespaceDefault
	patience = 5 * time.Minute // of a pod for its volumes, on a machine that others use too
)

// userImage is what pods of users run.
const userImage = "docker.io/library/busybox:1.36"

// tester is a user of the cluster, and who looks at what the user has.
type tester struct {
	*controlPlane
	node *guest
}

// want is a claim that a pod is to have.
type want struct {
	name, class, size string
	block             bool
	busy              bool // the pod writes all the time, until there is a file /data/idle
	source            *corev1.TypedLocalObjectReference
}

// claim makes a claim and does not wait for it.
func (t *tester) claim(ctx context.Context, w want) error {
	mode := corev1.PersistentVolumeFilesystem
	if w.block {
		mode = corev1.PersistentVolumeBlock
	}
	_, err := t.client.CoreV1().PersistentVolumeClaims(user).Create(ctx, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: w.name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: &w.class, VolumeMode: &mode, DataSource: w.source,
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(w.size)}},
		},
	}, metav1.CreateOptions{})
	return err
}

// pod makes a pod that has the claim of its name, at /data or as /dev/data, and
// does not wait for it. Its controller is nobody: it stays deleted.
func (t *tester) pod(ctx context.Context, w want) error {
	grace := int64(1)
	container := corev1.Container{Name: "c", Image: userImage, Command: []string{"sh", "-c", "trap exit TERM; sleep 1000000 & wait"}}
	if w.busy {
		container.Command[2] = "trap exit TERM; while [ ! -e /data/idle ]; do dd if=/dev/zero of=/data/busy bs=64k count=16 conv=notrunc,fsync 2> /dev/null; done & wait; sleep 1000000 & wait"
	}
	if w.block {
		container.VolumeDevices = []corev1.VolumeDevice{{Name: "data", DevicePath: "/dev/data"}}
	} else {
		container.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	}
	_, err := t.client.CoreV1().Pods(user).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: w.name}, Spec: corev1.PodSpec{
		TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{container},
		// Nothing that takes time and is not asked for.
		HostNetwork: true, AutomountServiceAccountToken: new(bool),
		// A node that is away for a while keeps its pods.
		Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: w.name},
		}}},
	}}, metav1.CreateOptions{})
	return err
}

// running waits until a user's pod is ready.
func (t *tester) running(ctx context.Context, name string) error {
	err := t.await(ctx, patience, "pod "+name, func(ctx context.Context) error {
		p, err := t.client.CoreV1().Pods(user).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		return podReady(p)
	})
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\n%s", err, t.events(ctx, name))
}

// events are what a person sees of a pod or claim: reasons and messages.
func (t *tester) events(ctx context.Context, name string) string {
	list, err := t.client.CoreV1().Events(user).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		return err.Error()
	}
	var text strings.Builder
	for _, e := range list.Items {
		fmt.Fprintf(&text, "%s %s: %s\n", e.Type, e.Reason, e.Message)
	}
	return text.String()
}

// says waits for an event of a pod or claim with that reason and those words,
// and returns it.
func (t *tester) says(ctx context.Context, name, reason, words string) (string, error) {
	var said string
	err := t.await(ctx, patience, "an event that says it", func(ctx context.Context) error {
		text := t.events(ctx, name)
		for line := range strings.Lines(text) {
			if strings.Contains(line, " "+reason+": ") && strings.Contains(line, words) {
				said = line
				return nil
			}
		}
		return errors.New(text)
	})
	return said, err
}

// up makes claims and a pod for each, and waits for the pods.
func (t *tester) up(ctx context.Context, wants ...want) error {
	for _, w := range wants {
		if err := errors.Join(t.claim(ctx, w), t.pod(ctx, w)); err != nil {
			return err
		}
	}
	for _, w := range wants {
		if err := t.running(ctx, w.name); err != nil {
			return err
		}
	}
	return nil
}

// down deletes a pod and waits until it is gone and its volume not attached any
// more.
func (t *tester) down(ctx context.Context, name string) error {
	if err := t.client.CoreV1().Pods(user).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	volume, err := t.volume(ctx, name)
	if err != nil {
		return err
	}
	return t.await(ctx, patience, "the end of pod "+name, func(ctx context.Context) error {
		if _, err := t.client.CoreV1().Pods(user).Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return errors.Join(errors.New("the pod is still there"), err)
		}
		attached, err := t.client.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, a := range attached.Items {
			if a.Spec.Source.PersistentVolumeName != nil && *a.Spec.Source.PersistentVolumeName == volume.Name {
				return errors.New("its volume is still attached")
			}
		}
		return nil
	})
}

// discard deletes pods and their claims, and does not wait for that.
func (t *tester) discard(ctx context.Context, names ...string) error {
	for _, name := range names {
		err := errors.Join(t.client.CoreV1().Pods(user).Delete(ctx, name, metav1.DeleteOptions{}), t.client.CoreV1().PersistentVolumeClaims(user).Delete(ctx, name, metav1.DeleteOptions{}))
		if err != nil {
			return err
		}
	}
	return nil
}

// again deletes a pod and makes it anew.
func (t *tester) again(ctx context.Context, w want) error {
	if err := errors.Join(t.down(ctx, w.name), t.pod(ctx, w)); err != nil {
		return err
	}
	return t.running(ctx, w.name)
}

// volume is the volume behind a claim.
func (t *tester) volume(ctx context.Context, claim string) (*corev1.PersistentVolume, error) {
	c, err := t.client.CoreV1().PersistentVolumeClaims(user).Get(ctx, claim, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return t.client.CoreV1().PersistentVolumes().Get(ctx, c.Spec.VolumeName, metav1.GetOptions{})
}

// sh runs a shell's line in a user's pod and returns what it printed.
func (t *tester) sh(ctx context.Context, pod, line string) (string, error) {
	out, err := t.kubectl(ctx, "exec", "-n", user, pod, "--", "sh", "-ec", line)
	return strings.TrimSpace(out), err
}

func (t *tester) kubectl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return command(ctx, append([]string{t.site.kub, "kubectl", "--kubeconfig=" + t.site.path("admin.kubeconfig")}, args...)...)
}

// dump writes what the cluster says of itself into the logs: objects, events and
// what containers have printed.
func (t *tester) dump(ctx context.Context, n int) {
	dir := filepath.Join(t.site.logs(), fmt.Sprintf("cluster-%d", n))
	if _, err := t.kubectl(ctx, "cluster-info", "dump", "--all-namespaces", "--output-directory="+dir); err != nil {
		fmt.Println(err)
	}
	objects, err := t.kubectl(ctx, "get", "pvc,pv,volumeattachments,csinodes,volumesnapshots", "-A", "-o", "yaml")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "volumes.yaml"), []byte(objects), 0o600)
	}
	if err != nil {
		fmt.Println(err)
	}
}

// record is the record of a volume's DEK as it lies in the store, empty if there
// is none.
func (t *tester) record(ctx context.Context, volumeID string) (string, error) {
	secrets, err := t.client.CoreV1().Secrets(records).List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	for _, s := range secrets.Items {
		for _, data := range s.Data {
			var r storedRecord
			if json.Unmarshal(data, &r) == nil && r.ID == driverName+"/"+volumeID {
				return string(data), nil
			}
		}
	}
	return "", nil
}

// scale sets how many replicas a deployment of ours has, and waits until so
// many are ready and no other pod is left.
func (t *tester) scale(ctx context.Context, deployment string, n int) error {
	if _, err := t.kubectl(ctx, "scale", "-n", namespace, "deployment/"+deployment, fmt.Sprintf("--replicas=%d", n)); err != nil {
		return err
	}
	return t.await(ctx, patience, deployment, func(ctx context.Context) error {
		pods, err := t.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + deployment})
		if err != nil {
			return err
		}
		if len(pods.Items) != n {
			return fmt.Errorf("%d pods, want %d", len(pods.Items), n)
		}
		for _, p := range pods.Items {
			if err := podReady(&p); err != nil {
				return err
			}
		}
		return nil
	})
}
