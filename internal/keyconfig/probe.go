package keyconfig

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// probeTime bounds the look at one store at start.
const probeTime = 15 * time.Second

// probedStore makes no object before it has seen that the store keeps
// conditions: one that overwrites what it should not would give two nodes
// different keys for one volume.
type probedStore struct {
	envelope.Store
	good atomic.Bool
}

func (s *probedStore) probe(ctx context.Context) error {
	if s.good.Load() {
		return nil
	}
	if err := envelope.ProbeStore(ctx, s.Store); err != nil {
		return err
	}
	s.good.Store(true)
	return nil
}

// Probed returns a store that makes no object in s before it was probed.
func Probed(s envelope.Store) envelope.Store { return &probedStore{Store: s} }

// Unprobed returns the store itself, which may be an envelope.Maker or Permitter.
func Unprobed(s envelope.Store) envelope.Store {
	if p, ok := s.(*probedStore); ok {
		return p.Store
	}
	return s
}

// Create is part of envelope.Store.
func (s *probedStore) Create(ctx context.Context, name string, data []byte) error {
	if err := s.probe(ctx); err != nil {
		return err
	}
	return s.Store.Create(ctx, name, data)
}

// EraseHistory is part of envelope.Eraser.
func (s *probedStore) EraseHistory(ctx context.Context, name string) (time.Time, error) {
	if e, ok := s.Store.(envelope.Eraser); ok {
		return e.EraseHistory(ctx, name)
	}
	return time.Time{}, nil // keeps no history
}

// Close is part of io.Closer.
func (s *probedStore) Close() error {
	if c, ok := s.Store.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// Probe looks whether the store that gets new keys keeps conditions. The error
// is that it does not; where it cannot be told now, log is told, and no key is
// made before it can.
func (k *Keys) Probe(ctx context.Context, log *slog.Logger) error {
	if err := k.Err(); err != nil || len(k.Stores) == 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	s, ok := k.Stores[0].It.(*probedStore)
	if !ok {
		return nil
	}
	err := s.probe(ctx)
	if errors.Is(err, errdefs.ErrState) {
		return err
	}
	if err != nil {
		log.Warn("the store cannot be checked yet; no key is made before it was", "store", k.Stores[0].Name, "error", err)
	}
	return nil
}
