package peers

import (
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// HSM is a token of SoftHSM, a PKCS#11 module in software.
type HSM struct {
	// Module is the path of the shared library, Token the token's label, PIN
	// the user's and PINFile the file that holds it.
	Module, Token, PIN, PINFile string
}

// SoftHSM makes a token, which goes with the test. All tokens of a process lie
// in one place, because the module reads SOFTHSM2_CONF once, and where this process
// uses the module already it is finalised, because it would not see a new token:
// so not from parallel tests.
func SoftHSM(t testing.TB) *HSM {
	t.Helper()
	Program(t, "softhsm2-util")
	Program(t, "pkcs11-tool")
	h := &HSM{Module: "/usr/lib/softhsm/libsofthsm2.so", Token: "token " + rand.Text()[:8]}
	if _, err := os.Stat(h.Module); err != nil {
		Missing(t, h.Module)
	}
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("cryptcsi-softhsm-%d", os.Getpid())) //nolint:usetesting // outlives the test, as the module does
	tokens, conf := filepath.Join(dir, "tokens"), filepath.Join(dir, "softhsm2.conf")
	must(t, os.MkdirAll(tokens, 0o700))
	must(t, os.WriteFile(conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600))
	must(t, os.Setenv("SOFTHSM2_CONF", conf)) //nolint:usetesting // for good: t.Setenv would take it back
	t.Cleanup(func() {
		h.Remove(t)
		if os.Remove(tokens) == nil { // the last one
			_ = os.RemoveAll(dir)
		}
	})

	h.SetPIN(t, rand.Text()[:16])
	h.Insert(t)
	finalize(h.Module)
	return h
}

// SetPIN writes another PIN into the file. The token keeps its own.
func (h *HSM) SetPIN(t testing.TB, pin string) {
	t.Helper()
	if h.PINFile == "" {
		h.PIN, h.PINFile = pin, filepath.Join(t.TempDir(), "pin")
	}
	must(t, os.WriteFile(h.PINFile, []byte(pin+"\n"), 0o600))
}

// Insert makes the token, empty.
func (h *HSM) Insert(t testing.TB) {
	t.Helper()
	h.run(t, "softhsm2-util", "--init-token", "--free", "--label", h.Token, "--pin", h.PIN, "--so-pin", "12345678")
}

// Remove destroys the token, where there is one, with everything in it.
func (h *HSM) Remove(t testing.TB) {
	t.Helper()
	_ = exec.Command("softhsm2-util", "--delete-token", "--token", h.Token).Run()
}

// URI names a key in the token. More parameters may follow it.
func (h *HSM) URI(object string) string {
	return fmt.Sprintf("pkcs11:token=%s;object=%s?module-path=%s&pin-source=file:%s",
		url.PathEscape(h.Token), url.PathEscape(object), h.Module, h.PINFile)
}

// CreateKey makes an AES-256 key in the token, fit for a KEK, by a tool that is
// not ours. The ID is in hex.
func (h *HSM) CreateKey(t testing.TB, object, id string) {
	t.Helper()
	h.Tool(t, "--keygen", "--key-type", "AES:32", "--label", object, "--id", id, "--sensitive", "--usage-decrypt")
}

// ImportKey writes a key of known bytes into the token.
func (h *HSM) ImportKey(t testing.TB, object, id string, key []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(file, key, 0o600))
	h.Tool(t, "--write-object", file, "--type", "secrkey", "--key-type", "AES:32", "--label", object, "--id", id, "--sensitive", "--usage-decrypt")
}

// Tool runs pkcs11-tool, logged in as the token's user, and returns what it printed.
func (h *HSM) Tool(t testing.TB, args ...string) string {
	t.Helper()
	return h.run(t, "pkcs11-tool", append([]string{"--module", h.Module, "--token-label", h.Token, "--login", "--pin", h.PIN}, args...)...)
}

// Flags returns the token's state as pkcs11-tool has it, without a login.
func (h *HSM) Flags(t testing.TB) string {
	t.Helper()
	all := h.run(t, "pkcs11-tool", "--module", h.Module, "--list-token-slots")
	_, ours, _ := strings.Cut(all, "token label        : "+h.Token)
	_, flags, ok := strings.Cut(ours, "token flags        : ")
	if !ok {
		t.Fatalf("pkcs11-tool does not list %s:\n%s", h.Token, all)
	}
	flags, _, _ = strings.Cut(flags, "\n")
	return flags
}

func (h *HSM) run(t testing.TB, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", program, err, out)
	}
	return string(out)
}
