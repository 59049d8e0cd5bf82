package worker_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// newCloned is a volume with the layout clone.
func newCloned(t *testing.T, size int64) *fixture {
	t.Helper()
	f := newFixture(t, size, dek.IntegrityHMAC)
	kernel.Need(t, "dm-clone", "dm-zero")
	f.d.Spec.Layout = dek.LayoutClone
	return f
}

// hydrate lets the open volume hydrate and waits until it is done.
func (f *fixture) hydrate(t *testing.T) {
	t.Helper()
	if err := f.Hydrate(f.v.Name, true); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		m := f.listed(t)
		if m.Regions > 0 && m.Hydrated == m.Regions {
			return
		}
		if !m.Hydrating || time.Now().After(deadline) {
			t.Fatalf("not hydrated: %+v", m)
		}
	}
}

// listed is the volume's mapping as List has it.
func (f *fixture) listed(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	list, err := f.List()
	if err != nil || len(list) != 1 || list[0].Name != f.v.Name {
		t.Fatalf("List = %+v, %v", list, err)
	}
	return list[0]
}

func (f *fixture) finish(t *testing.T) cryptmapper.Mapping {
	t.Helper()
	m, err := f.Finish(t.Context(), f.v, f.d)
	if err != nil {
		t.Fatalf("Finish: %v", err)
	}
	return m
}

// layers are the names of all mappings that begin with the volume's.
func (f *fixture) layers(t *testing.T) string {
	t.Helper()
	all, err := dm.List()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range all {
		if suffix, ok := strings.CutPrefix(m.Name, f.v.Name); ok {
			names = append(names, suffix)
		}
	}
	return strings.Join(names, " ")
}

// zeros fails unless the whole device reads as zeros.
func zeros(t *testing.T, path string) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	b, none := make([]byte, mib), make([]byte, mib)
	for at := int64(0); ; at += mib {
		n, err := file.ReadAt(b, at)
		if !bytes.Equal(b[:n], none[:n]) {
			t.Fatalf("%s is not zeros at %d", path, at)
		}
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("reading %s at %d: %v", path, at, err)
		}
	}
}

// A new volume is ready without a wipe, reads as zeros, and is an ordinary one
// when all of it was written once.
func TestKernelClone(t *testing.T) {
	f := newCloned(t, 100*mib)
	kernel.Need(t, "exec:cryptsetup")
	writeAt(t, f.v.Device, 16*mib, bytes.Repeat([]byte("old "), 8*mib/4))
	m := f.open(t)
	if m.Made || m.Integrity != dek.IntegrityHMAC || m.Regions == 0 || m.Hydrating || m.Hydrated == m.Regions || m.Backing == "" {
		t.Errorf("a new mapping is %+v", m)
	}
	if f.layers(t) == "" {
		t.Error("no layers")
	}
	zeros(t, m.Path)
	made := f.made(t, "hello")
	if made.Size != m.Size {
		t.Errorf("made is %+v, was %+v", made, m)
	}
	if _, err := f.Finish(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "% done") {
		t.Errorf("Finish before it is hydrated: %v", err)
	}
	f.close(t)
	if left := f.layers(t); left != "" {
		t.Errorf("Close left %s", left)
	}
	m = f.open(t)
	if m.Header != made.Header || string(readAt(t, m.Path, 0, 5)) != "hello" {
		t.Errorf("reopened: %+v", m)
	}
	began := time.Now()
	f.hydrate(t)
	t.Logf("hydrated %d MiB in %v", m.Size/mib, time.Since(began))
	done := f.finish(t)
	if done.Header.Sequence != made.Header.Sequence+1 || done.Regions != 0 || done.Size != m.Size || !done.Made {
		t.Errorf("finished: %+v", done)
	}
	f.confirm(done)
	if again := f.finish(t); again != done {
		t.Errorf("Finish again: %+v, want %+v", again, done)
	}
	if again := f.open(t); again != done {
		t.Errorf("opened again: %+v, want %+v", again, done)
	}
	f.close(t)
	run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
	if got := string(readAt(t, dm.Path(f.v.Name), 0, 5)); got != "hello" {
		t.Errorf("cryptsetup reads %q", got)
	}
	run(t, nil, "cryptsetup", "close", f.v.Name)
	m = f.open(t)
	if m.Regions != 0 || string(readAt(t, m.Path, 0, 5)) != "hello" {
		t.Errorf("reopened after it was finished: %+v", m)
	}
	writeAt(t, m.Path, 0, make([]byte, 5))
	f.close(t)
	zeros(t, f.open(t).Path)
}

