package worker_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/cryptmapper/luks2"
	"github.com/cryptcsi/cryptcsi/cryptmapper/worker"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestMain lets the test binary be its own crypt-worker:
// "<binary> crypt-worker <step>" dies by SIGKILL at that step, 0 for never.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "crypt-worker" {
		left, _ := strconv.Atoi(os.Args[2])
		err := worker.Serve(os.NewFile(cryptmapper.WorkerFD, "conn"), func(string) {
			if left--; left == 0 {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const mib = 1 << 20

// fixture is one volume on a loop device.
type fixture struct {
	*cryptmapper.Mapper
	v cryptmapper.Volume
	d dek.DEK
}

// newMapper returns a Mapper with the real crypt-worker, or with one that dies
// at a step.
func newMapper(t *testing.T, dieAt int) *cryptmapper.Mapper {
	command := []string{"../../bin/crypt-worker"}
	if dieAt > 0 {
		command = []string{os.Args[0], "crypt-worker", strconv.Itoa(dieAt)}
	}
	m := cryptmapper.New(cryptmapper.Options{Worker: command, LockDir: "/run/cryptcsi-test"})
	t.Cleanup(m.Shutdown)
	return m
}

func newFixture(t *testing.T, size int64, integrity dek.Integrity) *fixture {
	t.Helper()
	features := []string{"root", "loop", "dm-crypt", "keyring", "exec:blkid", "exec:../../bin/crypt-worker"}
	if integrity != dek.IntegrityNone {
		features = append(features, "dm-integrity")
	}
	kernel.Need(t, features...)
	kernel.NoLeaks(t)
	key := secret.New(dek.Size)
	_, _ = rand.Read(key.Expose())
	id := dek.ID("test.cryptcsi.io/" + t.Name())
	f := &fixture{
		Mapper: newMapper(t, 0),
		v:      cryptmapper.Volume{Name: cryptmapper.Prefix + "t" + dek.NewUUID(), Device: kernel.Loop(t, size)},
		d: dek.DEK{
			ID: id, State: dek.Prepared, Key: key,
			Spec:  dek.Spec{Cipher: dek.CipherXTS, Integrity: integrity},
			Claim: dek.Claim{Node: "n", UUID: dek.NewUUID()},
		},
	}
	t.Cleanup(func() {
		if err := f.Close(context.Background(), f.v.Name); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return f
}

// made opens, writes content at the start, and finishes the volume.
func (f *fixture) made(t *testing.T, content string) cryptmapper.Mapping {
	t.Helper()
	m := f.open(t)
	writeAt(t, m.Path, 0, []byte(content))
	m, err := f.MarkMade(t.Context(), f.v, f.d)
	if err != nil || !m.Made {
		t.Fatalf("MarkMade = %+v, %v", m, err)
	}
	f.confirm(m)
	return m
}

// confirm does to the DEK what ConfirmDEK does to the record: without a header
// backup that keeps what it has.
func (f *fixture) confirm(m cryptmapper.Mapping) {
	m.Header.Backup = cmp.Or(m.Header.Backup, f.d.Header.Backup)
	f.d.State, f.d.Header = dek.Formatted, m.Header
}

func (f *fixture) open(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	m, err := f.Open(t.Context(), f.v, f.d)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return m
}

func (f *fixture) close(t *testing.T) {
	t.Helper()
	if err := f.Close(t.Context(), f.v.Name); err != nil {
		t.Fatalf("Close: %v", err)
	}
}

// refused opens and expects an error of the class with the words.
func (f *fixture) refused(t *testing.T, class error, words string) {
	t.Helper()
	before := digest(t, f.v.Device)
	m, err := f.Open(t.Context(), f.v, f.d)
	if !errors.Is(err, class) || !strings.Contains(fmt.Sprint(err), words) {
		t.Errorf("Open = %+v, %v; want %v with %q", m, err, class, words)
	}
	if before != digest(t, f.v.Device) {
		t.Error("the refused device was written to")
	}
	if _, err := dm.Status(f.v.Name); !errors.Is(err, dm.ErrNotFound) {
		t.Errorf("a refused open left a mapping (%v)", err)
	}
}

// lend gives the closed volume to a try that may change the disk and what is
// known of it, and puts it right afterwards, which is sooner done than to make a
// volume for each try.
func (f *fixture) lend(t *testing.T, try func(f *fixture)) {
	t.Helper()
	lent, was := *f, readAt(t, f.v.Device, 0, size(t, f.v.Device))
	lent.d.Key = f.d.Key.Clone()
	try(&lent)
	f.close(t)
	writeAt(t, f.v.Device, 0, was)
}

// size is how many bytes a device has.
func size(t *testing.T, path string) int {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	n, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// digest is that of the first 17 MiB: the header area, and a piece of the data.
// It reads through a small buffer, because memory is slow to get in a guest.
func digest(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	_ = unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0)
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, io.LimitReader(file, 17*mib), make([]byte, 256<<10)); err != nil {
		t.Fatalf("reading %s: %v", path, err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func readAt(t *testing.T, path string, offset int64, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// What a mapping above wrote is not in this device's page cache.
	_ = unix.IoctlSetInt(int(file.Fd()), unix.BLKFLSBUF, 0)
	if _, err := file.ReadAt(b, offset); err != nil {
		t.Fatalf("reading %s at %d: %v", path, offset, err)
	}
	return b
}

func writeAt(t *testing.T, path string, offset int64, b []byte) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt(b, offset); err != nil {
		t.Fatalf("writing %s at %d: %v", path, offset, err)
	}
	if err := file.Sync(); err != nil {
		t.Fatalf("syncing %s: %v", path, err)
	}
}

func run(t *testing.T, stdin []byte, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// sample says at which steps a worker is killed: the first one, another in each
// run, and how many further on the next. CRASH_EVERY=1 (make crash) tries all;
// SEED repeats a run (VM_ENV=SEED takes it into the guest).
func sample(t *testing.T, stride int) (first, by int) {
	t.Helper()
	if os.Getenv("CRASH_EVERY") == "1" {
		return 1, 1
	}
	seed := uint64(number(t, "SEED", int(time.Now().UnixNano()&0xffffff)))
	t.Logf("SEED=%d", seed)
	return 1 + mathrand.New(mathrand.NewPCG(seed, 3)).IntN(stride), stride
}

var modes = []dek.Integrity{dek.IntegrityNone, dek.IntegrityHMAC}

func TestKernelFormatAndReopen(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newFixture(t, 64*mib, integrity)
			writeAt(t, f.v.Device, 16*mib, bytes.Repeat([]byte("old "), mib/4))
			m := f.open(t)
			if m.Made || m.Header.UUID != f.d.Claim.UUID || m.Header.Sequence == 0 || m.Integrity != integrity || m.ReadOnly {
				t.Errorf("a new mapping is %+v", m)
			}
			for _, offset := range []int64{0, m.Size - mib} {
				if !bytes.Equal(readAt(t, m.Path, offset, mib), make([]byte, mib)) {
					t.Errorf("the MiB at %d is not zero", offset)
				}
			}
			if again := f.open(t); again != m {
				t.Errorf("opened again: %+v, want %+v", again, m)
			}
			made := f.made(t, "hello")
			if made.Header.Sequence <= m.Header.Sequence {
				t.Errorf("sequence %d after %d", made.Header.Sequence, m.Header.Sequence)
			}
			if again, err := f.MarkMade(t.Context(), f.v, f.d); err != nil || again != made {
				t.Errorf("MarkMade again: %+v, %v", again, err)
			}
			f.close(t)
			f.close(t)
			if _, err := os.Stat(m.Path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the node stayed: %v", err)
			}
			m = f.open(t)
			if !m.Made || string(readAt(t, m.Path, 0, 5)) != "hello" {
				t.Errorf("reopened: %+v with %q", m, readAt(t, m.Path, 0, 5))
			}
			if list, err := f.List(); err != nil || len(list) != 1 || list[0].Name != f.v.Name || list[0].Backing == "" {
				t.Errorf("List = %+v, %v", list, err)
			}
		})
	}
}

// An ordinary cryptsetup is the independent reader of what we write.
func TestKernelCryptsetupOpensOurs(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newFixture(t, 40*mib, integrity)
			kernel.Need(t, "exec:cryptsetup")
			ours := f.made(t, "written by us")
			f.close(t)
			run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
			if got := string(readAt(t, dm.Path(f.v.Name), 0, 13)); got != "written by us" {
				t.Errorf("cryptsetup reads %q", got)
			}
			writeAt(t, dm.Path(f.v.Name), 0, []byte("written by it"))
			run(t, nil, "cryptsetup", "close", f.v.Name)
			if m := f.open(t); m.Header != ours.Header || string(readAt(t, m.Path, 0, 13)) != "written by it" {
				t.Errorf("after cryptsetup: %+v with %q", m, readAt(t, m.Path, 0, 13))
			}
			dump := run(t, nil, "cryptsetup", "luksDump", f.v.Device)
			for _, want := range []string{"pbkdf2", "Iterations: 1000", "aes-xts-plain64", "16777216 [bytes]", "sector: 4096", "cryptcsi"} {
				if !strings.Contains(dump, want) {
					t.Errorf("luksDump has no %q:\n%s", want, dump)
				}
			}
		})
	}
}

func TestKernelRefusals(t *testing.T) {
	volume := newFixture(t, 24*mib, dek.IntegrityNone)
	kernel.Need(t, "exec:mkfs.ext4")
	volume.made(t, "x")
	volume.close(t)
	otherKey := func() secret.Bytes {
		k := secret.New(dek.Size)
		_, _ = rand.Read(k.Expose())
		return k
	}
	for _, tt := range []struct {
		name   string
		break_ func(t *testing.T, f *fixture)
		class  error
		words  string
	}{
		{"wrong key", func(_ *testing.T, f *fixture) { f.d.Key = otherKey() }, errdefs.ErrState, "does not verify under the DEK"},
		{"wrong key of a new volume", func(_ *testing.T, f *fixture) {
			f.d.Key, f.d.State, f.d.Header, f.d.Claim.UUID = otherKey(), dek.Prepared, dek.HeaderID{}, dek.NewUUID()
		}, errdefs.ErrState, "not the remains of our own try"},
		{"another volume's key ID", func(_ *testing.T, f *fixture) { f.d.ID = "test.cryptcsi.io/other" }, errdefs.ErrState, `belongs to "test.cryptcsi.io/`},
		{"blanked disk", func(t *testing.T, f *fixture) { writeAt(t, f.v.Device, 0, make([]byte, 17*mib)) }, errdefs.ErrState, "will not be formatted"},
		{"filesystem where a new volume should be", func(t *testing.T, f *fixture) {
			writeAt(t, f.v.Device, 0, make([]byte, 17*mib))
			run(t, nil, "mkfs.ext4", "-q", f.v.Device)
			f.d.State, f.d.Header = dek.Prepared, dek.HeaderID{}
		}, errdefs.ErrState, `holds "ext4"`},
		{"partition table where a new volume should be", func(t *testing.T, f *fixture) {
			writeAt(t, f.v.Device, 0, make([]byte, 17*mib))
			mbr := make([]byte, 512)
			copy(mbr[446:], []byte{0, 0, 2, 0, 0x83, 0, 2, 0, 1, 0, 0, 0, 0, 8, 0, 0}) // one Linux partition
			mbr[510], mbr[511] = 0x55, 0xaa
			writeAt(t, f.v.Device, 0, mbr)
			f.d.State, f.d.Header = dek.Prepared, dek.HeaderID{}
		}, errdefs.ErrState, `holds "dos"`},
		{"nobody claimed", func(t *testing.T, f *fixture) {
			writeAt(t, f.v.Device, 0, make([]byte, 17*mib))
			f.d.State, f.d.Header, f.d.Claim = dek.Prepared, dek.HeaderID{}, dek.Claim{}
		}, errdefs.ErrInvalid, "no node has claimed"},
		{"new and read-only", func(t *testing.T, f *fixture) {
			writeAt(t, f.v.Device, 0, make([]byte, 17*mib))
			f.d.State, f.d.Header, f.v.ReadOnly = dek.Prepared, dek.HeaderID{}, true
		}, errdefs.ErrState, "use it writable once"},
		{"header bit flipped in both copies", func(t *testing.T, f *fixture) {
			for _, at := range []int64{4096 + 7, 16384 + 4096 + 7} {
				b := readAt(t, f.v.Device, at, 1)
				writeAt(t, f.v.Device, at, []byte{b[0] ^ 1})
			}
		}, errdefs.ErrState, "fails its checksum"},
		{"key material changed", func(t *testing.T, f *fixture) {
			b := readAt(t, f.v.Device, 40000, 1)
			writeAt(t, f.v.Device, 40000, []byte{b[0] ^ 1})
		}, errdefs.ErrState, "does not verify under the DEK"},
		{"device shrunk", func(t *testing.T, f *fixture) { f.v.Device = smaller(t, f.v.Device, 20*mib) }, errdefs.ErrState, "it was shrunk"},
		{"no block device", func(t *testing.T, f *fixture) { f.v.Device = "/dev/null" }, errdefs.ErrState, "not a block device"},
		{"mapping name of device-mapper's own", func(_ *testing.T, f *fixture) { f.v.Name = "control" }, errdefs.ErrInvalid, "uses such names itself"},
		{"cipher that is not offered", func(_ *testing.T, f *fixture) { f.d.Spec.Cipher = "cipher_null-ecb" }, errdefs.ErrInvalid, "only aes-xts-plain64"},
		{"integrity asked, none there", func(_ *testing.T, f *fixture) { f.d.Spec.Integrity = dek.IntegrityHMAC }, errdefs.ErrState, "integrity"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			volume.lend(t, func(f *fixture) {
				tt.break_(t, f)
				if f.v.Device != "/dev/null" {
					f.refused(t, tt.class, tt.words)
				} else if _, err := f.Open(t.Context(), f.v, f.d); !errors.Is(err, tt.class) {
					t.Errorf("Open = %v", err)
				}
			})
		})
	}
}

