package loopdriver_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/test/loopdriver"
)

func TestCreateVolumeSizes(t *testing.T) {
	r := start(t, loopdriver.Config{TotalBytes: 4 << 30})
	for _, tt := range []struct {
		name            string
		required, limit int64
		want            int64
		code            codes.Code
	}{
		{"default", 0, 0, 1 << 30, codes.OK},
		{"exact", 16 * mib, 0, 16 * mib, codes.OK},
		{"rounded up", 16*mib + 1, 0, 17 * mib, codes.OK},
		{"limit below default", 0, 8*mib + 5, 8 * mib, codes.OK},
		{"required is limit", 3 * mib, 3 * mib, 3 * mib, codes.OK},
		{"rounding passes limit", 3*mib + 1, 3*mib + 2, 0, codes.OutOfRange},
		{"limit under a mebibyte", 0, 100, 0, codes.OutOfRange},
		{"limit under required", 3 * mib, 2 * mib, 0, codes.InvalidArgument},
		{"negative", -1, 0, 0, codes.InvalidArgument},
		{"over the total", 5 << 30, 0, 0, codes.OutOfRange},
		{"over what is left", 4 << 30, 0, 0, codes.ResourceExhausted},
		{"overflow", 1<<63 - 1, 0, 0, codes.OutOfRange},
	} {
		req := createRequest(tt.name, 0)
		req.CapacityRange = &csi.CapacityRange{RequiredBytes: tt.required, LimitBytes: tt.limit}
		resp, err := r.CreateVolume(t.Context(), req)
		wantCode(t, tt.name, err, tt.code)
		if err != nil {
			continue
		}
		if got := resp.GetVolume().GetCapacityBytes(); got != tt.want {
			t.Errorf("%s: %d bytes, want %d", tt.name, got, tt.want)
		}
		fi, err := os.Stat(r.BackingFile(resp.GetVolume().GetVolumeId()))
		must(t, tt.name, err)
		if fi.Size() != tt.want {
			t.Errorf("%s: the file has %d bytes, want %d", tt.name, fi.Size(), tt.want)
		}
		if used := fi.Sys().(*syscall.Stat_t).Blocks; used > 16 {
			t.Errorf("%s: %d blocks are used by a sparse file", tt.name, used)
		}
	}
}

func TestCreateVolumeRefuses(t *testing.T) {
	r := start(t, loopdriver.Config{})
	for _, tt := range []struct {
		name   string
		change func(*csi.CreateVolumeRequest)
		want   codes.Code
	}{
		{"no name", func(q *csi.CreateVolumeRequest) { q.Name = "" }, codes.InvalidArgument},
		{"no capability", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities = nil }, codes.InvalidArgument},
		{"no access type", func(q *csi.CreateVolumeRequest) {
			q.VolumeCapabilities = []*csi.VolumeCapability{withMode(&csi.VolumeCapability{})}
		}, codes.InvalidArgument},
		{"no access mode", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities[0].AccessMode = nil }, codes.InvalidArgument},
		{"filesystem with several writers", func(q *csi.CreateVolumeRequest) {
			q.VolumeCapabilities[1].AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
		}, codes.InvalidArgument},
		{"foreign filesystem", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities[1] = mountCap("ntfs") }, codes.InvalidArgument},
		{"unknown parameter", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"cryptcsi.io/integrity": "on"} }, codes.InvalidArgument},
		{"mutable parameter", func(q *csi.CreateVolumeRequest) { q.MutableParameters = map[string]string{"iops": "3"} }, codes.InvalidArgument},
		{"other node", func(q *csi.CreateVolumeRequest) {
			q.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{
				{Segments: map[string]string{"topology.loop.cryptcsi.io/node": "elsewhere"}},
			}}
		}, codes.ResourceExhausted},
		{"unknown snapshot", func(q *csi.CreateVolumeRequest) { q.VolumeContentSource = fromSnapshot("snap-0000000000") }, codes.NotFound},
		{"unknown source volume", func(q *csi.CreateVolumeRequest) { q.VolumeContentSource = fromVolume("vol-0000000000") }, codes.NotFound},
	} {
		req := createRequest("v", mib)
		tt.change(req)
		_, err := r.CreateVolume(t.Context(), req)
		wantCode(t, tt.name, err, tt.want)
	}
	resp, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	must(t, "ListVolumes", err)
	if n := len(resp.GetEntries()); n != 0 {
		t.Errorf("%d volumes came out of refused requests", n)
	}

	req := createRequest("v", mib)
	req.Parameters = map[string]string{"note": "hello", "csi.storage.k8s.io/pvc/name": "claim"}
	req.VolumeCapabilities[0].AccessMode.Mode = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	created, err := r.CreateVolume(t.Context(), req)
	must(t, "CreateVolume", err)
	if got := created.GetVolume().GetVolumeContext()["note"]; got != "hello" {
		t.Errorf("note in the volume context is %q", got)
	}
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

