package azureconfig_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/azureconfig"
	"github.com/cryptcsi/cryptcsi/kms/kmstest/azurefake"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// params are those of a fake's token service, with pairs of more.
func params(s *azurefake.Server, pairs ...string) map[string]string {
	p := map[string]string{"tenant-id": azurefake.Tenant, "client-id": azurefake.Client, "ca-file": s.CAFile(), "authority-host": "https://" + s.Host()}
	for i := 0; i < len(pairs); i += 2 {
		p[pairs[i]] = pairs[i+1]
	}
	return p
}

func credential(t *testing.T, p map[string]string) azcore.TokenCredential {
	t.Helper()
	o, err := azureconfig.ClientOptions(p)
	if err != nil {
		t.Fatal(err)
	}
	c, err := azureconfig.Credential(p, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func token(ctx context.Context, c azcore.TokenCredential) (string, error) {
	token, err := c.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{"https://vault.azure.net/.default"}})
	return token.Token, err
}

func file(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestClouds(t *testing.T) {
	for _, tt := range []struct{ host, cloud, authority string }{
		{"v.vault.azure.net", "public", "https://login.microsoftonline.com/"},
		{"a.blob.core.windows.net", "public", "https://login.microsoftonline.com/"},
		{"V.MANAGEDHSM.AZURE.NET", "public", "https://login.microsoftonline.com/"},
		{"v.vault.azure.cn", "china", "https://login.chinacloudapi.cn/"},
		{"a.blob.core.chinacloudapi.cn", "china", "https://login.chinacloudapi.cn/"},
		{"v.vault.usgovcloudapi.net", "usgov", "https://login.microsoftonline.us/"},
		{"a.blob.core.usgovcloudapi.net", "usgov", "https://login.microsoftonline.us/"},
		{"127.0.0.1", "", ""}, {"evil-azure.net", "", ""}, {"", "", ""},
	} {
		if got := azureconfig.CloudOf(tt.host); got != tt.cloud {
			t.Errorf("%s is in cloud %q, want %q", tt.host, got, tt.cloud)
		}
		o, err := azureconfig.ClientOptions(map[string]string{"cloud": tt.cloud})
		if got := o.Cloud.ActiveDirectoryAuthorityHost; err != nil || got != tt.authority {
			t.Errorf("cloud %q: authority %q, %v; want %q", tt.cloud, got, err, tt.authority)
		}
	}
}

func TestInvalid(t *testing.T) {
	t.Setenv("AZURE_FEDERATED_TOKEN_FILE", "")
	there := file(t, []byte("x"))
	for want, p := range map[string]map[string]string{
		"cloud":           {"cloud": "moon"},
		"authority-host":  {"authority-host": "http://login.example.com/"},
		"none in PEM":     {"ca-file": there},
		"/none":           {"ca-file": "/none"},
		"no regular file": {"ca-file": "/dev/zero"},
		"give one of":     {"client-secret-file": there, "token-file": there},
		`needs "tenant`:   {"client-secret-file": there},
		"a certificate":   {"client-certificate-file": there, "tenant-id": "t", "client-id": "c"},
		"gone":            {"client-secret-file": "/gone", "tenant-id": "t", "client-id": "c"},
		"not there":       {"token-file": "/not there", "tenant-id": "t", "client-id": "c"},
		"token-file":      {"token-file": there, "tenant-id": "t", "client-id": ""},
		"invalid tenant":  {"client-secret-file": there, "tenant-id": "a/b", "client-id": "c"},
	} {
		o, err := azureconfig.ClientOptions(p)
		if err == nil {
			_, err = azureconfig.Credential(p, o)
		}
		if !errors.Is(err, errdefs.ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want ErrInvalid with %q", p, err, want)
		}
	}
	for _, p := range []map[string]string{{}, {"client-id": "c"}, {"tenant-id": "t"}} {
		if _, err := azureconfig.Credential(p, azcore.ClientOptions{}); err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
}

func TestSecret(t *testing.T) {
	s := azurefake.Start(t, false)
	c := credential(t, params(s, "client-secret-file", s.SecretFile()))
	first, err := token(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	s.RotateSecret(t)
	second, err := token(t.Context(), c)
	if err != nil || second == first {
		t.Errorf("after rotation: the same token, or %v", err)
	}
	if err := os.WriteFile(s.SecretFile(), []byte("S3CR3T"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = token(t.Context(), c)
	if !errors.Is(err, errdefs.ErrDenied) || !strings.Contains(err.Error(), "AADSTS7000215") || !strings.Contains(err.Error(), s.SecretFile()) || strings.Contains(err.Error(), "S3CR3T") {
		t.Errorf("a wrong secret: %v", err)
	}
}

func TestCertificate(t *testing.T) {
	s := azurefake.Start(t, false)
	cert, content := selfSigned(t)
	c := credential(t, params(s, "client-certificate-file", file(t, content)))
	if _, err := token(t.Context(), c); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("a certificate that nobody knows: %v", err)
	}
	s.Trust(cert, "")
	if _, err := token(t.Context(), c); err != nil {
		t.Error(err)
	}
}

// selfSigned returns a certificate, and PEM of it with its key.
func selfSigned(t *testing.T) (*x509.Certificate, []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "client"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
}

func TestWorkloadIdentity(t *testing.T) {
	s := azurefake.Start(t, false)
	s.Trust(nil, "federated-2")
	path := file(t, []byte("federated-1"))
	c := credential(t, params(s, "token-file", path))
	if _, err := token(t.Context(), c); !errors.Is(err, errdefs.ErrDenied) {
		t.Errorf("an old token: %v", err)
	}
	if err := os.WriteFile(path, []byte("federated-2"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := token(t.Context(), c); err != nil {
		t.Errorf("after the file was written anew: %v", err)
	}
	t.Setenv("AZURE_FEDERATED_TOKEN_FILE", path)
	if _, err := token(t.Context(), credential(t, params(s))); err != nil {
		t.Errorf("by the environment: %v", err)
	}
}

// TestEnvironment: the default chain begins with it.
func TestEnvironment(t *testing.T) {
	s := azurefake.Start(t, false)
	t.Setenv("AZURE_TENANT_ID", azurefake.Tenant)
	t.Setenv("AZURE_CLIENT_ID", azurefake.Client)
	t.Setenv("AZURE_CLIENT_SECRET", s.Secret())
	if _, err := token(t.Context(), credential(t, params(s, "tenant-id", "", "client-id", ""))); err != nil {
		t.Error(err)
	}
}

// TestUnavailable: a token service out of reach is no refusal.
func TestUnavailable(t *testing.T) {
	s := azurefake.Start(t, false)
	for what, host := range map[string]string{"nobody there": peers.Addr(t), "no answer": peers.Silent(t)} {
		c := credential(t, params(s, "client-secret-file", s.SecretFile(), "authority-host", "https://"+host))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		start := time.Now()
		_, err := token(ctx, c)
		cancel()
		if !errors.Is(err, errdefs.ErrUnavailable) || time.Since(start) > 4*time.Second {
			t.Errorf("%s: %v after %v", what, err, time.Since(start))
		}
	}
	broken := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	defer broken.Close()
	p := params(s, "client-secret-file", s.SecretFile(), "authority-host", broken.URL)
	if _, err := token(t.Context(), credential(t, p)); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "502") {
		t.Errorf("a broken token service: %v", err)
	}
}

// TestTransport: no redirect is followed, and no answer is endless.
func TestTransport(t *testing.T) {
	var asked []string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path)
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
			return
		}
		_, _ = w.Write(make([]byte, 1<<16))
	}))
	defer server.Close()
	ca := file(t, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	o, err := azureconfig.ClientOptions(map[string]string{"ca-file": ca})
	if err != nil {
		t.Fatal(err)
	}
	for path, limit := range map[string]int64{"/redirect": 1 << 20, "/short": 1 << 10, "/long": 1 << 16} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := azureconfig.Bounded(o.Transport, limit).Do(r)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if int64(len(b)) > limit || (err != nil) != (path == "/short") {
			t.Errorf("%s: %d bytes, %v", path, len(b), err)
		}
	}
	if len(asked) != 3 {
		t.Errorf("asked for %v", asked)
	}
}
