package driver_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// plant is a controller with a real keyring and a wrapped driver in memory.
type plant struct {
	t       *testing.T
	wrapped *drivertest.Wrapped
	ring    *envelope.Keyring
	faults  *drivertest.Faults
	list    driver.Plaintext
	keks    []string
	csi     csi.ControllerClient
	group   csi.GroupControllerClient
	id      csi.IdentityClient
}

func newPlant(t *testing.T) *plant {
	t.Helper()
	store, err := envelope.LocalStores().Open(t.Context(), "mem://")
	if err != nil {
		t.Fatal(err)
	}
	ring, err := envelope.New([]*kms.KEK{kms.New("fake", kmstest.NewBackend(), kms.Options{})}, []envelope.Store{store}, envelope.Options{KEKNames: []string{"gold"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ring.Close() })
	return &plant{t: t, ring: ring, faults: &drivertest.Faults{}, wrapped: &drivertest.Wrapped{Kernel: drivertest.NewKernel()}}
}

// start starts a controller process; again, it is the next one.
func (p *plant) start() *plant {
	p.t.Helper()
	c, err := driver.NewController(p.t.Context(), driver.ControllerConfig{
		Wrapped: p.faults.Conn(drivertest.Direct(p.wrapped.Register)), Keys: p.faults.ControllerKeys(p.ring), Plaintext: p.list, Version: "test", KEKs: p.keks,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	conn := drivertest.Direct(c.Register)
	p.csi, p.group, p.id = csi.NewControllerClient(conn), csi.NewGroupControllerClient(conn), csi.NewIdentityClient(conn)
	return p
}

func (p *plant) ok(what string, err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatalf("%s: %v", what, err)
	}
}

func (p *plant) refused(what string, err error, code codes.Code, words ...string) {
	p.t.Helper()
	(&machine{t: p.t}).refused(what, err, code, words...)
}

// request asks for a volume of 64 MiB; change adapts it.
func request(name string, change ...func(*csi.CreateVolumeRequest)) *csi.CreateVolumeRequest {
	r := &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4")}, CapacityRange: &csi.CapacityRange{RequiredBytes: 64 * mib}}
	for _, c := range change {
		c(r)
	}
	return r
}

func with(parameters ...string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		if r.Parameters == nil {
			r.Parameters = map[string]string{}
		}
		for i := 0; i < len(parameters); i += 2 {
			r.Parameters[parameters[i]] = parameters[i+1]
		}
	}
}

func as(caps ...*csi.VolumeCapability) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) { r.VolumeCapabilities = caps }
}

func of(snapshot, volume string) func(*csi.CreateVolumeRequest) {
	return func(r *csi.CreateVolumeRequest) {
		if snapshot != "" {
			r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
			return
		}
		r.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: volume}}}
	}
}

func (p *plant) create(r *csi.CreateVolumeRequest) (*csi.Volume, error) {
	resp, err := p.csi.CreateVolume(p.t.Context(), r)
	return resp.GetVolume(), err
}

func (p *plant) mustCreate(r *csi.CreateVolumeRequest) *csi.Volume {
	p.t.Helper()
	v, err := p.create(r)
	p.ok("CreateVolume", err)
	return v
}

func (p *plant) snapshot(name, volume string) (*csi.Snapshot, error) {
	resp, err := p.csi.CreateSnapshot(p.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume})
	return resp.GetSnapshot(), err
}

