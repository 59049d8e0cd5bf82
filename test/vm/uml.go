package main

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// umlModules is where Debian's package user-mode-linux keeps the modules, by
// the kernel's version.
const umlModules = "/usr/lib/uml/modules"

// umlCommand prepares a user-mode Linux whose root is the host's, read-only.
func umlCommand(o *options, j *job, scratch string) (*exec.Cmd, error) {
	kernel, err := exec.LookPath("linux.uml")
	if err != nil {
		return nil, errors.New("no kernel with device-mapper here, and no user-mode Linux to boot one: apt-get install user-mode-linux")
	}
	trees, err := filepath.Glob(filepath.Join(umlModules, "*", "modules.dep"))
	if err != nil || len(trees) != 1 {
		return nil, fmt.Errorf("%s: want one tree of modules, found %d: reinstall the package user-mode-linux", umlModules, len(trees))
	}
	j.Modules = filepath.Dir(trees[0])
	j.Load = deviceMapperModules()
	j.Share, j.Stdout, j.Stderr, j.Status = "hostfs", "/dev/ttyS0", "/dev/ttyS1", "/dev/ttyS2"

	// Links, because a path with a space or a comma would end the argument.
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.Symlink(self, filepath.Join(scratch, "init")); err != nil {
		return nil, err
	}
	args := []string{
		"mem=" + o.mem, "rootfstype=hostfs", "rootflags=/", "ro", "init=" + filepath.Join(scratch, "init"),
		"con=null", "con0=null,fd:2", "ssl=null", "ssl0=null,fd:3", "ssl1=null,fd:4", "ssl2=null,fd:5",
		"devtmpfs.mount=0", // it would hide a scratch directory in /dev/shm
		"umid=vm", "uml_dir=" + scratch + "/",
		// Measuring which RAID 6 code is fastest takes most of a second, and no test uses RAID 6.
		"initcall_blacklist=raid6_select_algo",
		guestEnv + "=" + scratch,
	}
	for i, disk := range o.disks {
		link := filepath.Join(scratch, "disk"+strconv.Itoa(i))
		if err := os.Symlink(disk, link); err != nil {
			return nil, err
		}
		args = append(args, fmt.Sprintf("ubd%d=%s", i, link))
	}
	if o.tap != "" {
		args = append(args, "eth0=tuntap,"+o.tap)
	}
	text, err := j.encode()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(scratch, jobFile), text, 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(kernel, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=/", "TMPDIR=" + scratch}
	preload, err := buildXState(scratch)
	if err != nil {
		return nil, err
	}
	cmd.Env = append(cmd.Env, "LD_PRELOAD="+preload)
	return cmd, nil
}

//go:embed uml/xstate.c
var xstateSource string

// buildXState builds what user-mode Linux needs on CPUs with large registers;
// see the source. On others it does nothing, so nobody has to tell them apart.
func buildXState(scratch string) (string, error) {
	library := filepath.Join(scratch, "xstate.so")
	cc := exec.Command("gcc", "-O1", "-shared", "-fPIC", "-x", "c", "-o", library, "-")
	cc.Stdin = strings.NewReader(xstateSource)
	if out, err := cc.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building what user-mode Linux is started with: %w: %s", err, out)
	}
	return library, nil
}
