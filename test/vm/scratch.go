package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// makeScratch makes the directory that holds what one guest needs, its memory
// included, and returns how to remove it. It lies in memory where there is
// room. It is locked for the life of this process, so that what a killed
// process has left is known as such, and removed, by the next one.
func makeScratch(o *options) (dir string, cleanup func(), err error) {
	parent := os.TempDir()
	var fs unix.Statfs_t
	if unix.Statfs("/dev/shm", &fs) == nil && fs.Bavail*uint64(fs.Bsize) > memBytes(o.mem) && unix.Access("/dev/shm", unix.W_OK) == nil {
		parent = "/dev/shm"
	}
	if strings.ContainsAny(parent, " ,\t\n") {
		return "", nil, fmt.Errorf("TMPDIR=%q: a kernel's command line cannot hold this name", parent)
	}
	sweep(parent)
	dir, err = os.MkdirTemp(parent, scratchPrefix)
	if err != nil {
		return "", nil, err
	}
	lock, err := os.Open(dir)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		_ = os.RemoveAll(dir)
		return "", nil, err
	}
	return dir, func() {
		_ = os.RemoveAll(dir)
		_ = lock.Close()
	}, nil
}

// sweep removes the scratch directories in parent that nobody holds.
func sweep(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, scratchPrefix+"*"))
	for _, dir := range dirs {
		f, err := os.Open(dir)
		if err != nil {
			continue
		}
		// An empty one may have been made just now and not be locked yet.
		entries, _ := f.ReadDir(1)
		if len(entries) > 0 && unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			_ = os.RemoveAll(dir)
		}
		_ = f.Close()
	}
}

// memBytes is a size such as 512M or 2G in bytes; the syntax has been checked.
func memBytes(s string) uint64 {
	n, _ := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if strings.HasSuffix(s, "G") {
		return n << 30
	}
	return n << 20
}
