package main

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/internal/authority"
	"github.com/cryptcsi/cryptcsi/keyservice"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/kms/kmstest"
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

// slowStore lists when it is let.
type slowStore struct {
	envelope.Store
	asked, goOn chan struct{}
}

func (s *slowStore) List(ctx context.Context, token string, limit int) ([]string, string, error) {
	s.asked <- struct{}{}
	select {
	case <-s.goOn:
		return s.Store.List(ctx, token, limit)
	case <-ctx.Done():
		return nil, "", ctx.Err()
	}
}

// TestMetricsDoNotWaitForTheStore: who looks at metrics sees them while records are
// counted, which a large or a slow store makes long, and later how many there are.
func TestMetricsDoNotWaitForTheStore(t *testing.T) {
	mem, err := envelope.LocalStores().Open(t.Context(), "mem://")
	wants(t, "store", err, nil)
	store := &slowStore{mem, make(chan struct{}, 10), make(chan struct{})}
	ring, err := envelope.New([]*kms.KEK{kms.New("fake", kmstest.NewBackend(), kms.Options{})}, []envelope.Store{store}, envelope.Options{})
	wants(t, "keyring", err, nil)
	d, err := ring.CreateDEK(t.Context(), "d/v", dek.Spec{Cipher: dek.CipherXTS})
	wants(t, "CreateDEK", err, nil)
	d.Wipe()
	server, err := keyservice.New(keyservice.Config{Keys: ring, Policy: keyservice.Policy{Any: true}, Authenticators: []keyservice.Authenticator{keyservice.Local{}}, Audit: slog.New(slog.DiscardHandler)})
	wants(t, "key service", err, nil)
	h, m := &holder{}, newMeasured()
	m.watch(server, h.lastCount)
	records := func() string {
		page := httptest.NewRecorder()
		m.Handler(nil).ServeHTTP(page, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
		found := regexp.MustCompile(`(?m)^cryptcsi_records (\S+)$`).FindStringSubmatch(page.Body.String())
		if found == nil {
			t.Fatalf("there is no cryptcsi_records in %s", page.Body)
		}
		return found[1]
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); h.keepCounted(ctx) }()
	defer func() { stop(); <-ended }()
	if n := records(); n != "-1" {
		t.Errorf("%s records while sealed", n)
	}
	h.take(&holder{keyring: ring})
	<-store.asked
	if n := records(); n != "-1" {
		t.Errorf("%s records before they are counted", n)
	}
	if len(store.asked) > 0 {
		t.Error("who looks at metrics asks the store, and waits for it")
	}
	close(store.goOn)
	for end := time.Now().Add(30 * time.Second); records() != "1"; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s records, want 1", records())
		}
	}
}
