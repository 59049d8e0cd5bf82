package drivertest

import (
	"context"
	"crypto/sha256"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// ConstellationKeys is Constellation's key service: it has a key for every UUID
// and can do nothing else.
type ConstellationKeys struct{ Asked []dek.ID }

var _ driver.Keys = (*ConstellationKeys)(nil)

// GetDEK is driver.Keys'.
func (k *ConstellationKeys) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	if err := ctx.Err(); err != nil {
		return dek.DEK{}, err
	}
	if err := dek.CheckUUID(string(id)); err != nil {
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	k.Asked = append(k.Asked, id)
	return constellationDEK(string(id)), nil
}

func constellationDEK(uuid string) dek.DEK {
	sum := sha256.Sum256([]byte("key-" + uuid))
	return dek.DEK{
		ID: dek.ID(uuid), State: dek.Formatted, Header: dek.HeaderID{UUID: uuid}, Key: secret.Take(sum[:]),
		Spec: dek.Spec{Cipher: dek.CipherXTS, Layout: dek.LayoutConstellation},
	}
}

// ClaimFormat is driver.Keys'.
func (k *ConstellationKeys) ClaimFormat(_ context.Context, id dek.ID, _ dek.Claim) (dek.Claim, error) {
	return dek.Claim{}, errdefs.Errorf(errdefs.ErrInvalid, "ClaimFormat of %s: nothing is ever formatted", id)
}

// ConfirmDEK is driver.Keys'.
func (k *ConstellationKeys) ConfirmDEK(_ context.Context, id dek.ID, _ dek.HeaderID) error {
	return errdefs.Errorf(errdefs.ErrInvalid, "ConfirmDEK of %s: there is no record", id)
}

// MakeConstellation makes a disk what Constellation makes of it: a header with
// the UUID and the key that belongs to it, and a filesystem, or none for "".
func (k *Kernel) MakeConstellation(path, uuid string, integrity dek.Integrity, fstype string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.disks[k.nodes[path]]
	key := constellationDEK(uuid)
	defer key.Wipe()
	key.Spec.Integrity = integrity
	h := header{ID: key.ID, UUID: uuid, Made: true, Size: d.size - dataOffset, Spec: key.Spec}
	d.writeHeader(h, key.Key)
	if fstype == "" {
		return nil
	}
	t, err := k.activate(driver.Volume{Name: "constellation"}, d, h, key.Spec)
	if err != nil {
		return err
	}
	defer k.drop(t)
	return k.putSuperblock(t.Number, superblock{Type: fstype, Size: t.Size})
}

var _ driver.Constellation = Mapper{}

// HeaderUUID is driver.Constellation's.
func (m Mapper) HeaderUUID(ctx context.Context, device string) (string, error) {
	m.Kernel.mu.Lock()
	defer m.Kernel.mu.Unlock()
	d, err := m.Kernel.rawDisk(ctx, device)
	if err != nil {
		return "", err
	}
	h, found := d.readHeader()
	if !found {
		return "", errdefs.Errorf(errdefs.ErrState, "there is no LUKS header on %s", device)
	}
	return h.UUID, nil
}
