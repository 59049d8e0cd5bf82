package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// MappingState says how a mapping and the state files fit together.
type MappingState string

// The states.
const (
	StateStaged     MappingState = "staged"     // open, and the state file says so
	StateIncomplete MappingState = "incomplete" // staging was interrupted; a call finishes or undoes it
	StateClosed     MappingState = "closed"     // a state file without a mapping: rebooted, or interrupted early
	StateOrphan     MappingState = "orphan"     // a mapping that no state file explains
	StateSuspended  MappingState = "suspended"  // I/O to it waits
	StateUnreadable MappingState = "unreadable" // a state file that cannot be read; any mapping may be its
)

// MappingInfo is what is known of one mapping or one state file.
type MappingInfo struct {
	Mapping     // the zero value but for Name where nothing is open
	State       MappingState
	Driver      string // the CSI driver that it belongs to
	VolumeID    string
	DEK         dek.ID
	AccessType  string // "mount" or "block"
	Filesystem  string
	StagingPath string
	Header      dek.HeaderID // as of the last staging or growth
	UsedAt      []string     // where it can be seen, beside the staging path
	Finishing   bool         // hydrated, and that is perhaps not confirmed
	Damage      Damage       // what the kernel has reported since it was staged
	Problem     error        // what is wrong with the state file; nil but for StateUnreadable
}

// Inspect joins the mappings of this node with the state files of all drivers
// of ours on it (there may be several, each in front of another driver). It
// reads no disk and needs no key.
func (d *Driver) Inspect(ctx context.Context) ([]MappingInfo, error) {
	return Inspect(ctx, realDir(d.cfg.KubeletDir), d.cfg.Mapper, d.cfg.Mounts, d.boot)
}

// Inspect is the method of the same name for a process that serves nothing.
func Inspect(_ context.Context, kubeletDir string, mapper interface{ List() ([]Mapping, error) }, mounts Mounts, boot string) ([]MappingInfo, error) {
	// The mappings first: a state file is written before its mapping is made,
	// so that what is in this list has its file by now.
	mappings, err := mapper.List()
	if err != nil {
		return nil, err
	}
	table, err := mounts.List()
	if err != nil {
		return nil, err
	}
	states, unreadable := readStates(kubeletDir)
	var all []MappingInfo
	for _, err := range unreadable {
		all = append(all, MappingInfo{State: StateUnreadable, Problem: err})
	}
	for _, st := range states {
		info := describe(st)
		i := slices.IndexFunc(mappings, func(m Mapping) bool { return m.Name == info.Name })
		if i >= 0 {
			info.Mapping = mappings[i]
			info.State = openState(info.Mapping, st, boot)
			info.UsedAt = usedElsewhere(table, info.Mapping, st.StagingPath)
			mappings = slices.Delete(mappings, i, i+1)
		}
		all = append(all, info)
	}
	for _, m := range mappings {
		all = append(all, MappingInfo{Mapping: m, State: StateOrphan, UsedAt: usedElsewhere(table, m, "")})
	}
	slices.SortFunc(all, func(a, b MappingInfo) int { return strings.Compare(a.VolumeID+"\x00"+a.Name, b.VolumeID+"\x00"+b.Name) })
	return all, nil
}

func describe(st *state) MappingInfo {
	return MappingInfo{
		Mapping: Mapping{Name: MappingName(st.Driver, st.VolumeID)}, State: StateClosed,
		Driver: st.Driver, VolumeID: st.VolumeID, DEK: st.DEK, AccessType: st.AccessType,
		Filesystem: st.Filesystem, StagingPath: st.StagingPath, Header: st.Header, Finishing: st.Finishing, Damage: st.Damage,
	}
}

func openState(m Mapping, st *state, boot string) MappingState {
	switch {
	case m.Suspended:
		return StateSuspended
	case st.Staged && st.BootID == boot && st.Device == m.Backing:
		return StateStaged
	}
	return StateIncomplete
}

// readStates reads the state files of all drivers of ours, and says of each that
// it cannot read what is wrong.
func readStates(kubeletDir string) (states []*state, unreadable []error) {
	paths, err := filepath.Glob(filepath.Join(privateDir(kubeletDir, "*"), "*", "volume.json"))
	if err != nil {
		return nil, []error{err}
	}
	for _, path := range paths {
		st, err := readState(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // unstaged just now
		}
		if err != nil {
			unreadable = append(unreadable, err)
			continue
		}
		states = append(states, st)
	}
	return states, unreadable
}

// Reconcile tidies up after a crash; it is called once, at the start, before
// anything is served. It closes mappings that no state file explains and that
// nobody uses, lets the I/O of volumes go on whose mappings were left suspended,
// and gives back what was staged in another boot: kubelet stages
// again what it still wants. It returns the orphans that stay: because they are
// in use, or because a state file that cannot be read may explain them. Its errors
// are no reason not to serve.
func (d *Driver) Reconcile(ctx context.Context) ([]MappingInfo, error) {
	all, err := d.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	unreadable := slices.ContainsFunc(all, func(i MappingInfo) bool { return i.State == StateUnreadable })
	var left []MappingInfo
	var errs []error
	for _, info := range all {
		switch {
		case info.State == StateUnreadable:
			errs = append(errs, info.Problem)
		case info.State == StateOrphan && (unreadable || len(info.UsedAt) > 0):
			left = append(left, info)
		case info.State == StateOrphan:
			err := d.cfg.Mapper.Close(ctx, info.Name)
			if errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, errdefs.ErrConflict) {
				left = append(left, info)
			} else if err != nil {
				errs = append(errs, err)
			} else {
				d.log.InfoContext(ctx, "closed an orphan", "mapping", info.Name, "device", info.Backing)
			}
		case info.State == StateSuspended && info.Driver == d.name:
			errs = append(errs, d.resume(ctx, info))
		case info.State == StateClosed && info.Driver == d.name:
			errs = append(errs, d.giveBackRebooted(ctx, info.VolumeID))
		}
	}
	return left, errors.Join(errs...)
}

// resume lets I/O to a volume go on: pods wait for it, and so would whoever
// unmounts it.
func (d *Driver) resume(ctx context.Context, info MappingInfo) error {
	if d.cfg.Resume == nil {
		return nil
	}
	if err := d.cfg.Resume(ctx, info.Name); err != nil {
		return fmt.Errorf("mapping %s of volume %s is suspended: %w", info.Name, info.VolumeID, err)
	}
	d.log.WarnContext(ctx, "resumed a mapping that was left suspended", "volume_id", info.VolumeID, "mapping", info.Name)
	return nil
}

// giveBackRebooted tears down a volume that was staged in another boot, if
// nothing is mounted where it was.
func (d *Driver) giveBackRebooted(ctx context.Context, volumeID string) error {
	v, err := d.volume(volumeID)
	if err != nil {
		return err
	}
	st, err := d.load(v)
	if err != nil || st == nil || st.BootID == d.boot {
		return err
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil || anyWithin(mounts, st.StagingPath) {
		return err
	}
	return d.teardown(ctx, v, st.StagingPath)
}
