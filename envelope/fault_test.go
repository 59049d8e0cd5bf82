package envelope_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

// cloneID is that of a clone of id.
const cloneID = id + "-clone"

// story takes one DEK, and a clone of it, through their lives and checks each
// step; a step that fails is called again, a few times, as kubelet would.
type story struct {
	*testing.T
	k      *envelope.Keyring
	clock  *clock
	rotate func()         // the KEK
	keys   []secret.Bytes // of id, the newest last
	clone  secret.Bytes
	stale  bool // a read may give what was: it is called once more
	failed int  // how many calls
}

func (s *story) step(name string, f func(ctx context.Context) error) {
	s.Helper()
	var err error
	for range 5 {
		if err = f(s.Context()); err == nil && s.stale {
			err = f(s.Context())
		}
		if err == nil {
			return
		}
		s.failed++
	}
	s.Fatalf("%s does not converge: %v", name, err)
}

// wrong is an error that only a stale read explains.
func (s *story) wrong(format string, args ...any) error {
	s.Helper()
	if !s.stale {
		s.Errorf(format, args...)
	}
	return fmt.Errorf(format, args...)
}

// see checks keys that were handed out: after rotations, previous is set while
// one goes on.
func (s *story) see(d dek.DEK, err error, rotations int, previous bool) error {
	s.Helper()
	if err != nil {
		return err
	}
	defer d.Wipe()
	if len(s.keys) == rotations {
		s.keys = append(s.keys, d.Key.Clone())
	}
	if len(s.keys) != rotations+1 || !d.Key.Equal(s.keys[rotations]) {
		return s.wrong("another key after %d rotations", rotations)
	}
	if previous != (d.Previous.Len() > 0) || previous && !d.Previous.Equal(s.keys[rotations-1]) {
		return s.wrong("another previous key after %d rotations", rotations)
	}
	return nil
}

func (s *story) get(name string, rotations int, previous bool) {
	s.Helper()
	s.step(name, func(ctx context.Context) error {
		d, err := s.k.GetDEK(ctx, id)
		return s.see(d, err, rotations, previous)
	})
}

func (s *story) run() {
	uuid := dek.NewUUID()
	s.create(uuid)
	s.rotation(uuid)
	s.cloning(uuid)
	s.end()
	for _, key := range append(s.keys, s.clone) {
		key.Wipe()
	}
}

func (s *story) create(uuid string) {
	for range 2 {
		s.step("CreateDEK", func(ctx context.Context) error {
			d, err := s.k.CreateDEK(ctx, id, spec())
			return s.see(d, err, 0, false)
		})
	}
	s.get("GetDEK", 0, false)
	claim := func(node string) {
		s.step("ClaimFormat", func(ctx context.Context) error {
			c, err := s.k.ClaimFormat(ctx, id, dek.Claim{Node: node, UUID: uuid})
			if err == nil && c != (dek.Claim{Node: node, UUID: uuid}) {
				return s.wrong("ClaimFormat = %+v", c)
			}
			return err
		})
	}
	claim("m")
	s.step("ReleaseClaim", func(ctx context.Context) error { return s.k.ReleaseClaim(ctx, id, "m") })
	claim("n")
	for _, sequence := range []uint64{1, 2} {
		s.step("ConfirmDEK", func(ctx context.Context) error {
			return s.k.ConfirmDEK(ctx, id, dek.HeaderID{UUID: uuid, Sequence: sequence})
		})
	}
}

func (s *story) rotation(uuid string) {
	s.rotate()
	s.step("RewrapDEK", func(ctx context.Context) error { return s.k.RewrapDEK(ctx, id) })
	s.get("GetDEK after RewrapDEK", 0, false)
	s.rotate()
	for range 2 {
		s.step("RotateDEK", func(ctx context.Context) error {
			d, err := s.k.RotateDEK(ctx, id)
			return s.see(d, err, 1, true)
		})
	}
	s.step("RewrapDEK", func(ctx context.Context) error { return s.k.RewrapDEK(ctx, id) })
	s.step("RewrapDEKAlways", func(ctx context.Context) error { return s.k.RewrapDEKAlways(ctx, id) })
	s.get("GetDEK while rotating", 1, true)
	s.step("ConfirmDEK", func(ctx context.Context) error {
		return s.k.ConfirmDEK(ctx, id, dek.HeaderID{UUID: uuid, Sequence: 3, Fingerprint: dek.Fingerprint(s.keys[1])})
	})
	s.get("GetDEK after the rotation", 1, false)
}

