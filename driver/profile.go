package driver

// Profile says what is special about a wrapped driver. The zero value is right
// for a block driver that does what the CSI specification says.
type Profile struct {
	// Refused says why this driver cannot be wrapped; "" if it can.
	Refused string
	// Expand says what to make of the wrapped driver's NodeExpandVolume.
	Expand ExpandPolicy
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

// profileOf returns the profile of a driver by its name.
func profileOf(name string) Profile {
	const noBlock = "it serves a network filesystem and has no block device to encrypt"
	switch name {
	case "loop.cryptcsi.io":
		return Profile{Expand: ExpandDelegate, HandOver: true, DeviceKey: "devicePath"}
	case "nfs.csi.k8s.io", "smb.csi.k8s.io", "efs.csi.aws.com", "filestore.csi.storage.gke.io",
		"file.csi.azure.com", "blob.csi.azure.com", "cephfs.csi.ceph.com", "nfs.csi.ceph.com",
		"csi.juicefs.com", "fsx.csi.aws.com", "s3.csi.aws.com", "gcsfuse.csi.storage.gke.io",
		"lustre.csi.storage.gke.io", "manila.csi.openstack.org", "nfs.manila.csi.openstack.org":
		return Profile{Refused: noBlock}
	}
	return Profile{}
}
