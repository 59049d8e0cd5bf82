// Package images assembles container images, without a daemon and without running
// anything: those that we release, from built programs and Debian's packages, as
// `test/install.sh images` unpacks them, in the OCI layout, which skopeo pushes;
// and others that tests need, as an archive. The same files give the same digests.
package images

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Image is a container image: layers from below, and how it starts.
type Image struct {
	Name       string
	Layers     []Layer
	Entrypoint []string
	User       string
	Env        []string
	Labels     map[string]string
}

// config says how a container starts, see the OCI image specification.
func (i Image) config(arch string, diffs []string, at time.Time) map[string]any {
	return map[string]any{
		"created": at, "architecture": arch, "os": "linux",
		"config": map[string]any{
			"Entrypoint": i.Entrypoint, "User": i.User, "Labels": i.Labels,
			"Env": append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, i.Env...),
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	}
}

// Archive writes images for one architecture as `docker save` does, for `ctr
// images import`, not compressed. A layer that two images share is there once.
func Archive(w io.Writer, arch string, images []Image) error {
	a := archive{tar: tar.NewWriter(w), written: map[string]bool{}}
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var manifest []entry
	for _, i := range images {
		e := entry{RepoTags: []string{i.Name}}
		var diffs []string
		for _, l := range i.Layers {
			content, err := l.tar(time.Unix(0, 0))
			if err != nil {
				return fmt.Errorf("%s: %w", i.Name, err)
			}
			name, err := a.put(content, ".tar")
			if err != nil {
				return err
			}
			e.Layers, diffs = append(e.Layers, name), append(diffs, digest(content))
		}
		config, err := json.Marshal(i.config(arch, diffs, time.Unix(0, 0)))
		if err != nil {
			return err
		}
		if e.Config, err = a.put(config, ".json"); err != nil {
			return err
		}
		manifest = append(manifest, e)
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		return err
	}
	return errors.Join(a.write("manifest.json", text), a.tar.Close())
}

// archive is a tar file of which each name is written once.
type archive struct {
	tar     *tar.Writer
	written map[string]bool
}

// put writes a blob under its digest.
func (a archive) put(content []byte, ending string) (string, error) {
	name := strings.TrimPrefix(digest(content), "sha256:") + ending
	return name, a.write(name, content)
}

func (a archive) write(name string, content []byte) error {
	if a.written[name] {
		return nil
	}
	a.written[name] = true
	if err := a.tar.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
		return err
	}
	_, err := a.tar.Write(content)
	return err
}
