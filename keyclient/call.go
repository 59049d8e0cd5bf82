package keyclient

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

// The codes that mean something else here than errgrpc says, by gRPC's names.
const (
	codeExhausted       = "ResourceExhausted"
	codeUnavailable     = "Unavailable"
	codeUnauthenticated = "Unauthenticated"
	codeUnimplemented   = "Unimplemented"
	codeCanceled        = "Canceled"
	codeDeadline        = "DeadlineExceeded"
)

// errClosed is what calls get after Close.
var errClosed = errdefs.Errorf(errdefs.ErrUnavailable, "the client was closed")

// operation is one attempt of a method: it asks over conn, and checks and keeps
// the answer. Its errors have a gRPC status, or a class where the answer was bad.
type operation func(ctx context.Context, conn *connection) error

// call runs op until it succeeds, fails for good, or has been tried often
// enough. Its errors name the key service.
func (c *Client) call(ctx context.Context, method string, attempts int, timeout time.Duration, op operation) error {
	for attempt := 1; ; attempt++ {
		err := ctx.Err()
		if err == nil {
			err = c.attempt(ctx, method, attempt, timeout, op)
		}
		again := errors.Is(err, errdefs.ErrUnavailable) && !errors.Is(err, errClosed)
		switch {
		case err == nil:
			return nil
		case again && ctx.Err() == nil && attempt < attempts && sleep(ctx, c.pause(attempt)):
			continue
		case again && ctx.Err() != nil:
			err = fmt.Errorf("%w (at last: %s)", ctx.Err(), err.Error()) // of ctx's class alone
		}
		return fmt.Errorf("key service at %s: %s: %w", c.cfg.Address, method, err)
	}
}

// pause is how long to wait after that many failures.
func (c *Client) pause(failures int) time.Duration {
	longest := c.cfg.Backoff << min(failures-1, 10)
	return longest/2 + rand.N(longest/2+1)
}

// sleep says whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// attempt runs op once within timeout, tells Observe, and returns its error by
// class.
func (c *Client) attempt(ctx context.Context, method string, attempt int, timeout time.Duration, op operation) error {
	conn, err := c.acquire()
	if err != nil {
		return err
	}
	defer c.release(conn)
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	err = op(bounded, conn)
	took := time.Since(start)
	code := status.Code(errgrpc.ToGRPC(err)).String()
	c.cfg.Observe(Call{Method: method, Code: code, Duration: took, Attempt: attempt})
	if err == nil || errdefs.Class(err) != nil {
		return err
	}
	err = c.classify(ctx, err, code, took, conn)
	if errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, errdefs.ErrDenied) {
		err = c.withProblems(err, conn)
	}
	return err
}

// classify gives the status of a failed call the class that it has for a
// caller with that ctx.
func (c *Client) classify(ctx context.Context, err error, code string, took time.Duration, conn *connection) error {
	said := status.Convert(err).Message()
	switch code {
	case codeUnauthenticated:
		return errdefs.Errorf(errdefs.ErrDenied, "it does not know who asks: %s; it was shown %s", said, c.shown(conn))
	case codeExhausted:
		return errdefs.Errorf(errdefs.ErrUnavailable, "it is too busy: %s", said)
	case codeUnimplemented:
		return errdefs.Errorf(errdefs.ErrInvalid, "it does not offer that (%s): is it a key service, and of a version as new as ours?", said)
	case codeUnavailable:
		return errdefs.Errorf(errdefs.ErrUnavailable, "%s%s", said, unanswered(conn))
	case codeCanceled, codeDeadline:
		// The caller still waits: it was our time for one attempt, or the
		// key service's own, or a server that stops.
		if ctx.Err() == nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "no answer after %v: %s", took.Round(time.Millisecond), said+c.refused(conn)+unanswered(conn))
		}
	}
	return errgrpc.FromGRPC(err)
}

// unanswered says what to look at where nobody answers at the address. A
// Service of Kubernetes refuses connections while no pod behind it is ready.
func unanswered(conn *connection) string {
	if conn.conn.GetState() != connectivity.TransientFailure {
		return ""
	}
	return "; is the key service running, ready and unsealed? One that waits for key-service unseal is not reached through a Service"
}

// refused says whom the key service may not want to see, where there is no
// connection: TLS 1.3 closes it without telling us reliably.
func (c *Client) refused(conn *connection) string {
	if c.cfg.CAFile == "" || conn.conn.GetState() == connectivity.Ready {
		return ""
	}
	return "; not connected, to be shown " + c.shown(conn)
}

// shown says which identity the key service was shown, without any secret.
func (c *Client) shown(conn *connection) string {
	var what []string
	if crt := conn.certificate; crt != nil {
		what = append(what, fmt.Sprintf("the certificate in %s (subject %q, URIs %q, valid until %s)", c.cfg.CertFile, crt.Subject, crt.URIs, crt.NotAfter.UTC().Format(time.RFC3339)))
	}
	if c.token != nil {
		what = append(what, "the token in "+c.cfg.TokenFile)
	}
	if what == nil {
		return "neither a certificate nor a token, because none is configured"
	}
	return strings.Join(what, " and ")
}

// withProblems adds to err what is known to be wrong with our own files.
func (c *Client) withProblems(err error, conn *connection) error {
	var problems []string
	c.mu.Lock()
	if c.fileErr != nil {
		problems = append(problems, "files changed and cannot be used: "+c.fileErr.Error())
	}
	c.mu.Unlock()
	if c.token != nil {
		if problem := c.token.problem(); problem != nil {
			problems = append(problems, problem.Error())
		}
	}
	if crt := conn.certificate; crt != nil && time.Now().After(crt.NotAfter) {
		problems = append(problems, fmt.Sprintf("our certificate in %s expired at %s", c.cfg.CertFile, crt.NotAfter.UTC().Format(time.RFC3339)))
	}
	if problems == nil {
		return err
	}
	return fmt.Errorf("%w (%s)", err, strings.Join(problems, "; "))
}
