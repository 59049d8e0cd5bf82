package kube_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

const audience = "cryptcsi-key-service"

// pod makes a pod on a node, of an account that it also makes.
func (f fixture) pod(t *testing.T, namespace, name, node string) *corev1.Pod {
	t.Helper()
	_, err := f.Client.CoreV1().ServiceAccounts(namespace).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	must(t, "create ServiceAccount", err)
	no := false
	pod, err := f.Client.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			ServiceAccountName: name, AutomountServiceAccountToken: &no, NodeName: node,
			Containers: []corev1.Container{{Name: "c", Image: "i"}},
		},
	}, metav1.CreateOptions{})
	must(t, "create Pod", err)
	return pod
}

// token is one of an account, bound to a pod if there is one.
func (f fixture) token(t *testing.T, namespace, account string, pod *corev1.Pod, audience string) string {
	t.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}
	if pod != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
	}
	got, err := f.Client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	must(t, "create token", err)
	return got.Status.Token
}

func (f fixture) tokens(t *testing.T) {
	namespace := f.Namespace(t)
	pod := f.pod(t, namespace, "csi", node1)
	nodeObject, err := f.Client.CoreV1().Nodes().Get(t.Context(), node1, metav1.GetOptions{})
	must(t, "get Node", err)
	account, err := f.Client.CoreV1().ServiceAccounts(namespace).Get(t.Context(), "csi", metav1.GetOptions{})
	must(t, "get ServiceAccount", err)
	tokens, err := kube.NewTokens(f.config(t), kube.TokensOptions{Audiences: []string{"another", audience}})
	must(t, "NewTokens", err)

	got, err := tokens.Review(t.Context(), f.token(t, namespace, "csi", pod, audience))
	must(t, "Review", err)
	want := kube.Account{
		Username: "system:serviceaccount:" + namespace + ":csi", UID: string(account.UID),
		Pod: "csi", PodUID: string(pod.UID), Node: node1, NodeUID: string(nodeObject.UID),
	}
	if got != want {
		t.Errorf("Review %+v, want %+v", got, want)
	}
	got, err = tokens.Review(t.Context(), f.token(t, namespace, "csi", nil, audience))
	must(t, "Review of an unbound token", err)
	if got != (kube.Account{Username: want.Username, UID: want.UID}) {
		t.Errorf("Review of an unbound token %+v", got)
	}

	good := f.token(t, namespace, "csi", pod, audience)
	flipped := []byte(good)
	flipped[len(flipped)/2] ^= 1
	for what, token := range map[string]string{
		"another audience":     f.token(t, namespace, "csi", pod, "https://kubernetes.default.svc"),
		"a changed token":      string(flipped),
		"nothing":              "",
		"an admin's token":     "admin-token",
		"nonsense":             "not.a.token",
		"spaces":               "a.b c.d",
		"too long a token":     strings.Repeat("x", 16<<10) + ".y.z",
		"without a signature":  good[:strings.LastIndexByte(good, '.')+1],
		"a token and a letter": good + "A",
	} {
		for range 2 { // the second is remembered
			_, err := tokens.Review(t.Context(), token)
			mustBe(t, what, err, errdefs.ErrDenied, "token")
			mustHide(t, err, token)
		}
	}
	for _, bad := range [][]string{nil, {""}} {
		_, err := kube.NewTokens(f.config(t), kube.TokensOptions{Audiences: bad})
		mustBe(t, "no audience", err, errdefs.ErrInvalid, "audience")
	}

	tokens, err = kube.NewTokens(f.configOf(t, "nobody"), kube.TokensOptions{Audiences: []string{audience}})
	must(t, "NewTokens", err)
	_, err = tokens.Review(t.Context(), good)
	mustBe(t, "without a right", err, errdefs.ErrUnavailable, "we may not create tokenreviews")
	mustHide(t, err, good)
}

