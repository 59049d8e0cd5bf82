package envelope

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// CacheStats says what the cache of unwrapped keys has done and has.
type CacheStats struct {
	Hits, Misses uint64
	Entries      int
}

// cache keeps unwrapped keys for a time, in memory that is locked. A nil *cache
// keeps nothing. It knows nothing of records: what it has is the answer of a
// KEK to one question, which is asked again in the very same bytes or not at all.
type cache struct {
	ttl time.Duration

	mu      sync.Mutex
	keys    secret.Bytes // one place of dek.Size for each entry; empty once closed
	free    []int        // places
	entries map[wrapOf]*list.Element
	byAge   *list.List // of *cached, the oldest first
	sweeper *time.Timer
	stats   CacheStats
}

// wrapOf is one of a DEK's two wraps.
type wrapOf struct {
	id       dek.ID
	previous bool
}

type cached struct {
	of      wrapOf
	sum     [sha256.Size]byte // of the wrapped key
	kek     int
	place   int
	expires time.Time
}

// newCache returns nil for no time. ErrState where memory cannot be locked.
func newCache(ttl time.Duration, size int) (*cache, error) {
	if ttl == 0 {
		return nil, nil
	}
	if ttl < 0 || size < 1 {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "a cache of %d keys for %v cannot be", size, ttl)
	}
	keys, err := secret.NewLocked(size * dek.Size)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrState, "a cache of keys takes memory that is locked against swapping, and this process cannot lock it: raise RLIMIT_MEMLOCK by %d KiB, or do without the cache: %w", size*dek.Size>>10+4, err)
	}
	c := &cache{ttl: ttl, keys: keys, entries: map[wrapOf]*list.Element{}, byAge: list.New()}
	for place := range size {
		c.free = append(c.free, place)
	}
	c.sweeper = time.AfterFunc(ttl, c.sweep)
	return c, nil
}

// sumOf tells two wrapped keys apart.
func sumOf(w wrappedV1) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, part := range []string{w.Scheme, w.KeyID, w.Mechanism, string(w.Ciphertext)} {
		_ = binary.Write(h, binary.BigEndian, uint32(len(part)))
		_, _ = io.WriteString(h, part)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// get returns a copy of the key that w holds; the caller wipes it.
func (c *cache) get(of wrapOf, w wrappedV1) (opened, bool) {
	if c == nil {
		return opened{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[of]
	if e == nil || e.Value.(*cached).sum != sumOf(w) || !time.Now().Before(e.Value.(*cached).expires) {
		c.stats.Misses++
		return opened{}, false
	}
	c.stats.Hits++
	hit := e.Value.(*cached)
	key := secret.New(dek.Size)
	key.Set(c.at(hit.place))
	return opened{key, hit.kek}, true
}

// put keeps a copy of o's key, in place of the oldest where there is no room.
func (c *cache) put(of wrapOf, w wrappedV1, o opened) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keys.Len() == 0 {
		return
	}
	c.drop(c.entries[of])
	if len(c.free) == 0 {
		c.drop(c.byAge.Front())
	}
	place := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	secret.Do(func() { copy(c.at(place), o.key.Expose()) })
	c.entries[of] = c.byAge.PushBack(&cached{of: of, sum: sumOf(w), kek: o.kek, place: place, expires: time.Now().Add(c.ttl)})
}

func (c *cache) at(place int) []byte { return c.keys.Expose()[place*dek.Size:][:dek.Size] }

// drop wipes an entry; nil is none. The caller holds the lock.
func (c *cache) drop(e *list.Element) {
	if e == nil {
		return
	}
	old := c.byAge.Remove(e).(*cached)
	delete(c.entries, old.of)
	clear(c.at(old.place))
	c.free = append(c.free, old.place)
}

// forget wipes what there is of a DEK.
func (c *cache) forget(id dek.ID) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(c.entries[wrapOf{id, false}])
	c.drop(c.entries[wrapOf{id, true}])
}

// sweep wipes what has expired, and comes again when the next one does.
func (c *cache) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keys.Len() == 0 {
		return
	}
	next := c.ttl
	for e := c.byAge.Front(); e != nil; e = c.byAge.Front() {
		if next = time.Until(e.Value.(*cached).expires); next > 0 {
			break
		}
		c.drop(e)
		next = c.ttl
	}
	c.sweeper.Reset(next)
}

func (c *cache) close() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sweeper.Stop()
	c.keys.Wipe()
	c.free, c.entries, c.byAge = nil, nil, list.New()
}

// CacheStats says how the cache is; zero without one.
func (k *Keyring) CacheStats() CacheStats {
	if k.cache == nil {
		return CacheStats{}
	}
	k.cache.mu.Lock()
	defer k.cache.mu.Unlock()
	s := k.cache.stats
	s.Entries = k.cache.byAge.Len()
	return s
}

// recall is unwrap by way of the cache.
func (k *Keyring) recall(ctx context.Context, of wrapOf, w wrappedV1) (opened, error) {
	if o, ok := k.cache.get(of, w); ok {
		return o, nil
	}
	o, err := k.unwrap(ctx, of.id, w)
	if err == nil {
		k.cache.put(of, w, o)
	}
	return o, err
}
