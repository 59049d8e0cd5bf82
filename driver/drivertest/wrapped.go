package drivertest

import (
	"cmp"
	"context"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Wrapped is a block CSI driver on a Kernel: Identity, Controller, GroupController and Node. It
// checks that the one in front of it keeps the rules of borrowing, and notes
// what breaks them as the Kernel's violations. Set the fields before use.
type Wrapped struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedNodeServer

	Kernel *Kernel
	Name   string // "": loop.cryptcsi.io
	Key    string // of the publish context's entry for the device; "": devicePath
	Secret string // what node stage secrets must hold under "token"

	NoStage     bool // NodeStageVolume is Unimplemented
	NoMulti     bool // without SINGLE_NODE_MULTI_WRITER
	Stacks      bool // NodePublishVolume mounts another layer each time, Unpublish takes one
	IgnoreBlock bool // publishes a directory
	MountsRaw   bool // mounts its own device, whatever it is told
	Forgets     bool // undoing is NotFound, and done
	Below       bool // mounts filesystems in a directory of the staging path
	Stats       bool // has NodeGetVolumeStats
	Leaves      bool // unstages and leaves them mounted

	// What the controller answers.
	AnswerVolume   string                         // CreateVolume answers with this ID, whatever it made
	AnswerSnapshot string                         // CreateSnapshot likewise
	AnswerGroup    func(*csi.VolumeGroupSnapshot) // changes what CreateVolumeGroupSnapshot answers
	AnswerContext  map[string]string              // and adds this volume context
	Rounds         int64                          // sizes are multiples of this
	RoundsDown     bool                           // sizes to whole GiB, and answers with what was asked for
	NotBlock       bool                           // confirms no block volume

	// NodeFault, if set, fails calls of the node.
	NodeFault func(rpc string) error

	mu        sync.Mutex
	volumes   map[string]*Disk     // by volume ID
	snapshots map[string]*snapshot // by snapshot ID
	deleted   map[string]bool      // the IDs that volumes had
	last      *csi.NodeStageVolumeRequest
	capacity  *csi.GetCapacityRequest
	calls     []string
}

// Disk is one volume of a Wrapped.
type Disk struct {
	Name    string
	Path    string // of its device node
	Size    int64
	stages  map[string]string // staging path: access type
	targets map[string]string // target path: access type
}

// snapshot is one of a Wrapped's.
type snapshot struct {
	name, source, group string // group: "" where it was cut alone
	size                int64
}

// The name of the publish context's entry for the device.
const deviceKey = "devicePath"

// Register adds the services to a server.
func (w *Wrapped) Register(s grpc.ServiceRegistrar) {
	csi.RegisterIdentityServer(s, w)
	csi.RegisterControllerServer(s, w)
	csi.RegisterGroupControllerServer(s, w)
	csi.RegisterNodeServer(s, w)
}

// Create makes a volume as CreateVolume and ControllerPublishVolume do.
func (w *Wrapped) Create(id string, size int64) *Disk {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.create(id, id, size)
}

func (w *Wrapped) create(id, name string, size int64) *Disk {
	if w.volumes == nil {
		w.volumes = map[string]*Disk{}
	}
	d := &Disk{Name: name, Path: w.Kernel.AddDisk(size), Size: size, stages: map[string]string{}, targets: map[string]string{}}
	w.volumes[id] = d
	return d
}

// Volume is the volume of that ID; nil where there is none.
func (w *Wrapped) Volume(id string) *Disk {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.volumes[id]
}

// Context is the volume's publish context.
func (w *Wrapped) Context(d *Disk) map[string]string { return map[string]string{w.key(): d.Path} }

func (w *Wrapped) key() string { return cmp.Or(w.Key, deviceKey) }

// Volumes lists the IDs of the volumes that exist, and Snapshots those of the
// snapshots.
func (w *Wrapped) Volumes() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.volumes))
}

// Snapshots is Volumes' counterpart.
func (w *Wrapped) Snapshots() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.snapshots))
}

// InUse lists what the driver has staged and published.
func (w *Wrapped) InUse() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for id, d := range w.volumes {
		for path := range d.stages {
			all = append(all, "stage of "+id+" at "+path)
		}
		for path := range d.targets {
			all = append(all, "publish of "+id+" at "+path)
		}
	}
	slices.Sort(all)
	return all
}

