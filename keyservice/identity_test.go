package keyservice_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

// overTLS is the context of a call by who showed that certificate.
func overTLS(t *testing.T, cert *x509.Certificate) context.Context {
	state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}, VerifiedChains: [][]*x509.Certificate{{cert}}}
	return peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}, AuthInfo: credentials.TLSInfo{State: state}})
}

func TestCertificates(t *testing.T) {
	day := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		cn   string
		uris []string
		want keyservice.Identity // zero: ErrDenied
	}{
		{"system:node:worker-1", nil, keyservice.Identity{Name: "system:node:worker-1", Node: "worker-1"}},
		{"operator", nil, keyservice.Identity{Name: "operator"}},
		{"SYSTEM:node:worker-1", nil, keyservice.Identity{Name: "SYSTEM:node:worker-1"}},
		{"xsystem:node:worker-1", nil, keyservice.Identity{Name: "xsystem:node:worker-1"}},
		{"ignored", []string{"spiffe://example.org/ns/a/node/worker-1"}, keyservice.Identity{Name: "spiffe://example.org/ns/a/node/worker-1", Node: "worker-1"}},
		{"system:node:x", []string{"spiffe://example.org/node/worker-1"}, keyservice.Identity{Name: "spiffe://example.org/node/worker-1", Node: "worker-1"}},
		{"system:node:x", []string{"spiffe://example.org/ns/a/sa/b"}, keyservice.Identity{Name: "spiffe://example.org/ns/a/sa/b"}},
		{"", []string{"spiffe://example.org/ns/a/sa/b/node/c"}, keyservice.Identity{Name: "spiffe://example.org/ns/a/sa/b/node/c"}},
		{"", []string{"spiffe://example.org/sa/a/node/c"}, keyservice.Identity{Name: "spiffe://example.org/sa/a/node/c"}},
		{"", []string{"spiffe://example.org/node/a/b"}, keyservice.Identity{Name: "spiffe://example.org/node/a/b"}},
		{"", nil, keyservice.Identity{}},
		{"a b", nil, keyservice.Identity{}},
		{"ümlaut", nil, keyservice.Identity{}},
		{strings.Repeat("x", 257), nil, keyservice.Identity{}},
		{"system:node:", nil, keyservice.Identity{}},
		{"local", nil, keyservice.Identity{}},
		{"spiffe://example.org/node/worker-1", nil, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.com/node/worker-1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.org.evil/node/worker-1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.org:1/node/worker-1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://u@example.org/node/worker-1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.org/node/worker%2d1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.org/node/"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe:///node/worker-1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.org/node/worker-1?x"}, keyservice.Identity{}},
		{"system:node:x", []string{"https://example.org/node/worker-1"}, keyservice.Identity{}},
		{"system:node:x", []string{"spiffe://example.org/node/a", "spiffe://example.org/node/b"}, keyservice.Identity{}},
	} {
		cert := &x509.Certificate{Subject: pkix.Name{CommonName: tt.cn}, NotAfter: day}
		for _, raw := range tt.uris {
			u, err := url.Parse(raw)
			must(t, raw, err)
			cert.URIs = append(cert.URIs, u)
		}
		now := day
		c := keyservice.Certificates{TrustDomain: "example.org", Clock: func() time.Time { return now }}
		got, err := c.Identify(overTLS(t, cert))
		if got != tt.want || (err == nil) != (tt.want != keyservice.Identity{}) || err != nil && !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("CN %q, URIs %q: %+v, %v; want %+v", tt.cn, tt.uris, got, err, tt.want)
		}
		now = day.Add(time.Second)
		if got, err := c.Identify(overTLS(t, cert)); !errors.Is(err, errdefs.ErrDenied) || got != (keyservice.Identity{}) {
			t.Errorf("CN %q, URIs %q, expired: %+v, %v", tt.cn, tt.uris, got, err)
		}
		if len(tt.uris) > 0 {
			now = day
			c.TrustDomain = ""
			if got, err := c.Identify(overTLS(t, cert)); !errors.Is(err, errdefs.ErrDenied) {
				t.Errorf("URIs %q without a trust domain: %+v, %v", tt.uris, got, err)
			}
		}
	}
	for what, ctx := range map[string]context.Context{
		"no peer": t.Context(),
		"no TLS":  peer.NewContext(t.Context(), &peer.Peer{}),
		"a certificate that nobody verified": peer.NewContext(t.Context(), &peer.Peer{AuthInfo: credentials.TLSInfo{
			State: tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: "operator"}}}},
		}}),
	} {
		if _, err := (keyservice.Certificates{}).Identify(ctx); !errors.Is(err, keyservice.ErrNoCredentials) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// reviewer knows one token.
type reviewer struct{ err error }

func (r reviewer) Review(_ context.Context, token string) (keyservice.Identity, error) {
	if r.err != nil {
		return keyservice.Identity{}, r.err
	}
	switch token {
	case "good":
		return keyservice.Identity{Name: "system:serviceaccount:ns:csi", Node: "worker-1"}, nil
	case "odd":
		return keyservice.Identity{Name: "local"}, nil
	}
	return keyservice.Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the token is for another audience")
}

func TestTokens(t *testing.T) {
	with := func(values ...string) context.Context {
		return metadata.NewIncomingContext(t.Context(), metadata.MD{"authorization": values})
	}
	auth := &keyservice.Tokens{Reviewer: reviewer{}}
	for _, good := range []string{"Bearer good", "bearer good"} {
		got, err := auth.Identify(with(good))
		if err != nil || got != (keyservice.Identity{Name: "system:serviceaccount:ns:csi", Node: "worker-1"}) {
			t.Errorf("%q: %+v, %v", good, got, err)
		}
	}
	for _, bad := range [][]string{{"Bearer bad"}, {"good"}, {"Bearer "}, {""}, {"Basic good"}, {"Bearer good", "Bearer good"}, {"Bearer odd"}, {"Bearer " + strings.Repeat("x", 17<<10)}} {
		if got, err := auth.Identify(with(bad...)); !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("%.30q: %+v, %v", bad, got, err)
		}
	}
	if _, err := auth.Identify(t.Context()); !errors.Is(err, keyservice.ErrNoCredentials) {
		t.Errorf("without a token: %v", err)
	}
}

