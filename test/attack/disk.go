package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// copyDisk copies a backing file with its holes.
func copyDisk(to, from string) error {
	_ = os.Remove(to)
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	size, err := in.Seek(0, io.SeekEnd)
	if err == nil {
		err = out.Truncate(size)
	}
	if err == nil {
		err = eachExtent(in, func(b []byte, offset int64) error {
			_, err := out.WriteAt(b, offset)
			return err
		})
	}
	return errors.Join(err, out.Close())
}

// eachExtent reads what is not a hole in a file, in pieces.
func eachExtent(file *os.File, do func(b []byte, offset int64) error) error {
	buf := make([]byte, 256<<10)
	for at := int64(0); ; {
		start, err := unix.Seek(int(file.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(file.Fd()), start, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = start; at < end; {
			n, err := file.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
			if n == 0 && err != nil {
				return err
			}
			if err := do(buf[:n], at); err != nil {
				return err
			}
			at += int64(n)
		}
	}
}

// digest tells whether a backing file is what it was. Pages of zeros count as
// holes.
func digest(path string) (sum [sha256.Size]byte, err error) {
	file, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer func() { _ = file.Close() }()
	h := sha256.New()
	zeros := make([]byte, 4096)
	err = eachExtent(file, func(b []byte, offset int64) error {
		for at := 0; at < len(b); at += 4096 {
			if page := b[at:min(at+4096, len(b))]; !bytes.Equal(page, zeros[:len(page)]) {
				fmt.Fprintf(h, "%d ", offset+int64(at))
				h.Write(page)
			}
		}
		return nil
	})
	return [sha256.Size]byte(h.Sum(nil)), err
}

// holds tells whether a backing file holds the text anywhere.
func holds(path, text string) (bool, error) {
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	found, tail, next := false, []byte(nil), int64(0)
	err = eachExtent(file, func(b []byte, offset int64) error {
		if offset != next {
			tail = nil
		}
		both := append(tail, b...)
		found = found || bytes.Contains(both, []byte(text))
		tail, next = bytes.Clone(both[max(0, len(both)-len(text)):]), offset+int64(len(b))
		return nil
	})
	return found, err
}

// loop attaches a file to a free loop device; the returned function detaches it.
func loop(path string, readOnly bool) (dev string, detach func(), err error) {
	mode, flags := os.O_RDWR, uint32(0)
	if readOnly {
		mode, flags = os.O_RDONLY, unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = file.Close() }()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = control.Close() }()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", nil, err
		}
		dev = fmt.Sprintf("/dev/loop%d", n)
		if err := node(dev, 7, n); err != nil {
			return "", nil, err
		}
		device, err := os.OpenFile(dev, mode, 0)
		if err != nil {
			return "", nil, err
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd())}
		config.Info.Flags = flags
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		_ = device.Close()
		if errors.Is(err, unix.EBUSY) {
			continue // somebody was faster
		}
		if err != nil {
			return "", nil, err
		}
		return dev, func() { detachLoop(dev) }, nil
	}
}

func detachLoop(dev string) {
	device, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		return
	}
	_ = unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0)
	_ = device.Close()
}

// node makes a device node where no devtmpfs does.
func node(path string, major, minor int) error {
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(major), uint32(minor))))
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// write puts bytes into a file or device and makes them durable.
func write(path string, offset int64, b []byte) error {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteAt(b, offset)
	return errors.Join(err, file.Sync(), file.Close())
}

// read returns bytes of a file or device as they are below its page cache.
func read(path string, offset int64, n int) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	_ = unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0)
	b := make([]byte, n)
	_, err = file.ReadAt(b, offset)
	return b, err
}
