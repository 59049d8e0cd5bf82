package driver

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Parameters that are not entries of a volume context too.
const (
	keyCipher  = KeyPrefix + "cipher"
	keyInit    = KeyPrefix + "integrity-init" // InitClone or InitWipe
	keyDiscard = KeyPrefix + "discard"
	keyMode    = KeyPrefix + "integrity-mode" // modeJournal or dek.ModeDirect
	keyKEK     = KeyPrefix + "kek"            // a name of ControllerConfig.KEKs
)

// keyFSType is external-provisioner's.
const keyFSType = "csi.storage.k8s.io/fstype"

// modeJournal is the value that asks for what no mode asks for too.
const modeJournal = "journal"

// noIntegrity is the value that asks for none.
const noIntegrity = "none"

// maxContext is what the CSI specification lets a map of strings have, keys
// and values together, in bytes.
const maxContext = 4 << 10

// How the sectors of a new volume with integrity get their tags.
const (
	InitClone = "clone" // while it is in use already, see dek.LayoutClone
	InitWipe  = "wipe"  // written in full before it is first used
)

// LayoutOf returns the layout that one of these asks for.
func LayoutOf(init string) (layout string, known bool) {
	if init == InitClone {
		return dek.LayoutClone, true
	}
	return "", init == InitWipe
}

// class is what a StorageClass's parameters say.
type class struct {
	integrity, init string // "" where they do not say
	mode            string // likewise
	discard         bool
	kek             string // "": the default one
	mkfs            string
	performance     string
	rest            map[string]string // for the wrapped driver
}

// ownParameters are those that are ours; each takes its value into a class, or
// says what it may be.
var ownParameters = map[string]func(c *class, value string) error{
	keyIntegrity: func(c *class, value string) error {
		c.integrity = value
		return among(value, string(dek.IntegrityHMAC), noIntegrity)
	},
	keyInit: func(c *class, value string) error {
		c.init = value
		return among(value, InitClone, InitWipe)
	},
	keyMode: func(c *class, value string) error {
		c.mode = value
		return among(value, modeJournal, dek.ModeDirect)
	},
	keyCipher: func(_ *class, value string) error { return among(value, dek.CipherXTS) },
	keyDiscard: func(c *class, value string) error {
		c.discard = value == "true"
		return among(value, "true", "false")
	},
	keyKEK: func(c *class, value string) error { // that there is one is checked with the spec
		c.kek = value
		return dek.CheckKEK(value)
	},
	keyMkfs: func(c *class, value string) error { // checked when the filesystem is known
		c.mkfs = value
		return nil
	},
	keyPerformance: func(c *class, value string) (err error) {
		c.performance, err = readPerformance(value)
		return err
	},
}

// performanceOptions are dm-crypt's that a volume may ask for: on which CPUs and
// in which contexts it works.
func performanceOptions() []string {
	return []string{"no_read_workqueue", "no_write_workqueue", "same_cpu_crypt", "submit_from_crypt_cpus"}
}

// readPerformance returns a list of them, sorted and each once.
func readPerformance(value string) (string, error) {
	if value == "" {
		return "", nil
	}
	asked := strings.Split(value, ",")
	for _, option := range asked {
		if option == "high_priority" {
			return "", errdefs.Errorf(errdefs.ErrInvalid, "performance option high_priority is not offered: it needs Linux 6.10 and libcryptsetup 2.8, and this version is built with an older one")
		}
		if !slices.Contains(performanceOptions(), option) {
			return "", errdefs.Errorf(errdefs.ErrInvalid, "performance option %q is not offered: there are %s, with commas in between", option, strings.Join(performanceOptions(), ", "))
		}
	}
	slices.Sort(asked)
	return strings.Join(slices.Compact(asked), ","), nil
}

func among(value string, allowed ...string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	return fmt.Errorf("%q is not offered: %s", value, strings.ReplaceAll(strings.Trim(fmt.Sprintf("%q", allowed), "[]"), " ", " or "))
}

// readParameters takes what is ours out of a StorageClass's parameters.
// ErrInvalid names the parameter that is not good: one that nobody acts on
// might be taken for protection that is not there.
func readParameters(all map[string]string) (class, error) {
	c := class{rest: foreign(all)}
	invalid := func(format string, args ...any) (class, error) {
		return class{}, errdefs.Errorf(errdefs.ErrInvalid, "parameter "+format, args...)
	}
	for key, value := range all {
		read := ownParameters[key]
		switch {
		case read != nil:
			if err := read(&c, value); err != nil {
				return invalid("%s: %w", key, err)
			}
		case strings.HasPrefix(key, KeyPrefix):
			return invalid("%s is not known: there are %s", key, strings.Join(slices.Sorted(maps.Keys(ownParameters)), ", "))
		}
	}
	if err := checkSpelling(c.rest); err != nil {
		return invalid("%w", err)
	}
	return c, nil
}

// checkSpelling refuses what was to be one of our keys, among those that are not.
func checkSpelling(foreign map[string]string) error {
	for key := range foreign {
		if strings.Contains(strings.ToLower(key), "cryptcsi") {
			return errdefs.Errorf(errdefs.ErrInvalid, "%s is not ours, though it looks so: ours begin with %s", key, KeyPrefix)
		}
	}
	return nil
}

