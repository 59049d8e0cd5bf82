package worker_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// keeping returns a Mapper that makes header backups and dies at a step.
func keeping(t *testing.T, dieAt int) *cryptmapper.Mapper {
	command := []string{"../../bin/crypt-worker"}
	if dieAt > 0 {
		command = []string{os.Args[0], "crypt-worker", strconv.Itoa(dieAt)}
	}
	m := cryptmapper.New(cryptmapper.Options{Worker: command, LockDir: "/run/cryptcsi-test", HeaderBackup: true})
	t.Cleanup(m.Shutdown)
	return m
}

// keptSize is that of the device of such a volume.
const keptSize = 24 * mib

// newKept is a closed volume with an ext4 in it, whose DEK has a header backup.
func newKept(t *testing.T, integrity dek.Integrity) *fixture {
	t.Helper()
	f := newFixture(t, keptSize, integrity)
	kernel.Need(t, "exec:mkfs.ext4", "exec:dmsetup")
	f.Mapper = keeping(t, 0)
	m := f.open(t)
	if m.Header.Backup != "" {
		t.Error("a volume that is not finished has a header backup")
	}
	run(t, nil, "mkfs.ext4", "-q", m.Path)
	m, err := f.MarkMade(t.Context(), f.v, f.d)
	if err != nil || m.Header.Backup == "" {
		t.Fatalf("MarkMade = %+v, %v", m, err)
	}
	f.confirm(m)
	f.close(t)
	return f
}

// contents is the digest of a whole device.
func contents(t *testing.T, path string, from int64) [sha256.Size]byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_ = unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0)
	h := sha256.New()
	if _, err := file.Seek(from, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, file, make([]byte, 256<<10)); err != nil {
		t.Fatalf("reading %s: %v", path, err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// through is the digest of what the volume holds.
func (f *fixture) through(t *testing.T) [sha256.Size]byte {
	t.Helper()
	defer f.close(t)
	return contents(t, f.open(t).Path, 0)
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// What destroys a header: both copies and the key material.
var disasters = map[string]func() []byte{
	"zeros": func() []byte { return make([]byte, luks2.DataOffset) },
	"noise": func() []byte { return noise(luks2.DataOffset) },
}

func TestKernelRestoreHeader(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newKept(t, integrity)
			kernel.Need(t, "exec:cryptsetup")
			want := f.through(t)
			for name, disaster := range disasters {
				writeAt(t, f.v.Device, 0, disaster())
				f.refused(t, errdefs.ErrState, "will not be formatted")
				raw := contents(t, f.v.Device, luks2.DataOffset)
				h, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{})
				if err != nil || !restored || h.UUID != f.d.Header.UUID || h.Sequence != f.d.Header.Sequence {
					t.Fatalf("%s: Restore = %+v, %v, %v", name, h, restored, err)
				}
				if contents(t, f.v.Device, luks2.DataOffset) != raw {
					t.Fatalf("%s: restoring the header wrote to the data", name)
				}
				before := contents(t, f.v.Device, 0)
				if again, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{}); err != nil || restored || again.UUID != h.UUID || contents(t, f.v.Device, 0) != before {
					t.Errorf("%s: Restore again = %+v, %v, %v", name, again, restored, err)
				}
				if f.through(t) != want {
					t.Errorf("%s: the volume holds something else", name)
				}
				run(t, f.d.Key.Expose(), "cryptsetup", "open", "--test-passphrase", "--key-file=-", f.v.Device)
			}
			// Damage alone to both copies, and one copy that verifies.
			writeAt(t, f.v.Device, 4096+7, []byte{0})
			writeAt(t, f.v.Device, luks2.CopySize+4096+7, []byte{0})
			if _, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{}); err != nil || !restored {
				t.Errorf("both copies damaged: %v, %v", restored, err)
			}
			writeAt(t, f.v.Device, 0, make([]byte, luks2.CopySize))
			if _, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{}); err != nil || restored {
				t.Errorf("one copy damaged: %v, %v", restored, err)
			}
			if f.through(t) != want {
				t.Error("the volume holds something else")
			}
		})
	}
}

