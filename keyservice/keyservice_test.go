package keyservice_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/grpcserver"
	"github.com/cryptcsi/cryptcsi/keyclient/keyclienttest"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func mustCode(t testing.TB, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v, want code %v", what, err, want)
	}
}

// lines is a log that a test reads.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// take returns the lines since the last take.
func (l *lines) take(t testing.TB) []map[string]any {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var got []map[string]any
	for line := range strings.Lines(l.buf.String()) {
		var m map[string]any
		must(t, "the log line "+line, json.Unmarshal([]byte(line), &m))
		got = append(got, m)
	}
	l.buf.Reset()
	return got
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewJSONHandler(l, nil)) }

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key, a.pem, _ = certify(t, nil, &x509.Certificate{
		Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

func certify(t testing.TB, by *authority, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, []byte, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, "GenerateKey", err)
	c.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, "serial", err)
	if c.NotBefore.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, signer := c, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	must(t, "CreateCertificate", err)
	cert, err := x509.ParseCertificate(der)
	must(t, "ParseCertificate", err)
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, "MarshalPKCS8PrivateKey", err)
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

// named is a certificate for a common name, or a SPIFFE ID.
func (a *authority) named(t testing.TB, name string, edit ...func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	c := &x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if strings.HasPrefix(name, "spiffe:") {
		u, err := url.Parse(name)
		must(t, "the SPIFFE ID", err)
		c.Subject, c.URIs = pkix.Name{}, []*url.URL{u}
	}
	for _, e := range edit {
		e(c)
	}
	_, _, cert, key := certify(t, a, c)
	pair, err := tls.X509KeyPair(cert, key)
	must(t, "X509KeyPair", err)
	return pair
}

const serverName = "key-service.test"

// write puts a new server certificate into cert-manager's files.
func (a *authority) write(t testing.TB, dir string) keyservice.TLSFiles {
	t.Helper()
	_, _, cert, key := certify(t, a, &x509.Certificate{DNSNames: []string{serverName}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	f := keyservice.TLSFiles{Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ClientCA: filepath.Join(dir, "ca.crt")}
	must(t, "writing", errors.Join(os.WriteFile(f.Cert, cert, 0o600), os.WriteFile(f.Key, key, 0o600), os.WriteFile(f.ClientCA, a.pem, 0o600)))
	return f
}

// volumesFunc is a policy.
type volumesFunc func(who keyservice.Identity, id dek.ID) error

func (f volumesFunc) Allowed(_ context.Context, who keyservice.Identity, id dek.ID) error {
	return f(who, id)
}

// attachments is a policy: nodes, and the DEKs of what is attached there.
func attachments(pairs ...string) volumesFunc {
	return func(who keyservice.Identity, id dek.ID) error {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == who.Node && pairs[i+1] == string(id) {
				return nil
			}
		}
		return errdefs.Errorf(errdefs.ErrDenied, "no attachment says so")
	}
}

// hooked is Keys that a test looks into.
type hooked struct {
	keyservice.Keys
	calls atomic.Int64
	get   func(ctx context.Context, id dek.ID) error // before GetDEK, if set
}

func (h *hooked) GetDEK(ctx context.Context, id dek.ID) (dek.DEK, error) {
	h.calls.Add(1)
	if h.get != nil {
		if err := h.get(ctx, id); err != nil {
			return dek.DEK{}, err
		}
	}
	return h.Keys.GetDEK(ctx, id)
}

func (h *hooked) ClaimFormat(ctx context.Context, id dek.ID, claim dek.Claim) (dek.Claim, error) {
	h.calls.Add(1)
	return h.Keys.ClaimFormat(ctx, id, claim)
}

func (h *hooked) ConfirmDEK(ctx context.Context, id dek.ID, header dek.HeaderID) error {
	h.calls.Add(1)
	return h.Keys.ConfirmDEK(ctx, id, header)
}

func newRing(t testing.TB) *envelope.Keyring {
	t.Helper()
	store, err := envelope.LocalStores().Open(t.Context(), "mem://")
	must(t, "opening a store", err)
	ring, err := envelope.New([]*kms.KEK{kms.New("fake", kmstest.NewBackend(), kms.Options{})}, []envelope.Store{store}, envelope.Options{Attempts: 1, KEKNames: []string{keyclienttest.KEK}})
	must(t, "envelope.New", err)
	t.Cleanup(func() { _ = ring.Close() })
	return ring
}

// world is a key service under test, with an authority for its clients.
type world struct {
	ring  *envelope.Keyring
	keys  *hooked
	audit *lines
	log   *lines
	ca    *authority
	files keyservice.TLSFiles
	srv   *keyservice.Server
	lis   *bufconn.Listener
	stop  context.CancelFunc
	ended chan error
}

// start starts a key service over mutual TLS; edit changes what it serves.
func start(t testing.TB, edit func(w *world, cfg *keyservice.Config)) *world {
	t.Helper()
	w := &world{ring: newRing(t), audit: &lines{}, log: &lines{}, ca: newAuthority(t), lis: bufconn.Listen(1 << 20), ended: make(chan error, 1)}
	w.keys = &hooked{Keys: w.ring}
	w.files = w.ca.write(t, t.TempDir())
	w.files.Log = w.log.logger()
	cfg := keyservice.Config{
		Keys:           w.keys,
		Authenticators: []keyservice.Authenticator{keyservice.Certificates{TrustDomain: "example.org"}},
		Audit:          w.audit.logger(), Logger: w.log.logger(), Version: "v-test",
	}
	if edit != nil {
		edit(w, &cfg)
	}
	var err error
	w.srv, err = keyservice.New(cfg)
	must(t, "New", err)
	conf, err := w.files.Config()
	must(t, "TLS", err)
	s := grpcserver.New(grpcserver.Config{Drain: time.Millisecond, Options: append(keyservice.ServerOptions(), grpc.Creds(credentials.NewTLS(conf)))})
	w.srv.Register(s)
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	go func() { w.ended <- s.Serve(ctx, w.lis); close(w.ended) }()
	t.Cleanup(func() {
		cancel()
		for range w.ended { // until it is closed
		}
	})
	return w
}

// client connects with a certificate.
func (w *world) client(t testing.TB, cert ...tls.Certificate) *client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.ca.pem)
	conf := &tls.Config{RootCAs: roots, ServerName: serverName, Certificates: cert, MinVersion: tls.VersionTLS13}
	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(credentials.NewTLS(conf)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return w.lis.DialContext(ctx) }))
	must(t, "NewClient", err)
	t.Cleanup(func() { _ = conn.Close() })
	return &client{KeyServiceClient: keyservicev1.NewKeyServiceClient(conn), AdminClient: keyservicev1.NewAdminClient(conn), conn: conn}
}

