package keyservice

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Identity is who is asking.
type Identity struct {
	// Name is what policies and the audit log know the caller by: a SPIFFE ID,
	// a certificate's common name, a token's user name, or "local".
	Name string
	// Node is the Kubernetes node that the caller acts for; "" where it is
	// none.
	Node string
}

// Authenticator establishes who is asking.
type Authenticator interface {
	// Identify looks at what came with a call (gRPC's peer and metadata in
	// ctx). ErrNoCredentials where nothing of its kind came; ErrDenied where
	// it did and is not good; ErrUnavailable where that cannot be told now.
	Identify(ctx context.Context) (Identity, error)
}

// TokenReviewer tells whose bearer token it is. ErrDenied where the token is
// not good; ErrUnavailable where that cannot be told now. No error has the
// token in its text.
type TokenReviewer interface {
	Review(ctx context.Context, token string) (Identity, error)
}

// ErrNoCredentials is an Authenticator's that found no credentials of its kind.
var ErrNoCredentials = errors.New("no credentials")

// localName is the name of what Local identifies.
const localName = "local"

// nodePrefix begins the common name of a node's certificate, as Kubernetes has it.
const nodePrefix = "system:node:"

// maxToken bounds a bearer token, in bytes.
const maxToken = 16 << 10

// Certificates identifies by the client certificate of mutual TLS, which the
// TLS configuration has verified:
//
//   - by its SPIFFE ID (the one URI among its names), if it has one. A node's
//     is spiffe://TRUST-DOMAIN/node/NAME or spiffe://TRUST-DOMAIN/ns/NAMESPACE/node/NAME.
//     Any other is an identity without node whose name is the whole ID.
//   - else by its subject's common name. A node's is system:node:NAME, as
//     Kubernetes' kubelets have it. Any other is an identity without node.
//
// So whoever gets a certificate with such a name from the authority is that
// node: the authority must be one that does not sign what anybody asks for.
type Certificates struct {
	// TrustDomain is the one whose SPIFFE IDs are known; "": a certificate with
	// a SPIFFE ID is refused.
	TrustDomain string
	// Clock is nil for time.Now. A certificate that expires ends what its
	// connection may do.
	Clock func() time.Time
}

// Identify is Authenticator's.
func (c Certificates) Identify(ctx context.Context) (Identity, error) {
	p, _ := peer.FromContext(ctx)
	if p == nil {
		return Identity{}, ErrNoCredentials
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return Identity{}, ErrNoCredentials
	}
	now := time.Now
	if c.Clock != nil {
		now = c.Clock
	}
	cert := info.State.VerifiedChains[0][0]
	if now().After(cert.NotAfter) {
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate expired at %s: renew it and connect again", cert.NotAfter.UTC().Format(time.RFC3339))
	}
	if len(cert.URIs) > 0 {
		return c.spiffe(cert.URIs)
	}
	return subject(cert)
}

// spiffe is the identity of a certificate with URIs.
func (c Certificates) spiffe(uris []*url.URL) (Identity, error) {
	u := uris[0]
	switch {
	case len(uris) > 1 || u.Scheme != "spiffe" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "":
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate has names that are URIs but not exactly one SPIFFE ID")
	case c.TrustDomain == "" || u.Host != c.TrustDomain:
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate's SPIFFE ID is of the trust domain %.300q, which the key service is not configured for", u.Host)
	}
	id := Identity{Name: u.String()}
	// What is escaped would let two texts name one node.
	if u.RawPath != "" || !validName(id.Name) || strings.Contains(id.Name, "%") {
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate's SPIFFE ID is malformed")
	}
	parts := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	if len(parts) == 4 && parts[0] == "ns" && parts[1] != "" {
		parts = parts[2:]
	}
	if len(parts) == 2 && parts[0] == "node" {
		id.Node = parts[1]
		if id.Node == "" {
			return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate's SPIFFE ID names no node")
		}
	}
	return id, nil
}

// subject is the identity of a certificate without URIs.
func subject(cert *x509.Certificate) (Identity, error) {
	name := cert.Subject.CommonName
	node, isNode := strings.CutPrefix(name, nodePrefix)
	switch {
	case !validName(name) || isNode && node == "":
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate has neither a SPIFFE ID nor a common name that could be an identity's")
	case name == localName || strings.HasPrefix(name, "spiffe:"):
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the client certificate's common name %q is how others are named", name)
	}
	if !isNode {
		node = ""
	}
	return Identity{Name: name, Node: node}, nil
}

