package envelopetest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// RunRace lets 64 racers create one DEK, a new one in each round, through
// keyrings of their own over one store: one racer's record is stored and all
// of them have its key. open returns handles on one and the same store; each
// gets a keyring, or more, and is closed by it where that is possible.
func RunRace(t *testing.T, open func(t *testing.T) []envelope.Store, rounds int) {
	service := kmstest.NewBackend() // shared, and not closed by its KEKs
	creates := &atomic.Int64{}
	var rings []*envelope.Keyring
	for _, s := range open(t) {
		k, err := envelope.New([]*kms.KEK{kms.New("fake", service, kms.Options{})}, []envelope.Store{counted{s, creates}}, envelope.Options{})
		must(t, "New", err)
		rings = append(rings, k)
	}
	spec := dek.Spec{Name: "race", Cipher: dek.CipherXTS}
	for round := range rounds {
		id := dek.ID(fmt.Sprintf("driver.example.com/race-%d", round))
		creates.Store(0)
		var wg sync.WaitGroup
		start := make(chan struct{})
		got := make([]dek.DEK, racers)
		for n := range racers {
			wg.Go(func() {
				<-start
				d, err := rings[n%len(rings)].CreateDEK(t.Context(), id, spec)
				if err != nil {
					t.Errorf("round %d: CreateDEK: %v", round, err)
				}
				got[n] = d
			})
		}
		close(start)
		wg.Wait()
		if won := creates.Load(); won != 1 {
			t.Errorf("round %d: the store let %d racers create the record", round, won)
		}
		stored, err := rings[round%len(rings)].GetDEK(t.Context(), id)
		must(t, "GetDEK", err)
		for _, d := range got {
			if !d.Key.Equal(stored.Key) {
				t.Errorf("round %d: a racer got another key than the stored one", round)
			}
			d.Wipe()
		}
		stored.Wipe()
		if t.Failed() {
			return
		}
	}
}

// counted counts the creations that the store says it has done.
type counted struct {
	envelope.Store
	n *atomic.Int64
}

func (c counted) Create(ctx context.Context, name string, data []byte) error {
	err := c.Store.Create(ctx, name, data)
	if err == nil {
		c.n.Add(1)
	}
	return err
}
