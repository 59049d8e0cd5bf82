package drivertest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Cloud is the controller of a block driver with several nodes, each a Wrapped
// on a Kernel of its own. Disks are attached and detached, snapshots and clones
// have the content of the moment in which they were made, and no ID is ever
// given twice. One call at a time: nodes that have a disk in common share its
// pages.
type Cloud struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer

	mu        sync.Mutex
	nodes     map[string]*Wrapped
	volumes   map[string]*cloudVolume
	snapshots map[string]*cloudSnapshot
	count     int
	broken    []string
}

// content is what is on a disk.
type content struct {
	size  int64
	pages map[int64]*[pageSize]byte
}

func (c content) copy() content {
	pages := make(map[int64]*[pageSize]byte, len(c.pages))
	for i, page := range c.pages {
		p := *page
		pages[i] = &p
	}
	return content{c.size, pages}
}

type cloudVolume struct {
	content
	name     string
	attached map[string]string // node: path of the device there
}

type cloudSnapshot struct {
	content
	name, source string
}

// NewCloud returns a cloud without volumes.
func NewCloud() *Cloud {
	return &Cloud{nodes: map[string]*Wrapped{}, volumes: map[string]*cloudVolume{}, snapshots: map[string]*cloudSnapshot{}}
}

// AddNode makes w the driver's half on the node of that name.
func (c *Cloud) AddNode(name string, w *Wrapped) { c.nodes[name] = w }

// Register adds the services of the controller.
func (c *Cloud) Register(s grpc.ServiceRegistrar) {
	csi.RegisterIdentityServer(s, c)
	csi.RegisterControllerServer(s, c)
}

// Volumes lists the IDs of the volumes that exist, and Snapshots those of the
// snapshots.
func (c *Cloud) Volumes() []string { return slices.Sorted(maps.Keys(c.volumes)) }

// Snapshots is Volumes' counterpart.
func (c *Cloud) Snapshots() []string { return slices.Sorted(maps.Keys(c.snapshots)) }

// Attached says on which nodes a volume is, and as which device.
func (c *Cloud) Attached(id string) map[string]string {
	if v := c.volumes[id]; v != nil {
		return maps.Clone(v.attached)
	}
	return nil
}

// Disk is a device of a volume's or a snapshot's content on a kernel of its
// own, for a look at it; nil where there is no such thing.
func (c *Cloud) Disk(id string) (k *Kernel, path string) {
	var from content
	if v := c.volumes[id]; v != nil {
		from = v.content
	} else if s := c.snapshots[id]; s != nil {
		from = s.content
	} else {
		return nil, ""
	}
	k = NewKernel()
	return k, k.attach(from.copy())
}

// Violations lists what happened and must never happen.
func (c *Cloud) Violations() []string { return slices.Clone(c.broken) }

func (c *Cloud) violate(format string, args ...any) {
	c.broken = append(c.broken, fmt.Sprintf(format, args...))
}

// attach adds a device with this content and returns the path of its node.
func (k *Kernel) attach(from content) string {
	path := k.AddDisk(from.size)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.disks[k.nodes[path]].pages = from.pages
	return path
}

// GetPluginInfo is Identity's.
func (c *Cloud) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: "loop.cryptcsi.io", VendorVersion: "1"}, nil
}

// CreateVolume is Controller's: idempotent by the name.
func (c *Cloud) CreateVolume(_ context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key := range req.GetParameters() {
		if strings.HasPrefix(key, driver.KeyPrefix) {
			c.violate("CreateVolume was shown %s", key)
		}
	}
	for id, v := range c.volumes {
		if v.name == req.GetName() {
			return created(id, v, req), nil
		}
	}
	from, err := c.source(req.GetVolumeContentSource())
	if err != nil {
		return nil, err
	}
	size := req.GetCapacityRange().GetRequiredBytes()
	if size < from.size {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%d bytes are fewer than the source's %d", size, from.size)
	}
	from.size = size
	c.count++
	id := fmt.Sprintf("disk-%d", c.count)
	c.volumes[id] = &cloudVolume{content: from, name: req.GetName(), attached: map[string]string{}}
	return created(id, c.volumes[id], req), nil
}

func created(id string, v *cloudVolume, req *csi.CreateVolumeRequest) *csi.CreateVolumeResponse {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: id, CapacityBytes: v.size, VolumeContext: map[string]string{"theirs": "1"}, ContentSource: req.GetVolumeContentSource(),
	}}
}

