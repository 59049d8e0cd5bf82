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

// method is one thing that two keyrings do at the same time.
type method struct {
	name   string
	before func(b *bench)                                                   // brings id to where the method applies
	call   func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error)  // the DEK, where it gives one
	after  func(t *testing.T, b *bench, k *envelope.Keyring, got []dek.DEK) // without faults
}

// bench is the state before a method: the disk opens with this key.
type bench struct {
	*testing.T
	k     *envelope.Keyring
	clock *clock
	disk  dek.DEK
}

func (b *bench) create()  { b.disk = create(b.T, b.k, id) }
func (b *bench) format()  { b.disk = format(b.T, b.k, id) }
func (b *bench) deleted() { b.format(); must(b.T, "DeleteDEK", b.k.DeleteDEK(b.Context(), id)) }
func (b *bench) expired() { b.deleted(); b.clock.advance(time.Hour) }
func (b *bench) rotating() {
	b.format()
	d, err := b.k.RotateDEK(b.Context(), id)
	must(b.T, "RotateDEK", err)
	b.Cleanup(d.Wipe)
	b.disk = d // a node has given the new key to the disk
}

// opens checks that the record still has what opens the disk, and that all who
// got a key got the one that is stored.
func opens(t *testing.T, b *bench, k *envelope.Keyring, got []dek.DEK) {
	t.Helper()
	d, err := k.GetDEK(t.Context(), id)
	must(t, "GetDEK", err)
	defer d.Wipe()
	if b.disk.Key.Len() > 0 && !d.Key.Equal(b.disk.Key) && !d.Previous.Equal(b.disk.Key) {
		t.Error("the key that the disk opens with is lost")
	}
	for _, g := range got {
		if g.Key.Len() > 0 && (!g.Key.Equal(d.Key) || !g.Previous.Equal(d.Previous)) {
			t.Error("a caller got other keys than the stored ones")
		}
	}
}

func gone(t *testing.T, _ *bench, k *envelope.Keyring, _ []dek.DEK) {
	t.Helper()
	_, err := k.GetDEK(t.Context(), id)
	mustBe(t, "GetDEK", err, errdefs.ErrNotFound)
}

func methods() []method {
	only := func(f func(ctx context.Context, k *envelope.Keyring) error) func(context.Context, *envelope.Keyring) (dek.DEK, error) {
		return func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error) { return dek.DEK{}, f(ctx, k) }
	}
	const uuid = "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"
	return []method{
		{"CreateDEK", func(*bench) {}, func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error) { return k.CreateDEK(ctx, id, spec()) }, opens},
		{"CloneDEK", func(b *bench) { format(b.T, b.k, cloneID) }, func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error) {
			return k.CloneDEK(ctx, id, spec(), cloneID)
		}, opens},
		{"GetDEK", (*bench).rotating, func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error) { return k.GetDEK(ctx, id) }, opens},
		{"ClaimFormat", (*bench).create, only(func(ctx context.Context, k *envelope.Keyring) error {
			_, err := k.ClaimFormat(ctx, id, dek.Claim{Node: "n", UUID: uuid})
			return err
		}), opens},
		{"ReleaseClaim", func(b *bench) {
			b.create()
			_, err := b.k.ClaimFormat(b.Context(), id, dek.Claim{Node: "n", UUID: uuid})
			must(b.T, "ClaimFormat", err)
		}, only(func(ctx context.Context, k *envelope.Keyring) error { return k.ReleaseClaim(ctx, id, "n") }), opens},
		{"RotateDEK", (*bench).format, func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error) { return k.RotateDEK(ctx, id) }, opens},
		{"ConfirmDEK", (*bench).rotating, func(ctx context.Context, k *envelope.Keyring) (dek.DEK, error) {
			d, err := k.GetDEK(ctx, id)
			if err != nil {
				return dek.DEK{}, err
			}
			defer d.Wipe()
			return dek.DEK{}, k.ConfirmDEK(ctx, id, dek.HeaderID{UUID: d.Header.UUID, Sequence: d.Header.Sequence + 1, Fingerprint: dek.Fingerprint(d.Key)})
		}, opens},
		{"RewrapDEK", (*bench).rotating, only(func(ctx context.Context, k *envelope.Keyring) error { return k.RewrapDEKAlways(ctx, id) }), opens},
		{"DeleteDEK", (*bench).rotating, only(func(ctx context.Context, k *envelope.Keyring) error { return k.DeleteDEK(ctx, id) }), func(t *testing.T, b *bench, k *envelope.Keyring, got []dek.DEK) {
			gone(t, b, k, got)
			must(t, "RestoreDEK", k.RestoreDEK(t.Context(), id))
			opens(t, b, k, got)
		}},
		{"RestoreDEK", (*bench).deleted, only(func(ctx context.Context, k *envelope.Keyring) error { return k.RestoreDEK(ctx, id) }), opens},
		{"Prune", (*bench).expired, only(func(ctx context.Context, k *envelope.Keyring) error { _, err := k.Prune(ctx, id); return err }), gone},
		{"Forget", (*bench).expired, only(func(ctx context.Context, k *envelope.Keyring) error {
			if err := k.Forget(ctx, id); !errors.Is(err, errdefs.ErrNotFound) {
				return err
			}
			return nil
		}), gone},
	}
}

