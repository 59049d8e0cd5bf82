package keyservice_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// gate holds GetDEK until it is opened.
type gate struct {
	entered chan struct{} // one for each GetDEK that came
	open    chan struct{}
	ended   chan error // how the context of a GetDEK ended that was not let through
}

func newGate() *gate {
	return &gate{entered: make(chan struct{}, 1000), open: make(chan struct{}), ended: make(chan error, 1000)}
}

func (g *gate) hold(ctx context.Context, _ dek.ID) error {
	g.entered <- struct{}{}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		g.ended <- ctx.Err()
		return ctx.Err()
	}
}

// until waits for what another goroutine brings about.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never seen: %s", what)
		}
	}
}

// TestSharedReads: many callers of one DEK cost two reads: the one under way
// when they came, and one that began after.
func TestSharedReads(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); w.keys.get = g.hold })
	key := w.create(t, vol)
	c := w.as(t, node)
	const callers = 12 // of one connection
	var wg sync.WaitGroup
	ask := func(n int) {
		for range n {
			wg.Go(func() {
				_, got, err := c.get(t.Context(), vol)
				if err != nil || !bytes.Equal(got, key) {
					t.Errorf("GetDEK: %v, or another key", err)
				}
			})
		}
	}
	ask(1)
	<-g.entered
	ask(callers - 1)
	until(t, "all callers", func() bool { return w.srv.Sharing(vol) == callers-1 })
	close(g.open)
	wg.Wait()
	if n := w.keys.calls.Load(); n != 2 {
		t.Errorf("%d callers cost %d reads, want 2", callers, n)
	}
	if n := len(w.audit.take(t)); n != callers {
		t.Errorf("%d audit lines for %d calls", n, callers)
	}
}

// TestOneCallersEndIsNotTheOthers: who goes away ends nothing for the others;
// when all have gone the read ends.
func TestOneCallersEndIsNotTheOthers(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); w.keys.get = g.hold })
	w.create(t, vol)
	c := w.as(t, node)
	first, cancelFirst := context.WithCancel(t.Context())
	second, cancelSecond := context.WithCancel(t.Context())
	answers := make(chan error, 3)
	get := func(ctx context.Context) { _, _, err := c.get(ctx, vol); answers <- err }
	go get(first)
	<-g.entered // the read that only the first one waits for
	go get(second)
	go get(t.Context())
	until(t, "three callers", func() bool { return w.srv.Sharing(vol) == 2 })
	cancelFirst()
	mustCode(t, "the first", <-answers, codes.Canceled)
	if err := <-g.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the read that nobody waits for ended with %v", err)
	}
	<-g.entered // the read of the two others
	cancelSecond()
	mustCode(t, "the second", <-answers, codes.Canceled)
	close(g.open)
	must(t, "the third", <-answers)
}

// TestNobodyIsToldWhatWas: a read that began before a change is not shared with
// who asks after it.
func TestNobodyIsToldWhatWas(t *testing.T) {
	release, entered := make(chan struct{}), make(chan struct{}, 1)
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		cfg.Keys = &slowAnswer{Keys: w.ring, release: release, entered: entered}
	})
	w.create(t, vol)
	c := w.as(t, node)
	type answer struct {
		a   *keyservicev1.DEK
		err error
	}
	old, fresh := make(chan answer, 1), make(chan answer, 1)
	go func() { a, _, err := c.get(t.Context(), vol); old <- answer{a, err} }()
	<-entered // it has read "prepared" and is slow to say so
	uuid := dek.NewUUID()
	_, err := w.ring.ClaimFormat(t.Context(), vol, dek.Claim{Node: nodeName, UUID: uuid})
	must(t, "ClaimFormat", err)
	must(t, "ConfirmDEK", w.ring.ConfirmDEK(t.Context(), vol, dek.HeaderID{UUID: uuid}))
	go func() { a, _, err := c.get(t.Context(), vol); fresh <- answer{a, err} }()
	until(t, "both callers", func() bool { running, _ := w.srv.Load(); return running == 2 && w.srv.Sharing(vol) == 1 })
	close(release)
	if a := <-old; a.err != nil || a.a.GetState() != "prepared" {
		t.Errorf("who asked before: %v, %v", a.a, a.err)
	}
	if a := <-fresh; a.err != nil || a.a.GetState() != "formatted" {
		t.Errorf("who asked after the change was told %v, %v", a.a, a.err)
	}
}

// slowAnswer reads at once and answers later.
type slowAnswer struct {
	keyservice.Keys
	release chan struct{}
	entered chan struct{}
}

func (s *slowAnswer) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	d, err := s.Keys.GetDEK(ctx, id)
	select {
	case s.entered <- struct{}{}:
	default:
	}
	<-s.release
	return d, err
}

