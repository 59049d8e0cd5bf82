package keyclient

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/keepalive"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
)

const (
	// pingAfter and pingTimeout are how soon a dead peer is noticed: their sum.
	pingAfter   = 20 * time.Second
	pingTimeout = 10 * time.Second
	// The pauses between tries to connect. A key service that is back is
	// found while callers still wait.
	connectBackoff    = 200 * time.Millisecond
	connectBackoffMax = 5 * time.Second
	connectTimeout    = 5 * time.Second
	// maxPath is the longest path that fits into a socket address.
	maxPath = 107
	// spread makes clients begin at different replicas of the key service.
	spread = `{"loadBalancingConfig":[{"pick_first":{"shuffleAddressList":true}}]}`
	// maxAnswer and maxHeaders bound what an answer may take, in bytes.
	maxAnswer  = 1 << 20
	maxHeaders = 64 << 10
)

// address is a parsed Config.Address.
type address struct {
	unix     bool
	loopback bool
}

func parseAddress(s string) (address, error) {
	if path, ok := strings.CutPrefix(s, "unix://"); ok {
		if !filepath.IsAbs(path) || len(path) > maxPath || strings.ContainsAny(path, "%?#") {
			return address{}, fmt.Errorf("a unix socket is written unix:///absolute/path, without %%, ? and #, and the path has at most %d bytes", maxPath)
		}
		return address{unix: true}, nil
	}
	hostPort, ok := strings.CutPrefix(s, "dns:///")
	if !ok {
		return address{}, errors.New("an address must be dns:///host:port or unix:///path")
	}
	host, port, err := net.SplitHostPort(hostPort)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || host == "" || strings.ContainsAny(host, "/%?#@ ") {
		return address{}, errors.New("an address must be dns:///host:port, the port a number")
	}
	ip, err := netip.ParseAddr(host)
	return address{loopback: host == "localhost" || err == nil && ip.IsLoopback()}, nil
}

// validate says what in cfg cannot work together.
func (cfg Config) validate() (address, error) {
	a, err := parseAddress(cfg.Address)
	if err != nil {
		return address{}, err
	}
	encrypted, local := cfg.CAFile != "", a.unix || a.loopback
	switch {
	case cfg.Protocol != ProtocolKeyService && cfg.Protocol != ProtocolConstellation:
		return address{}, fmt.Errorf("protocol %.40q: must be empty or %s", cfg.Protocol, ProtocolConstellation)
	case (cfg.CertFile == "") != (cfg.KeyFile == ""):
		return address{}, errors.New("a client certificate needs both its file and its key's file")
	case !encrypted && (cfg.CertFile != "" || cfg.ServerName != "" || cfg.VerifyServer != nil):
		return address{}, errors.New("a client certificate, a server name or a check of the server needs a CA file: without it the connection is plaintext")
	case encrypted && cfg.AllowPlaintextOverTheNetwork:
		return address{}, errors.New("plaintext over the network is allowed and a CA file is given: one of them is a mistake")
	case !encrypted && cfg.TokenFile != "" && !a.unix:
		return address{}, errors.New("a token is sent only over TLS (give a CA file) or a unix socket")
	case !encrypted && !local && !cfg.AllowPlaintextOverTheNetwork:
		return address{}, errors.New("plaintext is for unix sockets and loopback addresses: give a CA file, or allow plaintext over the network")
	case encrypted && cfg.CertFile == "" && cfg.TokenFile == "" && cfg.Protocol == ProtocolKeyService:
		return address{}, errors.New("nothing says who we are: give a client certificate or a token file")
	}
	return a, nil
}

// connection is a gRPC connection with the files that it was made from.
type connection struct {
	conn          *grpc.ClientConn
	keys          keyservicev1.KeyServiceClient
	admin         keyservicev1.AdminClient
	recovery      keyservicev1.RecoveryClient
	constellation constellationv1.APIClient
	files         []watched
	certificate   *x509.Certificate // ours; nil: none
	calls         int               // under way, guarded by Client.mu
}

