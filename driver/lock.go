package driver

import (
	"context"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// ownWorkPatience is how long a call waits for what this process does to a
// volume by itself, which takes milliseconds on a device that answers.
const ownWorkPatience = 2 * time.Second

// locks lets one operation at a time work on a volume. No call waits for
// another: the orchestrator is told to come again, so that calls cannot pile up
// behind a device that hangs.
type locks struct {
	mu   sync.Mutex
	held map[string]*hold
}

// hold is a volume that is worked on.
type hold struct {
	own      bool          // by this process itself, for no call
	released chan struct{} // closed when it ends
}

// try locks the volume for a call. ErrConflict where another call holds it.
func (l *locks) try(volume string) (unlock func(), err error) {
	unlock, _, err = l.take(volume, false)
	return unlock, err
}

// tryOwn locks the volume for work that no call has asked for. ErrConflict
// where it is locked.
func (l *locks) tryOwn(volume string) (unlock func(), err error) {
	unlock, _, err = l.take(volume, true)
	return unlock, err
}

// wait is try for a call that nobody may have to repeat because of work that
// this process began: for a while it waits until that has ended.
func (l *locks) wait(ctx context.Context, volume string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, ownWorkPatience)
	defer cancel()
	for {
		unlock, by, err := l.take(volume, false)
		if err == nil || !by.own {
			return unlock, err
		}
		select {
		case <-by.released:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// take locks the volume, or says who holds it.
func (l *locks) take(volume string, own bool) (unlock func(), by *hold, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if by := l.held[volume]; by != nil {
		return nil, by, errdefs.Errorf(errdefs.ErrConflict, "another call for volume %s is running; try again", volume)
	}
	if l.held == nil {
		l.held = map[string]*hold{}
	}
	h := &hold{own: own, released: make(chan struct{})}
	l.held[volume] = h
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, volume)
		close(h.released)
	}, h, nil
}