// smaller copies the start of a device to a smaller one.
func smaller(t *testing.T, device string, size int64) string {
	to := kernel.Loop(t, size)
	writeAt(t, to, 0, readAt(t, device, 0, int(size)))
	return to
}

func TestKernelRollback(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	m := f.open(t)
	old := readAt(t, f.v.Device, 0, 16*mib)
	f.made(t, "x")
	f.close(t)
	newest := readAt(t, f.v.Device, 0, 16*mib)
	writeAt(t, f.v.Device, 0, old)
	f.refused(t, errdefs.ErrState, "rolled back")

	// One copy rolled back is damage, and repaired from the other.
	writeAt(t, f.v.Device, 0, newest)
	writeAt(t, f.v.Device, 0, old[:luks2.CopySize])
	if got := f.open(t); got.Header.Sequence != m.Header.Sequence+1 || !got.Made {
		t.Errorf("opened with %+v", got)
	}
	if !bytes.Equal(readAt(t, f.v.Device, 0, 16*mib), newest) {
		t.Error("the older copy was not repaired")
	}
}

func TestKernelDamagedCopyIsRepaired(t *testing.T) {
	for name, at := range map[string]int64{"primary": 0, "secondary": luks2.CopySize} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, 40*mib, dek.IntegrityNone)
			f.made(t, "x")
			f.close(t)
			whole := readAt(t, f.v.Device, 0, 16*mib)
			writeAt(t, f.v.Device, at, make([]byte, luks2.CopySize))
			f.v.ReadOnly = true
			f.open(t)
			f.close(t)
			if bytes.Equal(readAt(t, f.v.Device, 0, 16*mib), whole) {
				t.Error("a read-only open wrote to the device")
			}
			f.v.ReadOnly = false
			f.open(t)
			if !bytes.Equal(readAt(t, f.v.Device, 0, 16*mib), whole) {
				t.Error("the copy was not repaired")
			}
		})
	}
}