// TestComingAfterWhoLeft: who waits for the next read and leaves takes it away
// from nobody who comes after.
func TestComingAfterWhoLeft(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); w.keys.get = g.hold })
	w.create(t, vol)
	c := w.as(t, node)
	answers := make(chan error, 2)
	go func() { _, _, err := c.get(t.Context(), vol); answers <- err }()
	<-g.entered
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() { _, _, err := c.get(ctx, vol); left <- err }()
	until(t, "one who waits for the next", func() bool { return w.srv.Sharing(vol) == 1 })
	cancel()
	mustCode(t, "who left", <-left, codes.Canceled)
	until(t, "nobody who waits", func() bool { return w.srv.Sharing(vol) == 0 })
	go func() { _, _, err := c.get(t.Context(), vol); answers <- err }()
	until(t, "another who waits for the next", func() bool { return w.srv.Sharing(vol) == 1 })
	close(g.open)
	for range 2 {
		must(t, "who stayed", <-answers)
	}
}

func TestAPanicIsOneFailedRead(t *testing.T) {
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		w.keys.get = func(context.Context, dek.ID) error {
			if w.keys.calls.Load() == 1 {
				panic("a bug")
			}
			return nil
		}
	})
	w.create(t, vol)
	c := w.as(t, node)
	_, _, err := c.get(t.Context(), vol)
	mustCode(t, "GetDEK", err, codes.Internal)
	if strings.Contains(err.Error(), "a bug") || !strings.Contains(w.log.String(), "a bug") {
		t.Errorf("the panic is in the answer (%v) or not in the log", err)
	}
	_, _, err = c.get(t.Context(), vol)
	must(t, "the GetDEK after it", err)
}

// TestOwnDeadline: where the service gives up before its caller, the caller
// may come again.
func TestOwnDeadline(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		cfg.Timeout = time.Second // long enough to get as far as the store
		w.keys.get = g.hold
	})
	w.create(t, vol)
	c := w.as(t, node)
	_, _, err := c.get(t.Context(), vol)
	mustCode(t, "our deadline", err, codes.Unavailable)
	if err := <-g.ended; err == nil {
		t.Error("the read did not end")
	}
}

func TestCallersDeadline(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); w.keys.get = g.hold })
	w.create(t, vol)
	c := w.as(t, node)
	// Longer each time, until the read has begun by then: a machine may be slow.
	for patience := 50 * time.Millisecond; len(g.entered) == 0; patience *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		_, _, err := c.get(ctx, vol)
		cancel()
		mustCode(t, "the caller's deadline", err, codes.DeadlineExceeded)
	}
	if err := <-g.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the read ended with %v", err)
	}
}

// TestTooManyCalls: two are worked on, one waits, the next is sent away at once,
// and an operator gets through.
func TestTooManyCalls(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) {
		cfg.Policy.Any = true
		cfg.MaxInFlight, cfg.MaxWaiting = 2, 1
		w.keys.get = g.hold
	})
	c := w.as(t, "somebody")
	answers := make(chan error, 4)
	for _, id := range []dek.ID{"d/1", "d/2", "d/3"} {
		w.create(t, id)
		go func() { _, _, err := c.get(t.Context(), id); answers <- err }()
	}
	until(t, "two running, one waiting", func() bool { running, waiting := w.srv.Load(); return running == 2 && waiting == 1 })
	// Nobody leaves meanwhile, so it is sent away at once or at the end of its time.
	_, _, err := c.get(t.Context(), "d/4")
	mustCode(t, "one too many", err, codes.ResourceExhausted)
	_, err = c.Status(t.Context(), &keyservicev1.StatusRequest{})
	must(t, "Status of a busy service", err)
	close(g.open)
	for range 3 {
		must(t, "one of the three", <-answers)
	}
	if running, waiting := w.srv.Load(); running != 0 || waiting != 0 {
		t.Errorf("%d running and %d waiting when all is done", running, waiting)
	}
}

// TestWaitingEndsWithTheCaller: who waits for a turn and leaves takes none.
func TestWaitingEndsWithTheCaller(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) {
		cfg.Policy.Any = true
		cfg.MaxInFlight = 1
		w.keys.get = g.hold
	})
	w.create(t, vol)
	c := w.as(t, "somebody")
	answers := make(chan error, 1)
	go func() { _, _, err := c.get(t.Context(), vol); answers <- err }()
	<-g.entered
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, _, err := c.get(ctx, "d/2")
	mustCode(t, "who waited", err, codes.DeadlineExceeded)
	until(t, "nobody waiting", func() bool { _, waiting := w.srv.Load(); return waiting == 0 })
	close(g.open)
	must(t, "who was before", <-answers)
}