// Calls lists the node calls that change something, with the access type.
func (w *Wrapped) Calls() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.calls)
}

// LastStage returns the last NodeStageVolume request as a block volume.
func (w *Wrapped) LastStage() *csi.NodeStageVolumeRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// LastCapacity is the latest GetCapacity request.
func (w *Wrapped) LastCapacity() *csi.GetCapacityRequest {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.capacity
}

// Reboot forgets the node's part.
func (w *Wrapped) Reboot() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.volumes {
		clear(d.stages)
		clear(d.targets)
	}
}

func (w *Wrapped) volume(id string) (*Disk, error) {
	if id == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "no volume ID")
	}
	d, ok := w.volumes[id]
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "no volume %s", id)
	}
	return d, nil
}

func (w *Wrapped) fault(rpc string) error {
	if w.NodeFault == nil {
		return nil
	}
	return w.NodeFault(rpc)
}

// access checks what every call of the node must have.
func (w *Wrapped) access(rpc string, c *csi.VolumeCapability, volumeContext, secrets map[string]string) string {
	kind := "mount"
	if c.GetBlock() != nil {
		kind = "block"
	}
	w.calls = append(w.calls, rpc+" "+kind)
	for key := range volumeContext {
		if strings.HasPrefix(key, driver.KeyPrefix) {
			w.Kernel.Violate("%s was shown %s", rpc, key)
		}
	}
	if w.Secret != secrets["token"] {
		w.Kernel.Violate("%s came with secrets %v", rpc, slices.Collect(maps.Keys(secrets)))
	}
	mode := c.GetAccessMode().GetMode()
	if w.NoMulti && (mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER || mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER) {
		w.Kernel.Violate("%s came with access mode %v, which this driver does not know", rpc, mode)
	}
	return kind
}

// NodeStageVolume does nothing for block volumes; others it mounts, from the
// device that the publish context names, making a filesystem on a blank one.
func (w *Wrapped) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if w.NoStage {
		return w.UnimplementedNodeServer.NodeStageVolume(ctx, req)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if err := w.fault("stage"); err != nil {
		return nil, err
	}
	kind := w.access("stage", req.GetVolumeCapability(), req.GetVolumeContext(), req.GetSecrets())
	if kind == "mount" {
		if err := w.mountDevice(ctx, d, req.GetPublishContext(), req.GetStagingTargetPath(), req.GetVolumeCapability()); err != nil {
			return nil, err
		}
	} else {
		w.last = req
	}
	d.stages[req.GetStagingTargetPath()] = kind
	return &csi.NodeStageVolumeResponse{}, nil
}

func (w *Wrapped) mountDevice(ctx context.Context, d *Disk, publishContext map[string]string, path string, c *csi.VolumeCapability) error {
	device := publishContext[w.key()]
	if w.MountsRaw {
		device = d.Path
	}
	if w.Below {
		path = filepath.Join(path, d.Name)
		if err := os.MkdirAll(path, 0o750); err != nil {
			return err
		}
	}
	if w.mounted(path) {
		return nil
	}
	info, err := w.Kernel.Probe(ctx, device)
	if err != nil {
		return err
	}
	fstype := c.GetMount().GetFsType()
	if fstype == "" {
		fstype = "ext4"
	}
	if info.Type == "" {
		if err := w.Kernel.Make(ctx, device, fstype, nil, true); err != nil {
			return err
		}
	}
	return w.Kernel.Mount(ctx, device, path, fstype, c.GetMount().GetMountFlags())
}

func (w *Wrapped) mounted(path string) bool {
	mounts, _ := w.Kernel.List()
	return slices.ContainsFunc(mounts, func(m driver.Mount) bool { return m.Target == path })
}

