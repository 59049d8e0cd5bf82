package loopdriver_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/test/loopdriver"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// attached is a volume on its way through the RPCs.
type attached struct {
	*rig
	id, dir string
	context map[string]string // publish context
}

// attach creates and attaches a volume; away undoes it.
func (r *rig) attach(t *testing.T, name string, bytes int64) *attached {
	t.Helper()
	return r.attachID(t, r.create(t, name, bytes))
}

// attachID attaches a volume that is there.
func (r *rig) attachID(t *testing.T, id string) *attached {
	t.Helper()
	a := &attached{rig: r, id: id, dir: t.TempDir()}
	must(t, "mkdir", os.Mkdir(a.staging(), 0o700))
	resp, err := r.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: a.id, NodeId: node, VolumeCapability: blockCap()})
	must(t, "ControllerPublishVolume", err)
	a.context = resp.GetPublishContext()
	return a
}

func (a *attached) staging() string { return filepath.Join(a.dir, "staging") }
func (a *attached) target() string  { return filepath.Join(a.dir, "target") }
func (a *attached) device() string  { return a.context["devicePath"] }

func (a *attached) stage(t *testing.T, c *csi.VolumeCapability) error {
	_, err := a.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{
		VolumeId: a.id, StagingTargetPath: a.staging(), VolumeCapability: c, PublishContext: a.context,
	})
	return err
}

func (a *attached) publish(t *testing.T, c *csi.VolumeCapability) error {
	_, err := a.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: a.id, StagingTargetPath: a.staging(), TargetPath: a.target(), VolumeCapability: c, PublishContext: a.context,
	})
	return err
}

func (a *attached) unpublish(t *testing.T) error {
	_, err := a.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: a.id, TargetPath: a.target()})
	return err
}

func (a *attached) unstage(t *testing.T) error {
	_, err := a.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: a.id, StagingTargetPath: a.staging()})
	return err
}

func (a *attached) detach(t *testing.T) error {
	_, err := a.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: a.id, NodeId: node})
	return err
}

// away undoes everything, and everything has to succeed.
func (a *attached) away(t *testing.T) {
	t.Helper()
	must(t, "unpublish", a.unpublish(t))
	must(t, "unstage", a.unstage(t))
	must(t, "detach", a.detach(t))
	_, err := a.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: a.id})
	must(t, "DeleteVolume", err)
}

func deviceBytes(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	must(t, "open", err)
	defer f.Close()
	n, err := f.Seek(0, io.SeekEnd)
	must(t, "seek", err)
	return n
}

func rdev(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, "stat "+path, unix.Stat(path, &st))
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		t.Fatalf("%s is not a block device", path)
	}
	return uint64(st.Rdev)
}

// yank detaches a loop device behind the driver's back, as a reboot does.
func yank(t *testing.T, dev string) {
	t.Helper()
	f, err := os.Open(dev)
	must(t, "open", err)
	must(t, "LOOP_CLR_FD", unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0))
	f.Close()
	for loops(t)[dev] != "" { // detached at the last close by whoever looks at it
		_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
	}
}

