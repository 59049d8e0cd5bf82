package worker_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// theirs is a volume made as Constellation makes them, by an ordinary
// cryptsetup, with an ext4 and a file in it that cryptcsi had no part in.
type theirs struct {
	*fixture
	uuid string
	ours dek.DEK // what it is re-keyed to
}

const theirWords = "written before cryptcsi was there"

// theirSize is that of the device, with room for a header and an ext4.
const theirSize = 24 * mib

// Key derivations: theirs, which takes two seconds for each try of a key, and
// the quickest that passes.
var (
	theirPBKDF = []string{"--pbkdf-memory=65536", "--pbkdf-parallel=4"}
	cheapPBKDF = []string{"--pbkdf-force-iterations=4", "--pbkdf-memory=65536", "--pbkdf-parallel=4"}
)

func newTheirs(t *testing.T, integrity dek.Integrity, pbkdf []string) *theirs {
	t.Helper()
	f := &theirs{fixture: newFixture(t, theirSize, integrity), uuid: dek.NewUUID()}
	kernel.Need(t, "exec:cryptsetup", "exec:mkfs.ext4", "ext4")
	f.d.ID, f.d.State, f.d.Claim, f.d.Header = dek.ID(f.uuid), dek.Formatted, dek.Claim{}, dek.HeaderID{UUID: f.uuid}
	f.d.Spec.Layout = dek.LayoutConstellation
	args := append([]string{"luksFormat", "--batch-mode", "--type=luks2", "--cipher=aes-xts-plain64", "--key-size=512", "--sector-size=4096",
		"--pbkdf=argon2id", "--uuid=" + f.uuid, "--key-file=-"}, pbkdf...)
	if integrity != dek.IntegrityNone {
		args = append(args, "--integrity=hmac-sha256")
	}
	run(t, f.d.Key.Expose(), "cryptsetup", append(args, f.v.Device)...)
	run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
	run(t, nil, "mkfs.ext4", "-q", dm.Path(f.v.Name))
	inFilesystem(t, dm.Path(f.v.Name), func(file string) {
		if err := os.WriteFile(file, []byte(theirWords), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	run(t, nil, "cryptsetup", "close", f.v.Name)
	key := secret.New(dek.Size)
	_, _ = rand.Read(key.Expose())
	f.ours = dek.DEK{
		ID: dek.ID("test.cryptcsi.io/" + f.v.Name), State: dek.Prepared, Key: key,
		Spec: dek.Spec{Cipher: dek.CipherXTS, Integrity: integrity}, Claim: dek.Claim{Node: "n", UUID: dek.NewUUID()},
	}
	return f
}

// lend is fixture.lend for what a volume of theirs has besides.
func (f *theirs) lend(t *testing.T, try func(f *theirs)) {
	t.Helper()
	f.fixture.lend(t, func(inner *fixture) {
		lent := *f
		lent.fixture = inner
		try(&lent)
	})
}

// inFilesystem mounts a device and calls do with the path of a file in it.
func inFilesystem(t *testing.T, device string, do func(file string)) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(device, dir, "ext4", 0, ""); err != nil {
		t.Fatalf("mounting %s: %v", device, err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmounting %s: %v", device, err)
		}
	}()
	do(dir + "/file")
}

// hasTheirWords fails the test unless the file is as it was written.
func hasTheirWords(t *testing.T, device string) {
	t.Helper()
	inFilesystem(t, device, func(file string) {
		if b, err := os.ReadFile(file); err != nil || string(b) != theirWords {
			t.Errorf("the file holds %q, %v", b, err)
		}
	})
}

// header is a digest of the first 16 MiB.
func headerDigest(t *testing.T, device string) [sha256.Size]byte {
	t.Helper()
	return sha256.Sum256(readAt(t, device, 0, 16*mib))
}

func TestKernelConstellationVolume(t *testing.T) {
	// One exactly as they are made: with integrity the key is derived no other way.
	for integrity, pbkdf := range map[dek.Integrity][]string{dek.IntegrityNone: theirPBKDF, dek.IntegrityHMAC: cheapPBKDF} {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newTheirs(t, integrity, pbkdf)
			before := headerDigest(t, f.v.Device)
			for round := range 2 {
				m := f.open(t)
				if want := (dek.HeaderID{UUID: f.uuid}); !m.Made || m.Header != want || m.Integrity != integrity || m.ReadOnly {
					t.Errorf("round %d: opened as %+v", round, m)
				}
				if again := f.open(t); again != m {
					t.Errorf("opened again: %+v, want %+v", again, m)
				}
				if made, err := f.MarkMade(t.Context(), f.v, f.d); err != nil || made != m {
					t.Errorf("MarkMade = %+v, %v", made, err)
				}
				hasTheirWords(t, m.Path)
				f.close(t)
			}
			f.v.ReadOnly = true
			if m := f.open(t); !m.ReadOnly {
				t.Errorf("opened read-only: %+v", m)
			}
			f.close(t)
			if headerDigest(t, f.v.Device) != before {
				t.Error("something was written to the header area")
			}
			run(t, f.d.Key.Expose(), "cryptsetup", "open", "--test-passphrase", "--key-file=-", f.v.Device)
		})
	}
}

