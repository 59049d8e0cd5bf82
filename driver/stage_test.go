package driver_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

func TestMountVolumeFromEndToEnd(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("xfs", "noatime")))
	m.ok("stage again", m.stage(mountCap("xfs", "noatime")))
	m.ok("publish", m.publish(mountCap("xfs", "noatime"), "a", false))
	m.write(m.target("a"), "secret words")
	m.read(m.staging(), "secret words")
	if got, want := m.targets(), []string{m.target("a"), m.staging()}; !cmp.Equal(got, want) {
		t.Errorf("the mapping is mounted at %v, want %v", got, want)
	}
	if r := m.record(); r.State != dek.Formatted || r.Header.UUID != r.Claim.UUID || r.Header.Sequence == 0 || r.Claim.Node != "node-1" {
		t.Errorf("the record is %+v", r)
	}
	m.refused("unstage under a pod", m.unstage(), codes.Unavailable, m.target("a"))
	m.ok("unpublish", m.unpublish("a"))
	if _, err := os.Lstat(m.target("a")); !os.IsNotExist(err) {
		t.Errorf("the target is still there: %v", err)
	}
	m.ok("unstage", m.unstage())
	m.ok("unstage again", m.unstage())
	m.clean()

	m.ok("stage the second time", m.stage(mountCap("")))
	m.read(m.staging(), "secret words")
	m.ok("unstage the second time", m.unstage())
	m.clean()
	if n := m.count("Make"); n != 1 {
		t.Errorf("mkfs ran %d times", n)
	}
}

func TestBlockVolumeFromEndToEnd(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(blockCap()))
	m.ok("stage again", m.stage(blockCap()))
	m.ok("publish", m.publish(blockCap(), "a", false))
	m.ok("publish again", m.publish(blockCap(), "a", false))
	if dev, err := m.kernel.Device(m.target("a")); err != nil || dev.Number != m.mapping().Number {
		t.Errorf("the pod sees device %+v, %v; the mapping is %s", dev, err, m.mapping().Number)
	}
	m.ok("write", m.kernel.WriteAt(m.target("a"), []byte("secret"), 5*mib))
	m.ok("publish read-only for one pod", m.publish(blockCap(), "b", true))
	m.ok("publish it again", m.publish(blockCap(), "b", true))
	m.refused("publish it writable", m.publish(blockCap(), "b", false), codes.AlreadyExists, "read-only true")
	m.ok("unpublish", m.unpublish("a"))
	m.ok("unpublish the other one", m.unpublish("b"))
	m.ok("unstage", m.unstage())
	m.clean()
	m.ok("stage the second time", m.stage(blockCap()))
	got := make([]byte, 6)
	if err := m.kernel.ReadAt(m.mapping().Path, got, 5*mib); err != nil || string(got) != "secret" {
		t.Errorf("the data are %q, %v", got, err)
	}
	m.ok("unstage the second time", m.unstage())
	m.clean()
}

func TestHandingOver(t *testing.T) {
	for name, setup := range map[string]func(m *machine){
		"stage":   func(*machine) {},
		"publish": func(m *machine) { m.wrapped.NoStage = true },
		"alias": func(m *machine) {
			m.cfg.Profile = &driver.Profile{HandOver: true, DeviceKey: "devicePath", Alias: true}
		},
		"forgetful":     func(m *machine) { m.wrapped.Forgets = true },
		"without multi": func(m *machine) { m.wrapped.NoMulti = true },
		"publish without multi": func(m *machine) {
			m.wrapped.NoStage = true
			m.wrapped.NoMulti = true
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.cfg.StageWith = driver.StageWithWrapped
			setup(m)
			m.start()
			for _, mode := range []csi.VolumeCapability_AccessMode_Mode{csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, singleWriter} {
				as := func() *csi.VolumeCapability { return capability(mode, mountCap("xfs")) }
				m.ok("stage", m.stage(as()))
				m.ok("stage again", m.stage(as()))
				m.ok("publish", m.publish(as(), "a", false))
				if m.count("Make")+m.count("Mount") > 2 { // binds for the pod
					t.Errorf("the proxy made or mounted the filesystem itself: %v", m.faults.Trace())
				}
				if r := m.record(); r.State != dek.Formatted {
					t.Errorf("the record is %+v", r)
				}
				if m.record().Claim.Node == "" {
					t.Error("formatted without a claim")
				}
				if data, err := m.kernel.ReadFile(m.staging(), "file"); err == nil && data != "secret words" {
					t.Errorf("the data are %q", data)
				}
				m.write(m.target("a"), "secret words")
				m.ok("unpublish", m.unpublish("a"))
				m.ok("unstage", m.unstage())
				m.clean()
			}
		})
	}
}

