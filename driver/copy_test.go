package driver_test

import (
	"context"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
)

const copyID = "vol-copy"

// copied turns to a copy of the machine's volume, of that size: its disk, and
// its record as the controller makes it.
func (m *machine) copied(size int64) *machine {
	m.t.Helper()
	source, from := m.dekID(), m.disk
	m.id, m.disk = copyID, m.wrapped.Create(copyID, size)
	m.kernel.CopyDisk(from.Path, m.disk.Path)
	d, err := m.keys.CloneDEK(context.Background(), m.dekID(), dek.Spec{Name: "copy", Cipher: dek.CipherXTS}, source)
	m.ok("CloneDEK", err)
	d.Wipe()
	return m
}

// copied is a machine with a copy of a volume that has data.
func (md mode) copied(t *testing.T) *machine {
	return md.filled(t).copied(64 * mib)
}

// own fails the test unless the volume has a key of its own by now.
func (m *machine) own(sequence uint64) {
	m.t.Helper()
	if r := m.record(); r.State != dek.Formatted || r.Header.Sequence != sequence {
		m.t.Errorf("the record is %s at %+v, want sequence %d", r.State, r.Header, sequence)
	}
}

func TestFirstUseOfACopy(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			m := md.copied(t)
			before := m.wrapped.Create("before", 64*mib)
			m.kernel.CopyDisk(m.disk.Path, before.Path)
			m.ok("deleting the source's key", m.keys.DeleteDEK(t.Context(), dekID))
			for range 2 {
				m.ok("stage", m.stage(md.cap()))
				md.read(m)
				m.own(3) // format, made, its own key
				m.ok("unstage", m.unstage())
				m.clean()
			}
			m.kernel.SwapDisks(m.disk.Path, before.Path)
			m.refused("rolled back to before", m.stage(md.cap()), codes.FailedPrecondition)
			m.clean()
		})
	}
}

func TestFaultsInTheFirstStageOfACopy(t *testing.T) {
	for _, md := range modes() {
		for _, giveUp := range []bool{false, true} {
			t.Run(md.name, func(t *testing.T) {
				t.Parallel()
				settled := settledStage(md, giveUp)
				eachFault(t, md.copied, func(m *machine) error { return m.stage(md.cap()) }, func(m *machine, f fault, err error) {
					settled(m, f, err)
					md.read(m)
					m.own(3)
					m.ok("unstage", m.unstage())
					m.clean()
				})
			})
		}
	}
}

// XFS mounts each UUID once on a node.
func TestSourceAndCopyOnOneNode(t *testing.T) {
	for _, first := range []string{volumeID, copyID} {
		m := modes()[0].copied(t)
		disks := map[string]string{volumeID: volumeID, copyID: copyID}
		source, other := m.wrapped.Volume(volumeID), m.wrapped.Volume(copyID)
		use := func(id string) {
			m.id, m.disk = disks[id], source
			if id == copyID {
				m.disk = other
			}
		}
		second := volumeID
		if first == volumeID {
			second = copyID
		}
		for _, id := range []string{first, second} {
			use(id)
			m.ok("stage "+id, m.stage(mountCap("xfs")))
			m.read(m.staging(), "secret words")
		}
		for _, id := range []string{first, second} {
			use(id)
			m.ok("unstage "+id, m.unstage())
		}
		m.clean()
	}
}

// A read-only use writes nothing, so the copy keeps its source's key until it is
// used writable; several nodes may read it until then.
func TestCopyReadOnly(t *testing.T) {
	m := modes()[0].copied(t)
	before := m.content()
	for range 2 {
		m.ok("stage read-only", m.stage(capability(manyReaders, mountCap("xfs"))))
		m.read(m.staging(), "secret words")
		m.ok("unstage", m.unstage())
	}
	if r := m.record(); r.State != dek.Rotating || r.Claim != (dek.Claim{}) {
		t.Errorf("the record is %s, claimed %+v", r.State, r.Claim)
	}
	if m.content() != before {
		t.Error("something was written")
	}
	m.ok("stage", m.stage(mountCap("xfs")))
	m.read(m.staging(), "secret words")
	m.own(3)
	m.ok("unstage", m.unstage())
	m.clean()
}

// content is what stands in the header area.
func (m *machine) content() string {
	b := make([]byte, mib)
	m.ok("reading the disk", m.kernel.ReadAt(m.disk.Path, b, 0))
	return string(b)
}

func TestCopyOnTwoNodes(t *testing.T) {
	m := modes()[1].copied(t)
	m.keys.Seize(m.dekID(), dek.Claim{Node: "node-2", UUID: m.record().Header.UUID})
	before := m.content()
	m.refused("stage", m.stage(blockCap()), codes.Aborted, "node-2")
	if m.content() != before {
		t.Error("something was written")
	}
	m.ok("unstage", m.unstage())
	m.clean()
}

