package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Events tells people what happens to their volumes, where they look. Tell
// returns at once, whatever becomes of the event.
type Events interface {
	Tell(e Event)
}

// Event is something that happened to a volume. Its message holds no secret.
type Event struct {
	Driver, VolumeID string
	Pods             []Pod // that use it on this node, as far as that is known
	Warning          bool
	Reason           string // one word, for programs
	Message          string
}

// Pod is a user of a volume.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
}

// The reasons of events.
const (
	ReasonKeyUnavailable = "KeyUnavailable"
	ReasonKeyRefused     = "KeyRefused"
	ReasonKeyMissing     = "KeyMissing"
	ReasonKeyDamaged     = "KeyRecordDamaged"
	ReasonWrongKey       = "WrongKey"
	ReasonRefused        = "VolumeRefused"
	ReasonDamaged        = "VolumeDamaged"
	ReasonInitialising   = "Initialising"
	ReasonInitialised    = "Initialised"
)

const (
	keyPatience = 2 * time.Minute  // for how long a key may be out of reach before that is told
	tellPeriod  = 10 * time.Minute // how often one reason is told of one volume
)

// teller tells events of volumes, and none for each repetition of a call. Its
// zero value is ready.
type teller struct {
	mu      sync.Mutex
	volumes map[string]*toldOf // by ID; gone when all is well
}

// toldOf is one volume that something is the matter with.
type toldOf struct {
	away time.Time            // since when its key is out of reach
	told map[string]time.Time // by reason
}

// of returns what is kept of a volume; the lock is held.
func (t *teller) of(volumeID string) *toldOf {
	if t.volumes == nil {
		t.volumes = map[string]*toldOf{}
	}
	of := t.volumes[volumeID]
	if of == nil {
		of = &toldOf{told: map[string]time.Time{}}
		t.volumes[volumeID] = of
	}
	return of
}

// may tells whether it is time to tell a reason of a volume, and takes it as told.
func (t *teller) may(volumeID, reason string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	of := t.of(volumeID)
	if last, ok := of.told[reason]; ok && now.Sub(last) < tellPeriod {
		return false
	}
	of.told[reason] = now
	return true
}

// away returns for how long the key of a volume has been out of reach.
func (t *teller) away(volumeID string, now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	of := t.of(volumeID)
	if of.away.IsZero() {
		of.away = now
	}
	return now.Sub(of.away)
}

// reached notes that the key of a volume is not out of reach.
func (t *teller) reached(volumeID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.of(volumeID).away = time.Time{}
}

// forget is for a volume with which all is well, or that has gone.
func (t *teller) forget(volumeID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.volumes, volumeID)
}

// tell tells it, unless there is nobody to tell or it was told just now. st, if
// not nil, knows the volume's pods.
func (d *Driver) tell(v volume, st *state, warning bool, reason, message string) {
	if d.cfg.Events == nil || !d.teller.may(v.id, reason, time.Now()) {
		return
	}
	e := Event{Driver: d.name, VolumeID: v.id, Warning: warning, Reason: reason, Message: message}
	if st != nil {
		for _, u := range st.Users {
			e.Pods = append(e.Pods, u.Pod)
		}
	}
	d.cfg.Events.Tell(e)
}

// tellFailed tells why a volume is not staged, where a person may have to do
// something. kubelet shows the error itself on the pod that waits.
func (s *staging) tellFailed(err error) {
	away := func() bool {
		return (s.at == "key" || s.at == "confirm") && (errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded))
	}
	if !away() {
		s.teller.reached(s.v.id)
	}
	warn := func(reason string) { s.tell(s.v, nil, true, reason, err.Error()) }
	switch {
	case away():
		if since := s.teller.away(s.v.id, time.Now()); since >= keyPatience {
			s.tell(s.v, nil, true, ReasonKeyUnavailable, fmt.Sprintf("no key for %d minutes, pods that need the volume wait: %v", since/time.Minute, err))
		}
	case errors.Is(err, errdefs.ErrCorrupt):
		warn(ReasonKeyDamaged)
	case errors.Is(err, errdefs.ErrDenied) && s.at == "key":
		warn(ReasonKeyRefused)
	case errors.Is(err, errdefs.ErrDenied):
		warn(ReasonWrongKey)
	case errors.Is(err, errdefs.ErrNotFound) && s.at == "key":
		warn(ReasonKeyMissing)
	case errors.Is(err, errdefs.ErrState):
		warn(ReasonRefused)
	}
}

// tellStaged tells of a new volume that can be used before all of it is written.
func (s *staging) tellStaged() {
	s.teller.forget(s.v.id)
	if s.formatted && s.m.Regions > 0 {
		s.tell(s.v, nil, false, ReasonInitialising, fmt.Sprintf("the volume is ready; %.1f GiB that were never written are initialised in the background while it is used", float64(left(s.m))/(1<<30)))
	}
}

// user is a pod that a volume is published to.
type user struct {
	Target string `json:"target"`
	Pod    Pod    `json:"pod"`
}

// podOf returns the pod that a volume is published to; false where kubelet does
// not say (podInfoOnMount in the CSIDriver).
func podOf(volumeContext map[string]string) (Pod, bool) {
	const prefix = "csi.storage.k8s.io/pod."
	p := Pod{Namespace: volumeContext[prefix+"namespace"], Name: volumeContext[prefix+"name"], UID: volumeContext[prefix+"uid"]}
	return p, p.Namespace != "" && p.Name != "" && p.UID != ""
}

// noteUser writes down which pod has the volume at target, nil for none: for
// events alone, so that it fails no call. The volume's lock is held.
func (d *Driver) noteUser(ctx context.Context, v volume, target string, pod *Pod) {
	st, err := d.load(v)
	if err != nil || st == nil {
		return // a call that needs the file says what is wrong with it
	}
	users := slices.DeleteFunc(slices.Clone(st.Users), func(u user) bool { return u.Target == target })
	if pod != nil {
		users = append(users, user{target, *pod})
	}
	if slices.Equal(users, st.Users) {
		return
	}
	st.Users = users
	if err := d.save(v, *st); err != nil {
		d.log.WarnContext(ctx, "the pods of a volume are not known, events do not reach them", "volume_id", v.id, "error", err)
	}
}
