package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// diskBytes is how large the node's disk is; the file is sparse.
const diskBytes = 12 << 30

// makeDisk makes the node's disk with all images in containerd's store: here,
// because unpacking takes a guest ten times as long.
func makeDisk(ctx context.Context, s site) (err error) {
	f, err := os.Create(s.path(diskFile))
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskBytes), f.Close()); err != nil {
		return err
	}
	at := s.path("disk")
	if err := os.Mkdir(at, 0o755); err != nil {
		return err
	}
	if err := commands(ctx,
		"mkfs.ext4 -q -E lazy_itable_init=1,lazy_journal_init=1 "+f.Name(),
		"mount -o loop "+f.Name()+" "+at,
	); err != nil {
		return err
	}
	// The loop device goes with the mount.
	defer func() { err = errors.Join(err, unix.Unmount(at, 0)) }()
	return importImages(ctx, s, at+"/containerd")
}

// importImages fills containerd's store, which begins empty, from imagesFile.
func importImages(ctx context.Context, s site, store string) error {
	const socket = "/run/e2e/containerd.sock"
	config := fmt.Sprintf("version = 2\nroot = %q\nstate = \"/run/e2e/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = %q\n", store, socket)
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