// Killed at a step of its life, a volume converges: the same DEK and claim open
// it, its data is there, nothing is left behind. CRASH_EVERY=1 (make crash)
// tries every step, otherwise it is a sample.
func TestKernelKilledAtSteps(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			step, stride := sample(t, map[dek.Integrity]int{dek.IntegrityNone: 3, dek.IntegrityHMAC: 6}[integrity])
			for ; ; step += stride {
				f := newFixture(t, 24*mib, integrity)
				dying := newMapper(t, step)
				_, err := dying.Open(t.Context(), f.v, f.d)
				killed := err != nil
				if killed && !strings.Contains(err.Error(), "killed") && !strings.Contains(err.Error(), "died") {
					t.Fatalf("step %d: %v", step, err)
				}
				f.open(t)
				dying = newMapper(t, step)
				if _, err = dying.MarkMade(t.Context(), f.v, f.d); err != nil {
					killed = true
				}
				f.made(t, "survives")
				f.close(t)
				if m := f.open(t); string(readAt(t, m.Path, 0, 8)) != "survives" {
					t.Fatalf("step %d: the data is gone", step)
				}
				dying = newMapper(t, step)
				if err := dying.Close(t.Context(), f.v.Name); err != nil {
					killed = true
				}
				f.close(t)
				if !killed {
					t.Logf("up to step %d", step-stride)
					return
				}
			}
		})
	}
}

