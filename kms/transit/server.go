package transit

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/openbao/openbao/api/v2"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// URI parameters.
const (
	paramCA        = "ca-file"
	paramCert      = "cert-file"
	paramKey       = "key-file"
	paramNamespace = "namespace"
	paramPlaintext = "plaintext"
)

const (
	// maxAnswer bounds what a server may answer, in bytes.
	maxAnswer = 1 << 20
	// maxFile bounds what a file of ours may hold, in bytes.
	maxFile = 64 << 10
	// maxWords bounds what a server's error may add to ours, in bytes.
	maxWords = 300
)

// server is where the engine is.
type server struct {
	address   string // with scheme and port
	namespace string
	web       *http.Transport
}

func newServer(u *url.URL, params map[string]string) (*server, error) {
	host, port := u.Hostname(), u.Port()
	if port == "" {
		port = "8200"
	}
	s := &server{
		address:   "https://" + net.JoinHostPort(host, port),
		namespace: params[paramNamespace],
		web:       http.DefaultTransport.(*http.Transport).Clone(), // HTTPS_PROXY counts
	}
	switch params[paramPlaintext] {
	case "", "false":
	case "true":
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s=true is for an agent on this machine: the host must be localhost or a loopback address", paramPlaintext)
		}
		if params[paramCA]+params[paramCert]+params[paramKey] != "" {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s=true excludes %s, %s and %s", paramPlaintext, paramCA, paramCert, paramKey)
		}
		s.address = "http://" + net.JoinHostPort(host, port)
	default:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be true or false", paramPlaintext)
	}
	// A connection that died silently is found out and not used again.
	s.web.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second}
	var err error
	s.web.TLSClientConfig, err = tlsConfig(params)
	return s, err
}

func tlsConfig(params map[string]string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca := params[paramCA]; ca != "" {
		pem, err := readFile(paramCA, ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(pem)) {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s %s holds no certificate in PEM", paramCA, ca)
		}
	}
	certFile, keyFile := params[paramCert], params[paramKey]
	if certFile == "" && keyFile == "" {
		return config, nil
	}
	if certFile == "" || keyFile == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameters %q and %q go together", paramCert, paramKey)
	}
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s %s and %s %s: %w", paramCert, certFile, paramKey, keyFile, err)
		}
		return &cert, nil
	}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	_, err := load()
	return config, err
}

// readFile returns what a small regular file holds, without white space around
// it. It is read anew each time: these files are replaced while we run.
func readFile(what, path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not hang us
	if err != nil {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%s %s must be a regular file", what, path)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%s: %w", what, err)
	}
	text := strings.TrimSpace(string(raw))
	if text == "" || len(raw) > maxFile {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "%s %s must hold 1 to %d bytes", what, path, maxFile)
	}
	return text, nil
}

