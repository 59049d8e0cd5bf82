// Package dm asks the kernel's device-mapper about mappings and changes them,
// by the ioctls of /dev/mapper/control (linux/dm-ioctl.h, interface version 4)
// and without libdevmapper: no udev cookie, no semaphore, no waiting for
// another process. Nothing here opens or reads a block device.
package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Dir is where device nodes of mappings stand.
const Dir = "/dev/mapper"

// ErrNotFound tells that there is no mapping of that name.
var ErrNotFound = errors.New("no such mapping")

// Number is a block device's number.
type Number struct {
	Major, Minor uint32
}

// String gives the form that tables and sysfs use, "major:minor".
func (n Number) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

// ParseNumber reads "major:minor".
func ParseNumber(s string) (Number, error) {
	var n Number
	if _, err := fmt.Sscanf(s, "%d:%d", &n.Major, &n.Minor); err != nil || n.String() != s {
		return Number{}, fmt.Errorf("device number %q is not major:minor", s)
	}
	return n, nil
}

// NumberOf splits a dev_t as stat and the ioctls give it.
func NumberOf(dev uint64) Number { return Number{unix.Major(dev), unix.Minor(dev)} }

// Info is the state of one mapping.
type Info struct {
	Name      string
	UUID      string
	Number    Number
	OpenCount int
	ReadOnly  bool
	Suspended bool
	Live      bool // has an active table
}

// Target is one line of a table or a status.
type Target struct {
	Start, Length uint64 // in 512-byte sectors
	Type          string
	Params        string
}

// Mapping is a name in the kernel's list.
type Mapping struct {
	Name   string
	Number Number
}

// Path returns where the device node of a mapping stands.
func Path(name string) string { return filepath.Join(Dir, name) }

// List returns every mapping of the system.
func List() ([]Mapping, error) {
	_, data, err := call(unix.DM_LIST_DEVICES, unix.DmIoctl{}, nil, 16<<10)
	if err != nil {
		return nil, fmt.Errorf("listing mappings: %w", err)
	}
	var list []Mapping
	for len(data) >= 12 {
		dev := binary.NativeEndian.Uint64(data)
		next := binary.NativeEndian.Uint32(data[8:])
		if dev == 0 { // the kernel's way of saying "none at all"
			break
		}
		list = append(list, Mapping{Name: cString(data[12:]), Number: NumberOf(dev)})
		if next == 0 || int(next) > len(data) {
			break
		}
		data = data[next:]
	}
	return list, nil
}

// Status returns the state of the named mapping, ErrNotFound where there is none.
func Status(name string) (Info, error) {
	h, err := header(name)
	if err != nil {
		return Info{}, err
	}
	out, _, err := call(unix.DM_DEV_STATUS, h, nil, 0)
	if err != nil {
		return Info{}, fmt.Errorf("state of mapping %s: %w", name, err)
	}
	return Info{
		Name:      name,
		UUID:      cString(out.Uuid[:]),
		Number:    NumberOf(out.Dev),
		OpenCount: int(out.Open_count),
		ReadOnly:  out.Flags&unix.DM_READONLY_FLAG != 0,
		Suspended: out.Flags&unix.DM_SUSPEND_FLAG != 0,
		Live:      out.Flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
	}, nil
}

// Table returns the active table. Where a volume key is not in the kernel
// keyring it is part of the table: cryptcsi never makes such a mapping.
func Table(name string) ([]Target, error) { return targets(name, unix.DM_STATUS_TABLE_FLAG) }

// LoadedTable returns the table that Resume would make the active one, nothing
// where none was loaded.
func LoadedTable(name string) ([]Target, error) {
	return targets(name, unix.DM_STATUS_TABLE_FLAG|unix.DM_QUERY_INACTIVE_TABLE_FLAG)
}

// TargetStatus returns the targets' own status lines, without flushing.
func TargetStatus(name string) ([]Target, error) { return targets(name, 0) }

