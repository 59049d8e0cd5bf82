package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestVM builds the program and runs it the way others do. Guests boot in
// parallel, as they do in a run of several packages.
func TestVM(t *testing.T) {
	if _, err := exec.LookPath("linux.uml"); err != nil {
		if os.Getenv("REQUIRE_ALL") == "1" {
			t.Fatalf("REQUIRE_ALL=1: %v", err)
		}
		t.Skipf("no user-mode Linux: %v (apt-get install user-mode-linux)", err)
	}
	vm := build(t)
	for name, test := range map[string]func(*testing.T, program){
		"exit codes":              testExitCodes,
		"output is byte-exact":    testOutput,
		"a panic fails":           testPanic,
		"a hang fails":            testHang,
		"a missing command":       testNoCommand,
		"the host is not touched": testIsolation,
		"a shared directory":      testShare,
		"a disk survives a kill":  testDisk,
		"two guests at once":      testTwo,
		"environment":             testEnvironment,
		"outputs of a test":       testTestOutputs,
		"go test -exec":           testGoTest,
		"a module in /tmp":        testModule,
		"a signal stops all":      testSignal,
		"a killed program":        testKilled,
		"kernel":                  testGuestKernel,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, vm)
		})
	}
}

// TestVMQEMU is the way with the distribution's kernel, slow and the second
// choice: it runs where VM=qemu is in the environment.
func TestVMQEMU(t *testing.T) {
	if os.Getenv("VM") != "qemu" {
		t.Skip("half a minute a guest: VM=qemu runs it, after apt-get install qemu-system-x86 linux-image-amd64")
	}
	vm := build(t)
	vm.mode = "qemu"
	for name, test := range map[string]func(*testing.T, program){
		"output is byte-exact":   testOutput,
		"a panic fails":          testPanic,
		"a shared directory":     testShare,
		"a disk survives a kill": testDisk,
		"outputs of a test":      testTestOutputs,
	} {
		t.Run(name, func(t *testing.T) { test(t, vm) })
	}
}

// program is the built program and the kind of guest to ask it for.
type program struct{ path, mode string }

func build(t *testing.T) program {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vm")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return program{path, "uml"}
}

// command prepares a run with nothing in the environment that this test was not
// told to have there.
func (p program) command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), p.path, args...)
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "VM") && !strings.HasPrefix(kv, "REQUIRE_") && !strings.HasPrefix(kv, "GOCOVERDIR=") {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(cmd.Env, "VM="+p.mode, "VM_KERNEL_DIR="+os.Getenv("VM_KERNEL_DIR"))
	return cmd
}

// finish runs a command to its end.
func finish(t *testing.T, cmd *exec.Cmd) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// mustRun runs a command that has to succeed, and returns its output.
func mustRun(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	code, stdout, stderr := finish(t, cmd)
	if code != 0 {
		t.Fatalf("%q: exit code %d\n%s%s", cmd.Args, code, stdout, stderr)
	}
	return stdout
}

func testExitCodes(t *testing.T, vm program) {
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "kill -9 $$": 128 + 9} {
		t.Run(script, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := finish(t, vm.command(t, "--", "sh", "-c", script))
			if code != want || stdout != "" || stderr != "" {
				t.Errorf("%q: exit code %d, output %q, errors %q, want %d and silence", script, code, stdout, stderr, want)
			}
		})
	}
}

