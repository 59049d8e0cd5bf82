package keyclient_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

func TestNewRefuses(t *testing.T) {
	ca := newAuthority(t)
	good := ca.clientConfig("dns:///key-service:9000")
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		write(t, path, []byte(content))
		return path
	}
	token, network := file("token", "abc"), "dns:///key-service:9000"
	_, otherKey := ca.issue(t.TempDir(), "other", time.Hour)
	for _, tt := range []struct {
		name  string
		edit  func(*keyclient.Config)
		words string
	}{
		{"no address", func(c *keyclient.Config) { c.Address = "" }, "dns:///host:port"},
		{"bare address", func(c *keyclient.Config) { c.Address = "key-service:9000" }, "dns:///host:port"},
		{"another scheme", func(c *keyclient.Config) { c.Address = "xds:///key-service:9000" }, "dns:///host:port"},
		{"a DNS server", func(c *keyclient.Config) { c.Address = "dns://8.8.8.8/key-service:9000" }, "dns:///host:port"},
		{"no port", func(c *keyclient.Config) { c.Address = "dns:///key-service" }, "port"},
		{"port 0", func(c *keyclient.Config) { c.Address = "dns:///key-service:0" }, "port"},
		{"named port", func(c *keyclient.Config) { c.Address = "dns:///key-service:https" }, "port"},
		{"no host", func(c *keyclient.Config) { c.Address = "dns:///:9000" }, "host"},
		{"path", func(c *keyclient.Config) { c.Address = "dns:///a/b:9000" }, "host"},
		{"relative socket", func(c *keyclient.Config) { c.Address = "unix://a.sock" }, "absolute"},
		{"long socket", func(c *keyclient.Config) { c.Address = "unix:///" + strings.Repeat("a", 107) }, "107 bytes"},
		{"odd socket", func(c *keyclient.Config) { c.Address = "unix:///a%20b" }, "absolute"},
		{"protocol", func(c *keyclient.Config) { c.Protocol = "kms" }, "protocol"},
		{"certificate without key", func(c *keyclient.Config) { c.KeyFile = "" }, "both"},
		{"key without certificate", func(c *keyclient.Config) { c.CertFile = "" }, "both"},
		{"certificate without CA", func(c *keyclient.Config) { c.CAFile = "" }, "CA file"},
		{"nobody", func(c *keyclient.Config) { c.CertFile, c.KeyFile = "", "" }, "who we are"},
		{"plaintext", func(c *keyclient.Config) { *c = keyclient.Config{Address: network} }, "loopback"},
		{"plaintext and a CA", func(c *keyclient.Config) { c.AllowPlaintextOverTheNetwork = true }, "mistake"},
		{"server name in plaintext", func(c *keyclient.Config) { *c = keyclient.Config{Address: "dns:///localhost:1", ServerName: "x"} }, "CA file"},
		{"token in plaintext", func(c *keyclient.Config) {
			*c = keyclient.Config{Address: network, TokenFile: token, AllowPlaintextOverTheNetwork: true}
		}, "token"},
		{"token in plaintext on loopback", func(c *keyclient.Config) { *c = keyclient.Config{Address: "dns:///127.0.0.1:1", TokenFile: token} }, "token"},
		{"no CA file", func(c *keyclient.Config) { c.CAFile = filepath.Join(dir, "none") }, "none"},
		{"CA file without PEM", func(c *keyclient.Config) { c.CAFile = token }, "no certificate"},
		{"CA file is a folder", func(c *keyclient.Config) { c.CAFile = dir }, "no regular file"},
		{"huge CA file", func(c *keyclient.Config) { c.CAFile = file("huge", strings.Repeat(" ", 2<<20)) }, "more than"},
		{"another key", func(c *keyclient.Config) { c.KeyFile = otherKey }, good.CertFile},
		{"no token file", func(c *keyclient.Config) { c.TokenFile = filepath.Join(dir, "none") }, "none"},
		{"empty token", func(c *keyclient.Config) { c.TokenFile = file("empty", " \n") }, "0 bytes"},
		{"token of two lines", func(c *keyclient.Config) { c.TokenFile = file("lines", "hunter2\nhunter2") }, "byte 7"},
		{"huge token", func(c *keyclient.Config) { c.TokenFile = file("hugetoken", strings.Repeat("a", 17<<10)) }, "must be"},
	} {
		cfg := good
		tt.edit(&cfg)
		client, err := keyclient.New(cfg)
		mustBe(t, tt.name, err, errdefs.ErrInvalid, tt.words)
		if err == nil {
			client.Close()
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the token is in %v", tt.name, err)
		}
	}
	for name, cfg := range map[string]keyclient.Config{
		"mTLS":                      good,
		"TLS and token":             {Address: network, CAFile: ca.file, TokenFile: token},
		"socket":                    {Address: "unix:///run/x.sock"},
		"socket and token":          {Address: "unix:///run/x.sock", TokenFile: token},
		"loopback":                  {Address: "dns:///[::1]:1"},
		"plaintext":                 {Address: network, AllowPlaintextOverTheNetwork: true},
		"Constellation":             {Address: network, AllowPlaintextOverTheNetwork: true, Protocol: keyclient.ProtocolConstellation},
		"Constellation over TLS":    {Address: network, CAFile: ca.file, Protocol: keyclient.ProtocolConstellation},
		"certificate and token too": {Address: network, CAFile: ca.file, CertFile: good.CertFile, KeyFile: good.KeyFile, TokenFile: token},
	} {
		client, err := keyclient.New(cfg)
		must(t, name, err)
		must(t, name, client.Close())
	}
}

