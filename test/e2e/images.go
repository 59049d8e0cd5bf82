package main

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/cryptcsi/cryptcsi/test/images"
)

// sidecars are upstream's programs by their images' names.
func sidecars() map[string]string {
	const registry = "registry.k8s.io/sig-storage/"
	return map[string]string{
		"csi-provisioner":     registry + "csi-provisioner:v6.3.0",
		"csi-attacher":        registry + "csi-attacher:v4.12.0",
		"csi-resizer":         registry + "csi-resizer:v2.2.0",
		"csi-snapshotter":     registry + "csi-snapshotter:v8.6.0",
		"snapshot-controller": registry + "snapshot-controller:v8.6.0",
	}
}

// othersImages are those that are the same in each run: upstream's, and what
// pods of users have.
func othersImages(s site) ([]images.Image, error) {
	busybox := images.Layer{"/tmp/": {}, "/etc/": {}}
	if err := machine(busybox).busybox(); err != nil {
		return nil, err
	}
	all := []images.Image{
		simple(pauseImage, busybox, "/bin/sleep", "2147483647"),
		simple("docker.io/library/busybox:1.36", busybox, "/bin/sh"),
	}
	tools := filepath.Join(s.bin, "../.tools/bin")
	for program, name := range sidecars() {
		all = append(all, simple(name, images.Layer{"/" + program: {From: filepath.Join(tools, program)}}, "/"+program))
	}
	slices.SortFunc(all, func(a, b images.Image) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// suiteImages are what the pods of Kubernetes' own tests run, under upstream's
// names, with what these tests call in them.
func suiteImages(s site) ([]images.Image, error) {
	tools := images.Layer{"/tmp/": {}, "/etc/": {}, "/mnt/": {}}
	if err := errors.Join(machine(tools).programs("bash", "nsenter", "losetup", "blkid", "mount", "umount"), machine(tools).busybox()); err != nil {
		return nil, err
	}
	gnu := images.Layer{} // busybox's dd has no oflag=nocache, and its shell takes no other
	if err := errors.Join(machine(gnu).programs("dd"), machine(gnu).add("/bin/sh", "/usr/bin/dash")); err != nil {
		return nil, err
	}
	agnhost := images.Layer{"/agnhost": {From: filepath.Join(s.bin, "../.tools/bin/agnhost")}}
	const registry = "registry.k8s.io/e2e-test-images/"
	return []images.Image{
		{Name: registry + "agnhost:2.63.0", Layers: []images.Layer{tools, agnhost}, Entrypoint: []string{"/agnhost"}},
		simple(registry+"busybox:1.37.0-1", tools, "/bin/sh"),
		simple(registry+"nginx:1.15-4", tools, "/bin/sh"), // only its shell is used
		{Name: registry + "glibc-dns-testing:2.0.0", Layers: []images.Layer{tools, gnu}, Entrypoint: []string{"/bin/sh"}},
	}, nil
}

// ourImages are those that `make images` makes, from the same packages of Debian,
// and the test's own.
func ourImages(s site) ([]images.Image, error) {
	var all []images.Image
	for _, r := range images.Releases(nil) {
		i, _, err := r.Image(s.source(filepath.Join(".cache/images", runtime.GOARCH)), s.bin, runtime.GOARCH, time.Unix(0, 0))
		if err != nil {
			return nil, err
		}
		i.Name = "docker.io/" + i.Name + ":dev"
		all = append(all, i)
	}
	// loopdriver calls what csi-plugin calls, and losetup.
	loop := images.Layer{"/usr/bin/loopdriver": {From: filepath.Join(s.bin, "loopdriver")}}
	err := machine(loop).programs("losetup")
	return append(all,
		images.Image{Name: "docker.io/cryptcsi/loopdriver:dev", Layers: []images.Layer{all[0].Layers[0], loop}, Entrypoint: []string{"/usr/bin/loopdriver"}},
		simple("docker.io/cryptcsi/e2e:dev", images.Layer{"/usr/bin/e2e": {From: filepath.Join(s.bin, "e2e")}}, "/usr/bin/e2e")), err
}

// previousImages are ours with the programs of the build before this one.
func previousImages(s site, ours []images.Image) ([]images.Image, error) {
	var before []images.Image
	for _, i := range ours {
		i.Name = strings.TrimSuffix(i.Name, "dev") + previousTag
		// Debian's files are the same.
		top := maps.Clone(i.Layers[len(i.Layers)-1])
		replaced := false
		for name := range top {
			program := filepath.Join(s.previous(), "bin", filepath.Base(name))
			if _, err := os.Stat(program); err == nil {
				top[name], replaced = images.File{From: program}, true
			}
		}
		if replaced {
			i.Layers = append(slices.Clone(i.Layers[:len(i.Layers)-1]), top)
			before = append(before, i)
		}
	}
	if len(before) != 2 {
		return nil, errors.New("the build before this one is missing: run test/install.sh e2e-previous")
	}
	return before, nil
}
