package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// FSTypes are the filesystems that a volume can have, the default first.
func FSTypes() []string { return []string{"ext4", "xfs", "btrfs"} }

// headerArea is what a volume's header takes of the device.
const headerArea = 16 << 20

// slack is how much smaller than its device something may stay: no table and
// no filesystem uses the last sectors of a device exactly.
const slack = 1 << 20

// undoTime bounds the undoing of a call that has failed.
const undoTime = time.Minute

// staging is one NodeStageVolume call on its way. The fields below the line are
// filled in step by step.
type staging struct {
	*Driver
	req       *csi.NodeStageVolumeRequest
	v         volume
	want      intent
	integrity dek.Integrity // at least this
	mkfs      string        // options for a filesystem that is made now
	// performance is how the mapping is to work.
	performance string

	caps nodeCapabilities
	dev  Device
	key  dek.DEK
	m    Mapping
	fs   FSInfo

	at        string // the step that it is at
	formatted bool   // for the first time, by this call
}

// newStaging checks a request against the specification and the policy. It
// calls nobody.
func (d *Driver) newStaging(req *csi.NodeStageVolumeRequest) (*staging, error) {
	v, err := d.volume(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	path, err := absolute("staging path", req.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	want, integrity, err := readCapability(req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	want.StagingPath = path
	want.HandedOver = d.cfg.StageWith == StageWithWrapped && want.AccessType == accessMount
	s := &staging{Driver: d, req: req, v: v, want: want, mkfs: req.GetVolumeContext()[keyMkfs]}
	if s.v.dek, err = d.askedDEK(v, req.GetVolumeContext()); err != nil {
		return nil, err
	}
	if s.integrity, err = d.askedIntegrity(integrity, req.GetVolumeContext()); err != nil {
		return nil, err
	}
	if s.performance, err = readPerformance(req.GetVolumeContext()[keyPerformance]); err != nil {
		return nil, err
	}
	if err := d.wrapped.profile.refuses(foreign(req.GetVolumeContext()), req.GetPublishContext(), req.GetSecrets()); err != nil {
		return nil, err
	}
	return s, checkSharing(want, s.integrity, d.wrapped.profile)
}

// readCapability translates a capability, and tells whether its filesystem asks
// for integrity. Its errors are ErrInvalid.
func readCapability(c *csi.VolumeCapability) (i intent, integrity bool, err error) {
	invalid := func(format string, args ...any) (intent, bool, error) {
		return intent{}, false, errdefs.Errorf(errdefs.ErrInvalid, format, args...)
	}
	if c == nil {
		return invalid("the volume capability is missing")
	}
	mode := c.GetAccessMode().GetMode()
	if mode == csi.VolumeCapability_AccessMode_UNKNOWN {
		return invalid("the access mode is missing")
	}
	i.AccessMode = mode.String()
	i.ReadOnly = mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY || mode == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	switch {
	case c.GetBlock() != nil:
		i.AccessType = accessBlock
	case c.GetMount() != nil:
		i.AccessType = accessMount
		i.FSType, integrity = readFSType(c.GetMount().GetFsType())
		i.MountFlags = c.GetMount().GetMountFlags()
		i.ReadOnly = i.ReadOnly || slices.Contains(i.MountFlags, "ro")
		if i.FSType != "" && !slices.Contains(FSTypes(), i.FSType) {
			return invalid("filesystem %q is not offered: use one of %v", i.FSType, FSTypes())
		}
	default:
		return invalid("the access type is missing: block or mount")
	}
	return i, integrity, nil
}

// askedIntegrity reads our entries of a volume context; byType says that the
// filesystem's name asks for integrity already.
func (d *Driver) askedIntegrity(byType bool, volumeContext map[string]string) (dek.Integrity, error) {
	invalid := func(format string, args ...any) (dek.Integrity, error) {
		return "", errdefs.Errorf(errdefs.ErrInvalid, format, args...)
	}
	asked := dek.IntegrityNone
	if byType {
		asked = dek.IntegrityHMAC
	}
	for key, value := range ownEntries(volumeContext) {
		switch {
		case key == keyIntegrity && value == string(dek.IntegrityHMAC):
			asked = dek.IntegrityHMAC
		case key == keyIntegrity:
			return invalid("%s: %q is not offered, only %q", key, value, dek.IntegrityHMAC)
		case key == keyEncrypted && value == "1":
		case key == keyEncrypted:
			return invalid("%s: %q: a volume cannot ask for less than the node's policy", key, value)
		case key == keyDEKID: // see askedDEK
		case key == keyMkfs, key == keyPerformance: // see makeFilesystem and newStaging
		default:
			return invalid("%s is not known to this version; it may ask for protection that would not be given", key)
		}
	}
	if err := checkSpelling(foreign(volumeContext)); err != nil {
		return "", err
	}
	if asked != dek.IntegrityNone && d.cfg.Integrity == IntegrityOff {
		return invalid("the volume asks for integrity, which this node does not offer (integrity policy %q)", IntegrityOff)
	}
	if d.cfg.Integrity == IntegrityRequired {
		asked = dek.IntegrityHMAC
	}
	return asked, nil
}

// ownEntries returns our own entries of a volume context.
func ownEntries(volumeContext map[string]string) map[string]string {
	theirs, ours := foreign(volumeContext), map[string]string{}
	for key, value := range volumeContext {
		if _, ok := theirs[key]; !ok {
			ours[key] = value
		}
	}
	return ours
}

// checkSharing refuses what would destroy data on several nodes. The wrapped
// driver, which is asked for block volumes only, no longer does.
func checkSharing(want intent, integrity dek.Integrity, p Profile) error {
	many, writers := multiNode(want.AccessMode)
	if writers && want.AccessType == accessMount {
		return errdefs.Errorf(errdefs.ErrInvalid, "access mode %s: a filesystem that several nodes write to at once is destroyed; use a block volume or one node", want.AccessMode)
	}
	if many && integrity != dek.IntegrityNone {
		return errdefs.Errorf(errdefs.ErrInvalid, "access mode %s: a volume with integrity keeps a journal on the disk and can be used on one node at a time", want.AccessMode)
	}
	if many && p.OneNode {
		return errdefs.Errorf(errdefs.ErrInvalid, "access mode %s: the wrapped driver makes a network filesystem of a volume for several nodes, which cannot be encrypted", want.AccessMode)
	}
	return nil
}

// stage does the work under the volume's lock. Where it fails for good,
// everything is undone: kubelet may never call NodeUnstageVolume then. Where
// another try may succeed, what is there stays for it.
func (s *staging) stage(ctx context.Context) error {
	if err := s.initialiser.said(s.v, s.want); err != nil {
		return err
	}
	if done, err := s.staged(); done || err != nil {
		return err
	}
	defer func() { s.key.Wipe() }()
	cause := s.run(ctx)
	if cause == nil || retryable(cause) {
		return cause
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer cancel()
	if err := s.teardown(ctx, s.v, s.want.StagingPath); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%v (undoing what was done so far failed, the next call tries again: %v)", cause, err)
	}
	return cause
}

// retryable tells whether err has one of the codes after which the
// orchestrator comes again or unstages. In doubt it does not.
func retryable(err error) bool {
	is := func(classes ...error) bool {
		return slices.ContainsFunc(classes, func(class error) bool { return errors.Is(err, class) })
	}
	return is(errdefs.ErrUnavailable, errdefs.ErrConflict, context.Canceled, context.DeadlineExceeded) &&
		!is(errdefs.ErrInvalid, errdefs.ErrNotFound, errdefs.ErrExists, errdefs.ErrDenied, errdefs.ErrState, errdefs.ErrCorrupt)
}

// staged tells whether the volume is staged already, as the kernel sees it.
// ErrExists where it is, and in another way than asked.
func (s *staging) staged() (bool, error) {
	st, err := s.load(s.v)
	if err != nil || st == nil || !st.Staged || st.BootID != s.boot {
		return false, unseen(err)
	}
	m, open, err := s.mapping(s.v)
	if err != nil || !open || m.Backing != st.Device {
		return false, unseen(err)
	}
	if _, found, err := s.earlier(s.v, st, m); err != nil || found != borrowIntact {
		return false, unseen(err)
	}
	if st.AccessType == accessMount {
		mounts, err := s.cfg.Mounts.List()
		if err != nil || !slices.ContainsFunc(at(mounts, st.StagingPath), func(l Mount) bool { return l.Device == m.Number }) {
			return false, unseen(err)
		}
	}
	if st.StagingPath != s.want.StagingPath {
		return false, errdefs.Errorf(errdefs.ErrExists, "volume %s is staged at %s already and not at %s", s.v.id, st.StagingPath, s.want.StagingPath)
	}
	if diff := st.difference(s.want); diff != "" {
		return false, errdefs.Errorf(errdefs.ErrExists, "volume %s is staged already, but with another capability: asked for %s", s.v.id, diff)
	}
	return true, nil
}

// unseen is the error of a look at what is there. Something may be, of an
// earlier call, so it is not final: the orchestrator would never unstage it.
func unseen(err error) error {
	if err == nil || errors.Is(err, errdefs.ErrState) {
		return err
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "finding out what is there of the volume: %w", err)
}

// run is NodeStageVolume, step by step. Each step can be repeated.
func (s *staging) run(ctx context.Context) error {
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"announce", s.announce}, {"borrow", s.takeDevice}, {"key", s.fetchKey}, {"open", s.open},
		{"fill", s.fill}, {"confirm", s.confirm}, {"mount", s.mount}, {"note", s.note},
	} {
		began := time.Now()
		s.at = step.name
		if err := step.do(ctx); err != nil {
			return err
		}
		if s.cfg.ObserveStep != nil {
			s.cfg.ObserveStep(step.name, time.Since(began))
		}
	}
	return nil
}

// announce writes down what is about to happen. What an earlier call left half
// done in another way is removed first, and so is a filesystem that the
// wrapped driver has mounted: the mapping below it may not be finished.
func (s *staging) announce(ctx context.Context) error {
	caps, err := s.wrapped.capabilities(ctx)
	if err != nil {
		return err
	}
	s.caps = caps
	if err := s.goOn(ctx); err != nil {
		return err
	}
	if err := s.checkStagingPath(); err != nil {
		return err
	}
	if err := os.MkdirAll(s.v.dir, 0o750); err != nil {
		return err
	}
	return s.save(s.v, s.state())
}

// checkStagingPath refuses a staging path where something else than the volume's
// mapping is mounted, or below it, as some drivers do. Nothing is written down
// or asked of the wrapped driver by then, so that undoing leaves it alone.
func (s *staging) checkStagingPath() error {
	m, _, err := s.mapping(s.v)
	if err != nil {
		return err
	}
	mounts, err := s.cfg.Mounts.List()
	if err != nil {
		return err
	}
	for _, l := range mounts {
		if within(l.Target, s.want.StagingPath) && l.Device != m.Number {
			return s.foreignMount(l)
		}
	}
	return nil
}

func (s *staging) foreignMount(l Mount) error {
	return errdefs.Errorf(errdefs.ErrState, "something that volume %s did not put there (device %s, %s) is mounted at %s: unmount it", s.v.id, l.Device, l.FSType, l.Target)
}

// goOn decides what of an earlier call is gone on with, and removes the rest.
func (s *staging) goOn(ctx context.Context) error {
	st, err := s.load(s.v)
	if err != nil {
		return err
	}
	m, _, err := s.mapping(s.v)
	if err != nil {
		return err
	}
	dev, found, err := s.earlier(s.v, st, m)
	if err != nil {
		return err
	}
	asked := st == nil || st.equal(s.want) && !st.HandedOver
	if asked && (found == borrowNone || found == borrowIntact) {
		s.dev = dev
		return nil
	}
	err = s.teardown(ctx, s.v, s.want.StagingPath)
	if found == borrowLost {
		const gone = "the device that was borrowed for volume %s is gone, or its number has been given to another one"
		if err != nil {
			return fmt.Errorf(gone+"; taking down what was made on it: %w", s.v.id, err)
		}
		return errdefs.Errorf(errdefs.ErrUnavailable, gone+": what was made on it has been taken down, the next call borrows it anew", s.v.id)
	}
	return err
}

// state is the state file's content as far as it is known by now.
func (s *staging) state() state {
	return state{
		Driver: s.name, VolumeID: s.v.id, DEK: s.v.dek, BootID: s.boot, intent: s.want,
		InnerStaged: s.caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME),
		Device:      s.dev.Number, DeviceSeq: s.dev.Seq,
	}
}

