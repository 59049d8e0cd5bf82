package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/test/libraries"
)

// layer is a set of files: where each is in the image, and where it is taken
// from. A name that ends in a slash is a directory; a source that begins with
// "->" is a symbolic link to what follows.
type layer map[string]string

// image is a container image: a name, layers from below, and how it starts.
type image struct {
	name       string
	layers     []layer
	entrypoint []string
	user       string
	env        []string
}

// archive writes images as `docker save` does, for `ctr images import`. The
// same files give the same bytes. A layer that two images share is there once.
func archive(w io.Writer, images []image) error {
	t := tar.NewWriter(w)
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var manifest []entry
	written := map[string]bool{}
	put := func(name string, content []byte) error {
		if written[name] {
			return nil
		}
		written[name] = true
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			return err
		}
		_, err := t.Write(content)
		return err
	}
	for _, i := range images {
		e := entry{RepoTags: []string{i.name}}
		var diffs []string
		for _, l := range i.layers {
			content, err := l.tar()
			if err != nil {
				return fmt.Errorf("%s: %w", i.name, err)
			}
			digest := sha256.Sum256(content)
			name := hex.EncodeToString(digest[:]) + ".tar"
			e.Layers, diffs = append(e.Layers, name), append(diffs, "sha256:"+strings.TrimSuffix(name, ".tar"))
			if err := put(name, content); err != nil {
				return err
			}
		}
		config, err := i.config(diffs)
		if err != nil {
			return err
		}
		digest := sha256.Sum256(config)
		e.Config = hex.EncodeToString(digest[:]) + ".json"
		if err := put(e.Config, config); err != nil {
			return err
		}
		manifest = append(manifest, e)
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	return errors.Join(put("manifest.json", text), t.Close())
}

func (i image) config(diffs []string) ([]byte, error) {
	return json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": i.entrypoint, "User": i.user, "Env": append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, i.env...)},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	})
}

// tar is the layer's content, in the order of its names, without times.
func (l layer) tar() ([]byte, error) {
	var buf bytes.Buffer
	t := tar.NewWriter(&buf)
	var names []string
	dirs := map[string]bool{}
	for name := range l {
		names = append(names, name)
		for dir := filepath.Dir(strings.TrimSuffix(name, "/")); dir != "/"; dir = filepath.Dir(dir) {
			dirs[dir+"/"] = true
		}
	}
	for dir := range dirs {
		if _, ok := l[dir]; !ok {
			names = append(names, dir)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if err := addFile(t, name, l[name]); err != nil {
			return nil, err
		}
	}
	err := t.Close()
	return buf.Bytes(), err
}

func addFile(t *tar.Writer, name, source string) error {
	h := &tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: 0o755}
	if link, ok := strings.CutPrefix(source, "->"); ok {
		h.Typeflag, h.Linkname = tar.TypeSymlink, link
		return t.WriteHeader(h)
	}
	if strings.HasSuffix(name, "/") {
		h.Typeflag = tar.TypeDir
		if name == "/tmp/" {
			h.Mode = 0o1777
		}
		return t.WriteHeader(h)
	}
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h.Size, h.Mode = info.Size(), int64(info.Mode().Perm())
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(t, f)
	return err
}

// addPrograms adds programs of this machine, by name or by path, where they are
// found, with the libraries that they need.
func (l layer) addPrograms(programs ...string) error {
	for _, p := range programs {
		path, err := exec.LookPath(p)
		if err != nil {
			return err
		}
		if err := l.add(path, path); err != nil {
			return err
		}
	}
	return nil
}

// add adds a program or library, and the libraries that it needs.
func (l layer) add(name, source string) error {
	if _, ok := l[name]; ok {
		return nil
	}
	if target, err := os.Readlink(source); err == nil {
		// A link within its folder stays one, as mkfs.ext4 is; others are
		// followed.
		real, err := filepath.EvalSymlinks(source)
		if err != nil {
			return err
		}
		if target == filepath.Base(real) {
			l[name] = "->" + target
			return l.add(filepath.Join(filepath.Dir(name), target), real)
		}
		source = real
	}
	l[name] = source
	needed, err := libraries.Needed(source)
	if err != nil {
		return err
	}
	for _, lib := range needed {
		path, err := findLibrary(lib)
		if err != nil {
			return fmt.Errorf("%s: %w", source, err)
		}
		if err := l.add(path, path); err != nil {
			return err
		}
	}
	return nil
}

func findLibrary(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	for _, dir := range libraries.Folders() {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return path, err
		}
	}
	return "", fmt.Errorf("library %s is nowhere", name)
}