// TestFaultsInRaces: two keyrings call each method at the same time, with each
// fault at each call to store and KMS in turn. All converge, on one key.
func TestFaultsInRaces(t *testing.T) {
	for _, m := range methods() {
		t.Run(m.name, func(t *testing.T) {
			storeCalls, kmsCalls := raceOnce(t, m, -1, 0, -1, 0)
			for at := range storeCalls {
				for fault := envelopetest.Fail; fault <= envelopetest.Delay; fault++ {
					raceOnce(t, m, at, fault, -1, 0)
				}
			}
			for at := range kmsCalls {
				for _, fault := range []kmstest.Fault{kmstest.Fail, kmstest.Lose, kmstest.Delay, kmstest.Nonsense, kmstest.Stale} {
					raceOnce(t, m, -1, 0, at, fault)
				}
			}
		})
	}
}

func raceOnce(t *testing.T, m method, storeAt int, storeFault envelopetest.Fault, kmsAt int, kmsFault kmstest.Fault) (storeCalls, kmsCalls int) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		storeBase, kmsBase := -1, -1 // before which no fault happens, and without which none
		service := kmstest.NewFaultBackend(kmstest.NewBackend(), func(call int, _ string) kmstest.Fault {
			mu.Lock()
			defer mu.Unlock()
			if kmsBase >= 0 && call-kmsBase == kmsAt {
				return kmsFault
			}
			return kmstest.None
		})
		store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(call int, _ string) envelopetest.Fault {
			mu.Lock()
			defer mu.Unlock()
			if storeBase >= 0 && call-storeBase == storeAt {
				return storeFault
			}
			return envelopetest.None
		})
		c := newClock()
		ring := func() *envelope.Keyring {
			o := c.options()
			o.Grace, o.RecordAuth, o.Attempts = time.Hour, recordSecret(), 2
			return newKeyring(t, fakeKEK(service), store, o)
		}
		b := &bench{T: t, k: ring(), clock: c}
		m.before(b)
		mu.Lock()
		storeBase, kmsBase = store.Calls(), service.Calls()
		mu.Unlock()
		got := make([]dek.DEK, 2)
		var wg sync.WaitGroup
		for n := range got {
			k := ring()
			wg.Go(func() {
				var err error
				for range 4 {
					if got[n], err = m.call(t.Context(), k); err == nil {
						return
					}
				}
				t.Errorf("%s does not converge: %v", m.name, err)
			})
		}
		wg.Wait()
		storeCalls, kmsCalls = store.Calls()-storeBase, service.Calls()-kmsBase
		mu.Lock()
		storeBase, kmsBase = -1, -1
		mu.Unlock()
		if storeFault == envelopetest.Stale { // "nothing to do" may have been the past's truth
			d, err := m.call(t.Context(), b.k)
			must(t, m.name, err)
			d.Wipe()
			for i := range got {
				got[i].Wipe()
				got[i] = dek.DEK{}
			}
		}
		m.after(t, b, b.k, got)
		for _, d := range got {
			d.Wipe()
		}
		if t.Failed() {
			t.Logf("store fault %d at %d, KMS fault %d at %d", storeFault, storeAt, kmsFault, kmsAt)
		}
	})
	return storeCalls, kmsCalls
}