// NodeUnstageVolume undoes NodeStageVolume.
func (w *Wrapped) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if w.NoStage {
		return w.UnimplementedNodeServer.NodeUnstageVolume(ctx, req)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	path := req.GetStagingTargetPath()
	w.calls = append(w.calls, "unstage")
	w.checkReturned("unstage", d, d.stages[path])
	where := path
	if w.Below {
		where = filepath.Join(path, d.Name)
	}
	for w.mounted(where) && !w.Leaves {
		if err := w.Kernel.Unmount(ctx, where); err != nil {
			return nil, err
		}
	}
	delete(d.stages, path)
	if w.Forgets {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is no longer known here", req.GetVolumeId())
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// checkReturned: a device must not be given back while something is on it.
func (w *Wrapped) checkReturned(rpc string, d *Disk, kind string) {
	dev, err := w.Kernel.Device(d.Path)
	if err != nil || kind != "block" {
		return
	}
	for _, h := range dev.Holders {
		if strings.HasPrefix(h.Name, driver.MappingPrefix) {
			w.Kernel.Violate("%s while %s is on the device", rpc, h.Name)
		}
	}
}

// NodePublishVolume binds the device's node, or the staging path.
func (w *Wrapped) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	kind := w.access("publish", req.GetVolumeCapability(), req.GetVolumeContext(), req.GetSecrets())
	target := req.GetTargetPath()
	if _, ok := d.stages[req.GetStagingTargetPath()]; !ok && !w.NoStage {
		return nil, errdefs.Errorf(errdefs.ErrState, "not staged at %q", req.GetStagingTargetPath())
	}
	if req.GetVolumeCapability().GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		for other := range d.targets {
			if other != target {
				return nil, errdefs.Errorf(errdefs.ErrState, "the single writer of the volume is at %s", other)
			}
		}
	}
	switch {
	case kind == "mount": // without NodeStageVolume only: this driver is always asked for block volumes
		err = w.mountDevice(ctx, d, req.GetPublishContext(), target, req.GetVolumeCapability())
	case w.IgnoreBlock:
		err = os.MkdirAll(target, 0o750)
	default:
		err = w.publishBlock(ctx, d, req)
	}
	if err != nil {
		return nil, err
	}
	d.targets[target] = kind
	return &csi.NodePublishVolumeResponse{}, nil
}

func (w *Wrapped) publishBlock(ctx context.Context, d *Disk, req *csi.NodePublishVolumeRequest) error {
	target := req.GetTargetPath()
	if req.GetReadonly() {
		w.Kernel.Violate("a device was borrowed read-only")
	}
	if d.targets[target] != "" {
		w.Kernel.Violate("published at %s for the second time", target)
		if !w.Stacks {
			return nil
		}
	}
	if err := os.WriteFile(target, nil, 0o600); err != nil {
		return err
	}
	return w.Kernel.Mount(ctx, d.Path, target, "", []string{"bind"})
}

// NodeUnpublishVolume undoes NodePublishVolume.
func (w *Wrapped) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	target := req.GetTargetPath()
	w.calls = append(w.calls, "unpublish")
	w.checkReturned("unpublish", d, d.targets[target])
	for w.mounted(target) {
		if err := w.Kernel.Unmount(ctx, target); err != nil {
			return nil, err
		}
		if w.Stacks {
			break
		}
	}
	if !w.mounted(target) {
		if err := os.Remove(target); err != nil && !os.IsNotExist(err) {
			return nil, err
		}
	}
	delete(d.targets, target)
	if w.Forgets {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "volume %s is no longer known here", req.GetVolumeId())
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeExpandVolume has nothing to do.
func (w *Wrapped) NodeExpandVolume(_ context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if err := w.fault("expand"); err != nil {
		return nil, err
	}
	if d.targets[req.GetVolumePath()] != "block" || req.GetVolumeCapability().GetBlock() == nil {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "no block volume at %s", req.GetVolumePath())
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: d.Size}, nil
}

// NodeGetVolumeStats always says the same.
func (w *Wrapped) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if !w.Stats {
		w.Kernel.Violate("NodeGetVolumeStats of a driver that does not have it")
		return w.UnimplementedNodeServer.NodeGetVolumeStats(ctx, req)
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: 4711}}}, nil
}

// NodeGetInfo names a node.
func (w *Wrapped) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: "node-1", MaxVolumesPerNode: 25}, nil
}

// NodeGetCapabilities includes some that must not be shown to a CO.
func (w *Wrapped) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	types := []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_VOLUME_CONDITION,
		csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
	}
	if !w.NoMulti {
		types = append(types, csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER)
	}
	if w.Stats {
		types = append(types, csi.NodeServiceCapability_RPC_GET_VOLUME_STATS)
	}
	if !w.NoStage {
		types = append(types, csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME)
	}
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range types {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return resp, nil
}

