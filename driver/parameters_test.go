package driver_test

import (
	"cmp"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// The record says whether a volume may discard; a copy may say it otherwise.
func TestDiscardParameter(t *testing.T) {
	p := newPlant(t).start()
	p.mustCreate(request("src", with("cryptcsi.io/discard", "true")))
	if d := p.dek(volumeDEK("vol-src")); d.Spec != (dek.Spec{Name: "src", Cipher: dek.CipherXTS, Discard: true}) {
		t.Errorf("spec = %+v", d.Spec)
	}
	_, err := p.create(request("src"))
	p.refused("without it this time", err, codes.AlreadyExists)
	p.formatted(volumeDEK("vol-src"))
	_, err = p.snapshot("s", "vol-src")
	p.ok("CreateSnapshot", err)
	p.mustCreate(request("copy", of("snap-s", ""), with("cryptcsi.io/discard", "false")))
	if d := p.dek(volumeDEK("vol-copy")); d.Spec.Discard || d.State != dek.Rotating {
		t.Errorf("the copy's record: %+v", d)
	}
	p.lawful()
}

// The mapping obeys the record.
func TestDiscardOnANode(t *testing.T) {
	for _, discard := range []bool{false, true} {
		m := newMachine(t)
		m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Discard: discard})
		m.start()
		m.ok("stage", m.stage(mountCap("ext4")))
		if got := m.mapping().Discard; got != discard {
			t.Errorf("the record says %v, the mapping %v", discard, got)
		}
		m.ok("unstage", m.unstage())
		m.clean()
	}
}

// Options for mkfs are checked when the volume is created, stand in its context,
// and reach the first mkfs and no other.
func TestMkfsOptions(t *testing.T) {
	const options = "-i 16384  -m 1.5"
	p := newPlant(t).start()
	v := p.mustCreate(request("pvc-1", with("cryptcsi.io/mkfs-options", options)))
	if got := v.GetVolumeContext()["cryptcsi.io/mkfs-options"]; got != options {
		t.Errorf("the context says %q", got)
	}
	v = p.mustCreate(request("pvc-2", with("cryptcsi.io/mkfs-options", options), as(blockCap())))
	if got, there := v.GetVolumeContext()["cryptcsi.io/mkfs-options"]; there {
		t.Errorf("a block volume's context says %q", got)
	}
	_, err := p.create(request("pvc-3", with("cryptcsi.io/mkfs-options", "-i 16384"), as(mountCap("ext4"), mountCap("xfs"))))
	p.refused("another filesystem's", err, codes.InvalidArgument, "parameter cryptcsi.io/mkfs-options", `"16384"`)

	m := newMachine(t)
	stage := func(options string) error {
		r := m.stageRequest(mountCap("ext4"))
		r.VolumeContext["cryptcsi.io/mkfs-options"] = options
		_, err := m.node.NodeStageVolume(t.Context(), r)
		return err
	}
	m.start()
	m.refused("a device among the options", stage("-i 16384 /dev/sda"), codes.InvalidArgument, "/dev/sda")
	if m.count("Make") > 0 {
		t.Error("mkfs ran")
	}
	m.ok("stage", stage(options))
	if got := m.kernel.MadeWith(m.mapping().Path); !slices.Equal(got, []string{"-i", "16384", "-m", "1.5"}) {
		t.Errorf("mkfs got %q", got)
	}
	m.ok("unstage", m.unstage())
	m.ok("stage of a volume that has its filesystem", stage("-x"))
	if m.count("Make") != 1 {
		t.Error("mkfs ran again")
	}
	m.ok("unstage", m.unstage())
	m.clean()
}

// Where the wrapped driver makes the filesystem nobody would obey them.
func TestMkfsOptionsOfAVolumeThatIsHandedOver(t *testing.T) {
	m := newMachine(t)
	m.cfg.StageWith = driver.StageWithWrapped
	m.start()
	r := m.stageRequest(mountCap("ext4"))
	r.VolumeContext["cryptcsi.io/mkfs-options"] = "-m 1"
	_, err := m.node.NodeStageVolume(t.Context(), r)
	m.refused("stage", err, codes.InvalidArgument, "cryptcsi.io/mkfs-options", "--stage-with=wrapped")
	m.clean()
}

