package envelope_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gocloud.dev/blob/fileblob"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

func openStore(t testing.TB, uri string) envelope.Store {
	t.Helper()
	s, err := envelope.LocalStores().Open(t.Context(), uri)
	if err != nil {
		t.Fatalf("OpenStore(%q): %v", uri, err)
	}
	return s
}

func TestMemStore(t *testing.T) {
	envelopetest.RunStore(t, func(t *testing.T) (a, b envelope.Store) {
		s := openStore(t, "mem://")
		return s, s
	})
}

func TestFileStore(t *testing.T) {
	envelopetest.RunStore(t, func(t *testing.T) (a, b envelope.Store) {
		uri := "file://" + t.TempDir()
		return openStore(t, uri), openStore(t, uri)
	})
}

// TestFaultStore: without faults the wrapper is a store like any other.
func TestFaultStore(t *testing.T) {
	envelopetest.RunStore(t, func(t *testing.T) (a, b envelope.Store) {
		s := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault { return envelopetest.None })
		return s, s
	})
}

func TestFaults(t *testing.T) {
	var fault envelopetest.Fault
	s := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault { return fault })
	ctx := t.Context()
	read := func() (string, error) {
		data, _, err := s.Read(ctx, "a")
		return string(data), err
	}
	fault = envelopetest.Fail
	if err := s.Create(ctx, "a", []byte("1")); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("Fail: %v", err)
	}
	fault = envelopetest.None
	if _, err := read(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("Fail did it: %v", err)
	}
	fault = envelopetest.Lose
	if err := s.Create(ctx, "a", []byte("1")); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("Lose: %v", err)
	}
	fault = envelopetest.Stale
	if _, err := read(); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("Stale before the first change: %v", err)
	}
	fault = envelopetest.None
	data, v, err := s.Read(ctx, "a")
	if string(data) != "1" || err != nil {
		t.Errorf("Lose did not do it: %q, %v", data, err)
	}
	if err := s.Replace(ctx, "a", []byte("2"), v); err != nil {
		t.Fatal(err)
	}
	fault = envelopetest.Stale
	if data, err := read(); data != "1" || err != nil {
		t.Errorf("Stale: %q, %v", data, err)
	}
}

func TestFaultDelay(t *testing.T) {
	s := envelopetest.NewFaultStore(openStore(t, "mem://"), func(int, string) envelopetest.Fault { return envelopetest.Delay })
	start := time.Now()
	if err := s.Create(t.Context(), "a", []byte("1")); err != nil || time.Since(start) < envelopetest.FaultDelay {
		t.Errorf("Create: %v after %v", err, time.Since(start))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Create(ctx, "b", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Create after its context: %v", err)
	}
	if data, _, err := s.Read(t.Context(), "a"); string(data) != "1" || err != nil {
		t.Errorf("Read = %q, %v", data, err)
	}
	if until, err := s.EraseHistory(t.Context(), "a"); !until.IsZero() || err != nil || s.Calls() != 4 {
		t.Errorf("EraseHistory = %v, %v after %d calls", until, err, s.Calls())
	}
}

// childURI tells a copy of this test binary to be one of the racing processes.
const childURI = "ENVELOPE_TEST_STORE"

// TestFileStoreAcrossProcesses: processes create and count in one directory.
func TestFileStoreAcrossProcesses(t *testing.T) {
	const processes, names, counts = 8, 20, 10
	if uri := os.Getenv(childURI); uri != "" {
		raceAsChild(t, openStore(t, uri), names, counts)
		return
	}
	dir := t.TempDir()
	uri := "file://" + dir
	store := openStore(t, uri)
	if err := store.Create(t.Context(), "count", nil); err != nil {
		t.Fatal(err)
	}
	var children []*exec.Cmd
	for n := range processes {
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestFileStoreAcrossProcesses$", "-test.v")
		child.Env = append(os.Environ(), childURI+"="+uri)
		out, err := os.Create(filepath.Join(t.TempDir(), fmt.Sprint(n)))
		if err != nil {
			t.Fatal(err)
		}
		child.Stdout, child.Stderr = out, out
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, child)
	}
	wins := 0
	for _, child := range children {
		err := child.Wait()
		out, readErr := os.ReadFile(child.Stdout.(*os.File).Name())
		if err != nil || readErr != nil {
			t.Errorf("child: %v, %v\n%s", err, readErr, out)
		}
		wins += strings.Count(string(out), "WON")
	}
	if wins != names {
		t.Errorf("%d creations were won, want %d", wins, names)
	}
	if data, _, err := store.Read(t.Context(), "count"); len(data) != processes*counts || err != nil {
		t.Errorf("counted to %d (%v), want %d", len(data), err, processes*counts)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".new-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files left: %q, %v", left, err)
	}
}

