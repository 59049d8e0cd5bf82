package driver

import (
	"context"
	"errors"
	"log/slog"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// ControllerConfig is what a Controller works with. Wrapped and Keys are
// required.
type ControllerConfig struct {
	DriverName string // "": the wrapped driver's own; the nodes' must be the same
	Wrapped    grpc.ClientConnInterface
	Profile    *Profile // nil: the one of the wrapped driver's name
	Keys       ControllerKeys
	Plaintext  Plaintext // nil: every volume is encrypted; else the nodes' list
	KEKs       []string  // the names that Keys takes as dek.Spec.KEK, besides none

	Version  string            // GetPluginInfo's
	Manifest map[string]string // GetPluginInfo's
	Logger   *slog.Logger      // nil: no log
}

// Controller serves CSI's Identity, Controller and GroupController in front of
// the wrapped driver's. It makes the record of a volume's DEK before it hands the volume
// out and deletes it after the volume, and it keeps no state: every call is
// finished by the same call again, whatever died in between. It is safe for
// concurrent use; two calls that change one volume at a time are refused with
// ErrConflict. Its methods' errors are of errdefs' classes.
//
// Snapshot metadata is not offered: its block numbers would be those of the
// encrypted device, not of what a pod sees.
type Controller struct {
	cfg     ControllerConfig
	log     *slog.Logger
	name    string
	wrapped *wrapped
	locks   locks
}

// NewController asks the wrapped driver who it is, waiting until it answers or
// ctx ends, and returns a Controller in front of it. ErrInvalid where the
// configuration cannot work.
func NewController(ctx context.Context, cfg ControllerConfig) (*Controller, error) {
	if cfg.Wrapped == nil || cfg.Keys == nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a controller needs a wrapped driver and keys")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	w, err := newWrapped(ctx, cfg.Wrapped, cfg.Profile)
	if err != nil {
		return nil, err
	}
	name, err := w.nameOr(cfg.DriverName)
	if err != nil {
		return nil, err
	}
	return &Controller{cfg: cfg, log: cfg.Logger, name: name, wrapped: w}, nil
}

// Name returns the driver's name.
func (c *Controller) Name() string { return c.name }

// Register adds the services. Nothing else is forwarded to the wrapped driver:
// a method that we do not know may make volumes without a record.
func (c *Controller) Register(s grpc.ServiceRegistrar) {
	csi.RegisterIdentityServer(s, identity{name: c.name, version: c.cfg.Version, manifest: c.cfg.Manifest, wrapped: c.wrapped})
	csi.RegisterControllerServer(s, controller{Controller: c})
	csi.RegisterGroupControllerServer(s, groupController{Controller: c})
}

// controller is the Controller service.
type controller struct {
	csi.UnimplementedControllerServer
	*Controller
}

// aboutVolume is a request that names a volume.
type aboutVolume interface{ GetVolumeId() string }

func checkVolumeID(req aboutVolume) error {
	if req.GetVolumeId() == "" {
		return errdefs.Errorf(errdefs.ErrInvalid, "the volume ID is missing")
	}
	return nil
}

// record returns what is recorded of a volume or snapshot, without its key;
// found is false where there is none, because it is not encrypted or never was.
func (c *Controller) record(ctx context.Context, id dek.ID, idErr error) (d dek.DEK, found bool, err error) {
	if idErr != nil {
		return dek.DEK{}, false, nil // nothing with such an ID was ever recorded
	}
	d, err = c.cfg.Keys.GetDEK(ctx, id)
	d.Wipe()
	if errors.Is(err, errdefs.ErrNotFound) {
		return dek.DEK{}, false, nil
	}
	return d, err == nil, err
}

// unsettled is an error of the key side, with its words, about something that
// the wrapped driver has made or may have made in an earlier call. The sidecars
// forget that on most codes, and whoever deletes the claim then leaves a disk
// behind; on this class they come again. ErrExists stays: what is there is not
// what was asked for, and nobody is to wait for it.
func unsettled(err error) error {
	class := errdefs.Class(err)
	switch {
	case errors.Is(class, errdefs.ErrExists), errors.Is(class, errdefs.ErrConflict):
		return err
	case class == nil && (err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)):
		return err
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
}

// deleteDEK deletes a record after what it was for. Where there is none that
// was no encrypted volume, or one whose record the store has lost or withholds,
// which cannot be told from here.
func (c *Controller) deleteDEK(ctx context.Context, id dek.ID, idErr error) error {
	if idErr != nil {
		return nil
	}
	err := c.cfg.Keys.DeleteDEK(ctx, id)
	if errors.Is(err, errdefs.ErrNotFound) {
		c.log.WarnContext(ctx, "deleted what has no record: if it was encrypted, the store has lost the record or withholds it, and the key was not destroyed", "dek_id", id)
		return nil
	}
	if err == nil {
		c.log.InfoContext(ctx, "deleted", "dek_id", id)
	}
	return err
}

// ControllerGetCapabilities answers what the wrapped driver can do.
func (c controller) ControllerGetCapabilities(ctx context.Context, req *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return call(ctx, c.wrapped, "ControllerGetCapabilities", func(ctx context.Context) (*csi.ControllerGetCapabilitiesResponse, error) {
		return c.wrapped.controller.ControllerGetCapabilities(ctx, req)
	})
}

// ControllerPublishVolume attaches. The wrapped driver, which attaches a block
// device, may no longer refuse what would destroy a filesystem.
func (c controller) ControllerPublishVolume(ctx context.Context, req *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	inner := proto.CloneOf(req)
	inner.VolumeContext = foreign(req.GetVolumeContext())
	plain := c.cfg.Plaintext.has(c.name, req.GetVolumeId())
	if plain {
		if err := marked(req.GetVolumeId(), req.GetVolumeContext()); err != nil {
			return nil, err
		}
	}
	if capability := req.GetVolumeCapability(); capability != nil && !plain {
		want, _, err := readCapability(capability)
		if err != nil {
			return nil, err
		}
		if err := checkSharing(want, dek.Integrity(req.GetVolumeContext()[keyIntegrity]), c.wrapped.profile); err != nil {
			return nil, err
		}
		inner.VolumeCapability = c.inner(capability, want)
	}
	return call(ctx, c.wrapped, "ControllerPublishVolume", func(ctx context.Context) (*csi.ControllerPublishVolumeResponse, error) {
		return c.wrapped.controller.ControllerPublishVolume(ctx, inner)
	})
}

// ControllerUnpublishVolume detaches.
func (c controller) ControllerUnpublishVolume(ctx context.Context, req *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	return call(ctx, c.wrapped, "ControllerUnpublishVolume", func(ctx context.Context) (*csi.ControllerUnpublishVolumeResponse, error) {
		return c.wrapped.controller.ControllerUnpublishVolume(ctx, req)
	})
}

// ValidateVolumeCapabilities confirms what both of us can do.
func (c controller) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := checkVolumeID(req); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "there is no volume capability")
	}
	if c.cfg.Plaintext.has(c.name, req.GetVolumeId()) {
		return call(ctx, c.wrapped, "ValidateVolumeCapabilities", func(ctx context.Context) (*csi.ValidateVolumeCapabilitiesResponse, error) {
			return c.wrapped.controller.ValidateVolumeCapabilities(ctx, req)
		})
	}
	inner := proto.CloneOf(req)
	inner.VolumeContext = foreign(req.GetVolumeContext())
	inner.Parameters = foreign(req.GetParameters())
	inner.MutableParameters = foreign(req.GetMutableParameters())
	wish, refused := c.readWish(req.GetParameters(), req.GetVolumeCapabilities())
	if refused == nil {
		inner.VolumeCapabilities = wish.capabilities
		refused = c.checkContext(req)
	}
	resp, err := call(ctx, c.wrapped, "ValidateVolumeCapabilities", func(ctx context.Context) (*csi.ValidateVolumeCapabilitiesResponse, error) {
		return c.wrapped.controller.ValidateVolumeCapabilities(ctx, inner)
	})
	switch {
	case err != nil:
		return nil, err
	case refused != nil:
		return &csi.ValidateVolumeCapabilitiesResponse{Message: refused.Error()}, nil
	case resp.GetConfirmed() == nil:
		return resp, nil
	}
	out := proto.CloneOf(resp)
	out.Confirmed.VolumeCapabilities = req.GetVolumeCapabilities()
	out.Confirmed.VolumeContext = req.GetVolumeContext()
	out.Confirmed.Parameters = req.GetParameters()
	out.Confirmed.MutableParameters = req.GetMutableParameters()
	return out, nil
}

