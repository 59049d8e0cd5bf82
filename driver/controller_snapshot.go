package driver

import (
	"context"
	"errors"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// CreateSnapshot makes the wrapped driver cut a snapshot, and then a record for
// it that has the source's key: without one what is on it could not be opened
// once the source is gone.
func (c controller) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	switch {
	case req.GetName() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the snapshot has no name")
	case req.GetSourceVolumeId() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the source volume ID is missing")
	}
	if err := noneOfOurs("parameter", req.GetParameters()); err != nil {
		return nil, err
	}
	unlock, err := c.locks.try(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	source, spec, err := c.checkSnapshotted(ctx, req.GetSourceVolumeId(), req.GetName())
	if err != nil {
		return nil, err
	}
	resp, err := call(ctx, c.wrapped, "CreateSnapshot", func(ctx context.Context) (*csi.CreateSnapshotResponse, error) {
		return c.wrapped.controller.CreateSnapshot(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	if err := c.recordSnapshot(ctx, resp.GetSnapshot().GetSnapshotId(), spec, source); err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	out.Snapshot.SizeBytes = c.wrapped.profile.snapshotSize(resp.GetSnapshot().GetSizeBytes(), spec)
	return out, nil
}

// checkSnapshotted says what the record of a snapshot of that name has to be. It
// refuses a source whose key is not certain, before there is a snapshot of it.
func (c *Controller) checkSnapshotted(ctx context.Context, volumeID, name string) (source dek.ID, spec dek.Spec, err error) {
	if source, err = dek.VolumeID(c.name, volumeID); err != nil {
		return "", dek.Spec{}, errdefs.Errorf(errdefs.ErrInvalid, "the source volume: %w", err)
	}
	d, found, err := c.record(ctx, source, nil)
	switch {
	case err != nil:
		return "", dek.Spec{}, unsettled(err)
	case !found:
		return "", dek.Spec{}, noRecord(source, "snapshotted")
	}
	if err := settled(source, d, "snapshotted"); err != nil {
		return "", dek.Spec{}, err
	}
	spec = d.Spec
	spec.Name = name
	if err := spec.Validate(); err != nil {
		return "", dek.Spec{}, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	if err := c.checkKEK(spec.KEK); err != nil {
		return "", dek.Spec{}, errdefs.Errorf(errdefs.ErrInvalid, "%s and its snapshots have the KEK that its StorageClass chose: %w", source, err)
	}
	return source, spec, nil
}

func (c *Controller) recordSnapshot(ctx context.Context, snapshotID string, spec dek.Spec, source dek.ID) error {
	id, err := dek.SnapshotID(c.name, snapshotID)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrState, "wrapped driver %s made a snapshot that cannot have a key: %w", c.wrapped.name, err)
	}
	d, err := c.cfg.Keys.CloneDEK(ctx, id, spec, source)
	d.Wipe()
	if errors.Is(err, errdefs.ErrExists) {
		return errdefs.Errorf(errdefs.ErrExists, "wrapped driver %s answered with snapshot %s, which is not usable as %q: another snapshot has or had that ID; it is left as it is: %w", c.wrapped.name, snapshotID, spec.Name, err)
	}
	if err == nil {
		c.log.InfoContext(ctx, "created", "snapshot_id", snapshotID, "dek_id", id, "name", spec.Name, "source", source)
	}
	return unsettled(err)
}

// DeleteSnapshot deletes the snapshot and then its record.
func (c controller) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the snapshot ID is missing")
	}
	_, err := call(ctx, c.wrapped, "DeleteSnapshot", func(ctx context.Context) (*csi.DeleteSnapshotResponse, error) {
		return c.wrapped.controller.DeleteSnapshot(ctx, req)
	})
	if err := ignoreNotFound(err); err != nil {
		return nil, err
	}
	id, idErr := dek.SnapshotID(c.name, req.GetSnapshotId())
	if err := c.deleteDEK(ctx, id, idErr); err != nil {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// ListSnapshots lists the wrapped driver's snapshots. The size of one that is
// asked for by its ID is exact, because a restored volume has to be as large;
// the others' are as ListVolumes has them.
func (c controller) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	resp, err := call(ctx, c.wrapped, "ListSnapshots", func(ctx context.Context) (*csi.ListSnapshotsResponse, error) {
		return c.wrapped.controller.ListSnapshots(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	for _, e := range out.GetEntries() {
		s := e.GetSnapshot()
		switch {
		case s == nil:
		case req.GetSnapshotId() == "":
			s.SizeBytes = c.wrapped.profile.snapshotSize(s.GetSizeBytes(), dek.Spec{})
		default:
			if err := c.setSize(ctx, s); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// GetSnapshot returns one snapshot, with the size that a restored volume needs.
func (c controller) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	resp, err := call(ctx, c.wrapped, "GetSnapshot", func(ctx context.Context) (*csi.GetSnapshotResponse, error) {
		return c.wrapped.controller.GetSnapshot(ctx, req)
	})
	if err != nil || resp.GetSnapshot() == nil {
		return resp, err
	}
	out := proto.CloneOf(resp)
	return out, c.setSize(ctx, out.GetSnapshot())
}

// setSize makes a snapshot's size the one of its mapping, if it is encrypted.
func (c *Controller) setSize(ctx context.Context, s *csi.Snapshot) error {
	id, idErr := dek.SnapshotID(c.name, s.GetSnapshotId())
	d, found, err := c.record(ctx, id, idErr)
	if err == nil && found {
		s.SizeBytes = c.wrapped.profile.snapshotSize(s.GetSizeBytes(), d.Spec)
	}
	return err
}
