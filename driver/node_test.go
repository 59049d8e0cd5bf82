package driver_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

func TestPublish(t *testing.T) {
	m := newMachine(t).start()
	c := mountCap("ext4", "noatime", "data=journal")
	m.refused("before stage", m.publish(c, "a", false), codes.FailedPrecondition, "NodeStageVolume")
	m.ok("stage", m.stage(c))
	m.ok("publish", m.publish(c, "a", false))
	m.ok("publish again", m.publish(c, "a", false))
	m.refused("read-only now", m.publish(c, "a", true), codes.AlreadyExists, "read-only")
	m.refused("as block now", m.publish(blockCap(), "a", false), codes.AlreadyExists, "access type")
	m.refused("as block at another target", m.publish(blockCap(), "b", false), codes.InvalidArgument, "access type")
	m.ok("a second pod, read-only", m.publish(c, "b", true))
	if err := m.kernel.WriteFile(m.target("b"), "file", "x"); err == nil {
		t.Error("the second pod can write")
	}
	if got, want := m.targets(), []string{m.target("a"), m.target("b"), m.staging()}; !cmp.Equal(got, want) {
		t.Errorf("mounted at %v, want %v", got, want)
	}
	for _, pod := range []string{"a", "b", "a", "never"} {
		m.ok("unpublish "+pod, m.unpublish(pod))
	}
	m.ok("unstage", m.unstage())
	m.refused("after unstage", m.publish(c, "a", false), codes.FailedPrecondition)
	m.clean()
}

func TestPublishTakesEveryLayerAway(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("")))
	m.ok("publish", m.publish(mountCap(""), "a", false))
	m.ok("a layer more", m.kernel.Mount(t.Context(), m.staging(), m.target("a"), "", []string{"bind"}))
	m.ok("unpublish", m.unpublish("a"))
	m.ok("unstage", m.unstage())
	m.clean()
}

func TestPublishOverSomethingElse(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("")))
	other := m.kernel.AddDisk(mib)
	m.ok("mkfs", m.kernel.Make(t.Context(), other, "xfs", nil, false))
	m.ok("mkdir", os.MkdirAll(m.target("a"), 0o700))
	m.ok("mount", m.kernel.Mount(t.Context(), other, m.target("a"), "xfs", nil))
	m.refused("publish", m.publish(mountCap(""), "a", false), codes.AlreadyExists, "another device")
}

func TestOneWriterMeansOneTarget(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap(""), "block": blockCap()} {
		m := newMachine(t).start()
		c = capability(singleWriter, c)
		m.ok("stage", m.stage(c))
		m.ok("publish", m.publish(c, "a", false))
		m.ok("publish again", m.publish(c, "a", false))
		m.refused(name+": second target", m.publish(c, "b", false), codes.FailedPrecondition, m.target("a"))
		m.ok("unpublish", m.unpublish("a"))
		m.ok("now the second", m.publish(c, "b", false))
	}
}

func TestUnpublishKeepsAwayFromRawDevices(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(blockCap()))
	raw, _ := filepath.Glob(filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/*/cryptcsi/*/dev"))
	if len(raw) != 1 {
		t.Fatalf("raw devices: %v", raw)
	}
	_, err := m.node.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: volumeID, TargetPath: raw[0]})
	m.refused("unpublish", err, codes.InvalidArgument, "raw devices")
}

func TestMissingArguments(t *testing.T) {
	m := newMachine(t).start()
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"unstage without volume": func() error {
			_, err := m.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{StagingTargetPath: "/s"})
			return err
		},
		"unstage without path": func() error {
			_, err := m.node.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: "v"})
			return err
		},
		"unpublish without volume": func() error {
			_, err := m.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{TargetPath: "/t"})
			return err
		},
		"unpublish without path": func() error {
			_, err := m.node.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: "v"})
			return err
		},
		"stats without volume": func() error {
			_, err := m.node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumePath: "/t"})
			return err
		},
		"stats without path": func() error {
			_, err := m.node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: "v"})
			return err
		},
		"expand without volume": func() error {
			_, err := m.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumePath: "/t"})
			return err
		},
		"expand without path": func() error {
			_, err := m.node.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: "v"})
			return err
		},
		"publish without volume": func() error {
			_, err := m.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{TargetPath: "/t", StagingTargetPath: "/s", VolumeCapability: blockCap()})
			return err
		},
		"publish without target": func() error {
			_, err := m.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "v", StagingTargetPath: "/s", VolumeCapability: blockCap()})
			return err
		},
		"publish without staging": func() error {
			_, err := m.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "v", TargetPath: "/t", VolumeCapability: blockCap()})
			return err
		},
		"publish without a purpose": func() error {
			_, err := m.node.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: "v", TargetPath: "/t", StagingTargetPath: "/s"})
			return err
		},
	} {
		m.refused(name, call(), codes.InvalidArgument)
	}
}

