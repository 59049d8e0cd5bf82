package driver

import (
	"context"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Constellation is what a driver needs for volumes that Constellation made. A
// driver that has it serves such volumes alone: they are opened as they are,
// with keys that are named by LUKS UUIDs, and never formatted.
type Constellation interface {
	// HeaderUUID returns the LUKS UUID on a device. The host may have
	// written any; ErrState where there is none, or more than one.
	HeaderUUID(ctx context.Context, device string) (string, error)
}

// keyDEKID names a Constellation volume's LUKS UUID, which is its key's ID.
const keyDEKID = KeyPrefix + "dek-id"

// integrityForm ends the names of filesystems in Constellation's StorageClasses
// that ask for integrity: "ext4-integrity".
const integrityForm = "-integrity"

// readFSType reads a capability's filesystem: its type, and whether the name asks
// for integrity as Constellation's do.
func readFSType(name string) (fstype string, integrity bool) {
	return strings.CutSuffix(name, integrityForm)
}

// askedDEK returns the DEK ID that a volume's key has. A volume context may
// name one only in Constellation mode: there the volume's ID says nothing about
// its key. Elsewhere it could name the key of another volume. Empty where the
// header has to say it.
func (d *Driver) askedDEK(v volume, volumeContext map[string]string) (dek.ID, error) {
	id, given := volumeContext[keyDEKID]
	if d.cfg.Constellation == nil {
		if given {
			return "", errdefs.Errorf(errdefs.ErrInvalid, "%s is possible only where this node asks Constellation's key service (--key-service-protocol=constellation): a volume's key is that of its own ID", keyDEKID)
		}
		return v.dek, nil
	}
	if !given {
		return "", nil
	}
	if err := dek.CheckUUID(id); err != nil {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%s must be the UUID of the volume's LUKS header: %w", keyDEKID, err)
	}
	return dek.ID(id), nil
}

// nameKey finds out which key a Constellation volume has where its volume
// context does not say it: as Constellation does, by what the disk says.
func (s *staging) nameKey(ctx context.Context) error {
	if s.v.dek != "" {
		return nil
	}
	uuid, err := s.cfg.Constellation.HeaderUUID(ctx, s.v.device())
	if err != nil {
		return err
	}
	s.v.dek = dek.ID(uuid)
	s.log.WarnContext(ctx, "the disk itself says which key it has: the host can put another volume in its place; name the LUKS UUID in the volume attribute "+keyDEKID+", or re-key the volume", "volume_id", s.v.id, "dek_id", uuid)
	return nil
}

// asMade completes the spec of a Constellation volume: nothing but the request
// says whether it has integrity. No key but one of theirs is used in this mode,
// and none of theirs in the other.
func (d *Driver) asMade(key *dek.DEK, integrity dek.Integrity) error {
	theirs := key.Spec.Layout == dek.LayoutConstellation
	if theirs != (d.cfg.Constellation != nil) {
		return errdefs.Errorf(errdefs.ErrState, "DEK %s has the layout %q: Constellation's volumes and others are served by different drivers", key.ID, key.Spec.Layout)
	}
	if theirs {
		key.Spec.Integrity = integrity
	}
	return nil
}
