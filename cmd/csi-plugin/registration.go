package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
)

// registrationRetry is how often it is tried whether the name is free.
const registrationRetry = time.Second

// registration tells kubelet which driver serves where: what
// node-driver-registrar does elsewhere.
type registration struct {
	registrationpb.UnimplementedRegistrationServer
	name, endpoint string
	log            *slog.Logger
	registered     func() // is called each time that kubelet has
	refused        chan string
}

// newRegistration registers the driver of a name, whose socket kubelet finds at
// endpoint.
func newRegistration(name, endpoint string, log *slog.Logger, registered func()) *registration {
	return &registration{name: name, endpoint: endpoint, log: log, registered: registered, refused: make(chan string, 1)}
}

// serve answers kubelet, which watches the folder and asks again when it was
// restarted, until ctx ends: then the driver is registered no longer. kubelet
// does not ask again by itself after it has refused; that is an error, so that
// the process ends and the next one is asked.
func (r *registration) serve(ctx context.Context, kubeletDir string) error {
	lis, err := r.listen(ctx, filepath.Join(kubeletDir, "plugins_registry", r.name+"-reg.sock"))
	if ctx.Err() != nil && err != nil {
		return nil //nolint:nilerr // told to end while it waited
	}
	if err != nil {
		return fmt.Errorf("registration with kubelet: %w", err)
	}
	server := grpcserver.New(grpcserver.Config{Logger: r.log})
	registrationpb.RegisterRegistrationServer(server, r)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(ctx, lis) })
	g.Go(func() error {
		select {
		case why := <-r.refused:
			return fmt.Errorf("kubelet has refused to register %s: %s", r.name, why)
		case <-ctx.Done():
			return nil
		}
	})
	return g.Wait()
}

// listen waits as long as another process has the driver registered under the same
// name: the vendor's registrar, until its pod is replaced.
func (r *registration) listen(ctx context.Context, path string) (net.Listener, error) {
	for waits := false; ; waits = true {
		lis, err := grpcserver.Listen(path)
		if info, missing := os.Lstat(path); !errors.Is(err, errdefs.ErrExists) || missing == nil && info.Mode().Type() != fs.ModeSocket {
			return lis, err
		}
		if !waits {
			r.log.WarnContext(ctx, "the driver is registered by another process; kubelet asks this one when that has ended", "driver", r.name, "error", err)
		}
		select {
		case <-time.After(registrationRetry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (r *registration) GetInfo(context.Context, *registrationpb.InfoRequest) (*registrationpb.PluginInfo, error) {
	// The version is that of kubelet's protocol with CSI drivers.
	return &registrationpb.PluginInfo{Type: "CSIPlugin", Name: r.name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

func (r *registration) NotifyRegistrationStatus(_ context.Context, s *registrationpb.RegistrationStatus) (*registrationpb.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.log.Info("registered with kubelet", "driver", r.name, "endpoint", r.endpoint)
		r.registered()
		return &registrationpb.RegistrationStatusResponse{}, nil
	}
	select {
	case r.refused <- s.GetError():
	default:
	}
	return &registrationpb.RegistrationStatusResponse{}, nil
}