func TestKernelBlockVolume(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", 16*mib)
	if file := loops(t)[a.device()]; file != r.BackingFile(a.id) {
		t.Fatalf("%s sits on %q, want %s", a.device(), file, r.BackingFile(a.id))
	}
	again, err := r.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: a.id, NodeId: node, VolumeCapability: blockCap()})
	must(t, "ControllerPublishVolume again", err)
	if got := again.GetPublishContext()["devicePath"]; got != a.device() {
		t.Errorf("a second ControllerPublishVolume names %s, the first %s", got, a.device())
	}
	wantCode(t, "publish before stage", a.publish(t, blockCap()), codes.FailedPrecondition)
	for range 3 {
		must(t, "stage", a.stage(t, blockCap()))
		must(t, "publish", a.publish(t, blockCap()))
	}
	wantCode(t, "publish as mount", a.publish(t, mountCap("")), codes.InvalidArgument)
	if rdev(t, a.target()) != rdev(t, a.device()) {
		t.Error("the target is another device")
	}

	secret := make([]byte, 8192)
	rand.Read(secret)
	f, err := os.OpenFile(a.target(), os.O_RDWR, 0)
	must(t, "open", err)
	_, err = f.WriteAt(secret, mib)
	must(t, "write", err)
	must(t, "sync", f.Sync())
	must(t, "close", f.Close())
	raw, err := os.ReadFile(r.BackingFile(a.id))
	must(t, "read", err)
	if !bytes.Equal(raw[mib:mib+8192], secret) {
		t.Error("what was written to the target is not in the backing file")
	}

	_, err = r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: a.id})
	wantCode(t, "delete while published", err, codes.FailedPrecondition)
	for range 2 {
		must(t, "unpublish", a.unpublish(t))
		must(t, "unstage", a.unstage(t))
		must(t, "detach", a.detach(t))
	}
	if _, err := os.Lstat(a.target()); !os.IsNotExist(err) {
		t.Errorf("the target after unpublish: %v", err)
	}
	a.away(t)
}

func TestKernelBlockVolumeGrowsWherePublished(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", 16*mib)
	must(t, "stage", a.stage(t, blockCap()))
	must(t, "publish", a.publish(t, blockCap()))
	resp, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: a.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 32 * mib}})
	must(t, "ControllerExpandVolume", err)
	if got := deviceBytes(t, a.target()); got != 32*mib || resp.GetCapacityBytes() != got {
		t.Errorf("the published device has %d bytes, the answer was %d", got, resp.GetCapacityBytes())
	}
	expand, err := r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: a.id, VolumePath: a.target()})
	must(t, "NodeExpandVolume", err)
	stats, err := r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: a.id, VolumePath: a.target()})
	must(t, "NodeGetVolumeStats", err)
	if expand.GetCapacityBytes() != 32*mib || stats.GetUsage()[0].GetTotal() != 32*mib || stats.GetVolumeCondition().GetAbnormal() {
		t.Errorf("NodeExpandVolume: %v, NodeGetVolumeStats: %v", expand, stats)
	}
	a.away(t)
}

func TestKernelManyAttachAtOnce(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	var ids []string
	for i := range 16 {
		ids = append(ids, r.create(t, strconv.Itoa(i), mib))
	}
	devices := make(chan string, len(ids))
	var wg sync.WaitGroup
	for _, id := range ids {
		wg.Go(func() {
			resp, err := r.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: id, NodeId: node, VolumeCapability: blockCap()})
			if err != nil {
				t.Errorf("ControllerPublishVolume: %v", err)
			}
			devices <- resp.GetPublishContext()["devicePath"]
		})
	}
	wg.Wait()
	close(devices)
	seen := map[string]bool{}
	for dev := range devices {
		if seen[dev] {
			t.Errorf("%s was handed out twice", dev)
		}
		seen[dev] = true
	}
	for _, id := range ids {
		wg.Go(func() {
			if _, err := r.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{VolumeId: id}); err != nil {
				t.Errorf("ControllerUnpublishVolume: %v", err)
			}
		})
	}
	wg.Wait()
}

func TestKernelParentOfTheTargetIsNotMade(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", mib)
	must(t, "stage", a.stage(t, blockCap()))
	_, err := r.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: a.id, StagingTargetPath: a.staging(), TargetPath: filepath.Join(a.dir, "no/target"), VolumeCapability: blockCap(), PublishContext: a.context,
	})
	if err == nil {
		t.Error("a target without its directory was published")
	}
	a.away(t)
}

func TestKernelMountVolume(t *testing.T) {
	kernel.Need(t, "root", "loop")
	for _, fs := range []struct {
		name  string
		bytes int64
	}{{"ext4", 32 * mib}, {"xfs", 320 * mib}} {
		t.Run(fs.name, func(t *testing.T) {
			kernel.Need(t, fs.name, "exec:mkfs."+fs.name)
			testMountVolume(t, mountCap(fs.name, "noatime"), fs.bytes)
		})
	}
}