func (p *plant) delete(id string) error {
	_, err := p.csi.DeleteVolume(p.t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	return err
}

func (p *plant) expand(id string, size int64) (*csi.ControllerExpandVolumeResponse, error) {
	return p.csi.ControllerExpandVolume(p.t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
}

func volumeDEK(id string) dek.ID   { return dek.ID("loop.cryptcsi.io/" + id) }
func snapshotDEK(id string) dek.ID { return dek.ID("snap:loop.cryptcsi.io/" + id) }

// dek is what the keyring has recorded.
func (p *plant) dek(id dek.ID) dek.DEK {
	p.t.Helper()
	d, err := p.ring.GetDEK(context.Background(), id)
	p.ok("GetDEK of "+string(id), err)
	p.t.Cleanup(d.Wipe)
	return d
}

// gone fails the test unless the DEK was deleted for good.
func (p *plant) gone(id dek.ID) {
	p.t.Helper()
	if _, err := p.ring.GetDEK(context.Background(), id); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "deleted") {
		p.t.Errorf("%s: %v, want one that was deleted", id, err)
	}
}

func (p *plant) lawful() {
	p.t.Helper()
	for _, v := range p.wrapped.Kernel.Violations() {
		p.t.Errorf("violation: %s", v)
	}
}

// formatted makes a node's part of the record: format and confirm.
func (p *plant) formatted(id dek.ID) {
	p.t.Helper()
	uuid := dek.NewUUID()
	_, err := p.ring.ClaimFormat(p.t.Context(), id, dek.Claim{Node: "n", UUID: uuid})
	p.ok("ClaimFormat", err)
	p.ok("ConfirmDEK", p.ring.ConfirmDEK(p.t.Context(), id, dek.HeaderID{UUID: uuid, Sequence: 2}))
}

func TestCreateVolume(t *testing.T) {
	p := newPlant(t)
	p.wrapped.AnswerContext = map[string]string{"cryptcsi.io/encrypted": "no", "cryptcsi.io/dek-id": "another's"}
	p.start()
	v := p.mustCreate(request("pvc-1", with("theirs", "x")))
	if v.GetCapacityBytes() != 64*mib || v.GetVolumeId() != "vol-pvc-1" {
		t.Errorf("volume = %v", v)
	}
	if got := fmt.Sprint(v.GetVolumeContext()); got != "map[cryptcsi.io/encrypted:1 name:pvc-1]" {
		t.Errorf("context = %s", got)
	}
	d := p.dek(volumeDEK("vol-pvc-1"))
	if d.State != dek.Prepared || d.Spec != (dek.Spec{Name: "pvc-1", Cipher: dek.CipherXTS}) {
		t.Errorf("DEK = %+v", d)
	}
	again := p.mustCreate(request("pvc-1", with("theirs", "x")))
	if again.String() != v.String() || !p.dek(volumeDEK("vol-pvc-1")).Key.Equal(d.Key) {
		t.Errorf("the same call again: %v, or another key", again)
	}
	_, err := p.create(request("pvc-1", with("cryptcsi.io/integrity", "hmac-sha256")))
	p.refused("with integrity this time", err, codes.AlreadyExists)

	v = p.mustCreate(request("pvc-2", with("cryptcsi.io/integrity", "hmac-sha256", "cryptcsi.io/cipher", "aes-xts-plain64")))
	if v.GetVolumeContext()["cryptcsi.io/integrity"] != "hmac-sha256" || v.GetCapacityBytes() < 64*mib || p.dek(volumeDEK("vol-pvc-2")).Spec.Integrity != dek.IntegrityHMAC {
		t.Errorf("with integrity: %v", v)
	}
	v = p.mustCreate(request("pvc-3", as(mountCap("ext4-integrity"))))
	if v.GetVolumeContext()["cryptcsi.io/integrity"] != "hmac-sha256" {
		t.Errorf("with integrity by the filesystem's name: %v", v)
	}
	p.lawful()
}

func TestCreateVolumeRefuses(t *testing.T) {
	p := newPlant(t).start()
	both := with("cryptcsi.io/integrity", "none")
	for what, tt := range map[string]struct {
		req  *csi.CreateVolumeRequest
		says string
	}{
		"no name":                  {request(""), "no name"},
		"no capability":            {request("x", as()), "capability"},
		"an unknown parameter":     {request("x", with("cryptcsi.io/integrty", "hmac-sha256")), "cryptcsi.io/integrty is not known"},
		"half a discard":           {request("x", with("cryptcsi.io/discard", "yes")), `cryptcsi.io/discard: "yes" is not offered: "true" or "false"`},
		"discard and integrity":    {request("x", with("cryptcsi.io/discard", "true", "cryptcsi.io/integrity", "hmac-sha256")), "cryptcsi.io/discard: a volume with integrity"},
		"a mode without integrity": {request("x", with("cryptcsi.io/integrity-mode", "journal")), "cryptcsi.io/integrity-mode says"},
		"another mode":             {request("x", with("cryptcsi.io/integrity", "hmac-sha256", "cryptcsi.io/integrity-mode", "bitmap")), `"bitmap"`},
		"direct and dm-clone":      {request("x", with("cryptcsi.io/integrity", "hmac-sha256", "cryptcsi.io/integrity-mode", "direct", "cryptcsi.io/integrity-init", "clone")), `cryptcsi.io/integrity-mode: "direct" goes with cryptcsi.io/integrity-init "wipe" only`},
		"a name that no KEK has":   {request("x", with("cryptcsi.io/kek", "Gold")), "cryptcsi.io/kek: KEK name"},
		"a KEK without a name":     {request("x", with("cryptcsi.io/kek", "")), "cryptcsi.io/kek: KEK name"},
		"a KEK, and no names":      {request("x", with("cryptcsi.io/kek", "gold")), `cryptcsi.io/kek: there is no KEK "gold": this controller was given no names`},
		"a wrong prefix":           {request("x", with("CryptCSI.io/integrity", "hmac-sha256")), "CryptCSI.io/integrity"},
		"another integrity":        {request("x", with("cryptcsi.io/integrity", "crc32")), `"crc32"`},
		"another cipher":           {request("x", with("cryptcsi.io/cipher", "null")), `"null"`},
		"another filesystem":       {request("x", as(mountCap("ntfs"))), "ntfs"},
		"integrity and none":       {request("x", both, as(mountCap("ext4-integrity"))), "cryptcsi.io/integrity"},
		"many writers":             {request("x", as(capability(manyWriters, mountCap("ext4")))), "MULTI_NODE_MULTI_WRITER"},
		"many, one by one":         {request("x", as(mountCap("ext4"), capability(manyWriters, mountCap("ext4")))), "MULTI_NODE_MULTI_WRITER"},
		"integrity on many nodes":  {request("x", with("cryptcsi.io/integrity", "hmac-sha256"), as(capability(manyWriters, blockCap()))), "integrity"},
		"a range from large to less": {request("x", func(r *csi.CreateVolumeRequest) {
			r.CapacityRange = &csi.CapacityRange{RequiredBytes: 2, LimitBytes: 1}
		}), "no sense"},
		"a mutable one of ours": {request("x", func(r *csi.CreateVolumeRequest) {
			r.MutableParameters = map[string]string{"cryptcsi.io/integrity": "none"}
		}), "cryptcsi.io/integrity"},
	} {
		_, err := p.create(tt.req)
		p.refused(what, err, codes.InvalidArgument, tt.says)
	}
	p.mustCreate(request("shared", as(capability(manyWriters, blockCap()))))
	if got := p.wrapped.Volumes(); !slices.Equal(got, []string{"vol-shared"}) {
		t.Errorf("volumes: %v", got)
	}
	p.lawful()
}

// The context with our marks has to fit into what the specification allows.
func TestContextLimit(t *testing.T) {
	p := newPlant(t).start()
	p.wrapped.AnswerContext = map[string]string{"k": strings.Repeat("v", 4<<10-len("k"+"name"+"pvc-1"+"cryptcsi.io/encrypted"+"1"))}
	p.mustCreate(request("pvc-1"))
	p.wrapped.AnswerContext["k"] += "v"
	_, err := p.create(request("pvc-2"))
	p.refused("one byte more", err, codes.FailedPrecondition, "4097")
}

// A driver rounds as it likes: what is reported is what can be used, and not
// more than was allowed.
func TestSizes(t *testing.T) {
	p := newPlant(t).start()
	p.wrapped.Rounds = 1 << 30
	if v := p.mustCreate(request("pvc-1")); v.GetCapacityBytes() != 1<<30-16*mib {
		t.Errorf("capacity = %d", v.GetCapacityBytes())
	}
	p.wrapped.Rounds = 0
	v := p.mustCreate(request("pvc-2", with("cryptcsi.io/integrity", "hmac-sha256"), func(r *csi.CreateVolumeRequest) {
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: 100 * mib, LimitBytes: 100 * mib}
	}))
	if v.GetCapacityBytes() != 100*mib {
		t.Errorf("capacity with a limit = %d", v.GetCapacityBytes())
	}
	e, err := p.expand("vol-pvc-1", 3<<30)
	p.ok("expand", err)
	if e.GetCapacityBytes() != 3<<30 || !e.GetNodeExpansionRequired() {
		t.Errorf("expand = %v", e)
	}
	p.mustCreate(request("pvc-3", with("cryptcsi.io/integrity", "hmac-sha256")))
	e, err = p.expand("vol-pvc-3", 200*mib)
	p.ok("expanding one with integrity", err)
	if e.GetCapacityBytes() != 200*mib || !e.GetNodeExpansionRequired() {
		t.Errorf("expand = %v", e)
	}
	p.wrapped.Create("plain", 64*mib)
	e, err = p.expand("plain", 96*mib)
	p.ok("expanding an unencrypted one", err)
	if e.GetCapacityBytes() != 96*mib {
		t.Errorf("expand = %v", e)
	}

	c, err := p.csi.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: map[string]string{"cryptcsi.io/integrity": "none"}})
	p.ok("GetCapacity", err)
	if c.GetAvailableCapacity() != 1<<40-16*mib || c.GetMaximumVolumeSize().GetValue() != 1<<30-16*mib || c.GetMinimumVolumeSize().GetValue() != 1 {
		t.Errorf("capacity = %v", c)
	}
	l, err := p.csi.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	p.ok("ListVolumes", err)
	if got := l.GetEntries()[1].GetVolume(); got.GetVolumeId() != "vol-pvc-1" || got.GetCapacityBytes() != 3<<30 {
		t.Errorf("volumes = %v", l)
	}
	s, err := p.snapshot("s", "vol-pvc-2")
	p.ok("CreateSnapshot", err)
	if s.GetSizeBytes() > v.GetCapacityBytes()+2*mib || s.GetSizeBytes() < 100*mib {
		t.Errorf("snapshot of %d bytes, its volume can use %d", s.GetSizeBytes(), v.GetCapacityBytes())
	}
	ls, err := p.csi.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SnapshotId: s.GetSnapshotId()})
	p.ok("ListSnapshots", err)
	if ls.GetEntries()[0].GetSnapshot().GetSizeBytes() != s.GetSizeBytes() {
		t.Errorf("snapshots = %v, want the size %d", ls, s.GetSizeBytes())
	}
}

