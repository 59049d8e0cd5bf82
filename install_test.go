package cryptcsi_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestInstallTriesAgain: a download that fails is tried again, with new lists of
// packages, and one that fails for good ends it.
func TestInstallTriesAgain(t *testing.T) {
	for _, tc := range []struct {
		name, failing string // the calls of apt-get that fail
		ok            bool
		calls         string
	}{
		{"none", "", true, "update install"},
		{"the lists once", "1", true, "update update install"},
		{"a package twice", "2 4", true, "update install update install update install"},
		{"for good", "1 2 3", false, "update update update"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			calls := filepath.Join(dir, "calls")
			for program, text := range map[string]string{
				"dpkg-query": "exit 1", // nothing is installed
				"sudo":       `exec "$@"`,
				"apt-get": `for word; do case $word in update|install) echo $word >>` + calls + `; esac; done
n=$(wc -l <` + calls + `)
for bad in ` + tc.failing + `; do [ "$n" != "$bad" ] || { echo "Err: it may hiccup" >&2; exit 100; }; done`,
			} {
				if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil { //nolint:gosec // a program
					t.Fatal(err)
				}
			}
			cmd := exec.CommandContext(t.Context(), "test/install.sh", "packages")
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "INSTALL_PAUSE=0")
			out, err := cmd.CombinedOutput()
			if (err == nil) != tc.ok || !tc.ok && !strings.Contains(string(out), "install: failed: packages: ") {
				t.Errorf("%v\n%s", err, out)
			}
			text, err := os.ReadFile(calls)
			if got := strings.Join(strings.Fields(string(text)), " "); err != nil || got != tc.calls {
				t.Errorf("apt-get was called for %s, %v; want %s", got, err, tc.calls)
			}
		})
	}
}
