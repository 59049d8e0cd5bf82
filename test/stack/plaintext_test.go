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

// dropIn is a driver that csi-plugin comes in front of.
type dropIn struct {
	*stack.Stack
	t *testing.T
}

// startDropIn starts both, with kubelet and the sidecars talking to the driver
// itself; keyService as stack.Config's.
func startDropIn(t *testing.T, keyService bool) dropIn {
	bin, err := filepath.Abs("../../bin")
	must(t, "bin", err)
	kernel.Need(t, "root", "dm-crypt", "keyring", "loop", "ext4", "exec:mkfs.ext4", "exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "loopdriver"), "exec:"+filepath.Join(bin, "key-service"))
	kernel.NoLeaks(t)
	s, err := stack.Start(t.Context(), stack.Config{Dir: t.TempDir(), Bin: bin, Controller: true, KeyService: keyService})
	must(t, "Start", err)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.Logs())
		}
	})
	conn, err := grpc.NewClient("unix://"+s.Path("wrapped.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	must(t, "dial", err)
	t.Cleanup(func() { _ = conn.Close() })
	s.Controller, s.Node = csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	return dropIn{s, t}
}

// pods are users of a volume, which is made.
func (d dropIn) pods(name string, c *csi.VolumeCapability) (copies, *stack.Volume) {
	p := copies{d.t, d.Stack, &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 << 20}, VolumeCapabilities: []*csi.VolumeCapability{c}}}
	return p, p.provision(p.request)
}

// comes lets csi-plugin take the driver's place, with a list of those volumes.
func (d dropIn) comes(listed ...*stack.Volume) {
	d.t.Helper()
	must(d.t, "StopPlugin", d.StopPlugin(syscall.SIGTERM))
	list := "# old volumes\n"
	for _, v := range listed {
		list += string(v.DEK()) + "\n"
	}
	must(d.t, "the list", os.WriteFile(d.Path("list"), []byte(list), 0o600))
	d.SetPluginArgs("--plaintext-volumes=pass-through", "--plaintext-volumes-file="+d.Path("list"))
	must(d.t, "StartPlugin", d.StartPlugin(d.t.Context()))
}

// TestKernelPlaintextVolumes: csi-plugin comes between a driver and its pods.
// Volumes that are listed go on as they were, also those that are in use at that
// moment; one that is not listed is refused, and so is one in the list that
// begins with a LUKS header; new ones are encrypted. All of it whether the node
// asks the store itself or a key service, which says of a volume that has no key
// only to its own node that there is none.
func TestKernelPlaintextVolumes(t *testing.T) {
	t.Run("a store of its own", func(t *testing.T) { plaintextVolumes(t, false) })
	t.Run("a key service", func(t *testing.T) { plaintextVolumes(t, true) })
}

func plaintextVolumes(t *testing.T, keyService bool) {
	d, ctx := startDropIn(t, keyService), t.Context()
	mounted, v1 := d.pods("mounted", stack.MountCapability("ext4"))
	_, v2 := d.pods("block", stack.BlockCapability())
	old := []*stack.Volume{v1, v2}
	for _, v := range old {
		must(t, "Up", v.Up(ctx))
		mounted.write(v)
	}
	_, locked := d.pods("luks", stack.BlockCapability())
	_, forgotten := d.pods("unlisted", stack.BlockCapability())
	must(t, "a LUKS header", os.WriteFile(locked.Device(), []byte("LUKS\xba\xbe\x00\x02"), 0))

	d.comes(v1, v2, locked)
	for _, v := range old {
		d.goesOn(mounted, v)
	}
	must(t, "Stage", locked.Stage(ctx))
	if err := locked.Publish(ctx); err == nil || !strings.Contains(err.Error(), "LUKS header") {
		t.Errorf("a device with a LUKS header: %v", err)
	}
	must(t, "Down", locked.Down(ctx))
	if err := forgotten.Stage(ctx); err == nil || !strings.Contains(err.Error(), "no record") {
		t.Errorf("a volume that is not listed: %v", err)
	}
	young, v := d.pods("young", stack.BlockCapability())
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

// goesOn uses a listed volume as its pods do.
func (d dropIn) goesOn(p copies, v *stack.Volume) {
	ctx := d.t.Context()
	must(d.t, "Up again, of a pod that runs", v.Up(ctx))
	p.has(v)
	must(d.t, "Expand", v.Expand(ctx, 64<<20))
	must(d.t, "Down", v.Down(ctx))
	must(d.t, "Up", v.Up(ctx))
	p.has(v)
	must(d.t, "Down", v.Down(ctx))
	if !contains(d.t, v.Device()) {
		d.t.Errorf("%s is not as it was", v.ID)
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
