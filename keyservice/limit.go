package keyservice

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// limiter bounds how many calls run and how many wait for their turn.
type limiter struct {
	slots   chan struct{}
	waiting atomic.Int64
	most    int64 // that may wait
}

func newLimiter(running, waiting int) *limiter {
	return &limiter{slots: make(chan struct{}, running), most: int64(waiting)}
}

// enter waits for the caller's turn. It fails with ctx's error, or at once
// where too many wait already; otherwise the caller calls leave.
func (l *limiter) enter(ctx context.Context) error {
	select {
	case l.slots <- struct{}{}:
		return nil
	default:
	}
	defer l.waiting.Add(-1)
	if l.waiting.Add(1) > l.most {
		return status.Error(codes.ResourceExhausted, "the key service has too many calls under way: call again later")
	}
	select {
	case l.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *limiter) leave() { <-l.slots }

func (l *limiter) load() (running, waiting int) {
	return len(l.slots), int(max(0, l.waiting.Load()))
}