// source is a copy of what a new volume begins with.
func (c *Cloud) source(s *csi.VolumeContentSource) (content, error) {
	if id := s.GetSnapshot().GetSnapshotId(); id != "" {
		if n := c.snapshots[id]; n != nil {
			return n.copy(), nil
		}
		return content{}, errdefs.Errorf(errdefs.ErrNotFound, "no snapshot %s", id)
	}
	if id := s.GetVolume().GetVolumeId(); id != "" {
		v, err := c.volume(id)
		if err != nil {
			return content{}, err
		}
		return v.copy(), nil
	}
	return content{pages: map[int64]*[pageSize]byte{}}, nil
}

func (c *Cloud) volume(id string) (*cloudVolume, error) {
	if v := c.volumes[id]; v != nil {
		return v, nil
	}
	return nil, errdefs.Errorf(errdefs.ErrNotFound, "no volume %s", id)
}

// DeleteVolume is Controller's.
func (c *Cloud) DeleteVolume(_ context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v := c.volumes[req.GetVolumeId()]; v != nil && len(v.attached) > 0 {
		return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is attached", req.GetVolumeId())
	}
	delete(c.volumes, req.GetVolumeId())
	return &csi.DeleteVolumeResponse{}, nil
}

// ControllerPublishVolume is Controller's. Only a volume that several nodes may
// have is attached to several.
func (c *Cloud) ControllerPublishVolume(_ context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, err := c.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	w := c.nodes[req.GetNodeId()]
	if w == nil {
		return nil, errdefs.Errorf(errdefs.ErrNotFound, "no node %s", req.GetNodeId())
	}
	path, ok := v.attached[req.GetNodeId()]
	many := req.GetVolumeCapability().GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	if !ok && len(v.attached) > 0 && !many {
		return nil, errdefs.Errorf(errdefs.ErrState, "volume %s is attached elsewhere", req.GetVolumeId())
	}
	if !ok {
		path = w.attach(req.GetVolumeId(), v)
		v.attached[req.GetNodeId()] = path
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{w.key(): path}}, nil
}

func (w *Wrapped) attach(id string, v *cloudVolume) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.volumes == nil {
		w.volumes = map[string]*Disk{}
	}
	d := &Disk{Name: v.name, Path: w.Kernel.attach(v.content), Size: v.size, stages: map[string]string{}, targets: map[string]string{}}
	w.volumes[id] = d
	return d.Path
}

// ControllerUnpublishVolume is Controller's. A device that something is still
// on is taken away all the same.
func (c *Cloud) ControllerUnpublishVolume(_ context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v := c.volumes[req.GetVolumeId()]; v != nil && v.attached[req.GetNodeId()] != "" {
		for _, use := range c.nodes[req.GetNodeId()].detach(req.GetVolumeId()) {
			c.violate("volume %s was detached while in use: %s", req.GetVolumeId(), use)
		}
		delete(v.attached, req.GetNodeId())
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (w *Wrapped) detach(id string) (inUse []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.volumes[id]
	for path := range d.stages {
		inUse = append(inUse, "staged at "+path)
	}
	for path := range d.targets {
		inUse = append(inUse, "published at "+path)
	}
	if dev, err := w.Kernel.Device(d.Path); err == nil {
		for _, h := range dev.Holders {
			inUse = append(inUse, "held by "+h.Name)
		}
	}
	w.Kernel.RemoveDisk(d.Path)
	delete(w.volumes, id)
	return inUse
}

// ControllerExpandVolume is Controller's. Nodes learn of it by a rescan.
func (c *Cloud) ControllerExpandVolume(_ context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, err := c.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	v.size = max(v.size, req.GetCapacityRange().GetRequiredBytes())
	for node := range v.attached {
		c.nodes[node].Grow(req.GetVolumeId(), v.size)
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.size, NodeExpansionRequired: true}, nil
}

// CreateSnapshot is Controller's: idempotent by the name.
func (c *Cloud) CreateSnapshot(_ context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, s := range c.snapshots {
		if s.name == req.GetName() {
			return cut(id, s), nil
		}
	}
	v, err := c.volume(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	c.count++
	id := fmt.Sprintf("cut-%d", c.count)
	c.snapshots[id] = &cloudSnapshot{content: v.copy(), name: req.GetName(), source: req.GetSourceVolumeId()}
	return cut(id, c.snapshots[id]), nil
}

func cut(id string, s *cloudSnapshot) *csi.CreateSnapshotResponse {
	return &csi.CreateSnapshotResponse{Snapshot: &csi.Snapshot{
		SnapshotId: id, SourceVolumeId: s.source, SizeBytes: s.size, ReadyToUse: true, CreationTime: timestamppb.New(time.Unix(1, 0)),
	}}
}

// DeleteSnapshot is Controller's.
func (c *Cloud) DeleteSnapshot(_ context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.snapshots, req.GetSnapshotId())
	return &csi.DeleteSnapshotResponse{}, nil
}
