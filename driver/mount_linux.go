package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Linux is the real kernel: it is Filesystems, Mounts and Devices. It needs
// root, mount(8) and the filesystems' own programs.
type Linux struct{}

var (
	_ Filesystems = Linux{}
	_ Mounts      = Linux{}
	_ Devices     = Linux{}
)

// repairTime bounds what must not be interrupted half way: a check or growth
// runs to its end though its caller has given up; the next call finds it done.
const repairTime = 30 * time.Minute

// Make runs mkfs. Discarding is left out: it would tell the host which blocks
// are in use, through dm-clone it would lose them, and on a large device it
// takes long. ext4's journal is not zeroed, which on a large volume is most of
// what mkfs writes: what lies there reads as zeros, or as noise under a key that
// is as new as the volume, and never as a journal that somebody wrote. Of
// a flag that is there twice the last one counts, but for xfs's lists.
func (Linux) Make(ctx context.Context, device, fstype string, options []string, shifted bool) error {
	switch fstype {
	case "ext4":
		more, extended := takeFlag(options, "-E")
		extended = strings.TrimSuffix("nodiscard,lazy_itable_init=1,lazy_journal_init=1,"+extended, ",")
		return run(ctx, "mkfs.ext4", slices.Concat([]string{"-q", "-F", "-m", "0", "-E", extended}, more, []string{device})...)
	case "xfs":
		args := []string{"-q", "-f", "-K"}
		if shifted { // dm-clone's regions are no stripes: the log would be padded to them
			args = append(args, "-d", "noalign")
		}
		return run(ctx, "mkfs.xfs", slices.Concat(args, options, []string{device})...)
	case "btrfs":
		return run(ctx, "mkfs.btrfs", slices.Concat([]string{"-q", "-f", "-K"}, options, []string{device})...)
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "filesystem %q cannot be made: use one of %v", fstype, FSTypes())
}

// Check runs e2fsck; xfs and btrfs repair themselves when they are mounted.
func (Linux) Check(ctx context.Context, device, fstype string) error {
	if fstype != "ext4" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), repairTime)
	defer cancel()
	err := run(ctx, "e2fsck", "-p", device)
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.ExitCode() >= 0 && exit.ExitCode()&^3 == 0:
		return nil // errors were found and corrected
	case errors.As(err, &exit):
		return errdefs.Errorf(errdefs.ErrState, "the filesystem is damaged and has to be repaired by hand: %w", err)
	}
	return err
}

// Grow runs the filesystem's own program; all of them grow while mounted.
func (Linux) Grow(ctx context.Context, device, mountpoint, fstype string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), repairTime)
	defer cancel()
	switch fstype {
	case "ext4":
		return run(ctx, "resize2fs", device)
	case "xfs":
		return run(ctx, "xfs_growfs", "-d", mountpoint)
	case "btrfs":
		return run(ctx, "btrfs", "filesystem", "resize", "max", mountpoint)
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "filesystem %q cannot grow", fstype)
}

// run runs a program. The error holds what it printed, shortened.
func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second // another process that is just being started may keep the pipe
	out, err := cmd.CombinedOutput()
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay): // the program itself has ended, and well
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s was interrupted: %w", name, ctx.Err())
	case errors.Is(err, exec.ErrNotFound):
		return errdefs.Errorf(errdefs.ErrInvalid, "%s is not installed in this image", name)
	}
	return fmt.Errorf("%s: %w: %s", name, err, said(string(out)))
}

// said is what a program printed, in one line: without how it is called, which
// mkfs.xfs explains after whatever is wrong, and of much the beginning and the end.
func said(out string) string {
	if at := strings.Index(out, "\nUsage: "); at >= 0 {
		out = out[:at]
	}
	const most = 200 // of either
	text := strings.Join(strings.Fields(out), " ")
	if len(text) > 2*most {
		text = strings.ToValidUTF8(text[:most], "") + " … " + strings.ToValidUTF8(text[len(text)-most:], "")
	}
	return text
}

// Where the superblocks lie, and how much of the device to read for them.
const (
	extSuper   = 1 << 10
	btrfsSuper = 64 << 10
	superArea  = btrfsSuper + 4<<10
)

// Probe reads the superblocks itself: that takes no process, and there is
// nothing else that could be in a mapping of ours.
func (Linux) Probe(ctx context.Context, device string) (FSInfo, error) {
	if err := ctx.Err(); err != nil {
		return FSInfo{}, err
	}
	f, err := os.Open(device)
	if err != nil {
		return FSInfo{}, err
	}
	defer func() { _ = f.Close() }()
	area := make([]byte, superArea)
	if _, err := io.ReadFull(f, area); err != nil {
		return FSInfo{}, fmt.Errorf("reading the superblock: %w", err)
	}
	return readSuperblock(area), nil
}

