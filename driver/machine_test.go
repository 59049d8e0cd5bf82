package driver_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
)

const (
	mib      = int64(1 << 20)
	volumeID = "vol-1"
	dekID    = dek.ID("loop.cryptcsi.io/" + volumeID)
)

// machine is a node with everything around it in memory. Each of its parts can
// be changed before start.
type machine struct {
	t       *testing.T
	kernel  *drivertest.Kernel
	wrapped *drivertest.Wrapped
	keys    *drivertest.Keys
	faults  *drivertest.Faults
	disk    *drivertest.Disk
	id      string // of the volume that the calls are about
	cfg     driver.Config
	dir     string // holds kubelet's directory, staging and targets
	boot    string
	faulty  bool                              // a step that fails after it was done loses its result, keys too
	mapper  func(driver.Mapper) driver.Mapper // stands around the mapper; nil: nothing
	driver  *driver.Driver
	// hydration stands around what the hydrator asks, likewise.
	hydration func(driver.Hydration) driver.Hydration
	conn      grpc.ClientConnInterface
	node      csi.NodeClient
}

// newMachine has one volume of 64 MiB and a DEK for it, unless creator is wanted.
func newMachine(t *testing.T) *machine {
	k := drivertest.NewKernel()
	m := &machine{
		t: t, id: volumeID, kernel: k, keys: drivertest.NewKeys(), faults: &drivertest.Faults{}, dir: scratch(t), boot: "boot-1",
		wrapped: &drivertest.Wrapped{Kernel: k, Secret: "hunter2"},
	}
	m.disk = m.wrapped.Create(volumeID, 64*mib)
	m.createDEK(dek.Spec{Cipher: dek.CipherXTS})
	return m
}

// scratch is a temporary directory, in memory where possible: waiting for a
// disk to sync state files would be most of the time that these tests take.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cryptcsi-driver-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("removing the scratch directory: %v", err)
		}
	})
	return dir
}

func (m *machine) createDEK(spec dek.Spec) {
	m.t.Helper()
	m.keys.Lose(dekID)
	d, err := m.keys.CreateDEK(context.Background(), dekID, spec)
	if err != nil {
		m.t.Fatal(err)
	}
	d.Key.Wipe()
}

// start starts a driver process; called again, it starts a new one over the
// same machine, as after a crash.
func (m *machine) start() *machine {
	m.t.Helper()
	if err := m.tryStart(); err != nil {
		m.t.Fatal(err)
	}
	return m
}

func (m *machine) tryStart() error {
	if m.cfg.Wrapped == nil {
		m.cfg.Wrapped = m.faults.Conn(drivertest.Direct(m.wrapped.Register))
	}
	cfg := m.cfg
	host := m.faults.Host(m.kernel)
	cfg.Mounts, cfg.Filesystems, cfg.Devices = host, host, host
	cfg.Mapper = m.faults.Mapper(drivertest.Mapper{Kernel: m.kernel})
	cfg.Hydration = m.faults.Hydration(drivertest.Mapper{Kernel: m.kernel})
	cfg.Resume = drivertest.Mapper{Kernel: m.kernel}.Resume
	if m.hydration != nil {
		cfg.Hydration = m.hydration(cfg.Hydration)
	}
	if m.mapper != nil {
		cfg.Mapper = m.mapper(cfg.Mapper)
	}
	keys := m.faults.Keys(m.keys)
	if cfg.Keys == nil {
		cfg.Keys = keys
	}
	if cfg.Creator != nil {
		cfg.Creator = keys
	}
	cfg.NodeName = "node-1"
	cfg.KubeletDir = filepath.Join(m.dir, "kubelet")
	cfg.AliasDir = m.dir
	cfg.Patience = 20 * time.Millisecond
	cfg.BootID = func() (string, error) { return m.boot, nil }
	d, err := driver.New(m.t.Context(), cfg)
	if err != nil {
		return err
	}
	d.WrapStateWrites(func(do func() error) error { return m.faults.Step("state", do) })
	m.driver = d
	m.conn = drivertest.Direct(d.Register)
	m.node = csi.NewNodeClient(m.conn)
	return nil
}

// reboot restarts the machine.
func (m *machine) reboot() {
	m.kernel.Reboot()
	m.wrapped.Reboot()
	m.boot += "+"
	m.start()
}

func (m *machine) staging() string {
	return filepath.Join(m.dir, "staging"+strings.TrimPrefix(m.id, volumeID))
}
func (m *machine) target(name string) string { return filepath.Join(m.dir, "pods", name) }

func (m *machine) dekID() dek.ID { return volumeDEK(m.id) }

// How a volume is asked for.
func mountCap(fstype string, flags ...string) *csi.VolumeCapability {
	return capability(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{
		Mount: &csi.VolumeCapability_MountVolume{FsType: fstype, MountFlags: flags},
	}})
}

func blockCap() *csi.VolumeCapability {
	return capability(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, &csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{
		Block: &csi.VolumeCapability_BlockVolume{},
	}})
}

func capability(mode csi.VolumeCapability_AccessMode_Mode, c *csi.VolumeCapability) *csi.VolumeCapability {
	c.AccessMode = &csi.VolumeCapability_AccessMode{Mode: mode}
	return c
}

