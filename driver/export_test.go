package driver

import "context"

// WrapStateWrites lets a test stand around every change of a state file.
func (d *Driver) WrapStateWrites(wrap func(do func() error) error) { d.writeState = wrap }

// Finish does what the hydrator does with a volume that is hydrated.
func (d *Driver) Finish(ctx context.Context, volumeID string) error {
	v, err := d.volume(volumeID)
	if err != nil {
		return err
	}
	return d.finish(ctx, v)
}

// ReadSuperblock, ReadMount and SuperArea are for tests of formats.
var (
	ReadSuperblock = readSuperblock
	ReadMount      = readMount
)

// Run is for the test of how programs end.
var Run = run

const SuperArea = superArea

// ReadMkfsOptions is for the test that every flag that is offered works.
var ReadMkfsOptions = readMkfsOptions

// MkfsFlags returns what can be set for a filesystem: flags, and for lists
// "flag name".
func MkfsFlags(fstype string) []string {
	var all []string
	for name, flag := range mkfsFlags[fstype] {
		if flag.list == nil {
			all = append(all, name)
		}
		for item := range flag.list {
			all = append(all, name+" "+item)
		}
	}
	return all
}

// For tests of the controller.
var (
	DeviceSize = deviceSize
	UsableSize = usableSize
	Profiles   = profiles
)
