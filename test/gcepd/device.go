package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/deviceutils"
)

// disks is a directory with a file for each disk and snapshot, and for each
// attached disk a link to its loop device, named as udev does it.
type disks string

func (d disks) disk(name string) string     { return filepath.Join(string(d), "disks", name) }
func (d disks) snapshot(name string) string { return filepath.Join(string(d), "snapshots", name) }
func (d disks) link(name string) string     { return filepath.Join(string(d), "by-id", "google-"+name) }

func (d disks) make() error {
	for _, path := range []string{d.disk("x"), d.snapshot("x"), d.link("x")} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (d disks) attach(ctx context.Context, name string) error {
	dev, err := losetup(ctx, "--find", "--show", d.disk(name))
	if err != nil {
		return err
	}
	return os.Symlink(dev, d.link(name))
}

// detach refuses to take a device away that somebody has mounted or mapped.
func (d disks) detach(ctx context.Context, name string) error {
	dev, err := os.Readlink(d.link(name))
	if err != nil {
		return err
	}
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		return fmt.Errorf("disk %s is in use: %w", name, err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	if _, err := losetup(ctx, "--detach", dev); err != nil {
		return err
	}
	return os.Remove(d.link(name))
}

// grow makes a disk larger, and its loop device if it is attached.
func grow(ctx context.Context, file string, bytes int64) error {
	if err := os.Truncate(file, bytes); err != nil {
		return err
	}
	dev, err := losetup(ctx, "--associated", file, "--noheadings", "--output=NAME")
	if err != nil || dev == "" {
		return err
	}
	_, err = losetup(ctx, "--set-capacity", dev)
	return err
}

// copyFile makes a file that holds what source does; nothing for "".
func copyFile(ctx context.Context, file, source string) error {
	if source == "" {
		return os.WriteFile(file, nil, 0o600)
	}
	_, err := command(ctx, "cp", "--sparse=always", "--reflink=auto", source, file)
	return err
}

func remove(file string) error {
	if err := os.Remove(file); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func losetup(ctx context.Context, args ...string) (string, error) {
	return command(ctx, "losetup", args...)
}

func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// devices finds attached disks. The driver's own asks udev and the disk for its
// serial number; a loop device has none but the file that it is on.
type devices struct {
	deviceutils.DeviceUtils
	disks disks
}

// GetDiskByIdPaths returns where udev would have put a link to the disk.
//
//nolint:staticcheck // Id: the driver's interface
func (d devices) GetDiskByIdPaths(name, partition string) []string {
	if partition != "" {
		name += "-part" + partition
	}
	return []string{d.disks.link(name)}
}

// VerifyDevicePath returns the path that is the disk.
func (d devices) VerifyDevicePath(paths []string, name string) (string, error) {
	for _, path := range paths {
		dev, err := filepath.EvalSymlinks(path)
		if err != nil {
			continue
		}
		backing, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "loop/backing_file"))
		if err == nil && filepath.Base(strings.TrimSpace(string(backing))) == name {
			return path, nil
		}
	}
	return "", fmt.Errorf("disk %s is not attached", name)
}