// as is client for who has that name.
func (w *world) as(t testing.TB, name string) *client {
	t.Helper()
	return w.client(t, w.ca.named(t, name))
}

type client struct {
	keyservicev1.KeyServiceClient
	keyservicev1.AdminClient
	conn *grpc.ClientConn
}

// get gets a key and opens it.
func (c *client) get(ctx context.Context, id dek.ID) (*keyservicev1.DEK, []byte, error) {
	private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err != nil {
		return nil, nil, err
	}
	a, err := c.GetDEK(ctx, &keyservicev1.GetDEKRequest{Id: string(id), Recipient: private.PublicKey().Bytes()})
	if err != nil {
		return nil, nil, err
	}
	key, err := unsealed(private, "key", id, a.GetSealedKey())
	return a, key, err
}

// unsealed opens a sealed key as the API's description has it.
func unsealed(private hpke.PrivateKey, field string, id dek.ID, sealed []byte) ([]byte, error) {
	if len(sealed) < 32 {
		return nil, errors.New("too short")
	}
	r, err := hpke.NewRecipient(sealed[:32], private, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte("cryptcsi keyservice v1"))
	if err != nil {
		return nil, err
	}
	return r.Open(append(append([]byte(field), 0), id...), sealed[32:])
}

func publicKey(t testing.TB) []byte {
	t.Helper()
	private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	must(t, "GenerateKey", err)
	return private.PublicKey().Bytes()
}

const (
	node       = "system:node:worker-1"
	nodeName   = "worker-1"
	node2      = "system:node:worker-2"
	controller = "controller"
	operator   = "operator"
	vol        = dek.ID("driver.example.com/vol-1")
)

func spec() dek.Spec { return dek.Spec{Name: "pvc-1", Cipher: dek.CipherXTS} }

