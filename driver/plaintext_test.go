package driver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// listed is a machine whose volume is in the list of unencrypted ones, and has
// no DEK.
func listed(t *testing.T) *machine {
	m := newMachine(t)
	m.keys.Lose(dekID)
	m.cfg.Plaintext = driver.Plaintext{dekID: true}
	return m
}

// passPublish is NodePublishVolume as kubelet makes it, with all that a wrapped
// driver may want to see.
func (m *machine) passPublish(c *csi.VolumeCapability, pod string) error {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.target(pod)), 0o750); err != nil {
		m.t.Fatal(err)
	}
	if c.GetMount() != nil { // some drivers make the directory themselves
		if err := os.MkdirAll(m.target(pod), 0o750); err != nil {
			m.t.Fatal(err)
		}
	}
	stage := m.stageRequest(c)
	_, err := m.node.NodePublishVolume(m.t.Context(), &csi.NodePublishVolumeRequest{
		VolumeId: volumeID, StagingTargetPath: m.staging(), TargetPath: m.target(pod), VolumeCapability: c,
		PublishContext: stage.PublishContext, Secrets: stage.Secrets, VolumeContext: stage.VolumeContext,
	})
	return err
}

func (m *machine) passStage(c *csi.VolumeCapability) error {
	m.t.Helper()
	if err := os.MkdirAll(m.staging(), 0o750); err != nil {
		m.t.Fatal(err)
	}
	return m.stage(c)
}

// A listed volume is the wrapped driver's alone: it gets the calls as they come,
// and nobody makes a key, a mapping or a private directory for it.
func TestPassThrough(t *testing.T) {
	for _, noStage := range []bool{false, true} {
		for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap("ext4"), "block": blockCap()} {
			t.Run(fmt.Sprintf("%s, without stage %v", name, noStage), func(t *testing.T) {
				m := listed(t)
				m.wrapped.NoStage = noStage
				m.start()
				m.ok("stage", m.passStage(c))
				m.ok("publish", m.passPublish(c, "a"))
				var want []string
				if !noStage {
					want = append(want, "stage "+name)
				}
				if got := m.wrapped.Calls(); !slices.Equal(got, append(want, "publish "+name)) {
					t.Errorf("the wrapped driver was called with %v", got)
				}
				if _, ok := m.keys.Record(dekID); ok || m.count("Open") > 0 {
					t.Error("a key or a mapping was made")
				}
				if c.GetMount() != nil {
					m.write(m.target("a"), "not secret")
					m.read(m.target("a"), "not secret")
				} else if dev, err := m.kernel.Device(m.target("a")); err != nil || strings.HasPrefix(dev.Number, "254:") {
					t.Errorf("at the target is %+v, %v", dev, err)
				}
				m.ok("unpublish", m.unpublish("a"))
				m.ok("unstage", m.unstage())
				m.ok("unstage again", m.unstage())
				m.clean()
			})
		}
	}
}

// Whatever contradicts the list makes an error, never plaintext and never a
// format.
func TestPassThroughIsContradicted(t *testing.T) {
	with := func(key, value string) func(*machine, *csi.NodeStageVolumeRequest) {
		return func(_ *machine, r *csi.NodeStageVolumeRequest) { r.VolumeContext[key] = value }
	}
	for name, tt := range map[string]struct {
		set  func(*machine, *csi.NodeStageVolumeRequest)
		code codes.Code
		says string
	}{
		"a record":      {func(m *machine, _ *csi.NodeStageVolumeRequest) { m.createDEK(dek.Spec{Cipher: dek.CipherXTS}) }, codes.FailedPrecondition, "it is encrypted"},
		"our mark":      {with("cryptcsi.io/encrypted", "1"), codes.FailedPrecondition, "cryptcsi.io/encrypted"},
		"another of us": {with("cryptcsi.io/encrypted", "0"), codes.FailedPrecondition, "cryptcsi.io/encrypted"},
		"integrity":     {with("cryptcsi.io/integrity", "hmac-sha256"), codes.FailedPrecondition, "cryptcsi.io/integrity"},
		"no answer about a record": {func(m *machine, _ *csi.NodeStageVolumeRequest) {
			m.faults.Arm(1, false, func() error { return errdefs.Errorf(errdefs.ErrUnavailable, "no key service") })
		}, codes.Unavailable, "no key service"},
		"not in the list": {func(m *machine, _ *csi.NodeStageVolumeRequest) {
			m.cfg.Plaintext = driver.Plaintext{"other.example.com/" + volumeID: true, dekID + "0": true}
			m.start()
		}, codes.NotFound, "no DEK"},
		"an empty list": {func(m *machine, _ *csi.NodeStageVolumeRequest) {
			m.cfg.Plaintext = driver.Plaintext{}
			m.start()
		}, codes.NotFound, "no DEK"},
	} {
		t.Run(name, func(t *testing.T) {
			m := listed(t).start()
			req := m.stageRequest(mountCap("ext4"))
			tt.set(m, req)
			_, err := m.node.NodeStageVolume(t.Context(), req)
			m.refused("stage", err, tt.code, tt.says)
			m.faults.Disarm()
			if req.VolumeContext["cryptcsi.io/encrypted"]+req.VolumeContext["cryptcsi.io/integrity"] == "" && name != "no answer about a record" {
				if m.passPublish(blockCap(), "a") == nil {
					t.Error("published all the same")
				}
				m.removeTargets()
			}
			if !m.kernel.Blank(m.disk.Path) {
				t.Error("something was written to the disk")
			}
			m.clean()
		})
	}
}

