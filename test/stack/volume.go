package stack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/dek"
)

// Volume is one volume and the calls that Kubernetes would make for it, each
// with the same arguments every time. Fields may be changed between calls.
type Volume struct {
	s              *Stack
	ID             string
	Capability     *csi.VolumeCapability
	Context        map[string]string
	PublishContext map[string]string
	Staging        string
	Target         string
	ReadOnly       bool // of the publish
}

// MountCapability is a filesystem for one writer.
func MountCapability(fstype string, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fstype, MountFlags: flags}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// BlockCapability is a raw device for one writer.
func BlockCapability() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	}
}

// Create makes a volume with the wrapped driver's controller and attaches it.
// The entries of extra are added to its volume context, as they would stand in
// a PersistentVolume. With a key service it also makes the volume's DEK, as a
// controller does: the node must not.
func (s *Stack) Create(ctx context.Context, name string, size int64, c *csi.VolumeCapability, extra map[string]string) (*Volume, error) {
	return s.Provision(ctx, &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: size}, VolumeCapabilities: []*csi.VolumeCapability{c},
	}, extra)
}

// Provision is Create with a request of which everything can be chosen.
func (s *Stack) Provision(ctx context.Context, req *csi.CreateVolumeRequest, extra map[string]string) (*Volume, error) {
	resp, err := s.Controller.CreateVolume(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("CreateVolume: %w", err)
	}
	name, c := req.GetName(), req.GetVolumeCapabilities()[0]
	v := &Volume{s: s, ID: resp.GetVolume().GetVolumeId(), Capability: c, Context: map[string]string{}}
	for _, m := range []map[string]string{resp.GetVolume().GetVolumeContext(), extra} {
		maps.Copy(v.Context, m)
	}
	sum := sha256.Sum256([]byte(v.ID))
	base := filepath.Join(s.KubeletDir(), "plugins/kubernetes.io/csi", s.Name, hex.EncodeToString(sum[:]))
	v.Staging = filepath.Join(base, "globalmount")
	v.Target = filepath.Join(s.KubeletDir(), "pods", name, "volume")
	if err := os.MkdirAll(v.Staging, 0o750); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(v.Target), 0o750); err != nil {
		return nil, err
	}
	if s.keys != nil && !s.cfg.Controller {
		// As an operator makes it: no controller stands in front of the sizes.
		spec := dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.Integrity(extra["cryptcsi.io/integrity"])}
		if _, err := s.keys.controller.CreateDEK(ctx, v.DEK(), spec); err != nil {
			return nil, err
		}
	}
	return v, v.Attach(ctx)
}

// DEK is the ID of the volume's key.
func (v *Volume) DEK() dek.ID { return dek.ID(v.s.Name + "/" + v.ID) }

// Key returns the volume's DEK, as an operator with KEK and store can.
func (v *Volume) Key(ctx context.Context) ([]byte, error) {
	keys, err := v.s.keyring(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = keys.Close() }()
	d, err := keys.GetDEK(ctx, v.DEK())
	if err != nil {
		return nil, err
	}
	defer d.Wipe()
	return bytes.Clone(d.Key.Expose()), nil
}

// Attach is ControllerPublishVolume.
func (v *Volume) Attach(ctx context.Context) error {
	resp, err := v.s.Controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
		VolumeId: v.ID, NodeId: Node1, VolumeCapability: v.Capability, VolumeContext: v.Context,
	})
	v.PublishContext = resp.GetPublishContext()
	return err
}

// Device returns the raw device that the volume is attached as.
func (v *Volume) Device() string { return v.PublishContext["devicePath"] }

// Stage is NodeStageVolume.
func (v *Volume) Stage(ctx context.Context) error {
	_, err := v.s.Node.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: v.ID, StagingTargetPath: v.Staging, VolumeCapability: v.Capability,
		VolumeContext: v.Context, PublishContext: v.PublishContext,
	})
	return err
}

// Publish is NodePublishVolume.
func (v *Volume) Publish(ctx context.Context) error {
	_, err := v.s.Node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId: v.ID, StagingTargetPath: v.Staging, TargetPath: v.Target, VolumeCapability: v.Capability,
		VolumeContext: v.Context, PublishContext: v.PublishContext, Readonly: v.ReadOnly,
	})
	return err
}

// Up is Stage and Publish.
func (v *Volume) Up(ctx context.Context) error {
	if err := v.Stage(ctx); err != nil {
		return err
	}
	return v.Publish(ctx)
}

// Unpublish is NodeUnpublishVolume.
func (v *Volume) Unpublish(ctx context.Context) error {
	_, err := v.s.Node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.ID, TargetPath: v.Target})
	return err
}

// Unstage is NodeUnstageVolume.
func (v *Volume) Unstage(ctx context.Context) error {
	_, err := v.s.Node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.ID, StagingTargetPath: v.Staging})
	return err
}

// Down is Unpublish and Unstage.
func (v *Volume) Down(ctx context.Context) error {
	if err := v.Unpublish(ctx); err != nil {
		return err
	}
	return v.Unstage(ctx)
}

// Expand grows the volume by controller and node.
func (v *Volume) Expand(ctx context.Context, size int64) error {
	r := &csi.CapacityRange{RequiredBytes: size}
	if _, err := v.s.Controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.ID, CapacityRange: r, VolumeCapability: v.Capability}); err != nil {
		return fmt.Errorf("ControllerExpandVolume: %w", err)
	}
	_, err := v.s.Node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.ID, VolumePath: v.Target, StagingTargetPath: v.Staging, CapacityRange: r, VolumeCapability: v.Capability})
	return err
}

// Delete detaches and deletes the volume and, with a key service, its DEK.
func (v *Volume) Delete(ctx context.Context) error {
	if _, err := v.s.Controller.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.ID, NodeId: Node1}); err != nil {
		return err
	}
	_, err := v.s.Controller.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.ID})
	if err != nil || v.s.keys == nil || v.s.cfg.Controller {
		return err
	}
	return v.s.keys.controller.DeleteDEK(ctx, v.DEK())
}