// GetPluginInfo is Identity's.
func (w *Wrapped) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	name := w.Name
	if name == "" {
		name = "loop.cryptcsi.io"
	}
	return &csi.GetPluginInfoResponse{Name: name, VendorVersion: "1"}, nil
}

// GetPluginCapabilities is Identity's.
func (w *Wrapped) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{
		{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}},
		{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE}}},
		{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE}}},
		{Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE}}},
	}}, nil
}

// Probe is Identity's.
func (w *Wrapped) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

// ControllerGetCapabilities is Controller's.
func (w *Wrapped) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return resp, nil
}

// CreateVolume is Controller's.
func (w *Wrapped) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if req.GetName() == "" || len(req.GetVolumeCapabilities()) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "name or capabilities are missing")
	}
	if md, ok := metadata.FromIncomingContext(ctx); ok && len(md.Get("x-test")) > 0 {
		if err := grpc.SetHeader(ctx, metadata.Pairs("x-test", md.Get("x-test")[0])); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for key := range req.GetParameters() {
		if strings.HasPrefix(key, driver.KeyPrefix) {
			w.Kernel.Violate("CreateVolume was shown %s", key)
		}
	}
	for _, c := range req.GetVolumeCapabilities() {
		if strings.Contains(c.GetMount().GetFsType(), "-") {
			w.Kernel.Violate("CreateVolume was shown filesystem %s", c.GetMount().GetFsType())
		}
	}
	size := max(req.GetCapacityRange().GetRequiredBytes(), 64<<20)
	if w.Rounds > 0 {
		size = (size + w.Rounds - 1) / w.Rounds * w.Rounds
	}
	size, asked := w.roundDown(size), size
	least, err := w.sourceSize(req.GetVolumeContentSource())
	if err != nil {
		return nil, err
	}
	if size < least {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "smaller than its source, which has %d bytes", least)
	}
	id := w.idOf(req.GetName())
	d, ok := w.volumes[id]
	if ok && d.Size != size || ok && w.RoundsDown && d.Size != asked {
		return nil, errdefs.Errorf(errdefs.ErrExists, "volume %s has another size", id)
	}
	if !ok {
		d = w.create(id, req.GetName(), size)
	}
	answer := map[string]string{"name": d.Name}
	maps.Copy(answer, w.AnswerContext)
	if w.AnswerVolume != "" {
		id = w.AnswerVolume
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: id, CapacityBytes: asked, VolumeContext: answer, ContentSource: req.GetVolumeContentSource()}}, nil
}

// roundDown is how large a device is made that is to have size bytes.
func (w *Wrapped) roundDown(size int64) int64 {
	if w.RoundsDown {
		return size >> 30 << 30
	}
	return size
}

// idOf is the ID of the volume of that name, or the one that it gets: no two
// volumes ever have the same.
func (w *Wrapped) idOf(name string) string {
	for id, d := range w.volumes {
		if d.Name == name {
			return id
		}
	}
	id := "vol-" + name
	if len(id) > 120 {
		id = id[:120]
	}
	for w.deleted[id] {
		id += "+"
	}
	return id
}

// sourceSize is the size of what a new volume is to be a copy of.
func (w *Wrapped) sourceSize(s *csi.VolumeContentSource) (int64, error) {
	if id := s.GetSnapshot().GetSnapshotId(); id != "" {
		if n, ok := w.snapshots[id]; ok {
			return n.size, nil
		}
		return 0, errdefs.Errorf(errdefs.ErrNotFound, "no snapshot %s", id)
	}
	if id := s.GetVolume().GetVolumeId(); id != "" {
		d, err := w.volume(id)
		if err != nil {
			return 0, err
		}
		return d.Size, nil
	}
	return 0, nil
}

// ListVolumes is Controller's.
func (w *Wrapped) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if req.GetStartingToken() != "" {
		return nil, errdefs.Errorf(errdefs.ErrConflict, "no such token")
	}
	resp := &csi.ListVolumesResponse{}
	for _, id := range slices.Sorted(maps.Keys(w.volumes)) {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{Volume: &csi.Volume{VolumeId: id, CapacityBytes: w.volumes[id].Size}})
	}
	return resp, nil
}

// GetCapacity is Controller's.
func (w *Wrapped) GetCapacity(_ context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.capacity = proto.CloneOf(req)
	return &csi.GetCapacityResponse{AvailableCapacity: 1 << 40, MaximumVolumeSize: wrapperspb.Int64(1 << 30), MinimumVolumeSize: wrapperspb.Int64(1 << 20)}, nil
}

