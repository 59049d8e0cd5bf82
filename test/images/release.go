package images

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/test/libraries"
)

// Release is what one of our images is made of, besides the architecture.
type Release struct {
	name      string
	programs  []string // ours, under /usr/bin
	tools     []string // Debian's, with all that they need
	libraries []string // that are loaded by name
	files     Layer
	env       []string
	user      string
	labels    map[string]string
}

// Releases are those that the Dockerfile makes: csi-plugin, and key-service.
func Releases(labels map[string]string) []Release {
	base := func() Layer {
		return Layer{
			"/tmp/": {}, "/run/": {},
			"/etc/passwd": {Content: []byte("root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n")},
			"/etc/group":  {Content: []byte("root:x:0:\nnonroot:x:65532:\n")},
		}
	}
	node := base()
	node["/run/cryptsetup/"] = File{}
	return []Release{
		{
			name: "csi-plugin", programs: []string{"csi-plugin", "crypt-worker"}, files: node, labels: labels,
			tools: []string{
				"sh", "blkid", "blockdev", "modprobe", "mount", "umount",
				"dumpe2fs", "e2fsck", "fsck", "fsck.ext4", "mkfs.ext4", "resize2fs", "/etc/mke2fs.conf",
				"fsck.xfs", "mkfs.xfs", "xfs_growfs", "xfs_io", "xfs_repair",
				"btrfs", "mkfs.btrfs",
			},
			libraries: []string{"libgcc_s.so.1"}, // for pthread_cancel
			// Creates device nodes itself: udev does not run in a container.
			env: []string{"DM_DISABLE_UDEV=1"},
		},
		{
			name: "key-service", programs: []string{"key-service"}, files: base(), labels: labels,
			libraries: []string{"libgcc_s.so.1", "libstdc++.so.6"}, // PKCS#11 modules want them
			user:      "65532:65532",
		},
	}
}

// Builder makes them from a folder with Debian's packages and one with our
// programs, each with a folder for each architecture. All files are of one time.
type Builder struct {
	Packages, Programs, Out string
	Arches                  []string
	At                      time.Time
}

// All makes the images, and a kustomize component that names them by digest.
func (b Builder) All(images []Release, registry string) error {
	var text strings.Builder
	text.WriteString("apiVersion: kustomize.config.k8s.io/v1alpha1\nkind: Component\nimages:\n")
	for _, i := range images {
		digest, err := b.image(i)
		if err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
		fmt.Printf("%s %s\n", i.name, digest)
		name := "cryptcsi/" + i.name
		if registry != "" {
			name = registry + "/" + i.name
		}
		fmt.Fprintf(&text, "  - name: cryptcsi/%s\n    newName: %s\n    digest: %s\n", i.name, name, digest)
	}
	return os.WriteFile(filepath.Join(b.Out, "kustomization.yaml"), []byte(text.String()), 0o644) //nolint:gosec // for others to read
}

// image makes one, for all architectures, and returns its digest.
func (b Builder) image(r Release) (string, error) {
	o := layout{filepath.Join(b.Out, r.name)}
	if err := os.RemoveAll(o.dir); err != nil {
		return "", err
	}
	var platforms []descriptor
	for _, arch := range b.Arches {
		d, err := b.platform(o, r, arch)
		if err != nil {
			return "", fmt.Errorf("%s: %w", arch, err)
		}
		platforms = append(platforms, d)
	}
	index, err := o.putIndex(platforms)
	return index.Digest, err
}

// platform makes one for an architecture.
func (b Builder) platform(o layout, r Release, arch string) (descriptor, error) {
	i, papers, err := r.Image(filepath.Join(b.Packages, arch), filepath.Join(b.Programs, arch), arch, b.At)
	if err != nil {
		return descriptor{}, err
	}
	if err := os.WriteFile(filepath.Join(b.Out, r.name+"-"+arch+".spdx.json"), papers, 0o644); err != nil { //nolint:gosec // for others to read
		return descriptor{}, err
	}
	var blobs []blob
	for _, l := range i.Layers {
		packed, err := l.pack(b.At)
		if err != nil {
			return descriptor{}, err
		}
		blobs = append(blobs, packed)
	}
	return o.putImage(i, arch, blobs, b.At)
}

// Image is the release for an architecture, from folders with its packages and
// its programs: a layer with Debian's files, and one with ours. With it comes its
// SBOM, which is also in it.
func (r Release) Image(packages, programs, arch string, at time.Time) (Image, []byte, error) {
	t, err := openTree(packages)
	if err != nil {
		return Image{}, nil, err
	}
	debian, ours := Layer{}, Layer{}
	var built []string
	for _, p := range r.programs {
		from := filepath.Join(programs, p)
		built, ours["/usr/bin/"+p] = append(built, from), File{From: from}
		err = errors.Join(err, t.addNeeded(debian, from))
	}
	for _, names := range []struct{ all, folders []string }{{r.tools, programFolders()}, {r.libraries, libraries.Folders()}} {
		for _, name := range names.all {
			path, findErr := t.find(name, names.folders)
			if err = errors.Join(err, findErr); findErr == nil {
				err = errors.Join(err, t.add(debian, path))
			}
		}
	}
	if err != nil {
		return Image{}, nil, err
	}
	authorities, err := t.authorities()
	if err != nil {
		return Image{}, nil, err
	}
	owners := append(t.packages(debian), "ca-certificates")
	if err := t.addPapers(debian); err != nil {
		return Image{}, nil, err
	}
	debian["/etc/ssl/certs/ca-certificates.crt"] = File{Content: authorities}
	maps.Copy(debian, r.files)
	papers, err := sbom(r.name, arch, t, owners, built, at)
	ours["/usr/share/sbom/"+r.name+".spdx.json"] = File{Content: papers}
	return Image{
		Name: "cryptcsi/" + r.name, Layers: []Layer{debian, ours},
		Entrypoint: []string{"/usr/bin/" + r.name}, User: r.user, Env: r.env, Labels: r.labels,
	}, papers, err
}