// tokenOfDeletedPod: its token is good while it is remembered and no longer
// than the 15 seconds that are promised.
func (f fixture) tokenOfDeletedPod(t *testing.T) {
	namespace := f.Namespace(t)
	pod := f.pod(t, namespace, "csi", node1)
	c := &clock{}
	tokens, err := kube.NewTokens(f.config(t), kube.TokensOptions{Audiences: []string{audience}, Now: c.now})
	must(t, "NewTokens", err)
	token := f.token(t, namespace, "csi", pod, audience)
	_, err = tokens.Review(t.Context(), token)
	must(t, "Review", err)
	now := int64(0)
	must(t, "delete Pod", f.Client.CoreV1().Pods(namespace).Delete(t.Context(), "csi", metav1.DeleteOptions{GracePeriodSeconds: &now}))
	_, err = tokens.Review(t.Context(), token)
	must(t, "Review from memory", err)
	fresh, err := kube.NewTokens(f.config(t), kube.TokensOptions{Audiences: []string{audience}, Now: c.now})
	must(t, "NewTokens", err)
	took := within(t, 15*time.Second, "the API server to forget the token", func() bool {
		c.forward(2 * time.Second) // forget a refusal
		_, err := fresh.Review(t.Context(), token)
		c.forward(6 * time.Second) // and a success
		return errors.Is(err, errdefs.ErrDenied)
	})
	_, err = tokens.Review(t.Context(), token)
	mustBe(t, "a deleted pod's token", err, errdefs.ErrDenied, "does not accept the token")
	t.Logf("refused %v after the pod was deleted, and what we remember besides", took)
}

func mustHide(t *testing.T, err error, token string) {
	t.Helper()
	for part := range strings.SplitSeq(token, ".") {
		if len(part) > 8 && strings.Contains(err.Error(), part) {
			t.Errorf("the error shows the token: %v", err)
		}
	}
}

// reviewer is an API server that knows nothing but TokenReviews, and answers
// as it is told.
func reviewer(t *testing.T, answer func(w http.ResponseWriter)) *rest.Config {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answer(w) }))
	t.Cleanup(server.Close)
	return &rest.Config{Host: server.URL, QPS: -1}
}

func writeReview(w http.ResponseWriter, status string) {
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"kind":"TokenReview","apiVersion":"authentication.k8s.io/v1","status":%s}`, status)
}

const goodReview = `{"authenticated":true,"audiences":["` + audience + `"],"user":{"username":"system:serviceaccount:ns:csi","uid":"u"}}`

// TestTokensJudge: what an API server can say beyond what a real one says here.
func TestTokensJudge(t *testing.T) {
	const token = "eyJhbGciOiJSUzI1NiJ9.c2VjcmV0c2VjcmV0.c2lnbmF0dXJlc2ln"
	for what, tc := range map[string]struct {
		status int
		answer string
		class  error
	}{
		"good":              {200, goodReview, nil},
		"no audience":       {200, `{"authenticated":true,"user":{"username":"system:serviceaccount:ns:csi"}}`, errdefs.ErrDenied},
		"other audience":    {200, `{"authenticated":true,"audiences":["x"],"user":{"username":"system:serviceaccount:ns:csi"}}`, errdefs.ErrDenied},
		"a person":          {200, `{"authenticated":true,"audiences":["` + audience + `"],"user":{"username":"alice","extra":{"authentication.kubernetes.io/node-name":["node-1"]}}}`, errdefs.ErrDenied},
		"refused":           {200, `{"authenticated":false,"error":"bad token ` + token + `"}`, errdefs.ErrDenied},
		"nothing":           {200, `{}`, errdefs.ErrDenied},
		"server error":      {500, token, errdefs.ErrUnavailable},
		"forbidden":         {403, token, errdefs.ErrUnavailable},
		"our token refused": {401, token, errdefs.ErrUnavailable},
		"throttled":         {429, token, errdefs.ErrUnavailable},
	} {
		config := reviewer(t, func(w http.ResponseWriter) {
			if tc.status == 200 {
				writeReview(w, tc.answer)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(tc.status)
			fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":"x%s","message":%q}`, tc.status, tc.answer, "echo "+tc.answer)
		})
		tokens, err := kube.NewTokens(config, kube.TokensOptions{Audiences: []string{audience}})
		must(t, "NewTokens", err)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err = tokens.Review(ctx, token)
		cancel()
		if tc.class == nil {
			must(t, what, err)
			continue
		}
		mustBe(t, what, err, tc.class, "")
		mustHide(t, err, token)
	}
	for what, host := range map[string]string{"closed": "http://" + peers.Addr(t), "silent": "http://" + peers.Silent(t)} {
		tokens, err := kube.NewTokens(&rest.Config{Host: host, QPS: -1}, kube.TokensOptions{Audiences: []string{audience}})
		must(t, "NewTokens", err)
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		_, err = tokens.Review(ctx, token)
		cancel()
		if !errors.Is(err, errdefs.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
		mustHide(t, err, token)
	}
}