func TestKernelIntegrityCatchesAFlippedBit(t *testing.T) {
	f := newFixture(t, 64*mib, dek.IntegrityHMAC)
	m := f.made(t, "x")
	marker := bytes.Repeat([]byte("MARK"), 1024)
	writeAt(t, m.Path, 8*mib, marker)
	before := readAt(t, f.v.Device, 0, 64*mib)
	writeAt(t, m.Path, 8*mib, bytes.Repeat([]byte("mark"), 1024))
	f.close(t)
	after := readAt(t, f.v.Device, 0, 64*mib)
	if bytes.Contains(after, marker[:64]) || bytes.Contains(after, []byte("markmarkmark")) {
		t.Fatal("plaintext on the device")
	}
	// The last difference is the data sector itself (the journal lies before it).
	at := len(after) - 1
	for ; at > 0 && before[at] == after[at]; at-- {
	}
	writeAt(t, f.v.Device, int64(at), []byte{after[at] ^ 4})
	m = f.open(t)
	file, err := os.Open(m.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	got := make([]byte, 4096)
	if _, err := file.ReadAt(got, 8*mib); !errors.Is(err, unix.EILSEQ) && !errors.Is(err, unix.EIO) {
		t.Errorf("reading a changed sector gave %q…, %v", got[:8], err)
	}
	if _, err := file.ReadAt(got, 0); err != nil {
		t.Errorf("another sector: %v", err)
	}
}

func TestKernelReadOnly(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newFixture(t, 40*mib, integrity)
			f.made(t, "fixed")
			f.close(t)
			f.v.ReadOnly = true
			m := f.open(t)
			if !m.ReadOnly || string(readAt(t, m.Path, 0, 5)) != "fixed" {
				t.Errorf("read-only: %+v with %q", m, readAt(t, m.Path, 0, 5))
			}
			unwritable(t, m.Path)
			f.v.ReadOnly = false
			if _, err := f.Open(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) {
				t.Errorf("opening writable over a read-only mapping: %v", err)
			}
			f.close(t)
			if got := string(readAt(t, f.open(t).Path, 0, 5)); got != "fixed" {
				t.Errorf("the content became %q", got)
			}
		})
	}
}

