package driver

import (
	"cmp"
	"context"
	"errors"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// provisioning is one CreateVolume call on its way.
type provisioning struct {
	*Controller
	inner  *csi.CreateVolumeRequest
	limit  int64
	spec   dek.Spec
	marks  map[string]string
	source dek.ID // "": a new disk
}

// CreateVolume makes the wrapped driver make a volume with room for what
// encryption takes, and then the record of its DEK: only with one is the volume
// handed out. Whatever was made stays where a later step fails; the same call
// again goes on there. A volume is never deleted here: the wrapped driver may
// have answered with the ID of one that is somebody else's.
func (c controller) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	p, err := c.newProvisioning(req)
	if err != nil {
		return nil, err
	}
	if err := p.checkSource(ctx); err != nil {
		return nil, err
	}
	if p.inner.CapacityRange, err = p.wrapped.profile.deviceRange(req.GetCapacityRange(), p.spec); err != nil {
		return nil, err
	}
	resp, err := call(ctx, c.wrapped, "CreateVolume", func(ctx context.Context) (*csi.CreateVolumeResponse, error) {
		return c.wrapped.controller.CreateVolume(ctx, p.inner)
	})
	if err != nil {
		return nil, err
	}
	return p.finish(ctx, resp)
}

// newProvisioning checks a request. It calls nobody.
func (c *Controller) newProvisioning(req *csi.CreateVolumeRequest) (*provisioning, error) {
	switch {
	case req.GetName() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the volume has no name")
	case len(req.GetVolumeCapabilities()) == 0:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no volume capability")
	}
	if err := noneOfOurs("mutable parameter", req.GetMutableParameters()); err != nil {
		return nil, err
	}
	if err := c.wrapped.profile.refuses(req.GetMutableParameters(), req.GetSecrets()); err != nil {
		return nil, err
	}
	wish, err := c.readWish(req.GetParameters(), req.GetVolumeCapabilities())
	if err != nil {
		return nil, err
	}
	p := &provisioning{
		Controller: c, inner: proto.CloneOf(req), limit: req.GetCapacityRange().GetLimitBytes(),
		spec: wish.spec, marks: wish.marks,
	}
	p.spec.Name = req.GetName()
	if err := p.spec.Validate(); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	p.inner.Parameters, p.inner.VolumeCapabilities = wish.parameters, wish.capabilities
	return p, p.readSource(req.GetVolumeContentSource())
}

// readSource names the DEK of what the new volume is to be a copy of.
func (p *provisioning) readSource(s *csi.VolumeContentSource) (err error) {
	switch {
	case s == nil:
		return nil
	case s.GetSnapshot().GetSnapshotId() != "":
		p.source, err = dek.SnapshotID(p.name, s.GetSnapshot().GetSnapshotId())
	case s.GetVolume().GetVolumeId() != "":
		p.source, err = dek.VolumeID(p.name, s.GetVolume().GetVolumeId())
	default:
		err = errors.New("names neither a snapshot nor a volume")
	}
	if err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "the volume's content source: %w", err)
	}
	return nil
}

// checkSource refuses a copy that could not be opened, before there is one. A
// copy is laid out as its source, whatever is asked for new volumes.
func (p *provisioning) checkSource(ctx context.Context) error {
	if p.source == "" {
		return nil
	}
	d, found, err := p.record(ctx, p.source, nil)
	switch {
	case err != nil:
		return unsettled(err)
	case !found:
		return noRecord(p.source, "copied")
	case d.Spec.Integrity != p.spec.Integrity:
		return errdefs.Errorf(errdefs.ErrInvalid, "%s has integrity %q, and a copy of its disk cannot have %q: use a StorageClass with the same %s", p.source, d.Spec.Integrity, p.spec.Integrity, keyIntegrity)
	case d.Spec.IntegrityMode != p.spec.IntegrityMode:
		return errdefs.Errorf(errdefs.ErrInvalid, "%s has the integrity mode %q, and a copy of its disk cannot have %q: use a StorageClass with the same %s", p.source, cmp.Or(d.Spec.IntegrityMode, modeJournal), cmp.Or(p.spec.IntegrityMode, modeJournal), keyMode)
	}
	p.spec.Layout = d.Spec.Layout
	return settled(p.source, d, "copied")
}

// settled refuses a source of which a copy could have either of two states, so
// that nobody would know later how to open it.
func settled(id dek.ID, d dek.DEK, what string) error {
	switch {
	case d.State == dek.Rotating && !id.Snapshot():
		return errdefs.Errorf(errdefs.ErrConflict, "the key of %s is being replaced, or it is a copy that no node has opened yet: use it once, then it can be %s", id, what)
	case d.State == dek.Prepared && d.Claim.Node != "":
		return errdefs.Errorf(errdefs.ErrConflict, "node %q is formatting %s for its first use: it can be %s when that is done", d.Claim.Node, id, what)
	}
	return nil
}

func noRecord(id dek.ID, what string) error {
	return errdefs.Errorf(errdefs.ErrNotFound, "there is no record of %s: it does not exist or is not encrypted, and only an encrypted disk can be %s here; copy the data instead", id, what)
}

