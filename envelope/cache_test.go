package envelope

import (
	"bytes"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// cacheWorld is two keyrings over one KMS and one store, of which one has a
// cache for a minute.
type cacheWorld struct {
	*testing.T
	ring, other *Keyring
	unwraps     atomic.Int64
	down        atomic.Bool
}

const cachedFor = time.Minute

func newCacheWorld(t *testing.T, size int) *cacheWorld {
	t.Helper()
	w := &cacheWorld{T: t}
	store, err := LocalStores().Open(t.Context(), "mem://")
	w.must("Open", err)
	backend := kmstest.NewBackend()
	backend.SetFault(func(op string) error {
		if w.down.Load() {
			return errdefs.Errorf(errdefs.ErrUnavailable, "the KMS is down")
		}
		if op == "Unwrap" {
			w.unwraps.Add(1)
		}
		return nil
	})
	open := func(o Options) *Keyring {
		o.Attempts, o.Grace = 1, time.Hour
		k, err := New([]*kms.KEK{kms.New("fake", backend, kms.Options{})}, []Store{unclosed{store}}, o)
		w.must("New", err)
		t.Cleanup(func() { w.must("Close", k.Close()) })
		return k
	}
	w.ring, w.other = open(Options{CacheFor: cachedFor, CacheSize: size}), open(Options{})
	return w
}

// unclosed is a store that several keyrings share.
type unclosed struct{ Store }

func (w *cacheWorld) must(what string, err error) {
	w.Helper()
	if err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

// create makes a formatted DEK, without the cache's knowledge.
func (w *cacheWorld) create(id dek.ID) []byte {
	w.Helper()
	d, err := w.other.CreateDEK(w.Context(), id, dek.Spec{Cipher: dek.CipherXTS})
	w.must("CreateDEK", err)
	defer d.Wipe()
	uuid := dek.NewUUID()
	_, err = w.other.ClaimFormat(w.Context(), id, dek.Claim{Node: "n", UUID: uuid})
	w.must("ClaimFormat", err)
	w.must("ConfirmDEK", w.other.ConfirmDEK(w.Context(), id, dek.HeaderID{UUID: uuid, Sequence: 1}))
	return bytes.Clone(d.Key.Expose())
}

// get is GetDEK that costs the KMS so many calls.
func (w *cacheWorld) get(what string, id dek.ID, want []byte, calls int64) dek.DEK {
	w.Helper()
	before := w.unwraps.Load()
	d, err := w.ring.GetDEK(w.Context(), id)
	w.must(what, err)
	if !bytes.Equal(d.Key.Expose(), want) {
		w.Errorf("%s: another key", what)
	}
	if n := w.unwraps.Load() - before; n != calls {
		w.Errorf("%s: the KMS was asked %d times, want %d", what, n, calls)
	}
	d.Wipe()
	return d
}

// kept checks how many keys the cache has, and that all its other places are
// wiped.
func (w *cacheWorld) kept(what string, want int) {
	w.Helper()
	c := w.ring.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	full := 0
	for i := range c.keys.Len() / dek.Size {
		if !bytes.Equal(c.at(i), make([]byte, dek.Size)) {
			full++
		}
	}
	if full != want || len(c.entries) != want || c.byAge.Len() != want || len(c.free) != c.keys.Len()/dek.Size-want {
		w.Errorf("%s: %d keys are kept and %d entries, want %d", what, full, len(c.entries), want)
	}
}

// TestCacheThroughAnOutage: a key that was unwrapped is handed out while the
// KMS is down, until its time is over, and then it is gone without a call.
func TestCacheThroughAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCacheWorld(t, 10)
		one, two := w.create("d/1"), w.create("d/2")
		w.get("the first time", "d/1", one, 1)
		w.get("the second time", "d/1", one, 0)
		w.down.Store(true)
		time.Sleep(cachedFor - time.Second)
		w.get("while the KMS is down", "d/1", one, 0)
		if _, err := w.ring.GetDEK(t.Context(), "d/2"); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("a key that was never unwrapped: %v", err)
		}
		w.kept("before its time", 1)
		time.Sleep(time.Second)
		synctest.Wait()
		w.kept("after its time", 0)
		if _, err := w.ring.GetDEK(t.Context(), "d/1"); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("after its time: %v", err)
		}
		w.down.Store(false)
		w.get("when the KMS is back", "d/1", one, 1)
		time.Sleep(cachedFor / 2)
		w.get("another", "d/2", two, 1)
		time.Sleep(cachedFor / 2)
		synctest.Wait()
		w.kept("when one of two expired", 1)
		w.get("the one that did not", "d/2", two, 0)
		if s := w.ring.CacheStats(); s != (CacheStats{Hits: 3, Misses: 5, Entries: 1}) {
			t.Errorf("the cache says %+v", s)
		}
		if s := w.other.CacheStats(); s != (CacheStats{}) {
			t.Errorf("no cache says %+v", s)
		}
	})
}

