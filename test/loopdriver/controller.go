package loopdriver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// devicePath is the key of the publish context under which the device's path
// is handed from ControllerPublishVolume to the node.
const devicePath = "devicePath"

// ControllerGetCapabilities lists what the controller can do.
func (d *Driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	types := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_VOLUME_CONDITION,
	}
	if !d.cfg.SingleWriter {
		types = append(types, csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER)
	}
	if !d.cfg.NoAttach {
		types = append(types,
			csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
			csi.ControllerServiceCapability_RPC_LIST_VOLUMES_PUBLISHED_NODES)
	}
	var caps []*csi.ControllerServiceCapability
	for _, t := range types {
		caps = append(caps, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{
			Rpc: &csi.ControllerServiceCapability_RPC{Type: t},
		}})
	}
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: caps}, nil
}

// CreateVolume makes a volume's file. The name is the key: a second request
// with the same name gets the same volume, or ErrExists if it asks for another
// size or source.
func (d *Driver) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := d.checkCreate(req); err != nil {
		return nil, err
	}
	sourceID := contentSourceID(req.GetVolumeContentSource())
	for _, v := range d.store.volumes() {
		if v.Name != req.GetName() {
			continue
		}
		r := req.GetCapacityRange()
		if v.Source != sourceID || v.Bytes < r.GetRequiredBytes() || r.GetLimitBytes() > 0 && v.Bytes > r.GetLimitBytes() {
			return nil, errdefs.Errorf(errdefs.ErrExists, "volume %q exists as %s with %d bytes and source %q, which is not what is asked for", v.Name, v.ID, v.Bytes, v.Source)
		}
		return &csi.CreateVolumeResponse{Volume: d.answer(v, req.GetVolumeContentSource())}, nil
	}
	sourceFile, sourceBytes, err := d.contentSource(req.GetVolumeContentSource())
	if err != nil {
		return nil, err
	}
	asked, err := d.pickSize(req.GetCapacityRange(), sourceBytes)
	if err != nil {
		return nil, err
	}
	v := volume{ID: newID("vol"), Name: req.GetName(), Source: sourceID}
	v.Bytes = d.roundDown(v, asked)
	v.MountOnly = d.cfg.FixedType && req.GetVolumeCapabilities()[0].GetMount() != nil
	v.Context = map[string]string{"backend": "sparse-file"}
	if note, ok := req.GetParameters()[noteParameter]; ok {
		v.Context[noteParameter] = note
	}
	if err := makeImage(ctx, d.BackingFile(v.ID), sourceFile, v.Bytes); err != nil {
		return nil, err
	}
	if err := d.formatEarly(ctx, v, req); err != nil {
		os.Remove(d.BackingFile(v.ID))
		return nil, err
	}
	if err := d.store.putVolume(v); err != nil {
		os.Remove(d.BackingFile(v.ID))
		return nil, err
	}
	answer := d.answer(v, req.GetVolumeContentSource())
	answer.CapacityBytes = asked
	return &csi.CreateVolumeResponse{Volume: answer}, nil
}

// roundDown is what a volume gets of the bytes that it is to have.
func (d *Driver) roundDown(v volume, bytes int64) int64 {
	if d.faults.on(faultRoundDown, v) {
		return max(1, bytes>>30) << 30
	}
	return bytes
}

// formatEarly makes the filesystem of a new volume, where that fault is on.
func (d *Driver) formatEarly(ctx context.Context, v volume, req *csi.CreateVolumeRequest) error {
	fs := fsType(req.GetVolumeCapabilities()[0])
	if fs == "" || v.Source != "" || !d.faults.on(faultFormatEarly, v) {
		return nil
	}
	if out, err := d.exec.CommandContext(ctx, "mkfs."+fs, "-q", d.BackingFile(v.ID)).CombinedOutput(); err != nil {
		return fmt.Errorf("making %s: %w: %s", fs, err, out)
	}
	return nil
}

func contentSourceID(s *csi.VolumeContentSource) string {
	if snap := s.GetSnapshot(); snap != nil {
		return snap.GetSnapshotId()
	}
	return s.GetVolume().GetVolumeId()
}

// contentSource finds the file to copy: "" where the volume starts empty.
func (d *Driver) contentSource(s *csi.VolumeContentSource) (file string, bytes int64, err error) {
	switch {
	case s.GetSnapshot() != nil:
		n, err := d.store.snapshot(s.GetSnapshot().GetSnapshotId())
		return d.file(snapshotsDir, n.ID), n.Bytes, err
	case s.GetVolume() != nil:
		v, err := d.store.volume(s.GetVolume().GetVolumeId())
		return d.BackingFile(v.ID), v.Bytes, err
	}
	return "", 0, nil
}

