package driver

import (
	"context"
	"maps"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// identity is the Identity service.
type identity struct {
	csi.UnimplementedIdentityServer
	*Driver
}

// GetPluginInfo names the driver and what it was built from.
func (i identity) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: i.name, VendorVersion: i.cfg.Version, Manifest: maps.Clone(i.cfg.Manifest)}, nil
}

// GetPluginCapabilities answers what the wrapped driver can do.
func (i identity) GetPluginCapabilities(ctx context.Context, req *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return call(ctx, i.wrapped, "GetPluginCapabilities", func(ctx context.Context) (*csi.GetPluginCapabilitiesResponse, error) {
		return i.wrapped.identity.GetPluginCapabilities(ctx, req)
	})
}

// Probe says that this process lives. It asks nobody: an unreachable KMS or
// wrapped driver is no reason to restart this process.
func (i identity) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}