func targets(name string, flags uint32) ([]Target, error) {
	h, err := header(name)
	if err != nil {
		return nil, err
	}
	h.Flags = flags | unix.DM_NOFLUSH_FLAG
	out, data, err := call(unix.DM_TABLE_STATUS, h, nil, 4<<10)
	if err != nil {
		return nil, fmt.Errorf("table of mapping %s: %w", name, err)
	}
	list := make([]Target, 0, out.Target_count)
	rest := data
	for range out.Target_count {
		if len(rest) < unix.SizeofDmTargetSpec {
			return nil, fmt.Errorf("table of mapping %s: cut short", name)
		}
		spec := (*unix.DmTargetSpec)(unsafe.Pointer(&rest[0]))
		list = append(list, Target{
			Start:  spec.Sector_start,
			Length: spec.Length,
			Type:   cString(spec.Target_type[:]),
			Params: cString(rest[unix.SizeofDmTargetSpec:]),
		})
		// Next counts from the start of the first target.
		if int(spec.Next) > len(data) {
			break
		}
		rest = data[spec.Next:]
	}
	return list, nil
}

// Remove takes a mapping away and its device node too, where no udev does it.
// ErrNotFound where there is none; EBUSY while something holds it open.
func Remove(name string) error {
	h, err := header(name)
	if err != nil {
		return err
	}
	info, err := Status(name)
	if err != nil {
		return err
	}
	if _, _, err := call(unix.DM_DEV_REMOVE, h, nil, 0); err != nil {
		return fmt.Errorf("removing mapping %s: %w", name, err)
	}
	removeNode(name, info.Number)
	return nil
}

// removeNode unlinks the node of a mapping that is gone, if it still is its node.
func removeNode(name string, n Number) {
	var st unix.Stat_t
	if unix.Stat(Path(name), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && NumberOf(st.Rdev) == n {
		_ = os.Remove(Path(name))
	}
}

// MakeNode makes sure that the device node of an existing mapping is there.
func MakeNode(name string, n Number) error {
	var st unix.Stat_t
	if err := unix.Stat(Path(name), &st); err == nil {
		if st.Mode&unix.S_IFMT == unix.S_IFBLK && NumberOf(st.Rdev) == n {
			return nil
		}
		if err := os.Remove(Path(name)); err != nil {
			return fmt.Errorf("replacing the stale node of mapping %s: %w", name, err)
		}
	}
	err := unix.Mknod(Path(name), unix.S_IFBLK|0o600, int(unix.Mkdev(n.Major, n.Minor)))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("making the node of mapping %s: %w", name, err)
	}
	return nil
}

// Create makes a mapping without a table and returns its number. EBUSY where
// the name or the UUID is there already.
func Create(name, uuid string) (Number, error) {
	h, err := header(name)
	if err != nil {
		return Number{}, err
	}
	copy(h.Uuid[:len(h.Uuid)-1], uuid)
	out, _, err := call(unix.DM_DEV_CREATE, h, nil, 0)
	if err != nil {
		return Number{}, fmt.Errorf("making mapping %s: %w", name, err)
	}
	return NumberOf(out.Dev), nil
}

// Message sends a message to the first target of a mapping.
func Message(name, text string) error {
	h, err := header(name)
	if err != nil {
		return err
	}
	// struct dm_target_msg: the sector, and the text.
	payload := append(make([]byte, 8), text...)
	if _, _, err := call(unix.DM_TARGET_MSG, h, append(payload, 0), 0); err != nil {
		return fmt.Errorf("message %q to mapping %s: %w", text, name, err)
	}
	return nil
}

// Load gives a mapping a new, still inactive table.
func Load(name string, table []Target, readOnly bool) error {
	h, err := header(name)
	if err != nil {
		return err
	}
	h.Target_count = uint32(len(table))
	h.Flags = unix.DM_SECURE_DATA_FLAG
	if readOnly {
		h.Flags |= unix.DM_READONLY_FLAG
	}
	var data []byte
	for _, t := range table {
		data = append(data, encode(t)...)
	}
	if _, _, err := call(unix.DM_TABLE_LOAD, h, data, 0); err != nil {
		return fmt.Errorf("loading a table into mapping %s: %w", name, err)
	}
	return nil
}

// Clear takes a table away again that was loaded and is not active.
func Clear(name string) error {
	h, err := header(name)
	if err != nil {
		return err
	}
	if _, _, err := call(unix.DM_TABLE_CLEAR, h, nil, 0); err != nil {
		return fmt.Errorf("clearing the loaded table of mapping %s: %w", name, err)
	}
	return nil
}

