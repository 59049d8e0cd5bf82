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

// Where one flush gets lost, it is noticed.
func TestKernelLostFlush(t *testing.T) {
	for _, tt := range []struct{ kind, lose string }{{kindLog, loseStack}, {kindLog, loseDisk}, {kindFlakey, loseStack}} {
		t.Run(tt.kind+","+tt.lose, func(t *testing.T) {
			c := need(t)
			l, err := newLife(1, c.dir, c.worker, false)
			if err != nil {
				t.Fatal(err)
			}
			defer l.free()
			l.lose, l.said = tt.lose, t.Logf
			var wrong *wrongError
			if err := l.die(tt.kind); !errors.As(err, &wrong) {
				t.Errorf("%v; want an error that says what is lost", err)
			}
		})
	}
}
