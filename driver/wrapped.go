package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

// wrapped is the driver that we stand in front of.
type wrapped struct {
	name       string
	profile    Profile
	identity   csi.IdentityClient
	node       csi.NodeClient
	controller csi.ControllerClient
	group      csi.GroupControllerClient
}

// callTimeout bounds a call of the wrapped driver whose caller set no bound.
const callTimeout = 2 * time.Minute

// newWrapped asks the driver for its name, waiting for it to come up.
// It has the profile given, or else the one of its name.
func newWrapped(ctx context.Context, conn grpc.ClientConnInterface, profile *Profile) (*wrapped, error) {
	w := &wrapped{name: "(not known yet)", identity: csi.NewIdentityClient(conn), node: csi.NewNodeClient(conn), controller: csi.NewControllerClient(conn), group: csi.NewGroupControllerClient(conn)}
	info, err := call(ctx, w, "GetPluginInfo", func(ctx context.Context) (*csi.GetPluginInfoResponse, error) {
		return w.identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	})
	if err != nil {
		return nil, err
	}
	w.name = info.GetName()
	w.profile, _ = ProfileOf(w.name)
	if profile != nil {
		w.profile = *profile
	}
	if w.profile.Refused != "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "driver %s cannot be wrapped: %s", w.name, w.profile.Refused)
	}
	return w, nil
}

// nameOr returns the name to serve under: the one given, or the wrapped driver's.
func (w *wrapped) nameOr(name string) (string, error) {
	if name == "" {
		name = w.name
	}
	if !driverName.MatchString(name) {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "driver name %q: must be up to 63 letters, digits, dots and dashes", name)
	}
	return name, nil
}

// call calls the wrapped driver with a deadline. A status of its own keeps its
// code.
func call[Resp any](ctx context.Context, w *wrapped, rpc string, do func(context.Context) (Resp, error)) (Resp, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	resp, err := do(ctx)
	if err != nil {
		var none Resp
		return none, fmt.Errorf("wrapped driver %s, %s: %w", w.name, rpc, errgrpc.FromGRPC(err))
	}
	return resp, nil
}

// nodeCapabilities are the wrapped driver's. They are asked for each time: it
// may be updated while we run.
type nodeCapabilities []csi.NodeServiceCapability_RPC_Type

func (c nodeCapabilities) has(t csi.NodeServiceCapability_RPC_Type) bool {
	return slices.Contains(c, t)
}

func (w *wrapped) capabilities(ctx context.Context) (nodeCapabilities, error) {
	resp, err := call(ctx, w, "NodeGetCapabilities", func(ctx context.Context) (*csi.NodeGetCapabilitiesResponse, error) {
		return w.node.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	})
	if err != nil {
		return nil, err
	}
	var caps nodeCapabilities
	for _, c := range resp.GetCapabilities() {
		if rpc := c.GetRpc(); rpc != nil {
			caps = append(caps, rpc.GetType())
		}
	}
	return caps, nil
}

func (w *wrapped) stage(ctx context.Context, req *csi.NodeStageVolumeRequest) error {
	_, err := call(ctx, w, "NodeStageVolume", func(ctx context.Context) (*csi.NodeStageVolumeResponse, error) {
		return w.node.NodeStageVolume(ctx, req)
	})
	return w.profile.ready(err)
}

func (w *wrapped) publish(ctx context.Context, req *csi.NodePublishVolumeRequest) error {
	_, err := call(ctx, w, "NodePublishVolume", func(ctx context.Context) (*csi.NodePublishVolumeResponse, error) {
		return w.node.NodePublishVolume(ctx, req)
	})
	return w.profile.ready(err)
}

// unstage undoes stage. A volume that the driver no longer knows is unstaged;
// the caller looks at what is really mounted.
func (w *wrapped) unstage(ctx context.Context, volumeID, path string) error {
	_, err := call(ctx, w, "NodeUnstageVolume", func(ctx context.Context) (*csi.NodeUnstageVolumeResponse, error) {
		return w.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: volumeID, StagingTargetPath: path})
	})
	return ignoreNotFound(err)
}

