package driver

import "context"

// Filesystems makes and looks after filesystems. Its methods are safe for
// concurrent use on different devices. FSTypes says which types there are.
type Filesystems interface {
	// Make puts an empty filesystem on the device, whatever is there, and does
	// not discard. It may be repeated after a crash at any instant. options are
	// mkfs's own, checked before; shifted says that what the device tells of its
	// geometry means nothing.
	Make(ctx context.Context, device, fstype string, options []string, shifted bool) error
	// Probe tells which filesystem is on the device: a zero FSInfo where there
	// is none that we know. It writes nothing. The device must not be mounted.
	Probe(ctx context.Context, device string) (FSInfo, error)
	// Check repairs what a crash left, where the filesystem does not do that
	// when it is mounted. ErrState where a person has to decide.
	Check(ctx context.Context, device, fstype string) error
	// Grow enlarges a mounted filesystem to its device; nothing happens where
	// it fills the device.
	Grow(ctx context.Context, device, mountpoint, fstype string) error
	// Usage says how full the filesystem at path is.
	Usage(path string) (Usage, error)
}

// FSInfo is what a superblock says.
type FSInfo struct {
	Type  string // "" where there is no known filesystem
	Size  int64  // bytes
	Clean bool   // nothing to check: it was unmounted in an orderly way, or checks itself
}

// Usage of a filesystem, in bytes and in inodes. A filesystem without a fixed
// number of inodes reports zeros.
type Usage struct {
	Total, Used, Available         int64
	Inodes, InodesUsed, InodesFree int64
}

// Mounts is the mount table of the process's mount namespace.
type Mounts interface {
	// List returns the mounts, later ones on top of earlier ones.
	List() ([]Mount, error)
	// Mount mounts source at target, which exists. With "bind" among the
	// options, source is a file or directory and fstype is empty; "ro" and the
	// other generic options then hold for this mount alone.
	Mount(ctx context.Context, source, target, fstype string, options []string) error
	// Unmount takes away the uppermost mount at target. It asks no disk.
	Unmount(ctx context.Context, target string) error
}

// Mount is one line of the mount table.
type Mount struct {
	Target string
	// Device is the "major:minor" of the filesystem's device, or, where a
	// device node is bound over a file, of the device that the node names.
	Device   string
	Node     bool // a device node bound over a file
	Stale    bool // what is mounted was removed from where it was bound from
	FSType   string
	ReadOnly bool
}

// Devices is what the kernel says about block devices.
type Devices interface {
	// Device describes the block device whose node is at path, which is not
	// followed if it is a symbolic link. fs.ErrNotExist where there is nothing,
	// ErrState where there is something else, ErrUnavailable where there is a
	// node whose device has gone.
	Device(path string) (Device, error)
	// Rescan asks the device at path for its size of today.
	Rescan(ctx context.Context, path string) error
	// Alias makes another node for the device "major:minor" at path; one that
	// is there for another device is replaced.
	Alias(path, number string) error
	// Activity says how busy the device "major:minor" is. It does not wait for
	// the device.
	Activity(number string) (Activity, error)
	// LUKS tells whether what is on the device at path begins with a LUKS
	// header.
	LUKS(path string) (bool, error)
}

// Activity of a block device.
type Activity struct {
	Done     uint64 // requests answered since the device was made
	InFlight uint64 // requests not answered yet
}

// Device is a block device.
type Device struct {
	Number  string // "major:minor"
	Seq     uint64 // never given to two devices since boot; 0 where the kernel does not count
	Size    int64  // bytes
	Holders []Holder
}

// Holder is a device that is stacked upon another one.
type Holder struct {
	Name      string // device-mapper's name, else the kernel's
	Multipath bool
}
