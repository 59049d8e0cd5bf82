package transit

import (
	"context"
	"errors"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/openbao/openbao/api/v2"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// URI parameters for credentials.
const (
	paramTokenFile = "token-file"
	paramAuth      = "auth"
	paramMount     = "auth-mount"
	paramRole      = "role"
	paramRoleID    = "role-id-file"
	paramSecretID  = "secret-id-file"
	paramJWT       = "jwt-file"
)

// loginParams are those that only a login has.
func loginParams() []string {
	return []string{paramAuth, paramMount, paramRole, paramRoleID, paramSecretID, paramJWT}
}

// serviceAccountToken is where Kubernetes puts a pod's own token.
const serviceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

const (
	// fresh is the age below which a token that was refused is replaced only
	// if it is dead: else every call that a policy refuses would leave a
	// token behind. An older one may lack what its role has been given since.
	fresh = 10 * time.Second
	// renewTimeout bounds a renewal while the old token is still good.
	renewTimeout = 3 * time.Second
)

// tokens are where tokens come from. Its methods may be called concurrently.
type tokens interface {
	// get returns a token that is good for all we know.
	get(ctx context.Context) (*token, error)
	// replace says that the server refused t, and answers whether it is
	// worth while to get another one.
	replace(ctx context.Context, t *token) bool
}

// token is a token with what is known of it.
type token struct {
	value  string
	client *api.Client // sends it

	// Of a login only.
	issued, refresh, expires time.Time // the last two are zero where it lives for ever
	lease                    time.Duration
	renewable                bool
}

// newTokens reads the parameters, and each file once to see that it is there.
func newTokens(s *server, params map[string]string) (tokens, error) {
	file := params[paramTokenFile]
	if params[paramAuth] != "" {
		if file != "" {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameters %q and %q exclude each other", paramTokenFile, paramAuth)
		}
		return newLogin(s, params)
	}
	for _, name := range loginParams() {
		if params[name] != "" {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q needs %q: approle, kubernetes, jwt or cert", name, paramAuth)
		}
	}
	if file != "" {
		_, err := readFile(paramTokenFile, file)
		return &given{server: s, read: func() (string, error) { return readFile(paramTokenFile, file) }, where: file}, err
	}
	for _, name := range []string{"BAO_TOKEN", "VAULT_TOKEN"} {
		if value := os.Getenv(name); value != "" {
			return &given{server: s, read: func() (string, error) { return value, nil }, where: name}, nil
		}
	}
	if params[paramPlaintext] == "true" {
		return &given{server: s, read: func() (string, error) { return "", nil }}, nil
	}
	return nil, errdefs.Errorf(errdefs.ErrInvalid, "no credentials: give URI parameter %q or %q, or BAO_TOKEN or VAULT_TOKEN in the environment", paramTokenFile, paramAuth)
}

// given are tokens that somebody else makes and renews.
type given struct {
	server *server
	read   func() (string, error)
	where  string // for messages

	mu      sync.Mutex
	current *token
}

func (g *given) get(context.Context) (*token, error) {
	value, err := g.read()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "no token: %v", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.current != nil && g.current.value == value {
		return g.current, nil
	}
	client, err := g.server.client(value, g.server.web)
	if err != nil {
		return nil, err
	}
	g.current = &token{value: value, client: client}
	return g.current, nil
}

func (g *given) replace(_ context.Context, t *token) bool {
	value, err := g.read()
	return err == nil && value != t.value
}

// login gets tokens from an auth method, one login at a time.
type login struct {
	server *server
	kind   string
	path   string // of the login
	from   string // files, for messages
	body   func() (map[string]any, error)
	now    func() time.Time

	mu      sync.Mutex
	current *token   // nil where there is none
	turn    *attempt // nil where none is under way
}

// attempt is a login or a renewal under way.
type attempt struct {
	done chan struct{} // closed when it has ended
	err  error         // to be read then
}

func newLogin(s *server, params map[string]string) (*login, error) {
	kind := params[paramAuth]
	l := &login{server: s, kind: kind, now: time.Now}
	mount := strings.Trim(params[paramMount], "/")
	if mount == "" {
		mount = kind
	}
	l.path = "auth/" + mount + "/login"
	takes := map[string][]string{
		"approle": {paramRoleID, paramSecretID}, "kubernetes": {paramRole, paramJWT}, "jwt": {paramRole, paramJWT}, "cert": {paramRole},
	}[kind]
	needs := map[string]string{"approle": paramRoleID, "kubernetes": paramRole, "cert": paramCert}[kind]
	switch {
	case takes == nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be approle, kubernetes, jwt or cert", paramAuth)
	case needs != "" && params[needs] == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s=%s needs URI parameter %q", paramAuth, kind, needs)
	}
	for _, name := range []string{paramRole, paramRoleID, paramSecretID, paramJWT} {
		if params[name] != "" && !strings.Contains(strings.Join(takes, " ")+" ", name+" ") {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s=%s takes no URI parameter %q", paramAuth, kind, name)
		}
	}
	l.from, l.body = credentials(kind, params)
	_, err := l.body()
	return l, err
}

// credentials says where a login's come from, and returns what reads them.
func credentials(kind string, params map[string]string) (from string, body func() (map[string]any, error)) {
	fields, files := map[string]string{}, map[string]string{}
	switch kind {
	case "approle":
		files["role_id"] = params[paramRoleID]
		files["secret_id"] = params[paramSecretID]
		from = paramRoleID + " " + params[paramRoleID]
		if params[paramSecretID] != "" {
			from += ", " + paramSecretID + " " + params[paramSecretID]
		}
	case "kubernetes", "jwt":
		fields["role"] = params[paramRole]
		files["jwt"] = params[paramJWT]
		if files["jwt"] == "" {
			files["jwt"] = serviceAccountToken
		}
		from = paramJWT + " " + files["jwt"]
	case "cert":
		fields["name"] = params[paramRole]
		from = paramCert + " " + params[paramCert]
	}
	return from, func() (map[string]any, error) {
		body := map[string]any{}
		for name, value := range fields {
			if value != "" {
				body[name] = value
			}
		}
		for name, path := range files {
			if path == "" {
				continue
			}
			value, err := readFile("file of the "+name, path)
			if err != nil {
				return nil, err
			}
			body[name] = value
		}
		return body, nil
	}
}

// get returns the current token, or logs in. Whoever comes while another one
// logs in waits for that one's result; whoever comes while the token is being
// renewed goes on with the old one.
func (l *login) get(ctx context.Context) (*token, error) {
	for {
		l.mu.Lock()
		t, turn, now := l.current, l.turn, l.now()
		good := t != nil && (t.expires.IsZero() || now.Before(t.expires))
		if good && (turn != nil || t.expires.IsZero() || now.Before(t.refresh)) {
			l.mu.Unlock()
			return t, nil
		}
		if turn == nil {
			turn = &attempt{done: make(chan struct{})}
			l.turn = turn
			l.mu.Unlock()
			return l.obtain(ctx, turn, t, good)
		}
		l.mu.Unlock()
		select {
		case <-turn.done:
			if turn.err != nil && !errors.Is(turn.err, context.Canceled) && !errors.Is(turn.err, context.DeadlineExceeded) {
				return nil, turn.err
			}
		case <-ctx.Done():
			return nil, errdefs.Errorf(errdefs.ErrUnavailable, "waiting for a login: %w", ctx.Err())
		}
	}
}

// obtain renews old if it is good, or logs in, and ends turn.
func (l *login) obtain(ctx context.Context, turn *attempt, old *token, good bool) (*token, error) {
	t, err := l.renewOrLogin(ctx, old, good)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil && good {
		// It still works: come back when half of what is left is over.
		again := *old
		again.refresh = l.now().Add(old.expires.Sub(l.now()) / 2)
		t, err = &again, nil
	}
	if err == nil {
		l.current = t
	}
	turn.err = err
	l.turn = nil
	close(turn.done)
	return t, err
}

func (l *login) renewOrLogin(ctx context.Context, old *token, good bool) (*token, error) {
	if !good {
		return l.login(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	if old.renewable {
		answer, err := old.client.Logical().WriteWithContext(ctx, "auth/token/renew-self", map[string]any{})
		if err == nil && answer != nil && answer.Auth != nil {
			t := *old
			t.live(l.now(), answer.Auth)
			// One that gives little means that the longest life is near.
			if t.expires.IsZero() || t.expires.Sub(l.now()) > old.lease/2 {
				return &t, nil
			}
		}
	}
	return l.login(ctx)
}

// live sets until when t lives, from now on.
func (t *token) live(now time.Time, auth *api.SecretAuth) {
	lease := time.Duration(auth.LeaseDuration) * time.Second
	t.renewable = auth.Renewable
	t.expires, t.refresh = time.Time{}, time.Time{}
	if lease > 0 {
		t.expires, t.refresh = now.Add(lease), now.Add(lease*2/3)
	}
}

func (l *login) login(ctx context.Context) (*token, error) {
	body, err := l.body()
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "no login: %v", err)
	}
	web := l.server.web
	if l.kind == "cert" { // a connection of its own shows the certificate of today
		web = web.Clone()
		defer web.CloseIdleConnections()
	}
	client, err := l.server.client("", web)
	if err != nil {
		return nil, err
	}
	answer, err := client.Logical().WriteWithContext(ctx, l.path, body)
	if err != nil {
		return nil, l.fail(err)
	}
	if answer == nil || answer.Auth == nil || answer.Auth.ClientToken == "" {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "%s answers without a token: does it want a second factor?", l.path)
	}
	t := &token{value: answer.Auth.ClientToken, issued: l.now(), lease: time.Duration(answer.Auth.LeaseDuration) * time.Second}
	t.live(t.issued, answer.Auth)
	t.client, err = l.server.client(t.value, l.server.web)
	return t, err
}

func (l *login) fail(err error) error {
	answer, ok := errors.AsType[*api.ResponseError](err)
	switch {
	case !ok:
		return errdefs.Errorf(errdefs.ErrUnavailable, "logging in at %s: %w", l.path, err)
	case answer.StatusCode >= 500 || answer.StatusCode == http.StatusTooManyRequests || answer.StatusCode == http.StatusPreconditionFailed:
		return unavailable(answer)
	}
	return errdefs.Errorf(errdefs.ErrDenied, "%s refuses the login: %s (credentials: %s)", l.path, words(answer), l.from)
}

func (l *login) replace(ctx context.Context, t *token) bool {
	if l.now().Sub(t.issued) < fresh {
		_, err := t.client.Logical().ReadWithContext(ctx, "auth/token/lookup-self")
		if !refusal(err) {
			return false
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current != nil && l.current.value == t.value {
		l.current = nil
	}
	return true
}
