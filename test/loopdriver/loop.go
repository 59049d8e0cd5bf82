package loopdriver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The kernel is the only record of which file sits behind which loop device;
// it is asked every time.

// detachWait bounds how long detaching waits for somebody who has the device
// open only for a moment, as blkid and udev do.
const detachWait = 5 * time.Second

// loopFor returns the loop device on file ("/dev/loopN"), or "" if there is
// none. The file's device and inode number decide, not its name.
func loopFor(file string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: file, Err: err}
	}
	bound, err := boundLoops()
	if err != nil {
		return "", err
	}
	for dev, backing := range bound {
		if filepath.Base(backing) != filepath.Base(file) {
			continue
		}
		info, err := loopInfo(dev)
		if errors.Is(err, unix.ENXIO) {
			continue // detached since
		}
		if err != nil {
			return "", err
		}
		if info.Device == st.Dev && info.Inode == st.Ino {
			return dev, nil
		}
	}
	return "", nil
}

// boundLoops maps each attached loop device to its file's name, as sysfs shows
// it.
func boundLoops() (map[string]string, error) {
	entries, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	bound := map[string]string{}
	for _, entry := range entries {
		backing, err := os.ReadFile(entry)
		if err != nil {
			continue // detached since
		}
		name := filepath.Base(filepath.Dir(filepath.Dir(entry)))
		bound["/dev/"+name] = strings.TrimSuffix(string(backing), "\n")
	}
	return bound, nil
}

func loopInfo(dev string) (*unix.LoopInfo64, error) {
	f, err := os.Open(dev)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("asking %s for its file: %w", dev, err)
	}
	return info, nil
}

// attachLoop returns the loop device on file and makes one if there is none:
// preferred where that is free, else any.
func attachLoop(file, preferred string) (string, error) {
	switch dev, err := loopFor(file); {
	case err != nil:
		return "", err
	case dev != "":
		info, err := loopInfo(dev)
		if err == nil && info.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
			return dev, nil
		}
		return "", errdefs.Errorf(errdefs.ErrUnavailable, "%s is being detached from %s: try again", dev, file)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if preferred != "" {
		if err := bindLoop(preferred, f); err == nil {
			return preferred, nil
		}
	}
	for {
		dev, err := freeLoop()
		if err != nil {
			return "", err
		}
		err = bindLoop(dev, f)
		if err == nil {
			return dev, nil
		}
		if !errors.Is(err, unix.EBUSY) { // else somebody was faster
			return "", err
		}
	}
}

// freeLoop returns an unused loop device, which anybody else may take too.
func freeLoop() (string, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("loop devices need root and the loop module: %w", err)
	}
	defer ctl.Close()
	n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "", fmt.Errorf("asking for a free loop device: %w", err)
	}
	return "/dev/loop" + strconv.Itoa(n), nil
}

// bindLoop attaches f to dev, with direct I/O where f's filesystem has it.
func bindLoop(dev string, f *os.File) error {
	loop, err := openOrMakeLoop(dev)
	if err != nil {
		return err
	}
	defer loop.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd())}
	copy(config.Info.File_name[:63], f.Name())
	// Some kernels drop the flag where direct I/O is impossible, some refuse.
	for _, flags := range []uint32{unix.LO_FLAGS_DIRECT_IO, 0} {
		config.Info.Flags = flags
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("attaching %s to %s: %w", f.Name(), dev, err)
	}
	return nil
}

// openOrMakeLoop opens dev, adding a device of that number to the kernel if it
// has none: after a reboot there are only a few.
func openOrMakeLoop(dev string) (*os.File, error) {
	loop, err := os.OpenFile(dev, os.O_RDWR, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return loop, err
	}
	n, err := strconv.Atoi(strings.TrimPrefix(dev, "/dev/loop"))
	if err != nil {
		return nil, fmt.Errorf("%q is not a loop device", dev)
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	if err := unix.IoctlSetInt(int(ctl.Fd()), unix.LOOP_CTL_ADD, n); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("adding %s: %w", dev, err)
	}
	return os.OpenFile(dev, os.O_RDWR, 0)
}

// detachFile detaches the loop device on file: nil where there is none or the
// file is gone, ErrState while a mount or a mapping holds the device.
func detachFile(ctx context.Context, file string) error {
	dev, err := loopFor(file)
	if errors.Is(err, os.ErrNotExist) || err == nil && dev == "" {
		return nil
	}
	if err != nil {
		return err
	}
	return detachLoop(ctx, dev)
}

func detachLoop(ctx context.Context, dev string) error {
	// An exclusive open fails while the device is mounted, in whatever
	// namespace, or carries a mapping. Without it the kernel would detach
	// behind the holder's last use and tell us that all is well.
	loop, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return errdefs.Errorf(errdefs.ErrState, "%s cannot be detached: it is mounted or a mapping sits on it", dev)
	}
	if err != nil {
		return err
	}
	err = unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_CLR_FD, 0)
	loop.Close() // the last close is what detaches
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detaching %s: %w", dev, err)
	}
	return waitDetached(ctx, dev)
}

// waitDetached waits for whoever else has dev open. The kernel announces the
// end by a uevent only, which a container may never see: so it is asked.
func waitDetached(ctx context.Context, dev string) error {
	ctx, cancel := context.WithTimeout(ctx, detachWait)
	defer cancel()
	entry := filepath.Join("/sys/block", filepath.Base(dev), "loop/backing_file")
	for {
		if _, err := os.Stat(entry); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err := wait(ctx, 5*time.Millisecond); err != nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "%s will be detached when the last process that has it open closes it: try again", dev)
		}
	}
}

// growLoop makes the loop device on file, if any, as large as the file.
func growLoop(file string) error {
	dev, err := loopFor(file)
	if err != nil || dev == "" {
		return err
	}
	loop, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer loop.Close()
	if err := unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return fmt.Errorf("growing %s: %w", dev, err)
	}
	return nil
}