func TestHandingOverToADriverThatMountsItsOwnDevice(t *testing.T) {
	m := newMachine(t)
	m.cfg.StageWith = driver.StageWithWrapped
	m.wrapped.MountsRaw = true
	m.start()
	m.refused("stage", m.stage(mountCap("ext4")), codes.FailedPrecondition, "does not stage what it is told")
	m.clean()
	if r := m.record(); r.State != dek.Prepared {
		t.Errorf("the record is %+v", r)
	}
}

func TestBorrowing(t *testing.T) {
	for name, setup := range map[string]func(m *machine){
		"a driver with everything":              func(*machine) {},
		"a driver without NodeStageVolume":      func(m *machine) { m.wrapped.NoStage = true },
		"a driver that stacks mounts":           func(m *machine) { m.wrapped.Stacks = true },
		"a driver that forgets volumes":         func(m *machine) { m.wrapped.Forgets = true },
		"a driver that knows three modes only":  func(m *machine) { m.wrapped.NoMulti = true },
		"another name than the wrapped one":     func(m *machine) { m.cfg.DriverName = "loop.cryptcsi.io"; m.wrapped.Name = "other.example" },
		"an unknown driver that is of no class": func(m *machine) { m.cfg.DriverName = "loop.cryptcsi.io"; m.wrapped.Name = "x" },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			setup(m)
			m.start()
			c := capability(singleWriter, blockCap())
			m.ok("stage", m.stage(c))
			// A new process, that has lost its state file: the device is here.
			states, _ := filepath.Glob(filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/*/cryptcsi/*/volume.json"))
			if len(states) != 1 {
				t.Fatalf("state files: %v", states)
			}
			m.ok("losing the state", os.Remove(states[0]))
			m.start()
			m.ok("stage again", m.stage(c))
			publishes := 0
			for _, c := range m.wrapped.Calls() {
				if strings.HasPrefix(c, "publish") {
					publishes++
				}
			}
			if publishes != 1 {
				t.Errorf("the device was published %d times: %v", publishes, m.wrapped.Calls())
			}
			m.ok("losing the state", os.Remove(states[0]))
			m.ok("unstage", m.unstage())
			m.clean()
		})
	}
}

func TestTheWrappedDriverSeesItsOwnContextOnly(t *testing.T) {
	m := newMachine(t)
	m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC})
	m.start()
	req := m.stageRequest(mountCap("ext4"))
	req.VolumeContext = map[string]string{"theirs": "1", "cryptcsi.io/integrity": "hmac-sha256", "cryptcsi.io/encrypted": "1"}
	_, err := m.node.NodeStageVolume(t.Context(), req)
	m.ok("stage", err)
	last := m.wrapped.LastStage()
	if !cmp.Equal(last.GetVolumeContext(), map[string]string{"theirs": "1"}) || !cmp.Equal(last.GetPublishContext(), m.wrapped.Context(m.disk)) {
		t.Errorf("the wrapped driver got volume context %v and publish context %v", last.GetVolumeContext(), last.GetPublishContext())
	}
	if path := last.GetStagingTargetPath(); path == m.staging() || !strings.HasPrefix(path, filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/")) {
		t.Errorf("the wrapped driver staged at %s", path)
	}
	if m.mapping().Integrity != dek.IntegrityHMAC {
		t.Error("the mapping has no integrity")
	}
	m.ok("unstage", m.unstage())
	m.clean()
}

// stageFails starts a machine, prepares it, and expects that staging is refused
// for good and leaves nothing.
func stageFails(t *testing.T, c *csi.VolumeCapability, code codes.Code, words string, prepare func(m *machine)) {
	t.Helper()
	m := newMachine(t)
	prepare(m)
	if m.driver == nil {
		m.start()
	}
	m.faults.Disarm()
	m.refused("stage", m.stage(c), code, words)
	if n := m.count("Make"); n > 0 {
		t.Errorf("mkfs ran")
	}
	m.clean()
}

