package keyservice

import (
	"context"
	"crypto/hpke"
	"errors"

	"google.golang.org/protobuf/proto"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// keyAPI answers KeyService.
type keyAPI struct {
	keyservicev1.UnimplementedKeyServiceServer
	*Server
}

// aboutDEK is a request that names a DEK.
type aboutDEK interface {
	proto.Message
	GetId() string
}

// GetDEK answers with the DEK, sealed; to a controller that asks for no key,
// with what its record says.
func (k keyAPI) GetDEK(ctx context.Context, req *keyservicev1.GetDEKRequest) (*keyservicev1.DEK, error) {
	return serve(ctx, k.Server, "GetDEK", req.GetId(), func(ctx context.Context, c *call) (a *keyservicev1.DEK, err error) {
		id, err := idOf(req)
		if err != nil {
			return nil, err
		}
		if len(req.GetRecipient()) == 0 && k.cfg.Policy.controller(c.Who) {
			return c.describe(ctx, id)
		}
		to, err := parseRecipient(req.GetRecipient())
		if err != nil {
			return nil, err
		}
		if err := c.mayHave(ctx, id); err != nil {
			return nil, err
		}
		keys, err := c.work(ctx)
		if err != nil {
			return nil, err
		}
		read := func(ctx context.Context) (dek.DEK, error) { return c.read(ctx, keys, id) }
		err = k.flights.share(ctx, id, read, func(d dek.DEK) (err error) {
			a, err = sealedOnWire(to, d)
			return err
		})
		return a, err
	})
}

// describe is GetDEK without keys.
func (c *call) describe(ctx context.Context, id dek.ID) (*keyservicev1.DEK, error) {
	if err := c.mayControl(ctx); err != nil {
		return nil, err
	}
	keys, err := c.work(ctx)
	if err != nil {
		return nil, err
	}
	d, err := c.read(ctx, keys, id)
	if err != nil {
		return nil, err
	}
	defer d.Wipe()
	return onWire(d), nil
}

// CreateDEK answers with what was created, and with its key only for who could
// also get it.
func (k keyAPI) CreateDEK(ctx context.Context, req *keyservicev1.CreateDEKRequest) (*keyservicev1.DEK, error) {
	return serve(ctx, k.Server, "CreateDEK", req.GetId(), func(ctx context.Context, c *call) (*keyservicev1.DEK, error) {
		id, err := idOf(req)
		if err != nil {
			return nil, err
		}
		n := newDEK{id: id, source: dek.ID(req.GetSource())}
		if n.spec, err = specOf(req.GetSpec()); err != nil {
			return nil, err
		}
		if n.source != "" {
			if _, err := dek.ParseID(req.GetSource()); err != nil || n.source == id {
				return nil, errdefs.Errorf(errdefs.ErrInvalid, "source: %.300q is no DEK that %s could be a copy of", n.source, id)
			}
		}
		c.Source = string(n.source)
		if err := c.mayControl(ctx); err != nil {
			return nil, err
		}
		if len(req.GetRecipient()) > 0 {
			return c.createFor(ctx, n, req.GetRecipient())
		}
		d, err := c.create(ctx, n)
		if err != nil {
			return nil, err
		}
		defer d.Wipe()
		return onWire(d), nil
	})
}

// newDEK is a DEK that is asked for.
type newDEK struct {
	id     dek.ID
	spec   dek.Spec
	source dek.ID // "": it is no copy
}

// createFor is CreateDEK for a caller that wants the key. The answer about a
// copy has its source's key too: the caller has to be one that may have it.
func (c *call) createFor(ctx context.Context, n newDEK, recipient []byte) (*keyservicev1.DEK, error) {
	to, err := parseRecipient(recipient)
	if err != nil {
		return nil, err
	}
	err = c.cfg.Policy.volume(ctx, c.Who, n.id)
	if err == nil && n.source != "" {
		err = c.cfg.Policy.volume(ctx, c.Who, n.source)
	}
	switch {
	case errors.Is(err, errdefs.ErrDenied):
		c.Allowed, c.Reason = false, "a controller asked for a key: "+err.Error()
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s may create DEKs but not have their keys: call CreateDEK without a recipient", c.Who.Name)
	case err != nil:
		return nil, c.decide(ctx, err)
	}
	d, err := c.create(ctx, n)
	if err != nil {
		return nil, err
	}
	defer d.Wipe()
	return sealedOnWire(to, d)
}

// create creates, unless the volume is noted as confirmed: then its record was
// lost, and a new key in its place would open nothing and hide that. A copy's
// source must not be rolled back either.
func (c *call) create(ctx context.Context, n newDEK) (dek.DEK, error) {
	keys, err := c.work(ctx)
	if err != nil {
		return dek.DEK{}, err
	}
	if err := c.current(ctx, keys, n.id); err != nil {
		return dek.DEK{}, err
	}
	if n.source == "" {
		return keys.CreateDEK(ctx, n.id, n.spec)
	}
	if err := c.current(ctx, keys, n.source); err != nil {
		return dek.DEK{}, err
	}
	return keys.CloneDEK(ctx, n.id, n.spec, n.source)
}

// ClaimFormat answers with the claim that holds.
func (k keyAPI) ClaimFormat(ctx context.Context, req *keyservicev1.ClaimFormatRequest) (*keyservicev1.Claim, error) {
	return serve(ctx, k.Server, "ClaimFormat", req.GetId(), func(ctx context.Context, c *call) (*keyservicev1.Claim, error) {
		id, err := idOf(req)
		if err != nil {
			return nil, err
		}
		claim, err := claimOf(req.GetClaim())
		if err != nil {
			return nil, err
		}
		if err := c.mayHave(ctx, id); err != nil {
			return nil, err
		}
		if claim.Node != c.Who.Node && !c.cfg.Policy.Any {
			return nil, c.decide(ctx, errdefs.Errorf(errdefs.ErrDenied, "it claims in the name of node %q", claim.Node))
		}
		keys, err := c.work(ctx)
		if err != nil {
			return nil, err
		}
		if err := c.current(ctx, keys, id); err != nil {
			return nil, err
		}
		holds, err := c.claim(ctx, keys, id, claim)
		if err != nil {
			return nil, err
		}
		return &keyservicev1.Claim{Node: holds.Node, Uuid: holds.UUID}, nil
	})
}

// ConfirmDEK confirms in the record, then in the note: a note that the record
// is behind would be taken for a rollback.
func (k keyAPI) ConfirmDEK(ctx context.Context, req *keyservicev1.ConfirmDEKRequest) (*keyservicev1.ConfirmDEKResponse, error) {
	return serve(ctx, k.Server, "ConfirmDEK", req.GetId(), func(ctx context.Context, c *call) (*keyservicev1.ConfirmDEKResponse, error) {
		id, err := idOf(req)
		if err != nil {
			return nil, err
		}
		h, err := headerOf(req.GetHeader())
		if err != nil {
			return nil, err
		}
		if err := c.mayHave(ctx, id); err != nil {
			return nil, err
		}
		keys, err := c.work(ctx)
		if err != nil {
			return nil, err
		}
		if err := c.current(ctx, keys, id); err != nil {
			return nil, err
		}
		if err := keys.ConfirmDEK(ctx, id, h); err != nil {
			return nil, err
		}
		return &keyservicev1.ConfirmDEKResponse{}, c.noteDown(ctx, id, h)
	})
}

// RewrapDEK rewraps.
func (k keyAPI) RewrapDEK(ctx context.Context, req *keyservicev1.RewrapDEKRequest) (*keyservicev1.RewrapDEKResponse, error) {
	return serve(ctx, k.Server, "RewrapDEK", req.GetId(), func(ctx context.Context, c *call) (*keyservicev1.RewrapDEKResponse, error) {
		id, err := idOf(req)
		if err != nil {
			return nil, err
		}
		if err := c.mayOperate(ctx); err != nil {
			return nil, err
		}
		keys, err := c.work(ctx)
		if err != nil {
			return nil, err
		}
		return &keyservicev1.RewrapDEKResponse{}, keys.RewrapDEK(ctx, id)
	})
}

// DeleteDEK deletes.
func (k keyAPI) DeleteDEK(ctx context.Context, req *keyservicev1.DeleteDEKRequest) (*keyservicev1.DeleteDEKResponse, error) {
	return serve(ctx, k.Server, "DeleteDEK", req.GetId(), func(ctx context.Context, c *call) (*keyservicev1.DeleteDEKResponse, error) {
		id, err := idOf(req)
		if err != nil {
			return nil, err
		}
		if err := c.mayControl(ctx); err != nil {
			return nil, err
		}
		keys, err := c.work(ctx)
		if err != nil {
			return nil, err
		}
		return &keyservicev1.DeleteDEKResponse{}, keys.DeleteDEK(ctx, id)
	})
}

// idOf checks a request's size and its ID.
func idOf(req aboutDEK) (dek.ID, error) {
	if proto.Size(req) > maxRequest {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "a request has at most %d bytes", maxRequest)
	}
	id, err := dek.ParseID(req.GetId())
	if err != nil {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return id, nil
}

func specOf(s *keyservicev1.Spec) (dek.Spec, error) {
	spec := dek.Spec{Name: s.GetName(), Cipher: s.GetCipher(), Integrity: dek.Integrity(s.GetIntegrity()), Layout: s.GetLayout(), Discard: s.GetDiscard(), IntegrityMode: s.GetIntegrityMode(), KEK: s.GetKek()}
	if err := spec.Validate(); err != nil {
		return dek.Spec{}, errdefs.Errorf(errdefs.ErrInvalid, "spec: %w", err)
	}
	return spec, nil
}

func claimOf(c *keyservicev1.Claim) (dek.Claim, error) {
	if n := len(c.GetNode()); n == 0 || n > maxName {
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrInvalid, "claim: node name of %d bytes: must be 1 to %d", n, maxName)
	}
	if n := len(c.GetUuid()); n == 0 || n > maxUUID {
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrInvalid, "claim: UUID of %d bytes: must be 1 to %d", n, maxUUID)
	}
	return dek.Claim{Node: c.GetNode(), UUID: c.GetUuid()}, nil
}