func TestVolumesAreFoundByNameAndSurviveARestart(t *testing.T) {
	dir := t.TempDir()
	r := start(t, loopdriver.Config{DataDir: dir})
	id := r.create(t, "a", 4*mib)
	if !regexp.MustCompile(`^vol-[0-9a-f]{10}$`).MatchString(id) {
		t.Errorf("volume ID %q", id)
	}
	must(t, "write", os.WriteFile(filepath.Join(dir, "volumes", "vol-ffffffffff.img"), nil, 0o600)) // a crash's leftover

	if _, err := loopdriver.New(loopdriver.Config{DataDir: dir, NodeID: node}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second driver on the same directory: %v", err)
	}
	r.stop()
	r = start(t, loopdriver.Config{DataDir: dir})
	if again := r.create(t, "a", 4*mib); again != id {
		t.Errorf("after a restart volume a is %s, was %s", again, id)
	}
	if _, err := os.Stat(r.BackingFile("vol-ffffffffff")); !os.IsNotExist(err) {
		t.Errorf("the leftover is still there: %v", err)
	}
	_, err := r.CreateVolume(t.Context(), createRequest("a", 5*mib))
	wantCode(t, "larger volume of the same name", err, codes.AlreadyExists)
	req := createRequest("a", 4*mib)
	req.VolumeContentSource = fromVolume(id)
	_, err = r.CreateVolume(t.Context(), req)
	wantCode(t, "same name from a source", err, codes.AlreadyExists)

	for range 2 {
		_, err = r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		must(t, "DeleteVolume", err)
	}
	if _, err := os.Stat(r.BackingFile(id)); !os.IsNotExist(err) {
		t.Errorf("the file of a deleted volume is still there: %v", err)
	}
}

func TestALostStateIsRefused(t *testing.T) {
	dir := t.TempDir()
	r := start(t, loopdriver.Config{DataDir: dir})
	id := r.create(t, "a", mib)
	r.stop()
	must(t, "remove", os.Remove(filepath.Join(dir, "state.json")))
	if _, err := loopdriver.New(loopdriver.Config{DataDir: dir, NodeID: node}); err == nil || !strings.Contains(err.Error(), "state.json is missing") {
		t.Errorf("New without state: %v", err)
	}
	if _, err := os.Stat(r.BackingFile(id)); err != nil {
		t.Errorf("the volume's file: %v", err)
	}
	must(t, "write", os.WriteFile(filepath.Join(dir, "state.json"), []byte(`{"volumes":`), 0o600))
	if _, err := loopdriver.New(loopdriver.Config{DataDir: dir, NodeID: node}); err == nil || !strings.Contains(err.Error(), "state.json") {
		t.Errorf("New with half a state: %v", err)
	}
}

// scatter writes data at both ends of file and across an odd offset, leaves
// holes between, and returns what the file now holds.
func scatter(t *testing.T, file string, size int64) []byte {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(t, "open", err)
	defer f.Close()
	content := make([]byte, size)
	for _, at := range []int64{0, size/3 + 4099, size - 8192} {
		copy(content[at:], bytes.Repeat([]byte("cryptcsi"), 1024))
		_, err := f.WriteAt(content[at:at+8192], at)
		must(t, "write", err)
	}
	return content
}

