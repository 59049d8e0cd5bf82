package main

import (
	"context"
	"fmt"

	"github.com/cryptcsi/cryptcsi/keyclient"
)

// recoverNode gives a node that waits with `csi-plugin open --recovery-listen`
// KMS and store to get the key of its device from.
func recoverNode(ctx context.Context, c *command) error {
	return c.give(ctx, func(ctx context.Context, client *keyclient.Client, g keyclient.Given) error {
		r, err := client.Recover(ctx, g)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "%q is open on the node as %q\n", r.DEK, r.Mapping)
		return err
	})
}
