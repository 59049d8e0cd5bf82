package driver_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/driver"
)

// foreign mounts a disk, as the wrapped driver does by itself without us, and
// returns a check that this is still mounted.
func (m *machine) foreign(device, path string) (stays func()) {
	m.t.Helper()
	m.ok("making the directory", os.MkdirAll(path, 0o750))
	m.ok("making a filesystem", m.kernel.Make(m.t.Context(), device, "ext4", nil, false))
	m.ok("mounting it", m.kernel.Mount(m.t.Context(), device, path, "ext4", nil))
	mounts, err := m.kernel.List()
	m.ok("listing the mounts", err)
	theirs := mounts[len(mounts)-1]
	return func() {
		m.t.Helper()
		mounts, err := m.kernel.List()
		if err != nil || !slices.Contains(mounts, theirs) {
			m.t.Errorf("%+v was unmounted: %+v, %v", theirs, mounts, err)
		}
	}
}

// Whatever is refused and undone, a filesystem that the volume did not put at or
// below its staging path stays, and the wrapped driver is not told to take it away.
func TestAForeignMountStays(t *testing.T) {
	for name, set := range map[string]func(m *machine) (path string){
		"no key":      func(m *machine) string { m.keys.Lose(dekID); return m.staging() },
		"a key":       func(m *machine) string { return m.staging() },
		"handed over": func(m *machine) string { m.cfg.StageWith = driver.StageWithWrapped; return m.staging() },
		"below":       func(m *machine) string { m.keys.Lose(dekID); return filepath.Join(m.staging(), volumeID) },
		"below, handed over": func(m *machine) string {
			m.cfg.StageWith = driver.StageWithWrapped
			return filepath.Join(m.staging(), volumeID)
		},
	} {
		for _, own := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				m := newMachine(t)
				path := set(m)
				m.start()
				disk := m.wrapped.Create("other", 64*mib)
				if own {
					disk = m.disk
				}
				stays := m.foreign(disk.Path, path)
				m.refused("stage", m.stage(mountCap("ext4")), codes.FailedPrecondition, "did not put there", path, "unmount it")
				stays()
				if calls := m.wrapped.Calls(); len(calls) > 0 {
					t.Errorf("the wrapped driver got %v", calls)
				}
			})
		}
	}
}

// The same where an earlier try has left something.
func TestAForeignMountStaysAfterAnEarlierTry(t *testing.T) {
	for name, set := range map[string]func(m *machine){
		"mounted by us": func(*machine) {},
		"handed over":   func(m *machine) { m.cfg.StageWith = driver.StageWithWrapped },
		"handed over to one that mounts below": func(m *machine) {
			m.cfg.StageWith, m.wrapped.Below = driver.StageWithWrapped, true
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := begun(t, set)
			m.reboot()
			path := m.staging()
			if m.wrapped.Below {
				path = filepath.Join(path, volumeID)
			}
			stays := m.foreign(m.wrapped.Create("other", 64*mib).Path, path)
			_, err := m.driver.Reconcile(t.Context())
			m.ok("tidying up", err)
			stays()
			m.refused("stage", m.stage(mountCap("ext4")), codes.FailedPrecondition, "did not put there")
			stays()
		})
	}
	m := begun(t, func(*machine) {})
	stays := m.foreign(m.wrapped.Create("other", 64*mib).Path, m.staging())
	m.refused("stage", m.stage(mountCap("ext4")), codes.FailedPrecondition, "did not put there")
	stays()
	if use := m.wrapped.InUse(); len(use) > 0 {
		t.Errorf("the wrapped driver still has %v", use)
	}
}

// The disk is mounted unencrypted elsewhere, which shows when it is borrowed.
func TestADiskThatIsMountedElsewhereStaysMounted(t *testing.T) {
	m := newMachine(t).start()
	stays := m.foreign(m.disk.Path, filepath.Join(m.dir, "elsewhere"))
	m.refused("stage", m.stage(mountCap("ext4")), codes.FailedPrecondition, "mounted unencrypted", "elsewhere")
	stays()
	if use := m.wrapped.InUse(); len(use) > 0 {
		t.Errorf("the wrapped driver still has %v", use)
	}
}

// Somebody has mounted something over a staged volume.
func TestAMountOverAStagedVolumeStays(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("ext4")))
	stays := m.foreign(m.wrapped.Create("other", 64*mib).Path, m.staging())
	before, _ := m.kernel.List()
	m.refused("unstage", m.unstage(), codes.Unavailable, "over volume", m.staging())
	stays()
	after, _ := m.kernel.List()
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("the mounts have changed: %s", diff)
	}
	m.ok("taking it away", m.kernel.Unmount(t.Context(), m.staging()))
	m.ok("unstage", m.unstage())
	m.clean()
}

// A volume that the wrapped driver staged by itself is unstaged by it, wherever
// at or below the staging path it mounts, and is unstaged only when it is.
func TestUnstagingWhatTheWrappedDriverStaged(t *testing.T) {
	for name, set := range map[string]func(m *machine){
		"at the staging path": func(*machine) {},
		"below":               func(m *machine) { m.wrapped.Below = true },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			set(m)
			m.start()
			m.ok("making the staging path", os.MkdirAll(m.staging(), 0o750))
			_, err := m.wrapped.NodeStageVolume(t.Context(), m.stageRequest(mountCap("ext4")))
			m.ok("staging without us", err)
			m.wrapped.Leaves = true
			m.refused("unstage", m.unstage(), codes.Unavailable, "still mounted at "+m.staging())
			m.wrapped.Leaves = false
			m.ok("unstage", m.unstage())
			m.clean()
			if calls := m.wrapped.Calls(); !slices.Contains(calls, "unstage") {
				t.Errorf("the wrapped driver got %v", calls)
			}
		})
	}
}
