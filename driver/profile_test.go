package driver_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/loopdriver"
)

var update = flag.Bool("update", false, "write testdata/profiles.txt")

// private is a volume's private directory.
var private = regexp.MustCompile(`\$DIR/kubelet/plugins/kubernetes.io/csi/[^/]+/cryptcsi/[0-9a-f]{64}`)

// settings are what the reference names, driver by driver, as incompatible with
// encryption; and two values of theirs that are harmless.
func settings() [][2]string {
	return [][2]string{
		{"blockSize", "4096"}, {"inodeSize", "256"}, {"bytesPerInode", "4096"}, {"numberOfInodes", "1000"}, {"ext4bigalloc", "true"},
		{"ext4ClusterSize", "16384"}, {"ext4EncryptionSupport", "true"}, {"partition", "1"}, {"data-cache-size", "10Gi"},
		{"data-cache-mode", "writeback"}, {"fsType", "xfs"}, {"fsFormatOptions", "-K"}, {"encryption-passphrase", "x"},
		{"linodebs.csi.linode.com/luks-encrypted", "true"}, {"encrypted", "true"}, {"encrypted", "false"}, {"mounter", "rbd-nbd"},
		{"mounter", "rbd"}, {"share", "true"}, {"linstor.csi.linbit.com/fsOpts", "-K"}, {"linstor.csi.linbit.com/mountOpts", "discard"},
		{"linstor.csi.linbit.com/postMountXfsOpts", "extsize 2m"}, {"FSOpts", "-K"}, {"mountopts", "discard"}, {"PostMountXfsOpts", "extsize 2m"},
		{"linstor.csi.linbit.com/fs-type", "nfs"}, {"linstor.csi.linbit.com/fs-type", "ext4"}, {"mkfsOptions", "-m0"}, {"mkfsParams", "-b 4096"},
		{"tryOtherMounters", "true"}, {"tryOtherMounters", "false"},
	}
}

// habits are how drivers are played here, by their names.
func habits(name string, w *drivertest.Wrapped) {
	w.Name, w.Secret = name, ""
	switch name {
	case "csi.hetzner.cloud", "topolvm.io":
		w.NoStage = true
	case "dobs.csi.digitalocean.com", "linodebs.csi.linode.com":
		w.RoundsDown = true
	case "linstor.csi.linbit.com":
		w.NoStage, w.Key = true, "linstor.csi.linbit.com/device-path"
	}
}

// transcript is what a wrapped driver of that name is asked, and what is
// answered, in all that a profile may change.
type transcript struct {
	strings.Builder
	name    string
	profile *driver.Profile
	dir     string
}

func (s *transcript) line(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if s.dir != "" {
		text = private.ReplaceAllString(strings.ReplaceAll(text, s.dir, "$DIR"), "$$RAW")
	}
	s.WriteString("  " + text + "\n")
}

// recorder notes the requests that pass.
type recorder struct {
	grpc.ClientConnInterface
	s *transcript
}

func (r recorder) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if text := summary(args); text != "" {
		r.s.line("→ %s%s", path.Base(method), text)
	}
	return r.ClientConnInterface.Invoke(ctx, method, args, reply, opts...)
}

func summary(req any) string {
	caps := func(all ...*csi.VolumeCapability) (text string) {
		for _, c := range all {
			kind := "block"
			if m := c.GetMount(); m != nil {
				kind = "mount " + m.GetFsType()
			}
			text += " " + kind + " " + c.GetAccessMode().GetMode().String()
		}
		return text
	}
	switch r := req.(type) {
	case *csi.CreateVolumeRequest:
		return fmt.Sprint(caps(r.GetVolumeCapabilities()...), " ", r.GetParameters(), " ", r.GetCapacityRange().GetRequiredBytes())
	case *csi.ValidateVolumeCapabilitiesRequest:
		return caps(r.GetVolumeCapabilities()...)
	case *csi.NodeStageVolumeRequest:
		return fmt.Sprint(caps(r.GetVolumeCapability()), " at ", r.GetStagingTargetPath(), " ", r.GetPublishContext(), " ", r.GetVolumeContext())
	case *csi.NodePublishVolumeRequest:
		return fmt.Sprint(caps(r.GetVolumeCapability()), " from ", r.GetStagingTargetPath(), " at ", r.GetTargetPath(), " ", r.GetPublishContext(), " ", r.GetVolumeContext())
	case *csi.NodeUnpublishVolumeRequest:
		return " " + r.GetTargetPath()
	case *csi.NodeUnstageVolumeRequest:
		return " " + r.GetStagingTargetPath()
	case *csi.NodeExpandVolumeRequest:
		return fmt.Sprint(caps(r.GetVolumeCapability()), " at ", r.GetVolumePath(), " ", r.GetStagingTargetPath(), " ", r.GetCapacityRange().GetRequiredBytes())
	}
	return ""
}

func (s *transcript) answer(what string, err error) {
	s.line("%s: %v", what, status.Code(err))
}