// TestStoppedMidCall: the caller may come again, elsewhere, and what the call
// did ends.
func TestStoppedMidCall(t *testing.T) {
	g := newGate()
	w := start(t, func(w *world, cfg *keyservice.Config) { roles(w, cfg); w.keys.get = g.hold })
	w.create(t, vol)
	c := w.as(t, node)
	answer := make(chan error, 1)
	go func() { _, _, err := c.get(t.Context(), vol); answer <- err }()
	<-g.entered
	w.stop()
	if err := <-answer; status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
		t.Errorf("the call in flight: %v", err)
	}
	if err := <-g.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the read ended with %v", err)
	}
}

// TestFailuresKeepTheirClass: what Keys say goes through.
func TestFailuresKeepTheirClass(t *testing.T) {
	fail := errdefs.ErrUnavailable
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		w.keys.get = func(context.Context, dek.ID) error { return errdefs.Errorf(fail, "the KMS said so") }
	})
	c := w.as(t, node)
	for class, want := range map[error]codes.Code{
		errdefs.ErrUnavailable: codes.Unavailable, errdefs.ErrCorrupt: codes.DataLoss,
		errdefs.ErrDenied: codes.PermissionDenied, errdefs.ErrState: codes.FailedPrecondition,
	} {
		fail = class
		_, _, err := c.get(t.Context(), vol)
		mustCode(t, "GetDEK", err, want)
		if !strings.Contains(err.Error(), "the KMS said so") {
			t.Errorf("the words are lost: %v", err)
		}
	}
}

// keeper remembers every key that was handed to the server.
type keeper struct {
	keyservice.Keys
	mu  sync.Mutex
	got []dek.DEK
}

func (k *keeper) keep(d dek.DEK, err error) (dek.DEK, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.got = append(k.got, d)
	return d, err
}

func (k *keeper) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	return k.keep(k.Keys.GetDEK(context.WithoutCancel(ctx), id))
}

func (k *keeper) CreateDEK(ctx context.Context, id dek.ID, s dek.Spec) (dek.DEK, error) {
	return k.keep(k.Keys.CreateDEK(ctx, id, s))
}

// TestKeysAreWiped: nothing is kept after the answer, whoever had left by then.
func TestKeysAreWiped(t *testing.T) {
	g := newGate()
	n := &notes{at: map[dek.ID]dek.HeaderID{}}
	var k *keeper
	w := start(t, func(w *world, cfg *keyservice.Config) {
		k = &keeper{Keys: w.ring}
		cfg.Keys = &hooked{Keys: k, get: func(ctx context.Context, id dek.ID) error {
			if id == "d/abandoned" {
				g.entered <- struct{}{}
				<-g.open // reads on although nobody waits any more
			}
			return nil
		}}
		cfg.Policy.Any, cfg.Notes = true, n
	})
	h := w.format(t, vol)
	w.create(t, "d/abandoned")
	c := w.as(t, node)
	n.at[vol] = h
	_, _, err := c.get(t.Context(), vol)
	must(t, "GetDEK", err)
	_, err = c.ConfirmDEK(t.Context(), &keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: &keyservicev1.Header{Uuid: h.UUID, Sequence: 6}})
	must(t, "ConfirmDEK", err)
	_, err = c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec()})
	must(t, "CreateDEK", err)
	_, err = c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec(), Recipient: publicKey(t)})
	must(t, "CreateDEK with a recipient", err)
	n.at[vol] = dek.HeaderID{UUID: h.UUID, Sequence: 100}
	_, _, err = c.get(t.Context(), vol)
	mustCode(t, "GetDEK of a rolled-back one", err, codes.FailedPrecondition)
	n.at[vol] = h
	_, err = c.GetDEK(t.Context(), &keyservicev1.GetDEKRequest{Id: string(vol), Recipient: make([]byte, 32)})
	mustCode(t, "GetDEK for a bad recipient", err, codes.InvalidArgument)

	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() { _, _, err := c.get(ctx, "d/abandoned"); gone <- err }()
	<-g.entered
	cancel()
	mustCode(t, "who went away", <-gone, codes.Canceled)
	until(t, "nobody at work", func() bool { running, _ := w.srv.Load(); return running == 0 })
	close(g.open)
	until(t, "the end of the abandoned read", func() bool { return w.srv.Idle("d/abandoned") })
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, d := range k.got {
		if d.Key.Len() != 0 || d.Previous.Len() != 0 {
			t.Errorf("key %d of %d was not wiped", i, len(k.got))
		}
	}
	if len(k.got) != 9 {
		t.Errorf("%d keys were looked at, want 9", len(k.got))
	}
}