// validName says whether an identity may be called that: as in a DEK's ID,
// what can stand in a log line as it is.
func validName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}

// Tokens identifies by a bearer token in the call's metadata. Whoever reaches
// the port can send tokens that have to be reviewed, so the calls that wait for
// that are bounded; those beyond are refused at once, with ErrUnavailable. Use
// a pointer to it.
type Tokens struct {
	Reviewer TokenReviewer
	// MaxWaiting bounds the calls that wait for a review, some tens of KiB of
	// memory each; 0: 4096.
	MaxWaiting int
	// MaxWaitingPerHost bounds those of one network address, so that one
	// stranger cannot take the places of all; 0: 64.
	MaxWaitingPerHost int

	mu      sync.Mutex
	waiting int
	hosts   map[string]int // waiting, by address
}

// Identify is Authenticator's.
func (t *Tokens) Identify(ctx context.Context) (Identity, error) {
	values := metadata.ValueFromIncomingContext(ctx, "authorization")
	if len(values) == 0 {
		return Identity{}, ErrNoCredentials
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(scheme, "bearer") || token == "" || len(token) > maxToken {
		return Identity{}, errdefs.Errorf(errdefs.ErrDenied, "the call's authorization is not one bearer token")
	}
	host := hostOf(ctx)
	if err := t.enter(host); err != nil {
		return Identity{}, err
	}
	defer t.leave(host)
	id, err := t.Reviewer.Review(ctx, token)
	if err == nil && (!validName(id.Name) || id.Name == localName) {
		err = errdefs.Errorf(errdefs.ErrDenied, "the token's user has a name of %d bytes that cannot be an identity's", len(id.Name))
	}
	if err != nil {
		return Identity{}, err
	}
	return id, nil
}

// enter takes a place among the calls that wait for a review.
func (t *Tokens) enter(host string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if most := cmp.Or(t.MaxWaitingPerHost, 64); t.hosts[host] >= most {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%d calls from its address wait for the review of their tokens already", most)
	}
	if most := cmp.Or(t.MaxWaiting, 4096); t.waiting >= most {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%d calls wait for the review of their tokens already", most)
	}
	if t.hosts == nil {
		t.hosts = map[string]int{}
	}
	t.waiting++
	t.hosts[host]++
	return nil
}

func (t *Tokens) leave(host string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting--
	if t.hosts[host]--; t.hosts[host] == 0 {
		delete(t.hosts, host)
	}
}

// hostOf is the caller's address without its port; "" where it has none.
func hostOf(ctx context.Context) string {
	host, _, err := net.SplitHostPort(peerOf(ctx))
	if err != nil {
		return ""
	}
	return host
}

// Local identifies whoever comes over a unix socket, or over loopback without
// TLS, as "local": every process of the machine that reaches it. It is for
// tests and for a single node.
type Local struct {
	Node string // that "local" acts for, if any
}

// Identify is Authenticator's.
func (l Local) Identify(ctx context.Context) (Identity, error) {
	p, _ := peer.FromContext(ctx)
	if p == nil || p.Addr == nil {
		return Identity{}, ErrNoCredentials
	}
	if _, tls := p.AuthInfo.(credentials.TLSInfo); tls || !isLocal(p.Addr) {
		return Identity{}, ErrNoCredentials
	}
	return Identity{Name: localName, Node: l.Node}, nil
}

func isLocal(a net.Addr) bool {
	switch a := a.(type) {
	case *net.UnixAddr:
		return true
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	}
	return false
}

// identify asks the authenticators. Its error is the caller's answer, reason
// is for the audit log alone.
func (s *Server) identify(ctx context.Context) (id Identity, reason string, err error) {
	for _, a := range s.cfg.Authenticators {
		id, err := a.Identify(ctx)
		switch {
		case errors.Is(err, ErrNoCredentials):
			continue
		case err == nil:
			return id, "", nil
		case errors.Is(err, errdefs.ErrDenied):
			return Identity{}, err.Error(), unauthenticated("its credentials were refused: the key service's audit log says why")
		case ctx.Err() != nil:
			return Identity{}, err.Error(), err
		}
		return Identity{}, err.Error(), errdefs.Errorf(errdefs.ErrUnavailable, "who the caller is cannot be established now: call again")
	}
	const none = "it came with no credentials that the key service looks at"
	return Identity{}, none, unauthenticated(none)
}

func unauthenticated(why string) error {
	return status.Error(codes.Unauthenticated, "who the caller is could not be established: "+why)
}