// readSuperblock finds out what begins with area, which is superArea long.
func readSuperblock(area []byte) FSInfo {
	le, be := binary.LittleEndian, binary.BigEndian
	if bytes.HasPrefix(area, []byte("XFSB")) {
		return FSInfo{Type: "xfs", Size: int64(be.Uint32(area[4:])) * int64(be.Uint64(area[8:])), Clean: true}
	}
	if b := area[btrfsSuper:]; bytes.Equal(b[0x40:0x48], []byte("_BHRfS_M")) {
		return FSInfo{Type: "btrfs", Size: int64(le.Uint64(b[0x70:])), Clean: true}
	}
	if e := area[extSuper:]; le.Uint16(e[0x38:]) == 0xEF53 {
		return readExt(e)
	}
	return FSInfo{}
}

// readExt reads an ext2, 3 or 4 superblock.
func readExt(e []byte) FSInfo {
	const (
		hasJournal                = 0x4 // compatible features
		needsRecovery             = 0x4 // incompatible ones
		extents, bits64, flexible = 0x40, 0x80, 0x200
		valid, errorsFound        = 1, 2 // states
	)
	le := binary.LittleEndian
	compat, incompat, state := le.Uint32(e[0x5C:]), le.Uint32(e[0x60:]), le.Uint16(e[0x3A:])
	blocks := int64(le.Uint32(e[0x4:]))
	if incompat&bits64 != 0 {
		blocks |= int64(le.Uint32(e[0x150:])) << 32
	}
	info := FSInfo{
		Type:  "ext2",
		Size:  blocks << (10 + le.Uint32(e[0x18:])&0xF),
		Clean: state&(valid|errorsFound) == valid && incompat&needsRecovery == 0,
	}
	if incompat&(extents|bits64|flexible) != 0 {
		info.Type = "ext4"
	} else if compat&hasJournal != 0 {
		info.Type = "ext3"
	}
	return info
}

// Usage is statfs.
func (Linux) Usage(path string) (Usage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return Usage{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	block := st.Frsize
	return Usage{
		Total: int64(st.Blocks) * block, Used: int64(st.Blocks-st.Bfree) * block, Available: int64(st.Bavail) * block,
		Inodes: int64(st.Files), InodesUsed: int64(st.Files - st.Ffree), InodesFree: int64(st.Ffree),
	}, nil
}

// Mount mounts a filesystem with mount(8), which knows all options there are,
// and makes bind mounts itself.
func (Linux) Mount(ctx context.Context, source, target, fstype string, options []string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if slices.Contains(options, "bind") {
		return bind(source, target, options)
	}
	return run(ctx, "mount", mount.MakeMountArgs(source, target, fstype, options)...)
}

// bind binds source to target. The mount has its own options, beside those that
// it inherits, from the moment on that it can be seen: whoever is killed leaves
// no writable mount for a read-only one.
func bind(source, target string, options []string) error {
	attr := unix.MountAttr{}
	for _, o := range options {
		attr.Attr_set |= bindAttributes[o]
		if o == "noatime" || o == "relatime" { // values of one field, the others are flags
			attr.Attr_clr |= unix.MOUNT_ATTR__ATIME
		}
	}
	fail := func(op string, err error) error {
		return &os.LinkError{Op: op, Old: source, New: target, Err: err}
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fail("bind", err)
	}
	defer func() { _ = unix.Close(tree) }()
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fail("bind with options", err)
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fail("bind", err)
	}
	return nil
}

// bindAttributes are the options that a bind mount can have of its own.
var bindAttributes = map[string]uint64{
	"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
	"noatime": unix.MOUNT_ATTR_NOATIME, "nodiratime": unix.MOUNT_ATTR_NODIRATIME, "relatime": unix.MOUNT_ATTR_RELATIME,
}

// Unmount is the system call.
func (Linux) Unmount(_ context.Context, target string) error {
	if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
		return &os.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

// List reads /proc/self/mountinfo.
func (Linux) List() ([]Mount, error) {
	table, err := mount.ParseMountInfo("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	mounts := make([]Mount, 0, len(table))
	for _, info := range table {
		m, source, root := readMount(info)
		mounts = append(mounts, named(m, source, root))
	}
	return mounts, nil
}

// readMount translates one line of mountinfo, see proc(5).
func readMount(info mount.MountInfo) (m Mount, source, root string) {
	m = Mount{
		Target: unescape(info.MountPoint), Device: fmt.Sprintf("%d:%d", info.Major, info.Minor), FSType: info.FsType,
		ReadOnly: slices.Contains(info.MountOptions, "ro") || slices.Contains(info.SuperOptions, "ro"),
	}
	m.Stale = strings.HasSuffix(info.Root, "//deleted")
	return m, unescape(info.Source), unescape(info.Root)
}

// named puts the block device that a mount is about into m.Device, where the
// line itself does not show it: device nodes bound over files, and btrfs, whose
// mounts have device numbers of their own.
func named(m Mount, source, root string) Mount {
	path := ""
	switch m.FSType {
	case "btrfs":
		path = source
	// Where a device node may lie. Not network filesystems: one that hangs
	// must not hang us.
	case "devtmpfs", "tmpfs", "ramfs", "overlay", "ext4", "xfs", "hostfs":
		if root != "/" {
			path = m.Target
		}
	}
	if path == "" {
		return m
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
		m.Device = number(st.Rdev)
		m.Node = m.FSType != "btrfs"
	}
	return m
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
