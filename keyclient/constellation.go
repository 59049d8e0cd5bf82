package keyclient

import (
	"context"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// constellationCan says what a Constellation key service cannot do: it derives
// a key for any string and keeps nothing. So there is nothing to create, claim,
// confirm, rewrap or delete, and only what names a header that exists may be
// asked for: nothing is ever formatted with such a key.
func constellationCan(method string, id dek.ID) error {
	if method != "GetDEK" {
		return errdefs.Errorf(errdefs.ErrInvalid, "%s of DEK %s: Constellation's key service hands out the keys of volumes that exist and can do nothing else", method, id)
	}
	if err := dek.CheckUUID(string(id)); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "Constellation's key service is asked for keys by the UUID of a LUKS header alone: %w", err)
	}
	return nil
}

// getDataKey gets the key of the LUKS header whose UUID id is. The volume
// counts as formatted, with that header: there is no record that could say
// anything else. Nor could it say whether the volume has integrity: the caller
// knows, or does not.
func getDataKey(ctx context.Context, conn *connection, id dek.ID) (dek.DEK, error) {
	a, err := conn.constellation.GetDataKey(ctx, &constellationv1.GetDataKeyRequest{DataKeyId: string(id), Length: dek.Size})
	if err != nil {
		return dek.DEK{}, err
	}
	key := secret.Take(a.GetDataKey())
	if key.Len() != dek.Size {
		defer key.Wipe()
		return dek.DEK{}, corrupt("a key of %d bytes, and %d were asked for", key.Len(), dek.Size)
	}
	return dek.DEK{
		ID: id, State: dek.Formatted, Spec: dek.Spec{Cipher: dek.CipherXTS, Layout: dek.LayoutConstellation}, Header: dek.HeaderID{UUID: string(id)}, Key: key,
	}, nil
}
