package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestCluster: a node's taint stays until kubelet has registered the plugin, a
// node that lacks something says so, and what the driver tells reaches the claim.
func TestCluster(t *testing.T) {
	const taint = "cryptcsi.io/agent-not-ready"
	s := peers.Kube(t)
	nodes := s.Client.CoreV1().Nodes()
	for _, name := range []string{"node-1", "node-2"} {
		_, err := nodes.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: taint, Effect: corev1.TaintEffectNoSchedule}}}}, metav1.CreateOptions{})
		fatal(t, err)
	}
	// look returns whether the taint is there, and the condition.
	look := func(name string) (bool, corev1.NodeCondition) {
		n, err := nodes.Get(t.Context(), name, metav1.GetOptions{})
		fatal(t, err)
		i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == "EncryptedVolumesReady" })
		var condition corev1.NodeCondition
		if i >= 0 {
			condition = n.Status.Conditions[i]
		}
		return slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taint }), condition
	}
	open := func(name string) *cluster {
		f := kubernetesFlags{events: true, condition: true, taint: taint, config: s.Kubeconfig(t, peers.KubeAdmin)}
		c, err := f.open(name, slog.New(slog.DiscardHandler))
		fatal(t, err)
		return c
	}

	lacking := open("node-2")
	why := errors.New("this node cannot have encrypted volumes: no dm-crypt")
	if err := lacking.unfit(t.Context(), why); !errors.Is(err, why) {
		t.Errorf("the reason becomes %v", err)
	}
	if tainted, c := look("node-2"); !tainted || c.Status != corev1.ConditionFalse || !strings.Contains(c.Message, "no dm-crypt") {
		t.Errorf("a node that lacks something: tainted %v, %+v", tainted, c)
	}

	c := open("node-1")
	ctx, stop := context.WithCancel(t.Context())
	defer background(func() { c.run(ctx) })()
	defer stop()
	claim := &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: "default", Name: "data", UID: "u"}
	_, err := s.Client.CoreV1().PersistentVolumes().Create(t.Context(), &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{
		Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		ClaimRef: claim, PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "v"}},
	}}, metav1.CreateOptions{})
	fatal(t, err)
	c.driverEvents().Tell(driver.Event{Driver: "d", VolumeID: "v", Pods: []driver.Pod{{Namespace: "default", Name: "pod", UID: "p"}}, Warning: true, Reason: driver.ReasonRefused, Message: "not this disk"})
	eventually(t, "events on claim and pod", func() bool {
		list, err := s.Client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "reason=" + driver.ReasonRefused})
		fatal(t, err)
		return len(list.Items) == 2
	})
	if tainted, c := look("node-1"); !tainted || c.Status != "" {
		t.Errorf("before kubelet knows the plugin: tainted %v, %+v", tainted, c)
	}
	c.registered()
	c.registered()
	eventually(t, "a node that is ready", func() bool {
		tainted, c := look("node-1")
		return !tainted && c.Status == corev1.ConditionTrue
	})
}

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("there are no %s", what)
		}
	}
}
