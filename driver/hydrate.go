package driver

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
)

// Hydration is what the driver needs of a Mapper to bring the volumes of layout
// dek.LayoutClone to their end, while pods use them. All methods are safe for
// concurrent use.
type Hydration interface {
	// List is Mapper's.
	List() ([]Mapping, error)
	// Hydrate lets the kernel write what was never written, in the background,
	// or has it pause. nil where nothing is to be written, or no mapping is.
	Hydrate(name string, on bool) error
	// Finish makes a mapping whose regions are all hydrated an ordinary one,
	// under its users, and then notes in the header that it is. ErrUnavailable
	// while regions are missing; where it was done before, nothing happens. What
	// it returns as Header is to be confirmed: until then a header from before
	// could be brought back.
	Finish(ctx context.Context, v Volume, d dek.DEK) (Mapping, error)
}

// How background hydration makes way for the pod. It runs once nothing was
// asked of the volume for a while, and pauses when something is. A volume that
// is never idle gets bursts nevertheless, so that it comes to its end. A burst
// is taken for twice as long as it ran, because what it began goes on for a
// while, and pauses follow it until a twentieth of the time was its. One that
// ran for longer than it should, because the CPU was kept from us, is followed
// by a longer pause.
const (
	runningTick    = 10 * time.Millisecond  // how often the volumes are looked at while one hydrates
	pausedTick     = 100 * time.Millisecond // and while none does
	hydrationIdle  = 300 * time.Millisecond
	hydrationBurst = 2 * runningTick
	hydrationShare = 20
	longestPause   = time.Minute
	progressPeriod = time.Second      // how often their progress is
	scanPeriod     = 10 * time.Second // how often it is tried to find them
)

// defaultHydrating is how many volumes hydrate at once.
const defaultHydrating = 2

// HydrationStatus is what the hydrator is doing.
type HydrationStatus struct {
	Running   int   // volumes that are written in the background just now
	Paused    int   // volumes that make way for their pods, or for other volumes
	Finishing int   // volumes that are written in full, and not yet finished
	Failed    int   // volumes whose disk failed, see Mapping
	Remaining int64 // bytes not written yet, of all of them
	Written   int64 // bytes written since the process started
}

// hydrator brings volumes of layout dek.LayoutClone to their end.
type hydrator struct {
	*Driver
	woken chan struct{}
	ended sync.WaitGroup // finishing volumes

	mu      sync.Mutex
	volumes map[string]*hydrating // by volume ID
	written int64
}

// hydrating is one volume on its way.
type hydrating struct {
	v     volume
	m     Mapping
	began time.Time // seen for the first time

	on         bool
	seen       Activity
	busyAt     time.Time // when the volume was last seen to be in use
	onAt       time.Time // since when it runs
	offAt      time.Time // since when it pauses
	burstUntil time.Time
	burstAgain time.Time // not before

	finishing bool
	retryAt   time.Time
	failures  int
}

func newHydrator(d *Driver) *hydrator {
	return &hydrator{Driver: d, woken: make(chan struct{}, 1), volumes: map[string]*hydrating{}}
}

// full says that nothing is left to be written.
func (h *hydrating) full() bool { return h.m.Hydrated == h.m.Regions }

// Hydrate lets volumes hydrate and finishes them, until ctx ends; then it
// pauses them all. It takes over whatever an earlier process left, and looks at
// the kernel's tables only while there is something to hydrate. It returns at
// once where the Config has no Hydration.
func (d *Driver) Hydrate(ctx context.Context) {
	if d.cfg.Hydration == nil {
		return
	}
	defer d.initialiser.stopAll()
	h := d.hydrator
	h.wake()
	timer := time.NewTimer(0)
	defer timer.Stop()
	looked := time.Time{}
	for {
		var err error
		select {
		case <-ctx.Done():
			h.pauseAll()
			h.ended.Wait()
			return
		case <-h.woken:
			err = h.scan(ctx)
		case <-timer.C:
			if time.Since(looked) >= progressPeriod {
				looked = time.Now()
				err = h.look(ctx)
			}
		}
		if err != nil {
			h.log.ErrorContext(ctx, "looking for volumes to hydrate", "error", err)
			time.AfterFunc(scanPeriod, h.wake)
		}
		timer.Stop()
		if next := h.round(ctx, time.Now()); next > 0 {
			timer.Reset(next)
		}
	}
}

// wake has the hydrator look at all volumes: one may have come or grown.
func (h *hydrator) wake() {
	if h == nil {
		return
	}
	select {
	case h.woken <- struct{}{}:
	default:
	}
}

// scan finds the volumes of this driver on this node that hydrate or have to
// be finished.
func (h *hydrator) scan(ctx context.Context) error {
	all, err := h.Inspect(ctx)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	found := map[string]bool{}
	for _, info := range all {
		v, err := h.volume(info.VolumeID)
		ours := err == nil && info.Driver == h.name && (info.State == StateStaged || info.State == StateSuspended)
		if !ours || info.Regions == 0 && !info.Finishing && !info.Failed {
			continue
		}
		found[v.id] = true
		if known := h.volumes[v.id]; known != nil && known.m.Number == info.Number {
			h.progress(ctx, known, info.Mapping)
			continue
		}
		now := time.Now()
		e := &hydrating{v: v, m: info.Mapping, began: now, on: info.Hydrating, onAt: now, offAt: now, burstAgain: now.Add(pauseAfter(hydrationBurst))}
		h.volumes[v.id] = e
		if info.Failed {
			e.m.Failed = false // which is said
			h.progress(ctx, e, info.Mapping)
			continue
		}
		h.log.InfoContext(ctx, "hydrating", "volume_id", v.id, "mapping", info.Name, "hydrated", info.Hydrated, "regions", info.Regions)
	}
	for id, e := range h.volumes {
		if !found[id] && !e.finishing {
			delete(h.volumes, id)
		}
	}
	return nil
}

