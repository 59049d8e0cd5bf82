package worker_test

import (
	"bytes"
	"os/exec"
	"testing"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// asCopy makes the record one of a copy of the volume, whose disk it now is.
func (f *fixture) asCopy() {
	f.d.ID += "-copy"
	f.d.State, f.d.Previous, f.d.Key = dek.Rotating, f.d.Key, secret.New(dek.Size)
	copy(f.d.Key.Expose(), f.d.Previous.Expose())
	f.d.Key.Expose()[0] ^= 1
	f.d.Header.Sequence = 0
}

// Killed at a step of a copy's first opening, the next one finishes it: the data
// is there, and only its own key opens it. CRASH_EVERY=1 tries every step.
func TestKernelRotateKilledAtSteps(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newFixture(t, 24*mib, integrity)
			f.made(t, "survives")
			f.close(t)
			f.asCopy()
			rotating, header := f.d, readAt(t, f.v.Device, 0, 16*mib)
			step, stride := sample(t, 4)
			for ; ; step += stride {
				writeAt(t, f.v.Device, 0, header)
				f.d = rotating
				_, err := newMapper(t, step).Open(t.Context(), f.v, f.d)
				m := f.open(t)
				if m.Header.Fingerprint != dek.Fingerprint(f.d.Key) || string(readAt(t, m.Path, 0, 8)) != "survives" {
					t.Fatalf("step %d: %+v", step, m)
				}
				f.close(t)
				f.confirm(m)
				f.d.Header.Fingerprint = ""
				if m := f.open(t); string(readAt(t, m.Path, 0, 8)) != "survives" {
					t.Fatalf("step %d: the data is gone", step)
				}
				f.close(t)
				if err == nil {
					if step < 10 {
						t.Errorf("only %d steps", step-1)
					}
					t.Logf("up to step %d", step-stride)
					break
				}
			}
			for _, k := range []struct {
				key   secret.Bytes
				opens bool
			}{{rotating.Key, true}, {rotating.Previous, false}} {
				if cryptsetupOpens(t, f.v.Device, k.key) != k.opens {
					t.Errorf("cryptsetup opens with that key: %v", !k.opens)
				}
			}
			writeAt(t, f.v.Device, 0, header)
			f.d.Previous = secret.Bytes{}
			f.refused(t, errdefs.ErrState, "no header")
		})
	}
}

// A copy that is older than what its record has of its source is refused, and
// not touched: one that was cut when the source was new, and one from before the
// source was given another key. That it is blank is no permission to format it.
func TestKernelLateCopyIsRefused(t *testing.T) {
	f := newFixture(t, 24*mib, dek.IntegrityNone)
	f.made(t, "x")
	f.close(t)
	source := f.d
	for name, age := range map[string]func(f *fixture){
		"cut before the first use": func(f *fixture) { writeAt(t, f.v.Device, 0, make([]byte, 24*mib)) },
		"cut before another key": func(f *fixture) {
			f.d.Previous = secret.New(dek.Size)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f.lend(t, func(f *fixture) {
				f.asCopy()
				age(f)
				f.refused(t, errdefs.ErrState, "of a copy make another one")
				f.v.ReadOnly = true
				f.refused(t, errdefs.ErrState, "of a copy make another one")
			})
		})
	}
	f.d = source
	f.open(t)
}

func cryptsetupOpens(t *testing.T, device string, key secret.Bytes) bool {
	t.Helper()
	cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file=-", device)
	cmd.Stdin = bytes.NewReader(key.Expose())
	return cmd.Run() == nil
}

// A source whose own disk was taken for its copy gets its header back from the
// backup in its record.
func TestKernelRotatedSourceIsRestored(t *testing.T) {
	for _, integrity := range modes {
		t.Run("integrity="+string(integrity), func(t *testing.T) {
			f := newKept(t, integrity)
			kernel.Need(t, "exec:cryptsetup")
			want, source := f.through(t), f.d
			f.asCopy()
			f.open(t)
			f.close(t)
			f.d = source
			f.refused(t, errdefs.ErrState, "belongs to")
			h, restored, err := f.Restore(t.Context(), f.v, f.d, cryptmapper.RestoreOptions{})
			if err != nil || !restored || h.UUID != source.Header.UUID {
				t.Fatalf("Restore = %+v, %v, %v", h, restored, err)
			}
			if f.through(t) != want {
				t.Error("the volume holds something else")
			}
		})
	}
}
