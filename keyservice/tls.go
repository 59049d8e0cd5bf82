package keyservice

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// maxPEM bounds a certificate or key file, in bytes.
const maxPEM = 1 << 20

// TLSFiles is a server's certificate with its chain, its key, and the
// authorities that sign its clients' certificates, all PEM: tls.crt, tls.key
// and ca.crt as cert-manager writes them.
type TLSFiles struct {
	Cert, Key string
	ClientCA  string // "": clients show no certificates, because they have tokens
	// Optional lets clients in that show no certificate, because they have a
	// token. One that is shown must be good all the same.
	Optional bool
	// Log is told of files that cannot be used; nil: nobody.
	Log *slog.Logger
	// Clock is nil for time.Now.
	Clock func() time.Time
}

// Config reads the files and returns a configuration for TLS 1.3, without
// session tickets, because a resumed session has its client's certificate from
// an earlier day. The files are looked at in every handshake and read again
// when one of them changed; where they cannot be used then, the ones before stay
// in use and the log says so. ErrInvalid for files that cannot be used now.
func (f TLSFiles) Config() (*tls.Config, error) {
	if f.Log == nil {
		f.Log = slog.New(slog.DiscardHandler)
	}
	r := &tlsReloader{files: f, watched: watched{paths: f.paths(), most: maxPEM}}
	pem, _, err := r.watched.changed()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "reading TLS files: %w", err)
	}
	if r.conf, err = f.parse(pem); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "TLS files: %w", err)
	}
	conf := r.conf.Clone()
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return r.current(), nil }
	return conf, nil
}

// tlsReloader keeps the configuration that the files gave last.
type tlsReloader struct {
	files TLSFiles

	mu      sync.Mutex
	watched watched
	conf    *tls.Config
}

func (r *tlsReloader) current() *tls.Config {
	r.mu.Lock()
	defer r.mu.Unlock()
	pem, changed, err := r.watched.changed()
	if !changed {
		return r.conf
	}
	var conf *tls.Config
	if err == nil {
		conf, err = r.files.parse(pem)
	}
	if err != nil {
		r.files.Log.Error("the changed certificate files are not used, the ones before stay in use", "error", err)
		return r.conf
	}
	r.files.Log.Info("the certificate files were read again", "expires", conf.Certificates[0].Leaf.NotAfter)
	r.conf = conf
	return conf
}

// paths are those that there are: without authorities nobody shows a certificate.
func (f TLSFiles) paths() []string {
	if f.ClientCA == "" {
		return []string{f.Cert, f.Key}
	}
	return []string{f.Cert, f.Key, f.ClientCA}
}

// parse makes a configuration of certificate, key and authorities.
func (f TLSFiles) parse(pem [][]byte) (*tls.Config, error) {
	defer clear(pem[1])
	pair, err := tls.X509KeyPair(pem[0], pem[1])
	if err != nil {
		return nil, fmt.Errorf("certificate %s with key %s: %w", f.Cert, f.Key, err)
	}
	clients := x509.NewCertPool()
	if f.ClientCA != "" && !clients.AppendCertsFromPEM(pem[2]) {
		return nil, fmt.Errorf("%s has no certificate of an authority in it", f.ClientCA)
	}
	conf := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{pair},
		ClientCAs:              clients,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		NextProtos:             []string{"h2"},
		SessionTicketsDisabled: true,
		Time:                   f.Clock,
	}
	switch {
	case f.ClientCA == "":
		conf.ClientAuth, conf.ClientCAs = tls.NoClientCert, nil
	case f.Optional:
		conf.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return conf, nil
}