func TestKernelResize(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	m := f.made(t, "grows")
	same, err := f.Resize(t.Context(), f.v, f.d)
	if err != nil || same != m {
		t.Fatalf("Resize without growth: %+v, %v", same, err)
	}
	kernel.Grow(t, f.v.Device, 80*mib)
	for range 2 {
		grown, err := f.Resize(t.Context(), f.v, f.d)
		if err != nil || grown.Size != 64*mib || grown.Header.Sequence != m.Header.Sequence+1 {
			t.Fatalf("Resize = %+v, %v", grown, err)
		}
		f.confirm(grown)
	}
	writeAt(t, m.Path, 63*mib, []byte("new end"))
	f.close(t)
	if m = f.open(t); m.Size != 64*mib || string(readAt(t, m.Path, 0, 5)) != "grows" || string(readAt(t, m.Path, 63*mib, 7)) != "new end" {
		t.Errorf("reopened after growth: %+v", m)
	}
	f.close(t)
	if _, err := f.Resize(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("Resize of a closed volume: %v", err)
	}
}

// A volume keeps the sectors that it was formatted with, whatever its device
// would suggest after it grew.
func TestKernelResizeKeepsSectors(t *testing.T) {
	f := newFixture(t, 40*mib+512, dek.IntegrityNone)
	f.made(t, "sectors of 512")
	f.close(t)
	kernel.Grow(t, f.v.Device, 80*mib)
	if m := f.open(t); string(readAt(t, m.Path, 0, 14)) != "sectors of 512" {
		t.Errorf("after growth: %+v", m)
	}
	if m, err := f.Resize(t.Context(), f.v, f.d); err != nil || m.Size != 64*mib {
		t.Errorf("Resize = %+v, %v", m, err)
	}
}

// TestKernelUnreadableSignature: a disk whose end cannot be read is not formatted,
// because what may be there would not be seen.
func TestKernelUnreadableSignature(t *testing.T) {
	for name, bad := range map[string]int64{"end": 64*mib - 4096, "beginning": 2*mib + 4096} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, 64*mib, dek.IntegrityNone)
			kernel.Need(t, "exec:dmsetup")
			disk := f.v.Device
			f.v.Device = dm.Path("unreadable")
			table := fmt.Sprintf("0 %d linear %s 0\n%d 8 error\n", bad/512, disk, bad/512)
			if rest := (64*mib - bad - 4096) / 512; rest > 0 {
				table += fmt.Sprintf("%d %d linear %s %d\n", bad/512+8, rest, disk, bad/512+8)
			}
			run(t, []byte(table), "dmsetup", "create", "unreadable")
			t.Cleanup(func() { _ = dm.Remove("unreadable") })
			if _, err := f.Open(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "will not be touched") {
				t.Errorf("Open: %v", err)
			}
			f.close(t)
			if got := readAt(t, disk, 0, 17*mib); !bytes.Equal(got, make([]byte, 17*mib)) {
				t.Error("it was written to")
			}
		})
	}
}

// TestKernelResizeUnaligned: a device that has grown by a part of a sector of ours
// does not keep the volume from growing, nor from opening.
func TestKernelResizeUnaligned(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	f.made(t, "sectors of 4096")
	reads := func(m cryptmapper.Mapping, size int64) {
		t.Helper()
		if got := string(readAt(t, m.Path, 0, 15)); got != "sectors of 4096" || m.Size != size {
			t.Errorf("%q, %d bytes; want %d", got, m.Size, size)
		}
	}
	resized := func(device, size int64) {
		t.Helper()
		kernel.Grow(t, f.v.Device, device)
		m, err := f.Resize(t.Context(), f.v, f.d)
		if err != nil {
			t.Fatal(err)
		}
		f.confirm(m)
		reads(m, size)
	}
	resized(49*mib+512, 33*mib)
	f.close(t)
	reads(f.open(t), 33*mib)
	f.close(t)
	kernel.Grow(t, f.v.Device, 50*mib+1024) // while it is closed
	f.v.ReadOnly, f.v.Performance = true, "no_read_workqueue,same_cpu_crypt"
	reads(f.open(t), 34*mib)
	f.close(t)
	f.v.ReadOnly = false
	if m := f.open(t); m.Performance != "no_read_workqueue,same_cpu_crypt" {
		t.Errorf("it works as %q", m.Performance)
	}
	resized(51*mib+3584, 35*mib)
	resized(52*mib, 36*mib)
	f.close(t)
	reads(f.open(t), 36*mib)
}

