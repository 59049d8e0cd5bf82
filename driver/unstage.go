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
	d.initialiser.stop(v.id)
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
	// What is there after a reboot, the wrapped driver did not mount for us.
	handedOver := st != nil && st.HandedOver && (st.BootID == d.boot || !anyWithin(mounts, st.StagingPath))
	if handedOver {
		if err := d.takeBack(ctx, v, st); err != nil {
			return err
		}
	}
	for _, path := range paths {
		if err := d.unmountMapping(ctx, v, m, path); err != nil {
			return err
		}
	}
	if !handedOver {
		return nil
	}
	return d.checkUnmounted(v, st.StagingPath)
}

// unmountMapping takes away every layer at path that shows the mapping, and
// nothing else.
func (d *Driver) unmountMapping(ctx context.Context, v volume, m Mapping, path string) error {
	for range maxLayers {
		mounts, err := d.cfg.Mounts.List()
		if err != nil {
			return err
		}
		layers := at(mounts, path)
		if m.Number == "" || !slices.ContainsFunc(layers, func(l Mount) bool { return l.Device == m.Number }) {
			return nil
		}
		if top := layers[len(layers)-1]; top.Device != m.Number {
			return errdefs.Errorf(errdefs.ErrUnavailable, "device %s is mounted at %s over volume %s, which did not put it there: unmount it", top.Device, path, v.id)
		}
		if err := d.cfg.Mounts.Unmount(ctx, path); err != nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "unmounting %s: %w", path, err)
		}
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s is still mounted after %d unmounts", path, maxLayers)
}

// checkUnmounted makes sure that the wrapped driver, which has unstaged the
// volume, left nothing mounted at or below its staging path.
func (d *Driver) checkUnmounted(v volume, staging string) error {
	mounts, err := d.cfg.Mounts.List()
	if err != nil {
		return err
	}
	for _, l := range mounts {
		if within(l.Target, staging) {
			return errdefs.Errorf(errdefs.ErrUnavailable, "the wrapped driver says that volume %s is unstaged, but device %s is still mounted at %s", v.id, l.Device, l.Target)
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
	if !anyWithin(mounts, v.dir) {
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
// staging path, or below it, though nothing of ours is left: it staged the volume
// before this plugin was there, or while the volume was in the list of unencrypted
// ones. To say that it is gone would have it detached from under its filesystem.
func (d *Driver) unstageForeign(ctx context.Context, v volume, staging string) error {
	mounts, err := d.cfg.Mounts.List()
	if err != nil || !anyWithin(mounts, staging) {
		return err
	}
	d.log.WarnContext(ctx, "the wrapped driver unstages what it staged without encryption", "volume_id", v.id, "staging_path", staging)
	if err := d.wrapped.unstage(ctx, v.id, staging); err != nil {
		return err
	}
	return d.checkUnmounted(v, staging)
}
