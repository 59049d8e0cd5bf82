package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// image is a file on a tmpfs and the loop device on it.
type image struct {
	file, device string
}

// newImage makes one that is sparse, or has all its memory already: the first
// write to a place must not cost more with one subject than with another.
func newImage(dir, name string, size int64, sparse bool) (*image, error) {
	i := &image{file: filepath.Join(dir, name)}
	f, err := os.Create(i.file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	if !sparse {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
			return nil, err
		}
	}
	i.device, err = kernel.Attach(f)
	return i, err
}

// blank makes the image a new volume's again, and keeps its memory.
func (i *image) blank() error {
	f, err := os.OpenFile(i.device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	zeros := make([]byte, mib)
	for at := range int64(18) {
		if _, err := f.WriteAt(zeros, at*mib); err != nil {
			return err
		}
	}
	return f.Sync()
}

func (i *image) remove() error {
	return errors.Join(kernel.Detach(i.device), os.Remove(i.file))
}

// volume is one of ours on an image.
type volume struct {
	*cryptmapper.Mapper
	image *image
	v     cryptmapper.Volume
	dek   dek.DEK
}

func newVolume(m *cryptmapper.Mapper, i *image, spec dek.Spec) *volume {
	spec.Cipher = dek.CipherXTS
	key := sha256.Sum256([]byte(i.file))
	return &volume{Mapper: m, image: i,
		v: cryptmapper.Volume{Name: cryptmapper.Prefix + "bench-" + filepath.Base(i.file), Device: i.device},
		dek: dek.DEK{
			ID: "bench.cryptcsi.io/vol", State: dek.Prepared, Key: secret.Take(key[:]), Spec: spec,
			Claim: dek.Claim{Node: "n", UUID: dek.NewUUID()},
		},
	}
}

func (v *volume) path() string { return "/dev/mapper/" + v.v.Name }

// up makes and opens a volume, and finishes it when ready has done its part.
func (v *volume) up(ctx context.Context, ready func(path string) error) error {
	m, err := v.Open(ctx, v.v, v.dek)
	if err != nil {
		return err
	}
	if ready != nil {
		if err := ready(m.Path); err != nil {
			return err
		}
	}
	m, err = v.MarkMade(ctx, v.v, v.dek)
	v.confirm(m)
	return err
}

func (v *volume) confirm(m cryptmapper.Mapping) { v.dek.State, v.dek.Header = dek.Formatted, m.Header }

func (v *volume) close(ctx context.Context) error { return v.Close(ctx, v.v.Name) }

// command runs a program.
func command(stdin []byte, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}
	return nil
}
