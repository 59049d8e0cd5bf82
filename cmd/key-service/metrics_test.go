package main

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/internal/authority"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// TestCertificateMetric: it is the end of the certificate that a client sees now, also
// after another one has taken its place.
func TestCertificateMetric(t *testing.T) {
	dir := t.TempDir()
	cert, key, ca := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), filepath.Join(dir, "ca.crt")
	issue := func(life time.Duration) {
		t.Helper()
		files, _, err := authority.Plan{Names: []string{"localhost"}, AuthorityLife: 10 * life, Life: life}.Renew(authority.Files{}, time.Now())
		wants(t, "certificate", err, nil)
		for file, content := range map[string][]byte{cert: files.Cert, key: files.Key, ca: files.Authorities} {
			wants(t, file, os.WriteFile(file, content, 0o600), nil)
		}
	}
	issue(90 * day)
	addr, metrics := peers.Addr(t), peers.Addr(t)
	start(t, with(append(localStore(t), localKEK(t)...), "--listen="+addr, "--volume-policy=any", "--metrics-address="+metrics,
		"--tls-cert-file="+cert, "--tls-key-file="+key, "--client-ca-file="+ca)...)
	for _, life := range []time.Duration{90 * day, 7 * day} {
		issue(life)
		m := regexp.MustCompile(`(?m)^cryptcsi_certificate_expiry_timestamp_seconds (\S+)$`).FindStringSubmatch(fetch(t, "http://"+metrics+"/metrics"))
		if m == nil {
			t.Fatal("there is no metric")
		}
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}) //nolint:gosec // only looks
		wants(t, "dial", err, nil)
		until := conn.ConnectionState().PeerCertificates[0].NotAfter
		wants(t, "close", conn.Close(), nil)
		if got, err := strconv.ParseFloat(m[1], 64); err != nil || int64(got) != until.Unix() || time.Until(until) > life+time.Hour || time.Until(until) < life/2 {
			t.Errorf("the metric is %s, %v; the certificate ends %v (%d)", m[1], err, until, until.Unix())
		}
	}
}
