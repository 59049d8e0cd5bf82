package stack

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/cryptcsi/cryptcsi/keyclient"
)

// Who asks the key service, by the common names of their certificates.
const (
	NodeIdentity       = "system:node:" + Node1
	OtherNode          = "system:node:node-2"
	ControllerIdentity = "controller"
	OperatorIdentity   = "operator"
)

// policy gives the DEKs of loopdriver's volumes to node-1.
const policy = NodeIdentity + `: ["loop.cryptcsi.io/*"]` + "\n" + OtherNode + `: ["another.example.com/*"]` + "\n"

// keyService is a key service, and what others need to reach it.
type keyService struct {
	address    string // host:port
	files      certificates
	pin        string
	controller *keyclient.Client
	process    *process
}

// makeKeyService makes certificates and a policy, and starts the key service.
func (s *Stack) makeKeyService(ctx context.Context) error {
	// A free port: between here and the start nobody else listens in a guest.
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.keys = &keyService{address: lis.Addr().String(), files: certificates(s.Path("tls"))}
	if err := errors.Join(lis.Close(), os.WriteFile(s.Path("policy.yaml"), []byte(policy), 0o600)); err != nil {
		return err
	}
	if s.keys.pin, err = s.keys.files.make("key-service", NodeIdentity, OtherNode, ControllerIdentity, OperatorIdentity); err != nil {
		return err
	}
	c := s.KeyClient(ControllerIdentity)
	c.WithoutKeys = true
	if s.keys.controller, err = keyclient.New(c); err != nil {
		return err
	}
	return s.StartKeyService(ctx, "--kms-uri="+s.KEK(), "--storage-uri="+s.Store())
}

// KeyClient is how one of the identities reaches the key service.
func (s *Stack) KeyClient(identity string) keyclient.Config {
	f := s.keys.files
	return keyclient.Config{Address: s.KeyAddress(), CAFile: f.ca(), CertFile: f.cert(identity), KeyFile: f.key(identity)}
}

// Impostor connects to the key service with a certificate in the node's name
// that somebody has made by himself, and returns how the service ends that;
// nil if it does not.
func (s *Stack) Impostor(ctx context.Context) error {
	own := certificates(s.Path("impostor"))
	if _, err := own.make(NodeIdentity); err != nil {
		return err
	}
	conf, err := s.keys.files.config(NodeIdentity)
	if err != nil {
		return err
	}
	if conf.Certificates[0], err = tls.LoadX509KeyPair(own.cert(NodeIdentity), own.key(NodeIdentity)); err != nil {
		return err
	}
	conf.NextProtos = []string{"h2"}
	conn, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", s.keys.address)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1)) // gRPC's server speaks first
	return err
}

// KeyAddress is where the key service listens.
func (s *Stack) KeyAddress() string { return "dns:///" + s.keys.address }

// AuditLog is the key service's.
func (s *Stack) AuditLog() string { return s.Path("audit.json") }

// StartKeyService starts the key service, at first or after StopKeyService,
// with KMS and store or --sealed in args.
func (s *Stack) StartKeyService(ctx context.Context, args ...string) (err error) {
	f := s.keys.files
	s.keys.process, err = startProcess(filepath.Join(s.cfg.Bin, "key-service"), append([]string{"serve",
		"--listen=" + s.keys.address, "--tls-cert-file=" + f.cert("key-service"), "--tls-key-file=" + f.key("key-service"), "--client-ca-file=" + f.ca(),
		"--volume-policy=prefix", "--prefix-file=" + s.Path("policy.yaml"), "--audit-log-file=" + s.AuditLog(),
		"--controller-identity=" + ControllerIdentity, "--operator-identity=" + OperatorIdentity,
	}, args...))
	if err != nil {
		return err
	}
	conf, err := f.config(OperatorIdentity)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(s.KeyAddress(), grpc.WithTransportCredentials(credentials.NewTLS(conf)))
	if err != nil {
		return err
	}
	defer conn.Close()
	return s.keys.process.serves(ctx, func(ctx context.Context) error {
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err
	})
}

// StopKeyService ends the key service with a signal and waits for it.
func (s *Stack) StopKeyService(sig syscall.Signal) error { return s.keys.process.stop(sig) }

// Unseal runs `key-service unseal` with a master secret, as an operator who
// has pinned the service's key, and returns what it printed.
func (s *Stack) Unseal(ctx context.Context, masterSecret string) (string, error) {
	f := s.keys.files
	out, err := exec.CommandContext(ctx, filepath.Join(s.cfg.Bin, "key-service"), "unseal", "--address="+s.KeyAddress(), "--server-key-sha256="+s.keys.pin,
		"--ca-file="+f.ca(), "--cert-file="+f.cert(OperatorIdentity), "--key-file="+f.key(OperatorIdentity),
		"--kms-uri=cluster://{0}?salt-file={1}", "--storage-uri="+s.Store(), "--file="+masterSecret, "--file="+s.Path("salt")).CombinedOutput()
	return string(out), err
}

// KeyServiceArgs are the flags with which csi-plugin asks the key service as one
// of the identities. It gives up a missing service after four seconds, where
// kubelet's patience would be two minutes.
func (s *Stack) KeyServiceArgs(identity string) []string {
	f := s.keys.files
	return []string{"--key-service=" + s.KeyAddress(), "--key-service-timeout=1s", "--key-service-ca-file=" + f.ca(),
		"--key-service-cert-file=" + f.cert(identity), "--key-service-key-file=" + f.key(identity)}
}

// certificates is a folder with an authority's certificate and those that it
// has signed, each with its key. The authority's own key is kept nowhere.
type certificates string

func (c certificates) ca() string { return filepath.Join(string(c), "ca.crt") }

func (c certificates) cert(identity string) string { return c.file(identity, ".crt") }

func (c certificates) key(identity string) string { return c.file(identity, ".key") }

func (c certificates) file(identity, ending string) string {
	return filepath.Join(string(c), strings.ReplaceAll(identity, ":", "-")+ending)
}

// make makes all of them, and returns the pin of the key service's key:
// SHA-256 of its SubjectPublicKeyInfo.
func (c certificates) make(service string, clients ...string) (pin string, err error) {
	if err := os.Mkdir(string(c), 0o700); err != nil {
		return "", err
	}
	authority, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	ca := template(1, "demo authority")
	ca.IsCA, ca.BasicConstraintsValid, ca.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, authority.Public(), authority)
	if err != nil {
		return "", err
	}
	if err := writePEM(c.ca(), "CERTIFICATE", der); err != nil {
		return "", err
	}
	for i, identity := range clients {
		if _, err := c.sign(template(int64(i+3), identity), ca, authority); err != nil {
			return "", err
		}
	}
	public, err := c.sign(template(2, service), ca, authority)
	return fmt.Sprintf("%x", sha256.Sum256(public)), err
}

// sign writes a certificate with a new key, whose public half it returns.
func (c certificates) sign(leaf, ca *x509.Certificate, authority *ecdsa.PrivateKey) (public []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	cert, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), authority)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	name := leaf.Subject.CommonName
	if err := errors.Join(writePEM(c.cert(name), "CERTIFICATE", cert), writePEM(c.key(name), "PRIVATE KEY", private)); err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(key.Public())
}

func template(serial int64, name string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// config is a client's, as one of the identities.
func (c certificates) config(identity string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(c.cert(identity), c.key(identity))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(c.ca())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s has no certificate", c.ca())
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: "127.0.0.1"}, nil
}
