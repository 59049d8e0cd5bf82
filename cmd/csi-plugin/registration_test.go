package main

import (
	"context"
	"log/slog"
	"net"
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
// one, and how it ends. What there is of others in the folder is made before.
func registered(t *testing.T, before ...func(socket string)) (client registrationpb.RegistrationClient, socket string, stop func(), ended <-chan error, joined *atomic.Int32) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "plugins_registry"), 0o755); err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "plugins_registry", "d.example.com-reg.sock")
	for _, do := range before {
		do(socket)
	}
	ctx, stop := context.WithCancel(t.Context())
	end := make(chan error, 1)
	joined = &atomic.Int32{}
	r := newRegistration("d.example.com", "/var/lib/kubelet/plugins/d/csi.sock", slog.New(slog.DiscardHandler), func() { joined.Add(1) })
	go func() { end <- r.serve(ctx, dir) }()
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

// In a driver's place its registrar goes on under the same name until its pod is
// replaced. Nobody restarts us meanwhile: that would be later and later.
func TestRegistrationWaits(t *testing.T) {
	var vendor net.Listener
	asked := make(chan struct{}, 100)
	kubelet, _, _, ended, _ := registered(t, func(socket string) {
		var err error
		if vendor, err = net.Listen("unix", socket); err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				conn, err := vendor.Accept()
				if err != nil {
					return
				}
				_ = conn.Close()
				asked <- struct{}{}
			}
		}()
	})
	for range 2 { // kubelet's client here, or we
		select {
		case <-asked:
		case err := <-ended:
			t.Fatalf("it ended beside the vendor's registrar: %v", err)
		}
	}
	_ = vendor.Close()
	if info, err := kubelet.GetInfo(t.Context(), &registrationpb.InfoRequest{}); err != nil || info.GetName() != "d.example.com" {
		t.Errorf("after the vendor's registrar: %v, %v", info, err)
	}
}

// A file that is no socket is somebody's mistake.
func TestRegistrationIsNoSocket(t *testing.T) {
	_, _, _, ended, _ := registered(t, func(socket string) {
		if err := os.WriteFile(socket, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	})
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "is not a socket") {
		t.Errorf("a file in the place of the socket: %v", err)
	}
}
