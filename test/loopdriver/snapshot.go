package loopdriver

import (
	"context"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// CreateSnapshot copies a volume's file as it is now. On filesystems with
// reflinks the copy is of one instant; elsewhere only if nobody writes to the
// volume meanwhile. The name is the key, as for volumes.
func (d *Driver) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	switch {
	case req.GetName() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the snapshot has no name")
	case req.GetSourceVolumeId() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no source volume ID")
	}
	if err := checkParameters(req.GetParameters()); err != nil {
		return nil, err
	}
	for _, n := range d.store.snapshots() {
		if n.Name != req.GetName() {
			continue
		}
		if n.Source != req.GetSourceVolumeId() {
			return nil, errdefs.Errorf(errdefs.ErrExists, "snapshot %q exists as %s of volume %s", n.Name, n.ID, n.Source)
		}
		return &csi.CreateSnapshotResponse{Snapshot: answerSnapshot(n)}, nil
	}
	v, err := d.store.volume(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	n := snapshot{ID: newID("snap"), Name: req.GetName(), Bytes: v.Bytes, Source: v.ID, Created: time.Now().UTC()}
	if err := makeImage(ctx, d.file(snapshotsDir, n.ID), d.BackingFile(v.ID), n.Bytes); err != nil {
		return nil, err
	}
	if err := d.store.putSnapshot(n); err != nil {
		os.Remove(d.file(snapshotsDir, n.ID))
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: answerSnapshot(n)}, nil
}

func answerSnapshot(n snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId:     n.ID,
		SourceVolumeId: n.Source,
		SizeBytes:      n.Bytes,
		CreationTime:   timestamppb.New(n.Created),
		ReadyToUse:     true,
	}
}

// DeleteSnapshot removes a snapshot: OK if there is none. Volumes made from it
// are copies and stay.
func (d *Driver) DeleteSnapshot(_ context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no snapshot ID")
	}
	n, err := d.store.snapshot(req.GetSnapshotId())
	if err != nil { // there is none
		return &csi.DeleteSnapshotResponse{}, nil
	}
	if err := d.store.deleteSnapshot(n.ID); err != nil {
		return nil, err
	}
	if err := os.Remove(d.file(snapshotsDir, n.ID)); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// ListSnapshots lists snapshots in the order of their IDs, all or those of the
// snapshot ID and source volume ID asked for.
func (d *Driver) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	var all []snapshot
	for _, n := range d.store.snapshots() {
		if (req.GetSnapshotId() == "" || req.GetSnapshotId() == n.ID) &&
			(req.GetSourceVolumeId() == "" || req.GetSourceVolumeId() == n.Source) {
			all = append(all, n)
		}
	}
	page, next, err := paginate(all, func(n snapshot) string { return n.ID }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, n := range page {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: answerSnapshot(n)})
	}
	return resp, nil
}

// GetSnapshot returns one snapshot.
func (d *Driver) GetSnapshot(_ context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no snapshot ID")
	}
	n, err := d.store.snapshot(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: answerSnapshot(n)}, nil
}
