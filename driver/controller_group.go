package driver

import (
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// groupController is the GroupController service: snapshots of several volumes,
// cut together. Each of them has a record of its own, as if it was cut alone.
type groupController struct {
	csi.UnimplementedGroupControllerServer
	*Controller
}

// snapshotted is a volume that is cut: its DEK, and what the record of the
// snapshot has to be.
type snapshotted struct {
	source dek.ID
	spec   dek.Spec
}

// GroupControllerGetCapabilities answers what the wrapped driver can do.
func (g groupController) GroupControllerGetCapabilities(ctx context.Context, req *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return call(ctx, g.wrapped, "GroupControllerGetCapabilities", func(ctx context.Context) (*csi.GroupControllerGetCapabilitiesResponse, error) {
		return g.wrapped.group.GroupControllerGetCapabilities(ctx, req)
	})
}

// CreateVolumeGroupSnapshot makes the wrapped driver cut the volumes, and then a
// record for each snapshot. None is handed out before all have one.
func (g groupController) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	volumes := slices.Sorted(slices.Values(req.GetSourceVolumeIds()))
	switch {
	case req.GetName() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the group snapshot has no name")
	case len(volumes) == 0 || volumes[0] == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a source volume ID is missing")
	case len(slices.Compact(slices.Clone(volumes))) < len(volumes):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a source volume ID is there twice")
	}
	if err := noneOfOurs("parameter", req.GetParameters()); err != nil {
		return nil, err
	}
	sources := map[string]snapshotted{}
	for _, volume := range volumes {
		unlock, err := g.locks.try(volume)
		if err != nil {
			return nil, err
		}
		defer unlock()
		source, spec, err := g.checkSnapshotted(ctx, volume, req.GetName())
		if err != nil {
			return nil, err
		}
		sources[volume] = snapshotted{source, spec}
	}
	resp, err := call(ctx, g.wrapped, "CreateVolumeGroupSnapshot", func(ctx context.Context) (*csi.CreateVolumeGroupSnapshotResponse, error) {
		return g.wrapped.group.CreateVolumeGroupSnapshot(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	if err := g.checkGroup(resp.GetGroupSnapshot(), sources); err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	for _, s := range out.GetGroupSnapshot().GetSnapshots() {
		of := sources[s.GetSourceVolumeId()]
		if err := g.recordSnapshot(ctx, s.GetSnapshotId(), of.spec, of.source); err != nil {
			return nil, err
		}
		s.SizeBytes = g.wrapped.profile.snapshotSize(s.GetSizeBytes(), of.spec)
	}
	return out, nil
}

// checkGroup makes sure that there is one snapshot of each source and no other:
// the driver alone says which of them is whose.
func (g groupController) checkGroup(group *csi.VolumeGroupSnapshot, sources map[string]snapshotted) error {
	cut := map[string]bool{}
	for _, s := range group.GetSnapshots() {
		if _, asked := sources[s.GetSourceVolumeId()]; !asked || cut[s.GetSourceVolumeId()] {
			return errdefs.Errorf(errdefs.ErrState, "wrapped driver %s answered with snapshot %s of volume %q, which it was not asked for, or not twice: the group snapshot is left as it is", g.wrapped.name, s.GetSnapshotId(), s.GetSourceVolumeId())
		}
		cut[s.GetSourceVolumeId()] = true
	}
	if len(cut) < len(sources) {
		return errdefs.Errorf(errdefs.ErrState, "wrapped driver %s was asked for snapshots of %d volumes and answered with %d: the group snapshot is left as it is", g.wrapped.name, len(sources), len(cut))
	}
	return nil
}

// DeleteVolumeGroupSnapshot deletes the snapshots and then their records.
func (g groupController) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	if err := g.checkTogether(ctx, req); err != nil {
		return nil, err
	}
	_, err := call(ctx, g.wrapped, "DeleteVolumeGroupSnapshot", func(ctx context.Context) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
		return g.wrapped.group.DeleteVolumeGroupSnapshot(ctx, req)
	})
	if err := ignoreNotFound(err); err != nil {
		return nil, err
	}
	for _, snapshot := range req.GetSnapshotIds() {
		id, idErr := dek.SnapshotID(g.name, snapshot)
		if err := g.deleteDEK(ctx, id, idErr); err != nil {
			return nil, err
		}
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// checkTogether refuses to delete snapshots that were not cut together: a driver
// need not look at the list, and the record of one that stays must stay too. The
// list may be missing where there is no such group.
func (g groupController) checkTogether(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) error {
	if req.GetGroupSnapshotId() == "" || len(req.GetSnapshotIds()) == 0 {
		group, err := g.get(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: req.GetGroupSnapshotId(), Secrets: req.GetSecrets()})
		if err == nil && len(group.GetGroupSnapshot().GetSnapshots()) > 0 {
			return errdefs.Errorf(errdefs.ErrInvalid, "the IDs of the snapshots of group %s are missing", req.GetGroupSnapshotId())
		}
		return ignoreNotFound(err)
	}
	name := ""
	for _, snapshot := range req.GetSnapshotIds() {
		id, idErr := dek.SnapshotID(g.name, snapshot)
		d, found, err := g.record(ctx, id, idErr)
		switch {
		case err != nil:
			return err
		case found && name != "" && d.Spec.Name != name:
			return errdefs.Errorf(errdefs.ErrInvalid, "snapshot %s belongs to %q and another one of the list to %q: nothing was deleted", snapshot, d.Spec.Name, name)
		case found:
			name = d.Spec.Name
		}
	}
	return nil
}

func (g groupController) get(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	if req.GetGroupSnapshotId() == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the group snapshot ID is missing")
	}
	return call(ctx, g.wrapped, "GetVolumeGroupSnapshot", func(ctx context.Context) (*csi.GetVolumeGroupSnapshotResponse, error) {
		return g.wrapped.group.GetVolumeGroupSnapshot(ctx, req)
	})
}

// GetVolumeGroupSnapshot returns one group, with the sizes that restored volumes
// need.
func (g groupController) GetVolumeGroupSnapshot(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	resp, err := g.get(ctx, req)
	if err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	for _, s := range out.GetGroupSnapshot().GetSnapshots() {
		if err := g.setSize(ctx, s); err != nil {
			return nil, err
		}
	}
	return out, nil
}
