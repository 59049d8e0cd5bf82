// Command hydration cuts the power of integrity volumes at random moments of
// their lives, above all while they hydrate, and looks whether anything that
// was promised got lost. It runs in a guest.
//
// The volume's device loses writes in one of two ways. dm-log-writes records
// what reaches it; afterwards the disk is made anew as it was promised to be at
// some flush or FUA write, sometimes with torn parts of what came next.
// dm-flakey, from some moment on, takes writes and drops them, which loses what
// the layers above still held in memory.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
)

// config is what a run does.
type config struct {
	n      int
	seed   uint64
	first  int      // the number of the first life
	kinds  []string // of cuts; chosen among at random
	dir    string
	worker string
	wiped  bool
	say    func(format string, args ...any)
	counts map[string]int // cuts by kind
}

// layout of the volumes' records.
func layout(wiped bool) string {
	if wiped {
		return ""
	}
	return dek.LayoutClone
}

func main() {
	n := flag.Int("n", 200, "how often power is cut")
	seed := flag.Uint64("seed", 1, "decides about everything but time")
	first := flag.Int("life", 0, "begin with the life of this number")
	wiped := flag.Bool("wiped", false, "volumes that are wiped when they are made, and never hydrate")
	flag.Parse()
	self, err := os.Executable()
	if err == nil {
		err = report(config{
			n: *n, seed: *seed, first: *first, wiped: *wiped, worker: filepath.Join(filepath.Dir(self), "crypt-worker"),
			kinds: []string{kindLog, kindLog, kindFlakey}, counts: map[string]int{},
			say: func(format string, args ...any) { fmt.Printf(format+"\n", args...) },
		})
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "hydration: %v\n", err)
		os.Exit(1)
	}
}

// report runs and says what was done.
func report(c config) (err error) {
	if c.dir, err = os.MkdirTemp("/dev/shm", "hydration-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(c.dir) }()
	began := time.Now()
	if err := run(context.Background(), c); err != nil {
		return err
	}
	c.say("%d cuts, %d by dm-log-writes, %d by dm-flakey, seed %d, in %v: no sector lost, wrong or unreadable",
		c.n, c.counts[kindLog], c.counts[kindFlakey], c.seed, time.Since(began).Round(time.Second))
	return nil
}
