package main_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/dek"
)

// Killed at a step of its first life, by kill -9 of the whole guest, a volume
// comes up after the next boot. The disk is all that outlives a guest. Every
// third step is tried without integrity, every eighth with it; CRASH_EVERY=1
// (make crash) tries all.
func TestGuestKilledAtEveryStep(t *testing.T) {
	vm, err := filepath.Abs("../../bin/vm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(vm); err != nil {
		if os.Getenv("REQUIRE_ALL") == "1" {
			t.Fatalf("bin/vm is needed: %v", err)
		}
		t.Skipf("bin/vm is needed (make build): %v", err)
	}
	program := filepath.Join(t.TempDir(), "crash")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	for _, integrity := range []dek.Integrity{dek.IntegrityNone, dek.IntegrityHMAC} {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			t.Parallel()
			stride := map[dek.Integrity]int{dek.IntegrityNone: 3, dek.IntegrityHMAC: 8}[integrity]
			if os.Getenv("CRASH_EVERY") == "1" {
				stride = 1
			}
			step := 1
			for killedAt(t, vm, program, string(integrity), step) {
				step += stride
			}
			if step < 4 {
				t.Errorf("only %d steps: the volume was hardly made", step)
			}
			t.Logf("killed at every step, or every %d, up to %d", stride, step-stride)
		})
	}
}

// killedAt makes a volume, killing the guest at a step, and goes on after a
// boot. It tells whether there was such a step.
func killedAt(t *testing.T, vm, program, integrity string, step int) bool {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 24<<20); err != nil {
		t.Fatal(err)
	}
	guest := func(killOn string, args ...string) (string, int) {
		vmArgs := []string{"-disk", disk, "-rw", filepath.Dir(program)}
		if killOn != "" {
			vmArgs = append(vmArgs, "-kill-on", killOn)
		}
		vmArgs = append(vmArgs, "--", program, "-integrity="+integrity)
		cmd := exec.CommandContext(t.Context(), vm, append(vmArgs, args...)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		_ = cmd.Run()
		return out.String(), cmd.ProcessState.ExitCode()
	}
	out, code := guest("STOPPED AT", "-stop="+strconv.Itoa(step))
	killed := code == 137
	if !killed && code != 0 {
		t.Fatalf("step %d: exit code %d\n%s", step, code, out)
	}
	if out, code := guest(""); code != 0 || !strings.Contains(out, "the content is there") {
		t.Fatalf("after being killed at step %d: exit code %d\n%s", step, code, out)
	}
	return killed
}
