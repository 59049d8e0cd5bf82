package driver

import (
	"errors"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Profile says what is special about a wrapped driver. The zero value is right
// for a block driver that does what the CSI specification says and that nobody
// has looked at.
type Profile struct {
	// Refused says why this driver cannot be wrapped; "" if it can.
	Refused string
	// Known: its source was read, and it hands out block devices. A driver
	// that is not known has to confirm for each new volume that it can.
	Known bool

	// CreateAsBlock: what a volume is, is decided when it is made, so that it
	// has to be made as a block volume.
	CreateAsBlock bool
	// OneNode: access modes for several nodes make a network filesystem.
	OneNode bool
	// SingleWriter: it knows the access mode SINGLE_NODE_WRITER alone.
	SingleWriter bool
	// Refuses are settings of the driver's own with which it would encrypt, lay
	// something else over the device, or expect to make the filesystem.
	Refuses []Setting

	// NotReady is the class of errors with which its NodeStageVolume and
	// NodePublishVolume say "not yet"; nil where they use ErrUnavailable's.
	NotReady error
	// Expand says what to make of the wrapped driver's NodeExpandVolume.
	Expand ExpandPolicy
	// NeverGrows: it reports growth that does not happen.
	NeverGrows bool
	// WholeGiB: it has devices of whole GiB alone. Some drivers round up to that,
	// others down, and answer with what they were asked for all the same.
	WholeGiB bool

	// HandOver: the driver stages the device that its publish context names,
	// whichever that is, so that it can be given the mapping instead.
	HandOver bool
	// DeviceKey is the entry of the publish context that names the device.
	DeviceKey string
	// Alias: the driver takes device names made of letters and digits right
	// under /dev only, so the mapping gets such a name.
	Alias bool
}

// ExpandPolicy says whether the wrapped driver is called when a volume grows.
type ExpandPolicy int

// The policies. Whatever the wrapped driver answers, the device is asked for
// its size afterwards.
const (
	ExpandBestEffort ExpandPolicy = iota // called; what it answers does not matter
	ExpandDelegate                       // called, and has to succeed
	ExpandSkip                           // not called: it would do harm
)

// Setting is an entry of StorageClass parameters, of a volume or publish
// context, or of secrets. Keys compare without case, as the drivers compare them.
type Setting struct {
	Key   string
	Value string // "": any but an empty one and "false"
	Why   string // it is refused
}

// Why settings are refused.
const (
	ownEncryption = "the wrapped driver would encrypt the volume a second time, with a key that is none of ours"
	ownMkfs       = "the filesystem is made inside the encrypted volume, where the wrapped driver's option has no effect"
	dataCache     = "the wrapped driver would lay a cache over the device, which the encrypted volume would be written past"
	ownPartition  = "a volume is encrypted as a whole"
	networkShare  = "the wrapped driver would serve the volume as a network filesystem"
	nbd           = "the wrapped driver reattaches nbd devices by kubelet's paths alone, and would not find this one after a restart; use krbd alone"
)

// profiles are the drivers whose sources were read.
func profiles() map[string]Profile {
	mkfs := func(keys ...string) (all []Setting) {
		for _, key := range keys {
			all = append(all, Setting{Key: key, Why: ownMkfs})
		}
		return all
	}
	table := map[string]Profile{
		"ebs.csi.aws.com": {Known: true, WholeGiB: true, HandOver: true, DeviceKey: "devicePath", Alias: true,
			Refuses: append(mkfs("blockSize", "inodeSize", "bytesPerInode", "numberOfInodes", "ext4BigAlloc", "ext4ClusterSize", "ext4EncryptionSupport"),
				Setting{Key: "partition", Why: ownPartition})},
		"pd.csi.storage.gke.io": {Known: true, WholeGiB: true,
			Refuses: []Setting{{Key: "data-cache-size", Why: dataCache}, {Key: "data-cache-mode", Why: dataCache}}},
		"disk.csi.azure.com": {Known: true, WholeGiB: true, Expand: ExpandDelegate, // rescans the device
			Refuses: append(mkfs("fsType"), Setting{Key: "partition", Why: ownPartition})},
		"cinder.csi.openstack.org":  {Known: true, WholeGiB: true, Expand: ExpandSkip},    // takes the bind mount's source for a device
		"csi.vsphere.vmware.com":    {Known: true, Expand: ExpandDelegate, OneNode: true}, // rescans the device
		"dobs.csi.digitalocean.com": {Known: true, WholeGiB: true},                        // rounds down
		"csi.hetzner.cloud": {Known: true, WholeGiB: true, HandOver: true, DeviceKey: "devicePath",
			Refuses: append(mkfs("fsFormatOptions"), Setting{Key: "encryption-passphrase", Why: ownEncryption})},
		"linodebs.csi.linode.com": {Known: true, WholeGiB: true, HandOver: true, DeviceKey: "devicePath", // rounds down
			Refuses: []Setting{{Key: "linodebs.csi.linode.com/luks-encrypted", Why: ownEncryption}}},
		"csi.scaleway.com": {Known: true, Refuses: []Setting{{Key: "encrypted", Why: ownEncryption}}},
		"topolvm.io":       {Known: true, SingleWriter: true},
		"linstor.csi.linbit.com": {Known: true, CreateAsBlock: true, HandOver: true, DeviceKey: "linstor.csi.linbit.com/device-path",
			Refuses: append(mkfs("linstor.csi.linbit.com/fsOpts", "linstor.csi.linbit.com/mountOpts", "linstor.csi.linbit.com/postMountXfsOpts",
				"fsOpts", "mountOpts", "postMountXfsOpts"), // it takes them without the prefix too
				Setting{Key: "linstor.csi.linbit.com/fs-type", Value: "nfs", Why: networkShare})},
		"rbd.csi.ceph.com": {Known: true, WholeGiB: true, // but for images of less than one
			Refuses: append(mkfs("mkfsOptions"), Setting{Key: "encrypted", Why: ownEncryption},
				Setting{Key: "mounter", Value: "rbd-nbd", Why: nbd}, Setting{Key: "tryOtherMounters", Why: nbd})},
		"driver.longhorn.io": {Known: true, OneNode: true, NotReady: errdefs.ErrInvalid, // while the volume is being attached
			Refuses: append(mkfs("mkfsParams"), Setting{Key: "encrypted", Why: ownEncryption}, Setting{Key: "share", Why: networkShare})},
		"hostpath.csi.k8s.io": {Known: true, CreateAsBlock: true, NeverGrows: true},
		"loop.cryptcsi.io":    {Known: true, Expand: ExpandDelegate, HandOver: true, DeviceKey: "devicePath"},
		// It makes a filesystem on what it is asked to stage, whatever the capability says.
		"block.csi.vultr.com": {Refused: "it makes a filesystem on the disk of a block volume too"},
	}
	for _, name := range []string{"nfs.csi.k8s.io", "smb.csi.k8s.io", "efs.csi.aws.com", "filestore.csi.storage.gke.io",
		"file.csi.azure.com", "blob.csi.azure.com", "cephfs.csi.ceph.com", "nfs.csi.ceph.com",
		"csi.juicefs.com", "fsx.csi.aws.com", "s3.csi.aws.com", "gcsfuse.csi.storage.gke.io",
		"lustre.csi.storage.gke.io", "manila.csi.openstack.org", "nfs.manila.csi.openstack.org"} {
		table[name] = Profile{Refused: "it serves a network filesystem and has no block device to encrypt"}
	}
	return table
}

// ProfileOf returns the profile of a driver by its name, and whether there is
// one. Rook puts the name of its namespace before ceph's.
func ProfileOf(name string) (Profile, bool) {
	table := profiles()
	if p, ok := table[name]; ok {
		return p, true
	}
	if _, ceph, _ := strings.Cut(name, "."); strings.HasSuffix(ceph, ".csi.ceph.com") {
		p, ok := table[ceph]
		return p, ok
	}
	return Profile{}, false
}

// refuses returns why one of the settings cannot be used with encryption.
func (p Profile) refuses(where ...map[string]string) error {
	for _, settings := range where {
		for key, value := range settings {
			for _, s := range p.Refuses {
				if strings.EqualFold(key, s.Key) && s.matches(value) {
					return errdefs.Errorf(errdefs.ErrInvalid, "%s: %s", s.Key, s.Why)
				}
			}
		}
	}
	return nil
}

func (s Setting) matches(value string) bool {
	if s.Value != "" {
		return strings.EqualFold(value, s.Value)
	}
	return value != "" && !strings.EqualFold(value, "false")
}

// ready translates an error that means "not yet" where the profile knows one.
func (p Profile) ready(err error) error {
	if p.NotReady != nil && errors.Is(err, p.NotReady) {
		return errdefs.Errorf(errdefs.ErrUnavailable, "not ready yet: %v", err)
	}
	return err
}
