package driver_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// initialising is a mapper whose first Open is not done yet.
type initialising struct {
	driver.Mapper
	opened *int
}

func (x initialising) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	if *x.opened++; *x.opened == 1 {
		return driver.Mapping{}, errdefs.Errorf(errdefs.ErrUnavailable, "initialising, 1 %%")
	}
	return x.Mapper.Open(ctx, v, d)
}

// begun is a machine with a volume whose first NodeStageVolume has borrowed the
// device and got no further.
func begun(t *testing.T, set func(m *machine)) *machine {
	t.Helper()
	m := newMachine(t)
	set(m)
	opened := 0
	m.mapper = func(x driver.Mapper) driver.Mapper { return initialising{x, &opened} }
	m.start()
	m.refused("the first try", m.stage(mountCap("ext4")), codes.Unavailable, "initialising")
	return m
}

// number is the number of a disk.
func (m *machine) number(d *drivertest.Disk) string {
	m.t.Helper()
	dev, err := m.kernel.Device(d.Path)
	m.ok("looking at a disk", err)
	return dev.Number
}

// renumber attaches the volume's disk anew, and gives the number that it had to
// another volume's new disk, which is returned.
func (m *machine) renumber() *drivertest.Disk {
	m.t.Helper()
	old := m.number(m.disk)
	other := m.wrapped.Create("vol-2", 64*mib)
	m.kernel.Reattach(m.disk.Path, "")
	m.kernel.Reattach(other.Path, old)
	return other
}

// comesToItsOwnDisk restarts the plugin and fails the test unless the new volume is
// staged, at the third try at the latest, on its own disk for good, and the other
// one was not touched.
func (m *machine) comesToItsOwnDisk(other *drivertest.Disk) {
	m.t.Helper()
	m.start()
	if err := m.stage(mountCap("ext4")); err != nil {
		m.refused("the second try", err, codes.Unavailable, "is gone")
		m.ok("the third try", m.stage(mountCap("ext4")))
	}
	m.write(m.staging(), "secret words")
	if m.kernel.Blank(m.disk.Path) || !m.kernel.Blank(other.Path) || m.mapping().Backing != m.number(m.disk) {
		m.t.Errorf("the volume is on %s, its disk is %s; the other one is blank: %v", m.mapping().Backing, m.number(m.disk), m.kernel.Blank(other.Path))
	}
	m.ok("unstage", m.unstage())
	m.ok("stage again", m.stage(mountCap("ext4")))
	m.read(m.staging(), "secret words")
	m.ok("unstage", m.unstage())
	m.clean()
}

func TestTheNumberOfABorrowedDeviceIsGivenToAnother(t *testing.T) {
	for name, set := range map[string]func(m *machine){
		"with numbers of disks":   func(*machine) {},
		"without":                 func(m *machine) { m.kernel.NoSeq = true },
		"without NodeStageVolume": func(m *machine) { m.wrapped.NoStage = true },
		"a driver that stacks":    func(m *machine) { m.wrapped.Stacks = true },
		"handed over":             func(m *machine) { m.cfg.StageWith = driver.StageWithWrapped },
	} {
		t.Run(name, func(t *testing.T) {
			m := begun(t, set)
			other := m.renumber()
			m.comesToItsOwnDisk(other)
		})
	}
}

// The same where the first try was killed, at whichever step.
func TestKilledAndTheNumberIsGivenToAnother(t *testing.T) {
	first := func(t *testing.T) *machine {
		m := newMachine(t)
		m.mapper = func(x driver.Mapper) driver.Mapper { return initialising{x, new(int)} }
		return m.start()
	}
	m := first(t)
	m.faults.Disarm()
	m.refused("without a fault", m.stage(mountCap("ext4")), codes.Unavailable)
	for n, step := range m.faults.Trace() {
		t.Run(fmt.Sprintf("%d %s", n+1, step), func(t *testing.T) {
			m := first(t)
			m.faults.Arm(n+1, false, func() error { panic(drivertest.Killed{}) })
			m.refused("killed", m.stage(mountCap("ext4")), codes.Internal, "killed")
			m.faults.Disarm()
			m.mapper = nil
			other := m.renumber()
			m.comesToItsOwnDisk(other)
		})
	}
}

