package driver

// WrapStateWrites lets a test stand around every change of a state file.
func (d *Driver) WrapStateWrites(wrap func(do func() error) error) { d.writeState = wrap }

// ReadSuperblock, ReadMount and SuperArea are for tests of formats.
var (
	ReadSuperblock = readSuperblock
	ReadMount      = readMount
)

const SuperArea = superArea

// For tests of the controller.
var (
	DeviceSize = deviceSize
	UsableSize = usableSize
	Profiles   = profiles
)