// unpublish undoes publish, with the same reservation.
func (w *wrapped) unpublish(ctx context.Context, volumeID, path string) error {
	_, err := call(ctx, w, "NodeUnpublishVolume", func(ctx context.Context) (*csi.NodeUnpublishVolumeResponse, error) {
		return w.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: volumeID, TargetPath: path})
	})
	return ignoreNotFound(err)
}

func ignoreNotFound(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil
	}
	return err
}

// borrow makes the wrapped driver hand out the raw device at v.device(). It is
// called again after a crash: staging is idempotent by the specification, but
// publishing is done only if nothing is there, because several drivers stack
// another mount each time.
func (d *Driver) borrow(ctx context.Context, v volume, req *csi.NodeStageVolumeRequest, caps nodeCapabilities) error {
	if err := os.MkdirAll(v.stageDir(), 0o750); err != nil {
		return err
	}
	inner := proto.CloneOf(req) // and not a new message: fields that we do not know stay in it
	inner.StagingTargetPath = v.stageDir()
	inner.VolumeContext = foreign(req.GetVolumeContext())
	inner.VolumeCapability = d.wrapped.profile.asBlock(req.GetVolumeCapability(), caps)
	staging := ""
	if caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		if err := d.wrapped.stage(ctx, inner); err != nil {
			return err
		}
		staging = v.stageDir()
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return err
	}
	if len(at(mounts, v.device())) > 0 {
		return nil
	}
	// Writable even for a read-only volume: read-only is the mapping's matter,
	// some drivers refuse read-only block volumes, and a read-only bind of a
	// device node keeps nobody from writing.
	return d.wrapped.publish(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:          inner.VolumeId,
		PublishContext:    inner.PublishContext,
		StagingTargetPath: staging,
		TargetPath:        v.device(),
		VolumeCapability:  inner.VolumeCapability,
		VolumeContext:     inner.VolumeContext,
		Secrets:           inner.Secrets,
	})
}

// borrowing is what there is of a device that an earlier call borrowed.
type borrowing int

const (
	borrowNone    borrowing = iota
	borrowIntact            // the device that was noted
	borrowUnnoted           // a device, of which no call lived to note which it is
	borrowLost              // the device has gone, and its number may be another one's
)

// earlier looks at what was borrowed. m is the volume's mapping, the zero value
// where none is open: as long as it is on a device, no other one gets its number.
func (d *Driver) earlier(v volume, st *state, m Mapping) (Device, borrowing, error) {
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return Device{}, borrowNone, err
	}
	layers := at(mounts, v.device())
	dev, err := d.cfg.Devices.Device(v.device())
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, errdefs.ErrState) && len(layers) == 0: // or a file to bind a device upon
		return Device{}, borrowNone, nil
	case errors.Is(err, errdefs.ErrUnavailable), errors.Is(err, errdefs.ErrState):
		return Device{}, borrowLost, nil
	case err != nil:
		return Device{}, borrowNone, err
	case m.Backing == dev.Number && (st == nil || st.Device == "" || st.borrowed(dev)):
		return dev, borrowIntact, nil
	case st == nil || st.Device == "" || st.BootID != d.boot:
		return Device{}, borrowUnnoted, nil
	case !st.borrowed(dev), dev.Seq == 0 && len(layers) > 0 && layers[len(layers)-1].Stale:
		return Device{}, borrowLost, nil
	}
	return dev, borrowIntact, nil
}

// asBlock is the capability with which a volume is borrowed.
func (p Profile) asBlock(c *csi.VolumeCapability, caps nodeCapabilities) *csi.VolumeCapability {
	block := proto.CloneOf(c)
	makeBlock(block)
	p.setNodeMode(block, caps)
	return block
}

