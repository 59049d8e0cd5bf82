package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// device is a block device held open: whatever its path leads to later, this
// file is what is read, written and mapped.
type device struct {
	file   *os.File
	raw    *os.File // past the page cache, see ReadAt
	number dm.Number
	seq    uint64 // diskseq: differs for each disk that ever had this number; 0 where the kernel has none
	size   int64
	sector int // logical, in bytes
}

func openDevice(path string, write bool) (*device, error) {
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	file, err := os.OpenFile(path, mode|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	cannotWrite := errdefs.Errorf(errdefs.ErrState, "device %s cannot be written: attach it writable", path)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM) {
		return nil, cannotWrite
	}
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "opening the device: %w", err)
	}
	d := &device{file: file}
	if err := d.identify(path); err != nil {
		d.close()
		return nil, err
	}
	// Most kernels open a read-only device for writing without a word.
	if readOnly, err := unix.IoctlGetInt(int(file.Fd()), unix.BLKROGET); write && err == nil && readOnly != 0 {
		d.close()
		return nil, cannotWrite
	}
	if d.raw, err = os.OpenFile(d.path(), mode|unix.O_DIRECT|unix.O_CLOEXEC, 0); err != nil {
		d.close()
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "opening device %s past the page cache: %w", path, err)
	}
	return d, nil
}

func (d *device) identify(path string) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.file.Fd()), &st); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "device %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return errdefs.Errorf(errdefs.ErrState, "%s is not a block device", path)
	}
	d.number = dm.NumberOf(st.Rdev)
	// Measured like this rather than by ioctl: it works for every kind.
	size, err := d.file.Seek(0, io.SeekEnd)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "size of %s: %w", path, err)
	}
	d.size = size
	if d.sector, err = unix.IoctlGetInt(int(d.file.Fd()), unix.BLKSSZGET); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "sector size of %s: %w", path, err)
	}
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, d.file.Fd(), unix.BLKGETDISKSEQ, uintptr(unsafe.Pointer(&d.seq))) // stays 0 before Linux 5.15
	return nil
}

func (d *device) close() {
	_ = d.file.Close()
	_ = d.raw.Close()
}

// ReadAt reads what is on the disk. The page cache has what this node last saw
// there: of a volume that is open it is kept, whatever the kernel's mappings, or
// another node that has the volume open too, wrote since.
func (d *device) ReadAt(p []byte, off int64) (int, error) {
	b, skip := d.span(len(p), off)
	n, err := d.raw.ReadAt(b, off-int64(skip))
	if n = copy(p, b[min(skip, n):n]); n == len(p) {
		err = nil
	}
	return n, err
}

// WriteAt writes to the disk exactly what it is given, if that is whole sectors:
// the page cache may write more, in blocks of a page, and what it has of the rest
// may be older than the disk.
func (d *device) WriteAt(p []byte, off int64) (int, error) {
	b, skip := d.span(len(p), off)
	if len(b) != len(p) {
		if _, err := d.raw.ReadAt(b, off-int64(skip)); err != nil {
			return 0, err
		}
	}
	copy(b[skip:], p)
	n, err := d.raw.WriteAt(b, off-int64(skip))
	return min(max(0, n-skip), len(p)), err
}

// Sync makes durable what was written, either way.
func (d *device) Sync() error { return d.raw.Sync() }

// span returns memory for the whole sectors that n bytes at off touch, and where
// they begin in it.
func (d *device) span(n int, off int64) (b []byte, skip int) {
	sector := int64(d.sector)
	skip = int(off % sector)
	return aligned(int((int64(skip+n) + sector - 1) / sector * sector)), skip
}

// aligned returns memory that direct I/O can use, whatever its length.
func aligned(n int) []byte {
	const unit = 4096
	b := make([]byte, n+unit)
	off := unit - int(uintptr(unsafe.Pointer(&b[0]))%unit)
	return b[off : off+n]
}

// path leads to exactly this open device, for libcryptsetup and programs.
func (d *device) path() string { return fmt.Sprintf("/proc/self/fd/%d", d.file.Fd()) }

// exclusive fails where something else (a mount, another mapping, md) holds the device.
func (d *device) exclusive() error {
	fd, err := unix.Open(d.path(), unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return errdefs.Errorf(errdefs.ErrState, "device %s is in use by something else and will not be touched: %w", d.number, err)
	}
	return unix.Close(fd)
}

// zero writes zeros over [offset, offset+length) and syncs.
func zero(file luks2.Device, offset, length int64) error {
	block := make([]byte, min(length, 1<<20))
	for length > 0 {
		n := min(length, int64(len(block)))
		if _, err := file.WriteAt(block[:n], offset); err != nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "wiping: %w", err)
		}
		offset, length = offset+n, length-n
	}
	if err := file.Sync(); err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "wiping: %w", err)
	}
	return nil
}

// lock is a mapping's lock file. The kernel lets it go with the process, and
// not before: a worker that outlived its serving process still holds it.
type lock struct{ file *os.File }

// place is what the lock file remembers about the device last worked on.
type place struct {
	Number string `json:"number"`
	Seq    uint64 `json:"diskseq"`
	Boot   string `json:"boot_id"`
}

func takeLock(dir, name string) (*lock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "lock directory: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(dir, name+".lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "lock file: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = file.Close()
		return nil, errdefs.Errorf(errdefs.ErrConflict, "a crypt-worker still works on mapping %s", name)
	}
	return &lock{file}, nil
}

func (l *lock) release() { _ = l.file.Close() }

// remember notes on which device the mapping is about to be made.
func (l *lock) remember(d *device) error {
	b, err := json.Marshal(place{d.number.String(), d.seq, bootID()})
	if err == nil {
		err = l.file.Truncate(0)
	}
	if err == nil {
		_, err = l.file.WriteAt(b, 0)
	}
	if err != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "lock file: %w", err)
	}
	return nil
}

// recall returns what remember noted since this boot, else nothing.
func (l *lock) recall() place {
	b := make([]byte, 1024)
	n, _ := l.file.ReadAt(b, 0)
	var p place
	if json.Unmarshal(b[:n], &p) != nil || p.Boot != bootID() {
		return place{}
	}
	return p
}

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}