func TestLocal(t *testing.T) {
	at := func(a net.Addr, info credentials.AuthInfo) context.Context {
		return peer.NewContext(t.Context(), &peer.Peer{Addr: a, AuthInfo: info})
	}
	auth := keyservice.Local{Node: "n"}
	for what, ctx := range map[string]context.Context{
		"a socket": at(&net.UnixAddr{Net: "unix"}, nil),
		"IPv4":     at(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}, nil),
		"IPv6":     at(&net.TCPAddr{IP: net.IPv6loopback}, nil),
	} {
		if got, err := auth.Identify(ctx); err != nil || got != (keyservice.Identity{Name: "local", Node: "n"}) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	for what, ctx := range map[string]context.Context{
		"nobody":          t.Context(),
		"another machine": at(&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}, nil),
		"any address":     at(&net.TCPAddr{}, nil),
		"TLS":             at(&net.TCPAddr{IP: net.IPv6loopback}, credentials.TLSInfo{}),
	} {
		if got, err := auth.Identify(ctx); !errors.Is(err, keyservice.ErrNoCredentials) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
}

// TestTokenOverTheWire: the first authenticator that finds something decides,
// and what is wrong with a token stays in the audit log.
func TestTokenOverTheWire(t *testing.T) {
	var fail atomic.Value
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		w.files.Optional = true
		cfg.Authenticators = []keyservice.Authenticator{
			&keyservice.Tokens{Reviewer: reviewerFunc(func(ctx context.Context, token string) (keyservice.Identity, error) {
				if err, ok := fail.Load().(error); ok {
					return keyservice.Identity{}, err
				}
				return reviewer{}.Review(ctx, token)
			})},
			keyservice.Certificates{},
		}
	})
	w.create(t, vol)
	token := func(text string) context.Context {
		return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+text)
	}
	anon, cert := w.client(t), w.as(t, node)
	_, _, err := anon.get(token("good"), vol)
	must(t, "a good token", err)
	_, _, err = cert.get(t.Context(), vol)
	must(t, "a certificate", err)
	w.audit.take(t)
	for _, c := range []*client{anon, cert} {
		_, _, err = c.get(token("hunter2"), vol)
		mustCode(t, "a bad token", err, codes.Unauthenticated)
		if strings.Contains(err.Error(), "audience") {
			t.Errorf("a stranger is told %v", err)
		}
	}
	log := w.audit.String() + w.log.String()
	if !strings.Contains(log, "another audience") || strings.Contains(log, "hunter2") {
		t.Errorf("the audit log lacks the reason or shows the token: %s", log)
	}
	fail.Store(errors.New("no API server"))
	_, _, err = anon.get(token("good"), vol)
	mustCode(t, "a token that cannot be reviewed", err, codes.Unavailable)
}