func (m *machine) removeTargets() {
	if err := os.RemoveAll(filepath.Join(m.dir, "pods")); err != nil {
		m.t.Error(err)
	}
}

// How full a listed volume is, the wrapped driver says if it can.
func TestPassThroughStats(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap("ext4"), "block": blockCap()} {
		for _, stats := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, %v", name, stats), func(t *testing.T) {
				m := listed(t)
				m.wrapped.Stats, m.wrapped.NoStage = stats, true
				m.start()
				m.ok("publish", m.passPublish(c, "a"))
				want := 64 * mib
				if stats {
					want = 4711
				}
				if got := m.usage(m.target("a")); got[0].GetTotal() != want {
					t.Errorf("the usage is %v, want %d", got, want)
				}
				if !stats {
					_, err := m.node.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: volumeID, VolumePath: m.target("b")})
					m.refused("elsewhere", err, codes.NotFound, "is not at")
				}
				m.lawful()
			})
		}
	}
}

// An encrypted volume in the list whose record is lost is not given to a pod raw.
func TestPassThroughOfALUKSDevice(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(blockCap()))
	m.ok("unstage", m.unstage())
	m.keys.Lose(dekID)
	m.cfg.Plaintext = driver.Plaintext{dekID: true}
	m.start()
	m.ok("stage", m.passStage(blockCap()))
	m.refused("publish", m.passPublish(blockCap(), "a"), codes.FailedPrecondition, "LUKS header", "not given out raw")
	m.ok("unstage", m.unstage())
	m.clean()
}

// What is on a node goes away again, whatever the list says by then.
func TestPassThroughListChanges(t *testing.T) {
	t.Run("taken out while in use", func(t *testing.T) {
		m := listed(t).start()
		m.ok("stage", m.passStage(mountCap("ext4")))
		m.ok("publish", m.passPublish(mountCap("ext4"), "a"))
		m.cfg.Plaintext = nil
		m.start()
		m.ok("unpublish", m.unpublish("a"))
		m.ok("unstage", m.unstage())
		if !slices.Contains(m.wrapped.Calls(), "unstage") {
			t.Error("the wrapped driver was not told")
		}
	})
	t.Run("put in while encrypted and in use", func(t *testing.T) {
		m := newMachine(t).start()
		m.ok("stage", m.stage(mountCap("ext4")))
		m.ok("publish", m.publish(mountCap("ext4"), "a", false))
		m.cfg.Plaintext = driver.Plaintext{dekID: true}
		m.start()
		m.refused("stage again", m.stage(mountCap("ext4")), codes.FailedPrecondition, "it is encrypted")
		m.ok("unpublish", m.unpublish("a"))
		m.ok("unstage", m.unstage())
		m.clean()
	})
}

func TestPassThroughConfigurations(t *testing.T) {
	for name, set := range map[string]func(*machine){
		"creating keys": func(m *machine) { m.cfg.Creator = m.keys },
		"integrity":     func(m *machine) { m.cfg.Integrity = driver.IntegrityRequired },
		"Constellation": func(m *machine) { m.cfg.Constellation = drivertest.Mapper{Kernel: m.kernel} },
	} {
		m := listed(t)
		set(m)
		if err := m.tryStart(); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "pass") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Killed or failing at any step, a volume that is passed through converges and
// leaves nothing.
func TestFaultsInPassThrough(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap("ext4"), "block": blockCap()} {
		life := func(m *machine) error {
			return errors.Join(m.passStage(c), m.passPublish(c, "a"), m.unpublish("a"), m.unstage())
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachFault(t, func(t *testing.T) *machine { return listed(t).start() }, life, func(m *machine, _ fault, _ error) {
				m.ok("unpublish", m.unpublish("a"))
				m.ok("unstage", m.unstage())
				m.clean()
				m.ok("its life again", life(m))
				m.clean()
				if _, ok := m.keys.Record(dekID); ok {
					m.t.Error("a key was made")
				}
			})
		})
	}
}