// takeDevice borrows the raw device, and writes down which one it is.
func (s *staging) takeDevice(ctx context.Context) error {
	if err := s.borrow(ctx, s.v, s.req, s.caps); err != nil {
		return err
	}
	dev, err := s.checkBorrowed(ctx, s.v)
	if err != nil {
		return err
	}
	if s.dev.Number == "" {
		s.dev = dev
		if err := s.save(s.v, s.state()); err != nil {
			return err
		}
	}
	if many, _ := multiNode(s.want.AccessMode); many {
		// Another node may have let it grow, and then it looks too small here.
		if err := s.cfg.Devices.Rescan(ctx, s.v.device()); err != nil {
			return err
		}
		if dev, err = s.checkBorrowed(ctx, s.v); err != nil {
			return err
		}
	}
	if dev.Number != s.dev.Number || dev.Seq != s.dev.Seq {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the device of volume %s is changing (was %s, is %s): try again", s.v.id, s.dev.Number, dev.Number)
	}
	s.dev = dev
	return nil
}

// fetchKey gets the DEK and checks what its record says against what this node
// and this volume demand.
func (s *staging) fetchKey(ctx context.Context) error {
	if err := s.nameKey(ctx); err != nil {
		return err
	}
	key, err := s.cfg.Keys.GetDEK(ctx, s.v.dek)
	if errors.Is(err, errdefs.ErrNotFound) && s.cfg.Creator != nil {
		spec := s.cfg.Spec
		if s.integrity != dek.IntegrityNone {
			spec.Integrity = s.integrity
		}
		if spec.Integrity != dek.IntegrityNone {
			spec.Layout = s.cfg.Layout
		}
		key, err = s.cfg.Creator.CreateDEK(ctx, s.v.dek, spec)
	}
	if err != nil {
		return err
	}
	s.key = key
	if err := s.asMade(&s.key, s.integrity); err != nil {
		return err
	}
	if s.integrity != dek.IntegrityNone && s.key.Spec.Integrity == dek.IntegrityNone {
		return errdefs.Errorf(errdefs.ErrState, "volume %s has no integrity, but the node's policy or the volume itself demands it: copy the data to a new volume that has it", s.v.id)
	}
	if err := checkSharing(s.want, s.key.Spec.Integrity, s.wrapped.profile); err != nil {
		return err
	}
	// Whoever writes a header says so first: two nodes at once would leave none.
	if key.State == dek.Formatted || s.want.ReadOnly {
		return nil
	}
	claim, err := s.cfg.Keys.ClaimFormat(ctx, s.v.dek, dek.Claim{Node: s.cfg.NodeName, UUID: dek.NewUUID()})
	if err != nil {
		return err
	}
	s.key.Claim = claim
	return nil
}

