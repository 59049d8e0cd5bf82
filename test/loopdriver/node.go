package loopdriver

import (
	"context"
	"io"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// NodeGetCapabilities lists what the node can do.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	types := []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_VOLUME_CONDITION,
	}
	if !d.cfg.SingleWriter {
		types = append(types, csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER)
	}
	if !d.cfg.NoStage {
		types = append(types, csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME)
	}
	var caps []*csi.NodeServiceCapability
	for _, t := range types {
		caps = append(caps, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{
			Rpc: &csi.NodeServiceCapability_RPC{Type: t},
		}})
	}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: caps}, nil
}

// NodeGetInfo names the one node.
func (d *Driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.cfg.NodeID, MaxVolumesPerNode: int64(d.cfg.MaxVolumes), AccessibleTopology: d.topology()}, nil
}

// NodeStageVolume mounts the device of the publish context at the staging
// path, making a filesystem on a blank one. For block volumes it only checks
// that the device is there.
func (d *Driver) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	switch {
	case d.cfg.NoStage:
		return d.UnimplementedNodeServer.NodeStageVolume(ctx, req)
	case req.GetVolumeId() == "":
		return nil, errNoVolumeID()
	case req.GetStagingTargetPath() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no staging path")
	}
	c := req.GetVolumeCapability()
	if err := d.checkCapabilities(nonNil(c)); err != nil {
		return nil, err
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	staging := req.GetStagingTargetPath()
	// Staged as a block device and as a filesystem at once is possible, as
	// with the drivers that keep no state on the node: a proxy borrows the
	// device and hands another one over.
	block := c.GetBlock() != nil
	for path, u := range v.Uses {
		if u.Staged && path != staging && u.Block == block {
			return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is staged at %s already", v.ID, path)
		}
	}
	u := use{Staged: true, Block: block, FSType: fsType(c), ReadOnly: readerOnly(c)}
	fresh, err := d.record(&v, staging, u)
	if err != nil {
		return nil, err
	}
	dev, err := d.device(&v, req.GetPublishContext())
	if err == nil && c.GetMount() != nil {
		err = d.stageMount(v, dev, staging, c)
	}
	if err != nil {
		return nil, d.rollBack(ctx, v, staging, fresh, err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

func (d *Driver) stageMount(v volume, dev, staging string, c *csi.VolumeCapability) error {
	if d.faults.on(faultShortName, v) && !regexp.MustCompile(`^/dev/[A-Za-z0-9]+$`).MatchString(dev) {
		return errdefs.Errorf(errdefs.ErrNotFound, "%s is no name of a device", dev)
	}
	return d.mountDevice(dev, staging, c)
}

func nonNil(c *csi.VolumeCapability) []*csi.VolumeCapability {
	if c == nil {
		return nil
	}
	return []*csi.VolumeCapability{c}
}

func readerOnly(c *csi.VolumeCapability) bool {
	switch c.GetAccessMode().GetMode() {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return true
	}
	return false
}

// record notes a use of path before the kernel is touched; fresh means that it
// was not noted before. ErrExists where path is in use differently.
func (d *Driver) record(v *volume, path string, u use) (fresh bool, err error) {
	if old, ok := v.Uses[path]; ok {
		if old != u {
			return false, errdefs.Errorf(errdefs.ErrExists, "volume %s is at %s already, as %+v and not %+v", v.ID, path, old, u)
		}
		return false, nil
	}
	if v.Uses == nil {
		v.Uses = map[string]use{}
	}
	v.Uses[path] = u
	return true, d.store.putVolume(*v)
}

// forget drops the use of path, and with the last one what the node attached.
func (d *Driver) forget(ctx context.Context, v volume, path string) error {
	delete(v.Uses, path)
	if len(v.Uses) == 0 {
		if err := d.dropBlank(ctx, v.ID); err != nil {
			return err
		}
		if d.cfg.NoAttach {
			if err := detachFile(ctx, d.BackingFile(v.ID)); err != nil {
				return err
			}
			v.Device = ""
		}
	}
	return d.store.putVolume(v)
}

// rollBack forgets a use that came to nothing, and returns the cause. It keeps
// the note of one that an earlier call made, and of one that left a mount.
func (d *Driver) rollBack(ctx context.Context, v volume, path string, fresh bool, cause error) error {
	if !fresh || mounted(path) {
		return cause
	}
	if err := d.forget(context.WithoutCancel(ctx), v, path); err != nil {
		d.cfg.Log.Warn("rolling back", "volume_id", v.ID, "path", path, "error", err)
	}
	return cause
}

// device returns the device to use: the one that the publish context names,
// whichever that is, or without ControllerPublishVolume one attached now.
func (d *Driver) device(v *volume, publishContext map[string]string) (string, error) {
	dev := publishContext[d.cfg.DeviceKey]
	if dev == "" && !d.cfg.NoAttach {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the publish context has no %s: was the volume attached?", d.cfg.DeviceKey)
	}
	if dev == "" {
		attached, err := attachLoop(d.BackingFile(v.ID), v.Device)
		if err != nil {
			return "", err
		}
		if v.Device != attached {
			v.Device = attached
			if err := d.store.putVolume(*v); err != nil {
				return "", err
			}
		}
		dev = d.stale(*v, attached)
	}
	fi, err := os.Stat(dev)
	if err != nil {
		return "", errdefs.Errorf(errdefs.ErrNotFound, "device of volume %s: %w", v.ID, err)
	}
	if !isBlock(fi.Mode()) {
		return "", errdefs.Errorf(errdefs.ErrState, "%s, named as the device of volume %s, is not a block device", dev, v.ID)
	}
	return dev, nil
}

func isBlock(m fs.FileMode) bool { return m&os.ModeDevice != 0 && m&os.ModeCharDevice == 0 }

// NodeUnstageVolume undoes NodeStageVolume: OK if nothing is staged.
func (d *Driver) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	switch {
	case d.cfg.NoStage:
		return d.UnimplementedNodeServer.NodeUnstageVolume(ctx, req)
	case req.GetVolumeId() == "":
		return nil, errNoVolumeID()
	case req.GetStagingTargetPath() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no staging path")
	}
	v, unknown := d.store.volume(req.GetVolumeId())
	staged, known := v.Uses[req.GetStagingTargetPath()]
	if !known && d.faults.on(faultForgetful, v) {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is not staged at %s", req.GetVolumeId(), req.GetStagingTargetPath())
	}
	for path, u := range v.Uses {
		if !u.Staged && u.Block == staged.Block && mounted(path) {
			return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is still published at %s", v.ID, path)
		}
	}
	if err := unmountAll(req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	if unknown == nil {
		if err := d.forget(ctx, v, req.GetStagingTargetPath()); err != nil {
			return nil, err
		}
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume makes the volume visible at the target path, which it
// creates; the directory that holds the target has to exist.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, errNoVolumeID()
	case req.GetTargetPath() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no target path")
	}
	c := req.GetVolumeCapability()
	if err := d.checkCapabilities(nonNil(c)); err != nil {
		return nil, err
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if err := d.checkPublish(v, req); err != nil {
		return nil, err
	}
	target := req.GetTargetPath()
	u := use{Block: c.GetBlock() != nil, FSType: fsType(c), ReadOnly: req.GetReadonly()}
	fresh, err := d.record(&v, target, u)
	if err != nil {
		return nil, err
	}
	if u.Block {
		err = d.publishBlock(ctx, &v, req)
	} else {
		err = d.publishMount(&v, req)
	}
	if err != nil {
		return nil, d.rollBack(ctx, v, target, fresh, err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// checkPublish looks at what the volume's other uses demand.
func (d *Driver) checkPublish(v volume, req *csi.NodePublishVolumeRequest) error {
	c := req.GetVolumeCapability()
	if v.MountOnly && c.GetBlock() != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "volume %s was made as a filesystem and cannot be published as a block device", v.ID)
	}
	if !d.cfg.NoStage {
		staging := req.GetStagingTargetPath()
		staged, ok := v.Uses[staging]
		if !ok || !staged.Staged {
			return errdefs.Errorf(errdefs.ErrState, "volume %s is not staged at %q", v.ID, staging)
		}
		if staged.Block != (c.GetBlock() != nil) || staged.FSType != fsType(c) {
			return errdefs.Errorf(errdefs.ErrInvalid, "volume %s is staged with another access type", v.ID)
		}
	}
	if c.GetAccessMode().GetMode() != csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		return nil
	}
	for path, u := range v.Uses {
		if !u.Staged && path != req.GetTargetPath() && mounted(path) {
			return errdefs.Errorf(errdefs.ErrState, "volume %s has a single writer, which is at %s", v.ID, path)
		}
	}
	return nil
}

// publishBlock binds the device's node onto a file.
func (d *Driver) publishBlock(ctx context.Context, v *volume, req *csi.NodePublishVolumeRequest) error {
	target := req.GetTargetPath()
	if d.faults.on(faultIgnoreBlock, *v) {
		return makeDir(target)
	}
	if mounted(target) && !d.faults.on(faultStack, *v) {
		return nil
	}
	dev, err := d.device(v, req.GetPublishContext())
	if err != nil {
		return err
	}
	dev = d.stale(*v, dev)
	if err := d.checkOneMount(*v, dev, req); err != nil {
		return err
	}
	if d.faults.on(faultBlank, *v) {
		if dev, err = d.blank(ctx, *v); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	if err := bind(dev, target, req.GetReadonly()); err != nil {
		os.Remove(target)
		return err
	}
	return nil
}

// checkOneMount refuses what one-mount has against a block publish.
func (d *Driver) checkOneMount(v volume, dev string, req *csi.NodePublishVolumeRequest) error {
	if !d.faults.on(faultOneMount, v) {
		return nil
	}
	if req.GetReadonly() {
		return errdefs.Errorf(errdefs.ErrInvalid, "volume %s is a block volume and cannot be read-only", v.ID)
	}
	infos, err := mount.ParseMountInfo("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, info := range infos {
		if info.Source == dev || info.FsType == "devtmpfs" && info.Root == strings.TrimPrefix(dev, "/dev") {
			return errdefs.Errorf(errdefs.ErrState, "%s is in use at %s", dev, info.MountPoint)
		}
	}
	return nil
}

// publishMount binds the staging path onto a directory, or without staging
// mounts the device there.
func (d *Driver) publishMount(v *volume, req *csi.NodePublishVolumeRequest) error {
	target := req.GetTargetPath()
	if err := makeDir(target); err != nil {
		return err
	}
	err := d.mountTarget(v, req)
	if err != nil && !mounted(target) {
		os.Remove(target)
	}
	return err
}

func (d *Driver) mountTarget(v *volume, req *csi.NodePublishVolumeRequest) error {
	target, c := req.GetTargetPath(), req.GetVolumeCapability()
	if !d.cfg.NoStage {
		if mounted(target) && !d.faults.on(faultStack, *v) {
			return nil
		}
		options := append([]string{"bind"}, c.GetMount().GetMountFlags()...)
		if req.GetReadonly() {
			options = append(options, "ro")
		}
		return d.mounter.Mount(req.GetStagingTargetPath(), target, "", options)
	}
	dev, err := d.device(v, req.GetPublishContext())
	if err != nil {
		return err
	}
	if err := d.mountDevice(dev, target, c); err != nil {
		return err
	}
	if req.GetReadonly() {
		return remountReadOnly(target)
	}
	return nil
}

// NodeUnpublishVolume undoes NodePublishVolume and removes the target: OK if
// nothing is there.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	switch {
	case req.GetVolumeId() == "":
		return nil, errNoVolumeID()
	case req.GetTargetPath() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no target path")
	}
	v, unknown := d.store.volume(req.GetVolumeId())
	if _, known := v.Uses[req.GetTargetPath()]; !known && d.faults.on(faultForgetful, v) {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is not published at %s", req.GetVolumeId(), req.GetTargetPath())
	}
	undo := unmountAll
	if unknown == nil && d.faults.on(faultStack, v) {
		undo = unmountOnce
	}
	if err := undo(req.GetTargetPath()); err != nil {
		return nil, err
	}
	if err := os.Remove(req.GetTargetPath()); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	if unknown == nil {
		if err := d.forget(ctx, v, req.GetTargetPath()); err != nil {
			return nil, err
		}
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// at returns the volume and its use of path: ErrNotFound where it is not there.
func (d *Driver) at(id, path string) (volume, use, error) {
	if id == "" {
		return volume{}, use{}, errNoVolumeID()
	}
	if path == "" {
		return volume{}, use{}, errdefs.Errorf(errdefs.ErrInvalid, "there is no volume path")
	}
	v, err := d.store.volume(id)
	if err != nil {
		return volume{}, use{}, err
	}
	u, ok := v.Uses[path]
	if !ok || !mounted(path) {
		return volume{}, use{}, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is not at %s", id, path)
	}
	return v, u, nil
}

// NodeGetVolumeStats measures the filesystem, or the device of a block volume.
func (d *Driver) NodeGetVolumeStats(_ context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	v, u, err := d.at(req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	resp := &csi.NodeGetVolumeStatsResponse{VolumeCondition: d.condition(v)}
	if u.Block {
		bytes, err := deviceSize(req.GetVolumePath())
		if err != nil {
			return nil, err
		}
		resp.Usage = []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: bytes}}
		return resp, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(req.GetVolumePath(), &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: req.GetVolumePath(), Err: err}
	}
	resp.Usage = []*csi.VolumeUsage{{
		Unit:      csi.VolumeUsage_BYTES,
		Total:     int64(st.Blocks) * st.Bsize,
		Used:      int64(st.Blocks-st.Bfree) * st.Bsize,
		Available: int64(st.Bavail) * st.Bsize,
	}, {
		Unit:      csi.VolumeUsage_INODES,
		Total:     int64(st.Files),
		Used:      int64(st.Files - st.Ffree),
		Available: int64(st.Ffree),
	}}
	return resp, nil
}

// deviceSize returns the size in bytes of the block device at path.
func deviceSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// NodeExpandVolume grows the filesystem to its device. A block volume has
// grown with its device already.
func (d *Driver) NodeExpandVolume(_ context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	path := req.GetVolumePath()
	v, u, err := d.at(req.GetVolumeId(), path)
	if err != nil {
		return nil, err
	}
	if err := d.checkExpand(v, u, req); err != nil {
		return nil, err
	}
	if d.faults.on(faultLateGrowth, v) {
		if err := d.grow(v); err != nil {
			return nil, err
		}
	}
	dev := path
	if !u.Block {
		if dev, err = mountSource(path); err != nil {
			return nil, err
		}
		if _, err := mount.NewResizeFs(d.exec).Resize(dev, path); err != nil {
			return nil, err
		}
	}
	bytes, err := deviceSize(dev)
	if err != nil {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: bytes}, nil
}

// checkExpand refuses what picky-expand has against a growth.
func (d *Driver) checkExpand(v volume, u use, req *csi.NodeExpandVolumeRequest) error {
	staged := d.cfg.NoStage || v.Uses[req.GetStagingTargetPath()].Staged
	block := req.GetVolumeCapability().GetBlock() != nil
	if !d.faults.on(faultPickyExpand, v) || staged && block == u.Block && req.GetVolumeCapability() != nil && req.GetCapacityRange() != nil {
		return nil
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "volume %s: range %v, capability %v and staging path %q do not do", v.ID, req.GetCapacityRange(), req.GetVolumeCapability(), req.GetStagingTargetPath())
}