// newID returns an ID that nobody can guess from a name.
func newID(prefix string) string {
	var b [5]byte
	rand.Read(b[:])
	return prefix + "-" + hex.EncodeToString(b[:])
}

func (d *Driver) answer(v volume, source *csi.VolumeContentSource) *csi.Volume {
	return &csi.Volume{
		VolumeId:           v.ID,
		CapacityBytes:      v.Bytes,
		VolumeContext:      v.Context,
		ContentSource:      source,
		AccessibleTopology: []*csi.Topology{d.topology()},
	}
}

func (d *Driver) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{"topology." + d.cfg.Name + "/node": d.cfg.NodeID}}
}

func (d *Driver) here(t *csi.Topology) bool {
	for key, value := range d.topology().GetSegments() {
		if got, ok := t.GetSegments()[key]; ok && got != value {
			return false
		}
	}
	return true
}

// DeleteVolume detaches and removes a volume: OK if there is none, ErrState
// while it is published or its device is in use.
func (d *Driver) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID()
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil { // there is none
		return &csi.DeleteVolumeResponse{}, nil
	}
	if v.Node != "" {
		return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is still published to node %s", v.ID, v.Node)
	}
	for path := range v.Uses {
		if mounted(path) {
			return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is still mounted at %s", v.ID, path)
		}
	}
	if err := d.detach(ctx, v); err != nil {
		return nil, err
	}
	// The state goes first: a file without state is removed at the next start,
	// state without a file would be a broken volume.
	if err := d.store.deleteVolume(v.ID); err != nil {
		return nil, err
	}
	if err := os.Remove(d.BackingFile(v.ID)); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func errNoVolumeID() error { return errdefs.Errorf(errdefs.ErrInvalid, "there is no volume ID") }

// detach takes away every loop device of v, the blank one with its file.
func (d *Driver) detach(ctx context.Context, v volume) error {
	if err := d.dropBlank(ctx, v.ID); err != nil {
		return err
	}
	return detachFile(ctx, d.BackingFile(v.ID))
}

// ControllerPublishVolume attaches the volume's file to a loop device.
func (d *Driver) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	switch {
	case d.cfg.NoAttach:
		return d.UnimplementedControllerServer.ControllerPublishVolume(ctx, req)
	case req.GetVolumeId() == "":
		return nil, errNoVolumeID()
	case req.GetNodeId() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no node ID")
	case req.GetVolumeCapability() == nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no volume capability")
	case req.GetReadonly():
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "volumes cannot be attached read-only")
	}
	if err := d.checkCapabilities([]*csi.VolumeCapability{req.GetVolumeCapability()}); err != nil {
		return nil, err
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if req.GetNodeId() != d.cfg.NodeID {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "there is no node %q, only %q", req.GetNodeId(), d.cfg.NodeID)
	}
	if v.Node == "" && d.published() >= d.cfg.MaxVolumes {
		return nil, exhausted("node %s has %d volumes and takes no more", d.cfg.NodeID, d.cfg.MaxVolumes)
	}
	dev, err := attachLoop(d.BackingFile(v.ID), v.Device)
	if err != nil {
		return nil, err
	}
	v.Node, v.Device = d.cfg.NodeID, dev
	if err := d.store.putVolume(v); err != nil {
		return nil, err
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{d.cfg.DeviceKey: d.stale(v, dev)}}, nil
}

func (d *Driver) published() int {
	n := 0
	for _, v := range d.store.volumes() {
		if v.Node != "" {
			n++
		}
	}
	return n
}

// stale returns dev, or with the fault stale-device the device of another
// volume, if one is attached.
func (d *Driver) stale(v volume, dev string) string {
	if !d.faults.on(faultStale, v) {
		return dev
	}
	for _, other := range d.store.volumes() {
		if other.ID != v.ID && other.Device != "" {
			return other.Device
		}
	}
	return dev
}

// ControllerUnpublishVolume detaches the loop device: OK if there is none,
// ErrState while it is in use.
func (d *Driver) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	if d.cfg.NoAttach {
		return d.UnimplementedControllerServer.ControllerUnpublishVolume(ctx, req)
	}
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID()
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil || req.GetNodeId() != "" && req.GetNodeId() != d.cfg.NodeID {
		return &csi.ControllerUnpublishVolumeResponse{}, nil // not published there
	}
	if err := d.detach(ctx, v); err != nil {
		return nil, err
	}
	v.Node, v.Device = "", ""
	maps.DeleteFunc(v.Uses, func(path string, _ use) bool { return !mounted(path) })
	if err := d.store.putVolume(v); err != nil {
		return nil, err
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

// ValidateVolumeCapabilities confirms what checkCapabilities accepts.
func (d *Driver) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID()
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no volume capability")
	}
	if _, err := d.store.volume(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if err := d.checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext:      req.GetVolumeContext(),
		VolumeCapabilities: req.GetVolumeCapabilities(),
		Parameters:         req.GetParameters(),
	}}, nil
}

