package images

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// descriptor points to a blob, see the OCI image specification.
type descriptor struct {
	MediaType string    `json:"mediaType"`
	Digest    string    `json:"digest"`
	Size      int       `json:"size"`
	Platform  *platform `json:"platform,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// layout is a folder in the OCI image layout, for one image of several
// platforms.
type layout struct{ dir string }

func (o layout) put(mediaType string, content []byte) (descriptor, error) {
	d := descriptor{MediaType: mediaType, Digest: digest(content), Size: len(content)}
	name := filepath.Join(o.dir, "blobs", strings.Replace(d.Digest, ":", "/", 1))
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // for others to read
		return d, err
	}
	return d, os.WriteFile(name, content, 0o644) //nolint:gosec // for others to read
}

func (o layout) putJSON(mediaType string, v any) (descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return o.put(mediaType, text)
}

// putImage writes one platform's image.
func (o layout) putImage(i Image, arch string, layers []blob, at time.Time) (descriptor, error) {
	var parts []descriptor
	var diffs []string
	for _, l := range layers {
		d, err := o.put(typeLayer, l.compressed)
		if err != nil {
			return d, err
		}
		parts, diffs = append(parts, d), append(diffs, l.diffID)
	}
	config, err := o.putJSON(typeConfig, i.config(arch, diffs, at))
	if err != nil {
		return config, err
	}
	d, err := o.putJSON(typeManifest, map[string]any{"schemaVersion": 2, "mediaType": typeManifest, "config": config, "layers": parts})
	d.Platform = &platform{arch, "linux"}
	return d, err
}

// putIndex writes what names the image, and returns it.
func (o layout) putIndex(platforms []descriptor) (descriptor, error) {
	index, err := o.putJSON(typeIndex, map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": platforms})
	if err != nil {
		return index, err
	}
	text, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []descriptor{index}})
	if err != nil {
		return index, err
	}
	if err := os.WriteFile(filepath.Join(o.dir, "index.json"), text, 0o644); err != nil { //nolint:gosec // for others to read
		return index, err
	}
	return index, os.WriteFile(filepath.Join(o.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644) //nolint:gosec // for others to read
}
