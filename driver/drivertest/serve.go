package drivertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

// edge is what every server does at its edge: it translates errors. A handler
// that panics with Killed is an Internal error, as a process that dies would be
// an Unavailable one.
func edge(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			if _, killed := p.(Killed); !killed {
				panic(p)
			}
			resp, err = nil, errgrpc.ToGRPC(errors.New("killed"))
		}
	}()
	resp, err = handler(ctx, req)
	return resp, errgrpc.ToGRPC(err)
}

// Direct is a connection to what register adds, without a server, a socket or
// goroutines: for tests that make thousands of calls. It has no streams and no
// call options.
func Direct(register func(grpc.ServiceRegistrar)) grpc.ClientConnInterface {
	d := direct{}
	register(d)
	return d
}

type direct map[string]method

type method struct {
	service any
	desc    grpc.MethodDesc
}

func (d direct) RegisterService(desc *grpc.ServiceDesc, service any) {
	for _, m := range desc.Methods {
		d["/"+desc.ServiceName+"/"+m.MethodName] = method{service, m}
	}
}

func (d direct) Invoke(ctx context.Context, name string, args, reply any, _ ...grpc.CallOption) error {
	m, ok := d[name]
	if !ok {
		return fmt.Errorf("there is no method %s", name)
	}
	receive := func(v any) error {
		proto.Merge(v.(proto.Message), args.(proto.Message))
		return nil
	}
	resp, err := m.desc.Handler(m.service, ctx, receive, edge)
	if err == nil {
		proto.Merge(reply.(proto.Message), resp.(proto.Message))
	}
	return err
}

func (direct) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("no streams here")
}

// Serve serves what register adds on a unix socket until the test ends, and
// returns the socket's path.
func Serve(t testing.TB, register func(grpc.ServiceRegistrar), opts ...grpc.ServerOption) string {
	t.Helper()
	// Not t.TempDir: a test's name may be too long for a socket's path, or hold
	// what means something else in an address.
	dir, err := os.MkdirTemp("", "csi-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "csi.sock")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(append([]grpc.ServerOption{grpc.ChainUnaryInterceptor(edge)}, opts...)...)
	register(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(lis) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	return path
}

// Dial connects to a socket until the test ends.
func Dial(t testing.TB, path string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