// disk is a volume: its header opens with one key and has a sequence.
type disk struct {
	mu       sync.Mutex
	key      string // fingerprint
	sequence uint64
}

// open is what a node does to it: it gives the new key to a header that opens
// with the previous one, or grows the volume without that, as a node does that
// had read the record earlier. It returns what to confirm, if anything.
func (d *disk) open(k dek.DEK, grow bool) (dek.HeaderID, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, old := dek.Fingerprint(k.Key), ""
	if k.Previous.Len() > 0 {
		old = dek.Fingerprint(k.Previous)
	}
	switch {
	case k.State == dek.Prepared || d.sequence < k.Header.Sequence || d.key != now && d.key != old:
		return dek.HeaderID{}, false
	case grow:
		d.sequence++
	case d.key != now:
		d.key = now
		d.sequence++
	}
	return dek.HeaderID{UUID: k.Header.UUID, Sequence: d.sequence, Fingerprint: d.key}, true
}

// TestNoKeyIsLost: nodes that open and grow a volume, operators that rotate,
// rewrap, delete, restore and prune, over two keyrings whose store and KMS do
// everything wrong that real ones do. At every moment the record, as far as it
// can be restored, has the key that the disk opens with.
func TestNoKeyIsLost(t *testing.T) {
	rotations := 0
	for seed := range uint64(12) {
		synctest.Test(t, func(t *testing.T) { rotations += noKeyIsLost(t, seed) })
	}
	if rotations < 15 {
		t.Errorf("only %d rotations were finished: there is nothing to check", rotations)
	}
	t.Logf("%d rotations", rotations)
}