func testMountVolume(t *testing.T, c *csi.VolumeCapability, size int64) {
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", size)
	for range 2 {
		must(t, "stage", a.stage(t, c))
		must(t, "publish", a.publish(t, c))
	}
	must(t, "write", os.WriteFile(filepath.Join(a.target(), "f"), []byte("kept"), 0o600))
	wantCode(t, "detach while mounted", a.detach(t), codes.FailedPrecondition)
	wantCode(t, "unstage while published", a.unstage(t), codes.FailedPrecondition)
	if mounts, _ := os.ReadFile("/proc/self/mountinfo"); !strings.Contains(string(mounts), " "+a.staging()+" rw,noatime") {
		t.Error("the mount flag did not reach the staging mount")
	}

	if c.GetMount().GetFsType() == "ext4" {
		a.needResize(t)
	}
	before := fsBytes(t, a.target())
	_, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: a.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 * size}})
	must(t, "ControllerExpandVolume", err)
	_, err = r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: a.id, VolumePath: a.target()})
	must(t, "NodeExpandVolume", err)
	if after := fsBytes(t, a.target()); after < before+size*9/10 {
		t.Errorf("the filesystem grew from %d to %d bytes, the device by %d", before, after, size)
	}

	must(t, "unpublish", a.unpublish(t))
	must(t, "unstage", a.unstage(t))
	// A larger clone is grown when it is staged, beside its source with the same UUID.
	must(t, "stage", a.stage(t, c))
	req := createRequest("clone", 3*size)
	req.VolumeContentSource = fromVolume(a.id)
	must(t, "sync", syncPath(a.staging()))
	clone, err := r.CreateVolume(t.Context(), req)
	must(t, "clone", err)
	b := r.attachID(t, clone.GetVolume().GetVolumeId())
	must(t, "stage clone", b.stage(t, c))
	if got := fsBytes(t, b.staging()); got < before+2*size*9/10 {
		t.Errorf("the clone's filesystem has %d bytes on a device of %d", got, 3*size)
	}
	if got, err := os.ReadFile(filepath.Join(b.staging(), "f")); err != nil || string(got) != "kept" {
		t.Errorf("file in the clone: %q, %v", got, err)
	}
	b.away(t)
	a.away(t)
}

// needResize skips, cleanly, what ext4 allows only with CAP_SYS_RESOURCE, which
// root lacks in some sandboxes.
func (a *attached) needResize(t *testing.T) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	must(t, "capget", unix.Capget(&header, &data[0]))
	switch {
	case data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0:
	case os.Getenv("REQUIRE_ALL") == "1":
		t.Fatal("growing ext4 needs CAP_SYS_RESOURCE, and REQUIRE_ALL=1 forbids to skip it")
	default:
		a.away(t)
		t.Skip("growing ext4 needs CAP_SYS_RESOURCE, which this root has not")
	}
}

func fsBytes(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, "statfs", unix.Statfs(path, &st))
	return int64(st.Blocks) * st.Bsize
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// A proxy hands over a device of its own: the driver formats and mounts that.
func TestKernelItMountsTheDeviceThatItIsTold(t *testing.T) {
	kernel.Need(t, "root", "loop", "ext4")
	r := start(t, loopdriver.Config{})
	a, other := r.attach(t, "a", 16*mib), r.attach(t, "b", 48*mib)
	told := a.context
	a.context = map[string]string{"devicePath": other.device()}
	must(t, "stage", a.stage(t, mountCap("ext4")))
	if got := fsBytes(t, a.staging()); got < 32*mib {
		t.Errorf("the filesystem has %d bytes: it is not on the device that was named", got)
	}
	wantCode(t, "stage of its own device over it", func() error {
		b := *a
		b.context = told
		return b.stage(t, mountCap("ext4"))
	}(), codes.FailedPrecondition)
	must(t, "unstage", a.unstage(t))
	a.context = map[string]string{"devicePath": filepath.Join(a.dir, "gone")}
	wantCode(t, "a device that is not there", a.stage(t, mountCap("ext4")), codes.NotFound)
	a.context = map[string]string{"devicePath": a.dir}
	wantCode(t, "a device that is none", a.stage(t, mountCap("ext4")), codes.FailedPrecondition)
	a.context = nil
	wantCode(t, "no device", a.stage(t, blockCap()), codes.InvalidArgument)
	a.away(t)
	other.away(t)
}

