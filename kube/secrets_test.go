package kube_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

var _ interface {
	envelope.Store
	envelope.Maker
	envelope.Permitter
} = (*kube.Secrets)(nil)

// fixture is one API server for all tests that need one.
type fixture struct{ *peers.APIServer }

// open opens the store of a namespace as a user.
func (f fixture) open(t *testing.T, user, namespace, prefix string) *kube.Secrets {
	t.Helper()
	config, err := kube.Config(f.Kubeconfig(t, user), "")
	if err != nil {
		t.Fatal(err)
	}
	s, err := kube.NewSecrets(config, namespace, prefix)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func mustBe(t *testing.T, what string, err, class error, words string) {
	t.Helper()
	if !errors.Is(err, class) || !strings.Contains(err.Error(), words) {
		t.Errorf("%s: %v, want %v with %q", what, err, class, words)
	}
}

func TestSecrets(t *testing.T) {
	f := fixture{peers.Kube(t)}
	t.Run("Layout", f.layout)
	t.Run("Denied", f.denied)
	t.Run("Foreign", f.foreign)
	t.Run("NoNamespace", f.noNamespace)
	t.Run("Race", f.race)
	t.Run("ExpiredList", f.expiredList)
	t.Run("Killed", f.killed)
}

// layout: what an operator sees, and what of it may be changed.
func (f fixture) layout(t *testing.T) {
	namespace := f.Namespace(t)
	s := f.open(t, peers.KubeAdmin, namespace, "prod-")
	must(t, "Create", s.Create(t.Context(), "dek-1", []byte("one")))
	secrets := f.Client.CoreV1().Secrets(namespace)
	got, err := secrets.Get(t.Context(), "prod-dek-1", metav1.GetOptions{})
	must(t, "Get", err)
	if got.Type != "cryptcsi.io/record" || len(got.Data) != 1 || string(got.Data["record"]) != "one" ||
		got.Labels["app.kubernetes.io/managed-by"] != "cryptcsi" || got.Labels["cryptcsi.io/store"] != "prod" {
		t.Errorf("Secret %+v", got)
	}

	_, before, err := s.Read(t.Context(), "dek-1")
	must(t, "Read", err)
	got.Annotations, got.Labels["backup"] = map[string]string{"note": "mine"}, "yes"
	_, err = secrets.Update(t.Context(), got, metav1.UpdateOptions{})
	must(t, "Update", err)
	mustBe(t, "Replace of what was annotated meanwhile", s.Replace(t.Context(), "dek-1", []byte("two"), before), errdefs.ErrConflict, "")
	_, version, err := s.Read(t.Context(), "dek-1")
	must(t, "Read", err)
	must(t, "Replace", s.Replace(t.Context(), "dek-1", []byte("two"), version))
	got, err = secrets.Get(t.Context(), "prod-dek-1", metav1.GetOptions{})
	must(t, "Get", err)
	if got.Annotations["note"] != "mine" || got.Labels["backup"] != "yes" || string(got.Data["record"]) != "two" {
		t.Errorf("Secret after Replace %+v", got)
	}

	for what, data := range map[string]map[string][]byte{
		"without data": nil, "with another key": {"record": []byte("x"), "more": nil}, "too long": {"record": make([]byte, envelope.MaxObject+1)},
	} {
		got.Data = data
		got, err = secrets.Update(t.Context(), got, metav1.UpdateOptions{})
		must(t, "Update", err)
		_, _, err = s.Read(t.Context(), "dek-1")
		mustBe(t, "Read of a record "+what, err, errdefs.ErrCorrupt, "prod-dek-1")
	}
	for _, bad := range []string{"Prod", "-prod", "prod_", "prod..x", "prod-.", "a.-b", strings.Repeat("p", 64), ".", "-"} {
		_, err := kube.NewSecrets(&rest.Config{}, namespace, bad)
		mustBe(t, "prefix "+bad, err, errdefs.ErrInvalid, bad)
	}
	for _, good := range []string{"p", "prod--", "prod.", "prod-1.x-"} {
		s := f.open(t, peers.KubeAdmin, namespace, good)
		must(t, "Create with prefix "+good, s.Create(t.Context(), "dek-1", nil))
		if names, _, err := s.List(t.Context(), "", 10); err != nil || !slices.Equal(names, []string{"dek-1"}) {
			t.Errorf("List with prefix %s: %q, %v", good, names, err)
		}
	}
	for _, bad := range []string{"", "Ns", "ns.x", "-ns", strings.Repeat("n", 64)} {
		_, err := kube.NewSecrets(&rest.Config{}, bad, "")
		mustBe(t, "namespace "+bad, err, errdefs.ErrInvalid, "namespace")
	}
}

// denied: each verb that is taken away is a refusal that names it.
func (f fixture) denied(t *testing.T) {
	namespace, user := f.Namespace(t), "limited"
	admin, s := f.open(t, peers.KubeAdmin, namespace, ""), f.open(t, user, namespace, "")
	verbs := []string{"create", "get", "list", "update", "delete"}
	for i, verb := range verbs {
		name := fmt.Sprintf("dek-%d", i)
		must(t, "Create", admin.Create(t.Context(), name, []byte("x")))
		_, version, err := admin.Read(t.Context(), name)
		must(t, "Read", err)
		rest := slices.DeleteFunc(slices.Clone(verbs), func(v string) bool { return v == verb })
		f.Allow(t, user, namespace, peers.Core("secrets", rest...), peers.Core("namespaces", "get"))
		words := "we may not " + verb + " secrets in namespace " + namespace
		err = eventually(t, words, func() error {
			switch verb {
			case "create":
				return s.Create(t.Context(), name+"-new", nil)
			case "get":
				_, _, err := s.Read(t.Context(), name)
				return err
			case "list":
				_, _, err := s.List(t.Context(), "", 10)
				return err
			case "update":
				return s.Replace(t.Context(), name, []byte("x"), version)
			}
			return s.Delete(t.Context(), name, version)
		})
		mustBe(t, "without "+verb, err, errdefs.ErrDenied, words)
		if data, now, err := admin.Read(t.Context(), name); err != nil || string(data) != "x" || now != version && verb != "update" {
			t.Errorf("without %s the object became %q (%s, was %s), %v", verb, data, now, version, err)
		}
	}
	mustBe(t, "Make", s.Make(t.Context()), errdefs.ErrDenied, "create namespaces")

	// Without the right to see its namespace a store works.
	f.Allow(t, user, namespace, peers.Core("secrets", verbs...))
	mustBe(t, "Read of nothing", eventually(t, "there is no Secret", func() error {
		_, _, err := s.Read(t.Context(), "nothing")
		return err
	}), errdefs.ErrNotFound, "nothing")

	config, err := kube.Config(f.Kubeconfig(t, peers.KubeAdmin), "")
	must(t, "Config", err)
	config.BearerToken = "wr0ng"
	s, err = kube.NewSecrets(config, namespace, "")
	must(t, "NewSecrets", err)
	_, _, err = s.Read(t.Context(), "dek-0")
	mustBe(t, "with a wrong token", err, errdefs.ErrDenied, "credentials")
	if strings.Contains(err.Error(), "wr0ng") {
		t.Errorf("the error shows the token: %v", err)
	}
}

// eventually repeats f until its error has the words: an API server hears of a
// change of roles a moment later.
func eventually(t *testing.T, words string, f func() error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		err := f()
		if err != nil && strings.Contains(err.Error(), words) || ctx.Err() != nil {
			return err
		}
	}
}