func TestMkfsOptionsAreRefused(t *testing.T) {
	for _, tt := range []struct{ fstype, options, says string }{
		{"ext4", "-n 1", `"-n"`}, // tries without doing
		{"ext4", "-F -m 1", `"-F"`},
		{"ext4", "-d /etc", `"-d"`},
		{"ext4", "-U clear", `"-U"`},
		{"ext4", "-q", `"-q"`},
		{"ext4", "-i16384", `"-i16384"`},
		{"ext4", "-i", "no value"},
		{"ext4", "-m 1 -m 2", "twice"},
		{"ext4", "/dev/sda", `"/dev/sda" is no flag`},
		{"ext4", "-m 1 /dev/sda", `"/dev/sda" is no flag`},
		{"ext4", "-i 16384 -- /dev/sda", `"--"`},
		{"ext4", "-m 51", `"51"`},
		{"ext4", "-m -1", `"-1"`},
		{"ext4", "-i 16k", `"16k"`},
		{"ext4", "-b 1024", `"1024"`},
		{"ext4", "-L -n", `"-n"`},
		{"ext4", "-L a/b", `"a/b"`},
		{"ext4", "-E discard", `"discard"`},
		{"ext4", "-E stride=4,offset=4096", `"offset"`},
		{"ext4", "-E stride", "stride: "},
		{"ext4", "-E test_fs", `"test_fs"`},
		{"ext4", "-E ", "no value"},
		{"ext4", "-E ,", `""`},
		{"ext4", "-J device=/dev/sdb", `"device"`},
		{"ext4", "-O ^has_journal", `"^has_journal"`},
		{"ext4", "-O ^extent,quota", `"^extent"`},
		{"ext4", "-O none", `"none"`},
		{"ext4", "-O quota=1", "quota takes no value"},
		{"ext4", "-T floppy", `"floppy"`},
		{"xfs", "-d file=1,name=/etc/passwd", `"file"`},
		{"xfs", "-d size=64m", `"size"`},
		{"xfs", "-l logdev=/dev/sdb", `"logdev"`},
		{"xfs", "-r rtdev=/dev/sdb", `"-r"`},
		{"xfs", "-p /etc/proto", `"-p"`},
		{"xfs", "-c options=/etc/x", `"-c"`},
		{"xfs", "-N 1", `"-N"`},
		{"xfs", "-m uuid=0", `"uuid"`},
		{"xfs", "-L abcdefghijklm", `"abcdefghijklm"`},
		{"btrfs", "-r /etc", `"-r"`},
		{"btrfs", "-b 1000000", `"-b"`},
		{"btrfs", "-m raid1", `"raid1"`},
		{"btrfs", "--csum none", `"none"`},
		{"ext4", strings.Repeat(" ", 513), "513 bytes"},
	} {
		words, err := driver.ReadMkfsOptions(tt.fstype, tt.options)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "cryptcsi.io/mkfs-options") {
			t.Errorf("%s %q: %q, %v, want ErrInvalid with %s", tt.fstype, tt.options, words, err, tt.says)
		}
	}
}

