package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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

// makeImages writes all images that the cluster uses into one file. Our own
// have what the Dockerfile puts into them, taken from this machine.
func makeImages(s site) (string, error) {
	base, node, busybox := layer{"/tmp/": "", "/etc/": ""}, layer{"/run/cryptsetup/": ""}, layer{"/tmp/": "", "/etc/": ""}
	keyService, worker := layer{}, layer{}
	tools := filepath.Join(s.bin, "../.tools/bin")
	shell, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		return "", err
	}
	err = errors.Join(
		base.add(shell, shell), node.addPrograms(nodePrograms()...), addBusybox(busybox),
		keyService.add("/usr/bin/key-service", filepath.Join(s.bin, "key-service")),
		worker.add("/usr/bin/crypt-worker", filepath.Join(s.bin, "crypt-worker")),
	)
	if err != nil {
		return "", err
	}
	base["/bin/sh"] = "->" + shell
	node["/etc/mke2fs.conf"] = "/etc/mke2fs.conf"
	worker["/usr/bin/csi-plugin"] = filepath.Join(s.bin, "csi-plugin")
	images := []image{
		{name: pauseImage, layers: []layer{busybox}, entrypoint: []string{"/bin/sleep", "2147483647"}},
		{name: "docker.io/library/busybox:1.36", layers: []layer{busybox}, entrypoint: []string{"/bin/sh"}},
		{name: "docker.io/cryptcsi/csi-plugin:dev", layers: []layer{base, node, worker}, entrypoint: []string{"/usr/bin/csi-plugin"}, env: []string{"DM_DISABLE_UDEV=1"}},
		{name: "docker.io/cryptcsi/key-service:dev", layers: []layer{base, keyService}, entrypoint: []string{"/usr/bin/key-service"}, user: "65532:65532"},
		{name: "docker.io/cryptcsi/loopdriver:dev", layers: []layer{base, node, {"/usr/bin/loopdriver": filepath.Join(s.bin, "loopdriver")}}, entrypoint: []string{"/usr/bin/loopdriver"}},
	}
	for program, name := range sidecars() {
		images = append(images, image{name: name, layers: []layer{{"/" + program: filepath.Join(tools, program)}}, entrypoint: []string{"/" + program}})
	}
	f, err := os.Create(s.path(imagesFile))
	if err != nil {
		return "", err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	err = errors.Join(archive(w, images), w.Flush())
	info, statErr := f.Stat()
	if err := errors.Join(err, statErr, f.Close()); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d images, %d MB", len(images), info.Size()/1e6), nil
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