// Clouds sell whole GiB. Their drivers round up, or down and answer with what they
// were asked for, and are then surprised by the same call again. A volume has what
// was asked for all the same, and its snapshot is restored with the size that the
// volume was asked for with: external-provisioner refuses less than it is told.
func TestWholeGiB(t *testing.T) {
	const gib = 1 << 30
	sized := func(size int64) func(*csi.CreateVolumeRequest) {
		return func(r *csi.CreateVolumeRequest) { r.CapacityRange = &csi.CapacityRange{RequiredBytes: size} }
	}
	for name, set := range map[string]func(*drivertest.Wrapped){
		"ebs.csi.aws.com":           func(w *drivertest.Wrapped) { w.Rounds = gib },
		"dobs.csi.digitalocean.com": func(w *drivertest.Wrapped) { w.RoundsDown = true },
	} {
		for _, integrity := range []string{"none", "hmac-sha256"} {
			p := newPlant(t)
			p.wrapped.Name = name
			set(p.wrapped)
			p.start()
			class := with("cryptcsi.io/integrity", integrity)
			id := func(volume string) dek.ID { return dek.ID(name + "/" + volume) }
			has := func(volume string, size int64) {
				t.Helper()
				if got := driver.UsableSize(p.wrapped.Volume(volume).Size, p.dek(id(volume)).Spec); got < size {
					t.Errorf("%s, integrity %s: %s has %d bytes of %d", name, integrity, volume, got, size)
				}
			}
			for i, size := range []int64{gib, 10 * gib, 200 * gib, 10*gib + 300*mib} {
				v, copied := fmt.Sprint("v", i), fmt.Sprint("copy", i)
				got := p.mustCreate(request(v, class, sized(size)))
				if again := p.mustCreate(request(v, class, sized(size))); got.GetCapacityBytes() < size || again.String() != got.String() {
					t.Errorf("%v, and again %v", got, again)
				}
				has("vol-"+v, size)
				s, err := p.snapshot(v, "vol-"+v)
				p.ok("CreateSnapshot", err)
				if s.GetSizeBytes() > size || s.GetSizeBytes() < size-gib {
					t.Errorf("%s, integrity %s: the snapshot of a volume of %d bytes is restored with %d", name, integrity, size, s.GetSizeBytes())
				}
				p.mustCreate(request(copied, class, sized(s.GetSizeBytes()), of(s.GetSnapshotId(), "")))
				if p.wrapped.Volume("vol-"+copied).Size != p.wrapped.Volume("vol-"+v).Size {
					t.Errorf("the copy has %d bytes, its source %d", p.wrapped.Volume("vol-"+copied).Size, p.wrapped.Volume("vol-"+v).Size)
				}
				e, err := p.expand("vol-"+v, size+gib)
				p.ok("ControllerExpandVolume", err)
				if e.GetCapacityBytes() != size+gib {
					t.Errorf("grew to %d", e.GetCapacityBytes())
				}
				has("vol-"+v, size+gib)
			}
		}
	}
}

