package driver_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
)

// world is a cloud, a key side, a controller and nodes, all in memory but for
// the nodes' state files. The driver's code in it is the real one.
type world struct {
	dir      string
	bug      *bug
	handOver bool
	noStage  bool
	stacks   bool

	cloud *drivertest.Cloud
	ring  *envelope.Keyring
	// faults is passed by every call of a store, KMS, wrapped driver, mapper and
	// kernel and by every change of a state file. One call runs at a time, so
	// whoever runs is who fails or dies.
	faults *drivertest.Faults
	ctl    csi.ControllerClient
	nodes  [sequenceNodes]*worldNode

	model model
	tally tally
	gone  map[dek.ID]bool // their key has to stay away
	// givenUp: a copy could not be finished, because its source was gone.
	givenUp bool
}

// worldNode is one node.
type worldNode struct {
	name    string
	dir     string
	kernel  *drivertest.Kernel
	wrapped *drivertest.Wrapped
	boots   int
	csi     csi.NodeClient
}

// bug is something wrong with the world, which the sequences have to find.
type bug struct {
	name   string
	mounts func(w *world, node int, host drivertest.Host) drivertest.Host
	keys   func(driver.Keys) driver.Keys
	ctl    func(driver.ControllerKeys) driver.ControllerKeys
	mapper func(driver.Mapper) driver.Mapper
}

func newWorld(parent string, which int, b *bug) (*world, error) {
	dir, err := os.MkdirTemp(parent, "")
	if err != nil {
		return nil, err
	}
	if b == nil {
		b = &bug{}
	}
	w := &world{dir: dir, bug: b, cloud: drivertest.NewCloud(), faults: &drivertest.Faults{}, gone: map[dek.ID]bool{}}
	w.tally.ops = map[string]int{}
	variants()[which].set(w)
	if err := w.makeRing(); err != nil {
		return nil, err
	}
	for i := range w.nodes {
		name := fmt.Sprintf("node-%d", i)
		n := &worldNode{name: name, dir: filepath.Join(dir, name), kernel: drivertest.NewKernel()}
		n.wrapped = &drivertest.Wrapped{Kernel: n.kernel, NoStage: w.noStage, Stacks: w.stacks, Forgets: w.stacks}
		w.cloud.AddNode(name, n.wrapped)
		w.nodes[i] = n
		if err := w.startNode(i); err != nil {
			return nil, err
		}
	}
	return w, w.startController()
}

func (w *world) close() {
	w.faults.Disarm()
	_ = w.ring.Close()
	_ = os.RemoveAll(w.dir)
}

func (w *world) makeRing() error {
	store, err := envelope.LocalStores().Open(context.Background(), "mem://")
	if err != nil {
		return err
	}
	service := kmstest.NewBackend()
	service.SetFault(func(op string) error { return w.faults.Step("kms "+op, func() error { return nil }) })
	w.ring, err = envelope.New([]*kms.KEK{kms.New("fake", service, kms.Options{})}, []envelope.Store{steppedStore{store, w.faults}}, envelope.Options{Attempts: 1})
	return err
}

// steppedStore puts steps around a store.
type steppedStore struct {
	envelope.Store
	f *drivertest.Faults
}

func (s steppedStore) Create(ctx context.Context, name string, data []byte) error {
	return s.f.Step("store Create", func() error { return s.Store.Create(ctx, name, data) })
}

func (s steppedStore) Replace(ctx context.Context, name string, data []byte, version string) error {
	return s.f.Step("store Replace", func() error { return s.Store.Replace(ctx, name, data, version) })
}

func (s steppedStore) Read(ctx context.Context, name string) (data []byte, version string, err error) {
	err = s.f.Step("store Read", func() error {
		data, version, err = s.Store.Read(ctx, name)
		return err
	})
	if err != nil {
		return nil, "", err
	}
	return data, version, nil
}

// nodeKeys is the key side as a node has it. Like the key service it takes a
// claim away from a node to which the volume is not attached any more.
type nodeKeys struct {
	*envelope.Keyring
	w *world
}

