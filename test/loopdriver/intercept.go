package loopdriver

import (
	"context"
	"log/slog"
	"path"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
)

// intercept is what every RPC passes: injected faults, locks, one log line,
// translation of errors.
func (d *Driver) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	method, start := path.Base(info.FullMethod), time.Now()
	resp, err := d.call(ctx, method, req, handle)

	level := slog.LevelInfo
	if quiet(method) && err == nil {
		level = slog.LevelDebug
	}
	attrs := []slog.Attr{
		slog.String("method", method),
		slog.Any("request", protosanitizer.StripSecrets(req)),
		slog.Duration("took", time.Since(start)),
	}
	if err != nil {
		attrs = append(attrs, slog.Any("error", err))
	}
	d.cfg.Log.LogAttrs(ctx, level, "call", attrs...)
	return resp, errgrpc.ToGRPC(err)
}

// quiet tells the methods that COs call all the time.
func quiet(method string) bool {
	switch method {
	case "Probe", "GetPluginInfo", "GetPluginCapabilities",
		"ControllerGetCapabilities", "NodeGetCapabilities", "NodeGetVolumeStats":
		return true
	}
	return false
}

func (d *Driver) call(ctx context.Context, method string, req any, handle grpc.UnaryHandler) (any, error) {
	fault, err := d.faults.next(method)
	if err != nil {
		return nil, err
	}
	unlock, err := d.locks.try(lockKeys(req))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := wait(ctx, fault.delay); err != nil {
		return nil, err
	}
	if fault.before != nil {
		return nil, fault.before
	}
	resp, err := handle(ctx, req)
	if err == nil && fault.after != nil {
		return nil, fault.after
	}
	return resp, err
}

func wait(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// lockKeys names what req changes and what it needs unchanged. Pure queries
// lock nothing.
func lockKeys(req any) []string {
	switch r := req.(type) {
	case *csi.CreateVolumeRequest:
		keys := []string{"volume name " + r.GetName()}
		if s := r.GetVolumeContentSource().GetSnapshot(); s != nil {
			keys = append(keys, "snapshot "+s.GetSnapshotId())
		}
		if v := r.GetVolumeContentSource().GetVolume(); v != nil {
			keys = append(keys, "volume "+v.GetVolumeId())
		}
		return keys
	case *csi.CreateSnapshotRequest:
		return []string{"snapshot name " + r.GetName(), "volume " + r.GetSourceVolumeId()}
	case *csi.DeleteSnapshotRequest:
		return []string{"snapshot " + r.GetSnapshotId()}
	case *csi.ValidateVolumeCapabilitiesRequest, *csi.ControllerGetVolumeRequest, *csi.NodeGetVolumeStatsRequest:
		return nil
	case interface{ GetVolumeId() string }:
		return []string{"volume " + r.GetVolumeId()}
	}
	return nil
}

// locks is a set of named locks that are tried, never waited for. The zero
// value is ready.
type locks struct {
	mu   sync.Mutex
	held map[string]bool
}

// try takes all keys or none: ErrConflict if one of them is held.
func (l *locks) try(keys []string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range keys {
		if l.held[k] {
			return nil, errdefs.Errorf(errdefs.ErrConflict, "an operation on %s is in progress: try again", k)
		}
	}
	if l.held == nil {
		l.held = map[string]bool{}
	}
	for _, k := range keys {
		l.held[k] = true
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, k := range keys {
			delete(l.held, k)
		}
	}, nil
}