func TestExpand(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap("xfs"), "block": blockCap()} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t).start()
			m.ok("stage", m.stage(c))
			m.ok("publish", m.publish(c, "a", false))
			_, err := m.expand(m.target("a"), 96*mib)
			m.refused("before the cloud has", err, codes.Unavailable, "not grown it yet")
			m.wrapped.Grow(volumeID, 96*mib)
			for range 2 {
				size, err := m.expand(m.target("a"), 90*mib)
				m.ok("expand", err)
				if size != 90*mib {
					t.Errorf("it reports %d bytes", size)
				}
			}
			if got := m.mapping().Size; got != 80*mib {
				t.Errorf("the mapping has %d bytes", got)
			}
			usage := m.usage(m.target("a"))
			if usage[0].GetTotal() != 80*mib {
				t.Errorf("the pod sees %d bytes", usage[0].GetTotal())
			}
			if r := m.record(); r.Header.Sequence != 3 {
				t.Errorf("the floor is %d", r.Header.Sequence)
			}
			size, err := m.expand(m.staging(), 0)
			m.ok("expand without a size, by the staging path", err)
			if size != 96*mib {
				t.Errorf("it reports %d bytes", size)
			}
			_, err = m.expand(m.target("b"), 0)
			m.refused("by a path of nobody", err, codes.NotFound)
			m.ok("unpublish", m.unpublish("a"))
			m.ok("unstage", m.unstage())
			_, err = m.expand(m.target("a"), 0)
			m.refused("not staged", err, codes.NotFound)
			m.clean()
		})
	}
}

func (m *machine) usage(path string) []*csi.VolumeUsage {
	m.t.Helper()
	resp, err := m.node.NodeGetVolumeStats(m.t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: m.id, VolumePath: path})
	m.ok("stats", err)
	return resp.GetUsage()
}

func TestExpandWhatDidNotGrow(t *testing.T) {
	m := newMachine(t)
	m.cfg.TolerateUngrown = true
	m.start()
	m.ok("stage", m.stage(mountCap("")))
	size, err := m.expand(m.staging(), 96*mib)
	m.ok("expand", err)
	if size != 64*mib {
		t.Errorf("it reports %d bytes, the device has 64 MiB", size)
	}
}

func TestExpandIntegrity(t *testing.T) {
	m := newMachine(t)
	m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC})
	m.start()
	m.ok("stage", m.stage(mountCap("")))
	m.wrapped.Grow(volumeID, 96*mib)
	_, err := m.expand(m.staging(), 96*mib)
	m.ok("expand", err)
	if got := m.mapping().Size; got != 80*mib {
		t.Errorf("the mapping has %d bytes", got)
	}
}

// A volume with integrity whose new space takes long is staged at the size that
// it has; any other error of the growth is staging's.
func TestStageWhileItGrows(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		code codes.Code
	}{
		"in time":      {nil, codes.OK},
		"not in time":  {errdefs.Errorf(errdefs.ErrUnavailable, "growing, 3 %% done"), codes.OK},
		"shrunk again": {errdefs.Errorf(errdefs.ErrState, "it was shrunk again"), codes.FailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC})
			m.mapper = func(inner driver.Mapper) driver.Mapper { return &growing{inner, tt.err} }
			m.start()
			m.ok("stage", m.stage(mountCap("")))
			before := m.mapping().Size
			m.ok("unstage", m.unstage())
			m.wrapped.Grow(volumeID, 96*mib)
			m.ok("rescan", m.kernel.Rescan(t.Context(), m.disk.Path))
			if err := m.stage(mountCap("")); tt.code != codes.OK {
				m.refused("stage", err, tt.code, tt.err.Error())
				return
			} else {
				m.ok("stage", err)
			}
			if got := m.mapping().Size; got != before && tt.err != nil || got == before && tt.err == nil {
				t.Errorf("the mapping has %d bytes after %d", got, before)
			}
		})
	}
}