func (k nodeKeys) ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error) {
	holds, err := k.Keyring.ClaimFormat(ctx, id, claim)
	if !errors.Is(err, errdefs.ErrConflict) {
		return holds, err
	}
	d, readErr := k.GetDEK(ctx, id)
	if readErr != nil {
		return dek.Claim{}, readErr
	}
	defer d.Wipe()
	_, volumeID, _ := strings.Cut(string(id), "/")
	if k.w.cloud.Attached(volumeID)[d.Claim.Node] != "" {
		return dek.Claim{}, err
	}
	if err := k.ReleaseClaim(ctx, id, d.Claim.Node); err != nil {
		return dek.Claim{}, err
	}
	return k.Keyring.ClaimFormat(ctx, id, claim)
}

// startNode starts a node plugin's process, the first or the next.
func (w *world) startNode(i int) error {
	n := w.nodes[i]
	host := w.faults.Host(n.kernel)
	if w.bug.mounts != nil {
		host = w.bug.mounts(w, i, host)
	}
	cfg := driver.Config{
		NodeName: n.name, KubeletDir: filepath.Join(n.dir, "kubelet"), AliasDir: n.dir, Patience: 20 * time.Millisecond,
		Wrapped: w.faults.Conn(drivertest.Direct(n.wrapped.Register)), Keys: nodeKeys{w.ring, w},
		Mapper: w.faults.Mapper(drivertest.Mapper{Kernel: n.kernel}), Mounts: host, Filesystems: host, Devices: host,
		BootID: func() (string, error) { return fmt.Sprintf("boot-%d", n.boots), nil },
	}
	if w.handOver {
		cfg.StageWith = driver.StageWithWrapped
	}
	if w.bug.keys != nil {
		cfg.Keys = w.bug.keys(cfg.Keys)
	}
	if w.bug.mapper != nil {
		cfg.Mapper = w.bug.mapper(cfg.Mapper)
	}
	d, err := driver.New(context.Background(), cfg)
	if err != nil {
		return err
	}
	d.WrapStateWrites(func(do func() error) error { return w.faults.Step("state", do) })
	if _, err := d.Reconcile(context.Background()); err != nil {
		return fmt.Errorf("CONVERGE: starting node plugin: %w", err)
	}
	n.csi = csi.NewNodeClient(drivertest.Direct(d.Register))
	return nil
}

func (w *world) startController() error {
	var keys driver.ControllerKeys = w.ring
	if w.bug.ctl != nil {
		keys = w.bug.ctl(keys)
	}
	c, err := driver.NewController(context.Background(), driver.ControllerConfig{Wrapped: w.faults.Conn(drivertest.Direct(w.cloud.Register)), Keys: keys})
	if err != nil {
		return err
	}
	w.ctl = csi.NewControllerClient(drivertest.Direct(c.Register))
	return nil
}

// outcome is how a call ended.
type outcome struct {
	err     error
	faulted bool // something was made to go wrong
	died    bool // with the process
	refused bool // as the model says it must be
}

// call makes a call with the step's fault in it, on a node or (-1) the
// controller, and starts the process again where it died.
func (w *world) call(o op, node int, do func(context.Context) error) (outcome, error) {
	how := func() error {
		switch {
		case o.Killed:
			panic(drivertest.Killed{})
		case o.FaultFinal:
			return errors.New("injected")
		}
		return errdefs.Errorf(errdefs.ErrUnavailable, "injected")
	}
	w.faults.Arm(o.FaultAt, o.FaultAfter, how)
	err := do(context.Background())
	out := outcome{err: err, faulted: o.FaultAt > 0 && len(w.faults.Trace()) >= o.FaultAt}
	w.faults.Disarm()
	out.died = out.faulted && o.Killed
	if out.faulted {
		w.tally.faults++
	}
	if out.died {
		w.tally.deaths++
		if node < 0 {
			return out, w.startController()
		}
		return out, w.startNode(node)
	}
	return out, nil
}

// do makes one step and checks everything.
func (w *world) do(o op) error {
	w.tally.ops[o.Kind]++
	out, err := w.step(o)
	if err == nil && out.err == nil && !out.faulted && !out.refused && o.Again {
		o.FaultAt, o.repeated = 0, true
		if out, err = w.step(o); err == nil && out.err != nil {
			err = fmt.Errorf("CONVERGE: the same call again fails: %w", out.err)
		}
	}
	w.tally.note(fmt.Sprintf("%s: %v", o, status.Code(out.err)))
	if err = errors.Join(err, w.check(o)); err != nil {
		return fmt.Errorf("%s: %w", o, err)
	}
	return nil
}