// CreateSnapshot is Controller's.
func (w *Wrapped) CreateSnapshot(_ context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	id := "snap-" + req.GetName()
	if w.snapshots == nil {
		w.snapshots = map[string]*snapshot{}
	}
	n := w.snapshots[id]
	if n != nil && n.source != req.GetSourceVolumeId() {
		return nil, errdefs.Errorf(errdefs.ErrExists, "snapshot %s is of another volume", id)
	}
	if n == nil {
		n = &snapshot{name: req.GetName(), source: req.GetSourceVolumeId(), size: d.Size}
		w.snapshots[id] = n
	}
	if w.AnswerSnapshot != "" {
		id = w.AnswerSnapshot
	}
	return &csi.CreateSnapshotResponse{Snapshot: n.answer(id)}, nil
}

func (n *snapshot) answer(id string) *csi.Snapshot {
	return &csi.Snapshot{SnapshotId: id, SourceVolumeId: n.source, SizeBytes: n.size, ReadyToUse: true, CreationTime: timestamppb.New(time.Unix(1, 0))}
}

// DeleteSnapshot is Controller's.
func (w *Wrapped) DeleteSnapshot(_ context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.snapshots, req.GetSnapshotId())
	return &csi.DeleteSnapshotResponse{}, nil
}

// ListSnapshots is Controller's.
func (w *Wrapped) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	resp := &csi.ListSnapshotsResponse{}
	for _, id := range slices.Sorted(maps.Keys(w.snapshots)) {
		if n := int(req.GetMaxEntries()); n > 0 && len(resp.Entries) == n {
			resp.NextToken = id
			break
		}
		n := w.snapshots[id]
		if id < req.GetStartingToken() {
			continue
		}
		if (req.GetSnapshotId() == "" || req.GetSnapshotId() == id) && (req.GetSourceVolumeId() == "" || req.GetSourceVolumeId() == n.source) {
			resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: n.answer(id)})
		}
	}
	return resp, nil
}

// DeleteVolume is Controller's.
func (w *Wrapped) DeleteVolume(_ context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if req.GetVolumeId() == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "no volume ID")
	}
	if d, ok := w.volumes[req.GetVolumeId()]; ok {
		if len(d.stages)+len(d.targets) > 0 {
			return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is in use", req.GetVolumeId())
		}
		w.Kernel.RemoveDisk(d.Path)
		delete(w.volumes, req.GetVolumeId())
		if w.deleted == nil {
			w.deleted = map[string]bool{}
		}
		w.deleted[req.GetVolumeId()] = true
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// ControllerPublishVolume is Controller's.
func (w *Wrapped) ControllerPublishVolume(_ context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if req.GetVolumeId() == "" || req.GetNodeId() == "" || req.GetVolumeCapability() == nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "volume, node or capability is missing")
	}
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	if req.GetNodeId() != "node-1" {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "no node %s", req.GetNodeId())
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: w.Context(d)}, nil
}

// ControllerUnpublishVolume is Controller's.
func (w *Wrapped) ControllerUnpublishVolume(_ context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "no volume ID")
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

// ValidateVolumeCapabilities is Controller's.
func (w *Wrapped) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := w.volume(req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "no capabilities")
	}
	if w.NotBlock && slices.ContainsFunc(req.GetVolumeCapabilities(), func(c *csi.VolumeCapability) bool { return c.GetBlock() != nil }) {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: "files only"}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{VolumeCapabilities: req.GetVolumeCapabilities()}}, nil
}

// ControllerExpandVolume is Controller's. The node learns of it by a rescan.
func (w *Wrapped) ControllerExpandVolume(_ context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, err := w.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	size := req.GetCapacityRange().GetRequiredBytes()
	if size == 0 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "no capacity range")
	}
	w.grow(d, w.roundDown(size))
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: max(d.Size, size), NodeExpansionRequired: true}, nil
}

// Grow enlarges a volume as the cloud does.
func (w *Wrapped) Grow(id string, size int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.grow(w.volumes[id], size)
}

func (w *Wrapped) grow(d *Disk, size int64) {
	d.Size = max(d.Size, size)
	w.Kernel.GrowDisk(d.Path, d.Size)
}
