package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
)

const (
	// page is how many objects are listed at a time.
	page = 500
	// parallel is how many records are rewrapped at a time.
	parallel = 8
)

// keyring opens what the flags name, as one Keyring. close closes all of it.
func (c *command) keyring(ctx context.Context, least, most int) (k *envelope.Keyring, closeAll func(), err error) {
	keys, err := c.open(ctx, least, most)
	if err != nil {
		return nil, nil, err
	}
	k, err = keys.Keyring(envelope.Options{Survives: func(id dek.ID, until time.Time) {
		fmt.Fprintf(c.stdout, "          %s: the store keeps an earlier wrap of the key until %s\n", id, moment(until))
	}})
	if err != nil {
		return nil, nil, errors.Join(err, keys.Close())
	}
	return k, func() { _ = errors.Join(k.Close(), keys.Close()) }, nil
}

// each calls f for every record in every store.
func each(ctx context.Context, k *envelope.Keyring, f func(envelope.Info) error) error {
	for token := ""; ; {
		infos, next, err := k.List(ctx, token, page)
		if err != nil {
			return err
		}
		for _, i := range infos {
			if err := f(i); err != nil {
				return err
			}
		}
		if next == "" {
			return nil
		}
		token = next
	}
}

func dekList(ctx context.Context, c *command) error {
	k, done, err := c.keyring(ctx, 0, 0)
	if err != nil {
		return err
	}
	defer done()
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DEK ID\tSTATE\tINTEGRITY\tCLAIM\tCREATED\tUPDATED\tKEK\tKEY ID")
	bad := 0
	err = each(ctx, k, func(i envelope.Info) error {
		if i.Err != nil {
			bad++
			fmt.Fprintf(w, "%s\tunreadable: %s\n", cmp.Or(string(i.ID), i.Object), oneLine(i.Err))
			return nil
		}
		state := string(i.State)
		if !i.Expires.IsZero() {
			state += " until " + moment(i.Expires)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", i.ID, state, cmp.Or(string(i.Spec.Integrity), "-"), cmp.Or(i.Node, "-"),
			moment(i.Created), moment(i.Updated), cmp.Or(i.Spec.KEK, "-"), cmp.Or(strings.Join(keyIDs(i), " "), "-"))
		return nil
	})
	if err := errors.Join(err, w.Flush()); err != nil {
		return err
	}
	if bad > 0 {
		return fmt.Errorf("%d objects in the store are no records that this build can read", bad)
	}
	return nil
}

func dekCreate(ctx context.Context, c *command) error {
	name := c.String("name", "", "the name that the volume was asked for by (CreateVolume's); empty for a static one")
	integrity := c.String("integrity", "", "authenticated sectors: hmac-sha256, or empty for none")
	mode := c.String("integrity-mode", "", "with integrity: direct, or empty for its journal (docs/storageclass.md)")
	kek := c.String("kek", "", "name of the KEK that is to wrap the key (--kms-uri NAME=…); empty is the first one")
	discard := c.Bool("discard", false, "let the volume's users discard blocks; the host then sees which are unused")
	k, done, err := c.keyring(ctx, 1, 1)
	if err != nil {
		return err
	}
	defer done()
	spec := dek.Spec{Name: *name, Cipher: dek.CipherXTS, Integrity: dek.Integrity(*integrity), Discard: *discard, IntegrityMode: *mode, KEK: *kek}
	d, err := k.CreateDEK(ctx, dek.ID(c.Arg(0)), spec)
	if err != nil {
		return err
	}
	d.Wipe()
	fmt.Fprintf(c.stdout, "%s: %s\n", d.ID, d.State)
	return nil
}

func dekDelete(ctx context.Context, c *command) error {
	yes := c.Bool("yes", false, "do it; without, only show what would be done")
	k, done, err := c.keyring(ctx, 1, 1)
	if err != nil {
		return err
	}
	defer done()
	id := dek.ID(c.Arg(0))
	if !*yes {
		d, err := k.GetDEK(ctx, id)
		if err != nil {
			return err
		}
		d.Wipe()
		fmt.Fprintf(c.stdout, "would be deleted: %s (%s); everything on the volume is lost with its key\n", id, d.State)
		return nil
	}
	if err := k.DeleteDEK(ctx, id); err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "deleted   %s\n", id)
	return nil
}

