// Package driver is the CSI plugin itself: the Identity and Node services that
// stand in front of another block driver's and encrypt its volumes.
//
// NodeStageVolume borrows the raw device from the wrapped driver on private
// paths, gets the volume's DEK, maps the device, makes or checks the filesystem
// and mounts it; NodeUnstageVolume takes all that down in reverse. The raw
// device never reaches a pod. docs/design.md has the rules that protect data.
//
// Whatever state a crash leaves, the same call again finishes it and
// NodeUnstageVolume removes it: both look at the kernel's tables first, and the
// state file, written before anything else is done, explains the rest.
package driver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/grpcproxy"
)

// KeyPrefix begins the entries of a volume context that are ours. They are not
// shown to the wrapped driver.
const KeyPrefix = "cryptcsi.io/"

// The entries that there are.
const (
	keyIntegrity = KeyPrefix + "integrity" // asks for authenticated sectors
	keyEncrypted = KeyPrefix + "encrypted" // the controller's mark, "1"
	keyMkfs      = KeyPrefix + "mkfs-options"

	keyPerformance = KeyPrefix + "performance"
)

// MappingPrefix begins the name of every mapping of ours.
const MappingPrefix = "cryptcsi-"

// IntegrityPolicy is the node's policy about authenticated sectors.
type IntegrityPolicy string

// The policies. A volume may ask for more than the policy, never for less.
const (
	IntegrityOff      IntegrityPolicy = "off"      // not offered: a volume that asks for it is refused
	IntegrityDefault  IntegrityPolicy = "default"  // as each volume asks
	IntegrityRequired IntegrityPolicy = "required" // a volume without it is refused
)

// Who mounts the filesystem.
const (
	StageWithProxy   = "proxy"
	StageWithWrapped = "wrapped"
)

// defaultPatience is how long a device may take to show its size.
const defaultPatience = 10 * time.Second

// Config is what a Driver works with. Wrapped, Keys, Mapper and NodeName are
// required; what says so in its comment has a default.
type Config struct {
	DriverName string // "": the wrapped driver's own
	NodeName   string // stands in the claim before a format
	KubeletDir string // "": /var/lib/kubelet; must be the same path for the wrapped driver

	Wrapped grpc.ClientConnInterface
	Profile *Profile // nil: the one of the wrapped driver's name

	Keys    Keys
	Creator Creator // nil: a node never creates DEKs
	Mapper  Mapper
	// Hydration is needed for volumes of layout dek.LayoutClone; see
	// Driver.Hydrate.
	Hydration Hydration
	Hydrating int // how many volumes hydrate at once; 0: 2
	// Resume, where not nil, lets I/O to a mapping go on that something left
	// suspended; see Driver.Reconcile.
	Resume func(ctx context.Context, mapping string) error
	// Constellation, where not nil, makes this a driver for volumes that
	// Constellation made, and for no others; Keys is then a client of its
	// key service, and there is no Creator.
	Constellation Constellation
	// Plaintext, where not nil, is the volumes that are passed through as they
	// are, for trusted configuration says that they are not encrypted. It goes
	// with neither a Creator nor Constellation nor IntegrityRequired.
	Plaintext Plaintext

	// What the driver asks of the kernel; nil: of the real one.
	Filesystems Filesystems
	Mounts      Mounts
	Devices     Devices

	StageWith string          // StageWithProxy ("") or StageWithWrapped
	Integrity IntegrityPolicy // "": IntegrityDefault
	Spec      dek.Spec        // of volumes made with Creator; zero: aes-xts-plain64
	Layout    string          // theirs, if they have integrity: dek.LayoutClone or ""
	// TolerateUngrown: NodeExpandVolume succeeds though the device is smaller
	// than asked for, with what there is.
	TolerateUngrown bool

	Version  string            // GetPluginInfo's
	Manifest map[string]string // GetPluginInfo's

	// What is measured, where not nil: the steps of each NodeStageVolume, and
	// each attempt to finish a hydrated volume, with the time since it was seen.
	ObserveStep   func(step string, took time.Duration)
	ObserveFinish func(took time.Duration, err error)

	// Failures, where not nil, calls seen with the name of a mapping whenever the
	// kernel reports a sector of it that is not authentic, until ctx ends; see
	// Driver.WatchIntegrity. ObserveFailure counts those of this driver's volumes.
	Failures       func(ctx context.Context, seen func(mapping string)) error
	ObserveFailure func()

	Events Events // nil: nobody is told

	Logger   *slog.Logger           // nil: no log
	BootID   func() (string, error) // nil: the kernel's
	AliasDir string                 // "": /dev
	Patience time.Duration          // 0: 10 s
}

