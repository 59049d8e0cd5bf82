// Package keyclient is the key service's client. A [Client] has the methods of
// a keyring, so that callers cannot tell a key service from keys of their own.
//
// # Connection
//
// A process has one Client, and a Client one gRPC connection that carries all
// calls. It is made at the first call and again whenever it breaks. Pings find
// a dead peer within half a minute, also while nothing is asked. Environment
// variables for proxies and service configurations out of the DNS are ignored.
//
// Files of certificates and tokens are read again when they change: before
// each call they are looked at, and calls that begin after a change show the
// new ones, on a new connection where certificates changed. Files that cannot
// be used leave the last good ones in use, and errors say so.
//
// # What holds whatever fails
//
// All methods are idempotent. An answer that was lost is asked for again: a
// method tries a few times, each within a bounded time, while the key service
// is ErrUnavailable. An answer is believed only if it is about the ID that was
// asked for and every field of it has its form; all else is ErrCorrupt.
//
// # Keys in memory
//
// Keys travel sealed (HPKE) to a key pair that is made for one attempt, and
// are opened into a [secret.Bytes]. The buffers of gRPC and TLS hold only the
// sealed form. What crypto/hpke opened is cleared as soon as it is copied. The
// private half of the pair and what HPKE derives from it stay in the garbage
// collector's heap until it reuses them; by then they open one old answer.
// The protocol of Constellation has none of this: see [ProtocolConstellation].
package keyclient

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Protocol is what a key service speaks.
type Protocol string

// The protocols.
const (
	// ProtocolKeyService is our own key service's, the default.
	ProtocolKeyService Protocol = ""
	// ProtocolConstellation is that of Constellation's key service. It knows
	// GetDEK alone, for IDs that are the UUID of a LUKS header; every other
	// method is ErrInvalid. The key comes as it is, not sealed, so copies of
	// it stay in buffers of gRPC until they are reused.
	ProtocolConstellation Protocol = "constellation"
)

// Config says where the key service is and who we are.
type Config struct {
	// Address is dns:///host:port or unix:///path.
	Address string
	// CAFile has the certificates (PEM) of those who may vouch for the key
	// service. With it the connection is TLS 1.3; the system's own
	// certificates are never used. Without it the connection is plaintext,
	// which takes a unix socket or a loopback address.
	CAFile string
	// CertFile and KeyFile are our certificate with its chain, and its key (PEM).
	CertFile, KeyFile string
	// ServerName is what the key service's certificate has to be for; "" is
	// the host in Address.
	ServerName string
	// VerifyServer, if set, is asked at the end of each TLS handshake, after
	// the certificate was found good; its error ends the connection.
	VerifyServer func(tls.ConnectionState) error
	// TokenFile has a token that goes along with each call. It is never sent
	// but over TLS or a unix socket.
	TokenFile string
	// AllowPlaintextOverTheNetwork allows plaintext to any address. Whoever
	// is on the way can then ask for keys in our name and read what
	// Constellation's protocol carries.
	AllowPlaintextOverTheNetwork bool
	// WithoutKeys makes GetDEK, CreateDEK and CloneDEK return DEKs without
	// their keys: all that a controller, who has no use for them, may have.
	WithoutKeys bool
	// Protocol of the key service.
	Protocol Protocol
	// Timeout bounds each attempt, connecting included; 0 is 25 s: more than the
	// 20 s of the key service, because who gives up before it and asks again
	// stands at the end of its queue.
	Timeout time.Duration
	// Attempts bounds how often a method asks in all while the key service is
	// ErrUnavailable; 0 is 4, 1 never asks again.
	Attempts int
	// Backoff is the longest pause before the second attempt; it doubles
	// with each further one. 0 is 200 ms.
	Backoff time.Duration
	// Observe, if set, is told of each attempt when it is over. It is called
	// concurrently.
	Observe func(Call)
}

// Call is one attempt of one method.
type Call struct {
	Method string // as the Client has it: "GetDEK"
	// Code is gRPC's name of the answer's code: "OK", "Unavailable";
	// "DataLoss" also where the answer failed our checks.
	Code     string
	Duration time.Duration
	Attempt  int // of this call, from 1
}

// Client asks a key service. Methods may be called concurrently and are
// idempotent. Errors are of errdefs' classes or ctx's, and name the key
// service's address; ErrUnavailable means that a change may have happened, and
// calling again finds out.
type Client struct {
	cfg     Config
	address address
	token   *tokenFile // nil: none

	mu      sync.Mutex
	current *connection              // nil once closed
	live    map[*connection]struct{} // current, and former ones with calls under way
	fileErr error                    // why files that changed are not in use
}

