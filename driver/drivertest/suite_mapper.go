package drivertest

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// MapperHarness is what RunMapper needs of a machine.
type MapperHarness struct {
	Mapper    driver.Mapper
	Hydration driver.Hydration // of the same
	Specs     []dek.Spec       // to run everything with
	// NewDevice returns the path of a block device that reads as zeros.
	NewDevice func(t *testing.T, size int64) string
	// Number returns the "major:minor" of a device.
	Number func(t *testing.T, device string) string
	// Grow enlarges a device, and the kernel knows of it.
	Grow func(t *testing.T, device string, size int64)
	// ReadAt and WriteAt go to the device itself, past every cache.
	ReadAt  func(t *testing.T, path string, p []byte, off int64)
	WriteAt func(t *testing.T, path string, p []byte, off int64)
	// CannotWrite tells whether a write to the device fails.
	CannotWrite func(t *testing.T, path string) bool
	// Hold opens a device until release is called.
	Hold func(t *testing.T, path string) (release func())
}

// suiteSize is the size of the devices; they grow by half.
const suiteSize = 40 << 20

// mapperTest is one test with one volume.
type mapperTest struct {
	*testing.T
	MapperHarness
	device string
	v      driver.Volume
	key    dek.DEK
}

// RunMapper checks that a Mapper keeps the promises of the interface's comments.
func RunMapper(t *testing.T, h MapperHarness) {
	tests := []struct {
		name string
		run  func(*mapperTest)
	}{
		{"a new volume", testNewVolume},
		{"a finished volume is never formatted", testFinishedVolume},
		{"finished, and the record does not know", testMadeButPrepared},
		{"interrupted before it was finished", testInterrupted},
		{"no claim", testNoClaim},
		{"another claim", testOtherClaim},
		{"foreign data", testForeignData},
		{"blanked", testBlanked},
		{"the wrong key", testWrongKey},
		{"rolled back", testRolledBack},
		{"another spec", testOtherSpec},
		{"another device under the same name", testOtherDevice},
		{"read-only", testReadOnly},
		{"closing", testClosing},
		{"growing", testGrowing},
		{"a copy gets its own key", testCopy},
		{"a copy read-only", testCopyReadOnly},
		{"not the copy", testNotTheCopy},
		{"hydrating", testHydrating},
		{"hydrating, and closed in the middle", testHydratingInTurns},
		{"a cancelled call", testCancelled},
		{"calls at the same time", testConcurrent},
	}
	for _, spec := range h.Specs {
		name := "integrity " + string(spec.Integrity)
		if spec.Integrity == dek.IntegrityNone {
			name = "no integrity"
		}
		if spec.Discard {
			name += ", discard"
		}
		if spec.IntegrityMode != "" {
			name += ", " + spec.IntegrityMode
		}
		if spec.Layout != "" {
			name += ", layout " + spec.Layout
		}
		t.Run(name, func(t *testing.T) {
			for _, tt := range tests {
				t.Run(tt.name, func(t *testing.T) { tt.run(newMapperTest(t, h, spec)) })
			}
		})
	}
}

func newMapperTest(t *testing.T, h MapperHarness, spec dek.Spec) *mapperTest {
	m := &mapperTest{T: t, MapperHarness: h, device: h.NewDevice(t, suiteSize)}
	m.v = driver.Volume{Name: driver.MappingName("suite.example", t.Name()), Device: m.device}
	id := dek.ID("suite.example/" + m.v.Name)
	id += dek.ID(strings.Repeat(`/"\<%&+~`, dek.MaxID)[:dek.MaxID-len(id)]) // as long as there can be one
	m.key = NewDEK(id, spec)
	m.key.Claim = dek.Claim{Node: "suite", UUID: dek.NewUUID()}
	t.Cleanup(func() {
		if err := h.Mapper.Close(context.WithoutCancel(t.Context()), m.v.Name); err != nil {
			t.Errorf("closing at the end: %v", err)
		}
		m.key.Key.Wipe()
	})
	return m
}

