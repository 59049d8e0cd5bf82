package cluster_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"

	"github.com/cryptcsi/cryptcsi/kube"
)

const (
	policy = "cryptcsi-uninstall"
	audit  = `{"spec":{"validationActions":["Audit"]}}`
	force  = `kubectl patch validatingadmissionpolicybinding ` + policy + ` --type=merge -p '` + audit + `'` // as docs/operations.md has it
)

// uninstalling is a cluster with cryptcsi in it, and csi-plugin's guard at work.
type uninstalling struct {
	*cluster
	objects []*unstructured.Unstructured
}

// TestUninstall: nothing of cryptcsi is deleted while there is an encrypted volume,
// however often it is tried, all of it when there is none, and all of it by force.
func TestUninstall(t *testing.T) {
	u := &uninstalling{cluster: start(t)}
	u.objects = u.apply(t, "../examples/hostpath")
	u.guard(t)
	t.Run("WhichVolumes", u.whichVolumes)
	t.Run("Refused", u.refused)
	t.Run("Everyday", u.everyday)
	t.Run("ManyVolumes", u.manyVolumes)
	t.Run("NoneLeft", u.noneLeft)
	t.Run("Forced", u.forced)
}

// guard runs, until the test ends, what csi-plugin's controller runs, as its account.
func (u *uninstalling) guard(t *testing.T) {
	t.Helper()
	g, err := kube.NewGuard(u.as(t, "cryptcsi-controller"), policy, slog.New(slog.NewTextHandler(t.Output(), nil)))
	must(t, "NewGuard", err)
	ctx, stop := context.WithCancel(klog.NewContext(context.Background(), logr.Discard()))
	var ended sync.WaitGroup
	for range 2 { // as there are two replicas
		ended.Go(func() { g.Run(ctx) })
	}
	t.Cleanup(func() { stop(); ended.Wait() })
}

// whichVolumes are encrypted: policy and guard agree about it, and so does the command
// of the documentation that lists them.
func (u *uninstalling) whichVolumes(t *testing.T) {
	list := documented(t, "## Uninstall", 2)[0]
	for name, v := range map[string]struct {
		change    func(*corev1.PersistentVolume)
		encrypted bool
	}{
		"of another driver": {func(*corev1.PersistentVolume) {}, false},
		"no attributes of ours": {func(v *corev1.PersistentVolume) {
			v.Spec.CSI.VolumeAttributes = map[string]string{"storage.kubernetes.io/csiProvisionerIdentity": "x"}
			v.Annotations = map[string]string{"pv.kubernetes.io/provisioned-by": "x"}
		}, false},
		"no CSI": {func(v *corev1.PersistentVolume) {
			v.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/x"}}
		}, false},
		"our mark": {encrypted, true},
		"another attribute of ours": {func(v *corev1.PersistentVolume) {
			v.Spec.CSI.VolumeAttributes = map[string]string{"a": "b", "cryptcsi.io/dek-id": "d/v"}
		}, true},
		"by hand, and noted": {func(v *corev1.PersistentVolume) { v.Annotations = map[string]string{kube.AnnotationFormatted: "x:1"} }, true},
	} {
		t.Run(name, func(t *testing.T) {
			u.volume(t, "pv", v.change)
			want := ""
			if v.encrypted {
				want = "pv <none>\n"
			}
			if got := (operator{u.cluster, t.TempDir()}).does(t, list); got != want {
				t.Errorf("what is left: %q, want %q", got, want)
			}
			if v.encrypted {
				eventually(t, "refusal", func() error { return refusedOver("pv", u.dry(t)) })
				u.held(t, true)
			} else {
				// One that is seen after this was.
				u.volume(t, "pv-last", encrypted)
				eventually(t, "refusal", func() error { return refusedOver("pv-last", u.dry(t)) })
				u.held(t, true)
				u.gone(t, "pv-last")
				eventually(t, "permission", func() error { return u.dry(t) })
				u.held(t, false)
			}
			u.gone(t, "pv")
			eventually(t, "permission", func() error { return u.dry(t) })
			u.held(t, false)
		})
	}
}

