package driver_test

import (
	"fmt"
	"slices"
)

// The model: what the orchestrator knows and what users were promised. It knows
// CSI and nothing of encryption, but that a copy has to be opened once before
// it is copied.

// sure is what is known of something that a call makes or undoes.
type sure int

const (
	no    sure = iota
	maybe      // a call about it has failed, or its process or node died
	yes
)

// The size of the scene.
const (
	sequenceNodes = 2
	sequencePods  = 2
	volumeSlots   = 4
	snapshotSlots = 3
)

// A shape is how a volume is asked for, for all its life.
type shape struct {
	Block, Integrity, Shared bool // Shared: a block volume for several nodes
	FSType                   string
}

// shapes are those that differ; what is not possible together is not there.
func shapes() []shape {
	return []shape{{}, {FSType: "xfs"}, {Block: true}, {Integrity: true}, {Block: true, Integrity: true}, {Block: true, Shared: true}}
}

// volumeModel is one volume.
type volumeModel struct {
	name, id string
	shape    shape
	there    sure
	going    bool // its deletion has begun
	from     *origin
	asked    int64             // of CreateVolume
	promised int64             // bytes that its user can use, once a node has followed
	resizing bool              // the controller was asked to, and did not answer
	growing  bool              // the controller has let it grow, a node has not followed
	context  map[string]string // as CreateVolume answered
	content  []string          // what is in it: one of these
	filled   sure              // a node has opened it or a copy's source
	copied   sure              // it is a copy that nobody has opened yet
	blank    bool              // it may be a copy of a disk that nobody had opened
	attached [sequenceNodes]sure
	device   [sequenceNodes]map[string]string // publish contexts
	staged   [sequenceNodes]sure
	// replugged: the device that a call has borrowed may not be the disk's any more.
	replugged [sequenceNodes]bool
	pods      [sequenceNodes][sequencePods]sure
}

// origin is what a volume is a copy of.
type origin struct {
	snapshot string // its ID, or
	volume   string
}

// snapshotModel is one snapshot.
type snapshotModel struct {
	name, id string
	of       string // the source's ID
	shape    shape
	there    sure
	going    bool
	size     int64
	content  []string
	copied   sure // its source held anything when it was cut
	blank    bool // or may not have
}

// model is the scene.
type model struct {
	volumes   [volumeSlots]*volumeModel
	snapshots [snapshotSlots]*snapshotModel
	names     int
	writes    int
}

func (m *model) name(what string) string {
	m.names++
	return fmt.Sprintf("%s-%d", what, m.names)
}

// used: something on a node is or may be left of the volume.
func (v *volumeModel) used(node int) bool {
	return v.staged[node] != no || slices.ContainsFunc(v.pods[node][:], func(s sure) bool { return s != no })
}

func (v *volumeModel) attachedAnywhere() bool { return v.attached != [sequenceNodes]sure{} }

// busy: something of the volume may be on the node, or it may be on another.
func (v *volumeModel) busy(node int) bool {
	return v.used(node) || v.attached[1-node] != no
}

// ready: a volume that calls can be about.
func (v *volumeModel) ready() bool { return v != nil && v.there == yes && !v.going }

// legal says whether an orchestrator may make this call now.
func (m *model) legal(o op) bool {
	v, s := m.volumes[o.Volume], m.snapshots[o.Snapshot]
	switch o.Kind {
	case opCreate:
		return v == nil
	case opRestore:
		return v == nil && s != nil && s.there == yes && !s.going
	case opClone:
		return v == nil && m.volumes[o.Source].ready()
	case opCreateAgain:
		return v != nil && v.there == maybe && !v.going
	case opSnapshot:
		return v.ready() && s == nil
	case opSnapshotAgain:
		return s != nil && s.there == maybe && !s.going
	case opDelete:
		return v != nil && v.there == yes && !v.attachedAnywhere()
	case opDeleteSnapshot:
		return s != nil && s.there == yes
	case opKill, opReboot, opKillController:
		return true
	}
	return v.ready() && m.legalOnNode(o, v)
}

func (m *model) legalOnNode(o op, v *volumeModel) bool {
	other := 1 - o.Node
	switch o.Kind {
	case opAttach:
		return v.attached[other] == no || v.shape.Shared
	case opDetach:
		return v.attached[o.Node] != no && !v.used(o.Node)
	case opStage:
		return v.attached[o.Node] == yes
	case opSick:
		return v.attached[o.Node] == yes && !v.busy(o.Node) && v.filled == yes && (o.Again || !v.shape.Block)
	case opReplug:
		return v.replugs(o.Node)
	case opUnstage:
		return v.staged[o.Node] != no && v.pods[o.Node] == [sequencePods]sure{}
	case opPublish:
		return v.staged[o.Node] == yes
	case opUnpublish:
		return v.pods[o.Node][o.Pod] != no
	case opWrite, opRead:
		return v.pods[o.Node][o.Pod] == yes
	case opExpand:
		return true
	case opNodeExpand:
		return v.staged[o.Node] == yes
	}
	return false
}

// replugs: the disk may go away and come back, and no user sees it.
func (v *volumeModel) replugs(node int) bool {
	return v.attached[node] == yes && v.staged[node] != yes && v.pods[node] == [sequencePods]sure{}
}

// reboot is what becomes of a node's things.
func (m *model) reboot(node int) {
	unsure := func(s *sure) {
		if *s == yes {
			*s = maybe
		}
	}
	for _, v := range m.volumes {
		if v == nil {
			continue
		}
		v.replugged[node] = false
		unsure(&v.staged[node])
		for i := range v.pods[node] {
			unsure(&v.pods[node][i])
		}
	}
}

// holds says that the volume's content was seen, or what is wrong with it.
func (v *volumeModel) holds(got string) error {
	if !slices.Contains(v.content, got) {
		return fmt.Errorf("DATA: volume %s (%s) holds %q, must be one of %q", v.name, v.id, got, v.content)
	}
	v.content = []string{got}
	return nil
}
