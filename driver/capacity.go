package driver

import (
	"sort"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// How dm-integrity divides a device with 4096-byte sectors: a superblock, a
// journal, then runs of 16 MiB of data behind their tags of 32 bytes a sector.
// Older kernels take 1/128 of the device for the journal, but not more than
// 64 MiB; newer ones take less.
const (
	sectorMax        = 4096    // a sector of ours: what is left of a device behind the last is of no use
	minimumData      = 4 << 20 // nodes format nothing smaller
	integrityRun     = 16 << 20
	integrityTags    = 128 << 10
	journalShare     = 127 // of the rest, where it takes 1/128 of the whole
	journalMax       = 64 << 20
	journalMin       = 256 << 10
	maxVolume        = int64(1) << 56
	integrityRounded = 1 << 20 // superblock and padding; and all in whole MiB
)

// What dm-clone's metadata take at the end of what is authenticated: twice a
// bit for each region, and some room. The regions of larger volumes are larger.
const (
	smallRegions, mediumRegions = 256 << 30, 1 << 40 // up to these lengths
	cloneRoom                   = 2 << 20
)

// CloneArea is the size of that area where length bytes are authenticated.
func CloneArea(length int64) int64 {
	region := int64(64 << 10)
	switch {
	case length <= smallRegions:
		region = 4 << 10
	case length <= mediumRegions:
		region = 16 << 10
	}
	regions := (length + region - 1) / region
	return (2*((regions+7)/8) + cloneRoom + 4095) / 4096 * 4096
}

// withCloneArea is what has to be authenticated so that size bytes are left. It
// takes as much as shorter ones do, so that more is never had for less.
func withCloneArea(size int64) int64 {
	area := func(length int64) int64 {
		most := CloneArea(length)
		for _, step := range []int64{smallRegions, mediumRegions} {
			if length > step {
				most = max(most, CloneArea(step))
			}
		}
		return most
	}
	length := size
	for length-area(length) < size {
		length = size + area(length)
	}
	return length
}

// deviceSize is the size of a device whose mapping has at least size bytes.
func deviceSize(size int64, spec dek.Spec) int64 {
	size = max((size+sectorMax-1)/sectorMax*sectorMax, minimumData)
	if spec.Integrity == dek.IntegrityNone {
		return size + headerArea
	}
	if spec.Layout == dek.LayoutClone {
		size = withCloneArea(size)
	}
	runs := (size + integrityRun - 1) / integrityRun
	data := size + runs*integrityTags
	journal := min(journalMax, max(journalMin, data/journalShare))
	total := headerArea + data + journal + integrityRounded
	return (total + integrityRounded - 1) / integrityRounded * integrityRounded
}

// usableSize is the inverse: what the mapping on a device has at least.
func usableSize(device int64, spec dek.Spec) int64 {
	if device >= maxVolume {
		return device
	}
	if spec.Integrity == dek.IntegrityNone {
		return max(0, device-headerArea) / sectorMax * sectorMax
	}
	n := sort.Search(int(max(0, device)/sectorMax)+1, func(n int) bool { return deviceSize(int64(n)*sectorMax, spec) > device })
	return max(0, int64(n)-1) * sectorMax
}

const gib = int64(1) << 30

// deviceSize is the size to ask the driver for, so that a mapping has size bytes.
func (p Profile) deviceSize(size int64, spec dek.Spec) int64 {
	size = deviceSize(size, spec)
	if p.WholeGiB {
		size = (size + gib - 1) / gib * gib
	}
	return size
}

// snapshotSize is the size that a volume has to be asked for with, so that it gets
// a device as large as a snapshot's. Where devices are whole GiB, many sizes lead
// to the same one. The largest of them that is whole GiB itself is told, if there
// is any: who made the source with that size can restore it with that size.
func (p Profile) snapshotSize(device int64, spec dek.Spec) int64 {
	size := usableSize(device, spec)
	if whole := size / gib * gib; whole > 0 && p.WholeGiB && p.deviceSize(whole, spec) == device {
		return whole
	}
	return size
}

// deviceRange is the range to ask the driver for. ErrInvalid where the range makes
// no sense.
func (p Profile) deviceRange(r *csi.CapacityRange, spec dek.Spec) (*csi.CapacityRange, error) {
	if r == nil {
		return nil, nil
	}
	required, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	if required < 0 || limit < 0 || required > maxVolume || limit > 0 && limit < required {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "capacity range from %d to %d bytes makes no sense", required, limit)
	}
	if required > 0 {
		required = p.deviceSize(required, spec)
	}
	if limit > 0 && limit <= maxVolume {
		limit = p.deviceSize(limit, spec)
	}
	return &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}, nil
}
