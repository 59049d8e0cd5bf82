package driver

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	// initialisePatience is how long staging waits for a new volume with integrity
	// whose every sector has to be written first.
	initialisePatience = 10 * time.Second
	// initialisePiece is the deadline of one try in the background: what it says of
	// its progress is as old as that, and so long a worker goes on whose csi-plugin
	// was killed. Where it is too short to get anything done it doubles.
	initialisePiece = 30 * time.Second
)

// initialiser has the new volumes of this process that are initialised in the
// background, between calls. Its zero value has none.
type initialiser struct {
	mu      sync.Mutex
	volumes map[string]*initialising
}

// initialising is one of them. Nobody else works on its mapping meanwhile.
type initialising struct {
	want     intent
	cancel   context.CancelFunc
	ended    chan struct{}
	progress error // guarded by initialiser.mu; what came of the last try
}

// openNew opens the mapping, and waits a little where the volume is a new one that
// has to be written in full before. That goes on in the background when the call
// has ended: the same call tells how far it is, and opens the volume when all is
// done. Whoever unstages the volume ends it; what was done stays done.
func (s *staging) openNew(ctx context.Context) (Mapping, error) {
	if s.key.Spec.Integrity == dek.IntegrityNone || s.key.State != dek.Prepared || s.want.ReadOnly {
		return s.cfg.Mapper.Open(ctx, s.mapped(), s.key)
	}
	patient, cancel := context.WithTimeout(ctx, initialisePatience)
	defer cancel()
	m, err := s.cfg.Mapper.Open(patient, s.mapped(), s.key)
	if err == nil || ctx.Err() != nil || !cutShort(patient, m, err) {
		return m, err
	}
	s.initialiser.begin(ctx, s, err)
	return m, s.initialiser.said(s.v, s.want)
}

// cutShort tells whether Open failed for want of time alone.
func cutShort(ctx context.Context, m Mapping, err error) bool {
	return m.Unfinished || ctx.Err() != nil && errors.Is(err, context.DeadlineExceeded)
}

// said is ErrUnavailable while the volume is initialised for the same request. For
// another one it is nil: what was begun otherwise is torn down, which ends that too.
func (i *initialiser) said(v volume, want intent) error {
	i.mu.Lock()
	job := i.volumes[v.id]
	var progress error
	if job != nil {
		progress = job.progress
	}
	i.mu.Unlock()
	if job == nil || !job.want.equal(want) {
		return nil
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "volume %s is new, and every sector of it is written once before it can be used; this goes on in the background: %v", v.id, progress)
}

// begin goes on with what s has begun. The volume is locked.
func (i *initialiser) begin(ctx context.Context, s *staging, progress error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	job := &initialising{want: s.want, cancel: cancel, ended: make(chan struct{}), progress: progress}
	key := s.key
	key.Key, key.Previous = s.key.Key.Clone(), s.key.Previous.Clone()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.volumes == nil {
		i.volumes = map[string]*initialising{}
	}
	i.volumes[s.v.id] = job
	s.log.InfoContext(ctx, "initialising in the background", "volume_id", s.v.id, "dek_id", s.v.dek, "device", s.dev.Number)
	go func() {
		defer close(job.ended)
		defer cancel()
		defer key.Wipe()
		i.run(ctx, s.Driver, s.v, s.mapped(), key, job)
	}()
}

// run tries until all is done, or something is wrong that time does not mend: the
// next call sees that for itself.
func (i *initialiser) run(ctx context.Context, d *Driver, v volume, mapped Volume, key dek.DEK, job *initialising) {
	began, piece := time.Now(), initialisePiece
	for {
		within, cancel := context.WithTimeout(ctx, piece)
		m, err := d.cfg.Mapper.Open(within, mapped, key)
		goOn := err != nil && ctx.Err() == nil && cutShort(within, m, err)
		cancel()
		i.mu.Lock()
		if job.progress = err; !goOn {
			delete(i.volumes, v.id)
		}
		i.mu.Unlock()
		switch {
		case err == nil:
			d.log.InfoContext(ctx, "initialised", "volume_id", v.id, "mapping", m.Name, "took", time.Since(began))
			return
		case !goOn && ctx.Err() == nil:
			d.log.WarnContext(ctx, "initialising ended early; the next call goes on from there", "volume_id", v.id, "error", err)
			return
		case !goOn:
			return
		case !m.Unfinished:
			piece *= 2
		}
	}
}

// stop ends what is done to the volume, and waits for that, which is short.
func (i *initialiser) stop(id string) {
	i.mu.Lock()
	job := i.volumes[id]
	i.mu.Unlock()
	if job != nil {
		job.cancel()
		<-job.ended
	}
}

// stopAll ends all that is done.
func (i *initialiser) stopAll() {
	i.mu.Lock()
	all := slices.Collect(maps.Keys(i.volumes))
	i.mu.Unlock()
	for _, id := range all {
		i.stop(id)
	}
}