// external-provisioner's questions are answered, with what a pod can use. Up to
// version 4 its capacity controller has a capability that says nothing, from 5
// on none, and both have the class's parameters as they are written; before it
// creates on a node it asks with what it will create.
func TestCapacityForTheProvisioner(t *testing.T) {
	p := newPlant(t).start()
	const integrity, fsType = "cryptcsi.io/integrity", "csi.storage.k8s.io/fstype"
	for i, tt := range []struct {
		class  []string
		caps   []*csi.VolumeCapability
		fsType string // of the volumes that will be created
	}{
		{nil, []*csi.VolumeCapability{saysNothing()}, "ext4"},
		{[]string{integrity, "hmac-sha256"}, []*csi.VolumeCapability{saysNothing()}, "ext4"},
		{nil, nil, "ext4"},
		{[]string{integrity, "hmac-sha256"}, nil, "ext4"},
		{[]string{fsType, "ext4"}, nil, "ext4"},
		{[]string{fsType, "ext4-integrity"}, nil, "ext4-integrity"},
		{nil, []*csi.VolumeCapability{mountCap("xfs")}, "xfs"},
		{nil, []*csi.VolumeCapability{saysNothing(), mountCap("xfs-integrity")}, "xfs-integrity"},
	} {
		r := request(fmt.Sprint(i), with("theirs", "x"), with(tt.class...), as(mountCap(tt.fsType)))
		asked := &csi.GetCapacityRequest{
			Parameters: r.GetParameters(), VolumeCapabilities: tt.caps,
			AccessibleTopology: &csi.Topology{Segments: map[string]string{"topology.example.com/node": "n"}},
		}
		c, err := p.csi.GetCapacity(t.Context(), asked)
		p.ok(fmt.Sprint("GetCapacity ", asked), err)
		// The largest volume fits into the largest device, and fills it.
		largest := c.GetMaximumVolumeSize().GetValue()
		r.CapacityRange = &csi.CapacityRange{RequiredBytes: largest}
		p.mustCreate(r)
		if got := p.wrapped.Volume("vol-" + r.GetName()).Size; got > 1<<30 || got < 1<<30-mib || c.GetAvailableCapacity() <= largest || c.GetAvailableCapacity() >= 1<<40 {
			t.Errorf("GetCapacity %v = %v, and a volume of the largest size takes %d bytes", asked, c, got)
		}
		inner, want := p.wrapped.LastCapacity(), proto.CloneOf(asked)
		delete(want.Parameters, integrity)
		for _, capability := range want.GetVolumeCapabilities() {
			if m := capability.GetMount(); m.GetFsType() != "" {
				m.FsType = "xfs"
			}
		}
		if !proto.Equal(inner, want) {
			t.Errorf("the wrapped driver is asked %v, want %v", inner, want)
		}
	}
}

// saysNothing is a capability of external-provisioner's capacity controller.
func saysNothing() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_UNKNOWN},
	}
}

// What cannot be created has no capacity either.
func TestCapacityOfWhatCannotBe(t *testing.T) {
	p := newPlant(t).start()
	for _, req := range []*csi.GetCapacityRequest{
		{Parameters: map[string]string{"cryptcsi.io/colour": "red"}, VolumeCapabilities: []*csi.VolumeCapability{saysNothing()}},
		{VolumeCapabilities: []*csi.VolumeCapability{{AccessMode: mountCap("").GetAccessMode()}}},
		{Parameters: map[string]string{"cryptcsi.io/integrity": "none"}, VolumeCapabilities: []*csi.VolumeCapability{mountCap("ext4-integrity")}},
	} {
		_, err := p.csi.GetCapacity(t.Context(), req)
		p.refused(fmt.Sprint("GetCapacity ", req), err, codes.InvalidArgument)
	}
}

// specs are what a volume can be, as far as its size depends on it.
func specs() []dek.Spec {
	return []dek.Spec{
		{Cipher: dek.CipherXTS},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone},
	}
}

// deviceSize and usableSize are each other's inverse, in both directions.
func TestCapacityArithmetic(t *testing.T) {
	const g = int64(1) << 30
	sizes := []int64{256*g - 4096, 256 * g, 256*g + 1, 256*g + 8<<20, 1<<40 - 1, 1 << 40, 1<<40 + 4096}
	for size := int64(1); size < 1<<55; size = size*3 + 4097 {
		sizes = append(sizes, size)
	}
	for _, spec := range specs() {
		for _, size := range sizes {
			device := driver.DeviceSize(size, spec)
			if got := driver.UsableSize(device, spec); got < size || device%4096 != 0 || driver.DeviceSize(got, spec) > device {
				t.Fatalf("%+v: %d bytes take %d, of which %d can be used", spec, size, device, got)
			}
			if spec.Integrity != dek.IntegrityNone && size > 1<<30 && float64(device) > 1.09*float64(size) {
				t.Errorf("%d bytes take %d", size, device)
			}
		}
		if got := driver.UsableSize(1<<20, spec); got != 0 {
			t.Errorf("of a device smaller than the header %d bytes can be used", got)
		}
	}
}

