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
	minimumData      = 4 << 20 // nodes format nothing smaller
	integrityRun     = 16 << 20
	integrityTags    = 128 << 10
	journalShare     = 127 // of the rest, where it takes 1/128 of the whole
	journalMax       = 64 << 20
	journalMin       = 256 << 10
	maxVolume        = int64(1) << 56
	integrityRounded = 1 << 20 // superblock and padding; and all in whole MiB
)

// deviceSize is the size of a device whose mapping has at least size bytes.
func deviceSize(size int64, integrity dek.Integrity) int64 {
	size = max(size, minimumData)
	if integrity == dek.IntegrityNone {
		return size + headerArea
	}
	runs := (size + integrityRun - 1) / integrityRun
	data := size + runs*integrityTags
	journal := min(journalMax, max(journalMin, data/journalShare))
	total := headerArea + data + journal + integrityRounded
	return (total + integrityRounded - 1) / integrityRounded * integrityRounded
}

// usableSize is the inverse: what the mapping on a device has at least.
func usableSize(device int64, integrity dek.Integrity) int64 {
	if device >= maxVolume {
		return device
	}
	if integrity == dek.IntegrityNone {
		return max(0, device-headerArea)
	}
	const step = 4096
	n := sort.Search(int(max(0, device)/step)+1, func(n int) bool { return deviceSize(int64(n)*step, integrity) > device })
	return max(0, int64(n)-1) * step
}

// deviceRange is the range to ask the wrapped driver for. ErrInvalid where the
// range makes no sense.
func deviceRange(r *csi.CapacityRange, integrity dek.Integrity) (*csi.CapacityRange, error) {
	if r == nil {
		return nil, nil
	}
	required, limit := r.GetRequiredBytes(), r.GetLimitBytes()
	if required < 0 || limit < 0 || required > maxVolume || limit > 0 && limit < required {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "capacity range from %d to %d bytes makes no sense", required, limit)
	}
	if required > 0 {
		required = deviceSize(required, integrity)
	}
	if limit > 0 && limit <= maxVolume {
		limit = deviceSize(limit, integrity)
	}
	return &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}, nil
}
