package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
)

// The subjects of the first part: how long a new volume takes until it can be used.
const (
	partReady = "ready" // all of it
	partMkfs  = "mkfs"  // making the filesystem alone

	oursNew   = "hydrating"
	oursAgain = "hydrating, again"
	plainNew  = "dm-crypt without integrity"
	wipedNew  = "wiped in full"
	wipedMade = "wiped before"
	trick     = "no wipe, backup superblocks by dd"
)

// ready measures new volumes of these sizes, as sparse files.
func (b *bench) ready() error {
	err := b.withWiped(func(v *volume, wipe time.Duration) error {
		for range b.rounds {
			for _, size := range b.sizes {
				for _, fs := range []string{"block", "ext4", "xfs"} {
					if err := errors.Join(b.readyOurs(size, fs), b.readyWiped(v, wipe, size, fs), b.readyPlain(size, fs)); err != nil {
						return fmt.Errorf("%s: %w", sized(size, fs), err)
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return b.readyTrick()
}

func sized(size int64, fs string) string { return fmt.Sprintf("%d GiB %s", size/gib, fs) }

// make makes a filesystem as the driver does.
func (b *bench) make(path, fs string, integrity bool) (time.Duration, error) {
	if fs == "block" {
		return 0, nil
	}
	return b.timed(func() error { return driver.Linux{}.Make(b.ctx, path, fs, nil, integrity) })
}

func (b *bench) readyOurs(size int64, fs string) error {
	return b.readyVolume(size, fs, oursNew, dek.Spec{Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone}, oursAgain)
}

func (b *bench) readyPlain(size int64, fs string) error {
	return b.readyVolume(size, fs, plainNew, dek.Spec{}, "")
}

// readyVolume times a new volume. again names the same filesystem made once
// more, where all that it writes has its tags: a stand-in for a volume that was
// wiped, which needs as much memory as it is large.
func (b *bench) readyVolume(size int64, fs, subject string, spec dek.Spec, again string) (err error) {
	i, err := newImage(b.dir, "ready", size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.remove()) }()
	v := newVolume(b.mapper, i, spec)
	var mkfs time.Duration
	took, err := b.timed(func() error {
		return v.up(b.ctx, func(path string) (err error) {
			mkfs, err = b.make(path, fs, again != "")
			return err
		})
	})
	defer func() { err = errors.Join(err, v.close(context.WithoutCancel(b.ctx))) }()
	if err != nil {
		return err
	}
	b.results.add(partReady, sized(size, fs), subject, "s", took.Seconds(), "")
	if fs == "block" {
		return nil
	}
	b.results.add(partMkfs, sized(size, fs), subject, "s", mkfs.Seconds(), "")
	if again == "" {
		return nil
	}
	mkfs, err = b.make(v.path(), fs, true)
	b.results.add(partMkfs, sized(size, fs), again, "s", mkfs.Seconds(), "")
	return err
}

// withWiped does something with a volume of the smallest size that was wiped in
// full, as volumes were made before, and how long that took.
func (b *bench) withWiped(do func(v *volume, wipe time.Duration) error) (err error) {
	i, err := newImage(b.dir, "wiped", b.sizes[0], true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.remove()) }()
	v := newVolume(b.mapper, i, dek.Spec{Integrity: dek.IntegrityHMAC})
	wipe, err := b.timed(func() error { return v.up(b.ctx, nil) })
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close(context.WithoutCancel(b.ctx))) }()
	return do(v, wipe)
}

// readyWiped adds a filesystem to the time of the wipe; for larger sizes it
// extrapolates the wipe alone, which is linear.
func (b *bench) readyWiped(v *volume, wipe time.Duration, size int64, fs string) error {
	if smallest := b.sizes[0]; size != smallest {
		b.results.add(partReady, sized(size, fs), wipedNew, "s", wipe.Seconds()*float64(size)/float64(smallest), "extrapolated")
		return nil
	}
	mkfs, err := b.make(v.path(), fs, true)
	if err != nil {
		return err
	}
	b.results.add(partReady, sized(size, fs), wipedNew, "s", (wipe + mkfs).Seconds(), "")
	if fs != "block" {
		b.results.add(partMkfs, sized(size, fs), wipedMade, "s", mkfs.Seconds(), "")
	}
	return nil
}

// readyTrick is what others do for ext4: nothing is wiped but the places of the
// backup superblocks, which mkfs reads. Only the smallest size: all inode tables
// must be written.
func (b *bench) readyTrick() (err error) {
	size := b.sizes[0]
	i, err := newImage(b.dir, "trick", size, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, i.remove()) }()
	took, err := b.timed(func() error {
		if err := cryptsetupFormat(i.device, passphrase(), "--integrity=hmac-sha256", "--integrity-no-wipe"); err != nil {
			return err
		}
		if err := cryptsetupOpen(i.device, passphrase(), "--integrity-no-journal"); err != nil {
			return err
		}
		return makeByTrick(filepath.Join("/dev/mapper", byHand))
	})
	err = errors.Join(err, command(nil, "cryptsetup", "close", byHand))
	if err == nil {
		b.results.add(partReady, sized(size, "ext4"), trick, "s", took.Seconds(), "")
	}
	return err
}

// makeByTrick writes the places that mkfs.ext4 reads, and then makes it without
// anything lazy.
func makeByTrick(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	size, err := f.Seek(0, 2)
	zeros := make([]byte, 64<<10)
	const group = 32768 * 4096
	for _, n := range []int64{0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343, 625, 729, 2187, 2401, 3125} {
		if n*group < size && err == nil {
			_, err = f.WriteAt(zeros, n*group)
		}
	}
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return command(nil, "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", path)
}