// A driver that answers with an ID that exists is refused, and what has that ID
// stays as it is: nothing is deleted, no key is lost.
func TestAnotherVolumesID(t *testing.T) {
	p := newPlant(t).start()
	p.mustCreate(request("victim"))
	p.formatted(volumeDEK("vol-victim"))
	before := p.dek(volumeDEK("vol-victim"))
	_, err := p.snapshot("victim", "vol-victim")
	p.ok("CreateSnapshot", err)
	snap := p.dek(snapshotDEK("snap-victim"))

	p.wrapped.AnswerVolume = "vol-victim"
	_, err = p.create(request("attacker"))
	p.refused("CreateVolume", err, codes.AlreadyExists, "vol-victim", "left as it is")
	_, err = p.create(request("attacker-2", of("snap-victim", "")))
	p.refused("CreateVolume from a snapshot", err, codes.AlreadyExists, "vol-victim")
	p.wrapped.AnswerVolume = ""

	p.mustCreate(request("mine"))
	p.formatted(volumeDEK("vol-mine"))
	p.wrapped.AnswerSnapshot = "snap-victim"
	_, err = p.snapshot("attacker", "vol-mine")
	p.refused("CreateSnapshot of another volume", err, codes.AlreadyExists, "snap-victim")
	_, err = p.snapshot("attacker-2", "vol-victim")
	p.refused("CreateSnapshot under another name", err, codes.AlreadyExists, "snap-victim")

	if !slices.Contains(p.wrapped.Volumes(), "vol-victim") || !slices.Contains(p.wrapped.Snapshots(), "snap-victim") {
		t.Error("the victim's were deleted")
	}
	if after := p.dek(volumeDEK("vol-victim")); !after.Key.Equal(before.Key) || after.State != dek.Formatted || after.Spec.Name != "victim" {
		t.Errorf("the victim's record is %+v", after)
	}
	if after := p.dek(snapshotDEK("snap-victim")); !after.Previous.Equal(snap.Previous) {
		t.Error("the victim's snapshot has another key")
	}

	p.ok("DeleteVolume", p.delete("vol-victim"))
	p.wrapped.AnswerVolume = "vol-victim"
	_, err = p.create(request("attacker-3"))
	p.refused("the ID of a deleted volume", err, codes.AlreadyExists, "deleted")
	p.wrapped.AnswerVolume = "a b"
	_, err = p.create(request("attacker-4"))
	p.refused("an ID that is none", err, codes.FailedPrecondition, "cannot have a key")
}

// IDs may be as long as Azure's longest. What can be known to be too long is
// refused before anything is made.
func TestLongIDs(t *testing.T) {
	p := newPlant(t).start()
	group := "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/" + strings.Repeat("g", 90) + "/providers/Microsoft.Compute/"
	p.wrapped.AnswerVolume = group + "disks/" + strings.Repeat("d", 80)
	p.wrapped.AnswerSnapshot = group + "snapshots/" + strings.Repeat("s", 80)
	p.mustCreate(request("pvc-1"))
	p.dek(volumeDEK(p.wrapped.AnswerVolume))
	p.wrapped.AnswerVolume = ""
	p.mustCreate(request("pvc-2"))
	_, err := p.snapshot("s", "vol-pvc-2")
	p.ok("CreateSnapshot", err)
	if d := p.dek(snapshotDEK(p.wrapped.AnswerSnapshot)); d.Source != volumeDEK("vol-pvc-2") {
		t.Errorf("the snapshot's record: %+v", d)
	}

	p.wrapped.AnswerSnapshot = strings.Repeat("s", dek.MaxID)
	_, err = p.snapshot("t", "vol-pvc-2")
	p.refused("a snapshot with a longer ID", err, codes.FailedPrecondition, "cannot have a key")
	long := strings.Repeat("v", dek.MaxID)
	p.faults.Disarm()
	_, err = p.snapshot("u", long)
	p.refused("a snapshot of a volume with a longer ID", err, codes.InvalidArgument, "source volume", "512")
	_, err = p.create(request("x", of("", long)))
	p.refused("a copy of a volume with a longer ID", err, codes.InvalidArgument, "content source", "512")
	_, err = p.create(request(strings.Repeat("n", 257)))
	p.refused("a volume with a long name", err, codes.InvalidArgument, "name", "256")
	if trace := p.faults.Trace(); len(trace) > 0 {
		t.Errorf("refused after %v", trace)
	}
}

func TestDeleteVolume(t *testing.T) {
	p := newPlant(t).start()
	p.mustCreate(request("pvc-1"))
	p.ok("DeleteVolume", p.delete("vol-pvc-1"))
	p.gone(volumeDEK("vol-pvc-1"))
	p.ok("DeleteVolume again", p.delete("vol-pvc-1"))
	p.wrapped.Create("plain", 64*mib)
	p.ok("DeleteVolume without a record", p.delete("plain"))
	p.ok("DeleteVolume of none", p.delete("never was"))
	p.refused("DeleteVolume without an ID", p.delete(""), codes.InvalidArgument)
	if got := p.wrapped.Volumes(); len(got) > 0 {
		t.Errorf("volumes: %v", got)
	}
}