func TestKernelForeignFilesystemIsNotFormatted(t *testing.T) {
	kernel.Need(t, "root", "loop", "ext4", "exec:mkfs.xfs")
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", 16*mib)
	must(t, "stage", a.stage(t, mountCap("ext4")))
	must(t, "unstage", a.unstage(t))
	before, err := os.ReadFile(r.BackingFile(a.id))
	must(t, "read", err)
	wantCode(t, "stage as xfs", a.stage(t, mountCap("xfs")), codes.FailedPrecondition)
	after, err := os.ReadFile(r.BackingFile(a.id))
	must(t, "read", err)
	if !bytes.Equal(before, after) {
		t.Error("a refused stage changed the volume")
	}
	a.away(t)
}

func TestKernelReadOnlyPublish(t *testing.T) {
	kernel.Need(t, "root", "loop", "ext4")
	for _, noStage := range []bool{false, true} {
		r := start(t, loopdriver.Config{NoStage: noStage})
		a := r.attach(t, "a", 16*mib)
		req := &csi.NodePublishVolumeRequest{
			VolumeId: a.id, TargetPath: a.target(), VolumeCapability: mountCap(""), PublishContext: a.context, Readonly: true,
		}
		if !noStage {
			must(t, "stage", a.stage(t, mountCap("")))
			req.StagingTargetPath = a.staging()
		}
		_, err := r.NodePublishVolume(t.Context(), req)
		must(t, "publish", err)
		if err := os.WriteFile(filepath.Join(a.target(), "f"), nil, 0o600); !os.IsPermission(err) && !strings.Contains(err.Error(), "read-only") {
			t.Errorf("write to a read-only publication: %v", err)
		}
		req.Readonly = false
		_, err = r.NodePublishVolume(t.Context(), req)
		wantCode(t, "the same target writable", err, codes.AlreadyExists)
		must(t, "unpublish", a.unpublish(t))
		if !noStage {
			must(t, "unstage", a.unstage(t))
		}
		must(t, "detach", a.detach(t))
	}
}

func TestKernelWithoutAttachTheNodeDoesIt(t *testing.T) {
	kernel.Need(t, "root", "loop")
	for _, noStage := range []bool{false, true} {
		r := start(t, loopdriver.Config{NoAttach: true, NoStage: noStage})
		a := &attached{rig: r, id: r.create(t, "a", 8*mib), dir: t.TempDir()}
		must(t, "mkdir", os.Mkdir(a.staging(), 0o700))
		publish := func(target string) error {
			req := &csi.NodePublishVolumeRequest{VolumeId: a.id, TargetPath: target, VolumeCapability: blockCap()}
			if !noStage {
				req.StagingTargetPath = a.staging()
			}
			_, err := r.NodePublishVolume(t.Context(), req)
			return err
		}
		if !noStage {
			must(t, "stage", a.stage(t, blockCap()))
		}
		second := filepath.Join(a.dir, "second")
		must(t, "publish", publish(a.target()))
		must(t, "publish", publish(second))
		if rdev(t, a.target()) != rdev(t, second) {
			t.Error("two targets show two devices")
		}
		must(t, "unpublish", a.unpublish(t))
		_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: a.id})
		wantCode(t, "delete while published", err, codes.FailedPrecondition)
		if got := deviceBytes(t, second); got != 8*mib {
			t.Errorf("after the first unpublish the second target has %d bytes", got)
		}
		_, err = r.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: a.id, TargetPath: second})
		must(t, "unpublish", err)
		if !noStage {
			must(t, "unstage", a.unstage(t))
		}
		for dev, file := range loops(t) {
			if file == r.BackingFile(a.id) {
				t.Errorf("%s is still attached after the last use", dev)
			}
		}
	}
}

