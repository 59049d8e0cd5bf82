package gcpckms

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"cloud.google.com/go/auth"
	googlecredentials "cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/compute/metadata"
	kmsapi "cloud.google.com/go/kms/apiv1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	maxFile       = 64 << 10         // of a credentials or CA file, in bytes
	maxToken      = 256 << 10        // of an answer on the way to a token, in bytes
	renewEarly    = 4 * time.Minute  // before a token expires
	renewPause    = 30 * time.Second // between attempts while the old one is good
	renewPatience = 3 * time.Second  // of a call whose token is good still

	envFile     = "GOOGLE_APPLICATION_CREDENTIALS"
	accountPath = "instance/service-accounts/default/"
)

// impersonated finds the service account in the URL of an impersonation.
var impersonated = regexp.MustCompile(`/serviceAccounts/([^/:@]+@[^/:@]+):generateAccessToken$`)

// caller is as whom the service is called: a credentials file, or without one
// the service account of the metadata server.
type caller struct {
	file string
	contents
}

// contents is what we look at in a credentials file; the SDK reads the rest.
type contents struct {
	Type             string `json:"type"`
	ClientEmail      string `json:"client_email"`
	ImpersonationURL string `json:"service_account_impersonation_url"`
	UniverseDomain   string `json:"universe_domain"`
	QuotaProject     string `json:"quota_project_id"`
	Source           struct {
		Executable there `json:"executable"`
	} `json:"credential_source"`
}

// there says that a field is there, and not what is in it.
type there bool

// UnmarshalJSON is part of json.Unmarshaler.
func (t *there) UnmarshalJSON([]byte) error {
	*t = true
	return nil
}

// String is for messages.
func (c caller) String() string {
	if c.file == "" {
		return "the metadata server (there is no URI parameter " + paramCredentials + ", no " + envFile + " and no file of gcloud)"
	}
	return c.file
}

// findCaller looks where application default credentials are, file first.
func findCaller(file string) (caller, error) {
	if file == "" {
		file = os.Getenv(envFile)
	}
	if file == "" {
		if file = gcloudFile(); !exists(file) {
			return caller{}, nil
		}
	}
	_, contents, err := readCredentials(file)
	return caller{file: file, contents: contents}, err
}

// gcloudFile is where `gcloud auth application-default login` leaves its file.
func gcloudFile() string {
	home, err := os.UserHomeDir()
	if err != nil {
		return ""
	}
	return filepath.Join(home, ".config", "gcloud", "application_default_credentials.json")
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return file != "" && err == nil
}

// readCredentials reads a file and checks its type. Errors show nothing of it.
func readCredentials(file string) ([]byte, contents, error) {
	data, err := readFile(paramCredentials, file)
	if err != nil {
		return nil, contents{}, err
	}
	var c contents
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, contents{}, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s is no JSON of Google's credentials", file)
	}
	switch googlecredentials.CredType(c.Type) {
	case googlecredentials.ServiceAccount, googlecredentials.ExternalAccount, googlecredentials.ImpersonatedServiceAccount, googlecredentials.AuthorizedUser:
	default:
		return nil, contents{}, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s is of type %.40q, must be service_account, external_account, impersonated_service_account or authorized_user", file, c.Type)
	}
	if c.Source.Executable {
		return nil, contents{}, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s wants to run a program: not offered, have it write the token into a file", file)
	}
	return data, c, nil
}

// readFile reads a regular file of a bounded size.
func readFile(what, path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not hang us
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s: %w", what, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s %s must be a regular file of at most %d bytes", what, path, maxFile)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s: %w", what, err)
	}
	return data, nil
}

// universe is the domain of the cloud that the credentials belong to.
func (c caller) universe() string {
	if c.UniverseDomain == "" {
		return "googleapis.com"
	}
	return c.UniverseDomain
}

// email returns the service account's. ErrInvalid where the caller is none, or
// where only Google knows.
func (c caller) email(ctx context.Context) (string, error) {
	email := c.ClientEmail
	if m := impersonated.FindStringSubmatch(c.ImpersonationURL); m != nil {
		email = m[1]
	}
	if c.file == "" {
		answer, err := metadataClient().GetWithContext(ctx, accountPath+"email")
		if err != nil && !refused(err) {
			return "", errdefs.Errorf(errdefs.ErrUnavailable, "who the key is for is asked of %s: %s", c, brief(err))
		}
		email = strings.TrimSpace(answer)
	}
	if strings.Count(email, "@") != 1 || strings.ContainsAny(email, " /:") {
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the credentials from %s are not those of one service account, so there is no default policy: give one (version 3 JSON)", c)
	}
	return email, nil
}

// tokens is credentials.PerRPCCredentials: it puts an access token on every
// call. One call at a time renews it, the others wait as long as they may.
type tokens struct {
	caller caller
	client *http.Client
	lock   chan struct{} // holds one element while the fields below are in use
	token  *auth.Token   // nil at first
	pause  time.Time     // no renewal before, unless the token has expired
}

// newTokens checks that the credentials can be used at all, without calling anybody.
func newTokens(c caller) (*tokens, error) {
	t := &tokens{caller: c, client: boundedClient(http.DefaultTransport), lock: make(chan struct{}, 1)}
	if c.file == "" {
		return t, nil
	}
	if _, err := t.load(); err != nil {
		return nil, err
	}
	return t, nil
}

// RequireTransportSecurity keeps tokens off plaintext connections.
func (t *tokens) RequireTransportSecurity() bool { return true }

