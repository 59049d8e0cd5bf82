package envelope_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

// story takes one DEK through its life and checks each step; a step that fails
// is called again, a few times, as kubelet would. It returns how many calls failed.
type story struct {
	*testing.T
	k      *envelope.Keyring
	rotate func()
	key    secret.Bytes // the first one seen
	failed int
}

func (s *story) step(name string, f func(ctx context.Context) error) {
	s.Helper()
	var err error
	for range 5 {
		if err = f(s.Context()); err == nil {
			return
		}
		s.failed++
	}
	s.Fatalf("%s does not converge: %v", name, err)
}

// see notes a key that was handed out: it must be the first one.
func (s *story) see(name string, key secret.Bytes) {
	s.Helper()
	if s.key.Len() == 0 {
		s.key = key
		return
	}
	if !key.Equal(s.key) {
		s.Errorf("%s gave a second key for one ID", name)
	}
	key.Wipe()
}

func (s *story) get(name string) (d dek.DEK) {
	s.step(name, func(ctx context.Context) (err error) {
		if d, err = s.k.GetDEK(ctx, id); err == nil {
			s.see(name, d.Key)
		}
		return err
	})
	return d
}

func (s *story) run() {
	defer s.key.Wipe()
	uuid := dek.NewUUID()
	for range 2 {
		s.step("CreateDEK", func(ctx context.Context) error {
			d, err := s.k.CreateDEK(ctx, id, spec())
			if err == nil {
				s.see("CreateDEK", d.Key)
			}
			return err
		})
	}
	s.get("GetDEK")
	s.step("ClaimFormat", func(ctx context.Context) error {
		c, err := s.k.ClaimFormat(ctx, id, dek.Claim{Node: "n", UUID: uuid})
		if err == nil && c.UUID != uuid {
			s.Errorf("ClaimFormat = %+v", c)
		}
		return err
	})
	for _, sequence := range []uint64{1, 2} {
		s.step("ConfirmDEK", func(ctx context.Context) error {
			return s.k.ConfirmDEK(ctx, id, dek.HeaderID{UUID: uuid, Sequence: sequence})
		})
	}
	s.rotate()
	s.step("RewrapDEK", func(ctx context.Context) error { return s.k.RewrapDEK(ctx, id) })
	s.get("GetDEK after RewrapDEK")
	s.step("DeleteDEK", func(ctx context.Context) error { return s.k.DeleteDEK(ctx, id) })
}

// TestOneFaultAnywhere runs the story with one fault at each call to the store
// in turn, then one at each call to the KMS.
func TestOneFaultAnywhere(t *testing.T) {
	type outcome struct{ storeCalls, kmsCalls, failed int }
	run := func(t *testing.T, attempts, at int, fault envelopetest.Fault, kmsAt int) outcome {
		fake := kmstest.NewBackend()
		kmsCalls := 0
		fake.SetFault(func(string) error {
			kmsCalls++
			if kmsCalls-1 == kmsAt {
				return errors.New("connection reset")
			}
			return nil
		})
		store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(call int, _ string) envelopetest.Fault {
			if call == at {
				return fault
			}
			return envelopetest.None
		})
		s := &story{T: t, k: newKeyring(t, fakeKEK(fake), store, fast(attempts)), rotate: fake.Rotate}
		s.run()
		if _, err := s.k.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("GetDEK at the end: %v", err)
		}
		return outcome{store.Calls(), kmsCalls, s.failed}
	}
	calm := run(t, 1, -1, envelopetest.None, -1)
	if calm.failed != 0 || calm.storeCalls < 14 || calm.kmsCalls < 10 {
		t.Fatalf("without a fault: %+v", calm)
	}
	for at := range calm.storeCalls - 1 { // the last call is the check at the end
		for fault, name := range map[envelopetest.Fault]string{envelopetest.Fail: "Fail", envelopetest.Lose: "Lose", envelopetest.Stale: "Stale"} {
			t.Run(fmt.Sprintf("store/%d/%s", at, name), func(t *testing.T) {
				once := run(t, 1, at, fault, -1)
				if fault != envelopetest.Stale && once.failed != 1 {
					t.Errorf("with one attempt %d calls failed, want 1", once.failed)
				}
				if retried := run(t, 3, at, fault, -1); fault != envelopetest.Stale && retried.failed != 0 {
					t.Errorf("with three attempts %d calls failed, want 0", retried.failed)
				}
			})
		}
	}
	for at := range calm.kmsCalls {
		t.Run(fmt.Sprintf("kms/%d", at), func(t *testing.T) {
			if once := run(t, 1, -1, envelopetest.None, at); once.failed != 1 {
				t.Errorf("with one attempt %d calls failed, want 1", once.failed)
			}
			if retried := run(t, 2, -1, envelopetest.None, at); retried.failed != 0 {
				t.Errorf("with two attempts %d calls failed, want 0", retried.failed)
			}
		})
	}
}

