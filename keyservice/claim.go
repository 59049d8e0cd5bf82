package keyservice

import (
	"context"
	"errors"
	"fmt"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Claims tells which claims can be taken over.
type Claims interface {
	// StaleClaim says whether a node that has claimed a volume's format cannot
	// be formatting it any more: nothing joins the two. False where that
	// cannot be proven; ErrUnavailable where it cannot be told now.
	StaleClaim(ctx context.Context, node string, id dek.ID) (bool, error)
}

// claim is ClaimFormat, which takes over a claim whose node cannot use it any
// more. The UUID stays what it was: the device may carry remains with it, and
// with any other they would be foreign.
//
// Between the question about the other node and the change of the record it
// may be attached again. That takes a volume which is attached to both at once
// while it has never been formatted, and milliseconds.
func (c *call) claim(ctx context.Context, keys NodeKeys, id dek.ID, claim dek.Claim) (dek.Claim, error) {
	holds, err := keys.ClaimFormat(ctx, id, claim)
	if !errors.Is(err, errdefs.ErrConflict) || c.cfg.Claims == nil || c.cfg.Policy.Attached == nil {
		return holds, err
	}
	// A prefix allows a node more than what is attached to it, but not this.
	if why := c.cfg.Policy.Attached.Allowed(ctx, c.Who, id); why != nil {
		return dek.Claim{}, err
	}
	d, readErr := c.read(ctx, keys, id)
	if readErr != nil {
		return dek.Claim{}, readErr
	}
	defer d.Wipe()
	holder := d.Claim.Node
	if holder == "" || holder == claim.Node {
		return dek.Claim{}, err // others changed the record: the caller comes again
	}
	stale, unknown := c.cfg.Claims.StaleClaim(ctx, holder, id)
	if unknown != nil {
		return dek.Claim{}, again(ctx, fmt.Errorf("node %s has claimed the format of DEK %s, and whether it still can format cannot be told now: %w", holder, id, unknown))
	}
	if !stale {
		return dek.Claim{}, err
	}
	// Only if the claim is still that node's, which ReleaseClaim sees to.
	if err := keys.ReleaseClaim(ctx, id, holder); err != nil {
		return dek.Claim{}, err
	}
	if holds, err = keys.ClaimFormat(ctx, id, claim); err == nil {
		c.Reason = fmt.Sprintf("it took over the claim of node %s, to which nothing attaches the volume any more", holder)
	}
	return holds, err
}