func TestSnapshotsAndClonesAreCopies(t *testing.T) {
	r := start(t, loopdriver.Config{})
	source := r.create(t, "source", 64*mib)
	want := scatter(t, r.BackingFile(source), 64*mib)

	snapReq := &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: source}
	snap, err := r.CreateSnapshot(t.Context(), snapReq)
	must(t, "CreateSnapshot", err)
	id := snap.GetSnapshot().GetSnapshotId()
	must(t, "overwrite", os.WriteFile(r.BackingFile(source), make([]byte, 64*mib), 0o600))

	again, err := r.CreateSnapshot(t.Context(), snapReq)
	must(t, "CreateSnapshot again", err)
	if again.GetSnapshot().GetSnapshotId() != id || !again.GetSnapshot().GetCreationTime().AsTime().Equal(snap.GetSnapshot().GetCreationTime().AsTime()) {
		t.Errorf("the same request gave %v and %v", snap, again)
	}
	req := createRequest("restored", 80*mib)
	req.VolumeContentSource = fromSnapshot(id)
	restored, err := r.CreateVolume(t.Context(), req)
	must(t, "CreateVolume from snapshot", err)
	req = createRequest("cloned", 0)
	req.VolumeContentSource = fromVolume(restored.GetVolume().GetVolumeId())
	cloned, err := r.CreateVolume(t.Context(), req)
	must(t, "CreateVolume from volume", err)

	_, err = r.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
	must(t, "DeleteSnapshot", err)
	want = append(want, make([]byte, 16*mib)...)
	for _, v := range []*csi.CreateVolumeResponse{restored, cloned} {
		file := r.BackingFile(v.GetVolume().GetVolumeId())
		got, err := os.ReadFile(file)
		must(t, "read", err)
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from its source", file)
		}
		fi, err := os.Stat(file)
		must(t, "stat", err)
		if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > mib {
			t.Errorf("%s uses %d bytes for 24 KiB of data", file, used)
		}
	}
	// The snapshot is gone, but a repeated request still finds its volume.
	req = createRequest("restored", 80*mib)
	req.VolumeContentSource = fromSnapshot(id)
	repeated, err := r.CreateVolume(t.Context(), req)
	must(t, "CreateVolume repeated", err)
	if repeated.GetVolume().GetVolumeId() != restored.GetVolume().GetVolumeId() {
		t.Error("a repeated CreateVolume made another volume")
	}
	_, err = r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "x", SourceVolumeId: "vol-0000000000"})
	wantCode(t, "snapshot of no volume", err, codes.NotFound)
}

func TestCloneSmallerThanItsSource(t *testing.T) {
	r := start(t, loopdriver.Config{})
	req := createRequest("small", 2*mib)
	req.CapacityRange.LimitBytes = 3 * mib
	req.VolumeContentSource = fromVolume(r.create(t, "big", 4*mib))
	_, err := r.CreateVolume(t.Context(), req)
	wantCode(t, "clone smaller than its source", err, codes.OutOfRange)
}

func TestControllerExpandVolume(t *testing.T) {
	r := start(t, loopdriver.Config{TotalBytes: 100 * mib, NodeExpansion: loopdriver.ExpandMount})
	id := r.create(t, "a", 10*mib)
	expand := func(bytes int64, c *csi.VolumeCapability) (*csi.ControllerExpandVolumeResponse, error) {
		return r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{
			VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}, VolumeCapability: c,
		})
	}
	size := func() int64 {
		fi, err := os.Stat(r.BackingFile(id))
		must(t, "stat", err)
		return fi.Size()
	}
	for _, tt := range []struct {
		ask, want int64
		c         *csi.VolumeCapability
		node      bool
	}{
		{20 * mib, 20 * mib, mountCap(""), true},
		{20 * mib, 20 * mib, blockCap(), false},
		{5 * mib, 20 * mib, nil, true}, // never shrinks
		{20*mib + 1, 21 * mib, nil, true},
	} {
		resp, err := expand(tt.ask, tt.c)
		must(t, "ControllerExpandVolume", err)
		if resp.GetCapacityBytes() != tt.want || size() != tt.want || resp.GetNodeExpansionRequired() != tt.node {
			t.Errorf("expand to %d: %v and a file of %d bytes, want %d and node expansion %v", tt.ask, resp, size(), tt.want, tt.node)
		}
	}
	_, err := expand(200*mib, nil)
	wantCode(t, "over the total", err, codes.OutOfRange)
	r.create(t, "b", 70*mib)
	_, err = expand(40*mib, nil)
	wantCode(t, "over what is left", err, codes.ResourceExhausted)
	if size() != 21*mib {
		t.Errorf("a refused expansion left %d bytes", size())
	}

	must(t, "SetFaults", r.SetFaults("no-grow:a"))
	resp, err := expand(25*mib, nil)
	must(t, "expand with no-grow", err)
	if resp.GetCapacityBytes() != 25*mib || size() != 21*mib {
		t.Errorf("no-grow: answer %d, file %d", resp.GetCapacityBytes(), size())
	}
	get, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
	must(t, "ControllerGetVolume", err)
	if !get.GetStatus().GetVolumeCondition().GetAbnormal() {
		t.Error("a file smaller than its volume is said to be normal")
	}
	must(t, "SetFaults", r.SetFaults())
	_, err = expand(25*mib, nil)
	must(t, "expand again", err)
	if size() != 25*mib {
		t.Errorf("a repeated expansion left %d bytes", size())
	}
}

