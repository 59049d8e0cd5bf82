package stack_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/test/stack"
	"github.com/cryptcsi/cryptcsi/test/vm/kernel"
)

// TestKernelKeyService: a volume by way of a key service; while that is away,
// or sealed, staging is Unavailable in words, and works when it is there again.
func TestKernelKeyService(t *testing.T) {
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	kernel.Need(t, "root", "dm-crypt", "keyring", "loop", "exec:mkfs.ext4",
		"exec:"+filepath.Join(bin, "csi-plugin"), "exec:"+filepath.Join(bin, "key-service"), "exec:"+filepath.Join(bin, "loopdriver"))
	kernel.NoLeaks(t)
	ctx, dir := t.Context(), t.TempDir()
	s, err := stack.Start(ctx, stack.Config{Dir: dir, Bin: bin, KeyService: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(s.Logs())
		}
	})
	unavailable := func(what string, err error, words string) {
		t.Helper()
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want Unavailable with %q", what, err, words)
		}
	}

	v, err := s.Create(ctx, "one", 64<<20, stack.MountCapability("ext4"), nil)
	must(t, "Create", err)
	must(t, "Stage", v.Stage(ctx))
	must(t, "Publish", v.Publish(ctx))
	content := []byte("kept")
	must(t, "write", os.WriteFile(filepath.Join(v.Target, "data"), content, 0o600))
	must(t, "Unpublish", v.Unpublish(ctx))
	must(t, "Unstage", v.Unstage(ctx))

	must(t, "stop the key service", s.StopKeyService(syscall.SIGTERM))
	unavailable("Stage without the key service", v.Stage(ctx), s.KeyAddress())

	must(t, "start it sealed", s.StartKeyService(ctx, "--sealed"))
	unavailable("Stage while it is sealed", v.Stage(ctx), "sealed")
	if out, err := s.Unseal(ctx, s.Path("salt")); err == nil {
		t.Errorf("unsealed with a wrong secret: %s", out)
	}
	unavailable("Stage after a wrong secret", v.Stage(ctx), "sealed")
	if out, err := s.Unseal(ctx, s.Path("master-secret")); err != nil {
		t.Fatalf("unseal: %v: %s", err, out)
	}
	must(t, "Stage", v.Stage(ctx))
	must(t, "Publish", v.Publish(ctx))
	got, err := os.ReadFile(filepath.Join(v.Target, "data"))
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("read %q, %v; want %q", got, err, content)
	}
	must(t, "Unpublish", v.Unpublish(ctx))
	must(t, "Unstage", v.Unstage(ctx))
	must(t, "Delete", v.Delete(ctx))
}