func TestKernelSingleWriterHasOneTarget(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", mib)
	c := blockCap()
	c.AccessMode.Mode = csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	must(t, "stage", a.stage(t, c))
	must(t, "publish", a.publish(t, c))
	req := &csi.NodePublishVolumeRequest{
		VolumeId: a.id, StagingTargetPath: a.staging(), TargetPath: filepath.Join(a.dir, "second"), VolumeCapability: c, PublishContext: a.context,
	}
	_, err := r.NodePublishVolume(t.Context(), req)
	wantCode(t, "second target", err, codes.FailedPrecondition)
	a.away(t)
}

func TestKernelRestart(t *testing.T) {
	kernel.Need(t, "root", "loop")
	dir := t.TempDir()
	t.Cleanup(func() { noLeaks(t, dir) })
	r := start(t, loopdriver.Config{DataDir: dir})
	kept, rebooted := r.attach(t, "kept", mib), r.attach(t, "rebooted", mib)
	must(t, "stage", kept.stage(t, blockCap()))
	must(t, "publish", kept.publish(t, blockCap()))
	r.stop()

	// One device gets lost, as by a reboot; one file with its device belongs to nothing.
	strayFile := filepath.Join(dir, "volumes", "vol-aaaaaaaaaa.img")
	must(t, "write", os.WriteFile(strayFile, make([]byte, mib), 0o600))
	strayDevice := bindForTest(t, strayFile)
	yank(t, rebooted.device())

	r = start(t, loopdriver.Config{DataDir: dir})
	now := loops(t)
	if got := now[kept.device()]; got != r.BackingFile(kept.id) {
		t.Errorf("%s sits on %q after the restart", kept.device(), got)
	}
	if got := now[rebooted.device()]; got != r.BackingFile(rebooted.id) {
		t.Errorf("%s, which the CO was told, sits on %q after the reboot", rebooted.device(), got)
	}
	if got := now[strayDevice]; got == strayFile {
		t.Errorf("stale %s was not detached", strayDevice)
	}
	kept.rig, rebooted.rig = r, r
	must(t, "publish after the restart", kept.publish(t, blockCap()))
	kept.away(t)
	rebooted.away(t)
}

// bindForTest attaches file by other means than the driver's.
func bindForTest(t *testing.T, file string) string {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	must(t, "open", err)
	defer f.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(t, "open", err)
	defer ctl.Close()
	for {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		must(t, "LOOP_CTL_GET_FREE", err)
		dev := "/dev/loop" + strconv.Itoa(n)
		loop, err := os.OpenFile(dev, os.O_RDWR, 0)
		must(t, "open", err)
		err = unix.IoctlSetInt(int(loop.Fd()), unix.LOOP_SET_FD, int(f.Fd()))
		loop.Close()
		if err == nil {
			return dev
		}
		if !errors.Is(err, unix.EBUSY) {
			t.Fatal(err)
		}
	}
}

func TestKernelFaultStackPublish(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{Faults: []string{"stack-publish:a"}})
	a := r.attach(t, "a", mib)
	must(t, "stage", a.stage(t, blockCap()))
	for range 3 {
		must(t, "publish", a.publish(t, blockCap()))
	}
	for range 2 {
		if err := a.unpublish(t); err == nil {
			t.Error("unpublish took more than one layer off")
		}
	}
	a.away(t)
}

