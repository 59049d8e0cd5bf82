package keyservice

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

// Decision is what was decided about one request and what came of it.
type Decision struct {
	Method  string // e.g. "GetDEK"
	Who     Identity
	DEK     string // its ID as the request has it; "" where the method has none
	Source  string // whose key goes into it; "" where it is no copy
	Allowed bool   // the caller may; whether it worked is Code's to say
	Reason  string // why it was not allowed, or did not work
	Code    string // gRPC's name of the answer's code
	Took    time.Duration
}

// maxLogged bounds what the audit log repeats of a bad request, in bytes: no
// good ID is longer.
const maxLogged = dek.MaxID

// call is one request on its way through the server.
type call struct {
	*Server
	Decision
	start time.Time
	turn  bool // it is among those that are worked on
}

// serve takes a request about a DEK through identification, do, and the audit
// log, and returns the answer as gRPC has it. do calls one of c's may methods
// before anything else but looking at the request, and work before it asks for
// keys: nobody waits in the queue, or makes others wait there, who may not.
func serve[Answer any](ctx context.Context, s *Server, method, id string, do func(ctx context.Context, c *call) (Answer, error)) (Answer, error) {
	c := &call{Server: s, Decision: Decision{Method: method, DEK: id}, start: time.Now()}
	bounded, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	defer c.leave()
	return answer(ctx, bounded, c, do)
}

// answer is serve without a turn. bounded is ctx with a deadline.
func answer[Answer any](ctx, bounded context.Context, c *call, do func(ctx context.Context, c *call) (Answer, error)) (Answer, error) {
	var none Answer
	var err error
	if c.Who, c.Reason, err = c.identify(bounded); err != nil {
		return none, c.end(ctx, err)
	}
	got, err := do(bounded, c)
	if err = c.end(ctx, err); err != nil {
		return none, err
	}
	return got, nil
}

// work waits for the call's turn, of which it has one, and returns what it works
// with; ErrUnavailable while sealed.
func (c *call) work(ctx context.Context) (Keys, error) {
	keys, err := c.keys()
	if err != nil || c.turn {
		return keys, err
	}
	if err := c.limit.enter(ctx); err != nil {
		return nil, err
	}
	c.turn = true
	return keys, nil
}

func (c *call) leave() {
	if c.turn {
		c.limit.leave()
	}
}

// end writes the audit line, before the answer leaves the process, and returns
// the answer's error. Nothing is handed out of which no line could be written.
func (c *call) end(ctx context.Context, err error) error {
	if err != nil && c.Reason == "" {
		c.Reason = err.Error()
	}
	err = errgrpc.ToGRPC(c.late(ctx, err))
	if status.Code(err) == codes.NotFound && !c.Allowed {
		err = errgrpc.ToGRPC(c.refusal())
	}
	c.Code, c.Took = status.Code(err).String(), time.Since(c.start)
	if lost := c.audit(ctx); lost != nil {
		c.cfg.Logger.Error("the audit log cannot be written, so nothing is handed out", "error", lost)
		if err == nil {
			err = errgrpc.ToGRPC(errdefs.Errorf(errdefs.ErrUnavailable, "the key service cannot write its audit log, so it hands out nothing: call again later"))
			c.Code = status.Code(err).String()
		}
	}
	c.cfg.Observe(c.Decision)
	return err
}

// late tells our own deadline from the caller's: where only ours is over, the
// caller may call again.
func (c *call) late(ctx context.Context, err error) error {
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%s took the key service too long, so it gave up: call again", c.Method)
	}
	return err
}

// audit writes the line. slog's Logger would drop the handler's error.
func (c *call) audit(ctx context.Context) error {
	level := slog.LevelInfo
	if !c.Allowed {
		level = slog.LevelWarn
	}
	id := c.DEK[:min(len(c.DEK), maxLogged)]
	attrs := []slog.Attr{
		slog.String("method", c.Method), slog.String("identity", c.Who.Name), slog.String("node", c.Who.Node),
		slog.String("dek_id", id), slog.Bool("allowed", c.Allowed), slog.String("code", c.Code), slog.String("peer", peerOf(ctx)),
	}
	if c.Source != "" {
		attrs = append(attrs, slog.String("source", c.Source))
	}
	if c.Reason != "" {
		attrs = append(attrs, slog.String("reason", c.Reason))
	}
	line := slog.NewRecord(time.Now(), level, "decision", 0)
	line.AddAttrs(attrs...)
	return c.cfg.Audit.Handler().Handle(context.WithoutCancel(ctx), line)
}

func peerOf(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}

// refusal is the one answer to who may not, whatever the reason.
func (c *call) refusal() error {
	if c.DEK == "" {
		return errdefs.Errorf(errdefs.ErrDenied, "%s may not call %s: the key service's audit log says why", c.Who.Name, c.Method)
	}
	return errdefs.Errorf(errdefs.ErrDenied, "%s may not call %s for DEK %s, or there is no such DEK: the key service's audit log says which", c.Who.Name, c.Method, c.DEK)
}

// decide makes a policy's word the call's.
func (c *call) decide(ctx context.Context, err error) error {
	c.Allowed = err == nil
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errdefs.ErrDenied):
		c.Reason = err.Error()
		return c.refusal()
	case ctx.Err() != nil:
		return ctx.Err()
	}
	c.Reason = err.Error()
	return errdefs.Errorf(errdefs.ErrUnavailable, "whether %s may call %s for DEK %s cannot be told now: call again", c.Who.Name, c.Method, c.DEK)
}

// mayHave decides whether the caller may have the DEK.
func (c *call) mayHave(ctx context.Context, id dek.ID) error {
	return c.decide(ctx, c.cfg.Policy.volume(ctx, c.Who, id))
}

// mayDerive decides whether the caller may have a key derived for Constellation.
func (c *call) mayDerive(ctx context.Context, id dek.ID) error {
	return c.decide(ctx, c.cfg.Policy.prefix(ctx, c.Who, id))
}

// mayControl decides whether the caller may create and delete.
func (c *call) mayControl(ctx context.Context) error {
	if !c.cfg.Policy.controller(c.Who) {
		return c.decide(ctx, errdefs.Errorf(errdefs.ErrDenied, "the identity is no controller"))
	}
	return c.decide(ctx, nil)
}

// mayOperate decides whether the caller may administer.
func (c *call) mayOperate(ctx context.Context) error {
	if !c.cfg.Policy.operator(c.Who) {
		return c.decide(ctx, errdefs.Errorf(errdefs.ErrDenied, "the identity is no operator"))
	}
	return c.decide(ctx, nil)
}
