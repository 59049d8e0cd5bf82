package loopdriver

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// adopt makes loop devices and files match the state, as New says.
func (d *Driver) adopt(ctx context.Context) error {
	keep := map[string]bool{} // files whose device stays
	for _, v := range d.store.volumes() {
		if err := d.adoptVolume(v); err != nil {
			return err
		}
		if v.Node != "" || d.cfg.NoAttach && len(v.Uses) > 0 {
			keep[d.BackingFile(v.ID)] = true
		}
		if len(v.Uses) > 0 {
			keep[d.file(blankDir, v.ID)] = true
		}
	}
	if err := d.detachOthers(ctx, keep); err != nil {
		return err
	}
	return d.removeOrphans()
}

// adoptVolume drops uses that did not survive, after a reboot say, and
// attaches the device again where the CO believes that it is attached.
func (d *Driver) adoptVolume(v volume) error {
	changed := false
	for path, u := range v.Uses {
		// Staging a block volume leaves no mount that could be missed.
		if !mounted(path) && !(u.Staged && u.Block) {
			delete(v.Uses, path)
			changed = true
		}
	}
	if v.Node != "" {
		dev, err := attachLoop(d.BackingFile(v.ID), v.Device)
		if err != nil {
			return err
		}
		if dev != v.Device {
			d.cfg.Log.Warn("the volume is on another loop device now: publish contexts handed out before name the wrong one",
				"volume_id", v.ID, "was", v.Device, "device", dev)
			v.Device, changed = dev, true
		}
	}
	if v.Node == "" && len(v.Uses) == 0 && v.Device != "" {
		v.Device, changed = "", true
	}
	if !changed {
		return nil
	}
	return d.store.putVolume(v)
}

// detachOthers detaches the loop devices on files of the data directory that
// are not to be kept. One that is in use is left alone, with a warning.
func (d *Driver) detachOthers(ctx context.Context, keep map[string]bool) error {
	bound, err := boundLoops()
	if err != nil {
		return err
	}
	for dev, backing := range bound {
		file, deleted := strings.CutSuffix(backing, " (deleted)")
		if !strings.HasPrefix(file, d.cfg.DataDir+"/") || keep[file] || !d.ours(dev, file, deleted) {
			continue
		}
		if err := detachLoop(ctx, dev); err != nil {
			d.cfg.Log.Warn("a loop device of a volume that is not attached is left", "device", dev, "file", file, "error", err)
			continue
		}
		d.cfg.Log.Info("detached a stale loop device", "device", dev, "file", file)
	}
	return nil
}

// ours tells whether dev is really on a file of the data directory. The path
// alone does not: in another container it may be the path of another file.
func (d *Driver) ours(dev, file string, deleted bool) bool {
	info, err := loopInfo(dev)
	if err != nil {
		return false
	}
	var st unix.Stat_t
	if deleted {
		return unix.Stat(d.cfg.DataDir, &st) == nil && st.Dev == info.Device
	}
	return unix.Stat(file, &st) == nil && st.Dev == info.Device && st.Ino == info.Inode
}

// removeOrphans removes files that a crash left between file and state.
func (d *Driver) removeOrphans() error {
	known := map[string]bool{}
	for _, v := range d.store.volumes() {
		known[d.BackingFile(v.ID)] = true
		if len(v.Uses) > 0 {
			known[d.file(blankDir, v.ID)] = true
		}
	}
	for _, n := range d.store.snapshots() {
		known[d.file(snapshotsDir, n.ID)] = true
	}
	for _, sub := range []string{volumesDir, snapshotsDir, blankDir} {
		images, err := filepath.Glob(filepath.Join(d.cfg.DataDir, sub, "*.img"))
		if err != nil {
			return err
		}
		for _, image := range images {
			if known[image] {
				continue
			}
			d.cfg.Log.Info("removing a file that belongs to nothing", "file", image)
			if err := os.Remove(image); err != nil {
				return err
			}
		}
	}
	return nil
}

// blank returns a device full of zeros and as large as v, to be shown in
// its place until its last use ends.
func (d *Driver) blank(ctx context.Context, v volume) (string, error) {
	file := d.file(blankDir, v.ID)
	if _, err := os.Stat(file); errors.Is(err, os.ErrNotExist) {
		if err := makeImage(ctx, file, "", v.Bytes); err != nil {
			return "", err
		}
	}
	return attachLoop(file, "")
}

// dropBlank undoes blank.
func (d *Driver) dropBlank(ctx context.Context, id string) error {
	file := d.file(blankDir, id)
	if err := detachFile(ctx, file); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