func (m *mapperTest) open() driver.Mapping {
	m.Helper()
	got, err := m.Mapper.Open(m.Context(), m.v, m.key)
	if err != nil {
		m.Fatalf("Open: %v", err)
	}
	return got
}

func (m *mapperTest) markMade() driver.Mapping {
	m.Helper()
	got, err := m.Mapper.MarkMade(m.Context(), m.v, m.key)
	if err != nil {
		m.Fatalf("MarkMade: %v", err)
	}
	return got
}

func (m *mapperTest) close() {
	m.Helper()
	if err := m.Mapper.Close(m.Context(), m.v.Name); err != nil {
		m.Fatalf("Close: %v", err)
	}
}

// refused expects an error of one of the classes, and no mapping.
func (m *mapperTest) refused(what string, v driver.Volume, key dek.DEK, classes ...error) {
	m.Helper()
	_, err := m.Mapper.Open(m.Context(), v, key)
	if err == nil {
		m.Fatalf("%s: opened", what)
	}
	if !slices.ContainsFunc(classes, func(c error) bool { return errors.Is(err, c) }) {
		m.Errorf("%s: %v, which is none of %v", what, err, classes)
	}
	if _, open := m.listed(v.Name); open {
		m.Errorf("%s: there is a mapping", what)
	}
}

func (m *mapperTest) listed(name string) (driver.Mapping, bool) {
	m.Helper()
	all, err := m.Mapper.List()
	if err != nil {
		m.Fatalf("List: %v", err)
	}
	i := slices.IndexFunc(all, func(x driver.Mapping) bool { return x.Name == name })
	if i < 0 {
		return driver.Mapping{}, false
	}
	return all[i], true
}

// finish makes the volume a finished one with data, confirms it, and closes it.
func (m *mapperTest) finish() driver.Mapping {
	m.Helper()
	path := m.open().Path
	m.WriteAt(m.T, path, pattern(), 1<<20)
	made := m.markMade()
	m.close()
	m.key.State, m.key.Header = dek.Formatted, made.Header
	return made
}

// pattern is a sector's worth of data.
func pattern() []byte { return bytes.Repeat([]byte("0123456789abcdef"), 256) }

func (m *mapperTest) hasData(path string) {
	m.Helper()
	got := make([]byte, len(pattern()))
	m.ReadAt(m.T, path, got, 1<<20)
	if !bytes.Equal(got, pattern()) {
		m.Errorf("the data are %.20q…", got)
	}
}

// zeros tells whether n bytes at off are zeros.
func (m *mapperTest) zeros(path string, n, off int64) bool {
	m.Helper()
	got := make([]byte, n)
	m.ReadAt(m.T, path, got, off)
	return bytes.Equal(got, make([]byte, n))
}

func testNewVolume(m *mapperTest) {
	first := m.open()
	if first.Name != m.v.Name || first.Backing != m.Number(m.T, m.device) || first.Number != m.Number(m.T, first.Path) ||
		first.Made || first.ReadOnly || first.Suspended || first.Integrity != m.key.Spec.Integrity || first.Header.UUID != m.key.Claim.UUID {
		m.Errorf("opened %+v for %+v", first, m.key.Claim)
	}
	if first.Size < suiteSize/2 || first.Size > suiteSize-16<<20 {
		m.Errorf("%d bytes of %d are usable", first.Size, suiteSize)
	}
	const mib = 1 << 20
	if !m.zeros(first.Path, mib, 0) || !m.zeros(first.Path, mib, first.Size-mib) {
		m.Error("the ends of a new volume are not zeros")
	}
	m.WriteAt(m.T, first.Path, pattern(), 0)
	m.WriteAt(m.T, first.Path, pattern(), first.Size-4096)
	again := m.open()
	if again.Number != first.Number || again.Made {
		m.Errorf("opened again: %+v, before: %+v", again, first)
	}
	if !m.zeros(first.Path, mib, 0) || !m.zeros(first.Path, mib, first.Size-mib) {
		m.Error("the ends of an unfinished volume are not zeros after Open")
	}
	listed, _ := m.listed(m.v.Name)
	again.Made, again.Header = false, dek.HeaderID{} // List reads no header
	if diff := cmp.Diff(again, listed); diff != "" {
		m.Errorf("List differs from Open: %s", diff)
	}
	made := m.markMade()
	if !made.Made || made.Header.UUID != first.Header.UUID || made.Header.Sequence <= first.Header.Sequence {
		m.Errorf("MarkMade: %+v after %+v", made, first)
	}
	if twice := m.markMade(); twice.Header != made.Header {
		m.Errorf("MarkMade again: %+v after %+v", twice, made)
	}
}