// open maps the device, makes sure that the mapping is on it, and lets it grow
// with a device that has grown while the volume was not in use.
func (s *staging) open(ctx context.Context) error {
	// The answer of the key service took its time: a device that has changed
	// meanwhile is not the one that was looked at.
	if now, err := s.cfg.Devices.Device(s.v.device()); err != nil {
		return err
	} else if now.Number != s.dev.Number || now.Seq != s.dev.Seq || now.Size != s.dev.Size {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the device of volume %s is changing (was %s with %d bytes, is %s with %d): try again", s.v.id, s.dev.Number, s.dev.Size, now.Number, now.Size)
	}
	m, err := s.openNew(ctx)
	if err != nil {
		return err
	}
	s.log.InfoContext(ctx, "opened", "volume_id", s.v.id, "dek_id", s.v.dek, "device", s.dev.Number, "mapping", m.Name, "made", m.Made)
	if s.cfg.Constellation != nil {
		s.log.WarnContext(ctx, "this volume is as Constellation made it: the host can change what its header says and swap it for another; re-key it with csi-plugin rekey", "volume_id", s.v.id, "dek_id", s.v.dek)
	}
	switch {
	case m.Backing != s.dev.Number:
		return errdefs.Errorf(errdefs.ErrState, "mapping %s is on device %s, volume %s is device %s", m.Name, m.Backing, s.v.id, s.dev.Number)
	case m.ReadOnly != s.want.ReadOnly:
		return errdefs.Errorf(errdefs.ErrState, "mapping %s has read-only %v, wanted %v: unstage the volume first", m.Name, m.ReadOnly, s.want.ReadOnly)
	case m.Integrity != s.key.Spec.Integrity:
		return errdefs.Errorf(errdefs.ErrState, "mapping %s has integrity %q, the record of volume %s says %q", m.Name, m.Integrity, s.v.id, s.key.Spec.Integrity)
	case m.Direct != (s.key.Spec.IntegrityMode == dek.ModeDirect):
		return errdefs.Errorf(errdefs.ErrState, "mapping %s has its integrity without journal: %v, the record of volume %s says mode %q", m.Name, m.Direct, s.v.id, s.key.Spec.IntegrityMode)
	case m.Discard != s.key.Spec.Discard:
		return errdefs.Errorf(errdefs.ErrState, "mapping %s lets discards through: %v, the record of volume %s says %v", m.Name, m.Discard, s.v.id, s.key.Spec.Discard)
	case !m.Made && s.want.ReadOnly:
		return errdefs.Errorf(errdefs.ErrState, "volume %s was never formatted and is asked for read-only: use it writable once", s.v.id)
	}
	if !m.ReadOnly && m.Regions == 0 && usableSize(s.dev.Size, s.key.Spec)-m.Size >= slack {
		if m, err = s.grow(ctx, m); err != nil {
			return err
		}
	}
	s.m = m
	return nil
}

