package gcpconfig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"cloud.google.com/go/auth"
	googlecredentials "cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/compute/metadata"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	maxToken      = 256 << 10        // of an answer on the way to a token, in bytes
	askTimeout    = 10 * time.Second // of one request for it
	renewEarly    = 4 * time.Minute  // before a token expires
	renewPause    = 30 * time.Second // between attempts while the old one is good
	renewPatience = 3 * time.Second  // of a call whose token is good still
)

// Need is what a service wants of access tokens.
type Need struct {
	Scopes []string
	// SelfSigned says that it takes what a service account signs itself, for
	// which nobody has to be asked. Cloud Storage does not.
	SelfSigned bool
}

// Tokens gets access tokens and keeps the last one until minutes before it
// expires. One call at a time renews it, the others wait as long as they may.
// The credentials file is read again for every new token, and so is the token
// file that it may name: both can rotate. HTTPS_PROXY and NO_PROXY are obeyed,
// but not for the metadata server.
type Tokens struct {
	caller Caller
	need   Need
	client *http.Client
	lock   chan struct{} // holds one element while the fields below are in use
	last   held
	pause  time.Time // no renewal before, unless the token has expired
}

// held is a token as it goes with a call.
type held struct {
	headers map[string]string
	expiry  time.Time
}

// Tokens checks that the credentials can be used at all, without calling
// anybody. ErrInvalid where they cannot.
func (c Caller) Tokens(need Need) (*Tokens, error) {
	t := &Tokens{caller: c, need: need, client: boundedClient(http.DefaultTransport), lock: make(chan struct{}, 1)}
	if c.file == "" {
		return t, nil
	}
	if _, _, err := t.load(); err != nil {
		return nil, err
	}
	return t, nil
}

// Headers returns what a call has to bring: "authorization" with a token that
// has not expired, and "x-goog-user-project" where the credentials file names
// a quota project. ErrDenied where a token was refused or the file cannot be
// used any more, ErrUnavailable where there was no answer.
func (t *Tokens) Headers(ctx context.Context) (map[string]string, error) {
	select {
	case t.lock <- struct{}{}:
		defer func() { <-t.lock }()
	case <-ctx.Done():
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "no access token yet: %w", ctx.Err())
	}
	now := time.Now()
	usable := now.Before(t.last.expiry)
	if usable && (now.Before(t.last.expiry.Add(-renewEarly)) || now.Before(t.pause)) {
		return maps.Clone(t.last.headers), nil
	}
	if usable {
		limited, cancel := context.WithTimeout(ctx, renewPatience)
		defer cancel()
		ctx = limited
	}
	fresh, err := t.fetch(ctx)
	switch {
	case err == nil:
		t.last = fresh
	case usable:
		t.pause = now.Add(renewPause)
	case refused(err):
		return nil, errdefs.Errorf(errdefs.ErrDenied, "no access token, credentials from %s: %s", t.caller, brief(err))
	default:
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "no access token, credentials from %s: %s", t.caller, brief(err))
	}
	return maps.Clone(t.last.headers), nil
}

// Forget drops a token that was not accepted, so that the next call gets
// another: the file may hold a new key by then.
func (t *Tokens) Forget() {
	select {
	case t.lock <- struct{}{}:
		t.last = held{}
		<-t.lock
	default: // somebody is about to renew it
	}
}

// fetch gets a new token.
func (t *Tokens) fetch(ctx context.Context) (held, error) {
	if t.caller.file == "" {
		return metadataToken(ctx, t.need.Scopes)
	}
	creds, c, err := t.load()
	if err != nil {
		return held{}, err
	}
	if err := c.checkTokenFiles(); err != nil {
		return held{}, err
	}
	token, err := creds.Token(ctx)
	switch {
	case err != nil:
		return held{}, err
	case token.Value == "" || token.Expiry.IsZero():
		return held{}, errors.New("the answer holds no token, or none that expires")
	}
	fresh := hold(token.Value, token.Expiry)
	if c.QuotaProject != "" {
		fresh.headers["x-goog-user-project"] = c.QuotaProject
	}
	return fresh, nil
}

