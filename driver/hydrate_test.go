package driver_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// hydratesIn is how long a volume of 64 MiB takes on the machine in memory,
// where nothing disturbs it.
const hydratesIn = 3 * time.Second

func cloneSpec() dek.Spec {
	return dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone}
}

// newCloneMachine is newMachine with a volume that hydrates.
func newCloneMachine(t *testing.T) *machine {
	m := newMachine(t)
	m.createDEK(cloneSpec())
	return m
}

// hydrate runs the hydrator until stop is called. Time is that of the bubble.
func (m *machine) hydrate() (stop func()) {
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan struct{})
	d := m.driver
	go func() { d.Hydrate(ctx); close(done) }()
	return func() { cancel(); <-done }
}

// timed is a test of a machine with a volume that hydrates, in which waiting
// takes no time.
func timed(t *testing.T, prepare func(*machine), run func(*machine)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := newCloneMachine(t)
		prepare(m)
		m.start()
		m.ok("stage", m.stage(blockCap()))
		run(m)
		m.lawful()
	})
}

func plain(*machine) {}

// sequence is the header's on the disk.
func (m *machine) sequence() uint64 {
	m.t.Helper()
	key, err := m.keys.GetDEK(context.Background(), dekID)
	m.ok("GetDEK", err)
	defer key.Wipe()
	mp, err := drivertest.Mapper{Kernel: m.kernel}.Open(context.Background(), driver.Volume{Name: m.mapping().Name, Device: m.disk.Path}, key)
	m.ok("looking at the header", err)
	return mp.Header.Sequence
}

// isFinished fails the test unless the volume is finished, and that is confirmed.
func (m *machine) isFinished() {
	m.t.Helper()
	if mp := m.mapping(); mp.Regions != 0 || mp.Hydrating {
		m.t.Fatalf("not finished: %+v", mp)
	}
	if got, want := m.record().Header.Sequence, m.sequence(); got != want || m.record().State != dek.Formatted {
		m.t.Errorf("the floor is %d, the header %d", got, want)
	}
	infos, err := m.driver.Inspect(m.t.Context())
	if err != nil || len(infos) != 1 || infos[0].Finishing || infos[0].Header.Sequence != m.sequence() {
		m.t.Errorf("the state is %+v, %v", infos, err)
	}
}

func (m *machine) condition() *csi.VolumeCondition {
	m.t.Helper()
	resp, err := m.node.NodeGetVolumeStats(m.t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: volumeID, VolumePath: m.staging()})
	m.ok("stats", err)
	return resp.GetVolumeCondition()
}

func TestHydrates(t *testing.T) {
	timed(t, plain, func(m *machine) {
		md := modes()[1]
		md.write(m)
		if got := m.mapping(); got.Regions == 0 || got.Hydrating {
			t.Fatalf("a new volume is %+v", got)
		}
		stop := m.hydrate()
		defer stop()
		time.Sleep(hydratesIn / 2)
		half := m.driver.HydrationStatus()
		if half.Running != 1 || half.Paused+half.Finishing != 0 || half.Remaining == 0 || half.Written == 0 {
			t.Errorf("in the middle: %+v", half)
		}
		if c := m.condition(); c.GetAbnormal() || !strings.Contains(c.GetMessage(), "% (running)") {
			t.Errorf("in the middle: %v", c)
		}
		time.Sleep(hydratesIn)
		m.isFinished()
		if s := m.driver.HydrationStatus(); s.Running+s.Paused+s.Finishing != 0 || s.Remaining != 0 || s.Written <= half.Written {
			t.Errorf("at the end: %+v", s)
		}
		if c := m.condition(); c.GetAbnormal() || c.GetMessage() != "in order" {
			t.Errorf("at the end: %v", c)
		}
		// Nothing is looked at where nothing hydrates.
		m.faults.Disarm()
		time.Sleep(time.Hour)
		if steps := m.faults.Trace(); len(steps) > 0 {
			t.Errorf("an hour without anything to do took %v", steps)
		}
		m.ok("unstage", m.unstage())
		m.clean()
		m.ok("stage", m.stage(blockCap()))
		md.read(m)
	})
}

