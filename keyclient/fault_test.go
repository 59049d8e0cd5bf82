package keyclient_test

import (
	"context"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// steps are a volume's life, in order; each is one call.
func steps(c *keyclient.Client, uuid string) []struct {
	name string
	call func(context.Context) error
} {
	return []struct {
		name string
		call func(context.Context) error
	}{
		{"CreateDEK", func(ctx context.Context) error {
			d, err := c.CreateDEK(ctx, id, spec())
			d.Wipe()
			return err
		}},
		{"ClaimFormat", func(ctx context.Context) error {
			got, err := c.ClaimFormat(ctx, id, dek.Claim{Node: "node-a", UUID: uuid})
			if err == nil && got.UUID != uuid {
				return errdefs.Errorf(errdefs.ErrState, "another claim holds: %+v", got)
			}
			return err
		}},
		{"ConfirmDEK", func(ctx context.Context) error {
			return c.ConfirmDEK(ctx, id, dek.HeaderID{UUID: uuid, Sequence: 3})
		}},
		{"GetDEK", func(ctx context.Context) error {
			d, err := c.GetDEK(ctx, id)
			defer d.Wipe()
			if err == nil && (d.State != dek.Formatted || d.Header.Sequence != 3) {
				return errdefs.Errorf(errdefs.ErrState, "the DEK is %+v", d)
			}
			return err
		}},
		{"RewrapDEK", func(ctx context.Context) error { return c.RewrapDEK(ctx, id) }},
		{"DeleteDEK", func(ctx context.Context) error { return c.DeleteDEK(ctx, id) }},
	}
}

// TestLostAnswers: each change is made and its answer lost, by an error in its
// place and by the death of the server.
func TestLostAnswers(t *testing.T) {
	t.Run("an error instead", func(t *testing.T) {
		var seen calls
		c, s, _ := unixClient(t, keyclient.Config{Observe: seen.observe})
		lost := false
		s.intercept = func(ctx context.Context, _ string, call func(context.Context) (any, error)) (any, error) {
			a, err := call(ctx)
			if lost = !lost; lost {
				return nil, status.Error(codes.Unavailable, "the answer is lost")
			}
			return a, err
		}
		s.start()
		for _, step := range steps(c, dek.NewUUID()) {
			must(t, step.name, step.call(t.Context()))
			if got := seen.codes(); !slices.Equal(got, []string{"Unavailable", "OK"}) {
				t.Errorf("%s: attempts %v", step.name, got)
			}
		}
	})
	t.Run("killed", func(t *testing.T) {
		var seen calls
		c, s, _ := unixClient(t, keyclient.Config{Observe: seen.observe})
		done := make(chan struct{})
		deadly := true
		s.intercept = func(ctx context.Context, _ string, call func(context.Context) (any, error)) (any, error) {
			a, err := call(ctx)
			if deadly {
				done <- struct{}{}
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return a, err
		}
		s.start()
		for _, step := range steps(c, dek.NewUUID()) {
			answer := make(chan error, 1)
			deadly = true
			go func() { answer <- step.call(context.Background()) }()
			<-done
			s.kill()
			deadly = false
			s.start()
			must(t, step.name, <-answer)
			if got := seen.codes(); got[0] == "OK" || got[len(got)-1] != "OK" {
				t.Errorf("%s: attempts %v", step.name, got)
			}
		}
	})
}

// hanging is an interceptor that never answers.
func hanging(ctx context.Context, _ string, _ func(context.Context) (any, error)) (any, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestSlowServer(t *testing.T) {
	var seen calls
	c, s, _ := unixClient(t, keyclient.Config{Timeout: 30 * time.Millisecond, Attempts: 2, Observe: seen.observe})
	s.intercept = hanging
	s.start()
	mustBe(t, "with time left", c.RewrapDEK(t.Context(), id), errdefs.ErrUnavailable, s.address(), "no answer after")
	if got := seen.codes(); !slices.Equal(got, []string{"DeadlineExceeded", "DeadlineExceeded"}) {
		t.Errorf("attempts %v", got)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer func() { cancel() }()
	mustBe(t, "with no time left", c.RewrapDEK(ctx, id), context.DeadlineExceeded, s.address())
	if got := seen.codes(); len(got) > 1 {
		t.Errorf("attempts %v", got)
	}

	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(5*time.Millisecond, cancel)
	mustBe(t, "cancelled", c.RewrapDEK(ctx, id), context.Canceled)
	seen.codes()
	mustBe(t, "cancelled before", c.RewrapDEK(ctx, id), context.Canceled)
	if got := seen.codes(); got != nil {
		t.Errorf("attempts %v", got)
	}
}

// TestCallersDeadlineEndsRetries: the pauses between attempts end with it.
func TestCallersDeadlineEndsRetries(t *testing.T) {
	c, s, _ := unixClient(t, keyclient.Config{Backoff: time.Hour})
	s.intercept = func(context.Context, string, func(context.Context) (any, error)) (any, error) {
		return nil, status.Error(codes.Unavailable, "sealed")
	}
	s.start()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := c.RewrapDEK(ctx, id)
	mustBe(t, "RewrapDEK", err, context.DeadlineExceeded, "at last", "sealed")
	if errdefs.Class(err) != nil {
		t.Errorf("%v has a class besides ctx's", err)
	}
}

// TestNobodyThere: a Service of which every replica is sealed refuses
// connections, so the message says what to look at.
func TestNobodyThere(t *testing.T) {
	c, s, _ := unixClient(t, keyclient.Config{Timeout: 300 * time.Millisecond, Attempts: 2})
	mustBe(t, "RewrapDEK", c.RewrapDEK(t.Context(), id), errdefs.ErrUnavailable, s.address(), "no such file", "ready and unsealed?")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	mustBe(t, "RewrapDEK with a deadline", c.RewrapDEK(ctx, id), context.DeadlineExceeded, s.address())
}

// TestNoGRPC: what listens there answers, but not as a key service does.
func TestNoGRPC(t *testing.T) {
	for name, words := range map[string]string{
		"HTTP 1":  "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes",
		"garbage": strings.Repeat("\x00\xff", 1000),
		"nothing": "",
	} {
		t.Run(name, func(t *testing.T) {
			lis, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, "Listen", err)
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					conn, err := lis.Accept()
					if err != nil {
						return
					}
					_, _ = io.WriteString(conn, words)
					conn.Close()
				}
			}()
			defer func() { lis.Close(); <-done }()
			c := open(t, keyclient.Config{Address: "dns:///" + lis.Addr().String(), Timeout: 50 * time.Millisecond, Attempts: 2})
			mustBe(t, "RewrapDEK", c.RewrapDEK(t.Context(), id), errdefs.ErrUnavailable, lis.Addr().String())
		})
	}
}

// TestSealedThenUnsealed: the words of a sealed key service reach the caller,
// and once it is unsealed the same client works.
func TestSealedThenUnsealed(t *testing.T) {
	c, s, _ := unixClient(t, keyclient.Config{Attempts: 2})
	sealed := true
	s.intercept = func(ctx context.Context, _ string, call func(context.Context) (any, error)) (any, error) {
		if sealed {
			return nil, status.Error(codes.Unavailable, "the key service is sealed: an operator has to unseal it")
		}
		return call(ctx)
	}
	s.start()
	_, err := c.CreateDEK(t.Context(), id, spec())
	mustBe(t, "CreateDEK", err, errdefs.ErrUnavailable, "sealed: an operator has to unseal it")
	if strings.Contains(err.Error(), "ready and unsealed?") {
		t.Errorf("the server has said what is wrong: %v", err)
	}
	sealed = false
	d, err := c.CreateDEK(t.Context(), id, spec())
	must(t, "CreateDEK once it is unsealed", err)
	d.Wipe()
}

// TestKMSAway: classes of errors come through from behind the key service.
func TestKMSAway(t *testing.T) {
	backend := kmstest.NewBackend()
	store, err := envelope.LocalStores().Open(t.Context(), "mem://")
	must(t, "Open", err)
	ring, err := envelope.New([]*kms.KEK{kms.New("fake", backend, kms.Options{})}, []envelope.Store{store}, envelope.Options{Attempts: 1})
	must(t, "New", err)
	defer ring.Close()
	c := open(t, keyclient.Config{Address: newServer(t, "unix", nil, &service{ring: ring}).start().address(), Attempts: 2})
	d, err := c.CreateDEK(t.Context(), id, spec())
	must(t, "CreateDEK", err)
	d.Wipe()
	for _, class := range []error{errdefs.ErrUnavailable, errdefs.ErrDenied, errdefs.ErrCorrupt} {
		backend.SetFault(func(string) error { return errdefs.Errorf(class, "the KMS's words") })
		_, err := c.GetDEK(t.Context(), id)
		mustBe(t, "GetDEK", err, class, "the KMS's words")
	}
}