// A node that died after the header was written, and a floor that was raised
// without proof of the key since: the next stage still ends it.
func TestCopyAtItsFloor(t *testing.T) {
	m := modes()[0].copied(t)
	d, err := m.keys.GetDEK(t.Context(), m.dekID())
	m.ok("GetDEK", err)
	got, err := drivertest.Mapper{Kernel: m.kernel}.Open(t.Context(), driver.Volume{Name: driver.MappingName("loop.cryptcsi.io", m.id), Device: m.disk.Path}, d)
	m.ok("Open", err)
	d.Wipe()
	m.reboot()
	m.ok("ConfirmDEK", m.keys.ConfirmDEK(t.Context(), m.dekID(), dek.HeaderID{UUID: got.Header.UUID, Sequence: got.Header.Sequence}))
	if r := m.record(); r.State != dek.Rotating || r.Header.Sequence != 3 {
		t.Errorf("the record is %s at %+v", r.State, r.Header)
	}
	m.ok("stage", m.stage(mountCap("xfs")))
	m.read(m.staging(), "secret words")
	m.own(3)
}

func TestLargerCopy(t *testing.T) {
	m := modes()[0].filled(t).copied(96 * mib)
	m.ok("stage", m.stage(mountCap("xfs")))
	m.read(m.staging(), "secret words")
	m.own(4)
	m.ok("publish", m.publish(mountCap("xfs"), "a", false))
	if u := m.usage(m.target("a")); u[0].GetTotal() != 80*mib {
		t.Errorf("the pod sees %d bytes", u[0].GetTotal())
	}
}

// What is no copy of the source is not opened, and never formatted.
func TestNotTheCopy(t *testing.T) {
	for name, swap := range map[string]func(m *machine){
		"a blank disk": func(m *machine) { m.kernel.BlankDisk(m.disk.Path) },
		"a copy shorter": func(m *machine) {
			m.kernel.GrowDisk(m.disk.Path, 32*mib)
			_ = m.kernel.Rescan(m.t.Context(), m.disk.Path)
		},
		"another volume's disk": func(m *machine) { m.kernel.CopyDisk(m.other(), m.disk.Path) },
	} {
		t.Run(name, func(t *testing.T) {
			m := modes()[0].copied(t)
			swap(m)
			before := m.content()
			m.refused("stage", m.stage(mountCap("xfs")), codes.FailedPrecondition)
			if m.content() != before || m.record().State != dek.Rotating {
				t.Error("something was written")
			}
			m.clean()
		})
	}
}

// other is the disk of a finished volume that is no relative.
func (m *machine) other() string {
	m.t.Helper()
	id, disk := m.id, m.disk
	defer func() { m.id, m.disk = id, disk }()
	m.id, m.disk = "vol-other", m.wrapped.Create("vol-other", 64*mib)
	d, err := m.keys.CreateDEK(m.t.Context(), m.dekID(), dek.Spec{Cipher: dek.CipherXTS})
	m.ok("CreateDEK", err)
	d.Wipe()
	m.ok("stage another", m.stage(mountCap("xfs")))
	m.ok("unstage another", m.unstage())
	return m.disk.Path
}

// Once the copy has its own key, neither opens in the other's place.
func TestSourceAndCopyExchanged(t *testing.T) {
	m := modes()[0].copied(t)
	source, other := m.wrapped.Volume(volumeID), m.wrapped.Volume(copyID)
	m.ok("stage", m.stage(mountCap("xfs")))
	m.ok("unstage", m.unstage())
	m.kernel.SwapDisks(source.Path, other.Path)
	m.refused("the source in place of the copy", m.stage(mountCap("xfs")), codes.FailedPrecondition)
	m.id, m.disk = volumeID, source
	m.refused("the copy in place of the source", m.stage(mountCap("xfs")), codes.FailedPrecondition)
	m.clean()
}

// A source that was never used has nothing on its disk, and so has its copy.
func TestCopyOfWhatWasNeverUsed(t *testing.T) {
	m := newMachine(t).start().copied(64 * mib)
	m.ok("stage", m.stage(mountCap("xfs")))
	m.own(2)
	m.ok("unstage", m.unstage())
	m.clean()
}

// A volume whose key was replaced gets a header under the new one, also when it
// is grown before it is staged again.
func TestRotatedKey(t *testing.T) {
	for _, md := range modes() {
		t.Run(md.name, func(t *testing.T) {
			m := md.filled(t)
			m.ok("stage", m.stage(md.cap()))
			m.keys.Rotate(m.dekID())
			m.wrapped.Grow(m.id, 96*mib)
			_, err := m.expand(m.staging(), 96*mib)
			m.ok("expand", err)
			if r := m.record(); r.State != dek.Rotating || r.Header.Sequence != 3 {
				t.Errorf("the record is %s at %+v", r.State, r.Header)
			}
			m.ok("unstage", m.unstage())
			for range 2 {
				m.ok("stage", m.stage(md.cap()))
				md.read(m)
				m.own(4)
				m.ok("unstage", m.unstage())
				m.clean()
			}
		})
	}
}