// refused: with a volume, every guarded object stays at the first try and at the
// second, and so do policy and binding.
func (u *uninstalling) refused(t *testing.T) {
	u.volume(t, "pv-1", encrypted)
	u.held(t, true)
	eventually(t, "refusal", func() error { return refusedOver("pv-1", u.dry(t)) })
	for range 2 {
		var stay, went []string
		for _, o := range u.objects {
			err := u.remove(t, o, metav1.DeleteOptions{})
			switch {
			case guarded(o):
				stay = append(stay, o.GetKind())
				if err := refusedOver("pv-1", err); err != nil {
					t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
				}
			case err != nil && !apierrors.IsNotFound(err):
				t.Errorf("%s %s is not deleted: %v", o.GetKind(), o.GetName(), err)
			default:
				went = append(went, o.GetKind())
			}
		}
		slices.Sort(went)
		want := []string{"ConfigMap", "Job", "StorageClass", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "VolumeSnapshotClass"}
		if got := slices.Compact(went); !slices.Equal(got, want) || len(stay) < 30 {
			t.Errorf("no refusal for %v, want it for all but %v; %d refused", got, want, len(stay))
		}
	}
	for _, kind := range []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"} {
		if o, err := u.get(t, kind); err != nil || o.GetDeletionTimestamp() == nil {
			t.Errorf("%s: %v, %v; want it on its way out, and there", kind, o, err)
		}
	}
}

// everyday: what controllers, the key service and an upgrade do is not disturbed.
func (u *uninstalling) everyday(t *testing.T) {
	u.apply(t, "../examples/hostpath")
	for name, labels := range map[string]map[string]string{
		// As the controllers label what they make of the objects' templates.
		"pod":     {"app.kubernetes.io/name": "cryptcsi", "app.kubernetes.io/component": "node"},
		"another": {},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: corev1.PodSpec{ServiceAccountName: "cryptcsi-node", Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
		_, err := u.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
		must(t, "pod", err)
		must(t, "delete a pod", u.Client.CoreV1().Pods(namespace).Delete(t.Context(), name, metav1.DeleteOptions{}))
	}
	service, err := kubernetes.NewForConfig(u.as(t, account))
	must(t, "client", err)
	_, err = service.CoreV1().Secrets(records).Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "record"}, Type: "cryptcsi.io/record"}, metav1.CreateOptions{})
	must(t, "record", err)
	must(t, "delete a record", service.CoreV1().Secrets(records).Delete(t.Context(), "record", metav1.DeleteOptions{}))
	for _, o := range u.objects {
		template, _, _ := unstructured.NestedStringMap(o.Object, "spec", "template", "metadata", "labels")
		job, _, _ := unstructured.NestedStringMap(o.Object, "spec", "jobTemplate", "metadata", "labels")
		for _, labels := range []map[string]string{template, job} {
			if labels["app.kubernetes.io/part-of"] != "" {
				t.Errorf("%s %s hands the guard's label on to what is made from it", o.GetKind(), o.GetName())
			}
		}
	}
}