func wireSpec() *keyservicev1.Spec { return &keyservicev1.Spec{Name: "pvc-1", Cipher: dek.CipherXTS} }

// roles is the policy of most tests: worker-1 has vol attached.
func roles(_ *world, cfg *keyservice.Config) {
	cfg.Policy = keyservice.Policy{Controllers: []string{controller}, Operators: []string{operator}, Attached: attachments(nodeName, string(vol))}
}

// create makes a DEK and returns its key.
func (w *world) create(t testing.TB, id dek.ID) []byte {
	t.Helper()
	d, err := w.ring.CreateDEK(t.Context(), id, spec())
	must(t, "CreateDEK", err)
	defer d.Wipe()
	return bytes.Clone(d.Key.Expose())
}

// format makes a DEK that is formatted, with sequence 5.
func (w *world) format(t testing.TB, id dek.ID) dek.HeaderID {
	t.Helper()
	w.create(t, id)
	h := dek.HeaderID{UUID: dek.NewUUID(), Sequence: 5}
	_, err := w.ring.ClaimFormat(t.Context(), id, dek.Claim{Node: nodeName, UUID: h.UUID})
	must(t, "ClaimFormat", err)
	must(t, "ConfirmDEK", w.ring.ConfirmDEK(t.Context(), id, h))
	return h
}

func TestGetDEKIsSealedToItsRecipient(t *testing.T) {
	w := start(t, roles)
	h := w.format(t, vol)
	d, err := w.ring.RotateDEK(t.Context(), vol)
	must(t, "RotateDEK", err)
	defer d.Wipe()
	private, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	must(t, "GenerateKey", err)
	a, err := w.as(t, node).GetDEK(t.Context(), &keyservicev1.GetDEKRequest{Id: string(vol), Recipient: private.PublicKey().Bytes()})
	must(t, "GetDEK", err)
	for field, f := range map[string]struct {
		sealed []byte
		key    secret.Bytes
	}{"key": {a.GetSealedKey(), d.Key}, "previous": {a.GetSealedPrevious(), d.Previous}} {
		got, err := unsealed(private, field, vol, f.sealed)
		must(t, "opening "+field, err)
		if !bytes.Equal(got, f.key.Expose()) {
			t.Errorf("%s is another key", field)
		}
		if _, err := unsealed(private, field, vol+"0", f.sealed); err == nil {
			t.Errorf("%s opens for another ID", field)
		}
		if _, err := unsealed(private, field+"x", vol, f.sealed); err == nil {
			t.Errorf("%s opens as another field", field)
		}
		for i := range f.sealed {
			flipped := bytes.Clone(f.sealed)
			flipped[i] ^= 1
			if _, err := unsealed(private, field, vol, flipped); err == nil {
				t.Errorf("%s opens with byte %d changed", field, i)
			}
		}
		if other, _ := hpke.DHKEM(ecdh.X25519()).GenerateKey(); other != nil {
			if _, err := unsealed(other, field, vol, f.sealed); err == nil {
				t.Errorf("%s opens for another recipient", field)
			}
		}
	}
	if a.GetId() != string(vol) || a.GetState() != "rotating" || a.GetSpec().GetName() != "pvc-1" || a.GetHeader().GetUuid() != h.UUID ||
		a.GetHeader().GetSequence() != 5 || a.GetHeader().GetFingerprint() != "" || a.GetClaim().GetNode() != "" || a.GetClaim().GetUuid() != h.UUID {
		t.Errorf("the answer is %v", a)
	}
}

