package main

import (
	"context"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kube"
)

// What keyservice asks, answered by kube.

type reviewer struct{ *kube.Tokens }

func (r reviewer) Review(ctx context.Context, token string) (keyservice.Identity, error) {
	a, err := r.Tokens.Review(ctx, token)
	return keyservice.Identity{Name: a.Username, Node: a.Node}, err
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
