package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/test/images"
	"github.com/cryptcsi/cryptcsi/test/libraries"
)

// machine is a layer with files of this machine.
type machine images.Layer

// programs adds programs of this machine, by name or by path, where they are
// found, with the libraries that they need.
func (l machine) programs(names ...string) error {
	for _, p := range names {
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
func (l machine) add(name, source string) error {
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
			l[name] = images.File{Link: target}
			return l.add(filepath.Join(filepath.Dir(name), target), real)
		}
		source = real
	}
	l[name] = images.File{From: source}
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

// busybox adds it under all its names.
func (l machine) busybox() error {
	l["/bin/busybox"] = images.File{From: "/bin/busybox"}
	names, err := exec.Command("/bin/busybox", "--list").Output()
	for name := range strings.FieldsSeq(string(names)) {
		if name != "busybox" {
			l["/bin/"+name] = images.File{Link: "busybox"}
		}
	}
	return err
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

// simple is an image with one layer, which starts its first argument.
func simple(name string, l images.Layer, entrypoint ...string) images.Image {
	return images.Image{Name: name, Layers: []images.Layer{l}, Entrypoint: entrypoint}
}

// filesOf says of images and all their files what they are, without reading these.
func filesOf(all []images.Image) ([]string, error) {
	var about []string
	for _, i := range all {
		about = append(about, fmt.Sprint(i.Name, i.Entrypoint, i.User, i.Env))
		for _, l := range i.Layers {
			for name, f := range l {
				about = append(about, fmt.Sprintf("%s %s %s %s %x", i.Name, name, f.From, f.Link, f.Content))
				if f.From == "" {
					continue
				}
				info, err := os.Stat(f.From)
				if err != nil {
					return nil, err
				}
				about = append(about, fmt.Sprint(name, info.Size(), info.ModTime().UnixNano()))
			}
		}
	}
	slices.Sort(about)
	return about, nil
}

// writeImages writes images into one file.
func writeImages(s site, all []images.Image) error {
	f, err := os.Create(s.path(imagesFile))
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	return errors.Join(images.Archive(w, runtime.GOARCH, all), w.Flush(), f.Close())
}
