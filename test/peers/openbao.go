package peers

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// OpenBaoServer is a whole OpenBao server with storage in memory, initialised
// and unsealed, with TLS and a transit engine mounted at transit.
type OpenBaoServer struct {
	Vault
	unsealKey string
}

// OpenBao starts one. Building it takes minutes: test/install.sh peers=openbao.
func OpenBao(t testing.TB) *OpenBaoServer {
	t.Helper()
	s := &OpenBaoServer{Vault: newVault(t, "https")}
	cert, key := s.CA.Issue(t, "openbao")
	config := filepath.Join(t.TempDir(), "config.hcl")
	text := fmt.Sprintf(`
storage "inmem" {}
listener "tcp" {
  address         = %q
  cluster_address = %q
  tls_cert_file   = %q
  tls_key_file    = %q
}
api_addr = "https://%s"
`, s.Addr, Addr(t), cert, key, s.Addr)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	Start(t, s.Addr, exec.Command(Program(t, "openbao"), "server", "-config", config))
	made := s.Call(t, "PUT", "/v1/sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
	s.Token, _ = made["root_token"].(string)
	if keys, ok := made["keys_base64"].([]any); ok && len(keys) == 1 {
		s.unsealKey, _ = keys[0].(string)
	}
	s.TokenFile = tokenFile(t, s.Token)
	s.Seal(t, false)
	s.Call(t, "PUT", "/v1/sys/mounts/transit", map[string]any{"type": "transit"})
	return s
}

// Seal seals the server, or unseals it.
func (s *OpenBaoServer) Seal(t testing.TB, on bool) {
	t.Helper()
	if on {
		s.Call(t, "PUT", "/v1/sys/seal", map[string]any{})
		return
	}
	s.Call(t, "PUT", "/v1/sys/unseal", map[string]any{"key": s.unsealKey})
}

// Policy writes an ACL policy: capabilities by path.
func (s *OpenBaoServer) Policy(t testing.TB, name string, paths map[string]string) {
	t.Helper()
	var text strings.Builder
	for path, capabilities := range paths {
		fmt.Fprintf(&text, "path %q { capabilities = [%s] }\n", path, capabilities)
	}
	s.Call(t, "PUT", "/v1/sys/policies/acl/"+name, map[string]any{"policy": text.String()})
}
