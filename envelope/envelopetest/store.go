// Package envelopetest tells whether an envelope.Store is right, and makes a
// right one fail on demand.
package envelopetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// RunStore runs the suite. open opens an empty store and returns two handles on
// it that the suite may use together; they may be one value where the store
// cannot be shared.
func RunStore(t *testing.T, open func(t *testing.T) (a, b envelope.Store)) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, a, b envelope.Store)
	}{
		{"CreateRead", createRead},
		{"Replace", replace},
		{"Delete", deletes},
		{"Sizes", sizes},
		{"Names", names},
		{"List", list},
		{"Cancelled", cancelled},
		{"CreateRace", createRace},
		{"ReplaceRace", replaceRace},
		{"NeverHalf", neverHalf},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, b := open(t)
			test.run(t, a, b)
		})
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func mustBe(t *testing.T, what string, err, class error) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%s: %v, want %v", what, err, class)
	}
}

// mustHold checks what is stored and returns its version.
func mustHold(t *testing.T, s envelope.Store, name, want string) (version string) {
	t.Helper()
	data, version, err := s.Read(t.Context(), name)
	must(t, "Read", err)
	if string(data) != want {
		t.Errorf("%s holds %.40q, want %.40q", name, data, want)
	}
	return version
}

func createRead(t *testing.T, a, b envelope.Store) {
	_, _, err := a.Read(t.Context(), "one")
	mustBe(t, "Read of nothing", err, errdefs.ErrNotFound)
	data := []byte("first")
	must(t, "Create", a.Create(t.Context(), "one", data))
	data[0] = 'X' // the store has a copy of its own
	v := mustHold(t, b, "one", "first")
	if again := mustHold(t, a, "one", "first"); again != v {
		t.Errorf("one object has the versions %q and %q", v, again)
	}
	mustBe(t, "Create of an existing object", b.Create(t.Context(), "one", []byte("second")), errdefs.ErrExists)
	mustBe(t, "Create with the same data", b.Create(t.Context(), "one", []byte("first")), errdefs.ErrExists)
	mustHold(t, a, "one", "first")
	got, _, err := a.Read(t.Context(), "one")
	must(t, "Read", err)
	got[0] = 'X' // and so has the reader
	mustHold(t, a, "one", "first")
}

func replace(t *testing.T, a, b envelope.Store) {
	mustBe(t, "Replace of nothing", a.Replace(t.Context(), "one", []byte("x"), ""), errdefs.ErrConflict)
	_, _, err := a.Read(t.Context(), "one")
	mustBe(t, "Read after Replace of nothing", err, errdefs.ErrNotFound)

	must(t, "Create", a.Create(t.Context(), "one", []byte("first")))
	must(t, "Create", a.Create(t.Context(), "two", []byte("other")))
	v1 := mustHold(t, a, "one", "first")
	must(t, "Replace", b.Replace(t.Context(), "one", []byte("second"), v1))
	v2 := mustHold(t, a, "one", "second")
	if v1 == v2 {
		t.Error("the version did not change")
	}
	for _, stale := range []string{v1, "", "x" + v2, mustHold(t, a, "two", "other")} {
		mustBe(t, fmt.Sprintf("Replace of version %q", stale), a.Replace(t.Context(), "one", []byte("third"), stale), errdefs.ErrConflict)
	}
	mustHold(t, b, "one", "second")
	mustHold(t, b, "two", "other")
}

func deletes(t *testing.T, a, b envelope.Store) {
	mustBe(t, "Delete of nothing", a.Delete(t.Context(), "one", ""), errdefs.ErrConflict)
	must(t, "Create", a.Create(t.Context(), "one", []byte("first")))
	v1 := mustHold(t, a, "one", "first")
	must(t, "Replace", a.Replace(t.Context(), "one", []byte("second"), v1))
	mustBe(t, "Delete of an older version", b.Delete(t.Context(), "one", v1), errdefs.ErrConflict)
	v2 := mustHold(t, b, "one", "second")
	must(t, "Delete", b.Delete(t.Context(), "one", v2))
	_, _, err := a.Read(t.Context(), "one")
	mustBe(t, "Read of a deleted object", err, errdefs.ErrNotFound)
	mustBe(t, "Replace of a deleted object", a.Replace(t.Context(), "one", []byte("x"), v2), errdefs.ErrConflict)
	must(t, "Create after Delete", a.Create(t.Context(), "one", []byte("anew")))
	mustHold(t, b, "one", "anew")
}