type reviewerFunc func(ctx context.Context, token string) (keyservice.Identity, error)

func (f reviewerFunc) Review(ctx context.Context, token string) (keyservice.Identity, error) {
	return f(ctx, token)
}

// TestCertificatesRotate: the server's certificate and the clients' authority
// change under a server that runs.
func TestCertificatesRotate(t *testing.T) {
	w := start(t, roles)
	w.create(t, vol)
	oldCA, oldCert := w.ca, w.ca.named(t, node)
	_, _, err := w.client(t, oldCert).get(t.Context(), vol)
	must(t, "before", err)

	// A broken file changes nothing.
	good, err := os.ReadFile(w.files.Key)
	must(t, "reading", err)
	must(t, "writing", os.WriteFile(w.files.Key, []byte("broken"), 0o600))
	for range 3 {
		_, _, err = w.client(t, oldCert).get(t.Context(), vol)
		must(t, "with a broken file", err)
	}
	if n := strings.Count(w.log.String(), "not used"); n != 1 || strings.Contains(w.log.String(), string(good)) {
		t.Errorf("the broken file was told of %d times, or shown: %s", n, w.log)
	}

	// Another authority for everybody.
	w.ca = newAuthority(t)
	w.ca.write(t, dirOf(w.files.Cert))
	_, _, err = w.as(t, node).get(t.Context(), vol)
	must(t, "with everything new", err)
	_, _, err = w.client(t, oldCert).get(t.Context(), vol)
	mustCode(t, "a certificate of the old authority", err, codes.Unavailable)
	w.ca = oldCA
	_, _, err = w.client(t, oldCert).get(t.Context(), vol)
	mustCode(t, "a client that trusts the old authority", err, codes.Unavailable)
}

func dirOf(path string) string { return path[:strings.LastIndex(path, "/")] }

// TestACertificateExpires: in the handshake, and under a connection.
func TestACertificateExpires(t *testing.T) {
	var ahead atomic.Int64
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		clock := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
		cfg.Authenticators = []keyservice.Authenticator{keyservice.Certificates{Clock: clock}}
	})
	w.create(t, vol)
	expired := w.ca.named(t, node, func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	_, _, err := w.client(t, expired).get(t.Context(), vol)
	mustCode(t, "an expired certificate", err, codes.Unavailable) // no connection

	c := w.as(t, node)
	_, _, err = c.get(t.Context(), vol)
	must(t, "a good certificate", err)
	ahead.Store(int64(2 * time.Hour))
	_, _, err = c.get(t.Context(), vol)
	mustCode(t, "a certificate that expired under its connection", err, codes.Unauthenticated)
}

