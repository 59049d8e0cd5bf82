package loopdriver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// mountDevice mounts dev at path (an existing directory), making the
// filesystem where dev is blank, and grows the filesystem to dev. Nothing
// happens where dev is mounted there; ErrState where something else is, or
// where dev holds another filesystem. It runs no fsck.
func (d *Driver) mountDevice(dev, path string, c *csi.VolumeCapability) error {
	if mounted(path) {
		return sameDevice(path, dev)
	}
	want, options := fsType(c), slices.Clone(c.GetMount().GetMountFlags())
	if readerOnly(c) {
		options = append(options, "ro")
	}
	if want == "xfs" {
		options = append(options, "nouuid") // a clone has its source's UUID
	}
	have, err := d.mounter.GetDiskFormat(dev)
	if err != nil {
		return fmt.Errorf("looking for a filesystem on %s: %w", dev, err)
	}
	switch {
	case have == "" && readerOnly(c):
		return errdefs.Errorf(errdefs.ErrState, "%s is blank and the volume is read-only: there is nothing to mount", dev)
	case have == "": // and so as large as the device from the start
		return d.mounter.FormatAndMount(dev, path, want, options)
	case have == want:
		err = d.mounter.Mount(dev, path, want, options)
	default:
		err = errdefs.Errorf(errdefs.ErrState, "%s holds %q and not the filesystem %s", dev, have, want)
	}
	if err != nil || readerOnly(c) {
		return err
	}
	// A volume made from a smaller source, or grown while it was not staged.
	resize := mount.NewResizeFs(d.exec)
	need, err := resize.NeedResize(dev, path)
	if err == nil && need {
		_, err = resize.Resize(dev, path)
	}
	return err
}

// sameDevice checks that what is mounted at path is dev.
func sameDevice(path, dev string) error {
	source, err := mountSource(path)
	if err != nil {
		return err
	}
	var have, want unix.Stat_t
	if err := unix.Stat(source, &have); err != nil {
		return &os.PathError{Op: "stat", Path: source, Err: err}
	}
	if err := unix.Stat(dev, &want); err != nil {
		return &os.PathError{Op: "stat", Path: dev, Err: err}
	}
	if have.Rdev != want.Rdev {
		return errdefs.Errorf(errdefs.ErrState, "%s is mounted at %s, not %s: unmount it first", source, path, dev)
	}
	return nil
}

// mountSource returns the device that is mounted at path, topmost.
func mountSource(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	infos, err := mount.ParseMountInfo("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	source := ""
	for _, info := range infos {
		if info.MountPoint == real {
			source = info.Source
		}
	}
	if source == "" {
		return "", errdefs.Errorf(errdefs.ErrNotFound, "nothing is mounted at %s", path)
	}
	return source, nil
}

// mounted reports whether path itself is a mount point. What cannot be looked
// at for another reason than not being there counts as one: a mount of a dead
// device is such a thing.
func mounted(path string) bool {
	var stx unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &stx)
	if err != nil {
		return !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR)
	}
	return stx.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// bind makes the node of dev appear at path. Read-only keeps nobody from
// writing to the device: the flag is the mount's, not the device's.
func bind(dev, path string, readOnly bool) error {
	if err := unix.Mount(dev, path, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind " + dev + " onto", Path: path, Err: err}
	}
	if readOnly {
		return remountReadOnly(path)
	}
	return nil
}

func remountReadOnly(path string) error {
	if err := unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return &os.PathError{Op: "remount read-only", Path: path, Err: err}
	}
	return nil
}

// unmountOnce takes one mount off path, if there is one.
func unmountOnce(path string) error {
	if !mounted(path) {
		return nil
	}
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	return nil
}

// unmountAll takes all mounts off path.
func unmountAll(path string) error {
	for mounted(path) {
		if err := unmountOnce(path); err != nil {
			return err
		}
	}
	return nil
}

func makeDir(path string) error {
	if err := os.Mkdir(path, 0o750); err != nil && !os.IsExist(err) {
		return err
	}
	return nil
}
