package keyservice

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// settled is how old a change must be before an unchanged stamp proves that
// there was no other: far more than the resolution of any file system's clock.
const settled = time.Second

// watched is a set of small files that are read again when they change. Its
// methods are not called concurrently.
type watched struct {
	paths []string
	most  int64 // bytes of each

	seen  []stamp
	young bool // one of them changed so recently that seen proves nothing
	sum   [sha256.Size]byte
}

// stamp tells two states of a file apart, also where it was replaced by
// another, as Kubernetes replaces what it mounts. It is zero for a file that
// cannot be looked at.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// changed says whether the files changed since it was last called, and how
// they are now; the caller clears what is secret. A file that cannot be read is
// a change, too.
func (w *watched) changed() (contents [][]byte, changed bool, err error) {
	stamps := make([]stamp, len(w.paths))
	young := false
	for i, path := range w.paths {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			stamps[i] = stamp{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
			young = young || time.Since(time.Unix(st.Ctim.Unix())) < settled
		}
	}
	if slices.Equal(stamps, w.seen) && !w.young {
		return nil, false, nil
	}
	w.seen, w.young = stamps, young
	contents, err = w.read()
	h := sha256.New()
	for _, c := range contents {
		fmt.Fprintf(h, "%d:", len(c))
		h.Write(c)
	}
	fmt.Fprint(h, err)
	if sum := h.Sum(nil); !bytes.Equal(sum, w.sum[:]) {
		copy(w.sum[:], sum)
		return contents, true, err
	}
	for _, c := range contents {
		clear(c)
	}
	return nil, false, nil
}

func (w *watched) read() ([][]byte, error) {
	var contents [][]byte
	for _, path := range w.paths {
		data, err := readSmall(path, w.most)
		if err != nil {
			return nil, err
		}
		contents = append(contents, data)
	}
	return contents, nil
}

// readSmall reads a regular file of at most that many bytes.
func readSmall(path string, most int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe must not hang us
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > most {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", path, most)
	}
	// Into one piece of memory, so that whoever clears it clears all of it.
	data := make([]byte, info.Size()+1)
	n, err := io.ReadFull(f, data)
	switch {
	case err == nil:
		clear(data)
		return nil, fmt.Errorf("%s grew while it was read", path)
	case !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF):
		clear(data)
		return nil, err
	}
	return data[:n], nil
}
