package stack_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// words are what a pod writes.
var words = bytes.Repeat([]byte("what a pod wrote"), 4096)

// copies is what is made of one kind of volume.
type copies struct {
	*testing.T
	*stack.Stack
	request *csi.CreateVolumeRequest // of the source
}

// TestKernelCopies: a volume is copied while a pod writes to it; the copies
// open with its data and beside it on one node, and once volume, snapshot and
// both their keys are gone they open with keys of their own and no other.
func TestKernelCopies(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	kernel.Need(t, "root", "dm-crypt", "dm-integrity", "keyring", "loop", "ext4", "xfs", "exec:mkfs.ext4", "exec:mkfs.xfs", "exec:cryptsetup",
		"exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "key-service"), "exec:"+filepath.Join(bin, "loopdriver"))
	kernel.NoLeaks(t)
	s, err := stack.Start(t.Context(), stack.Config{Dir: t.TempDir(), Bin: bin, KeyService: true, Controller: true})
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
	for _, tt := range []struct {
		name       string
		size       int64
		capability *csi.VolumeCapability
		integrity  string
		snapshot   bool // the guest's memory does not hold a third large disk
	}{
		{"ext4", 32 << 20, stack.MountCapability("ext4"), "none", true},
		{"block", 16 << 20, stack.BlockCapability(), "none", true},
		{"xfs", 320 << 20, stack.MountCapability("xfs"), "none", true},
		{"ext4-integrity", 32 << 20, stack.MountCapability("ext4"), "hmac-sha256", true},
		{"block-integrity", 16 << 20, stack.BlockCapability(), "hmac-sha256", true},
		{"xfs-integrity", 320 << 20, stack.MountCapability("xfs"), "hmac-sha256", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := copies{t, s, &csi.CreateVolumeRequest{
				Name: tt.name, CapacityRange: &csi.CapacityRange{RequiredBytes: tt.size}, VolumeCapabilities: []*csi.VolumeCapability{tt.capability},
				Parameters: map[string]string{"cryptcsi.io/integrity": tt.integrity},
			}}
			c.tell(tt.snapshot)
		})
	}
}

func (c copies) tell(snapshot bool) {
	ctx := c.Context()
	source := c.provision(c.request)
	must(c.T, "Up", source.Up(ctx))
	c.write(source)

	all := []*stack.Volume{c.provision(c.copy("clone", 0, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
		Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: source.ID},
	}}))}
	if snapshot {
		all = append(all, c.restored(source))
	}
	for _, v := range all {
		must(c.T, "Up beside the source", v.Up(ctx))
		c.has(v)
	}
	c.has(source)
	must(c.T, "Down", source.Down(ctx))
	old, err := source.Key(ctx)
	must(c.T, "the source's key", err)
	must(c.T, "Delete the source", source.Delete(ctx))
	if _, err := source.Key(ctx); err == nil {
		c.Error("the source's key is still there")
	}
	for _, v := range all {
		must(c.T, "Down", v.Down(ctx))
		own, err := v.Key(ctx)
		must(c.T, "its own key", err)
		if !opens(ctx, v.Device(), own) || opens(ctx, v.Device(), old) {
			c.Errorf("%s: its own key opens it %v, the source's %v", v.ID, opens(ctx, v.Device(), own), opens(ctx, v.Device(), old))
		}
		must(c.T, "Up again", v.Up(ctx))
		c.has(v)
		must(c.T, "Down again", v.Down(ctx))
		must(c.T, "Delete", v.Delete(ctx))
	}
}

// restored is a volume made from a snapshot that is gone by now; it is larger
// where that can be.
func (c copies) restored(source *stack.Volume) *stack.Volume {
	ctx := c.Context()
	snap, err := c.Controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: c.request.GetName() + "-snap", SourceVolumeId: source.ID})
	must(c.T, "CreateSnapshot", err)
	id := snap.GetSnapshot().GetSnapshotId()
	more := int64(16 << 20)
	if c.request.GetParameters()["cryptcsi.io/integrity"] != "none" {
		more = 0
	}
	v := c.provision(c.copy("restored", more, &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id},
	}}))
	_, err = c.Controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	must(c.T, "DeleteSnapshot", err)
	return v
}

// copy is a request for a copy, larger by more.
func (c copies) copy(name string, more int64, of *csi.VolumeContentSource) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: c.request.GetName() + "-" + name, VolumeContentSource: of, Parameters: c.request.GetParameters(), VolumeCapabilities: c.request.GetVolumeCapabilities(),
		CapacityRange: &csi.CapacityRange{RequiredBytes: c.request.GetCapacityRange().GetRequiredBytes() + more},
	}
}

func (c copies) provision(req *csi.CreateVolumeRequest) *stack.Volume {
	c.Helper()
	v, err := c.Provision(c.Context(), req, nil)
	must(c.T, "CreateVolume of "+req.GetName(), err)
	return v
}

// path is where the pod's words are, and how it opens that.
func path(v *stack.Volume) string {
	if v.Capability.GetBlock() != nil {
		return v.Target
	}
	return filepath.Join(v.Target, "words")
}

// write writes as a pod does that wants its data kept.
func (c copies) write(v *stack.Volume) {
	c.Helper()
	file, err := os.OpenFile(path(v), os.O_RDWR|os.O_CREATE, 0o600)
	must(c.T, "open", err)
	defer file.Close()
	_, err = file.Write(words)
	must(c.T, "write", err)
	must(c.T, "fsync", file.Sync())
}

func (c copies) has(v *stack.Volume) {
	c.Helper()
	file, err := os.Open(path(v))
	must(c.T, "open", err)
	defer file.Close()
	got := make([]byte, len(words))
	if _, err := file.Read(got); err != nil || !bytes.Equal(got, words) {
		c.Errorf("%s has %.20q, %v", v.ID, got, err)
	}
}

// opens asks cryptsetup whether a key opens the header on a device.
func opens(ctx context.Context, device string, key []byte) bool {
	cmd := exec.CommandContext(ctx, "cryptsetup", "open", "--test-passphrase", "--key-file=-", device)
	cmd.Stdin = bytes.NewReader(key)
	return cmd.Run() == nil
}