// Driver serves CSI. It is safe for concurrent use; two calls for one volume
// at a time are refused with ErrConflict. Its methods' errors are of errdefs'
// classes.
type Driver struct {
	cfg     Config
	log     *slog.Logger
	name    string
	base    string // of the private directories
	boot    string
	wrapped *wrapped
	locks   locks
	// writeState runs every change of a state file.
	writeState  func(func() error) error
	hydrator    *hydrator // nil without Config.Hydration
	teller      *teller
	initialiser *initialiser
}

// driverName is what the CSI specification allows; it is a file name too.
var driverName = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9.]{0,61}[a-zA-Z0-9])?$`)

// New asks the wrapped driver who it is, waiting until it answers or ctx ends,
// and returns a Driver in front of it. ErrInvalid where the configuration
// cannot work.
func New(ctx context.Context, cfg Config) (*Driver, error) {
	setDefaults(&cfg)
	if err := checkConfig(cfg); err != nil {
		return nil, err
	}
	w, err := newWrapped(ctx, cfg.Wrapped, cfg.Profile)
	if err != nil {
		return nil, err
	}
	if cfg.StageWith == StageWithWrapped && !w.profile.HandOver {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the wrapped driver %s is not known to stage the device that it is told: only %q is possible", w.name, StageWithProxy)
	}
	name, err := w.nameOr(cfg.DriverName)
	if err != nil {
		return nil, err
	}
	cfg.TolerateUngrown = cfg.TolerateUngrown || w.profile.NeverGrows
	boot, err := cfg.BootID()
	if err != nil {
		return nil, fmt.Errorf("reading the boot ID: %w", err)
	}
	d := &Driver{
		cfg: cfg, log: cfg.Logger, name: name, boot: boot, wrapped: w,
		base:       privateDir(realDir(cfg.KubeletDir), name),
		writeState: func(do func() error) error { return do() },
		teller:     &teller{}, initialiser: &initialiser{},
	}
	if cfg.Hydration != nil {
		d.hydrator = newHydrator(d)
	}
	return d, nil
}

// privateDir is where a driver keeps what belongs to it. It lies in the one
// tree that all block drivers can see.
func privateDir(kubelet, driver string) string {
	return filepath.Join(kubelet, "plugins/kubernetes.io/csi", driver, "cryptcsi")
}

func setDefaults(cfg *Config) {
	linux := Linux{}
	if cfg.Filesystems == nil {
		cfg.Filesystems = linux
	}
	if cfg.Mounts == nil {
		cfg.Mounts = linux
	}
	if cfg.Devices == nil {
		cfg.Devices = linux
	}
	if cfg.BootID == nil {
		cfg.BootID = linux.BootID
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Spec.Cipher == "" {
		cfg.Spec.Cipher = dek.CipherXTS
	}
	if cfg.Integrity == "" {
		cfg.Integrity = IntegrityDefault
	}
	if cfg.Integrity == IntegrityRequired {
		cfg.Spec.Integrity = dek.IntegrityHMAC
	}
	setString(&cfg.KubeletDir, "/var/lib/kubelet")
	setString(&cfg.StageWith, StageWithProxy)
	setString(&cfg.AliasDir, "/dev")
	if cfg.Hydrating == 0 {
		cfg.Hydrating = defaultHydrating
	}
	if cfg.Patience == 0 {
		cfg.Patience = defaultPatience
	}
}

func setString(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

func checkConfig(cfg Config) error {
	invalid := func(format string, args ...any) error { return errdefs.Errorf(errdefs.ErrInvalid, format, args...) }
	switch {
	case cfg.Wrapped == nil || cfg.Keys == nil || cfg.Mapper == nil:
		return invalid("a driver needs a wrapped driver, keys and a mapper")
	case cfg.Constellation != nil && cfg.Creator != nil:
		return invalid("Constellation's key service makes no DEKs, and its volumes are never formatted: --create-keys cannot be")
	case cfg.Hydrating < 0:
		return invalid("%d volumes cannot hydrate at once", cfg.Hydrating)
	case cfg.Plaintext != nil && cfg.Creator != nil:
		return invalid("a node that creates keys for volumes without one passes none through: --create-keys excludes --plaintext-volumes=pass-through")
	case cfg.Plaintext != nil && cfg.Constellation != nil:
		return invalid("a driver for Constellation's volumes has no others: --plaintext-volumes=pass-through cannot be")
	case cfg.Plaintext != nil && cfg.Integrity == IntegrityRequired:
		return invalid("volumes that are passed through have no integrity: --integrity=required excludes --plaintext-volumes=pass-through")
	case cfg.NodeName == "":
		return invalid("the node's name is not given: without it two nodes could format one volume")
	case !filepath.IsAbs(cfg.KubeletDir):
		return invalid("kubelet's directory %q is not an absolute path", cfg.KubeletDir)
	case cfg.StageWith != StageWithProxy && cfg.StageWith != StageWithWrapped:
		return invalid("stage with %q: must be %q or %q", cfg.StageWith, StageWithProxy, StageWithWrapped)
	case cfg.Integrity != IntegrityOff && cfg.Integrity != IntegrityDefault && cfg.Integrity != IntegrityRequired:
		return invalid("integrity policy %q: must be %q, %q or %q", cfg.Integrity, IntegrityOff, IntegrityDefault, IntegrityRequired)
	case cfg.Integrity == IntegrityOff && cfg.Spec.Integrity != dek.IntegrityNone:
		return invalid("new volumes cannot have integrity %s where the policy is %q", cfg.Spec.Integrity, IntegrityOff)
	}
	if err := cfg.Spec.Validate(); err != nil {
		return invalid("spec of new volumes: %w", err)
	}
	if cfg.Layout != "" && cfg.Layout != dek.LayoutClone {
		return invalid("layout %q of new volumes is not known", cfg.Layout)
	}
	return nil
}

// Name returns the driver's name.
func (d *Driver) Name() string { return d.name }

// Register adds the services that the driver answers itself.
func (d *Driver) Register(s grpc.ServiceRegistrar) {
	csi.RegisterIdentityServer(s, identity{name: d.name, version: d.cfg.Version, manifest: d.cfg.Manifest, wrapped: d.wrapped})
	csi.RegisterNodeServer(s, node{Driver: d})
}

// ServerOptions make the server forward what the driver does not answer itself
// to the wrapped driver. Of CSI's services that is Controller alone: Node methods
// that we do not know may be about the raw device, group snapshots would have no
// record to be restored by, and snapshot metadata tells where blocks of the disk
// have changed and not of the volume.
func (d *Driver) ServerOptions() []grpc.ServerOption {
	return grpcproxy.ServerOptions(d.cfg.Wrapped, func(method string) bool {
		service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
		return !strings.HasPrefix(service, "csi.") || service == csi.Controller_ServiceDesc.ServiceName
	})
}

// MappingName is the name of a volume's mapping. It depends on the two names
// alone and looks like no volume ID, because some drivers close mappings that
// are named like their volumes.
func MappingName(driverName, volumeID string) string {
	return MappingPrefix + hash(driverName + "/" + volumeID)[:32]
}

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// volume is one volume's names and private paths.
type volume struct {
	id      string
	dek     dek.ID
	mapping string
	dir     string
}

func (v volume) stageDir() string  { return filepath.Join(v.dir, "stage") }
func (v volume) device() string    { return filepath.Join(v.dir, "dev") }
func (v volume) stateFile() string { return filepath.Join(v.dir, "volume.json") }

// volume checks a volume ID.
func (d *Driver) volume(id string) (volume, error) {
	if id == "" {
		return volume{}, errdefs.Errorf(errdefs.ErrInvalid, "the volume ID is missing")
	}
	key, err := dek.VolumeID(d.name, id)
	if err != nil {
		return volume{}, errdefs.Errorf(errdefs.ErrInvalid, "volume ID: %w", err)
	}
	return volume{id: id, dek: key, mapping: MappingName(d.name, id), dir: filepath.Join(d.base, hash(id))}, nil
}

// mapping returns the volume's mapping as the kernel shows it.
func (d *Driver) mapping(v volume) (m Mapping, open bool, err error) {
	all, err := d.cfg.Mapper.List()
	if err != nil {
		return Mapping{}, false, fmt.Errorf("listing the mappings: %w", err)
	}
	for _, m := range all {
		if m.Name == v.mapping {
			return m, true, nil
		}
	}
	return Mapping{}, false, nil
}

// absolute checks a path of a request and makes it comparable with the mount
// table's.
func absolute(what, path string) (string, error) {
	if path == "" {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the %s is missing", what)
	}
	if !filepath.IsAbs(path) {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the %s %q is not absolute", what, path)
	}
	return canonical(path), nil
}

// canonical resolves symbolic links in the directories that lead to path. The
// last element is what gets mounted and is left alone.
func canonical(path string) string {
	path = filepath.Clean(path)
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return path // nothing there yet; it is compared as it is
	}
	return filepath.Join(parent, filepath.Base(path))
}

// realDir resolves symbolic links in dir, its last element included.
func realDir(dir string) string { return filepath.Dir(canonical(filepath.Join(dir, "x"))) }

// at returns the mounts at target, lowest first.
func at(mounts []Mount, target string) []Mount {
	var layers []Mount
	for _, m := range mounts {
		if m.Target == target {
			layers = append(layers, m)
		}
	}
	return layers
}

// anyWithin tells whether something is mounted at dir or below it.
func anyWithin(mounts []Mount, dir string) bool {
	return slices.ContainsFunc(mounts, func(m Mount) bool { return within(m.Target, dir) })
}

// within tells whether path is dir or below it.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// maxLayers bounds how many mounts at one place are taken away.
const maxLayers = 64

// unmountAll takes away every layer at target, however many a wrapped driver
// has stacked there, and makes sure that nothing is left.
func (d *Driver) unmountAll(ctx context.Context, target string) error {
	for range maxLayers {
		mounts, err := d.cfg.Mounts.List()
		if err != nil {
			return err
		}
		if len(at(mounts, target)) == 0 {
			return nil
		}
		if err := d.cfg.Mounts.Unmount(ctx, target); err != nil {
			return errdefs.Errorf(errdefs.ErrUnavailable, "unmounting %s: %w", target, err)
		}
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s is still mounted after %d unmounts", target, maxLayers)
}

// until asks cond again and again, until it holds or fails, or patience ends.
func (d *Driver) until(ctx context.Context, cond func() (bool, error)) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Patience)
	defer cancel()
	tick := time.NewTicker(min(d.cfg.Patience/10, 100*time.Millisecond))
	defer tick.Stop()
	for {
		if ok, err := cond(); ok || err != nil {
			return ok, err
		}
		select {
		case <-ctx.Done():
			return false, nil
		case <-tick.C:
		}
	}
}

// removePath removes a file or an empty directory, if it is there.
func removePath(path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
