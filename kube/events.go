package kube

import (
	"context"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	eventQueue   = 256              // events that wait for the API server; more are dropped
	eventTimeout = 15 * time.Second // of one request
	claimsAge    = 10 * time.Minute // how long it is believed whose a volume is
	claimsPause  = 10 * time.Second // between two listings
	longestEvent = 1024             // bytes of a message that the API server takes
)

// Event is something that happened to a volume, for the PersistentVolumeClaim
// that it is bound to and for pods.
type Event struct {
	Driver, VolumeID string // as the PersistentVolume has them
	Pods             []Pod
	Warning          bool
	Reason           string // one word in CamelCase
	Message          string
}

// Pod names a pod.
type Pod struct{ Namespace, Name, UID string }

// Events makes Events of the API server. One that is repeated is counted up, and
// of those of one object there are at most 25 at once and then one in five
// minutes. It needs
//
//	rules:
//	- apiGroups: [""]
//	  resources: [events]
//	  verbs: [create, patch]
//	- apiGroups: [""]
//	  resources: [persistentvolumes]
//	  verbs: [list]
//
// and looks for a volume's claim only when there is something to tell of it.
type Events struct {
	core   corev1client.CoreV1Interface
	source corev1.EventSource
	log    *slog.Logger
	queue  chan Event

	claims map[string]*corev1.ObjectReference // by driver and volume ID; Run's
	listed time.Time
}

// NewEvents returns Events that are made by Run, in the name of a node. It calls
// nobody.
func NewEvents(config *rest.Config, node string, log *slog.Logger) (*Events, error) {
	config = rest.CopyConfig(config)
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	config.Timeout = eventTimeout
	core, err := corev1client.NewForConfig(config)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	return &Events{core: core, source: corev1.EventSource{Component: ManagedBy, Host: node}, log: log, queue: make(chan Event, eventQueue)}, nil
}

// Tell has the event made, some time and if possible. It returns at once.
func (e *Events) Tell(event Event) {
	select {
	case e.queue <- event:
	default:
		e.log.Warn("an event is dropped: the API server does not take them", "volume_id", event.VolumeID, "reason", event.Reason, "message", event.Message)
	}
}

// Run makes the events until ctx ends.
func (e *Events) Run(ctx context.Context) {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&corev1client.EventSinkImpl{Interface: e.core.Events("")})
	recorder := broadcaster.NewRecorder(runtime.NewScheme(), e.source)
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-e.queue:
			kind := corev1.EventTypeNormal
			if event.Warning {
				kind = corev1.EventTypeWarning
			}
			for _, about := range e.about(ctx, event) {
				recorder.Event(about, kind, event.Reason, cut(event.Message))
			}
		}
	}
}

// about returns what an event is shown at.
func (e *Events) about(ctx context.Context, event Event) []*corev1.ObjectReference {
	var list []*corev1.ObjectReference
	claim, err := e.claim(ctx, event)
	if err != nil {
		e.log.WarnContext(ctx, "an event does not reach the PersistentVolumeClaim", "volume_id", event.VolumeID, "reason", event.Reason, "error", err)
	}
	if claim != nil {
		list = append(list, claim)
	}
	for _, p := range event.Pods {
		list = append(list, &corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID)})
	}
	return list
}

// claim returns the PersistentVolumeClaim that a volume is bound to, nil for
// none. Volumes cannot be asked for by their ID, so all are listed, rarely and
// from the API server's memory; where it is not in there, which may be late, from
// its store.
func (e *Events) claim(ctx context.Context, event Event) (*corev1.ObjectReference, error) {
	key := event.Driver + "/" + event.VolumeID
	if claim := e.claims[key]; claim != nil && time.Since(e.listed) < claimsAge {
		return claim, nil
	}
	// What waits here meanwhile is answered by the same listing.
	select {
	case <-time.After(time.Until(e.listed.Add(claimsPause))):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	e.listed = time.Now()
	for _, from := range []string{"0", ""} {
		if err := e.list(ctx, event.Driver, from); err != nil {
			return e.claims[key], err
		}
		if claim := e.claims[key]; claim != nil {
			return claim, nil
		}
	}
	return nil, nil
}

// list reads the claims of a driver's volumes, at least as new as a version.
func (e *Events) list(ctx context.Context, driver, version string) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	volumes, err := e.core.PersistentVolumes().List(ctx, metav1.ListOptions{ResourceVersion: version})
	if err != nil {
		return asked(ctx, "list persistentvolumes", err)
	}
	e.claims = map[string]*corev1.ObjectReference{}
	for _, pv := range volumes.Items {
		if csi, ref := pv.Spec.CSI, pv.Spec.ClaimRef; csi != nil && ref != nil && csi.Driver == driver {
			e.claims[csi.Driver+"/"+csi.VolumeHandle] = &corev1.ObjectReference{
				Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: ref.Namespace, Name: ref.Name, UID: ref.UID,
			}
		}
	}
	return nil
}

// cut shortens a message to what an Event can have, at a character's border.
func cut(message string) string {
	const more = " …"
	if len(message) <= longestEvent {
		return message
	}
	return strings.ToValidUTF8(message[:longestEvent-len(more)], "") + more
}