// ListVolumes lists volumes in the order of their IDs; the token is the last
// ID listed, so that it stays good when volumes go.
func (d *Driver) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	all := d.store.volumes()
	page, next, err := paginate(all, func(v volume) string { return v.ID }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range page {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: d.answer(v, nil),
			Status: &csi.ListVolumesResponse_VolumeStatus{PublishedNodeIds: nodes(v), VolumeCondition: d.condition(v)},
		})
	}
	return resp, nil
}

func nodes(v volume) []string {
	if v.Node == "" {
		return nil
	}
	return []string{v.Node}
}

// paginate returns up to limit items (all if 0) after the one whose ID token is.
func paginate[T any](all []T, id func(T) string, token string, limit int32) (page []T, next string, err error) {
	if limit < 0 {
		return nil, "", errdefs.Errorf(errdefs.ErrInvalid, "max_entries is negative")
	}
	if token != "" {
		if !regexp.MustCompile(`^(vol|snap)-[0-9a-f]{10}$`).MatchString(token) {
			return nil, "", errdefs.Errorf(errdefs.ErrConflict, "starting token %q is none of ours: start again without one", token)
		}
		for len(all) > 0 && id(all[0]) <= token {
			all = all[1:]
		}
	}
	if limit == 0 || int(limit) >= len(all) {
		return all, "", nil
	}
	return all[:limit], id(all[limit-1]), nil
}

// ControllerGetVolume returns one volume and its condition.
func (d *Driver) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID()
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{
		Volume: d.answer(v, nil),
		Status: &csi.ControllerGetVolumeResponse_VolumeStatus{PublishedNodeIds: nodes(v), VolumeCondition: d.condition(v)},
	}, nil
}

// condition compares what the driver believes with what is there.
func (d *Driver) condition(v volume) *csi.VolumeCondition {
	abnormal := func(message string) *csi.VolumeCondition {
		return &csi.VolumeCondition{Abnormal: true, Message: message}
	}
	fi, err := os.Stat(d.BackingFile(v.ID))
	if err != nil {
		return abnormal("the backing file cannot be read: " + err.Error())
	}
	if fi.Size() < v.Bytes {
		return abnormal("the backing file is smaller than the volume")
	}
	if v.Device != "" {
		if dev, err := loopFor(d.BackingFile(v.ID)); err != nil || dev != v.Device {
			return abnormal(filepath.Base(v.Device) + " is no longer attached to the backing file")
		}
	}
	return &csi.VolumeCondition{Message: "the backing file is complete"}
}

// GetCapacity returns what can still be promised.
func (d *Driver) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if t := req.GetAccessibleTopology(); t != nil && !d.here(t) {
		return &csi.GetCapacityResponse{}, nil
	}
	return &csi.GetCapacityResponse{AvailableCapacity: d.store.free()}, nil
}

// ControllerExpandVolume enlarges the file and its loop device. It never
// shrinks; a volume that is large enough is left alone.
func (d *Driver) ControllerExpandVolume(_ context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errNoVolumeID()
	}
	if req.GetCapacityRange() == nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no capacity range")
	}
	v, err := d.store.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	asked, err := d.pickSize(req.GetCapacityRange(), v.Bytes)
	if err != nil {
		return nil, err
	}
	v.Bytes = d.roundDown(v, asked)
	if err := d.store.putVolume(v); err != nil {
		return nil, err
	}
	// The file's size decides, not the state's: so a repetition heals a growth
	// that was interrupted here, or left out by the fault.
	late := v.Node != "" && d.faults.on(faultLateGrowth, v)
	if !late && !d.faults.on(faultNoGrow, v) {
		if err := d.grow(v); err != nil {
			return nil, err
		}
	}
	return &csi.ControllerExpandVolumeResponse{
		CapacityBytes:         asked,
		NodeExpansionRequired: d.nodeExpansion(req.GetVolumeCapability()),
	}, nil
}

// grow makes the file and its loop device as large as the volume.
func (d *Driver) grow(v volume) error {
	if err := growImage(d.BackingFile(v.ID), v.Bytes); err != nil {
		return err
	}
	return growLoop(d.BackingFile(v.ID))
}

func (d *Driver) nodeExpansion(c *csi.VolumeCapability) bool {
	switch d.cfg.NodeExpansion {
	case ExpandNever:
		return false
	case ExpandMount:
		return c.GetBlock() == nil
	}
	return true
}
