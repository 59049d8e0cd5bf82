package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
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
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/credentials"
)

const (
	// controller may create DEKs, node may get those whose IDs begin with its own.
	controller = "controller"
	node       = "system:node:bench"
	hosts      = "127.0.0.1"
)

// site is a directory with an authority, certificates, a master secret, and
// the processes that use them.
type site struct {
	dir, bin string
	cert     *x509.Certificate
	key      *ecdsa.PrivateKey
	running  []*process
}

// newSite makes a site in memory, if there is a file system for that: what a
// disk costs is not measured here.
func newSite(bin string) (*site, error) {
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "cryptcsi-benchkeys-")
	if err != nil {
		return nil, err
	}
	s := &site{dir: dir, bin: bin}
	if err := s.furnish(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

func (s *site) furnish() error {
	secrets := make([]byte, 64)
	if _, err := rand.Read(secrets); err != nil {
		return err
	}
	ca, _, err := s.issue("authority")
	if err != nil {
		return err
	}
	cert, key, err := s.issue("key-service")
	if err != nil {
		return err
	}
	return errors.Join(s.write("master", secrets[:32]), s.write("salt", secrets[32:]),
		s.write("ca.crt", ca), s.write("tls.crt", cert), s.write("tls.key", key))
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name string, data []byte) error { return os.WriteFile(s.path(name), data, 0o600) }

func (s *site) kek() string { return "cluster://" + s.path("master") + "?salt-file=" + s.path("salt") }

// issue makes a certificate, the first one for the authority itself.
func (s *site) issue(name string) (cert, key []byte, err error) {
	pair, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, nil, err
	}
	c := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IPAddresses: []net.IP{net.ParseIP(hosts)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if s.cert == nil {
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
		s.cert, s.key = c, pair
	}
	der, err := x509.CreateCertificate(rand.Reader, c, s.cert, pair.Public(), s.key)
	if err != nil {
		return nil, nil, err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(pair)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), nil
}

// identity makes a client's certificate, in files.
func (s *site) identity(name string) (certFile, keyFile string, err error) {
	cert, key, err := s.issue(name)
	if err != nil {
		return "", "", err
	}
	certFile, keyFile = name+".crt", name+".key"
	return s.path(certFile), s.path(keyFile), errors.Join(s.write(certFile, cert), s.write(keyFile, key))
}

// credentials are those of a client.
func (s *site) credentials(name string) (credentials.TransportCredentials, error) {
	certFile, keyFile, err := s.identity(name)
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(s.path("ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: hosts, Certificates: []tls.Certificate{pair}}), nil
}

// process is a server in a process of its own.
type process struct {
	name, address string
	cmd           *exec.Cmd
	log           *os.File
	ended         chan error
}

// start starts a server in the site's directory, and waits until it listens on
// the address that takes the place of ADDRESS in args.
func (s *site) start(ctx context.Context, name, program string, args ...string) (*process, error) {
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", hosts+":0")
	if err != nil {
		return nil, err
	}
	p := &process{name: name, address: lis.Addr().String(), ended: make(chan error, 1)}
	_ = lis.Close()
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "ADDRESS", p.address)
	}
	if p.log, err = os.Create(s.path(name + ".log")); err != nil {
		return nil, err
	}
	p.cmd = exec.Command(program, args...)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = s.dir, p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.ended <- p.cmd.Wait() }()
	s.running = append(s.running, p)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.address)
		if err == nil {
			return p, conn.Close()
		}
		select {
		case err := <-p.ended:
			p.ended <- err
			return nil, fmt.Errorf("%s ended at once: %w", name, err)
		default:
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%s does not listen: %w", name, err)
		}
	}
}

// serve starts a key service with a policy, and an audit log in a file.
func (s *site) serve(ctx context.Context, name, policy, audit string, more ...string) (*process, error) {
	if err := s.write(name+".policy", []byte(policy)); err != nil {
		return nil, err
	}
	return s.start(ctx, name, filepath.Join(s.bin, "key-service"), append([]string{"serve", "--listen=ADDRESS", "--kms-uri=" + s.kek(),
		"--tls-cert-file=tls.crt", "--tls-key-file=tls.key", "--client-ca-file=ca.crt", "--controller-identity=" + controller,
		"--volume-policy=prefix", "--prefix-file=" + name + ".policy", "--audit-log-file=" + audit}, more...)...)
}

func (p *process) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	err := <-p.ended
	p.ended <- err
	return errors.Join(err, p.log.Close())
}

// cpu is the time that the process has had of the processors so far.
func (p *process) cpu() (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// Behind the program's name, which may hold anything, come the fields from
	// the third on; user and system time are the 14th and the 15th, in 1/100 s.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, err1 := strconv.ParseInt(fields[14-3], 10, 64)
	system, err2 := strconv.ParseInt(fields[15-3], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

// memory returns the process's resident memory now and at most, in MiB.
func (p *process) memory() (now, peak float64, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(data)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kib); n == 1 {
			now = kib / 1024
		}
		if n, _ := fmt.Sscanf(line, "VmHWM: %f kB", &kib); n == 1 {
			peak = kib / 1024
		}
	}
	if peak == 0 {
		return 0, 0, fmt.Errorf("%s: the kernel does not say how much memory it has", p.name)
	}
	return now, peak, nil
}

// logs is the end of what the processes said.
func (s *site) logs() string {
	var all strings.Builder
	for _, p := range s.running {
		text, _ := os.ReadFile(p.log.Name())
		fmt.Fprintf(&all, "--- %s\n%s\n", p.name, text[max(0, len(text)-2000):])
	}
	return all.String()
}

// remove stops what still runs and removes the site.
func (s *site) remove() error {
	for _, p := range s.running {
		_ = p.stop() // or it has ended before
	}
	return os.RemoveAll(s.dir)
}