// manyVolumes: a refusal does not take long.
func (u *uninstalling) manyVolumes(t *testing.T) {
	const n = 100
	for i := range n {
		u.volume(t, fmt.Sprintf("many-%d", i), encrypted)
	}
	begin := time.Now()
	for _, o := range u.objects {
		err := u.remove(t, o, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
		if guarded(o) && !apierrors.IsForbidden(err) {
			t.Errorf("with %d volumes %s %s: %v", n, o.GetKind(), o.GetName(), err)
		}
	}
	took := time.Since(begin)
	t.Logf("%d objects over %d volumes in %v", len(u.objects), n, took)
	if took > time.Minute {
		t.Errorf("refusals took %v", took)
	}
	for i := range n {
		u.gone(t, fmt.Sprintf("many-%d", i))
	}
}

// noneLeft: with the last volume policy and binding go, which were deleted before,
// and then nothing is in the way of the rest.
func (u *uninstalling) noneLeft(t *testing.T) {
	u.gone(t, "pv-1")
	for _, kind := range []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"} {
		eventually(t, "the end of the "+kind, func() error {
			if _, err := u.get(t, kind); !apierrors.IsNotFound(err) {
				return fmt.Errorf("it is there, %w", err)
			}
			return nil
		})
	}
	for _, o := range u.objects {
		if err := u.remove(t, o, metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}}); err != nil && !apierrors.IsNotFound(err) {
			t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// forced: the command of the documentation takes the guard away, with volumes.
func (u *uninstalling) forced(t *testing.T) {
	u.apply(t, "../examples/hostpath")
	u.volume(t, "pv-2", encrypted)
	u.held(t, true)
	eventually(t, "refusal", func() error { return refusedOver("pv-2", u.dry(t)) })
	bindings := u.Client.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
	_, err := bindings.Patch(t.Context(), policy, types.MergePatchType, []byte(audit), metav1.PatchOptions{})
	must(t, "force", err)
	u.held(t, false)
	eventually(t, "permission", func() error { return u.dry(t) })
	for _, o := range u.objects {
		must(t, "delete "+o.GetKind()+" "+o.GetName(), u.remove(t, o, metav1.DeleteOptions{}))
	}
	for _, o := range u.objects {
		got, err := u.to(t, o).Get(t.Context(), o.GetName(), metav1.GetOptions{})
		if o.GetKind() == "Namespace" && err == nil && got.GetDeletionTimestamp() != nil {
			continue // whose end is a controller's work, and there is none
		}
		if !apierrors.IsNotFound(err) {
			t.Errorf("%s %s is left: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

func guarded(o *unstructured.Unstructured) bool {
	return o.GetLabels()["app.kubernetes.io/part-of"] == "cryptcsi"
}

func encrypted(v *corev1.PersistentVolume) {
	v.Spec.CSI.VolumeAttributes = map[string]string{"cryptcsi.io/encrypted": "1"}
}

func (u *uninstalling) volume(t *testing.T, name string, change func(*corev1.PersistentVolume)) {
	t.Helper()
	v := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
		Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: name}},
	}}
	change(v)
	_, err := u.Client.CoreV1().PersistentVolumes().Create(t.Context(), v, metav1.CreateOptions{})
	must(t, "PersistentVolume", err)
}

// gone deletes a volume; Kubernetes' own finalizer is a controller's matter, and there
// is none.
func (u *uninstalling) gone(t *testing.T, name string) {
	t.Helper()
	volumes := u.Client.CoreV1().PersistentVolumes()
	_, err := volumes.Patch(t.Context(), name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	must(t, "finalizers", err)
	must(t, "delete", volumes.Delete(t.Context(), name, metav1.DeleteOptions{}))
}

// dry asks whether a guarded object could be deleted.
func (u *uninstalling) dry(t *testing.T) error {
	t.Helper()
	return u.Client.AppsV1().DaemonSets(namespace).Delete(t.Context(), "cryptcsi-node", metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}})
}

// refusedOver is nil if an error is the refusal that names a volume and what to do.
func refusedOver(volume string, err error) error {
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "PersistentVolume "+volume+" is encrypted") || !strings.Contains(err.Error(), force) {
		return fmt.Errorf("the answer is %w", err)
	}
	return nil
}

// held waits until policy and binding have the finalizer, or have it no more.
func (u *uninstalling) held(t *testing.T, want bool) {
	t.Helper()
	for _, kind := range []string{"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"} {
		eventually(t, "finalizer", func() error {
			o, err := u.get(t, kind)
			if err == nil && slices.Contains(o.GetFinalizers(), kube.FinalizerVolumes) != want {
				err = fmt.Errorf("%s has the finalizers %v", kind, o.GetFinalizers())
			}
			return err
		})
	}
}

func (u *uninstalling) get(t *testing.T, kind string) (*unstructured.Unstructured, error) {
	t.Helper()
	o := &unstructured.Unstructured{}
	o.SetAPIVersion("admissionregistration.k8s.io/v1")
	o.SetKind(kind)
	return u.to(t, o).Get(t.Context(), policy, metav1.GetOptions{})
}

func (u *uninstalling) remove(t *testing.T, o *unstructured.Unstructured, options metav1.DeleteOptions) error {
	t.Helper()
	background := metav1.DeletePropagationBackground // as kubectl does
	options.PropagationPolicy = &background
	return u.to(t, o).Delete(t.Context(), o.GetName(), options)
}
