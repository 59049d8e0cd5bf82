package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// guestEnv names, in the environment of the guest's first process, the
	// directory that has the job.
	guestEnv = "VM_GUEST"
	// minderEnv says, in the environment of the first process of the guest's
	// process ID namespace, that it is that.
	minderEnv = "VM_MINDER"
	// jobFile is the file in the scratch directory that has the job.
	jobFile = "job.json"
	// rootTag is the 9p tag of the host's root.
	rootTag = "root"
	// scratchPrefix begins the names of the directories that hold what a guest needs.
	scratchPrefix = "cryptcsi-vm-"
)

// job is what the host tells the guest.
type job struct {
	Args    []string
	Env     []string
	Dir     string
	Keep    []string // what to keep visible where the guest has an empty directory
	RW      []string // directories shared writable
	Files   []string // single files shared writable; they exist
	made    []string // those of Files that did not exist before
	Modules string   // the directory of this kernel's modules
	Load    []string // modules to load at the start

	Links [][2]string // symbolic links to make: target, path

	Share                  string // file system type of the host's files: hostfs or 9p
	Stdout, Stderr, Status string // the character devices for the three streams
}

// result is what the guest tells the host, as JSON on the status line, once.
type result struct {
	Code  int
	Error string // why the command could not be run; Code says nothing then
}

// emptyDirs are the directories that are empty in a guest.
func emptyDirs() []string { return []string{"/dev/shm", "/run", "/tmp"} }

// stopped is the cause of a stop from outside.
type stopped struct {
	code int
	why  string
}

func (s *stopped) Error() string { return s.why }

// runGuest boots a guest, runs the command in it and returns the exit code.
// The error, if any, is for the person: why the code is not the command's.
func runGuest(ctx context.Context, o *options, stdout, stderr io.Writer) (int, error) {
	scratch, cleanup, err := makeScratch(o)
	if err != nil {
		return exitBroken, err
	}
	defer cleanup()
	j, err := makeJob(o)
	defer j.removeEmptyOutputs()
	if err != nil {
		return exitBroken, err
	}
	prepare := umlCommand
	if o.mode == "qemu" {
		prepare = qemuCommand
	} else {
		defer onOneCPU()()
	}
	cmd, err := prepare(o, j, scratch)
	if err != nil {
		return exitBroken, err
	}
	return supervise(ctx, cmd, o.killOn, stdout, stderr)
}

func (j *job) encode() ([]byte, error) { return json.Marshal(j) }

// sharedDirs are the host's directories that the guest mounts writable, sorted,
// so that a directory comes before those in it.
func (j *job) sharedDirs() []string {
	dirs := slices.Clone(j.RW)
	for _, name := range j.Files {
		dirs = append(dirs, filepath.Dir(name))
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// makeJob collects what both kinds of guest are told, and makes sure that the
// files that the command is to write exist. With an error it returns what it has got.
func makeJob(o *options) (*job, error) {
	j := &job{Args: slices.Clone(o.args), Env: guestEnviron(os.Environ())}
	dir, err := os.Getwd()
	if err != nil {
		return j, err
	}
	j.Dir = dir
	if j.Args[0], err = filepath.Abs(j.Args[0]); err != nil {
		return j, err
	}
	// The whole module, wherever it was checked out; the whole directory, for
	// what lies beside the command, of a common one only the file.
	j.Keep = []string{moduleRoot(dir), filepath.Dir(j.Args[0])}
	if slices.Contains(emptyDirs(), j.Keep[1]) {
		j.Keep[1] = j.Args[0]
	}
	j.RW = append(j.RW, o.rw...)
	for _, d := range append(o.outputs.dirs, os.Getenv("GOCOVERDIR")) {
		if d == "" {
			continue
		}
		if d, err = filepath.Abs(d); err != nil {
			return j, err
		}
		j.RW = append(j.RW, d)
	}
	for _, d := range j.RW {
		if info, err := os.Stat(d); err != nil {
			return j, fmt.Errorf("share a directory: %w", err)
		} else if !info.IsDir() {
			return j, fmt.Errorf("share a directory: %s is a file", d)
		}
	}
	return j, j.addFiles(o.outputs.files)
}

// moduleRoot is the directory of the Go module that dir is in, else dir.
func moduleRoot(dir string) string {
	for root := dir; root != "/"; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			return root
		}
	}
	return dir
}

// addFiles shares the files that the command is to write. A single file can
// only be shared if it exists.
func (j *job) addFiles(names []string) error {
	for _, name := range names {
		name, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
		switch {
		case err == nil:
			_ = f.Close()
			j.made = append(j.made, name)
		case !errors.Is(err, os.ErrExist):
			return fmt.Errorf("an output of the test binary: %w", err)
		}
		j.Files = append(j.Files, name)
	}
	return nil
}

// removeEmptyOutputs takes away the files that were made for the command and
// that it has not written: an empty profile is no profile.
func (j *job) removeEmptyOutputs() {
	for _, name := range j.made {
		if info, err := os.Stat(name); err == nil && info.Size() == 0 {
			_ = os.Remove(name)
		}
	}
}