// spec is what a volume of that class has to be, without its name; byType says
// that the filesystem's name asks for integrity.
func (c class) spec(byType bool) (dek.Spec, error) {
	invalid := func(format string, args ...any) (dek.Spec, error) {
		return dek.Spec{}, errdefs.Errorf(errdefs.ErrInvalid, "parameter "+format, args...)
	}
	integrity := c.integrity == string(dek.IntegrityHMAC) || byType
	spec := dek.Spec{Cipher: dek.CipherXTS, Discard: c.discard, KEK: c.kek}
	switch {
	case !integrity && c.init != "":
		return invalid("%s says how a volume with integrity is initialised, and this one has none: set %s to %q", keyInit, keyIntegrity, dek.IntegrityHMAC)
	case !integrity && c.mode != "":
		return invalid("%s says how a volume with integrity is written, and this one has none: set %s to %q", keyMode, keyIntegrity, dek.IntegrityHMAC)
	case !integrity:
		return spec, nil
	case c.mode == dek.ModeDirect && c.init == InitClone:
		return invalid("%s: %q goes with %s %q only: dm-clone's metadata is written all the time, and a crash could leave it unreadable, and the volume with it", keyMode, c.mode, keyInit, InitWipe)
	case c.discard:
		return invalid("%s: a volume with integrity cannot discard: a sector that was discarded has no tag and would be unreadable; set it to \"false\", or %s to %q", keyDiscard, keyIntegrity, noIntegrity)
	}
	spec.Integrity = dek.IntegrityHMAC
	switch {
	case c.mode == dek.ModeDirect:
		spec.IntegrityMode = dek.ModeDirect
	case c.init != InitWipe:
		spec.Layout = dek.LayoutClone
	}
	return spec, nil
}

// mark adds to marks what a volume that is used as want needs, where that can
// be done. A block volume has no filesystem to be made.
func (c class) mark(marks map[string]string, want intent) error {
	if c.performance != "" {
		marks[keyPerformance] = c.performance
	}
	if c.mkfs == "" || want.AccessType != accessMount {
		return nil
	}
	if _, err := readMkfsOptions(want.newFSType(), c.mkfs); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "parameter %w", err)
	}
	marks[keyMkfs] = c.mkfs
	return nil
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
	spec         dek.Spec                // without a name
	marks        map[string]string       // for the volume context, what the node needs and the spec does not say
	parameters   map[string]string       // the wrapped driver's
	capabilities []*csi.VolumeCapability // as the wrapped driver gets them
}

// readWish reads parameters and capabilities together: integrity can be asked
// for in both. Its errors are ErrInvalid.
func (c *Controller) readWish(parameters map[string]string, capabilities []*csi.VolumeCapability) (wish, error) {
	class, err := readParameters(parameters)
	if err != nil {
		return wish{}, err
	}
	if err := c.wrapped.profile.refuses(class.rest); err != nil {
		return wish{}, err
	}
	w := wish{parameters: class.rest, marks: map[string]string{}}
	wants := make([]intent, len(capabilities))
	integrity := false
	for i, capability := range capabilities {
		want, byType, err := readCapability(capability)
		if err != nil {
			return wish{}, err
		}
		if byType && class.integrity == noIntegrity {
			return wish{}, errdefs.Errorf(errdefs.ErrInvalid, "the filesystem's name %q asks for integrity, and %s says %q", capability.GetMount().GetFsType(), keyIntegrity, noIntegrity)
		}
		integrity = integrity || byType
		if err := class.mark(w.marks, want); err != nil {
			return wish{}, err
		}
		wants[i] = want
		w.capabilities = append(w.capabilities, c.inner(capability, want))
	}
	if w.spec, err = class.spec(integrity); err != nil {
		return wish{}, err
	}
	if err := c.checkKEK(w.spec.KEK); err != nil {
		return wish{}, errdefs.Errorf(errdefs.ErrInvalid, "parameter %s: %w", keyKEK, err)
	}
	for _, want := range wants {
		if err := checkSharing(want, w.spec.Integrity, c.wrapped.profile); err != nil {
			return wish{}, err
		}
	}
	return w, nil
}

// askedByClass is a StorageClass's parameters as external-provisioner asks with
// them for capacity, where the filesystem that volumes will have is still among
// them: one whose name asks for integrity takes the room that integrity takes.
func askedByClass(parameters map[string]string) map[string]string {
	_, integrity := readFSType(parameters[keyFSType])
	if _, said := parameters[keyIntegrity]; said || !integrity {
		return parameters
	}
	all := maps.Clone(parameters)
	all[keyIntegrity] = string(dek.IntegrityHMAC)
	return all
}

// byMode separates capabilities that have an access mode from those without.
func byMode(all []*csi.VolumeCapability) (with, without []*csi.VolumeCapability) {
	for _, capability := range all {
		if capability.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_UNKNOWN {
			without = append(without, capability)
		} else {
			with = append(with, capability)
		}
	}
	return with, without
}

// checkKEK refuses the name of a KEK that is not configured, before something is
// made that could have no key.
func (c *Controller) checkKEK(name string) error {
	switch {
	case name == "" || slices.Contains(c.cfg.KEKs, name):
		return nil
	case len(c.cfg.KEKs) == 0:
		return fmt.Errorf("there is no KEK %q: this controller was given no names of KEKs", name)
	}
	return fmt.Errorf("there is no KEK %q: this controller was given %s", name, strings.Join(c.cfg.KEKs, ", "))
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
func volumeContext(theirs, marks map[string]string, integrity dek.Integrity) (map[string]string, error) {
	all := foreign(theirs)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, marks)
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