// step makes one call and tells the model what came of it. The second error is
// a broken promise.
func (w *world) step(o op) (outcome, error) {
	v, s := w.model.volumes[o.Volume], w.model.snapshots[o.Snapshot]
	switch o.Kind {
	case opCreate, opRestore, opClone, opCreateAgain:
		return w.create(o)
	case opDelete:
		return w.delete(o, v)
	case opSnapshot, opSnapshotAgain:
		return w.snapshot(o)
	case opDeleteSnapshot:
		return w.deleteSnapshot(o, s)
	case opAttach:
		return w.attach(o, v)
	case opDetach:
		return w.detach(o, v)
	case opStage:
		return w.stage(o, v)
	case opSick:
		return w.stageZeros(o, v)
	case opReplug:
		return outcome{}, w.replug(o, v)
	case opUnstage:
		return w.unstage(o, v)
	case opPublish:
		return w.publish(o, v)
	case opUnpublish:
		return w.unpublish(o, v)
	case opWrite:
		return outcome{}, w.write(o, v)
	case opRead:
		return outcome{}, w.read(o, v)
	case opExpand:
		return w.expand(o, v)
	case opNodeExpand:
		return w.nodeExpand(o, v)
	case opKill:
		return outcome{}, w.startNode(o.Node)
	case opKillController:
		return outcome{}, w.startController()
	case opReboot:
		n := w.nodes[o.Node]
		n.boots++
		n.kernel.Reboot()
		n.wrapped.Reboot()
		w.model.reboot(o.Node)
		return outcome{}, w.startNode(o.Node)
	}
	return outcome{}, fmt.Errorf("no such step %q", o.Kind)
}

// settled moves what a call makes to where its outcome leaves it. A call that
// fails though nothing was made to go wrong is a broken promise.
func (s *sure) settled(out outcome, done sure) error {
	if out.err == nil {
		*s = done
		return nil
	}
	*s = maybe
	return out.legitimate()
}

func (out outcome) legitimate() error {
	if out.err == nil || out.faulted {
		return nil
	}
	return fmt.Errorf("CONVERGE: fails though nothing is wrong: %w", out.err)
}

func (v *volumeModel) capability() *csi.VolumeCapability {
	switch {
	case v.shape.Shared:
		return capability(manyWriters, blockCap())
	case v.shape.Block:
		return blockCap()
	}
	return mountCap(v.shape.FSType)
}

// create is CreateVolume in all its forms. A volume whose source is gone before
// it is known to exist is given up.
func (w *world) create(o op) (outcome, error) {
	v := w.model.volumes[o.Volume]
	if o.Kind != opCreateAgain && v == nil {
		v = w.plan(o)
		w.model.volumes[o.Volume] = v
		w.tally.volumes++
	}
	if v.from != nil && v.from.volume != "" { // the cloud copies at the first call that comes through to it
		if source := w.byID(v.from.volume); source != nil {
			v.content, v.copied, v.blank = union(v.content, source.content), max(v.copied, source.filled), v.blank || source.filled != yes
		}
	}
	req := &csi.CreateVolumeRequest{
		Name: v.name, VolumeCapabilities: []*csi.VolumeCapability{v.capability()}, CapacityRange: &csi.CapacityRange{RequiredBytes: v.asked},
	}
	if v.shape.Integrity {
		req.Parameters = map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}
	}
	if v.from != nil {
		of(v.from.snapshot, v.from.volume)(req)
	}
	var resp *csi.CreateVolumeResponse
	out, err := w.call(o, -1, func(ctx context.Context) (err error) {
		resp, err = w.ctl.CreateVolume(ctx, req)
		return err
	})
	switch {
	case err != nil:
		return out, err
	case out.err != nil && v.from != nil && !out.faulted && w.cannotCopy(v.from, v.asked, out.err):
		w.model.volumes[o.Volume] = nil
		w.givenUp = true
		return outcome{refused: true}, nil
	case out.err != nil:
		v.there = maybe
		return out, out.legitimate()
	}
	got := resp.GetVolume()
	switch {
	case v.id != "" && v.id != got.GetVolumeId():
		return out, fmt.Errorf("CONVERGE: %s is %s and then %s", v.name, v.id, got.GetVolumeId())
	case got.GetCapacityBytes() < v.asked:
		return out, fmt.Errorf("SIZE: %d bytes of %d", got.GetCapacityBytes(), v.asked)
	case got.GetVolumeContext()["cryptcsi.io/encrypted"] != "1":
		return out, fmt.Errorf("RAW: the volume context of %s has no mark: %v", v.name, got.GetVolumeContext())
	}
	v.id, v.there, v.promised, v.context = got.GetVolumeId(), yes, got.GetCapacityBytes(), got.GetVolumeContext()
	return out, nil
}

