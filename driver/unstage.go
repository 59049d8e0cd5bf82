package driver

import (
	"context"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// teardown removes everything that staging makes, wherever it stopped: the
// filesystem, the mapping, the borrowed device, the state file, in this order.
// It serves NodeUnstageVolume and a NodeStageVolume that failed. It looks at
// the kernel's tables and the state file, reads no disk and needs no key.
// ErrUnavailable while a pod uses the volume. staging is the caller's path,
// which need not be the one in the state file.
func (d *Driver) teardown(ctx context.Context, v volume, staging string) error {
	st, err := d.load(v)
	if err != nil {
		return err
	}
	m, open, err := d.mapping(v)
	if err != nil {
		return err
	}
	if err := d.unmountStaged(ctx, v, st, m, staging); err != nil {
		return err
	}
	// Also where the kernel shows no mapping: a worker of an earlier call may
	// still be about to make one, and Close knows.
	if open || st != nil {
		if err := d.cfg.Mapper.Close(ctx, v.mapping); err != nil {
			return err
		}
		if err := removePath(d.alias(v)); err != nil {
			return err
		}
		d.log.InfoContext(ctx, "closed", "volume_id", v.id, "mapping", v.mapping, "was_open", open)
	}
	inner, borrowed, err := d.borrowed(ctx, v, st)
	if err != nil {
		return err
	}
	if borrowed {
		if err := d.giveBack(ctx, v, inner); err != nil {
			return err
		}
	}
	return d.forget(v)
}

// unmountStaged takes the filesystem away, unless something else than the
// staging path shows the volume.
func (d *Driver) unmountStaged(ctx context.Context, v volume, st *state, m Mapping, staging string) error {
	paths := []string{staging}
	if st != nil && st.StagingPath != staging {
		paths = append(paths, st.StagingPath)
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return err
	}
	for _, l := range mounts {
		if m.Number != "" && l.Device == m.Number && !slices.Contains(paths, l.Target) {
			return errdefs.Errorf(errdefs.ErrUnavailable, "volume %s is still in use at %s: that has to be unpublished first", v.id, l.Target)
		}
	}
	if st != nil && st.HandedOver {
		if err := d.takeBack(ctx, v, st); err != nil {
			return err
		}
	}
	for _, path := range paths {
		// What the state file names is ours whatever is mounted there; the
		// caller's path only if it shows this volume's mapping.
		ours := st != nil && st.StagingPath == path && st.AccessType == accessMount
		if !ours && !slices.ContainsFunc(at(mounts, path), func(l Mount) bool { return m.Number != "" && l.Device == m.Number }) {
			continue
		}
		if err := d.unmountAll(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// borrowed tells whether the raw device may be with us, and whether the wrapped
// driver has staged it.
func (d *Driver) borrowed(ctx context.Context, v volume, st *state) (innerStaged, borrowed bool, err error) {
	if st != nil {
		return st.InnerStaged, true, nil
	}
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return false, false, err
	}
	if !slices.ContainsFunc(mounts, func(m Mount) bool { return within(m.Target, v.dir) }) {
		return false, false, nil
	}
	// The state file is lost, the device is here.
	caps, err := d.wrapped.capabilities(ctx)
	if err != nil {
		return false, false, fmt.Errorf("giving back volume %s: %w", v.id, err)
	}
	return caps.has(csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME), true, nil
}

// unstageForeign lets the wrapped driver take away what is still mounted at the
// staging path though nothing of ours is left: it staged the volume before this
// plugin was there, or while the volume was in the list of unencrypted ones. To
// say that it is gone would have it detached from under its filesystem.
func (d *Driver) unstageForeign(ctx context.Context, v volume, staging string) error {
	mounts, err := d.cfg.Mounts.List()
	if err != nil || len(at(mounts, staging)) == 0 {
		return err
	}
	d.log.WarnContext(ctx, "the wrapped driver unstages what it staged without encryption", "volume_id", v.id, "staging_path", staging)
	if err := d.wrapped.unstage(ctx, v.id, staging); err != nil {
		return err
	}
	return d.unmountAll(ctx, staging)
}
