package grpcproxy_test

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/cryptcsi/cryptcsi/internal/grpcproxy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bytesMsg is a message whose payload a test can look at.
type bytesMsg = wrapperspb.BytesValue

// far is the server behind the proxy: a service that the proxy has never heard
// of, with one method per kind of call.
type far struct {
	cancelled chan struct{}
	deadline  chan time.Duration
}

func (f *far) desc() *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: "test.Far",
		HandlerType: (*any)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Unary", Handler: f.unary}},
		Streams: []grpc.StreamDesc{
			{StreamName: "Echo", Handler: f.echo, ServerStreams: true, ClientStreams: true},
			{StreamName: "Collect", Handler: f.collect, ClientStreams: true},
			{StreamName: "Hang", Handler: f.hang, ServerStreams: true},
		},
	}
}

func (f *far) unary(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	in := &bytesMsg{}
	if err := dec(in); err != nil {
		return nil, err
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if err := grpc.SetHeader(ctx, metadata.Pairs("far-header", "h", "far-saw", strings.Join(md.Get("near-meta"), "+"))); err != nil {
		return nil, err
	}
	if err := grpc.SetTrailer(ctx, metadata.Pairs("far-trailer-bin", "\x00\x01")); err != nil {
		return nil, err
	}
	if len(md.Get("fail")) > 0 {
		st, err := status.New(codes.ResourceExhausted, "attached to too many").WithDetails(structpb.NewStringValue("detail"))
		if err != nil {
			return nil, err
		}
		return nil, st.Err()
	}
	return in, nil
}

func (f *far) echo(_ any, s grpc.ServerStream) error {
	for {
		in := &bytesMsg{}
		if err := s.RecvMsg(in); errors.Is(err, io.EOF) {
			s.SetTrailer(metadata.Pairs("half-closed", "yes"))
			return s.SendMsg(&bytesMsg{Value: []byte("bye")})
		} else if err != nil {
			return err
		}
		if err := s.SendMsg(in); err != nil {
			return err
		}
	}
}

func (f *far) collect(_ any, s grpc.ServerStream) error {
	var all []byte
	for {
		in := &bytesMsg{}
		if err := s.RecvMsg(in); errors.Is(err, io.EOF) {
			return s.SendMsg(&bytesMsg{Value: all})
		} else if err != nil {
			return err
		}
		all = append(all, in.Value...)
	}
}

// hang sends one message and then waits until the caller goes away.
func (f *far) hang(_ any, s grpc.ServerStream) error {
	if d, ok := s.Context().Deadline(); ok {
		f.deadline <- time.Until(d)
	}
	if err := s.SendMsg(&bytesMsg{Value: []byte("started")}); err != nil {
		return err
	}
	<-s.Context().Done()
	close(f.cancelled)
	return s.Context().Err()
}

// near is a service that the proxy's own server does implement.
var near = grpc.ServiceDesc{
	ServiceName: "test.Near",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Known", Handler: func(_ any, _ context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		if err := dec(&emptypb.Empty{}); err != nil {
			return nil, err
		}
		return &bytesMsg{Value: []byte("near")}, nil
	}}},
}

// setup returns a connection to a proxy in front of f.
func setup(t *testing.T) (*grpc.ClientConn, *far) {
	t.Helper()
	f := &far{cancelled: make(chan struct{}), deadline: make(chan time.Duration, 1)}
	behind := grpc.NewServer(grpc.MaxRecvMsgSize(grpcproxy.MaxMessage))
	behind.RegisterService(f.desc(), f)
	backend := start(t, behind)

	allow := func(method string) bool { return !strings.HasPrefix(method, "/test.Near/") }
	proxy := grpc.NewServer(grpcproxy.ServerOptions(backend, allow)...)
	proxy.RegisterService(&near, nil)
	return start(t, proxy), f
}