func (w *world) byID(id string) *volumeModel {
	for _, v := range w.model.volumes {
		if v != nil && v.id == id {
			return v
		}
	}
	return nil
}

func union(a, b []string) []string {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// plan is what CreateVolume is to make.
func (w *world) plan(o op) *volumeModel {
	v := &volumeModel{name: w.model.name("volume"), shape: shapes()[o.Shape], asked: 64 * mib, content: []string{""}}
	switch o.Kind {
	case opRestore:
		s := w.model.snapshots[o.Snapshot]
		v.shape, v.asked, v.from = s.shape, s.size, &origin{snapshot: s.id}
		v.content, v.copied, v.blank = slices.Clone(s.content), s.copied, s.blank
	case opClone:
		source := w.model.volumes[o.Source]
		v.shape, v.asked, v.from = source.shape, source.promised, &origin{volume: source.id}
		v.content, v.copied, v.blank = slices.Clone(source.content), source.filled, source.filled != yes
	}
	if o.Larger {
		v.asked += 16 * mib
	}
	return v
}

// cannotCopy: the source is gone, or a copy that nobody has opened, or its
// first use has begun and not ended, or it is larger than was known.
func (w *world) cannotCopy(from *origin, asked int64, err error) bool {
	switch status.Code(err) {
	case codes.NotFound:
		return !slices.Contains(w.cloud.Volumes(), from.volume) && !slices.Contains(w.cloud.Snapshots(), from.snapshot)
	case codes.Aborted:
		v := w.byID(from.volume)
		return v != nil && (v.copied != no || v.filled == maybe)
	case codes.InvalidArgument: // it has grown meanwhile
		v := w.byID(from.volume)
		return v != nil && (v.resizing || v.promised > asked)
	}
	return false
}

func (w *world) delete(o op, v *volumeModel) (outcome, error) {
	v.going = true
	out, err := w.call(o, -1, func(ctx context.Context) error {
		_, err := w.ctl.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
		return err
	})
	if slices.Contains(w.cloud.Volumes(), v.id) {
		d, keyErr := w.ring.GetDEK(context.Background(), volumeDEK(v.id))
		d.Wipe()
		if keyErr != nil {
			return out, fmt.Errorf("DATA: volume %s is there and its key is not: %w", v.name, keyErr)
		}
	}
	if err != nil || out.err != nil {
		return out, errors.Join(err, out.legitimate())
	}
	w.gone[volumeDEK(v.id)] = true
	if o.Again == o.repeated {
		w.model.volumes[o.Volume] = nil
	}
	return out, w.absent(v.id, w.cloud.Volumes(), volumeDEK(v.id))
}

// absent says that neither the disk nor its key is there.
func (w *world) absent(id string, disks []string, key dek.ID) error {
	if slices.Contains(disks, id) {
		return fmt.Errorf("DELETE: %s is still in the cloud", id)
	}
	d, err := w.ring.GetDEK(context.Background(), key)
	d.Wipe()
	if !errors.Is(err, errdefs.ErrNotFound) {
		return fmt.Errorf("DELETE: %s is deleted, its DEK is not: %s", id, fmt.Sprint(err))
	}
	return nil
}

func (w *world) snapshot(o op) (outcome, error) {
	s := w.model.snapshots[o.Snapshot]
	if s == nil {
		v := w.model.volumes[o.Volume]
		s = &snapshotModel{name: w.model.name("snapshot"), of: v.id, shape: v.shape}
		w.model.snapshots[o.Snapshot] = s
	}
	// The cloud cuts at the first call that comes through to it.
	if v := w.byID(s.of); v != nil {
		s.content, s.copied, s.blank = union(s.content, v.content), max(s.copied, v.filled), s.blank || v.filled != yes
	}
	var resp *csi.CreateSnapshotResponse
	out, err := w.call(o, -1, func(ctx context.Context) (err error) {
		resp, err = w.ctl.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: s.name, SourceVolumeId: s.of})
		return err
	})
	switch {
	case err != nil:
		return out, err
	case out.err != nil && !out.faulted && w.cannotCopy(&origin{volume: s.of}, 0, out.err):
		w.model.snapshots[o.Snapshot] = nil
		w.givenUp = true
		return outcome{refused: true}, nil
	case out.err != nil:
		s.there = maybe
		return out, out.legitimate()
	}
	s.id, s.there, s.size = resp.GetSnapshot().GetSnapshotId(), yes, resp.GetSnapshot().GetSizeBytes()
	return out, nil
}