func testFinishedVolume(m *mapperTest) {
	made := m.finish()
	got := m.open()
	if !got.Made || got.Header != made.Header {
		m.Errorf("opened %+v, was %+v", got, made)
	}
	m.hasData(got.Path)
	if again := m.open(); again.Number != got.Number {
		m.Errorf("opened again: %+v", again)
	}
	m.hasData(got.Path)
}

func testMadeButPrepared(m *mapperTest) {
	m.finish()
	m.key.State, m.key.Header = dek.Prepared, dek.HeaderID{}
	got := m.open()
	if !got.Made {
		m.Errorf("opened %+v", got)
	}
	m.hasData(got.Path)
}

func testInterrupted(m *mapperTest) {
	m.open()
	m.close()
	got := m.open()
	if got.Made || got.Header.UUID != m.key.Claim.UUID {
		m.Errorf("opened %+v", got)
	}
	m.close()
	formatted := m.key
	formatted.State, formatted.Header = dek.Formatted, got.Header
	m.refused("not finished, and the record says it is", m.v, formatted, errdefs.ErrState)
}

func testNoClaim(m *mapperTest) {
	key := m.key
	key.Claim = dek.Claim{}
	m.refused("formatting without a claim", m.v, key, errdefs.ErrState, errdefs.ErrInvalid)
	if !m.zeros(m.device, 1<<20, 0) {
		m.Error("something was written")
	}
}

func testOtherClaim(m *mapperTest) {
	m.open()
	m.close()
	key := m.key
	key.Claim = dek.Claim{Node: "suite", UUID: dek.NewUUID()}
	m.refused("the remains of another claim", m.v, key, errdefs.ErrState)
}

func testForeignData(m *mapperTest) {
	// What any of mkfs, a partition table or an old volume leaves: something
	// that tools recognise, at either end.
	mbr := make([]byte, 4096)
	mbr[510], mbr[511] = 0x55, 0xAA
	ext := make([]byte, 4096)
	copy(ext[1024+0x38:], []byte{0x53, 0xEF})
	for _, sector := range [][]byte{mbr, ext, []byte("LUKS\xba\xbe\x00\x01" + string(make([]byte, 4088)))} {
		device := m.NewDevice(m.T, suiteSize)
		m.WriteAt(m.T, device, sector, 0)
		v := m.v
		v.Device = device
		m.refused("foreign data", v, m.key, errdefs.ErrState)
		got := make([]byte, len(sector))
		m.ReadAt(m.T, device, got, 0)
		if !bytes.Equal(got, sector) {
			m.Error("foreign data were overwritten")
		}
	}
}

func testBlanked(m *mapperTest) {
	m.finish()
	v := m.v
	v.Device = m.NewDevice(m.T, suiteSize)
	m.refused("a blank disk in place of a formatted one", v, m.key, errdefs.ErrState)
	if !m.zeros(v.Device, 17<<20, 0) {
		m.Error("something was written")
	}
}

func testWrongKey(m *mapperTest) {
	m.finish()
	wrong := NewDEK(m.key.ID, m.key.Spec)
	defer wrong.Key.Wipe()
	wrong.Claim, wrong.State, wrong.Header = m.key.Claim, m.key.State, m.key.Header
	m.refused("the wrong key", m.v, wrong, errdefs.ErrState, errdefs.ErrDenied)
	wrong.State, wrong.Header = dek.Prepared, dek.HeaderID{}
	wrong.Claim.UUID = dek.NewUUID()
	m.refused("the wrong key of a new volume", m.v, wrong, errdefs.ErrState, errdefs.ErrDenied)
	m.hasData(m.open().Path)
}

