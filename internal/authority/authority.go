// Package authority keeps a certificate authority of one service and the
// service's certificate, and renews both so that nobody who trusts the
// authority has to notice. It calls nobody and writes nothing: files go in,
// files come out.
package authority

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"slices"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// backdate is how far certificates begin in the past, for clocks that are late.
const backdate = time.Hour

// Files are all that there is of an authority and its service, as PEM. The
// zero value is that there is nothing yet.
type Files struct {
	// Authorities are certificates, the oldest first, and Keys their private
	// keys in the same order. A client that trusts Authorities trusts Cert.
	Authorities, Keys []byte
	// Cert is the service's certificate, Key its private key.
	Cert, Key []byte
}

// Plan is what is wanted.
type Plan struct {
	// Names are those that the service is reached by.
	Names []string
	// AuthorityLife and Life are how long authorities and certificates are
	// valid. Both are renewed when a third of it is left.
	AuthorityLife, Life time.Duration
	// Settle is how long a new authority is shown to clients before it signs
	// anything.
	Settle time.Duration
}

func (p Plan) check() error {
	switch {
	case len(p.Names) == 0:
		return errdefs.Errorf(errdefs.ErrInvalid, "a certificate without a name")
	case p.Life < time.Hour || p.Settle < 0 || p.AuthorityLife < 3*p.Life || p.AuthorityLife/3 < 2*p.Settle:
		return errdefs.Errorf(errdefs.ErrInvalid, "certificates for %v under authorities for %v that sign after %v: want at least an hour, three times as long, and less than a sixth of that",
			p.Life, p.AuthorityLife, p.Settle)
	}
	return nil
}

// Renew returns what the files are to become, and in words what was done about
// them; nothing to do returns them as they are. Authorities leave when they
// have expired, and a new one comes while the one before has a third of its
// life left; it signs from Settle later. So a client may be behind by Settle,
// and the service by a third of Life. ErrState for files that do not belong to
// each other or cannot be read: they are a person's matter.
func (p Plan) Renew(old Files, now time.Time) (Files, []string, error) {
	if err := p.check(); err != nil {
		return Files{}, nil, err
	}
	all, err := parse(old)
	if err != nil {
		return Files{}, nil, err
	}
	var done []string
	kept := slices.DeleteFunc(slices.Clone(all), func(a pair) bool { return !now.Before(a.cert.NotAfter) })
	if n := len(all) - len(kept); n > 0 {
		done = append(done, fmt.Sprintf("took %d expired authorities away", n))
	}
	if len(kept) == 0 || old3rd(kept[len(kept)-1].cert, now) {
		made, err := p.newAuthority(now)
		if err != nil {
			return Files{}, nil, err
		}
		kept, done = append(kept, made), append(done, "made an authority")
	}
	next := old
	if len(done) > 0 {
		if next.Authorities, next.Keys, err = encode(kept); err != nil {
			return Files{}, nil, err
		}
	}
	signer := p.signer(kept, now)
	if why := p.unfit(old, signer.cert, now); why != "" {
		if next.Cert, next.Key, err = p.issue(signer, now); err != nil {
			return Files{}, nil, err
		}
		done = append(done, "made a certificate: "+why)
	}
	return next, done, nil
}

// old3rd says that of a certificate's life at most a third is left.
func old3rd(c *x509.Certificate, now time.Time) bool {
	return c.NotAfter.Sub(now) <= c.NotAfter.Sub(c.NotBefore)/3
}

// signer is the newest authority that clients had time to learn of, the oldest
// of all where there is none.
func (p Plan) signer(all []pair, now time.Time) pair {
	for _, a := range slices.Backward(all) {
		if now.Sub(a.cert.NotBefore.Add(backdate)) >= p.Settle {
			return a
		}
	}
	return all[0]
}

// unfit says why the service needs another certificate, "" if it needs none.
func (p Plan) unfit(f Files, signer *x509.Certificate, now time.Time) string {
	if len(f.Cert) == 0 {
		return "there was none"
	}
	have, err := parsePair(f.Cert, f.Key)
	switch {
	case err != nil:
		return "the one before could not be used: " + err.Error()
	case have.cert.CheckSignatureFrom(signer) != nil:
		return "another authority signs now"
	case !slices.Equal(have.cert.DNSNames, p.Names):
		return "it has other names"
	case old3rd(have.cert, now):
		return "the one before ends " + have.cert.NotAfter.UTC().Format(time.RFC3339)
	}
	return ""
}

func (p Plan) newAuthority(now time.Time) (pair, error) {
	return sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "cryptcsi key service " + now.UTC().Format("2006-01-02")},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(p.AuthorityLife),
		KeyUsage:              x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, // it can vouch for no client
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}, pair{})
}

func (p Plan) issue(signer pair, now time.Time) (cert, key []byte, err error) {
	end := now.Add(p.Life)
	if signer.cert.NotAfter.Before(end) {
		end = signer.cert.NotAfter
	}
	made, err := sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: p.Names[0]},
		DNSNames:              p.Names,
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, signer)
	if err != nil {
		return nil, nil, err
	}
	return encode([]pair{made})
}

// pair is a certificate and its key.
type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// sign makes a key and its certificate, signed by another one or by itself.
func sign(template *x509.Certificate, by pair) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	if by.cert == nil {
		by = pair{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	if err != nil {
		return pair{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return pair{cert: cert, key: key}, err
}

func encode(pairs []pair) (certs, keys []byte, err error) {
	for _, p := range pairs {
		der, err := x509.MarshalPKCS8PrivateKey(p.key)
		if err != nil {
			return nil, nil, err
		}
		certs = append(certs, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw})...)
		keys = append(keys, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
		clear(der)
	}
	return certs, keys, nil
}

// parse reads the authorities. Nothing of theirs beside a certificate of a
// service is a state that we do not make: somebody else keeps it.
func parse(f Files) ([]pair, error) {
	certs, keys := f.Authorities, f.Keys
	if len(keys) == 0 && (len(certs) > 0 || len(f.Cert) > 0) {
		return nil, errdefs.Errorf(errdefs.ErrState, "there are certificates, and no authority of ours that has made them: somebody else keeps them, or the authority's key was lost")
	}
	var all []pair
	for len(bytes.TrimSpace(certs)) > 0 || len(bytes.TrimSpace(keys)) > 0 {
		var cert, key *pem.Block
		cert, certs = pem.Decode(certs)
		key, keys = pem.Decode(keys)
		if cert == nil || key == nil {
			return nil, errdefs.Errorf(errdefs.ErrState, "the authorities' certificates and keys are not PEM, or not as many of one as of the other")
		}
		a, err := parsePair(pem.EncodeToMemory(cert), pem.EncodeToMemory(key))
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrState, "authority %d: %w", len(all)+1, err)
		}
		if !a.cert.IsCA {
			return nil, errdefs.Errorf(errdefs.ErrState, "authority %d is the certificate of none", len(all)+1)
		}
		all = append(all, a)
	}
	return all, nil
}

func parsePair(certPEM, keyPEM []byte) (pair, error) {
	block, _ := pem.Decode(certPEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if block == nil || keyBlock == nil {
		return pair{}, errdefs.Errorf(errdefs.ErrState, "certificate or key are not PEM")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return pair{}, errdefs.Errorf(errdefs.ErrState, "certificate: %w", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	key, ok := parsed.(*ecdsa.PrivateKey)
	if err != nil || !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return pair{}, errdefs.Errorf(errdefs.ErrState, "the key is not the certificate's") // the reason might quote it
	}
	return pair{cert: cert, key: key}, nil
}