// TestKernelTemporaryLeft: what libcryptsetup was about to use for formatting when
// it was killed holds the device no longer than to the next call.
func TestKernelTemporaryLeft(t *testing.T) {
	for _, resumed := range []bool{false, true} {
		f := newFixture(t, 64*mib, dek.IntegrityHMAC)
		var st unix.Stat_t
		if err := unix.Stat(f.v.Device, &st); err != nil {
			t.Fatal(err)
		}
		name := cryptmapper.TemporaryPrefix + dek.NewUUID()
		leave := func() {
			t.Helper()
			_, err := dm.Create(name, "")
			if err == nil {
				err = dm.Load(name, []dm.Target{{Length: 8, Type: "integrity", Params: dm.NumberOf(st.Rdev).String() + " 32768 32 J 1 block_size:4096"}}, false)
			}
			if err == nil && resumed {
				err = dm.Resume(name)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		// Dies while it formats, before there is a mapping.
		if m, err := newMapper(t, 1).Open(t.Context(), f.v, f.d); err == nil {
			t.Fatalf("Open = %+v", m)
		}
		leave()
		f.close(t)
		if _, err := dm.Status(name); !errors.Is(err, dm.ErrNotFound) {
			t.Errorf("resumed %t: after Close it is there, %v", resumed, err)
		}
		_ = dm.Remove(name)
		leave()
		f.open(t)
		f.close(t)
	}
}

func TestKernelResizeKilledAtSteps(t *testing.T) {
	step, stride := sample(t, 2)
	for ; ; step += stride {
		f := newFixture(t, 40*mib, dek.IntegrityNone)
		f.made(t, "grows")
		kernel.Grow(t, f.v.Device, 80*mib)
		dying := newMapper(t, step)
		_, err := dying.Resize(t.Context(), f.v, f.d)
		grown, again := f.Resize(t.Context(), f.v, f.d)
		if again != nil || grown.Size != 64*mib {
			t.Fatalf("step %d: Resize = %+v, %v", step, grown, again)
		}
		f.confirm(grown)
		f.close(t)
		f.open(t)
		f.close(t)
		if err == nil {
			t.Logf("up to step %d", step-stride)
			return
		}
	}
}

func TestKernelIdentity(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	m := f.made(t, "x")
	// The same disk behind another device number, as after a re-attach.
	moved := smaller(t, f.v.Device, 40*mib)
	busy, err := os.Open(m.Path)
	if err != nil {
		t.Fatal(err)
	}
	old := f.v.Device
	f.v.Device = moved
	if _, err := f.Open(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "still uses the mapping") {
		t.Errorf("a mapping in use on another device: %v", err)
	}
	busy.Close()
	if got := f.open(t); got.Backing == m.Backing {
		t.Errorf("the stale mapping on %s was reused", old)
	}
}

// TestKernelChosenName: under a name that a person chose nothing of somebody
// else is resumed, replaced or closed.
func TestKernelChosenName(t *testing.T) {
	for _, integrity := range []dek.Integrity{dek.IntegrityNone, dek.IntegrityHMAC} {
		f := newFixture(t, 40*mib, integrity)
		f.v.Name = "State_disk.1+" + dek.NewUUID()
		f.made(t, "x")
		f.close(t)
		m := f.open(t)
		if got := string(readAt(t, m.Path, 0, 1)); m.Path != "/dev/mapper/"+f.v.Name || got != "x" {
			t.Errorf("%s has %q", m.Path, got)
		}
		// The same disk behind another number: whose mapping it is, is not clear.
		own := f.v.Device
		f.v.Device = smaller(t, own, 40*mib)
		if _, err := f.Open(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "close it, or take another name") {
			t.Errorf("a mapping on another device: %v", err)
		}
		if again, err := dm.Status(f.v.Name); err != nil || again.Number.String() != m.Number {
			t.Errorf("the mapping was touched: %+v, %v", again, err)
		}
		f.v.Device = own
		f.close(t)
	}

	f := newFixture(t, 40*mib, dek.IntegrityNone)
	kernel.Need(t, "exec:dmsetup", "dm-zero")
	f.v.Name = "somebodys-" + dek.NewUUID()
	for _, name := range []string{f.v.Name, cryptmapper.IntegrityName(f.v.Name)} {
		run(t, nil, "dmsetup", "create", name, "--table", "0 8 zero")
		run(t, nil, "dmsetup", "suspend", name)
		before := run(t, nil, "dmsetup", "info", "-c", "--noheadings", name)
		_, open := f.Open(t.Context(), f.v, f.d)
		for what, err := range map[string]error{"Open": open, "Close": f.Close(t.Context(), f.v.Name)} {
			if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "no encrypted device of ours") {
				t.Errorf("%s over somebody else's %s: %v", what, name, err)
			}
		}
		if after := run(t, nil, "dmsetup", "info", "-c", "--noheadings", name); after != before {
			t.Errorf("somebody else's mapping was %s, is %s", before, after)
		}
		run(t, nil, "dmsetup", "resume", name)
		run(t, nil, "dmsetup", "remove", name)
	}
}

func TestKernelCloseInUse(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	m := f.made(t, "x")
	busy, err := os.Open(m.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(t.Context(), f.v.Name); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("closing a mapping in use: %v", err)
	}
	busy.Close()
	f.close(t)
}

// A device that hangs locks its own volume and no other; when it answers
// again, the volume comes free.
func TestKernelHangingDeviceStopsNobodyElse(t *testing.T) {
	f, other := newFixture(t, 40*mib, dek.IntegrityNone), newFixture(t, 40*mib, dek.IntegrityNone)
	kernel.Need(t, "exec:dmsetup")
	f.made(t, "x")
	f.close(t)
	slow := cryptmapper.Prefix + "stalled"
	run(t, nil, "dmsetup", "create", slow, "--table", "0 "+strconv.Itoa(40*mib/512)+" linear "+f.v.Device+" 0")
	t.Cleanup(func() { _ = dm.Remove(slow) })
	run(t, nil, "dmsetup", "suspend", slow)
	good := f.v.Device
	f.v.Device = dm.Path(slow)
	f.hang(t)
	other.Mapper = f.Mapper
	other.made(t, "not delayed")
	run(t, nil, "dmsetup", "resume", slow)
	f.v.Device = good
	for deadline := time.Now().Add(2 * time.Minute); len(f.Stuck()) > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if err := dm.Remove(slow); err != nil {
		t.Fatal(err)
	}
	f.open(t)
	f.close(t)
}

// hang opens the volume, whose device hangs, until a worker has got as far as to
// hang with it, which on a busy machine takes longer, and keeps others away.
func (f *fixture) hang(t *testing.T) {
	t.Helper()
	for limit := 2 * time.Second; limit < 5*time.Minute; limit *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		_, err := f.Open(ctx, f.v, f.d)
		cancel()
		switch {
		case errors.Is(err, errdefs.ErrConflict) && slices.Equal(f.Stuck(), []string{f.v.Name}):
			return
		case !errors.Is(err, errdefs.ErrConflict) && !errors.Is(err, context.DeadlineExceeded):
			t.Fatalf("a hanging device: %v", err)
		}
	}
	t.Fatal("no worker hangs")
}

