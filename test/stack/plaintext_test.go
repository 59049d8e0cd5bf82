package stack_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelPlaintextVolumes: csi-plugin comes between a driver and its pods.
// Volumes that are listed go on as they were, also those that are in use at that
// moment; one that is not listed is refused, and so is one in the list that
// begins with a LUKS header; new ones are encrypted.
func TestKernelPlaintextVolumes(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	kernel.Need(t, "root", "dm-crypt", "keyring", "loop", "ext4", "exec:mkfs.ext4", "exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "loopdriver"))
	kernel.NoLeaks(t)
	ctx := t.Context()
	s, err := stack.Start(ctx, stack.Config{Dir: t.TempDir(), Bin: bin, Controller: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.Logs())
		}
	})

	// Before: kubelet and the sidecars talk to the driver itself.
	conn, err := grpc.NewClient("unix://"+s.Path("wrapped.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	must(t, "dial", err)
	defer conn.Close()
	s.Controller, s.Node = csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	provision := func(name string, c *csi.VolumeCapability) copies {
		return copies{t, s, &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 << 20}, VolumeCapabilities: []*csi.VolumeCapability{c}}}
	}
	mounted, block := provision("mounted", stack.MountCapability("ext4")), provision("block", stack.BlockCapability())
	old := []*stack.Volume{mounted.provision(mounted.request), block.provision(block.request)}
	for _, v := range old {
		must(t, "Up", v.Up(ctx))
		mounted.write(v)
	}
	luks, unlisted := provision("luks", stack.BlockCapability()), provision("unlisted", stack.BlockCapability())
	locked, forgotten := luks.provision(luks.request), unlisted.provision(unlisted.request)
	must(t, "a LUKS header", os.WriteFile(locked.Device(), []byte("LUKS\xba\xbe\x00\x02"), 0))

	// After.
	must(t, "StopPlugin", s.StopPlugin(syscall.SIGTERM))
	list := "# old volumes\n"
	for _, v := range append(old, locked) {
		list += string(v.DEK()) + "\n"
	}
	must(t, "the list", os.WriteFile(s.Path("list"), []byte(list), 0o600))
	s.SetPluginArgs("--plaintext-volumes=pass-through", "--plaintext-volumes-file="+s.Path("list"))
	must(t, "StartPlugin", s.StartPlugin(ctx))
	for _, v := range old {
		must(t, "Up again, of a pod that runs", v.Up(ctx))
		mounted.has(v)
		must(t, "Expand", v.Expand(ctx, 64<<20))
		must(t, "Down", v.Down(ctx))
		must(t, "Up", v.Up(ctx))
		mounted.has(v)
		must(t, "Down", v.Down(ctx))
		if !contains(t, v.Device()) {
			t.Errorf("%s is not as it was", v.ID)
		}
	}
	must(t, "Stage", locked.Stage(ctx))
	if err := locked.Publish(ctx); err == nil || !strings.Contains(err.Error(), "LUKS header") {
		t.Errorf("a device with a LUKS header: %v", err)
	}
	must(t, "Down", locked.Down(ctx))
	if err := forgotten.Stage(ctx); err == nil || !strings.Contains(err.Error(), "no record") {
		t.Errorf("a volume that is not listed: %v", err)
	}

	young := provision("young", stack.BlockCapability())
	v := young.provision(young.request)
	must(t, "Up", v.Up(ctx))
	young.write(v)
	must(t, "Down", v.Down(ctx))
	if contains(t, v.Device()) {
		t.Error("a new volume is not encrypted")
	}
	for _, v := range append(old, locked, forgotten, v) {
		must(t, "Delete", v.Delete(ctx))
	}
}

// contains tells whether what the pod wrote can be read on a device.
func contains(t *testing.T, device string) bool {
	t.Helper()
	file, err := os.Open(device)
	must(t, "open", err)
	defer file.Close()
	all, err := io.ReadAll(file)
	must(t, "read", err)
	return bytes.Contains(all, words)
}
