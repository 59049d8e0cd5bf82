package gcpconfig_test

import (
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/gcpconfig"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/gcpfake"
)

func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	rewrite(t, path, content)
	return path
}

func rewrite(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// pipe returns one that nobody writes to.
func pipe(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// needs are those of the services that there are.
func needs() []gcpconfig.Need {
	return []gcpconfig.Need{{Scopes: []string{"the-scope"}, SelfSigned: true}, {Scopes: []string{"the-scope"}}}
}

func tokens(file string, need gcpconfig.Need) (*gcpconfig.Tokens, error) {
	caller, err := gcpconfig.FindCaller(file)
	if err != nil {
		return nil, err
	}
	return caller.Tokens(need)
}

func mustTokens(t *testing.T, file string, need gcpconfig.Need) *gcpconfig.Tokens {
	t.Helper()
	found, err := tokens(file, need)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func fieldsOf(t *testing.T, account string) map[string]string {
	t.Helper()
	var fields map[string]string
	if err := json.Unmarshal([]byte(account), &fields); err != nil {
		t.Fatal(err)
	}
	return fields
}

// TestRefusedFiles: what is wrong is said, and nothing of the file is shown.
func TestRefusedFiles(t *testing.T) {
	gcpfake.NoAccount(t)
	const program = `{"executable": {"command": "/bin/S3CR3T"}}`
	for _, tt := range []struct{ file, want string }{
		{"/nowhere/account.json", "/nowhere/account.json"},
		{t.TempDir(), "regular file"},
		{"/dev/zero", "regular file"},
		{pipe(t), "regular file"},
		{write(t, strings.Repeat(" ", 70000)), "regular file"},
		{write(t, ""), "is no JSON"},
		{write(t, "S3CR3T"), "is no JSON"},
		{write(t, `{"type": "service_account", "private_key": "S3CR3T`), "is no JSON"},
		{write(t, `{"type": ["S3CR3T"]}`), "is no JSON"},
		{write(t, `{"installed": {"client_secret": "S3CR3T"}}`), `type ""`},
		{write(t, `{"type": "gdch_service_account"}`), `type "gdch_service_account"`},
		{write(t, `{"type": "service_account"}`), "not complete"},
		{write(t, `{"type": "service_account", "private_key": "S3CR3T"}`), "private_key does not parse"},
		{write(t, `{"type": "authorized_user", "refresh_token": "S3CR3T"}`), "not complete"},
		{write(t, `{"type": "impersonated_service_account", "source_credentials": {"refresh_token": "S3CR3T"}}`), "not complete"},
		{write(t, `{"type": "external_account", "client_secret": "S3CR3T"}`), "Audience"},
		{write(t, `{"type": "external_account", "credential_source": `+program+`}`), "run a program"},
		{write(t, `{"type": "impersonated_service_account", "source_credentials": {"type": "external_account", "credential_source": `+program+`}}`), "run a program"},
	} {
		for _, need := range needs() {
			_, err := tokens(tt.file, need)
			if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s: %v, want ErrInvalid with %q", tt.file, err, tt.want)
			}
			if err != nil && (strings.Contains(err.Error(), "S3CR3T") || !strings.Contains(err.Error(), tt.file)) {
				t.Errorf("shows a secret, or does not say which file: %v", err)
			}
		}
	}
}

// TestPrivateKeyIsNotShown: whatever is wrong with a private key, the error is
// the same, when the file is first read and when it has changed.
func TestPrivateKeyIsNotShown(t *testing.T) {
	good := gcpfake.ServiceAccount(t, "https://nobody.invalid/token")
	fields := fieldsOf(t, good)
	block, _ := pem.Decode([]byte(fields["private_key"]))
	der := block.Bytes
	damaged := [][]byte{der[:len(der)/2], der[1:], der[4:], append([]byte{der[0] ^ 0x10}, der[1:]...)}
	for range 50 {
		bad := append([]byte(nil), der...)
		at := make([]byte, 8)
		_, _ = rand.Read(at) // never fails, see crypto/rand
		for i := range 4 {
			bad[(int(at[2*i])<<8|int(at[2*i+1]))%min(len(bad), 64)] ^= 0x2a
		}
		damaged = append(damaged, bad)
	}
	refused := 0
	for _, bad := range damaged {
		fields["private_key"] = string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: bad}))
		content, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		for _, need := range needs() {
			file := write(t, good)
			changed := mustTokens(t, file, need)
			rewrite(t, file, string(content))
			want := "the credentials file " + file + " is not complete, or its private_key does not parse"
			_, err := tokens(file, need)
			if err == nil {
				continue // it parses: the damage is in a number
			}
			refused++
			if err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
			_, err = changed.Headers(t.Context())
			if !errors.Is(err, errdefs.ErrDenied) || err.Error() != "no access token, credentials from "+file+": "+want {
				t.Errorf("a file that has changed: %v", err)
			}
			for line := range strings.Lines(fields["private_key"]) {
				for ; len(line) > 8; line = line[1:] {
					if !strings.HasPrefix(line, "-----") && strings.Contains(err.Error(), line[:8]) {
						t.Fatalf("shows a piece of the key: %v", err)
					}
				}
			}
		}
	}
	if refused < 8 {
		t.Errorf("%d of the keys do not parse", refused)
	}
}

// TestCallers: where credentials come from, in the order of application
// default credentials.
func TestCallers(t *testing.T) {
	gcpfake.NoAccount(t)
	is := func(file, from, universe string) {
		t.Helper()
		caller, err := gcpconfig.FindCaller(file)
		if err != nil || !strings.HasPrefix(caller.String(), from) || caller.Universe() != universe {
			t.Errorf("from %s in %s, %v; want %s in %s", caller, caller.Universe(), err, from, universe)
		}
	}
	is("", "the metadata server", "googleapis.com")

	home := filepath.Join(os.Getenv("HOME"), ".config", "gcloud")
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	gcloud := filepath.Join(home, "application_default_credentials.json")
	rewrite(t, gcloud, `{"type": "authorized_user"}`)
	is("", gcloud, "googleapis.com")

	environment := write(t, `{"type": "service_account", "universe_domain": "example.com"}`)
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", environment)
	is("", environment, "example.com")

	named := write(t, `{"type": "external_account"}`)
	is(named, named, "googleapis.com")

	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/file")
	if _, err := gcpconfig.FindCaller(""); !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), "/nowhere/file") {
		t.Errorf("a file that is named and not there: %v", err)
	}
}
