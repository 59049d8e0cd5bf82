package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
	"github.com/cryptcsi/cryptcsi/internal/logging"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/secret"
)

// nodeFlags is the configuration of `csi-plugin node`.
type nodeFlags struct {
	log                        logging.Flags
	file                       config.File
	keys                       keyFlags
	endpoint, wrapped          string
	driverName, nodeName       string
	kubeletDir                 string
	stageWith, integrity       string
	tolerateUngrown            bool
	metricsAddress             string
	worker                     *string
	warmWorkers                int
	startTimeout, drainTimeout time.Duration
}

func parseNodeFlags(args []string, stderr io.Writer) (*nodeFlags, error) {
	f := &nodeFlags{}
	fs := newFlags("node", stderr)
	f.log.Add(fs)
	f.file.Add(fs)
	f.keys.add(fs)
	hostname, _ := os.Hostname()
	fs.StringVar(&f.endpoint, "endpoint", cmp.Or(os.Getenv("CSI_ENDPOINT"), "unix:///csi/csi.sock"), "unix socket to serve CSI on; default from $CSI_ENDPOINT")
	fs.StringVar(&f.wrapped, "wrapped-endpoint", "", "unix socket of the wrapped driver's node server (required)")
	fs.StringVar(&f.driverName, "driver-name", "", "CSI driver name to serve under; empty takes the wrapped driver's")
	fs.StringVar(&f.nodeName, "node-name", cmp.Or(os.Getenv("NODE_NAME"), hostname), "name of this node in claims; default from $NODE_NAME, then the host name")
	fs.StringVar(&f.kubeletDir, "kubelet-dir", "/var/lib/kubelet", "kubelet's directory, the same path here and for the wrapped driver")
	fs.BoolVar(&f.keys.keepAlive, "kek-keepalive", false, "label the KEK as in use every 6 h, so that key-service kek list knows that it is")
	fs.StringVar(&f.stageWith, "stage-with", driver.StageWithProxy, `who makes and mounts the filesystem: "proxy", or "wrapped" to hand the mapped device over to the wrapped driver`)
	fs.StringVar(&f.integrity, "integrity", string(driver.IntegrityDefault), `authenticated sectors: "off" refuses volumes that ask for them, "default" does as the volume asks, "required" refuses volumes without`)
	fs.BoolVar(&f.tolerateUngrown, "tolerate-ungrown", false, "let NodeExpandVolume succeed though the wrapped driver has not grown its device")
	fs.StringVar(&f.metricsAddress, "metrics-address", "", "address for /metrics, /healthz and /readyz, e.g. :9808; empty for none")
	f.worker = workerFlag(fs)
	fs.IntVar(&f.warmWorkers, "warm-workers", 2, "crypt-workers kept started ahead")
	fs.DurationVar(&f.startTimeout, "start-timeout", time.Minute, "how long to wait for the wrapped driver at start")
	fs.DurationVar(&f.drainTimeout, "drain-timeout", 30*time.Second, "how long calls may go on after SIGTERM")
	if err := parse(fs, args); err != nil {
		return nil, err
	}
	if err := f.file.Load(fs); err != nil {
		return nil, usageError("node: " + err.Error())
	}
	return f, f.check()
}