const (
	readerOnly   = csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
	manyReaders  = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	manyWriters  = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	singleWriter = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
)

func (m *machine) stageRequest(c *csi.VolumeCapability) *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{
		VolumeId: m.id, StagingTargetPath: m.staging(), VolumeCapability: c,
		PublishContext: m.wrapped.Context(m.disk), Secrets: map[string]string{"token": "hunter2"},
		VolumeContext: map[string]string{"theirs": "1"},
	}
}

func (m *machine) stage(c *csi.VolumeCapability) error {
	_, err := m.node.NodeStageVolume(m.t.Context(), m.stageRequest(c))
	return err
}

func (m *machine) unstage() error {
	_, err := m.node.NodeUnstageVolume(m.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: m.id, StagingTargetPath: m.staging()})
	return err
}

func (m *machine) publish(c *csi.VolumeCapability, pod string, readOnly bool) error {
	_, err := m.node.NodePublishVolume(m.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: m.id, StagingTargetPath: m.staging(), TargetPath: m.target(pod), VolumeCapability: c, Readonly: readOnly,
	})
	return err
}

func (m *machine) unpublish(pod string) error {
	_, err := m.node.NodeUnpublishVolume(m.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: m.id, TargetPath: m.target(pod)})
	return err
}

func (m *machine) expand(path string, size int64) (int64, error) {
	resp, err := m.node.NodeExpandVolume(m.t.Context(), &csi.NodeExpandVolumeRequest{
		VolumeId: m.id, VolumePath: path, CapacityRange: &csi.CapacityRange{RequiredBytes: size},
	})
	return resp.GetCapacityBytes(), err
}

// ok fails the test on an error.
func (m *machine) ok(what string, err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatalf("%s: %v", what, err)
	}
}

// refused fails the test unless err has the code and says each of the words.
func (m *machine) refused(what string, err error, code codes.Code, words ...string) {
	m.t.Helper()
	if status.Code(err) != code {
		m.t.Fatalf("%s: got %v, want code %v", what, err, code)
	}
	for _, w := range words {
		if !strings.Contains(status.Convert(err).Message(), w) {
			m.t.Errorf("%s: the message %q does not say %q", what, status.Convert(err).Message(), w)
		}
	}
	if len(status.Convert(err).Details()) > 0 {
		m.t.Errorf("%s: the status has details", what)
	}
}

// write and read go through the filesystem at a path.
func (m *machine) write(path, data string) {
	m.t.Helper()
	m.ok("writing a file", m.kernel.WriteFile(path, "file", data))
}

func (m *machine) read(path, want string) {
	m.t.Helper()
	got, err := m.kernel.ReadFile(path, "file")
	if err != nil || got != want {
		m.t.Fatalf("the file at %s is %q (%v), want %q", path, got, err, want)
	}
}

// mapping returns the open mapping.
func (m *machine) mapping() driver.Mapping {
	m.t.Helper()
	all, err := drivertest.Mapper{Kernel: m.kernel}.List()
	if err != nil || len(all) != 1 {
		m.t.Fatalf("mappings: %v, %v", all, err)
	}
	return all[0]
}

// clean fails the test if anything is left on the node, or if a rule was broken.
func (m *machine) clean() {
	m.t.Helper()
	m.lawful()
	mappings, err := drivertest.Mapper{Kernel: m.kernel}.List()
	if err != nil || len(mappings) > 0 {
		m.t.Errorf("mappings left: %v, %v", mappings, err)
	}
	mounts, err := m.kernel.List()
	if err != nil || len(mounts) > 0 {
		m.t.Errorf("mounts left: %v, %v", mounts, err)
	}
	if use := m.wrapped.InUse(); len(use) > 0 {
		m.t.Errorf("the wrapped driver still has %v", use)
	}
	if n := m.keys.Unwiped(); n > 0 && !m.faulty {
		m.t.Errorf("%d keys were not wiped", n)
	}
	base := filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/loop.cryptcsi.io/cryptcsi")
	if entries, err := os.ReadDir(base); err == nil && len(entries) > 0 {
		m.t.Errorf("private directories left: %v", entries)
	}
	if aliases, _ := filepath.Glob(filepath.Join(m.dir, "cryptcsi*")); len(aliases) > 0 {
		m.t.Errorf("device nodes left: %v", aliases)
	}
}

func (m *machine) lawful() {
	m.t.Helper()
	for _, v := range m.kernel.Violations() {
		m.t.Errorf("violation: %s", v)
	}
}

// count counts the steps of that name since the last Arm or Disarm.
func (m *machine) count(step string) int {
	n := 0
	for _, s := range m.faults.Trace() {
		if s == step {
			n++
		}
	}
	return n
}

// record returns what the key side holds.
func (m *machine) record() dek.DEK {
	m.t.Helper()
	r, ok := m.keys.Record(m.dekID())
	if !ok {
		m.t.Fatal("there is no record")
	}
	return r
}

// targets lists where the mapping is mounted.
func (m *machine) targets() []string {
	mounts, _ := m.kernel.List()
	var all []string
	for _, l := range mounts {
		if l.Device == m.mapping().Number {
			all = append(all, l.Target)
		}
	}
	slices.Sort(all)
	return all
}
