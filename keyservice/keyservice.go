// Package keyservice serves DEKs over gRPC (api/keyservice/v1) to those who
// may have them: who is asking ([Authenticator]), what they may do and for
// which DEKs ([Policy], [Volumes]), and a line in the audit log for each
// decision. The DEKs themselves come from [Keys], which may be given later: until
// then the service is sealed.
//
// # What a caller learns
//
// Whether a caller may is decided before anything is looked up. A refusal is
// the same, text and code, whether the DEK exists or not, and a caller that
// may have a DEK which does not exist gets that same refusal too, unless it
// may create or administer DEKs. Only the audit log tells them apart.
//
// # Where keys are
//
// A DEK is held while its request runs and is sealed to the caller's one-time
// key before it is given to gRPC, whose buffers therefore never hold one. None
// is kept. The one exception is Constellation's call, whose answer is the key
// itself.
//
// # Rolled-back records
//
// A store can give an old record back. Where the floor of a volume's header is
// noted in a place that is trusted ([Notes]), a record that is missing or behind
// the note is refused with ErrState.
package keyservice

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/secret"
)

// NodeKeys is what nodes ask for, with envelope.Keyring's contracts.
type NodeKeys interface {
	GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error)
	ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error)
	ConfirmDEK(ctx context.Context, id dek.ID, h dek.HeaderID) error
	ReleaseClaim(ctx context.Context, id dek.ID, node string) error // for a node that takes a claim over
}

// AdminKeys is what controllers and operators ask for, likewise.
type AdminKeys interface {
	CreateDEK(ctx context.Context, id dek.ID, spec dek.Spec) (dek.DEK, error)
	CloneDEK(ctx context.Context, id dek.ID, spec dek.Spec, source dek.ID) (dek.DEK, error)
	RewrapDEK(ctx context.Context, id dek.ID) error
	DeleteDEK(ctx context.Context, id dek.ID) error
}

// Keys is DEKs. Methods are called concurrently and honour ctx; errors are of
// errdefs' classes or ctx's. Whoever gets a DEK wipes it.
type Keys interface {
	NodeKeys
	AdminKeys
}

// Deriver is implemented by Keys that can also derive keys, for Constellation:
// 32 bytes of HKDF-SHA-256 with info "key-" + id. The caller wipes them.
type Deriver interface {
	Derive(ctx context.Context, id string) (secret.Bytes, error)
}

// Notes is where the floor of a volume's header is written down besides the
// record, in a place that is trusted.
type Notes interface {
	// Note returns the floor, and whether the volume was ever confirmed.
	// A note that Confirm wrote just now may not be seen yet.
	Note(ctx context.Context, id dek.ID) (dek.HeaderID, bool, error)
	// Confirm raises the floor to h; nil only once that is written down, or
	// where there is no place for a note of this DEK.
	Confirm(ctx context.Context, id dek.ID, h dek.HeaderID) error
}

// Config says what a Server serves, to whom and how.
type Config struct {
	// Keys are what is served. nil: the service starts sealed.
	Keys Keys
	// Unseal opens KEKs and stores and tries them, wholly or not at all. The
	// request's secrets are wiped when it has returned. What it returned and the
	// Server cannot use is closed if it is an io.Closer. nil: not to be unsealed.
	Unseal func(ctx context.Context, req *keyservicev1.UnsealRequest) (Keys, error)
	// Status tells how KEKs and stores are, once unsealed; Sealed and Version
	// are filled in. nil: nothing more is known.
	Status func(ctx context.Context) (*keyservicev1.StatusResponse, error)
	// Version is the program's, for Status.
	Version string
	// SealChanged is called by New and at the unsealing, e.g. to set the
	// status of gRPC's health service. nil: nobody is told.
	SealChanged func(sealed bool)

	// Authenticators are asked in their order; the first that finds
	// credentials of its kind decides. At least one.
	Authenticators []Authenticator
	// Policy says who may do what.
	Policy Policy
	// Notes; nil is none, and a rolled-back record is not noticed here.
	Notes Notes
	// Claims tells which claims a node may take over from another. nil: none;
	// then an operator has to run key-service dek release.
	Claims Claims
	// Constellation turns /kms.API/GetDataKey on. It needs Keys that derive.
	Constellation bool

	// Audit gets one line for each decision. Required.
	Audit *slog.Logger
	// Logger gets what is wrong with the service itself; nil: nobody.
	Logger *slog.Logger
	// Observe is told of each decision, concurrently; nil: nobody is told.
	Observe func(Decision)

	// MaxInFlight bounds the calls that are worked on at a time, of callers who
	// may have what they ask for; 0: 256.
	MaxInFlight int
	// MaxWaiting bounds such calls that wait for their turn, some 10 KiB of
	// memory each; one more is RESOURCE_EXHAUSTED at once. 0: 32768, which is
	// a thousand nodes that come up with thirty volumes each; negative: none
	// waits.
	MaxWaiting int
	// Timeout bounds a call, its waiting included; 0: 20 s.
	Timeout time.Duration
	// AdminTimeout is that of Unseal and Status; 0: 2 min.
	AdminTimeout time.Duration
	// Clock tells when a certificate has expired; nil: time.Now.
	Clock func() time.Time
}