// encode returns a target as the kernel takes it, padded to eight bytes.
func encode(t Target) []byte {
	size := (unix.SizeofDmTargetSpec + len(t.Params) + 1 + 7) &^ 7
	spec := unix.DmTargetSpec{Sector_start: t.Start, Length: t.Length, Next: uint32(size)}
	copy(spec.Target_type[:len(spec.Target_type)-1], t.Type)
	data := make([]byte, size)
	*(*unix.DmTargetSpec)(unsafe.Pointer(&data[0])) = spec
	copy(data[unix.SizeofDmTargetSpec:], t.Params)
	return data
}

// Suspend stops I/O to a mapping, letting what is under way finish.
func Suspend(name string) error { return suspend(name, unix.DM_SUSPEND_FLAG|unix.DM_SKIP_LOCKFS_FLAG) }

// Resume makes a loaded table the active one, or lets I/O go on. A mapping that
// is live need not be suspended for that: the kernel does it within the one
// call, so that no death of the caller leaves it suspended. Host rules for LVM,
// md and multipath are told to stay away.
func Resume(name string) error {
	return suspend(name, unix.DM_SKIP_LOCKFS_FLAG)
}

// private stands in the upper half of the number that the kernel hands to udev:
// DM_UDEV_DISABLE_SUBSYSTEM_RULES, _DISK_RULES and _OTHER_RULES, and
// DM_UDEV_PRIMARY_SOURCE, which makes them count. In the lower half would be the
// semaphore that somebody waits at; nobody does.
const private = (0x0002 | 0x0004 | 0x0008 | 0x0040) << 16

func suspend(name string, flags uint32) error {
	h, err := header(name)
	if err != nil {
		return err
	}
	h.Flags = flags
	h.Event_nr = private
	if _, _, err := call(unix.DM_DEV_SUSPEND, h, nil, 0); err != nil {
		return fmt.Errorf("suspending or resuming mapping %s: %w", name, err)
	}
	return nil
}

func header(name string) (unix.DmIoctl, error) {
	var h unix.DmIoctl
	if name == "" || len(name) >= len(h.Name) || strings.ContainsAny(name, "/\x00") {
		return h, fmt.Errorf("mapping name %q is not possible", name)
	}
	copy(h.Name[:], name)
	return h, nil
}

// call sends one ioctl with room for an answer of about room bytes, and more
// where the kernel asks for more.
func call(request uint, h unix.DmIoctl, payload []byte, room int) (unix.DmIoctl, []byte, error) {
	control, err := unix.Open(filepath.Join(Dir, unix.DM_CONTROL_NODE), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return h, nil, fmt.Errorf("opening %s/control (is the dm_mod kernel module loaded?): %w", Dir, err)
	}
	defer func() { _ = unix.Close(control) }()
	for size := unix.SizeofDmIoctl + max(room, len(payload)); ; size *= 2 {
		// Eight-byte aligned, as the kernel's structures are.
		words := make([]uint64, (size+7)/8)
		buf := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(words)*8)
		head := (*unix.DmIoctl)(unsafe.Pointer(&words[0]))
		*head = h
		head.Version = [3]uint32{unix.DM_VERSION_MAJOR, 0, 0}
		head.Data_size = uint32(len(buf))
		head.Data_start = unix.SizeofDmIoctl
		copy(buf[unix.SizeofDmIoctl:], payload)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(control), uintptr(request), uintptr(unsafe.Pointer(head)))
		if errno == unix.ENXIO {
			return h, nil, ErrNotFound
		}
		if errno != 0 {
			return h, nil, errno
		}
		if head.Flags&unix.DM_BUFFER_FULL_FLAG != 0 && size < 16<<20 {
			continue
		}
		start, end := int(head.Data_start), min(int(head.Data_size), len(buf))
		if start > end {
			start = end
		}
		return *head, buf[start:end], nil
	}
}

func cString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// NeedTarget fails where the kernel has no such target, after it was asked to
// load the module.
func NeedTarget(name string) error {
	h, err := header(name)
	if err != nil {
		return err
	}
	if _, _, err := call(unix.DM_GET_TARGET_VERSION, h, nil, 1<<10); err != nil {
		return fmt.Errorf("the kernel has no dm-%s target and cannot load one (modprobe dm-%s): %w", name, name, err)
	}
	return nil
}