// growthPatience is how long staging waits for a volume with integrity to grow:
// its new space may have to be written first.
const growthPatience = 10 * time.Second

// grow lets the mapping have what its device has. Where that takes long the pod
// need not wait: the volume is used at its size, and NodeExpandVolume goes on.
func (s *staging) grow(ctx context.Context, m Mapping) (Mapping, error) {
	if m.Integrity == dek.IntegrityNone {
		return s.cfg.Mapper.Resize(ctx, s.mapped(), s.key)
	}
	patient, cancel := context.WithTimeout(ctx, growthPatience)
	defer cancel()
	grown, err := s.cfg.Mapper.Resize(patient, s.mapped(), s.key)
	if (errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)) && ctx.Err() == nil {
		s.log.WarnContext(ctx, "the device has grown, the volume is used at the size that it had: it grows when it is expanded", "volume_id", s.v.id, "device", s.dev.Number, "size", m.Size, "error", err)
		return m, nil
	}
	return grown, err
}

func (s *staging) mapped() Volume {
	return Volume{Name: s.v.mapping, Device: s.v.device(), ReadOnly: s.want.ReadOnly, Performance: s.performance}
}

// fill makes sure that the mapping holds what it must: the only place that
// makes filesystems. A volume that was finished once is never made again.
func (s *staging) fill(ctx context.Context) error {
	if s.want.AccessType == accessBlock {
		return s.markMade(ctx)
	}
	mounts, err := s.cfg.Mounts.List()
	if err != nil {
		return err
	}
	// Mounted already, by a call whose state file is lost. Only a finished
	// filesystem gets that far, and it must not be looked at from below.
	if layers := at(mounts, s.want.StagingPath); len(layers) > 0 {
		top := layers[len(layers)-1]
		if top.Device != s.m.Number || !s.m.Made {
			return s.foreignMount(top)
		}
		s.fs = FSInfo{Type: top.FSType, Size: s.m.Size, Clean: true}
		return nil
	}
	if s.fs, err = s.cfg.Filesystems.Probe(ctx, s.m.Path); err != nil {
		return err
	}
	switch {
	case s.m.Made:
		return s.checkFilesystem()
	case s.want.HandedOver && s.mkfs != "":
		return errdefs.Errorf(errdefs.ErrInvalid, "%s: on this node the wrapped driver makes filesystems (--stage-with=%s), and it does not take them", keyMkfs, StageWithWrapped)
	case s.want.HandedOver:
		return s.checkEmpty()
	}
	return s.makeFilesystem(ctx)
}