// The limits that api/keyservice/v1 promises, in bytes.
const (
	maxRequest = 8 << 10
	maxName    = 256
	maxUUID    = 64
	// maxGiven bounds a request with a Given, which carries files.
	maxGiven = 128 << 10
)

// Server answers KeyService, Admin and, if asked to, Constellation's API. Its
// methods may be called concurrently.
type Server struct {
	cfg     Config
	limit   *limiter
	flights flights
	opened  atomic.Pointer[opened] // nil: sealed

	unsealing sync.Mutex // held while an Unseal is under way
	seal      requestMAC
}

// opened is what an unsealed Server has.
type opened struct {
	keys Keys
	by   []byte // what identifies the request that unsealed it; nil where none did
}

// New returns a Server. ErrInvalid where cfg contradicts itself or leaves out
// what must not be forgotten.
func New(cfg Config) (*Server, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	cfg.fill()
	s := &Server{cfg: cfg, limit: newLimiter(cfg.MaxInFlight, cfg.MaxWaiting), seal: newRequestMAC()}
	s.flights = newFlights(cfg.Timeout, cfg.Logger)
	if cfg.Keys != nil {
		s.opened.Store(&opened{keys: cfg.Keys})
	}
	cfg.SealChanged(s.Sealed())
	return s, nil
}

func (c *Config) check() error {
	p := c.Policy
	switch {
	case len(c.Authenticators) == 0:
		return errdefs.Errorf(errdefs.ErrInvalid, "nobody could tell who is asking: the key service needs client certificates, tokens, or a local socket")
	case c.Audit == nil:
		return errdefs.Errorf(errdefs.ErrInvalid, "the key service needs an audit log")
	case c.Keys == nil && c.Unseal == nil:
		return errdefs.Errorf(errdefs.ErrInvalid, "the key service has no keys and no way to be unsealed")
	case p.Any && (p.Attached != nil || p.Prefixes != nil):
		return errdefs.Errorf(errdefs.ErrInvalid, "a policy that allows everything to everybody excludes every other")
	}
	if _, derives := c.Keys.(Deriver); c.Constellation && c.Keys != nil && !derives {
		return errNoDeriver()
	}
	return nil
}

func (c *Config) fill() {
	if c.SealChanged == nil {
		c.SealChanged = func(bool) {}
	}
	if c.Observe == nil {
		c.Observe = func(Decision) {}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Clock == nil {
		c.Clock = time.Now
	}
	if c.MaxInFlight <= 0 {
		c.MaxInFlight = 256
	}
	if c.MaxWaiting == 0 {
		c.MaxWaiting = 32 << 10
	}
	if c.Timeout <= 0 {
		c.Timeout = 20 * time.Second
	}
	if c.AdminTimeout <= 0 {
		c.AdminTimeout = 2 * time.Minute
	}
}

// Register registers the services that s answers.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	keyservicev1.RegisterKeyServiceServer(r, keyAPI{Server: s})
	keyservicev1.RegisterAdminServer(r, adminAPI{Server: s})
	if s.cfg.Constellation {
		constellationv1.RegisterAPIServer(r, constellationAPI{Server: s})
	}
}

// ServerOptions returns the options of a gRPC server in front of a Server, or of
// something else that takes a Given:
// limits, and an age at which connections are renewed, so that a certificate
// that expired or an authority that was removed does not live on in one.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxGiven),
		grpc.MaxHeaderListSize(32 << 10),
		// What a connection asks beyond this waits in its client. So a node with
		// many volumes is not before one with few, and a stranger makes the
		// server hold no more than this many requests of maxUnseal.
		grpc.MaxConcurrentStreams(16),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.NumStreamWorkers(64), // whose stacks have grown once; more calls than that get goroutines of their own
		// Thousands of nodes keep a connection, and seldom use it.
		grpc.ReadBufferSize(4 << 10),
		grpc.WriteBufferSize(4 << 10),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionAge:      10 * time.Minute,
			MaxConnectionAgeGrace: time.Minute,
			Time:                  time.Minute,
			Timeout:               20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}
}

// Sealed says whether the service has no keys yet.
func (s *Server) Sealed() bool { return s.opened.Load() == nil }

// Load says how many calls are being worked on and how many wait.
func (s *Server) Load() (running, waiting int) { return s.limit.load() }

// keys returns what is served, ErrUnavailable while sealed.
func (s *Server) keys() (Keys, error) {
	if o := s.opened.Load(); o != nil {
		return o.keys, nil
	}
	return nil, errdefs.Errorf(errdefs.ErrUnavailable, "the key service is sealed: an operator has to run key-service unseal")
}
