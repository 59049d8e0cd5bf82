package authority_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/authority"
)

const day = 24 * time.Hour

func plan() authority.Plan {
	return authority.Plan{Names: []string{"key-service.cryptcsi.svc", "key-service"}, AuthorityLife: 1200 * day, Life: 90 * day, Settle: 2 * day}
}

func start() time.Time { return time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC) }

func renew(t *testing.T, p authority.Plan, f authority.Files, now time.Time) (authority.Files, []string) {
	t.Helper()
	next, done, err := p.Renew(f, now)
	if err != nil {
		t.Fatalf("%v: %v", now, err)
	}
	return next, done
}

// trusted says whether a client that has these authorities trusts the service.
func trusted(t *testing.T, authorities []byte, f authority.Files, now time.Time) error {
	t.Helper()
	served, err := tls.X509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatalf("certificate and key: %v", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authorities)
	for _, name := range plan().Names {
		if _, err := served.Leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, DNSName: name, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
			return err
		}
	}
	return nil
}

// TestTenYears runs a renewal a day. Whoever looks at the authorities every
// second day and reads the certificate every other week is never refused.
func TestTenYears(t *testing.T) {
	var now authority.Files
	var client, server authority.Files
	most, issued, authorities := 0, 0, 0
	for d := range 3650 {
		at := start().Add(time.Duration(d) * day)
		next, _ := renew(t, plan(), now, at)
		if !bytes.Equal(next.Cert, now.Cert) {
			issued++
		}
		if len(next.Keys) > 0 && !bytes.HasPrefix(now.Authorities, next.Authorities) {
			authorities++
		}
		now = next
		if d == 0 || d%2 == 1 { // authorities come on even days
			client = now
		}
		if d%14 == 0 {
			server = now
		}
		most = max(most, bytes.Count(now.Authorities, []byte("BEGIN CERT")))
		for who, f := range map[string]authority.Files{"current": now, "read two weeks ago": server} {
			if err := trusted(t, client.Authorities, f, at); err != nil {
				t.Fatalf("day %d: a client with authorities of up to a day ago, certificate %s: %v", d, who, err)
			}
		}
	}
	if most != 2 || issued < 50 || issued > 80 || authorities < 4 {
		t.Errorf("%d authorities at a time, %d certificates, %d changes of authorities", most, issued, authorities)
	}
}

func TestSecondRunChangesNothing(t *testing.T) {
	first, done := renew(t, plan(), authority.Files{}, start())
	if len(done) != 2 {
		t.Errorf("the first run did %q", done)
	}
	again, done := renew(t, plan(), first, start().Add(day))
	if len(done) != 0 || !bytes.Equal(again.Authorities, first.Authorities) || !bytes.Equal(again.Key, first.Key) {
		t.Errorf("the second run did %q", done)
	}
	p := plan()
	p.Names = p.Names[:1]
	other, done := renew(t, p, first, start().Add(day))
	if len(done) != 1 || bytes.Equal(other.Cert, first.Cert) || !bytes.Equal(other.Authorities, first.Authorities) {
		t.Errorf("with other names it did %q", done)
	}
}

// TestLongAway: no run for longer than everything is valid.
func TestLongAway(t *testing.T) {
	first, _ := renew(t, plan(), authority.Files{}, start())
	late := start().Add(2000 * day)
	now, done := renew(t, plan(), first, late)
	if err := trusted(t, now.Authorities, now, late); err != nil || len(done) != 3 {
		t.Errorf("after everything expired: %v, %q", err, done)
	}
	if trusted(t, first.Authorities, now, late) == nil {
		t.Error("the expired authority vouches for the new certificate")
	}
}

func TestRefused(t *testing.T) {
	good, _ := renew(t, plan(), authority.Files{}, start())
	other, _ := renew(t, plan(), authority.Files{}, start())
	for name, f := range map[string]authority.Files{
		"a certificate of others":  {Cert: good.Cert, Key: good.Key},
		"authorities of others":    {Authorities: good.Authorities},
		"keys without authorities": {Keys: good.Keys},
		"keys of others":           {Authorities: good.Authorities, Keys: other.Keys},
		"too few keys":             {Authorities: slices.Concat(good.Authorities, other.Authorities), Keys: good.Keys},
		"no authority":             {Authorities: good.Cert, Keys: good.Key},
		"no PEM":                   {Authorities: []byte("x"), Keys: []byte("y")},
	} {
		if _, _, err := plan().Renew(f, start()); !errors.Is(err, errdefs.ErrState) {
			t.Errorf("%s: %v, want ErrState", name, err)
		}
	}
	broken := good
	broken.Key = other.Key
	fixed, done := renew(t, plan(), broken, start())
	if err := trusted(t, fixed.Authorities, fixed, start()); err != nil || len(done) != 1 {
		t.Errorf("a certificate with another's key: %v, %q", err, done)
	}
	for _, p := range []authority.Plan{{}, {Names: []string{"a"}, Life: day, AuthorityLife: day}, {Names: []string{"a"}, Life: day, AuthorityLife: 9 * day, Settle: 2 * day}} {
		if _, _, err := p.Renew(authority.Files{}, start()); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%+v: %v, want ErrInvalid", p, err)
		}
	}
}

// TestOpenSSLAgrees: another implementation takes the chain for a server, and
// not for a client.
func TestOpenSSLAgrees(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("REQUIRE_ALL") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	f, _ := renew(t, plan(), authority.Files{}, time.Now())
	dir := t.TempDir()
	for name, data := range map[string][]byte{"ca.crt": f.Authorities, "tls.crt": f.Cert} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	verify := func(purpose string) error {
		cmd := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-CAfile", "ca.crt", "-purpose", purpose, "-verify_hostname", plan().Names[0], "tls.crt")
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		t.Logf("%s: %s", purpose, out)
		return err
	}
	if err := verify("sslserver"); err != nil {
		t.Error(err)
	}
	if verify("sslclient") == nil {
		t.Error("the service's certificate is good for a client")
	}
	block, _ := pem.Decode(f.Authorities)
	if c, err := x509.ParseCertificate(block.Bytes); err != nil || !c.MaxPathLenZero || c.MaxPathLen != 0 {
		t.Errorf("the authority may make authorities: %v", err)
	}
}