func noKeyIsLost(t *testing.T, seed uint64) int {
	var mu sync.Mutex
	chance, calm := rand.New(rand.NewPCG(seed, 1)), true
	roll := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		if calm {
			return 0
		}
		return chance.IntN(n)
	}
	fake := kmstest.NewBackend()
	service := kmstest.NewFaultBackend(fake, func(int, string) kmstest.Fault {
		return append(make([]kmstest.Fault, 15), kmstest.Fail, kmstest.Lose, kmstest.Delay, kmstest.Nonsense, kmstest.Stale)[roll(20)]
	})
	store := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault {
		return append(make([]envelopetest.Fault, 10), envelopetest.Fail, envelopetest.Lose, envelopetest.Stale, envelopetest.Delay)[roll(14)]
	})
	var rings []*envelope.Keyring
	for range 2 {
		rings = append(rings, newKeyring(t, fakeKEK(service), store, envelope.Options{Grace: time.Hour, RecordAuth: recordSecret()}))
	}
	made := format(t, rings[0], id)
	d := &disk{key: dek.Fingerprint(made.Key), sequence: made.Header.Sequence}
	mu.Lock()
	calm = false
	mu.Unlock()

	next := map[string]string{} // which key follows which
	finished := map[string]bool{}
	see := func(k dek.DEK) {
		if k.Previous.Len() == 0 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		old, now := dek.Fingerprint(k.Previous), dek.Fingerprint(k.Key)
		if was, ok := next[old]; ok && was != now {
			t.Errorf("seed %d: two keys follow one", seed)
		}
		next[old] = now
	}
	node := func(ctx context.Context, k *envelope.Keyring, grow bool) error {
		key, err := k.GetDEK(ctx, id)
		if err != nil {
			return err
		}
		defer key.Wipe()
		see(key)
		time.Sleep(time.Duration(roll(300)) * time.Millisecond) // others go on
		h, ok := d.open(key, grow)
		if !ok {
			return nil
		}
		time.Sleep(time.Duration(roll(300)) * time.Millisecond)
		err = k.ConfirmDEK(ctx, id, h)
		if err == nil && key.State == dek.Rotating && h.Fingerprint == dek.Fingerprint(key.Key) {
			mu.Lock()
			finished[h.Fingerprint] = true
			mu.Unlock()
		}
		return err
	}
	act := func(ctx context.Context, k *envelope.Keyring, n int) error {
		switch n {
		case 0, 1:
			key, err := k.RotateDEK(ctx, id)
			if err == nil {
				see(key)
			}
			key.Wipe()
			return err
		case 2:
			return k.RewrapDEK(ctx, id)
		case 3:
			return errors.Join(k.DeleteDEK(ctx, id), k.RestoreDEK(ctx, id))
		case 4:
			_, err := k.Prune(ctx, id)
			return err
		case 5:
			fake.Rotate()
			return nil
		default:
			return node(ctx, k, n%2 == 0)
		}
	}
	var wg sync.WaitGroup
	for n := range 6 {
		r := rand.New(rand.NewPCG(seed, uint64(10+n)))
		wg.Go(func() {
			for range 25 {
				err := act(t.Context(), rings[n%2], r.IntN(12))
				if errors.Is(err, errdefs.ErrExists) || errors.Is(err, errdefs.ErrInvalid) {
					t.Errorf("seed %d: %v", seed, err)
				}
			}
		})
	}
	wg.Wait()
	mu.Lock()
	calm = true
	mu.Unlock()

	must(t, "RestoreDEK", rings[0].RestoreDEK(t.Context(), id))
	for range 2 { // the next node to come finishes what was begun
		must(t, "a node", node(t.Context(), rings[1], false))
	}
	key, err := rings[0].GetDEK(t.Context(), id)
	must(t, "GetDEK", err)
	defer key.Wipe()
	if key.State != dek.Formatted || dek.Fingerprint(key.Key) != d.key {
		t.Errorf("seed %d: the disk opens with %s; the record is %s with key %s: a key is lost", seed, d.key, key.State, dek.Fingerprint(key.Key))
	}
	if d.sequence < key.Header.Sequence {
		t.Errorf("seed %d: the floor is %d, the disk has %d", seed, key.Header.Sequence, d.sequence)
	}
	return len(finished)
}

// TestOldNodeEndsNoRotation: a node that read the record before the rotation
// grows the volume under the old key and confirms a higher sequence.
func TestOldNodeEndsNoRotation(t *testing.T) {
	k := newKeyring(t, fakeKEK(kmstest.NewBackend()), openStore(t, "mem://"), fast(1))
	old := format(t, k, id)
	d, err := k.RotateDEK(t.Context(), id)
	must(t, "RotateDEK", err)
	defer d.Wipe()
	for i, fingerprint := range []string{"", dek.Fingerprint(old.Key), "junk", fmt.Sprint(secret.Bytes{})} {
		must(t, "ConfirmDEK", k.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: old.Header.UUID, Sequence: old.Header.Sequence + 1 + uint64(i), Fingerprint: fingerprint}))
		got, err := k.GetDEK(t.Context(), id)
		must(t, "GetDEK", err)
		if got.State != dek.Rotating || !got.Previous.Equal(old.Key) {
			t.Errorf("fingerprint %q ended the rotation: the key on the disk is lost", fingerprint)
		}
		got.Wipe()
	}
}
