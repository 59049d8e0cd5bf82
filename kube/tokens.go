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
	"golang.org/x/sync/singleflight"
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
	maxReviewed  = 20000    // tokens that are remembered
	maxReviews   = 32       // at a time
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
// remembered is its SHA-256, for 20000 tokens at most.
type Tokens struct {
	audiences []string
	now       func() time.Time
	reviews   authenticationv1client.TokenReviewInterface
	slots     chan struct{}
	flights   singleflight.Group

	mu    sync.Mutex
	known map[[sha256.Size]byte]reviewed
}

type reviewed struct {
	account Account
	err     error
	until   time.Time
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
		slots: make(chan struct{}, maxReviews), known: map[[sha256.Size]byte]reviewed{},
	}, nil
}

// Review returns whose a token is. ErrDenied for a token that is none of a
// service account, expired, revoked, or for another audience; ErrUnavailable
// where the API server does not say. No error shows the token.
func (t *Tokens) Review(ctx context.Context, token string) (Account, error) {
	if !plausible(token) {
		return Account{}, errdefs.Errorf(errdefs.ErrDenied, "the token is no token of a service account")
	}
	key := sha256.Sum256([]byte(token))
	if r, ok := t.remembered(key); ok {
		return r.account, r.err
	}
	done := t.flights.DoChan(string(key[:]), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewLimit)
		defer cancel()
		return t.ask(ctx, key, token), nil
	})
	select {
	case r := <-done:
		answer := r.Val.(reviewed)
		return answer.account, answer.err
	case <-ctx.Done():
		return Account{}, ctx.Err()
	}
}

// plausible tells what the API server need not be asked about: it issues JWTs.
func plausible(token string) bool {
	return len(token) <= maxToken && strings.Count(token, ".") == 2 &&
		strings.Trim(token, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.") == ""
}

func (t *Tokens) remembered(key [sha256.Size]byte) (reviewed, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.known[key]
	return r, ok && t.now().Before(r.until)
}

// ask asks the API server and remembers the answer, if it is one.
func (t *Tokens) ask(ctx context.Context, key [sha256.Size]byte, token string) reviewed {
	select {
	case t.slots <- struct{}{}:
		defer func() { <-t.slots }()
	case <-ctx.Done():
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
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.known) >= maxReviewed {
		maps.DeleteFunc(t.known, func(_ [sha256.Size]byte, r reviewed) bool { return !t.now().Before(r.until) })
	}
	if len(t.known) < maxReviewed {
		t.known[key] = r
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
