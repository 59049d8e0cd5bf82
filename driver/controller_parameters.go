package driver

import (
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// keyCipher is the parameter that names the cipher.
const keyCipher = KeyPrefix + "cipher"

// maxContext is what the CSI specification lets a map of strings have, keys
// and values together, in bytes.
const maxContext = 4 << 10

// readParameters takes what is ours out of a StorageClass's parameters: the
// integrity asked for, and the rest for the wrapped driver. ErrInvalid names the
// parameter that is not good: one that nobody acts on might be taken for
// protection that is not there.
func readParameters(parameters map[string]string) (integrity dek.Integrity, asked bool, rest map[string]string, err error) {
	invalid := func(format string, args ...any) (dek.Integrity, bool, map[string]string, error) {
		return "", false, nil, errdefs.Errorf(errdefs.ErrInvalid, "parameter "+format, args...)
	}
	for key, value := range parameters {
		switch {
		case key == keyIntegrity && value == string(dek.IntegrityHMAC):
			integrity, asked = dek.IntegrityHMAC, true
		case key == keyIntegrity && value == "none":
			asked = true
		case key == keyIntegrity:
			return invalid("%s: %q is not offered: %q or %q", key, value, dek.IntegrityHMAC, "none")
		case key == keyCipher && value == dek.CipherXTS:
		case key == keyCipher:
			return invalid("%s: %q is not offered: only %q", key, value, dek.CipherXTS)
		case key == KeyPrefix+"mkfs-options" || key == KeyPrefix+"discard":
			return invalid("%s is not offered by this version", key)
		case strings.HasPrefix(key, KeyPrefix):
			return invalid("%s is not known: there are %s and %s", key, keyIntegrity, keyCipher)
		case strings.Contains(strings.ToLower(key), "cryptcsi"):
			return invalid("%s is not ours, though it looks so: ours begin with %s", key, KeyPrefix)
		}
	}
	return integrity, asked, foreign(parameters), nil
}

// noneOfOurs refuses parameters of ours where none can be.
func noneOfOurs(what string, parameters map[string]string) error {
	for key := range ownEntries(parameters) {
		return errdefs.Errorf(errdefs.ErrInvalid, "%s %s: how a volume is encrypted is decided when it is made, by its StorageClass", what, key)
	}
	return nil
}

// wish is what a controller's request asks of a volume.
type wish struct {
	integrity    dek.Integrity
	parameters   map[string]string       // the wrapped driver's
	capabilities []*csi.VolumeCapability // as the wrapped driver gets them
}

// readWish reads parameters and capabilities together: integrity can be asked
// for in both. Its errors are ErrInvalid.
func (c *Controller) readWish(parameters map[string]string, capabilities []*csi.VolumeCapability) (wish, error) {
	integrity, asked, rest, err := readParameters(parameters)
	if err != nil {
		return wish{}, err
	}
	if err := c.wrapped.profile.refuses(rest); err != nil {
		return wish{}, err
	}
	w := wish{integrity: integrity, parameters: rest}
	wants := make([]intent, len(capabilities))
	for i, capability := range capabilities {
		want, byType, err := readCapability(capability)
		if err != nil {
			return wish{}, err
		}
		if byType && asked && integrity == dek.IntegrityNone {
			return wish{}, errdefs.Errorf(errdefs.ErrInvalid, "the filesystem's name %q asks for integrity, and %s says %q", capability.GetMount().GetFsType(), keyIntegrity, "none")
		}
		if byType {
			w.integrity = dek.IntegrityHMAC
		}
		wants[i] = want
		w.capabilities = append(w.capabilities, c.inner(capability, want))
	}
	for _, want := range wants {
		if err := checkSharing(want, w.integrity, c.wrapped.profile); err != nil {
			return wish{}, err
		}
	}
	return w, nil
}

// inner is a capability as the wrapped driver's controller gets it.
func (c *Controller) inner(capability *csi.VolumeCapability, want intent) *csi.VolumeCapability {
	inner := proto.CloneOf(capability)
	if m := inner.GetMount(); m != nil {
		m.FsType = want.FSType // without the suffix that asks for integrity
	}
	if c.wrapped.profile.CreateAsBlock {
		makeBlock(inner)
	}
	c.wrapped.profile.setMode(inner)
	return inner
}

// innerOf is inner for a request that may have no capability.
func (c *Controller) innerOf(capability *csi.VolumeCapability) (*csi.VolumeCapability, error) {
	if capability == nil {
		return nil, nil
	}
	want, _, err := readCapability(capability)
	if err != nil {
		return nil, err
	}
	return c.inner(capability, want), nil
}

// volumeContext is the wrapped driver's with our marks. ErrState where they do
// not fit in.
func volumeContext(theirs map[string]string, integrity dek.Integrity) (map[string]string, error) {
	all := foreign(theirs)
	if all == nil {
		all = map[string]string{}
	}
	all[keyEncrypted] = "1"
	if integrity != dek.IntegrityNone {
		all[keyIntegrity] = string(integrity)
	}
	size := 0
	for key, value := range all {
		size += len(key) + len(value)
	}
	if size > maxContext {
		return nil, errdefs.Errorf(errdefs.ErrState, "the wrapped driver's volume context leaves no room for the marks of an encrypted volume: %d bytes with them, at most %d are allowed", size, maxContext)
	}
	return all, nil
}

// multiNode says which access modes are for several nodes, and which of these
// for several of them writing.
func multiNode(mode string) (many, writers bool) {
	writing := []string{csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER.String(), csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER.String()}
	writers = slices.Contains(writing, mode)
	return writers || mode == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY.String(), writers
}
