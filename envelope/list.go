package envelope

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// Info is what a record says, or why it cannot be read. It was read without a
// key, so its MAC was not checked (the authenticator was, where there is one
// and a secret): it is for looking, not for deciding what a volume must be.
type Info struct {
	Store  int    // index of the store among those given to New
	Object string // its name in that store
	// Err says why the object, whose name is that of a record, is none that
	// this keyring reads (ErrCorrupt, ErrState, ErrInvalid). All below is
	// zero then, and nothing is known of which keys it needs.
	Err error

	ID      dek.ID
	State   dek.State
	Spec    dek.Spec
	Source  dek.ID
	Wraps   []Wrap // the DEK's, then the previous one's; none in a bare tombstone
	Node    string // that holds the claim on formatting
	Created time.Time
	Updated time.Time
	Expires time.Time // of a tombstone with a key: when Prune may destroy it
	// Authenticated says that the record has an authenticator.
	Authenticated bool
}

// Wrap says under which key of which KMS a DEK is wrapped.
type Wrap struct {
	Scheme    string
	KeyID     string
	Mechanism string
}

// readers is how many records List reads at a time.
const readers = 8

// List returns up to limit (at least 1) records and the token of the next
// page, "" after the last one; the first page's token is "". A page may be
// shorter, or empty, before the last. It goes through all stores in their
// order: what changes meanwhile may or may not be seen, all else is, once for
// each store that has it. Objects with names that no record has are not ours
// and left out. A record that cannot be read now is an error, so that a list
// without errors is complete.
func (k *Keyring) List(ctx context.Context, token string, limit int) (infos []Info, next string, err error) {
	store, page, err := k.parseToken(token)
	if err != nil {
		return nil, "", err
	}
	err = k.retry(ctx, func() error {
		names, after, err := k.stores[store].List(ctx, page, max(limit, 1))
		if err != nil {
			return err
		}
		switch {
		case after != "":
			next = fmt.Sprintf("%d/%s", store, after)
		case store+1 < len(k.stores):
			next = fmt.Sprintf("%d/", store+1)
		default:
			next = ""
		}
		infos, err = k.infos(ctx, store, names)
		return err
	})
	if err != nil {
		return nil, "", fmt.Errorf("listing DEKs: %w", err)
	}
	return infos, next, nil
}

func (k *Keyring) parseToken(token string) (store int, page string, err error) {
	if token == "" {
		return 0, "", nil
	}
	index, page, ok := strings.Cut(token, "/")
	store, err = strconv.Atoi(index)
	if !ok || err != nil || store < 0 || store >= len(k.stores) {
		return 0, "", errdefs.Errorf(errdefs.ErrInvalid, "listing DEKs: %.100q is no token that a list gave", token)
	}
	return store, page, nil
}

// infos reads what is named like a record, a few at a time.
func (k *Keyring) infos(ctx context.Context, store int, names []string) ([]Info, error) {
	all := make([]Info, len(names))
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for reader := range readers {
		wg.Go(func() {
			for i := reader; i < len(names); i += readers {
				if isObjectName(names[i]) {
					all[i], errs[i] = k.info(ctx, store, names[i])
				}
			}
		})
	}
	wg.Wait()
	var found []Info
	for i, info := range all {
		if errs[i] != nil {
			return nil, errs[i]
		}
		if info.Object != "" {
			found = append(found, info)
		}
	}
	return found, nil
}

// info reads one record; the zero Info where it is gone.
func (k *Keyring) info(ctx context.Context, store int, name string) (Info, error) {
	r, _, err := k.read(ctx, k.stores[store], name)
	if err == nil && ObjectName(r.ID) != name {
		err = errdefs.Errorf(errdefs.ErrCorrupt, "the record of %s is in another's place", r.ID)
	}
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		return Info{}, nil
	case errors.Is(err, errdefs.ErrCorrupt), errors.Is(err, errdefs.ErrState), errors.Is(err, errdefs.ErrInvalid):
		return Info{Store: store, Object: name, Err: fmt.Errorf("object %s: %w", name, err)}, nil
	case err != nil:
		return Info{}, fmt.Errorf("object %s: %w", name, err)
	}
	info := Info{
		Store: store, Object: name,
		ID: r.ID, State: r.State, Spec: dek.Spec(r.Spec), Source: r.Source, Node: r.Claim.Node,
		Created: parseTime(r.Created), Updated: parseTime(r.Updated), Expires: parseTime(r.Expires),
		Authenticated: r.Auth != nil,
	}
	for _, w := range []wrappedV1{r.Wrapped, r.Previous} {
		if !w.IsZero() {
			info.Wraps = append(info.Wraps, Wrap{w.Scheme, w.KeyID, w.Mechanism})
		}
	}
	return info, nil
}

// parseTime of what decoding has checked; zero for none.
func parseTime(s string) time.Time {
	t, err := time.Parse(timeFormat, s)
	if err != nil {
		return time.Time{}
	}
	return t
}

// isObjectName says whether name could be one that ObjectName gives.
func isObjectName(name string) bool {
	digest, ok := strings.CutPrefix(name, objectPrefix)
	_, err := hex.DecodeString(digest)
	return ok && err == nil && len(name) == len(ObjectName("")) && digest == strings.ToLower(digest)
}