// without returns a Mapper that does as on a kernel without dm-clone, and dies at
// a step.
func without(t *testing.T, dieAt int) *cryptmapper.Mapper {
	command := []string{"../../bin/crypt-worker"}
	if dieAt > 0 {
		command = []string{os.Args[0], "crypt-worker", strconv.Itoa(dieAt)}
	}
	m := cryptmapper.New(cryptmapper.Options{Worker: command, LockDir: "/run/cryptcsi-test", WithoutClone: true})
	t.Cleanup(m.Shutdown)
	return m
}

// A node without dm-clone wipes new volumes, and refuses those that need it.
func TestKernelCloneWithout(t *testing.T) {
	t.Run("new", func(t *testing.T) {
		f := newCloned(t, 64*mib)
		own := f.Mapper
		f.Mapper = without(t, 0)
		m := f.made(t, "wiped")
		if m.Regions != 0 || m.Made != true {
			t.Errorf("%+v", m)
		}
		f.close(t)
		f.Mapper = own
		if again := f.open(t); again != m || string(readAt(t, m.Path, 0, 5)) != "wiped" {
			t.Errorf("where there is dm-clone: %+v, want %+v", again, m)
		}
		if done := f.finish(t); done != m {
			t.Errorf("Finish: %+v, want %+v", done, m)
		}
		if err := f.Hydrate(f.v.Name, true); err != nil {
			t.Errorf("Hydrate: %v", err)
		}
		f.close(t)
		wholeBlank(t, f)
	})
	t.Run("begun by dm-clone", func(t *testing.T) {
		f := newCloned(t, 64*mib)
		m := f.open(t)
		writeAt(t, m.Path, 8*mib, []byte("of a mkfs that was killed"))
		f.close(t)
		f.Mapper = without(t, 0)
		m = f.open(t)
		if m.Regions != 0 || m.Made {
			t.Errorf("%+v", m)
		}
		zeros(t, m.Path)
	})
	t.Run("begun by wiping", func(t *testing.T) {
		f := newCloned(t, 100*mib)
		if err := f.cutShort(t, without(t, 0)); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "% done") {
			t.Fatalf("wiping: %v", err)
		}
		m := f.open(t)
		if m.Regions == 0 || m.Hydrated == m.Regions {
			t.Errorf("%+v", m)
		}
		zeros(t, m.Path)
	})
	t.Run("hydrating", func(t *testing.T) {
		f := newCloned(t, 64*mib)
		f.made(t, "x")
		own := f.Mapper
		f.Mapper = without(t, 0)
		f.open(t) // it is open: nothing needs dm-clone
		f.close(t)
		f.refused(t, errdefs.ErrState, "use it on a node with dm-clone until it is done")
		f.Mapper = own
		f.open(t)
		f.hydrate(t)
		f.confirm(f.finish(t))
		f.close(t)
		f.Mapper = without(t, 0)
		if m := f.open(t); string(readAt(t, m.Path, 0, 1)) != "x" {
			t.Errorf("finished: %+v", m)
		}
	})
}

// wholeBlank opens the closed volume with Debian's cryptsetup and reads all of
// it, the area behind its end too.
func wholeBlank(t *testing.T, f *fixture) {
	t.Helper()
	kernel.Need(t, "exec:cryptsetup")
	run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
	contents(t, dm.Path(f.v.Name), 0)
	run(t, nil, "cryptsetup", "close", f.v.Name)
}

// authErrors counts what the kernel has logged of sectors that are not authentic.
func authErrors(t *testing.T) int {
	t.Helper()
	b := make([]byte, 1<<20)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(b[:n], []byte("INTEGRITY AEAD ERROR"))
}

