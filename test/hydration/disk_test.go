package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// A log that is replayed whole gives the very device that was written; one that
// is replayed to a mark has what was flushed before it, and nothing after.
func TestKernelReplay(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-log-writes", "exec:dmsetup")
	image := filepath.Join(t.TempDir(), "image")
	if err := makeFile(image, 4<<20); err != nil {
		t.Fatal(err)
	}
	d, err := openDisk(kindLog, image)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(d.path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	buf, err := aligned(4 * sectorSize)
	if err != nil {
		t.Fatal(err)
	}
	write := func(sector int, b byte) {
		t.Helper()
		for i := range buf {
			buf[i] = b
		}
		if _, err := file.WriteAt(buf, int64(sector)*sectorSize); err != nil {
			t.Fatal(err)
		}
	}
	step := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write(0, 1)
	step(file.Sync())
	step(d.mark("flushed"))
	for range 50 {
		write(rng.IntN(1020), byte(rng.IntN(256)))
	}
	write(0, 2)
	step(d.mark("not-flushed"))
	write(4, 3)
	step(file.Sync())
	step(file.Close())
	step(d.close())
	after, err := os.ReadFile(image)
	step(err)
	entries, err := d.entries()
	step(err)
	step(copySparse(image+".kept", d.before()))
	step(d.rewind(entries))
	got, err := os.ReadFile(image)
	step(err)
	if !bytes.Equal(got, after) {
		t.Error("the whole log does not give the device that was written")
	}
	for i, e := range entries {
		if e.mark != "not-flushed" {
			continue
		}
		step(os.Rename(image+".kept", d.before()))
		step(d.rewind(entries[:i]))
		got, err := os.ReadFile(image)
		step(err)
		if want := append(bytes.Repeat([]byte{1}, len(buf)), make([]byte, len(got)-len(buf))...); !bytes.Equal(got, want) {
			t.Error("at the mark the disk is not what was flushed before it")
		}
		return
	}
	t.Errorf("the mark is not in the log of %d entries", len(entries))
}
