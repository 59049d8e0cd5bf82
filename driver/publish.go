package driver

import (
	"context"
	"os"
	"path/filepath"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// publishing is one NodePublishVolume call.
type publishing struct {
	*Driver
	v        volume
	want     intent // staging path and capability
	target   string
	readOnly bool
}

func (d *Driver) newPublishing(req *csi.NodePublishVolumeRequest) (*publishing, error) {
	v, err := d.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	target, err := absolute("target path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	want, _, err := readCapability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	if want.StagingPath, err = absolute("staging path", req.GetStagingTargetPath()); err != nil {
		return nil, err
	}
	return &publishing{Driver: d, v: v, want: want, target: target, readOnly: req.GetReadonly()}, nil
}

// publish binds the staged filesystem, or the mapping's device node, to the
// target. It does so once, however often it is called.
func (p *publishing) publish(ctx context.Context) error {
	st, m, err := p.stagedMapping()
	if err != nil {
		return err
	}
	mounts, err := p.cfg.Mounts.List()
	if err != nil {
		return err
	}
	if layers := at(mounts, p.target); len(layers) > 0 {
		return p.published(layers[len(layers)-1], m)
	}
	if p.want.AccessType != st.AccessType {
		return errdefs.Errorf(errdefs.ErrInvalid, "volume %s is staged with access type %s, asked for is %s", p.v.id, st.AccessType, p.want.AccessType)
	}
	if p.want.AccessMode == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER.String() {
		for _, l := range mounts {
			if l.Device == m.Number && l.Target != st.StagingPath {
				return errdefs.Errorf(errdefs.ErrState, "volume %s has access mode %s and is in use at %s already", p.v.id, p.want.AccessMode, l.Target)
			}
		}
	}
	return p.bind(ctx, st, m)
}

// stagedMapping returns what NodeStageVolume has made.
func (p *publishing) stagedMapping() (*state, Mapping, error) {
	st, err := p.load(p.v)
	if err != nil {
		return nil, Mapping{}, err
	}
	m, open, err := p.mapping(p.v)
	if err != nil {
		return nil, Mapping{}, err
	}
	if st == nil || !st.Staged || st.BootID != p.boot || !open || m.Backing != st.Device || st.StagingPath != p.want.StagingPath {
		return nil, Mapping{}, errdefs.Errorf(errdefs.ErrState, "volume %s is not staged at %s on this node: NodeStageVolume has to come first", p.v.id, p.want.StagingPath)
	}
	if _, found, err := p.earlier(p.v, st, m); err != nil {
		return nil, Mapping{}, err
	} else if found == borrowLost {
		return nil, Mapping{}, errdefs.Errorf(errdefs.ErrState, "the device %s of volume %s is gone: NodeStageVolume has to be called again, once no pod of this node uses the volume", st.Device, p.v.id)
	}
	if st.AccessType == accessBlock {
		return st, m, nil
	}
	mounts, err := p.cfg.Mounts.List()
	if err != nil {
		return nil, Mapping{}, err
	}
	if layers := at(mounts, st.StagingPath); len(layers) == 0 || layers[len(layers)-1].Device != m.Number {
		return nil, Mapping{}, errdefs.Errorf(errdefs.ErrState, "the filesystem of volume %s is not mounted at %s any more: NodeStageVolume has to be called again", p.v.id, st.StagingPath)
	}
	return st, m, nil
}

// published compares what is mounted at the target with what was asked for.
func (p *publishing) published(top Mount, m Mapping) error {
	switch {
	case top.Device != m.Number:
		return errdefs.Errorf(errdefs.ErrExists, "another device (%s) than volume %s is mounted at %s", top.Device, p.v.id, p.target)
	case top.Node != (p.want.AccessType == accessBlock):
		return errdefs.Errorf(errdefs.ErrExists, "volume %s is published at %s with another access type than %s", p.v.id, p.target, p.want.AccessType)
	case top.ReadOnly != (p.readOnly || m.ReadOnly):
		return errdefs.Errorf(errdefs.ErrExists, "volume %s is published at %s with read-only %v, asked for %v", p.v.id, p.target, top.ReadOnly, p.readOnly)
	}
	return nil
}

// bind makes the mount. A device node that is bound read-only can be written to all
// the same: of a pod that asks for a writable block volume read-only, kubelet lets
// the containers only read the device.
func (p *publishing) bind(ctx context.Context, st *state, m Mapping) error {
	options := []string{"bind"}
	if p.readOnly || m.ReadOnly {
		options = append(options, "ro")
	}
	if err := os.MkdirAll(filepath.Dir(p.target), 0o750); err != nil {
		return err
	}
	if p.want.AccessType == accessMount {
		if err := os.MkdirAll(p.target, 0o750); err != nil {
			return err
		}
		for _, flag := range p.want.MountFlags {
			if bindFlag(flag) {
				options = append(options, flag)
			}
		}
		return p.cfg.Mounts.Mount(ctx, st.StagingPath, p.target, "", options)
	}
	f, err := os.OpenFile(p.target, os.O_CREATE|os.O_RDONLY, 0o640)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return p.cfg.Mounts.Mount(ctx, m.Path, p.target, "", options)
}

// bindFlag tells whether a mount flag is of the mount and not of the
// filesystem, so that it can be given to a bind mount too.
func bindFlag(flag string) bool {
	return slices.Contains([]string{"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime"}, flag)
}

// unpublish takes away every layer at the target and removes it.
func (d *Driver) unpublish(ctx context.Context, v volume, target string) error {
	if within(target, d.base) {
		return errdefs.Errorf(errdefs.ErrInvalid, "target path %s of volume %s is where raw devices are kept", target, v.id)
	}
	if err := d.unmountAll(ctx, target); err != nil {
		return err
	}
	return removePath(target)
}
