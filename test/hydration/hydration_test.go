package main

import (
	"errors"
	"os"
	"testing"

	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

func need(t *testing.T) config {
	t.Helper()
	kernel.Need(t, "root", "loop", "keyring", "dm-crypt", "dm-integrity", "dm-log-writes", "dm-flakey", "exec:dmsetup", "exec:blkid", "exec:../../bin/crypt-worker")
	kernel.NoLeaks(t)
	dir, err := os.MkdirTemp("/dev/shm", "hydration-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return config{dir: dir, worker: "../../bin/crypt-worker", say: t.Logf, counts: map[string]int{}}
}

// A volume whose power is cut loses nothing that was promised. (make
// kill-hydration does more of it.)
func TestKernelPowerIsCut(t *testing.T) {
	for wiped, n := range map[bool]int{false: 5, true: 2} {
		c := need(t)
		c.wiped, c.n, c.seed, c.kinds = wiped, n, 1, []string{kindLog, kindFlakey}
		if err := run(t.Context(), c); err != nil {
			t.Errorf("wiped=%v: %v", wiped, err)
		}
	}
}

// Where one flush gets lost, it is noticed. Not for sure at the first try: the
// layers flush by themselves every few seconds, and where one of them does so
// right before the cut, as on a machine that stands still then, nothing is lost.
func TestKernelLostFlush(t *testing.T) {
	for _, tt := range []struct{ kind, lose string }{{kindLog, loseStack}, {kindLog, loseDisk}, {kindFlakey, loseStack}} {
		t.Run(tt.kind+","+tt.lose, func(t *testing.T) {
			c := need(t)
			for seed := uint64(1); seed <= 5; seed++ {
				err := loses(t, c, seed, tt.kind, tt.lose)
				if _, ok := errors.AsType[*wrongError](err); ok {
					return
				}
				if err != nil {
					t.Fatalf("%v; want an error that says what is lost", err)
				}
				t.Logf("seed %d: nothing was lost", seed)
			}
			t.Error("that a flush gets lost is not noticed")
		})
	}
}

// loses has a new volume lose a flush.
func loses(t *testing.T, c config, seed uint64, kind, lose string) error {
	t.Helper()
	l, err := newLife(seed, c.dir, c.worker, false)
	if err != nil {
		t.Fatal(err)
	}
	defer l.free()
	l.lose, l.said = lose, t.Logf
	return l.die(kind)
}
