package keyclient_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	constellationv1 "github.com/cryptcsi/cryptcsi/api/constellation/v1"
	keyservicev1 "github.com/cryptcsi/cryptcsi/api/keyservice/v1"
	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs/errgrpc"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/keyclient/keyclienttest"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
	"github.com/cryptcsi/cryptcsi/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const id = dek.ID("driver.example.com/vol-1")

func spec() dek.Spec {
	return dek.Spec{Name: "pvc-1", Cipher: dek.CipherXTS, Integrity: dek.IntegrityHMAC}
}

// newRing returns a keyring in memory.
func newRing(t *testing.T) *envelope.Keyring {
	t.Helper()
	store, err := envelope.LocalStores().Open(t.Context(), "mem://")
	if err != nil {
		t.Fatal(err)
	}
	k, err := envelope.New([]*kms.KEK{kms.New("fake", kmstest.NewBackend(), kms.Options{})}, []envelope.Store{store}, envelope.Options{KEKNames: []string{keyclienttest.KEK}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

// service is a key service that lets everybody do everything: the API's words
// over a keyring, and nothing of the real server's code.
type service struct {
	keyservicev1.UnimplementedKeyServiceServer
	keyservicev1.UnimplementedAdminServer
	constellationv1.UnimplementedAPIServer
	ring *envelope.Keyring
}

func (s *service) GetDEK(ctx context.Context, r *keyservicev1.GetDEKRequest) (*keyservicev1.DEK, error) {
	return answer(r.Recipient)(s.ring.GetDEK(ctx, dek.ID(r.Id)))
}

func (s *service) CreateDEK(ctx context.Context, r *keyservicev1.CreateDEKRequest) (*keyservicev1.DEK, error) {
	spec := dek.Spec{Name: r.Spec.Name, Cipher: r.Spec.Cipher, Integrity: dek.Integrity(r.Spec.Integrity), Layout: r.Spec.Layout, Discard: r.Spec.Discard, IntegrityMode: r.Spec.IntegrityMode, KEK: r.Spec.Kek}
	if r.Source != "" {
		return answer(r.Recipient)(s.ring.CloneDEK(ctx, dek.ID(r.Id), spec, dek.ID(r.Source)))
	}
	return answer(r.Recipient)(s.ring.CreateDEK(ctx, dek.ID(r.Id), spec))
}

func (s *service) ClaimFormat(ctx context.Context, r *keyservicev1.ClaimFormatRequest) (*keyservicev1.Claim, error) {
	c, err := s.ring.ClaimFormat(ctx, dek.ID(r.Id), dek.Claim{Node: r.Claim.Node, UUID: r.Claim.Uuid})
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &keyservicev1.Claim{Node: c.Node, Uuid: c.UUID}, nil
}

func (s *service) ConfirmDEK(ctx context.Context, r *keyservicev1.ConfirmDEKRequest) (*keyservicev1.ConfirmDEKResponse, error) {
	h := dek.HeaderID{UUID: r.Header.Uuid, Sequence: r.Header.Sequence, Fingerprint: r.Header.Fingerprint, Backup: r.Header.Backup}
	return &keyservicev1.ConfirmDEKResponse{}, errgrpc.ToGRPC(s.ring.ConfirmDEK(ctx, dek.ID(r.Id), h))
}

func (s *service) RewrapDEK(ctx context.Context, r *keyservicev1.RewrapDEKRequest) (*keyservicev1.RewrapDEKResponse, error) {
	return &keyservicev1.RewrapDEKResponse{}, errgrpc.ToGRPC(s.ring.RewrapDEK(ctx, dek.ID(r.Id)))
}

func (s *service) DeleteDEK(ctx context.Context, r *keyservicev1.DeleteDEKRequest) (*keyservicev1.DeleteDEKResponse, error) {
	return &keyservicev1.DeleteDEKResponse{}, errgrpc.ToGRPC(s.ring.DeleteDEK(ctx, dek.ID(r.Id)))
}

// answer turns a DEK into the API's, sealed to recipient.
func answer(recipient []byte) func(dek.DEK, error) (*keyservicev1.DEK, error) {
	return func(d dek.DEK, err error) (*keyservicev1.DEK, error) {
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		defer d.Wipe()
		a := &keyservicev1.DEK{
			Id: string(d.ID), State: string(d.State), Source: string(d.Source),
			Spec: &keyservicev1.Spec{Name: d.Spec.Name, Cipher: d.Spec.Cipher, Integrity: string(d.Spec.Integrity), Layout: d.Spec.Layout, Discard: d.Spec.Discard, IntegrityMode: d.Spec.IntegrityMode, Kek: d.Spec.KEK},
		}
		if d.Claim != (dek.Claim{}) {
			a.Claim = &keyservicev1.Claim{Node: d.Claim.Node, Uuid: d.Claim.UUID}
		}
		if d.Header != (dek.HeaderID{}) {
			a.Header = &keyservicev1.Header{Uuid: d.Header.UUID, Sequence: d.Header.Sequence, Backup: d.Header.Backup}
		}
		if len(recipient) == 0 {
			return a, nil
		}
		a.SealedKey = seal(recipient, "key", d.ID, d.Key)
		if d.Previous.Len() > 0 {
			a.SealedPrevious = seal(recipient, "previous", d.ID, d.Previous)
		}
		return a, nil
	}
}

// seal is HPKE's base mode as RFC 9180 writes it down, for one message, with
// DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-256-GCM.
func seal(recipient []byte, field string, id dek.ID, key secret.Bytes) []byte {
	to, err := ecdh.X25519().NewPublicKey(recipient)
	check(err)
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	check(err)
	dh, err := ephemeral.ECDH(to)
	check(err)
	enc := ephemeral.PublicKey().Bytes()

	kem := []byte("KEM\x00\x20")
	prk := labeledExtract(kem, nil, "eae_prk", dh)
	shared := labeledExpand(kem, prk, "shared_secret", slices.Concat(enc, recipient), 32)

	suite := []byte("HPKE\x00\x20\x00\x01\x00\x02")
	schedule := slices.Concat([]byte{0},
		labeledExtract(suite, nil, "psk_id_hash", nil),
		labeledExtract(suite, nil, "info_hash", []byte("cryptcsi keyservice v1")))
	sec := labeledExtract(suite, shared, "secret", nil)
	block, err := aes.NewCipher(labeledExpand(suite, sec, "key", schedule, 32))
	check(err)
	gcm, err := cipher.NewGCM(block)
	check(err)
	aad := slices.Concat([]byte(field), []byte{0}, []byte(id))
	return gcm.Seal(enc, labeledExpand(suite, sec, "base_nonce", schedule, 12), key.Expose(), aad)
}

func labeledExtract(suite, salt []byte, label string, ikm []byte) []byte {
	prk, err := hkdf.Extract(sha256.New, slices.Concat([]byte("HPKE-v1"), suite, []byte(label), ikm), salt)
	check(err)
	return prk
}

func labeledExpand(suite, prk []byte, label string, info []byte, n int) []byte {
	out, err := hkdf.Expand(sha256.New, prk, string(slices.Concat([]byte{0, byte(n)}, []byte("HPKE-v1"), suite, []byte(label), info)), n)
	check(err)
	return out
}

// check is for errors that only a mistake in this file can make.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

// server runs a service on one address, again and again.
type server struct {
	t       *testing.T
	network string
	addr    string
	tls     *tls.Config // nil: plaintext
	service any         // with methods of the APIs
	// intercept, if set, stands around each call.
	intercept func(ctx context.Context, method string, call func(context.Context) (any, error)) (any, error)

	grpc     *grpc.Server
	serving  sync.WaitGroup
	accepted atomic.Int32 // connections
}

// newServer returns a server that does not run yet.
func newServer(t *testing.T, network string, conf *tls.Config, service any) *server {
	t.Helper()
	s := &server{t: t, network: network, tls: conf, service: service}
	if network == "unix" {
		dir, err := os.MkdirTemp("", "keyclient")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		s.addr = filepath.Join(dir, "s")
	} else {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.addr = lis.Addr().String()
		lis.Close()
	}
	t.Cleanup(s.kill)
	return s
}

// address is what a client's configuration says.
func (s *server) address() string {
	if s.network == "unix" {
		return "unix://" + s.addr
	}
	return "dns:///" + s.addr
}

func (s *server) start() *server {
	s.t.Helper()
	lis, err := net.Listen(s.network, s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	opts := []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if s.intercept == nil {
				return handler(ctx, req)
			}
			return s.intercept(ctx, info.FullMethod, func(ctx context.Context) (any, error) { return handler(ctx, req) })
		}),
	}
	if s.tls != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(s.tls)))
	}
	s.grpc = grpc.NewServer(opts...)
	if service, ok := s.service.(keyservicev1.KeyServiceServer); ok {
		keyservicev1.RegisterKeyServiceServer(s.grpc, service)
	}
	if service, ok := s.service.(keyservicev1.AdminServer); ok {
		keyservicev1.RegisterAdminServer(s.grpc, service)
	}
	if service, ok := s.service.(constellationv1.APIServer); ok {
		constellationv1.RegisterAPIServer(s.grpc, service)
	}
	g := s.grpc
	s.serving.Go(func() { _ = g.Serve(counting{lis, &s.accepted}) })
	return s
}

