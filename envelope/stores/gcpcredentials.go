package stores

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// gcpTransport sends requests with a token, and bounds what is answered.
type gcpTransport struct {
	next        http.RoundTripper
	credentials *gcpCredentials // nil: no token
}

// RoundTrip is part of http.RoundTripper.
func (t *gcpTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.credentials != nil {
		token, err := t.credentials.token(r.Context())
		if err != nil {
			if r.Body != nil {
				_ = r.Body.Close()
			}
			return nil, err
		}
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+token)
	}
	answer, err := t.next.RoundTrip(r)
	if err == nil {
		answer.Body = http.MaxBytesReader(nil, answer.Body, maxAnswer)
	}
	return answer, err
}

// gcpCredentials are those of a file, or application default ones, which are
// looked for when they are needed: on a virtual machine that takes a call.
type gcpCredentials struct {
	file string // "": application default

	mu      sync.Mutex
	content []byte // of the file, when it was last read
	found   *auth.Credentials
}

// newGCPCredentials reads the file, if there is one, and calls nobody.
func newGCPCredentials(file string) (*gcpCredentials, error) {
	c := &gcpCredentials{file: file}
	if file == "" {
		return c, nil
	}
	if _, err := c.read(); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return c, nil
}

// token returns a token that is good for now.
func (c *gcpCredentials) token(ctx context.Context) (string, error) {
	type result struct {
		found *auth.Credentials
		err   error
	}
	looked := make(chan result, 1)
	go func() { // looking knows no context
		found, err := c.look()
		looked <- result{found, err}
	}()
	var r result
	select {
	case r = <-looked:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if r.err != nil {
		return "", errdefs.Errorf(errdefs.ErrDenied, "Google credentials: %w", r.err)
	}
	token, err := r.found.Token(ctx)
	if err == nil {
		return token.Value, nil
	}
	if answer, ok := errors.AsType[*auth.Error](err); ok && answer.Response != nil && answer.Response.StatusCode < 500 && !answer.Temporary() {
		return "", errdefs.Errorf(errdefs.ErrDenied, "Google credentials: no token for those from %s: %s", c.source(), cut(err.Error()))
	}
	return "", errdefs.Errorf(errdefs.ErrUnavailable, "Google credentials: no token for those from %s: %s", c.source(), cut(err.Error()))
}

func (c *gcpCredentials) source() string {
	if c.file != "" {
		return c.file
	}
	return "the environment or the metadata service"
}

// look finds the credentials, or those that the file holds now.
func (c *gcpCredentials) look() (*auth.Credentials, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.file != "" {
		return c.read()
	}
	if c.found == nil {
		found, err := credentials.DetectDefault(&credentials.DetectOptions{Scopes: gcpScopes()})
		if err != nil {
			return nil, fmt.Errorf("none are in GOOGLE_APPLICATION_CREDENTIALS, gcloud's files or the metadata service: %w", err)
		}
		c.found = found
	}
	return c.found, nil
}

func gcpScopes() []string { return []string{"https://www.googleapis.com/auth/cloud-platform"} }

// read reads the file, of the kinds that Google hands out.
func (c *gcpCredentials) read() (*auth.Credentials, error) {
	f, err := os.Open(c.file)
	if err != nil {
		return nil, fmt.Errorf("the credentials file: %w", err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return nil, fmt.Errorf("the credentials file: %w", err)
	}
	if c.found != nil && bytes.Equal(content, c.content) {
		return c.found, nil
	}
	kinds := []credentials.CredType{credentials.ServiceAccount, credentials.ExternalAccount, credentials.ImpersonatedServiceAccount, credentials.AuthorizedUser}
	var kind struct {
		Type credentials.CredType `json:"type"`
	}
	if err := json.Unmarshal(content, &kind); err != nil || !slices.Contains(kinds, kind.Type) {
		return nil, fmt.Errorf("the credentials file %s must be JSON whose \"type\" is one of %s", c.file, strings.Trim(fmt.Sprint(kinds), "[]"))
	}
	found, err := credentials.NewCredentialsFromJSON(kind.Type, content, &credentials.DetectOptions{Scopes: gcpScopes()})
	if err != nil {
		return nil, fmt.Errorf("the credentials file %s cannot be used: %s", c.file, cut(err.Error()))
	}
	c.found, c.content = found, content
	return found, nil
}