func (w *world) deleteSnapshot(o op, s *snapshotModel) (outcome, error) {
	s.going = true
	out, err := w.call(o, -1, func(ctx context.Context) error {
		_, err := w.ctl.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: s.id})
		return err
	})
	if err != nil || out.err != nil {
		return out, errors.Join(err, out.legitimate())
	}
	w.gone[snapshotDEK(s.id)] = true
	if o.Again == o.repeated {
		w.model.snapshots[o.Snapshot] = nil
	}
	return out, w.absent(s.id, w.cloud.Snapshots(), snapshotDEK(s.id))
}

func (w *world) attach(o op, v *volumeModel) (outcome, error) {
	out, err := w.call(o, -1, func(ctx context.Context) error {
		resp, err := w.ctl.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
			VolumeId: v.id, NodeId: w.nodes[o.Node].name, VolumeCapability: v.capability(), VolumeContext: v.context,
		})
		v.device[o.Node] = resp.GetPublishContext()
		return err
	})
	if err != nil {
		return out, err
	}
	return out, v.attached[o.Node].settled(out, yes)
}

func (w *world) detach(o op, v *volumeModel) (outcome, error) {
	out, err := w.call(o, -1, func(ctx context.Context) error {
		_, err := w.ctl.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: w.nodes[o.Node].name})
		return err
	})
	if err != nil {
		return out, err
	}
	return out, v.attached[o.Node].settled(out, no)
}

func (w *world) stagingPath(o op, v *volumeModel) string {
	return filepath.Join(w.nodes[o.Node].dir, "staging", v.name)
}

func (w *world) podPath(o op, v *volumeModel) string {
	return filepath.Join(w.nodes[o.Node].dir, "pods", fmt.Sprint(o.Pod), v.name)
}

// stage is NodeStageVolume. After an answer that is final and not a death,
// kubelet may never come back: nothing may be left then.
func (w *world) stage(o op, v *volumeModel) (outcome, error) {
	before := v.staged[o.Node]
	out, err := w.call(o, o.Node, func(ctx context.Context) error {
		_, err := w.nodes[o.Node].csi.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
			VolumeId: v.id, StagingTargetPath: w.stagingPath(o, v), VolumeCapability: v.capability(),
			PublishContext: v.device[o.Node], VolumeContext: v.context,
		})
		return err
	})
	switch {
	case err != nil:
		return out, err
	case out.err == nil:
		v.staged[o.Node], v.filled, v.copied, v.replugged[o.Node] = yes, yes, no, false
		return out, w.largeEnough(o, v)
	case v.replugged[o.Node] && !out.faulted && status.Code(out.err) == codes.Unavailable:
		v.replugged[o.Node] = false // once; the next call starts anew
		return outcome{refused: true}, nil
	case v.shape.Shared && status.Code(out.err) == codes.Aborted && v.filled != yes && v.attached[1-o.Node] != no:
		v.staged[o.Node] = max(v.staged[o.Node], maybe)
		return outcome{refused: true}, nil // the other node has claimed the format
	}
	if !out.faulted && status.Code(out.err) == codes.FailedPrecondition && v.filled != yes && w.neverUsed(v) {
		return outcome{refused: true}, w.nothingLeft(o.Node, v)
	}
	v.filled = max(v.filled, maybe)
	v.copied = min(v.copied, maybe)
	if out.died || comesBack(out.err) || before == yes {
		if before != yes {
			v.staged[o.Node] = maybe
		}
		return out, out.legitimate()
	}
	v.staged[o.Node] = no
	return out, errors.Join(out.legitimate(), w.nothingLeft(o.Node, v))
}

