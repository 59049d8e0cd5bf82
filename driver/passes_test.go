package driver_test

import (
	"context"
	"maps"
	"path"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
)

// noting is a connection to a wrapped driver that notes what it was asked last, by
// method, and gives the answers that are set instead of the driver's.
type noting struct {
	grpc.ClientConnInterface
	asked, answers map[string]proto.Message
}

func (n noting) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	name := path.Base(method)
	n.asked[name] = proto.Clone(args.(proto.Message))
	if answer := n.answers[name]; answer != nil {
		proto.Merge(reply.(proto.Message), answer)
		return nil
	}
	return n.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

// noted starts the plant's controller with a connection that notes.
func (p *plant) noted() noting {
	p.t.Helper()
	n := noting{drivertest.Direct(p.wrapped.Register), map[string]proto.Message{}, map[string]proto.Message{}}
	c, err := driver.NewController(p.t.Context(), driver.ControllerConfig{Wrapped: n, Keys: p.ring, Plaintext: p.list})
	p.ok("NewController", err)
	conn := drivertest.Direct(c.Register)
	p.csi, p.group, p.id = csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn), csi.NewIdentityClient(conn)
	return n
}

// ours is a context or parameters of ours and of the driver's.
func ours() map[string]string {
	return map[string]string{"cryptcsi.io/integrity": "hmac-sha256", "theirs": "x"}
}

func onlyTheirs(t *testing.T, what string, got map[string]string) {
	t.Helper()
	if !maps.Equal(got, map[string]string{"theirs": "x"}) {
		t.Errorf("the wrapped driver is shown the %s %v", what, got)
	}
}

// The wrapped driver is not shown what is ours, and whoever asks gets back what he
// asked about.
func TestWhatTheWrappedControllerIsShown(t *testing.T) {
	p := newPlant(t)
	n := p.noted()
	id := p.mustCreate(request("a", with("cryptcsi.io/integrity", "hmac-sha256"))).GetVolumeId()
	_, err := p.csi.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: "node-1", VolumeCapability: mountCap("ext4"), VolumeContext: ours()})
	p.ok("ControllerPublishVolume", err)
	onlyTheirs(t, "volume context", n.asked["ControllerPublishVolume"].(*csi.ControllerPublishVolumeRequest).GetVolumeContext())

	asks := &csi.ValidateVolumeCapabilitiesRequest{
		VolumeId: id, VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4")}, VolumeContext: ours(), Parameters: ours(), MutableParameters: ours(),
	}
	r, err := p.csi.ValidateVolumeCapabilities(t.Context(), asks)
	p.ok("ValidateVolumeCapabilities", err)
	shown := n.asked["ValidateVolumeCapabilities"].(*csi.ValidateVolumeCapabilitiesRequest)
	onlyTheirs(t, "volume context", shown.GetVolumeContext())
	onlyTheirs(t, "parameters", shown.GetParameters())
	onlyTheirs(t, "mutable parameters", shown.GetMutableParameters())
	c := r.GetConfirmed()
	if !maps.Equal(c.GetVolumeContext(), ours()) || !maps.Equal(c.GetParameters(), ours()) || !maps.Equal(c.GetMutableParameters(), ours()) {
		t.Errorf("confirmed: %v", c)
	}
}

// The node has to follow whatever the driver says, as the mapping does not grow by
// itself; a volume that is passed through grows as the driver says.
func TestNodesFollowGrowth(t *testing.T) {
	p := newPlant(t)
	p.wrapped.Name = "hostpath.csi.k8s.io" // which is shown block volumes
	p.list = driver.Plaintext{"hostpath.csi.k8s.io/plain": true}
	p.wrapped.Create("plain", 64*mib)
	n := p.noted()
	id := p.mustCreate(request("a")).GetVolumeId()
	n.answers["ControllerExpandVolume"] = &csi.ControllerExpandVolumeResponse{CapacityBytes: 1 << 30}
	for volume, encrypted := range map[string]bool{id: true, "plain": false} {
		r, err := p.csi.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
			VolumeId: volume, CapacityRange: &csi.CapacityRange{RequiredBytes: 512 * mib}, VolumeCapability: mountCap("ext4"),
		})
		p.ok("ControllerExpandVolume", err)
		shown := n.asked["ControllerExpandVolume"].(*csi.ControllerExpandVolumeRequest).GetVolumeCapability()
		if r.GetNodeExpansionRequired() != encrypted || (shown.GetBlock() != nil) != encrypted {
			t.Errorf("%s: answered %v, the wrapped driver was shown %v", volume, r, shown)
		}
	}
}

