package main

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/GoogleCloudPlatform/k8s-cloud-provider/pkg/cloud/meta"
	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/api/compute/v1"
	gce "sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/gce-cloud-provider/compute"
	"sigs.k8s.io/gcp-compute-persistent-disk-csi-driver/pkg/parameters"
)

const gib = 1 << 30

// cloud is the driver's own fake of Google's API, with disks that hold bytes
// and can be attached.
type cloud struct {
	*gce.FakeCloudProvider
	disks disks
}

// InsertDisk makes a disk, empty or as a copy.
func (c *cloud) InsertDisk(ctx context.Context, project string, key *meta.Key, params parameters.DiskParameters, bytes int64, capacity *csi.CapacityRange, zones []string, snapshotID, sourceID string, multiWriter bool, accessMode string) error {
	if err := c.FakeCloudProvider.InsertDisk(ctx, project, key, params, bytes, capacity, zones, snapshotID, sourceID, multiWriter, accessMode); err != nil {
		return err
	}
	disk, err := c.GetDisk(ctx, project, key)
	if err != nil {
		return err
	}
	source := ""
	switch {
	case snapshotID != "":
		source = c.disks.snapshot(path.Base(snapshotID))
	case sourceID != "":
		source = c.disks.disk(path.Base(sourceID))
	}
	if err := copyFile(ctx, c.disks.disk(key.Name), source); err != nil {
		return err
	}
	return grow(ctx, c.disks.disk(key.Name), disk.GetSizeGb()*gib)
}

// DeleteDisk destroys a disk.
func (c *cloud) DeleteDisk(ctx context.Context, project string, key *meta.Key) error {
	if err := remove(c.disks.disk(key.Name)); err != nil {
		return err
	}
	return c.FakeCloudProvider.DeleteDisk(ctx, project, key)
}

// ResizeDisk lets a disk grow, attached or not.
func (c *cloud) ResizeDisk(ctx context.Context, project string, key *meta.Key, bytes int64) (int64, error) {
	gb, err := c.FakeCloudProvider.ResizeDisk(ctx, project, key, bytes)
	if err != nil {
		return gb, err
	}
	return gb, grow(ctx, c.disks.disk(key.Name), gb*gib)
}

// AttachDisk shows the disk to this machine.
func (c *cloud) AttachDisk(ctx context.Context, project string, key *meta.Key, readWrite, diskType, zone, instance string, force bool) error {
	if err := c.disks.attach(ctx, key.Name); err != nil {
		return err
	}
	return c.FakeCloudProvider.AttachDisk(ctx, project, key, readWrite, diskType, zone, instance, force)
}

// DetachDisk takes it away. A real cloud would do that to a disk in use, too.
func (c *cloud) DetachDisk(ctx context.Context, project, name, zone, instance string) error {
	if err := c.disks.detach(ctx, name); err != nil {
		return err
	}
	return c.FakeCloudProvider.DetachDisk(ctx, project, name, zone, instance)
}

// CreateSnapshot copies a disk. The fake calls every snapshot 10 GB large.
func (c *cloud) CreateSnapshot(ctx context.Context, project string, key *meta.Key, name string, params parameters.SnapshotParameters) (*compute.Snapshot, error) {
	_, err := c.GetSnapshot(ctx, project, name)
	exists := err == nil
	snapshot, err := c.FakeCloudProvider.CreateSnapshot(ctx, project, key, name, params)
	if err != nil || exists {
		return snapshot, err
	}
	disk, err := c.GetDisk(ctx, project, key)
	if err != nil {
		return nil, err
	}
	snapshot.DiskSizeGb = disk.GetSizeGb()
	return snapshot, copyFile(ctx, c.disks.snapshot(name), c.disks.disk(key.Name))
}

// DeleteSnapshot destroys a snapshot.
func (c *cloud) DeleteSnapshot(ctx context.Context, project, name string) error {
	if err := remove(c.disks.snapshot(name)); err != nil {
		return err
	}
	return c.FakeCloudProvider.DeleteSnapshot(ctx, project, name)
}

// ListSnapshots takes the one filter that the driver uses as Google's API does;
// the fake leaves out what matches.
func (c *cloud) ListSnapshots(ctx context.Context, filter string) ([]*compute.Snapshot, string, error) {
	all, token, err := c.FakeCloudProvider.ListSnapshots(ctx, "")
	if err != nil || filter == "" {
		return all, token, err
	}
	pattern, ok := strings.CutPrefix(filter, "sourceDisk eq ")
	if !ok {
		return nil, "", fmt.Errorf("filter %q is not known here", filter)
	}
	source, err := regexp.Compile("^" + pattern)
	if err != nil {
		return nil, "", err
	}
	return slices.DeleteFunc(all, func(s *compute.Snapshot) bool { return !source.MatchString(s.SourceDisk) }), token, nil
}
