package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestMain lets the test's own program be key-service serve in a process of its own.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// process starts key-service serve and returns its process ID.
func process(t *testing.T, args ...string) string {
	t.Helper()
	addr := peers.Addr(t)
	cmd := exec.Command(os.Args[0], append([]string{"serve", "--listen=" + addr}, args...)...)
	peers.Start(t, addr, cmd)
	return fmt.Sprint(cmd.Process.Pid)
}

// TestLikeProcess: a verb beside a service needs no flags but its process ID,
// wherever the service has its own from.
func TestLikeProcess(t *testing.T) {
	store, kek := localStore(t), localKEK(t)
	must(t, with(append(store, kek...), "dek create", "d/one"))
	file := write(t, "kms-uri: "+kek[1]+"\nvolume-policy: any\ndelete-grace: 1h\n")
	like := []string{"--like-process=" + process(t, append(store, "--config="+file)...)}
	must(t, with(like, "check"), `static://\S+ +wrap +ok`, `file://\S+ +list it +ok`, "all .* steps are right")
	must(t, with(like, "dek list"), "d/one +prepared")
	must(t, with(like, "dek delete", "--yes", "d/one"), "deleted +d/one")
	must(t, with(like, "dek restore", "d/one"), "restored +d/one") // by the service's --delete-grace

	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{with(append(store, like...), "check"), 2, "--like-process excludes --storage-uri"},
		{with(like, "prune", "--delete-grace=1m"), 2, "--like-process excludes --delete-grace"},
		{[]string{"check", fmt.Sprintf("--like-process=%d", os.Getpid())}, 2, "is no key-service serve"},
		{[]string{"check", "--like-process=-1"}, 1, "--like-process: "},
		{[]string{"check", "--like-process=" + process(t, "--sealed", "--volume-policy=any")}, 2, "in its memory only"},
	} {
		if code, out := keyService(t, tt.args...); code != tt.code || !strings.Contains(out, tt.says) {
			t.Errorf("key-service %v: exit code %d, want %d; it should say %q:\n%s", tt.args, code, tt.code, tt.says, out)
		}
	}
}
