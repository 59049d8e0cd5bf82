package driver_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
)

func (p *plant) groupSnapshot(name string, volumes ...string) (*csi.VolumeGroupSnapshot, error) {
	resp, err := p.group.CreateVolumeGroupSnapshot(p.t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: volumes})
	return resp.GetGroupSnapshot(), err
}

func (p *plant) deleteGroup(id string, snapshots ...string) error {
	_, err := p.group.DeleteVolumeGroupSnapshot(p.t.Context(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: snapshots})
	return err
}

// twoVolumes are called vol-a and vol-b, the second with integrity, and a node
// has formatted both.
func twoVolumes(p *plant) {
	p.mustCreate(request("a"))
	p.mustCreate(request("b", with("cryptcsi.io/integrity", "hmac-sha256")))
	p.formatted(volumeDEK("vol-a"))
	p.formatted(volumeDEK("vol-b"))
}

// Snapshots that were cut together are restored one by one, each with its own
// source's key, and deleted together.
func TestGroupSnapshots(t *testing.T) {
	p := newPlant(t).start()
	twoVolumes(p)
	g, err := p.groupSnapshot("g", "vol-b", "vol-a")
	p.ok("CreateVolumeGroupSnapshot", err)
	got, err := p.group.GetVolumeGroupSnapshot(t.Context(), &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId()})
	p.ok("GetVolumeGroupSnapshot", err)
	if got.GetGroupSnapshot().String() != g.String() || len(g.GetSnapshots()) != 2 {
		t.Errorf("created %v, is %v", g, got.GetGroupSnapshot())
	}
	for i, name := range []string{"a", "b"} {
		s, source := g.GetSnapshots()[i], p.dek(volumeDEK("vol-"+name))
		d := p.dek(snapshotDEK(s.GetSnapshotId()))
		if !d.Previous.Equal(source.Key) || d.Source != source.ID || d.Spec.Name != "g" || d.Spec.Integrity != source.Spec.Integrity {
			t.Errorf("the record of the snapshot of %s: %+v", name, d)
		}
		if size := s.GetSizeBytes(); size < 64*mib || size > 66*mib {
			t.Errorf("the snapshot of %s has %d bytes", name, size)
		}
	}
	p.mustCreate(request("restored", of(g.GetSnapshots()[0].GetSnapshotId(), "")))
	if d := p.dek(volumeDEK("vol-restored")); !d.Previous.Equal(p.dek(volumeDEK("vol-a")).Key) {
		t.Error("the restored volume does not open with its source's key")
	}
	p.ok("DeleteVolumeGroupSnapshot", p.deleteGroup(g.GetGroupSnapshotId(), "snap-g-vol-a", "snap-g-vol-b"))
	p.gone(snapshotDEK("snap-g-vol-a"))
	p.gone(snapshotDEK("snap-g-vol-b"))
	p.ok("again", p.deleteGroup(g.GetGroupSnapshotId(), "snap-g-vol-a", "snap-g-vol-b"))
	p.ok("one that never was", p.deleteGroup("never was"))

	caps, err := p.group.GroupControllerGetCapabilities(t.Context(), &csi.GroupControllerGetCapabilitiesRequest{})
	if err != nil || len(caps.GetCapabilities()) != 1 {
		t.Errorf("capabilities: %v, %v", caps, err)
	}
	p.lawful()
}

// What cannot be cut is refused before any volume is.
func TestGroupSnapshotsThatCannotBe(t *testing.T) {
	p := newPlant(t).start()
	twoVolumes(p)
	p.wrapped.Create("plain", 64*mib)
	p.mustCreate(request("clone", of("", "vol-a")))
	for what, tt := range map[string]struct {
		name    string
		volumes []string
		code    codes.Code
		says    string
	}{
		"no name":                   {"", []string{"vol-a"}, codes.InvalidArgument, "no name"},
		"no volume":                 {"x", nil, codes.InvalidArgument, "missing"},
		"an empty ID":               {"x", []string{"vol-a", ""}, codes.InvalidArgument, "missing"},
		"a volume twice":            {"x", []string{"vol-a", "vol-b", "vol-a"}, codes.InvalidArgument, "twice"},
		"an unencrypted one":        {"x", []string{"vol-a", "plain"}, codes.NotFound, "not encrypted"},
		"a clone that nobody used":  {"x", []string{"vol-a", "vol-clone"}, codes.Aborted, "use it once"},
		"one that is not there yet": {"x", []string{"vol-a", "vol-x"}, codes.NotFound, "vol-x"},
	} {
		_, err := p.groupSnapshot(tt.name, tt.volumes...)
		p.refused(what, err, tt.code, tt.says)
	}
	_, err := p.group.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{
		Name: "x", SourceVolumeIds: []string{"vol-a"}, Parameters: map[string]string{"cryptcsi.io/integrity": "none"},
	})
	p.refused("a parameter of ours", err, codes.InvalidArgument, "cryptcsi.io/integrity")
	if got := p.wrapped.Snapshots(); len(got) > 0 {
		t.Errorf("there are %v", got)
	}
	_, err = p.groupSnapshot("x", "vol-a", "vol-b") // nothing is locked any more
	p.ok("CreateVolumeGroupSnapshot", err)
}