// controllerPart makes volumes.
func (s *transcript) controllerPart(t *testing.T) {
	p := newPlant(t)
	habits(s.name, p.wrapped)
	c, err := driver.NewController(t.Context(), driver.ControllerConfig{
		Wrapped: recorder{drivertest.Direct(p.wrapped.Register), s}, Profile: s.profile, Keys: p.ring,
	})
	if err != nil {
		s.line("refused: %v", err)
		return
	}
	p.csi = csi.NewControllerClient(drivertest.Direct(c.Register))
	for _, capability := range []*csi.VolumeCapability{
		mountCap("ext4"), capability(readerOnly, mountCap("xfs")), capability(manyReaders, blockCap()), capability(manyWriters, mountCap("ext4")),
	} {
		_, err := p.create(request(fmt.Sprint("pvc-", len(p.wrapped.Volumes())), as(capability), with("theirs", "x")))
		s.answer("create", err)
	}
	refused := ""
	quiet := *s
	for i, setting := range settings() {
		if _, err := p.create(request(fmt.Sprint("set-", i), with(setting[:]...))); err != nil {
			refused += " " + setting[0] + "=" + setting[1]
		}
	}
	s.Reset()
	s.WriteString(quiet.String())
	s.line("refuses the parameters%s", refused)
}

// machine is a node in front of the driver.
func (s *transcript) machine(t *testing.T, change func(*machine)) *machine {
	m := newMachine(t)
	habits(s.name, m.wrapped)
	d, err := m.keys.CreateDEK(t.Context(), dek.ID(s.name+"/"+volumeID), dek.Spec{Cipher: dek.CipherXTS})
	m.ok("CreateDEK", err)
	d.Wipe()
	s.dir = m.dir
	m.cfg.Profile = s.profile
	m.cfg.Wrapped = recorder{drivertest.Direct(m.wrapped.Register), s}
	if change != nil {
		change(m)
	}
	if err := m.tryStart(); err != nil {
		s.line("does not start: %v", err)
		return nil
	}
	return m
}

// request is what kubelet asks, without secrets.
func (s *transcript) stage(m *machine, c *csi.VolumeCapability, change func(*csi.NodeStageVolumeRequest)) error {
	r := m.stageRequest(c)
	r.Secrets = nil
	if change != nil {
		change(r)
	}
	_, err := m.node.NodeStageVolume(m.t.Context(), r)
	return err
}

// nodePart uses a volume.
func (s *transcript) nodePart(t *testing.T) {
	m := s.machine(t, nil)
	if m == nil {
		return
	}
	s.answer("stage", s.stage(m, mountCap("ext4"), nil))
	s.answer("publish", m.publish(mountCap("ext4"), "a", false))
	fail := func(class error) func(string) error {
		return func(rpc string) error { return errdefs.Errorf(class, "injected into %s", rpc) }
	}
	m.wrapped.NodeFault = fail(errdefs.ErrState)
	m.wrapped.Grow(volumeID, 96*mib)
	_, err := m.expand(m.target("a"), 96*mib)
	s.answer("expand, while the driver's own fails", err)
	m.wrapped.NodeFault = nil
	_, err = m.expand(m.target("a"), 128*mib)
	s.answer("expand of a device that has not grown", err)
	m.ok("unpublish", m.unpublish("a"))
	s.answer("unstage", m.unstage())
	s.answer("stage for many readers", s.stage(m, capability(manyReaders, mountCap("ext4")), nil))
	m.ok("unstage", m.unstage())
	m.wrapped.NodeFault = fail(errdefs.ErrInvalid)
	s.answer("stage, while the driver calls it invalid", s.stage(m, capability(readerOnly, mountCap("ext4")), nil))
	m.wrapped.NodeFault = nil
	m.ok("unstage", m.unstage())
	quiet := s.String()
	refused := ""
	for _, setting := range settings() {
		for i, where := range []string{"volume context", "publish context", "secret"} {
			if i > 0 && !slices.Contains([]string{"data-cache-size", "encryption-passphrase"}, setting[0]) {
				continue // they are all looked for everywhere
			}
			err := s.stage(m, mountCap("ext4"), func(r *csi.NodeStageVolumeRequest) {
				maps.Copy([]map[string]string{r.VolumeContext, r.PublishContext, {}}[i], map[string]string{setting[0]: setting[1]})
				if where == "secret" {
					r.Secrets = map[string]string{setting[0]: setting[1]}
				}
			})
			if err == nil {
				m.ok("unstage", m.unstage())
				continue
			}
			refused += " " + where + " " + setting[0] + "=" + setting[1] + ","
			m.ok("unstage", m.unstage())
		}
	}
	s.Reset()
	s.WriteString(quiet)
	s.line("refuses the%s", refused)
	s.handOver(t)
}

// handOver lets the driver make the filesystem.
func (s *transcript) handOver(t *testing.T) {
	m := s.machine(t, func(m *machine) { m.cfg.StageWith = driver.StageWithWrapped })
	if m == nil {
		return
	}
	s.answer("stage by handing over", s.stage(m, mountCap("ext4"), nil))
	s.answer("unstage", m.unstage())
}

