package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/internal/config"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
	"github.com/cryptcsi/cryptcsi/internal/logging"
)

// frontFlags are those of a verb that serves CSI in front of a wrapped driver.
type frontFlags struct {
	verb                       string
	log                        logging.Flags
	file                       config.File
	keys                       keyFlags
	plaintext                  plaintextFlags
	endpoint, wrapped          string
	driverName, profile        string
	metricsAddress             string
	startTimeout, drainTimeout time.Duration
	beside                     []func(context.Context) error // what runs as long as CSI is served
}

func (f *frontFlags) add(fs *flag.FlagSet) {
	f.verb = fs.Name()
	f.log.Add(fs)
	f.file.Add(fs)
	fs.BoolVar(&f.keys.keepAlive, "kek-keepalive", false, "label the KEK as in use every 6 h, so that key-service kek list knows that it is")
	fs.StringVar(&f.endpoint, "endpoint", cmp.Or(os.Getenv("CSI_ENDPOINT"), "unix:///csi/csi.sock"), "unix socket to serve CSI on; default from $CSI_ENDPOINT")
	fs.StringVar(&f.wrapped, "wrapped-endpoint", "", "unix socket of the wrapped driver's "+f.verb+" server (required)")
	fs.StringVar(&f.driverName, "driver-name", "", "CSI driver name to serve under, the same for node and controller; empty takes the wrapped driver's")
	fs.StringVar(&f.profile, "profile", "", "name of the driver that the wrapped one is treated as, and changes: NAME,FIELD=VALUE,... (docs/storageclass.md); empty goes by its own name")
	f.plaintext.add(fs)
	fs.StringVar(&f.metricsAddress, "metrics-address", "", "address for /metrics, /healthz and /readyz, e.g. :9808; empty for none")
	fs.DurationVar(&f.startTimeout, "start-timeout", time.Minute, "how long to wait for the wrapped driver at start")
	fs.DurationVar(&f.drainTimeout, "drain-timeout", 30*time.Second, "how long calls may go on after SIGTERM")
}

// parse reads command line and configuration file.
func (f *frontFlags) parse(fs *flag.FlagSet, args []string) error {
	if err := parse(fs, args); err != nil {
		return err
	}
	if err := f.file.Load(fs); err != nil {
		return usageError(f.verb + ": " + err.Error())
	}
	return f.check()
}

// check finds what can be found without touching anything.
func (f *frontFlags) check() error {
	if err := errors.Join(f.keys.check(f.verb), f.plaintext.check(f.verb)); err != nil {
		return err
	}
	switch {
	case f.wrapped == "":
		return usageError(f.verb + ": --wrapped-endpoint is required")
	case f.wrapped == f.endpoint:
		return usageError(f.verb + ": --wrapped-endpoint and --endpoint are the same socket")
	case !strings.HasPrefix(f.wrapped, "unix:"):
		return usageError(fmt.Sprintf("%s: --wrapped-endpoint %q: must be a unix socket, unix:///path", f.verb, f.wrapped))
	}
	if _, err := driver.ParseProfile(f.profile); err != nil {
		return usageError(fmt.Sprintf("%s: --profile %q: %v", f.verb, f.profile, err))
	}
	return nil
}

// profileGiven is the profile that --profile names, nil without. check has
// found it to be right.
func (f *frontFlags) profileGiven() *driver.Profile {
	if f.profile == "" {
		return nil
	}
	p, _ := driver.ParseProfile(f.profile)
	return &p
}

// tryKeys opens the keys and closes them, for --check-config.
func (f *frontFlags) tryKeys(ctx context.Context, log *slog.Logger, stderr io.Writer) error {
	if _, err := f.plaintext.read(); err != nil {
		return err
	}
	_, closeKeys, err := f.keys.open(ctx, log, keyOptions{checkOnly: true})
	if err == nil {
		closeKeys()
		fmt.Fprintln(stderr, "the configuration is right")
	}
	return err
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

// front is what stands in front of a wrapped driver.
type front interface {
	Name() string
	Register(s grpc.ServiceRegistrar)
}

// serve answers until ctx ends and then lets the calls in flight finish.
func (f *frontFlags) serve(ctx context.Context, log *slog.Logger, d front, conn *grpc.ClientConn, m *measured, options ...grpc.ServerOption) error {
	server := grpcserver.New(grpcserver.Config{Logger: log, Observe: m.RPC, Drain: f.drainTimeout, Options: options})
	d.Register(server)
	lis, err := grpcserver.Listen(f.endpoint)
	if err != nil {
		return fmt.Errorf("--endpoint: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ctx, lis) })
	for _, run := range f.beside {
		g.Go(func() error { return run(ctx) })
	}
	if f.metricsAddress != "" {
		g.Go(func() error {
			return m.Serve(ctx, f.metricsAddress, func(ctx context.Context) error { return probe(ctx, conn) })
		})
	}
	log.Info("serving", "endpoint", f.endpoint, "driver", d.Name())
	err = g.Wait()
	log.Info("csi-plugin ends", "verb", f.verb, "error", err)
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
