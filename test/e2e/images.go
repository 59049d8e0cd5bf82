package main

import (
	"bufio"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// nodePrograms are what csi-plugin and loopdriver call at run time, see
// TestImageIsComplete.
func nodePrograms() []string {
	return []string{
		"blkid", "blockdev", "modprobe", "mount", "umount", "losetup",
		"dumpe2fs", "e2fsck", "fsck", "fsck.ext4", "mkfs.ext4", "resize2fs",
		"fsck.xfs", "mkfs.xfs", "xfs_growfs", "xfs_io", "xfs_repair",
		"btrfs", "mkfs.btrfs",
	}
}

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
func othersImages(s site) ([]image, error) {
	busybox := layer{"/tmp/": "", "/etc/": ""}
	if err := addBusybox(busybox); err != nil {
		return nil, err
	}
	images := []image{
		{name: pauseImage, layers: []layer{busybox}, entrypoint: []string{"/bin/sleep", "2147483647"}},
		{name: "docker.io/library/busybox:1.36", layers: []layer{busybox}, entrypoint: []string{"/bin/sh"}},
	}
	tools := filepath.Join(s.bin, "../.tools/bin")
	for program, name := range sidecars() {
		images = append(images, image{name: name, layers: []layer{{"/" + program: filepath.Join(tools, program)}}, entrypoint: []string{"/" + program}})
	}
	slices.SortFunc(images, func(a, b image) int { return strings.Compare(a.name, b.name) })
	return images, nil
}

// suiteImages are what the pods of Kubernetes' own tests run, under upstream's
// names, with what these tests call in them.
func suiteImages(s site) ([]image, error) {
	tools := layer{"/tmp/": "", "/etc/": "", "/mnt/": ""}
	if err := errors.Join(tools.addPrograms("bash", "nsenter", "losetup", "blkid", "mount", "umount"), addBusybox(tools)); err != nil {
		return nil, err
	}
	agnhost := layer{"/agnhost": filepath.Join(s.bin, "../.tools/bin/agnhost")}
	const registry = "registry.k8s.io/e2e-test-images/"
	return []image{
		{name: registry + "agnhost:2.63.0", layers: []layer{tools, agnhost}, entrypoint: []string{"/agnhost"}},
		{name: registry + "busybox:1.37.0-1", layers: []layer{tools}, entrypoint: []string{"/bin/sh"}},
		{name: registry + "nginx:1.15-4", layers: []layer{tools}, entrypoint: []string{"/bin/sh"}}, // only its shell is used
	}, nil
}

// ourImages have what the Dockerfile puts into them, taken from this machine.
func ourImages(s site) ([]image, error) {
	base, node := layer{"/tmp/": "", "/etc/": ""}, layer{"/run/cryptsetup/": ""}
	keyService, worker := layer{}, layer{}
	shell, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		base.add(shell, shell), node.addPrograms(nodePrograms()...),
		keyService.add("/usr/bin/key-service", filepath.Join(s.bin, "key-service")),
		worker.add("/usr/bin/crypt-worker", filepath.Join(s.bin, "crypt-worker")),
	)
	if err != nil {
		return nil, err
	}
	base["/bin/sh"] = "->" + shell
	node["/etc/mke2fs.conf"] = "/etc/mke2fs.conf"
	worker["/usr/bin/csi-plugin"] = filepath.Join(s.bin, "csi-plugin")
	return []image{
		{name: "docker.io/cryptcsi/csi-plugin:dev", layers: []layer{base, node, worker}, entrypoint: []string{"/usr/bin/csi-plugin"}, env: []string{"DM_DISABLE_UDEV=1"}},
		{name: "docker.io/cryptcsi/key-service:dev", layers: []layer{base, keyService}, entrypoint: []string{"/usr/bin/key-service"}, user: "65532:65532"},
		{name: "docker.io/cryptcsi/loopdriver:dev", layers: []layer{base, node, {"/usr/bin/loopdriver": filepath.Join(s.bin, "loopdriver")}}, entrypoint: []string{"/usr/bin/loopdriver"}},
		{name: "docker.io/cryptcsi/e2e:dev", layers: []layer{{"/usr/bin/e2e": filepath.Join(s.bin, "e2e")}}, entrypoint: []string{"/usr/bin/e2e"}},
	}, nil
}

// previousImages are ours with the programs of the build before this one.
func previousImages(s site, ours []image) ([]image, error) {
	var before []image
	for _, i := range ours {
		i.name = strings.TrimSuffix(i.name, "dev") + previousTag
		// Libraries are the machine's, and the same.
		top := maps.Clone(i.layers[len(i.layers)-1])
		replaced := false
		for name := range top {
			program := filepath.Join(s.previous(), "bin", filepath.Base(name))
			if _, err := os.Stat(program); err == nil {
				top[name], replaced = program, true
			}
		}
		if replaced {
			i.layers = append(slices.Clone(i.layers[:len(i.layers)-1]), top)
			before = append(before, i)
		}
	}
	if len(before) != 2 {
		return nil, errors.New("the build before this one is missing: run test/install.sh e2e-previous")
	}
	return before, nil
}

// writeImages writes images into one file.
func writeImages(s site, images []image) error {
	f, err := os.Create(s.path(imagesFile))
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	return errors.Join(archive(w, images), w.Flush(), f.Close())
}

// addBusybox adds it under all its names.
func addBusybox(l layer) error {
	l["/bin/busybox"] = "/bin/busybox"
	names, err := exec.Command("/bin/busybox", "--list").Output()
	for name := range strings.FieldsSeq(string(names)) {
		if name != "busybox" {
			l["/bin/"+name] = "->busybox"
		}
	}
	return err
}