// What is asked for one by one has the size that a pod can use.
func TestSizesOfOne(t *testing.T) {
	p := newPlant(t)
	n := p.noted()
	id := p.mustCreate(request("a", with("cryptcsi.io/integrity", "hmac-sha256"))).GetVolumeId()
	s, err := p.snapshot("s", id)
	p.ok("CreateSnapshot", err)
	device := p.wrapped.Volume(id).Size
	want := driver.UsableSize(device, p.dek(volumeDEK(id)).Spec)
	n.answers["ControllerGetVolume"] = &csi.ControllerGetVolumeResponse{Volume: &csi.Volume{VolumeId: id, CapacityBytes: device}}
	n.answers["GetSnapshot"] = &csi.GetSnapshotResponse{Snapshot: &csi.Snapshot{SnapshotId: s.GetSnapshotId(), SizeBytes: device}}
	v, err := p.csi.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
	p.ok("ControllerGetVolume", err)
	one, err := p.csi.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
	p.ok("GetSnapshot", err)
	if v.GetVolume().GetCapacityBytes() != want || one.GetSnapshot().GetSizeBytes() != want || want >= device-16*mib {
		t.Errorf("volume of %d bytes, snapshot of %d, want %d", v.GetVolume().GetCapacityBytes(), one.GetSnapshot().GetSizeBytes(), want)
	}
	all, err := p.csi.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
	p.ok("ListSnapshots", err)
	if got := all.GetEntries()[0].GetSnapshot().GetSizeBytes(); got != device-16*mib {
		t.Errorf("listed with %d bytes, want %d", got, device-16*mib)
	}
}

// What the driver must not be asked for can stand in other places than parameters.
func TestRefusedElsewhere(t *testing.T) {
	p := newPlant(t)
	p.wrapped.Name = "csi.hetzner.cloud"
	n := p.noted()
	const key = "encryption-passphrase"
	_, err := p.create(request("a", func(r *csi.CreateVolumeRequest) { r.Secrets = map[string]string{key: "x"} }))
	p.refused("a secret", err, codes.InvalidArgument, key)
	_, err = p.create(request("a", func(r *csi.CreateVolumeRequest) { r.MutableParameters = map[string]string{key: "x"} }))
	p.refused("a mutable parameter", err, codes.InvalidArgument, key)
	if n.asked["CreateVolume"] != nil {
		t.Error("CreateVolume was asked for")
	}
	id := p.mustCreate(request("a")).GetVolumeId()
	_, err = p.csi.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: id, MutableParameters: map[string]string{key: "x"}})
	p.refused("modifying", err, codes.InvalidArgument, key)
	_, err = p.csi.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id, Parameters: map[string]string{"cryptcsi.io/kek": "gold"}})
	p.refused("a snapshot's parameter of ours", err, codes.InvalidArgument, "cryptcsi.io/kek")
}

// A copy is laid out as its source, whatever is asked for new volumes.
func TestLayoutOfCopies(t *testing.T) {
	p := newPlant(t).start()
	integrity := with("cryptcsi.io/integrity", "hmac-sha256")
	p.mustCreate(request("wiped", integrity, with("cryptcsi.io/integrity-init", "wipe")))
	p.formatted(volumeDEK("vol-wiped"))
	p.mustCreate(request("copy", of("", "vol-wiped"), integrity))
	if got := p.dek(volumeDEK("vol-copy")).Spec; got.Layout != "" || got.Integrity != dek.IntegrityHMAC {
		t.Errorf("the copy's record: %+v", got)
	}
}

// What the wrapped driver's node is shown of a filesystem that it makes, or of a
// volume that is its own.
func TestWhatTheWrappedNodeIsShown(t *testing.T) {
	note := func(m *machine) noting {
		n := noting{drivertest.Direct(m.wrapped.Register), map[string]proto.Message{}, map[string]proto.Message{}}
		m.cfg.Wrapped = n
		m.start()
		return n
	}
	m := newMachine(t)
	m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC})
	m.cfg.StageWith = driver.StageWithWrapped
	n := note(m)
	m.ok("stage", m.stage(mountCap("ext4-integrity")))
	if got := n.asked["NodeStageVolume"].(*csi.NodeStageVolumeRequest).GetVolumeCapability().GetMount().GetFsType(); got != "ext4" {
		t.Errorf("the wrapped driver is to make %q", got)
	}
	m.ok("unstage", m.unstage())

	m = listed(t)
	m.wrapped.NoStage = true
	n = note(m)
	m.ok("stage", m.passStage(mountCap("ext4")))
	m.ok("publish", m.passPublish(mountCap("ext4"), "a"))
	if got := n.asked["NodePublishVolume"].(*csi.NodePublishVolumeRequest).GetStagingTargetPath(); got != "" {
		t.Errorf("a driver that does not stage is shown the staging path %s", got)
	}
}
