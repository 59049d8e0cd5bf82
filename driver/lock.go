package driver

import (
	"sync"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// locks lets one operation at a time work on a volume. Nobody waits: the
// orchestrator is told to come again, so that calls cannot pile up behind a
// device that hangs.
type locks struct {
	mu   sync.Mutex
	held map[string]bool
}

// try locks the volume. ErrConflict where another call holds it.
func (l *locks) try(volume string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[volume] {
		return nil, errdefs.Errorf(errdefs.ErrConflict, "another call for volume %s is running; try again", volume)
	}
	if l.held == nil {
		l.held = map[string]bool{}
	}
	l.held[volume] = true
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.held, volume)
	}, nil
}