func TestListsArePaged(t *testing.T) {
	r := start(t, loopdriver.Config{})
	ids := map[string]bool{}
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		ids[r.create(t, name, mib)] = true
	}
	token := ""
	for page := 0; ; page++ {
		resp, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: token, MaxEntries: 2})
		must(t, "ListVolumes", err)
		for _, e := range resp.GetEntries() {
			id := e.GetVolume().GetVolumeId()
			if !ids[id] {
				t.Errorf("volume %s is listed twice or is none of ours", id)
			}
			delete(ids, id)
			_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}) // the token has to survive it
			must(t, "DeleteVolume", err)
		}
		if token = resp.GetNextToken(); token == "" {
			if page != 2 {
				t.Errorf("the last of five volumes came on page %d of two each", page+1)
			}
			break
		}
	}
	if len(ids) != 0 {
		t.Errorf("not listed: %v", ids)
	}
	_, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{StartingToken: "invalid-token"})
	wantCode(t, "foreign token", err, codes.Aborted)
	_, err = r.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
	wantCode(t, "negative max_entries", err, codes.InvalidArgument)
}

func TestCapacityIsWhatIsLeft(t *testing.T) {
	r := start(t, loopdriver.Config{TotalBytes: 100 * mib})
	r.create(t, "a", 30*mib)
	for _, tt := range []struct {
		node string
		want int64
	}{{"", 70 * mib}, {node, 70 * mib}, {"elsewhere", 0}} {
		req := &csi.GetCapacityRequest{}
		if tt.node != "" {
			req.AccessibleTopology = &csi.Topology{Segments: map[string]string{"topology.loop.cryptcsi.io/node": tt.node}}
		}
		resp, err := r.GetCapacity(t.Context(), req)
		must(t, "GetCapacity", err)
		if resp.GetAvailableCapacity() != tt.want {
			t.Errorf("capacity on node %q is %d, want %d", tt.node, resp.GetAvailableCapacity(), tt.want)
		}
	}
}

func TestWithoutAttachOrStageTheMethodsAreGone(t *testing.T) {
	r := start(t, loopdriver.Config{NoAttach: true, NoStage: true})
	_, err := r.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{})
	wantCode(t, "ControllerPublishVolume", err, codes.Unimplemented)
	_, err = r.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{})
	wantCode(t, "ControllerUnpublishVolume", err, codes.Unimplemented)
	_, err = r.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{})
	wantCode(t, "NodeStageVolume", err, codes.Unimplemented)
	_, err = r.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{})
	wantCode(t, "NodeUnstageVolume", err, codes.Unimplemented)
}

func TestItSaysWhatItIsNotFor(t *testing.T) {
	r := start(t, loopdriver.Config{Name: "other.example.com"})
	info, err := r.GetPluginInfo(context.Background(), &csi.GetPluginInfoRequest{})
	must(t, "GetPluginInfo", err)
	if info.GetName() != "other.example.com" || !strings.Contains(info.GetManifest()["purpose"], "never production") {
		t.Errorf("GetPluginInfo = %v", info)
	}
}
