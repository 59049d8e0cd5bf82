package keyservice

import (
	"context"
	"errors"
	"slices"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Volumes says which DEKs an identity may have.
type Volumes interface {
	// Allowed returns nil where it may have the DEK; ErrDenied, with a reason
	// for the audit log alone, where it may not; ErrUnavailable where that
	// cannot be told now. Any other error counts as ErrUnavailable. It never
	// looks at whether the DEK exists.
	Allowed(ctx context.Context, who Identity, id dek.ID) error
}

// Policy says who may do what. The zero value allows nobody anything.
type Policy struct {
	// Controllers are names of identities that may create and delete every
	// DEK. They get no keys.
	Controllers []string
	// Operators are names of identities that may rewrap every DEK, unseal, and
	// see the status. They get no keys.
	Operators []string
	// Attached is asked which DEKs an identity that is a node may get, claim
	// and confirm; nil: none.
	Attached Volumes
	// Prefixes is asked the same for every identity, node or not: what either
	// allows is allowed. nil: none. Keys derived for Constellation are for those
	// only to whom Prefixes gives them.
	Prefixes Volumes
	// Any ALLOWS EVERYTHING TO EVERY IDENTITY: each gets every key, claims in
	// every node's name, deletes every DEK, and unseals. For tests and for a
	// single node that has its key service to itself. Whoever sets it says so
	// in the log.
	Any bool
}

// operator says whether who may administer.
func (p Policy) operator(who Identity) bool {
	return p.Any || slices.Contains(p.Operators, who.Name)
}

// controller says whether who may create and delete.
func (p Policy) controller(who Identity) bool {
	return p.Any || slices.Contains(p.Controllers, who.Name)
}

// volume decides whether who may have the DEK; errors are as Volumes'.
func (p Policy) volume(ctx context.Context, who Identity, id dek.ID) error {
	if p.Any {
		return nil
	}
	prefixes := p.prefix(ctx, who, id)
	if prefixes == nil || who.Node == "" || p.Attached == nil {
		return prefixes
	}
	attached := p.Attached.Allowed(ctx, who, id)
	switch {
	case attached == nil:
		return nil
	case errors.Is(attached, errdefs.ErrDenied) && !errors.Is(prefixes, errdefs.ErrDenied):
		return prefixes
	case p.Prefixes == nil || !errors.Is(attached, errdefs.ErrDenied):
		return attached
	}
	return errdefs.Errorf(errdefs.ErrDenied, "%w; %w", attached, prefixes)
}

// prefix is volume for what only Prefixes can give.
func (p Policy) prefix(ctx context.Context, who Identity, id dek.ID) error {
	switch {
	case p.Any:
		return nil
	case p.Prefixes == nil && who.Node == "":
		return errdefs.Errorf(errdefs.ErrDenied, "the identity is no node, and nothing else may have keys")
	case p.Prefixes == nil:
		return errdefs.Errorf(errdefs.ErrDenied, "no policy gives DEKs to identities by name")
	}
	return p.Prefixes.Allowed(ctx, who, id)
}
