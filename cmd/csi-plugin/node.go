package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/kms/all"
	"github.com/cryptcsi/cryptcsi/secret"
)

// nodeFlags is the configuration of `csi-plugin node`.
type nodeFlags struct {
	frontFlags
	nodeName, kubeletDir string
	stageWith, integrity string
	tolerateUngrown      bool
	worker               *string
	warmWorkers          int
	headerBackup         bool
	registrationPath     string
	integrityInit        string
	hydrating            int
	kubernetes           kubernetesFlags
}

func parseNodeFlags(args []string, stderr io.Writer) (*nodeFlags, error) {
	f := &nodeFlags{}
	fs := newFlags("node", stderr)
	f.frontFlags.add(fs)
	f.keys.add(fs)
	hostname, _ := os.Hostname()
	fs.StringVar(&f.nodeName, "node-name", cmp.Or(os.Getenv("NODE_NAME"), hostname), "name of this node in claims; default from $NODE_NAME, then the host name")
	fs.StringVar(&f.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "kubelet's directory, the same path here and for the wrapped driver")
	fs.StringVar(&f.stageWith, "stage-with", driver.StageWithProxy, `who makes and mounts the filesystem: "proxy", or "wrapped" to hand the mapped device over to the wrapped driver`)
	fs.StringVar(&f.integrity, "integrity", string(driver.IntegrityDefault), `authenticated sectors: "off" refuses volumes that ask for them, "default" does as the volume asks, "required" refuses volumes without`)
	fs.StringVar(&f.integrityInit, "integrity-init", driver.InitClone, `with --create-keys, how new volumes with integrity are initialised: "clone" while they are in use, "wipe" in full before`)
	fs.IntVar(&f.hydrating, "hydrating-volumes", 2, "how many volumes are initialised in the background at once; the others wait, and can be used meanwhile")
	fs.BoolVar(&f.tolerateUngrown, "tolerate-ungrown", false, "let NodeExpandVolume succeed though the wrapped driver has not grown its device")
	fs.BoolVar(&f.headerBackup, "header-backup", false, "keep in each volume's record, under its DEK, what restore-header makes a destroyed header from; volumes without one get it when they are next staged, and one that is there is kept up to date without this too")
	fs.StringVar(&f.registrationPath, "kubelet-registration-path", "", "path of --endpoint's socket on the node: the plugin registers itself with kubelet, in --kubelet-dir/plugins_registry; empty leaves that to node-driver-registrar")
	f.kubernetes.add(fs)
	f.worker = workerFlag(fs)
	fs.IntVar(&f.warmWorkers, "warm-workers", 2, "crypt-workers kept started ahead")
	if err := f.parse(fs, args); err != nil {
		return nil, err
	}
	if _, known := driver.LayoutOf(f.integrityInit); !known {
		return nil, usageError(fmt.Sprintf("node: --integrity-init %q: must be %q or %q", f.integrityInit, driver.InitClone, driver.InitWipe))
	}
	if f.hydrating < 1 || f.hydrating > 64 {
		return nil, usageError(fmt.Sprintf("node: --hydrating-volumes %d: must be 1 to 64", f.hydrating))
	}
	if f.keys.create && f.plaintext.mode == plaintextPass {
		return nil, usageError("node: --create-keys excludes --plaintext-volumes=pass-through: a volume without a key would get one, or be unencrypted")
	}
	if f.warmWorkers < 0 || f.warmWorkers > 64 {
		return nil, usageError(fmt.Sprintf("node: --warm-workers %d: must be 0 to 64", f.warmWorkers))
	}
	if f.registrationPath != "" && !filepath.IsAbs(f.registrationPath) {
		return nil, usageError(fmt.Sprintf("node: --kubelet-registration-path %q: must be an absolute path", f.registrationPath))
	}
	return f, f.kubernetes.check(f.registrationPath != "")
}

// node serves the node side of CSI until ctx ends.
func node(ctx context.Context, args []string, stderr io.Writer) error {
	f, err := parseNodeFlags(args, stderr)
	if err != nil {
		return err
	}
	log, err := f.log.Logger(stderr)
	if err != nil {
		return usageError("node: " + err.Error())
	}
	if f.file.Check {
		return f.tryKeys(ctx, log, stderr)
	}
	library, err := libcryptsetup(ctx, *f.worker)
	if err != nil {
		return err
	}
	log.Info("csi-plugin node starts", "version", version, "commit", commit, "libcryptsetup", library, "kms", strings.Join(all.Usable(), ","))
	cluster, err := f.kubernetes.open(f.nodeName, log)
	if err != nil {
		return err
	}
	if err := checkSystem(f.integrity == string(driver.IntegrityRequired), log); err != nil {
		return cluster.unfit(ctx, err)
	}
	var m *measured
	cm := cryptmapper.New(cryptmapper.Options{Worker: []string{*f.worker}, Warm: f.warmWorkers, HeaderBackup: f.headerBackup,
		Observe:       func(op cryptmapper.Op, name string, err error) { m.operation(op, name, err) },
		ObserveHeader: func(took time.Duration) { m.stageStep("header", took) }})
	defer cm.Shutdown()
	m = newMeasured(library, cm.List, cm.Stuck)
	keyring, closeKeys, err := f.keys.open(ctx, log, keyOptions{kms: m.KMS, store: m.Store, service: m.keyCall, state: m.watchKeyService})
	if err != nil {
		return err
	}
	defer closeKeys()
	conn, err := dial(f.wrapped)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	d, err := newDriver(ctx, f, log, conn, keyring, mapper{cm}, m, library, cluster.driverEvents())
	if err != nil {
		return err
	}
	if f.registrationPath != "" {
		r := newRegistration(d.Name(), f.registrationPath, log, cluster.registered)
		f.beside = append(f.beside, func(ctx context.Context) error { return r.serve(ctx, f.kubeletDir) })
	}
	m.watchHydration(d.HydrationStatus)
	hydrating, stop := context.WithCancel(ctx)
	defer background(func() { d.Hydrate(hydrating) })()
	defer background(func() { watchIntegrity(hydrating, d, log) })()
	defer background(func() { cluster.run(hydrating) })()
	defer stop()
	return f.serve(ctx, log, d, conn, m, d.ServerOptions()...)
}