// TestTokensAreRemembered: one question for many callers, again after the time,
// and an answer that failed counts for nobody.
func TestTokensAreRemembered(t *testing.T) {
	const token = "aaaa.bbbb.cccc"
	var asked atomic.Int64
	var fail, refuse atomic.Bool
	config := reviewer(t, func(w http.ResponseWriter) {
		asked.Add(1)
		switch {
		case fail.Load():
			w.WriteHeader(http.StatusInternalServerError)
		case refuse.Load():
			writeReview(w, `{}`)
		default:
			writeReview(w, goodReview)
		}
	})
	c := &clock{}
	tokens, err := kube.NewTokens(config, kube.TokensOptions{Audiences: []string{audience}, Now: c.now})
	must(t, "NewTokens", err)
	review := func(class error, wantAsked int64) {
		t.Helper()
		_, err := tokens.Review(t.Context(), token)
		if !errors.Is(err, class) {
			t.Errorf("Review: %v, want %v", err, class)
		}
		if got := asked.Load(); got != wantAsked {
			t.Errorf("asked %d times, want %d", got, wantAsked)
		}
	}
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() { _, _ = tokens.Review(t.Context(), token) })
	}
	wg.Wait()
	review(nil, 1)
	refuse.Store(true)
	c.forward(4 * time.Second)
	review(nil, 1)
	c.forward(time.Second)
	review(errdefs.ErrDenied, 2)
	review(errdefs.ErrDenied, 2)
	refuse.Store(false)
	c.forward(time.Second)
	review(nil, 3)
	c.forward(5 * time.Second)
	fail.Store(true)
	review(errdefs.ErrUnavailable, 4)
	fail.Store(false)
	review(nil, 5)

	// A caller who leaves takes nobody with him.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = tokens.Review(ctx, "other.token.here")
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("Review by one who left: %v", err)
	}
	_, err = tokens.Review(t.Context(), "other.token.here")
	must(t, "Review", err)
}

// TestStrangersTokens: made-up tokens are reviewed 32 at a time, a review whose
// callers have left takes no place from anybody, and those that were refused
// push no good one out of memory.
func TestStrangersTokens(t *testing.T) {
	var asked, asking, most atomic.Int64
	hold := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		asked.Add(1)
		if bytes.Contains(body, []byte("good.token.here")) {
			writeReview(w, goodReview)
			return
		}
		n := asking.Add(1)
		defer asking.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		select {
		case <-hold:
			writeReview(w, `{}`)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(server.Close)
	day := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	tokens, err := kube.NewTokens(&rest.Config{Host: server.URL, QPS: -1}, kube.TokensOptions{Audiences: []string{audience}, Now: func() time.Time { return day }})
	must(t, "NewTokens", err)
	ctx, leave := context.WithCancel(t.Context())
	var strangers sync.WaitGroup
	for i := range 200 {
		strangers.Go(func() {
			if _, err := tokens.Review(ctx, fmt.Sprintf("made.up.%d", i)); !errors.Is(err, context.Canceled) {
				t.Errorf("a stranger who left: %v", err)
			}
		})
	}
	within(t, 10*time.Second, "32 reviews", func() bool { return asking.Load() == 32 })
	if n := most.Load(); n != 32 {
		t.Errorf("the API server was asked %d times at a time, want 32", n)
	}
	leave()
	strangers.Wait()
	soon, cancel := context.WithTimeout(t.Context(), 5*time.Second) // half of what a review may take
	defer cancel()
	_, err = tokens.Review(soon, "good.token.here")
	must(t, "Review after strangers have left", err)

	close(hold)
	for i := range 2200 {
		_, err := tokens.Review(t.Context(), fmt.Sprintf("again.made.up%d", i))
		mustBe(t, "a made-up token", err, errdefs.ErrDenied, "")
	}
	before := asked.Load()
	_, err = tokens.Review(t.Context(), "good.token.here")
	must(t, "Review from memory", err)
	_, err = tokens.Review(t.Context(), "again.made.up7")
	mustBe(t, "a refused token", err, errdefs.ErrDenied, "")
	if asked.Load() != before {
		t.Error("what is remembered was asked for")
	}
	_, err = tokens.Review(t.Context(), "again.made.up2199")
	mustBe(t, "a refused token too many", err, errdefs.ErrDenied, "")
	if asked.Load() != before+1 {
		t.Error("more refused tokens are remembered than there is room for")
	}
}
