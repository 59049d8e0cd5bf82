package kernel

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// NoLeaks fails the test if at its end there are mappings of ours (names that
// begin with cryptcsi-), loop devices or mounts that were not there when it was
// called. Call it first, so that it looks after all other cleanups; a test that
// runs in parallel with others cannot use it.
func NoLeaks(t testing.TB) {
	t.Helper()
	before, err := holdings()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The kernel frees a loop device after its last user, and that may be a
		// program that looks at new devices by itself: allow for a moment.
		deadline := time.Now().Add(2 * time.Second)
		for {
			left, err := newHoldings(before)
			switch {
			case err != nil:
				t.Error(err)
			case len(left) == 0:
			case time.Now().Before(deadline):
				time.Sleep(20 * time.Millisecond)
				continue
			default:
				t.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
			}
			return
		}
	})
}

func newHoldings(before []string) ([]string, error) {
	now, err := holdings()
	return slices.DeleteFunc(now, func(s string) bool { return slices.Contains(before, s) }), err
}

// holdings lists what a test could leave behind, one line each.
func holdings() ([]string, error) {
	var all []string
	devices, err := dmDevices()
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without device-mapper there are no mappings
		return nil, err
	}
	for _, name := range devices {
		if strings.HasPrefix(name, "cryptcsi-") {
			all = append(all, "mapping "+name)
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, path := range loops {
		if file, err := os.ReadFile(path); err == nil { // else it was detached just now
			device := filepath.Base(filepath.Dir(filepath.Dir(path)))
			all = append(all, "loop device "+device+" on "+strings.TrimSpace(string(file)))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 {
			all = append(all, "mount "+f[0]+" at "+f[4])
		}
	}
	return all, nil
}
