package main

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// onOneCPU lets this thread, and what it starts, run on one processor only, one
// that no other guest has as long as there is such. User-mode Linux has but one,
// and its kernel and its programs are processes that wait for each other at every
// system call and page fault: on different processors each of these costs a
// wake-up across them, and starting a program takes three times as long. Where it
// cannot be done the guest runs nevertheless. What comes back lets the processor go.
func onOneCPU() (release func()) {
	var allowed unix.CPUSet
	if unix.SchedGetaffinity(0, &allowed) != nil || allowed.Count() < 2 {
		return func() {}
	}
	var cpus []int
	for cpu := 0; len(cpus) < allowed.Count(); cpu++ {
		if allowed.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	cpu := cpus[os.Getpid()%len(cpus)]
	var lock *os.File
	// The first processor has more than its share of interrupts.
	for i := len(cpus) - 1; i >= 0 && lock == nil; i-- {
		if lock = lockCPU(cpus[i]); lock != nil {
			cpu = cpus[i]
		}
	}
	var one unix.CPUSet
	one.Set(cpu)
	_ = unix.SchedSetaffinity(0, &one)
	return func() {
		_ = unix.SchedSetaffinity(0, &allowed)
		_ = lock.Close() // of none it says so
	}
}

// lockCPU takes a processor for the life of this process, nil if another guest
// has it.
func lockCPU(cpu int) *os.File {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), fmt.Sprintf("cryptcsi-cpu-%d", cpu)), os.O_RDONLY|os.O_CREATE, 0o644)
	if err != nil {
		return nil
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		_ = f.Close()
		return nil
	}
	return f
}