// A filesystem is made at once and used while the volume hydrates; at any moment
// it is sound and every sector of the device can be read.
func TestKernelCloneFilesystems(t *testing.T) {
	for name, tools := range map[string]struct{ mkfs, fsck []string }{
		"ext4": {[]string{"mkfs.ext4", "-q"}, []string{"e2fsck", "-fn"}},                          // with its discards, which come to nothing
		"xfs":  {[]string{"mkfs.xfs", "--unsupported", "-q", "-f"}, []string{"xfs_repair", "-n"}}, // as small
	} {
		t.Run(name, func(t *testing.T) {
			f := newCloned(t, 112*mib)
			kernel.Need(t, name, "exec:"+tools.mkfs[0], "exec:"+tools.fsck[0], "exec:blkid", "exec:fstrim", "exec:cryptsetup")
			errorsBefore := authErrors(t)
			m := f.open(t)
			run(t, nil, tools.mkfs[0], append(tools.mkfs[1:], m.Path)...)
			m, err := f.MarkMade(t.Context(), f.v, f.d)
			if err != nil {
				t.Fatal(err)
			}
			f.confirm(m)
			files := map[string][]byte{}
			use := func(while string, act func()) {
				t.Helper()
				dir := t.TempDir()
				run(t, nil, "mount", "-t", name, m.Path, dir)
				act()
				for i := range 8 {
					file := fmt.Sprintf("%s-%d", while, i)
					files[file] = noise(mib)
					writeFile(t, filepath.Join(dir, file), files[file])
				}
				if out, err := exec.Command("fstrim", dir).CombinedOutput(); err == nil {
					t.Errorf("fstrim on a volume without discards: %s", out)
				}
				for file, want := range files {
					if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || !bytes.Equal(got, want) {
						t.Errorf("%s: %s is %d other bytes, %v", while, file, len(got), err)
					}
				}
				run(t, nil, "umount", dir)
				run(t, nil, tools.fsck[0], append(tools.fsck[1:], m.Path)...)
				contents(t, m.Path, 0)
			}
			use("paused", func() {})
			f.close(t)
			f.open(t)
			use("reopened", func() {
				if err := f.Hydrate(f.v.Name, true); err != nil {
					t.Error(err)
				}
			})
			use("hydrating", func() {})
			f.hydrate(t)
			use("swapped", func() { f.confirm(f.finish(t)) })
			f.close(t)
			f.open(t)
			use("finished", func() {})
			if n := authErrors(t) - errorsBefore; n != 0 {
				t.Errorf("%d sectors were not authentic", n)
			}
			f.close(t)
			run(t, f.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", f.v.Device, f.v.Name)
			if got := strings.TrimSpace(run(t, nil, "blkid", "-p", "-o", "value", "-s", "TYPE", dm.Path(f.v.Name))); got != name {
				t.Errorf("through cryptsetup it is %q", got)
			}
			run(t, nil, "cryptsetup", "close", f.v.Name)
		})
	}
}

// writeFile writes a file and syncs it.
func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := file.Sync(); err != nil {
		t.Fatal(err)
	}
}

// A discard through dm-clone would mark what was never written: there is none,
// at no time, for nobody.
func TestKernelCloneDiscard(t *testing.T) {
	f := newCloned(t, 64*mib)
	kernel.Need(t, "exec:blkdiscard")
	refused := func(m cryptmapper.Mapping) {
		t.Helper()
		for _, limit := range []string{"discard_max_bytes", "discard_max_hw_bytes"} {
			b, err := os.ReadFile("/sys/dev/block/" + m.Number + "/queue/" + limit)
			if err != nil || string(b) != "0\n" {
				t.Errorf("%s is %q, %v", limit, b, err)
			}
		}
		if out, err := exec.Command("blkdiscard", "-f", m.Path).CombinedOutput(); err == nil {
			t.Errorf("blkdiscard: %s", out)
		}
		run(t, nil, "blkdiscard", "-f", "-z", "-o", "4194304", "-l", "4194304", m.Path)
		zeros(t, m.Path)
	}
	m := f.open(t)
	refused(m)
	m = f.made(t, "\x00")
	f.close(t)
	refused(f.open(t))
	f.hydrate(t)
	f.finish(t)
	refused(m)
}

