// Package drivertest has a machine in memory for tests of package driver: block
// devices, device-mapper, mounts and filesystems (Kernel), a Mapper, Keys and a
// wrapped driver over it, and a way to make any of them fail or die at any step
// (Faults). RunMapper, RunMounts and RunFilesystems are the conformance suites
// that these fakes and the real things pass alike.
//
// Paths are real files and directories; what is mounted on them is in memory.
package drivertest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Kernel is the machine. Its methods are safe for concurrent use. It is
// driver.Mounts, driver.Filesystems and driver.Devices.
type Kernel struct {
	mu     sync.Mutex
	disks  map[string]*disk  // by device number
	nodes  map[string]string // path of a device node: device number
	tables map[string]*table // by name of the mapping
	mounts []driver.Mount
	held   map[string]int    // by device number
	done   map[string]uint64 // requests, by device number
	count  int
	broken []string

	// NoSeq: the kernel does not count its disks, as before Linux 5.15. Set it
	// before use.
	NoSeq bool
}

var (
	_ driver.Mounts      = (*Kernel)(nil)
	_ driver.Filesystems = (*Kernel)(nil)
	_ driver.Devices     = (*Kernel)(nil)
)

// disk is a raw block device, or rather its pages that are not zero.
type disk struct {
	number  string
	seq     uint64
	size    int64 // what the kernel knows
	newSize int64 // what a rescan finds
	pages   map[int64]*[pageSize]byte
	// hydrated regions of a volume of layout dek.LayoutClone, as its metadata
	// would say.
	hydrated uint64
}

const pageSize = 4096

// table is an open mapping.
type table struct {
	driver.Mapping
	disk   *disk
	offset int64
	since  time.Time // hydration was last looked at
}

// NewKernel boots a machine without devices.
func NewKernel() *Kernel {
	return &Kernel{disks: map[string]*disk{}, nodes: map[string]string{}, tables: map[string]*table{}, held: map[string]int{}, done: map[string]uint64{}}
}

// violate notes that somebody did what must never happen.
func (k *Kernel) violate(format string, args ...any) {
	k.broken = append(k.broken, fmt.Sprintf(format, args...))
}

// Violate is for other fakes on this machine.
func (k *Kernel) Violate(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.violate(format, args...)
}

// Violations lists what happened and must never happen, such as a mkfs on a
// finished volume.
func (k *Kernel) Violations() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.broken)
}

// Reboot forgets what kernels forget: mounts, mappings and who holds what.
func (k *Kernel) Reboot() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.tables {
		delete(k.nodes, t.Path)
	}
	k.mounts, k.tables, k.held = nil, map[string]*table{}, map[string]int{}
}

// AddDisk adds a blank block device and returns the path of its node.
func (k *Kernel) AddDisk(size int64) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.count++
	d := &disk{number: fmt.Sprintf("7:%d", k.count), seq: uint64(k.count), size: size, newSize: size, pages: map[int64]*[pageSize]byte{}}
	path := fmt.Sprintf("/dev/fake%d", k.count)
	k.disks[d.number], k.nodes[path] = d, d.number
	return path
}

// RemoveDisk takes a device away.
func (k *Kernel) RemoveDisk(path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unplug(path)
}

// unplug removes a device and its node.
func (k *Kernel) unplug(path string) *disk {
	d := k.disks[k.nodes[path]]
	delete(k.disks, d.number)
	k.unlink(path)
	return d
}

// unlink removes a node. Where it is bound, what was removed stays.
func (k *Kernel) unlink(path string) {
	for i, m := range k.mounts {
		k.mounts[i].Stale = m.Stale || m.Node && m.Device == k.nodes[path]
	}
	delete(k.nodes, path)
}

// Unlink removes a device's node, and the file that Alias left.
func (k *Kernel) Unlink(path string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unlink(path)
	return os.Remove(path)
}

// Reattach detaches a device and attaches it anew, with a number that is not in
// use: another one of before, or "" for one that never was.
func (k *Kernel) Reattach(path, number string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.unplug(path)
	k.count++
	if number == "" {
		number = fmt.Sprintf("7:%d", k.count)
	}
	d.number, d.seq = number, uint64(k.count)
	k.disks[number], k.nodes[path] = d, number
}