// guestEnviron picks the variables that the guest sees from those of the host.
func guestEnviron(environ []string) []string {
	var named []string
	for _, kv := range environ {
		if list, ok := strings.CutPrefix(kv, "VM_ENV="); ok {
			named = strings.Split(list, ",")
		}
	}
	named = append(named, "HOME", "LANG", "TERM", "TZ", "USER")
	path := "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	var env []string
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		if name == "PATH" {
			path = "PATH=" + value + ":/usr/sbin:/sbin" // mkfs and its like live there
			continue
		}
		pass := name != guestEnv && (strings.HasPrefix(name, "GO") || strings.HasPrefix(name, "TEST_") ||
			strings.HasPrefix(name, "VM_") || strings.HasPrefix(name, "REQUIRE_"))
		for _, n := range named {
			pass = pass || n == name
		}
		if pass {
			env = append(env, kv)
		}
	}
	return append(env, path, "DM_DISABLE_UDEV=1", "REQUIRE_ALL=1")
}

// mind runs a guest as the first process of its namespace, of which the guest
// itself must be another: a kernel that panics aborts, and no signal of its own
// ends a first process. It returns the guest's exit code.
func mind(command []string) int {
	pid, err := syscall.ForkExec(command[0], command, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2, 3, 4, 5}})
	if err != nil {
		fmt.Fprintf(os.Stderr, "exec %s: %v\n", command[0], err)
		return exitBroken
	}
	for fd := 3; fd <= 5; fd++ {
		_ = unix.Close(fd)
	}
	code, err := reapUntil(pid)
	if err != nil {
		return exitBroken
	}
	return code
}

// supervise starts the guest, passes its streams on until it ends, and says
// how it ended. The guest lives in a process ID namespace whose first process
// (see mind) dies with this thread: whatever happens here, all of it goes. Its
// file descriptors 3, 4 and 5 are the command's output, its errors and the
// status; what it writes to 1 and 2 is the console.
func supervise(ctx context.Context, cmd *exec.Cmd, killOn string, stdout, stderr io.Writer) (int, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Pdeathsig: unix.SIGKILL, Setpgid: true}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Geteuid(), HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getegid(), HostID: os.Getegid(), Size: 1}}
	}
	cmd.Args = append([]string{"vm"}, append([]string{cmd.Path}, cmd.Args[1:]...)...)
	cmd.Path = "/proc/self/exe"
	cmd.Env = append(cmd.Env, minderEnv+"=1")
	kill := func() { _ = cmd.Process.Kill() }
	console := &tail{max: 16 << 10}
	var result bytes.Buffer
	watch := &watcher{w: stdout, want: []byte(killOn), found: kill}
	// With the status everything has arrived that will: no need to wait for a
	// shutdown, which a hanging device could hold up.
	status := &watcher{w: &result, want: []byte("\n"), found: kill}
	var readers sync.WaitGroup
	var writers []*os.File
	for _, w := range []io.Writer{console, watch, stderr, status} {
		pr, pw, err := os.Pipe()
		if err != nil {
			return exitBroken, err
		}
		writers = append(writers, pw)
		readers.Go(func() {
			_, _ = io.Copy(w, pr) // a host that does not take the output does not stop the guest
			_, _ = io.Copy(io.Discard, pr)
			_ = pr.Close()
		})
	}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = writers[0], writers[0], writers[1:]
	err := cmd.Start()
	for _, w := range writers {
		_ = w.Close()
	}
	if err != nil {
		readers.Wait()
		return exitBroken, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	release := context.AfterFunc(ctx, kill)
	died := cmd.Wait()
	release()
	readers.Wait()
	return verdict(ctx, watch.hit, result.Bytes(), died, console)
}

// verdict turns the end of a guest into an exit code and, where that is not
// the command's own, a reason.
func verdict(ctx context.Context, hit bool, status []byte, died error, console *tail) (int, error) {
	if hit {
		return exitKilled, nil
	}
	var r result
	if json.Unmarshal(status, &r) == nil {
		if r.Error == "" {
			return r.Code, nil
		}
		return exitBroken, fmt.Errorf("the guest could not run the command: %s\n%s", r.Error, console.words())
	}
	if s, ok := errors.AsType[*stopped](context.Cause(ctx)); ok {
		return s.code, fmt.Errorf("%w\n%s", s, console.words())
	}
	how := "went away"
	if died != nil {
		how = died.Error()
	}
	return exitBroken, fmt.Errorf("the guest ended before the command did (%s)\n%s", how, console.words())
}

// watcher passes a stream on and calls found once, when it has seen want in
// it; what comes after that is swallowed.
type watcher struct {
	w     io.Writer
	want  []byte // empty: nothing is wanted
	found func()
	hit   bool
	last  []byte // the end of what was passed on, shorter than want
}

func (w *watcher) Write(p []byte) (int, error) {
	if w.hit {
		return len(p), nil
	}
	if len(w.want) == 0 {
		return w.w.Write(p)
	}
	seen := append(w.last, p...)
	if i := bytes.Index(seen, w.want); i >= 0 {
		w.found()
		w.hit = true
		n := i + len(w.want) - len(w.last)
		_, err := w.w.Write(p[:n])
		return len(p), err
	}
	keep := min(len(seen), len(w.want)-1)
	w.last = append([]byte(nil), seen[len(seen)-keep:]...)
	return w.w.Write(p)
}

// tail keeps the last max bytes of a stream.
type tail struct {
	max  int
	data []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.data = append(t.data, p...)
	if extra := len(t.data) - t.max; extra > 0 {
		t.data = append(t.data[:0], t.data[extra:]...)
	}
	return len(p), nil
}

// words are the last lines of a console, for a person.
func (t *tail) words() string {
	lines := strings.Split(strings.TrimSpace(strings.ReplaceAll(string(t.data), "\r", "")), "\n")
	lines = lines[max(0, len(lines)-60):]
	return "--- the guest's console ended with ---\n" + strings.Join(lines, "\n") + "\n---"
}
