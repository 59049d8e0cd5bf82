package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// rootModules are what a guest of QEMU needs to reach the host's files. They
// come with the initial file system, and with what they depend on.
func rootModules() []string {
	return []string{"virtio_pci", "9pnet_virtio", "9p", "overlay"}
}

// qemuCommand prepares a guest with the distribution's kernel and two CPUs,
// emulated in software: slower than user-mode Linux by an order of magnitude,
// for what only another kernel or a second CPU can show. The kernel is taken
// from boot and lib/modules in the directory VM_KERNEL_DIR, by default /.
func qemuCommand(o *options, j *job, scratch string) (*exec.Cmd, error) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil || runtime.GOARCH != "amd64" {
		return nil, errors.New("VM=qemu needs an x86 machine and QEMU: apt-get install qemu-system-x86 linux-image-amd64")
	}
	kernel, tree, err := findKernel(os.Getenv("VM_KERNEL_DIR"))
	if err != nil {
		return nil, err
	}
	j.Modules, j.Load = tree.dir, append([]string{"virtio_blk", "aesni_intel"}, deviceMapperModules()...)
	j.Share, j.Stdout, j.Stderr, j.Status = "9p", "/dev/ttyS1", "/dev/ttyS2", "/dev/ttyS3"
	var lacks []string
	for _, target := range []string{"dm-clone", "dm-dust"} { // Debian builds its kernels without them
		if len(tree.order(target)) == 0 {
			lacks = append(lacks, target)
		}
	}
	j.Env = append(j.Env, "VM_LACKS="+strings.Join(lacks, ","))

	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", o.mem,
		"-kernel", kernel, "-initrd", filepath.Join(scratch, "initrd"),
		"-append", "console=ttyS0 panic=-1 " + guestEnv + "=" + scratch,
	}
	for i, fd := range []int{1, 3, 4, 5} { // the serial lines: console, output, errors, status
		args = append(args, "-chardev", fmt.Sprintf("file,id=c%d,path=/proc/self/fd/%d", i, fd), "-serial", fmt.Sprintf("chardev:c%d", i))
	}
	for i, dir := range j.sharedDirs() {
		args = append(args, shareArgs(shareTag(i), dir, "")...)
	}
	args = append(args, shareArgs(rootTag, "/", ",readonly=on")...)
	for i, disk := range o.disks {
		letter := string(rune('a' + i))
		j.Links = append(j.Links, [2]string{"/dev/vd" + letter, "/dev/ubd" + letter})
		args = append(args, "-drive", fmt.Sprintf("if=virtio,format=raw,file=%s", commas(disk)))
	}
	cmd := exec.Command(qemu, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "TMPDIR=" + scratch}
	return cmd, writeInitrd(filepath.Join(scratch, "initrd"), j, scratch, tree)
}

// shareTag is the 9p tag of the i-th shared directory.
func shareTag(i int) string { return "share" + strconv.Itoa(i) }

// shareArgs are QEMU's arguments for a directory of the host.
func shareArgs(tag, dir, more string) []string {
	return []string{
		"-fsdev", fmt.Sprintf("local,id=%s,path=%s,security_model=none,multidevs=remap%s", tag, commas(dir), more),
		"-device", fmt.Sprintf("virtio-9p-pci,fsdev=%s,mount_tag=%s", tag, tag),
	}
}

// commas writes a path so that QEMU does not take its commas for ends.
func commas(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// findKernel returns the last kernel below dir that can mount the host's files,
// and its modules.
func findKernel(dir string) (string, *moduleTree, error) {
	if dir == "" {
		dir = "/"
	}
	kernels, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil {
		return "", nil, err
	}
	slices.Sort(kernels)
	slices.Reverse(kernels)
	for _, kernel := range kernels {
		version := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
		tree, err := readModuleTree(filepath.Join(dir, "lib/modules", version))
		if err == nil && len(tree.order("9p")) > 0 { // the kernel for clouds has not got it
			return kernel, tree, nil
		}
	}
	return "", nil, fmt.Errorf("no kernel with 9p in %s (of %d there): apt-get install linux-image-amd64, or unpack it, run depmod -b DIR VERSION and set VM_KERNEL_DIR=DIR",
		filepath.Join(dir, "boot"), len(kernels))
}

// writeInitrd writes the initial file system of a guest: this program, its job,
// and the modules for the way to the host's files.
func writeInitrd(path string, j *job, scratch string, tree *moduleTree) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if !isStatic(self) {
		return fmt.Errorf("VM=qemu needs a static %s: build it with CGO_ENABLED=0", self)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	archive := &cpio{w: f}
	archive.copyFile("init", self)
	archive.copyFile("modules/modules.dep", filepath.Join(tree.dir, "modules.dep"))
	done := map[string]bool{}
	for _, name := range rootModules() {
		for _, file := range tree.order(name) {
			if !done[file] {
				archive.copyFile("modules/"+file, filepath.Join(tree.dir, file))
			}
			done[file] = true
		}
	}
	text, err := j.encode()
	if err != nil {
		return err
	}
	archive.file(strings.TrimPrefix(filepath.Join(scratch, jobFile), "/"), text)
	archive.end()
	return errors.Join(archive.err, f.Close())
}

// isStatic reports whether a program runs without a loader.
func isStatic(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// cpio writes an archive in the kernel's format "newc". The first error stays.
type cpio struct {
	w    io.Writer
	err  error
	dirs map[string]bool
}

// copyFile adds a file of the host.
func (c *cpio) copyFile(name, from string) {
	content, err := os.ReadFile(from)
	if err != nil {
		c.err = errors.Join(c.err, err)
		return
	}
	c.file(name, content)
}

// file adds an executable file and the directories on the way to it.
func (c *cpio) file(name string, content []byte) {
	if c.dirs == nil {
		c.dirs = map[string]bool{".": true}
	}
	var missing []string
	for dir := filepath.Dir(name); !c.dirs[dir]; dir = filepath.Dir(dir) {
		missing = append(missing, dir)
		c.dirs[dir] = true
	}
	for _, dir := range slices.Backward(missing) {
		c.entry(dir, 0o040755, nil)
	}
	c.entry(name, 0o100755, content)
}

func (c *cpio) end() { c.entry("TRAILER!!!", 0, nil) }

func (c *cpio) entry(name string, mode int, content []byte) {
	// inode, mode, uid, gid, links, mtime, size, device ×2, rdev ×2, name's length, checksum
	var header strings.Builder
	header.WriteString("070701")
	for _, n := range []int{0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0} {
		header.WriteString(fmt.Sprintf("%08x", n))
	}
	for _, part := range []string{header.String() + name + "\x00", string(content)} {
		if c.err == nil {
			_, c.err = io.WriteString(c.w, part+strings.Repeat("\x00", -len(part)&3))
		}
	}
}