// A disk that fails while the volume hydrates takes dm-clone with it. That shows,
// the volume can be closed, and opened again it goes on where it was.
func TestKernelCloneDiskFails(t *testing.T) {
	f := newCloned(t, 64*mib)
	kernel.Need(t, "exec:dmsetup")
	const below = "test-below"
	whole := "0 " + strconv.Itoa(64*mib/512)
	table := func(target string) {
		t.Helper()
		run(t, nil, "dmsetup", "load", below, "--table", whole+target)
		run(t, nil, "dmsetup", "suspend", "--noflush", "--nolockfs", below)
		run(t, nil, "dmsetup", "resume", below)
	}
	good := " linear " + f.v.Device + " 0"
	run(t, nil, "dmsetup", "create", below, "--table", whole+good)
	defer func() { run(t, nil, "dmsetup", "remove", below) }()
	f.v.Device = dm.Path(below)
	m := f.made(t, "kept")
	if m.Failed {
		t.Errorf("at first: %+v", m)
	}
	file, err := os.OpenFile(m.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	table(" error")
	// The first writes get no further than the memory of dm-integrity's journal,
	// so that dm-clone has something to write into its metadata.
	_, _ = file.WriteAt(noise(mib), 8*mib)
	for deadline := time.Now().Add(time.Minute); !f.listed(t).Failed; time.Sleep(20 * time.Millisecond) {
		_ = file.Sync()
		if time.Now().After(deadline) {
			t.Fatalf("with a disk that failed: %+v", f.listed(t))
		}
	}
	if now := f.listed(t); now.Size != m.Size || now.Backing != m.Backing || now.Hydrating {
		t.Errorf("with a disk that failed: %+v", now)
	}
	file.Close()
	f.close(t)
	table(good)
	if m = f.open(t); m.Failed || m.Regions == 0 || string(readAt(t, m.Path, 0, 4)) != "kept" {
		t.Errorf("opened again: %+v", m)
	}
	readAt(t, m.Path, 0, int(m.Size))
	f.settled(t)
	f.close(t)
}

func TestKernelCloneReadOnly(t *testing.T) {
	f := newCloned(t, 64*mib)
	f.made(t, "fixed")
	f.close(t)
	f.v.ReadOnly = true
	m := f.open(t)
	if !m.ReadOnly || string(readAt(t, m.Path, 0, 5)) != "fixed" || m.Regions == 0 {
		t.Errorf("read-only: %+v", m)
	}
	unwritable(t, m.Path)
	if again := f.open(t); again != m {
		t.Errorf("opened again: %+v, want %+v", again, m)
	}
	f.hydrate(t)
	done := f.finish(t)
	if !done.ReadOnly || done.Regions != 0 {
		t.Errorf("finished: %+v", done)
	}
	unwritable(t, m.Path)
	f.confirm(done)
	f.close(t)
	if m = f.open(t); !m.ReadOnly || string(readAt(t, m.Path, 0, 5)) != "fixed" {
		t.Errorf("reopened: %+v", m)
	}
	f.v.ReadOnly = false
	if _, err := f.Open(t.Context(), f.v, f.d); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("opening writable over a read-only mapping: %v", err)
	}
}

// replayed is a finished volume that hydrates, and whose metadata a host changes.
type replayed struct {
	*fixture
	size int64  // the metadata lies behind it
	used []byte // the metadata once the volume was used
}

// through acts on what lies on dm-clone. Under the volume's own key an older
// sector is what is written again: the same ciphertext and tag.
func (r *replayed) through(t *testing.T, act func(path string)) {
	t.Helper()
	run(t, r.d.Key.Expose(), "cryptsetup", "open", "--key-file=-", r.v.Device, r.v.Name)
	act(dm.Path(r.v.Name))
	run(t, nil, "cryptsetup", "close", r.v.Name)
}

// metadata puts other metadata in the place of what is there.
func (r *replayed) metadata(t *testing.T, b []byte) {
	t.Helper()
	r.through(t, func(path string) { writeAt(t, path, r.size, b) })
}