// TestMkfsTakesEveryOption: what is offered is what mkfs knows.
func TestMkfsTakesEveryOption(t *testing.T) {
	values := map[string]string{ // 1 where it is not here
		"ext4 -b": "4096", "ext4 -i": "16384", "ext4 -I": "512", "ext4 -J size": "8", "ext4 -L": "label_16_bytes.a", "ext4 -m": "2.5",
		"ext4 -N": "20000", "ext4 -E root_owner": "1000:1000", "ext4 -E stride": "4", "ext4 -E stripe_width": "16",
		"xfs -b size": "4096", "xfs -d agcount": "5", "xfs -i size": "1024", "xfs -i maxpct": "50", "xfs -l size": "80m", "xfs -L": "label_of_12b", "xfs -n size": "8192",
		"btrfs --csum": "sha256", "btrfs -d": "dup", "btrfs -m": "single", "btrfs -L": "label", "btrfs -n": "16k",
	}
	without := func(item string) bool { // what nothing follows
		return strings.Contains(item, " -O ") || strings.HasPrefix(item, "btrfs -R") || strings.HasPrefix(item, "ext4 -T")
	}
	for _, fstype := range driver.FSTypes() {
		kernel.Need(t, "exec:mkfs."+fstype)
		for _, item := range driver.MkfsFlags(fstype) {
			flag, name, list := strings.Cut(item, " ")
			value := cmp.Or(values[fstype+" "+item], "1")
			switch {
			case without(fstype + " " + item):
				value = name
			case list:
				value = name + "=" + value
			}
			words, err := driver.ReadMkfsOptions(fstype, flag+" "+value)
			if err != nil {
				t.Error(err)
				continue
			}
			device := sparse(t, 512*mib)
			if err := (driver.Linux{}).Make(t.Context(), device, fstype, words, true); err != nil {
				t.Errorf("%s %s: %v", fstype, words, err)
			}
			if got, err := (driver.Linux{}).Probe(t.Context(), device); err != nil || got.Type != fstype {
				t.Errorf("%s %s: made %+v, %v", fstype, words, got, err)
			}
			_ = os.Remove(device) // all together they would take a gigabyte
		}
	}
}

// TestMkfsObeys: together with our own options.
func TestMkfsObeys(t *testing.T) {
	kernel.Need(t, "exec:mkfs.ext4", "exec:mkfs.xfs", "exec:dumpe2fs", "exec:xfs_db")
	make := func(fstype, options string, shifted bool) string {
		words, err := driver.ReadMkfsOptions(fstype, options)
		if err != nil {
			t.Fatal(err)
		}
		device := sparse(t, 512*mib)
		if err := (driver.Linux{}).Make(t.Context(), device, fstype, words, shifted); err != nil {
			t.Fatal(err)
		}
		return device
	}
	holds := func(out []byte, err error, words ...string) {
		t.Helper()
		text := strings.Join(strings.Fields(string(out)), " ")
		for _, w := range words {
			if err != nil || !strings.Contains(text, w) {
				t.Errorf("%v, want %q in %s", err, w, text)
			}
		}
	}
	out, err := exec.Command("dumpe2fs", "-h", make("ext4", "-E stride=4,root_owner=7:8 -i 65536 -m 10 -L data", false)).CombinedOutput()
	holds(out, err, "Inode count: 8192 ", "Reserved block count: 13107 ", "volume name: data ", "RAID stride: 4 ", "Total journal size: 16M")
	out, err = exec.Command("xfs_db", "-r", "-c", "sb 0", "-c", "print agcount inodesize unit", make("xfs", "-d agcount=7 -i size=1024", true)).CombinedOutput()
	holds(out, err, "agcount = 7", "inodesize = 1024", "unit = 0")
}