// look updates the progress of the volumes that are known.
func (h *hydrator) look(ctx context.Context) error {
	all, err := h.cfg.Hydration.List()
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, e := range h.volumes {
		i := slices.IndexFunc(all, func(m Mapping) bool { return m.Number == e.m.Number && m.Name == e.m.Name })
		switch {
		case i >= 0:
			h.progress(ctx, e, all[i])
		case !e.finishing: // unstaged
			delete(h.volumes, id)
		}
	}
	return nil
}

// progress notes how far a volume is now. One that failed may not say it: it
// stays where it was, and is left alone until it is staged again.
func (h *hydrator) progress(ctx context.Context, e *hydrating, m Mapping) {
	if m.Failed {
		if !e.m.Failed {
			h.log.ErrorContext(ctx, "a volume does not hydrate any more: "+failedText, "volume_id", e.v.id, "mapping", m.Name)
			h.tellFailed(e)
		}
		e.m.Failed, e.on = true, false
		return
	}
	if m.Regions == e.m.Regions && m.Hydrated > e.m.Hydrated {
		h.written += left(e.m) - left(m)
	}
	e.m, e.on = m, m.Hydrating
}

// left is how many bytes of a mapping are not written yet.
func left(m Mapping) int64 {
	if m.Regions == 0 {
		return 0
	}
	return int64(float64(m.Size) * float64(m.Regions-m.Hydrated) / float64(m.Regions))
}

// round starts, pauses and finishes what it is time for. It returns when the
// next round is due, 0 for not before somebody wakes the hydrator.
func (h *hydrator) round(ctx context.Context, now time.Time) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	var pending []*hydrating
	for _, e := range h.volumes {
		switch {
		case e.m.Failed:
		case e.full():
			h.tryFinish(ctx, e, now)
		default:
			pending = append(pending, e)
		}
	}
	switch running := h.pace(ctx, pending, now); {
	case running > 0:
		return runningTick
	case len(pending) > 0:
		return pausedTick
	case len(h.volumes) > 0:
		return progressPeriod
	}
	return 0
}

// pace lets the volumes hydrate that may, as many at once as the node is to
// have; those that have waited longest come first, and one that runs goes on. It
// returns how many do.
func (h *hydrator) pace(ctx context.Context, pending []*hydrating, now time.Time) (running int) {
	slices.SortFunc(pending, func(a, b *hydrating) int {
		if a.on != b.on {
			return map[bool]int{true: -1, false: 1}[a.on]
		}
		return cmp.Or(a.offAt.Compare(b.offAt), cmp.Compare(a.v.id, b.v.id))
	})
	for _, e := range pending {
		on := running < h.cfg.Hydrating && !e.m.Suspended && h.may(e, now)
		if on != e.on {
			h.set(ctx, e, on, now)
		}
		if e.on {
			running++
		}
	}
	return running
}

// may tells whether a volume should hydrate now: it is idle, or has paused for
// long enough.
func (h *hydrator) may(e *hydrating, now time.Time) bool {
	seen, err := h.cfg.Devices.Activity(e.m.Number)
	if err != nil { // it is being closed
		return false
	}
	if seen != e.seen || seen.InFlight > 0 {
		e.seen, e.busyAt = seen, now
	}
	if now.Sub(e.busyAt) >= hydrationIdle || now.Before(e.burstUntil) {
		return true
	}
	if e.on || now.Before(e.burstAgain) {
		return false
	}
	e.burstUntil = now.Add(hydrationBurst)
	return true
}

func (h *hydrator) set(ctx context.Context, e *hydrating, on bool, now time.Time) {
	if err := h.cfg.Hydration.Hydrate(e.m.Name, on); err != nil {
		h.log.WarnContext(ctx, "hydration does not start or pause", "volume_id", e.v.id, "on", on, "error", err)
		return
	}
	e.on = on
	if on {
		e.onAt = now
		return
	}
	e.offAt = now
	ran := hydrationBurst
	if !e.burstUntil.Before(e.onAt) { // it was a burst, not idleness
		ran = max(ran, now.Sub(e.onAt))
	}
	e.burstAgain = now.Add(min(pauseAfter(ran), longestPause))
}

// pauseAfter is how long to pause after a burst that ran for so long.
func pauseAfter(ran time.Duration) time.Duration { return (hydrationShare - 1) * 2 * ran }

// pauseAll is done when the process ends: nobody would make way for the pods.
func (h *hydrator) pauseAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.volumes {
		if e.on {
			h.set(context.Background(), e, false, time.Now())
		}
	}
}

// HydrationStatus returns what is under way.
func (d *Driver) HydrationStatus() HydrationStatus {
	h := d.hydrator
	if h == nil {
		return HydrationStatus{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	s := HydrationStatus{Written: h.written}
	for _, e := range h.volumes {
		s.Remaining += left(e.m)
		switch {
		case e.m.Failed:
			s.Failed++
		case e.full():
			s.Finishing++
		case e.on:
			s.Running++
		default:
			s.Paused++
		}
	}
	return s
}