// finished stages and unstages once, so that the volume is formatted.
func (m *machine) finished(c *csi.VolumeCapability) {
	m.t.Helper()
	m.start()
	m.ok("stage", m.stage(c))
	if c.GetMount() != nil {
		m.write(m.staging(), "secret words")
	}
	m.ok("unstage", m.unstage())
}

func TestNeverFormatOnDoubt(t *testing.T) {
	ext4 := mountCap("ext4")
	t.Run("no record", func(t *testing.T) {
		stageFails(t, ext4, codes.NotFound, "no DEK", func(m *machine) { m.keys.Lose(dekID) })
	})
	t.Run("foreign data", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "foreign", func(m *machine) {
			m.ok("scribble", m.kernel.WriteAt(m.disk.Path, []byte("LABEL"), 40*mib))
		})
	})
	t.Run("formatted and blank", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "not to be formatted", func(m *machine) {
			m.finished(ext4)
			m.kernel.BlankDisk(m.disk.Path)
		})
	})
	t.Run("formatted and another disk", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "header", func(m *machine) {
			m.finished(ext4)
			other := m.kernel.AddDisk(64 * mib)
			m.ok("a header", m.kernel.WriteAt(other, []byte(`fakeluks:{"UUID":"x","Made":true}`), 0))
			m.kernel.SwapDisks(m.disk.Path, other)
		})
	})
	t.Run("made, and the filesystem gone", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "no filesystem in it", func(m *machine) {
			m.finished(blockCap())
		})
	})
	t.Run("made, and the filesystem gone, handed over", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "no filesystem in it", func(m *machine) {
			m.cfg.StageWith = driver.StageWithWrapped
			m.finished(blockCap())
		})
	})
	t.Run("another filesystem", func(t *testing.T) {
		stageFails(t, mountCap("xfs"), codes.FailedPrecondition, "type ext4, asked for is xfs", func(m *machine) { m.finished(ext4) })
	})
	t.Run("read-only and never formatted", func(t *testing.T) {
		stageFails(t, capability(readerOnly, mountCap("ext4")), codes.FailedPrecondition, "", func(*machine) {})
	})
}

func TestPolicy(t *testing.T) {
	ext4 := mountCap("ext4")
	integrity := dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC}
	t.Run("filesystem and many writers", func(t *testing.T) {
		stageFails(t, capability(manyWriters, mountCap("ext4")), codes.InvalidArgument, "several nodes", func(*machine) {})
	})
	t.Run("integrity in the record and many nodes", func(t *testing.T) {
		stageFails(t, capability(manyWriters, blockCap()), codes.InvalidArgument, "one node at a time", func(m *machine) { m.createDEK(integrity) })
	})
	t.Run("required and not there", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "has no integrity", func(m *machine) { m.cfg.Integrity = driver.IntegrityRequired })
	})
	t.Run("formatting elsewhere", func(t *testing.T) {
		m := newMachine(t).start()
		m.keys.Seize(dekID, dek.Claim{Node: "node-2", UUID: "u"})
		m.refused("stage", m.stage(ext4), codes.Aborted, "node-2")
		m.ok("unstage", m.unstage())
		m.clean()
	})
	for name, tt := range map[string]struct {
		policy  driver.IntegrityPolicy
		context map[string]string
		code    codes.Code
		got     dek.Integrity
	}{
		"default, nothing asked":  {driver.IntegrityDefault, nil, codes.OK, dek.IntegrityNone},
		"default, asked":          {driver.IntegrityDefault, map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}, codes.OK, dek.IntegrityHMAC},
		"off, nothing asked":      {driver.IntegrityOff, nil, codes.OK, dek.IntegrityNone},
		"off, asked":              {driver.IntegrityOff, map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}, codes.InvalidArgument, ""},
		"required, nothing asked": {driver.IntegrityRequired, nil, codes.OK, dek.IntegrityHMAC},
		"less than the policy":    {driver.IntegrityDefault, map[string]string{"cryptcsi.io/integrity": "none"}, codes.InvalidArgument, ""},
		"plaintext":               {driver.IntegrityDefault, map[string]string{"cryptcsi.io/encrypted": "0"}, codes.InvalidArgument, ""},
		"unknown wish":            {driver.IntegrityDefault, map[string]string{"cryptcsi.io/integrity2": "hmac-sha256"}, codes.InvalidArgument, ""},
		"a wrong spelling":        {driver.IntegrityDefault, map[string]string{"CryptCSI.io/integrity": "hmac-sha256"}, codes.InvalidArgument, ""},
	} {
		t.Run("creating: "+name, func(t *testing.T) {
			m := newMachine(t)
			m.keys.Lose(dekID)
			m.cfg.Creator, m.cfg.Integrity = m.keys, tt.policy
			m.start()
			req := m.stageRequest(ext4)
			req.VolumeContext = tt.context
			_, err := m.node.NodeStageVolume(t.Context(), req)
			if tt.code != codes.OK {
				m.refused("stage", err, tt.code)
				if calls := m.wrapped.Calls(); len(calls) > 0 {
					t.Errorf("the wrapped driver was called: %v", calls)
				}
				return
			}
			m.ok("stage", err)
			if got := m.mapping().Integrity; got != tt.got {
				t.Errorf("integrity %q, want %q", got, tt.got)
			}
		})
	}
}

