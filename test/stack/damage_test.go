package stack_test

import (
	"crypto/rand"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelDamage: somebody changes sectors of a volume's disk. Whoever reads
// them gets an error, and it is seen in the volume's condition, the metric, the
// log and inspect, after a restart of csi-plugin too, until the volume is staged
// again; another volume stays in order.
func TestKernelDamage(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	must(t, "bin", err)
	kernel.Need(t, "root", "dm-crypt", "dm-integrity", "keyring", "loop",
		"exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "loopdriver"))
	kernel.NoLeaks(t)
	ctx, address := t.Context(), freeAddress(t)
	s, err := stack.Start(ctx, stack.Config{Dir: t.TempDir(), Bin: bin, PluginArgs: []string{"--metrics-address=" + address, "--integrity-init=wipe"}})
	must(t, "start", err)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.Logs())
		}
	})
	integrity := map[string]string{"cryptcsi.io/integrity": "hmac-sha256"}
	var volumes []*stack.Volume
	for _, name := range []string{"damaged", "other"} {
		v, err := s.Create(ctx, name, 64<<20, stack.BlockCapability(), integrity)
		must(t, "Create", err)
		must(t, "Stage", v.Stage(ctx))
		must(t, "Unstage", v.Unstage(ctx))
		volumes = append(volumes, v)
	}
	damaged, other := volumes[0], volumes[1]
	scribble(t, damaged.Device())
	must(t, "Up", errors.Join(damaged.Up(ctx), other.Up(ctx)))
	defer func() {
		must(t, "Down", errors.Join(damaged.Down(ctx), other.Down(ctx), damaged.Delete(ctx), other.Delete(ctx)))
	}()
	condition := func(v *stack.Volume) *csi.VolumeCondition {
		t.Helper()
		stats, err := s.Node.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: v.ID, VolumePath: v.Target})
		must(t, "NodeGetVolumeStats", err)
		return stats.GetVolumeCondition()
	}
	if c := condition(damaged); c.GetAbnormal() {
		t.Errorf("before anybody reads: %v", c)
	}
	if _, err := os.ReadFile(other.Target); err != nil {
		t.Errorf("the other volume: %v", err)
	}
	if _, err := os.ReadFile(damaged.Target); err == nil {
		t.Error("sectors that were changed can be read")
	}
	for end := time.Now().Add(time.Minute); !condition(damaged).GetAbnormal(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the condition stays %v", condition(damaged))
		}
	}
	if c := condition(damaged); !strings.Contains(c.GetMessage(), "sectors that are not authentic") {
		t.Errorf("the condition is %v", c)
	}
	if n := value(t, address, "cryptcsi_integrity_errors_total"); n == "0" {
		t.Error("the metric is 0")
	}
	if n := strings.Count(s.Logs(), "sectors that are not authentic: the disk fails"); n != 1 {
		t.Errorf("it was logged %d times", n)
	}
	must(t, "stop", s.StopPlugin(syscall.SIGKILL))
	must(t, "start", s.StartPlugin(ctx))
	if c := condition(damaged); !c.GetAbnormal() {
		t.Errorf("after a restart: %v", c)
	}
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "csi-plugin"), "inspect", "--kubelet-dir="+s.KubeletDir()).CombinedOutput()
	if err != nil || strings.Count(string(out), "not authentic") != 1 {
		t.Errorf("inspect: %v\n%s", err, out)
	}
	if c := condition(other); c.GetAbnormal() {
		t.Errorf("the other volume: %v", c)
	}
	must(t, "stage again", errors.Join(damaged.Down(ctx), damaged.Up(ctx)))
	if c := condition(damaged); c.GetAbnormal() {
		t.Errorf("staged again: %v", c)
	}
}

// scribble changes a part of the disk that holds data and tags.
func scribble(t *testing.T, device string) {
	t.Helper()
	junk := make([]byte, 1<<20)
	_, _ = rand.Read(junk)
	f, err := os.OpenFile(device, os.O_WRONLY|os.O_SYNC, 0)
	must(t, "open", err)
	_, err = f.WriteAt(junk, 48<<20)
	must(t, "scribble", errors.Join(err, f.Close()))
}
