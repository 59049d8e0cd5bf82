package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--help"}, 0, "NEVER FOR PRODUCTION"},
		{[]string{"--no-such-flag"}, 2, "no-such-flag"},
		{[]string{"serve"}, 2, "unexpected argument serve"},
		{nil, 1, "a data directory and a node ID are required"},
		{[]string{"--data-dir", dir, "--endpoint", "tcp://127.0.0.1:1"}, 1, "endpoint"},
		{[]string{"--data-dir", dir, "--fault", "nonsense"}, 1, "nonsense"},
		{[]string{"--data-dir", dir, "--like", "who.example.com"}, 2, "nothing is known of it"},
		{[]string{"--data-dir", dir, "--node-expansion-required", "sometimes"}, 1, "sometimes"},
	} {
		var stderr bytes.Buffer
		code := run(t.Context(), tt.args, &stderr)
		if code != tt.code || !strings.Contains(stderr.String(), tt.says) {
			t.Errorf("loopdriver %q: exit code %d and %q, want %d and %q", tt.args, code, stderr.String(), tt.code, tt.says)
		}
	}
}

func TestServesUntilItIsStopped(t *testing.T) {
	dir, err := os.MkdirTemp("", "ld")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	endpoint := "unix://" + filepath.Join(dir, "csi.sock")
	done := make(chan int, 1)
	var stderr bytes.Buffer
	go func() {
		done <- run(ctx, []string{
			"--data-dir", filepath.Join(dir, "data"), "--node-id", "n", "--endpoint", endpoint,
			"--attach=false", "--fault", "no-grow", "--verbose",
		}, &stderr)
	}()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	if info.GetName() != "loop.cryptcsi.io" {
		t.Errorf("the driver's name is %q", info.GetName())
	}
	req := &csi.CreateVolumeRequest{Name: "v", Secrets: map[string]string{"k": "hunter2"}}
	if _, err := csi.NewControllerClient(conn).CreateVolume(ctx, req); err == nil {
		t.Error("CreateVolume without capabilities succeeded")
	}
	cancel()
	if code := <-done; code != 0 {
		t.Errorf("exit code %d", code)
	}
	if log := stderr.String(); !strings.Contains(log, "CreateVolume") || strings.Contains(log, "hunter2") {
		t.Errorf("the log has to name the RPC and not its secrets: %s", log)
	}
}
