package driver

import (
	"context"
	"errors"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	// finishTime bounds the work on the mapping, which is a matter of
	// milliseconds on a device that answers.
	finishTime = 2 * time.Minute
	// A finish that failed is tried again after a second, and then after twice
	// as long each time, up to this.
	finishBackoff = 5 * time.Minute
)

// tryFinish finishes a volume in the background, unless that is under way or
// failed just now.
func (h *hydrator) tryFinish(ctx context.Context, e *hydrating, now time.Time) {
	if e.finishing || now.Before(e.retryAt) || ctx.Err() != nil || e.m.Suspended {
		return
	}
	finishing := 0
	for _, other := range h.volumes {
		if other.finishing {
			finishing++
		}
	}
	if finishing >= h.cfg.Hydrating {
		return
	}
	e.finishing = true
	h.ended.Go(func() {
		err := h.finish(ctx, e.v)
		h.finished(ctx, e, err)
		h.wake()
	})
}

// errUnstaged is why there was nothing to finish.
var errUnstaged = errdefs.Errorf(errdefs.ErrNotFound, "the volume is not staged on this node any more")

// finished notes how a finish ended.
func (h *hydrator) finished(ctx context.Context, e *hydrating, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e.finishing = false
	if errors.Is(err, errUnstaged) {
		delete(h.volumes, e.v.id)
		return
	}
	took := time.Since(e.began)
	if h.cfg.ObserveFinish != nil && ctx.Err() == nil {
		h.cfg.ObserveFinish(took, err)
	}
	if err == nil {
		delete(h.volumes, e.v.id)
		h.tellFinished(e)
		h.log.InfoContext(ctx, "hydrated", "volume_id", e.v.id, "mapping", e.m.Name, "bytes", e.m.Size, "took", took)
		return
	}
	wait := min(time.Second<<min(e.failures, 16), finishBackoff)
	e.failures++
	e.retryAt = time.Now().Add(wait)
	h.log.WarnContext(ctx, "a hydrated volume is not finished; it can be used as it is, and this is tried again",
		"volume_id", e.v.id, "mapping", e.m.Name, "again_in", wait, "error", err)
}

// tellFinished tells that a volume is initialised, to its pods too. Since when it
// could be used this process may not know.
func (h *hydrator) tellFinished(e *hydrating) {
	if st, err := h.load(e.v); err == nil && st != nil {
		h.tell(e.v, st, false, ReasonInitialised, "all of the volume is initialised")
	}
}

// tellFailed tells that a volume cannot be initialised, to its pods too.
func (h *hydrator) tellFailed(e *hydrating) {
	if st, err := h.load(e.v); err == nil && st != nil {
		h.tell(e.v, st, true, ReasonDamaged, failedText)
	}
}

// finish makes a volume that is hydrated an ordinary one, and confirms that.
// The volume's lock is held for the work on the mapping alone, not while
// anything is asked over the network: other calls wait for that a little, and are
// Aborted where it takes longer. Cut anywhere, the same call again finishes it;
// what was not confirmed when the volume is unstaged is by the next stage.
// errUnstaged where that was done before there was anything to confirm.
func (d *Driver) finish(ctx context.Context, v volume) error {
	st, err := d.load(v)
	if err != nil {
		return err
	}
	if st == nil {
		return errUnstaged
	}
	key, err := d.cfg.Keys.GetDEK(ctx, st.DEK)
	if err != nil {
		return err
	}
	defer key.Wipe()
	if key.State == dek.Rotating {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the key of volume %s is being replaced: it is finished when it is staged the next time", v.id)
	}
	m, err := d.finishMapping(ctx, v, st.DEK, key)
	if err != nil {
		return err
	}
	if Unconfirmed(key, m.Header) {
		if err := d.cfg.Keys.ConfirmDEK(ctx, st.DEK, m.Header); err != nil {
			return err
		}
	}
	return d.noteFinished(v, m.Header)
}

// finishMapping does the part that changes the mapping. errUnstaged where the
// volume is not staged any more.
func (d *Driver) finishMapping(ctx context.Context, v volume, id dek.ID, key dek.DEK) (Mapping, error) {
	unlock, err := d.locks.tryOwn(v.id)
	if err != nil {
		return Mapping{}, err
	}
	defer unlock()
	st, err := d.stagedState(v)
	if err != nil {
		return Mapping{}, err
	}
	if st.DEK != id {
		return Mapping{}, errdefs.Errorf(errdefs.ErrUnavailable, "volume %s has another key now", v.id)
	}
	// Known from here on, whatever dies: something may have to be confirmed.
	if !st.Finishing {
		st.Finishing = true
		if err := d.save(v, *st); err != nil {
			return Mapping{}, err
		}
	}
	// Not cancelled half way: I/O to the volume waits while its table changes.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTime)
	defer cancel()
	return d.cfg.Hydration.Finish(ctx, Volume{Name: v.mapping, Device: v.device(), ReadOnly: st.ReadOnly}, key)
}

// stagedState returns the state of a volume that is staged as it says.
func (d *Driver) stagedState(v volume) (*state, error) {
	st, err := d.load(v)
	if err != nil {
		return nil, err
	}
	m, open, err := d.mapping(v)
	if err != nil {
		return nil, err
	}
	if st == nil || !open || openState(m, st, d.boot) != StateStaged {
		return nil, errUnstaged
	}
	dev, err := d.cfg.Devices.Device(v.device())
	if err != nil {
		return nil, err
	}
	if dev.Number != m.Backing || !st.borrowed(dev) {
		return nil, errdefs.Errorf(errdefs.ErrState, "mapping %s is on device %s, volume %s is device %s now: unstage and stage it again", m.Name, m.Backing, v.id, dev.Number)
	}
	return st, nil
}

// noteFinished notes that nothing is left to confirm.
func (d *Driver) noteFinished(v volume, header dek.HeaderID) error {
	unlock, err := d.locks.tryOwn(v.id)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := d.load(v)
	if err != nil || st == nil {
		return err
	}
	header = noted(header)
	st.Finishing = false
	if header.Sequence > st.Header.Sequence {
		st.Header = header
	}
	return d.save(v, *st)
}