// checkFilesystem refuses a finished volume without its filesystem: something
// is wrong with the disk, and making a new one would hide that for ever.
func (s *staging) checkFilesystem() error {
	switch {
	case s.fs.Type == "":
		return errdefs.Errorf(errdefs.ErrState, "volume %s was formatted before, but there is no filesystem in it: it was used as a block volume, or its data are damaged; it will not be formatted again", s.v.id)
	case s.want.FSType != "" && s.fs.Type != s.want.FSType:
		return errdefs.Errorf(errdefs.ErrState, "volume %s has a filesystem of type %s, asked for is %s", s.v.id, s.fs.Type, s.want.FSType)
	}
	return nil
}

// makeFilesystem is forced: a killed mkfs leaves a signature that never mounts.
func (s *staging) makeFilesystem(ctx context.Context) error {
	fstype := s.want.newFSType()
	options, err := readMkfsOptions(fstype, s.mkfs)
	if err != nil {
		return err
	}
	if err := s.cfg.Filesystems.Make(ctx, s.m.Path, fstype, options, s.m.Integrity != dek.IntegrityNone); err != nil {
		return err
	}
	s.log.InfoContext(ctx, "formatted", "volume_id", s.v.id, "device", s.dev.Number, "filesystem", fstype, "options", s.mkfs)
	s.fs = FSInfo{Type: fstype, Size: s.m.Size, Clean: true}
	return s.markMade(ctx)
}