// GrowDisk enlarges a device. The kernel learns of it by a rescan.
func (k *Kernel) GrowDisk(path string, size int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.disks[k.nodes[path]].newSize = size
}

// BlankDisk makes a device read as zeros, as a sick backend does.
func (k *Kernel) BlankDisk(path string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.disks[k.nodes[path]].pages)
}

// Blank tells whether nothing was ever written to a device.
func (k *Kernel) Blank(path string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.disks[k.nodes[path]].blank()
}

// Sicken makes a device read as zeros, whole or all behind its header, until
// heal is called: what was written meanwhile is gone then.
func (k *Kernel) Sicken(path string, whole bool) (heal func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	pages := k.disks[k.nodes[path]].pages
	healthy := maps.Clone(pages)
	for i := range pages {
		if whole || i*pageSize >= dataOffset {
			delete(pages, i)
		}
	}
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		clear(pages)
		maps.Copy(pages, healthy)
	}
}

// SwapDisks exchanges the content of two devices.
func (k *Kernel) SwapDisks(a, b string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	da, db := k.disks[k.nodes[a]], k.disks[k.nodes[b]]
	da.pages, db.pages = db.pages, da.pages
}

// CopyDisk makes the content of a device that of another one, as a snapshot or
// clone has it.
func (k *Kernel) CopyDisk(from, to string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.disks[k.nodes[to]]
	clear(d.pages)
	for i, page := range k.disks[k.nodes[from]].pages {
		d.pages[i] = new(*page)
	}
}

// Hold opens a device as any process could, until release is called.
func (k *Kernel) Hold(path string) (release func(), err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	number, err := k.resolve(path)
	if err != nil {
		return nil, err
	}
	k.held[number]++
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.held[number]--
	}, nil
}

// ReadAt reads from the device whose node is, or is bound, at path.
func (k *Kernel) ReadAt(path string, p []byte, off int64) error {
	return k.io(path, len(p), off, false, func(d *disk, off int64) { d.readAt(p, off) })
}

// WriteAt writes to the device whose node is, or is bound, at path.
func (k *Kernel) WriteAt(path string, p []byte, off int64) error {
	return k.io(path, len(p), off, true, func(d *disk, off int64) { d.writeAt(p, off) })
}

func (k *Kernel) io(path string, n int, off int64, write bool, do func(d *disk, off int64)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	number, err := k.resolve(path)
	if err != nil {
		return err
	}
	d, base, size, readOnly, err := k.device(number)
	if err != nil {
		return err
	}
	if write && readOnly {
		return &os.PathError{Op: "write", Path: path, Err: unix.EPERM}
	}
	if off < 0 || off+int64(n) > size {
		return fmt.Errorf("%d bytes at %d of %d", n, off, size)
	}
	k.done[number]++
	do(d, base+off)
	return nil
}