func raceAsChild(t *testing.T, s envelope.Store, names, counts int) {
	mine := []byte(fmt.Sprint(os.Getpid()))
	for n := range names {
		err := s.Create(t.Context(), fmt.Sprintf("race-%d", n), mine)
		if err == nil {
			fmt.Println("WON")
		} else if !errors.Is(err, errdefs.ErrExists) {
			t.Errorf("Create: %v", err)
		}
	}
	for range counts {
		for {
			data, v, err := s.Read(t.Context(), "count")
			if err == nil {
				err = s.Replace(t.Context(), "count", append(data, 'x'), v)
			}
			if err == nil {
				break
			}
			if !errors.Is(err, errdefs.ErrConflict) {
				t.Fatalf("counting: %v", err)
			}
		}
	}
}

// TestFileblobReadsIt: the layout is that of gocloud.dev's own file store.
func TestFileblobReadsIt(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, "file://"+dir)
	name := envelope.ObjectName("driver/volume")
	if err := s.Create(t.Context(), name, []byte("data")); err != nil {
		t.Fatal(err)
	}
	bucket, err := fileblob.OpenBucket(dir, &fileblob.Options{Metadata: fileblob.MetadataDontWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer bucket.Close()
	if got, err := bucket.ReadAll(t.Context(), name); string(got) != "data" || err != nil {
		t.Errorf("fileblob reads %q, %v", got, err)
	}
	if err := bucket.WriteAll(t.Context(), name, []byte("changed"), nil); err != nil {
		t.Fatal(err)
	}
	if got, _, err := s.Read(t.Context(), name); string(got) != "changed" || err != nil {
		t.Errorf("we read %q, %v", got, err)
	}
}

func TestObjectName(t *testing.T) {
	// printf %s ebs.csi.aws.com/vol-1 | sha256sum
	const want = "dek-86ad27703f7c40afafe00beff24d8737be048e1e85ae68fb494cd12ef073e113"
	if got := envelope.ObjectName("ebs.csi.aws.com/vol-1"); got != want {
		t.Errorf("ObjectName = %s, want %s", got, want)
	}
}

// TestFileStoreLeavings: what a crash leaves is no object, and goes when it is
// old enough to belong to nobody.
func TestFileStoreLeavings(t *testing.T) {
	dir := t.TempDir()
	old, fresh := filepath.Join(dir, ".new-OLD"), filepath.Join(dir, ".new-FRESH")
	for _, path := range []string{old, fresh} {
		if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	past := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(old, past, past); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, "file://"+dir)
	if names, _, err := s.List(t.Context(), "", 10); len(names) != 0 || err != nil {
		t.Errorf("List = %q, %v", names, err)
	}
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old one is still there: %v", err)
	}
	if _, err := os.Stat(fresh); err != nil {
		t.Errorf("the fresh one, perhaps another process's, is gone: %v", err)
	}
}

func TestFileStoreHostileObjects(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, "file://"+dir)
	outside := filepath.Join(t.TempDir(), "outside")
	for _, err := range []error{
		os.WriteFile(outside, []byte("secret"), 0o600),
		os.Symlink(outside, filepath.Join(dir, "link")),
		os.Mkdir(filepath.Join(dir, "dir"), 0o700),
		os.WriteFile(filepath.Join(dir, "big"), make([]byte, envelope.MaxObject+1), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"link", "dir"} {
		if data, _, err := s.Read(t.Context(), name); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("Read of a %s: %q, %v, want ErrUnavailable", name, data, err)
		}
	}
	if _, _, err := s.Read(t.Context(), "big"); !errors.Is(err, errdefs.ErrCorrupt) {
		t.Errorf("Read of a huge object: %v, want ErrCorrupt", err)
	}
}

