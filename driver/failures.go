package driver

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"
)

// A disk that fails says so many times.
const (
	damagePeriod = 5 * time.Second  // how often it is written down
	damageSilent = 10 * time.Minute // how often it is said
)

// Damage is what the kernel has reported of a volume since it was staged.
type Damage struct {
	Reports int       `json:"reports"` // of sectors that are not authentic; several may be about one, one about many
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
}

// String says it for people; "" where there is nothing to say.
func (d Damage) String() string {
	if d.Reports == 0 {
		return ""
	}
	return fmt.Sprintf("%d reports of sectors that are not authentic, the first at %s, the last at %s",
		d.Reports, d.First.UTC().Format(time.RFC3339), d.Last.UTC().Format(time.RFC3339))
}

// damaged is what one volume's damage comes to that is not written down yet. It
// goes with the staging that it is about.
type damaged struct {
	v       volume
	staged  time.Time
	pending Damage
	noted   time.Time
	said    time.Time
}

// WatchIntegrity notes what Config.Failures tells of this driver's volumes, in
// the log, in their state and in NodeGetVolumeStats, until ctx ends. It returns
// at once where there is no Config.Failures; ErrUnavailable where the kernel
// cannot be listened to.
func (d *Driver) WatchIntegrity(ctx context.Context) error {
	if d.cfg.Failures == nil {
		return nil
	}
	reports := make(chan string, 64) // more than the kernel makes in the time that one takes
	ended := make(chan error, 1)
	go func() {
		ended <- d.cfg.Failures(ctx, func(mapping string) {
			select {
			case reports <- mapping:
			default:
			}
		})
	}()
	volumes := map[string]*damaged{} // by mapping
	tick := time.NewTicker(damagePeriod)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			return err
		case mapping := <-reports:
			d.damage(ctx, volumes, mapping, time.Now())
		case now := <-tick.C:
			maps.DeleteFunc(volumes, func(_ string, e *damaged) bool { return !d.noteDamage(ctx, e, now) })
		}
	}
}

// damage takes one report. While a volume is being staged the kernel may read
// what was never written; a damaged one then fails to be staged.
func (d *Driver) damage(ctx context.Context, volumes map[string]*damaged, mapping string, now time.Time) {
	v, st := d.volumeOf(ctx, mapping)
	if st == nil {
		return
	}
	e := volumes[mapping]
	if e == nil || !e.staged.Equal(st.StagedAt) {
		e = &damaged{v: v, staged: st.StagedAt}
		volumes[mapping] = e
	}
	e.pending = e.pending.and(Damage{Reports: 1, First: now, Last: now})
	if d.cfg.ObserveFailure != nil {
		d.cfg.ObserveFailure()
	}
	if e.said.IsZero() || now.Sub(e.said) >= damageSilent {
		e.said = now
		d.log.ErrorContext(ctx, "the kernel has found sectors that are not authentic: the disk fails, or was changed by somebody else; reading them is an I/O error",
			"volume_id", e.v.id, "mapping", mapping)
		d.tell(v, st, true, ReasonDamaged, "sectors of the volume are not authentic: its disk fails, or was changed by somebody else; reading them is an I/O error; move the data to another volume, and restore what cannot be read")
	}
	d.noteDamage(ctx, e, now)
}

// and adds what was reported later.
func (d Damage) and(later Damage) Damage {
	if d.Reports == 0 {
		return later
	}
	return Damage{Reports: d.Reports + later.Reports, First: d.First, Last: later.Last}
}

// volumeOf finds the volume of this driver that is staged with that mapping; no
// state where there is none.
func (d *Driver) volumeOf(ctx context.Context, mapping string) (volume, *state) {
	states, unreadable := readStates(realDir(d.cfg.KubeletDir))
	i := slices.IndexFunc(states, func(st *state) bool {
		return st.Driver == d.name && st.Staged && MappingName(st.Driver, st.VolumeID) == mapping
	})
	if i < 0 {
		for _, err := range unreadable {
			d.log.ErrorContext(ctx, "looking for a damaged volume", "mapping", mapping, "error", err)
		}
		return volume{}, nil
	}
	v, err := d.volume(states[i].VolumeID)
	if err != nil {
		return volume{}, nil
	}
	return v, states[i]
}

// noteDamage writes down what is pending, unless that was done just now or a
// call works on the volume: then the next tick does. False where the volume was
// unstaged, and perhaps staged anew, which is as if it were another one.
func (d *Driver) noteDamage(ctx context.Context, e *damaged, now time.Time) (staged bool) {
	if now.Sub(e.noted) < damagePeriod {
		return true
	}
	unlock, err := d.locks.tryOwn(e.v.id)
	if err != nil {
		return true
	}
	defer unlock()
	st, err := d.load(e.v)
	if err == nil && (st == nil || !st.Staged || !st.StagedAt.Equal(e.staged)) {
		return false
	}
	if err == nil && e.pending.Reports > 0 {
		e.noted = now
		st.Damage = st.Damage.and(e.pending)
		err = d.save(e.v, *st)
	}
	if err != nil {
		d.log.ErrorContext(ctx, "noting a volume's damage", "volume_id", e.v.id, "error", err)
		return true
	}
	e.pending = Damage{}
	return true
}
