package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// blockSize is what the test writes at once.
const blockSize = 4 * sectorSize

// recorded is the image of a disk with a log, which was written to: a block of 1
// at its start, flushed; then others there and elsewhere, after which comes a mark.
func recorded(t *testing.T) (*disk, string) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	step(t, makeFile(image, 4<<20))
	d, err := openDisk(kindLog, image)
	step(t, err)
	file, err := os.OpenFile(d.path(), os.O_RDWR|unix.O_DIRECT, 0)
	step(t, err)
	buf, err := aligned(blockSize)
	step(t, err)
	write := func(sector int, b byte) {
		t.Helper()
		copy(buf, bytes.Repeat([]byte{b}, len(buf)))
		_, err := file.WriteAt(buf, int64(sector)*sectorSize)
		step(t, err)
	}
	write(0, 1)
	step(t, file.Sync())
	step(t, d.mark("flushed"))
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		write(rng.IntN(1020), byte(rng.IntN(256)))
	}
	write(0, 2)
	step(t, d.mark("not-flushed"))
	write(4, 3)
	step(t, file.Sync())
	step(t, file.Close())
	step(t, d.close())
	return d, image
}

func step(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// holds fails the test unless the file is as it should be.
func holds(t *testing.T, file string, want []byte, what string) {
	t.Helper()
	got, err := os.ReadFile(file)
	step(t, err)
	if !bytes.Equal(got, want) {
		t.Error(what)
	}
}

// A log that is replayed whole gives the very device that was written; one that
// is replayed to a mark has what was flushed before it, and nothing after.
func TestKernelReplay(t *testing.T) {
	kernel.Need(t, "root", "loop", "dm-log-writes", "exec:dmsetup")
	d, image := recorded(t)
	after, err := os.ReadFile(image)
	step(t, err)
	entries, err := d.entries()
	step(t, err)
	step(t, copySparse(image+".kept", d.before()))
	step(t, d.rewind(entries))
	holds(t, image, after, "the whole log does not give the device that was written")

	at := slices.IndexFunc(entries, func(e entry) bool { return e.mark == "not-flushed" })
	if at < 0 {
		t.Fatalf("the mark is not in the log of %d entries", len(entries))
	}
	step(t, os.Rename(image+".kept", d.before()))
	step(t, d.rewind(entries[:at]))
	flushed := make([]byte, len(after))
	copy(flushed, bytes.Repeat([]byte{1}, blockSize))
	holds(t, image, flushed, "at the mark the disk is not what was flushed before it")
}
