package drivertest

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// GroupControllerGetCapabilities is GroupController's.
func (w *Wrapped) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{
		{Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}}},
	}}, nil
}

// CreateVolumeGroupSnapshot is GroupController's.
func (w *Wrapped) CreateVolumeGroupSnapshot(_ context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.snapshots == nil {
		w.snapshots = map[string]*snapshot{}
	}
	group := "group-" + req.GetName()
	for _, source := range req.GetSourceVolumeIds() {
		d, err := w.volume(source)
		if err != nil {
			return nil, err
		}
		id := "snap-" + req.GetName() + "-" + source
		if w.snapshots[id] == nil {
			w.snapshots[id] = &snapshot{name: req.GetName(), source: source, group: group, size: d.Size}
		}
	}
	answer := w.groupSnapshot(group)
	if w.AnswerGroup != nil {
		w.AnswerGroup(answer)
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: answer}, nil
}

func (w *Wrapped) groupSnapshot(group string) *csi.VolumeGroupSnapshot {
	g := &csi.VolumeGroupSnapshot{GroupSnapshotId: group, CreationTime: timestamppb.New(time.Unix(1, 0)), ReadyToUse: true}
	for _, id := range slices.Sorted(maps.Keys(w.snapshots)) {
		if n := w.snapshots[id]; n.group == group {
			s := n.answer(id)
			s.GroupSnapshotId = group
			g.Snapshots = append(g.Snapshots, s)
		}
	}
	return g
}

// GetVolumeGroupSnapshot is GroupController's.
func (w *Wrapped) GetVolumeGroupSnapshot(_ context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	g := w.groupSnapshot(req.GetGroupSnapshotId())
	if len(g.GetSnapshots()) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "no group %s", req.GetGroupSnapshotId())
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: g}, nil
}

// DeleteVolumeGroupSnapshot is GroupController's. It does not look at the list.
func (w *Wrapped) DeleteVolumeGroupSnapshot(_ context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.snapshots, func(_ string, n *snapshot) bool { return n.group == req.GetGroupSnapshotId() })
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}