// identity is a server that answers every call with NotFound and notes who
// asked.
type identity struct {
	mu      sync.Mutex
	serials []*big.Int // of the client's certificate
	tokens  []string
	version uint16 // of TLS
	// hold, if set, is sent to and received from before the answer.
	hold chan struct{}
}

func (i *identity) intercept(ctx context.Context, _ string, _ func(context.Context) (any, error)) (any, error) {
	if hold := i.note(ctx); hold != nil {
		hold <- struct{}{}
		<-hold
	}
	return nil, status.Error(codes.NotFound, "there is none")
}

// note notes who asked and says whether to hold the call.
func (i *identity) note(ctx context.Context) (hold chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	p, _ := peer.FromContext(ctx)
	if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
		i.version = info.State.Version
		if certs := info.State.PeerCertificates; len(certs) > 0 {
			i.serials = append(i.serials, certs[0].SerialNumber)
		}
	}
	md, _ := metadata.FromIncomingContext(ctx)
	i.tokens = append(i.tokens, md.Get("authorization")...)
	return i.hold
}

func (i *identity) setHold(hold chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.hold = hold
}

// asked calls a method that the server answers.
func asked(t *testing.T, what string, c *keyclient.Client) {
	t.Helper()
	mustBe(t, what, c.RewrapDEK(t.Context(), id), errdefs.ErrNotFound)
}

func TestCertificateRotated(t *testing.T) {
	ca, who := newAuthority(t), &identity{}
	s := newServer(t, "tcp", ca.serverConfig("localhost"), &service{})
	s.intercept = who.intercept
	s.start()
	cfg := ca.clientConfig(s.address())
	client, dir := open(t, cfg), filepath.Dir(cfg.CertFile)
	for range 2 {
		asked(t, "with the first certificate", client)
	}
	if got := s.accepted.Load(); got != 1 || who.serials[0].Cmp(who.serials[1]) != 0 {
		t.Errorf("%d connections while nothing changed", got)
	}
	if who.version != tls.VersionTLS13 {
		t.Errorf("TLS version %x", who.version)
	}

	// A call under way ends on its connection, those that begin meanwhile
	// show the new certificate.
	hold := make(chan struct{})
	who.setHold(hold)
	under := make(chan error, 1)
	go func() { under <- client.RewrapDEK(context.Background(), id) }()
	<-hold
	who.setHold(nil)
	ca.issue(dir, "node-a", time.Hour)
	asked(t, "with the second certificate", client)
	hold <- struct{}{}
	mustBe(t, "the call under way", <-under, errdefs.ErrNotFound)
	if n := len(who.serials); n != 4 || who.serials[2].Cmp(who.serials[0]) != 0 || who.serials[3].Cmp(who.serials[0]) == 0 {
		t.Errorf("the server saw certificates %v", who.serials)
	}
	if got := s.accepted.Load(); got != 2 {
		t.Errorf("%d connections after one change", got)
	}

	// Half of a change, and no file at all, leave the last good one.
	other, _ := ca.issue(t.TempDir(), "node-a", time.Hour)
	data, err := os.ReadFile(other)
	must(t, "ReadFile", err)
	write(t, cfg.CertFile, data)
	asked(t, "with half a change", client)
	must(t, "Remove", os.Remove(cfg.KeyFile))
	asked(t, "without a key file", client)
	s.intercept = func(context.Context, string, func(context.Context) (any, error)) (any, error) {
		return nil, status.Error(codes.PermissionDenied, "not yours")
	}
	mustBe(t, "refused meanwhile", client.RewrapDEK(t.Context(), id), errdefs.ErrDenied, "not yours", cfg.KeyFile, "no such file")
	s.intercept = who.intercept
	ca.issue(dir, "node-a", time.Hour)
	asked(t, "with the third certificate", client)
	if n := len(who.serials); n != 7 || who.serials[5].Cmp(who.serials[3]) != 0 || who.serials[6].Cmp(who.serials[5]) == 0 {
		t.Errorf("the server saw certificates %v", who.serials)
	}
}

