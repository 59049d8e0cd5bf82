package driver

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Plaintext is the volumes that were there, unencrypted, before this plugin
// was, each by the ID that its DEK would have. It comes from trusted
// configuration alone: nothing that a disk, a store or the wrapped driver says
// or lacks makes a volume one of these. What they say can only take it away.
type Plaintext map[dek.ID]bool

// ParsePlaintext reads a list of "<driver name>/<volume handle>", one in each
// line; empty lines and those that begin with '#' do not count. ErrInvalid
// names the line that is wrong.
func ParsePlaintext(data []byte) (Plaintext, error) {
	list := Plaintext{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, handle, _ := strings.Cut(line, "/")
		id, err := dek.VolumeID(name, handle)
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "line %d is no \"<driver name>/<volume handle>\": %w", n, err)
		}
		list[id] = true
	}
	if err := lines.Err(); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return list, nil
}

// has tells whether a volume of that driver is listed.
func (p Plaintext) has(driverName, volumeID string) bool {
	id, err := dek.VolumeID(driverName, volumeID)
	return err == nil && p[id]
}

// marked refuses a listed volume whose context says that it is encrypted.
func marked(volumeID string, volumeContext map[string]string) error {
	for key := range ownEntries(volumeContext) {
		return errdefs.Errorf(errdefs.ErrState, "volume %s is in the list of unencrypted volumes, and its volume context has %s: one of them is wrong, so it is not used", volumeID, key)
	}
	return nil
}

// plaintext tells whether a volume is to be given to a pod as it is. It is an
// error where the list is contradicted: by the volume's context or a record.
// That the key side cannot be asked is an error too.
func (d *Driver) plaintext(ctx context.Context, v volume, volumeContext map[string]string) (bool, error) {
	if !d.cfg.Plaintext[v.dek] {
		return false, nil
	}
	if err := marked(v.id, volumeContext); err != nil {
		return false, err
	}
	key, err := d.cfg.Keys.GetDEK(ctx, v.dek)
	key.Wipe()
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		return true, nil
	case err == nil:
		err = errdefs.Errorf(errdefs.ErrState, "volume %s is in the list of unencrypted volumes, and it has a DEK: it is encrypted; take it out of the list", v.id)
	}
	return false, err
}

// leftPlaintext tells whether what a node has of a volume is the wrapped
// driver's alone, so that it is to take it away: the volume is listed, and
// nothing of ours is there.
func (d *Driver) leftPlaintext(v volume) (bool, error) {
	if !d.cfg.Plaintext[v.dek] {
		return false, nil
	}
	st, err := d.load(v)
	if err != nil || st != nil {
		return false, err
	}
	_, open, err := d.mapping(v)
	return err == nil && !open, err
}

// A volume that is passed through: the wrapped driver gets each call as it came.
// It is never shown a call that it does not have.

func (d *Driver) passStage(ctx context.Context, v volume, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil || !caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		return &csi.NodeStageVolumeResponse{}, err
	}
	d.log.WarnContext(ctx, "staged without encryption: the volume is in the list of unencrypted volumes", "volume_id", v.id)
	return call(ctx, d.wrapped, "NodeStageVolume", func(ctx context.Context) (*csi.NodeStageVolumeResponse, error) {
		return d.wrapped.node.NodeStageVolume(ctx, req)
	})
}

func (d *Driver) passUnstage(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil || !caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		return &csi.NodeUnstageVolumeResponse{}, err
	}
	return call(ctx, d.wrapped, "NodeUnstageVolume", func(ctx context.Context) (*csi.NodeUnstageVolumeResponse, error) {
		return d.wrapped.node.NodeUnstageVolume(ctx, req)
	})
}

// passPublish shows a pod the volume as it is, unless a block device turns out
// to have a LUKS header: that is one of ours whose record is lost, and a pod
// that takes it for blank would destroy it. (A filesystem is not mounted from
// such a device by anybody.)
func (d *Driver) passPublish(ctx context.Context, v volume, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil {
		return nil, err
	}
	inner := proto.CloneOf(req)
	if !caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		inner.StagingTargetPath = ""
	}
	d.log.WarnContext(ctx, "published without encryption: the volume is in the list of unencrypted volumes", "volume_id", v.id)
	resp, err := call(ctx, d.wrapped, "NodePublishVolume", func(ctx context.Context) (*csi.NodePublishVolumeResponse, error) {
		return d.wrapped.node.NodePublishVolume(ctx, inner)
	})
	if err != nil || req.GetVolumeCapability().GetBlock() == nil {
		return resp, err
	}
	luks, err := d.cfg.Devices.LUKS(canonical(req.GetTargetPath()))
	if err == nil && !luks {
		return resp, nil
	}
	if err == nil {
		err = errdefs.Errorf(errdefs.ErrState, "volume %s is in the list of unencrypted volumes, and its device begins with a LUKS header: it is encrypted, and is not given out raw", v.id)
	}
	undo := &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: req.GetTargetPath()}
	if _, left := d.passUnpublish(context.WithoutCancel(ctx), undo); left != nil {
		err = errdefs.Errorf(errdefs.ErrUnavailable, "%v (taking it away failed, the next call tries again: %v)", err, left)
	}
	return nil, err
}

func (d *Driver) passUnpublish(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	return call(ctx, d.wrapped, "NodeUnpublishVolume", func(ctx context.Context) (*csi.NodeUnpublishVolumeResponse, error) {
		return d.wrapped.node.NodeUnpublishVolume(ctx, req)
	})
}

// passExpand is asked of drivers too that need no call on the node, because we
// always can.
func (d *Driver) passExpand(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil {
		return nil, err
	}
	if !caps.has(csi.NodeServiceCapability_RPC_EXPAND_VOLUME) {
		return &csi.NodeExpandVolumeResponse{CapacityBytes: req.GetCapacityRange().GetRequiredBytes()}, nil
	}
	return call(ctx, d.wrapped, "NodeExpandVolume", func(ctx context.Context) (*csi.NodeExpandVolumeResponse, error) {
		return d.wrapped.node.NodeExpandVolume(ctx, req)
	})
}

// passStats measures by itself where the wrapped driver does not, because we
// always can.
func (d *Driver) passStats(ctx context.Context, path string, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil {
		return nil, err
	}
	if !caps.has(csi.NodeServiceCapability_RPC_GET_VOLUME_STATS) {
		return d.measure(path, req.GetVolumeId())
	}
	return call(ctx, d.wrapped, "NodeGetVolumeStats", func(ctx context.Context) (*csi.NodeGetVolumeStatsResponse, error) {
		return d.wrapped.node.NodeGetVolumeStats(ctx, req)
	})
}

// measure measures what is mounted at path.
func (d *Driver) measure(path, volumeID string) (*csi.NodeGetVolumeStatsResponse, error) {
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return nil, err
	}
	layers := at(mounts, path)
	if len(layers) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is not at %s", volumeID, path)
	}
	if !layers[len(layers)-1].Node {
		usage, err := d.usage(path)
		return &csi.NodeGetVolumeStatsResponse{Usage: usage}, err
	}
	dev, err := d.cfg.Devices.Device(path)
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: dev.Size}}}, err
}
