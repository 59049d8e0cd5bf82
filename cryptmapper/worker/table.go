package worker

import (
	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// reload gives a mapping, which may be in use, another table: load puts it beside
// the one that it has.
func (o *operation) reload(name string, load func() error) error {
	if err := load(); err != nil {
		return err
	}
	o.step("another table loaded")
	if err := swap(name); err != nil {
		return err
	}
	o.step("table changed")
	return nil
}

// swap makes the table that was loaded the active one, or lets the I/O of a
// suspended mapping go on. The kernel suspends and resumes within the one call,
// so that nothing can kill us in between; and it does not try to make room by
// writing to the volume whose I/O waits. A table that does not fit is gone when
// it was tried once: then the mapping goes on as it was.
func swap(name string) error {
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return unavailable(err)
	}
	err := dm.Resume(name)
	if err == nil {
		return nil
	}
	if info, e := dm.Status(name); e == nil && info.Suspended {
		_ = dm.Resume(name)
	}
	return unavailable(err)
}

// unavailable gives what the device-mapper says a class, where it has none yet.
func unavailable(err error) error {
	if err == nil || errdefs.Class(err) != nil {
		return err
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
}
