package main

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/hpke"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

const (
	connections = 8
	// idsPerCaller are different DEKs, so that no two calls share a read.
	idsPerCaller = 4
	// opened is how many answers come to one that is opened and compared, where
	// opening is not the client's part of what is measured.
	opened = 256

	specName = "pvc-6b3f2a0e-8d59-4f0e-a2f5-5a1b7d0c9e11"
	cipher   = dek.CipherXTS
)

// contestant is one of those that take turns.
type contestant struct {
	name   string
	server *process // nil: this process
	call   func(ctx context.Context, caller, i int) error

	rate []float64 // calls a second, of each round
	cpu  []float64 // microseconds of the server's processor for a call, of each round
}

// measure has callers call for that long.
func (c *contestant) measure(ctx context.Context, callers int, long time.Duration) error {
	var before, after time.Duration
	var err error
	if c.server != nil {
		if before, err = c.server.cpu(); err != nil {
			return err
		}
	}
	var calls atomic.Int64
	var failed error
	var once sync.Once
	var wg sync.WaitGroup
	began := time.Now()
	for caller := range callers {
		wg.Go(func() {
			for i := 0; time.Since(began) < long; i++ {
				if err := c.call(ctx, caller, i); err != nil {
					once.Do(func() { failed = fmt.Errorf("%s: %w", c.name, err) })
					return
				}
				calls.Add(1)
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	if failed != nil {
		return failed
	}
	c.rate = append(c.rate, float64(calls.Load())/took.Seconds())
	if c.server != nil {
		if after, err = c.server.cpu(); err != nil {
			return err
		}
		c.cpu = append(c.cpu, float64((after-before).Microseconds())/float64(calls.Load()))
	}
	return nil
}

func median(of []float64) float64 {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}

// rates compares GetDEK with all else.
func (b *bench) rates(ctx context.Context, w io.Writer) (err error) {
	f, err := b.field(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	all := []*contestant{f.echo, f.get, f.client, f.unaudited, f.keyring, f.redial, f.constellation}
	for round := range b.rounds + 1 {
		for _, c := range all {
			if err := c.measure(ctx, b.callers, b.round); err != nil {
				return err
			}
		}
		if round == 0 { // warms up
			for _, c := range all {
				c.rate, c.cpu = nil, nil
			}
		}
	}
	b.echoed = median(f.echo.cpu)
	rows := [][]string{{"WHAT", "CALLS/S", "LEAST", "MOST", "SERVER'S CPU/CALL"}}
	for _, c := range all {
		cpu := "-"
		if c.server != nil {
			cpu = fmt.Sprintf("%.0f µs", median(c.cpu))
		}
		rows = append(rows, []string{c.name, fmt.Sprintf("%.0f", median(c.rate)), fmt.Sprintf("%.0f", slices.Min(c.rate)), fmt.Sprintf("%.0f", slices.Max(c.rate)), cpu})
	}
	if err := table(w, rows); err != nil {
		return err
	}
	rows = [][]string{{"RATIO OF RATES", "", "AIM"}}
	for _, r := range []struct {
		ours, other *contestant
		aim         string
	}{
		{f.get, f.echo, "0.70"}, {f.client, f.echo, ""}, {f.get, f.keyring, ""}, {f.get, f.redial, "10"},
		{f.get, f.constellation, ""}, {f.get, f.unaudited, ""},
	} {
		rows = append(rows, []string{r.ours.name + " / " + r.other.name, fmt.Sprintf("%.2f", median(r.ours.rate)/median(r.other.rate)), r.aim})
	}
	return table(w, rows)
}

// field is the contestants and what they need.
type field struct {
	echo, get, client, unaudited, keyring, redial, constellation *contestant

	closers []io.Closer
}

func (f *field) close() error {
	var errs []error
	for _, c := range slices.Backward(f.closers) {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

type closer func() error

func (c closer) Close() error { return c() }

func (f *field) stopping(p *process) { f.closers = append(f.closers, closer(p.stop)) }

func rateID(caller, i int) dek.ID {
	return dek.ID(fmt.Sprintf("bench.example.com/pvc-%04d-%d", caller, i%idsPerCaller))
}

func (b *bench) field(ctx context.Context) (_ *field, err error) {
	f := &field{}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	policy := fmt.Sprintf("%s: [\"bench.example.com/*\"]\n", node)
	audited, err := b.serve(ctx, "key-service", policy, "audit.json", "--storage-uri=mem://")
	if err != nil {
		return nil, err
	}
	f.stopping(audited)
	unaudited, err := b.serve(ctx, "key-service-without-audit", policy, "/dev/null", "--storage-uri=mem://")
	if err != nil {
		return nil, err
	}
	f.stopping(unaudited)
	echoed, err := b.start(ctx, "echo", "/proc/self/exe", "-serve-echo=ADDRESS")
	if err != nil {
		return nil, err
	}
	f.stopping(echoed)
	if f.get, err = b.getting(ctx, f, "GetDEK", audited); err != nil {
		return nil, err
	}
	if f.unaudited, err = b.getting(ctx, f, "GetDEK, audit log to /dev/null", unaudited); err != nil {
		return nil, err
	}
	if f.echo, err = b.echoing(f, echoed); err != nil {
		return nil, err
	}
	if f.client, err = b.asking(f, audited); err != nil {
		return nil, err
	}
	if f.redial, err = b.redialling(audited); err != nil {
		return nil, err
	}
	if f.keyring, err = b.inProcess(ctx, f); err != nil {
		return nil, err
	}
	f.constellation, err = b.likeConstellation(ctx, f)
	return f, err
}

// dial opens connections, kept alive, of the node.
func (b *bench) dial(f *field, to *process) ([]keyservicev1.KeyServiceClient, error) {
	creds, err := b.credentials(node)
	if err != nil {
		return nil, err
	}
	var all []keyservicev1.KeyServiceClient
	for range connections {
		conn, err := grpc.NewClient(to.address, grpc.WithTransportCredentials(creds))
		if err != nil {
			return nil, err
		}
		f.closers = append(f.closers, conn)
		all = append(all, keyservicev1.NewKeyServiceClient(conn))
	}
	return all, nil
}

// newClient is a node's or controller's client as csi-plugin has it.
func (b *bench) newClient(name string, to *process, observe func(keyclient.Call)) (*keyclient.Client, error) {
	cert, key, err := b.identity(name)
	if err != nil {
		return nil, err
	}
	return keyclient.New(keyclient.Config{Address: "dns:///" + to.address, CAFile: b.path("ca.crt"), CertFile: cert, KeyFile: key,
		WithoutKeys: name == controller, Observe: observe})
}

// getting is GetDEK on kept connections as far as the server goes: the callers'
// key pairs are made before, and one of many answers is opened.
func (b *bench) getting(ctx context.Context, f *field, name string, from *process) (*contestant, error) {
	keys, err := b.create(ctx, from)
	if err != nil {
		return nil, err
	}
	clients, err := b.dial(f, from)
	if err != nil {
		return nil, err
	}
	private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		return nil, err
	}
	recipient := private.PublicKey().Bytes()
	return &contestant{name: name, server: from, call: func(ctx context.Context, caller, i int) error {
		id := rateID(caller, i)
		a, err := clients[caller%connections].GetDEK(ctx, &keyservicev1.GetDEKRequest{Id: string(id), Recipient: recipient})
		if err != nil {
			return err
		}
		if len(a.GetSealedKey()) != sealedSize || a.GetId() != string(id) {
			return errors.New("an answer of another size or ID")
		}
		if i%opened != 0 {
			return nil
		}
		key, err := unseal(private, a)
		if err == nil && !bytes.Equal(key, keys[id]) {
			err = errors.New("a wrong key")
		}
		return err
	}}, nil
}

// unseal opens an answer as the API's description has it.
func unseal(private hpke.PrivateKey, a *keyservicev1.DEK) ([]byte, error) {
	r, err := hpke.NewRecipient(a.GetSealedKey()[:32], private, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("cryptcsi keyservice v1"))
	if err != nil {
		return nil, err
	}
	return r.Open([]byte("key\x00"+a.GetId()), a.GetSealedKey()[32:])
}

// create makes the DEKs of all callers in a service, and returns their keys.
func (b *bench) create(ctx context.Context, in *process) (map[dek.ID][]byte, error) {
	boss, err := b.newClient(controller, in, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = boss.Close() }()
	worker, err := b.newClient(node, in, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = worker.Close() }()
	keys := map[dek.ID][]byte{}
	for caller := range b.callers {
		for i := range idsPerCaller {
			id := rateID(caller, i)
			if _, err := boss.CreateDEK(ctx, id, dek.Spec{Name: specName, Cipher: cipher}); err != nil {
				return nil, err
			}
			d, err := worker.GetDEK(ctx, id)
			if err != nil {
				return nil, err
			}
			keys[id] = bytes.Clone(d.Key.Expose())
			d.Wipe()
		}
	}
	return keys, nil
}

// echoing is the empty echo on kept connections.
func (b *bench) echoing(f *field, from *process) (*contestant, error) {
	clients, err := b.dial(f, from)
	if err != nil {
		return nil, err
	}
	recipient := make([]byte, 32)
	return &contestant{name: "empty echo", server: from, call: func(ctx context.Context, caller, i int) error {
		a, err := clients[caller%connections].GetDEK(ctx, &keyservicev1.GetDEKRequest{Id: string(rateID(caller, i)), Recipient: recipient})
		if err == nil && len(a.GetSealedKey()) != sealedSize {
			err = errors.New("an answer of another size")
		}
		return err
	}}, nil
}

// asking is what csi-plugin does: a key pair for each call, every answer opened.
func (b *bench) asking(f *field, from *process) (*contestant, error) {
	var clients []*keyclient.Client
	for range connections {
		c, err := b.newClient(node, from, nil)
		if err != nil {
			return nil, err
		}
		f.closers = append(f.closers, c)
		clients = append(clients, c)
	}
	return &contestant{name: "GetDEK by keyclient, opened", server: from, call: func(ctx context.Context, caller, i int) error {
		d, err := clients[caller%connections].GetDEK(ctx, rateID(caller, i))
		d.Wipe()
		return err
	}}, nil
}

// redialling is GetDEK on a connection of its own.
func (b *bench) redialling(from *process) (*contestant, error) {
	creds, err := b.credentials(node)
	if err != nil {
		return nil, err
	}
	recipient := make([]byte, 32)
	recipient[0] = 9
	return &contestant{name: "GetDEK, a connection for each", server: from, call: func(ctx context.Context, caller, i int) error {
		conn, err := grpc.NewClient(from.address, grpc.WithTransportCredentials(creds))
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = keyservicev1.NewKeyServiceClient(conn).GetDEK(ctx, &keyservicev1.GetDEKRequest{Id: string(rateID(caller, i)), Recipient: recipient})
		return err
	}}, nil
}

// inProcess is the keyring without a service.
func (b *bench) inProcess(ctx context.Context, f *field) (*contestant, error) {
	ring, err := b.keyring(ctx, "mem://")
	if err != nil {
		return nil, err
	}
	f.closers = append(f.closers, ring)
	for caller := range b.callers {
		for i := range idsPerCaller {
			d, err := ring.CreateDEK(ctx, rateID(caller, i), dek.Spec{Name: specName, Cipher: cipher})
			if err != nil {
				return nil, err
			}
			d.Wipe()
		}
	}
	return &contestant{name: "keyring in this process", call: func(ctx context.Context, caller, i int) error {
		d, err := ring.GetDEK(ctx, rateID(caller, i))
		d.Wipe()
		return err
	}}, nil
}

// likeConstellation is their pattern with their API: a plaintext connection for
// each request, a key that is derived and travels as it is.
func (b *bench) likeConstellation(ctx context.Context, f *field) (*contestant, error) {
	if err := b.write("constellation.policy", []byte("local: [\"bench.example.com/*\"]\n")); err != nil {
		return nil, err
	}
	p, err := b.start(ctx, "constellation", b.bin+"/key-service", "serve", "--listen=ADDRESS", "--kms-uri="+b.kek(), "--storage-uri=mem://",
		"--constellation-api", "--volume-policy=prefix", "--prefix-file=constellation.policy", "--audit-log-file=constellation.json")
	if err != nil {
		return nil, err
	}
	f.stopping(p)
	return &contestant{name: "Constellation's: derived, a plaintext connection for each", server: p, call: func(ctx context.Context, caller, i int) error {
		conn, err := grpc.NewClient(p.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		a, err := constellationv1.NewAPIClient(conn).GetDataKey(ctx, &constellationv1.GetDataKeyRequest{DataKeyId: string(rateID(caller, i)), Length: dek.Size})
		if err == nil && len(a.GetDataKey()) != dek.Size {
			err = errors.New("a key of another size")
		}
		return err
	}}, nil
}