func hold(token string, expiry time.Time) held {
	return held{map[string]string{"authorization": "Bearer " + token}, expiry}
}

// load reads the credentials file as it is now.
func (t *Tokens) load() (*auth.Credentials, contents, error) {
	data, c, err := readCredentials(t.caller.file)
	if err != nil {
		return nil, c, err
	}
	parse := func(selfSigned bool) (*auth.Credentials, error) {
		return googlecredentials.NewCredentialsFromJSON(googlecredentials.CredType(c.Type), data, &googlecredentials.DetectOptions{
			Scopes: t.need.Scopes, UseSelfSignedJWT: selfSigned,
			Client: t.client, Logger: slog.New(slog.DiscardHandler),
		})
	}
	creds, err := parse(true) // also where that is not needed: it parses the private key
	if err == nil && !t.need.SelfSigned {
		creds, err = parse(false)
	}
	switch {
	case err != nil && c.Type != string(googlecredentials.ExternalAccount): // a parser's words may tell bytes of a private key
		return nil, c, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s is not complete, or its private_key does not parse", t.caller.file)
	case err != nil:
		return nil, c, errdefs.Errorf(errdefs.ErrInvalid, "the credentials file %s: %s", t.caller.file, brief(err))
	}
	return creds, c, nil
}

// checkTokenFiles keeps the SDK from opening what may hang.
func (c *contents) checkTokenFiles() error {
	for ; c != nil; c = c.Impersonator {
		if c.Source.File == "" {
			continue
		}
		switch info, err := os.Stat(c.Source.File); {
		case err != nil:
			return err
		case !info.Mode().IsRegular():
			return errdefs.Errorf(errdefs.ErrInvalid, "the token file %s must be a regular file", c.Source.File)
		}
	}
	return nil
}

func metadataClient() *metadata.Client {
	return metadata.NewClient(boundedClient(&http.Transport{DisableKeepAlives: true})) // no proxy: the server is link-local
}

func metadataToken(ctx context.Context, scopes []string) (held, error) {
	query := url.Values{"scopes": {strings.Join(scopes, ",")}}
	text, err := metadataClient().GetWithContext(ctx, accountPath+"token?"+query.Encode())
	if err != nil {
		return held{}, err
	}
	var answer struct {
		Value   string `json:"access_token"`
		Seconds int    `json:"expires_in"`
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil || answer.Value == "" || answer.Seconds <= 0 {
		return held{}, errors.New("the metadata server answered something else than a token")
	}
	return hold(answer.Value, time.Now().Add(time.Duration(answer.Seconds)*time.Second)), nil
}

// boundedClient returns a client whose answers are bounded and in which every
// status but success is a refusal, whichever way the SDK would treat it.
func boundedClient(next http.RoundTripper) *http.Client {
	return &http.Client{Transport: bounded{next}, Timeout: askTimeout}
}

type bounded struct{ next http.RoundTripper }

// RoundTrip is part of http.RoundTripper.
func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxToken)
	if resp.StatusCode >= 300 {
		defer resp.Body.Close()
		return nil, refusalOf(resp)
	}
	return resp, nil
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
	data, err := io.ReadAll(resp.Body)
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

// refused tells an answer of no, which asking again would not change, from no
// answer.
func refused(err error) bool {
	if r, ok := errors.AsType[refusal](err); ok {
		return r.code < 500 && r.code != http.StatusRequestTimeout && r.code != http.StatusTooManyRequests
	}
	return errors.Is(err, errdefs.ErrInvalid) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}

// brief is the message of an error from outside, bounded and on one line. Of a
// URL it shows the host alone: the rest is somebody's configuration.
func brief(err error) string {
	text := err.Error()
	if e, ok := errors.AsType[*http.MaxBytesError](err); ok {
		text = fmt.Sprintf("the answer is longer than %d bytes", e.Limit)
	} else if e, ok := errors.AsType[*url.Error](err); ok {
		text = e.Err.Error()
		if u, err := url.Parse(e.URL); err == nil {
			text = u.Host + ": " + text
		}
	}
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "?")), " ")
	if r := []rune(text); len(r) > 600 {
		text = string(r[:600]) + "…"
	}
	return text
}