// growing answers Resize with an error, and within a bound.
type growing struct {
	driver.Mapper
	err error
}

func (g *growing) Resize(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		return driver.Mapping{}, errors.New("growing without a bound")
	}
	if g.err != nil {
		return driver.Mapping{}, g.err
	}
	return g.Mapper.Resize(ctx, v, d)
}

func TestExpandProfiles(t *testing.T) {
	broken := func(m *machine) { // NodeExpandVolume is the rpc after NodeGetCapabilities
		m.faults.Disarm()
		m.ok("stage", m.stage(mountCap("")))
		m.wrapped.Grow(volumeID, 96*mib)
		m.faults.Disarm()
		_, err := m.expand(m.staging(), 96*mib)
		m.ok("a first one, to count", err)
		for i, s := range m.faults.Trace() {
			if s == "rpc NodeExpandVolume" {
				m.faults.Arm(i+1, false, func() error { return errdefs.Errorf(errdefs.ErrState, "the device looks odd") })
				return
			}
		}
		m.faults.Disarm()
	}
	for policy, want := range map[driver.ExpandPolicy]codes.Code{
		driver.ExpandBestEffort: codes.OK, driver.ExpandDelegate: codes.FailedPrecondition, driver.ExpandSkip: codes.OK,
	} {
		m := newMachine(t)
		m.cfg.Profile = &driver.Profile{Expand: policy}
		m.start()
		broken(m)
		_, err := m.expand(m.staging(), 96*mib)
		if want == codes.OK {
			m.ok("expand", err)
		} else {
			m.refused("expand", err, want, "looks odd")
		}
		if called := m.count("rpc NodeExpandVolume") > 0; called != (policy != driver.ExpandSkip) {
			t.Errorf("policy %d: the wrapped driver was called: %v", policy, called)
		}
	}
}

func TestStats(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("")))
	m.ok("publish", m.publish(mountCap(""), "a", false))
	m.write(m.target("a"), "12345")
	usage := m.usage(m.target("a"))
	if len(usage) != 2 || usage[0].GetUnit() != csi.VolumeUsage_BYTES || usage[0].GetUsed() != 5 || usage[1].GetUnit() != csi.VolumeUsage_INODES || usage[1].GetUsed() != 1 {
		t.Errorf("usage %v", usage)
	}
	for _, path := range []string{"some/path", m.target("b"), "/"} {
		_, err := m.node.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: volumeID, VolumePath: path})
		m.refused("stats of "+path, err, codes.NotFound)
	}
	_, err := m.node.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: "vol-2", VolumePath: m.target("a")})
	m.refused("stats of another volume", err, codes.NotFound)
}

func TestIdentityAndCapabilities(t *testing.T) {
	m := newMachine(t)
	m.cfg.Version, m.cfg.Manifest = "1.2", map[string]string{"commit": "abc"}
	m.start()
	id := csi.NewIdentityClient(m.conn)
	info, err := id.GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
	m.ok("GetPluginInfo", err)
	if info.GetName() != "loop.cryptcsi.io" || info.GetVendorVersion() != "1.2" || info.GetManifest()["commit"] != "abc" {
		t.Errorf("plugin info %v", info)
	}
	caps, err := id.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	m.ok("GetPluginCapabilities", err)
	if len(caps.GetCapabilities()) != 3 || strings.Contains(caps.String(), "METADATA") {
		t.Errorf("plugin capabilities %v", caps)
	}
	m.faults.Disarm()
	if _, err := id.Probe(t.Context(), &csi.ProbeRequest{}); err != nil {
		t.Errorf("Probe: %v", err)
	}
	if steps := m.faults.Trace(); len(steps) > 0 {
		t.Errorf("Probe asked others: %v", steps)
	}
	node, err := m.node.NodeGetInfo(t.Context(), &csi.NodeGetInfoRequest{})
	m.ok("NodeGetInfo", err)
	if node.GetNodeId() != "node-1" || node.GetMaxVolumesPerNode() != 25 {
		t.Errorf("node info %v", node)
	}
	got, err := m.node.NodeGetCapabilities(t.Context(), &csi.NodeGetCapabilitiesRequest{})
	m.ok("NodeGetCapabilities", err)
	have := map[string]int{}
	for _, c := range got.GetCapabilities() {
		have[c.GetRpc().GetType().String()]++
	}
	want := map[string]int{"STAGE_UNSTAGE_VOLUME": 1, "EXPAND_VOLUME": 1, "GET_VOLUME_STATS": 1, "SINGLE_NODE_MULTI_WRITER": 1, "VOLUME_CONDITION": 1}
	if !cmp.Equal(have, want) {
		t.Errorf("node capabilities: %s", cmp.Diff(want, have))
	}
}