// checkContext refuses to share a volume whose context says that it has
// integrity: who asks need not give the parameters that it was made with.
func (c *Controller) checkContext(req *csi.ValidateVolumeCapabilitiesRequest) error {
	for _, capability := range req.GetVolumeCapabilities() {
		want, _, err := readCapability(capability)
		if err != nil {
			return err
		}
		if err := checkSharing(want, dek.Integrity(req.GetVolumeContext()[keyIntegrity]), c.wrapped.profile); err != nil {
			return err
		}
	}
	return nil
}

// GetCapacity is what the wrapped driver has, less what encryption takes. Who
// asks may not know yet how the volume will be used: capabilities without an
// access mode, as external-provisioner has them up to version 4, say nothing
// and are passed on as they are.
func (c controller) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	said, unsaid := byMode(req.GetVolumeCapabilities())
	wish, err := c.readWish(askedByClass(req.GetParameters()), said)
	if err != nil {
		return nil, err
	}
	inner := proto.CloneOf(req)
	inner.Parameters, inner.VolumeCapabilities = wish.parameters, append(unsaid, wish.capabilities...)
	resp, err := call(ctx, c.wrapped, "GetCapacity", func(ctx context.Context) (*csi.GetCapacityResponse, error) {
		return c.wrapped.controller.GetCapacity(ctx, inner)
	})
	if err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	out.AvailableCapacity = usableSize(resp.GetAvailableCapacity(), wish.spec)
	if out.MaximumVolumeSize != nil {
		out.MaximumVolumeSize.Value = usableSize(resp.GetMaximumVolumeSize().GetValue(), wish.spec)
	}
	if out.MinimumVolumeSize != nil {
		out.MinimumVolumeSize.Value = max(1, usableSize(resp.GetMinimumVolumeSize().GetValue(), wish.spec))
	}
	return out, nil
}