func TestKernelManyAtOnce(t *testing.T) {
	kernel.Need(t, "dm-crypt")
	var wg sync.WaitGroup
	var fixtures []*fixture
	for range 8 {
		fixtures = append(fixtures, newFixture(t, 24*mib, dek.IntegrityNone))
	}
	for _, f := range fixtures {
		f.Mapper = fixtures[0].Mapper
		wg.Go(func() {
			if _, err := f.Open(t.Context(), f.v, f.d); err != nil {
				t.Errorf("Open: %v", err)
			}
		})
	}
	wg.Wait()
	for _, f := range fixtures {
		f.close(t)
	}
}

// cutShort opens the volume by m with deadlines that are too early, and returns
// what comes of it: an error with a percentage, or nil when all is done. How much
// is done until a deadline is the machine's matter. Where that was nothing to
// speak of, because the worker was killed on its way, the next one is later.
func (f *fixture) cutShort(t *testing.T, m *cryptmapper.Mapper) error {
	t.Helper()
	for limit := 1200 * time.Millisecond; limit < 5*time.Minute; limit *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		_, err := m.Open(ctx, f.v, f.d)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errdefs.ErrConflict) {
			return err
		}
	}
	t.Fatal("no deadline is late enough")
	return nil
}

func TestKernelInitialisingGoesOn(t *testing.T) {
	f := newFixture(t, 100*mib, dek.IntegrityHMAC)
	percentage := regexp.MustCompile(`, ([0-9]+) % done`)
	tries, last := 0, 0
	for ; ; tries++ {
		err := f.cutShort(t, f.Mapper)
		if err == nil {
			break
		}
		found := percentage.FindStringSubmatch(err.Error())
		if !errors.Is(err, errdefs.ErrUnavailable) || found == nil {
			t.Fatalf("try %d: %v", tries, err)
		}
		now, _ := strconv.Atoi(found[1])
		if now <= last {
			t.Fatalf("try %d: %v; it was %d %% before", tries, err, last)
		}
		last = now
	}
	if tries == 0 {
		t.Fatal("it was not cut short")
	}
	t.Logf("%d tries more after the first, the last to fail at %d %%", tries, last)
	m := f.made(t, "x")
	readAt(t, m.Path, 0, int(m.Size))
}

