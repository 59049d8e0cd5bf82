package cryptmapper

import (
	"errors"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// CloneArea returns, for an authenticated device of length bytes (what
// dm-integrity provides: the volume and the area together), the region size
// that dm-clone gets and how many bytes at the end are reserved for its
// metadata. The volume has the rest.
//
// dm-clone keeps one bit for each region, and while it writes them anew both
// states. Small regions make small writes cheap, because a write that does not
// cover its region copies the rest; above 256 GiB the bits would be too many.
func CloneArea(length int64) (region int, reserved int64) {
	switch {
	case length <= 256<<30:
		region = 4 << 10
	case length <= 1<<40:
		region = 16 << 10
	default:
		region = 64 << 10
	}
	regions := (length + int64(region) - 1) / int64(region)
	area := 2*((regions+7)/8) + 2<<20
	return region, (area + 4095) &^ 4095
}

// KernelHasClone returns nil where the kernel has what volumes need to be ready
// before every sector has its tag, after it was asked to load the modules; else
// the error says what is missing.
func KernelHasClone() error {
	for _, target := range []string{"linear", "zero", "clone"} {
		if err := dm.NeedTarget(target); err != nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
		}
	}
	return nil
}

// hydrate is Mapper.Hydrate.
func hydrate(name string, on bool) error {
	message := "disable_hydration"
	if on {
		message = "enable_hydration"
	}
	err := dm.Message(CloneName(name), message)
	if err != nil && !errors.Is(err, dm.ErrNotFound) {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	return nil
}