func TestStageArguments(t *testing.T) {
	m := newMachine(t).start()
	for name, spoil := range map[string]func(r *csi.NodeStageVolumeRequest){
		"no volume":           func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "" },
		"volume with a blank": func(r *csi.NodeStageVolumeRequest) { r.VolumeId = "a b" },
		"long volume":         func(r *csi.NodeStageVolumeRequest) { r.VolumeId = strings.Repeat("v", dek.MaxID) },
		"no staging path":     func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "" },
		"relative path":       func(r *csi.NodeStageVolumeRequest) { r.StagingTargetPath = "a/b" },
		"no capability":       func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = nil },
		"no access mode":      func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability.AccessMode = nil },
		"no access type":      func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability.AccessType = nil },
		"odd filesystem":      func(r *csi.NodeStageVolumeRequest) { r.VolumeCapability = mountCap("ntfs") },
	} {
		req := m.stageRequest(mountCap("ext4"))
		spoil(req)
		_, err := m.node.NodeStageVolume(t.Context(), req)
		m.refused(name, err, codes.InvalidArgument)
	}
	if calls := m.wrapped.Calls(); len(calls) > 0 {
		t.Errorf("the wrapped driver was called: %v", calls)
	}
	m.clean()
}

func TestStagedInAnotherWay(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("ext4")))
	m.refused("as block", m.stage(blockCap()), codes.AlreadyExists, "access type")
	m.refused("with flags", m.stage(mountCap("ext4", "noatime")), codes.AlreadyExists, "mount flags")
	m.refused("read-only", m.stage(capability(readerOnly, mountCap("ext4"))), codes.AlreadyExists, "access mode")
	req := m.stageRequest(mountCap("ext4"))
	req.StagingTargetPath += "-elsewhere"
	_, err := m.node.NodeStageVolume(t.Context(), req)
	m.refused("elsewhere", err, codes.AlreadyExists, m.staging())
	m.ok("as before", m.stage(mountCap("ext4")))
	m.ok("unstage", m.unstage())
	m.clean()
}

func TestReadOnly(t *testing.T) {
	for name, c := range map[string]func(*csi.VolumeCapability) *csi.VolumeCapability{
		"one reader": func(c *csi.VolumeCapability) *csi.VolumeCapability { return capability(readerOnly, c) },
		"readers":    func(c *csi.VolumeCapability) *csi.VolumeCapability { return capability(manyReaders, c) },
		"flag":       func(*csi.VolumeCapability) *csi.VolumeCapability { return mountCap("ext4", "ro") },
	} {
		for _, with := range []string{driver.StageWithProxy, driver.StageWithWrapped} {
			t.Run(name+", staged by "+with, func(t *testing.T) {
				m := newMachine(t)
				m.cfg.StageWith = with
				m.finished(mountCap("ext4"))
				ro := c(mountCap("ext4"))
				m.ok("stage", m.stage(ro))
				if !m.mapping().ReadOnly {
					t.Error("the mapping is writable")
				}
				m.ok("publish", m.publish(ro, "a", false))
				if err := m.kernel.WriteFile(m.target("a"), "file", "x"); err == nil {
					t.Error("a pod can write")
				}
				m.read(m.target("a"), "secret words")
				_, err := m.expand(m.target("a"), 0)
				m.refused("expand", err, codes.FailedPrecondition, "read-only")
				m.ok("unpublish", m.unpublish("a"))
				m.ok("unstage", m.unstage())
				m.clean()
			})
		}
	}
	t.Run("block", func(t *testing.T) {
		m := newMachine(t)
		m.finished(blockCap())
		ro := capability(readerOnly, blockCap())
		m.ok("stage", m.stage(ro))
		m.ok("publish", m.publish(ro, "a", true))
		if !m.mapping().ReadOnly {
			t.Error("the mapping is writable")
		}
	})
}