// The borrowed device goes away, and the disk comes back as another one.
func TestABorrowedDeviceIsGone(t *testing.T) {
	for _, restart := range []bool{false, true} {
		m := begun(t, func(*machine) {})
		m.kernel.Reattach(m.disk.Path, "")
		if restart {
			m.start()
		}
		m.refused("the second try", m.stage(mountCap("ext4")), codes.Unavailable, "is gone")
		m.clean()
		m.ok("the third try", m.stage(mountCap("ext4")))
		m.ok("unstage", m.unstage())
		m.clean()
	}
}

// An engine that is restarted takes the device from below a staged volume.
func TestTheDeviceOfAStagedVolumeIsGone(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			m := md.filled(t)
			m.ok("stage", m.stage(md.cap()))
			m.ok("publish", m.publish(md.cap(), "a", false))
			m.kernel.Reattach(m.disk.Path, "")
			m.refused("publish", m.publish(md.cap(), "b", false), codes.FailedPrecondition, "is gone")
			m.refused("stage in use", m.stage(md.cap()), codes.Unavailable, "is gone", "still in use", m.target("a"))
			m.ok("unpublish", m.unpublish("a"))
			m.refused("stage", m.stage(md.cap()), codes.Unavailable, "is gone")
			m.clean()
			m.ok("stage anew", m.stage(md.cap()))
			md.read(m)
			m.ok("publish", m.publish(md.cap(), "b", false))
			m.ok("unpublish", m.unpublish("b"))
			m.ok("unstage", m.unstage())
			m.clean()
		})
	}
}

// A state file of before this was noted: where a mapping is open the volume goes
// on, else it is borrowed anew.
func TestStateWithoutTheBorrowedDevice(t *testing.T) {
	for name, tt := range map[string]struct {
		first    func(driver.Mapper) driver.Mapper
		borrowed int
	}{
		"open":     {func(x driver.Mapper) driver.Mapper { return unmade{x} }, 0},
		"not open": {func(x driver.Mapper) driver.Mapper { return initialising{x, new(int)} }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.mapper = tt.first
			m.start()
			m.refused("the first try", m.stage(mountCap("ext4")), codes.Unavailable)
			m.mapper = nil
			m.forgetDevice()
			m.start()
			m.faults.Disarm()
			m.ok("stage", m.stage(mountCap("ext4")))
			if n := m.count("rpc NodePublishVolume"); n != tt.borrowed {
				t.Errorf("borrowed %d times more, want %d", n, tt.borrowed)
			}
			m.ok("unstage", m.unstage())
			m.clean()
		})
	}
}

// forgetDevice takes out of the state file which device was borrowed.
func (m *machine) forgetDevice() {
	m.t.Helper()
	states, _ := filepath.Glob(filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/*/cryptcsi/*/volume.json"))
	if len(states) != 1 {
		m.t.Fatalf("state files: %v", states)
	}
	data, err := os.ReadFile(states[0])
	m.ok("reading the state", err)
	before := regexp.MustCompile(`(?m)^\s*"device.*\n`).ReplaceAll(data, nil)
	if string(before) == string(data) {
		m.t.Fatalf("the state does not say which device was borrowed: %s", data)
	}
	m.ok("writing the state", os.WriteFile(states[0], before, 0o600))
}

// unmade is a mapper that cannot note that a volume is finished.
type unmade struct{ driver.Mapper }

func (unmade) MarkMade(context.Context, driver.Volume, dek.DEK) (driver.Mapping, error) {
	return driver.Mapping{}, errdefs.Errorf(errdefs.ErrUnavailable, "injected")
}
