package loopdriver_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/test/loopdriver"
)

func TestFaultSyntax(t *testing.T) {
	r := start(t, loopdriver.Config{})
	for _, good := range []string{
		"slow:NodeStageVolume=2s", "slow:Probe#3=1ms",
		"error:CreateVolume=UNAVAILABLE", "error:CreateVolume#1=OUT_OF_RANGE", "error-after:NodePublishVolume#12=INTERNAL",
		"stale-device", "stale-device:pvc-1", "blank-device", "blank-device:vol-0123456789",
		"stack-publish", "no-grow", "ignore-block:x",
		"late-growth", "picky-expand", "one-mount", "forgetful", "format-early", "short-name:pvc-1", "round-down",
	} {
		if err := r.SetFaults(good); err != nil {
			t.Errorf("SetFaults(%q): %v", good, err)
		}
	}
	for bad, why := range map[string]string{
		"":                                 "unknown kind",
		"fast:NodeStageVolume=2s":          "unknown kind",
		"slow:NodeStageVolume":             "duration",
		"slow:NodeStageVolume=-2s":         "duration",
		"slow:NodeStage=2s":                "no RPC",
		"slow=2s":                          "no RPC",
		"error:CreateVolume#0=UNAVAILABLE": "call's number",
		"error:CreateVolume#x=UNAVAILABLE": "call's number",
		"error:CreateVolume=OK":            "gRPC error code",
		"error:CreateVolume=SOMETHING":     "gRPC error code",
		"error:CreateVolume":               "gRPC error code",
		"stale-device:":                    "want stale-device",
		"no-grow=1":                        "want no-grow",
	} {
		if err := r.SetFaults(bad); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("SetFaults(%q) = %v, want an error with %q", bad, err, why)
		}
	}
	_, err := loopdriver.New(loopdriver.Config{DataDir: t.TempDir(), NodeID: node, Faults: []string{"nonsense"}})
	if err == nil {
		t.Error("New with a bad fault succeeded")
	}
}

func TestFaultRoundDown(t *testing.T) {
	r := start(t, loopdriver.Config{Faults: []string{"round-down"}})
	const gib = 1 << 30
	bytes := func(id string) int64 {
		v, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
		must(t, "ControllerGetVolume", err)
		return v.GetVolume().GetCapacityBytes()
	}
	for _, tt := range []struct{ asked, has int64 }{{mib, gib}, {gib, gib}, {2*gib + mib, 2 * gib}} {
		req := createRequest(fmt.Sprint(tt.asked), tt.asked)
		got, err := r.CreateVolume(t.Context(), req)
		must(t, "CreateVolume", err)
		if has := bytes(got.GetVolume().GetVolumeId()); got.GetVolume().GetCapacityBytes() != tt.asked || has != tt.has {
			t.Errorf("asked for %d: says %d, has %d", tt.asked, got.GetVolume().GetCapacityBytes(), has)
		}
		_, err = r.CreateVolume(t.Context(), req)
		want := codes.OK
		if tt.asked > tt.has {
			want = codes.AlreadyExists
		}
		wantCode(t, "the same again", err, want)
	}
	id := r.create(t, "grows", gib)
	got, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 3*gib + 1}})
	must(t, "ControllerExpandVolume", err)
	if has := bytes(id); got.GetCapacityBytes() != 3*gib+mib || has != 3*gib {
		t.Errorf("grew to %d, says %d", has, got.GetCapacityBytes())
	}
}

func TestErrorsHitTheCallTheyNumber(t *testing.T) {
	r := start(t, loopdriver.Config{Faults: []string{"error:CreateVolume#2=UNAVAILABLE", "error-after:CreateVolume#3=INTERNAL"}})
	create := func(name string) error {
		_, err := r.CreateVolume(t.Context(), createRequest(name, mib))
		return err
	}
	list := func() int {
		resp, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
		must(t, "ListVolumes", err)
		return len(resp.GetEntries())
	}
	wantCode(t, "first call", create("a"), codes.OK)
	wantCode(t, "second call", create("b"), codes.Unavailable)
	if n := list(); n != 1 {
		t.Errorf("%d volumes after a call that must not do anything", n)
	}
	wantCode(t, "third call", create("b"), codes.Internal)
	if n := list(); n != 2 {
		t.Errorf("%d volumes after a call whose answer was lost", n)
	}
	wantCode(t, "fourth call", create("b"), codes.OK)
	if n := list(); n != 2 {
		t.Errorf("%d volumes after the retry", n)
	}
}

func TestFaultsFileIsReadAtEachCall(t *testing.T) {
	dir := t.TempDir()
	r := start(t, loopdriver.Config{DataDir: dir})
	probe := func() error {
		_, err := r.Probe(t.Context(), &csi.ProbeRequest{})
		return err
	}
	write := func(s string) {
		t.Helper()
		file := filepath.Join(dir, "faults.json")
		must(t, "write", os.WriteFile(file+".new", []byte(s), 0o600))
		must(t, "rename", os.Rename(file+".new", file))
	}
	wantCode(t, "no file", probe(), codes.OK)
	write(`["error:Probe#3=ABORTED"]`)
	wantCode(t, "call 1", probe(), codes.OK)
	wantCode(t, "call 2", probe(), codes.OK)
	write(`["error:Probe#3=ABORTED", "no-grow"]`) // the rule that stays keeps its count
	wantCode(t, "call 3", probe(), codes.Aborted)
	wantCode(t, "call 4", probe(), codes.OK)
	write(`["error:Probe=UNKNOWN"]`)
	wantCode(t, "every call", probe(), codes.Unknown)
	write(`["error:`)
	wantCode(t, "half a file", probe(), codes.FailedPrecondition)
	write(`["nonsense"]`)
	wantCode(t, "a bad fault", probe(), codes.FailedPrecondition)
	must(t, "remove", os.Remove(filepath.Join(dir, "faults.json")))
	wantCode(t, "file removed", probe(), codes.OK)
}

func TestASlowCallHoldsItsVolumeAndNoOther(t *testing.T) {
	r := start(t, loopdriver.Config{})
	a, b := r.create(t, "a", mib), r.create(t, "b", mib)
	expand := func(ctx context.Context, id string) error {
		_, err := r.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * mib}})
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	slow := make(chan error, 1)
	begin := func() {
		must(t, "SetFaults", r.SetFaults()) // so that calls are counted anew
		must(t, "SetFaults", r.SetFaults("slow:ControllerExpandVolume#1=1h"))
		go func() { slow <- expand(ctx, a) }()
	}
	begin()
	// The first call has arrived when another one on the volume is refused.
	for {
		select {
		case err := <-slow: // it met the other one, and was refused itself
			wantCode(t, "the slow call", err, codes.Aborted)
			begin()
		default:
		}
		_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: "vol-of-nobody"})
		must(t, "DeleteVolume of another", err)
		_, err = r.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: a, TargetPath: filepath.Join(t.TempDir(), "x")})
		if err != nil {
			wantCode(t, "second call on the volume", err, codes.Aborted)
			break
		}
		time.Sleep(time.Millisecond)
	}
	wantCode(t, "call on another volume", expand(t.Context(), b), codes.OK)
	_, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: a})
	wantCode(t, "query of the volume", err, codes.OK)
	cancel()
	wantCode(t, "cancelled call", <-slow, codes.Canceled)
	get, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: a})
	must(t, "ControllerGetVolume", err)
	if got := get.GetVolume().GetCapacityBytes(); got != mib {
		t.Errorf("a call cancelled while it waited did its work: %d bytes", got)
	}
}
