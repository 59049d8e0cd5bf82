package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// selfCheck is the DEK of no volume that tells a right KEK from a wrong one.
const selfCheck dek.ID = "check.cryptcsi.io/self-check"

const (
	// countFor is how old the number of records may be.
	countFor = 5 * time.Minute
	// countWithin bounds counting: each record is read, and there may be very many.
	countWithin = 30 * time.Minute
)

// holder has what is served: from the start, or from the unsealing on.
type holder struct {
	mu      sync.Mutex
	keys    *keyconfig.Keys // its files
	keyring *envelope.Keyring
	keks    []*kms.KEK // the keyring's
	ready   chan struct{}

	cacheFor  time.Duration // as envelope.Options has them
	cacheSize int

	counted time.Time // for status
	records int64
	countOK error

	shown int64 // for metrics
	known bool
}

// derived is a Keyring that also derives keys, for Constellation.
type derived struct {
	*envelope.Keyring
	kek *kms.KEK
}

func (d derived) Derive(ctx context.Context, id string) (secret.Bytes, error) {
	return d.kek.Derive(ctx, id)
}

// open makes what is served of keys, and owns them.
func (h *holder) open(keys *keyconfig.Keys, log *slog.Logger) (keyservice.Keys, error) {
	keks := keys.Opened()
	keyring, err := keys.Keyring(envelope.Options{CacheFor: h.cacheFor, CacheSize: h.cacheSize, Survives: func(id dek.ID, until time.Time) {
		log.Warn("a deleted key can still be unwrapped from an earlier version of its record, which the store keeps", "dek", id, "until", until)
	}})
	if err != nil {
		return nil, errors.Join(err, keys.Close())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys, h.keyring, h.keks = keys, keyring, keks
	if h.ready == nil {
		h.ready = make(chan struct{})
	}
	close(h.ready)
	if keks[0].CanDerive() {
		return derived{keyring, keks[0]}, nil
	}
	return keyring, nil
}

func (h *holder) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keyring != nil {
		_ = errors.Join(h.keyring.Close(), h.keys.Close())
	}
}

// opened returns what is served, nil while sealed.
func (h *holder) opened() (*envelope.Keyring, []*kms.KEK) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keyring, h.keks
}

// cacheStats says how the cache of keys is; zero while sealed.
func (h *holder) cacheStats() envelope.CacheStats {
	if keyring, _ := h.opened(); keyring != nil {
		return keyring.CacheStats()
	}
	return envelope.CacheStats{}
}

// unsealed waits until something is served. False where ctx ends before.
func (h *holder) unsealed(ctx context.Context) bool {
	h.mu.Lock()
	if h.ready == nil {
		h.ready = make(chan struct{})
	}
	ready := h.ready
	h.mu.Unlock()
	select {
	case <-ready:
		return true
	case <-ctx.Done():
		return false
	}
}

// keepAlive labels the KEK as in use, once there is one.
func (h *holder) keepAlive(ctx context.Context, log *slog.Logger) {
	if h.unsealed(ctx) {
		_, keks := h.opened()
		keyconfig.KeepAlive(ctx, keks, log)
	}
}

// keepCounted counts the records from time to time until ctx ends, once there are any.
// Who looks at metrics does not wait for that: it takes as long as the store is large or
// slow, and nothing at all would be seen meanwhile.
func (h *holder) keepCounted(ctx context.Context) {
	for h.unsealed(ctx) && ctx.Err() == nil {
		keyring, _ := h.opened()
		within, cancel := context.WithTimeout(ctx, countWithin)
		n, err := countAll(within, keyring)
		cancel()
		if ctx.Err() == nil {
			h.mu.Lock()
			h.shown, h.known = n, err == nil
			h.mu.Unlock()
		}
		select {
		case <-time.After(countFor):
		case <-ctx.Done():
		}
	}
}

// lastCount is what keepCounted has counted last; -1 while that is not known.
func (h *holder) lastCount() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.known {
		return -1
	}
	return h.shown
}

