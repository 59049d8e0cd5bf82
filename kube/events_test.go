package kube_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"

	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestNode is what csi-plugin asks of a cluster on a node, as users who may only
// what the documentation of each type says.
func TestNode(t *testing.T) {
	noLeaks(t)
	f := fixture{peers.Kube(t)}
	f.AllowCluster(t, "events", peers.DocumentedRules(t, "events.go", "Events")...)
	f.AllowCluster(t, "node", peers.DocumentedRules(t, "node.go", "Node")...)
	t.Run("Taint", f.taint)
	t.Run("Condition", f.condition)
	t.Run("Events", f.events)
	t.Run("EventsForbidden", f.eventsForbidden)
	t.Run("EventsWithoutServer", f.eventsWithoutServer)
}

// journal is a log that can be read meanwhile.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// tellers runs Events of a user until the test ends.
func (f fixture) tellers(t *testing.T, user string, log *journal) *kube.Events {
	t.Helper()
	e, err := kube.NewEvents(f.configOf(t, user), node1, slog.New(slog.NewTextHandler(log, nil)))
	must(t, "NewEvents", err)
	ctx, cancel := context.WithCancel(klog.NewContext(t.Context(), logr.Discard()))
	ended := make(chan struct{})
	go func() { defer close(ended); e.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return e
}

// eventsOf are the events of an object as kubectl describe asks for them.
func (f fixture) eventsOf(t *testing.T, namespace, kind, name, uid string) []corev1.Event {
	t.Helper()
	list, err := f.Client.CoreV1().Events(namespace).List(t.Context(), metav1.ListOptions{
		FieldSelector: fmt.Sprintf("involvedObject.kind=%s,involvedObject.name=%s,involvedObject.uid=%s", kind, name, uid),
	})
	must(t, "list events", err)
	return list.Items
}

func (f fixture) claimed(t *testing.T, name, handle, namespace string) {
	v := pv(name, ebs, handle)
	v.Spec.ClaimRef = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: namespace, Name: "data", UID: types.UID("claim-" + name)}
	f.createPV(t, v)
}

func (f fixture) events(t *testing.T) {
	log := &journal{}
	e := f.tellers(t, "events", log)
	ns := f.Namespace(t)
	f.claimed(t, "told", "vol-told", ns)
	long := strings.Repeat("é", 2000)
	e.Tell(kube.Event{Driver: ebs, VolumeID: "vol-told", Pods: []kube.Pod{{ns, "web-0", "pod-1"}}, Warning: true, Reason: "VolumeRefused", Message: "not this disk"})
	e.Tell(kube.Event{Driver: ebs, VolumeID: "vol-told", Reason: "Initialised", Message: long})
	for range 3 {
		e.Tell(kube.Event{Driver: ebs, VolumeID: "vol-told", Warning: true, Reason: "VolumeRefused", Message: "not this disk"})
	}
	ofClaim := func() []corev1.Event { return f.eventsOf(t, ns, "PersistentVolumeClaim", "data", "claim-told") }
	within(t, 20*time.Second, "an event that is counted up", func() bool {
		for _, ev := range ofClaim() {
			if ev.Count == 4 && ev.Type == corev1.EventTypeWarning && ev.Reason == "VolumeRefused" && ev.Message == "not this disk" && ev.Source.Host == node1 {
				return true
			}
		}
		return false
	})
	if got := ofClaim(); len(got) != 2 {
		t.Errorf("the claim has %d events: %v", len(got), got)
	}
	if got := f.eventsOf(t, ns, "Pod", "web-0", "pod-1"); len(got) != 1 || got[0].Message != "not this disk" {
		t.Errorf("the pod has %v", got)
	}
	for i := range 200 {
		e.Tell(kube.Event{Driver: ebs, VolumeID: "vol-told", Warning: true, Reason: "Flood", Message: fmt.Sprint(i)})
		time.Sleep(time.Millisecond) // not faster than Run takes them
	}
	e.Tell(kube.Event{Driver: ebs, VolumeID: "vol-told", Pods: []kube.Pod{{ns, "last", "pod-2"}}, Reason: "Last", Message: "m"})
	within(t, 20*time.Second, "the last event", func() bool { return len(f.eventsOf(t, ns, "Pod", "last", "pod-2")) == 1 })
	if n := len(ofClaim()); n > 25 {
		t.Errorf("a flood made %d events", n)
	}
	if strings.Contains(log.String(), "does not reach") {
		t.Error(log)
	}
}

// eventsForbidden: without permission nobody is told but the log, and nobody waits.
func (f fixture) eventsForbidden(t *testing.T) {
	log := &journal{}
	e := f.tellers(t, "nobody", log)
	e.Tell(kube.Event{Driver: ebs, VolumeID: "vol-told", Reason: "Reason", Message: "m"})
	within(t, 10*time.Second, "a word in the log", func() bool { return strings.Contains(log.String(), "list persistentvolumes") })
}

// eventsWithoutServer: where nothing takes events they are dropped, at once.
func (f fixture) eventsWithoutServer(t *testing.T) {
	log := &journal{}
	config := f.configOf(t, "events")
	config.Host = "https://127.0.0.1:1"
	e, err := kube.NewEvents(config, node1, slog.New(slog.NewTextHandler(log, nil)))
	must(t, "NewEvents", err)
	began := time.Now()
	for range 1000 {
		e.Tell(kube.Event{Driver: ebs, VolumeID: "v", Reason: "Reason", Message: "m"})
	}
	if took := time.Since(began); took > 5*time.Second || !strings.Contains(log.String(), "dropped") {
		t.Errorf("1000 events took %v; the log: %.300s", took, log)
	}
}