// The controller of listed volumes.
func TestPassThroughController(t *testing.T) {
	p := newPlant(t)
	p.list = driver.Plaintext{volumeDEK("old"): true, volumeDEK("vol-new"): true}
	p.wrapped.Create("old", 64*mib)
	p.start()
	ctx := context.Background()

	_, err := p.create(request("new"))
	p.refused("a new volume with a listed ID", err, codes.AlreadyExists, "list of unencrypted volumes", "left as it is")
	if !slices.Contains(p.wrapped.Volumes(), "vol-new") {
		t.Error("it was deleted")
	}
	if d, err := p.ring.GetDEK(ctx, volumeDEK("vol-new")); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a key was made for it: %+v, %v", d, err)
	}

	_, err = p.snapshot("s", "old")
	p.refused("a snapshot", err, codes.NotFound, "not encrypted")
	if len(p.wrapped.Snapshots()) > 0 {
		t.Error("a snapshot was cut")
	}
	_, err = p.create(request("clone", of("", "old")))
	p.refused("a clone", err, codes.NotFound, "not encrypted")

	resp, err := p.expand("old", 128*mib)
	if err != nil || resp.GetCapacityBytes() != 128*mib {
		t.Errorf("grew to %v, %v", resp, err)
	}
	list, err := p.csi.ListVolumes(ctx, &csi.ListVolumesRequest{})
	p.ok("ListVolumes", err)
	for _, e := range list.GetEntries() {
		if v := e.GetVolume(); v.GetVolumeId() == "old" && v.GetCapacityBytes() != 128*mib {
			t.Errorf("listed with %d bytes", v.GetCapacityBytes())
		}
	}

	attach := func(volumeContext map[string]string) error {
		_, err := p.csi.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{
			VolumeId: "old", NodeId: "node-1", VolumeCapability: capability(manyWriters, mountCap("nfs")), VolumeContext: volumeContext,
		})
		return err
	}
	p.ok("attaching it in a way that we do not offer", attach(map[string]string{"theirs": "1"}))
	p.refused("attaching it with our mark", attach(map[string]string{"cryptcsi.io/encrypted": "1"}), codes.FailedPrecondition, "one of them is wrong")
	p.ok("DeleteVolume", p.delete("old"))
	if slices.Contains(p.wrapped.Volumes(), "old") {
		t.Error("it is still there")
	}
}

// Other drivers that encrypt have given out plaintext without a word: for
// volumeMode: Block, for a parameter in a wrong spelling, for integrity that was
// asked for and is not there, for a volume whose key was missing. Here each is
// encrypted or refused.
func TestNoSilentPlaintext(t *testing.T) {
	t.Run("volumeMode: Block", func(t *testing.T) {
		m := newMachine(t).start()
		m.ok("stage", m.stage(blockCap()))
		m.ok("publish", m.publish(blockCap(), "a", false))
		dev, err := m.kernel.Device(m.target("a"))
		m.ok("looking at the target", err)
		if dev.Number != m.mapping().Number {
			t.Errorf("the pod has device %s, the mapping is %s", dev.Number, m.mapping().Number)
		}
	})
	t.Run("a wrong spelling", func(t *testing.T) {
		for _, parameter := range []string{"cryptcsi.io/Integrity", "CRYPTCSI.IO/integrity", "cryptcsi/integrity", "cryptcsi.io/encrypt", "cryptcsi-integrity"} {
			p := newPlant(t).start()
			_, err := p.create(request("x", with(parameter, "hmac-sha256")))
			p.refused(parameter, err, codes.InvalidArgument, parameter)
			m := newMachine(t).start()
			req := m.stageRequest(blockCap())
			req.VolumeContext[parameter] = "hmac-sha256"
			_, err = m.node.NodeStageVolume(t.Context(), req)
			m.refused(parameter+" of a static volume", err, codes.InvalidArgument, parameter)
		}
	})
	t.Run("integrity that is not there", func(t *testing.T) {
		m := newMachine(t).start()
		req := m.stageRequest(mountCap("ext4-integrity"))
		_, err := m.node.NodeStageVolume(t.Context(), req)
		m.refused("asked by the filesystem's name", err, codes.FailedPrecondition, "has no integrity")
		m.clean()
	})
	t.Run("no key", func(t *testing.T) {
		for _, c := range []*csi.VolumeCapability{blockCap(), mountCap("ext4")} {
			m := newMachine(t).start()
			m.keys.Lose(dekID)
			m.refused("stage", m.stage(c), codes.NotFound, "no DEK")
			m.refused("publish", m.publish(c, "a", false), codes.FailedPrecondition, "not staged")
			m.clean()
		}
	})
}
