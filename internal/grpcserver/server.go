// Package grpcserver is how every gRPC server of the project listens, logs,
// translates errors, survives a panic and stops.
package grpcserver

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

// LevelRequest is the level at which requests are logged, secrets stripped:
// klog's -v=5.
const LevelRequest = slog.Level(-5)

// defaultDrain is how long a stopping server waits for calls in flight.
const defaultDrain = 30 * time.Second

// Observer is told of every finished call: its full method, the name of its
// status code, and how long it took. It is called concurrently.
type Observer func(method, code string, took time.Duration)

// Config says how a server behaves. The zero value works.
type Config struct {
	Logger  *slog.Logger        // one line per call; nil: no log
	Observe Observer            // nil: nobody is told
	Drain   time.Duration       // bound of a graceful stop; 0: 30 s
	Options []grpc.ServerOption // more of gRPC's own
	// HideRequests keeps requests out of the log at every level: they hold
	// secrets that nothing marks as such.
	HideRequests bool
}

// Server is a gRPC server with the project's habits. Services are registered
// on the embedded one before Serve.
type Server struct {
	*grpc.Server
	cfg Config
}

// New returns a server without services.
func New(cfg Config) *Server {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Drain == 0 {
		cfg.Drain = defaultDrain
	}
	s := &Server{cfg: cfg}
	opts := []grpc.ServerOption{grpc.ChainUnaryInterceptor(s.unary), grpc.ChainStreamInterceptor(s.stream)}
	s.Server = grpc.NewServer(append(opts, cfg.Options...)...)
	return s
}

// Serve answers calls on lis until ctx ends, then lets the calls in flight
// finish, at most for the drain time, and closes lis. It returns nil after an
// orderly stop and an error where lis failed or calls had to be cut off.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	served := make(chan error, 1)
	go func() { served <- s.Server.Serve(lis) }()
	select {
	case err := <-served:
		s.Stop()
		return err
	case <-ctx.Done():
	}
	drained := make(chan struct{})
	go func() { s.GracefulStop(); close(drained) }()
	late := time.NewTimer(s.cfg.Drain)
	defer late.Stop()
	select {
	case <-drained:
		return <-served
	case <-late.C:
	}
	// Stop closes the connections and cancels the calls' contexts. Nobody waits
	// for it: while a handler hangs, GracefulStop may hold the lock that both
	// need, and one that a dead device holds must not hold the process.
	go s.Stop()
	return fmt.Errorf("calls were still running %v after the stop signal and were cut off", s.cfg.Drain)
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	if !s.cfg.HideRequests {
		s.cfg.Logger.Log(ctx, LevelRequest, "request", "method", info.FullMethod, "request", sanitized{req})
	}
	err = s.call(ctx, info.FullMethod, func() error {
		resp, err = handler(ctx, req)
		return errgrpc.ToGRPC(err)
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return s.call(ss.Context(), info.FullMethod, func() error {
		err := handler(srv, ss)
		// The status of a forwarded call passes as it is, details included.
		if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
			return err
		}
		return errgrpc.ToGRPC(err)
	})
}

// call runs one call, turns a panic into an error, logs and observes.
func (s *Server) call(ctx context.Context, method string, do func() error) error {
	start := time.Now()
	err := s.survive(ctx, method, do)
	took := time.Since(start)
	code := status.Code(err).String()
	if s.cfg.Observe != nil {
		s.cfg.Observe(method, code, took)
	}
	attrs := []slog.Attr{slog.String("method", method), slog.Duration("took", took), slog.String("code", code)}
	level := slog.LevelInfo
	if strings.HasSuffix(method, "/Probe") {
		level = slog.LevelDebug
	}
	if err != nil {
		level = slog.LevelError
		attrs = append(attrs, slog.String("error", status.Convert(err).Message()))
	}
	s.cfg.Logger.LogAttrs(ctx, level, "call", attrs...)
	return err
}

// survive keeps the process alive where a handler panics: one volume's trouble
// must not take down the others' calls.
func (s *Server) survive(ctx context.Context, method string, do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Logger.ErrorContext(ctx, "panic in a handler", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errgrpc.ToGRPC(fmt.Errorf("%s crashed; the stack is in the log of this process", method))
		}
	}()
	return do()
}

// sanitized prints a request without the fields that CSI marks as secret. The
// work is done only where the line is really written.
type sanitized struct{ req any }

func (r sanitized) LogValue() slog.Value {
	return slog.StringValue(protosanitizer.StripSecrets(r.req).String())
}
