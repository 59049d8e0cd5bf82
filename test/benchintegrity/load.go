package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// The workloads. Each is one writer or reader that waits for each request, with
// direct I/O, so that nothing but the device is measured.
const (
	seqWrite   = "sequential write, 1 MiB"
	seqRead    = "sequential read, 1 MiB"
	randWrite  = "random write, 4 KiB"
	fsyncWrite = "random write, 4 KiB, fsync after each"
	randRead   = "random read, 4 KiB"
)

func workloads() []string { return []string{seqWrite, seqRead, randWrite, randRead, fsyncWrite} }

// speed is what a workload came to.
type speed struct {
	rate   float64       // MiB or requests a second
	median time.Duration // of a request, by the clock on the wall
}

// unit of a workload's rate.
func unit(workload string) string {
	if workload == seqWrite || workload == seqRead {
		return "MiB/s"
	}
	return "/s"
}

// load runs a workload on a device until length of the clock has passed, no
// place twice.
func (c *clock) load(path, workload string, length time.Duration, buf []byte) (speed, error) {
	file, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return speed{}, err
	}
	defer file.Close()
	size, err := file.Seek(0, 2)
	if err != nil {
		return speed{}, err
	}
	chunk, order := int64(4096), rand.New(rand.NewPCG(1, 2)).Perm(int(size/4096))
	if unit(workload) == "MiB/s" {
		chunk, order = 1<<20, nil
	}
	b := buf[:chunk]
	var times []time.Duration
	took, err := c.timed(func() error {
		t, err := c.timer(length)
		if err != nil {
			return err
		}
		for i := int64(0); i < size/chunk; i++ {
			if over, err := t.over(); i > 0 && (over || err != nil) {
				return err
			}
			at := i
			if order != nil {
				at = int64(order[i])
			}
			start := time.Now()
			if err := request(file, workload, b, at*chunk); err != nil {
				return fmt.Errorf("%s at %d: %w", workload, at*chunk, err)
			}
			times = append(times, time.Since(start))
		}
		return nil
	})
	if err != nil {
		return speed{}, err
	}
	slices.Sort(times)
	return speed{rate: float64(len(times)) / took.Seconds(), median: times[len(times)/2]}, nil
}

func request(file *os.File, workload string, b []byte, at int64) error {
	switch workload {
	case seqRead, randRead:
		_, err := file.ReadAt(b, at)
		return err
	}
	if _, err := file.WriteAt(b, at); err != nil || workload != fsyncWrite {
		return err
	}
	return file.Sync()
}

// aligned returns memory that direct I/O takes, with content that is no zeros.
func aligned(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	for i := range b {
		b[i] = byte(i)
	}
	return b, err
}
