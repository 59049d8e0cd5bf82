package peers

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// KMIPServer is PyKMIP's server: KMIP 1.0 to 2.0, TLS 1.2, clients known by
// the common names of their certificates.
type KMIPServer struct {
	// Addr is where it listens, host:port.
	Addr string
	// CA issued its certificate and is who it trusts for clients.
	CA *CA
	// CertFile and KeyFile are those of the client that CreateKey is, the owner.
	CertFile, KeyFile string

	dir     string
	loaded  int // how often it has read the policy
	python3 string
}

// kmipPolicy names the operation policy of the keys that CreateKey makes.
const kmipPolicy = "cryptcsi"

// PyKMIP starts one, with an empty database.
func PyKMIP(t testing.TB) *KMIPServer {
	t.Helper()
	program := Program(t, "pykmip-server") // Debian's, for Debian's Python
	s := &KMIPServer{Addr: Addr(t), CA: NewCA(t), dir: t.TempDir(), python3: "/usr/bin/python3"}
	s.CertFile, s.KeyFile = s.CA.Issue(t, "owner")
	cert, key := s.CA.Issue(t, "server")
	host, port, err := net.SplitHostPort(s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`[server]
hostname=%s
port=%s
certificate_path=%s
key_path=%s
ca_path=%s
auth_suite=TLS1.2
enable_tls_client_auth=True
policy_path=%s
database_path=%s
logging_level=INFO
`, host, port, cert, key, s.CA.File, s.file("policy"), s.file("db"))
	if err := os.Mkdir(s.file("policy"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.file("server.conf"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	s.writePolicy(t, kmipOperations())
	Start(t, s.Addr, exec.Command(program, "-f", s.file("server.conf"), "-l", s.file("log")))
	t.Cleanup(func() {
		if said, err := os.ReadFile(s.file("log")); t.Failed() && err == nil {
			t.Logf("the end of pykmip-server's log:\n%s", said[max(0, len(said)-4<<10):])
		}
	})
	s.awaitPolicy(t)
	return s
}

func (s *KMIPServer) file(name string) string { return filepath.Join(s.dir, name) }

// URI opens the key with that unique identifier as the owner.
func (s *KMIPServer) URI(id string) string {
	return "kmip://" + s.Addr + "/" + url.PathEscape(id) + "?" + s.credentials(s.CertFile, s.KeyFile)
}

// NameURI opens the key with that Name as the owner.
func (s *KMIPServer) NameURI(name string) string {
	return "kmip://" + s.Addr + "/?name=" + url.PathEscape(name) + "&" + s.credentials(s.CertFile, s.KeyFile)
}

// As is a URI of this server with another client's certificate.
func (s *KMIPServer) As(uri, certFile, keyFile string) string {
	return strings.Replace(uri, s.credentials(s.CertFile, s.KeyFile), s.credentials(certFile, keyFile), 1)
}

func (s *KMIPServer) credentials(certFile, keyFile string) string {
	return "ca-file=" + s.CA.File + "&cert-file=" + certFile + "&key-file=" + keyFile
}

// CreateKey makes an active AES-256 key with a Name and returns its unique
// identifier. PyKMIP's own client does it, for the owner. What may be done
// with the key, Allow says.
func (s *KMIPServer) CreateKey(t testing.TB, name string) string {
	t.Helper()
	return s.Client(t, fmt.Sprintf(`
id = client.create(enums.CryptographicAlgorithm.AES, 256, operation_policy_name=%q, name=%q,
	cryptographic_usage_mask=[enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT])
client.activate(id)
print(id)`, kmipPolicy, name))
}

// Client runs a program in Python, where client is a connected ProxyKmipClient
// of the owner and enums is kmip.enums, and returns what it prints.
func (s *KMIPServer) Client(t testing.TB, program string) string {
	t.Helper()
	host, port, err := net.SplitHostPort(s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd := exec.CommandContext(t.Context(), s.python3, "-W", "ignore", "-c", fmt.Sprintf(`
from kmip import enums
from kmip.pie.client import ProxyKmipClient
with ProxyKmipClient(hostname=%q, port=%s, cert=%q, key=%q, ca=%q, ssl_version="PROTOCOL_TLSv1_2", config_file="/dev/null") as client:
`+"\t"+`%s`, host, port, s.CertFile, s.KeyFile, s.CA.File, strings.ReplaceAll(strings.TrimSpace(program), "\n", "\n\t")))
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("PyKMIP's client: %v\n%s", err, said.String())
	}
	return strings.TrimSpace(string(out))
}

// Deny takes operations on CreateKey's keys away from everybody, and returns
// when that works, as undo does. PyKMIP calls them GET (which Encrypt and
// Decrypt need too), LOCATE, GET_ATTRIBUTES, and so on.
func (s *KMIPServer) Deny(t testing.TB, operations ...string) (undo func()) {
	t.Helper()
	var left []string
	for _, op := range kmipOperations() {
		if !strings.Contains(" "+strings.Join(operations, " ")+" ", " "+op+" ") {
			left = append(left, op)
		}
	}
	s.writePolicy(t, left)
	s.awaitPolicy(t)
	return func() {
		t.Helper()
		s.writePolicy(t, kmipOperations())
		s.awaitPolicy(t)
	}
}

func kmipOperations() []string {
	return []string{"GET", "LOCATE", "GET_ATTRIBUTES", "GET_ATTRIBUTE_LIST", "MODIFY_ATTRIBUTE", "DELETE_ATTRIBUTE", "ACTIVATE", "REVOKE", "DESTROY"}
}

// writePolicy replaces the policy by one that lets the owner do operations.
func (s *KMIPServer) writePolicy(t testing.TB, operations []string) {
	t.Helper()
	var allowed []string
	for _, op := range operations {
		allowed = append(allowed, fmt.Sprintf("%q: %q", op, "ALLOW_OWNER"))
	}
	policy := fmt.Sprintf(`{%q: {"preset": {"SYMMETRIC_KEY": {%s}}}}`, kmipPolicy, strings.Join(allowed, ", "))
	temporary := s.file("policy.new")
	if err := os.WriteFile(temporary, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temporary, s.file("policy/cryptcsi.json")); err != nil {
		t.Fatal(err)
	}
	s.loaded++
}

// awaitPolicy waits until the server, which looks once a second, says that it
// has read the policy as often as it was written.
func (s *KMIPServer) awaitPolicy(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		logs, err := filepath.Glob(s.file("log*")) // it is rotated
		seen := 0
		for _, log := range logs {
			said, _ := os.ReadFile(log)
			seen += strings.Count(string(said), "Loading policy: "+kmipPolicy)
		}
		if seen >= s.loaded {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("pykmip-server has read its policy %d times, not %d (%v)", seen, s.loaded, err)
		}
	}
}
