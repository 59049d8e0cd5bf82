package cryptmapper

import (
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// maxName is the longest name of a mapping, in bytes: with the suffix of the
// layer below it the kernel still takes it.
const maxName = 100

// The layers of a volume with the layout dek.LayoutClone, below the mapping
// itself, which is linear. All but the first are there only while it hydrates.
// dm-integrity's is IntegrityName(CryptName(name)).
const layerPrefix = "_csi-"

// CryptName returns the name of the dm-crypt layer.
func CryptName(name string) string { return name + layerPrefix + "crypt" }

// MetaName returns the name of the area with dm-clone's metadata.
func MetaName(name string) string { return name + layerPrefix + "meta" }

// DataName returns the name of what dm-clone writes to.
func DataName(name string) string { return name + layerPrefix + "data" }

// ZeroName returns the name of what dm-clone reads what was never written from.
func ZeroName(name string) string { return name + layerPrefix + "zero" }

// CloneName returns the name of the dm-clone layer.
func CloneName(name string) string { return name + layerPrefix + "clone" }

// Layers returns the names of all layers that can be below a mapping, each
// before what it lies on.
func Layers(name string) []string {
	return []string{
		CloneName(name), DataName(name), MetaName(name), ZeroName(name),
		CryptName(name), IntegrityName(CryptName(name)), IntegrityName(name),
	}
}

// isLayer tells whether a name is that of a layer below a mapping.
func isLayer(name string) bool {
	return slices.ContainsFunc(Layers(""), func(suffix string) bool { return strings.HasSuffix(name, suffix) })
}

// CheckName says whether a mapping may be called that: 1 to 100 of the
// characters that no program has to escape, and no name that device-mapper or
// libcryptsetup use themselves. ErrInvalid if not. Names that start with Prefix
// are the driver's, which removes those that it does not know.
func CheckName(name string) error {
	other := func(c rune) bool {
		return !strings.ContainsRune("-_.+", c) && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z')
	}
	switch {
	case name == "" || len(name) > maxName:
		return errdefs.Errorf(errdefs.ErrInvalid, "mapping name %.100q: must have 1 to %d bytes", name, maxName)
	case strings.ContainsFunc(name, other) || name[0] == '.' || name[0] == '-':
		return errdefs.Errorf(errdefs.ErrInvalid, "mapping name %q: only letters, digits and -_.+ are allowed, and neither - nor . at the start", name)
	case isLayer(name):
		return errdefs.Errorf(errdefs.ErrInvalid, "mapping name %q: the layers below a mapping have such names", name)
	case name == "control" || name == Prefix || strings.HasPrefix(name, TemporaryPrefix):
		return errdefs.Errorf(errdefs.ErrInvalid, "mapping name %q: device-mapper or libcryptsetup uses such names itself", name)
	}
	return nil
}