func TestTheDeviceThatIsHandedOut(t *testing.T) {
	ext4 := mountCap("ext4")
	t.Run("a directory", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "not a block device", func(m *machine) { m.wrapped.IgnoreBlock = true })
	})
	t.Run("one path of several", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "multipath", func(m *machine) { m.kernel.Stack(m.disk.Path, "mpatha") })
	})
	t.Run("in use", func(t *testing.T) {
		stageFails(t, ext4, codes.FailedPrecondition, "in use by vg0-lv0", func(m *machine) { m.kernel.Stack(m.disk.Path, "vg0-lv0") })
	})
	t.Run("mounted in the clear", func(t *testing.T) {
		m := newMachine(t).start()
		dir := t.TempDir()
		m.ok("mkfs", m.kernel.Make(t.Context(), m.disk.Path, "ext4", nil, false))
		m.ok("mount", m.kernel.Mount(t.Context(), m.disk.Path, dir, "ext4", nil))
		m.refused("stage", m.stage(ext4), codes.FailedPrecondition, "mounted unencrypted at "+dir)
		m.ok("unmount", m.kernel.Unmount(t.Context(), dir))
		m.clean()
	})
	t.Run("without a size", func(t *testing.T) {
		m := newMachine(t)
		m.wrapped.Create("vol-0", 0)
		m.start()
		req := m.stageRequest(ext4)
		req.VolumeId = "vol-0"
		_, err := m.node.NodeStageVolume(t.Context(), req)
		m.refused("stage", err, codes.Unavailable, "size 0")
	})
}

func TestMappingOnAnotherDevice(t *testing.T) {
	m := newMachine(t)
	m.finished(mountCap("ext4"))
	// A mapping of the volume's name on another disk, held by somebody.
	other := m.kernel.AddDisk(64 * mib)
	key := drivertest.NewDEK(dekID, dek.Spec{Cipher: dek.CipherXTS})
	key.Claim.UUID = "u"
	stale, err := drivertest.Mapper{Kernel: m.kernel}.Open(t.Context(), driver.Volume{Name: driver.MappingName("loop.cryptcsi.io", volumeID), Device: other}, key)
	m.ok("the stale mapping", err)
	release, err := m.kernel.Hold(stale.Path)
	m.ok("holding it", err)
	m.refused("stage", m.stage(mountCap("ext4")), codes.Unavailable, "is there already")
	release()
	m.ok("stage, when nobody holds it", m.stage(mountCap("ext4")))
	m.read(m.staging(), "secret words")
	m.ok("unstage", m.unstage())
	m.clean()
}

func TestAfterAReboot(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap("ext4"), "block": blockCap()} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t).start()
			m.ok("stage", m.stage(c))
			m.ok("publish", m.publish(c, "a", false))
			m.reboot()
			m.refused("publish", m.publish(c, "a", false), codes.FailedPrecondition, "NodeStageVolume")
			m.ok("stage", m.stage(c))
			m.ok("publish", m.publish(c, "a", false))
			m.reboot()
			m.ok("unpublish", m.unpublish("a"))
			m.ok("unstage", m.unstage())
			m.clean()
		})
	}
}

func TestGrownWhileNotInUse(t *testing.T) {
	m := newMachine(t)
	m.finished(mountCap("ext4"))
	m.wrapped.Grow(volumeID, 96*mib)
	m.ok("rescan", m.kernel.Rescan(t.Context(), m.disk.Path))
	m.ok("stage", m.stage(mountCap("ext4")))
	if got := m.mapping().Size; got != 80*mib {
		t.Errorf("the mapping has %d bytes", got)
	}
	if u, err := m.kernel.Usage(m.staging()); err != nil || u.Total != 80*mib {
		t.Errorf("the filesystem has %d bytes, %v", u.Total, err)
	}
	if r := m.record(); r.Header.Sequence < 3 {
		t.Errorf("the floor was not raised: %+v", r)
	}
	m.read(m.staging(), "secret words")
}