func TestWhatIsForwarded(t *testing.T) {
	m := newMachine(t)
	m.cfg.Wrapped = drivertest.Dial(t, drivertest.Serve(t, m.wrapped.Register))
	m.start()
	conn := drivertest.Dial(t, drivertest.Serve(t, m.driver.Register, m.driver.ServerOptions()...))
	var header metadata.MD
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-test", "yes")
	vol, err := csi.NewControllerClient(conn).CreateVolume(ctx, &csi.CreateVolumeRequest{Name: "n", VolumeCapabilities: []*csi.VolumeCapability{blockCap()}}, grpc.Header(&header))
	m.ok("CreateVolume", err)
	if vol.GetVolume().GetVolumeId() != "vol-n" || !cmp.Equal(header.Get("x-test"), []string{"yes"}) {
		t.Errorf("volume %v, header %v", vol, header)
	}
	_, err = csi.NewControllerClient(conn).ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{})
	m.refused("what the wrapped driver lacks", err, codes.Unimplemented, "ControllerModifyVolume")
	for method, ours := range map[string]bool{
		"/csi.v1.Node/NodeFromTheFuture":                             true, // not forwarded
		"/csi.v2.Node/NodeStageVolume":                               true,
		"/csi.v1.Identity/FromTheFuture":                             true,
		csi.GroupController_CreateVolumeGroupSnapshot_FullMethodName: true,
		csi.SnapshotMetadata_GetMetadataAllocated_FullMethodName:     true,
		"/csi.v1.Controller/FromTheFuture":                           false,
		"/other.example.Service/SomethingOfTheirs":                   false,
	} {
		err := conn.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{})
		words := "is not implemented" // ours
		if !ours {
			words = "unknown" // the wrapped server's
		}
		m.refused(method, err, codes.Unimplemented, words)
	}
}

func TestNew(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(m *machine)
		words  string
	}{
		"network filesystem": {func(m *machine) { m.wrapped.Name = "nfs.csi.k8s.io" }, "network filesystem"},
		"cannot hand over":   {func(m *machine) { m.wrapped.Name = "x.example"; m.cfg.StageWith = driver.StageWithWrapped }, "x.example"},
		"stage with whom":    {func(m *machine) { m.cfg.StageWith = "me" }, `"me"`},
		"odd name":           {func(m *machine) { m.cfg.DriverName = "../up" }, "../up"},
		"odd policy":         {func(m *machine) { m.cfg.Integrity = "maybe" }, "maybe"},
		"contradiction":      {func(m *machine) { m.cfg.Integrity = driver.IntegrityOff; m.cfg.Spec.Integrity = dek.IntegrityHMAC }, "off"},
		"odd cipher":         {func(m *machine) { m.cfg.Spec.Cipher = "cipher_null" }, "cipher_null"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			tt.change(m)
			m.refused("New", errgrpc.ToGRPC(m.tryStart()), codes.InvalidArgument, tt.words)
		})
	}
}

func TestMappingName(t *testing.T) {
	// Must never change: volumes that are open while we are updated have it.
	// Computed with: printf 'd.example/vol-1' | sha256sum
	if got, want := driver.MappingName("d.example", "vol-1"), "cryptcsi-"+"fcbec0918ab315c422499e0504edbbda"; got != want {
		t.Errorf("MappingName = %q, want %q", got, want)
	}
	if driver.MappingName("a", "b") == driver.MappingName("a", "c") || driver.MappingName("a", "b") == driver.MappingName("c", "b") {
		t.Error("two volumes have one name")
	}
}