func transcribe(t *testing.T, name string, profile *driver.Profile) string {
	t.Helper()
	s := &transcript{name: name, profile: profile}
	s.WriteString(name + "\n")
	s.controllerPart(t)
	if p, _ := driver.ProfileOf(name); profile == nil && p.Refused != "" {
		return s.String()
	}
	s.nodePart(t)
	return s.String()
}

// TestProfiles compares what each known driver, and one that is not known, is
// asked with testdata/profiles.txt, which was read against the drivers' sources.
func TestProfiles(t *testing.T) {
	names := append(slices.Sorted(maps.Keys(driver.Profiles())), "rook-ceph.rbd.csi.ceph.com", "rook-ceph.cephfs.csi.ceph.com", "who.example.com")
	var all strings.Builder
	for _, name := range names {
		all.WriteString(transcribe(t, name, nil))
	}
	file := filepath.Join("testdata", "profiles.txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(all.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(all.String(), "\n")); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// TestEveryProfileCounts takes each row, each of its fields, and each setting
// that it refuses out of the table: every one of them must change something.
func TestEveryProfileCounts(t *testing.T) {
	for name, row := range driver.Profiles() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := transcribe(t, name, &row)
			differs := func(what string, p driver.Profile) {
				if transcribe(t, name, &p) == want {
					t.Errorf("%s makes no difference", what)
				}
			}
			differs("the row", driver.Profile{})
			if row.Refused != "" {
				return
			}
			for i := range reflect.TypeFor[driver.Profile]().NumField() {
				p := row
				field := reflect.ValueOf(&p).Elem().Field(i)
				if !field.IsZero() {
					field.SetZero()
					differs(reflect.TypeFor[driver.Profile]().Field(i).Name, p)
				}
			}
			for i, setting := range row.Refuses {
				p := row
				p.Refuses = slices.Delete(slices.Clone(row.Refuses), i, i+1)
				differs("refusing "+setting.Key, p)
			}
		})
	}
}

// TestEveryKnownDriverIsPlayed: csi-sanity runs over all that test/loopdriver
// plays.
func TestEveryKnownDriverIsPlayed(t *testing.T) {
	for name, p := range driver.Profiles() {
		if p.Known && name != loopdriver.DefaultName && !slices.Contains(loopdriver.Others(), name) {
			t.Errorf("loopdriver does not know the habits of %s", name)
		}
	}
}

// TestParseProfile makes each row of the table by fields alone.
func TestParseProfile(t *testing.T) {
	none, yes := driver.Profile{}, driver.Profile{Known: true, CreateAsBlock: true, OneNode: true, SingleWriter: true, NeverGrows: true, WholeGiB: true, Alias: true}
	azure, _ := driver.ProfileOf("disk.csi.azure.com")
	less := azure
	less.Refuses, less.OneNode = azure.Refuses[1:], true
	for text, want := range map[string]driver.Profile{
		"":                   none,
		"disk.csi.azure.com": azure,
		"disk.csi.azure.com,allow=FSTYPE,one-node=yes":                                                          less,
		",known=yes,create-as-block=yes,one-node=yes,single-writer=yes,never-grows=yes,whole-gib=yes,alias=yes": yes,
		",expand=skip,not-ready=yes":                                                                            {Expand: driver.ExpandSkip, NotReady: errdefs.ErrInvalid},
		",expand=delegate,expand=best-effort,not-ready=yes,not-ready=no,known=yes,known=no":                     none,
		",hand-over=theDevice": {HandOver: true, DeviceKey: "theDevice"},
		"csi.hetzner.cloud,hand-over=no,known=no,whole-gib=no,allow=fsFormatOptions,allow=encryption-passphrase": none,
	} {
		got, err := driver.ParseProfile(text)
		if diff := cmp.Diff(want, got, cmpopts.EquateErrors(), cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got)\n%s", text, err, diff)
		}
	}
	for text, says := range map[string]string{
		"who.example.com": "who.example.com", ",known": "no value", ",known=": "no value", ",known=true": "no, yes",
		",expand=no": "delegate", ",knwon=yes": "no such field", ",not-ready=INVALID_ARGUMENT": "no, yes", ",refuse=": "no value",
	} {
		if _, err := driver.ParseProfile(text); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want ErrInvalid with %q", text, err, says)
		}
	}
	if p, err := driver.ParseProfile("nfs.csi.k8s.io,known=yes"); err != nil || p.Refused == "" {
		t.Errorf("NFS can be wrapped by a flag: %v", err)
	}
	if p, err := driver.ParseProfile("ebs.csi.aws.com,refuse=x"); err != nil {
		t.Errorf("refuse: %v", err)
	} else if s := p.Refuses[len(p.Refuses)-1]; s.Key != "x" || s.Why == "" {
		t.Errorf("refuse=x adds %+v", s)
	}
}