// A driver that mixes up what it has cut, or answers with what exists, gets no
// key for it, and what exists stays as it is.
func TestGroupSnapshotsOfAnother(t *testing.T) {
	p := newPlant(t).start()
	twoVolumes(p)
	p.mustCreate(request("victim"))
	p.formatted(volumeDEK("vol-victim"))
	_, err := p.snapshot("victim", "vol-victim")
	p.ok("CreateSnapshot", err)
	before := p.dek(snapshotDEK("snap-victim"))
	for i, tt := range []struct {
		what   string
		answer func(*csi.VolumeGroupSnapshot)
		code   codes.Code
		says   string
	}{
		{"a snapshot of another volume", func(g *csi.VolumeGroupSnapshot) { g.Snapshots[1].SourceVolumeId = "vol-victim" }, codes.FailedPrecondition, "vol-victim"},
		{"two snapshots of one volume", func(g *csi.VolumeGroupSnapshot) { g.Snapshots[1].SourceVolumeId = "vol-a" }, codes.FailedPrecondition, "vol-a"},
		{"a snapshot missing", func(g *csi.VolumeGroupSnapshot) { g.Snapshots = g.Snapshots[:1] }, codes.FailedPrecondition, "2 volumes"},
		{"the same snapshot twice", func(g *csi.VolumeGroupSnapshot) { g.Snapshots[1].SnapshotId = g.Snapshots[0].SnapshotId }, codes.AlreadyExists, "left as it is"},
		{"a snapshot that exists", func(g *csi.VolumeGroupSnapshot) { g.Snapshots[0].SnapshotId = "snap-victim" }, codes.AlreadyExists, "snap-victim"},
	} {
		p.wrapped.AnswerGroup = tt.answer
		_, err := p.groupSnapshot(fmt.Sprint("g", i), "vol-a", "vol-b")
		p.refused(tt.what, err, tt.code, tt.says)
	}
	p.wrapped.AnswerGroup = nil
	g, err := p.groupSnapshot("g", "vol-a", "vol-b")
	p.ok("CreateVolumeGroupSnapshot", err)
	p.refused("deleting another's snapshot with it", p.deleteGroup(g.GetGroupSnapshotId(), "snap-g-vol-a", "snap-victim"), codes.InvalidArgument, "nothing was deleted")
	p.refused("deleting it without a list", p.deleteGroup(g.GetGroupSnapshotId()), codes.InvalidArgument, "missing")
	p.refused("deleting none", p.deleteGroup(""), codes.InvalidArgument, "missing")
	if after := p.dek(snapshotDEK("snap-victim")); !after.Previous.Equal(before.Previous) {
		t.Error("the victim's snapshot has another key")
	}
	p.dek(snapshotDEK("snap-g-vol-a"))
	if got := p.wrapped.Snapshots(); !slices.Contains(got, "snap-victim") || !slices.Contains(got, "snap-g-vol-a") {
		t.Errorf("there are %v", got)
	}
}

// interruptedGroups are operations for TestFaultsOfTheController.
func interruptedGroups() (create, remove interruption) {
	cut := func(p *plant) error { _, err := p.groupSnapshot("g", "vol-a", "vol-b"); return err }
	whole := func(p *plant) {
		for _, name := range []string{"a", "b"} {
			if d := p.dek(snapshotDEK("snap-g-vol-" + name)); d.State != dek.Rotating || !d.Previous.Equal(p.dek(volumeDEK("vol-"+name)).Key) {
				p.t.Errorf("the record of the snapshot of %s: %+v", name, d)
			}
		}
	}
	create = interruption{"group snapshot", twoVolumes, cut, func(p *plant, err error) {
		if err == nil {
			whole(p)
		}
	}, whole}
	remove = interruption{"delete group snapshot", func(p *plant) {
		twoVolumes(p)
		p.ok("CreateVolumeGroupSnapshot", cut(p))
	}, func(p *plant) error { return p.deleteGroup("group-g", "snap-g-vol-a", "snap-g-vol-b") }, func(p *plant, err error) {
		if len(p.wrapped.Snapshots()) > 0 {
			whole(p) // no record goes first
		}
		if err == nil {
			p.gone(snapshotDEK("snap-g-vol-b"))
		}
	}, func(p *plant) {
		p.gone(snapshotDEK("snap-g-vol-a"))
		p.gone(snapshotDEK("snap-g-vol-b"))
	}}
	return create, remove
}