// Restored and cloned volumes begin with their source's key as previous, and go
// on without their source.
func TestSnapshotsAndClones(t *testing.T) {
	p := newPlant(t).start()
	p.mustCreate(request("src"))
	p.formatted(volumeDEK("vol-src"))
	src := p.dek(volumeDEK("vol-src"))
	s, err := p.snapshot("s", "vol-src")
	p.ok("CreateSnapshot", err)
	if s.GetSizeBytes() != 64*mib {
		t.Errorf("a snapshot of %d bytes", s.GetSizeBytes())
	}
	snap := p.dek(snapshotDEK("snap-s"))
	if snap.Source != volumeDEK("vol-src") || !snap.Previous.Equal(src.Key) || snap.Spec.Name != "s" {
		t.Errorf("the snapshot's record: %+v", snap)
	}
	larger := func(r *csi.CreateVolumeRequest) { r.CapacityRange.RequiredBytes = 128 * mib }
	v := p.mustCreate(request("restored", of("snap-s", ""), larger))
	if v.GetCapacityBytes() != 128*mib {
		t.Errorf("restored to %d bytes", v.GetCapacityBytes())
	}
	p.mustCreate(request("clone", of("", "vol-src")))
	p.ok("DeleteVolume of the source", p.delete("vol-src"))
	_, err = p.csi.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "snap-s"})
	p.ok("DeleteSnapshot", err)
	p.gone(volumeDEK("vol-src"))
	p.gone(snapshotDEK("snap-s"))
	for _, id := range []string{"vol-restored", "vol-clone"} {
		if d := p.dek(volumeDEK(id)); d.State != dek.Rotating || !d.Previous.Equal(src.Key) || d.Key.Equal(src.Key) || d.Header != (dek.HeaderID{UUID: src.Header.UUID}) {
			t.Errorf("%s: %+v", id, d)
		}
	}
	_, err = p.snapshot("early", "vol-clone")
	p.refused("a snapshot of a clone that no node has opened", err, codes.Aborted, "use it once")
	_, err = p.create(request("early", of("", "vol-clone")))
	p.refused("a clone of it", err, codes.Aborted, "use it once")
	p.lawful()
}

func TestCopiesThatCannotBe(t *testing.T) {
	p := newPlant(t).start()
	p.wrapped.Create("plain", 64*mib)
	_, err := p.snapshot("s", "plain")
	p.refused("a snapshot of an unencrypted volume", err, codes.NotFound, "not encrypted")
	_, err = p.create(request("c", of("", "plain")))
	p.refused("a clone of an unencrypted volume", err, codes.NotFound, "not encrypted")
	_, err = p.create(request("r", of("snap-x", "")))
	p.refused("a volume of no snapshot", err, codes.NotFound, "snap-x")
	p.mustCreate(request("src", with("cryptcsi.io/integrity", "hmac-sha256")))
	_, err = p.create(request("c", of("", "vol-src")))
	p.refused("a clone without the source's integrity", err, codes.InvalidArgument, "integrity")
	p.mustCreate(request("c", of("", "vol-src"), with("cryptcsi.io/integrity", "hmac-sha256")))
	_, err = p.ring.ClaimFormat(t.Context(), volumeDEK("vol-src"), dek.Claim{Node: "node-7", UUID: dek.NewUUID()})
	p.ok("ClaimFormat", err)
	_, err = p.snapshot("s", "vol-src")
	p.refused("a snapshot in the middle of the first format", err, codes.Aborted, "node-7")
	_, err = p.create(request("d", of("", "vol-src"), with("cryptcsi.io/integrity", "hmac-sha256")))
	p.refused("a clone in the middle of the first format", err, codes.Aborted, "node-7")
	if got := p.wrapped.Volumes(); !slices.Equal(got, []string{"plain", "vol-c", "vol-src"}) || len(p.wrapped.Snapshots()) > 0 {
		t.Errorf("there are %v and %v", got, p.wrapped.Snapshots())
	}
}

func TestControllerPassesOn(t *testing.T) {
	p := newPlant(t).start()
	v := p.mustCreate(request("pvc-1", with("cryptcsi.io/integrity", "hmac-sha256")))
	publish := func(c *csi.VolumeCapability) error {
		_, err := p.csi.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{VolumeId: v.GetVolumeId(), NodeId: "node-1", VolumeCapability: c, VolumeContext: v.GetVolumeContext()})
		return err
	}
	p.ok("ControllerPublishVolume", publish(mountCap("ext4-integrity")))
	p.refused("to several nodes", publish(capability(manyWriters, mountCap("ext4"))), codes.InvalidArgument, "MULTI_NODE")
	p.refused("to several nodes with integrity", publish(capability(manyWriters, blockCap())), codes.InvalidArgument, "journal")
	validate := func(c *csi.VolumeCapability) *csi.ValidateVolumeCapabilitiesResponse {
		r, err := p.csi.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{
			VolumeId: v.GetVolumeId(), VolumeCapabilities: []*csi.VolumeCapability{c}, VolumeContext: v.GetVolumeContext(),
			Parameters: map[string]string{"cryptcsi.io/integrity": "hmac-sha256"},
		})
		p.ok("ValidateVolumeCapabilities", err)
		return r
	}
	if r := validate(mountCap("ext4-integrity")); r.GetConfirmed().GetVolumeCapabilities()[0].GetMount().GetFsType() != "ext4-integrity" || len(r.GetConfirmed().GetParameters()) != 1 {
		t.Errorf("confirmed: %v", r)
	}
	if r := validate(capability(manyWriters, mountCap("ext4"))); r.GetConfirmed() != nil || !strings.Contains(r.GetMessage(), "MULTI_NODE") {
		t.Errorf("several writers: %v", r)
	}
	r, err := p.csi.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{ // without its class's parameters
		VolumeId: v.GetVolumeId(), VolumeCapabilities: []*csi.VolumeCapability{capability(manyWriters, blockCap())}, VolumeContext: v.GetVolumeContext(),
	})
	if err != nil || r.GetConfirmed() != nil || !strings.Contains(r.GetMessage(), "journal") {
		t.Errorf("several nodes with integrity: %v, %v", r, err)
	}
	caps, err := p.id.GetPluginCapabilities(t.Context(), &csi.GetPluginCapabilitiesRequest{})
	p.ok("GetPluginCapabilities", err)
	if strings.Contains(caps.String(), "METADATA") || !strings.Contains(caps.String(), "GROUP_CONTROLLER_SERVICE") {
		t.Errorf("capabilities: %v", caps)
	}
	_, err = p.csi.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{VolumeId: v.GetVolumeId(), MutableParameters: map[string]string{"cryptcsi.io/integrity": "none"}})
	p.refused("ControllerModifyVolume of ours", err, codes.InvalidArgument, "cryptcsi.io/integrity")
}

