package kube

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	// How long an answer counts. The API server itself remembers a good token
	// for 10 s, which adds up.
	goodToken = 5 * time.Second
	badToken  = time.Second

	maxToken     = 16 << 10 // bytes
	maxGood      = 20000    // tokens that are remembered
	maxBad       = 2000
	maxReviews   = 32 // at a time
	reviewLimit  = 10 * time.Second
	accountUser  = "system:serviceaccount:"
	tokenClaims  = "authentication.kubernetes.io/"
	claimNode    = tokenClaims + "node-name"
	claimNodeUID = tokenClaims + "node-uid"
	claimPod     = tokenClaims + "pod-name"
	claimPodUID  = tokenClaims + "pod-uid"
)

// Account is whose a service account's token is.
type Account struct {
	// Username is "system:serviceaccount:NAMESPACE:NAME", UID the account's.
	Username, UID string
	// Pod and Node are what the token is bound to, by name and UID: the pod
	// that uses it and the node on which that runs. Empty where it is bound to
	// none: such a token speaks for no node.
	Pod, PodUID, Node, NodeUID string
}

// TokensOptions of Tokens.
type TokensOptions struct {
	// Audiences of which a token must name one. At least one: a token without
	// an audience of ours was not meant for us, and whoever got it could use it here.
	Audiences []string
	// Now tells the time; nil is time.Now.
	Now func() time.Time
}

// Tokens tells whose a service account's token is, by TokenReview. Its methods
// may be called concurrently.
//
// A good token counts for 5 s before the API server is asked again, which
// itself remembers one for 10 s: a token whose pod or account was deleted is
// refused after 15 s at most. One second for a refused token. What is
// remembered is its SHA-256, for 20000 good and 2000 refused tokens at most:
// anybody can make up as many as he likes.
//
// The API server is asked about 32 tokens at a time. A review ends when nobody
// waits for it any more, so there are never more than callers.
type Tokens struct {
	audiences []string
	now       func() time.Time
	reviews   authenticationv1client.TokenReviewInterface
	slots     chan struct{}

	mu        sync.Mutex
	good, bad memory
	pending   map[tokenHash]*review
}

type tokenHash [sha256.Size]byte

type reviewed struct {
	account Account
	err     error
	until   time.Time
}

// review is a question that callers wait for. Its fields are guarded by
// Tokens.mu, but answer is read freely once done is closed.
type review struct {
	key     tokenHash
	callers int
	cancel  context.CancelFunc
	done    chan struct{}
	answer  reviewed
}

// memory is what is remembered of at most so many tokens.
type memory struct {
	most  int
	known map[tokenHash]reviewed
	swept time.Time
}

// keep remembers r, if there is room. Looking for room costs no more than once
// a second, however many tokens come.
func (m *memory) keep(key tokenHash, r reviewed, now time.Time) {
	if len(m.known) >= m.most && now.Sub(m.swept) >= badToken {
		maps.DeleteFunc(m.known, func(_ tokenHash, r reviewed) bool { return !now.Before(r.until) })
		m.swept = now
	}
	if len(m.known) < m.most {
		m.known[key] = r
	}
}

// NewTokens returns Tokens. It calls nobody.
func NewTokens(config *rest.Config, o TokensOptions) (*Tokens, error) {
	if len(o.Audiences) == 0 || slices.Contains(o.Audiences, "") {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "tokens need an audience that is ours alone")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	config = rest.CopyConfig(config)
	config.ContentType, config.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return bounded{next} })
	client, err := authenticationv1client.NewForConfig(config)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the API server's configuration: %w", err)
	}
	return &Tokens{
		audiences: slices.Clone(o.Audiences), now: o.Now, reviews: client.TokenReviews(),
		slots: make(chan struct{}, maxReviews), pending: map[tokenHash]*review{},
		good: memory{most: maxGood, known: map[tokenHash]reviewed{}}, bad: memory{most: maxBad, known: map[tokenHash]reviewed{}},
	}, nil
}

// Review returns whose a token is. ErrDenied for a token that is none of a
// service account, expired, revoked, or for another audience; ErrUnavailable
// where the API server does not say. No error shows the token.
func (t *Tokens) Review(ctx context.Context, token string) (Account, error) {
	if !plausible(token) {
		return Account{}, errdefs.Errorf(errdefs.ErrDenied, "the token is no token of a service account")
	}
	r, known := t.join(ctx, sha256.Sum256([]byte(token)), token)
	if r == nil {
		return known.account, known.err
	}
	defer t.part(r)
	select {
	case <-r.done:
		return r.answer.account, r.answer.err
	case <-ctx.Done():
		return Account{}, ctx.Err()
	}
}