func TestKernelConstellationResize(t *testing.T) {
	f := newTheirs(t, dek.IntegrityNone, cheapPBKDF)
	m := f.open(t)
	before := headerDigest(t, f.v.Device)
	kernel.Grow(t, f.v.Device, theirSize+32*mib)
	grown, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil || grown.Size != m.Size+32*mib || grown.Header != m.Header {
		t.Errorf("Resize = %+v, %v; was %+v", grown, err, m)
	}
	if again, err := f.Resize(t.Context(), f.v, f.d); err != nil || again != grown {
		t.Errorf("Resize again = %+v, %v", again, err)
	}
	if headerDigest(t, f.v.Device) != before {
		t.Error("growing wrote to the header area")
	}
	hasTheirWords(t, grown.Path)
	f.close(t)
	if m := f.open(t); m.Size != grown.Size {
		t.Errorf("reopened with %d bytes, was %d", m.Size, grown.Size)
	}
	f.close(t)
	with := newTheirs(t, dek.IntegrityHMAC, cheapPBKDF)
	with.open(t)
	if _, err := with.Resize(t.Context(), with.v, with.d); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("growing a volume with integrity: %v", err)
	}
	with.close(t)
}

// forge changes the JSON of both copies and puts the unkeyed checksums right.
func forge(t *testing.T, device, from, to string) {
	t.Helper()
	for _, at := range []int64{0, 16 << 10} {
		raw := readAt(t, device, at, 16<<10)
		if bytes.Count(raw[4096:], []byte(from)) != 1 {
			t.Fatalf("%q does not stand once in the header", from)
		}
		text := bytes.Replace(bytes.TrimRight(raw[4096:], "\x00"), []byte(from), []byte(to), 1)
		clear(raw[4096:])
		copy(raw[4096:], text)
		clear(raw[448:512])
		sum := sha256.Sum256(raw)
		copy(raw[448:], sum[:])
		writeAt(t, device, at, raw)
	}
}