// finish makes the record of what the wrapped driver has made, and describes it.
func (p *provisioning) finish(ctx context.Context, resp *csi.CreateVolumeResponse) (*csi.CreateVolumeResponse, error) {
	volumeID := resp.GetVolume().GetVolumeId()
	id, err := dek.VolumeID(p.name, volumeID)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "wrapped driver %s made a volume that cannot have a key: %w", p.wrapped.name, err)
	}
	if p.cfg.Plaintext[id] {
		return nil, errdefs.Errorf(errdefs.ErrExists, "wrapped driver %s answered with volume %s, which is in the list of unencrypted volumes: it is left as it is; if that one was deleted and its ID given again, take it out of the list", p.wrapped.name, volumeID)
	}
	out := proto.CloneOf(resp)
	if out.Volume.VolumeContext, err = volumeContext(resp.GetVolume().GetVolumeContext(), p.marks, p.spec.Integrity); err != nil {
		return nil, err
	}
	out.Volume.CapacityBytes = usableSize(resp.GetVolume().GetCapacityBytes(), p.spec)
	if p.limit > 0 {
		out.Volume.CapacityBytes = min(out.Volume.CapacityBytes, p.limit)
	}
	if err := p.proveBlock(ctx, resp.GetVolume()); err != nil {
		return nil, err
	}
	d, err := p.makeDEK(ctx, id)
	d.Wipe()
	if errors.Is(err, errdefs.ErrExists) {
		return nil, errdefs.Errorf(errdefs.ErrExists, "wrapped driver %s answered with volume %s, which is not usable as %q: another volume has or had that ID, or this one was asked for with other parameters before; it is left as it is: %w", p.wrapped.name, volumeID, p.spec.Name, err)
	}
	if err != nil {
		return nil, unsettled(err)
	}
	p.log.InfoContext(ctx, "created", "volume_id", volumeID, "dek_id", id, "name", p.spec.Name, "integrity", p.spec.Integrity, "layout", p.spec.Layout, "discard", p.spec.Discard, "kek", p.spec.KEK, "source", p.source)
	return out, nil
}

func (p *provisioning) makeDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	if p.source == "" {
		return p.cfg.Keys.CreateDEK(ctx, id, p.spec)
	}
	return p.cfg.Keys.CloneDEK(ctx, id, p.spec, p.source)
}

// proveBlock makes a driver that nobody has looked at say that the volume can
// be a block device: others format what they stage, whatever they are asked.
func (p *provisioning) proveBlock(ctx context.Context, v *csi.Volume) error {
	if p.wrapped.profile.Known {
		return nil
	}
	req := &csi.ValidateVolumeCapabilitiesRequest{VolumeId: v.GetVolumeId(), VolumeContext: v.GetVolumeContext(), Parameters: p.inner.GetParameters(), Secrets: p.inner.GetSecrets()}
	for _, c := range p.inner.GetVolumeCapabilities() {
		block := proto.CloneOf(c)
		makeBlock(block)
		req.VolumeCapabilities = append(req.VolumeCapabilities, block)
	}
	resp, err := call(ctx, p.wrapped, "ValidateVolumeCapabilities", func(ctx context.Context) (*csi.ValidateVolumeCapabilitiesResponse, error) {
		return p.wrapped.controller.ValidateVolumeCapabilities(ctx, req)
	})
	if err != nil {
		return err
	}
	if resp.GetConfirmed() == nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "wrapped driver %s is not known to this version and does not confirm that it can hand out volume %s as a block device (%q): it cannot be encrypted, and was left as it is", p.wrapped.name, v.GetVolumeId(), resp.GetMessage())
	}
	return nil
}

// DeleteVolume deletes the volume and then its DEK, and is not done before both
// are gone: the other way round a volume that could not be deleted would be
// unreadable.
func (c controller) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := checkVolumeID(req); err != nil {
		return nil, err
	}
	unlock, err := c.locks.try(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	_, err = call(ctx, c.wrapped, "DeleteVolume", func(ctx context.Context) (*csi.DeleteVolumeResponse, error) {
		return c.wrapped.controller.DeleteVolume(ctx, req)
	})
	if err := ignoreNotFound(err); err != nil {
		return nil, err
	}
	id, idErr := dek.VolumeID(c.name, req.GetVolumeId())
	if err := c.deleteDEK(ctx, id, idErr); err != nil {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// ControllerExpandVolume lets the device grow so that the volume has what is
// asked for. A volume without record is not ours, and grows as it is asked to.
func (c controller) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := checkVolumeID(req); err != nil {
		return nil, err
	}
	if req.GetCapacityRange() == nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no capacity range")
	}
	unlock, err := c.locks.try(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer unlock()
	id, idErr := dek.VolumeID(c.name, req.GetVolumeId())
	d, found, err := c.record(ctx, id, idErr)
	if err != nil {
		return nil, err
	}
	inner := proto.CloneOf(req)
	if found {
		if inner.CapacityRange, err = c.wrapped.profile.deviceRange(req.GetCapacityRange(), d.Spec); err != nil {
			return nil, err
		}
	}
	if found || !c.cfg.Plaintext[id] {
		if inner.VolumeCapability, err = c.innerOf(req.GetVolumeCapability()); err != nil {
			return nil, err
		}
	}
	resp, err := call(ctx, c.wrapped, "ControllerExpandVolume", func(ctx context.Context) (*csi.ControllerExpandVolumeResponse, error) {
		return c.wrapped.controller.ControllerExpandVolume(ctx, inner)
	})
	if err != nil || !found {
		return resp, err
	}
	return expanded(resp, req.GetCapacityRange().GetRequiredBytes(), d.Spec), nil
}

// expanded is the answer: exactly the size asked for where the device has it.
// The node always has to follow, because the mapping does not grow by itself.
func expanded(resp *csi.ControllerExpandVolumeResponse, required int64, spec dek.Spec) *csi.ControllerExpandVolumeResponse {
	out := proto.CloneOf(resp)
	out.CapacityBytes = usableSize(resp.GetCapacityBytes(), spec)
	if required > 0 {
		out.CapacityBytes = min(out.CapacityBytes, required)
	}
	out.NodeExpansionRequired = true
	return out
}
