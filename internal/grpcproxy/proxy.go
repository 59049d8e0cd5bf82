// Package grpcproxy forwards gRPC calls that a server does not implement to
// another server, byte for byte. It knows no service and no message: unary
// calls and all kinds of streams are the same to it, and fields or methods
// that were invented after this code was compiled pass like all others.
//
// It is the one place beside errdefs that names a gRPC code: a method that is
// not allowed is Unimplemented, as if no handler had been installed.
package grpcproxy

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// MaxMessage is the largest message that passes, in either direction: well
// above gRPC's default of 4 MiB, which long lists of volumes exceed, and still
// a bound on what a peer can make us hold.
const MaxMessage = 64 << 20

// ServerOptions makes a server forward every call that it has no handler for
// to conn, where allow agrees to the call's full method ("/package.Service/Method").
// They include the codec that Handler needs and the message limits; handlers
// of registered services are not affected.
func ServerOptions(conn grpc.ClientConnInterface, allow func(fullMethod string) bool) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{}),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.UnknownServiceHandler(Handler(conn, allow)),
	}
}

// Handler forwards the calls that it is given. Metadata, deadline, cancellation
// and half close travel towards conn; header, trailer and the status travel
// back unchanged. A server that installs it itself must be given the codec as
// ServerOptions does.
func Handler(conn grpc.ClientConnInterface, allow func(fullMethod string) bool) grpc.StreamHandler {
	return func(_ any, down grpc.ServerStream) error {
		method, ok := grpc.MethodFromServerStream(down)
		if !ok || !allow(method) {
			return status.Errorf(codes.Unimplemented, "method %s is not implemented", method)
		}
		return forward(conn, method, down)
	}
}

// forward runs one call. The caller's messages are pumped by a goroutine that
// ends when the call ends: down's context is cancelled when the handler returns.
func forward(conn grpc.ClientConnInterface, method string, down grpc.ServerStream) error {
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, forwardable(md))
	}
	desc := grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	up, err := conn.NewStream(ctx, &desc, method, grpc.ForceCodecV2(codec{}),
		grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage))
	if err != nil {
		return err
	}
	go func() {
		if err := pumpRequests(up, down); err != nil {
			cancel() // the caller is gone, or sent what cannot be forwarded
		}
	}()
	return pumpResponses(up, down)
}

// pumpRequests copies the caller's messages until it closes its half.
func pumpRequests(up grpc.ClientStream, down grpc.ServerStream) error {
	for {
		var f frame
		if err := down.RecvMsg(&f); errors.Is(err, io.EOF) {
			return up.CloseSend()
		} else if err != nil {
			return err
		}
		if err := up.SendMsg(&f); errors.Is(err, io.EOF) {
			return nil // the call is over; pumpResponses reads its status
		} else if err != nil {
			return err
		}
	}
}

// pumpResponses copies header, messages and trailer, and returns the status.
func pumpResponses(up grpc.ClientStream, down grpc.ServerStream) error {
	header, err := up.Header()
	if err == nil && header != nil {
		if err := down.SendHeader(forwardable(header)); err != nil {
			return err
		}
	}
	for {
		var f frame
		if err := up.RecvMsg(&f); err != nil {
			down.SetTrailer(forwardable(up.Trailer()))
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := down.SendMsg(&f); err != nil {
			return err
		}
	}
}

// forwardable copies md without what belongs to one hop.
func forwardable(md metadata.MD) metadata.MD {
	out := make(metadata.MD, len(md))
	for key, values := range md {
		if !perHop(key) {
			out[key] = append([]string(nil), values...)
		}
	}
	return out
}

func perHop(key string) bool {
	switch key {
	case "content-type", "user-agent", "te", "connection", "host",
		"grpc-timeout", "grpc-encoding", "grpc-accept-encoding",
		"grpc-message-type", "grpc-message", "grpc-status", "grpc-status-details-bin":
		return true
	}
	return strings.HasPrefix(key, ":")
}