// sparse is a file of zeros.
func sparse(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	err := os.WriteFile(path, nil, 0o600)
	if err == nil {
		err = os.Truncate(path, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Performance options stand in the context in one order, and reach each mapping
// that is made.
func TestPerformanceOptions(t *testing.T) {
	p := newPlant(t).start()
	v := p.mustCreate(request("pvc-1", with("cryptcsi.io/performance", "same_cpu_crypt,no_write_workqueue,same_cpu_crypt")))
	const sorted = "no_write_workqueue,same_cpu_crypt"
	if got := v.GetVolumeContext()["cryptcsi.io/performance"]; got != sorted {
		t.Errorf("the context says %q", got)
	}
	for value, says := range map[string]string{
		"fast":                              `"fast" is not offered`,
		"no_read_workqueue, same_cpu_crypt": `" same_cpu_crypt"`,
		"no_read_workqueue,":                `""`,
		"allow_discards":                    `"allow_discards"`,
		"high_priority":                     "libcryptsetup 2.8",
	} {
		_, err := p.create(request("x", with("cryptcsi.io/performance", value)))
		p.refused(value, err, codes.InvalidArgument, "parameter cryptcsi.io/performance", says)
	}

	m := newMachine(t).start()
	stage := func(options string) error {
		r := m.stageRequest(mountCap("ext4"))
		r.VolumeContext["cryptcsi.io/performance"] = options
		_, err := m.node.NodeStageVolume(t.Context(), r)
		return err
	}
	m.refused("an option that is none", stage("allow_discards"), codes.InvalidArgument, "allow_discards")
	for range 2 {
		m.ok("stage", stage(sorted))
		if got := m.mapping().Performance; got != sorted {
			t.Errorf("the mapping has %q", got)
		}
		m.ok("unstage", m.unstage())
	}
	m.clean()
}

// A volume without dm-integrity's journal is wiped before its first use, and so
// is one without a word about either; a copy keeps its source's mode.
func TestIntegrityMode(t *testing.T) {
	p := newPlant(t).start()
	integrity := with("cryptcsi.io/integrity", "hmac-sha256")
	direct := with("cryptcsi.io/integrity-mode", "direct")
	p.mustCreate(request("a", integrity, with("cryptcsi.io/integrity-mode", "journal")))
	p.mustCreate(request("b", integrity, direct))
	for name, want := range map[string]dek.Spec{
		"a": {Name: "a", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, Layout: dek.LayoutClone},
		"b": {Name: "b", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: dek.ModeDirect},
	} {
		if got := p.dek(volumeDEK("vol-" + name)).Spec; got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	_, err := p.create(request("c", of("", "vol-b"), integrity))
	p.refused("a copy with a journal", err, codes.InvalidArgument, `"direct"`, `"journal"`, "cryptcsi.io/integrity-mode")
	p.mustCreate(request("c", of("", "vol-b"), integrity, direct))
	p.lawful()

	m := newMachine(t)
	m.createDEK(dek.Spec{Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC, IntegrityMode: dek.ModeDirect})
	m.start()
	m.ok("stage", m.stage(mountCap("ext4")))
	if !m.mapping().Direct {
		t.Error("the mapping has a journal")
	}
	m.ok("unstage", m.unstage())
	m.clean()
}

// The KEK that a class names wraps the volume's key. A name that is not known is
// refused before there is a volume, a copy or a snapshot.
func TestKEKByName(t *testing.T) {
	p := newPlant(t)
	p.keks = []string{"gold", "lead"}
	p.start()
	gold := with("cryptcsi.io/kek", "gold")
	if v := p.mustCreate(request("a", gold, with("theirs", "x"))); v.GetVolumeContext()["cryptcsi.io/kek"] != "" {
		t.Errorf("the volume context: %v", v.GetVolumeContext())
	}
	if got := p.dek(volumeDEK("vol-a")).Spec; got != (dek.Spec{Name: "a", Cipher: dek.CipherXTS, KEK: "gold"}) {
		t.Errorf("recorded: %+v", got)
	}
	_, err := p.create(request("a", with("theirs", "x")))
	p.refused("the same without the parameter", err, codes.AlreadyExists)

	_, err = p.create(request("b", with("cryptcsi.io/kek", "silver")))
	p.refused("a name that is not there", err, codes.InvalidArgument, "parameter cryptcsi.io/kek", `"silver"`, "gold, lead")
	_, err = p.csi.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: map[string]string{"cryptcsi.io/kek": "silver"}})
	p.refused("its capacity", err, codes.InvalidArgument, "cryptcsi.io/kek")
	if got := p.wrapped.Volumes(); !slices.Equal(got, []string{"vol-a"}) {
		t.Errorf("volumes: %v", got)
	}
	// What the key side does not know after all gets no key: the keyring has gold alone.
	_, err = p.create(request("c", with("cryptcsi.io/kek", "lead")))
	p.refused("a name that the key side has not", err, codes.Unavailable, `"lead"`)

	p.mustCreate(request("d", of("", "vol-a")))
	if got := p.dek(volumeDEK("vol-d")).Spec.KEK; got != "" {
		t.Errorf("a copy that names none has %q", got)
	}
	_, err = p.snapshot("s", "vol-a")
	p.ok("CreateSnapshot", err)
	if got := p.dek(snapshotDEK("snap-s")).Spec.KEK; got != "gold" {
		t.Errorf("a snapshot has %q", got)
	}
	p.keks = []string{"lead"}
	p.start()
	_, err = p.snapshot("later", "vol-a")
	p.refused("a snapshot when the name is gone", err, codes.InvalidArgument, `"gold"`)
}