// TestWhoMayCallWhat calls every method as everybody.
func TestWhoMayCallWhat(t *testing.T) {
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	must(t, "writing", os.WriteFile(policy, []byte(`{"spiffe://example.org/joinservice": ["driver.example.com/*"]}`), 0o600))
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		p, err := keyservice.OpenPrefix(policy, nil)
		must(t, "OpenPrefix", err)
		cfg.Policy.Prefixes = p
		cfg.Unseal = func(context.Context, *keyservicev1.UnsealRequest) (keyservice.Keys, error) { return w.ring, nil }
	})
	uuid := w.format(t, vol).UUID
	methods := map[string]func(c *client, ctx context.Context) error{
		"GetDEK": func(c *client, ctx context.Context) error { _, _, err := c.get(ctx, vol); return err },
		"CreateDEK": func(c *client, ctx context.Context) error {
			_, err := c.CreateDEK(ctx, &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec()})
			return err
		},
		"ClaimFormat": func(c *client, ctx context.Context) error {
			_, err := c.ClaimFormat(ctx, &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: uuid}})
			return err
		},
		"ConfirmDEK": func(c *client, ctx context.Context) error {
			_, err := c.ConfirmDEK(ctx, &keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: &keyservicev1.Header{Uuid: uuid}})
			return err
		},
		"RewrapDEK": func(c *client, ctx context.Context) error {
			_, err := c.RewrapDEK(ctx, &keyservicev1.RewrapDEKRequest{Id: string(vol)})
			return err
		},
		"DeleteDEK": func(c *client, ctx context.Context) error {
			// One that does not exist, so that the others stay possible.
			_, err := c.DeleteDEK(ctx, &keyservicev1.DeleteDEKRequest{Id: string(vol) + "-none"})
			return err
		},
		"Unseal": func(c *client, ctx context.Context) error {
			_, err := c.Unseal(ctx, &keyservicev1.UnsealRequest{KmsUris: []string{"x"}})
			return err
		},
		"Status": func(c *client, ctx context.Context) error {
			_, err := c.Status(ctx, &keyservicev1.StatusRequest{})
			return err
		},
	}
	// What each may; the code is what the method gives to who may.
	may := map[string]map[string]codes.Code{
		node: {"GetDEK": codes.OK, "ClaimFormat": codes.FailedPrecondition, "ConfirmDEK": codes.OK},
		"spiffe://example.org/ns/cryptcsi/node/worker-1": {"GetDEK": codes.OK, "ClaimFormat": codes.FailedPrecondition, "ConfirmDEK": codes.OK},
		node2:      {},
		controller: {"CreateDEK": codes.OK, "DeleteDEK": codes.NotFound},
		operator:   {"RewrapDEK": codes.OK, "Unseal": codes.AlreadyExists, "Status": codes.OK},
		// No node, so it can claim in nobody's name.
		"spiffe://example.org/joinservice": {"GetDEK": codes.OK, "ConfirmDEK": codes.OK},
		"worker-1":                         {},
		"somebody":                         {},
	}
	for who, allowed := range may {
		c := w.as(t, who)
		for method, call := range methods {
			w.audit.take(t)
			want, ok := allowed[method]
			if !ok {
				want = codes.PermissionDenied
			}
			mustCode(t, who+" calls "+method, call(c, t.Context()), want)
			seen := w.audit.take(t)
			if len(seen) != 1 {
				t.Fatalf("%s calls %s: %d audit lines: %v", who, method, len(seen), seen)
			}
			if l := seen[0]; l["method"] != method || l["identity"] != who || l["allowed"] != ok || l["code"] != want.String() || !ok && l["reason"] == nil {
				t.Errorf("%s calls %s: audit line %v", who, method, l)
			}
		}
	}
}

func TestAnybodyWithoutCredentials(t *testing.T) {
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		w.files.Optional = true
	})
	c := w.client(t)
	_, _, err := c.get(t.Context(), vol)
	mustCode(t, "GetDEK", err, codes.Unauthenticated)
	_, err = c.Status(t.Context(), &keyservicev1.StatusRequest{})
	mustCode(t, "Status", err, codes.Unauthenticated)
	if got := w.audit.take(t); len(got) != 2 || got[0]["allowed"] != false || got[0]["identity"] != "" || got[0]["code"] != "Unauthenticated" {
		t.Errorf("audit: %v", got)
	}
}

// TestAnyPolicy: everybody may everything, and only then.
func TestAnyPolicy(t *testing.T) {
	w := start(t, func(_ *world, cfg *keyservice.Config) { cfg.Policy.Any = true })
	c := w.as(t, "somebody")
	_, err := c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec()})
	must(t, "CreateDEK", err)
	_, _, err = c.get(t.Context(), vol)
	must(t, "GetDEK", err)
	_, err = c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: "other", Uuid: dek.NewUUID()}})
	must(t, "ClaimFormat in another node's name", err)
	_, _, err = c.get(t.Context(), vol+"0")
	mustCode(t, "GetDEK of what does not exist", err, codes.NotFound)
}