// A driver that nobody knows has to say that it can do block devices.
func TestUnknownDriver(t *testing.T) {
	p := newPlant(t)
	p.wrapped.Name, p.wrapped.NotBlock = "who.example.com", true
	p.start()
	_, err := p.create(request("pvc-1"))
	p.refused("CreateVolume", err, codes.InvalidArgument, "who.example.com", "block device", "files only")
	if _, err := p.ring.GetDEK(t.Context(), "who.example.com/vol-pvc-1"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a record: %v", err)
	}
	p.wrapped.NotBlock = false
	p.mustCreate(request("pvc-2"))
}

// Each operation of two steps and more, with a fault at each step: nothing is
// handed out without a record, no record goes before its volume, and the same
// call again, or giving up, leads to an orderly end.
func TestFaultsOfTheController(t *testing.T) {
	for _, tt := range interrupted() {
		t.Run(tt.name, func(t *testing.T) {
			p := tt.plant(t)
			p.ok("without a fault", tt.do(p))
			steps := p.faults.Trace()
			if len(steps) < 2 {
				t.Fatalf("only %v", steps)
			}
			for n, step := range steps {
				for _, f := range append(faults(), fault{name: "fails for now before", how: func() error { return errdefs.Errorf(errdefs.ErrUnavailable, "injected, try again") }}) {
					t.Run(fmt.Sprintf("%s step %d %s", f.name, n+1, step), func(t *testing.T) { tt.fails(t, n+1, f) })
				}
			}
		})
	}
}

// Whatever the key side says about something new: the sidecars come again, with
// the claim deleted too, so that a disk or snapshot which is there already is
// not left behind. For external-provisioner and external-snapshotter all codes
// but these are the end (checkError and isCSIFinalError in their sources).
func TestRefusalsOfTheKeySideAreNotTheEnd(t *testing.T) {
	goOn := []codes.Code{codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.Aborted}
	refusals := []error{
		errdefs.Errorf(errdefs.ErrDenied, "kms:Encrypt is not allowed"), errdefs.Errorf(errdefs.ErrCorrupt, "the record does not verify"),
		errdefs.Errorf(errdefs.ErrState, "the bucket is missing"), errdefs.Errorf(errdefs.ErrInvalid, "there is no KEK of that name"),
		errdefs.Errorf(errdefs.ErrUnavailable, "the store does not answer"), errdefs.Errorf(errdefs.ErrConflict, "others change the record"),
		context.DeadlineExceeded, status.Error(codes.ResourceExhausted, "too many calls"), status.Error(codes.Unauthenticated, "who is that"), errors.New("whatever"),
	}
	asked := 0
	for _, tt := range interrupted()[:5] { // what makes something
		p := tt.plant(t)
		p.ok(tt.name, tt.do(p))
		for n, step := range p.faults.Trace() {
			if strings.HasPrefix(step, "rpc ") {
				continue
			}
			for _, refusal := range refusals {
				asked++
				p := tt.plant(t)
				p.faults.Arm(n+1, false, func() error { return refusal })
				err := tt.do(p)
				p.faults.Disarm()
				if !slices.Contains(goOn, status.Code(err)) || !strings.Contains(err.Error(), status.Convert(refusal).Message()) {
					t.Errorf("%s, %s fails by %v: %v", tt.name, step, refusal, err)
				}
				p.ok("again", tt.do(p))
				tt.after(p)
			}
		}
	}
	if asked < 11*len(refusals) {
		t.Errorf("only %d refusals", asked)
	}
}

// interruption is a call in which something fails.
type interruption struct {
	name    string
	prepare func(*plant)
	do      func(*plant) error
	always  func(p *plant, err error) // after the fault
	after   func(p *plant)            // after the same call again
}

func (i interruption) plant(t *testing.T) *plant {
	p := newPlant(t).start()
	i.prepare(p)
	p.faults.Disarm()
	return p
}

// fails lets the call fail at a step, and makes it again.
func (i interruption) fails(t *testing.T, step int, f fault) {
	p := i.plant(t)
	p.faults.Arm(step, f.after, f.how)
	err := i.do(p)
	p.faults.Disarm()
	if f.dies {
		p.start()
	}
	i.always(p, err)
	for _, what := range []string{"again", "and again"} {
		p.ok(what, i.do(p))
		i.after(p)
	}
	p.lawful()
	if status.Code(err) == codes.AlreadyExists {
		t.Errorf("the fault's answer: %v", err)
	}
}

