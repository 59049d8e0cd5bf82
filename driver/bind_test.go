package driver_test

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/driver"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// bindIn is set for the process that TestKernelBindsAreReadOnlyAtOnce kills.
const bindIn = "CRYPTCSI_TEST_BIND_IN"

// A process that binds read-only is killed, again and again: what it leaves
// mounted is read-only.
func TestKernelBindsAreReadOnlyAtOnce(t *testing.T) {
	if dir := os.Getenv(bindIn); dir != "" {
		bindUntilKilled(t, filepath.Join(dir, "source"), filepath.Join(dir, "target"))
	}
	kernel.Need(t, "root")
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	for _, path := range []string{source, target} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("none", source, "tmpfs", unix.MS_NOSUID, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(source, 0) }()
	left := 0
	// With several CPUs nearly all of the time is the kernel's for unmounting.
	for round := 0; round < 24 || left < 3 && round < 2000; round++ {
		killWhileBinding(t, dir, time.Duration(round%24)*37*time.Microsecond)
		mounts, err := driver.Linux{}.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range mounts {
			if l.Target != target {
				continue
			}
			left++
			if !l.ReadOnly {
				t.Errorf("round %d left %+v", round, l)
			}
			if err := (driver.Linux{}).Unmount(t.Context(), target); err != nil {
				t.Fatal(err)
			}
		}
	}
	if left == 0 {
		t.Error("no kill came while it was mounted")
	}
}

func bindUntilKilled(t *testing.T, source, target string) {
	for round := 0; ; round++ {
		if err := (driver.Linux{}).Mount(t.Context(), source, target, "", []string{"bind", "ro", "noexec"}); err != nil {
			t.Fatal(err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(target, &st); err != nil || st.Flags&(unix.ST_RDONLY|unix.ST_NOEXEC|unix.ST_NOSUID) != unix.ST_RDONLY|unix.ST_NOEXEC|unix.ST_NOSUID {
			t.Fatalf("mounted with flags %#x, %v", st.Flags, err)
		}
		if err := (driver.Linux{}).Unmount(t.Context(), target); err != nil {
			t.Fatal(err)
		}
		if round == 0 {
			_, _ = os.Stdout.WriteString("begun\n")
		}
	}
}

func killWhileBinding(t *testing.T, dir string, after time.Duration) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), bindIn+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	time.Sleep(after) // any moment will do
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if line != "begun\n" {
		t.Fatalf("the process said %q, %v", line, err)
	}
}
