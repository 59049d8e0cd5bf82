package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// BootID is different after every boot.
func (Linux) BootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

func number(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// Device reads sysfs and opens nothing.
func (Linux) Device(path string) (Device, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return Device{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return Device{}, errdefs.Errorf(errdefs.ErrState, "%s is not a block device: the driver did not publish the volume as one", path)
	}
	dev := Device{Number: number(st.Rdev)}
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + dev.Number)
	if err != nil {
		return Device{}, gone(dev.Number, err)
	}
	sectors, err := readNumber(filepath.Join(dir, "size"))
	if err != nil {
		return Device{}, gone(dev.Number, err)
	}
	dev.Size = int64(sectors) * 512
	disk := dir
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		disk = filepath.Dir(dir)
	}
	if dev.Seq, err = readNumber(filepath.Join(disk, "diskseq")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Device{}, err
	}
	dev.Holders, err = holders(filepath.Join(dir, "holders"))
	return dev, err
}

// gone does not wrap err: that sysfs has no file does not mean that the caller's
// path leads nowhere.
func gone(number string, err error) error {
	return errdefs.Errorf(errdefs.ErrUnavailable, "the kernel has no device %s any more: %v", number, err)
}

func readNumber(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 63)
}

func holders(dir string) ([]Holder, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []Holder
	for _, e := range entries {
		h := Holder{Name: e.Name()}
		if name, err := os.ReadFile(filepath.Join(dir, e.Name(), "dm/name")); err == nil {
			h.Name = strings.TrimSpace(string(name))
		}
		if uuid, err := os.ReadFile(filepath.Join(dir, e.Name(), "dm/uuid")); err == nil {
			h.Multipath = strings.HasPrefix(string(uuid), "mpath-")
		}
		all = append(all, h)
	}
	return all, nil
}

// Rescan asks SCSI disks and loop devices for their size; the others tell the
// kernel by themselves.
func (Linux) Rescan(_ context.Context, path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	dir := "/sys/dev/block/" + number(st.Rdev)
	if _, err := os.Stat(filepath.Join(dir, "loop")); err == nil {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0)
		return errors.Join(err, f.Close())
	}
	f, err := os.OpenFile(filepath.Join(dir, "device/rescan"), os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString("1")
	return errors.Join(err, f.Close())
}

// Activity reads the device's stat file in sysfs, see the kernel's
// Documentation/block/stat.rst.
func (Linux) Activity(number string) (Activity, error) {
	data, err := os.ReadFile(filepath.Join("/sys/dev/block", number, "stat"))
	if err != nil {
		return Activity{}, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	const reads, writes, inFlight, discards, flushes = 0, 4, 8, 11, 15 // fields; the last two came later
	var a Activity
	for i, field := range strings.Fields(string(data)) {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return Activity{}, errdefs.Errorf(errdefs.ErrUnavailable, "statistics of device %s: %w", number, err)
		}
		switch i {
		case reads, writes, discards, flushes:
			a.Done += n
		case inFlight:
			a.InFlight = n
		}
	}
	return a, nil
}

// Alias makes a block device node.
func (Linux) Alias(path, number string) error {
	var major, minor uint32
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("device number %q: %w", number, err)
	}
	dev := unix.Mkdev(major, minor)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err == nil {
		if st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == dev {
			return nil
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(dev)); err != nil {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return nil
}

// LUKS looks at the first bytes of a device. Nothing is believed of them.
func (Linux) LUKS(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	magic := make([]byte, len(luksMagic))
	if _, err := io.ReadFull(f, magic); err != nil {
		return false, fmt.Errorf("reading the begin of the device: %w", err)
	}
	return string(magic) == luksMagic, nil
}

// luksMagic begins LUKS headers of both versions.
const luksMagic = "LUKS\xba\xbe"