func interrupted() []interruption {
	nothing := func(*plant) {}
	source := func(p *plant) {
		p.mustCreate(request("src"))
		p.formatted(volumeDEK("vol-src"))
	}
	snapshot := func(p *plant) error { _, err := p.snapshot("s", "vol-src"); return err }
	snapshotted := func(p *plant) {
		source(p)
		p.ok("CreateSnapshot", snapshot(p))
	}
	create := func(change ...func(*csi.CreateVolumeRequest)) func(*plant) error {
		return func(p *plant) error { _, err := p.create(request("new", change...)); return err }
	}
	made := func(state dek.State) func(*plant) {
		return func(p *plant) { recorded("vol-new", state)(p, nil) }
	}
	group, deleteGroup := interruptedGroups()
	return []interruption{
		{"create", nothing, create(), recorded("vol-new", ""), made(dek.Prepared)},
		{"restore", snapshotted, create(of("snap-s", "")), recorded("vol-new", ""), made(dek.Rotating)},
		{"clone", source, create(of("", "vol-src")), recorded("vol-new", ""), made(dek.Rotating)},
		{"snapshot", source, snapshot, func(p *plant, err error) {
			if err == nil {
				p.dek(snapshotDEK("snap-s"))
			}
		}, func(p *plant) {
			if d := p.dek(snapshotDEK("snap-s")); !d.Previous.Equal(p.dek(volumeDEK("vol-src")).Key) {
				p.t.Error("the snapshot has another key")
			}
		}},
		group,
		{"delete", source, func(p *plant) error { return p.delete("vol-src") }, func(p *plant, err error) {
			if slices.Contains(p.wrapped.Volumes(), "vol-src") {
				p.dek(volumeDEK("vol-src")) // the record never goes first
			}
			if err == nil {
				p.gone(volumeDEK("vol-src"))
			}
		}, func(p *plant) { p.gone(volumeDEK("vol-src")) }},
		{"delete snapshot", snapshotted, func(p *plant) error {
			_, err := p.csi.DeleteSnapshot(p.t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: "snap-s"})
			return err
		}, func(p *plant, _ error) {
			if len(p.wrapped.Snapshots()) > 0 {
				p.dek(snapshotDEK("snap-s"))
			}
			p.dek(volumeDEK("vol-src"))
		}, func(p *plant) { p.gone(snapshotDEK("snap-s")) }},
		deleteGroup,
		{"expand", source, func(p *plant) error { _, err := p.expand("vol-src", 128*mib); return err }, func(*plant, error) {}, nothing},
	}
}

// recorded checks the record of a volume that was handed out, or, where state
// is "", only then.
func recorded(volume string, state dek.State) func(*plant, error) {
	return func(p *plant, err error) {
		p.t.Helper()
		if err != nil {
			return
		}
		d := p.dek(volumeDEK(volume))
		if d.Spec.Name != "new" || state != "" && d.State != state {
			p.t.Errorf("the record of %s: %+v", volume, d)
		}
		if n := len(p.wrapped.Volumes()); n > 2 {
			p.t.Errorf("%d volumes", n)
		}
	}
}

// TestKernelOverhead holds deviceSize against cryptsetup and the kernel's
// dm-integrity: what is mapped on a device of that size is as large as asked
// for, and not much larger.
func TestKernelOverhead(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-crypt", "dm-integrity", "exec:cryptsetup")
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte(strings.Repeat("k", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, spec := range specs() {
		for _, size := range []int64{1 * mib, 15 * mib, 16 * mib, 16*mib + 4096, 64 * mib, 100*mib + 512, 1 << 30, 7<<30 + 12345*4096, 8 << 30, 100 << 30, 256 << 30, 256<<30 + 4096, 1 << 40, 5 << 40} {
			// A device of its own each time, that is gone before the next.
			t.Run(fmt.Sprintf("%s %s %d", spec.Integrity, spec.Layout, size), func(t *testing.T) { overhead(t, key, spec, size) })
		}
	}
}

// overhead lets cryptsetup make a device of the size that is asked of the cloud
// for a volume, and compares what it gives with what was asked for.
func overhead(t *testing.T, key string, spec dek.Spec, size int64) {
	cryptsetup := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "cryptsetup", args...).CombinedOutput(); err != nil {
			t.Fatalf("cryptsetup %v: %v\n%s", args, err, out)
		}
	}
	device := kernel.Loop(t, driver.DeviceSize(size, spec))
	args := []string{"luksFormat", "-q", "--type=luks2", "--cipher=aes-xts-plain64", "--sector-size=4096", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--key-file=" + key}
	if spec.Integrity != dek.IntegrityNone {
		args = append(args, "--integrity="+string(spec.Integrity), "--integrity-no-wipe")
	}
	cryptsetup(append(args, device)...)
	cryptsetup("open", "--key-file="+key, device, "overhead")
	mapped, err := driver.Linux{}.Device("/dev/mapper/overhead")
	cryptsetup("close", "overhead")
	if err != nil {
		t.Fatal(err)
	}
	if spec.Layout == dek.LayoutClone {
		mapped.Size -= driver.CloneArea(mapped.Size)
	}
	t.Logf("%d bytes usable, %d more than asked for", mapped.Size, mapped.Size-size)
	if mapped.Size < size || mapped.Size < driver.UsableSize(driver.DeviceSize(size, spec), spec) {
		t.Errorf("%d bytes were asked for, %d are there", size, mapped.Size)
	}
	if mapped.Size > max(size, 4*mib)+16*mib+size/500 || spec.Layout == "" && mapped.Size > max(size, 4*mib)+3*mib+size/500 {
		t.Errorf("%d bytes were asked for, %d are there", size, mapped.Size)
	}
}