// fails opens the volume and expects ErrState with the words, and no layers. The
// device may have been written to: a journal was replayed.
func (r *replayed) fails(t *testing.T, what, words string) {
	t.Helper()
	if _, err := r.Open(t.Context(), r.v, r.d); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), words) {
		t.Errorf("%s: %v", what, err)
	}
	if left := r.layers(t); left != "" {
		t.Errorf("%s: the refused open left %s", what, left)
	}
}

// What a host can do by bringing back an older state of the metadata.
func TestKernelCloneRollback(t *testing.T) {
	r := &replayed{fixture: newCloned(t, 40*mib)}
	kernel.Need(t, "exec:cryptsetup", "exec:dmsetup")
	r.size = r.made(t, "used").Size
	r.close(t)
	r.through(t, func(path string) { r.used = readAt(t, path, r.size, 2*mib) })
	if bytes.Equal(r.used[:4096], make([]byte, 4096)) {
		t.Fatal("the metadata is not behind the volume")
	}
	t.Run("zeros", r.withZeros)
	t.Run("made anew", r.madeAnew)
	t.Run("not the volume's", r.notItsOwn)
	t.Run("finished", r.finished)
}

func (r *replayed) withZeros(t *testing.T) {
	r.metadata(t, make([]byte, 4096))
	whole := contents(t, r.v.Device, 0)
	r.refused(t, errdefs.ErrState, "says that nothing was ever written")
	if contents(t, r.v.Device, 0) != whole {
		t.Error("dm-clone was given metadata that is zeros")
	}
}

// madeAnew: metadata as dm-clone makes it over zeros, which is not zeros any more.
func (r *replayed) madeAnew(t *testing.T) {
	r.through(t, func(path string) {
		writeAt(t, path, r.size, make([]byte, 2*mib))
		sectors := strconv.FormatInt(r.size/512, 10)
		run(t, nil, "dmsetup", "create", "test-meta", "--table", "0 4096 linear "+path+" "+sectors)
		run(t, nil, "dmsetup", "create", "test-data", "--table", "0 "+sectors+" linear "+path+" 0")
		run(t, nil, "dmsetup", "create", "test-zero", "--table", "0 "+sectors+" zero")
		run(t, nil, "dmsetup", "create", "test-clone", "--table", "0 "+sectors+" clone /dev/mapper/test-meta /dev/mapper/test-data /dev/mapper/test-zero 8 1 no_hydration")
		run(t, nil, "dmsetup", "remove", "test-clone", "test-zero", "test-data", "test-meta")
		if b := readAt(t, path, r.size, 4096); bytes.Equal(b, make([]byte, 4096)) {
			t.Fatal("dm-clone wrote no metadata")
		}
	})
	r.fails(t, "metadata made anew", "says that nothing was ever written")
}

// notItsOwn: a sector that is none of the volume's, another place's or noise.
func (r *replayed) notItsOwn(t *testing.T) {
	r.metadata(t, r.used)
	before := readAt(t, r.v.Device, 0, size(t, r.v.Device))
	r.metadata(t, noise(4096))
	after := readAt(t, r.v.Device, 0, len(before))
	at := len(after) - 1
	for ; at > 0 && before[at] == after[at]; at-- {
	}
	writeAt(t, r.v.Device, int64(at), []byte{after[at] ^ 4})
	r.refused(t, errdefs.ErrState, "cannot be read")
	r.metadata(t, append(bytes.Clone(r.used[:4096]), make([]byte, mib)...))
	r.fails(t, "the first block with others' rest", "cannot be read")
}

// finished: put right, it goes on, and is finished; then no metadata counts.
func (r *replayed) finished(t *testing.T) {
	r.metadata(t, r.used)
	m := r.open(t)
	if string(readAt(t, m.Path, 0, 4)) != "used" {
		t.Errorf("it holds %q", readAt(t, m.Path, 0, 4))
	}
	writeAt(t, m.Path, 8*mib, []byte("later"))
	r.hydrate(t)
	r.confirm(r.finish(t))
	r.close(t)
	for _, metadata := range [][]byte{r.used, make([]byte, 2*mib)} {
		r.metadata(t, metadata)
		m = r.open(t)
		if string(readAt(t, m.Path, 0, 4)) != "used" || string(readAt(t, m.Path, 8*mib, 5)) != "later" || m.Regions != 0 {
			t.Errorf("a finished volume obeys metadata: %+v", m)
		}
		r.close(t)
	}
}

