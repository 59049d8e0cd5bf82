package driver_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// A mode is a way to use a volume. Data go in and out through the pod's path.
type mode struct {
	name string
	cap  func() *csi.VolumeCapability
	set  func(m *machine)
}

func modes() []mode {
	return []mode{
		{"mount", func() *csi.VolumeCapability { return mountCap("xfs") }, func(*machine) {}},
		{"block", blockCap, func(*machine) {}},
		{"handed over", func() *csi.VolumeCapability { return mountCap("xfs") }, func(m *machine) { m.cfg.StageWith = driver.StageWithWrapped }},
		{"handed over without stage", func() *csi.VolumeCapability { return mountCap("xfs") }, func(m *machine) {
			m.cfg.StageWith = driver.StageWithWrapped
			m.wrapped.NoStage = true
		}},
		{"stacking", blockCap, func(m *machine) { m.wrapped.Stacks = true }},
	}
}

func (md mode) machine(t *testing.T) *machine {
	m := newMachine(t)
	md.set(m)
	return m.start()
}

// use writes or compares the volume's data at the staging path or mapping.
func (md mode) write(m *machine) {
	m.t.Helper()
	if md.cap().GetBlock() == nil {
		m.write(m.staging(), "secret words")
		return
	}
	m.ok("writing", m.kernel.WriteAt(m.mapping().Path, []byte("secret words"), 3*mib))
}

func (md mode) read(m *machine) {
	m.t.Helper()
	if md.cap().GetBlock() == nil {
		m.read(m.staging(), "secret words")
		return
	}
	got := make([]byte, len("secret words"))
	if err := m.kernel.ReadAt(m.mapping().Path, got, 3*mib); err != nil || string(got) != "secret words" {
		m.t.Fatalf("the data are %q, %v", got, err)
	}
}

// A fault is a way in which a step goes wrong.
type fault struct {
	name  string
	after bool
	how   func() error
	dies  bool
}

// faults are the ways that differ. To die after a step is to die before the
// next one, and to fail for now before a step leaves what to die there leaves.
func faults() []fault {
	final := func() error { return errors.New("injected") }
	retry := func() error { return errdefs.Errorf(errdefs.ErrUnavailable, "injected, try again") }
	return []fault{
		{"fails for good before", false, final, false},
		{"fails for good after", true, final, false},
		{"fails for now after", true, retry, false},
		{"dies before", false, func() error { panic(drivertest.Killed{}) }, true},
	}
}

// eachFault runs do, which must succeed without faults, with each fault at each
// of its steps. prepare makes a new machine; settle says what has to hold after
// the fault, err being the answer of do.
func eachFault(t *testing.T, prepare func(t *testing.T) *machine, do func(m *machine) error, settle func(m *machine, f fault, err error)) {
	t.Helper()
	m := prepare(t)
	m.faults.Disarm()
	m.ok("without a fault", do(m))
	steps := m.faults.Trace()
	if len(steps) < 4 {
		t.Fatalf("only %d steps: %v", len(steps), steps)
	}
	for n, step := range steps {
		for _, f := range faults() {
			name := fmt.Sprintf("%s step %d %s", f.name, n+1, step)
			ok := t.Run(name, func(t *testing.T) {
				m := prepare(t)
				m.faulty = f.after
				m.faults.Arm(n+1, f.after, f.how)
				err := do(m)
				m.faults.Disarm()
				if f.dies {
					m.start()
				}
				settle(m, f, err)
				m.lawful()
			})
			if !ok {
				t.Logf("the steps are %v", steps)
			}
		}
	}
}

// settledStage is what holds after a NodeStageVolume with one fault: an answer
// after which the orchestrator may never come back leaves nothing; and both to
// go on and to give up leads to an orderly end.
func settledStage(md mode, giveUp bool) func(*machine, fault, error) {
	return func(m *machine, f fault, err error) {
		m.t.Helper()
		if err != nil && !f.dies && !comesBack(err) {
			m.clean()
		}
		if giveUp {
			m.ok("unstage", m.unstage())
			m.clean()
		}
		m.ok("stage again", m.stage(md.cap()))
		m.ok("and again", m.stage(md.cap()))
	}
}

// comesBack tells whether kubelet takes a code for not final.
func comesBack(err error) bool {
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		return true
	}
	return false
}

