// Package azureconfig is what the Azure clients have in common: which cloud,
// which certificates to trust, and where credentials come from. Credentials are
// never in a URI: they come from files that it names, or from the chain that
// Azure's own tools use. Nothing here calls the network but a credential that
// is asked for a token.
package azureconfig

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The names of the URI parameters.
const (
	tenantID        = "tenant-id"
	clientID        = "client-id"
	secretFile      = "client-secret-file"
	certificateFile = "client-certificate-file"
	cloudName       = "cloud"
	caFile          = "ca-file"
	tokenFile       = "token-file"
	authorityHost   = "authority-host"
)

// maxFile bounds every file that is read here, in bytes.
const maxFile = 1 << 20

// Params returns the names of the URI parameters that this package reads:
//
//   - tenant-id, client-id: the identity; also of a managed identity
//   - client-secret-file, client-certificate-file (PEM or PFX with its key, no
//     password), token-file (a federated token): how it proves itself, at most
//     one. They are read again for every token, so they can rotate.
//   - cloud: public, china or usgov; see CloudOf
//   - ca-file: PEM certificates to trust besides the system's
//   - authority-host: https URL of the token service, of a cloud that is none of those
func Params() []string {
	return []string{tenantID, clientID, secretFile, certificateFile, cloudName, caFile, tokenFile, authorityHost}
}

// CloudOf returns the value of "cloud" that the host of a service belongs to,
// empty where the name does not tell (a private name, an address).
func CloudOf(host string) string {
	host = strings.ToLower(host)
	for suffix, name := range map[string]string{
		".azure.net": "public", ".windows.net": "public",
		".azure.cn": "china", ".chinacloudapi.cn": "china",
		".usgovcloudapi.net": "usgov", ".azure.us": "usgov",
	} {
		if strings.HasSuffix(host, suffix) {
			return name
		}
	}
	return ""
}

// ClientOptions returns the options of a client: the cloud, the trusted
// certificates, and at most two retries, which end with the context. Without
// "cloud" and "authority-host" the environment (AZURE_AUTHORITY_HOST) or the
// public cloud counts. Redirects are never followed: a request holds keys.
// ErrInvalid where a value or the file cannot be used.
func ClientOptions(p map[string]string) (azcore.ClientOptions, error) {
	authority, err := authority(p)
	if err != nil {
		return azcore.ClientOptions{}, err
	}
	client, err := httpClient(p[caFile])
	if err != nil {
		return azcore.ClientOptions{}, err
	}
	return azcore.ClientOptions{
		Cloud:     cloud.Configuration{ActiveDirectoryAuthorityHost: authority},
		Retry:     policy.RetryOptions{MaxRetries: 2, RetryDelay: 200 * time.Millisecond, MaxRetryDelay: 2 * time.Second},
		Telemetry: policy.TelemetryOptions{ApplicationID: "cryptcsi"},
		Transport: client,
	}, nil
}

// authority returns the URL of the token service, empty for the default.
func authority(p map[string]string) (string, error) {
	clouds := map[string]string{
		"":       "",
		"public": cloud.AzurePublic.ActiveDirectoryAuthorityHost,
		"china":  cloud.AzureChina.ActiveDirectoryAuthorityHost,
		"usgov":  cloud.AzureGovernment.ActiveDirectoryAuthorityHost,
	}
	known, ok := clouds[p[cloudName]]
	if !ok {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is %.32q, must be one of %s", cloudName, p[cloudName],
			strings.Join(slices.Sorted(maps.Keys(clouds))[1:], ", "))
	}
	given := p[authorityHost]
	if given == "" {
		return known, nil
	}
	if u, err := url.Parse(given); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be the https URL of the token service, like https://login.example.com/", authorityHost)
	}
	return given, nil
}

// httpClient returns a client that follows no redirect and bounds its
// handshakes; calls are bounded by their contexts.
func httpClient(caFile string) (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := readFile(caFile)
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "the file of trusted certificates: %w", err)
		}
		if config.RootCAs, err = x509.SystemCertPool(); err != nil {
			config.RootCAs = x509.NewCertPool()
		}
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "the file of trusted certificates %s holds none in PEM", caFile)
		}
	}
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		TLSClientConfig:     config,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second},
		MaxIdleConnsPerHost: 10,
		IdleConnTimeout:     90 * time.Second,
	}
	return &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// Bounded returns a transport over next that reads at most limit bytes of an
// answer; a longer one fails.
func Bounded(next policy.Transporter, limit int64) policy.Transporter {
	return transportFunc(func(r *http.Request) (*http.Response, error) {
		resp, err := next.Do(r)
		if err != nil {
			return nil, err
		}
		resp.Body = http.MaxBytesReader(nil, resp.Body, limit)
		return resp, nil
	})
}

type transportFunc func(*http.Request) (*http.Response, error)

// Do is part of policy.Transporter.
func (f transportFunc) Do(r *http.Request) (*http.Response, error) { return f(r) }

// readFile reads a whole file of 1 byte to maxFile.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) == 0 || len(b) > maxFile:
		return nil, fmt.Errorf("%s has %d bytes or more, must have 1 to %d", path, len(b), maxFile)
	}
	return b, nil
}