// unwritable fails where something can be written through a read-only mapping.
func unwritable(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return
	}
	_, err = file.WriteAt([]byte("other"), 0)
	if err == nil {
		err = file.Sync()
	}
	file.Close()
	if err == nil {
		t.Error("a read-only mapping was written to")
	}
}

// A disk with sectors of 4096 bytes, on which nothing smaller can be written.
func TestKernelLargeSectors(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newFixture(t, 40*mib, integrity)
			file, err := os.Open(f.v.Device)
			if err != nil {
				t.Fatal(err)
			}
			err = unix.IoctlSetInt(int(file.Fd()), unix.LOOP_SET_BLOCK_SIZE, 4096)
			if err = errors.Join(err, file.Close()); err != nil {
				t.Fatal(err)
			}
			m := f.made(t, "large")
			kernel.Grow(t, f.v.Device, 48*mib)
			grown, err := f.Resize(t.Context(), f.v, f.d)
			if err != nil || grown.Size <= m.Size {
				t.Fatalf("Resize = %+v, %v", grown, err)
			}
			f.confirm(grown)
			f.close(t)
			writeAt(t, f.v.Device, 0, make([]byte, luks2.CopySize)) // to be repaired
			f.open(t)
			f.close(t)
			f.asCopy() // to be given another key
			if m := f.open(t); m.Size != grown.Size || string(readAt(t, m.Path, 0, 5)) != "large" {
				t.Errorf("reopened: %+v", m)
			}
		})
	}
}

// An update of the header that was cut within the first copy leaves one good
// copy. The next call repairs the torn one, also where it has nothing else to
// write, so that another cut, within the other copy, does not leave none.
func TestKernelTornHeaderIsRepaired(t *testing.T) {
	f := newFixture(t, 40*mib, dek.IntegrityNone)
	f.open(t)
	dying := func(step int) *fixture {
		w := *f
		w.Mapper = newMapper(t, step)
		return &w
	}
	whole := func() int {
		t.Helper()
		copies, err := f.Peek(t.Context(), f.v.Device)
		if err != nil {
			t.Fatal(err)
		}
		return len(copies)
	}
	// Mapping flushed, second copy written, JSON of the first written.
	if _, err := dying(3).MarkMade(t.Context(), f.v, f.d); err == nil || whole() != 1 {
		t.Fatalf("MarkMade: %v, %d copies are whole", err, whole())
	}
	torn := readAt(t, f.v.Device, 0, 2*luks2.CopySize)
	m, err := f.MarkMade(t.Context(), f.v, f.d)
	if err != nil || !m.Made {
		t.Fatalf("MarkMade again: %+v, %v", m, err)
	}
	f.confirm(m)
	if whole() != 2 {
		t.Error("MarkMade left the torn copy as it was")
	}
	f.close(t)
	f.v.ReadOnly = true
	writeAt(t, f.v.Device, 0, torn)
	f.open(t)
	f.close(t)
	if !bytes.Equal(readAt(t, f.v.Device, 0, len(torn)), torn) {
		t.Error("opening read-only wrote to the header")
	}
	f.v.ReadOnly = false
	f.open(t)
	if whole() != 2 {
		t.Error("opening left the torn copy as it was")
	}
	writeAt(t, f.v.Device, 0, torn) // while it is open
	kernel.Grow(t, f.v.Device, 80*mib)
	// Torn copy repaired (two steps), mapping grown, second copy written.
	if _, err := dying(4).Resize(t.Context(), f.v, f.d); err == nil {
		t.Fatal("Resize was not killed")
	}
	f.close(t)
	// The power goes within the second copy: of its first 4096 bytes nothing is there.
	writeAt(t, f.v.Device, luks2.CopySize, torn[luks2.CopySize:luks2.CopySize+4096])
	if m := f.open(t); !m.Made || whole() != 2 {
		t.Errorf("after two cuts: %+v, %d copies are whole", m, whole())
	}
}