func testRolledBack(m *mapperTest) {
	m.finish()
	key := m.key
	key.Header.Sequence++
	m.refused("a header below the floor", m.v, key, errdefs.ErrState)
	key.Header = dek.HeaderID{UUID: dek.NewUUID(), Sequence: 1}
	m.refused("another header", m.v, key, errdefs.ErrState)
}

func testOtherSpec(m *mapperTest) {
	m.finish()
	key := m.key
	switch {
	case m.key.Spec.Layout != "":
		key.Spec.Layout = ""
	case m.key.Spec.Integrity != dek.IntegrityNone:
		key.Spec.Integrity, key.Spec.IntegrityMode = dek.IntegrityNone, ""
	default:
		key.Spec.Integrity, key.Spec.Discard = dek.IntegrityHMAC, false
	}
	m.refused("a header with another spec", m.v, key, errdefs.ErrState)
}

func testOtherDevice(m *mapperTest) {
	m.finish()
	release := m.Hold(m.T, m.open().Path)
	other := newMapperTest(m.T, m.MapperHarness, m.key.Spec)
	v := m.v
	v.Device = other.device
	if _, err := m.Mapper.Open(m.Context(), v, other.key); !errors.Is(err, errdefs.ErrState) {
		m.Errorf("a mapping that is in use was taken for one on another device: %v", err)
	}
	if got, _ := m.listed(m.v.Name); got.Backing != m.Number(m.T, m.device) {
		m.Errorf("the mapping is on %s now", got.Backing)
	}
	release()
}

func testReadOnly(m *mapperTest) {
	v := m.v
	v.ReadOnly = true
	m.refused("formatting read-only", v, m.key, errdefs.ErrState)
	m.finish()
	got, err := m.Mapper.Open(m.Context(), v, m.key)
	if err != nil {
		m.Fatal(err)
	}
	if !got.ReadOnly || !got.Made {
		m.Errorf("opened %+v", got)
	}
	m.hasData(got.Path)
	if !m.CannotWrite(m.T, got.Path) {
		m.Error("a read-only mapping was written to")
	}
	if _, err := m.Mapper.Open(m.Context(), m.v, m.key); !errors.Is(err, errdefs.ErrState) {
		m.Errorf("a read-only mapping was taken for a writable one: %v", err)
	}
}

func testClosing(m *mapperTest) {
	m.close() // nothing there
	path := m.open().Path
	m.markMade()
	release := m.Hold(m.T, path)
	if err := m.Mapper.Close(m.Context(), m.v.Name); !errors.Is(err, errdefs.ErrUnavailable) {
		m.Errorf("closing what is in use: %v", err)
	}
	if _, open := m.listed(m.v.Name); !open {
		m.Error("the mapping is gone under its user")
	}
	release()
	m.close()
	if _, open := m.listed(m.v.Name); open {
		m.Error("closed, and still listed")
	}
	m.close()
}

// settle hydrates the open volume in full and finishes it.
func (m *mapperTest) settle() driver.Mapping {
	m.Helper()
	if got, _ := m.listed(m.v.Name); got.Regions > 0 {
		m.hydrate(true)
		m.hydrated(1)
	}
	finished, err := m.Hydration.Finish(m.Context(), m.v, m.key)
	if err != nil {
		m.Fatalf("Finish: %v", err)
	}
	m.key.Header = finished.Header
	return finished
}