// watchIntegrity goes without where the kernel's log cannot be read: volumes are
// as safe as with it, and only say less.
func watchIntegrity(ctx context.Context, d *driver.Driver, log *slog.Logger) {
	if err := d.WatchIntegrity(ctx); err != nil {
		log.Warn("damaged volumes are not reported: the container needs /dev/kmsg and CAP_SYSLOG", "error", err)
	}
}

// background runs do until it returns; the function waits for that.
func background(do func()) (wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	return func() { <-done }
}

// checkSystem finds out at start what would otherwise fail at the first volume;
// integrity says that its absence is an error too.
func checkSystem(integrity bool, log *slog.Logger) error {
	if err := secret.Harden(); err != nil {
		return err
	}
	if err := secret.CheckLocking(); err != nil {
		log.Warn("keys cannot be locked in memory and may reach swap space: raise RLIMIT_MEMLOCK", "error", err)
	}
	lacks := []error{dm.NeedTarget("crypt"), checkKeyring()}
	if err := dm.NeedTarget("integrity"); err != nil {
		if integrity {
			lacks = append(lacks, err)
		}
		log.Warn("volumes with integrity cannot be opened on this node", "error", err)
	}
	if err := cryptmapper.KernelHasClone(); err != nil {
		log.Warn("new volumes with integrity are written in full before they can be used, and those that another node is still initialising cannot be opened", "error", err)
	}
	if err := errors.Join(lacks...); err != nil {
		return fmt.Errorf("this node cannot have encrypted volumes: %w", err)
	}
	return nil
}

// checkKeyring tries the kernel keyring, where libcryptsetup puts volume keys
// on their way into the kernel. Without it they would stand in dm-crypt's
// table, readable by every root process: that is refused.
func checkKeyring() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := unix.AddKey("logon", "cryptcsi:probe", []byte("probe"), unix.KEY_SPEC_THREAD_KEYRING)
	if err != nil {
		return fmt.Errorf("the kernel keyring cannot be used (add_key: %w): allow add_key, keyctl and request_key in the container's seccomp profile", err)
	}
	_, _ = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_THREAD_KEYRING, 0, 0)
	return nil
}

func newDriver(ctx context.Context, f *nodeFlags, log *slog.Logger, conn *grpc.ClientConn, keys keys, m mapper, seen *measured, library string, events driver.Events) (*driver.Driver, error) {
	ctx, cancel := context.WithTimeout(ctx, f.startTimeout)
	defer cancel()
	var creator driver.Creator
	if f.keys.create {
		creator = keys
	}
	var theirs driver.Constellation
	if f.keys.service.protocol == string(keyclient.ProtocolConstellation) {
		theirs = m
	}
	plaintext, err := f.plaintext.read()
	if err != nil {
		return nil, err
	}
	layout, _ := driver.LayoutOf(f.integrityInit)
	d, err := driver.New(ctx, driver.Config{
		DriverName: f.driverName, NodeName: f.nodeName, KubeletDir: f.kubeletDir,
		Wrapped: conn, Profile: f.profileGiven(), Keys: keys, Creator: creator, Mapper: m, Constellation: theirs,
		Hydration: m, Hydrating: f.hydrating, Layout: layout, Resume: m.Resume,
		Plaintext: plaintext,
		StageWith: f.stageWith, Integrity: driver.IntegrityPolicy(f.integrity), Spec: dek.Spec{Cipher: dek.CipherXTS},
		TolerateUngrown: f.tolerateUngrown,
		ObserveStep:     seen.stageStep, ObserveFinish: seen.finished,
		Failures: cryptmapper.WatchIntegrity, ObserveFailure: seen.failures.Inc, Events: events,
		Version:  version,
		Manifest: map[string]string{"commit": commit, "libcryptsetup": library, "kms": strings.Join(all.Usable(), ",")},
		Logger:   log,
	})
	if err != nil {
		return nil, err
	}
	orphans, err := d.Reconcile(ctx)
	for _, o := range orphans {
		log.Warn("a mapping that no volume explains is left as it is", "mapping", o.Name, "device", o.Backing)
	}
	if err != nil {
		log.Error("tidying up after the last run", "error", err)
	}
	return d, nil
}