// TestNoTellingWhatExists: a refusal is the same for what exists and what does
// not. Only who may have that very DEK learns that there is none: the node that
// has the volume, which the list of unencrypted volumes may name.
func TestNoTellingWhatExists(t *testing.T) {
	const theirs = dek.ID("driver.example.com/vol-2")
	w := start(t, roles)
	ask := func(who string, id dek.ID) map[string]string {
		c := w.as(t, who)
		got := map[string]string{}
		_, _, err := c.get(t.Context(), id)
		got["GetDEK"] = status.Convert(err).Proto().String()
		_, err = c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(id), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: dek.NewUUID()}})
		got["ClaimFormat"] = status.Convert(err).Proto().String()
		_, err = c.ConfirmDEK(t.Context(), &keyservicev1.ConfirmDEKRequest{Id: string(id), Header: &keyservicev1.Header{Uuid: dek.NewUUID()}})
		got["ConfirmDEK"] = status.Convert(err).Proto().String()
		_, err = c.DeleteDEK(t.Context(), &keyservicev1.DeleteDEKRequest{Id: string(id)})
		got["DeleteDEK"] = status.Convert(err).Proto().String()
		_, err = c.RewrapDEK(t.Context(), &keyservicev1.RewrapDEKRequest{Id: string(id)})
		got["RewrapDEK"] = status.Convert(err).Proto().String()
		return got
	}
	mine := ask(node, vol)
	calls := w.keys.calls.Load()
	before, others := ask(node, theirs), ask(node2, vol)
	w.create(t, theirs)
	w.create(t, vol)
	after, othersAfter := ask(node, theirs), ask(node2, vol)
	if w.keys.calls.Load() != calls {
		t.Error("what a caller may not have was looked up")
	}
	for method, want := range before {
		if after[method] != want || !strings.Contains(want, codesText(codes.PermissionDenied)) {
			t.Errorf("%s: %q before it existed, %q after", method, want, after[method])
		}
		if othersAfter[method] != others[method] || strings.NewReplacer(string(vol), string(theirs), node2, node).Replace(others[method]) != want {
			t.Errorf("%s by another node: %q before it existed, %q after; one that exists nowhere: %q", method, others[method], othersAfter[method], want)
		}
		told := codes.NotFound
		if method == "DeleteDEK" || method == "RewrapDEK" {
			told = codes.PermissionDenied
		}
		if !strings.Contains(mine[method], codesText(told)) {
			t.Errorf("%s of one that does not exist by the node that may have it: %q, want code %v", method, mine[method], told)
		}
	}
	var seen []any
	for _, l := range w.audit.take(t) {
		if l["method"] == "GetDEK" {
			seen = append(seen, l["allowed"], l["code"])
		}
	}
	no := codes.PermissionDenied.String()
	if want := []any{true, codes.NotFound.String(), false, no, false, no, false, no, false, no}; !slices.Equal(seen, want) {
		t.Errorf("the audit log has %v, want %v", seen, want)
	}
}

func codesText(c codes.Code) string { return status.New(c, "").Proto().String() }

func TestClaimsAreTheCallersOwn(t *testing.T) {
	w := start(t, roles)
	w.create(t, vol)
	c := w.as(t, node)
	uuid := dek.NewUUID()
	_, err := c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: "worker-2", Uuid: uuid}})
	mustCode(t, "a claim in another's name", err, codes.PermissionDenied)
	if got := w.audit.take(t); len(got) != 1 || got[0]["allowed"] != false || !strings.Contains(got[0]["reason"].(string), "worker-2") {
		t.Errorf("audit: %v", got)
	}
	a, err := c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: &keyservicev1.Claim{Node: nodeName, Uuid: uuid}})
	must(t, "a claim of its own", err)
	if a.GetNode() != nodeName || a.GetUuid() != uuid {
		t.Errorf("the claim is %v", a)
	}
}