// stageZeros is NodeStageVolume while the backend serves zeros: looking blank is
// no permission to format a volume that was finished.
func (w *world) stageZeros(o op, v *volumeModel) (outcome, error) {
	heal := w.nodes[o.Node].kernel.Sicken(w.cloud.Attached(v.id)[w.nodes[o.Node].name], o.Again)
	defer heal()
	healthy := *v
	o.FaultAt = 0
	out, _ := w.stage(o, v)
	*v = healthy
	if out.err == nil {
		return out, errors.New("FORMAT: zeros were staged as a volume that was in use before")
	}
	return outcome{refused: true}, w.nothingLeft(o.Node, v)
}

// neverUsed: the disk is a copy of one that nobody had opened, or not to the
// end. Where the cloud had cut before and the controller recorded after its
// source's first use, nobody knows what it should be, and it is refused.
func (w *world) neverUsed(v *volumeModel) bool {
	kernel, disk := w.cloud.Disk(v.id)
	return v.blank && (slices.Equal(v.content, []string{""}) || !kernel.Finished(disk))
}

// largeEnough: the mapping has what was promised.
func (w *world) largeEnough(o op, v *volumeModel) error {
	all, err := drivertest.Mapper{Kernel: w.nodes[o.Node].kernel}.List()
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.Name == driver.MappingName(driverName, v.id) {
			fixed := v.shape.Integrity && v.from != nil // has what its source had
			if m.Size < v.promised && !v.growing && !v.shape.Shared && !fixed {
				return fmt.Errorf("SIZE: volume %s has %d bytes of %d", v.name, m.Size, v.promised)
			}
			return nil
		}
	}
	return fmt.Errorf("MAPPING: volume %s is staged and has none", v.name)
}

func (w *world) unstage(o op, v *volumeModel) (outcome, error) {
	out, err := w.call(o, o.Node, func(ctx context.Context) error {
		_, err := w.nodes[o.Node].csi.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: w.stagingPath(o, v)})
		return err
	})
	if err == nil {
		err = v.staged[o.Node].settled(out, no)
	}
	if err != nil || out.err != nil {
		return out, err
	}
	v.replugged[o.Node] = false
	return out, w.nothingLeft(o.Node, v)
}

// replug lets a disk go away and come back with another number. The one that it
// had goes to another volume's disk, unless a mapping keeps it.
func (w *world) replug(o op, v *volumeModel) error {
	n := w.nodes[o.Node]
	mappings, err := drivertest.Mapper{Kernel: n.kernel}.List()
	if err != nil {
		return err
	}
	again := func(v *volumeModel, number string) (old string, err error) {
		path := w.cloud.Attached(v.id)[n.name]
		dev, err := n.kernel.Device(path)
		if err == nil {
			n.kernel.Reattach(path, number)
			v.replugged[o.Node] = v.staged[o.Node] != no
		}
		return dev.Number, err
	}
	old, err := again(v, "")
	kept := slices.ContainsFunc(mappings, func(m driver.Mapping) bool { return m.Backing == old })
	other := w.model.volumes[o.Source]
	if err != nil || kept || other == v || !other.ready() || !other.replugs(o.Node) {
		return err
	}
	_, err = again(other, old)
	return err
}

const driverName = "loop.cryptcsi.io"

// nothingLeft: nothing of a volume that is not staged is on the node.
func (w *world) nothingLeft(node int, v *volumeModel) error {
	n := w.nodes[node]
	name, sum := driver.MappingName(driverName, v.id), sha256.Sum256([]byte(v.id))
	all, err := drivertest.Mapper{Kernel: n.kernel}.List()
	if err != nil {
		return err
	}
	if slices.ContainsFunc(all, func(m driver.Mapping) bool { return m.Name == name }) {
		return fmt.Errorf("LEAK: %s has mapping %s of volume %s", n.name, name, v.name)
	}
	for _, use := range n.wrapped.InUse() {
		if strings.Contains(use, " of "+v.id+" at ") {
			return fmt.Errorf("LEAK: %s: the wrapped driver has %s", n.name, use)
		}
	}
	private := filepath.Join(n.private(), hex.EncodeToString(sum[:]))
	if _, err := os.Lstat(private); err == nil {
		return fmt.Errorf("LEAK: %s has %s", n.name, private)
	}
	mounts, err := n.kernel.List()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if filepath.Base(m.Target) == v.name || strings.HasPrefix(m.Target, private) {
			return fmt.Errorf("LEAK: %s has %s mounted", n.name, m.Target)
		}
	}
	return nil
}

