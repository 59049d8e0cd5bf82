package driver

import (
	"context"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// node is the Node service: each method checks its request, takes the volume's
// lock and calls what does the work. Node methods that this specification does
// not know are Unimplemented, see ServerOptions.
type node struct {
	csi.UnimplementedNodeServer
	*Driver
}

// NodeStageVolume makes the volume's filesystem, or for block volumes its
// mapping, ready on this node.
func (n node) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	v, err := n.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	unlock, err := n.locks.wait(ctx, v.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if plain, err := n.plaintext(ctx, v, req.GetVolumeContext()); err != nil {
		return nil, err
	} else if plain {
		return n.passStage(ctx, v, req)
	}
	s, err := n.newStaging(req)
	if err != nil {
		return nil, err
	}
	if err := s.stage(ctx); err != nil {
		s.tellFailed(err)
		return nil, err
	}
	s.tellStaged()
	n.hydrator.wake()
	return &csi.NodeStageVolumeResponse{}, nil
}

// NodeUnstageVolume undoes NodeStageVolume, finished or not.
func (n node) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	v, err := n.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	staging, err := absolute("staging path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := n.locks.wait(ctx, v.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if plain, err := n.leftPlaintext(v); err != nil {
		return nil, err
	} else if plain {
		return n.passUnstage(ctx, req)
	}
	if err := n.teardown(ctx, v, staging); err != nil {
		return nil, err
	}
	if err := n.unstageForeign(ctx, v, staging); err != nil {
		return nil, err
	}
	n.teller.forget(v.id)
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume makes a staged volume visible at a target path.
func (n node) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	v, err := n.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	unlock, err := n.locks.wait(ctx, v.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if plain, err := n.plaintext(ctx, v, req.GetVolumeContext()); err != nil {
		return nil, err
	} else if plain {
		return n.passPublish(ctx, v, req)
	}
	p, err := n.newPublishing(req)
	if err != nil {
		return nil, err
	}
	if err := p.publish(ctx); err != nil {
		return nil, err
	}
	if pod, ok := podOf(req.GetVolumeContext()); ok {
		n.noteUser(ctx, v, p.target, &pod)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume undoes NodePublishVolume and removes the target.
func (n node) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	v, err := n.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	target, err := absolute("target path", req.GetTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := n.locks.wait(ctx, v.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if plain, err := n.leftPlaintext(v); err != nil {
		return nil, err
	} else if plain && !within(target, n.base) {
		return n.passUnpublish(ctx, req)
	}
	if err := n.unpublish(ctx, v, target); err != nil {
		return nil, err
	}
	n.noteUser(ctx, v, target, nil)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeExpandVolume grows mapping and filesystem to what the device has.
func (n node) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	v, err := n.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	path, err := volumePath(req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	unlock, err := n.locks.wait(ctx, v.id)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if plain, err := n.leftPlaintext(v); err != nil {
		return nil, err
	} else if plain {
		return n.passExpand(ctx, req)
	}
	size, err := n.expand(ctx, v, path, req)
	if err != nil {
		return nil, err
	}
	n.hydrator.wake()
	return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, nil
}

// NodeGetVolumeStats measures what a pod sees. It takes no lock and changes
// nothing.
func (n node) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	v, err := n.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	path, err := volumePath(req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if plain, err := n.leftPlaintext(v); err != nil {
		return nil, err
	} else if plain {
		return n.passStats(ctx, path, req)
	}
	return n.stats(v, path)
}

// NodeGetInfo is the wrapped driver's: topology and limits are its matter.
func (n node) NodeGetInfo(ctx context.Context, req *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return call(ctx, n.wrapped, "NodeGetInfo", func(ctx context.Context) (*csi.NodeGetInfoResponse, error) {
		return n.wrapped.node.NodeGetInfo(ctx, req)
	})
}

// NodeGetCapabilities merges what the wrapped driver can do with what we do
// ourselves. Without VOLUME_MOUNT_GROUP kubelet sets the group of the files
// itself, which works on any filesystem.
func (n node) NodeGetCapabilities(ctx context.Context, _ *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	caps, err := n.wrapped.capabilities(ctx)
	if err != nil {
		return nil, err
	}
	caps = slices.DeleteFunc(caps, func(t csi.NodeServiceCapability_RPC_Type) bool {
		return t == csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP
	})
	for _, ours := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_VOLUME_CONDITION,
	} {
		if !caps.has(ours) {
			caps = append(caps, ours)
		}
	}
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range caps {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}
