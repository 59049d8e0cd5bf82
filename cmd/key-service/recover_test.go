package main

import (
	"context"
	"crypto/tls"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// waiting is a node that waits for its key: it takes the master secret "right".
type waiting struct {
	keyservicev1.UnimplementedRecoveryServer
	mu   sync.Mutex
	seen []*keyservicev1.RecoverRequest
}

func (w *waiting) Recover(_ context.Context, req *keyservicev1.RecoverRequest) (*keyservicev1.RecoverResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = append(w.seen, req)
	if string(req.GetFiles()[0]) != "right" {
		return nil, errgrpc.ToGRPC(errdefs.Errorf(errdefs.ErrState, "no header verifies"))
	}
	return &keyservicev1.RecoverResponse{DekId: "d/state", Mapping: "state\x1b[2J"}, nil
}

// serve answers with that certificate until the test ends.
func (w *waiting) serve(t *testing.T, cert, key string) (address string) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})))
	keyservicev1.RegisterRecoveryServer(server, w)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "dns:///" + lis.Addr().String()
}

// TestRecover: the operator's side. A node that is not known by more than its
// name is told nothing.
func TestRecover(t *testing.T) {
	ca, w := peers.NewCA(t), &waiting{}
	cert, key := ca.Issue(t, "node")
	operatorCert, operatorKey := ca.Issue(t, "operator")
	address := w.serve(t, cert, key)
	right, wrong, auth := write(t, "right"), write(t, "wrong"), write(t, strings.Repeat("r", 32))
	verb := []string{"recover", "--address", address, "--ca-file", ca.File, "--cert-file", operatorCert, "--key-file", operatorKey,
		"--kms-uri=cluster://{0}?salt-file={1}", "--storage-uri=file:///store", "--record-auth-secret-file", auth}
	args := func(file string, more ...string) []string {
		return append(append(slices.Clip(verb), "--file="+file, "--file="+wrong), more...)
	}
	pinned := "--server-key-sha256=" + pin(t, cert)

	for says, args := range map[string][]string{
		"--server-key-sha256 or --verify-command is required": args(right),
		"--kms-uri and --storage-uri are required":            {"recover", "--address", address, pinned},
		"--address is required":                               {"recover", "--kms-uri=cluster:///x", "--storage-uri=mem://", pinned},
	} {
		if code, out := keyService(t, args...); code != 2 || !strings.Contains(out, says) {
			t.Errorf("key-service %q: exit code %d, want 2 and %q:\n%s", args, code, says, out)
		}
	}
	mustFail(t, args(right, "--server-key-sha256="+strings.Repeat("0", 64)), "nothing was sent")
	mustFail(t, args(right, "--verify-command=grep -q CERTIFICATE && false"), "nothing was sent")
	mustFail(t, args(right, pinned, "--verify-command=false"), "nothing was sent")
	if len(w.seen) > 0 {
		t.Fatalf("an unknown node was told %v", w.seen)
	}
	mustFail(t, args(wrong, pinned), "no header verifies")
	must(t, args(right, "--verify-command=grep -q CERTIFICATE"), `"d/state" is open on the node as "state\\x1b\[2J"`)
	must(t, args(right, pinned), "is open")
	for i, first := range []string{"wrong", "right", "right"} {
		r := w.seen[i]
		if len(r.Files) != 2 || string(r.Files[0]) != first || string(r.Files[1]) != "wrong" || string(r.RecordAuthSecret) != strings.Repeat("r", 32) ||
			!slices.Equal(r.KmsUris, []string{"cluster://{0}?salt-file={1}"}) || !slices.Equal(r.StorageUris, []string{"file:///store"}) {
			t.Errorf("the node was told %v", r)
		}
	}
}
