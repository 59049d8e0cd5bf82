package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guestMain is the first process of a guest. It builds the guest's view of the
// files, runs the command, reports and switches the machine off.
func guestMain(scratch string) {
	var r result
	j, status, err := setUp(scratch)
	if err == nil {
		r.Code, err = j.run()
	}
	if err != nil {
		r.Error = err.Error()
	}
	j.settle()
	if status != nil {
		text, _ := json.Marshal(r) // two plain fields
		_, _ = status.Write(append(text, '\n'))
		_ = drain(status)
	} else {
		fmt.Fprintln(os.Stderr, "vm: guest:", r.Error)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// setUp makes the guest ready to run the command.
func setUp(scratch string) (j job, status *os.File, err error) {
	text, err := os.ReadFile(filepath.Join(scratch, jobFile))
	if err != nil {
		return j, nil, err
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return j, nil, err
	}
	if err := j.enterRoot(); err != nil {
		return j, nil, err
	}
	if err := j.mountAll(); err != nil {
		return j, nil, err
	}
	if status, err = openLine(j.Status); err != nil {
		return j, nil, err
	}
	if err := loadModules(j.Modules, j.Load); err != nil {
		return j, status, err
	}
	for _, link := range j.Links {
		if err := os.Symlink(link[0], link[1]); err != nil {
			return j, status, err
		}
	}
	return j, status, errors.Join(unix.Sethostname([]byte("guest")), loopbackUp())
}

// enterRoot makes the host's files, with a memory file system laid over them,
// the root.
func (j *job) enterRoot() error {
	const base, host = "/tmp", "/host" // every host has the first, the initial file system of QEMU the second
	lower := "/"
	if j.Share == "9p" {
		if err := errors.Join(loadModules("/modules", rootModules()), os.MkdirAll(base, 0o755), os.Mkdir(host, 0o755)); err != nil {
			return err
		}
		lower = host
		if err := mount(rootTag, host, "9p", unix.MS_RDONLY, optionsOf9p+",cache=loose"); err != nil {
			return err
		}
	} else if err := loadModules(j.Modules, []string{"overlay"}); err != nil {
		return err
	}
	if err := mount("tmpfs", base, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			return err
		}
	}
	root := filepath.Join(base, "root")
	if err := mount("overlay", root, "overlay", 0, "lowerdir="+lower+",upperdir="+base+"/upper,workdir="+base+"/work"); err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

// mountAll mounts what a Linux machine has, and the shares.
func (j *job) mountAll() error {
	held, err := j.grabKept()
	if err != nil {
		return err
	}
	for _, m := range []struct {
		kind, at, data string
	}{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", "mode=755"},
		{"devpts", "/dev/pts", "ptmxmode=666"}, {"cgroup2", "/sys/fs/cgroup", ""},
		{"tmpfs", "/dev/shm", "mode=1777"}, {"tmpfs", "/run", "mode=755"}, {"tmpfs", "/tmp", "mode=1777"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := mount(m.kind, m.at, m.kind, 0, m.data); err != nil {
			return err
		}
	}
	for _, d := range []string{"/run/cryptsetup", "/run/lock"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	for link, to := range map[string]string{"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"} {
		if err := os.Symlink("/proc/self/fd"+to, "/dev/"+link); err != nil {
			return err
		}
	}
	for _, k := range held {
		if err := k.restore(); err != nil {
			return err
		}
	}
	modules := filepath.Join("/lib/modules", filepath.Base(j.Modules)) // where modprobe and the kernel look
	return errors.Join(makeMountPoint(modules, true), mount(j.Modules, modules, "", unix.MS_BIND, ""), j.mountShares())
}

// kept is a directory or file held open while something is mounted above it.
type kept struct {
	path string
	tree int
	dir  bool
}

// grabKept takes hold of what of j.Keep an empty directory will hide.
func (j *job) grabKept() ([]kept, error) {
	paths := append(slices.Clone(j.Keep), j.Modules)
	slices.Sort(paths) // a directory before what is in it
	var all []kept
	for _, path := range slices.Compact(paths) {
		hidden := func(top string) bool { return path == top || strings.HasPrefix(path, top+"/") }
		if !slices.ContainsFunc(emptyDirs(), hidden) {
			continue
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("open_tree %s: %w", path, err)
		}
		all = append(all, kept{path, fd, info.IsDir()})
	}
	return all, nil
}

func (k kept) restore() error {
	defer unix.Close(k.tree)
	if err := makeMountPoint(k.path, k.dir); err != nil {
		return err
	}
	if err := unix.MoveMount(k.tree, "", unix.AT_FDCWD, k.path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount %s: %w", k.path, err)
	}
	return nil
}

// mountShares mounts the directories and files that are the host's own: each
// directory once, at a side, because QEMU allows no more, and then to where the
// command looks for it.
func (j *job) mountShares() error {
	side := map[string]string{}
	for i, dir := range j.sharedDirs() {
		side[dir] = fmt.Sprintf("/run/vm/%d", i)
		if err := errors.Join(makeMountPoint(side[dir], true), j.share(i, dir, side[dir])); err != nil {
			return err
		}
	}
	dirs := slices.Clone(j.RW)
	slices.Sort(dirs) // a directory before those in it
	for _, dir := range slices.Compact(dirs) {
		if err := errors.Join(makeMountPoint(dir, true), mount(side[dir], dir, "", unix.MS_BIND, "")); err != nil {
			return err
		}
	}
	for _, name := range j.Files {
		source := filepath.Join(side[filepath.Dir(name)], filepath.Base(name))
		if err := errors.Join(makeMountPoint(name, false), mount(source, name, "", unix.MS_BIND, "")); err != nil {
			return err
		}
	}
	return nil
}

// makeMountPoint makes an empty directory or file unless there is one.
func makeMountPoint(path string, dir bool) error {
	if dir {
		return os.MkdirAll(path, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// optionsOf9p are those of every mount of the host's files in QEMU.
const optionsOf9p = "trans=virtio,version=9p2000.L,msize=262144"

// share mounts the i-th shared directory of the host, writable.
func (j *job) share(i int, hostDir, at string) error {
	if j.Share == "9p" {
		return mount(shareTag(i), at, "9p", 0, optionsOf9p+",cache=mmap")
	}
	return mount("none", at, "hostfs", 0, hostDir)
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return &fs.PathError{Op: "mount " + kind, Path: target, Err: err}
	}
	return nil
}

// run runs the command and returns its exit code when it has ended and its
// output has left the machine.
func (j *job) run() (int, error) {
	if err := os.Chdir(j.Dir); err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	stdout, err := openLine(j.Stdout)
	if err != nil {
		return 0, err
	}
	stderr, err := openLine(j.Stderr)
	if err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(j.Args[0], j.Args, &syscall.ProcAttr{
		Dir: j.Dir, Env: append(j.Env, "PWD="+j.Dir),
		Files: []uintptr{null.Fd(), stdout.Fd(), stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("exec %s: %w", j.Args[0], err)
	}
	code, err := reapUntil(pid)
	if err != nil {
		return 0, err
	}
	if err := drain(stdout); err != nil {
		return 0, err
	}
	return code, drain(stderr)
}

// reapUntil collects every child that ends, orphans included, until pid has.
func reapUntil(pid int) (int, error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case got == pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil
		case got == pid && ws.Exited():
			return ws.ExitStatus(), nil
		}
	}
}

// settle brings what the guest has written to the host. A device that hangs
// must not keep the guest alive: it gets ten seconds.
func (j *job) settle() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, path := range slices.Concat(j.RW, j.Files) {
			if f, err := os.Open(path); err == nil {
				_ = unix.Syncfs(int(f.Fd()))
				_ = f.Close()
			}
		}
		unix.Sync()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
	}
}

// openLine opens a serial line that passes bytes on as they are.
func openLine(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	line := os.NewFile(uintptr(fd), path)
	mode, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err == nil {
		mode.Iflag, mode.Oflag, mode.Lflag = 0, 0, 0
		err = unix.IoctlSetTermios(fd, unix.TCSETS, mode)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "make raw", Path: path, Err: err}
	}
	return line, nil
}

// drain waits until everything written to a line has left the machine.
func drain(line *os.File) error {
	const notABreak = 1
	if err := unix.IoctlSetInt(int(line.Fd()), unix.TCSBRK, notABreak); err != nil {
		return fmt.Errorf("drain %s: %w", line.Name(), err)
	}
	return nil
}

// loopbackUp makes 127.0.0.1 reachable.
func loopbackUp() error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(sock, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up the loopback interface: %w", err)
	}
	return nil
}
