package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/images"
)

// diskBytes is how large the node's disk is; the file is sparse.
const diskBytes = 12 << 30

// makeDisk makes the node's disk with all images in containerd's store: here,
// because unpacking takes a guest ten times as long. What others have built
// is on a disk that is kept and copied.
func makeDisk(ctx context.Context, s site, o options) (string, error) {
	others, err := othersImages(s)
	if err != nil {
		return "", err
	}
	if o.withSuite() {
		suite, err := suiteImages(s)
		if err != nil {
			return "", err
		}
		others = append(others, suite...)
	}
	ours, err := ourImages(s)
	if err != nil {
		return "", err
	}
	if o.upgrades() {
		before, err := previousImages(s, ours)
		if err != nil {
			return "", err
		}
		others = append(others, before...)
	}
	base, err := keptDisk(ctx, s, others)
	if err != nil {
		return "", err
	}
	if err := commands(ctx, "cp --sparse=always "+base+" "+s.path(diskFile)); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d images, of which %d are ours", len(others)+len(ours), len(ours)), fillDisk(ctx, s, s.path(diskFile), ours)
}

// keptDisk returns a disk with these images, which is made where there is none.
func keptDisk(ctx context.Context, s site, all []images.Image) (string, error) {
	name, err := nameOf(all)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(s.bin, "../.cache/e2e")
	// A short run has fewer than a long one, and keeps its own.
	kind := fmt.Sprintf("disk-%d-", len(all))
	kept := filepath.Join(dir, kind+name)
	if _, err := os.Stat(kept); err == nil {
		return kept, nil
	}
	old, _ := filepath.Glob(filepath.Join(dir, kind+"*"))
	for _, o := range old {
		_ = os.Remove(o)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Under its name there is a whole one only.
	unfinished := kept + ".unfinished"
	if err := os.WriteFile(unfinished, nil, 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(unfinished, diskBytes); err != nil {
		return "", err
	}
	if err := commands(ctx, "mkfs.ext4 -q -E lazy_itable_init=1,lazy_journal_init=1 "+unfinished); err != nil {
		return "", err
	}
	if err := fillDisk(ctx, s, unfinished, all); err != nil {
		return "", err
	}
	return kept, os.Rename(unfinished, kept)
}

// nameOf tells images from others by their files, without reading these.
func nameOf(all []images.Image) (string, error) {
	about, err := filesOf(all)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Append(nil, diskBytes, about))
	return fmt.Sprintf("%x", sum[:8]), nil
}

// fillDisk imports images into containerd's store on a disk.
func fillDisk(ctx context.Context, s site, disk string, all []images.Image) (err error) {
	at := s.path("disk")
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := commands(ctx, "mount -o loop "+disk+" "+at); err != nil {
		return err
	}
	// The loop device goes with the mount.
	defer func() { err = errors.Join(err, unix.Unmount(at, 0)) }()
	if err := writeImages(s, all); err != nil {
		return err
	}
	return importImages(ctx, s, at+"/containerd")
}

// importImages adds those of imagesFile to containerd's store.
func importImages(ctx context.Context, s site, store string) (err error) {
	run, err := os.MkdirTemp("/run", "e2e-") // the path of a socket must be short
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(run)) }()
	socket := run + "/containerd.sock"
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n", store, run+"/state", socket)
	if err := os.WriteFile(s.path("import.toml"), []byte(config), 0o644); err != nil {
		return err
	}
	containerd, err := start(s.logs(), "containerd-import", "containerd", "--config="+s.path("import.toml"))
	if err != nil {
		return err
	}
	defer containerd.stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		if _, err := command(ctx, "ctr", "--address="+socket, "--connect-timeout=2s", "version"); err == nil {
			break
		}
		if err := errors.Join(containerd.failed(), ctx.Err()); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	_, err = command(ctx, "ctr", "--address="+socket, "-n", "k8s.io", "images", "import", s.path(imagesFile))
	return errors.Join(err, os.Remove(s.path(imagesFile)))
}
