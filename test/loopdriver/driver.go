// Package loopdriver is a small, honest CSI driver for block volumes: each
// volume is a sparse file, attached as a loop device.
//
// It exists to be wrapped: by the demo, by csi-sanity and by fault tests. It
// must never serve real data: everything lies on one machine, in one
// directory, with no redundancy.
//
// It behaves as the drivers of the big clouds do. ControllerPublishVolume
// attaches the device and names it in the publish context under "devicePath";
// NodeStageVolume mounts whatever device that key names, and
// NodePublishVolume binds it for block volumes, creating the target but not
// the target's parent directory. Growth is real: ControllerExpandVolume
// enlarges the file and the attached device. Faults can be switched on at any
// time; see Config.Faults.
//
// # Data directory
//
//	state.json            what the driver knows, replaced atomically
//	volumes/<id>.img      a volume's bytes
//	snapshots/<id>.img    a snapshot's bytes
//	blank/<id>.img        the zeros shown by the fault blank-device
//	faults.json           optional: a JSON array of faults, read again at each RPC
//	lock                  held while a driver serves the directory
package loopdriver

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	mount "k8s.io/mount-utils"
	"k8s.io/utils/exec"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// DefaultName is the driver's name where Config names none.
const DefaultName = "loop.cryptcsi.io"

// Sizes in bytes. Volumes are whole multiples of granularity.
const (
	granularity   = 1 << 20
	defaultBytes  = 1 << 30
	defaultTotal  = 1 << 40
	defaultMax    = 128
	drainDeadline = 10 * time.Second
)

// NodeExpansion says when ControllerExpandVolume asks the CO to call
// NodeExpandVolume. Real drivers differ in exactly this.
type NodeExpansion string

// The answers. ExpandMount asks for it unless the volume is a block volume.
const (
	ExpandAlways NodeExpansion = "always"
	ExpandMount  NodeExpansion = "mount"
	ExpandNever  NodeExpansion = "never"
)

// Config configures a Driver. DataDir and NodeID are required.
type Config struct {
	Name    string // defaults to DefaultName
	DataDir string // made if missing; one driver at a time
	NodeID  string

	NoStage  bool // no STAGE_UNSTAGE_VOLUME: all is done at publish
	NoAttach bool // no PUBLISH_UNPUBLISH_VOLUME: the node attaches the loop device

	// FixedType: what a volume is, block or mount, is decided when it is made.
	FixedType bool
	// SingleWriter: SINGLE_NODE_WRITER is the one access mode that is known.
	SingleWriter bool

	// DeviceKey is the entry of the publish context that names the device;
	// defaults to devicePath.
	DeviceKey string

	NodeExpansion NodeExpansion // defaults to ExpandAlways
	TotalBytes    int64         // what all volumes together may promise; defaults to 1 TiB
	MaxVolumes    int           // how many may be attached at once; defaults to 128

	// Faults are active from the start. Syntax of each, where VOLUME is a
	// volume's ID or name and RPC a method's name:
	//
	//	slow:RPC[#n]=DURATION       wait before the work, with the volume locked
	//	error:RPC[#n]=CODE          fail before doing anything
	//	error-after:RPC[#n]=CODE    do the work and lose the answer
	//	stale-device[:VOLUME]       name the device of another attached volume, in
	//	                            the publish context and at block publish
	//	blank-device[:VOLUME]       show a fresh device full of zeros at block publish
	//	stack-publish[:VOLUME]      mount once more at each NodePublishVolume, and
	//	                            take one layer off at each NodeUnpublishVolume
	//	no-grow[:VOLUME]            report growth that did not happen
	//	ignore-block[:VOLUME]       publish a directory where a device was asked for
	//	late-growth[:VOLUME]        an attached device grows at NodeExpandVolume only
	//	picky-expand[:VOLUME]       NodeExpandVolume wants range, capability and staging
	//	                            path, and nothing but block for a block device
	//	one-mount[:VOLUME]          no block publish of a device that is mounted or bound
	//	                            elsewhere, nor a read-only one
	//	forgetful                   NOT_FOUND where there is nothing to unpublish or unstage
	//	format-early[:VOLUME]       CreateVolume makes the filesystem
	//	short-name[:VOLUME]         stage only devices named by letters and digits in /dev
	//	round-down[:VOLUME]         have whole GiB, at least one, and answer with what was
	//	                            asked for; a volume that is not that large is ALREADY_EXISTS
	//
	// With #n only the n-th call since the fault was set is hit, else every
	// call. CODE is a gRPC code such as UNAVAILABLE. The file faults.json in
	// the data directory adds to these; while it cannot be parsed every RPC
	// fails and says so.
	Faults []string

	Log *slog.Logger // nil: silent
}

