package drivertest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// HostHarness is what RunMounts and RunFilesystems need of a machine.
type HostHarness struct {
	Host Host
	// NewDevice returns the path of a block device that reads as zeros.
	NewDevice func(t *testing.T, size int64) string
	// Grow enlarges a device. Its kernel may have to be asked to look.
	Grow func(t *testing.T, device string, size int64)
	// Reuse gives a device's number to another one, whose node is at its path.
	Reuse func(t *testing.T, device string)
	// Unlink removes a node that Alias made.
	Unlink func(path string) error
	// Use writes to a device itself.
	Use func(t *testing.T, device string)
	// Types are the filesystems to try, the first one also for mounts.
	Types []string
}

// Sizes that every filesystem is content with.
const (
	fsSize    = 512 << 20
	grownSize = 768 << 20
)

// mountsTest is one test with one filesystem on a device.
type mountsTest struct {
	*testing.T
	HostHarness
	device string
	number string
	dir    string
}

// RunMounts checks that Mounts and Devices keep their promises.
func RunMounts(t *testing.T, h HostHarness) {
	for name, run := range map[string]func(*mountsTest){
		"a filesystem":     testMountFilesystem,
		"binds":            testBinds,
		"device nodes":     testNodes,
		"layers":           testLayers,
		"what cannot work": testBadMounts,
		"devices":          testDevices,
	} {
		t.Run(name, func(t *testing.T) {
			m := &mountsTest{T: t, HostHarness: h, device: h.NewDevice(t, fsSize), dir: t.TempDir()}
			dev, err := h.Host.Device(m.device)
			if err != nil {
				t.Fatal(err)
			}
			m.number = dev.Number
			if err := h.Host.Make(t.Context(), m.device, h.Types[0], nil, false); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(m.unmountEverything)
			run(m)
		})
	}
}

// unmountEverything takes away what a test left below its directory.
func (m *mountsTest) unmountEverything() {
	for _, l := range slices.Backward(m.below()) {
		if err := m.Host.Unmount(context.Background(), l.Target); err != nil {
			m.Error(err)
		}
	}
}

// below returns the mounts below the test's directory.
func (m *mountsTest) below() []driver.Mount {
	m.Helper()
	all, err := m.Host.List()
	if err != nil {
		m.Fatal(err)
	}
	return slices.DeleteFunc(all, func(l driver.Mount) bool { return filepath.Dir(l.Target) != m.dir })
}

func (m *mountsTest) shows(want ...driver.Mount) {
	m.Helper()
	if diff := cmp.Diff(want, m.below()); diff != "" && len(want)+len(m.below()) > 0 {
		m.Errorf("the mount table: %s", diff)
	}
}

func (m *mountsTest) mkdir(name string) string {
	m.Helper()
	path := filepath.Join(m.dir, name)
	if err := os.Mkdir(path, 0o700); err != nil {
		m.Fatal(err)
	}
	return path
}

func (m *mountsTest) mkfile(name string) string {
	m.Helper()
	path := filepath.Join(m.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		m.Fatal(err)
	}
	return path
}

func (m *mountsTest) mount(source, target, fstype string, options ...string) {
	m.Helper()
	if err := m.Host.Mount(m.Context(), source, target, fstype, options); err != nil {
		m.Fatalf("mount %s at %s: %v", source, target, err)
	}
}

func (m *mountsTest) unmount(target string) {
	m.Helper()
	if err := m.Host.Unmount(m.Context(), target); err != nil {
		m.Fatal(err)
	}
}

func testMountFilesystem(m *mountsTest) {
	fstype := m.Types[0]
	dir := m.mkdir(`with space and \ backslash`)
	m.mount(m.device, dir, fstype, "noatime")
	m.shows(driver.Mount{Target: dir, Device: m.number, FSType: fstype})
	m.unmount(dir)
	m.shows()
	m.mount(m.device, dir, fstype, "ro", "noatime")
	m.shows(driver.Mount{Target: dir, Device: m.number, FSType: fstype, ReadOnly: true})
	m.unmount(dir)
}

func testBinds(m *mountsTest) {
	fstype := m.Types[0]
	staging, a, b := m.mkdir("staging"), m.mkdir("a"), m.mkdir("b")
	m.mount(m.device, staging, fstype)
	m.mount(staging, a, "", "bind", "nosuid", "noatime")
	m.mount(staging, b, "", "bind", "ro")
	m.shows(
		driver.Mount{Target: staging, Device: m.number, FSType: fstype},
		driver.Mount{Target: a, Device: m.number, FSType: fstype},
		driver.Mount{Target: b, Device: m.number, FSType: fstype, ReadOnly: true},
	)
	m.unmount(staging) // the others stay
	m.unmount(b)
	m.shows(driver.Mount{Target: a, Device: m.number, FSType: fstype})
}

