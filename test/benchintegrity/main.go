// Command benchintegrity measures, on a kernel with device-mapper, volumes with
// integrity against themselves in other states, against cryptsetup, and against
// what others do: how long a new one takes until it can be used, how fast each
// is, and what each choice below costs. It prints tables with ratios and what
// became of the aims. Every figure is a comparison within one run on one
// kernel; none is a test. With -draw it draws a former run's figures instead.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
)

func main() {
	rounds := flag.Int("rounds", 9, "how often each comparison is made")
	length := flag.Duration("time", time.Second, "how long a workload runs")
	size := flag.Int64("size", 256, "MiB of the volumes whose speed is measured")
	sizes := flag.String("sizes", "1,16,64,256", "GiB of the new volumes")
	parts := flag.String("parts", "ready,speed,staging,during,flags,choices,regions,area", "what to measure")
	disk := flag.String("disk", "", "a blank `device`, which is overwritten: for the part whole, which is not measured unless asked for")
	out := flag.String("out", "", "write the figures to this `file`")
	clockAt := flag.String("clock", "", "`directory` by which the host tells the guest its CPU time; empty: measure by the time on the wall")
	asHost := flag.Bool("host", false, "run the command that follows, and answer the clock of the guest that it boots")
	draw := flag.String("draw", "", "draw the figures of these `files` (separated by commas) into the directory of docs, and measure nothing")
	docs := flag.String("docs", "docs", "directory of performance.md and performance.svg")
	flag.Parse()
	var err error
	switch {
	case *draw != "":
		err = drawAll(*draw, *docs)
	case *asHost:
		if err = clockDir(*clockAt); err == nil {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			err = host(ctx, *clockAt, flag.Args())
		}
	default:
		b := &bench{clock: clock{dir: *clockAt}, ctx: context.Background(), rounds: *rounds, time: *length, size: *size * mib, disk: *disk}
		for s := range strings.SplitSeq(*sizes, ",") {
			n, e := strconv.ParseInt(s, 10, 64)
			err = errors.Join(err, e)
			b.sizes = append(b.sizes, n*gib)
		}
		if err == nil {
			b.out = *out
			err = b.run(strings.Split(*parts, ","), os.Stdout)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "benchintegrity: %v\n", err)
		os.Exit(1)
	}
}

type bench struct {
	clock
	ctx     context.Context
	rounds  int
	time    time.Duration
	size    int64
	sizes   []int64
	dir     string
	bin     string
	mapper  *cryptmapper.Mapper
	buf     []byte
	out     string
	disk    string
	results results
}

// run measures the parts, prints the tables after each, and keeps the figures
// of those that came to their end.
func (b *bench) run(parts []string, w io.Writer) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	b.bin = filepath.Dir(self)
	if b.dir, err = os.MkdirTemp("/dev/shm", "cryptcsi-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	b.mapper = cryptmapper.New(cryptmapper.Options{Worker: []string{filepath.Join(b.bin, "crypt-worker")}, LockDir: filepath.Join(b.dir, "locks")})
	defer b.mapper.Shutdown()
	if b.buf, err = aligned(mib); err != nil {
		return err
	}
	b.results.Kernel, b.results.Date = kernelRelease(), time.Now().UTC().Format(time.DateOnly)
	for _, p := range []struct {
		name string
		do   func() error
	}{{"ready", b.ready}, {"speed", b.speed}, {"staging", b.staging}, {"during", b.during}, {"flags", b.cryptFlags}, {"choices", b.choices}, {"regions", b.regions}, {"area", b.area}, {"whole", b.whole}} {
		if !slices.Contains(parts, p.name) {
			continue
		}
		began := time.Now()
		err := p.do()
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Fprintf(w, "# %s: measured in %v\n", p.name, time.Since(began).Round(time.Second))
		if err := b.save(); err != nil {
			return err
		}
	}
	return b.results.print(w)
}

// save keeps what was measured so far.
func (b *bench) save() error {
	if b.out == "" {
		return nil
	}
	return b.results.save(b.out)
}

func kernelRelease() string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return unix.ByteSliceToString(u.Release[:])
}

// print prints all tables and the aims.
func (r *results) print(w io.Writer) error {
	for _, t := range tables() {
		if err := r.table(w, t.title, t.part, t.base); err != nil {
			return err
		}
	}
	return r.bars(w)
}

// tables in the order in which they are shown, each with what the ratios in
// brackets are to.
func tables() []struct{ part, title, base string } {
	return []struct{ part, title, base string }{
		{partReady, "A new volume, from Open until it can be used (ratio: to what was done before)", wipedNew},
		{partMkfs, "Of that, making the filesystem (ratio: to the same where all that it writes has its tags)", oursAgain},
		{partStage, "A new volume, from NodeStageVolume until it answers (ratio: to the smallest)", ""},
		{partSpeed, "Speed (ratio: to a volume that was wiped in full)", wiped},
		{partLatency, "Of that, the time that half of the requests stay below, by the clock on the wall (ratio: likewise)", wiped},
		{partDuring, "Speed through csi-plugin, which stops hydrating while there is I/O (ratio: to one that is finished)", duringDone},
		{partHydration, "Hydration by itself", ""},
		{partFlags, "dm-crypt's flags (ratio: to none)", flagsNone},
		{partChoices, "dm-integrity's choices (ratio: to what volumes have)", choiceOurs},
		{partArea, "dm-clone's metadata by size of regions, made and loaded again (ratio: to 4 KiB)", "4 KiB"},
		{partRegions, "Regions of dm-clone that are not hydrated (ratio: to no dm-clone)", regionNone},
	}
}
