package loopdriver_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/test/loopdriver"
)

const (
	mib  = int64(1) << 20
	node = "node-1"
)

// rig is a driver behind its socket.
type rig struct {
	driver *loopdriver.Driver
	csi.ControllerClient
	csi.NodeClient
	csi.IdentityClient
	socket string
	stop   func()
}

// start serves cfg, with a directory and node of its own where cfg has none.
// The test ends with everything stopped and no loop device or mount left.
func start(t *testing.T, cfg loopdriver.Config) *rig {
	t.Helper()
	if cfg.DataDir == "" {
		cfg.DataDir = t.TempDir()
		t.Cleanup(func() { noLeaks(t, cfg.DataDir) })
	}
	cfg.NodeID = node
	d, err := loopdriver.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "ld") // t.TempDir can be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{driver: d, socket: "unix://" + filepath.Join(dir, "csi.sock")}
	l, err := loopdriver.Listen(r.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, l) }()
	conn, err := grpc.NewClient(r.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	r.ControllerClient, r.NodeClient, r.IdentityClient = csi.NewControllerClient(conn), csi.NewNodeClient(conn), csi.NewIdentityClient(conn)
	stopped := false
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		conn.Close()
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		os.RemoveAll(dir)
	}
	t.Cleanup(r.stop)
	return r
}

func (r *rig) SetFaults(specs ...string) error { return r.driver.SetFaults(specs...) }
func (r *rig) BackingFile(id string) string    { return r.driver.BackingFile(id) }

// noLeaks asks the kernel for mounts below the test's temporary directories and
// for loop devices on files there, reports them and takes them away.
func noLeaks(t *testing.T, dir string) {
	dir = filepath.Dir(dir) // what all t.TempDir of one test have in common
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if path := strings.Fields(line)[4]; strings.HasPrefix(path, dir+"/") {
			t.Errorf("left behind: %s", line)
			unix.Unmount(path, unix.MNT_DETACH)
		}
	}
	for dev, file := range loops(t) {
		if strings.HasPrefix(file, dir+"/") {
			t.Errorf("left behind: %s on %s", dev, file)
			yank(t, dev)
		}
	}
}

// loops maps the machine's attached loop devices to their files.
func loops(t *testing.T) map[string]string {
	t.Helper()
	entries, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, e := range entries {
		if file, err := os.ReadFile(e); err == nil { // else just detached
			m["/dev/"+strings.Split(e, "/")[3]] = strings.TrimSpace(string(file))
		}
	}
	return m
}

func blockCap() *csi.VolumeCapability {
	return withMode(&csi.VolumeCapability{AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}})
}

func mountCap(fs string, flags ...string) *csi.VolumeCapability {
	return withMode(&csi.VolumeCapability{AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fs, MountFlags: flags}}})
}

func withMode(c *csi.VolumeCapability) *csi.VolumeCapability {
	c.AccessMode = &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}
	return c
}

func createRequest(name string, bytes int64) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name:               name,
		CapacityRange:      &csi.CapacityRange{RequiredBytes: bytes},
		VolumeCapabilities: []*csi.VolumeCapability{blockCap(), mountCap("")},
	}
}

// create makes a volume and returns its ID.
func (r *rig) create(t *testing.T, name string, bytes int64) string {
	t.Helper()
	resp, err := r.CreateVolume(t.Context(), createRequest(name, bytes))
	if err != nil {
		t.Fatalf("CreateVolume(%s): %v", name, err)
	}
	return resp.GetVolume().GetVolumeId()
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v (%v), want %v", what, err, got, want)
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