// TestControllersGetNoKeys: neither by asking nor by the way.
func TestControllersGetNoKeys(t *testing.T) {
	w := start(t, func(w *world, cfg *keyservice.Config) {
		roles(w, cfg)
		cfg.Policy.Controllers = append(cfg.Policy.Controllers, node)
	})
	c := w.as(t, controller)
	a, err := c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec()})
	must(t, "CreateDEK", err)
	if len(a.GetSealedKey()) != 0 || a.GetState() != "prepared" {
		t.Errorf("CreateDEK answers %v", a)
	}
	req := &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec(), Recipient: publicKey(t)}
	_, err = c.CreateDEK(t.Context(), req)
	mustCode(t, "CreateDEK with a recipient", err, codes.InvalidArgument)
	if l := w.audit.take(t); l[1]["allowed"] != false {
		t.Errorf("audit: %v", l)
	}
	// A node that creates (csi-plugin node --create-keys) may have the key.
	a, err = w.as(t, node).CreateDEK(t.Context(), req)
	must(t, "CreateDEK of a node with the right", err)
	if len(a.GetSealedKey()) == 0 {
		t.Error("a node that may have the key did not get it")
	}
	req.Id += "-elsewhere"
	_, err = w.as(t, node).CreateDEK(t.Context(), req)
	mustCode(t, "CreateDEK of what is attached elsewhere, with a recipient", err, codes.InvalidArgument)
}

// TestAuditShowsNoKey looks for keys in everything that was logged.
func TestAuditShowsNoKey(t *testing.T) {
	w := start(t, roles)
	key := w.create(t, vol)
	if _, got, err := w.as(t, node).get(t.Context(), vol); err != nil || !bytes.Equal(got, key) {
		t.Fatalf("GetDEK: %v", err)
	}
	log := w.audit.String() + w.log.String()
	for _, form := range forms(key) {
		if strings.Contains(log, form) {
			t.Error("a key is in the log")
		}
	}
	if l := w.audit.take(t); len(l) != 1 || l[0]["dek_id"] != string(vol) || l[0]["node"] != nodeName || l[0]["peer"] == nil || l[0]["reason"] != nil {
		t.Errorf("audit: %v", l)
	}
}

func forms(key []byte) []string {
	text, _ := json.Marshal(key)
	return []string{string(key), string(text[1 : len(text)-1])}
}

func TestBadRequests(t *testing.T) {
	w := start(t, func(_ *world, cfg *keyservice.Config) { cfg.Policy.Any = true })
	c := w.as(t, "somebody")
	long := strings.Repeat("x", 257)
	good := publicKey(t)
	get := func(id string, recipient []byte) error {
		_, err := c.GetDEK(t.Context(), &keyservicev1.GetDEKRequest{Id: id, Recipient: recipient})
		return err
	}
	create := func(s *keyservicev1.Spec, recipient []byte) error {
		_, err := c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: s, Recipient: recipient})
		return err
	}
	clone := func(source string) error {
		_, err := c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: string(vol), Spec: wireSpec(), Source: source})
		return err
	}
	claim := func(cl *keyservicev1.Claim) error {
		_, err := c.ClaimFormat(t.Context(), &keyservicev1.ClaimFormatRequest{Id: string(vol), Claim: cl})
		return err
	}
	confirm := func(h *keyservicev1.Header) error {
		_, err := c.ConfirmDEK(t.Context(), &keyservicev1.ConfirmDEKRequest{Id: string(vol), Header: h})
		return err
	}
	w.create(t, vol)
	for what, err := range map[string]error{
		"no ID":               get("", good),
		"a long ID":           get(strings.Repeat("x", dek.MaxID+1), good),
		"an ID with a space":  get("a b", good),
		"its own source":      clone(string(vol)),
		"a source of no DEK":  clone("a b"),
		"a short recipient":   get(string(vol), good[:31]),
		"a long recipient":    get(string(vol), append(good, 0)),
		"a zero recipient":    get(string(vol), make([]byte, 32)),
		"no spec":             create(nil, nil),
		"another cipher":      create(&keyservicev1.Spec{Cipher: "rot13"}, nil),
		"a long name":         create(&keyservicev1.Spec{Cipher: dek.CipherXTS, Name: long}, nil),
		"a bad recipient":     create(wireSpec(), good[:31]),
		"no claim":            claim(nil),
		"no node":             claim(&keyservicev1.Claim{Uuid: dek.NewUUID()}),
		"a long node":         claim(&keyservicev1.Claim{Uuid: dek.NewUUID(), Node: long}),
		"no UUID":             claim(&keyservicev1.Claim{Node: "n"}),
		"no header":           confirm(nil),
		"a backup of no form": confirm(&keyservicev1.Header{Uuid: dek.NewUUID(), Backup: "AAA"}),
		"a long backup":       confirm(&keyservicev1.Header{Uuid: dek.NewUUID(), Backup: strings.Repeat("AAAA", 129)}),
		"a long fingerprint":  confirm(&keyservicev1.Header{Uuid: dek.NewUUID(), Fingerprint: long}),
		"a large request":     get(string(vol), make([]byte, 9<<10)),
	} {
		mustCode(t, what, err, codes.InvalidArgument)
	}
	for _, l := range w.audit.take(t) {
		if l["code"] != "InvalidArgument" || len(l["dek_id"].(string)) > dek.MaxID {
			t.Errorf("audit: %v", l)
		}
	}
	longest := strings.Repeat("x", dek.MaxID)
	mustCode(t, "the longest ID", get(longest, good), codes.NotFound)
	if got := w.audit.take(t); len(got) != 1 || got[0]["dek_id"] != longest {
		t.Errorf("audit of the longest ID: %v", got)
	}
	mustCode(t, "a huge request", get(strings.Repeat("x", 1<<20), good), codes.ResourceExhausted)
}