// GetRequestMetadata returns the headers of a call. Its errors are gRPC's.
func (t *tokens) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	token, err := t.get(ctx)
	if err != nil {
		return nil, err
	}
	headers := map[string]string{"authorization": "Bearer " + token.Value}
	if t.caller.QuotaProject != "" {
		headers["x-goog-user-project"] = t.caller.QuotaProject
	}
	return headers, nil
}

// get returns a token that has not expired.
func (t *tokens) get(ctx context.Context) (*auth.Token, error) {
	select {
	case t.lock <- struct{}{}:
		defer func() { <-t.lock }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	now := time.Now()
	usable := t.token != nil && now.Before(t.token.Expiry)
	if usable && (now.Before(t.token.Expiry.Add(-renewEarly)) || now.Before(t.pause)) {
		return t.token, nil
	}
	if usable {
		limited, cancel := context.WithTimeout(ctx, renewPatience)
		defer cancel()
		ctx = limited
	}
	token, err := t.fetch(ctx)
	switch {
	case err == nil:
		t.token = token
		return token, nil
	case usable:
		t.pause = now.Add(renewPause)
		return t.token, nil
	case refused(err):
		return nil, status.Errorf(codes.Unauthenticated, "no access token: %s", brief(err))
	default:
		return nil, status.Errorf(codes.Unavailable, "no access token, credentials from %s: %s", t.caller, brief(err))
	}
}

// forget drops a token that was not accepted, so that the next call gets
// another: the file may hold a new key by then.
func (t *tokens) forget() {
	select {
	case t.lock <- struct{}{}:
		t.token = nil
		<-t.lock
	default: // somebody is about to renew it
	}
}

// fetch gets a new token.
func (t *tokens) fetch(ctx context.Context) (*auth.Token, error) {
	if t.caller.file == "" {
		return metadataToken(ctx)
	}
	creds, err := t.load()
	if err != nil {
		return nil, err
	}
	token, err := creds.Token(ctx)
	if err == nil && (token.Value == "" || token.Expiry.IsZero()) {
		err = errors.New("the answer holds no token, or none that expires")
	}
	return token, err
}

// load reads the credentials file as it is now.
func (t *tokens) load() (*auth.Credentials, error) {
	data, c, err := readCredentials(t.caller.file)
	if err != nil {
		return nil, err
	}
	creds, err := googlecredentials.NewCredentialsFromJSON(googlecredentials.CredType(c.Type), data, &googlecredentials.DetectOptions{
		Scopes: kmsapi.DefaultAuthScopes(), UseSelfSignedJWT: true,
		Client: t.client, Logger: slog.New(slog.DiscardHandler),
	})
	switch {
	case err != nil && c.Type != string(googlecredentials.ExternalAccount): // a parser's words may tell bytes of a private key
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s is not complete, or its private_key does not parse", t.caller.file)
	case err != nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s: %s", t.caller.file, brief(err))
	}
	return creds, nil
}

func metadataClient() *metadata.Client {
	return metadata.NewClient(boundedClient(&http.Transport{DisableKeepAlives: true})) // no proxy: the server is link-local
}

func metadataToken(ctx context.Context) (*auth.Token, error) {
	query := url.Values{"scopes": {strings.Join(kmsapi.DefaultAuthScopes(), ",")}}
	text, err := metadataClient().GetWithContext(ctx, accountPath+"token?"+query.Encode())
	if err != nil {
		return nil, err
	}
	var answer struct {
		Value   string `json:"access_token"`
		Seconds int    `json:"expires_in"`
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil || answer.Value == "" || answer.Seconds <= 0 {
		return nil, errors.New("the metadata server answered something else than a token")
	}
	return &auth.Token{Value: answer.Value, Expiry: time.Now().Add(time.Duration(answer.Seconds) * time.Second)}, nil
}

// refused tells an answer of no from no answer.
func refused(err error) bool {
	if r, ok := errors.AsType[refusal](err); ok {
		return r.final()
	}
	return errors.Is(err, errdefs.ErrInvalid) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}

// boundedClient returns a client whose answers are bounded and in which every
// status but success is a refusal, whichever way the SDK would treat it.
func boundedClient(next http.RoundTripper) *http.Client {
	return &http.Client{Transport: bounded{next}, Timeout: 10 * time.Second}
}

type bounded struct{ next http.RoundTripper }

// RoundTrip is part of http.RoundTripper.
func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, refusalOf(resp)
	}
	resp.Body = limited{io.LimitReader(resp.Body, maxToken), resp.Body}
	return resp, nil
}

type limited struct {
	io.Reader
	io.Closer
}

// refusal is an answer without success.
type refusal struct {
	code   int
	reason string // as the server words it; empty where it does not
}

func refusalOf(resp *http.Response) refusal {
	r := refusal{code: resp.StatusCode}
	var answer struct {
		Error       any    `json:"error"` // a word, or an object with a message
		Description string `json:"error_description"`
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxToken))
	if err != nil || json.Unmarshal(data, &answer) != nil {
		return r
	}
	switch e := answer.Error.(type) {
	case string:
		r.reason = fmt.Sprintf(" (%.80q: %.300q)", e, answer.Description)
	case map[string]any:
		r.reason = fmt.Sprintf(" (%.300q)", fmt.Sprint(e["message"]))
	}
	return r
}

func (r refusal) Error() string { return fmt.Sprintf("HTTP status %d%s", r.code, r.reason) }

// final says that asking again would give the same answer.
func (r refusal) final() bool {
	return r.code < 500 && r.code != http.StatusRequestTimeout && r.code != http.StatusTooManyRequests
}