// Driver serves the CSI Identity, Controller and Node services. All methods
// are safe for concurrent use; a second RPC on a volume, snapshot or name while
// one runs answers Aborted.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer

	cfg     Config
	store   *store
	faults  *faults
	locks   locks
	mounter *mount.SafeFormatAndMount
	exec    exec.Interface
	flock   *os.File
}

// New opens the data directory and brings the machine in line with it: volumes
// that were attached get their loop devices back (under the same number, since
// the CO remembers it), all other loop devices on files of the directory are
// detached, and files that no volume or snapshot owns are removed. It fails
// while another Driver has the directory open.
func New(cfg Config) (*Driver, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	faults, err := newFaults(filepath.Join(cfg.DataDir, "faults.json"), cfg.Faults)
	if err != nil {
		return nil, err
	}
	for _, sub := range []string{volumesDir, snapshotsDir, blankDir} {
		if err := os.MkdirAll(filepath.Join(cfg.DataDir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("data directory: %w", err)
		}
	}
	// sysfs shows the files behind loop devices without symbolic links.
	if cfg.DataDir, err = filepath.EvalSymlinks(cfg.DataDir); err != nil {
		return nil, err
	}
	flock, err := lockDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	store, err := openStore(cfg.DataDir, cfg.TotalBytes)
	if err != nil {
		return nil, closing(flock, err)
	}
	d := &Driver{
		cfg: cfg, store: store, faults: faults, flock: flock, exec: exec.New(),
	}
	d.mounter = mount.NewSafeFormatAndMount(mount.NewWithoutSystemd(""), d.exec)
	if err := d.adopt(context.Background()); err != nil {
		return nil, closing(flock, err)
	}
	return d, nil
}

func closing(f *os.File, err error) error {
	f.Close()
	return err
}

func (c Config) complete() (Config, error) {
	if c.DataDir == "" || c.NodeID == "" {
		return c, errdefs.Errorf(errdefs.ErrInvalid, "a data directory and a node ID are required")
	}
	var err error
	if c.DataDir, err = filepath.Abs(c.DataDir); err != nil {
		return c, err
	}
	if c.Name == "" {
		c.Name = DefaultName
	}
	if c.NodeExpansion == "" {
		c.NodeExpansion = ExpandAlways
	}
	switch c.NodeExpansion {
	case ExpandAlways, ExpandMount, ExpandNever:
	default:
		return c, errdefs.Errorf(errdefs.ErrInvalid, "node expansion %q: want always, mount or never", c.NodeExpansion)
	}
	if c.DeviceKey == "" {
		c.DeviceKey = devicePath
	}
	if c.TotalBytes == 0 {
		c.TotalBytes = defaultTotal
	}
	if c.MaxVolumes == 0 {
		c.MaxVolumes = defaultMax
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// lockDir takes the directory's lock, which the kernel drops with the process.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, errdefs.Errorf(errdefs.ErrState, "data directory %s is in use by another process: %w", dir, err)
	}
	return f, nil
}

// Close lets go of the data directory. Volumes stay attached, as they would
// when a driver's pod restarts.
func (d *Driver) Close() error { return d.flock.Close() }

// SetFaults replaces the faults given in Config.Faults. Faults that stay keep
// their call counts; those in faults.json are not touched.
func (d *Driver) SetFaults(specs ...string) error { return d.faults.set(specs) }

// BackingFile is the path of the file that holds the volume's bytes.
func (d *Driver) BackingFile(volumeID string) string { return d.file(volumesDir, volumeID) }

func (d *Driver) file(sub, id string) string {
	return filepath.Join(d.cfg.DataDir, sub, id+".img")
}

// Listen makes the unix socket that endpoint names ("unix:///path" or a plain
// path), replacing a socket that an earlier process left behind.
func Listen(endpoint string) (net.Listener, error) {
	path := strings.TrimPrefix(strings.TrimPrefix(endpoint, "unix:"), "//")
	if path == "" || strings.Contains(path, ":") {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "endpoint %q: want unix:///path/of.sock", endpoint)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == os.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return net.Listen("unix", path)
}

// Serve answers RPCs on l until ctx is done, then lets running RPCs finish for
// a few seconds. It closes l, not d.
func (d *Driver) Serve(ctx context.Context, l net.Listener) error {
	srv := grpc.NewServer(grpc.UnaryInterceptor(d.intercept))
	csi.RegisterIdentityServer(srv, d)
	csi.RegisterControllerServer(srv, d)
	csi.RegisterNodeServer(srv, d)

	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	timer := time.AfterFunc(drainDeadline, srv.Stop)
	defer timer.Stop()
	srv.GracefulStop()
	return <-served
}

// outOfRange and exhausted are answers that CSI asks for and the project's own
// vocabulary of errors does not need.
func outOfRange(format string, args ...any) error {
	return status.Errorf(codes.OutOfRange, format, args...)
}

func exhausted(format string, args ...any) error {
	return status.Errorf(codes.ResourceExhausted, format, args...)
}