func dekRestore(ctx context.Context, c *command) error {
	return c.byID(ctx, "restored", (*envelope.Keyring).RestoreDEK)
}

func dekRelease(ctx context.Context, c *command) error {
	node := c.String("node", "", "the node whose claim is taken away: make sure first that it no longer runs")
	return c.byID(ctx, "released", func(k *envelope.Keyring, ctx context.Context, id dek.ID) error {
		if *node == "" {
			return usageError("dek release: --node is required")
		}
		return k.ReleaseClaim(ctx, id, *node)
	})
}

// byID does one thing to one DEK.
func (c *command) byID(ctx context.Context, what string, do func(*envelope.Keyring, context.Context, dek.ID) error) error {
	k, done, err := c.keyring(ctx, 1, 1)
	if err != nil {
		return err
	}
	defer done()
	if err := do(k, ctx, dek.ID(c.Arg(0))); err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "%-9s %s\n", what, c.Arg(0))
	return nil
}

// rewrap wraps all keys, or some, under the KEK's current version.
func rewrap(ctx context.Context, c *command) error {
	force := c.Bool("force", false, "also keys that are wrapped under the current version already")
	k, done, err := c.keyring(ctx, 0, 1<<20)
	if err != nil {
		return err
	}
	defer done()
	ids := make([]dek.ID, 0, c.NArg())
	for _, id := range c.Args() {
		ids = append(ids, dek.ID(id))
	}
	bad := 0
	if len(ids) == 0 {
		if ids, bad, err = c.keyed(ctx, k); err != nil {
			return err
		}
	}
	p := &progress{c: c, what: "rewrapped", total: len(ids)}
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, id := range ids {
		g.Go(func() error {
			if *force {
				p.step(id, k.RewrapDEKAlways(ctx, id))
			} else {
				p.step(id, k.RewrapDEK(ctx, id))
			}
			return nil
		})
	}
	_ = g.Wait()
	if err := p.end(); err != nil || bad == 0 {
		return err
	}
	return fmt.Errorf("%d objects in the store are no records that this build can read: do not retire old versions of the KEK before they are understood", bad)
}

// keyed returns the IDs of all DEKs that have a key, those that were deleted and
// can be restored too, and how many objects are no records.
func (c *command) keyed(ctx context.Context, k *envelope.Keyring) (ids []dek.ID, bad int, err error) {
	err = each(ctx, k, func(i envelope.Info) error {
		switch {
		case i.Err != nil:
			bad++
			c.log.Error("an object in the store is no record that this build can read", "object", i.Object, "error", i.Err)
		case len(i.Wraps) > 0:
			ids = append(ids, i.ID)
		}
		return nil
	})
	return ids, bad, err
}

// progress tells how far a long run is, at most once a second.
type progress struct {
	c      *command
	what   string
	total  int
	done   atomic.Int64
	mu     sync.Mutex
	told   time.Time
	failed []error
}

func (p *progress) step(id dek.ID, err error) {
	n := p.done.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.failed = append(p.failed, err)
		fmt.Fprintf(p.c.stderr, "%s: %s\n", id, oneLine(err))
	}
	if time.Since(p.told) > time.Second {
		p.told = time.Now()
		fmt.Fprintf(p.c.stderr, "%d of %d\n", n, p.total)
	}
}

func (p *progress) end() error {
	fmt.Fprintf(p.c.stdout, "%s %d of %d\n", p.what, p.total-len(p.failed), p.total)
	if len(p.failed) > 0 {
		return fmt.Errorf("%d of %d failed; run it again when the reason is gone: what was done is skipped then", len(p.failed), p.total)
	}
	return nil
}

// keyIDs are those that a record refers to.
func keyIDs(i envelope.Info) []string {
	var ids []string
	for _, w := range i.Wraps {
		ids = append(ids, w.KeyID)
	}
	return ids
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