// A volume that was made before backups were asked for gets one when it is
// opened, and one that has it does not get another.
func TestKernelBackupOfAnOldVolume(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	f.made(t, "x")
	f.close(t)
	f.Mapper = keeping(t, 0)
	m := f.open(t)
	if m.Header.Backup == "" {
		t.Fatal("an old volume was opened and has no backup")
	}
	f.confirm(m)
	if m := f.open(t); m.Header.Backup != "" {
		t.Error("a volume with a backup was given another one")
	}
	kernel.Grow(t, f.v.Device, 80*mib)
	m, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil || m.Header.Backup == "" {
		t.Fatalf("Resize = %+v, %v", m, err)
	}
	f.confirm(m)
	f.close(t)
	writeAt(t, f.v.Device, 0, make([]byte, luks2.DataOffset))
	if _, _, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{}); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "--block-volume") {
		t.Errorf("a volume without a filesystem: %v", err)
	}
	if _, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{BlockVolume: true}); err != nil || !restored {
		t.Fatalf("Restore = %v, %v", restored, err)
	}
	if m := f.open(t); m.Size != 64*mib || string(readAt(t, m.Path, 0, 1)) != "x" {
		t.Errorf("restored: %+v", m)
	}
}

// A volume that grows on a node that makes no backups has its backup renewed
// there, so that restoring it brings back all of the volume.
func TestKernelBackupIsRenewed(t *testing.T) {
	for _, layout := range []string{"", dek.LayoutClone} {
		t.Run("layout="+layout, func(t *testing.T) {
			f, precious := newGrown(t, layout)
			if m := f.open(t); m.Header.Backup != "" {
				t.Error("the backup was not renewed when the volume grew, but when it was opened")
			}
			f.close(t)
			writeAt(t, f.v.Device, 0, make([]byte, luks2.DataOffset))
			if _, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{BlockVolume: true}); err != nil || !restored {
				t.Fatalf("Restore = %v, %v", restored, err)
			}
			f.keeps(t, precious)
		})
	}
}

// The record of a volume that has grown, with a backup of before: as builds left
// it that did not renew it.
func TestKernelStaleBackup(t *testing.T) {
	for _, layout := range []string{"", dek.LayoutClone} {
		for _, version := range []int{1, 3} {
			t.Run(fmt.Sprintf("layout=%s,version=%d", layout, version), func(t *testing.T) {
				f, precious := newGrown(t, layout)
				last := f.d.Header.Backup
				f.d.Header.Backup = f.staleBackup
				if version == 1 {
					f.d.Header.Backup = f.asFirst(t, f.staleBackup)
				}
				f.lend(t, func(f *fixture) {
					writeAt(t, f.v.Device, 0, make([]byte, luks2.DataOffset))
					before := contents(t, f.v.Device, 0)
					_, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{BlockVolume: true})
					if restored || !errors.Is(err, errdefs.ErrState) || !strings.Contains(fmt.Sprint(err), "--older-backup") {
						t.Errorf("Restore = %v, %v", restored, err)
					}
					if contents(t, f.v.Device, 0) != before {
						t.Error("the refused device was written to")
					}
					_, restored, err = f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{BlockVolume: true, OlderBackup: true})
					if err != nil || !restored {
						t.Fatalf("with --older-backup: %v, %v", restored, err)
					}
					if m := f.open(t); m.Size >= precious || string(readAt(t, m.Path, 0, 5)) != "grows" {
						t.Errorf("with --older-backup: %+v", m)
					}
				})
				m := f.open(t) // on a node that makes none
				if m.Header.Backup == "" {
					t.Fatal("the record has a backup of another size and gets no other")
				}
				f.confirm(m)
				if f.d.Header.Backup == last {
					t.Error("two backups have one nonce")
				}
				f.keeps(t, precious)
				f.close(t)
				writeAt(t, f.v.Device, 0, make([]byte, luks2.DataOffset))
				if _, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{BlockVolume: true}); err != nil || !restored {
					t.Fatalf("Restore = %v, %v", restored, err)
				}
				f.keeps(t, precious)
			})
		}
	}
}