// A pod that is never idle slows hydration to a fortieth or so, and not to
// nothing: the rest of the time is for what a burst has begun.
func TestHydrationMakesWay(t *testing.T) {
	timed(t, plain, func(m *machine) {
		busy, idle := make(chan struct{}), sync.WaitGroup{}
		path := m.mapping().Path
		idle.Go(func() {
			for {
				select {
				case <-busy:
					return
				case <-time.After(5 * time.Millisecond):
					_ = m.kernel.WriteAt(path, []byte("x"), 0)
				}
			}
		})
		stop := m.hydrate()
		defer stop()
		time.Sleep(hydratesIn)
		got := m.mapping()
		if share := float64(got.Hydrated) / float64(got.Regions); got.Regions == 0 || share < .01 || share > .06 {
			t.Errorf("beside a pod that never rests %.0f %% hydrated in the time of all", 100*share)
		}
		time.Sleep(45 * hydratesIn)
		if got := m.mapping(); got.Regions > 0 {
			t.Errorf("beside a pod that never rests it does not end: %+v", got)
		}
		close(busy)
		idle.Wait()
	})
}

func TestHydrationWaitsForIdleness(t *testing.T) {
	timed(t, plain, func(m *machine) {
		stop := m.hydrate()
		defer stop()
		time.Sleep(hydratesIn / 2)
		m.ok("writing", m.kernel.WriteAt(m.mapping().Path, []byte("x"), 0))
		time.Sleep(100 * time.Millisecond)
		if m.mapping().Hydrating {
			t.Error("a write does not pause hydration")
		}
		if s := m.driver.HydrationStatus(); s.Paused != 1 {
			t.Errorf("paused: %+v", s)
		}
		time.Sleep(400 * time.Millisecond)
		if !m.mapping().Hydrating {
			t.Error("it does not go on when the volume is idle")
		}
	})
}

// more adds volumes to a machine.
func (m *machine) more(n int) (stage []func() error) {
	for i := range n {
		id := fmt.Sprintf("more-%d", i)
		disk := m.wrapped.Create(id, 64*mib)
		_, err := m.keys.CreateDEK(context.Background(), dek.ID("loop.cryptcsi.io/"+id), cloneSpec())
		m.ok("CreateDEK", err)
		stage = append(stage, func() error {
			req := m.stageRequest(blockCap())
			req.VolumeId, req.StagingTargetPath, req.PublishContext = id, m.staging()+id, m.wrapped.Context(disk)
			_, err := m.node.NodeStageVolume(m.t.Context(), req)
			return err
		})
	}
	return stage
}

func TestFewHydrateAtOnce(t *testing.T) {
	timed(t, func(m *machine) { m.cfg.Hydrating = 2 }, func(m *machine) {
		stop := m.hydrate()
		defer stop()
		for _, stage := range m.more(4) {
			m.ok("stage", stage())
		}
		most := 0
		for range 200 {
			time.Sleep(hydratesIn / 20)
			all, _ := drivertest.Mapper{Kernel: m.kernel}.List()
			left := slices.DeleteFunc(all, func(mp driver.Mapping) bool { return mp.Regions == 0 })
			on := slices.DeleteFunc(slices.Clone(left), func(mp driver.Mapping) bool { return !mp.Hydrating || mp.Hydrated == mp.Regions })
			if most = max(most, len(on)); len(left) == 0 {
				break
			}
		}
		if most != 2 {
			t.Errorf("%d volumes hydrated at once, want 2", most)
		}
		if s := m.driver.HydrationStatus(); s != (driver.HydrationStatus{Written: s.Written}) {
			t.Errorf("not all came to their end: %+v", s)
		}
	})
}

// Without the key side nothing is lost, and it is not pestered.
func TestFinishWithoutKeys(t *testing.T) {
	timed(t, plain, func(m *machine) {
		var results []error
		m.cfg.ObserveFinish = func(_ time.Duration, err error) { results = append(results, err) }
		away := &switched{Keys: m.keys}
		m.cfg.Keys = away
		m.start()
		away.off()
		stop := m.hydrate()
		defer stop()
		time.Sleep(hydratesIn + time.Hour)
		if got := m.mapping(); got.Regions == 0 || got.Hydrated != got.Regions {
			t.Errorf("without the key side: %+v", got)
		}
		if s := m.driver.HydrationStatus(); s.Finishing != 1 || s.Remaining != 0 {
			t.Errorf("without the key side: %+v", s)
		}
		if n := len(results); n < 10 || n > 30 || !errors.Is(results[0], errdefs.ErrUnavailable) {
			t.Errorf("%d attempts within an hour: %v", n, results)
		}
		away.on()
		time.Sleep(6 * time.Minute)
		m.isFinished()
		if results[len(results)-1] != nil {
			t.Errorf("at the end: %v", results[len(results)-1])
		}
	})
}