func TestInspectAndReconcile(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("xfs")))
	m.ok("publish", m.publish(mountCap("xfs"), "a", false))
	orphan := func(id string) driver.Mapping {
		key := drivertest.NewDEK(dek.ID("x/"+id), dek.Spec{Cipher: dek.CipherXTS})
		key.Claim.UUID = "u"
		got, err := drivertest.Mapper{Kernel: m.kernel}.Open(t.Context(), driver.Volume{Name: driver.MappingName("x", id), Device: m.kernel.AddDisk(64 * mib)}, key)
		m.ok("an orphan", err)
		return got
	}
	idle, busy := orphan("idle"), orphan("busy")
	release, err := m.kernel.Hold(busy.Path)
	m.ok("holding one", err)
	defer release()

	all, err := m.driver.Inspect(t.Context())
	m.ok("Inspect", err)
	states := map[string]driver.MappingState{}
	for _, info := range all {
		states[info.Name] = info.State
		if info.VolumeID == volumeID && (info.StagingPath != m.staging() || info.Filesystem != "xfs" || info.DEK != dekID || !cmp.Equal(info.UsedAt, []string{m.target("a")})) {
			t.Errorf("it says of the volume: %+v", info)
		}
	}
	ours := driver.MappingName("loop.cryptcsi.io", volumeID)
	if want := map[string]driver.MappingState{ours: driver.StateStaged, idle.Name: driver.StateOrphan, busy.Name: driver.StateOrphan}; !cmp.Equal(states, want) {
		t.Errorf("states: %s", cmp.Diff(want, states))
	}

	left, err := m.driver.Reconcile(t.Context())
	m.ok("Reconcile", err)
	if len(left) != 1 || left[0].Name != busy.Name {
		t.Errorf("Reconcile left %+v", left)
	}
	m.read(m.target("a"), m.written("a"))

	m.kernel.Reboot() // and a wrapped driver that remembers what it had staged
	m.boot += "+"
	m.start()
	left, err = m.driver.Reconcile(t.Context())
	if err != nil || len(left) > 0 {
		t.Errorf("Reconcile after a reboot left %+v, %v", left, err)
	}
	m.clean()
	m.ok("stage", m.stage(mountCap("xfs")))
	m.read(m.staging(), "secret words")
}

// written writes a file for a pod and returns its content.
func (m *machine) written(pod string) string {
	m.write(m.target(pod), "secret words")
	return "secret words"
}

func TestReconcileKnowsOtherInstances(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(blockCap())) // open, and nobody holds it
	m.cfg.DriverName = "second.example"
	m.start()
	left, err := m.driver.Reconcile(t.Context())
	if err != nil || len(left) > 0 {
		t.Errorf("Reconcile of another driver left %+v, %v", left, err)
	}
	m.mapping() // still there
}

// kubelet's access modes change with a capability that an update of the wrapped
// driver brings or takes away, while volumes are staged.
func TestTheAccessModeOfAStagedVolumeIsSpelledAnew(t *testing.T) {
	const vague, many, one = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER, singleWriter
	for _, tt := range []struct {
		staged, asked csi.VolumeCapability_AccessMode_Mode
		same          bool
	}{
		{vague, many, true}, {many, vague, true}, {vague, one, true}, {one, vague, true},
		{many, one, false}, {one, many, false}, {vague, readerOnly, false}, {vague, manyWriters, false},
	} {
		m := newMachine(t).start()
		m.ok("stage", m.stage(capability(tt.staged, blockCap())))
		m.ok("publish", m.publish(capability(tt.staged, blockCap()), "a", false))
		err := m.stage(capability(tt.asked, blockCap()))
		if !tt.same {
			m.refused("stage", err, codes.AlreadyExists, tt.asked.String())
			continue
		}
		m.ok("stage as "+tt.asked.String(), err)
		m.ok("unpublish", m.unpublish("a"))
		m.ok("publish", m.publish(capability(tt.asked, blockCap()), "b", false))
		m.ok("unpublish", m.unpublish("b"))
		m.ok("unstage", m.unstage())
		m.clean()
	}
}
