package loopdriver

import (
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// noteParameter is the one StorageClass parameter that the driver knows: it
// comes back in the volume context. Others are refused, as most drivers do.
const noteParameter = "note"

func (d *Driver) checkCreate(req *csi.CreateVolumeRequest) error {
	if req.GetName() == "" {
		return errdefs.Errorf(errdefs.ErrInvalid, "the volume has no name")
	}
	if err := d.checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return err
	}
	if err := checkParameters(req.GetParameters(), noteParameter); err != nil {
		return err
	}
	if err := checkParameters(req.GetMutableParameters()); err != nil {
		return err
	}
	requisite := req.GetAccessibilityRequirements().GetRequisite()
	if slices.ContainsFunc(requisite, d.here) {
		return nil
	}
	if len(requisite) > 0 {
		return exhausted("volumes can be made on node %q only, which the accessibility requirements exclude", d.cfg.NodeID)
	}
	return nil
}

// checkParameters refuses parameters that nobody would act on. Those of the
// external-provisioner pass.
func checkParameters(params map[string]string, known ...string) error {
	for key := range params {
		if !slices.Contains(known, key) && !strings.HasPrefix(key, "csi.storage.k8s.io/") {
			return errdefs.Errorf(errdefs.ErrInvalid, "parameter %q is unknown", key)
		}
	}
	return nil
}

// checkCapabilities refuses access types and modes that the driver cannot
// give: a filesystem written by several nodes at once, most of all.
func (d *Driver) checkCapabilities(caps []*csi.VolumeCapability) error {
	if len(caps) == 0 {
		return errdefs.Errorf(errdefs.ErrInvalid, "there is no volume capability")
	}
	for _, c := range caps {
		if c.GetBlock() == nil && c.GetMount() == nil {
			return errdefs.Errorf(errdefs.ErrInvalid, "the volume capability has no access type")
		}
		switch mode := c.GetAccessMode().GetMode(); mode {
		case csi.VolumeCapability_AccessMode_UNKNOWN:
			return errdefs.Errorf(errdefs.ErrInvalid, "the volume capability has no access mode")
		case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER:
		default:
			if d.cfg.SingleWriter {
				return errdefs.Errorf(errdefs.ErrState, "access mode %v is not known", mode)
			}
		}
		switch mode := c.GetAccessMode().GetMode(); mode {
		case csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER, csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
			if c.GetMount() != nil {
				return errdefs.Errorf(errdefs.ErrInvalid, "access mode %v needs a block volume: no filesystem here survives several writing nodes", mode)
			}
		}
		if c.GetMount() != nil {
			switch fs := fsType(c); fs {
			case "ext4", "xfs", "btrfs":
			default:
				return errdefs.Errorf(errdefs.ErrInvalid, "filesystem %q: want ext4, xfs or btrfs", fs)
			}
		}
	}
	return nil
}

// fsType is the filesystem asked for, "" for a block volume.
func fsType(c *csi.VolumeCapability) string {
	switch {
	case c.GetMount() == nil:
		return ""
	case c.GetMount().GetFsType() == "":
		return "ext4"
	}
	return c.GetMount().GetFsType()
}

// pickSize chooses a multiple of the granularity within r, at least atLeast.
func (d *Driver) pickSize(r *csi.CapacityRange, atLeast int64) (int64, error) {
	required, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	if required < 0 || limit < 0 || limit > 0 && required > limit {
		return 0, errdefs.Errorf(errdefs.ErrInvalid, "capacity range from %d to %d bytes makes no sense", required, limit)
	}
	want := max(required, atLeast)
	if want == 0 {
		want = defaultBytes
		if limit > 0 {
			want = min(want, max(granularity, limit/granularity*granularity))
		}
	}
	if want > d.cfg.TotalBytes {
		return 0, outOfRange("%d bytes are more than the %d that all volumes together may have", want, d.cfg.TotalBytes)
	}
	want = (want + granularity - 1) / granularity * granularity
	if limit > 0 && want > limit {
		return 0, outOfRange("the volume would have %d bytes, which is over the limit of %d", want, limit)
	}
	return want, nil
}
