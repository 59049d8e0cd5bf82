package keyservice

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
)

// flights lets concurrent callers of one DEK share a read of it. A caller
// shares only a read that began after it asked: whoever arrives while one is
// under way shares the next. So nobody is told less than what was true when he
// asked, and at most one read of a DEK runs at a time.
//
// A read belongs to none of its callers: it goes on until the last of them has
// left, and the DEK is wiped once the last of them has used it.
type flights struct {
	timeout time.Duration
	log     *slog.Logger

	mu *sync.Mutex
	// waiting has an entry for each DEK of which a read is under way: the one
	// after it, nil while nobody wants it.
	waiting map[dek.ID]*flight
}

// flight is one read. Its fields are guarded by flights.mu, except that result
// and err are read freely once done is closed and before the rider leaves.
type flight struct {
	fetch  fetch
	ctx    context.Context
	cancel context.CancelFunc
	riders int
	done   chan struct{}
	landed bool
	result dek.DEK
	err    error
}

// fetch reads a DEK; ctx has a deadline.
type fetch func(ctx context.Context) (dek.DEK, error)

func newFlights(timeout time.Duration, log *slog.Logger) flights {
	return flights{timeout: timeout, log: log, mu: &sync.Mutex{}, waiting: map[dek.ID]*flight{}}
}

// share calls use with the DEK that fetch, this caller's or another's, read. The
// DEK is shared: use neither changes nor wipes nor keeps it.
func (f *flights) share(ctx context.Context, id dek.ID, fetch fetch, use func(dek.DEK) error) error {
	fl := f.board(id, fetch)
	defer f.leave(id, fl)
	select {
	case <-fl.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if fl.err != nil {
		return fl.err
	}
	return use(fl.result)
}

func (f *flights) board(id dek.ID, fetch fetch) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	next, flying := f.waiting[id]
	if next == nil {
		next = &flight{fetch: fetch, done: make(chan struct{})}
		next.ctx, next.cancel = context.WithCancel(context.Background())
		if flying {
			f.waiting[id] = next
		} else {
			f.waiting[id] = nil
			go f.fly(id, next)
		}
	}
	next.riders++
	return next
}

// leave ends one rider's part in fl.
func (f *flights) leave(id dek.ID, fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fl.riders--
	if fl.riders > 0 {
		return
	}
	fl.cancel()
	if fl.landed {
		fl.result.Wipe()
	}
	if f.waiting[id] == fl { // nobody may board a cancelled one
		f.waiting[id] = nil
	}
}

// fly runs fl and the flights that wait for its end.
func (f *flights) fly(id dek.ID, fl *flight) {
	for fl != nil {
		d, err := f.run(id, fl)
		f.mu.Lock()
		fl.result, fl.err, fl.landed = d, err, true
		if fl.riders == 0 {
			d.Wipe()
		}
		close(fl.done)
		if fl = f.waiting[id]; fl != nil {
			f.waiting[id] = nil
		} else {
			delete(f.waiting, id)
		}
		f.mu.Unlock()
	}
}

// run calls fetch. What panics there would otherwise end the process, because
// no handler is below it on the stack.
func (f *flights) run(id dek.ID, fl *flight) (d dek.DEK, err error) {
	ctx, cancel := context.WithTimeout(fl.ctx, f.timeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			f.log.Error("panic while reading a DEK", "dek_id", id, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			d, err = dek.DEK{}, fmt.Errorf("reading DEK %s crashed; the stack is in the key service's log", id)
		}
	}()
	return fl.fetch(ctx)
}