func TestCertificateExpired(t *testing.T) {
	ca, who := newAuthority(t), &identity{}
	s := newServer(t, "tcp", ca.serverConfig("localhost"), &service{})
	s.intercept = who.intercept
	s.start()
	cfg := ca.clientConfig(s.address())
	ca.issue(filepath.Dir(cfg.CertFile), "node-a", -time.Minute)
	cfg.Timeout, cfg.Attempts = 100*time.Millisecond, 2
	client := open(t, cfg)
	mustBe(t, "with an expired certificate", client.RewrapDEK(t.Context(), id), errdefs.ErrUnavailable, "expired at", cfg.CertFile)
	if len(who.serials) != 0 {
		t.Error("the server let an expired certificate in")
	}
	ca.issue(filepath.Dir(cfg.CertFile), "node-a", time.Hour)
	asked(t, "with the next certificate", client)
}

// TestNewCertificateWhileWaiting: a caller who waits gets in with the
// certificate that comes meanwhile.
func TestNewCertificateWhileWaiting(t *testing.T) {
	ca, who := newAuthority(t), &identity{}
	s := newServer(t, "tcp", ca.serverConfig("localhost"), &service{})
	s.intercept = who.intercept
	s.start()
	cfg := ca.clientConfig(s.address())
	ca.issue(filepath.Dir(cfg.CertFile), "node-a", -time.Minute)
	failed := make(chan struct{}, 1000)
	cfg.Timeout, cfg.Attempts = 50*time.Millisecond, 1000
	cfg.Observe = func(keyclient.Call) { failed <- struct{}{} }
	client := open(t, cfg)
	answer := make(chan error, 1)
	go func() { answer <- client.RewrapDEK(context.Background(), id) }()
	<-failed
	ca.issue(filepath.Dir(cfg.CertFile), "node-a", time.Hour)
	mustBe(t, "the call", <-answer, errdefs.ErrNotFound)
}

func TestWhoTheServerIs(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	write(t, ca.file+".token", []byte("abc"))
	at := func(conf *tls.Config) string {
		s := newServer(t, "tcp", conf, &service{})
		s.intercept = (&identity{}).intercept
		return s.start().address()
	}
	old := ca.serverConfig("localhost")
	old.MaxVersion = tls.VersionTLS12
	for _, tt := range []struct {
		name    string
		address string
		edit    func(*keyclient.Config)
		words   string // "": it gets in
	}{
		{"good", at(ca.serverConfig("localhost")), func(*keyclient.Config) {}, ""},
		{"by another name", at(ca.serverConfig("elsewhere")), func(c *keyclient.Config) { c.ServerName = "elsewhere" }, ""},
		{"wrong name", at(ca.serverConfig("elsewhere")), func(*keyclient.Config) {}, "127.0.0.1"},
		{"wrong name asked for", at(ca.serverConfig("localhost")), func(c *keyclient.Config) { c.ServerName = "elsewhere" }, "elsewhere"},
		{"wrong CA", at(ca.serverConfig("localhost")), func(c *keyclient.Config) { c.CAFile = other.file }, "unknown authority"},
		{"wrong client CA", at(ca.serverConfig("localhost")), func(c *keyclient.Config) {
			c.CertFile, c.KeyFile = other.issue(t.TempDir(), "node-a", time.Hour)
		}, "not connected, to be shown the certificate in"}, // TLS 1.3 may or may not tell why
		{"TLS 1.2", at(old), func(*keyclient.Config) {}, "protocol version"},
		{"no TLS", at(nil), func(*keyclient.Config) {}, "does not look like a TLS handshake"},
		{"no client certificate", at(ca.serverConfig("localhost")), func(c *keyclient.Config) {
			c.CertFile, c.KeyFile, c.TokenFile = "", "", ca.file+".token"
		}, "not connected, to be shown the token in"},
		{"refused by our check", at(ca.serverConfig("localhost")), func(c *keyclient.Config) {
			c.VerifyServer = func(tls.ConnectionState) error { return errors.New("not the pinned key") }
		}, "not the pinned key"},
		{"passed by our check", at(ca.serverConfig("localhost")), func(c *keyclient.Config) {
			c.VerifyServer = func(s tls.ConnectionState) error {
				if len(s.VerifiedChains) == 0 {
					return fmt.Errorf("asked before the certificate was verified")
				}
				return nil
			}
		}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cfg := ca.clientConfig(tt.address)
			cfg.Timeout, cfg.Attempts = time.Second, 1
			tt.edit(&cfg)
			if tt.words == "" {
				cfg.Timeout = 0
				asked(t, "it", open(t, cfg))
				return
			}
			mustBe(t, "it", open(t, cfg).RewrapDEK(t.Context(), id), errdefs.ErrUnavailable, tt.address, tt.words)
		})
	}
}