func start(t *testing.T, s *grpc.Server) *grpc.ClientConn {
	t.Helper()
	lis, err := net.Listen("unix", filepath.Join(t.TempDir(), "s.sock"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(lis) }()
	conn, err := grpc.NewClient("unix://"+lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(grpcproxy.MaxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		s.Stop()
		if err := <-served; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	return conn
}

func TestUnaryMetadataAndTrailer(t *testing.T) {
	conn, _ := setup(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "near-meta", "a", "near-meta", "b")
	var header, trailer metadata.MD
	out := &bytesMsg{}
	if err := conn.Invoke(ctx, "/test.Far/Unary", &bytesMsg{Value: []byte("x")}, out, grpc.Header(&header), grpc.Trailer(&trailer)); err != nil {
		t.Fatal(err)
	}
	if string(out.Value) != "x" {
		t.Errorf("answer %q", out.Value)
	}
	if got := header.Get("far-saw"); !cmp.Equal(got, []string{"a+b"}) {
		t.Errorf("the far side saw metadata %q", got)
	}
	if got := header.Get("content-type"); !cmp.Equal(got, []string{"application/grpc"}) {
		t.Errorf("content-type %q, want the near hop's only", got)
	}
	if got := trailer.Get("far-trailer-bin"); !cmp.Equal(got, []string{"\x00\x01"}) {
		t.Errorf("trailer %q", got)
	}
}

func TestStatusPassesUntouched(t *testing.T) {
	conn, _ := setup(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "fail", "1")
	var trailer metadata.MD
	err := conn.Invoke(ctx, "/test.Far/Unary", &bytesMsg{}, &bytesMsg{}, grpc.Trailer(&trailer))
	st := status.Convert(err)
	if st.Code() != codes.ResourceExhausted || st.Message() != "attached to too many" || len(st.Details()) != 1 {
		t.Errorf("status %v with details %v", st, st.Details())
	}
	if got := trailer.Get("far-trailer-bin"); len(got) != 1 {
		t.Errorf("an error's trailer was lost: %v", trailer)
	}
}

func TestUnknownFieldsSurvive(t *testing.T) {
	conn, _ := setup(t)
	in := &bytesMsg{Value: []byte("x")}
	in.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 42))
	out := &bytesMsg{}
	if err := conn.Invoke(t.Context(), "/test.Far/Unary", in, out); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(in, out) {
		t.Errorf("sent %v, got %v", in, out)
	}
}

func TestBigMessage(t *testing.T) {
	conn, _ := setup(t)
	big := []byte(strings.Repeat("0123456789abcdef", 1<<20)) // 16 MiB
	out := &bytesMsg{}
	if err := conn.Invoke(t.Context(), "/test.Far/Unary", &bytesMsg{Value: big}, out); err != nil {
		t.Fatal(err)
	}
	if string(out.Value) != string(big) {
		t.Errorf("16 MiB came back as %d other bytes", len(out.Value))
	}
}

func TestBidirectionalStreamAndHalfClose(t *testing.T) {
	conn, _ := setup(t)
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	s, err := conn.NewStream(t.Context(), desc, "/test.Far/Echo")
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"one", "", "three"} { // in lockstep: nothing is held back
		if err := s.SendMsg(&bytesMsg{Value: []byte(word)}); err != nil {
			t.Fatal(err)
		}
		got := &bytesMsg{}
		if err := s.RecvMsg(got); err != nil || string(got.Value) != word {
			t.Fatalf("sent %q, got %q, %v", word, got.Value, err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	got := &bytesMsg{}
	if err := s.RecvMsg(got); err != nil || string(got.Value) != "bye" {
		t.Fatalf("after the half close: %q, %v", got.Value, err)
	}
	if err := s.RecvMsg(got); !errors.Is(err, io.EOF) {
		t.Errorf("end of stream: %v", err)
	}
	if !cmp.Equal(s.Trailer().Get("half-closed"), []string{"yes"}) {
		t.Errorf("trailer %v", s.Trailer())
	}
}

func TestClientStream(t *testing.T) {
	conn, _ := setup(t)
	s, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, "/test.Far/Collect")
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"a", "b", "c"} {
		if err := s.SendMsg(&bytesMsg{Value: []byte(word)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	got := &bytesMsg{}
	if err := s.RecvMsg(got); err != nil || string(got.Value) != "abc" {
		t.Errorf("collected %q, %v", got.Value, err)
	}
}

func TestCancelReachesTheFarSide(t *testing.T) {
	conn, f := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := hang(ctx, t, conn)
	cancel()
	<-f.cancelled
	if err := s.RecvMsg(&bytesMsg{}); status.Code(err) != codes.Canceled {
		t.Errorf("after cancelling: %v", err)
	}
}

func TestDeadlineReachesTheFarSide(t *testing.T) {
	conn, f := setup(t)
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	s := hang(ctx, t, conn)
	if left := <-f.deadline; left <= 0 || left > 150*time.Millisecond {
		t.Errorf("the far side has %v left", left)
	}
	if err := s.RecvMsg(&bytesMsg{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("after the deadline: %v", err)
	}
	<-f.cancelled
}

// hang opens the Hang stream and waits until the far side runs.
func hang(ctx context.Context, t *testing.T, conn *grpc.ClientConn) grpc.ClientStream {
	t.Helper()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/test.Far/Hang")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg(&bytesMsg{}); err != nil {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := s.RecvMsg(&bytesMsg{}); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatIsOursAndWhatIsNot(t *testing.T) {
	conn, _ := setup(t)
	out := &bytesMsg{}
	if err := conn.Invoke(t.Context(), "/test.Near/Known", &emptypb.Empty{}, out); err != nil || string(out.Value) != "near" {
		t.Errorf("a registered method: %q, %v", out.Value, err)
	}
	err := conn.Invoke(t.Context(), "/test.Near/FromTheFuture", &emptypb.Empty{}, out)
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a method that is not allowed: %v", err)
	}
	err = conn.Invoke(t.Context(), "/test.Nowhere/X", &emptypb.Empty{}, out)
	if status.Code(err) != codes.Unimplemented || !strings.Contains(err.Error(), "test.Nowhere") {
		t.Errorf("a service that nobody has, want the far side's answer: %v", err)
	}
}

func TestFarSideGone(t *testing.T) {
	dead, err := grpc.NewClient("unix://"+filepath.Join(t.TempDir(), "none.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dead.Close() })
	conn := start(t, grpc.NewServer(grpcproxy.ServerOptions(dead, func(string) bool { return true })...))
	if err := conn.Invoke(t.Context(), "/test.Far/Unary", &bytesMsg{}, &bytesMsg{}); status.Code(err) != codes.Unavailable {
		t.Errorf("no far side: %v", err)
	}
}
