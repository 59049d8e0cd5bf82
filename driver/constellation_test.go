package driver_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/driver/drivertest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

const luksUUID = "0b9c1a52-6f0e-4d5b-9a3e-8f1c2d3e4f50"

// constellation is a node in Constellation mode, and what it said.
type constellation struct {
	*machine
	theirs *drivertest.ConstellationKeys
	said   *bytes.Buffer
}

// newConstellation has one volume that Constellation made, with a filesystem.
func newConstellation(t *testing.T, integrity dek.Integrity, fstype string) *constellation {
	c := &constellation{machine: newMachine(t), theirs: &drivertest.ConstellationKeys{}, said: &bytes.Buffer{}}
	c.cfg.Constellation = drivertest.Mapper{Kernel: c.kernel}
	c.cfg.Keys = c.theirs
	c.cfg.Logger = slog.New(slog.NewTextHandler(c.said, nil))
	c.ok("making the volume", c.kernel.MakeConstellation(c.disk.Path, luksUUID, integrity, fstype))
	return c
}

// stageAs stages with entries of ours in the volume context, given in pairs.
func (c *constellation) stageAs(capability *csi.VolumeCapability, entries ...string) error {
	req := c.stageRequest(capability)
	for i := 0; i < len(entries); i += 2 {
		req.VolumeContext[entries[i]] = entries[i+1]
	}
	_, err := c.node.NodeStageVolume(c.t.Context(), req)
	return err
}

func TestConstellationVolume(t *testing.T) {
	for name, tt := range map[string]struct {
		integrity dek.Integrity
		as        *csi.VolumeCapability
		entries   []string
	}{
		"by its UUID":       {as: mountCap("ext4"), entries: []string{"cryptcsi.io/dek-id", luksUUID}},
		"by its header":     {as: mountCap("ext4")},
		"any filesystem":    {as: mountCap("")},
		"integrity by name": {integrity: dek.IntegrityHMAC, as: mountCap("ext4-integrity")},
		"integrity by ours": {integrity: dek.IntegrityHMAC, as: mountCap("ext4"), entries: []string{"cryptcsi.io/integrity", "hmac-sha256"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newConstellation(t, tt.integrity, "ext4")
			c.start()
			for round := range 2 {
				c.ok("stage", c.stageAs(tt.as, tt.entries...))
				c.ok("stage again", c.stageAs(tt.as, tt.entries...))
				if round == 0 {
					c.write(c.staging(), "secret words")
				}
				c.read(c.staging(), "secret words")
				if m := c.mapping(); m.Integrity != tt.integrity {
					t.Errorf("the mapping is %+v", m)
				}
				if st := c.state(); st.DEK != luksUUID || st.Filesystem != "ext4" {
					t.Errorf("the state file says %+v", st)
				}
				c.ok("publish", c.publish(tt.as, "a", false))
				c.ok("unpublish", c.unpublish("a"))
				c.ok("unstage", c.unstage())
				c.clean()
			}
			if n := strings.Count(c.said.String(), "as Constellation made it"); n != 2 {
				t.Errorf("two stages warned %d times", n)
			}
			if warned := strings.Contains(c.said.String(), "host can put another volume in its place"); warned == strings.Contains(name, "UUID") {
				t.Errorf("warned of a key that the disk names: %v", warned)
			}
			if len(c.theirs.Asked) == 0 || c.theirs.Asked[0] != luksUUID {
				t.Errorf("asked for %v", c.theirs.Asked)
			}
			if n := c.count("Make") + c.count("ConfirmDEK") + c.count("ClaimFormat"); n != 0 {
				t.Errorf("formatted, claimed or confirmed: %v", c.faults.Trace())
			}
		})
	}
}

// state reads the volume's state file.
func (c *constellation) state() (st struct {
	DEK        dek.ID `json:"dek_id"`
	Filesystem string `json:"filesystem"`
}) {
	c.t.Helper()
	files, _ := filepath.Glob(filepath.Join(c.dir, "kubelet/plugins/kubernetes.io/csi/*/cryptcsi/*/volume.json"))
	if len(files) != 1 {
		c.t.Fatalf("state files: %v", files)
	}
	data, err := os.ReadFile(files[0])
	c.ok("reading the state file", err)
	c.ok("decoding the state file", json.Unmarshal(data, &st))
	return st
}

func TestConstellationVolumeGrows(t *testing.T) {
	c := newConstellation(t, dek.IntegrityNone, "ext4")
	c.start()
	c.ok("stage", c.stageAs(mountCap("ext4")))
	before := c.mapping().Size
	c.kernel.GrowDisk(c.disk.Path, 96*mib)
	if size, err := c.expand(c.staging(), 96*mib); err != nil || size != 96*mib {
		t.Fatalf("expand = %d, %v", size, err)
	}
	if got := c.mapping().Size; got != before+32*mib {
		t.Errorf("the mapping has %d bytes, had %d", got, before)
	}
	c.ok("unstage", c.unstage())
	c.clean()
}