// A backup that an earlier release made does not tell its age. Where the device
// has no room for a larger volume it is good all the same, and without integrity
// wherever. It is replaced when the volume is opened.
func TestKernelBackupOfAnEarlierRelease(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newKept(t, integrity)
			want := f.through(t)
			f.d.Header.Backup = f.asFirst(t, f.d.Header.Backup)
			f.d.Header.Sequence++ // made later, by whatever
			if integrity == dek.IntegrityNone {
				kernel.Grow(t, f.v.Device, keptSize+8*mib)
			}
			writeAt(t, f.v.Device, 0, make([]byte, luks2.DataOffset))
			if _, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{}); err != nil || !restored {
				t.Fatalf("Restore = %v, %v", restored, err)
			}
			m := f.open(t)
			if integrity != dek.IntegrityNone && contents(t, m.Path, 0) != want {
				t.Error("the volume holds something else")
			}
			if m.Header.Backup == "" {
				t.Fatal("it is not replaced")
			}
			f.confirm(m)
			if m := f.open(t); m.Header.Backup != "" {
				t.Error("it is replaced again")
			}
		})
	}
}

// grown is a volume that grew on a node without --header-backup.
type grown struct {
	*fixture
	staleBackup string // of before
}

// newGrown also returns where in the new space "precious" stands. The volume is
// closed, and its Mapper makes no backups.
func newGrown(t *testing.T, layout string) (*grown, int64) {
	t.Helper()
	g := &grown{fixture: newFixture(t, 24*mib, dek.IntegrityHMAC)}
	g.d.Spec.Layout = layout
	without := g.Mapper
	g.Mapper = keeping(t, 0)
	g.made(t, "grows")
	if layout == dek.LayoutClone {
		g.settled(t)
	}
	g.staleBackup = g.d.Header.Backup
	g.Mapper = without
	kernel.Grow(t, g.v.Device, 40*mib)
	m, err := g.Resize(t.Context(), g.v, g.d)
	if err != nil {
		t.Fatal(err)
	}
	g.confirm(m)
	if layout == dek.LayoutClone {
		g.hydrate(t)
		g.confirm(g.finish(t))
	}
	writeAt(t, m.Path, m.Size-4096, []byte("precious"))
	g.close(t)
	return g, m.Size - 4096
}

// keeps fails unless "precious" is still there after the volume took what its
// device has.
func (f *fixture) keeps(t *testing.T, precious int64) {
	t.Helper()
	f.open(t)
	m, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(readAt(t, m.Path, precious, 8)); got != "precious" {
		t.Errorf("the volume has %q where something precious was", got)
	}
}

// asFirst is a backup as the first releases would have made it: what
// docs/header-format.md says of version 1.
func (f *fixture) asFirst(t *testing.T, text string) string {
	t.Helper()
	key, err := hkdf.Key(sha256.New, f.d.Key.Expose(), nil, "cryptcsi luks2 backup v1", 32)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := aes.NewCipher(key)
	aead, _ := cipher.NewGCM(block)
	sealed, _ := base64.StdEncoding.DecodeString(text)
	data := []byte(f.d.Header.UUID + string(f.d.ID))
	plain, err := aead.Open(nil, sealed[:12], sealed[12:], data)
	if err != nil {
		t.Fatal(err)
	}
	plain = append(plain[:37:37], plain[57:]...)
	plain[0] = 1
	return base64.StdEncoding.EncodeToString(aead.Seal(sealed[:12:12], sealed[:12], plain, data))
}

