package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registered serves a registration and returns a client of it, as kubelet is
// one, and how it ends.
func registered(t *testing.T) (client registrationpb.RegistrationClient, socket string, stop func(), ended <-chan error, joined *atomic.Int32) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "plugins_registry"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	end := make(chan error, 1)
	joined = &atomic.Int32{}
	r := newRegistration("d.example.com", "/var/lib/kubelet/plugins/d/csi.sock", slog.New(slog.DiscardHandler), func() { joined.Add(1) })
	go func() { end <- r.serve(ctx, dir) }()
	socket = filepath.Join(dir, "plugins_registry", "d.example.com-reg.sock")
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(); _ = conn.Close() })
	return registrationpb.NewRegistrationClient(conn), socket, stop, end, joined
}

func TestRegistration(t *testing.T) {
	kubelet, socket, stop, ended, joined := registered(t)
	info, err := kubelet.GetInfo(t.Context(), &registrationpb.InfoRequest{})
	if err != nil || info.GetType() != "CSIPlugin" || info.GetName() != "d.example.com" || info.GetEndpoint() != "/var/lib/kubelet/plugins/d/csi.sock" || strings.Join(info.GetSupportedVersions(), " ") != "1.0.0" {
		t.Errorf("kubelet is told %v, %v", info, err)
	}
	if _, err := kubelet.NotifyRegistrationStatus(t.Context(), &registrationpb.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Errorf("kubelet registers it: %v", err)
	}
	if n := joined.Load(); n != 1 {
		t.Errorf("told %d times that kubelet has registered it", n)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("an orderly end: %v", err)
	}
	if _, err := os.Lstat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket is still there, and so kubelet's registration: %v", err)
	}
}

// Who is refused ends, because kubelet does not ask the same socket again.
func TestRegistrationRefused(t *testing.T) {
	kubelet, _, _, ended, joined := registered(t)
	if _, err := kubelet.NotifyRegistrationStatus(t.Context(), &registrationpb.RegistrationStatus{Error: "no such driver wanted"}); err != nil {
		t.Errorf("kubelet refuses it: %v", err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "no such driver wanted") {
		t.Errorf("refused by kubelet: %v", err)
	}
	if joined.Load() != 0 {
		t.Error("a refusal counts as registered")
	}
}