// kill cuts off everything, as the death of the process does.
func (s *server) kill() {
	if s.grpc != nil {
		s.grpc.Stop()
		s.serving.Wait()
		s.grpc = nil
	}
}

// counting counts the connections that a listener accepts.
type counting struct {
	net.Listener
	n *atomic.Int32
}

func (l counting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return c, err
}

// calls collects what Observe is told.
type calls struct {
	mu  sync.Mutex
	all []keyclient.Call
}

func (c *calls) observe(call keyclient.Call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all = append(c.all, call)
}

// codes returns the codes of all attempts so far, and forgets them.
func (c *calls) codes() (codes []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, call := range c.all {
		codes = append(codes, call.Code)
	}
	c.all = nil
	return codes
}

// open returns a client with cfg that is closed when t ends. It does not wait
// long between attempts.
func open(t *testing.T, cfg keyclient.Config) *keyclient.Client {
	t.Helper()
	if cfg.Backoff == 0 {
		cfg.Backoff = time.Millisecond
	}
	c, err := keyclient.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

// authority issues certificates into files.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, file: filepath.Join(t.TempDir(), "ca.crt")}
	a.key = newKey(t)
	template := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: "a CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

// issue writes a certificate for that name, valid for that long, and its key
// into dir, over what is there.
func (a *authority) issue(dir, name string, valid time.Duration) (certFile, keyFile string) {
	a.t.Helper()
	key := newKey(a.t)
	template := &x509.Certificate{
		SerialNumber: serial(a.t), Subject: pkix.Name{CommonName: name},
		DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		URIs:      []*url.URL{{Scheme: "spiffe", Host: "cluster.example", Path: "/node/" + name}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(valid),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if name == "elsewhere" {
		template.IPAddresses = nil
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	writePEM(a.t, certFile, "CERTIFICATE", der)
	writePEM(a.t, keyFile, "PRIVATE KEY", keyDER)
	return certFile, keyFile
}

// serverConfig is that of a server by that name, which wants certificates of
// the same authority.
func (a *authority) serverConfig(name string) *tls.Config {
	a.t.Helper()
	pair, err := tls.LoadX509KeyPair(a.issue(a.t.TempDir(), name, time.Hour))
	if err != nil {
		a.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12}
}

// clientConfig is that of a client with a certificate of the authority.
func (a *authority) clientConfig(address string) keyclient.Config {
	a.t.Helper()
	cert, key := a.issue(a.t.TempDir(), "node-a", time.Hour)
	return keyclient.Config{Address: address, CAFile: a.file, CertFile: cert, KeyFile: key}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func serial(t *testing.T) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// writePEM replaces a file in one step.
func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	write(t, path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}
