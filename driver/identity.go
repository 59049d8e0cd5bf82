package driver

import (
	"context"
	"maps"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
)

// identity is the Identity service.
type identity struct {
	csi.UnimplementedIdentityServer
	name, version string
	manifest      map[string]string
	wrapped       *wrapped
}

// GetPluginInfo names the driver and what it was built from.
func (i identity) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: i.name, VendorVersion: i.version, Manifest: maps.Clone(i.manifest)}, nil
}

// GetPluginCapabilities answers what the wrapped driver can do, but for snapshot
// metadata, which is not offered. Node and controller answer the same.
func (i identity) GetPluginCapabilities(ctx context.Context, req *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	resp, err := call(ctx, i.wrapped, "GetPluginCapabilities", func(ctx context.Context) (*csi.GetPluginCapabilitiesResponse, error) {
		return i.wrapped.identity.GetPluginCapabilities(ctx, req)
	})
	if err != nil {
		return nil, err
	}
	out := proto.CloneOf(resp)
	out.Capabilities = slices.DeleteFunc(out.Capabilities, func(c *csi.PluginCapability) bool {
		return c.GetService().GetType() == csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE
	})
	return out, nil
}

// Probe says that this process lives. It asks nobody: an unreachable KMS or
// wrapped driver is no reason to restart this process.
func (i identity) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}