// ListVolumes lists the wrapped driver's volumes. Asking for the record of each
// would cost a call of the KMS per volume and minute, so sizes are those of
// volumes without integrity; one with integrity has somewhat less.
func (c controller) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	resp, err := call(ctx, c.wrapped, "ListVolumes", func(ctx context.Context) (*csi.ListVolumesResponse, error) {
		return c.wrapped.controller.ListVolumes(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	for _, e := range out.GetEntries() {
		if v := e.GetVolume(); v != nil && !c.cfg.Plaintext.has(c.name, v.GetVolumeId()) {
			v.CapacityBytes = usableSize(v.GetCapacityBytes(), dek.Spec{})
		}
	}
	return out, nil
}

// ControllerGetVolume returns one volume, with the size that a pod can use.
func (c controller) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	if err := checkVolumeID(req); err != nil {
		return nil, err
	}
	resp, err := call(ctx, c.wrapped, "ControllerGetVolume", func(ctx context.Context) (*csi.ControllerGetVolumeResponse, error) {
		return c.wrapped.controller.ControllerGetVolume(ctx, req)
	})
	if err != nil || resp.GetVolume() == nil {
		return resp, err
	}
	id, idErr := dek.VolumeID(c.name, req.GetVolumeId())
	d, found, err := c.record(ctx, id, idErr)
	if err != nil || !found {
		return resp, err
	}
	out := proto.CloneOf(resp)
	out.Volume.CapacityBytes = usableSize(resp.GetVolume().GetCapacityBytes(), d.Spec)
	return out, nil
}

// ControllerModifyVolume changes what is the wrapped driver's.
func (c controller) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	if err := noneOfOurs("parameter", req.GetMutableParameters()); err != nil {
		return nil, err
	}
	if err := c.wrapped.profile.refuses(req.GetMutableParameters()); err != nil && !c.cfg.Plaintext.has(c.name, req.GetVolumeId()) {
		return nil, err
	}
	return call(ctx, c.wrapped, "ControllerModifyVolume", func(ctx context.Context) (*csi.ControllerModifyVolumeResponse, error) {
		return c.wrapped.controller.ControllerModifyVolume(ctx, req)
	})
}