func testNodes(m *mountsTest) {
	file := m.mkfile("node")
	m.mount(m.device, file, "", "bind")
	got := m.below()
	if len(got) != 1 || got[0].Device != m.number || !got[0].Node || got[0].Target != file || got[0].ReadOnly {
		m.Fatalf("the mount table shows %+v", got)
	}
	if dev, err := m.Host.Device(file); err != nil || dev.Number != m.number || dev.Size != fsSize {
		m.Errorf("the bound node is %+v, %v", dev, err)
	}
	// As a pod's target is bound from the mapping's node.
	again := m.mkfile("again")
	m.mount(file, again, "", "bind", "ro")
	if got := m.below(); len(got) != 2 || got[1].Device != m.number || !got[1].Node || !got[1].ReadOnly {
		m.Errorf("the mount table shows %+v", got)
	}
	m.unmount(again)
	m.unmount(file)
	alias := filepath.Join(m.dir, "alias")
	if err := m.Host.Alias(alias, m.number); err != nil {
		m.Fatal(err)
	}
	m.mount(alias, file, "", "bind")
	for _, stale := range []bool{false, true} {
		if got := m.below(); len(got) != 1 || got[0].Device != m.number || !got[0].Node || got[0].Stale != stale {
			m.Errorf("the mount table shows %+v, want stale %v", got, stale)
		}
		if err := m.Unlink(alias); err != nil && !stale {
			m.Error(err)
		}
	}
}

func testLayers(m *mountsTest) {
	file := m.mkfile("node")
	other := m.NewDevice(m.T, fsSize)
	m.mount(m.device, file, "", "bind")
	m.mount(other, file, "", "bind")
	if got := m.below(); len(got) != 2 {
		m.Fatalf("two layers are %+v", got)
	}
	if dev, err := m.Host.Device(file); err != nil || dev.Number == m.number {
		m.Errorf("the upper layer is %+v, %v", dev, err)
	}
	m.unmount(file)
	if dev, err := m.Host.Device(file); err != nil || dev.Number != m.number {
		m.Errorf("the lower layer is %+v, %v", dev, err)
	}
	m.unmount(file)
	m.shows()
	if err := m.Host.Unmount(m.Context(), file); err == nil {
		m.Error("unmounted what is not mounted")
	}
}

func testBadMounts(m *mountsTest) {
	dir := m.mkdir("dir")
	for what, err := range map[string]error{
		"no source":          m.Host.Mount(m.Context(), filepath.Join(m.dir, "none"), dir, m.Types[0], nil),
		"no target":          m.Host.Mount(m.Context(), m.device, filepath.Join(m.dir, "none"), m.Types[0], nil),
		"no source to bind":  m.Host.Mount(m.Context(), filepath.Join(m.dir, "none"), dir, "", []string{"bind"}),
		"blank device":       m.Host.Mount(m.Context(), m.NewDevice(m.T, fsSize), dir, m.Types[0], nil),
		"a node upon a dir":  m.Host.Mount(m.Context(), m.device, dir, "", []string{"bind"}),
		"a cancelled caller": m.Host.Mount(cancelled(m.Context()), m.device, dir, m.Types[0], nil),
	} {
		if err == nil {
			m.Errorf("%s: mounted", what)
		}
	}
	m.shows()
}

func cancelled(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}

func testDevices(m *mountsTest) {
	first, err := m.Host.Device(m.device)
	if err != nil || first.Size != fsSize || first.Number == "" || len(first.Holders) > 0 {
		m.Errorf("the device is %+v, %v", first, err)
	}
	other, err := m.Host.Device(m.NewDevice(m.T, fsSize))
	if err != nil || other.Number == first.Number || other.Seq == first.Seq && first.Seq != 0 {
		m.Errorf("another device is %+v, the first %+v, %v", other, first, err)
	}
	if _, err := m.Host.Device(filepath.Join(m.dir, "none")); !os.IsNotExist(err) {
		m.Errorf("no device: %v", err)
	}
	if _, err := m.Host.Device(m.mkfile("file")); err == nil || os.IsNotExist(err) {
		m.Errorf("a file: %v", err)
	}
	m.Grow(m.T, m.device, grownSize)
	if err := m.Host.Rescan(m.Context(), m.device); err != nil {
		m.Error(err)
	}
	if grown, err := m.Host.Device(m.device); err != nil || grown.Size != grownSize || grown.Seq != first.Seq {
		m.Errorf("after growing: %+v, %v", grown, err)
	}
	testActivity(m, first.Number)
	m.Reuse(m.T, m.device)
	reused, err := m.Host.Device(m.device)
	if err != nil || reused.Number != first.Number || reused.Seq == first.Seq && first.Seq != 0 {
		m.Errorf("the device was %+v, another one with its number is %+v, %v", first, reused, err)
	}
	alias := filepath.Join(m.dir, "alias")
	if err := m.Host.Alias(alias, "4095:12345"); err != nil {
		m.Fatal(err)
	}
	if _, err := m.Host.Device(alias); !errors.Is(err, errdefs.ErrUnavailable) || os.IsNotExist(err) || errors.Is(err, os.ErrNotExist) {
		m.Errorf("a node whose device has gone: %v", err)
	}
	for _, dev := range []driver.Device{other, first, first} {
		if err := m.Host.Alias(alias, dev.Number); err != nil {
			m.Fatal(err)
		}
		if got, err := m.Host.Device(alias); err != nil || got.Number != dev.Number {
			m.Errorf("the alias is %+v, %v", got, err)
		}
	}
}