func TestKernelFaultStaleDevice(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	a, b := r.attach(t, "a", mib), r.attach(t, "b", mib)
	must(t, "SetFaults", r.SetFaults("stale-device:b"))
	resp, err := r.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: b.id, NodeId: node, VolumeCapability: blockCap()})
	must(t, "ControllerPublishVolume", err)
	if got := resp.GetPublishContext()["devicePath"]; got != a.device() {
		t.Errorf("the publish context names %s, want the other volume's %s", got, a.device())
	}
	must(t, "stage", b.stage(t, blockCap()))
	must(t, "publish", b.publish(t, blockCap()))
	if rdev(t, b.target()) != rdev(t, a.device()) {
		t.Error("block publish shows the volume's own device")
	}
	must(t, "unpublish", b.unpublish(t))
	must(t, "SetFaults", r.SetFaults())
	must(t, "publish", b.publish(t, blockCap()))
	if rdev(t, b.target()) != rdev(t, b.device()) {
		t.Error("without the fault block publish shows another device")
	}
	b.away(t)
	a.away(t)
}

func TestKernelFaultBlankDevice(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{})
	a := r.attach(t, "a", 4*mib)
	must(t, "write", os.WriteFile(a.device(), bytes.Repeat([]byte{7}, int(4*mib)), 0))
	must(t, "SetFaults", r.SetFaults("blank-device:"+a.id))
	must(t, "stage", a.stage(t, blockCap()))
	for range 2 {
		must(t, "publish", a.publish(t, blockCap()))
		got, err := os.ReadFile(a.target())
		must(t, "read", err)
		if !bytes.Equal(got, make([]byte, 4*mib)) {
			t.Errorf("the blank device has %d bytes, not all of them zero", len(got))
		}
		must(t, "scribble", os.WriteFile(a.target(), []byte("scribble"), 0))
		must(t, "unpublish", a.unpublish(t))
		must(t, "unstage", a.unstage(t)) // a new one next time
		must(t, "stage", a.stage(t, blockCap()))
	}
	must(t, "SetFaults", r.SetFaults())
	must(t, "publish", a.publish(t, blockCap()))
	got, err := os.ReadFile(a.target())
	must(t, "read", err)
	if !bytes.Equal(got, bytes.Repeat([]byte{7}, int(4*mib))) {
		t.Error("the volume's own data are not back")
	}
	a.away(t)
}

func TestKernelFaultIgnoreBlock(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{Faults: []string{"ignore-block"}})
	a := r.attach(t, "a", mib)
	must(t, "stage", a.stage(t, blockCap()))
	must(t, "publish", a.publish(t, blockCap()))
	if fi, err := os.Lstat(a.target()); err != nil || !fi.IsDir() {
		t.Errorf("the target is %v, %v; want a directory", fi, err)
	}
	a.away(t)
}

// expand grows a volume, and returns what NodeExpandVolume says to it.
func (a *attached) expand(t *testing.T, bytes int64, change func(*csi.NodeExpandVolumeRequest)) error {
	t.Helper()
	r := &csi.CapacityRange{RequiredBytes: bytes}
	_, err := a.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: a.id, CapacityRange: r, VolumeCapability: blockCap()})
	must(t, "ControllerExpandVolume", err)
	req := &csi.NodeExpandVolumeRequest{VolumeId: a.id, VolumePath: a.target(), StagingTargetPath: a.staging(), CapacityRange: r, VolumeCapability: blockCap()}
	if change != nil {
		change(req)
	}
	_, err = a.NodeExpandVolume(t.Context(), req)
	return err
}

func TestKernelFaultLateGrowth(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{Faults: []string{"late-growth", "error:NodeExpandVolume#1=INTERNAL"}})
	a := r.attach(t, "a", mib)
	must(t, "stage", a.stage(t, blockCap()))
	must(t, "publish", a.publish(t, blockCap()))
	for _, want := range []int64{mib, 2 * mib} {
		err := a.expand(t, 2*mib, nil)
		if got := deviceBytes(t, a.target()); got != want {
			t.Errorf("the device has %d bytes after NodeExpandVolume: %v; want %d", got, err, want)
		}
	}
	a.away(t)
}