// markMade notes in the header that the volume is finished.
func (s *staging) markMade(ctx context.Context) error {
	if s.m.Made {
		return nil
	}
	m, err := s.cfg.Mapper.MarkMade(ctx, s.mapped(), s.key)
	if err != nil {
		return err
	}
	s.m, s.formatted = m, true
	return nil
}

// confirm tells the key side that the volume is formatted, and which header
// it must not fall behind. No pod sees the volume before that.
func (s *staging) confirm(ctx context.Context) error {
	if !s.m.Made { // handed over: mount comes first
		return nil
	}
	if !Unconfirmed(s.key, s.m.Header) {
		return nil
	}
	if err := s.cfg.Keys.ConfirmDEK(ctx, s.v.dek, s.m.Header); err != nil {
		return err
	}
	if s.key.State == dek.Rotating && s.m.Header.Fingerprint == dek.Fingerprint(s.key.Key) {
		s.log.InfoContext(ctx, "given its own key", "volume_id", s.v.id, "dek_id", s.v.dek, "source", s.key.Source)
	}
	s.key.State, s.key.Header = dek.Formatted, s.m.Header
	return nil
}

// mount mounts the filesystem at the staging path and lets it grow.
func (s *staging) mount(ctx context.Context) error {
	if s.want.AccessType == accessBlock {
		return nil
	}
	mountIt := s.mountFilesystem
	if s.want.HandedOver {
		mountIt = s.handOver
	}
	if err := mountIt(ctx); err != nil {
		return err
	}
	if s.want.ReadOnly || s.m.Size-s.fs.Size < slack {
		return nil
	}
	return s.cfg.Filesystems.Grow(ctx, s.m.Path, s.want.StagingPath, s.fs.Type)
}

func (s *staging) mountFilesystem(ctx context.Context) error {
	mounts, err := s.cfg.Mounts.List()
	if err != nil || len(at(mounts, s.want.StagingPath)) > 0 {
		return err // fill has made sure that it is ours
	}
	if err := os.MkdirAll(s.want.StagingPath, 0o750); err != nil {
		return err
	}
	options := slices.Clone(s.want.MountFlags)
	if s.want.ReadOnly {
		options = readOnlyOptions(options, s.fs)
	} else if !s.fs.Clean {
		if err := s.cfg.Filesystems.Check(ctx, s.m.Path, s.fs.Type); err != nil {
			return err
		}
	}
	// A copy has its source's UUID, and XFS mounts each UUID once on a node:
	// whichever of the two comes second would be refused.
	if s.fs.Type == "xfs" && !slices.Contains(options, "nouuid") {
		options = append(options, "nouuid")
	}
	return s.cfg.Mounts.Mount(ctx, s.m.Path, s.want.StagingPath, s.fs.Type, options)
}

// readOnlyOptions make the mount leave the journal alone: on a device that
// cannot be written it could not be replayed.
func readOnlyOptions(options []string, fs FSInfo) []string {
	if !slices.Contains(options, "ro") {
		options = append(options, "ro")
	}
	switch {
	case fs.Type == "ext4" && !fs.Clean:
		options = append(options, "noload")
	case fs.Type == "xfs":
		options = append(options, "norecovery")
	case fs.Type == "btrfs":
		options = append(options, "rescue=nologreplay")
	}
	return options
}

// Unconfirmed tells whether the record lacks something of a volume's header, so
// that Keys.ConfirmDEK has to be called before the volume is used.
func Unconfirmed(key dek.DEK, h dek.HeaderID) bool {
	return key.State != dek.Formatted || h.Sequence > key.Header.Sequence || h.Backup != ""
}

// noted is what the state file keeps of a header: the rest has its place in the
// record, or says something of a single call.
func noted(h dek.HeaderID) dek.HeaderID {
	h.Backup, h.Fingerprint = "", ""
	return h
}

// note writes down that the volume is staged.
func (s *staging) note(context.Context) error {
	st := s.state()
	st.Staged, st.StagedAt = true, time.Now()
	st.Filesystem = s.fs.Type
	st.Spec = s.key.Spec
	st.Header = noted(s.m.Header)
	return s.save(s.v, st)
}