func testGrowing(m *mapperTest) {
	m.finish()
	m.open()
	before := m.settle()
	resize := func() (driver.Mapping, error) { return m.Mapper.Resize(m.Context(), m.v, m.key) }
	m.Grow(m.T, m.device, suiteSize*3/2)
	got, err := resize()
	if err != nil {
		m.Fatal(err)
	}
	least := int64(suiteSize / 2)
	if m.key.Spec.Integrity != dek.IntegrityNone { // tags take some of it
		least = least * 9 / 10
	}
	if got.Size < before.Size+least || got.Size > before.Size+suiteSize/2 || got.Number != before.Number || !got.Made || got.Header.Sequence <= before.Header.Sequence {
		m.Errorf("grew to %+v, was %+v", got, before)
	}
	m.hasData(got.Path)
	m.WriteAt(m.T, got.Path, pattern(), got.Size-4096)
	got = m.settle() // what has grown may hydrate too
	if again, err := resize(); err != nil || again.Header != got.Header || again.Size != got.Size {
		m.Errorf("growing again: %+v, %v", again, err)
	}
	m.close()
	if reopened := m.open(); reopened.Size != got.Size {
		m.Errorf("reopened with %d bytes, had %d", reopened.Size, got.Size)
	}
}

// copied returns a copy of the finished volume, with a record as CloneDEK makes it.
func (m *mapperTest) copied() *mapperTest {
	m.Helper()
	c := newMapperTest(m.T, m.MapperHarness, m.key.Spec)
	c.v.Name = driver.MappingName("suite.example", "copy of "+m.v.Name+c.device)
	c.key.ID = dek.ID("suite.example/" + c.v.Name)
	c.key.State, c.key.Source, c.key.Claim = dek.Rotating, m.key.ID, dek.Claim{Node: "suite", UUID: m.key.Header.UUID}
	c.key.Header, c.key.Previous = dek.HeaderID{UUID: m.key.Header.UUID}, m.key.Key
	chunk := make([]byte, 4<<20)
	for off := int64(0); off < suiteSize; off += int64(len(chunk)) {
		m.ReadAt(m.T, m.device, chunk, off)
		m.WriteAt(m.T, c.device, chunk, off)
	}
	m.Cleanup(func() { _ = m.Mapper.Close(context.WithoutCancel(m.Context()), c.v.Name) })
	return c
}

// ownKey is what ConfirmDEK makes of the record.
func (m *mapperTest) ownKey(got driver.Mapping) {
	m.Helper()
	m.key.State, m.key.Previous = dek.Formatted, secret.Bytes{}
	m.key.Header = dek.HeaderID{UUID: got.Header.UUID, Sequence: got.Header.Sequence}
}

func testCopy(m *mapperTest) {
	made := m.finish()
	c := m.copied()
	before := *c
	got := c.open()
	if !got.Made || got.Header.UUID != made.Header.UUID || got.Header.Sequence != made.Header.Sequence+1 || got.Header.Fingerprint != dek.Fingerprint(c.key.Key) {
		m.Errorf("opened %+v, copied from %+v", got, made)
	}
	c.hasData(got.Path)
	if again := c.open(); again.Header != got.Header || again.Number != got.Number {
		m.Errorf("opened again: %+v, before: %+v", again, got)
	}
	c.close()
	c.ownKey(got)
	reopened := c.open()
	if reopened.Header.UUID != got.Header.UUID || reopened.Header.Sequence != got.Header.Sequence || reopened.Header.Fingerprint != "" {
		m.Errorf("with its own key: %+v, was %+v", reopened, got)
	}
	c.hasData(reopened.Path)
	c.close()

	// Neither opens in the other's place any more.
	as := *m
	as.v.Device = c.device
	as.refused("the copy as its source", as.v, m.key, errdefs.ErrState)
	v := c.v
	v.Device = m.device
	c.refused("the source as its copy", v, c.key, errdefs.ErrState)
	m.hasData(m.open().Path)
	second := before
	second.key.Key = m.key.Key.Clone()
	defer second.key.Key.Wipe()
	second.key.Key.Expose()[0] ^= 1
	second.refused("one copy as another", c.v, second.key, errdefs.ErrState)
}