// status asks every KEK and counts the records.
func (h *holder) status(ctx context.Context) (*keyservicev1.StatusResponse, error) {
	s := &keyservicev1.StatusResponse{Records: -1}
	keyring, keks := h.opened()
	if keyring == nil {
		return s, nil
	}
	for _, k := range keks {
		kek := &keyservicev1.Kek{Name: k.Name()}
		var err error
		if kek.KeyId, err = k.CurrentKeyID(ctx); err != nil {
			kek.Error = err.Error()
		}
		s.Keks = append(s.Keks, kek)
	}
	n, err := h.count(ctx)
	if err != nil {
		s.RecordsError = err.Error()
		return s, nil
	}
	s.Records = n
	return s, nil
}

// count returns how many DEKs there are, as of some minutes ago; -1 while sealed.
func (h *holder) count(ctx context.Context) (int64, error) {
	keyring, _ := h.opened()
	if keyring == nil {
		return -1, nil
	}
	h.mu.Lock()
	if time.Since(h.counted) < countFor {
		defer h.mu.Unlock()
		return h.records, h.countOK
	}
	h.mu.Unlock()
	n, err := countAll(ctx, keyring)
	if err != nil {
		n = -1
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if ctx.Err() == nil { // else it says more about the caller than about the store
		h.counted, h.records, h.countOK = time.Now(), n, err
	}
	return n, err
}

// countAll reads every record.
func countAll(ctx context.Context, keyring *envelope.Keyring) (n int64, err error) {
	err = each(ctx, keyring, func(i envelope.Info) error {
		if i.Err != nil || i.State != dek.Deleted {
			n++
		}
		return nil
	})
	return n, err
}

// unseal opens what an operator gives, and tries it before it is believed: on
// the store, on a record if there is one, and on a record of its own.
func (s *service) unseal(ctx context.Context, req *keyservicev1.UnsealRequest, flags *keyconfig.Flags) (keyservice.Keys, error) {
	keys, err := flags.OpenGiven(ctx, req.GetKmsUris(), req.GetStorageUris(), req.GetFiles(), req.GetRecordAuthSecret(),
		keyconfig.Options{KMS: kms.Options{Observe: s.metrics.KMS}, Store: s.metrics.Store}, s.log)
	if err != nil {
		return nil, err
	}
	trial := &holder{cacheFor: s.served.cacheFor, cacheSize: s.served.cacheSize}
	served, err := trial.open(keys, s.log)
	if err != nil {
		return nil, err
	}
	if err := s.try(ctx, served, trial.keyring); err != nil {
		trial.close()
		return nil, fmt.Errorf("this KMS and store were tried and not taken, nothing has changed: %w", err)
	}
	s.served.take(trial)
	return served, nil
}

// take is given what another holder has.
func (h *holder) take(from *holder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys, h.keyring, h.keks = from.keys, from.keyring, from.keks
	if h.ready == nil {
		h.ready = make(chan struct{})
	}
	close(h.ready)
}

// try opens a record that is there, and one of our own, made at the first time.
func (s *service) try(ctx context.Context, served keyservice.Keys, k *envelope.Keyring) error {
	if _, derives := served.(keyservice.Deriver); s.flags.constellation && !derives {
		return errdefs.Errorf(errdefs.ErrInvalid, "--constellation-api needs a KEK that derives keys: cluster://")
	}
	found := errors.New("found one")
	var unreadable error
	err := each(ctx, k, func(i envelope.Info) error {
		unreadable = cmp.Or(unreadable, i.Err)
		if i.Err != nil || i.State == dek.Deleted || i.ID == selfCheck {
			return nil
		}
		d, err := k.GetDEK(ctx, i.ID)
		if err != nil {
			return err
		}
		d.Wipe()
		return found
	})
	switch {
	case err == nil && unreadable != nil: // as with a wrong secret of record authentication
		return fmt.Errorf("no record in the store could be opened: %w", unreadable)
	case err != nil && !errors.Is(err, found):
		return err
	}
	d, err := k.CreateDEK(ctx, selfCheck, dek.Spec{Cipher: dek.CipherXTS})
	if err != nil {
		return err
	}
	d.Wipe()
	return nil
}
