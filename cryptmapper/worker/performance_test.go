package worker_test

import (
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/cryptmapper/dm"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelPerformance: the kernel has what was asked for when the volume is
// made, opened and grown, and the volume works.
func TestKernelPerformance(t *testing.T) {
	all := strings.Join(cryptmapper.PerformanceOptions(), ",")
	for name, newVolume := range map[string]func(*testing.T) *fixture{
		"no integrity": func(t *testing.T) *fixture { return newFixture(t, 32*mib, dek.IntegrityNone) },
		"integrity":    func(t *testing.T) *fixture { return newFixture(t, 32*mib, dek.IntegrityHMAC) },
		"clone":        func(t *testing.T) *fixture { return newCloned(t, 64*mib) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newVolume(t)
			f.v.Performance = all
			has := func(m cryptmapper.Mapping) {
				t.Helper()
				table, err := dm.Table(cryptName(f))
				if err != nil || len(table) != 1 {
					t.Fatalf("table %v, %v", table, err)
				}
				for _, option := range cryptmapper.PerformanceOptions() {
					if m.Performance != all || !strings.Contains(table[0].Params, " "+option) {
						t.Errorf("the mapping says %q, the table lacks %s: %s", m.Performance, option, table[0].Params)
					}
				}
			}
			has(f.made(t, "content"))
			if f.d.Spec.Layout == dek.LayoutClone {
				f.hydrate(t)
				f.confirm(f.finish(t))
			}
			f.close(t)
			m := f.open(t)
			has(m)
			kernel.Grow(t, f.v.Device, 96*mib)
			grown, err := f.Resize(t.Context(), f.v, f.d)
			if err != nil || grown.Size <= m.Size {
				t.Fatalf("Resize = %+v, %v", grown, err)
			}
			has(grown)
			if got := string(readAt(t, m.Path, 0, 7)); got != "content" {
				t.Errorf("read %q", got)
			}
			f.v.Performance = ""
			if again := f.open(t); again.Performance != all {
				t.Errorf("a mapping that was there has now %q", again.Performance)
			}
			f.close(t)
			if m := f.open(t); m.Performance != "" {
				t.Errorf("opened without, it has %q", m.Performance)
			}
		})
	}
}

// An option that dm-crypt does not take leaves no mapping.
func TestKernelPerformanceUnknown(t *testing.T) {
	f := newFixture(t, 32*mib, dek.IntegrityNone)
	f.made(t, "content")
	f.close(t)
	f.v.Performance = "no_such_option"
	f.refused(t, errdefs.ErrInvalid, "no_such_option")
}

// cryptName is the name of a volume's dm-crypt mapping.
func cryptName(f *fixture) string {
	if f.d.Spec.Layout == dek.LayoutClone {
		return cryptmapper.CryptName(f.v.Name)
	}
	return f.v.Name
}