func headerOf(h *keyservicev1.Header) (dek.HeaderID, error) {
	if n := len(h.GetUuid()); n == 0 || n > maxUUID {
		return dek.HeaderID{}, errdefs.Errorf(errdefs.ErrInvalid, "header: UUID of %d bytes: must be 1 to %d", n, maxUUID)
	}
	if n := len(h.GetFingerprint()); n > maxUUID {
		return dek.HeaderID{}, errdefs.Errorf(errdefs.ErrInvalid, "header: fingerprint of %d bytes: at most %d", n, maxUUID)
	}
	if err := dek.CheckBackup(h.GetBackup()); err != nil {
		return dek.HeaderID{}, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return dek.HeaderID{UUID: h.GetUuid(), Sequence: h.GetSequence(), Fingerprint: h.GetFingerprint(), Backup: h.GetBackup()}, nil
}

// sealedOnWire is d with its keys sealed.
func sealedOnWire(to hpke.PublicKey, d dek.DEK) (a *keyservicev1.DEK, err error) {
	a = onWire(d)
	if a.SealedKey, err = sealTo(to, fieldKey, d.ID, d.Key); err != nil {
		return nil, err
	}
	if a.SealedPrevious, err = sealTo(to, fieldPrevious, d.ID, d.Previous); err != nil {
		return nil, err
	}
	return a, nil
}

// onWire is d without its keys.
func onWire(d dek.DEK) *keyservicev1.DEK {
	a := &keyservicev1.DEK{
		Id: string(d.ID), State: string(d.State), Source: string(d.Source),
		Spec: &keyservicev1.Spec{Name: d.Spec.Name, Cipher: d.Spec.Cipher, Integrity: string(d.Spec.Integrity), Layout: d.Spec.Layout, Discard: d.Spec.Discard, IntegrityMode: d.Spec.IntegrityMode, Kek: d.Spec.KEK},
	}
	if d.Claim != (dek.Claim{}) {
		a.Claim = &keyservicev1.Claim{Node: d.Claim.Node, Uuid: d.Claim.UUID}
	}
	if d.Header != (dek.HeaderID{}) {
		a.Header = &keyservicev1.Header{Uuid: d.Header.UUID, Sequence: d.Header.Sequence, Backup: d.Header.Backup}
	}
	return a
}
