package stores

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// writeAccount writes a service account's file whose tokens come from url.
func writeAccount(t *testing.T, file, url string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	content, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "test", "private_key_id": "1", "client_email": "test@test.iam.gserviceaccount.com",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), "token_uri": url,
	})
	if err == nil {
		err = os.WriteFile(file, content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestGCPCredentials(t *testing.T) {
	var status, asked atomic.Int64
	status.Store(http.StatusOK)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(int(status.Load()))
		if status.Load() == http.StatusOK {
			fmt.Fprintf(w, `{"access_token":"token-%d","token_type":"Bearer","expires_in":3600}`, asked.Add(1))
		} else {
			fmt.Fprint(w, `{"error":"invalid_grant","error_description":"account not found"}`)
		}
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "gcp.json")
	writeAccount(t, file, server.URL)
	c, err := newGCPCredentials(file)
	if err != nil {
		t.Fatal(err)
	}
	if asked.Load() != 0 {
		t.Error("opening asked for a token")
	}
	for range 2 {
		if token, err := c.token(t.Context()); err != nil || token != "token-1" {
			t.Errorf("token %q, %v", token, err)
		}
	}
	writeAccount(t, file, server.URL) // rotated
	if token, err := c.token(t.Context()); err != nil || token != "token-2" {
		t.Errorf("after rotation: token %q, %v", token, err)
	}

	for answer, class := range map[int64]error{http.StatusBadRequest: errdefs.ErrDenied, http.StatusUnauthorized: errdefs.ErrDenied, http.StatusBadGateway: errdefs.ErrUnavailable} {
		status.Store(answer)
		writeAccount(t, file, server.URL)
		if _, err = c.token(t.Context()); !errors.Is(err, class) || !strings.Contains(err.Error(), file) {
			t.Errorf("answered %d: %v, want %v", answer, err, class)
		}
	}
	server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err = c.token(ctx); !errors.Is(err, errdefs.ErrUnavailable) && ctx.Err() == nil {
		t.Errorf("nobody there: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err = c.token(t.Context()); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("the file is gone: %v", err)
	}
}

func TestGCPTransport(t *testing.T) {
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"access_token":"the-token","token_type":"Bearer","expires_in":3600}`)
	}))
	defer tokens.Close()
	file := filepath.Join(t.TempDir(), "gcp.json")
	writeAccount(t, file, tokens.URL)
	credentials, err := newGCPCredentials(file)
	if err != nil {
		t.Fatal(err)
	}
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("Authorization"))
	}))
	defer service.Close()
	client := &http.Client{Transport: &gcpTransport{next: http.DefaultTransport, credentials: credentials}}
	answer, err := client.Get(service.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body := make([]byte, 100)
	n, _ := answer.Body.Read(body)
	if got := string(body[:n]); got != "Bearer the-token" {
		t.Errorf("the service got %q", got)
	}
	writeAccount(t, file, "http://127.0.0.1:1")
	if _, err := client.Get(service.URL); !errors.Is(err, errdefs.ErrUnavailable) { //nolint:bodyclose // there is none
		t.Errorf("without a token: %v", err)
	}
}
