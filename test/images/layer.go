package main

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

// layer is the files of an image, by their paths. A path with a slash at its end
// is a folder; folders above files need not be named.
type layer map[string]file

// file is one of: a copy of a file, a link to a path, or its content.
type file struct {
	from, link string
	content    []byte
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

// pack writes the layer in the order of its names, of root and with one time for
// all: the same files are the same bytes.
func (l layer) pack(at time.Time) (blob, error) {
	all := maps.Clone(l)
	for name := range l {
		for dir := path.Dir(strings.TrimSuffix(name, "/")); dir != "/"; dir = path.Dir(dir) {
			all[dir+"/"] = file{}
		}
	}
	var plain, packed bytes.Buffer
	t := tar.NewWriter(&plain)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := all[name].write(t, name, at); err != nil {
			return blob{}, err
		}
	}
	if err := t.Close(); err != nil {
		return blob{}, err
	}
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(plain.Bytes()); err != nil {
		return blob{}, err
	}
	err := z.Close()
	return blob{compressed: packed.Bytes(), digest: digest(packed.Bytes()), diffID: digest(plain.Bytes())}, err
}

func (f file) write(t *tar.Writer, name string, at time.Time) error {
	h := &tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: 0o644, ModTime: at, Format: tar.FormatPAX}
	switch {
	case strings.HasSuffix(name, "/"):
		h.Typeflag, h.Mode = tar.TypeDir, 0o755
		if name == "/tmp/" {
			h.Mode = 0o1777
		}
		return t.WriteHeader(h)
	case f.link != "":
		h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		return t.WriteHeader(h)
	}
	content := f.content
	if f.from != "" {
		info, err := os.Stat(f.from)
		if err != nil {
			return err
		}
		if content, err = os.ReadFile(f.from); err != nil {
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