func TestKernelConstellationRefusals(t *testing.T) {
	volumes := map[dek.Integrity]*theirs{}
	for _, integrity := range modes {
		volumes[integrity] = newTheirs(t, integrity, cheapPBKDF)
	}
	for _, tt := range []struct {
		name      string
		integrity dek.Integrity
		break_    func(t *testing.T, f *theirs)
		class     error
		words     string
	}{
		{"blank disk", "", func(t *testing.T, f *theirs) { writeAt(t, f.v.Device, 0, make([]byte, theirSize)) }, errdefs.ErrState, "will not be formatted"},
		{"wrong key", "", func(_ *testing.T, f *theirs) { f.d.Key.Expose()[0] ^= 1 }, errdefs.ErrDenied, ""},
		{"another UUID", "", func(_ *testing.T, f *theirs) {
			f.d.ID = dek.ID(dek.NewUUID())
			f.d.Header.UUID = string(f.d.ID)
		}, errdefs.ErrState, f0},
		{"null cipher", "", func(t *testing.T, f *theirs) {
			forge(t, f.v.Device, `"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"cipher_null-ecb","sector_size"`)
		}, errdefs.ErrState, f0},
		{"another token", "", func(t *testing.T, f *theirs) {
			forge(t, f.v.Device, `"tokens":{}`, `"tokens":{"0":{"type":"x","keyslots":["0"]}}`)
		}, errdefs.ErrState, f0},
		{"persistent flags", "", func(t *testing.T, f *theirs) {
			forge(t, f.v.Device, `"keyslots_size":"16744448"`, `"keyslots_size":"16744448","flags":["allow-discards"]`)
		}, errdefs.ErrState, f0},
		{"integrity taken away", dek.IntegrityHMAC, func(t *testing.T, f *theirs) {
			forge(t, f.v.Device, `,"integrity":{"type":"hmac(sha256)","journal_encryption":"none","journal_integrity":"none"}`, ``)
		}, errdefs.ErrState, f0},
		{"integrity asked for and not there", "", func(_ *testing.T, f *theirs) { f.d.Spec.Integrity = dek.IntegrityHMAC }, errdefs.ErrState, f0},
		{"integrity there and not asked for", dek.IntegrityHMAC, func(_ *testing.T, f *theirs) { f.d.Spec.Integrity = "" }, errdefs.ErrState, f0},
		{"prepared", "", func(_ *testing.T, f *theirs) {
			f.d.State, f.d.Claim = dek.Prepared, dek.Claim{Node: "n", UUID: f.uuid}
		}, errdefs.ErrInvalid, "never formatted"},
		{"larger than the device", dek.IntegrityHMAC, func(t *testing.T, f *theirs) {
			raw := readAt(t, f.v.Device, 16*mib, 512) // the dm-integrity superblock
			binary.LittleEndian.PutUint64(raw[16:], binary.LittleEndian.Uint64(raw[16:])*4)
			writeAt(t, f.v.Device, 16*mib, raw)
		}, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			volumes[tt.integrity].lend(t, func(f *theirs) {
				tt.break_(t, f)
				if tt.class == nil { // whatever it is, it is refused
					if m, err := f.Open(t.Context(), f.v, f.d); err == nil {
						t.Errorf("opened as %+v", m)
					}
					return
				}
				f.refused(t, tt.class, tt.words)
			})
		})
	}
}

// f0 is what every refusal of a header says.
const f0 = "will not be formatted"

// rekey does what csi-plugin rekey does, with a record that is always right.
func (f *theirs) rekey(t *testing.T, m *cryptmapper.Mapper) error {
	t.Helper()
	if f.ours.State == dek.Prepared {
		h, err := m.Rekey(t.Context(), f.v, f.ours, dek.ID(f.uuid), f.d.Key)
		if err != nil {
			return err
		}
		f.ours.State, f.ours.Header = dek.Formatted, h
	}
	h, err := m.Rekey(t.Context(), f.v, f.ours, "", secret.Bytes{})
	if err == nil && h != f.ours.Header {
		t.Errorf("re-keyed to %+v, confirmed was %+v", h, f.ours.Header)
	}
	return err
}

// opens tells what an ordinary cryptsetup says of a key.
func opens(device string, key secret.Bytes) bool {
	cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file=-", device)
	cmd.Stdin = bytes.NewReader(key.Expose())
	return cmd.Run() == nil
}

// done fails the test unless the volume is ours, whole, with its data, and the
// old key opens nothing any more.
func (f *theirs) done(t *testing.T) {
	t.Helper()
	as := f.fixture.d
	defer func() { f.fixture.d = as }()
	f.fixture.d = f.ours
	m := f.open(t)
	if !m.Made || m.Header != f.ours.Header || m.Header.UUID != f.ours.Claim.UUID {
		t.Errorf("opened as %+v, confirmed was %+v", m, f.ours.Header)
	}
	hasTheirWords(t, m.Path)
	f.close(t)
	if opens(f.v.Device, as.Key) {
		t.Error("the old key still opens the volume")
	}
	if !opens(f.v.Device, f.ours.Key) {
		t.Error("cryptsetup does not open the volume with the new key")
	}
	if b := readAt(t, f.v.Device, 8*mib, 2*mib); !bytes.Equal(b, make([]byte, len(b))) {
		t.Error("what was put aside is still there")
	}
	f.fixture.d = as
	f.refused(t, errdefs.ErrState, f0)
}