func TestKernelRestoreRefusals(t *testing.T) {
	volumes := map[dek.Integrity]*fixture{}
	for _, integrity := range modes {
		volumes[integrity] = newKept(t, integrity)
	}
	blank := func(t *testing.T, f *fixture) { writeAt(t, f.v.Device, 0, make([]byte, luks2.DataOffset)) }
	for _, tt := range []struct {
		name      string
		integrity dek.Integrity
		break_    func(t *testing.T, f *fixture)
		class     error
		words     string
	}{
		{"open", "", func(t *testing.T, f *fixture) { f.open(t) }, errdefs.ErrState, "the volume is open"},
		{"held by another mapping", "", func(t *testing.T, f *fixture) {
			blank(t, f)
			run(t, nil, "dmsetup", "create", "cryptcsi-holder", "--table", "0 1000 linear "+f.v.Device+" 0")
			t.Cleanup(func() { _ = dm.Remove("cryptcsi-holder") })
		}, errdefs.ErrState, "in use by something else"},
		{"no backup", "", func(t *testing.T, f *fixture) { blank(t, f); f.d.Header.Backup = "" }, errdefs.ErrState, "holds no header backup"},
		{"prepared", "", func(t *testing.T, f *fixture) { blank(t, f); f.d.State = dek.Prepared }, errdefs.ErrState, "only the header of a finished volume"},
		{"backup of another volume", "", func(t *testing.T, f *fixture) { blank(t, f); f.d.ID += "-other" }, errdefs.ErrCorrupt, "another volume's"},
		{"another key", "", func(t *testing.T, f *fixture) { blank(t, f); f.d.Key.Expose()[0] ^= 1 }, errdefs.ErrCorrupt, "does not open under its DEK"},
		{"rolled back", "", func(_ *testing.T, f *fixture) { f.d.Header.Sequence++ }, errdefs.ErrState, "rolled back"},
		{"another LUKS header", "", func(t *testing.T, f *fixture) {
			other := newKept(t, "")
			f.v.Device = other.v.Device
		}, errdefs.ErrState, "it is another volume's disk"},
		{"a filesystem", "", func(t *testing.T, f *fixture) {
			blank(t, f)
			run(t, nil, "mkfs.ext4", "-q", "-F", f.v.Device)
		}, errdefs.ErrState, `holds "ext4"`},
		{"another volume without its header", "", func(t *testing.T, f *fixture) {
			f.v.Device = newKept(t, "").v.Device
			blank(t, f)
		}, errdefs.ErrState, "no filesystem"},
		{"another volume with integrity without its header", dek.IntegrityHMAC, func(t *testing.T, f *fixture) {
			f.v.Device = newKept(t, dek.IntegrityHMAC).v.Device
			blank(t, f)
		}, errdefs.ErrState, "authentic"},
		{"a disk of noise", "", func(t *testing.T, f *fixture) { writeAt(t, f.v.Device, 0, noise(keptSize)) }, errdefs.ErrState, "no filesystem"},
		{"a disk of noise, with integrity", dek.IntegrityHMAC, func(t *testing.T, f *fixture) { writeAt(t, f.v.Device, 0, noise(keptSize)) }, errdefs.ErrState, "superblock"},
		{"a disk of zeros", "", func(t *testing.T, f *fixture) { writeAt(t, f.v.Device, 0, make([]byte, keptSize)) }, errdefs.ErrState, "no filesystem"},
		{"a smaller disk", "", func(t *testing.T, f *fixture) {
			blank(t, f)
			f.v.Device = smaller(t, f.v.Device, 20*mib)
		}, errdefs.ErrState, "it was shrunk"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			volumes[tt.integrity].lend(t, func(f *fixture) {
				tt.break_(t, f)
				before := contents(t, f.v.Device, 0)
				_, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{})
				if restored || !errors.Is(err, tt.class) || !strings.Contains(fmt.Sprint(err), tt.words) {
					t.Errorf("Restore: %v, %v; want %v with %q", restored, err, tt.class, tt.words)
				}
				if contents(t, f.v.Device, 0) != before {
					t.Error("the refused device was written to")
				}
			})
		})
	}
}

// A worker killed after any step: the same call again finishes it.
func TestKernelRestoreKilledAtSteps(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newKept(t, integrity)
			want := f.through(t)
			step, stride := sample(t, 4)
			for ; ; step += stride {
				writeAt(t, f.v.Device, 0, disasters["noise"]())
				_, _, err := keeping(t, step).Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{})
				if err != nil && !strings.Contains(err.Error(), "killed") && !strings.Contains(err.Error(), "died") {
					t.Fatalf("step %d: %v", step, err)
				}
				if _, _, again := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{}); again != nil {
					t.Fatalf("step %d: Restore again: %v", step, again)
				}
				if f.through(t) != want {
					t.Fatalf("step %d: the volume holds something else", step)
				}
				if err == nil {
					t.Logf("up to step %d", step-stride)
					break
				}
			}
		})
	}
}