// A header of before is refused by the sequence, so that dm-clone cannot come
// back once it is done.
func TestKernelCloneHeaderRollback(t *testing.T) {
	f := newCloned(t, 64*mib)
	f.made(t, "x")
	old := readAt(t, f.v.Device, 0, 16*mib)
	f.hydrate(t)
	f.confirm(f.finish(t))
	f.close(t)
	writeAt(t, f.v.Device, 0, old)
	f.refused(t, errdefs.ErrState, "rolled back")
}

// The smallest volumes that are taken work; smaller ones are refused before
// anything is written.
func TestKernelCloneSmallest(t *testing.T) {
	small := newCloned(t, 22*mib)
	small.refused(t, errdefs.ErrInvalid, "needs at least")
	for _, size := range []int64{22*mib + 4096, 24*mib + 512} {
		f := newCloned(t, size)
		m := f.open(t)
		zeros(t, m.Path)
		f.made(t, "small")
		f.close(t)
		m = f.open(t)
		f.hydrate(t)
		f.confirm(f.finish(t))
		f.close(t)
		if m = f.open(t); string(readAt(t, m.Path, 0, 5)) != "small" {
			t.Errorf("%d bytes: %+v", size, m)
		}
		t.Logf("a device of %d bytes gives a volume of %d", size, m.Size)
		f.close(t)
	}
}

// dm-clone's metadata has room for every region, and for all of them again while
// they are written anew.
func TestKernelCloneArea(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-clone", "dm-zero", "exec:dmsetup")
	kernel.NoLeaks(t)
	for _, length := range []int64{4 * mib, mib << 10, 256 << 30, 256<<30 + 4096, 1 << 40, 1<<40 + 4096, 16 << 40} {
		region, reserved := cryptmapper.CloneArea(length)
		meta := kernel.Loop(t, reserved)
		sectors := strconv.FormatInt((length-reserved)/512, 10)
		run(t, nil, "dmsetup", "create", "test-zero", "--table", "0 "+sectors+" zero")
		run(t, nil, "dmsetup", "create", "test-clone", "--table", fmt.Sprintf("0 %s clone %s /dev/mapper/test-zero /dev/mapper/test-zero %d 1 no_hydration", sectors, meta, region/512))
		var used, total int64
		status := strings.Fields(run(t, nil, "dmsetup", "status", "test-clone"))
		if _, err := fmt.Sscanf(status[4], "%d/%d", &used, &total); err != nil {
			t.Fatalf("%q: %v", status, err)
		}
		t.Logf("%d MiB in regions of %d: %d of %d blocks", length/mib, region, used, total)
		if 2*used > total {
			t.Errorf("%d bytes: %d of %d blocks of metadata are used", length, used, total)
		}
		run(t, nil, "dmsetup", "remove", "test-clone", "test-zero")
	}
}

// A header backup restores the header as it was: of a volume that hydrates, of
// one that is done, of one that has grown and hydrates again.
func TestKernelCloneRestoreHeader(t *testing.T) {
	f := newCloned(t, 32*mib)
	f.Mapper = keeping(t, 0)
	restored := func(name string, m cryptmapper.Mapping) {
		t.Helper()
		if m.Header.Backup == "" {
			t.Fatalf("there is no header backup: %+v", m)
		}
		f.confirm(m)
		f.close(t)
		writeAt(t, f.v.Device, 0, disasters[name]())
		f.refused(t, errdefs.ErrState, "will not be formatted")
		if h, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{BlockVolume: true}); err != nil || !restored || h.UUID != m.Header.UUID || h.Sequence != m.Header.Sequence {
			t.Fatalf("%s: Restore = %+v, %v, %v", name, h, restored, err)
		}
		again := f.open(t)
		if again.Size != m.Size || again.Regions != m.Regions || string(readAt(t, again.Path, 0, 4)) != "kept" {
			t.Errorf("%s: restored: %+v, was %+v", name, again, m)
		}
		readAt(t, again.Path, 0, int(again.Size))
	}
	restored("noise", f.made(t, "kept"))
	f.hydrate(t)
	restored("zeros", f.finish(t))
	kernel.Grow(t, f.v.Device, 40*mib)
	m := f.resize(t)
	writeAt(t, m.Path, m.Size-4, []byte("kept"))
	restored("noise", m)
	if got := string(readAt(t, m.Path, m.Size-4, 4)); got != "kept" {
		t.Errorf("the new space holds %q", got)
	}
	f.hydrate(t)
	restored("zeros", f.finish(t))
}