func TestToken(t *testing.T) {
	ca := newAuthority(t)
	for name, conf := range map[string]*tls.Config{"TLS": ca.serverConfig("localhost"), "unix": nil} {
		t.Run(name, func(t *testing.T) {
			network, who, dir := "unix", &identity{}, t.TempDir()
			cfg := keyclient.Config{TokenFile: filepath.Join(dir, "token")}
			if conf != nil {
				network, cfg.CAFile, conf.ClientAuth = "tcp", ca.file, tls.NoClientCert
			}
			s := newServer(t, network, conf, &service{})
			s.intercept = who.intercept
			s.start()
			cfg.Address = s.address()
			project(t, dir, "first\n")
			client := open(t, cfg)
			for range 2 {
				asked(t, "with the first token", client)
			}
			project(t, dir, "secnd\n")
			asked(t, "with the second token", client)
			project(t, dir, "")
			asked(t, "with an empty file", client)
			s.intercept = func(context.Context, string, func(context.Context) (any, error)) (any, error) {
				return nil, status.Error(codes.Unauthenticated, "the token has expired")
			}
			err := client.RewrapDEK(t.Context(), id)
			mustBe(t, "refused", err, errdefs.ErrDenied, "the token has expired", "shown the token in "+cfg.TokenFile, "0 bytes")
			if strings.Contains(err.Error(), "secnd") {
				t.Errorf("the token is in %v", err)
			}
			s.intercept = who.intercept
			project(t, dir, "third")
			asked(t, "with the third token", client)
			want := []string{"Bearer first", "Bearer first", "Bearer secnd", "Bearer secnd", "Bearer third"}
			if !slices.Equal(who.tokens, want) {
				t.Errorf("the server saw %q, want %q", who.tokens, want)
			}
			if got := s.accepted.Load(); got != 1 {
				t.Errorf("%d connections, want 1", got)
			}
		})
	}
}

// project puts a file "token" into dir as kubelet does into a projected
// volume: a folder of its own behind a symbolic link that is replaced.
func project(t *testing.T, dir, content string) {
	t.Helper()
	data, err := os.MkdirTemp(dir, "..data-")
	must(t, "MkdirTemp", err)
	write(t, filepath.Join(data, "token"), []byte(content))
	link := filepath.Join(dir, "..data")
	must(t, "Symlink", os.Symlink(filepath.Base(data), link+"_tmp"))
	must(t, "Rename", os.Rename(link+"_tmp", link))
	if err := os.Symlink("..data/token", filepath.Join(dir, "token")); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
}

// TestUnauthenticatedNamesTheCertificate: the refused can see with what they came.
func TestUnauthenticatedNamesTheCertificate(t *testing.T) {
	ca := newAuthority(t)
	s := newServer(t, "tcp", ca.serverConfig("localhost"), &service{})
	s.intercept = func(context.Context, string, func(context.Context) (any, error)) (any, error) {
		return nil, status.Error(codes.Unauthenticated, "no such node")
	}
	s.start()
	cfg := ca.clientConfig(s.address())
	mustBe(t, "it", open(t, cfg).RewrapDEK(t.Context(), id), errdefs.ErrDenied, "no such node", cfg.CertFile, "CN=node-a", "spiffe://cluster.example/node/node-a")
}