// foreign: a Secret that is not ours is left alone, and said to be there.
func (f fixture) foreign(t *testing.T) {
	namespace := f.Namespace(t)
	s, secrets := f.open(t, peers.KubeAdmin, namespace, ""), f.Client.CoreV1().Secrets(namespace)
	ours := map[string]string{"app.kubernetes.io/managed-by": "cryptcsi", "cryptcsi.io/store": ""}
	for name, secret := range map[string]*corev1.Secret{
		"type":   {Type: corev1.SecretTypeOpaque, ObjectMeta: metav1.ObjectMeta{Labels: ours}},
		"labels": {Type: "cryptcsi.io/record"},
		"store":  {Type: "cryptcsi.io/record", ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app.kubernetes.io/managed-by": "cryptcsi", "cryptcsi.io/store": "x"}}},
	} {
		secret.Name, secret.Data = name, map[string][]byte{"record": []byte("theirs")}
		made, err := secrets.Create(t.Context(), secret, metav1.CreateOptions{})
		must(t, "Create", err)
		version := string(made.UID) + "/" + made.ResourceVersion
		mustBe(t, "Create", s.Create(t.Context(), name, []byte("ours")), errdefs.ErrState, name)
		_, _, err = s.Read(t.Context(), name)
		mustBe(t, "Read", err, errdefs.ErrState, name)
		mustBe(t, "Replace", s.Replace(t.Context(), name, []byte("ours"), version), errdefs.ErrState, name)
		if now, err := secrets.Get(t.Context(), name, metav1.GetOptions{}); err != nil || now.ResourceVersion != made.ResourceVersion {
			t.Errorf("%s was changed: %v", name, err)
		}
	}
}

// noNamespace: where the namespace is not there, objects are not "not found".
func (f fixture) noNamespace(t *testing.T) {
	s := f.open(t, peers.KubeAdmin, "made-later", "")
	_, _, readErr := s.Read(t.Context(), "dek-1")
	_, _, listErr := s.List(t.Context(), "", 10)
	for op, err := range map[string]error{
		"Create": s.Create(t.Context(), "dek-1", nil), "Read": readErr, "List": listErr, "Replace": s.Replace(t.Context(), "dek-1", nil, "a/1"),
	} {
		mustBe(t, op, err, errdefs.ErrState, "no namespace made-later")
	}
	for range 2 {
		must(t, "Make", s.Make(t.Context()))
	}
	must(t, "Create", s.Create(t.Context(), "dek-1", nil))

	// Without a controller a namespace that is deleted stays in that state.
	must(t, "delete", f.Client.CoreV1().Namespaces().Delete(t.Context(), "made-later", metav1.DeleteOptions{}))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for n := 0; ctx.Err() == nil; n++ { // until the admission has heard of it
		if err := s.Create(ctx, fmt.Sprintf("new-%d", n), nil); err != nil {
			mustBe(t, "Create in what is being deleted", err, errdefs.ErrState, "is being deleted")
			return
		}
	}
	t.Error("a namespace that is being deleted takes new objects")
}

// race: 64 callers, of whom one makes the object and all see the same.
func (f fixture) race(t *testing.T) {
	namespace := f.Namespace(t)
	handles := []*kube.Secrets{f.open(t, peers.KubeAdmin, namespace, ""), f.open(t, peers.KubeAdmin, namespace, "")}
	for round := range 8 {
		name := fmt.Sprintf("dek-%d", round)
		seen := make([]string, 64)
		won := make([]bool, 64)
		var wg sync.WaitGroup
		for n := range seen {
			wg.Go(func() {
				s := handles[n%2]
				err := s.Create(t.Context(), name, fmt.Appendf(nil, "racer-%d", n))
				if won[n] = err == nil; err != nil && !errors.Is(err, errdefs.ErrExists) {
					t.Errorf("Create: %v", err)
				}
				data, _, err := s.Read(t.Context(), name)
				if err != nil {
					t.Errorf("Read: %v", err)
				}
				seen[n] = string(data)
			})
		}
		wg.Wait()
		slices.Sort(seen)
		if seen = slices.Compact(seen); len(seen) != 1 || len(slices.DeleteFunc(won, func(b bool) bool { return !b })) != 1 {
			t.Errorf("racers saw %q, winners %v", seen, won)
		}
	}
}

// expiredList: a listing that took longer than etcd remembers goes on.
func (f fixture) expiredList(t *testing.T) {
	s := f.open(t, peers.KubeAdmin, f.Namespace(t), "")
	var want []string
	for n := range 9 {
		name := fmt.Sprintf("dek-%d", n)
		must(t, "Create", s.Create(t.Context(), name, nil))
		want = append(want, name)
	}
	names, token, err := s.List(t.Context(), "", 4)
	must(t, "List", err)
	must(t, "Create", s.Create(t.Context(), "dek-7a", nil)) // later than the first page
	f.Compact(t)
	f.Kill(t) // and with it its cache, which remembers more than etcd
	f.Run(t)
	rest, next, err := s.List(t.Context(), token, 100)
	must(t, "List with an old token", err)
	want = slices.Insert(want, 8, "dek-7a") // it is the present that is listed now
	if got := append(names, rest...); !slices.Equal(got, want) || next != "" {
		t.Errorf("listed %q, want %q", got, want)
	}
	_, _, err = s.List(t.Context(), "no token", 4)
	mustBe(t, "List with nonsense", err, errdefs.ErrInvalid, "")
}

// killed: writes into an API server that dies end in time, and what they
// answered is what happened.
func (f fixture) killed(t *testing.T) {
	s := f.open(t, peers.KubeAdmin, f.Namespace(t), "")
	const writers = 16
	must(t, "Create", s.Create(t.Context(), "shared", nil))
	made := make([][]string, writers)    // whose Create said yes
	unknown := make([][]string, writers) // whose Create said neither yes nor no
	written := make(chan struct{}, 1<<16)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := 0; ; n++ {
				name := fmt.Sprintf("dek-%d-%d", w, n)
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				err := s.Create(ctx, name, []byte(name))
				cancel()
				if err != nil {
					mustBe(t, "Create while the server dies", err, errdefs.ErrUnavailable, "cannot be asked")
					unknown[w] = append(unknown[w], name)
					return
				}
				made[w] = append(made[w], name)
				written <- struct{}{}
			}
		})
	}
	for range 5 * writers {
		<-written
	}
	f.Kill(t)
	wg.Wait()
	_, _, err := s.Read(t.Context(), "shared")
	mustBe(t, "Read from a dead server", err, errdefs.ErrUnavailable, "cannot be asked")
	f.Run(t)
	for w := range writers {
		for _, name := range made[w] {
			if data, _, err := s.Read(t.Context(), name); err != nil || string(data) != name {
				t.Errorf("%s was created and is %q, %v", name, data, err)
			}
		}
		for _, name := range unknown[w] {
			if data, _, err := s.Read(t.Context(), name); !errors.Is(err, errdefs.ErrNotFound) && string(data) != name {
				t.Errorf("%s may have been created and is %q, %v", name, data, err)
			}
		}
	}
}

// TestHostileServer: nothing is read without limit, and nothing is waited for
// longer than ctx says.
func TestHostileServer(t *testing.T) {
	flood := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		chunk := []byte(strings.Repeat(" ", 1<<20))
		for range 1 << 10 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}))
	defer flood.Close()
	for what, host := range map[string]string{"endless": flood.URL, "silent": "http://" + peers.Silent(t), "closed": "http://" + peers.Addr(t)} {
		s, err := kube.NewSecrets(&rest.Config{Host: host, QPS: -1}, "ns", "")
		must(t, "NewSecrets", err)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, _, err = s.Read(ctx, "dek-1")
		cancel()
		if !errors.Is(err, errdefs.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