// resolve returns the number of the device whose node is, or is bound, at path.
func (k *Kernel) resolve(path string) (string, error) {
	if l := k.top(path); l != nil {
		if l.Node {
			return l.Device, nil
		}
		return "", &os.PathError{Op: "open", Path: path, Err: unix.ENOTBLK}
	}
	if number, ok := k.nodes[path]; ok {
		return number, nil
	}
	return "", &os.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

// device returns the disk behind a device number, where on it the device
// begins, its size and whether it is read-only.
func (k *Kernel) device(number string) (d *disk, offset, size int64, readOnly bool, err error) {
	for _, t := range k.tables {
		if t.Number == number {
			return t.disk, t.offset, t.Size, t.ReadOnly, nil
		}
	}
	if d, ok := k.disks[number]; ok {
		return d, 0, d.size, false, nil
	}
	return nil, 0, 0, false, fmt.Errorf("device %s: %w", number, unix.ENXIO)
}

func (d *disk) readAt(p []byte, off int64) {
	for len(p) > 0 {
		n := min(int64(len(p)), pageSize-off%pageSize)
		if page := d.pages[off/pageSize]; page != nil {
			copy(p[:n], page[off%pageSize:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

func (d *disk) writeAt(p []byte, off int64) {
	for len(p) > 0 {
		n := min(int64(len(p)), pageSize-off%pageSize)
		page := d.pages[off/pageSize]
		if page == nil {
			page = &[pageSize]byte{}
			d.pages[off/pageSize] = page
		}
		copy(page[off%pageSize:], p[:n])
		p, off = p[n:], off+n
	}
}

// zero drops the pages of a range; off and n are multiples of a page's size.
func (d *disk) zero(off, n int64) {
	for i := range d.pages {
		if at := i * pageSize; at >= off && at < off+n {
			delete(d.pages, i)
		}
	}
}

func (d *disk) blank() bool {
	for _, page := range d.pages {
		if *page != [pageSize]byte{} {
			return false
		}
	}
	return true
}

// List is driver.Mounts'.
func (k *Kernel) List() ([]driver.Mount, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.mounts), nil
}

func (k *Kernel) top(target string) *driver.Mount {
	for i := range slices.Backward(k.mounts) {
		if k.mounts[i].Target == target {
			return &k.mounts[i]
		}
	}
	return nil
}

// Mount is driver.Mounts'.
func (k *Kernel) Mount(ctx context.Context, source, target, fstype string, options []string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	at, err := os.Lstat(target)
	if err != nil {
		return err
	}
	m := driver.Mount{Target: target, FSType: fstype, ReadOnly: slices.Contains(options, "ro")}
	if slices.Contains(options, "bind") {
		if err := k.bind(&m, source); err != nil {
			return err
		}
	} else if err := k.mountDevice(&m, source, options); err != nil {
		return err
	}
	if at.IsDir() == m.Node {
		return &os.LinkError{Op: "mount", Old: source, New: target, Err: unix.ENOTDIR}
	}
	k.mounts = append(k.mounts, m)
	return nil
}

func (k *Kernel) bind(m *driver.Mount, source string) error {
	if l := k.top(source); l != nil {
		m.Device, m.Node, m.FSType = l.Device, l.Node, l.FSType
		m.ReadOnly = m.ReadOnly || l.ReadOnly
		return nil
	}
	number, err := k.resolve(source)
	if err != nil {
		return err
	}
	m.Device, m.Node, m.FSType = number, true, "devtmpfs"
	return nil
}

func (k *Kernel) mountDevice(m *driver.Mount, source string, options []string) error {
	number, err := k.resolve(source)
	if err != nil {
		return err
	}
	super, err := k.superblock(number)
	if err != nil {
		return err
	}
	_, _, _, readOnly, err := k.device(number)
	switch {
	case err != nil:
		return err
	case super.Type == "" || super.Type != m.FSType:
		return fmt.Errorf("mount %s: wrong filesystem type %q, the superblock says %q", source, m.FSType, super.Type)
	case readOnly && !m.ReadOnly:
		return fmt.Errorf("mount %s: %w", source, unix.EROFS)
	case super.Type == "xfs" && !slices.Contains(options, "nouuid") && k.twin(number, super.UUID):
		return fmt.Errorf("mount %s: its UUID is mounted: %w", source, unix.EINVAL)
	}
	m.Device = number
	return nil
}

// twin tells whether a filesystem of that UUID is mounted from another device.
func (k *Kernel) twin(number, uuid string) bool {
	return slices.ContainsFunc(k.mounts, func(m driver.Mount) bool {
		other, err := k.superblock(m.Device)
		return err == nil && !m.Node && m.Device != number && other.UUID == uuid
	})
}

// Unmount is driver.Mounts'.
func (k *Kernel) Unmount(ctx context.Context, target string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	for i := range slices.Backward(k.mounts) {
		if k.mounts[i].Target == target {
			k.mounts = slices.Delete(k.mounts, i, i+1)
			return nil
		}
	}
	return &os.PathError{Op: "unmount", Path: target, Err: unix.EINVAL}
}

// superblock is what a filesystem of this machine consists of: everything.
type superblock struct {
	Type    string
	UUID    string
	Size    int64
	Dirty   bool
	Options []string // of its mkfs
	Files   map[string]string
}

// The superblock lies behind where boot sectors lie.
const (
	superOffset = 4096
	superLength = 64 << 10
	superMagic  = "fakefs:"
)

// MadeWith returns the options that the filesystem on a device was made with.
func (k *Kernel) MadeWith(path string) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	s, _ := k.superblock(k.nodes[path])
	return s.Options
}

func (k *Kernel) superblock(number string) (superblock, error) {
	d, base, _, _, err := k.device(number)
	if err != nil {
		return superblock{}, err
	}
	buf := make([]byte, superLength)
	d.readAt(buf, base+superOffset)
	buf, _, _ = bytes.Cut(buf, []byte{0})
	text, ok := strings.CutPrefix(string(buf), superMagic)
	var s superblock
	if !ok || json.Unmarshal([]byte(text), &s) != nil {
		return superblock{}, nil
	}
	return s, nil
}

func (k *Kernel) putSuperblock(number string, s superblock) error {
	d, base, _, readOnly, err := k.device(number)
	if err != nil {
		return err
	}
	if readOnly {
		return unix.EROFS
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	buf := make([]byte, superLength)
	copy(buf, superMagic+string(text))
	d.writeAt(buf, base+superOffset)
	return nil
}

// Make is driver.Filesystems'. On a mapping that is finished it is a violation.
func (k *Kernel) Make(ctx context.Context, device, fstype string, options []string, _ bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	number, err := k.resolve(device)
	if err != nil {
		return err
	}
	if k.users(number) > 0 {
		return fmt.Errorf("mkfs %s: %w", device, unix.EBUSY)
	}
	for _, t := range k.tables {
		if t.Number == number && t.disk.made() {
			k.violate("mkfs on the finished volume behind %s", t.Name)
		}
	}
	_, _, size, _, err := k.device(number)
	if err != nil {
		return err
	}
	return k.putSuperblock(number, superblock{Type: fstype, UUID: dek.NewUUID(), Size: size, Options: options})
}

// users counts who has the device open.
func (k *Kernel) users(number string) int {
	n := k.held[number]
	for _, m := range k.mounts {
		if m.Device == number && !m.Node {
			n++
		}
	}
	return n
}

// Probe is driver.Filesystems'.
func (k *Kernel) Probe(ctx context.Context, device string) (driver.FSInfo, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return driver.FSInfo{}, err
	}
	number, err := k.resolve(device)
	if err != nil {
		return driver.FSInfo{}, err
	}
	s, err := k.superblock(number)
	return driver.FSInfo{Type: s.Type, Size: s.Size, Clean: s.Type != "" && !s.Dirty}, err
}

// Check is driver.Filesystems'.
func (k *Kernel) Check(ctx context.Context, device, fstype string) error {
	return k.change(ctx, device, func(s *superblock, _ int64) error {
		if s.Type != fstype {
			return fmt.Errorf("fsck.%s on %q", fstype, s.Type)
		}
		s.Dirty = false
		return nil
	})
}

// Grow is driver.Filesystems'.
func (k *Kernel) Grow(ctx context.Context, device, mountpoint, fstype string) error {
	return k.change(ctx, device, func(s *superblock, size int64) error {
		number, _ := k.resolve(device)
		if l := k.top(mountpoint); l == nil || l.Device != number || l.Node || s.Type != fstype {
			return fmt.Errorf("growing a %s that is not mounted at %s", fstype, mountpoint)
		}
		s.Size = size
		return nil
	})
}

func (k *Kernel) change(ctx context.Context, device string, do func(s *superblock, size int64) error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	number, err := k.resolve(device)
	if err != nil {
		return err
	}
	_, _, size, _, err := k.device(number)
	if err != nil {
		return err
	}
	s, err := k.superblock(number)
	if err != nil {
		return err
	}
	if err := do(&s, size); err != nil {
		return err
	}
	return k.putSuperblock(number, s)
}

// Usage is driver.Filesystems'. A file is one inode and as long as it is.
func (k *Kernel) Usage(path string) (driver.Usage, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.top(path)
	if l == nil || l.Node {
		return driver.Usage{}, &os.PathError{Op: "statfs", Path: path, Err: fs.ErrNotExist}
	}
	s, err := k.superblock(l.Device)
	if err != nil {
		return driver.Usage{}, err
	}
	u := driver.Usage{Total: s.Size, Inodes: 1000, InodesUsed: int64(len(s.Files))}
	for _, data := range s.Files {
		u.Used += int64(len(data))
	}
	u.Available, u.InodesFree = u.Total-u.Used, u.Inodes-u.InodesUsed
	return u, nil
}

// Dirty makes the filesystem of a device look as after a crash.
func (k *Kernel) Dirty(device string) error {
	return k.change(context.Background(), device, func(s *superblock, _ int64) error { s.Dirty = true; return nil })
}

// WriteFile writes a file into the filesystem mounted at dir.
func (k *Kernel) WriteFile(dir, name, data string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.top(dir)
	if l == nil || l.Node {
		return &os.PathError{Op: "open", Path: dir, Err: fs.ErrNotExist}
	}
	if l.ReadOnly {
		return &os.PathError{Op: "open", Path: dir, Err: unix.EROFS}
	}
	s, err := k.superblock(l.Device)
	if err != nil {
		return err
	}
	if s.Files == nil {
		s.Files = map[string]string{}
	}
	s.Files[name] = data
	return k.putSuperblock(l.Device, s)
}

// ReadFile reads a file of the filesystem mounted at dir.
func (k *Kernel) ReadFile(dir, name string) (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l := k.top(dir)
	if l == nil || l.Node {
		return "", &os.PathError{Op: "open", Path: dir, Err: fs.ErrNotExist}
	}
	s, err := k.superblock(l.Device)
	if err != nil {
		return "", err
	}
	data, ok := s.Files[name]
	if !ok {
		return "", &os.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return data, nil
}

// Device is driver.Devices'.
func (k *Kernel) Device(path string) (driver.Device, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	number, err := k.resolve(path)
	if err != nil {
		if _, real := os.Lstat(path); real != nil && errors.Is(err, fs.ErrNotExist) {
			return driver.Device{}, err
		}
		return driver.Device{}, errdefs.Errorf(errdefs.ErrState, "%s is not a block device", path)
	}
	d, _, size, _, err := k.device(number)
	if err != nil {
		return driver.Device{}, errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	dev := driver.Device{Number: number, Seq: d.seq, Size: size}
	if k.NoSeq {
		dev.Seq = 0
	}
	for _, t := range k.tables {
		if t.Backing == number {
			dev.Holders = append(dev.Holders, driver.Holder{Name: t.Name, Multipath: strings.HasPrefix(t.Name, "mpath")})
		}
	}
	return dev, nil
}

// Rescan is driver.Devices'.
func (k *Kernel) Rescan(_ context.Context, path string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	number, err := k.resolve(path)
	if err != nil {
		return err
	}
	if d, ok := k.disks[number]; ok {
		d.size = d.newSize
	}
	return nil
}

// Alias is driver.Devices'. It leaves a file, so that whoever removes the alias
// has something to remove.
func (k *Kernel) Alias(path, number string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.nodes[path] = number
	return os.WriteFile(path, nil, 0o600)
}

// Activity is driver.Devices'. Everything is answered at once.
func (k *Kernel) Activity(number string) (driver.Activity, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, _, _, _, err := k.device(number); err != nil {
		return driver.Activity{}, err
	}
	return driver.Activity{Done: k.done[number]}, nil
}

// LUKS is driver.Devices'.
func (k *Kernel) LUKS(path string) (bool, error) {
	magic := make([]byte, len(headerMagic))
	err := k.ReadAt(path, magic, 0)
	return string(magic) == headerMagic, err
}

// Stack puts a foreign device-mapper device onto a disk, as multipathd does
// (name it "mpath…") or as somebody's LVM.
func (k *Kernel) Stack(device, name string) (remove func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.disks[k.nodes[device]]
	k.tables[name] = &table{Mapping: driver.Mapping{Name: name, Number: "253:1", Backing: d.number, Size: d.size}, disk: d}
	return func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.tables, name)
	}
}