// New checks cfg and reads the files in it; ErrInvalid says what cannot work.
// It asks nobody: a key service that is away shows at the first call.
func New(cfg Config) (*Client, error) {
	address, err := cfg.validate()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "key service %.300q: %w", cfg.Address, err)
	}
	c := &Client{cfg: cfg.withDefaults(), address: address, live: map[*connection]struct{}{}}
	if cfg.TokenFile != "" {
		if c.token, err = newTokenFile(cfg.TokenFile); err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "key service %s: %w", cfg.Address, err)
		}
	}
	if c.current, err = c.dial(); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "key service %s: %w", cfg.Address, err)
	}
	c.live[c.current] = struct{}{}
	return c, nil
}

func (cfg Config) withDefaults() Config {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 25 * time.Second
	}
	if cfg.Attempts <= 0 {
		cfg.Attempts = 4
	}
	if cfg.Backoff <= 0 {
		cfg.Backoff = 200 * time.Millisecond
	}
	if cfg.Observe == nil {
		cfg.Observe = func(Call) {}
	}
	return cfg
}

// Close ends the connection. Calls under way fail with ErrUnavailable.
func (c *Client) Close() error {
	c.mu.Lock()
	live := slices.Collect(maps.Keys(c.live))
	c.current = nil
	clear(c.live)
	c.mu.Unlock()
	for _, conn := range live {
		conn.close()
	}
	return nil
}

// States are what State can return.
func States() []string {
	return []string{"idle", "connecting", "ready", "transient_failure", "shutdown"}
}

// State says how the connection is, for metrics: "idle" (nothing was asked
// yet, or it broke and nothing was asked since), "connecting", "ready",
// "transient_failure" or "shutdown".
func (c *Client) State() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == nil {
		return "shutdown"
	}
	return strings.ToLower(c.current.conn.GetState().String())
}

// GetDEK returns the DEK of that ID; the caller wipes it. ErrNotFound where
// there is none, or ErrDenied where we may not know that. Without its key where
// Config says so.
func (c *Client) GetDEK(ctx context.Context, id dek.ID) (d dek.DEK, err error) {
	get := c.getDEK
	if c.cfg.Protocol == ProtocolConstellation {
		get = getDataKey
	}
	err = c.about(ctx, "GetDEK", id, func(ctx context.Context, conn *connection) (err error) {
		d, err = get(ctx, conn, id)
		return err
	})
	return d, err
}

func (c *Client) getDEK(ctx context.Context, conn *connection, id dek.ID) (dek.DEK, error) {
	public, open, err := c.answerTo()
	if err != nil {
		return dek.DEK{}, err
	}
	a, err := conn.keys.GetDEK(ctx, &keyservicev1.GetDEKRequest{Id: string(id), Recipient: public})
	if err != nil {
		return dek.DEK{}, err
	}
	return open(a, id)
}

// answerTo says for whom the keys of the next answer are to be sealed, nil for
// none, and how to open the answer.
func (c *Client) answerTo() (public []byte, open func(*keyservicev1.DEK, dek.ID) (dek.DEK, error), err error) {
	if c.cfg.WithoutKeys {
		return nil, withoutKeys, nil
	}
	to, err := newRecipient()
	if err != nil {
		return nil, nil, err
	}
	return to.public(), to.openDEK, nil
}

// CreateDEK returns the DEK of that ID, made now or before; the caller wipes
// it. ErrExists where it exists with another spec, and where it was deleted.
// Without its key where Config says so.
func (c *Client) CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (d dek.DEK, err error) {
	return c.make(ctx, "CreateDEK", id, spec, "")
}

// CloneDEK is CreateDEK for a volume or snapshot whose disk is a copy of
// source's; see envelope.Keyring. ErrConflict while source is being rotated.
func (c *Client) CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (d dek.DEK, err error) {
	if _, err := dek.ParseID(string(source)); err != nil {
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrInvalid, "source of DEK %.300q: %w", id, err)
	}
	return c.make(ctx, "CloneDEK", id, spec, source)
}

