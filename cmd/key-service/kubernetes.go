package main

import (
	"context"
	"slices"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kube"
)

// What keyservice asks, answered by kube.

// reviewer knows tokens. Every pod can have a token for any audience with its
// node in it, so only the accounts in nodes speak for the node they run on.
type reviewer struct {
	*kube.Tokens
	nodes []string
}

func (r reviewer) Review(ctx context.Context, token string) (keyservice.Identity, error) {
	a, err := r.Tokens.Review(ctx, token)
	id := keyservice.Identity{Name: a.Username}
	if slices.Contains(r.nodes, a.Username) {
		id.Node = a.Node
	}
	return id, err
}

type attached struct{ *kube.Attachments }

func (a attached) Allowed(ctx context.Context, who keyservice.Identity, id dek.ID) error {
	return a.Attachments.Allowed(ctx, who.Node, id)
}

type notes struct{ *kube.Notes }

func (n notes) Confirm(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	_, err := n.Notes.Confirm(ctx, id, h) // false: a DEK outside Kubernetes
	return err
}
