package main

import (
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOnOneCPU(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, after unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	release := onOneCPU()
	if out, err := exec.Command("nproc").Output(); err != nil || strings.TrimSpace(string(out)) != "1" {
		t.Errorf("what is started sees %q processors, want 1 (%v)", out, err)
	}
	release()
	if err := unix.SchedGetaffinity(0, &after); err != nil || after != before {
		t.Errorf("afterwards the thread may run on %v, before on %v (%v)", after, before, err)
	}
}

// A second guest gets another processor, and one that ends leaves its own to the next.
func TestLockCPU(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	first := lockCPU(0)
	if first == nil || lockCPU(0) != nil {
		t.Fatal("not exactly one has the processor")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if lockCPU(0) == nil {
		t.Error("the processor is not free again")
	}
}
