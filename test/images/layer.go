package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Layer is the files of an image, by their paths. A path with a slash at its end
// is a folder; folders above files need not be named.
type Layer map[string]File

// File is one of: a copy of a file, a link to a path, or its content.
type File struct {
	From, Link string
	Content    []byte
}

// blob is a layer as it is stored.
type blob struct {
	compressed     []byte
	digest, diffID string // with and without compression
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// pack compresses the layer.
func (l Layer) pack(at time.Time) (blob, error) {
	plain, err := l.tar(at)
	if err != nil {
		return blob{}, err
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(plain); err != nil {
		return blob{}, err
	}
	err = z.Close()
	return blob{compressed: packed.Bytes(), digest: digest(packed.Bytes()), diffID: digest(plain)}, err
}

// tar writes the layer in the order of its names, of root and with one time for
// all: the same files are the same bytes.
func (l Layer) tar(at time.Time) ([]byte, error) {
	all := maps.Clone(l)
	for name := range l {
		for dir := path.Dir(strings.TrimSuffix(name, "/")); dir != "/"; dir = path.Dir(dir) {
			all[dir+"/"] = File{}
		}
	}
	var plain bytes.Buffer
	t := tar.NewWriter(&plain)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := all[name].write(t, name, at); err != nil {
			return nil, err
		}
	}
	err := t.Close()
	return plain.Bytes(), err
}

func (f File) write(t *tar.Writer, name string, at time.Time) error {
	h := &tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: 0o644, ModTime: at, Format: tar.FormatPAX}
	switch {
	case strings.HasSuffix(name, "/"):
		h.Typeflag, h.Mode = tar.TypeDir, 0o755
		if name == "/tmp/" {
			h.Mode = 0o1777
		}
		return t.WriteHeader(h)
	case f.Link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.Link, 0o777
		return t.WriteHeader(h)
	}
	content := f.Content
	if f.From != "" {
		info, err := os.Stat(f.From)
		if err != nil {
			return err
		}
		if content, err = os.ReadFile(f.From); err != nil {
			return err
		}
		if info.Mode().Perm()&0o111 != 0 {
			h.Mode = 0o755 // nothing is anybody else's, and nothing setuid
		}
	}
	h.Size = int64(len(content))
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err := t.Write(content)
	return err
}