// check finds what can be found without touching anything.
func (f *nodeFlags) check() error {
	if err := f.keys.check("node"); err != nil {
		return err
	}
	switch {
	case f.wrapped == "":
		return usageError("node: --wrapped-endpoint is required")
	case f.wrapped == f.endpoint:
		return usageError("node: --wrapped-endpoint and --endpoint are the same socket")
	case !strings.HasPrefix(f.wrapped, "unix:"):
		return usageError(fmt.Sprintf("node: --wrapped-endpoint %q: must be a unix socket, unix:///path", f.wrapped))
	case f.warmWorkers < 0 || f.warmWorkers > 64:
		return usageError(fmt.Sprintf("node: --warm-workers %d: must be 0 to 64", f.warmWorkers))
	}
	return nil
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
		_, closeKeys, err := f.keys.open(ctx, log, keyOptions{checkOnly: true})
		if err == nil {
			closeKeys()
			fmt.Fprintln(stderr, "the configuration is right")
		}
		return err
	}
	library, err := libcryptsetup(ctx, *f.worker)
	if err != nil {
		return err
	}
	log.Info("csi-plugin node starts", "version", version, "commit", commit, "libcryptsetup", library, "kms", strings.Join(schemes(), ","))
	if err := checkSystem(f.integrity == string(driver.IntegrityRequired), log); err != nil {
		return err
	}
	var m *measured
	cm := cryptmapper.New(cryptmapper.Options{Worker: []string{*f.worker}, Warm: f.warmWorkers,
		Observe: func(op cryptmapper.Op, name string, err error) { m.operation(op, name, err) }})
	defer cm.Shutdown()
	m = newMeasured(library, cm.List, cm.Stuck)
	keyring, closeKeys, err := f.keys.open(ctx, log, keyOptions{kms: m.KMS, service: m.keyCall, state: m.watchKeyService})
	if err != nil {
		return err
	}
	defer closeKeys()
	conn, err := dial(f.wrapped)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	d, err := newDriver(ctx, f, log, conn, keyring, mapper{cm}, library)
	if err != nil {
		return err
	}
	return serve(ctx, f, log, d, conn, m)
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
	if err := dm.NeedTarget("crypt"); err != nil {
		return err
	}
	if err := dm.NeedTarget("integrity"); err != nil {
		if integrity {
			return err
		}
		log.Warn("volumes with integrity cannot be opened on this node", "error", err)
	}
	return checkKeyring()
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

// dial returns the one connection to the wrapped driver. It connects when it is
// used, and again when the driver was restarted. Some servers refuse the
// socket's path as authority.
func dial(endpoint string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return nil, fmt.Errorf("--wrapped-endpoint: %w", err)
	}
	return conn, nil
}

func newDriver(ctx context.Context, f *nodeFlags, log *slog.Logger, conn *grpc.ClientConn, keys keys, m mapper, library string) (*driver.Driver, error) {
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
	d, err := driver.New(ctx, driver.Config{
		DriverName: f.driverName, NodeName: f.nodeName, KubeletDir: f.kubeletDir,
		Wrapped: conn, Keys: keys, Creator: creator, Mapper: m, Constellation: theirs,
		StageWith: f.stageWith, Integrity: driver.IntegrityPolicy(f.integrity), Spec: dek.Spec{Cipher: dek.CipherXTS},
		TolerateUngrown: f.tolerateUngrown,
		Version:         version,
		Manifest:        map[string]string{"commit": commit, "libcryptsetup": library, "kms": strings.Join(schemes(), ",")},
		Logger:          log,
	})
	if err != nil {
		return nil, err
	}
	orphans, err := d.Reconcile(ctx)
	for _, o := range orphans {
		log.Warn("a mapping that no volume explains is in use", "mapping", o.Name, "device", o.Backing)
	}
	if err != nil {
		log.Error("tidying up after the last run", "error", err)
	}
	return d, nil
}

// serve answers until ctx ends and then lets the calls in flight finish.
func serve(ctx context.Context, f *nodeFlags, log *slog.Logger, d *driver.Driver, conn *grpc.ClientConn, m *measured) error {
	server := grpcserver.New(grpcserver.Config{Logger: log, Observe: m.RPC, Drain: f.drainTimeout, Options: d.ServerOptions()})
	d.Register(server)
	lis, err := grpcserver.Listen(f.endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ctx, lis) })
	if f.metricsAddress != "" {
		g.Go(func() error {
			return m.Serve(ctx, f.metricsAddress, func(ctx context.Context) error { return probe(ctx, conn) })
		})
	}
	log.Info("serving", "endpoint", f.endpoint, "driver", d.Name(), "node", f.nodeName)
	err = g.Wait()
	log.Info("csi-plugin node ends", "error", err)
	return err
}

// probe asks the wrapped driver whether it is there.
func probe(ctx context.Context, conn *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := csi.NewIdentityClient(conn).Probe(ctx, &csi.ProbeRequest{}); err != nil {
		return fmt.Errorf("the wrapped driver does not answer: %w", err)
	}
	return nil
}
