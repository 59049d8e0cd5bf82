package keyservice

import (
	"context"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// constellationAPI answers Constellation's GetDataKey.
type constellationAPI struct {
	constellationv1.UnimplementedAPIServer
	*Server
}

// maxDerived is the longest key in bytes: that of every key that Constellation
// asks for. Its service has no bound. HKDF's shorter outputs are the beginnings
// of its longer ones, so up to here the bytes are the same.
const maxDerived = dek.Size

func errNoDeriver() error {
	return errdefs.Errorf(errdefs.ErrInvalid, "Constellation's API needs a KEK that derives keys: only scheme cluster does")
}

// GetDataKey derives a key.
func (a constellationAPI) GetDataKey(ctx context.Context, req *constellationv1.GetDataKeyRequest) (*constellationv1.GetDataKeyResponse, error) {
	return serve(ctx, a.Server, "GetDataKey", req.GetDataKeyId(), func(ctx context.Context, c *call) (*constellationv1.GetDataKeyResponse, error) {
		id, err := dek.ParseID(req.GetDataKeyId())
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
		}
		if n := req.GetLength(); n < 1 || n > maxDerived {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "a key of %d bytes: must be 1 to %d", n, maxDerived)
		}
		if err := c.mayDerive(ctx, id); err != nil {
			return nil, err
		}
		keys, err := c.work(ctx)
		if err != nil {
			return nil, err
		}
		deriver, ok := keys.(Deriver)
		if !ok {
			return nil, errNoDeriver()
		}
		key, err := deriver.Derive(ctx, string(id))
		if err != nil {
			return nil, err
		}
		defer key.Wipe()
		if key.Len() < int(req.GetLength()) {
			return nil, errdefs.Errorf(errdefs.ErrState, "the KEK derived %d bytes, %d were asked for", key.Len(), req.GetLength())
		}
		// gRPC encodes the answer after this returns, so this copy and its
		// buffers stay until they are collected.
		return &constellationv1.GetDataKeyResponse{DataKey: append([]byte(nil), key.Expose()[:req.GetLength()]...)}, nil
	})
}
