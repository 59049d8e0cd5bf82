// Command gcepd is Google's CSI driver for persistent disks, of a module of its
// own because of what that driver needs: its real identity, controller and node
// servers, with its own fake of the cloud, over loop devices instead of disks.
// test/sanity puts csi-plugin in front of it.
//
// What is not the driver's own: a disk's bytes (cloud.go), and how the device of
// an attached disk is found (device.go). Calls are served one at a time, because
// the fake cloud has no locks.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/api/compute/v1"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	"sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/deviceutils"
	gce "sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/gce-cloud-provider/compute"
	"sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/gce-cloud-provider/metadata"
	driver "sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/gce-pd-csi-driver"
	mountmanager "sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/mount-manager"
)

func main() {
	endpoint := flag.String("endpoint", "unix:///csi/csi.sock", "socket to serve on")
	dir := flag.String("data-dir", "", "directory for disks and snapshots; required")
	node := flag.String("node-id", "", "name of this machine in the cloud; required")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *endpoint, *dir, *node); err != nil {
		fmt.Fprintln(os.Stderr, "gcepd:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, endpoint, dir, node string) error {
	if dir == "" || node == "" {
		return fmt.Errorf("--data-dir and --node-id are required")
	}
	metadata.SetName(node)
	here := metadata.NewFakeService()
	fake, err := gce.CreateFakeCloudProvider(here.GetProject(), here.GetZone(), nil)
	if err != nil {
		return err
	}
	fake.InsertInstance(&compute.Instance{Name: node}, here.GetZone(), node)
	c := &cloud{FakeCloudProvider: fake, disks: disks(dir)}
	if err := c.disks.make(); err != nil {
		return err
	}
	servers, err := newServers(c, here)
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", strings.TrimPrefix(endpoint, "unix://"))
	if err != nil {
		return err
	}
	go func() {
		<-ctx.Done()
		servers.GracefulStop()
	}()
	return servers.Serve(listener)
}

// newServers are the driver's, put together as its own main does it, with the
// flags that its manifests have.
func newServers(c *cloud, here metadata.MetadataService) (*grpc.Server, error) {
	mounter, err := mountmanager.NewSafeMounter(1, time.Minute)
	if err != nil {
		return nil, err
	}
	d := driver.GetGCEDriver()
	identity := driver.NewIdentityServer(d)
	controller := driver.NewControllerServer(d, c, 0, time.Minute, nil, false, false, driver.MultiZoneVolumeHandleConfig{}, driver.ListVolumesConfig{},
		driver.ProvisionableDisksConfig{SupportsIopsChange: []string{"hyperdisk-balanced"}, SupportsThroughputChange: []string{"hyperdisk-balanced"}}, false, &driver.GCEControllerServerArgs{})
	node := driver.NewNodeServer(d, mounter, devices{deviceutils.NewDeviceUtils(), c.disks}, here, mountmanager.NewStatter(mounter),
		&driver.NodeServerArgs{EnableDeviceInUseCheck: true, DeviceInUseTimeout: 30 * time.Second, SysfsPath: "/sys"}).WithSerializedFormatAndMount(time.Minute, 1)
	if err := d.SetupGCEDriver("pd.csi.storage.gke.io", "v1.28.1", nil, nil, identity, controller, node); err != nil {
		return nil, err
	}
	s := grpc.NewServer(grpc.UnaryInterceptor(oneAtATime()))
	csi.RegisterIdentityServer(s, identity)
	csi.RegisterControllerServer(s, controller)
	csi.RegisterNodeServer(s, node)
	return s, nil
}

func oneAtATime() grpc.UnaryServerInterceptor {
	var mu sync.Mutex
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
		mu.Lock()
		defer mu.Unlock()
		resp, err := handle(ctx, req)
		if err != nil {
			klog.Errorf("%s: %v", filepath.Base(info.FullMethod), err)
		}
		return resp, err
	}
}