func TestConstellationRefusals(t *testing.T) {
	const otherUUID = "11111111-6f0e-4d5b-9a3e-8f1c2d3e4f50"
	for name, tt := range map[string]struct {
		integrity dek.Integrity
		fstype    string
		setup     func(c *constellation)
		as        *csi.VolumeCapability
		entries   []string
		code      codes.Code
		words     string
	}{
		"another UUID":              {fstype: "ext4", as: mountCap("ext4"), entries: []string{"cryptcsi.io/dek-id", otherUUID}, code: codes.FailedPrecondition},
		"no UUID":                   {fstype: "ext4", as: mountCap("ext4"), entries: []string{"cryptcsi.io/dek-id", "loop.cryptcsi.io/vol-1"}, code: codes.InvalidArgument, words: "must be the UUID"},
		"an unknown entry":          {fstype: "ext4", as: mountCap("ext4"), entries: []string{"cryptcsi.io/dek", luksUUID}, code: codes.InvalidArgument, words: "not known"},
		"integrity that is missing": {fstype: "ext4", as: mountCap("ext4-integrity"), code: codes.FailedPrecondition},
		"integrity not asked for":   {integrity: dek.IntegrityHMAC, fstype: "ext4", as: mountCap("ext4"), code: codes.FailedPrecondition},
		"no filesystem":             {as: mountCap("ext4"), code: codes.FailedPrecondition, words: "will not be formatted again"},
		"another filesystem":        {fstype: "xfs", as: mountCap("ext4"), code: codes.FailedPrecondition, words: "asked for is ext4"},
		"an unknown filesystem":     {fstype: "ext4", as: mountCap("zfs-integrity"), code: codes.InvalidArgument, words: `"zfs"`},
		"blanked":                   {fstype: "ext4", as: mountCap("ext4"), setup: func(c *constellation) { c.kernel.BlankDisk(c.disk.Path) }, code: codes.FailedPrecondition, words: "no LUKS header"},
		"blanked, by its UUID": {fstype: "ext4", as: mountCap("ext4"), entries: []string{"cryptcsi.io/dek-id", luksUUID},
			setup: func(c *constellation) { c.kernel.BlankDisk(c.disk.Path) }, code: codes.FailedPrecondition},
		"integrity off": {integrity: dek.IntegrityHMAC, fstype: "ext4", as: mountCap("ext4-integrity"),
			setup: func(c *constellation) { c.cfg.Integrity = driver.IntegrityOff }, code: codes.InvalidArgument, words: "does not offer"},
		"integrity required": {fstype: "ext4", as: mountCap("ext4"), setup: func(c *constellation) { c.cfg.Integrity = driver.IntegrityRequired }, code: codes.FailedPrecondition},
		"a key of ours":      {fstype: "ext4", as: mountCap("ext4"), setup: func(c *constellation) { c.cfg.Keys = ourKey(c.t) }, code: codes.FailedPrecondition, words: "different drivers"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newConstellation(t, tt.integrity, tt.fstype)
			if tt.setup != nil {
				tt.setup(c)
			}
			c.start()
			c.refused("stage", c.stageAs(tt.as, tt.entries...), tt.code, tt.words)
			c.clean()
			if n := c.count("Make"); n != 0 {
				t.Errorf("mkfs ran %d times", n)
			}
		})
	}
}

// ourKey is a key service of ours that has a key of that ID.
func ourKey(t *testing.T) driver.Keys {
	keys := drivertest.NewKeys()
	d, err := keys.CreateDEK(t.Context(), luksUUID, dek.Spec{Cipher: dek.CipherXTS})
	if err != nil {
		t.Fatal(err)
	}
	d.Wipe()
	return keys
}

// Outside of Constellation mode a volume context names no key. The names of
// filesystems ask for integrity there too.
func TestWithoutConstellation(t *testing.T) {
	c := &constellation{machine: newMachine(t)}
	c.start()
	c.refused("another key", c.stageAs(mountCap("ext4"), "cryptcsi.io/dek-id", luksUUID), codes.InvalidArgument, "--key-service-protocol=constellation")
	c.refused("their form", c.stage(mountCap("ext4-integrity")), codes.FailedPrecondition, "no integrity")
	c.clean()

	c = newConstellation(t, dek.IntegrityNone, "ext4")
	c.cfg.Constellation = nil // their key service, and nobody said so
	c.start()
	if err := c.stage(mountCap("ext4")); err == nil {
		t.Error("their volume was staged by a driver that is not in their mode")
	}
	c.clean()
}

func TestConstellationMakesNoKeys(t *testing.T) {
	c := newConstellation(t, dek.IntegrityNone, "ext4")
	c.cfg.Creator = c.keys
	if err := c.tryStart(); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "--create-keys") {
		t.Errorf("started: %v", err)
	}
}
