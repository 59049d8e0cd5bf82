package kube_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const (
	keyService = "key-service" // a user with the ClusterRole of the package's documentation
	ebs        = "ebs.csi.aws.com"
	local      = "local.csi.example" // its CSIDriver says that it has no attach
	node1      = "node-1"
	node2      = "node-2"
)

// TestCluster is what the key service asks of a cluster, as a user who may
// only what the documentation says.
func TestCluster(t *testing.T) {
	noLeaks(t)
	f := fixture{peers.Kube(t)}
	f.AllowCluster(t, keyService, peers.DocumentedRules(t, "kube.go", "")...)
	f.nodes(t)
	f.createPV(t, pv("away", ebs, "vol-away"))
	f.createVA(t, va("away", ebs, node1, "away"))
	quick := f.followAll(t)
	t.Run("Attached", f.attached)
	t.Run("WithoutAttach", f.withoutAttach)
	t.Run("DetachCloses", f.detachCloses)
	t.Run("FreshAttachment", f.freshAttachment)
	t.Run("TooManyReads", f.tooManyReads)
	t.Run("StaleClaim", f.staleClaim)
	t.Run("Notes", f.notes)
	t.Run("NotesRace", f.notesRace)
	t.Run("NotesOfFreshVolume", f.notesOfFreshVolume)
	t.Run("Tokens", f.tokens)
	t.Run("TokenOfDeletedPod", f.tokenOfDeletedPod)
	t.Run("Permissions", f.permissions)
	t.Run("ServerAway", func(t *testing.T) { f.serverAway(t, quick) })
}

// noLeaks fails the test if something runs on when it has ended and all that
// it began from here on was stopped.
func noLeaks(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
}

const awayID = ebs + "/vol-away" // attached to node1 until serverAway

// steady are Attachments that must have answers all the time until stop is called.
type steady struct {
	*kube.Attachments
	stop func()
}

// followAll returns Attachments that follow the cluster with a staleness that
// is shorter than the tests are long.
func (f fixture) followAll(t *testing.T) steady {
	t.Helper()
	a := f.follow(t, f.config(t), kube.AttachmentsOptions{Staleness: 8 * time.Second})
	stop, stopped := make(chan struct{}), make(chan struct{})
	begun := time.Now()
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			if err := a.Allowed(t.Context(), node1, awayID); err != nil {
				t.Errorf("with a server, after %v: %v", time.Since(begun), err)
				<-stop
				return
			}
		}
	}()
	var once sync.Once
	s := steady{a, func() { once.Do(func() { close(stop); <-stopped }) }}
	t.Cleanup(s.stop)
	return s
}

func (f fixture) nodes(t *testing.T) {
	for name, zone := range map[string]string{node1: "a", node2: "b"} {
		_, err := f.Client.CoreV1().Nodes().Create(t.Context(), &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"zone": zone}},
		}, metav1.CreateOptions{})
		must(t, "create Node", err)
	}
	no := false
	_, err := f.Client.StorageV1().CSIDrivers().Create(t.Context(), &storagev1.CSIDriver{
		ObjectMeta: metav1.ObjectMeta{Name: local}, Spec: storagev1.CSIDriverSpec{AttachRequired: &no},
	}, metav1.CreateOptions{})
	must(t, "create CSIDriver", err)
}

// config is that of the key service.
func (f fixture) config(t *testing.T) *rest.Config { return f.configOf(t, keyService) }

// configOf has the certificate itself: files client-go watches for ever.
func (f fixture) configOf(t *testing.T, user string) *rest.Config {
	t.Helper()
	config, err := kube.Config(f.Kubeconfig(t, user), "")
	must(t, "Config", err)
	must(t, "LoadTLSFiles", rest.LoadTLSFiles(config))
	config.CertFile, config.KeyFile = "", ""
	return config
}

// clock is the time, which can be put forward.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) forward(d time.Duration) { c.ahead.Add(int64(d)) }

// follow returns Attachments that have heard from the API server.
func (f fixture) follow(t *testing.T, config *rest.Config, o kube.AttachmentsOptions) *kube.Attachments {
	t.Helper()
	a, err := kube.NewAttachments(config, o)
	must(t, "NewAttachments", err)
	run(t, a)
	within(t, 20*time.Second, "a listing of the cluster", a.HasSynced)
	return a
}

func run(t *testing.T, a *kube.Attachments) {
	ctx, cancel := context.WithCancel(klog.NewContext(t.Context(), logr.Discard()))
	ended := make(chan struct{})
	go func() { defer close(ended); a.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
}

// within fails the test unless something comes true in time, and returns how
// long it took.
func within(t *testing.T, limit time.Duration, what string, holds func() bool) time.Duration {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(100 * time.Microsecond) {
		took := time.Since(begun)
		if holds() {
			return took
		}
		if took > limit {
			t.Fatalf("waited %v for %s", limit, what)
		}
	}
}

// pv is a bound PersistentVolume "<driver>/<handle>" of that name.
func pv(name, driver, handle string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:    corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle},
			},
		},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound},
	}
}

func (f fixture) createPV(t *testing.T, pv *corev1.PersistentVolume) {
	t.Helper()
	made, err := f.Client.CoreV1().PersistentVolumes().Create(t.Context(), pv, metav1.CreateOptions{})
	must(t, "create PersistentVolume", err)
	made.Status = pv.Status
	_, err = f.Client.CoreV1().PersistentVolumes().UpdateStatus(t.Context(), made, metav1.UpdateOptions{})
	must(t, "update PersistentVolume", err)
}

// va attaches a PersistentVolume to a node, under a name as Kubernetes gives.
func va(name, attacher, node, volume string) *storagev1.VolumeAttachment {
	return &storagev1.VolumeAttachment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: storagev1.VolumeAttachmentSpec{
			Attacher: attacher, NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &volume},
		},
		Status: storagev1.VolumeAttachmentStatus{Attached: true},
	}
}

func (f fixture) createVA(t *testing.T, va *storagev1.VolumeAttachment) {
	t.Helper()
	made, err := f.Client.StorageV1().VolumeAttachments().Create(t.Context(), va, metav1.CreateOptions{})
	must(t, "create VolumeAttachment", err)
	if va.Status.Attached {
		made.Status = va.Status
		_, err = f.Client.StorageV1().VolumeAttachments().UpdateStatus(t.Context(), made, metav1.UpdateOptions{})
		must(t, "update VolumeAttachment", err)
	}
}

func (f fixture) deleteVA(t *testing.T, name string) {
	t.Helper()
	must(t, "delete VolumeAttachment", f.Client.StorageV1().VolumeAttachments().Delete(t.Context(), name, metav1.DeleteOptions{}))
}

func mustAllow(t *testing.T, what string, a *kube.Attachments, node string, id dek.ID) {
	t.Helper()
	must(t, what, a.Allowed(t.Context(), node, id))
}