func sizes(t *testing.T, a, b envelope.Store) {
	whole := strings.Repeat("x", envelope.MaxObject)
	must(t, "Create of MaxObject bytes", a.Create(t.Context(), "one", []byte(whole)))
	v := mustHold(t, b, "one", whole)
	mustBe(t, "Create of too much", a.Create(t.Context(), "two", []byte(whole+"x")), errdefs.ErrInvalid)
	mustBe(t, "Replace by too much", a.Replace(t.Context(), "one", []byte(whole+"x"), v), errdefs.ErrInvalid)
	must(t, "Create of nothing", a.Create(t.Context(), "empty", nil))
	mustHold(t, b, "empty", "")
}

func names(t *testing.T, a, b envelope.Store) {
	for _, bad := range []string{"", ".", "..", "/", "a/b", "../a", "A", "1", "-a", "a.b", "a b", "ä", "a\x00", strings.Repeat("a", 101)} {
		what := fmt.Sprintf("(%q)", bad)
		mustBe(t, "Create"+what, a.Create(t.Context(), bad, nil), errdefs.ErrInvalid)
		_, _, err := a.Read(t.Context(), bad)
		mustBe(t, "Read"+what, err, errdefs.ErrInvalid)
		mustBe(t, "Replace"+what, a.Replace(t.Context(), bad, nil, ""), errdefs.ErrInvalid)
		mustBe(t, "Delete"+what, a.Delete(t.Context(), bad, ""), errdefs.ErrInvalid)
	}
	for _, good := range []string{"a", "a-1", envelope.ObjectName("driver/volume"), strings.Repeat("a", 100)} {
		must(t, "Create", a.Create(t.Context(), good, []byte(good)))
		mustHold(t, b, good, good)
	}
}

// pages reads all pages and returns their names, in order.
func pages(t *testing.T, s envelope.Store, limit int) (all []string) {
	t.Helper()
	token := ""
	for range 100 {
		page, next, err := s.List(t.Context(), token, limit)
		must(t, "List", err)
		if len(page) > limit {
			t.Fatalf("a page of %d names, the limit is %d", len(page), limit)
		}
		all = append(all, page...)
		if next == "" {
			return all
		}
		token = next
	}
	t.Fatal("List does not end")
	return nil
}

func list(t *testing.T, a, b envelope.Store) {
	if got := pages(t, a, 10); len(got) != 0 {
		t.Errorf("an empty store lists %q", got)
	}
	var want []string
	for n := range 10 {
		name := fmt.Sprintf("dek-%d", (n*7)%10)
		must(t, "Create", a.Create(t.Context(), name, nil))
		want = append(want, name)
	}
	slices.Sort(want)
	for _, limit := range []int{1, 3, 5, 9, 10, 11, 1000} {
		if diff := cmp.Diff(want, pages(t, b, limit)); diff != "" {
			t.Errorf("List by %d: (-want +got)\n%s", limit, diff)
		}
	}
	// What stays is seen once, whatever is made and deleted between two pages.
	first, next, err := a.List(t.Context(), "", 4)
	must(t, "List", err)
	must(t, "Delete", b.Delete(t.Context(), want[3], mustHold(t, b, want[3], "")))
	must(t, "Create", b.Create(t.Context(), "a", nil))
	rest, _, err := a.List(t.Context(), next, 100)
	must(t, "List", err)
	if diff := cmp.Diff(want, append(first, rest...)); diff != "" {
		t.Errorf("List while others write: (-want +got)\n%s", diff)
	}
}