// makeBlock makes c the capability of a block volume.
func makeBlock(c *csi.VolumeCapability) {
	c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
}

// setMode makes the access mode one that the driver knows. It is shown the
// volume as writable by one node at most, which a reader-only one is too.
func (p Profile) setMode(c *csi.VolumeCapability) {
	if many, _ := multiNode(c.GetAccessMode().GetMode().String()); p.SingleWriter && !many && c.GetAccessMode() != nil {
		c.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	}
}

// setNodeMode is setMode for the driver's node side. A single writer is not
// shown as one: the driver could take the place to which it publishes the device
// for that writer, and refuse the mapping that is handed to it. That there is
// only one is seen to where pods get the volume.
func (p Profile) setNodeMode(c *csi.VolumeCapability, caps nodeCapabilities) {
	p.setMode(c)
	switch c.GetAccessMode().GetMode() {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
		c.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
		if caps.has(csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER) {
			c.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
		}
	}
}

// foreign returns a volume context without our own entries.
func foreign(volumeContext map[string]string) map[string]string {
	out := maps.Clone(volumeContext)
	maps.DeleteFunc(out, func(key, _ string) bool { return strings.HasPrefix(key, KeyPrefix) })
	return out
}

// checkBorrowed looks at what the wrapped driver handed out, before anything
// opens it: a block device with a size, that is used by nothing but the
// volume's own mapping.
func (d *Driver) checkBorrowed(ctx context.Context, v volume) (Device, error) {
	var dev Device
	ok, err := d.until(ctx, func() (bool, error) {
		var err error
		dev, err = d.cfg.Devices.Device(v.device())
		return dev.Size > 0, err
	})
	switch {
	case errors.Is(err, os.ErrNotExist):
		return Device{}, errdefs.Errorf(errdefs.ErrUnavailable, "wrapped driver %s published volume %s, but there is nothing at %s: is kubelet's directory shared between the containers, with the same path and bidirectional propagation?", d.wrapped.name, v.id, v.device())
	case err != nil:
		return Device{}, fmt.Errorf("wrapped driver %s handed out volume %s: %w", d.wrapped.name, v.id, err)
	case !ok:
		return Device{}, errdefs.Errorf(errdefs.ErrUnavailable, "device %s of volume %s has size 0", dev.Number, v.id)
	}
	for _, h := range dev.Holders {
		if h.Multipath {
			return Device{}, errdefs.Errorf(errdefs.ErrState, "device %s of volume %s is one path of multipath map %s: the wrapped driver must publish the map", dev.Number, v.id, h.Name)
		}
		if !strings.HasPrefix(h.Name, v.mapping) {
			return Device{}, errdefs.Errorf(errdefs.ErrState, "device %s of volume %s is in use by %s", dev.Number, v.id, h.Name)
		}
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return Device{}, err
	}
	for _, m := range mounts {
		if m.Device == dev.Number && !within(m.Target, v.dir) {
			return Device{}, errdefs.Errorf(errdefs.ErrState, "device %s of volume %s is mounted unencrypted at %s: unmount it", dev.Number, v.id, m.Target)
		}
	}
	return dev, nil
}

// giveBack undoes borrow and makes sure that nothing of it is left. The mapping
// must be closed: device-mapper would keep the device, and the wrapped driver
// would detach it all the same.
func (d *Driver) giveBack(ctx context.Context, v volume, innerStaged bool) error {
	if err := d.wrapped.unpublish(ctx, v.id, v.device()); err != nil {
		return err
	}
	if err := d.unmountAll(ctx, v.device()); err != nil {
		return err
	}
	if err := removePath(v.device()); err != nil {
		return err
	}
	if innerStaged {
		if err := d.wrapped.unstage(ctx, v.id, v.stageDir()); err != nil {
			return err
		}
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if within(m.Target, v.dir) {
			if err := d.unmountAll(ctx, m.Target); err != nil {
				return err
			}
		}
	}
	return nil
}