// TestFileStoreGone: a directory that vanished is no place to create in, and
// a new one in its place is not taken for it.
func TestFileStoreGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := openStore(t, "file://"+dir+"?create_dir=true")
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Create(t.Context(), "a", nil); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("Create: %v, want ErrUnavailable", err)
	}
}

// TestFileStoreLockHonoursContext: a lock that another holder keeps delays a
// change no longer than its context.
func TestFileStoreLockHonoursContext(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, "file://"+dir)
	if err := s.Create(t.Context(), "a", []byte("1")); err != nil {
		t.Fatal(err)
	}
	_, v, err := s.Read(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.CommandContext(t.Context(), "flock", filepath.Join(dir, ".lock"), "sh", "-c", "echo held; cat")
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.Replace(ctx, "a", []byte("2"), v); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Replace under somebody's lock: %v, want context.DeadlineExceeded", err)
	}
	stdin.Close()
	if err := holder.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := s.Replace(t.Context(), "a", []byte("3"), v); err != nil {
		t.Errorf("Replace after it: %v", err)
	}
}

func TestOpenStoreRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const s = "S3CR3T"
	for _, tt := range []struct{ uri, want string }{
		{"", "is empty"},
		{s, "no scheme"},
		{"file://%zz" + s, "does not parse"},
		{"s3://bucket?key=" + s, `"s3" is not known`},
		{"file:///tmp?key=" + s, `"key" is not known; this scheme takes create_dir`},
		{"file:///tmp?create_dir=yes", "true or false"},
		{"file://relative/dir", "absolute path"},
		{"file:relative", "absolute path"},
		{"file://", "absolute path"},
		{"file://user:" + s + "@/tmp", "holds credentials"},
		{"file:///nowhere/at/all", "no directory /nowhere/at/all"},
		{"file://" + file, "opening the store's directory"},
		{"file://" + file + "/below?create_dir=true", "making the store's directory"},
		{"mem://host", "takes no host"},
		{"mem:///path", "takes no host"},
		{"mem://?key=" + s, `"key" is not known; this scheme takes none`},
		{"mem://#", "fragment"},
	} {
		_, err := envelope.LocalStores().Open(t.Context(), tt.uri)
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("OpenStore(%q) = %v, want ErrInvalid with %q", tt.uri, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("OpenStore(%q) shows a secret: %v", tt.uri, err)
		}
	}
}

func TestCreateDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s := openStore(t, "file://"+dir+"?create_dir=true")
	if err := s.Create(t.Context(), "x", []byte("1")); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "x"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want mode %o", path, info.Mode(), err, want)
		}
	}
	again := openStore(t, "file://"+dir+"?create_dir=true")
	if data, _, err := again.Read(t.Context(), "x"); !bytes.Equal(data, []byte("1")) || err != nil {
		t.Errorf("reopened: %q, %v", data, err)
	}
}

// FuzzStoreURI: opening never panics, and an error of a URI with a secret
// parameter does not show it. Nothing that exists can be opened or made: the
// paths lie where no directory can be.
func FuzzStoreURI(f *testing.F) {
	for _, uri := range []string{"mem://", "file:///dev/null/x", "file:", "mem:", "s3://b", "file://h/p", "://", "file:///dev/null/x?create_dir=true", "%"} {
		f.Add(uri, "key")
	}
	f.Fuzz(func(t *testing.T, uri, param string) {
		const s = "S3CR3T"
		if strings.Contains(uri, "create_dir") && !strings.Contains(uri, "/dev/null/x") || strings.Contains(uri+param, s) || strings.Contains(uri, "?") {
			return
		}
		_, err := envelope.LocalStores().Open(t.Context(), uri+"?"+param+"="+s)
		if err == nil {
			t.Errorf("%q opened with the parameter %q", uri, param)
		} else if strings.Contains(err.Error(), s) {
			t.Errorf("%q shows a secret: %v", uri, err)
		}
		if s, err := envelope.LocalStores().Open(t.Context(), uri); err == nil && s == nil {
			t.Errorf("%q gave neither store nor error", uri)
		}
	})
}