func (s *story) cloning(uuid string) {
	for range 2 {
		s.step("CloneDEK", func(ctx context.Context) error {
			d, err := s.k.CloneDEK(ctx, cloneID, spec(), id)
			if err != nil {
				return err
			}
			defer d.Wipe()
			if s.clone.Len() == 0 {
				s.clone = d.Key.Clone()
			}
			if !d.Key.Equal(s.clone) || !d.Previous.Equal(s.keys[1]) {
				return s.wrong("CloneDEK gave other keys")
			}
			return nil
		})
	}
	s.step("ConfirmDEK of the clone", func(ctx context.Context) error {
		return s.k.ConfirmDEK(ctx, cloneID, dek.HeaderID{UUID: uuid, Sequence: 4, Fingerprint: dek.Fingerprint(s.clone)})
	})
	s.step("GetDEK of the clone", func(ctx context.Context) error {
		d, err := s.k.GetDEK(ctx, cloneID)
		defer d.Wipe()
		if err == nil && (!d.Key.Equal(s.clone) || d.State != dek.Formatted) {
			return s.wrong("the clone is %+v", d)
		}
		return err
	})
}

func (s *story) end() {
	s.step("DeleteDEK", func(ctx context.Context) error { return s.k.DeleteDEK(ctx, id) })
	s.step("RestoreDEK", func(ctx context.Context) error { return s.k.RestoreDEK(ctx, id) })
	s.get("GetDEK after RestoreDEK", 1, false)
	s.step("Prune of a living one", func(ctx context.Context) error { _, err := s.k.Prune(ctx, id); return err })
	s.step("DeleteDEK", func(ctx context.Context) error { return s.k.DeleteDEK(ctx, id) })
	s.clock.advance(time.Hour)
	s.step("List", func(ctx context.Context) error {
		infos, _, err := s.k.List(ctx, "", 10)
		if err == nil && len(infos) != 2 {
			return s.wrong("List = %+v", infos)
		}
		return err
	})
	s.step("Prune", func(ctx context.Context) error { _, err := s.k.Prune(ctx, id); return err })
	s.step("Forget", func(ctx context.Context) error {
		if err := s.k.Forget(ctx, id); !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
		return nil // by the call whose answer was lost
	})
}

// TestOneFaultAnywhere runs the story with each fault at each call to the store
// and to the KMS in turn; TestFaultsInRaces has those that are missing here.
func TestOneFaultAnywhere(t *testing.T) {
	type outcome struct{ storeCalls, kmsCalls, failed int }
	run := func(t *testing.T, attempts, storeAt int, storeFault envelopetest.Fault, kmsAt int, kmsFault kmstest.Fault) (o outcome) {
		synctest.Test(t, func(t *testing.T) {
			fake := kmstest.NewBackend()
			service := kmstest.NewFaultBackend(fake, func(call int, _ string) kmstest.Fault {
				if call == kmsAt {
					return kmsFault
				}
				return kmstest.None
			})
			store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(call int, _ string) envelopetest.Fault {
				if call == storeAt {
					return storeFault
				}
				return envelopetest.None
			})
			c := newClock()
			options := c.options()
			options.Attempts, options.Grace, options.RecordAuth = attempts, time.Hour, recordSecret()
			s := &story{T: t, k: newKeyring(t, fakeKEK(service), store, options), clock: c, rotate: fake.Rotate, stale: storeFault == envelopetest.Stale}
			s.run()
			o = outcome{store.Calls(), service.Calls(), s.failed}
			if _, err := s.k.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrNotFound) {
				t.Errorf("GetDEK at the end: %v", err)
			}
		})
		return o
	}
	calm := run(t, 1, -1, 0, -1, 0)
	if calm.failed != 0 || calm.storeCalls < 50 || calm.kmsCalls < 40 {
		t.Fatalf("without a fault: %+v", calm)
	}
	// A call that the first attempt loses is seen by the caller, or tried
	// again: in turns, and the other way round for the other fault.
	check := func(t *testing.T, got outcome, attempts int, loud bool) {
		switch {
		case loud && attempts == 1 && got.failed != 1, loud && attempts > 1 && got.failed != 0:
			t.Errorf("%d calls failed with %d attempts", got.failed, attempts)
		case got.failed > 1:
			t.Errorf("%d calls failed by one fault", got.failed)
		}
	}
	for at := range calm.storeCalls {
		for fault, attempts := range map[envelopetest.Fault]int{
			envelopetest.Fail: 1 + at%2, envelopetest.Lose: 2 - at%2, envelopetest.Stale: 3,
		} {
			t.Run(fmt.Sprintf("store/%d/%d", at, fault), func(t *testing.T) {
				check(t, run(t, attempts, at, fault, -1, 0), attempts, fault == envelopetest.Fail || fault == envelopetest.Lose)
			})
		}
	}
	for at := range calm.kmsCalls {
		for fault, attempts := range map[kmstest.Fault]int{
			kmstest.Fail: 1 + at%2, kmstest.Stale: 1, kmstest.Nonsense: 3,
		} {
			t.Run(fmt.Sprintf("kms/%d/%d", at, fault), func(t *testing.T) {
				check(t, run(t, attempts, -1, 0, at, fault), attempts, fault == kmstest.Fail)
			})
		}
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