// fill writes b all over the volume, past the page cache and without a flush:
// so dm-clone counts every region as hydrated and has not committed that.
func fill(t *testing.T, m cryptmapper.Mapping, b byte) {
	t.Helper()
	memory, err := unix.Mmap(-1, 0, mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(memory) }()
	for i := range memory {
		memory[i] = b
	}
	file, err := os.OpenFile(m.Path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for at := int64(0); at < m.Size; at += mib {
		if _, err := file.WriteAt(memory[:min(mib, m.Size-at)], at); err != nil {
			t.Fatal(err)
		}
	}
}

// Killed, and the power gone, right after the table has changed: what was
// written past dm-clone must not come back as what was there before. dm-clone
// commits once a second by itself, hence several tries.
func TestKernelCloneFinishCommits(t *testing.T) {
	const tableChanged = 3 // the step of Finish
	for range 3 {
		f := newCloned(t, 26*mib)
		m := f.made(t, "x")
		fill(t, m, 'a')
		if _, err := newMapper(t, tableChanged).Finish(t.Context(), f.v, f.d); err == nil {
			t.Fatal("Finish was not killed")
		}
		if table := run(t, nil, "dmsetup", "table", f.v.Name); strings.Contains(table, f.number(t, cryptmapper.CloneName(f.v.Name))) {
			t.Fatalf("killed before the table changed: %s", table)
		}
		writeAt(t, m.Path, 3*mib, []byte("past dm-clone"))
		image := *f
		image.v = cryptmapper.Volume{Name: cryptmapper.Prefix + "t" + dek.NewUUID(), Device: smaller(t, f.v.Device, 26*mib)}
		after := image.open(t)
		if got := string(readAt(t, after.Path, 3*mib, 15)) + string(readAt(t, after.Path, m.Size-1, 1)); got != "past dm-cloneaaa" {
			t.Errorf("after the crash it holds %q", got)
		}
		image.close(t)
		f.close(t)
	}
}

// Whoever lists mappings while one is finished sees it all the time.
func TestKernelCloneListed(t *testing.T) {
	for range 3 {
		f := newCloned(t, 26*mib)
		m := f.made(t, "x")
		fill(t, m, 'a')
		stop, done := make(chan struct{}), make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					done <- n
					return
				default:
				}
				list, err := f.List()
				if err != nil || len(list) != 1 || list[0].Size != m.Size || list[0].Backing != m.Backing {
					t.Errorf("List = %+v, %v", list, err)
				}
				n++
			}
		}()
		f.finish(t)
		close(stop)
		t.Logf("listed %d times", <-done)
		f.close(t)
	}
}

// number is the device number of a mapping.
func (f *fixture) number(t *testing.T, name string) string {
	t.Helper()
	info, err := dm.Status(name)
	if err != nil {
		t.Fatal(err)
	}
	return info.Number.String()
}

// The size of a volume does not count: 300 GiB are ready as quickly, with larger
// regions, which a small write covers in part and of which the last is cut.
func TestKernelCloneLarge(t *testing.T) {
	f := newCloned(t, 300<<30)
	began := time.Now()
	m := f.open(t)
	t.Logf("%d GiB are ready after %v", m.Size>>30, time.Since(began))
	if regions := uint64((m.Size + 16383) / 16384); m.Regions != regions || m.Hydrated > regions/100 {
		t.Errorf("%+v", m)
	}
	places := []int64{0, 1<<30 + 8192, 270 << 30, m.Size - 3*mib - 4096, m.Size - 8192}
	for _, at := range places {
		readAt(t, m.Path, max(0, at-mib), mib)
		writeAt(t, m.Path, at+100, []byte("small"))
	}
	m, err := f.MarkMade(t.Context(), f.v, f.d)
	if err != nil {
		t.Fatal(err)
	}
	f.confirm(m)
	f.close(t)
	m = f.open(t)
	for _, at := range places {
		want := make([]byte, 8192)
		copy(want[100:], "small")
		if got := readAt(t, m.Path, at, 8192); !bytes.Equal(got, want) {
			t.Errorf("at %d: %q", at, bytes.Trim(got, "\x00"))
		}
	}
}