func TestKernelRekey(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newTheirs(t, integrity, cheapPBKDF)
			if err := f.rekey(t, f.Mapper); err != nil {
				t.Fatalf("Rekey: %v", err)
			}
			f.done(t)
			after := headerDigest(t, f.v.Device)
			if err := f.rekey(t, f.Mapper); err != nil || headerDigest(t, f.v.Device) != after {
				t.Errorf("re-keyed again: %v, header changed %v", err, headerDigest(t, f.v.Device) != after)
			}
			// The same again for a record that does not know it.
			f.ours.State, f.ours.Header = dek.Prepared, dek.HeaderID{}
			if err := f.rekey(t, f.Mapper); err != nil || headerDigest(t, f.v.Device) != after {
				t.Errorf("re-keyed again, prepared: %v", err)
			}
			f.done(t)
		})
	}
}

func TestKernelRekeyRefusals(t *testing.T) {
	volume := newTheirs(t, dek.IntegrityNone, cheapPBKDF)
	kernel.Need(t, "exec:dmsetup")
	for _, tt := range []struct {
		name   string
		break_ func(t *testing.T, f *theirs)
		class  error
		words  string
	}{
		{"open", func(t *testing.T, f *theirs) { f.open(t) }, errdefs.ErrState, "the volume is open"},
		{"held by another mapping", func(t *testing.T, f *theirs) {
			run(t, nil, "dmsetup", "create", "cryptcsi-holder", "--table", "0 1000 linear "+f.v.Device+" 0")
			t.Cleanup(func() { _ = dm.Remove("cryptcsi-holder") })
		}, errdefs.ErrState, "in use by something else"},
		{"the UUID that is there already", func(_ *testing.T, f *theirs) { f.ours.Claim.UUID = f.uuid }, errdefs.ErrState, "already"},
		{"no claim", func(_ *testing.T, f *theirs) { f.ours.Claim = dek.Claim{} }, errdefs.ErrInvalid, "nobody has claimed"},
		{"wrong old key", func(_ *testing.T, f *theirs) { f.d.Key.Expose()[0] ^= 1 }, errdefs.ErrDenied, "trying the old key"},
		{"another volume", func(_ *testing.T, f *theirs) { f.uuid = dek.NewUUID() }, errdefs.ErrState, "nothing was changed"},
		{"blank", func(t *testing.T, f *theirs) { writeAt(t, f.v.Device, 0, make([]byte, theirSize)) }, errdefs.ErrState, "nothing was changed"},
		{"another integrity", func(_ *testing.T, f *theirs) { f.ours.Spec.Integrity = dek.IntegrityHMAC }, errdefs.ErrState, "nothing was changed"},
		{"formatted, and not on this disk", func(_ *testing.T, f *theirs) {
			f.ours.State, f.ours.Header = dek.Formatted, dek.HeaderID{UUID: f.ours.Claim.UUID, Sequence: 1}
		}, errdefs.ErrState, "another disk, or an older state"},
		{"rotating", func(_ *testing.T, f *theirs) { f.ours.State = dek.Rotating }, errdefs.ErrState, "new DEK of ours"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			volume.lend(t, func(f *theirs) {
				tt.break_(t, f)
				before := digest(t, f.v.Device)
				if err := f.rekey(t, f.Mapper); !errors.Is(err, tt.class) || !strings.Contains(fmt.Sprint(err), tt.words) {
					t.Errorf("Rekey: %v; want %v with %q", err, tt.class, tt.words)
				}
				if digest(t, f.v.Device) != before {
					t.Error("the refused device was written to")
				}
			})
		})
	}
}