// TestTLSDemands: TLS 1.3, a client certificate, for clients.
func TestTLSDemands(t *testing.T) {
	w := start(t, roles)
	w.create(t, vol)
	_, _, err := w.client(t).get(t.Context(), vol)
	mustCode(t, "no certificate", err, codes.Unavailable)
	_, _, err = w.client(t, newAuthority(t).named(t, node)).get(t.Context(), vol)
	mustCode(t, "a certificate of a stranger", err, codes.Unavailable)
	server := w.ca.named(t, node, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	_, _, err = w.client(t, server).get(t.Context(), vol)
	mustCode(t, "a server's certificate", err, codes.Unavailable)
	conf, err := w.files.Config()
	must(t, "Config", err)
	each, err := conf.GetConfigForClient(nil)
	must(t, "GetConfigForClient", err)
	for _, c := range []*tls.Config{conf, each} {
		if c.MinVersion != tls.VersionTLS13 || !c.SessionTicketsDisabled || c.ClientAuth != tls.RequireAndVerifyClientCert {
			t.Errorf("TLS from %#x, tickets disabled: %v, clients: %v", c.MinVersion, c.SessionTicketsDisabled, c.ClientAuth)
		}
	}
}

func TestTLSFilesRefused(t *testing.T) {
	a := newAuthority(t)
	for what, edit := range map[string]func(f keyservice.TLSFiles) error{
		"no certificate": func(f keyservice.TLSFiles) error { return os.Remove(f.Cert) },
		"no authority":   func(f keyservice.TLSFiles) error { return os.WriteFile(f.ClientCA, nil, 0o600) },
		"another's key":  func(f keyservice.TLSFiles) error { return os.Rename(a.write(t, t.TempDir()).Key, f.Key) },
		"a directory":    func(f keyservice.TLSFiles) error { return errors.Join(os.Remove(f.Key), os.Mkdir(f.Key, 0o700)) },
	} {
		f := a.write(t, t.TempDir())
		must(t, what, edit(f))
		if _, err := f.Config(); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestStrangersInTheWay: whoever is not known yet, or may not, takes no place
// from who may, and not all that wait for their review come from one host.
func TestStrangersInTheWay(t *testing.T) {
	reviewing, hold := make(chan struct{}, 100), make(chan struct{})
	held := reviewerFunc(func(ctx context.Context, _ string) (keyservice.Identity, error) {
		reviewing <- struct{}{}
		select {
		case <-hold:
		case <-ctx.Done():
		}
		return keyservice.Identity{}, errdefs.Errorf(errdefs.ErrDenied, "nobody")
	})
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		cfg.MaxInFlight, cfg.MaxWaiting = 1, -1
		cfg.Authenticators = []keyservice.Authenticator{&keyservice.Tokens{Reviewer: held, MaxWaitingPerHost: 8}, keyservice.Certificates{}}
	})
	w.create(t, vol)
	stranger := w.as(t, "stranger")
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer x")
	refused := make(chan error, 9)
	for i := range 8 {
		go func() {
			if i%2 == 0 {
				_, err := stranger.Status(ctx, &keyservicev1.StatusRequest{})
				refused <- err
				return
			}
			_, _, err := stranger.get(ctx, vol)
			refused <- err
		}()
		<-reviewing
	}
	_, _, err := stranger.get(ctx, vol)
	mustCode(t, "one stranger too many", err, codes.Unavailable)
	_, _, err = stranger.get(t.Context(), vol) // known, and may not
	mustCode(t, "who may not", err, codes.PermissionDenied)
	_, _, err = w.as(t, node).get(t.Context(), vol)
	must(t, "who may, with one place for all", err)
	_, err = w.as(t, operator).Status(t.Context(), &keyservicev1.StatusRequest{})
	must(t, "an operator", err)
	close(hold)
	for range 8 {
		mustCode(t, "a stranger", <-refused, codes.Unauthenticated)
	}
}

// TestWaitingForReviews: so many of one host, so many in all, and a place is
// free again when a review ends.
func TestWaitingForReviews(t *testing.T) {
	reviewing, next := make(chan struct{}), make(chan struct{})
	auth := &keyservice.Tokens{MaxWaiting: 3, MaxWaitingPerHost: 2, Reviewer: reviewerFunc(func(context.Context, string) (keyservice.Identity, error) {
		reviewing <- struct{}{}
		<-next
		return keyservice.Identity{Name: "somebody"}, nil
	})}
	from := func(host byte, port int) context.Context {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.MD{"authorization": {"Bearer x"}})
		return peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, host), Port: port}})
	}
	ended := make(chan error, 4)
	ask := func(host byte, port int) {
		t.Helper()
		go func() { _, err := auth.Identify(from(host, port)); ended <- err }()
		<-reviewing
	}
	full := func(host byte, says string) {
		t.Helper()
		if _, err := auth.Identify(from(host, 9)); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), says) {
			t.Errorf("one too many: %v", err)
		}
	}
	ask(1, 1)
	ask(1, 2)
	full(1, "from its address")
	ask(2, 1)
	full(3, "3 calls wait")
	next <- struct{}{}
	must(t, "a review", <-ended)
	ask(3, 1)
	full(2, "3 calls wait")
	for range 3 {
		next <- struct{}{}
		must(t, "a review", <-ended)
	}
	ask(1, 1)
	ask(1, 2)
	full(1, "from its address")
	for range 2 {
		next <- struct{}{}
		must(t, "a review", <-ended)
	}
}
