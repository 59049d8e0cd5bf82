package kube

import (
	"context"
	"io"
	"net/http"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const shortWatch = 2 * time.Second

// table has what is kept (T) of all objects of one kind, as a watch tells it,
// and says how old it can be. Its methods may be called concurrently.
type table[T any] struct {
	kind string                  // for messages: "PersistentVolumes"
	keep func(obj any) (T, bool) // what of an object; false: nothing
	key  func(T) string          // under which it is found besides its name; "": under none
	age  *age

	changed func() // called when something may have changed; nil: nobody asks

	mu    sync.RWMutex
	names map[string]T
	keys  map[string]map[string]T // by key and name
}

func newTable[T any](kind string, a *age, keep func(any) (T, bool), key func(T) string) *table[T] {
	return &table[T]{kind: kind, keep: keep, key: key, age: a, names: map[string]T{}, keys: map[string]map[string]T{}}
}

// get returns what is kept of the object of that name.
func (t *table[T]) get(name string) (T, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	v, ok := t.names[name]
	return v, ok
}

// under returns what has that key, in no order.
func (t *table[T]) under(key string) []T {
	t.mu.RLock()
	defer t.mu.RUnlock()
	found := t.keys[key]
	if len(found) == 0 {
		return nil
	}
	list := make([]T, 0, len(found))
	for _, v := range found {
		list = append(list, v)
	}
	return list
}

// size is how many objects something is kept of.
func (t *table[T]) size() int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.names)
}

// ready is nil while the table may be believed.
func (t *table[T]) ready() error {
	since, ok := t.age.get()
	switch {
	case !ok:
		return errdefs.Errorf(errdefs.ErrUnavailable, "the API server has not told us its %s yet", t.kind)
	case since > t.age.most:
		return errdefs.Errorf(errdefs.ErrUnavailable, "the API server has told us nothing about its %s for %v, and what we know may be out of date", t.kind, since.Round(time.Second))
	}
	return nil
}

// follow keeps the table as the API server has it until ctx is done.
func (t *table[T]) follow(ctx context.Context, source *cache.ListWatch, example runtime.Object) {
	backoff := &wait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 0.5, Steps: 5, Cap: 5 * time.Second}
	cache.NewReflectorWithOptions(source, example, t, cache.ReflectorOptions{Name: "cryptcsi", Backoff: backoff}).RunWithContext(ctx)
}

// Add, Update, Delete, Replace and Resync make it a cache.ReflectorStore.
func (t *table[T]) Add(obj any) error {
	name, err := nameOf(obj)
	if err != nil {
		return err
	}
	defer t.tell()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(name)
	t.insert(name, obj)
	return nil
}

func (t *table[T]) Update(obj any) error { return t.Add(obj) }

func (t *table[T]) Delete(obj any) error {
	name, err := nameOf(obj)
	if err != nil {
		return err
	}
	defer t.tell()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.remove(name)
	return nil
}

// Replace takes a whole listing.
func (t *table[T]) Replace(list []any, _ string) error {
	defer t.tell()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.names, t.keys = make(map[string]T, len(list)), make(map[string]map[string]T, len(list))
	for _, obj := range list {
		name, err := nameOf(obj)
		if err != nil {
			return err
		}
		t.insert(name, obj)
	}
	t.age.listed()
	return nil
}

func (t *table[T]) Resync() error { return nil }

func (t *table[T]) tell() {
	if t.changed != nil {
		t.changed()
	}
}

func (t *table[T]) insert(name string, obj any) {
	v, ok := t.keep(obj)
	if !ok {
		return
	}
	t.names[name] = v
	key := t.key(v)
	if key == "" {
		return
	}
	if t.keys[key] == nil {
		t.keys[key] = make(map[string]T, 1)
	}
	t.keys[key][name] = v
}