// Of a disk that was grown after Constellation had made its integrity volume the
// kernel would hand out sectors without tags: it is refused, and not written to.
func TestKernelRekeyGrownIntegrity(t *testing.T) {
	f := newTheirs(t, dek.IntegrityHMAC, cheapPBKDF)
	kernel.Grow(t, f.v.Device, theirSize+32*mib)
	before := digest(t, f.v.Device)
	if err := f.rekey(t, f.Mapper); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("Rekey: %v", err)
	}
	for range 2 {
		f.refused(t, errdefs.ErrState, "has grown")
	}
	if digest(t, f.v.Device) != before {
		t.Error("header area or superblock were written to")
	}
}

// A worker killed after any step leaves a volume that opens the old way, or the
// new one, or is refused; that nobody formats; and that the same call finishes.
// CRASH_EVERY=1 (make crash) tries every step, otherwise it is a sample.
func TestKernelRekeyKilledAtSteps(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newTheirs(t, integrity, cheapPBKDF)
			header, record := readAt(t, f.v.Device, 0, 16*mib), f.ours
			for phase := range 2 {
				if phase == 1 { // prepared and confirmed; killed while it finishes
					writeAt(t, f.v.Device, 0, header)
					h, err := f.Rekey(t.Context(), f.v, record, dek.ID(f.uuid), f.d.Key)
					if err != nil {
						t.Fatalf("Rekey: %v", err)
					}
					record.State, record.Header = dek.Formatted, h
					header = readAt(t, f.v.Device, 0, 16*mib)
				}
				step, stride := sample(t, 5)
				for ; ; step += stride {
					writeAt(t, f.v.Device, 0, header) // nothing else is changed by it
					f.ours = record
					_, err := newMapper(t, step).Rekey(t.Context(), f.v, f.ours, dek.ID(f.uuid), f.d.Key)
					if err == nil {
						if step < 5 {
							t.Errorf("phase %d has %d steps", phase, step-1)
						}
						break
					}
					if phase == 0 { // a mapping that was tried must not be in the way
						hasTheirWords(t, f.open(t).Path)
						f.close(t)
					}
					t.Logf("phase %d, killed at step %d: %s", phase, step, f.between(t))
					if err := f.rekey(t, f.Mapper); err != nil {
						t.Fatalf("phase %d, after step %d: %v", phase, step, err)
					}
					if way := f.between(t); way != newWay {
						t.Errorf("phase %d, after step %d and the same call: %s", phase, step, way)
					}
				}
				if err := f.rekey(t, f.Mapper); err != nil {
					t.Fatal(err)
				}
				f.done(t)
			}
		})
	}
}

const newWay = "opens the new way"

// between looks at what a killed worker has left: the new way either has the
// data or is refused, whatever the record says.
func (f *theirs) between(t *testing.T) string {
	t.Helper()
	as := f.fixture.d
	defer func() { f.fixture.d = as }()
	f.fixture.d = f.ours
	m, err := f.Open(t.Context(), f.v, f.ours)
	if err == nil {
		if !m.Made {
			t.Errorf("opened as a new volume: %+v", m)
		}
		hasTheirWords(t, m.Path)
		f.close(t)
		return newWay
	}
	if !errors.Is(err, errdefs.ErrState) {
		t.Errorf("the new way: %v", err)
	}
	return "refused the new way"
}

// Two volumes that were re-keyed cannot be swapped; before that they can, and
// the UUID in the volume context is what tells.
func TestKernelRekeyedVolumesCannotBeSwapped(t *testing.T) {
	a, b := newTheirs(t, dek.IntegrityNone, cheapPBKDF), newTheirs(t, dek.IntegrityNone, cheapPBKDF)
	for _, f := range []*theirs{a, b} {
		if err := f.rekey(t, f.Mapper); err != nil {
			t.Fatalf("Rekey: %v", err)
		}
		f.d = f.ours
	}
	a.v.Device, b.v.Device = b.v.Device, a.v.Device
	a.refused(t, errdefs.ErrState, "belongs to")
	b.refused(t, errdefs.ErrState, "belongs to")
}
