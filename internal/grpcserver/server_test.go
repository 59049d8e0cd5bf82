package grpcserver_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// service answers NodeStageVolume and Probe with what a test puts in.
type service struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer
	stage func(context.Context) error
}

func (s *service) NodeStageVolume(ctx context.Context, _ *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	return &csi.NodeStageVolumeResponse{}, s.stage(ctx)
}

func (s *service) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

// running is a server under test.
type running struct {
	conn   *grpc.ClientConn
	stop   context.CancelFunc
	served chan error
	log    *lockedBuffer
	seen   chan string
	path   string
}

func start(t *testing.T, level slog.Level, drain time.Duration, stage func(context.Context) error, opts ...grpc.ServerOption) *running {
	t.Helper()
	r := &running{served: make(chan error, 1), log: &lockedBuffer{}, seen: make(chan string, 10), path: filepath.Join(t.TempDir(), "s.sock")}
	lis, err := grpcserver.Listen("unix://" + r.path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpcserver.New(grpcserver.Config{
		Logger:  slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: level})),
		Observe: func(method, code string, took time.Duration) { r.seen <- method + " " + code },
		Drain:   drain,
		Options: opts,
	})
	svc := &service{stage: stage}
	csi.RegisterNodeServer(s, svc)
	csi.RegisterIdentityServer(s, svc)
	var ctx context.Context
	ctx, r.stop = context.WithCancel(t.Context())
	go func() { r.served <- s.Serve(ctx, lis) }()
	r.conn, err = grpc.NewClient("unix://"+r.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.conn.Close(); r.stop() })
	return r
}

func (r *running) stage(ctx context.Context) error {
	_, err := csi.NewNodeClient(r.conn).NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: "vol-1", Secrets: map[string]string{"token": "hunter2"},
	})
	return err
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestErrorsAreTranslatedLoggedAndObserved(t *testing.T) {
	r := start(t, slog.LevelInfo, time.Second, func(context.Context) error {
		return errdefs.Errorf(errdefs.ErrState, "the device holds foreign data")
	})
	err := r.stage(t.Context())
	if status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "the device holds foreign data" {
		t.Errorf("got %v", err)
	}
	if got := <-r.seen; got != "/csi.v1.Node/NodeStageVolume FailedPrecondition" {
		t.Errorf("observed %q", got)
	}
	log := r.log.String()
	if strings.Count(log, "\n") != 1 || !strings.Contains(log, "code=FailedPrecondition") || !strings.Contains(log, "foreign data") {
		t.Errorf("log:\n%s", log)
	}
}

func TestRequestsAreLoggedOnlyOnDemandAndWithoutSecrets(t *testing.T) {
	for _, level := range []slog.Level{slog.LevelDebug, grpcserver.LevelRequest} {
		r := start(t, level, time.Second, func(context.Context) error { return nil })
		if err := r.stage(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-r.seen
		log := r.log.String()
		if got := strings.Contains(log, "vol-1"); got != (level == grpcserver.LevelRequest) {
			t.Errorf("at level %v the request was logged: %v\n%s", level, got, log)
		}
		if strings.Contains(log, "hunter2") {
			t.Errorf("a secret was logged:\n%s", log)
		}
	}
}

func TestProbeIsQuiet(t *testing.T) {
	r := start(t, slog.LevelInfo, time.Second, nil)
	if _, err := csi.NewIdentityClient(r.conn).Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Fatal(err)
	}
	<-r.seen
	if log := r.log.String(); log != "" {
		t.Errorf("a probe was logged: %s", log)
	}
}

func TestPanicIsOneFailedCall(t *testing.T) {
	first := true
	r := start(t, slog.LevelInfo, time.Second, func(context.Context) error {
		if first {
			first = false
			panic("a bug")
		}
		return nil
	})
	if err := r.stage(t.Context()); status.Code(err) != codes.Internal || strings.Contains(err.Error(), "a bug") {
		t.Errorf("a panic became %v", err)
	}
	<-r.seen
	if log := r.log.String(); !strings.Contains(log, "a bug") || !strings.Contains(log, "server_test.go") {
		t.Errorf("the log lacks the panic or its stack:\n%s", log)
	}
	if err := r.stage(t.Context()); err != nil {
		t.Errorf("the call after the panic: %v", err)
	}
}

func TestForwardedStatusKeepsItsDetails(t *testing.T) {
	far := status.New(codes.ResourceExhausted, "full")
	far, err := far.WithDetails(&csi.ProbeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	r := start(t, slog.LevelInfo, time.Second, nil, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return far.Err() }))
	st := status.Convert(r.conn.Invoke(t.Context(), "/other.Service/Method", &csi.ProbeRequest{}, &csi.ProbeResponse{}))
	if st.Code() != codes.ResourceExhausted || len(st.Details()) != 1 {
		t.Errorf("status %v, details %v", st, st.Details())
	}
}

func TestStopWaitsForCallsInFlight(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	r := start(t, slog.LevelInfo, time.Minute, func(context.Context) error { close(entered); <-leave; return nil })
	answer := make(chan error, 1)
	go func() { answer <- r.stage(context.Background()) }()
	<-entered
	r.stop()
	close(leave)
	if err := <-answer; err != nil {
		t.Errorf("the call in flight: %v", err)
	}
	if err := <-r.served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := os.Stat(r.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestStopIsBounded(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	r := start(t, slog.LevelInfo, time.Millisecond, func(context.Context) error { close(entered); <-leave; return nil })
	defer close(leave) // the handler ignores its context, as one on a dead device does
	answer := make(chan error, 1)
	go func() { answer <- r.stage(context.Background()) }()
	<-entered
	r.stop()
	if err := <-r.served; err == nil || !strings.Contains(err.Error(), "cut off") {
		t.Errorf("Serve: %v", err)
	}
	if err := <-answer; status.Code(err) != codes.Unavailable {
		t.Errorf("the call that was cut off: %v", err)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	for _, form := range []string{"unix://" + path, "unix:" + path, path} {
		lis, err := grpcserver.Listen(form)
		if err != nil {
			t.Fatalf("Listen(%q): %v", form, err)
		}
		if lis.Addr().String() != path {
			t.Errorf("Listen(%q) listens on %s", form, lis.Addr())
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
			t.Errorf("the socket's mode is %v, %v", info.Mode(), err)
		}
		_ = lis.Close()
	}
	for _, bad := range []string{"", "unix://", "unix://relative.sock", "tcp://localhost:1", "unix:///tmp/", "/" + strings.Repeat("x", 200)} {
		if _, err := grpcserver.Listen(bad); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("Listen(%q): %v", bad, err)
		}
	}
}

func TestListenOverAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	_ = dead.Close()
	lis, err := grpcserver.Listen(path)
	if err != nil {
		t.Fatalf("a stale socket is in the way: %v", err)
	}
	defer func() { _ = lis.Close() }()
	if _, err := grpcserver.Listen(path); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("a living server's socket was taken over: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the living server lost its socket: %v", err)
	} else {
		_ = conn.Close()
	}
}

// TestListenLeavesAnothersSocket: some servers, such as node-driver-registrar, take
// a socket's place without asking. It is theirs then.
func TestListenLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	lis, err := grpcserver.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if err := lis.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the other server lost its socket: %v", err)
	} else {
		_ = conn.Close()
	}
}

func TestListenLeavesOtherFilesAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := grpcserver.Listen(path); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("Listen over a file: %v", err)
	}
	if got, _ := os.ReadFile(path); string(got) != "data" {
		t.Error("the file is gone")
	}
}
