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

// Observe is told of a call to a store when it ends.
type Observe func(scheme, operation string, took time.Duration, err error)

// probedStore makes no object before it has seen that the store keeps
// conditions: one that overwrites what it should not would give two nodes
// different keys for one volume. It tells observe of every call.
type probedStore struct {
	store   envelope.Store
	good    atomic.Bool
	scheme  string
	observe Observe // nil: nobody
}

func (s *probedStore) probe(ctx context.Context) error {
	if s.good.Load() {
		return nil
	}
	if err := envelope.ProbeStore(ctx, s.store); err != nil {
		return err
	}
	s.good.Store(true)
	return nil
}

// Probed returns a store that makes no object in s before it was probed.
func Probed(s envelope.Store) envelope.Store { return &probedStore{store: s} }

// Unprobed returns the store itself, which may be an envelope.Maker or Permitter.
func Unprobed(s envelope.Store) envelope.Store {
	if p, ok := s.(*probedStore); ok {
		return p.store
	}
	return s
}

// watch runs one call to the store.
func (s *probedStore) watch(operation string, call func() error) error {
	began := time.Now()
	err := call()
	if s.observe != nil {
		s.observe(s.scheme, operation, time.Since(began), err)
	}
	return err
}

// Create is part of envelope.Store.
func (s *probedStore) Create(ctx context.Context, name string, data []byte) error {
	if err := s.probe(ctx); err != nil {
		return err
	}
	return s.watch("create", func() error { return s.store.Create(ctx, name, data) })
}

// Read is part of envelope.Store.
func (s *probedStore) Read(ctx context.Context, name string) (data []byte, version string, err error) {
	err = s.watch("read", func() (err error) { data, version, err = s.store.Read(ctx, name); return err })
	return data, version, err
}

// Replace is part of envelope.Store.
func (s *probedStore) Replace(ctx context.Context, name string, data []byte, version string) error {
	return s.watch("replace", func() error { return s.store.Replace(ctx, name, data, version) })
}

// Delete is part of envelope.Store.
func (s *probedStore) Delete(ctx context.Context, name, version string) error {
	return s.watch("delete", func() error { return s.store.Delete(ctx, name, version) })
}

// List is part of envelope.Store.
func (s *probedStore) List(ctx context.Context, token string, limit int) (names []string, next string, err error) {
	err = s.watch("list", func() (err error) { names, next, err = s.store.List(ctx, token, limit); return err })
	return names, next, err
}

// EraseHistory is part of envelope.Eraser.
func (s *probedStore) EraseHistory(ctx context.Context, name string) (until time.Time, err error) {
	e, ok := s.store.(envelope.Eraser)
	if !ok {
		return time.Time{}, nil // keeps no history
	}
	err = s.watch("erase_history", func() (err error) { until, err = e.EraseHistory(ctx, name); return err })
	return until, err
}

// Close is part of io.Closer.
func (s *probedStore) Close() error {
	if c, ok := s.store.(io.Closer); ok {
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
