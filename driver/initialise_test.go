package driver_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// wiping is a mapper without dm-clone: a new volume takes that long, in pieces of
// which nothing is left where one is cut.
type wiping struct {
	driver.Mapper
	t           *testing.T
	whole       time.Duration
	piece       time.Duration
	mu          sync.Mutex
	fails       error // instead of the next piece
	done        time.Duration
	busy, opens int
}

func (w *wiping) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	w.mu.Lock()
	w.opens++
	if w.busy++; w.busy > 1 {
		w.t.Error("two are at one volume")
	}
	w.mu.Unlock()
	defer func() { w.mu.Lock(); w.busy--; w.mu.Unlock() }()
	for w.did(0) < w.whole {
		if err := w.failing(); err != nil {
			return driver.Mapping{}, err
		}
		if deadline, ok := ctx.Deadline(); ok && w.did(0) > 0 && time.Until(deadline) < w.piece {
			return driver.Mapping{Unfinished: true}, errdefs.Errorf(errdefs.ErrUnavailable, "initialising, %d %% done", 100*w.did(0)/w.whole)
		}
		select {
		case <-time.After(w.piece):
			w.did(w.piece)
		case <-ctx.Done():
			return driver.Mapping{}, ctx.Err()
		}
	}
	return w.Mapper.Open(ctx, v, d)
}

func (w *wiping) failing() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fails
}

func (w *wiping) opened() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.opens
}

// did adds to what is done, and returns it.
func (w *wiping) did(d time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done += d
	return w.done
}

// wiped is a test of a machine with a new volume that is wiped first.
func wiped(t *testing.T, w *wiping, run func(*testing.T, *machine)) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC})
		w.t = t
		m.mapper = func(inner driver.Mapper) driver.Mapper { w.Mapper = inner; return w }
		m.start()
		run(t, m)
		m.lawful()
	})
}

// waits is a NodeStage that must say that the volume is initialised, within that time.
func (m *machine) waits(most time.Duration, says string) {
	m.t.Helper()
	began := time.Now()
	ctx, cancel := context.WithCancel(m.t.Context())
	_, err := m.node.NodeStageVolume(ctx, m.stageRequest(mountCap("ext4")))
	cancel() // as when a call has ended
	m.refused("NodeStage of a volume that is initialised", err, codes.Unavailable, says)
	if took := time.Since(began); took > most {
		m.t.Errorf("NodeStage took %v, at most %v", took, most)
	}
}

// TestInitialisesInTheBackground: no call waits until a large volume is written,
// and between calls it goes on.
func TestInitialisesInTheBackground(t *testing.T) {
	w := &wiping{whole: time.Hour, piece: time.Second}
	wiped(t, w, func(t *testing.T, m *machine) {
		m.waits(10*time.Second, "goes on in the background: initialising, 0 % done")
		time.Sleep(33 * time.Minute)
		m.waits(0, "initialising, 5") // 55 %, or what it was half a minute before
		time.Sleep(30 * time.Minute)
		opens := w.opened()
		m.ok("stage", m.stage(mountCap("ext4")))
		if n := w.opened() - opens; n != 1 {
			t.Errorf("opened %d times once it was initialised", n)
		}
		m.ok("unstage", m.unstage())
		m.clean()
		m.ok("stage again", m.stage(mountCap("ext4")))
	})
}

// A volume that takes no longer than a call may is there at once.
func TestInitialisesAtOnce(t *testing.T) {
	w := &wiping{whole: 8 * time.Second, piece: time.Second}
	wiped(t, w, func(_ *testing.T, m *machine) {
		m.ok("stage", m.stage(mountCap("ext4")))
		if n := w.opened(); n != 1 {
			t.Errorf("%d opens", n)
		}
	})
}

// TestInitialisingEnds: unstaging, another request, the end of the process and a
// device that is found wrong end what goes on in the background.
func TestInitialisingEnds(t *testing.T) {
	ends := func(name string, how func(*testing.T, *machine, *wiping)) {
		t.Run(name, func(t *testing.T) {
			w := &wiping{whole: time.Hour, piece: time.Second}
			wiped(t, w, func(t *testing.T, m *machine) {
				m.waits(10*time.Second, "0 % done")
				time.Sleep(30 * time.Minute)
				how(t, m, w)
			})
		})
	}
	rests := func(t *testing.T, w *wiping) {
		t.Helper()
		before := w.did(0)
		time.Sleep(time.Hour)
		if now := w.did(0); now != before {
			t.Errorf("it went on from %v to %v", before, now)
		}
	}
	ends("unstage", func(t *testing.T, m *machine, w *wiping) {
		m.ok("unstage", m.unstage())
		m.clean()
		rests(t, w)
		m.waits(10*time.Second, "50 % done") // nothing was lost
		m.ok("unstage", m.unstage())
	})
	ends("another request", func(t *testing.T, m *machine, w *wiping) {
		began := time.Now()
		m.refused("stage as a block volume", m.stage(blockCap()), codes.Unavailable, "% done")
		if time.Since(began) == 0 {
			t.Error("what goes on is what was asked for before")
		}
		m.waits(10*time.Second, "% done")
		m.ok("unstage", m.unstage())
		m.clean()
		rests(t, w)
	})
	ends("end of the process", func(t *testing.T, m *machine, w *wiping) {
		m.hydrate()()
		rests(t, w)
		m.start()
		m.waits(10*time.Second, "50 % done")
		m.ok("unstage", m.unstage())
	})
	ends("a device that is wrong", func(t *testing.T, m *machine, w *wiping) {
		w.mu.Lock()
		w.fails = errdefs.Errorf(errdefs.ErrState, "foreign")
		w.mu.Unlock()
		time.Sleep(time.Minute)
		rests(t, w)
		m.refused("stage", m.stage(mountCap("ext4")), codes.FailedPrecondition)
		m.clean()
	})
}

// TestInitialisesSlowly: where nothing at all gets done within a try, the next one
// has more time.
func TestInitialisesSlowly(t *testing.T) {
	w := &wiping{whole: 10 * time.Minute, piece: 5 * time.Minute}
	wiped(t, w, func(_ *testing.T, m *machine) {
		m.waits(10*time.Second, "deadline exceeded")
		time.Sleep(time.Hour)
		m.ok("stage", m.stage(mountCap("ext4")))
	})
}