// TestCacheReadsTheRecord: what others did to the record counts at once.
func TestCacheReadsTheRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCacheWorld(t, 10)
		const id = dek.ID("d/1")
		key := w.create(id)
		d := w.get("the first time", id, key, 1)
		w.must("ConfirmDEK", w.other.ConfirmDEK(t.Context(), id, dek.HeaderID{UUID: d.Header.UUID, Sequence: 7}))
		if d := w.get("after another confirmed", id, key, 0); d.Header.Sequence != 7 {
			t.Errorf("the header's sequence is %d", d.Header.Sequence)
		}
		w.must("RewrapDEKAlways", w.other.RewrapDEKAlways(t.Context(), id))
		w.get("after another rewrapped", id, key, 1)
		w.get("again", id, key, 0)

		fresh, err := w.other.RotateDEK(t.Context(), id)
		w.must("RotateDEK", err)
		defer fresh.Wipe()
		w.get("after another rotated", id, fresh.Key.Expose(), 2)
		w.down.Store(true)
		again, err := w.ring.GetDEK(t.Context(), id)
		w.must("while rotating, the KMS down", err)
		if !bytes.Equal(again.Previous.Expose(), key) || again.State != dek.Rotating {
			t.Error("the previous key is another")
		}
		again.Wipe()
		w.kept("while rotating", 2)

		w.must("DeleteDEK by another, which takes no KMS", w.other.DeleteDEK(t.Context(), id))
		if _, err := w.ring.GetDEK(t.Context(), id); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("after another deleted: %v", err)
		}
		w.kept("after another deleted", 0)
	})
}

// TestCacheForgets: what this keyring changes is wiped at once; what proves that
// a key can be unwrapped asks the KMS.
func TestCacheForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCacheWorld(t, 10)
		const id = dek.ID("d/1")
		key := w.create(id)
		for what, change := range map[string]func() error{
			"RewrapDEKAlways": func() error { return w.ring.RewrapDEKAlways(t.Context(), id) },
			"DeleteDEK":       func() error { return w.ring.DeleteDEK(t.Context(), id) },
			"RotateDEK":       func() error { d, err := w.ring.RotateDEK(t.Context(), "d/rotated"); d.Wipe(); return err },
		} {
			of, its := id, key
			if what == "RotateDEK" {
				of, its = "d/rotated", w.create("d/rotated")
			}
			w.get("before "+what, of, its, 1)
			w.must(what, change())
			w.kept("after "+what, 0)
			w.must("RestoreDEK", w.ring.RestoreDEK(t.Context(), id))
			w.kept("after RestoreDEK", 0)
		}
		w.get("before Prune", id, key, 1)
		w.down.Store(true)
		if _, err := w.ring.Prune(t.Context(), id); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("Prune believed the cache: %v", err)
		}
	})
}

// TestCacheIsBounded: the oldest goes first, and Close leaves nothing.
func TestCacheIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newCacheWorld(t, 2)
		keys := map[dek.ID][]byte{}
		for _, id := range []dek.ID{"d/1", "d/2", "d/3"} {
			keys[id] = w.create(id)
			w.get("the first time", id, keys[id], 1)
			time.Sleep(time.Second)
		}
		w.kept("of three", 2)
		w.get("the youngest", "d/3", keys["d/3"], 0)
		w.get("the second", "d/2", keys["d/2"], 0)
		w.get("the oldest", "d/1", keys["d/1"], 1)
		w.must("Close", w.ring.Close())
		if n := w.ring.cache.keys.Len(); n != 0 {
			t.Errorf("%d bytes are left after Close", n)
		}
	})
	for _, o := range []Options{{CacheFor: time.Second}, {CacheFor: -1, CacheSize: 1}, {CacheFor: 1, CacheSize: -1}} {
		if _, err := newCache(o.CacheFor, o.CacheSize); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%v and %d: %v", o.CacheFor, o.CacheSize, err)
		}
	}
}

// TestCacheOfThatWrapAlone: no other wrap of the same ID finds the key.
func TestCacheOfThatWrapAlone(t *testing.T) {
	c, err := newCache(time.Hour, 3)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	w := wrappedV1{Scheme: "s", KeyID: "k", Mechanism: "m", Ciphertext: []byte("c")}
	key := countUp(1, dek.Size)
	defer key.Wipe()
	c.put(wrapOf{id: "d/1"}, w, opened{key, 3})
	hit, ok := c.get(wrapOf{id: "d/1"}, w)
	if !ok || !hit.key.Equal(key) || hit.kek != 3 {
		t.Error("what was kept is not found")
	}
	hit.key.Wipe()
	for what, other := range map[string]wrappedV1{
		"ciphertext": {"s", "k", "m", []byte("C")}, "key ID": {"s", "K", "m", []byte("c")}, "mechanism": {"s", "k", "M", []byte("c")},
		"scheme": {"S", "k", "m", []byte("c")}, "border": {"s", "km", "", []byte("c")},
	} {
		if _, ok := c.get(wrapOf{id: "d/1"}, other); ok {
			t.Errorf("a wrap with another %s finds the key", what)
		}
	}
	for _, of := range []wrapOf{{"d/1", true}, {"d/2", false}} {
		if _, ok := c.get(of, w); ok {
			t.Errorf("%+v finds the key", of)
		}
	}
}
