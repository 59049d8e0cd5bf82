package driver_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// told are the events that a driver told.
type told []driver.Event

func (t *told) Tell(e driver.Event) { *t = append(*t, e) }

// reasons returns those since the last call, and forgets them.
func (t *told) reasons() []string {
	var list []string
	for _, e := range *t {
		list = append(list, e.Reason)
	}
	*t = nil
	return list
}

// lockedKeys answer with an error while there is one.
type lockedKeys struct {
	driver.Keys
	err error
}

func (k *lockedKeys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	if k.err != nil {
		return dek.DEK{}, k.err
	}
	return k.Keys.GetDEK(ctx, id)
}

// A key that is out of reach is told after some minutes, and then now and then,
// and not at each of kubelet's tries; what a person has to look at is told at once.
func TestEventsOfRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, events := newMachine(t), &told{}
		keys := &lockedKeys{Keys: m.keys, err: errdefs.Errorf(errdefs.ErrUnavailable, "the key service does not answer")}
		m.cfg.Keys, m.cfg.Events = keys, events
		m.start()
		try := func(lasting, every time.Duration) {
			for end := time.Now().Add(lasting); time.Now().Before(end); time.Sleep(every) {
				if err := m.stage(mountCap("ext4")); err == nil {
					t.Error("staged without a key")
				}
			}
		}
		try(2*time.Minute, time.Second)
		if got := events.reasons(); got != nil {
			t.Errorf("told %v before two minutes are over", got)
		}
		try(5*time.Minute, time.Second)
		if len(*events) != 1 || !strings.HasPrefix((*events)[0].Message, "no key for 2 minutes") || !strings.Contains((*events)[0].Message, "does not answer") {
			t.Errorf("told after two minutes: %+v", *events)
		}
		events.reasons()
		try(time.Hour, 2*time.Minute)
		if got := events.reasons(); len(got) < 4 || len(got) > 7 {
			t.Errorf("told in an hour: %v", got)
		}
		for class, reason := range map[error]string{
			errdefs.ErrDenied: driver.ReasonKeyRefused, errdefs.ErrNotFound: driver.ReasonKeyMissing,
			errdefs.ErrCorrupt: driver.ReasonKeyDamaged, errdefs.ErrState: driver.ReasonRefused,
		} {
			keys.err = errdefs.Errorf(class, "no")
			try(time.Minute, time.Second)
			if diff := cmp.Diff([]string{reason}, events.reasons()); diff != "" {
				t.Errorf("%v (-want +got)\n%s", class, diff)
			}
		}
		// It was in reach meanwhile, so that it is out of reach anew.
		keys.err = errdefs.Errorf(errdefs.ErrUnavailable, "the key service does not answer")
		time.Sleep(time.Hour)
		try(time.Minute, time.Second)
		if got := events.reasons(); got != nil {
			t.Errorf("told %v within a minute", got)
		}
		keys.err = nil
		m.ok("stage", m.stage(mountCap("ext4")))
		if got := events.reasons(); got != nil {
			t.Errorf("told of a volume that is as it should be: %v", got)
		}
	})
}

// A new volume that hydrates says so once, and when it is done, to its pods too.
func TestEventsOfHydration(t *testing.T) {
	events := &told{}
	timed(t, func(m *machine) { m.cfg.Events = events }, func(m *machine) {
		if got := events.reasons(); !cmp.Equal(got, []string{driver.ReasonInitialising}) {
			m.t.Errorf("at first: %v", got)
		}
		m.ok("unstage", m.unstage())
		m.ok("stage", m.stage(blockCap()))
		m.ok("stage again", m.stage(blockCap()))
		publish := func(pod string, info map[string]string) {
			_, err := m.node.NodePublishVolume(m.t.Context(), &csi.NodePublishVolumeRequest{
				VolumeId: volumeID, StagingTargetPath: m.staging(), TargetPath: m.target(pod), VolumeCapability: blockCap(), VolumeContext: info,
			})
			m.ok("publish", err)
		}
		info := func(name string) map[string]string {
			return map[string]string{"csi.storage.k8s.io/pod.namespace": "ns", "csi.storage.k8s.io/pod.name": name, "csi.storage.k8s.io/pod.uid": "uid-" + name}
		}
		publish("a", info("a"))
		publish("a", info("a"))
		publish("b", info("b"))
		publish("c", nil)
		m.ok("unpublish", m.unpublish("a"))
		if got := events.reasons(); got != nil {
			m.t.Errorf("staged again: %v", got)
		}
		m.start() // another process knows the pods
		stop := m.hydrate()
		time.Sleep(2 * hydratesIn)
		stop()
		m.isFinished()
		want := []driver.Event{{Driver: "loop.cryptcsi.io", VolumeID: volumeID, Pods: []driver.Pod{{Namespace: "ns", Name: "b", UID: "uid-b"}}, Reason: driver.ReasonInitialised}}
		for i := range *events {
			(*events)[i].Message = ""
		}
		if diff := cmp.Diff(want, []driver.Event(*events)); diff != "" {
			m.t.Errorf("at the end (-want +got)\n%s", diff)
		}
	})
}