// client returns a client that sends that token, over web. It does not retry:
// whoever calls a KEK does.
func (s *server) client(token string, web *http.Transport) (*api.Client, error) {
	client, err := api.NewClient(&api.Config{
		Address:            s.address,
		DisableEnvironment: true,
		HttpClient: &http.Client{
			Transport: bounded{web},
			// The SDK follows one redirect itself, as standby servers ask for.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	})
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the client: %w", err)
	}
	client.SetToken(token)
	if s.namespace != "" {
		client.SetNamespace(s.namespace)
	}
	return client, nil
}

// bounded limits every answer.
type bounded struct{ web http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.web.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	}
	return resp, err
}

// write sends data to a path of the API.
func (b *Backend) write(ctx context.Context, path string, data map[string]any) (*api.Secret, error) {
	return b.call(ctx, path, func(l *api.Logical) (*api.Secret, error) { return l.WriteWithContext(ctx, path, data) })
}

func (b *Backend) delete(ctx context.Context, path string) error {
	_, err := b.call(ctx, path, func(l *api.Logical) (*api.Secret, error) { return l.DeleteWithContext(ctx, path) })
	return err
}

// call calls with a token, and once more with another one where the first is refused.
func (b *Backend) call(ctx context.Context, path string, f func(*api.Logical) (*api.Secret, error)) (*api.Secret, error) {
	t, err := b.tokens.get(ctx)
	if err != nil {
		return nil, err
	}
	secret, err := f(t.client.Logical())
	if refusal(err) && b.tokens.replace(ctx, t) {
		if t, err = b.tokens.get(ctx); err != nil {
			return nil, err
		}
		secret, err = f(t.client.Logical())
	}
	return secret, b.fail(path, err)
}

// refusal tells whether the server refused. It does not say whether the token
// or its policy is the reason.
func refusal(err error) bool {
	answer, ok := errors.AsType[*api.ResponseError](err)
	return ok && (answer.StatusCode == http.StatusForbidden || answer.StatusCode == http.StatusUnauthorized)
}

// words are what the server says, on one line.
func words(answer *api.ResponseError) string {
	text := strings.Join(strings.Fields(strings.Join(answer.Errors, "; ")), " ")
	if len(text) > maxWords {
		text = strings.ToValidUTF8(text[:maxWords], "") + "…"
	}
	if text == "" {
		text = http.StatusText(answer.StatusCode)
	}
	return text
}

// fail translates an error of a call to path.
func (b *Backend) fail(path string, err error) error {
	answer, ok := errors.AsType[*api.ResponseError](err)
	switch {
	case err == nil:
		return nil
	case !ok:
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	text := words(answer)
	switch answer.StatusCode {
	case http.StatusBadRequest:
		return b.badRequest(text)
	case http.StatusUnauthorized, http.StatusForbidden:
		return errdefs.Errorf(errdefs.ErrDenied, "the server refuses %s: %s", path, text)
	case http.StatusNotFound:
		if strings.Contains(text, "no handler for route") {
			return errdefs.Errorf(errdefs.ErrNotFound, "no transit engine is mounted at %s: %s", b.mount, text)
		}
		return b.noKey()
	case http.StatusMethodNotAllowed:
		return errdefs.Errorf(errdefs.ErrInvalid, "the server does not offer %s: %s", path, text)
	}
	return unavailable(answer)
}

// badRequest tells apart by its words what all comes with status 400.
func (b *Backend) badRequest(text string) error {
	has := func(part string) bool { return strings.Contains(text, part) }
	switch {
	case has("key not found"), has("no existing key named"), has("invalid key name"):
		return b.noKey()
	case has("disallowed by policy"), has("too old"):
		return errdefs.Errorf(errdefs.ErrDenied, "that version of the key is disabled (min_decryption_version) or destroyed: %s", text)
	case has("version is too new"):
		return errdefs.Errorf(errdefs.ErrDenied, "the server has no such version of the key: was it restored from an older backup? (%s)", text)
	case has("soft-deleted"):
		return errdefs.Errorf(errdefs.ErrDenied, "the key is soft-deleted: restore it with %s/keys/%s/soft-delete-restore", b.mount, b.key)
	case has("missing client token"):
		return errdefs.Errorf(errdefs.ErrDenied, "the server saw no token: %s", text)
	case has("message authentication failed"), has("invalid ciphertext"), has("unable to decrypt"):
		return errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key does not verify for this ID: it was damaged, moved from another ID, or the key %s of this server is another one than wrapped it (%s)", b.key, text)
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "the server cannot do that: %s", text)
}

func (b *Backend) noKey() error {
	return errdefs.Errorf(errdefs.ErrNotFound, "the engine at %s has no key %s: create it with `kek create`", b.mount, b.key)
}

// unavailable is what a server says that may do better later.
func unavailable(answer *api.ResponseError) error {
	text := words(answer)
	switch {
	case strings.Contains(text, "sealed"):
		return errdefs.Errorf(errdefs.ErrUnavailable, "the server is sealed and gives no key until it is unsealed (`bao operator unseal`, or auto-unseal): %s", text)
	case answer.StatusCode == http.StatusTooManyRequests:
		return errdefs.Errorf(errdefs.ErrUnavailable, "the server's rate limit (quota) is reached: %s", text)
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "the server cannot answer now: status %d: %s", answer.StatusCode, text)
}
