package driver

import (
	"context"
	"errors"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// volumePath reads the path of a stats or expand request. A relative one
// belongs to no volume, which is not the same as being missing.
func volumePath(path string) (string, error) {
	if path == "" {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the volume path is missing")
	}
	return canonical(path), nil
}

// visibleAt returns the volume's state and mapping if the volume can be seen
// at path: its staging path or where it is published. ErrNotFound otherwise.
func (d *Driver) visibleAt(v volume, path string) (*state, Mapping, error) {
	st, err := d.load(v)
	if err != nil {
		return nil, Mapping{}, err
	}
	m, open, err := d.mapping(v)
	if err != nil {
		return nil, Mapping{}, err
	}
	if st == nil || !st.Staged || st.BootID != d.boot || !open {
		return nil, Mapping{}, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is not staged on this node", v.id)
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return nil, Mapping{}, err
	}
	isBlockStaging := st.AccessType == accessBlock && path == st.StagingPath
	if layers := at(mounts, path); !isBlockStaging && (len(layers) == 0 || layers[len(layers)-1].Device != m.Number) {
		return nil, Mapping{}, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is not at %s", v.id, path)
	}
	return st, m, nil
}

// stats is NodeGetVolumeStats.
func (d *Driver) stats(v volume, path string) (*csi.NodeGetVolumeStatsResponse, error) {
	st, m, err := d.visibleAt(v, path)
	if err != nil {
		return nil, err
	}
	resp := &csi.NodeGetVolumeStatsResponse{VolumeCondition: condition(m, st.Damage)}
	if st.AccessType == accessBlock {
		resp.Usage = []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: m.Size}}
		return resp, nil
	}
	resp.Usage, err = d.usage(path)
	return resp, err
}

// usage is that of the filesystem at path.
func (d *Driver) usage(path string) ([]*csi.VolumeUsage, error) {
	u, err := d.cfg.Filesystems.Usage(path)
	if err != nil {
		return nil, err
	}
	usage := []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: u.Total, Used: u.Used, Available: u.Available}}
	if u.Inodes > 0 {
		usage = append(usage, &csi.VolumeUsage{Unit: csi.VolumeUsage_INODES, Total: u.Inodes, Used: u.InodesUsed, Available: u.InodesFree})
	}
	return usage, nil
}

// failedText is about a volume that hydrates no more.
const failedText = "the disk failed while sectors that were never written were being initialised; reading and writing them is an I/O error until the volume is unstaged and staged again, with the disk in order"

// condition says in words how a mapping is.
func condition(m Mapping, damage Damage) *csi.VolumeCondition {
	switch {
	case damage.Reports > 0:
		return &csi.VolumeCondition{Abnormal: true, Message: "the disk fails, or was changed by somebody else: " + damage.String() + "; reading them is an I/O error; restore what is on them from a backup"}
	case m.Suspended:
		return &csi.VolumeCondition{Abnormal: true, Message: "the mapping is suspended, and whoever reads or writes it waits: it is being changed, or that was interrupted and restarting csi-plugin on the node resumes it"}
	case m.Failed:
		return &csi.VolumeCondition{Abnormal: true, Message: failedText}
	case m.Regions > 0:
		return &csi.VolumeCondition{Message: "in order; sectors that were never written are being initialised in the background: " + m.Progress()}
	}
	return &csi.VolumeCondition{Message: "in order"}
}

// expand is NodeExpandVolume, bottom up: wrapped driver, device, mapping,
// filesystem. It works from the state file: the request need hold nothing but
// volume and path. It returns the capacity to report, which is the device's
// and not the mapping's: it is compared with what was asked of the cloud.
func (d *Driver) expand(ctx context.Context, v volume, path string, req *csi.NodeExpandVolumeRequest) (int64, error) {
	st, m, err := d.visibleAt(v, path)
	if err != nil {
		return 0, err
	}
	if m.ReadOnly {
		return 0, errdefs.Errorf(errdefs.ErrState, "volume %s is staged read-only: it grows when it is staged writable", v.id)
	}
	if err := d.expandInner(ctx, v, st, req); err != nil {
		return 0, err
	}
	required := req.GetCapacityRange().GetRequiredBytes()
	least := required // on a volume without a controller of ours, the device's
	if st.Spec.Name != "" && required > 0 {
		least = deviceSize(required, st.Spec)
	}
	dev, err := d.grownDevice(ctx, v, least)
	if err != nil {
		return 0, err
	}
	if dev.Number != m.Backing || !st.borrowed(dev) {
		return 0, errdefs.Errorf(errdefs.ErrState, "mapping %s is on device %s, volume %s is device %s now: unstage and stage it again", m.Name, m.Backing, v.id, dev.Number)
	}
	if dev.Size < least && !d.cfg.TolerateUngrown {
		return 0, errdefs.Errorf(errdefs.ErrUnavailable, "device %s of volume %s has %d bytes, less than the %d asked for: the cloud has not grown it yet", dev.Number, v.id, dev.Size, least)
	}
	if m, err = d.expandMapping(ctx, v, st, m); err != nil {
		return 0, err
	}
	if st.AccessType == accessMount {
		if err := d.cfg.Filesystems.Grow(ctx, m.Path, st.StagingPath, st.Filesystem); err != nil {
			return 0, err
		}
	}
	if required > 0 {
		return min(required, dev.Size), nil
	}
	return dev.Size, nil
}

