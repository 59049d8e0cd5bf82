package driver_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// unreadable puts a state file onto the node that this program does not know,
// and returns its path.
func (m *machine) unreadable(driverName string) string {
	m.t.Helper()
	dir := filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi", driverName, "cryptcsi/abc")
	m.ok("making a directory", os.MkdirAll(dir, 0o750))
	path := filepath.Join(dir, "volume.json")
	m.ok("writing a state file", os.WriteFile(path, []byte(`{"version":2}`), 0o600))
	return path
}

// One state file that cannot be read is said to be so, and all other volumes are
// looked after.
func TestOneUnreadableStateFile(t *testing.T) {
	for _, name := range []string{"other.example.com", "loop.cryptcsi.io"} {
		t.Run(name, func(t *testing.T) {
			path := ""
			timed(t, func(m *machine) { path = m.unreadable(name) }, func(m *machine) {
				states := map[driver.MappingState]driver.MappingInfo{}
				all, err := m.driver.Inspect(m.t.Context())
				m.ok("Inspect", err)
				for _, info := range all {
					states[info.State] = info
				}
				if problem := states[driver.StateUnreadable].Problem; len(all) != 2 || states[driver.StateStaged].VolumeID != volumeID ||
					!errors.Is(problem, errdefs.ErrState) || !strings.Contains(problem.Error(), path) {
					m.t.Errorf("it shows %+v", all)
				}

				stop := m.hydrate()
				time.Sleep(2 * hydratesIn)
				if mp := m.mapping(); mp.Regions > 0 {
					m.t.Errorf("the volume is not finished: %+v", mp)
				}
				stop()

				m.kernel.Reboot()
				m.wrapped.Reboot()
				m.boot += "+"
				m.start()
				_, err = m.driver.Reconcile(m.t.Context())
				if err == nil || !strings.Contains(err.Error(), path) {
					m.t.Errorf("Reconcile does not name the file: %v", err)
				}
				m.ok("taking it away", os.Remove(path))
				m.ok("and its directory", os.Remove(filepath.Dir(path)))
				m.clean() // the volume was given back
			})
		})
	}
}

// A mapping that no state file explains may be that of one that cannot be read.
func TestOrphansBesideAnUnreadableStateFile(t *testing.T) {
	m := newMachine(t).start()
	key := drivertest.NewDEK("x/orphan", dek.Spec{Cipher: dek.CipherXTS})
	key.Claim.UUID = "u"
	_, err := drivertest.Mapper{Kernel: m.kernel}.Open(t.Context(), driver.Volume{Name: driver.MappingName("x", "orphan"), Device: m.kernel.AddDisk(64 * mib)}, key)
	m.ok("an orphan", err)
	path := m.unreadable("x")
	left, err := m.driver.Reconcile(t.Context())
	if err == nil || len(left) != 1 || left[0].Name != m.mapping().Name {
		t.Errorf("Reconcile left %+v, %v", left, err)
	}
	m.ok("taking it away", os.Remove(path))
	if left, err := m.driver.Reconcile(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("Reconcile left %+v, %v", left, err)
	}
	m.clean()
}

// The next process lets the I/O of its own volumes go on that were left suspended.
func TestReconcileResumes(t *testing.T) {
	m := newMachine(t).start()
	m.createDEK(dek.Spec{Cipher: dek.CipherXTS})
	m.ok("stage", m.stage(blockCap()))
	m.kernel.Suspend(m.mapping().Name)
	m.cfg.DriverName = "other.example.com"
	m.start()
	if _, err := m.driver.Reconcile(t.Context()); err != nil || !m.mapping().Suspended {
		t.Errorf("another driver's: %v, %+v", err, m.mapping())
	}
	m.cfg.DriverName = ""
	m.start()
	if c := m.condition(); !c.GetAbnormal() || !strings.Contains(c.GetMessage(), "suspended") {
		t.Errorf("the condition is %v", c)
	}
	left, err := m.driver.Reconcile(t.Context())
	if err != nil || len(left) > 0 || m.mapping().Suspended {
		t.Errorf("Reconcile = %+v, %v: %+v", left, err, m.mapping())
	}
	if c := m.condition(); c.GetAbnormal() {
		t.Errorf("the condition is %v", c)
	}
}