func testCopyReadOnly(m *mapperTest) {
	made := m.finish()
	c := m.copied()
	head := func() []byte {
		b := make([]byte, 12<<20)
		c.ReadAt(m.T, c.device, b, 0)
		return b
	}
	before := head()
	v := c.v
	v.ReadOnly = true
	got, err := m.Mapper.Open(m.Context(), v, c.key)
	if err != nil {
		m.Fatal(err)
	}
	if !got.ReadOnly || !got.Made || got.Header.Sequence != made.Header.Sequence || got.Header.Fingerprint != dek.Fingerprint(c.key.Previous) {
		m.Errorf("opened %+v, copied from %+v", got, made)
	}
	c.hasData(got.Path)
	c.close()
	if !bytes.Equal(head(), before) {
		m.Error("the header was written")
	}
	if got := c.open(); got.Header.Fingerprint != dek.Fingerprint(c.key.Key) {
		m.Errorf("opened writable: %+v", got)
	}
}

func testNotTheCopy(m *mapperTest) {
	m.finish()
	c := m.copied()
	v := c.v
	v.Device = m.NewDevice(m.T, suiteSize)
	c.refused("a blank disk", v, c.key, errdefs.ErrState)
	if !m.zeros(v.Device, 17<<20, 0) {
		m.Error("something was written")
	}
	key := c.key
	key.Header.Sequence = 100
	c.refused("below the floor", c.v, key, errdefs.ErrState)
	key.Header = dek.HeaderID{UUID: dek.NewUUID()}
	c.refused("another header", c.v, key, errdefs.ErrState)
	key = c.key
	key.Previous = NewDEK("suite.example/other", key.Spec).Key
	defer key.Previous.Wipe()
	c.refused("another source", c.v, key, errdefs.ErrState)
	c.hasData(c.open().Path)
}

// hydrated waits until a mapping has at least that share of its regions.
func (m *mapperTest) hydrated(share float64) driver.Mapping {
	m.Helper()
	const patience = time.Minute
	for until := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		got, open := m.listed(m.v.Name)
		switch {
		case !open || got.Regions == 0:
			m.Fatalf("nothing hydrates: %+v", got)
		case float64(got.Hydrated) >= share*float64(got.Regions):
			return got
		case time.Now().After(until):
			m.Fatalf("only %s after %v", got.Progress(), patience)
		}
	}
}

func (m *mapperTest) hydrate(on bool) {
	m.Helper()
	for range 2 {
		if err := m.Hydration.Hydrate(m.v.Name, on); err != nil {
			m.Fatalf("Hydrate %v: %v", on, err)
		}
	}
}

func testHydrating(m *mapperTest) {
	first := m.open()
	if m.key.Spec.Layout != dek.LayoutClone {
		testNothingToHydrate(m)
		return
	}
	if first.Regions == 0 || first.Hydrated == first.Regions || first.Hydrating {
		m.Fatalf("a new volume hydrates as %+v", first)
	}
	m.WriteAt(m.T, first.Path, pattern(), 1<<20)
	made := m.markMade()
	if made.Regions != first.Regions {
		m.Errorf("MarkMade: %+v", made)
	}
	if _, err := m.Hydration.Finish(m.Context(), m.v, m.key); !errors.Is(err, errdefs.ErrUnavailable) {
		m.Errorf("finished before it was hydrated: %v", err)
	}
	if !m.zeros(first.Path, 1<<20, first.Size/2) {
		m.Error("what was never written is not zeros")
	}
	m.hydrate(true)
	if got, _ := m.listed(m.v.Name); !got.Hydrating {
		m.Errorf("Hydrate: %+v", got)
	}
	m.hydrated(1)
	finished, err := m.Hydration.Finish(m.Context(), m.v, m.key)
	if err != nil {
		m.Fatal(err)
	}
	if finished.Regions != 0 || finished.Hydrated != 0 || finished.Hydrating || finished.Number != first.Number || finished.Size != first.Size ||
		!finished.Made || finished.Header.UUID != made.Header.UUID || finished.Header.Sequence <= made.Header.Sequence {
		m.Errorf("Finish: %+v after %+v", finished, made)
	}
	m.hasData(finished.Path)
	if !m.zeros(finished.Path, 1<<20, finished.Size-1<<20) {
		m.Error("what was never written is not zeros after Finish")
	}
	if again, err := m.Hydration.Finish(m.Context(), m.v, m.key); err != nil || again.Header != finished.Header || again.Number != finished.Number {
		m.Errorf("Finish again: %+v, %v", again, err)
	}
	m.close()
	m.key.State, m.key.Header = dek.Formatted, finished.Header
	if got := m.open(); got.Regions != 0 || got.Header != finished.Header || got.Size != first.Size {
		m.Errorf("opened %+v, was %+v", got, finished)
	}
	m.hasData(first.Path)
}

