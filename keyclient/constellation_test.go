package keyclient_test

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

// constellation derives keys as Constellation's key service does: for any ID,
// from a master secret and a salt, "key-" before the ID.
type constellation struct {
	constellationv1.UnimplementedAPIServer
	secret, salt []byte
	length       int // of what is answered; 0: as asked
	err          error
}

func (c *constellation) GetDataKey(_ context.Context, r *constellationv1.GetDataKeyRequest) (*constellationv1.GetDataKeyResponse, error) {
	n := int(r.Length)
	if c.length != 0 {
		n = c.length
	}
	k, err := hkdf.Key(sha256.New, c.secret, c.salt, "key-"+r.DataKeyId, n)
	check(err)
	return &constellationv1.GetDataKeyResponse{DataKey: k}, c.err
}

func TestConstellation(t *testing.T) {
	service := &constellation{secret: make([]byte, 32), salt: make([]byte, 32)}
	ca := newAuthority(t)
	overTLS := ca.serverConfig("localhost")
	overTLS.ClientAuth = 0
	for name, cfg := range map[string]keyclient.Config{
		"plaintext": {Address: newServer(t, "tcp", nil, service).start().address()},
		"TLS":       {Address: newServer(t, "tcp", overTLS, service).start().address(), CAFile: ca.file},
	} {
		t.Run(name, func(t *testing.T) {
			cfg.Protocol = keyclient.ProtocolConstellation
			c := open(t, cfg)
			const uuid = "00000000-0000-0000-0000-000000000000"
			d, err := c.GetDEK(t.Context(), uuid)
			must(t, "GetDEK", err)
			defer d.Wipe()
			if got := hex.EncodeToString(d.Key.Expose()); got != "2b5c829f691bfd4232f8aac464bccc07e605c7c8e82cbca09837e86d0b6d0665" {
				t.Errorf("key %s", got)
			}
			key := d.Key
			defer key.Wipe()
			d.Key = dek.DEK{}.Key
			if want := (dek.DEK{ID: uuid, State: dek.Formatted, Spec: dek.Spec{Cipher: dek.CipherXTS, Layout: dek.LayoutConstellation}, Header: dek.HeaderID{UUID: uuid}}); d != want {
				t.Errorf("GetDEK = %+v, want %+v", d, want)
			}
			constellationRefuses(t, c)
		})
	}
	c := open(t, keyclient.Config{Address: newServer(t, "unix", nil, service).start().address(), Protocol: keyclient.ProtocolConstellation, Attempts: 2})
	for _, length := range []int{1, 31, 33, 64, 4096} {
		service.length = length
		d, err := c.GetDEK(t.Context(), dek.ID(uuid))
		mustBe(t, "a key of another length", err, errdefs.ErrCorrupt)
		if d.Key.Len() != 0 {
			t.Error("a key came with an error")
		}
	}
	service.err = status.Error(codes.Unavailable, "not yet")
	_, err := c.GetDEK(t.Context(), dek.ID(uuid))
	mustBe(t, "GetDEK", err, errdefs.ErrUnavailable, "not yet")
}

// constellationRefuses checks that nothing but keys of headers can be asked for.
func constellationRefuses(t *testing.T, c *keyclient.Client) {
	t.Helper()
	ctx := t.Context()
	for _, id := range []dek.ID{id, "measurementSecret", "clusterID", uuid + "0", "driver.example.com/" + uuid, "0B9C1A52-6F0E-4D5B-9A3E-8F1C2D3E4F50", ""} {
		_, err := c.GetDEK(ctx, id)
		mustBe(t, "GetDEK of "+string(id), err, errdefs.ErrInvalid)
	}
	_, createErr := c.CreateDEK(ctx, uuid, spec())
	_, claimErr := c.ClaimFormat(ctx, uuid, dek.Claim{Node: "n", UUID: uuid})
	_, statusErr := c.Status(ctx)
	_, unsealErr := c.Unseal(ctx, keyclient.Given{})
	_, recoverErr := c.Recover(ctx, keyclient.Given{})
	for method, err := range map[string]error{
		"CreateDEK": createErr, "ClaimFormat": claimErr, "Status": statusErr, "Unseal": unsealErr, "Recover": recoverErr,
		"ConfirmDEK": c.ConfirmDEK(ctx, uuid, dek.HeaderID{UUID: uuid}),
		"RewrapDEK":  c.RewrapDEK(ctx, uuid), "DeleteDEK": c.DeleteDEK(ctx, uuid),
	} {
		mustBe(t, method, err, errdefs.ErrInvalid, method, "Constellation's key service")
	}
}
