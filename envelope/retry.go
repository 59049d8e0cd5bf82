package envelope

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// maxRaces bounds how often a change starts over because others changed the
// record in between; each time, one of those others has got on.
const maxRaces = 100

// raceBackoff is the longest pause before starting over.
const raceBackoff = 10 * time.Millisecond

// errRaced is a lost compare-and-swap.
var errRaced = errors.New("lost a race")

// try is retry for a method about one DEK, whose ID it checks and names in
// errors. op begins by reading the record. So starting over also finds out
// what became of a write whose answer was lost: it is seen as done.
func (k *Keyring) try(ctx context.Context, id dek.ID, op func() error) error {
	if _, err := dek.ParseID(string(id)); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	if err := k.retry(ctx, op); err != nil {
		return fmt.Errorf("DEK %s: %w", id, err)
	}
	return nil
}

// retry runs op until it succeeds, fails for good, or has been tried often
// enough.
func (k *Keyring) retry(ctx context.Context, op func() error) error {
	failures, races := 0, 0
	for {
		err := op()
		var pause time.Duration
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errRaced) && races < maxRaces:
			races++
			pause = raceBackoff
		case errors.Is(err, errdefs.ErrUnavailable) && failures+1 < k.attempts:
			pause = k.backoff << min(failures, 10)
			failures++
		default:
			return err
		}
		if !sleep(ctx, pause/2+rand.N(pause/2+1)) {
			return fmt.Errorf("%w (at last: %s)", ctx.Err(), err.Error()) // of ctx's class alone
		}
	}
}

// sleep says whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