func (n *worldNode) private() string {
	return filepath.Join(n.dir, "kubelet/plugins/kubernetes.io/csi", driverName, "cryptcsi")
}

func (w *world) publish(o op, v *volumeModel) (outcome, error) {
	out, err := w.call(o, o.Node, func(ctx context.Context) error {
		_, err := w.nodes[o.Node].csi.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId: v.id, StagingTargetPath: w.stagingPath(o, v), TargetPath: w.podPath(o, v), VolumeCapability: v.capability(),
			PublishContext: v.device[o.Node], VolumeContext: v.context,
		})
		return err
	})
	if err == nil {
		err = v.pods[o.Node][o.Pod].settled(out, yes)
	}
	if err != nil || out.err != nil {
		return out, err
	}
	return out, w.read(o, v)
}

func (w *world) unpublish(o op, v *volumeModel) (outcome, error) {
	out, err := w.call(o, o.Node, func(ctx context.Context) error {
		_, err := w.nodes[o.Node].csi.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: w.podPath(o, v)})
		return err
	})
	if err == nil {
		err = v.pods[o.Node][o.Pod].settled(out, no)
	}
	if _, there := os.Lstat(w.podPath(o, v)); err == nil && out.err == nil && there == nil {
		err = fmt.Errorf("LEAK: %s is still there", w.podPath(o, v))
	}
	return out, err
}

// The content of a volume is one short text; in a block volume it has a place
// in the middle.
const contentLength = 32

func (w *world) write(o op, v *volumeModel) error {
	w.model.writes++
	text := fmt.Sprintf("%s#%d", v.name, w.model.writes)
	kernel, path := w.nodes[o.Node].kernel, w.podPath(o, v)
	var err error
	if v.shape.Block {
		buf := make([]byte, contentLength)
		copy(buf, text)
		err = kernel.WriteAt(path, buf, 3*mib)
	} else {
		err = kernel.WriteFile(path, "file", text)
	}
	if err != nil {
		return fmt.Errorf("DATA: writing: %w", err)
	}
	v.content = []string{text}
	return nil
}

func (w *world) read(o op, v *volumeModel) error {
	kernel, path := w.nodes[o.Node].kernel, w.podPath(o, v)
	if !v.shape.Block {
		text, err := kernel.ReadFile(path, "file")
		var missing *fs.PathError
		if errors.As(err, &missing) && missing.Path == "file" {
			text, err = "", nil
		}
		if err != nil {
			return fmt.Errorf("DATA: reading: %w", err)
		}
		return v.holds(text)
	}
	buf := make([]byte, contentLength)
	if err := kernel.ReadAt(path, buf, 3*mib); err != nil {
		return fmt.Errorf("DATA: reading: %w", err)
	}
	return v.holds(strings.TrimRight(string(buf), "\x00"))
}

func (w *world) expand(o op, v *volumeModel) (outcome, error) {
	size := v.promised
	if !o.repeated {
		size += 8 * mib
	}
	var resp *csi.ControllerExpandVolumeResponse
	out, err := w.call(o, -1, func(ctx context.Context) (err error) {
		resp, err = w.ctl.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
			VolumeId: v.id, VolumeCapability: v.capability(), CapacityRange: &csi.CapacityRange{RequiredBytes: size},
		})
		return err
	})
	switch {
	case err != nil:
		return out, err
	case out.err != nil:
		v.resizing = true
		return out, out.legitimate()
	case resp.GetCapacityBytes() < size || !resp.GetNodeExpansionRequired():
		return out, fmt.Errorf("SIZE: asked for %d: %v", size, resp)
	}
	v.promised, v.growing, v.resizing = resp.GetCapacityBytes(), true, false
	return out, nil
}

func (w *world) nodeExpand(o op, v *volumeModel) (outcome, error) {
	out, err := w.call(o, o.Node, func(ctx context.Context) error {
		_, err := w.nodes[o.Node].csi.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{
			VolumeId: v.id, VolumePath: w.stagingPath(o, v), StagingTargetPath: w.stagingPath(o, v), VolumeCapability: v.capability(),
			CapacityRange: &csi.CapacityRange{RequiredBytes: v.promised},
		})
		return err
	})
	switch {
	case err != nil:
		return out, err
	case out.err != nil:
		return out, out.legitimate()
	}
	v.growing = false
	return out, w.largeEnough(o, v)
}