// witness collects what several callers were told about one DEK.
type witness struct {
	mu     sync.Mutex
	keys   []secret.Bytes
	claims map[string]dek.Claim // by UUID
	floor  uint64
}

func (w *witness) key(key secret.Bytes) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keys = append(w.keys, key)
}

// act calls one method, by chance, and tells the witness what it was told.
func (w *witness) act(ctx context.Context, r *rand.Rand, k *envelope.Keyring, node string, uuid func() string) error {
	switch r.IntN(5) {
	case 0:
		d, err := k.CreateDEK(ctx, id, spec())
		if err == nil {
			w.key(d.Key)
		}
		return err
	case 1:
		d, err := k.GetDEK(ctx, id)
		if err == nil {
			w.key(d.Key)
		}
		return err
	case 2:
		c, err := k.ClaimFormat(ctx, id, dek.Claim{Node: node, UUID: dek.NewUUID()})
		if err == nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.claims[c.UUID] = c
		}
		return err
	case 3:
		h := dek.HeaderID{UUID: uuid(), Sequence: r.Uint64N(1000)}
		if h.UUID == "" {
			return nil
		}
		err := k.ConfirmDEK(ctx, id, h)
		if err == nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.floor = max(w.floor, h.Sequence)
		}
		return err
	default:
		return k.RewrapDEK(ctx, id)
	}
}

// TestManyFaults: callers of two keyrings over one store, which fails, loses
// answers and serves stale data at random, as does the KMS. Whatever they are
// told is true in the end: one key, one claim, no floor below what was confirmed.
func TestManyFaults(t *testing.T) {
	seen := 0
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) { seen += manyFaults(t, seed) })
	}
	if seen < 150 {
		t.Errorf("only %d keys were handed out: the faults leave nothing to check", seen)
	}
}

func manyFaults(t *testing.T, seed uint64) (keys int) {
	chance := rand.New(rand.NewPCG(seed, 1)) // asked under the stores' and kmsMu's locks
	calm := false
	fake := kmstest.NewBackend()
	store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault {
		if calm {
			return envelopetest.None
		}
		return []envelopetest.Fault{envelopetest.Fail, envelopetest.Lose, envelopetest.Stale, 0, 0, 0, 0, 0}[chance.IntN(8)]
	})
	var kmsMu sync.Mutex
	kmsChance := rand.New(rand.NewPCG(seed, 2))
	fake.SetFault(func(string) error {
		kmsMu.Lock()
		defer kmsMu.Unlock()
		if !calm && kmsChance.IntN(10) == 0 {
			return errors.New("connection reset")
		}
		return nil
	})
	w := &witness{claims: map[string]dek.Claim{}}
	uuid := func() string { // of the claim, once somebody has it
		w.mu.Lock()
		defer w.mu.Unlock()
		for u := range w.claims {
			return u
		}
		return ""
	}
	rings := []*envelope.Keyring{newKeyring(t, fakeKEK(fake), store, envelope.Options{}), newKeyring(t, fakeKEK(fake), store, envelope.Options{})}
	var wg sync.WaitGroup
	for n := range 6 {
		r := rand.New(rand.NewPCG(seed, uint64(10+n)))
		wg.Go(func() {
			for step := range 12 {
				if n == 0 && step%4 == 3 {
					fake.Rotate()
				}
				err := w.act(t.Context(), r, rings[n%2], fmt.Sprintf("node-%d", n), uuid)
				if errors.Is(err, errdefs.ErrCorrupt) || errors.Is(err, errdefs.ErrExists) || errors.Is(err, errdefs.ErrInvalid) || errors.Is(err, errdefs.ErrDenied) {
					t.Errorf("seed %d: %v", seed, err)
				}
			}
		})
	}
	wg.Wait()
	calm = true

	d, err := rings[0].GetDEK(t.Context(), id)
	if err != nil && !(errors.Is(err, errdefs.ErrNotFound) && len(w.keys) == 0) {
		t.Fatalf("seed %d: %d keys were handed out, and in the end: %v", seed, len(w.keys), err)
	}
	for _, key := range w.keys {
		if !key.Equal(d.Key) {
			t.Errorf("seed %d: a key was handed out that is not the stored one", seed)
		}
		key.Wipe()
	}
	d.Key.Wipe()
	for _, c := range w.claims {
		if c != d.Claim {
			t.Errorf("seed %d: %+v was granted, %+v is stored", seed, c, d.Claim)
		}
	}
	if d.Header.Sequence < w.floor {
		t.Errorf("seed %d: %d was confirmed, the floor is %d", seed, w.floor, d.Header.Sequence)
	}
	return len(w.keys)
}