func TestNewRefuses(t *testing.T) {
	good := func() keyservice.Config {
		return keyservice.Config{Keys: newRing(t), Authenticators: []keyservice.Authenticator{keyservice.Local{}}, Audit: slog.New(slog.DiscardHandler)}
	}
	for what, edit := range map[string]func(*keyservice.Config){
		"nobody to tell who asks": func(c *keyservice.Config) { c.Authenticators = nil },
		"no audit log":            func(c *keyservice.Config) { c.Audit = nil },
		"sealed for ever":         func(c *keyservice.Config) { c.Keys = nil },
		"any and attached":        func(c *keyservice.Config) { c.Policy.Any, c.Policy.Attached = true, attachments() },
		"no derivation":           func(c *keyservice.Config) { c.Constellation = true },
	} {
		cfg := good()
		edit(&cfg)
		if _, err := keyservice.New(cfg); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := keyservice.New(good()); err != nil {
		t.Errorf("a good one: %v", err)
	}
}

// full is a log on a disk without room.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left") }

// TestAuditThatCannotBeWritten: without its line nothing is handed out.
func TestAuditThatCannotBeWritten(t *testing.T) {
	w := start(t, func(_ *world, cfg *keyservice.Config) {
		cfg.Policy.Any, cfg.Audit = true, slog.New(slog.NewJSONHandler(full{}, nil))
	})
	d, err := w.ring.CreateDEK(t.Context(), "d/one", dek.Spec{Cipher: dek.CipherXTS})
	must(t, "CreateDEK", err)
	d.Wipe()
	_, _, err = w.as(t, "somebody").get(t.Context(), "d/one")
	mustCode(t, "GetDEK", err, codes.Unavailable)
	if !strings.Contains(w.log.String(), "no space left") {
		t.Errorf("the log does not say why: %s", w.log)
	}
}

// TestCloneIsAudited: whose key goes into a copy is in the log; a copy of what
// is not there is refused.
func TestCloneIsAudited(t *testing.T) {
	w := start(t, func(_ *world, cfg *keyservice.Config) { cfg.Policy.Any = true })
	c := w.as(t, "controller")
	w.create(t, vol)
	w.audit.take(t)
	snap := "snap:" + string(vol)
	d, err := c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: snap, Spec: wireSpec(), Source: string(vol)})
	must(t, "CreateDEK with a source", err)
	if d.GetSource() != string(vol) || len(d.GetSealedKey())+len(d.GetSealedPrevious()) > 0 {
		t.Errorf("CreateDEK with a source = %v", d)
	}
	lines := w.audit.take(t)
	if len(lines) != 1 || lines[0]["source"] != string(vol) || lines[0]["dek_id"] != snap {
		t.Errorf("audit: %v", lines)
	}
	_, err = c.CreateDEK(t.Context(), &keyservicev1.CreateDEKRequest{Id: snap + "2", Spec: wireSpec(), Source: "d/none"})
	mustCode(t, "CreateDEK with a source that is not there", err, codes.NotFound)
}
