package kms

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Opener opens the backend that u names; it reads u's parameters with Params.
// Whatever cannot work (a missing file, a bad parameter) is an error now and
// not at the first call.
type Opener func(ctx context.Context, u *url.URL) (Backend, error)

// Mux maps URI schemes to their openers.
type Mux map[string]Opener

// Open opens the KEK that uri names, with the default options. The caller
// closes it. No deadline but ctx's bounds it.
func (m Mux) Open(ctx context.Context, uri string) (*KEK, error) {
	return m.OpenWith(ctx, uri, Options{})
}

// OpenWith is Open with options. Options.Name is set from the URI where empty.
func (m Mux) OpenWith(ctx context.Context, uri string, o Options) (*KEK, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, fmt.Errorf("KMS URI %w", err)
	}
	open, ok := m[u.Scheme]
	if !ok {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "KMS URI: scheme %q is not known; this build knows %s",
			u.Scheme, strings.Join(slices.Sorted(maps.Keys(m)), ", "))
	}
	if o.Name == "" {
		o.Name = Redact(u)
	}
	b, err := open(ctx, u)
	if err != nil {
		unopened := &KEK{name: o.Name, hide: hider(uri, u, o.Name)}
		return nil, unopened.fail(ctx, "opening", err)
	}
	k := New(u.Scheme, b, o)
	k.hide = hider(uri, u, o.Name)
	return k, nil
}

// ParseURI parses the URI of a KMS or a store. A URI names a thing and never
// authenticates: one with a user, a password or a fragment is refused. Errors
// are ErrInvalid and do not repeat the URI, which may hold a secret.
func ParseURI(uri string) (*url.URL, error) {
	u, err := url.Parse(uri)
	switch {
	case uri == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "is empty")
	case err != nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "does not parse (it is not shown: it may hold a secret)")
	case u.Scheme == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "has no scheme: it must begin like cluster:///… (it is not shown: it may hold a secret)")
	case u.User != nil:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s holds credentials: give them to the service's own credential chain or in a file", Redact(u))
	case strings.Contains(uri, "#"):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s has a fragment (#): escape it as %%23 if it belongs to a name", Redact(u))
	}
	return u, nil
}

// Params returns u's query parameters. ErrInvalid, with the parameter's name
// but never its value, where one is not among the known ones or comes twice.
// A parameter that is absent is absent from the result too. Only %XX is an
// escape: a '+' is a plus, as in the file names and credentials that stand here.
func Params(u *url.URL, known ...string) (map[string]string, error) {
	params := map[string]string{}
	if u.RawQuery == "" {
		return params, nil
	}
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		rawName, rawValue, _ := strings.Cut(pair, "=")
		name, nameErr := url.PathUnescape(rawName)
		value, valueErr := url.PathUnescape(rawValue)
		if nameErr != nil || valueErr != nil {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI's parameters do not parse (they are not shown: they may hold a secret)")
		}
		if !slices.Contains(known, name) {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is not known; %s", name, listed(known))
		}
		if _, twice := params[name]; twice {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is given twice", name)
		}
		params[name] = value
	}
	return params, nil
}

func listed(known []string) string {
	if len(known) == 0 {
		return "this scheme takes none"
	}
	return "this scheme takes " + strings.Join(known, ", ")
}

// Redact returns the part of u that may stand in messages: scheme, host and
// path. Of a URI without slashes only the scheme is shown.
func Redact(u *url.URL) string {
	if u.Opaque != "" {
		return u.Scheme + ":…"
	}
	shown := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath, OmitHost: u.OmitHost}
	return shown.String()
}

// hider replaces the URI by its redacted form wherever an SDK's error quotes it.
func hider(uri string, u *url.URL, name string) *strings.Replacer {
	hide := []string{uri, name, u.String(), name}
	if u.RawQuery != "" {
		hide = append(hide, u.RawQuery, "…")
	}
	if u.Opaque != "" {
		hide = append(hide, u.Opaque, "…")
	}
	return strings.NewReplacer(hide...)
}