// switched are keys that can be out of reach.
type switched struct {
	driver.Keys
	mu   sync.Mutex
	away bool
}

func (s *switched) on()  { s.mu.Lock(); s.away = false; s.mu.Unlock() }
func (s *switched) off() { s.mu.Lock(); s.away = true; s.mu.Unlock() }

func (s *switched) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrUnavailable, "nobody is there")
	}
	return s.Keys.GetDEK(ctx, id)
}

// The next process goes on, and the one before has left nothing running.
func TestHydrationAfterRestart(t *testing.T) {
	timed(t, plain, func(m *machine) {
		stop := m.hydrate()
		time.Sleep(hydratesIn / 3)
		stop()
		before := m.mapping()
		if before.Hydrating || before.Hydrated == 0 {
			t.Errorf("after the end: %+v", before)
		}
		m.start()
		defer m.hydrate()()
		time.Sleep(hydratesIn)
		m.isFinished()
	})
}

// A process that ends between the last change of the header and its
// confirmation leaves that to the next one.
func TestConfirmsAfterRestart(t *testing.T) {
	timed(t, plain, func(m *machine) {
		away := &switched{Keys: m.keys}
		away.off()
		m.cfg.Keys = unconfirmed{m.keys, away}
		m.start()
		stop := m.hydrate()
		time.Sleep(2 * hydratesIn)
		stop()
		if got := m.mapping(); got.Regions > 0 || m.record().Header.Sequence == m.sequence() {
			t.Fatalf("finished and not confirmed: %+v", got)
		}
		away.on()
		m.start()
		defer m.hydrate()()
		time.Sleep(time.Second)
		m.isFinished()
	})
}

// unconfirmed are keys of which none can be confirmed while away is.
type unconfirmed struct {
	driver.Keys
	away *switched
}

func (u unconfirmed) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	d, err := u.away.GetDEK(ctx, id)
	if err != nil {
		return err
	}
	d.Wipe()
	return u.Keys.ConfirmDEK(ctx, id, h)
}

// What belongs to another driver on the node is left to it.
func TestHydratesItsOwn(t *testing.T) {
	timed(t, plain, func(m *machine) {
		m.cfg.DriverName = "other.example.com"
		m.start()
		defer m.hydrate()()
		time.Sleep(3 * hydratesIn)
		if got := m.mapping(); got.Hydrating || got.Hydrated > 0 {
			t.Errorf("another driver's volume: %+v", got)
		}
	})
}

func TestUnstageWhileHydrating(t *testing.T) {
	timed(t, plain, func(m *machine) {
		defer m.hydrate()()
		time.Sleep(hydratesIn / 3)
		m.ok("unstage", m.unstage())
		m.clean()
		time.Sleep(2 * time.Second)
		if s := m.driver.HydrationStatus(); s != (driver.HydrationStatus{Written: s.Written}) {
			t.Errorf("after the unstage: %+v", s)
		}
		m.ok("stage", m.stage(blockCap()))
		if m.mapping().Hydrated == 0 {
			t.Error("it begins anew")
		}
		time.Sleep(hydratesIn)
		m.isFinished()
	})
}

// slow lets a Finish or a GetDEK wait until it is let go.
type slow struct {
	driver.Hydration
	driver.Keys
	began, goOn chan struct{}
	key         bool
}

func (s *slow) List() ([]driver.Mapping, error) { return s.Hydration.List() }

func (s *slow) wait(here bool) {
	if here {
		s.began <- struct{}{}
		<-s.goOn
	}
}

func (s *slow) Finish(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	s.wait(!s.key)
	return s.Hydration.Finish(ctx, v, d)
}

func (s *slow) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	s.wait(s.key)
	return s.Keys.GetDEK(ctx, id)
}