func TestKernelFaultPickyExpand(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{Faults: []string{"picky-expand"}})
	a := r.attach(t, "a", mib)
	must(t, "stage", a.stage(t, blockCap()))
	must(t, "publish", a.publish(t, blockCap()))
	for what, change := range map[string]func(*csi.NodeExpandVolumeRequest){
		"no range":           func(r *csi.NodeExpandVolumeRequest) { r.CapacityRange = nil },
		"no capability":      func(r *csi.NodeExpandVolumeRequest) { r.VolumeCapability = nil },
		"another capability": func(r *csi.NodeExpandVolumeRequest) { r.VolumeCapability = mountCap("") },
		"no staging path":    func(r *csi.NodeExpandVolumeRequest) { r.StagingTargetPath = "" },
	} {
		wantCode(t, what, a.expand(t, 2*mib, change), codes.InvalidArgument)
	}
	must(t, "expand", a.expand(t, 2*mib, nil))
	a.away(t)
}

func TestKernelFaultOneMount(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{Faults: []string{"one-mount"}})
	a := r.attach(t, "a", mib)
	must(t, "stage", a.stage(t, blockCap()))
	for range 2 {
		must(t, "publish", a.publish(t, blockCap()))
	}
	first := a.dir
	a.dir = t.TempDir()
	publish := &csi.NodePublishVolumeRequest{
		VolumeId: a.id, StagingTargetPath: filepath.Join(first, "staging"), TargetPath: a.target(), VolumeCapability: blockCap(), PublishContext: a.context,
	}
	_, err := a.NodePublishVolume(t.Context(), publish)
	wantCode(t, "a second target", err, codes.FailedPrecondition)
	a.dir = first
	must(t, "unpublish", a.unpublish(t))
	publish.Readonly = true
	_, err = a.NodePublishVolume(t.Context(), publish)
	wantCode(t, "read-only", err, codes.InvalidArgument)
	a.away(t)
}

func TestKernelFaultForgetful(t *testing.T) {
	kernel.Need(t, "root", "loop")
	r := start(t, loopdriver.Config{Faults: []string{"forgetful"}})
	a := r.attach(t, "a", mib)
	wantCode(t, "unpublish", a.unpublish(t), codes.NotFound)
	wantCode(t, "unstage", a.unstage(t), codes.NotFound)
	must(t, "stage", a.stage(t, blockCap()))
	must(t, "publish", a.publish(t, blockCap()))
	a.away(t)
}

func TestKernelFaultFormatEarly(t *testing.T) {
	kernel.Need(t, "root", "loop", "exec:mkfs.ext4", "exec:blkid")
	r := start(t, loopdriver.Config{Faults: []string{"format-early"}})
	for c, want := range map[*csi.VolumeCapability]string{blockCap(): "", mountCap("ext4"): "ext4"} {
		req := createRequest("a "+want, 16*mib)
		req.VolumeCapabilities = []*csi.VolumeCapability{c}
		resp, err := r.CreateVolume(t.Context(), req)
		must(t, "CreateVolume", err)
		out, _ := exec.CommandContext(t.Context(), "blkid", "-p", "-o", "value", "-s", "TYPE", r.BackingFile(resp.GetVolume().GetVolumeId())).Output()
		if got := strings.TrimSpace(string(out)); got != want {
			t.Errorf("a new volume holds %q, want %q", got, want)
		}
	}
}

func TestKernelFaultShortName(t *testing.T) {
	kernel.Need(t, "root", "loop", "ext4", "exec:mkfs.ext4")
	r := start(t, loopdriver.Config{Faults: []string{"short-name"}, DeviceKey: "at"})
	a := r.attach(t, "a", 16*mib)
	own := a.context["at"]
	long := filepath.Join(t.TempDir(), "device")
	must(t, "link", os.Symlink(own, long))
	a.context["at"] = long
	wantCode(t, "stage", a.stage(t, mountCap("ext4")), codes.NotFound)
	a.context["at"] = own
	must(t, "stage", a.stage(t, mountCap("ext4")))
	must(t, "publish", a.publish(t, mountCap("ext4")))
	a.away(t)
}
