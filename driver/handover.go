package driver

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// checkEmpty makes sure that the wrapped driver will format a volume that is to
// be formatted, and nothing else: it decides by looking at the device.
func (s *staging) checkEmpty() error {
	if s.fs.Type != "" {
		return errdefs.Errorf(errdefs.ErrState, "volume %s is new, but shows a filesystem of type %s", s.v.id, s.fs.Type)
	}
	return nil
}

// handOver gives the mapping to the wrapped driver, which formats it if it is
// new and mounts it at the staging path; then it makes sure that it did that
// with the mapping and with nothing else.
func (s *staging) handOver(ctx context.Context) error {
	path := s.m.Path
	if s.wrapped.profile.Alias {
		path = s.alias(s.v)
		if err := s.cfg.Devices.Alias(path, s.m.Number); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(s.want.StagingPath, 0o750); err != nil {
		return err
	}
	if err := s.stageMapping(ctx, path); err != nil {
		return err
	}
	mounts, err := s.cfg.Mounts.List()
	if err != nil {
		return err
	}
	layers := at(mounts, s.want.StagingPath)
	if len(layers) == 0 {
		return errdefs.Errorf(errdefs.ErrState, "wrapped driver %s was given the mapping of volume %s and mounted nothing at %s", s.wrapped.name, s.v.id, s.want.StagingPath)
	}
	// One mount may show several times, where kubelet's directory is bound
	// onto itself; all of them have to be the mapping.
	for _, l := range layers {
		if l.Device != s.m.Number || l.Node {
			return errdefs.Errorf(errdefs.ErrState, "wrapped driver %s was given mapping %s of volume %s and mounted device %s: it does not stage what it is told", s.wrapped.name, s.m.Number, s.v.id, l.Device)
		}
	}
	if !s.m.Made {
		s.fs = FSInfo{Type: layers[0].FSType, Size: s.m.Size, Clean: true}
	}
	if err := s.markMade(ctx); err != nil {
		return err
	}
	return s.confirm(ctx)
}

// stageMapping is the wrapped driver's NodeStageVolume, or NodePublishVolume
// where it has none, with the mapping in place of the device.
func (s *staging) stageMapping(ctx context.Context, path string) error {
	publishContext := maps.Clone(s.req.GetPublishContext())
	if publishContext == nil {
		publishContext = map[string]string{}
	}
	publishContext[s.wrapped.profile.DeviceKey] = path
	capability := proto.CloneOf(s.req.GetVolumeCapability())
	s.wrapped.profile.setNodeMode(capability, s.caps)
	capability.GetMount().FsType = s.want.FSType // without Constellation's suffix
	if m := capability.GetMount(); s.want.ReadOnly && !slices.Contains(m.MountFlags, "ro") {
		m.MountFlags = append(m.MountFlags, "ro")
	}
	// As in mountFilesystem: a copy has its source's UUID.
	if m := capability.GetMount(); (s.want.FSType == "xfs" || s.fs.Type == "xfs") && !slices.Contains(m.MountFlags, "nouuid") {
		m.MountFlags = append(m.MountFlags, "nouuid")
	}
	if s.caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME) {
		inner := proto.CloneOf(s.req)
		inner.StagingTargetPath = s.want.StagingPath
		inner.VolumeCapability = capability
		inner.PublishContext = publishContext
		inner.VolumeContext = foreign(s.req.GetVolumeContext())
		return s.wrapped.stage(ctx, inner)
	}
	return s.wrapped.publish(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:         s.v.id,
		PublishContext:   publishContext,
		TargetPath:       s.want.StagingPath,
		VolumeCapability: capability,
		Readonly:         s.want.ReadOnly,
		VolumeContext:    foreign(s.req.GetVolumeContext()),
		Secrets:          s.req.GetSecrets(),
	})
}

// takeBack undoes handOver.
func (d *Driver) takeBack(ctx context.Context, v volume, st *state) error {
	if st.InnerStaged {
		return d.wrapped.unstage(ctx, v.id, st.StagingPath)
	}
	return d.wrapped.unpublish(ctx, v.id, st.StagingPath)
}

// alias is the device node of a mapping for drivers that take names of letters
// and digits only.
func (d *Driver) alias(v volume) string {
	return filepath.Join(d.cfg.AliasDir, "cryptcsi"+v.mapping[len(MappingPrefix):][:16])
}
