package dek_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/secret"
)

func TestVolumeID(t *testing.T) {
	for _, tt := range []struct {
		driver, volume string
		want           dek.ID
		ok             bool
	}{
		{"ebs.csi.aws.com", "vol-0123456789abcdef0", "ebs.csi.aws.com/vol-0123456789abcdef0", true},
		{"pd.csi.storage.gke.io", "projects/p/zones/z/disks/d", "pd.csi.storage.gke.io/projects/p/zones/z/disks/d", true},
		{"d", "", "", false},
		{"", "v", "", false},
		{"a/b", "v", "", false},
		{"snap:a", "v", "", false},
		{"d", "with space", "", false},
		{"d", "new\nline", "", false},
		{"d", "ünicode", "", false},
		{"d", strings.Repeat("x", 510), dek.ID("d/" + strings.Repeat("x", 510)), true},
		{"d", strings.Repeat("x", 511), "", false},
	} {
		got, err := dek.VolumeID(tt.driver, tt.volume)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("VolumeID(%q, %q) = %q, %v", tt.driver, tt.volume, got, err)
		}
	}
}

func TestSnapshotID(t *testing.T) {
	snapshot, err := dek.SnapshotID("ebs.csi.aws.com", "snap-1")
	if err != nil || snapshot != "snap:ebs.csi.aws.com/snap-1" || !snapshot.Snapshot() {
		t.Errorf("SnapshotID = %q, %v", snapshot, err)
	}
	volume, err := dek.VolumeID("ebs.csi.aws.com", "snap:1")
	if err != nil || volume.Snapshot() {
		t.Errorf("volume %q, %v", volume, err)
	}
	for _, bad := range [][2]string{{"", "s"}, {"a:b", "s"}, {"d", ""}, {"d", "a b"}} {
		if id, err := dek.SnapshotID(bad[0], bad[1]); err == nil {
			t.Errorf("SnapshotID(%q) = %q", bad, id)
		}
	}
}

// The longest that Azure allows: a resource group's name has up to 90 characters,
// a disk's or snapshot's 80, and a CSI driver's 63.
func TestIDsOfAzure(t *testing.T) {
	group := "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/" + strings.Repeat("g", 90)
	name, driver := strings.Repeat("n", 80), strings.Repeat("d", 63)
	if id, err := dek.VolumeID(driver, group+"/providers/Microsoft.Compute/disks/"+name); err != nil {
		t.Errorf("a disk's ID of %d bytes: %v", len(id), err)
	}
	if id, err := dek.SnapshotID(driver, group+"/providers/Microsoft.Compute/snapshots/"+name); err != nil {
		t.Errorf("a snapshot's ID of %d bytes: %v", len(id), err)
	}
}

// TestFingerprint: a value computed with another implementation of HKDF, and
// another for every key.
func TestFingerprint(t *testing.T) {
	key := secret.New(dek.Size)
	defer key.Wipe()
	for i := range key.Expose() {
		key.Expose()[i] = byte(i)
	}
	if got, want := dek.Fingerprint(key), "dd630a267d5152021908e838369b9771"; got != want {
		t.Errorf("Fingerprint = %s, want %s", got, want)
	}
	was := dek.Fingerprint(key)
	key.Expose()[31] ^= 1
	if dek.Fingerprint(key) == was {
		t.Error("two keys have one fingerprint")
	}
}

func TestSpecValidate(t *testing.T) {
	for _, good := range []dek.Spec{
		{Cipher: dek.CipherXTS},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Name: "pvc-1"},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone},
		{Cipher: dek.CipherXTS, Discard: true},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: dek.ModeDirect},
		{Cipher: dek.CipherXTS, KEK: "0-gold-"},
		{Cipher: dek.CipherXTS, KEK: strings.Repeat("k", 63)},
	} {
		if err := good.Validate(); err != nil {
			t.Errorf("%+v: %v", good, err)
		}
	}
	for _, bad := range []dek.Spec{
		{},
		{Cipher: "cipher_null-ecb"},
		{Cipher: dek.CipherXTS, Integrity: "crc32c"},
		{Cipher: dek.CipherXTS, Layout: dek.LayoutClone},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: "thin"},
		{Cipher: dek.CipherXTS, Layout: dek.LayoutConstellation},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Discard: true},
		{Cipher: dek.CipherXTS, IntegrityMode: dek.ModeDirect},
		{Cipher: dek.CipherXTS, KEK: "-gold"},
		{Cipher: dek.CipherXTS, KEK: "Gold"},
		{Cipher: dek.CipherXTS, KEK: "gold:"},
		{Cipher: dek.CipherXTS, KEK: strings.Repeat("k", 64)},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: "bitmap"},
		{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: dek.ModeDirect, Layout: dek.LayoutClone},
		{Cipher: dek.CipherXTS, Name: strings.Repeat("n", 300)},
	} {
		if bad.Validate() == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}

func TestNewUUID(t *testing.T) {
	re := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := map[string]bool{}
	for range 1000 {
		u := dek.NewUUID()
		if !re.MatchString(u) || seen[u] {
			t.Fatalf("UUID %q is malformed or came twice", u)
		}
		seen[u] = true
	}
}

func TestClaimValidate(t *testing.T) {
	uuid := dek.NewUUID()
	for name, c := range map[string]struct {
		claim    dek.Claim
		released bool
		ok       bool
	}{
		"held":                {dek.Claim{Node: "node-1", UUID: uuid}, false, true},
		"held, in a record":   {dek.Claim{Node: "node-1", UUID: uuid}, true, true},
		"released":            {dek.Claim{UUID: uuid}, true, true},
		"nobody's":            {dek.Claim{UUID: uuid}, false, false},
		"no UUID":             {dek.Claim{Node: "node-1"}, false, false},
		"upper case":          {dek.Claim{Node: "n", UUID: strings.ToUpper(uuid[:35] + "a")}, false, false},
		"dash out of place":   {dek.Claim{Node: "n", UUID: uuid[1:] + "0"}, false, false},
		"long UUID":           {dek.Claim{Node: "n", UUID: uuid + "0"}, false, false},
		"name of 256 bytes":   {dek.Claim{Node: strings.Repeat("n", 256), UUID: uuid}, false, true},
		"name of 257 bytes":   {dek.Claim{Node: strings.Repeat("n", 257), UUID: uuid}, false, false},
		"name of other bytes": {dek.Claim{Node: "\xff", UUID: uuid}, false, false},
	} {
		if err := c.claim.Validate(c.released); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
