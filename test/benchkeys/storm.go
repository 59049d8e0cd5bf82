package main

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

// deadline is how long a node waits for a key: half of the two minutes that
// kubelet gives a volume.
const deadline = time.Minute

// storm is a cluster that starts: all nodes ask for the keys of all their
// volumes at once, each with its own certificate on a connection of its own.
func (b *bench) storm(ctx context.Context, w io.Writer) (err error) {
	store := "file://" + b.path("store")
	keys, err := b.fill(ctx, store+"?create_dir=true")
	if err != nil {
		return err
	}
	var policy strings.Builder
	for n := range b.nodes {
		fmt.Fprintf(&policy, "%s: [\"%s*\"]\n", nodeName(n), stormID(n, 0)[:len(stormID(n, 0))-2])
	}
	server, err := b.serve(ctx, "key-service-in-a-storm", policy.String(), "storm.json", "--storage-uri="+store)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.stop()) }()
	r := &result{took: make([]time.Duration, len(keys))}
	var clients []*keyclient.Client
	defer func() {
		for _, c := range clients {
			err = errors.Join(err, c.Close())
		}
	}()
	for n := range b.nodes {
		c, err := b.newClient(nodeName(n), server, func(keyclient.Call) { r.attempts.Add(1) })
		if err != nil {
			return err
		}
		clients = append(clients, c)
	}
	before, err := server.use()
	if err != nil {
		return err
	}
	b.unleash(ctx, clients, keys, r)
	after, err := server.use()
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "a storm: %d nodes with a connection and a certificate each ask for %d keys each, all at once; deadline %v\n", b.nodes, b.volumes, deadline)
	if err := table(w, r.table(before, after)); err != nil {
		return err
	}
	if r.wrong.Load() > 0 || r.failed.Load() > 0 {
		return fmt.Errorf("the storm did harm, the first of it: %w", r.first)
	}
	return nil
}

// use is what server and clients have used so far.
type use struct {
	memory, peak    float64 // of the server, in MiB
	server, clients time.Duration
}

func (p *process) use() (u use, err error) {
	var errs [3]error
	u.memory, u.peak, errs[0] = p.memory()
	u.server, errs[1] = p.cpu()
	u.clients, errs[2] = spent()
	return u, errors.Join(errs[:]...)
}

// fill makes the DEKs of all nodes, and returns their keys.
func (b *bench) fill(ctx context.Context, store string) (keys [][]byte, err error) {
	ring, err := b.keyring(ctx, store)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ring.Close()) }()
	keys = make([][]byte, b.nodes*b.volumes)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(b.callers)
	for n := range b.nodes {
		g.Go(func() error {
			for v := range b.volumes {
				d, err := ring.CreateDEK(ctx, stormID(n, v), dek.Spec{Name: specName, Cipher: cipher})
				if err != nil {
					return err
				}
				keys[n*b.volumes+v] = slices.Clone(d.Key.Expose())
				d.Wipe()
			}
			return nil
		})
	}
	return keys, g.Wait()
}

func nodeName(n int) string { return fmt.Sprintf("system:node:worker-%04d", n) }

func stormID(n, v int) dek.ID {
	return dek.ID(fmt.Sprintf("storm.example.com/worker-%04d-pvc-%02d", n, v))
}

// result is what a storm came to.
type result struct {
	right, wrong, failed, attempts atomic.Int64

	once  sync.Once
	first error           // of what went wrong
	took  []time.Duration // from the beginning to each answer, sorted
}

func (r *result) table(before, after use) [][]string {
	last := len(r.took) - 1
	quantile := func(q float64) string { return fmt.Sprintf("%.2f s", r.took[int(float64(last)*q)].Seconds()) }
	seconds := func(from, to time.Duration) string { return fmt.Sprintf("%.1f s", (to - from).Seconds()) }
	count := func(n int64) string { return fmt.Sprint(n) }
	return [][]string{
		{"ASKED", "RIGHT", "WRONG", "FAILED", "ASKED AGAIN", "P50", "P99", "MAX", "KEYS/S", "SERVER'S MEMORY BEFORE", "AT MOST", "ITS CPU", "CLIENTS' CPU"},
		{
			count(int64(len(r.took))), count(r.right.Load()), count(r.wrong.Load()), count(r.failed.Load()), count(r.attempts.Load() - int64(len(r.took))),
			quantile(.5), quantile(.99), quantile(1), fmt.Sprintf("%.0f", float64(len(r.took))/r.took[last].Seconds()),
			fmt.Sprintf("%.0f MiB", before.memory), fmt.Sprintf("%.0f MiB", after.peak), seconds(before.server, after.server), seconds(before.clients, after.clients),
		},
	}
}

// unleash has all clients ask at once.
func (b *bench) unleash(ctx context.Context, clients []*keyclient.Client, keys [][]byte, r *result) {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	var wg sync.WaitGroup
	began := time.Now()
	for i := range keys {
		wg.Go(func() {
			id := stormID(i/b.volumes, i%b.volumes)
			d, err := clients[i/b.volumes].GetDEK(ctx, id)
			defer d.Wipe()
			r.took[i] = time.Since(began)
			switch {
			case err != nil:
				r.failed.Add(1)
			case subtle.ConstantTimeCompare(d.Key.Expose(), keys[i]) != 1:
				r.wrong.Add(1)
				err = fmt.Errorf("DEK %s has another key", id)
			default:
				r.right.Add(1)
				return
			}
			r.once.Do(func() { r.first = err })
		})
	}
	wg.Wait()
	slices.Sort(r.took)
}