// testNothingToHydrate: a volume without dm-clone has nothing to do.
func testNothingToHydrate(m *mapperTest) {
	m.markMade()
	m.hydrate(true)
	before, _ := m.listed(m.v.Name)
	if before.Regions != 0 || before.Hydrating {
		m.Errorf("it hydrates: %+v", before)
	}
	made := m.open().Header
	if got, err := m.Hydration.Finish(m.Context(), m.v, m.key); err != nil || got.Header != made || got.Number != before.Number {
		m.Errorf("Finish: %+v, %v; was %+v", got, err, before)
	}
	m.close()
	if err := m.Hydration.Hydrate(m.v.Name, true); err != nil {
		m.Errorf("Hydrate of what is not open: %v", err)
	}
}

func testHydratingInTurns(m *mapperTest) {
	if m.key.Spec.Layout != dek.LayoutClone {
		return
	}
	path := m.open().Path
	m.WriteAt(m.T, path, pattern(), 1<<20)
	made := m.markMade()
	m.key.State, m.key.Header = dek.Formatted, made.Header
	m.hydrate(true)
	m.hydrated(.05)
	m.hydrate(false)
	stopped, _ := m.listed(m.v.Name)
	m.close()
	again := m.open()
	if again.Hydrating || again.Regions != stopped.Regions || again.Hydrated < stopped.Hydrated || again.Header != made.Header {
		m.Errorf("opened %+v, was %+v", again, stopped)
	}
	m.hasData(path)
	m.hydrate(true)
	m.close() // while it runs
	m.hasData(m.open().Path)
	m.hydrate(true)
	m.hydrated(1)
	finished, err := m.Hydration.Finish(m.Context(), m.v, m.key)
	if err != nil || finished.Regions != 0 {
		m.Fatalf("Finish: %+v, %v", finished, err)
	}
	m.hasData(path)
	m.key.Header = finished.Header
}

func testCancelled(m *mapperTest) {
	ctx, cancel := context.WithCancel(m.Context())
	cancel()
	_, err := m.Mapper.Open(ctx, m.v, m.key)
	if !errors.Is(err, context.Canceled) && !errors.Is(err, errdefs.ErrUnavailable) {
		m.Errorf("a cancelled Open: %v", err)
	}
	m.finish()
	m.hasData(m.open().Path)
}

func testConcurrent(m *mapperTest) {
	others := make([]*mapperTest, 3)
	for i := range others {
		others[i] = newMapperTest(m.T, m.MapperHarness, m.key.Spec)
		others[i].v.Name = driver.MappingName("suite.example", m.v.Name+string(rune('a'+i)))
		m.Cleanup(func() {
			if err := m.Mapper.Close(context.Background(), others[i].v.Name); err != nil {
				m.Error(err)
			}
		})
	}
	var wg sync.WaitGroup
	for _, o := range others {
		wg.Go(func() {
			if _, err := o.Mapper.Open(m.Context(), o.v, o.key); err != nil {
				m.Errorf("one of several volumes: %v", err)
			}
		})
		wg.Go(func() {
			if _, err := m.Mapper.Open(m.Context(), m.v, m.key); err != nil && !errors.Is(err, errdefs.ErrConflict) {
				m.Errorf("one volume, several times: %v", err)
			}
		})
	}
	wg.Wait()
	m.open()
}