// close ends the connection and all calls on it.
func (c *connection) close() { _ = c.conn.Close() } // fails only where it was closed before

// acquire returns the connection for one attempt, a new one where files have
// changed. The caller releases it.
func (c *Client) acquire() (*connection, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == nil {
		return nil, errClosed
	}
	if changed(c.current.files) {
		c.renew()
	} else {
		c.fileErr = nil
	}
	c.current.calls++
	return c.current, nil
}

// renew replaces the connection by one from the files as they are now, if they
// are good. Calls under way end on the former one.
func (c *Client) renew() {
	fresh, err := c.dial()
	c.fileErr = err
	if err != nil {
		return
	}
	former := c.current
	c.current = fresh
	c.live[fresh] = struct{}{}
	c.endUnused(former)
}

func (c *Client) release(conn *connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn.calls--
	c.endUnused(conn)
}

// endUnused closes a former connection once the last call on it is over.
func (c *Client) endUnused(conn *connection) {
	if _, ok := c.live[conn]; ok && conn != c.current && conn.calls == 0 {
		delete(c.live, conn)
		conn.close()
	}
}

// dial makes a connection from the files as they are now. Nothing is sent yet.
func (c *Client) dial() (*connection, error) {
	made := &connection{}
	creds, err := c.credentials(made)
	if err != nil {
		return nil, err
	}
	made.conn, err = grpc.NewClient(c.cfg.Address, append(c.tokenOption(),
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultServiceConfig(spread),
		grpc.WithDisableRetry(), // Client.call does that
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: connectBackoff, Multiplier: 1.6, Jitter: 0.2, MaxDelay: connectBackoffMax},
			MinConnectTimeout: connectTimeout,
		}),
		// Servers of other makers may end a connection that pings when there
		// is no call.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: pingAfter, Timeout: pingTimeout, PermitWithoutStream: c.cfg.Protocol == ProtocolKeyService,
		}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithMaxHeaderListSize(maxHeaders),
	)...)
	if err != nil {
		return nil, err
	}
	made.keys = keyservicev1.NewKeyServiceClient(made.conn)
	made.admin = keyservicev1.NewAdminClient(made.conn)
	made.recovery = keyservicev1.NewRecoveryClient(made.conn)
	made.constellation = constellationv1.NewAPIClient(made.conn)
	return made, nil
}

func (c *Client) tokenOption() []grpc.DialOption {
	if c.token == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithPerRPCCredentials(c.token)}
}

// credentials reads our files for made and says how its connections begin.
func (c *Client) credentials(made *connection) (credentials.TransportCredentials, error) {
	switch {
	case c.cfg.CAFile == "" && (c.address.unix || c.address.loopback):
		return local.NewCredentials(), nil // fails where a name is no loopback address after all
	case c.cfg.CAFile == "":
		return insecure.NewCredentials(), nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: c.cfg.ServerName, RootCAs: x509.NewCertPool(), VerifyConnection: c.cfg.VerifyServer}
	ca, err := made.read(c.cfg.CAFile)
	if err != nil {
		return nil, err
	}
	if !conf.RootCAs.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("CA file %s holds no certificate in PEM", c.cfg.CAFile)
	}
	if c.cfg.CertFile == "" {
		return credentials.NewTLS(conf), nil
	}
	ours, err := made.readCertificate(c.cfg.CertFile, c.cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	made.certificate = ours.Leaf
	// Shown whomever the server trusts, so that it says what it dislikes.
	conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &ours, nil }
	return credentials.NewTLS(conf), nil
}

func (c *connection) readCertificate(certFile, keyFile string) (tls.Certificate, error) {
	chain, err := c.read(certFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := c.read(keyFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate %s with key %s: %w", certFile, keyFile, err)
	}
	return pair, nil
}

// read reads a file and remembers it as one that the connection is made from.
func (c *connection) read(path string) ([]byte, error) {
	w, data, err := readWatched(path)
	c.files = append(c.files, w)
	return data, err
}