// make is CreateDEK, and CloneDEK where there is a source.
func (c *Client) make(ctx context.Context, method string, id dek.ID, spec dek.Spec, source dek.ID) (d dek.DEK, err error) {
	if err := validSpec(spec); err != nil {
		return dek.DEK{}, errdefs.Errorf(errdefs.ErrInvalid, "DEK %.300q: %w", id, err)
	}
	err = c.about(ctx, method, id, func(ctx context.Context, conn *connection) error {
		public, open, err := c.answerTo()
		if err != nil {
			return err
		}
		a, err := conn.keys.CreateDEK(ctx, &keyservicev1.CreateDEKRequest{
			Id: string(id), Spec: specToWire(spec), Source: string(source), Recipient: public,
		})
		if err != nil {
			return err
		}
		got, err := open(a, id)
		if err == nil && (got.Spec != spec || got.Source != source) {
			defer got.Wipe()
			return corrupt("it is one of spec %+v and source %q, and %+v and %q were asked for", got.Spec, got.Source, spec, source)
		}
		d = got
		return err
	})
	return d, err
}

// ClaimFormat announces that a node is about to format with a LUKS UUID, or while
// the DEK is Rotating to give the volume a header under its own key, and returns
// the claim that holds: the node's own earlier one, if any, or with the UUID of
// one that was released, or of the header. ErrConflict while another node holds
// the claim; ErrState where the DEK is Formatted.
func (c *Client) ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (holds dek.Claim, err error) {
	if err := claim.Validate(false); err != nil {
		return dek.Claim{}, errdefs.Errorf(errdefs.ErrInvalid, "DEK %.300q: claim: %w", id, err)
	}
	err = c.about(ctx, "ClaimFormat", id, func(ctx context.Context, conn *connection) error {
		a, err := conn.keys.ClaimFormat(ctx, &keyservicev1.ClaimFormatRequest{Id: string(id), Claim: &keyservicev1.Claim{Node: claim.Node, Uuid: claim.UUID}})
		if err != nil {
			return err
		}
		got := dek.Claim{Node: a.GetNode(), UUID: a.GetUuid()}
		if err := got.Validate(false); err != nil {
			return corrupt("%w", err)
		}
		if got.Node != claim.Node {
			return corrupt("the claim is one of node %.300q, and node %q asked", got.Node, claim.Node)
		}
		holds = got
		return nil
	})
	return holds, err
}

// ConfirmDEK records that the volume is formatted and raises the header floor
// to h; a sequence below the floor changes nothing. ErrState where h is another
// header than the one that was claimed or confirmed, or nothing was claimed.
func (c *Client) ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error {
	if err := dek.CheckUUID(h.UUID); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "DEK %.300q: header: %w", id, err)
	}
	if err := dek.CheckBackup(h.Backup); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "DEK %.300q: %w", id, err)
	}
	return c.about(ctx, "ConfirmDEK", id, func(ctx context.Context, conn *connection) error {
		_, err := conn.keys.ConfirmDEK(ctx, &keyservicev1.ConfirmDEKRequest{
			Id: string(id), Header: &keyservicev1.Header{Uuid: h.UUID, Sequence: h.Sequence, Fingerprint: h.Fingerprint, Backup: h.Backup},
		})
		return err
	})
}

// RewrapDEK wraps the DEK under the KEK's current version.
func (c *Client) RewrapDEK(ctx context.Context, id dek.ID) error {
	return c.about(ctx, "RewrapDEK", id, func(ctx context.Context, conn *connection) error {
		_, err := conn.keys.RewrapDEK(ctx, &keyservicev1.RewrapDEKRequest{Id: string(id)})
		return err
	})
}

// DeleteDEK destroys the DEK; nil where that was done before. The ID never
// gets another key.
func (c *Client) DeleteDEK(ctx context.Context, id dek.ID) error {
	return c.about(ctx, "DeleteDEK", id, func(ctx context.Context, conn *connection) error {
		_, err := conn.keys.DeleteDEK(ctx, &keyservicev1.DeleteDEKRequest{Id: string(id)})
		return err
	})
}

// about is call for a method about one DEK, whose ID it checks first.
func (c *Client) about(ctx context.Context, method string, id dek.ID, op operation) error {
	if _, err := dek.ParseID(string(id)); err != nil {
		return errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	if c.cfg.Protocol == ProtocolConstellation {
		if err := constellationCan(method, id); err != nil {
			return fmt.Errorf("key service at %s: %w", c.cfg.Address, err)
		}
	}
	return c.call(ctx, method, c.cfg.Attempts, c.cfg.Timeout, op)
}