func TestFaultsInTheFirstStage(t *testing.T) {
	for _, md := range modes() {
		for _, giveUp := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, giving up %v", md.name, giveUp), func(t *testing.T) {
				t.Parallel()
				settled := settledStage(md, giveUp)
				eachFault(t, md.machine, func(m *machine) error { return m.stage(md.cap()) }, func(m *machine, f fault, err error) {
					settled(m, f, err)
					md.write(m)
					m.ok("unstage", m.unstage())
					m.clean()
					m.ok("stage the second time", m.stage(md.cap()))
					md.read(m)
					m.ok("unstage the second time", m.unstage())
					m.clean()
				})
			})
		}
	}
}

// filled is a machine whose volume has data and is not staged.
func (md mode) filled(t *testing.T) *machine {
	m := md.machine(t)
	m.ok("stage", m.stage(md.cap()))
	md.write(m)
	m.ok("unstage", m.unstage())
	return m
}

func TestFaultsInALaterStage(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			t.Parallel()
			settled := settledStage(md, false)
			eachFault(t, md.filled, func(m *machine) error { return m.stage(md.cap()) }, func(m *machine, f fault, err error) {
				settled(m, f, err)
				md.read(m)
				m.ok("unstage", m.unstage())
				m.clean()
			})
		})
	}
}

func TestFaultsInUnstage(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			t.Parallel()
			staged := func(t *testing.T) *machine {
				m := md.filled(t)
				m.ok("stage", m.stage(md.cap()))
				return m
			}
			eachFault(t, staged, (*machine).unstage, func(m *machine, _ fault, _ error) {
				m.ok("unstage again", m.unstage())
				m.clean()
				m.ok("stage", m.stage(md.cap()))
				md.read(m)
			})
			// The pod comes back instead.
			eachFault(t, staged, (*machine).unstage, func(m *machine, _ fault, _ error) {
				m.ok("stage", m.stage(md.cap()))
				md.read(m)
				m.ok("unstage", m.unstage())
				m.clean()
			})
		})
	}
}

func TestFaultsInExpand(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			t.Parallel()
			published := func(t *testing.T) *machine {
				m := md.filled(t)
				m.ok("stage", m.stage(md.cap()))
				m.ok("publish", m.publish(md.cap(), "a", false))
				m.wrapped.Grow(volumeID, 96*mib)
				return m
			}
			expand := func(m *machine) error {
				_, err := m.expand(m.target("a"), 96*mib)
				return err
			}
			eachFault(t, published, expand, func(m *machine, _ fault, _ error) {
				m.ok("expand again", expand(m))
				if u := m.usage(m.target("a")); u[0].GetTotal() != 80*mib {
					m.t.Errorf("the pod sees %d bytes", u[0].GetTotal())
				}
				if r := m.record(); r.Header.Sequence != 3 {
					m.t.Errorf("the floor is %d", r.Header.Sequence)
				}
				md.read(m)
				m.ok("unpublish", m.unpublish("a"))
				m.ok("unstage", m.unstage())
				m.clean()
			})
		})
	}
}

func TestFaultsInPublishAndUnpublish(t *testing.T) {
	for _, md := range modes()[:2] {
		staged := func(t *testing.T) *machine {
			m := md.filled(t)
			m.ok("stage", m.stage(md.cap()))
			return m
		}
		around := func(m *machine) error {
			return errors.Join(m.publish(md.cap(), "a", false), m.unpublish("a"))
		}
		t.Run(md.name, func(t *testing.T) {
			t.Parallel()
			eachFault(t, staged, around, func(m *machine, _ fault, _ error) {
				m.ok("publish", m.publish(md.cap(), "a", false))
				md.read(m)
				m.ok("unpublish", m.unpublish("a"))
				m.ok("unstage", m.unstage())
				m.clean()
			})
		})
	}
}

// A stage that fails for good at its last step is undone; each step of the
// undoing fails in turn. The answer must then be one after which kubelet comes
// back.
func TestFaultsInUndoing(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			t.Parallel()
			m := md.machine(t)
			m.faults.Disarm()
			m.ok("without a fault", m.stage(md.cap()))
			last := len(m.faults.Trace())
			for n := 1; ; n++ {
				m := md.machine(t)
				m.faults.Arm(last, true, func() error {
					m.faults.Arm(n, false, func() error { return errors.New("injected while undoing") })
					return errors.New("injected")
				})
				err := m.stage(md.cap())
				undone := len(m.faults.Trace()) < n
				m.faults.Disarm()
				if undone { // there are fewer steps
					m.refused("stage", err, codes.Internal)
					m.clean()
					return
				}
				m.refused(fmt.Sprintf("undoing fails at step %d", n), err, codes.Unavailable, "injected", "while undoing")
				m.ok("stage again", m.stage(md.cap()))
				m.ok("unstage", m.unstage())
				m.clean()
			}
		})
	}
}
