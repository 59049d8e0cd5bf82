package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
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
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
	"github.com/cryptcsi/cryptcsi/secret"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	a := &authority{cert: cert, key: key, file: filepath.Join(t.TempDir(), "ca.crt")}
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

// issue writes a certificate with that common name, or SPIFFE ID, and its key.
func (a *authority) issue(t *testing.T, name string) (certFile, keyFile string) {
	t.Helper()
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if strings.HasPrefix(name, "spiffe:") {
		u, _ := url.Parse(name)
		template.URIs, template.Subject = []*url.URL{u}, pkix.Name{}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	raw, _ := x509.MarshalPKCS8PrivateKey(key)
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	writePEM(t, certFile, "CERTIFICATE", der)
	writePEM(t, keyFile, "PRIVATE KEY", raw)
	return certFile, keyFile
}

func writePEM(t *testing.T, file, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// writeFiles returns the flags that name the files of a node that can be recovered.
func writeFiles(t *testing.T, a *authority, node string) string {
	cert, key := a.issue(t, node)
	return " --recovery-cert-file=" + cert + " --recovery-key-file=" + key + " --recovery-client-ca-file=" + a.file
}

// stranded is a node whose disk has data and whose keys are with an operator.
type stranded struct {
	*bench
	ca           *authority
	master, salt []byte
	store        string
	result       chan error
	address      string
}

// strand makes the disk and its record with a KMS and a store, and starts an
// open that cannot reach them.
func strand(t *testing.T, args ...string) *stranded {
	t.Helper()
	s := equip(t)
	s.opensDirectly(t)
	s.devices.Kernel.Reboot()
	s.wait(t, args...)
	return s
}

// equip makes the disk and what the operator has.
func equip(t *testing.T) *stranded {
	return &stranded{bench: newBench(t), ca: newAuthority(t), store: t.TempDir(), result: make(chan error, 1),
		master: []byte(strings.Repeat("m", 32)), salt: []byte(strings.Repeat("s", 32))}
}

// directly lets do work with KMS and store.
func (s *stranded) directly(t *testing.T, do func(f *openFlags, way *ordinary)) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string][]byte{"master": s.master, "salt": s.salt} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := s.flags(t, "--create-keys", "--kms-uri=cluster://"+dir+"/master?salt-file="+dir+"/salt", "--storage-uri=file://"+s.store)
	way, closeKeys, err := f.way(t.Context(), slog.New(slog.NewTextHandler(s.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer closeKeys()
	do(f, way)
}

func (s *stranded) opensDirectly(t *testing.T) {
	t.Helper()
	s.directly(t, func(f *openFlags, way *ordinary) {
		if _, err := s.run(t, f, way); err != nil {
			t.Fatal(err)
		}
	})
}

// wait starts an open that waits for an operator.
func (s *stranded) wait(t *testing.T, args ...string) {
	t.Helper()
	f := s.recoverable(t, args...)
	way, closeKeys, err := f.way(t.Context(), slog.New(slog.NewTextHandler(s.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	s.start(t, f, way, closeKeys)
}

// recoverable are the flags of an open that waits for an operator.
func (s *stranded) recoverable(t *testing.T, args ...string) *openFlags {
	t.Helper()
	args = append(args, strings.Fields(writeFiles(t, s.ca, "node"))...)
	return s.flags(t, append(args, "--recovery-listen=127.0.0.1:0", "--recovery-operator-identity=operator",
		"--recovery-operator-identity=spiffe://example.org/operator", "--recovery-trust-domain=example.org")...)
}

func (s *stranded) start(t *testing.T, f *openFlags, way *ordinary, closeKeys func()) {
	t.Helper()
	go func() {
		path, err := s.run(t, f, way)
		if err == nil && path != "/dev/mapper/"+mappingOf {
			err = errors.New("another path: " + path)
		}
		closeKeys()
		s.result <- err
	}()
	s.address = s.log.await(t, `may bring the key.* address=(\S+)`)
}

// as is the client of somebody with such a certificate.
func (s *stranded) as(t *testing.T, ca *authority, name string) *keyclient.Client {
	t.Helper()
	cert, key := ca.issue(t, name)
	c, err := keyclient.New(keyclient.Config{Address: "dns:///" + s.address, CAFile: s.ca.file, CertFile: cert, KeyFile: key, Attempts: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// recover calls Recover with that master secret.
func (s *stranded) recover(t *testing.T, c *keyclient.Client, master []byte) error {
	t.Helper()
	defer c.Close()
	g := keyclient.Given{
		KMSURIs: []string{"cluster://{0}?salt-file={1}"}, StorageURIs: []string{"file://" + s.store},
		Files: []secret.Bytes{secret.Take(slices.Clone(master)), secret.Take(slices.Clone(s.salt))},
	}
	defer g.Wipe()
	r, err := c.Recover(t.Context(), g)
	if err == nil && (r != keyclient.Recovered{DEK: stateDisk, Mapping: mappingOf}) {
		t.Errorf("Recover says %+v", r)
	}
	return err
}

// notLetIn connects as an operator of that authority, or without a certificate.
func (s *stranded) notLetIn(t *testing.T, ca *authority) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(s.ca.cert)
	conf := &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}}
	if ca != nil {
		ours, err := tls.LoadX509KeyPair(ca.issue(t, "operator"))
		if err != nil {
			t.Fatal(err)
		}
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &ours, nil }
	}
	conn, err := tls.Dial("tcp", s.address, conf)
	if err == nil { // with TLS 1.3 the client is told afterwards
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if err == nil || !strings.Contains(err.Error(), "remote error: tls: ") {
		t.Errorf("somebody unknown was let in: %v", err)
	}
}

// ended says how the open ended, which it must by now.
func (s *stranded) ended(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.result:
		return err
	case <-time.After(time.Minute):
		t.Fatal("open goes on")
		return nil
	}
}

// unreachable is a key service that nobody serves.
func unreachable(t *testing.T) []string {
	return []string{"--key-service=unix://" + filepath.Join(t.TempDir(), "none.sock"), "--key-service-timeout=10ms"}
}

// TestRecovery: strangers and wrong secrets change nothing, the right one opens.
func TestRecovery(t *testing.T) {
	for name, args := range map[string][]string{"beside the ordinary way": unreachable(t), "alone": nil} {
		t.Run(name, func(t *testing.T) {
			s := strand(t, args...)
			before := s.content(t)
			for _, who := range []string{"stranger", "operator2", "system:node:n", "spiffe://example.org/operator/x", "spiffe://example.com/operator"} {
				if err := s.recover(t, s.as(t, s.ca, who), s.master); !errors.Is(err, errdefs.ErrDenied) {
					t.Errorf("%s: %v", who, err)
				}
				s.log.await(t, `msg=recovery identity=.*opened=false error=`)
			}
			s.notLetIn(t, newAuthority(t))
			s.notLetIn(t, nil)
			err := s.recover(t, s.as(t, s.ca, "operator"), []byte(strings.Repeat("w", 32)))
			if err == nil || !strings.Contains(err.Error(), "tried and not taken, nothing has changed") || errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("a wrong secret: %v", err)
			}
			s.log.await(t, `msg=recovery identity=operator peer=127\S+ dek=\S+ opened=false error=".*tried and not taken`)
			s.closed(t)
			if s.content(t) != before {
				t.Error("the disk was written")
			}
			if err := s.recover(t, s.as(t, s.ca, "spiffe://example.org/operator"), s.master); err != nil {
				t.Errorf("the right secret: %v", err)
			}
			if err := s.ended(t); err != nil {
				t.Errorf("open: %v", err)
			}
			s.log.await(t, `msg=recovery identity=spiffe://example.org/operator peer=127\S+ dek=\S+ opened=true`)
			if _, err := net.Dial("tcp", s.address); err == nil {
				t.Error("it still listens")
			}
			for _, hidden := range []string{string(s.master), string(s.salt), strings.Repeat("w", 32)} {
				if strings.Contains(s.log.String(), hidden) {
					t.Error("a secret is in the log")
				}
			}
		})
	}
}

// TestRecoveryTriesTheDevice: a key that is right for the record and wrong for
// the device opens nothing.
func TestRecoveryTriesTheDevice(t *testing.T) {
	s := strand(t)
	other := s.devices.Kernel.AddDisk(64 << 20)
	s.devices.Kernel.SwapDisks(other, s.disk)
	if err := s.recover(t, s.as(t, s.ca, "operator"), s.master); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("a blank disk in its place: %v", err)
	}
	s.closed(t)
	s.devices.Kernel.SwapDisks(other, s.disk)
	if err := s.recover(t, s.as(t, s.ca, "operator"), s.master); err != nil {
		t.Error(err)
	}
	if err := s.ended(t); err != nil {
		t.Error(err)
	}
}

// TestRecoveryFormatsNothing: a record that was never confirmed is none to
// recover by, claimed or not, whatever the disk looks like.
func TestRecoveryFormatsNothing(t *testing.T) {
	s := equip(t)
	s.directly(t, func(f *openFlags, way *ordinary) {
		d, err := way.keys.CreateDEK(t.Context(), stateDisk, dek.Spec{Cipher: dek.CipherXTS})
		d.Wipe()
		if err == nil {
			_, err = way.keys.ClaimFormat(t.Context(), stateDisk, dek.Claim{Node: "n", UUID: dek.NewUUID()})
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	s.wait(t)
	before := s.content(t)
	if err := s.recover(t, s.as(t, s.ca, "operator"), s.master); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "never finished") {
		t.Errorf("a new volume: %v", err)
	}
	s.closed(t)
	if s.content(t) != before {
		t.Error("the disk was written")
	}
	s.opensDirectly(t) // the ordinary way does that
	if err := s.recover(t, s.as(t, s.ca, "operator"), s.master); err != nil {
		t.Errorf("once it is finished: %v", err)
	}
	if err := s.ended(t); err != nil {
		t.Error(err)
	}
}

// TestRecoveryOneAtATime: a second attempt is told so, and tries of the ordinary
// way and of an operator never meet on the device.
func TestRecoveryOneAtATime(t *testing.T) {
	s := strand(t)
	reached, proceed := make(chan struct{}), make(chan struct{})
	s.devices.before = func(string) error { close(reached); <-proceed; return nil }
	first := make(chan error, 1)
	c := s.as(t, s.ca, "operator")
	go func() { first <- s.recover(t, c, s.master) }()
	<-reached
	if err := s.recover(t, s.as(t, s.ca, "operator"), s.master); !errors.Is(err, errdefs.ErrConflict) {
		t.Errorf("the second: %v", err)
	}
	close(proceed)
	if err := errors.Join(<-first, s.ended(t)); err != nil {
		t.Error(err)
	}
}

// TestRecoveryBesideTries: the ordinary way tries a key that is wrong, again and
// again; it never meets an operator on the device and does not keep him out.
func TestRecoveryBesideTries(t *testing.T) {
	s := equip(t)
	s.opensDirectly(t)
	s.devices.Kernel.Reboot()
	d, err := s.keys.CreateDEK(t.Context(), stateDisk, dek.Spec{Cipher: dek.CipherXTS}) // another one
	d.Wipe()
	if err == nil {
		_, err = s.keys.ClaimFormat(t.Context(), stateDisk, dek.Claim{Node: "n", UUID: dek.NewUUID()})
	}
	if err != nil {
		t.Fatal(err)
	}
	reached, proceed := make(chan struct{}, 1000), make(chan struct{})
	s.devices.before = func(string) error { reached <- struct{}{}; <-proceed; return nil }
	s.start(t, s.recoverable(t), &ordinary{keys: s.keys, node: "n"}, func() {})
	<-reached
	proceed <- struct{}{}
	s.log.await(t, `msg="not open yet" .*a header that is not ours`)
	<-reached // the next try of the ordinary way is at the device
	first := make(chan error, 1)
	c := s.as(t, s.ca, "operator")
	go func() { first <- s.recover(t, c, s.master) }()
	select {
	case <-reached:
		t.Error("both are at the device")
	case <-time.After(300 * time.Millisecond): // nothing tells that somebody waits
	}
	close(proceed)
	if err := errors.Join(<-first, s.ended(t)); err != nil {
		t.Error(err)
	}
}

// TestOrdinaryWayWins: what was denied or away may come by itself while an
// operator is waited for; then nobody is waited for any more.
func TestOrdinaryWayWins(t *testing.T) {
	b := newBench(t)
	b.opens(t, "--create-keys")
	b.close(t)
	s := &stranded{bench: b, ca: newAuthority(t)}
	denied := errdefs.Errorf(errdefs.ErrDenied, "no")
	b.faults["GetDEK"] = []error{denied, away(), errdefs.Errorf(errdefs.ErrCorrupt, "bad"), denied}
	args := append(strings.Fields(writeFiles(t, s.ca, "node")), "--recovery-listen=127.0.0.1:0", "--recovery-operator-identity=operator")
	b.opens(t, args...)
	if n := strings.Count(b.log.String(), "gives_up_in=never"); n != 4 {
		t.Errorf("%d lines of progress, want 4", n)
	}
	if _, err := net.Dial("tcp", b.log.await(t, `address=(\S+)`)); err == nil {
		t.Error("it still listens")
	}
	b.close(t)
}

// TestNobodyComes: --wait bounds the waiting for an operator.
func TestNobodyComes(t *testing.T) {
	s := strand(t, "--wait=20ms")
	if err := s.ended(t); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "nobody has brought") {
		t.Errorf("without an operator: %v", err)
	}
	s.wait(t, append(unreachable(t), "--wait=50ms")...)
	if err := s.ended(t); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without key service and operator: %v", err)
	}
	s.closed(t)
}