// join returns what is remembered of a token, else the review to wait for, of
// which the caller takes part.
func (t *Tokens) join(ctx context.Context, key tokenHash, token string) (*review, reviewed) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range []*memory{&t.good, &t.bad} {
		if r, ok := m.known[key]; ok && t.now().Before(r.until) {
			return nil, r
		}
	}
	r := t.pending[key]
	if r == nil {
		r = &review{key: key, done: make(chan struct{})}
		ctx, r.cancel = context.WithTimeout(context.WithoutCancel(ctx), reviewLimit)
		t.pending[key] = r
		go t.run(ctx, r, token)
	}
	r.callers++
	return r, reviewed{}
}

// part ends one caller's wait for r; the last one's ends r.
func (t *Tokens) part(r *review) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.callers--; r.callers > 0 {
		return
	}
	r.cancel()
	t.forget(r)
}

// forget lets nobody join r any more. The caller holds the lock.
func (t *Tokens) forget(r *review) {
	if t.pending[r.key] == r {
		delete(t.pending, r.key)
	}
}

// plausible tells what the API server need not be asked about: it issues JWTs.
func plausible(token string) bool {
	return len(token) <= maxToken && strings.Count(token, ".") == 2 &&
		strings.Trim(token, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.") == ""
}

// run asks, and remembers the answer if it is one.
func (t *Tokens) run(ctx context.Context, r *review, token string) {
	answer := t.ask(ctx, token)
	t.mu.Lock()
	defer t.mu.Unlock()
	if !answer.until.IsZero() {
		m := &t.good
		if answer.err != nil {
			m = &t.bad
		}
		m.keep(r.key, answer, t.now())
	}
	t.forget(r)
	r.answer = answer
	close(r.done)
}

// ask asks the API server. Where that does not say, until is zero.
func (t *Tokens) ask(ctx context.Context, token string) reviewed {
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return reviewed{err: errdefs.Errorf(errdefs.ErrUnavailable, "too many tokens are being reviewed: call again later")}
	}
	begun := t.now()
	// At klog's level 8 and above the client logs what it sends: not this.
	answer, err := t.reviews.Create(klog.NewContext(ctx, logr.Discard()), &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: t.audiences},
	}, metav1.CreateOptions{})
	if err != nil {
		return reviewed{err: unreviewed(err)}
	}
	r := reviewed{until: begun.Add(goodToken)}
	if r.account, r.err = t.account(answer.Status); r.err != nil {
		r.until = begun.Add(badToken)
	}
	return r
}

// account judges an answer of the API server. It does not quote Status.Error,
// which may quote the token.
func (t *Tokens) account(s authenticationv1.TokenReviewStatus) (Account, error) {
	switch {
	case !s.Authenticated:
		return Account{}, errdefs.Errorf(errdefs.ErrDenied, "the API server does not accept the token for audience %s: it is expired, its account, pod or node was deleted, or it is for another audience", strings.Join(t.audiences, " or "))
	case !slices.ContainsFunc(s.Audiences, func(a string) bool { return slices.Contains(t.audiences, a) }):
		return Account{}, errdefs.Errorf(errdefs.ErrDenied, "the token is not for audience %s", strings.Join(t.audiences, " or "))
	case !strings.HasPrefix(s.User.Username, accountUser):
		return Account{}, errdefs.Errorf(errdefs.ErrDenied, "the token is user %.100q's and no service account's", s.User.Username)
	}
	claim := func(name string) string {
		if values := s.User.Extra[name]; len(values) == 1 {
			return values[0]
		}
		return ""
	}
	return Account{
		Username: s.User.Username, UID: s.User.UID,
		Pod: claim(claimPod), PodUID: claim(claimPodUID), Node: claim(claimNode), NodeUID: claim(claimNodeUID),
	}, nil
}

// unreviewed is unasked without an answer's text: that may quote the token.
func unreviewed(err error) error {
	status := apierrors.APIStatus(nil)
	if !errors.As(err, &status) {
		return unasked("create tokenreviews", err)
	}
	s := status.Status()
	return unasked("create tokenreviews", &apierrors.StatusError{ErrStatus: metav1.Status{
		Reason: s.Reason, Code: s.Code, Message: fmt.Sprintf("it answered %d (%s)", s.Code, http.StatusText(int(s.Code))),
	}})
}