// expandInner lets the wrapped driver do its part, as the profile says. It is
// shown the raw device as a block volume: it must not look for a filesystem.
func (d *Driver) expandInner(ctx context.Context, v volume, st *state, req *csi.NodeExpandVolumeRequest) error {
	if d.wrapped.profile.Expand == ExpandSkip {
		return nil
	}
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil {
		return err
	}
	if !caps.has(csi.NodeServiceCapability_RPC_EXPAND_VOLUME) {
		return nil
	}
	inner := proto.CloneOf(req)
	inner.VolumePath = v.device()
	inner.StagingTargetPath = ""
	if st.InnerStaged {
		inner.StagingTargetPath = v.stageDir()
	}
	mode := csi.VolumeCapability_AccessMode_Mode(csi.VolumeCapability_AccessMode_Mode_value[st.AccessMode])
	inner.VolumeCapability = d.wrapped.profile.asBlock(&csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode}}, caps)
	_, err = call(ctx, d.wrapped, "NodeExpandVolume", func(ctx context.Context) (*csi.NodeExpandVolumeResponse, error) {
		return d.wrapped.node.NodeExpandVolume(ctx, inner)
	})
	if err != nil && d.wrapped.profile.Expand == ExpandBestEffort && ctx.Err() == nil {
		d.log.InfoContext(ctx, "the wrapped driver did not expand the volume; the device's own size decides", "volume_id", v.id, "error", err)
		return nil
	}
	return err
}

// grownDevice asks the device for its size until that is enough or patience
// ends. It is rescanned also where it seems large enough: it may have grown by
// less than what a header takes.
func (d *Driver) grownDevice(ctx context.Context, v volume, least int64) (Device, error) {
	var dev Device
	_, err := d.until(ctx, func() (bool, error) {
		err := d.cfg.Devices.Rescan(ctx, v.device())
		if err != nil {
			return false, err
		}
		dev, err = d.cfg.Devices.Device(v.device())
		return dev.Size >= least || d.cfg.TolerateUngrown, err
	})
	return dev, errors.Join(err, ctx.Err())
}

// expandMapping grows the mapping, and raises the header's floor if the header
// was written.
func (d *Driver) expandMapping(ctx context.Context, v volume, st *state, m Mapping) (Mapping, error) {
	key, err := d.cfg.Keys.GetDEK(ctx, st.DEK)
	if err != nil {
		return m, err
	}
	defer key.Wipe()
	if err := d.asMade(&key, st.Spec.Integrity); err != nil {
		return m, err
	}
	grown, err := d.cfg.Mapper.Resize(ctx, Volume{Name: v.mapping, Device: v.device()}, key)
	if err != nil {
		return m, err
	}
	if Unconfirmed(key, grown.Header) {
		if err := d.cfg.Keys.ConfirmDEK(ctx, st.DEK, grown.Header); err != nil {
			return m, err
		}
	}
	grown.Header = noted(grown.Header)
	if st.Header != grown.Header {
		st.Header = grown.Header
		return grown, d.save(v, *st)
	}
	return grown, nil
}

// usedElsewhere returns where a mapping can be seen beside the given path.
func usedElsewhere(mounts []Mount, m Mapping, path string) []string {
	var targets []string
	for _, l := range mounts {
		if l.Device == m.Number && l.Target != path && !slices.Contains(targets, l.Target) {
			targets = append(targets, l.Target)
		}
	}
	return targets
}
