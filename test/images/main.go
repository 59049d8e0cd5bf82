// Command images assembles the container images csi-plugin and key-service for
// several architectures, without a daemon and without running anything: from
// built programs and Debian's packages, as `test/install.sh images` unpacks them.
// The same programs and packages give the same digests. Each image becomes a
// folder in the OCI layout, which skopeo pushes.
package main

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/test/libraries"
)

// image is what one is made of besides the architecture.
type image struct {
	name      string
	programs  []string // ours, under /usr/bin
	tools     []string // Debian's, with all that they need
	libraries []string // that are loaded by name
	files     layer
	env       []string
	user      string
	labels    map[string]string
}

// images are those that the Dockerfile makes.
func images(labels map[string]string) []image {
	base := func() layer {
		return layer{
			"/tmp/": {}, "/run/": {},
			"/etc/passwd": {content: []byte("root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n")},
			"/etc/group":  {content: []byte("root:x:0:\nnonroot:x:65532:\n")},
		}
	}
	node := base()
	node["/run/cryptsetup/"] = file{}
	return []image{
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

func main() {
	trees := flag.String("packages", ".cache/images", "folder with Debian's packages, one folder for each architecture")
	programs := flag.String("programs", "bin/images", "folder with our programs, one folder for each architecture")
	out := flag.String("out", "bin/images", "folder for the images")
	arches := flag.String("arch", "amd64,arm64", "architectures")
	registry := flag.String("registry", "", "registry that the images will be in, for kustomization.yaml")
	version := flag.String("version", "dev", "label org.opencontainers.image.version")
	commit := flag.String("commit", "unknown", "label org.opencontainers.image.revision")
	at := flag.Int64("time", 0, "when all files are from, in seconds since 1970")
	flag.Parse()
	b := builder{trees: *trees, programs: *programs, out: *out, arches: strings.Split(*arches, ","), at: time.Unix(*at, 0).UTC()}
	labels := map[string]string{
		"org.opencontainers.image.source": "https://github.com/cryptcsi/cryptcsi", "org.opencontainers.image.licenses": "Apache-2.0",
		"org.opencontainers.image.version": *version, "org.opencontainers.image.revision": *commit,
	}
	if err := b.all(images(labels), *registry); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

type builder struct {
	trees, programs, out string
	arches               []string
	at                   time.Time
}

// all makes the images, and a kustomize component that names them by digest.
func (b builder) all(images []image, registry string) error {
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
	return os.WriteFile(filepath.Join(b.out, "kustomization.yaml"), []byte(text.String()), 0o644) //nolint:gosec // for others to read
}

// image makes one, for all architectures, and returns its digest.
func (b builder) image(i image) (string, error) {
	o := layout{filepath.Join(b.out, i.name)}
	if err := os.RemoveAll(o.dir); err != nil {
		return "", err
	}
	var platforms []descriptor
	for _, arch := range b.arches {
		d, err := b.platform(o, i, arch)
		if err != nil {
			return "", fmt.Errorf("%s: %w", arch, err)
		}
		platforms = append(platforms, d)
	}
	index, err := o.putIndex(platforms)
	return index.Digest, err
}

// platform makes one for an architecture: a layer with Debian's files, and one
// with ours.
func (b builder) platform(o layout, i image, arch string) (descriptor, error) {
	t, err := openTree(filepath.Join(b.trees, arch))
	if err != nil {
		return descriptor{}, err
	}
	debian, ours := layer{}, layer{}
	var programs []string
	for _, p := range i.programs {
		from := filepath.Join(b.programs, arch, p)
		programs, ours["/usr/bin/"+p] = append(programs, from), file{from: from}
		err = errors.Join(err, t.addNeeded(debian, from))
	}
	for _, names := range []struct{ all, folders []string }{{i.tools, programFolders()}, {i.libraries, libraries.Folders()}} {
		for _, name := range names.all {
			path, findErr := t.find(name, names.folders)
			if err = errors.Join(err, findErr); findErr == nil {
				err = errors.Join(err, t.add(debian, path))
			}
		}
	}
	if err != nil {
		return descriptor{}, err
	}
	authorities, err := t.authorities()
	if err != nil {
		return descriptor{}, err
	}
	packages := append(t.packages(debian), "ca-certificates")
	if err := t.addPapers(debian); err != nil {
		return descriptor{}, err
	}
	debian["/etc/ssl/certs/ca-certificates.crt"] = file{content: authorities}
	maps.Copy(debian, i.files)
	text, err := sbom(i.name, arch, t, packages, programs, b.at)
	if err != nil {
		return descriptor{}, err
	}
	ours["/usr/share/sbom/"+i.name+".spdx.json"] = file{content: text}
	if err := os.WriteFile(filepath.Join(b.out, i.name+"-"+arch+".spdx.json"), text, 0o644); err != nil { //nolint:gosec // for others to read
		return descriptor{}, err
	}
	var blobs []blob
	for _, l := range []layer{debian, ours} {
		packed, err := l.pack(b.at)
		if err != nil {
			return descriptor{}, err
		}
		blobs = append(blobs, packed)
	}
	return o.putImage(i, arch, blobs, b.at)
}