func testNoCommand(t *testing.T, vm program) {
	if code, _, stderr := finish(t, vm.command(t, "no-such-program")); code != exitNoCommand || !strings.Contains(stderr, "no-such-program") {
		t.Errorf("exit code %d, %q, want %d and the name", code, stderr, exitNoCommand)
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := finish(t, vm.command(t, text)); code != exitBroken || !strings.Contains(stderr, "exec format error") {
		t.Errorf("a text file: exit code %d, %q, want %d and the reason", code, stderr, exitBroken)
	}
}

func testOutput(t *testing.T, vm program) {
	data := make([]byte, 64<<10)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	cmd := vm.command(t, "sh", "-c", `cat data; tac -s "" data >/dev/null; head -c 1000 data >&2`)
	cmd.Dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(cmd.Dir, "data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := finish(t, cmd)
	if code != 0 || stdout != string(data) {
		t.Errorf("exit code %d, %d bytes of output, the same %v, want 0 and the same %d", code, len(stdout), stdout == string(data), len(data))
	}
	if stderr != string(data[:1000]) {
		t.Errorf("%d bytes of errors are not the 1000 that were written", len(stderr))
	}
}

func testPanic(t *testing.T, vm program) {
	code, stdout, stderr := finish(t, vm.command(t, "sh", "-c", "echo before; echo c > /proc/sysrq-trigger; echo after"))
	if code != exitBroken || stdout != "before\n" || !strings.Contains(stderr, "Kernel panic - not syncing: sysrq triggered crash") {
		t.Errorf("exit code %d, output %q, want %d, %q, and the console's end:\n%s", code, stdout, exitBroken, "before\n", stderr)
	}
}

func testHang(t *testing.T, vm program) {
	const limit = 5 * time.Second
	start := time.Now()
	code, _, stderr := finish(t, vm.command(t, "-timeout", limit.String(), "sleep", "1000"))
	if took := time.Since(start); code != exitTimeout || took < limit || took > limit+30*time.Second || !strings.Contains(stderr, "not done after 5s") {
		t.Errorf("exit code %d after %v, want %d after %v\n%s", code, took, exitTimeout, limit, stderr)
	}
}

func testIsolation(t *testing.T, vm program) {
	cmd := vm.command(t, "sh", "-c", `echo changed > here && rm gone && echo made > new && touch /etc/cryptcsi-vm-test && cat here`)
	cmd.Dir = t.TempDir()
	for _, name := range []string{"here", "gone"} {
		if err := os.WriteFile(filepath.Join(cmd.Dir, name), []byte("host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := mustRun(t, cmd); got != "changed\n" {
		t.Errorf("the guest reads %q where it wrote %q", got, "changed\n")
	}
	for _, name := range []string{"here", "gone"} {
		if got, err := os.ReadFile(filepath.Join(cmd.Dir, name)); err != nil || string(got) != "host\n" {
			t.Errorf("%s on the host: %q, %v, want it untouched", name, got, err)
		}
	}
	for _, path := range []string{filepath.Join(cmd.Dir, "new"), "/etc/cryptcsi-vm-test"} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s on the host: %v, want no such file", path, err)
		}
	}
}

func testShare(t *testing.T, vm program) {
	dir := filepath.Join(t.TempDir(), "a b,c") // a name that arguments and options do not like
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "in"), []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	mustRun(t, vm.command(t, "-rw", dir, "--", "sh", "-c", `cd "$1" && cp in out && rm in`, "sh", dir))
	if got, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || string(got) != "host\n" {
		t.Errorf("what the guest wrote: %q, %v, want %q", got, err, "host\n")
	}
	if _, err := os.Stat(filepath.Join(dir, "in")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what the guest removed: %v, want no such file", err)
	}
}

// A write that the guest was told to be on the disk is there when the guest is
// killed before it could do anything else.
func testDisk(t *testing.T, vm program) {
	disk := filepath.Join(t.TempDir(), "disk, 1")
	if err := os.WriteFile(disk, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	const size = 16 << 20
	if err := os.Truncate(disk, size); err != nil {
		t.Fatal(err)
	}
	write := `printf 'acknowledged' | dd of=/dev/ubda bs=4096 seek=100 conv=sync oflag=direct 2>/dev/null && echo DO''NE && sleep 1000`
	code, stdout, stderr := finish(t, vm.command(t, "-disk", disk, "-kill-on", "DONE", "--", "sh", "-c", write))
	if code != exitKilled || stdout != "DONE" {
		t.Fatalf("exit code %d, output %q, want %d, %q\n%s", code, stdout, exitKilled, "DONE", stderr)
	}
	got := mustRun(t, vm.command(t, "-disk", disk, "--", "sh", "-c", "blockdev --getsize64 /dev/ubda; dd if=/dev/ubda bs=4096 skip=100 count=1 2>/dev/null | head -c 12"))
	if want := fmt.Sprintf("%d\nacknowledged", size); got != want {
		t.Errorf("after the kill the disk holds %q, want %q", got, want)
	}
}

// Each of two guests waits for what the other one does.
func testTwo(t *testing.T, vm program) {
	dir := t.TempDir()
	const script = `cd "$1" && touch "$2" && until [ -e "$3" ]; do sleep 0.1; done; echo "$2"`
	first := vm.command(t, "-timeout", "2m", "-rw", dir, "--", "sh", "-c", script, "sh", dir, "a", "b")
	second := vm.command(t, "-timeout", "2m", "-rw", dir, "--", "sh", "-c", script, "sh", dir, "b", "a")
	var out bytes.Buffer
	first.Stdout, first.Stderr = &out, os.Stderr
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	got := mustRun(t, second)
	if err := first.Wait(); err != nil || out.String() != "a\n" || got != "b\n" {
		t.Errorf("the guests said %q (%v) and %q, want a and b", out.String(), err, got)
	}
}

func testEnvironment(t *testing.T, vm program) {
	cmd := vm.command(t, "env")
	cmd.Dir = t.TempDir()
	cmd.Env = append(cmd.Env, "TEST_WORD=two words", "REQUIRE_X=1", "NAMED=yes", "VM_ENV=NAMED", "SECRET=no")
	env := strings.Split(mustRun(t, cmd), "\n")
	for _, want := range []string{"TEST_WORD=two words", "REQUIRE_X=1", "NAMED=yes", "PWD=" + cmd.Dir, "DM_DISABLE_UDEV=1", "REQUIRE_ALL=1"} {
		if !slices.Contains(env, want) {
			t.Errorf("the guest's environment lacks %q", want)
		}
	}
	if slices.Contains(env, "SECRET=no") {
		t.Error("the guest's environment has what nobody asked for")
	}
}

// The files that a test binary was told to write arrive, and only these.
func testTestOutputs(t *testing.T, vm program) {
	dir := t.TempDir()
	const script = `echo profile > cover.out; echo log > log.txt; echo counters > counters/c; echo other > other`
	cmd := vm.command(t, "sh", "-c", script, "sh", "-test.coverprofile=cover.out", "-test.outputdir="+dir,
		"-test.testlogfile="+dir+"/log.txt", "-test.gocoverdir="+dir+"/counters", "-test.cpuprofile=cpu.out")
	cmd.Dir = dir
	if err := os.Mkdir(filepath.Join(dir, "counters"), 0o755); err != nil {
		t.Fatal(err)
	}
	mustRun(t, cmd)
	for name, want := range map[string]string{"cover.out": "profile\n", "log.txt": "log\n", "counters/c": "counters\n"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"other", "cpu.out"} {
		if _, err := os.Stat(filepath.Join(dir, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, want no such file", name, err)
		}
	}
}

// The whole way, with the go command above and a real test binary below.
func testGoTest(t *testing.T, vm program) {
	profile := filepath.Join(t.TempDir(), "cover.out")
	cmd := vm.command(t)
	cmd.Path, cmd.Err = exec.LookPath("go")
	cmd.Args = []string{"go", "test", "-count=1", "-v", "-exec", vm.path, "-run", "^TestKernelLoop$", "-coverprofile", profile, "./kernel"}
	if out := mustRun(t, cmd); !strings.Contains(out, "--- PASS: TestKernelLoop") {
		t.Errorf("go test -exec did not run the test:\n%s", out)
	}
	got, err := os.ReadFile(profile)
	if err != nil || !strings.Contains(string(got), "kernel/loop.go:") {
		t.Errorf("coverage profile: %v, %d bytes without kernel/loop.go", err, len(got))
	}
}

// testModule: a test sees its whole module, also where that was checked out to
// a directory that is empty in a guest.
func testModule(t *testing.T, vm program) {
	root := t.TempDir() // in /tmp
	below := filepath.Join(root, "a", "b")
	if err := errors.Join(os.MkdirAll(below, 0o755), os.WriteFile(filepath.Join(root, "go.mod"), []byte("module m\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	cmd := vm.command(t, "cat", "../../go.mod")
	cmd.Dir = below
	if out := mustRun(t, cmd); out != "module m\n" {
		t.Errorf("the module's file reads %q", out)
	}
}

// testGuestKernel asks the guest for what nothing else here needs.
func testGuestKernel(t *testing.T, vm program) {
	const script = `ping -c1 127.0.0.1 >/dev/null 2>&1 || ip addr show lo | grep -q 'UP' || echo no loopback
		[ -d /run/cryptsetup ] || echo no /run/cryptsetup
		[ -e /dev/mapper/control ] || echo no control node
		[ -w /sys/fs/cgroup/cgroup.procs ] || echo no cgroup2
		[ -c /dev/pts/ptmx ] || echo no devpts
		for d in /tmp /run /dev/shm; do [ $(stat -f -c %T $d) = tmpfs ] || echo $d is no tmpfs; done
		echo x > /dev/stdout | cat >/dev/null || echo no /dev/stdout
		modprobe dm-dust || echo no modprobe`
	if got := mustRun(t, vm.command(t, "sh", "-c", script)); got != "" {
		t.Error(got)
	}
}

// family is the program's process and every one below it, with the scratch
// directory that they use.
func family(t *testing.T, pid int) (pids []int, scratch string) {
	t.Helper()
	pids = []int{pid}
	for i := 0; i < len(pids); i++ {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			children, _ := os.ReadFile(task) // a thread that has ended has none
			for child := range strings.FieldsSeq(string(children)) {
				n, err := strconv.Atoi(child)
				if err != nil {
					t.Fatal(err)
				}
				pids = append(pids, n)
			}
		}
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pids[i]))
		for arg := range bytes.SplitSeq(line, []byte{0}) {
			if dir, ok := bytes.CutPrefix(arg, []byte(guestEnv+"=")); ok {
				scratch = string(dir)
			}
		}
	}
	return pids, scratch
}

// startWaiting starts a guest whose command never ends, and returns when that runs.
func startWaiting(t *testing.T, vm program) *exec.Cmd {
	t.Helper()
	cmd := vm.command(t, "sh", "-c", "echo running; sleep 1000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("running\n"))
	if _, err := out.Read(line); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// gone fails the test unless the processes end. Those that the test does not
// wait for are the first process's to collect: a zombie is an end.
func gone(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		for deadline := time.Now().Add(10 * time.Second); alive(pid); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("process %d is still there", pid)
				break
			}
		}
	}
}

func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

func testSignal(t *testing.T, vm program) {
	cmd := startWaiting(t, vm)
	pids, scratch := family(t, cmd.Process.Pid)
	if len(pids) < 4 || scratch == "" {
		t.Fatalf("a running guest has the processes %v and the directory %q", pids, scratch)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 128+int(unix.SIGTERM) {
		t.Errorf("exit code %d, want %d", code, 128+unix.SIGTERM)
	}
	gone(t, pids)
	if _, err := os.Stat(scratch); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v, want no such directory", scratch, err)
	}
}

// Even where the program itself is killed its guest goes, and the next run
// takes its directory away.
func testKilled(t *testing.T, vm program) {
	cmd := startWaiting(t, vm)
	pids, scratch := family(t, cmd.Process.Pid)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	gone(t, pids)
	mustRun(t, vm.command(t, "true"))
	if _, err := os.Stat(scratch); scratch == "" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%q: %v, want no such directory", scratch, err)
	}
}
