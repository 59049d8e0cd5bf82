package main

import (
	"context"
	"crypto/ecdh"
	"crypto/hpke"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/cluster"
	"github.com/cryptcsi/cryptcsi/secret"
)

func (b *bench) openKEK(ctx context.Context) (*kms.KEK, error) {
	return kms.Mux{cluster.Scheme: cluster.Open}.Open(ctx, b.kek())
}

// keyring is one in this process, under the site's KEK.
func (b *bench) keyring(ctx context.Context, storage string) (*envelope.Keyring, error) {
	kek, err := b.openKEK(ctx)
	if err != nil {
		return nil, err
	}
	store, err := envelope.LocalStores().Open(ctx, storage)
	if err != nil {
		return nil, errors.Join(err, kek.Close())
	}
	return envelope.New([]*kms.KEK{kek}, []envelope.Store{store}, envelope.Options{})
}

// parts measures what a GetDEK is made of, each alone.
func (b *bench) parts(ctx context.Context, w io.Writer) error {
	const id = "bench.example.com/pvc-0000-0"
	kek, err := b.openKEK(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = kek.Close() }()
	key := secret.Random(dek.Size)
	defer key.Wipe()
	wrapped, err := kek.Wrap(ctx, id, key)
	if err != nil {
		return err
	}
	ring, err := b.keyring(ctx, "mem://")
	if err != nil {
		return err
	}
	defer func() { _ = ring.Close() }()
	d, err := ring.CreateDEK(ctx, id, dek.Spec{Name: specName, Cipher: cipher})
	if err != nil {
		return err
	}
	d.Wipe()
	private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		return err
	}
	file, err := os.Create(b.path("line.json"))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	log := slog.New(slog.NewJSONHandler(file, nil))

	var seal, unwrap float64
	rows := [][]string{{"PART", "CPU"}}
	for _, p := range []struct {
		name string
		keep *float64
		do   func() error
	}{
		{"sealing the answer (HPKE: X25519 twice, HKDF, AES-GCM)", &seal, func() error {
			_, s, err := hpke.NewSender(private.PublicKey(), hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("cryptcsi keyservice v1"))
			if err == nil {
				_, err = s.Seal([]byte(id), key.Expose())
			}
			return err
		}},
		{"unwrapping (AES-GCM, into locked memory)", &unwrap, func() error {
			k, err := kek.Unwrap(ctx, id, wrapped)
			k.Wipe()
			return err
		}},
		{"  of it locked memory, taken and given back", nil, func() error {
			s := secret.New(dek.Size)
			s.Wipe()
			return nil
		}},
		{"keyring's GetDEK (record read and checked, MAC, unwrapping)", nil, func() error {
			d, err := ring.GetDEK(ctx, id)
			d.Wipe()
			return err
		}},
		{"a line in the audit log", nil, func() error {
			log.LogAttrs(ctx, slog.LevelInfo, "decision", slog.String("method", "GetDEK"), slog.String("identity", node), slog.String("node", "bench"),
				slog.String("dek_id", id), slog.Bool("allowed", true), slog.String("code", "OK"), slog.String("peer", "127.0.0.1:12345"))
			return nil
		}},
		{"the client's key pair for an answer", nil, func() error {
			_, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
			return err
		}},
	} {
		took, err := each(b.round, p.do)
		if err != nil {
			return err
		}
		if p.keep != nil {
			*p.keep = took
		}
		rows = append(rows, []string{p.name, fmt.Sprintf("%.1f µs", took)})
	}
	rows = append(rows,
		[]string{"a call of the empty echo, in its server", fmt.Sprintf("%.1f µs", b.echoed)},
		[]string{"the least that a server can need: echo + sealing + unwrapping", fmt.Sprintf("%.1f µs", b.echoed+seal+unwrap)})
	return table(w, rows)
}

// each returns how many microseconds of processor do takes, garbage collection
// included: what else the machine does hardly matters to that.
func each(long time.Duration, do func() error) (float64, error) {
	n := 0
	before, err := spent()
	if err != nil {
		return 0, err
	}
	for began := time.Now(); time.Since(began) < long; n++ {
		if err := do(); err != nil {
			return 0, err
		}
	}
	after, err := spent()
	return float64((after - before).Nanoseconds()) / 1e3 / float64(n), err
}

// spent is the time that this process has had of the processors.
func spent() (time.Duration, error) {
	var r unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &r)
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()), err
}