// testActivity: who reads and writes is seen.
func testActivity(m *mountsTest, number string) {
	activity := func() uint64 {
		m.Helper()
		a, err := m.Host.Activity(number)
		if err != nil || a.InFlight > 0 {
			m.Fatalf("activity: %+v, %v", a, err)
		}
		return a.Done
	}
	before := activity()
	if again := activity(); again != before {
		m.Errorf("nobody asked anything, and %d requests were answered", again-before)
	}
	m.Use(m.T, m.device)
	if after := activity(); after <= before {
		m.Errorf("%d requests before the device was used, %d after", before, after)
	}
	if _, err := m.Host.Activity("4095:12345"); err == nil {
		m.Error("a device that is not there was active")
	}
}

// RunFilesystems checks that Filesystems keep their promises.
func RunFilesystems(t *testing.T, h HostHarness) {
	for _, fstype := range h.Types {
		t.Run(fstype, func(t *testing.T) { testFilesystem(t, h, fstype) })
	}
	t.Run("unknown", func(t *testing.T) {
		device := h.NewDevice(t, fsSize)
		if got, err := h.Host.Probe(t.Context(), device); err != nil || got != (driver.FSInfo{}) {
			t.Errorf("a blank device holds %+v, %v", got, err)
		}
	})
}

func testFilesystem(t *testing.T, h HostHarness, fstype string) {
	ctx, device, dir := t.Context(), h.NewDevice(t, fsSize), t.TempDir()
	if err := h.Host.Make(cancelled(ctx), device, fstype, nil, false); err == nil {
		t.Error("a cancelled caller got a filesystem")
	}
	for i, made := range append(slices.Clone(h.Types), fstype, fstype) { // over each other
		if err := h.Host.Make(ctx, device, made, nil, i%2 == 0); err != nil {
			t.Fatalf("making %s: %v", made, err)
		}
		// A filesystem does not use the last bytes of every device.
		const slack = 1 << 20
		got, err := h.Host.Probe(ctx, device)
		if err != nil || got.Type != made || !got.Clean || got.Size > fsSize || got.Size < fsSize-slack {
			t.Errorf("a new %s shows as %+v, %v", made, got, err)
		}
	}
	if err := h.Host.Check(ctx, device, fstype); err != nil {
		t.Errorf("checking: %v", err)
	}
	if err := h.Host.Mount(ctx, device, dir, fstype, nil); err != nil {
		t.Fatal(err)
	}
	mounted := true
	defer func() {
		if mounted {
			_ = h.Host.Unmount(context.WithoutCancel(ctx), dir)
		}
	}()
	before, err := h.Host.Usage(dir)
	if err != nil || before.Total < fsSize/2 || before.Total > fsSize || before.Available > before.Total || before.Used > before.Total/2 {
		t.Errorf("usage %+v, %v", before, err)
	}
	h.Grow(t, device, grownSize)
	if err := h.Host.Rescan(ctx, device); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := h.Host.Grow(ctx, device, dir, fstype); err != nil {
			t.Fatalf("growing: %v", err)
		}
	}
	after, err := h.Host.Usage(dir)
	if err != nil || after.Total < before.Total+(grownSize-fsSize)/2 {
		t.Errorf("usage after growing %+v, %v; before %+v", after, err, before)
	}
	mounted = false
	if err := h.Host.Unmount(ctx, dir); err != nil {
		t.Fatal(err)
	}
	if got, err := h.Host.Probe(ctx, device); err != nil || got.Type != fstype || got.Size < grownSize-(16<<20) || !got.Clean {
		t.Errorf("after growing it shows as %+v, %v", got, err)
	}
}