// Killed at any step of its life, a volume of this layout converges: the data is
// there, and nothing is left behind.
func TestKernelCloneKilledAtSteps(t *testing.T) {
	step, stride := sample(t, 7)
	for ; ; step += stride {
		f := newCloned(t, 26*mib)
		killed := false
		dying := func(what string, act func(m *cryptmapper.Mapper) error) {
			t.Helper()
			err := act(newMapper(t, step))
			if err == nil {
				return
			}
			if !strings.Contains(err.Error(), "killed") && !strings.Contains(err.Error(), "died") {
				t.Fatalf("step %d of %s: %v", step, what, err)
			}
			killed = true
		}
		open := func(m *cryptmapper.Mapper) error { _, err := m.Open(t.Context(), f.v, f.d); return err }
		dying("Open", open)
		zeros(t, f.open(t).Path)
		dying("MarkMade", func(m *cryptmapper.Mapper) error { _, err := m.MarkMade(t.Context(), f.v, f.d); return err })
		f.made(t, "survives")
		f.close(t)
		dying("Open of a made volume", open)
		m := f.open(t)
		f.hydrate(t)
		dying("Finish", func(m *cryptmapper.Mapper) error { _, err := m.Finish(t.Context(), f.v, f.d); return err })
		// The pod goes on, and then the power fails.
		writeAt(t, m.Path, mib, []byte("written after"))
		image := *f
		image.v = cryptmapper.Volume{Name: cryptmapper.Prefix + "t" + dek.NewUUID(), Device: smaller(t, f.v.Device, 26*mib)}
		holds := func(f *fixture) {
			t.Helper()
			m := f.open(t)
			if got := string(readAt(t, m.Path, 0, 8)) + string(readAt(t, m.Path, mib, 13)); got != "surviveswritten after" {
				t.Fatalf("step %d: it holds %q", step, got)
			}
		}
		holds(&image)
		image.finish(t)
		image.close(t)
		holds(f)
		f.finish(t)
		f.close(t)
		holds(f)
		dying("Close", func(m *cryptmapper.Mapper) error { return m.Close(t.Context(), f.v.Name) })
		f.close(t)
		if left := f.layers(t); left != "" {
			t.Fatalf("step %d left %s", step, left)
		}
		if !killed {
			t.Logf("up to step %d", step-stride)
			return
		}
	}
}

// Killed while a node without dm-clone wipes it, a new volume goes on on either
// kind of node.
func TestKernelCloneWithoutKilledAtSteps(t *testing.T) {
	step, stride := sample(t, 6)
	for ; ; step += stride {
		for _, next := range []*cryptmapper.Mapper{newMapper(t, 0), without(t, 0)} {
			f := newCloned(t, 26*mib)
			_, err := without(t, step).Open(t.Context(), f.v, f.d)
			if err == nil {
				t.Logf("up to step %d", step-stride)
				return
			}
			f.Mapper = next
			zeros(t, f.open(t).Path)
			m := f.made(t, "survives")
			f.close(t)
			if again := f.open(t); again.Header != m.Header || string(readAt(t, m.Path, 0, 8)) != "survives" {
				t.Fatalf("step %d: %+v", step, again)
			}
			f.close(t)
		}
	}
}

// The volumes that are re-keyed are ones that Constellation made: it wipes them,
// and there is no area in them.
func TestKernelCloneRekey(t *testing.T) {
	f := newCloned(t, 40*mib)
	before := contents(t, f.v.Device, 0)
	_, err := f.Rekey(t.Context(), f.v, f.d, dek.ID(dek.NewUUID()), f.d.Key)
	if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), `layout "clone"`) {
		t.Errorf("Rekey = %v", err)
	}
	if contents(t, f.v.Device, 0) != before {
		t.Error("the device was written to")
	}
}