// NodeUnstageVolume waits for a mapping that is being finished, but not for long, and
// while the key side is asked it does its work.
func TestUnstageWhileFinishing(t *testing.T) {
	for _, atKey := range []bool{false, true} {
		t.Run(fmt.Sprintf("at the key side %v", atKey), func(t *testing.T) {
			timed(t, plain, func(m *machine) {
				s := &slow{Keys: m.keys, began: make(chan struct{}), goOn: make(chan struct{}), key: atKey}
				m.hydration = func(h driver.Hydration) driver.Hydration { s.Hydration = h; return s }
				m.cfg.Keys = s
				var results []error
				m.cfg.ObserveFinish = func(_ time.Duration, err error) { results = append(results, err) }
				m.start()
				stop := m.hydrate()
				<-s.began
				err := m.unstage()
				if atKey {
					m.ok("unstage", err)
				} else {
					m.refused("unstage", err, codes.Aborted, "another call")
				}
				waited := make(chan error, 1)
				if !atKey {
					go func() { waited <- m.unstage() }()
					synctest.Wait()
				}
				s.goOn <- struct{}{}
				synctest.Wait()
				if !atKey {
					m.ok("the unstage that waited", <-waited)
				}
				m.clean()
				stop()
				if finished := map[bool]int{true: 0, false: 1}[atKey]; len(results) != finished {
					m.t.Errorf("%d volumes were finished, the attempts ended with %v", finished, results)
				}
			})
		})
	}
}

// Each step of finishing a volume fails or dies: it stays usable, the same
// again finishes it, and so does the next stage; the floor rises.
func TestFaultsInFinish(t *testing.T) {
	prepare := func(t *testing.T) *machine {
		m := newCloneMachine(t).start()
		m.ok("stage", m.stage(blockCap()))
		modes()[1].write(m)
		m.kernel.Hydrate(m.mapping().Name)
		return m
	}
	finish := func(m *machine) (err error) {
		defer func() {
			if p := recover(); p != nil {
				if _, killed := p.(drivertest.Killed); !killed {
					panic(p)
				}
				err = errors.New("killed")
			}
		}()
		return m.driver.Finish(context.Background(), volumeID)
	}
	for _, restage := range []bool{false, true} {
		t.Run(fmt.Sprintf("staged again %v", restage), func(t *testing.T) {
			t.Parallel()
			eachFault(t, prepare, finish, func(m *machine, _ fault, _ error) {
				modes()[1].read(m)
				if restage {
					m.ok("unstage", m.unstage())
					m.clean()
					m.ok("stage", m.stage(blockCap()))
					if got, want := m.record().Header.Sequence, m.sequence(); got != want {
						m.t.Errorf("staged with the floor %d and the header %d", got, want)
					}
				}
				m.ok("finish again", finish(m))
				m.isFinished()
				modes()[1].read(m)
				m.ok("unstage", m.unstage())
				m.clean()
			})
		})
	}
}

// A volume whose disk failed while it hydrated says so, and is not taken for one
// that is hydrated. Staged again it goes on.
func TestHydrationFails(t *testing.T) {
	events, attempts := &told{}, 0
	prepare := func(m *machine) {
		m.cfg.Events = events
		m.cfg.ObserveFinish = func(time.Duration, error) { attempts++ }
	}
	timed(t, prepare, func(m *machine) {
		events.reasons()
		stop := m.hydrate()
		time.Sleep(hydratesIn / 2)
		m.kernel.Fail(m.mapping().Name)
		time.Sleep(time.Hour)
		if s := m.driver.HydrationStatus(); attempts > 0 || s.Failed != 1 || s.Remaining == 0 || s.Running+s.Paused+s.Finishing != 0 {
			m.t.Errorf("%d attempts to finish it, %+v", attempts, s)
		}
		if c := m.condition(); !c.GetAbnormal() || !strings.Contains(c.GetMessage(), "the disk failed") {
			m.t.Errorf("the condition is %v", c)
		}
		if got := events.reasons(); !slices.Equal(got, []string{driver.ReasonDamaged}) {
			m.t.Errorf("the events are %v", got)
		}
		stop()
		m.start() // the next process sees it too
		defer m.hydrate()()
		time.Sleep(time.Minute)
		if s, got := m.driver.HydrationStatus(), events.reasons(); attempts > 0 || s != (driver.HydrationStatus{Failed: 1}) || len(got) != 1 {
			m.t.Errorf("after a restart: %d attempts to finish it, %+v, %v", attempts, s, got)
		}
		m.ok("unstage", m.unstage())
		m.ok("stage", m.stage(blockCap()))
		time.Sleep(hydratesIn)
		m.isFinished()
		if c := m.condition(); c.GetAbnormal() {
			m.t.Errorf("the condition is %v", c)
		}
	})
}