func cancelled(t *testing.T, a, b envelope.Store) {
	must(t, "Create", a.Create(t.Context(), "one", []byte("first")))
	v := mustHold(t, a, "one", "first")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, readErr := a.Read(ctx, "one")
	_, _, listErr := a.List(ctx, "", 10)
	for op, err := range map[string]error{
		"Create": a.Create(ctx, "two", nil), "Read": readErr, "List": listErr,
		"Replace": a.Replace(ctx, "one", nil, v), "Delete": a.Delete(ctx, "one", v),
	} {
		mustBe(t, op+" with a cancelled context", err, context.Canceled)
	}
	mustHold(t, b, "one", "first")
	_, _, err := b.Read(t.Context(), "two")
	mustBe(t, "Read of what was not created", err, errdefs.ErrNotFound)
}

// racers is how many callers meet in the races.
const racers = 64

// race runs f concurrently on both handles, as many times as there are racers.
func race(a, b envelope.Store, f func(n int, s envelope.Store)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for n := range racers {
		wg.Go(func() { <-start; f(n, []envelope.Store{a, b}[n%2]) })
	}
	close(start)
	wg.Wait()
}

func createRace(t *testing.T, a, b envelope.Store) {
	for round := range 4 {
		name := fmt.Sprintf("race-%d", round)
		var mu sync.Mutex
		var won []string
		race(a, b, func(n int, s envelope.Store) {
			mine := fmt.Sprintf("racer-%d", n)
			err := s.Create(t.Context(), name, []byte(mine))
			if err != nil && !errors.Is(err, errdefs.ErrExists) {
				t.Errorf("Create: %v", err)
			}
			data, _, readErr := s.Read(t.Context(), name)
			if readErr != nil || err == nil && string(data) != mine {
				t.Errorf("%s created (%v) and reads %q, %v", mine, err, data, readErr)
			}
			if err == nil {
				mu.Lock()
				won = append(won, mine)
				mu.Unlock()
			}
		})
		if len(won) != 1 {
			t.Fatalf("%d racers created the object: %q", len(won), won)
		}
		mustHold(t, a, name, won[0])
	}
}

// replaceRace counts by compare-and-swap: no step may be lost.
func replaceRace(t *testing.T, a, b envelope.Store) {
	const steps = 5 // of each racer
	must(t, "Create", a.Create(t.Context(), "count", nil))
	race(a, b, func(_ int, s envelope.Store) {
		for range steps {
			for {
				data, v, err := s.Read(t.Context(), "count")
				if err == nil {
					err = s.Replace(t.Context(), "count", append(bytes.Clone(data), 'x'), v)
				}
				if err == nil {
					break
				}
				if !errors.Is(err, errdefs.ErrConflict) {
					t.Errorf("counting: %v", err)
					return
				}
			}
		}
	})
	mustHold(t, a, "count", strings.Repeat("x", racers*steps))
}

// neverHalf reads while others write: every read gives one whole object.
func neverHalf(t *testing.T, a, b envelope.Store) {
	fill := func(c byte) []byte { return bytes.Repeat([]byte{c}, 16<<10) }
	var writers, readers sync.WaitGroup
	done := make(chan struct{})
	for range 4 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				data, _, err := b.Read(t.Context(), "big")
				if errors.Is(err, errdefs.ErrNotFound) {
					continue
				}
				if err != nil || len(data) == 0 || !bytes.Equal(data, fill(data[0])) {
					t.Errorf("a reader got half an object: %d bytes, %v", len(data), err)
					return
				}
			}
		})
	}
	writers.Go(func() {
		if err := a.Create(t.Context(), "big", fill('a')); err != nil {
			t.Errorf("Create: %v", err)
			return
		}
		for n := range 20 {
			_, v, err := a.Read(t.Context(), "big")
			if err == nil {
				err = a.Replace(t.Context(), "big", fill(byte('b'+n)), v)
			}
			if err != nil {
				t.Errorf("Replace: %v", err)
			}
		}
	})
	writers.Wait()
	close(done)
	readers.Wait()
}
