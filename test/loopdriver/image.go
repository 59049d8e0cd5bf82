package loopdriver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// copyStep is how much is copied between two looks at the context.
const copyStep = 64 << 20

// makeImage makes a sparse file of the given size at path, with the content of
// source unless that is "". Whatever was at path is replaced. On error nothing
// is left.
func makeImage(ctx context.Context, path, source string, bytes int64) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(path)
		}
	}()
	if source != "" {
		if err := copyImage(ctx, f, source); err != nil {
			return fmt.Errorf("copying %s: %w", source, err)
		}
	}
	if err := f.Truncate(bytes); err != nil {
		return err
	}
	return errors.Join(f.Sync(), syncDir(filepath.Dir(path)))
}

// copyImage shares the source's blocks where the filesystem can (then the copy
// is of one instant) and else copies what is not a hole (then it is of one
// instant only if nobody writes meanwhile).
func copyImage(ctx context.Context, dst *os.File, source string) error {
	src, err := os.Open(source)
	if err != nil {
		return err
	}
	defer src.Close()
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return nil
	}
	fi, err := src.Stat()
	if err != nil {
		return err
	}
	for at := int64(0); at < fi.Size(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		start, end, err := nextData(src, at, fi.Size())
		if err != nil {
			return err
		}
		end = min(end, start+copyStep)
		if _, err := src.Seek(start, io.SeekStart); err != nil {
			return err
		}
		if _, err := dst.Seek(start, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.CopyN(dst, src, end-start); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// nextData returns the first run of data at or after offset at, cut at size;
// start and end are size where only a hole follows.
func nextData(f *os.File, at, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case errors.Is(err, unix.EINVAL): // this filesystem knows no holes
		return at, size, nil
	case err != nil:
		return 0, 0, err
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	return min(start, size), min(end, size), err
}

// growImage makes the file at least that large and reports nothing to do as
// success.
func growImage(path string, bytes int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() >= bytes {
		return err
	}
	if err := f.Truncate(bytes); err != nil {
		return err
	}
	return f.Sync()
}