func TestAFilesystemThatWasNotUnmounted(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("ext4")))
	m.ok("crash", m.kernel.Dirty(m.mapping().Path))
	m.reboot()
	m.faults.Disarm()
	m.ok("stage", m.stage(mountCap("ext4")))
	trace := m.faults.Trace()
	if check, mount := slices.Index(trace, "Check"), slices.Index(trace, "Mount"); check < 0 || check > mount {
		t.Errorf("fsck did not run before the mount: %v", trace)
	}
}

func TestASecondCallIsToldToComeAgain(t *testing.T) {
	m := newMachine(t).start()
	entered, leave := make(chan struct{}), make(chan struct{})
	m.faults.Arm(3, true, func() error { close(entered); <-leave; return nil })
	first := make(chan error, 1)
	go func() { first <- m.stage(mountCap("ext4")) }()
	<-entered
	m.refused("second stage", m.stage(mountCap("ext4")), codes.Aborted)
	m.refused("unstage meanwhile", m.unstage(), codes.Aborted)
	close(leave)
	m.ok("the first stage", <-first)
	m.ok("stage", m.stage(mountCap("ext4")))
	m.ok("unstage", m.unstage())
	m.clean()
}

func TestStateFileIsPlain(t *testing.T) {
	m := newMachine(t).start()
	m.ok("stage", m.stage(mountCap("ext4")))
	paths, _ := filepath.Glob(filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/loop.cryptcsi.io/cryptcsi/*/*.json"))
	if len(paths) != 1 {
		t.Fatalf("state files: %v", paths)
	}
	data, err := os.ReadFile(paths[0])
	m.ok("reading it", err)
	if strings.Contains(string(data), "hunter2") || !strings.Contains(string(data), volumeID) {
		t.Errorf("the state file:\n%s", data)
	}
	m.ok("a newer version", os.WriteFile(paths[0], []byte(strings.Replace(string(data), `"version": 1`, `"version": 2`, 1)), 0o600))
	m.refused("unstage", m.unstage(), codes.FailedPrecondition, "version 2")
	m.ok("damage", os.WriteFile(paths[0], data[:20], 0o600))
	m.refused("unstage", m.unstage(), codes.FailedPrecondition, "damaged")
	m.ok("repair", os.WriteFile(paths[0], data, 0o600))
	m.ok("unstage", m.unstage())
	m.clean()
}

// step returns the number of a step's first occurrence in a first stage.
func (m *machine) step(name string, c *csi.VolumeCapability) int {
	m.t.Helper()
	probe := newMachine(m.t)
	probe.cfg.StageWith, probe.cfg.Profile = m.cfg.StageWith, m.cfg.Profile
	probe.start()
	probe.faults.Disarm()
	probe.ok("stage", probe.stage(c))
	n := slices.Index(probe.faults.Trace(), name) + 1
	if n == 0 {
		m.t.Fatalf("there is no step %q in %v", name, probe.faults.Trace())
	}
	return n
}

func TestTheDeviceChangesWhileTheKeyIsFetched(t *testing.T) {
	m := newMachine(t).start()
	m.faults.Arm(m.step("GetDEK", mountCap("")), true, func() error {
		m.wrapped.Grow(volumeID, 96*mib)
		return m.kernel.Rescan(t.Context(), m.disk.Path)
	})
	m.refused("stage", m.stage(mountCap("")), codes.Unavailable, "is changing")
	m.ok("stage again", m.stage(mountCap("")))
	m.ok("unstage", m.unstage())
	m.clean()
}

func TestAPodSeesNothingBeforeTheRecordSaysFormatted(t *testing.T) {
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap(""), "block": blockCap()} {
		m := newMachine(t).start()
		seen := false
		m.faults.Arm(m.step("ConfirmDEK", c), false, func() error {
			seen = true
			if err := m.publish(c, "a", false); err == nil {
				t.Errorf("%s: published before the record says formatted", name)
			}
			return nil
		})
		_ = m.stage(c)
		if !seen {
			t.Errorf("%s: there was no ConfirmDEK", name)
		}
	}
}

func TestEveryLayerIsGivenBack(t *testing.T) {
	m := newMachine(t)
	m.wrapped.Stacks = true
	m.start()
	m.ok("stage", m.stage(blockCap()))
	raw, _ := filepath.Glob(filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/*/cryptcsi/*/dev"))
	if len(raw) != 1 {
		t.Fatalf("raw devices: %v", raw)
	}
	for range 3 {
		m.ok("another layer", m.kernel.Mount(t.Context(), m.disk.Path, raw[0], "", []string{"bind"}))
	}
	m.faults.Arm(1000, false, nil)
	m.ok("unstage", m.unstage())
	trace := m.faults.Trace()
	unmounts, unstage := 0, slices.Index(trace, "rpc NodeUnstageVolume")
	for _, step := range trace[:unstage] {
		if step == "Unmount" {
			unmounts++
		}
	}
	if unmounts != 3 {
		t.Errorf("%d layers were taken away before the wrapped driver was told to unstage, want 3: %v", unmounts, trace)
	}
	m.clean()
}

func TestWhatCanBeTriedAgainStaysForTheNextTry(t *testing.T) {
	m := newMachine(t).start()
	m.faults.Arm(m.step("Open", mountCap("")), false, func() error {
		return errdefs.Errorf(errdefs.ErrUnavailable, "initialising, 40 %%")
	})
	m.refused("stage", m.stage(mountCap("")), codes.Unavailable, "initialising, 40 %")
	before := m.wrapped.Calls()
	if want := []string{"stage block", "publish block"}; !cmp.Equal(before, want) {
		t.Errorf("the wrapped driver was called: %v, want %v", before, want)
	}
	m.faults.Disarm()
	m.ok("stage again", m.stage(mountCap("")))
	if got := m.wrapped.Calls()[len(before):]; !cmp.Equal(got, []string{"stage block"}) {
		t.Errorf("then it was called: %v", got)
	}
	m.ok("unstage", m.unstage())
	m.clean()
}

// lyingMapper opens, and says something else.
type lyingMapper struct {
	driver.Mapper
	lie func(*driver.Mapping)
}

func (l lyingMapper) Open(ctx context.Context, v driver.Volume, d dek.DEK) (driver.Mapping, error) {
	m, err := l.Mapper.Open(ctx, v, d)
	l.lie(&m)
	return m, err
}

func TestAMappingThatIsNotWhatItMustBe(t *testing.T) {
	for name, lie := range map[string]func(*driver.Mapping){
		"is on device":            func(m *driver.Mapping) { m.Backing = "8:0" },
		"has read-only":           func(m *driver.Mapping) { m.ReadOnly = !m.ReadOnly },
		"has integrity":           func(m *driver.Mapping) { m.Integrity = dek.IntegrityHMAC },
		"without journal":         func(m *driver.Mapping) { m.Direct = true },
		"lets discards through":   func(m *driver.Mapping) { m.Discard = true },
		"was never formatted and": func(m *driver.Mapping) { m.Made = false },
	} {
		m := newMachine(t)
		m.finished(mountCap(""))
		m.mapper = func(inner driver.Mapper) driver.Mapper { return lyingMapper{inner, lie} }
		m.start()
		c := mountCap("")
		if strings.HasPrefix(name, "was never") {
			c = capability(readerOnly, c)
		}
		m.faults.Disarm()
		m.refused("stage", m.stage(c), codes.FailedPrecondition, name)
		if m.count("Make")+m.count("Mount") > 0 {
			t.Errorf("%s: it was used", name)
		}
		m.clean()
	}
}

func TestTheStateFileOfAMountedVolumeIsLost(t *testing.T) {
	m := newMachine(t).start()
	c := mountCap("xfs")
	m.ok("stage", m.stage(c))
	m.ok("publish", m.publish(c, "a", false))
	m.write(m.target("a"), "secret words")
	states, _ := filepath.Glob(filepath.Join(m.dir, "kubelet/plugins/kubernetes.io/csi/*/cryptcsi/*/volume.json"))
	if len(states) != 1 {
		t.Fatalf("state files: %v", states)
	}
	m.ok("losing it", os.Remove(states[0]))
	m.refused("publish", m.publish(c, "b", false), codes.FailedPrecondition, "NodeStageVolume")
	m.faults.Disarm()
	m.ok("stage", m.stage(c))
	if m.count("Mount")+m.count("Probe")+m.count("Make") > 0 {
		t.Errorf("the mounted filesystem was not left alone: %v", m.faults.Trace())
	}
	m.ok("publish", m.publish(c, "b", false))
	m.read(m.target("b"), "secret words")
	m.ok("unpublish", m.unpublish("a"))
	m.ok("unpublish", m.unpublish("b"))
	m.ok("unstage", m.unstage())
	m.clean()
}