func (t *table[T]) remove(name string) {
	v, ok := t.names[name]
	if !ok {
		return
	}
	delete(t.names, name)
	key := t.key(v)
	delete(t.keys[key], name)
	if len(t.keys[key]) == 0 {
		delete(t.keys, key)
	}
}

func nameOf(obj any) (string, error) {
	m, err := meta.Accessor(obj)
	if err != nil {
		return "", err
	}
	return m.GetName(), nil
}

// source is what a table follows: the objects that list and watch speak of,
// by a client with a's transport.
func source[L runtime.Object](a *age, list func(context.Context, metav1.ListOptions) (L, error),
	watches func(context.Context, metav1.ListOptions) (watch.Interface, error),
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return list(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			seconds := int64(a.next(o.SendInitialEvents != nil) / time.Second)
			o.TimeoutSeconds = &seconds
			return watches(ctx, o)
		},
	}
}

// named narrows a source to the object of one name.
func named(source *cache.ListWatch, name string) *cache.ListWatch {
	selector := fields.OneTermEqualSelector("metadata.name", name).String()
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return source.ListWithContextFunc(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return source.WatchFuncWithContext(ctx, o)
		},
	}
}

// age bounds how old a table is. An open watch proves nothing: a connection
// can be dead, or held back by whoever owns the network. So watches are short,
// and one that the API server ended in its own time, which the end of the
// answer inside of TLS tells, proves that everything arrived that had happened
// before it began. A complete listing proves the same.
type age struct {
	most time.Duration // that a table may have
	now  func() time.Time

	mu     sync.Mutex
	length time.Duration // of the next watch
	begun  time.Time     // of the latest request
	proven time.Time     // the table has all that happened before; zero: it has nothing
}

func newAge(most time.Duration, now func() time.Time) *age {
	return &age{most: most, now: now}
}

// next returns how long the API server is to let the next watch run: a quarter
// of what a table may have; half of it for one that lists first; and no longer
// than client-go believes in (a second) if the table is in need of a proof.
func (a *age) next(lists bool) time.Duration {
	since, _ := a.get()
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case lists:
		a.length = a.most / 2
	case since > a.most/2:
		a.length = shortWatch
	default:
		a.length = max(a.most/4, shortWatch)
	}
	a.length = a.length.Truncate(time.Second)
	return a.length
}

// config returns a client's configuration whose requests are seen.
func (a *age) config(c *rest.Config) *rest.Config {
	c = rest.CopyConfig(c)
	c.Wrap(func(next http.RoundTripper) http.RoundTripper { return timed{next, a} })
	return c
}

// get returns the age, and whether there is anything.
func (a *age) get() (time.Duration, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.now().Sub(a.proven), !a.proven.IsZero()
}

func (a *age) listed() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.begun.After(a.proven) {
		a.proven = a.begun
	}
}

// watched is told when the answer to a watch ended that began then and was to
// run so long. One that ended early was broken off, perhaps with something left
// to say.
func (a *age) watched(begun time.Time, length time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now().Sub(begun) >= length && begun.After(a.proven) {
		a.proven = begun
	}
}

// request notes the beginning of a request, and returns it with the length that
// it has if it is a watch.
func (a *age) request() (time.Time, time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.begun = a.now()
	return a.begun, a.length
}

// timed tells age about requests, of which there is one at a time.
type timed struct {
	next http.RoundTripper
	age  *age
}

func (t timed) RoundTrip(r *http.Request) (*http.Response, error) {
	begun, length := t.age.request()
	resp, err := t.next.RoundTrip(r)
	if err == nil && resp.StatusCode == http.StatusOK && r.URL.Query().Has("watch") {
		resp.Body = &timedBody{resp.Body, func() { t.age.watched(begun, length) }}
	}
	return resp, err
}

// WrappedRoundTripper lets client-go find the transport.
func (t timed) WrappedRoundTripper() http.RoundTripper { return t.next }

type timedBody struct {
	io.ReadCloser
	end func()
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF { // and no other: that one says that the answer is complete
		b.end()
	}
	return n, err
}
