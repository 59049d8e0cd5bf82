package kube_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kube"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// attachmentName is as Kubernetes' controller and kubelet make it.
func attachmentName(handle, attacher, node string) string {
	return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(handle+attacher+node)))
}

// attached: what an attachment opens, and all that it does not.
func (f fixture) attached(t *testing.T) {
	before := pv("named", ebs, "vol-named")
	before.Spec.CSI.VolumeAttributes = map[string]string{kube.AttributeDEKID: "taken/over"}
	snap := pv("snap", ebs, "vol-snap")
	snap.Spec.CSI.VolumeAttributes = map[string]string{kube.AttributeDEKID: "snap:" + ebs + "/s"}
	nonsense := pv("nonsense", ebs, "vol-nonsense")
	nonsense.Spec.CSI.VolumeAttributes = map[string]string{kube.AttributeDEKID: "white space"}
	hostPath := pv("host-path", ebs, "")
	hostPath.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/x"}}
	for _, v := range []*corev1.PersistentVolume{
		pv("a", ebs, "vol-a"), pv("b", ebs, "vol-b"), pv("waiting", ebs, "vol-waiting"), pv("leaving", ebs, "vol-leaving"),
		pv("other", ebs, "vol-other"), pv("side", "side.csi.example", "vol-side"), pv("twice", ebs, "vol-a"), before, snap, nonsense, hostPath,
	} {
		f.createPV(t, v)
	}
	waiting := va("waiting", ebs, node1, "waiting")
	waiting.Status.Attached = false
	leaving := va("leaving", ebs, node1, "leaving")
	leaving.Finalizers = []string{"cryptcsi.io/test"}
	inline := va("inline", ebs, node1, "")
	spec := pv("", ebs, "vol-inline").Spec
	spec.Capacity = nil // as the API wants it inline
	inline.Spec.Source = storagev1.VolumeAttachmentSource{InlineVolumeSpec: &spec}
	for _, v := range []*storagev1.VolumeAttachment{
		va("a-1", ebs, node1, "a"), va("b-2", ebs, node2, "b"), waiting, leaving, inline,
		va("other", "another.csi.example", node1, "other"), va("side", "sidecar.csi.example", node1, "side"),
		va("named", ebs, node1, "named"), va("snap", ebs, node1, "snap"), va("nonsense", ebs, node1, "nonsense"), va("host-path", ebs, node1, "host-path"),
		va(attachmentName("vol-no-pv", ebs, node1), ebs, node1, "no-such-pv"),
	} {
		f.createVA(t, v)
	}
	f.deleteVA(t, "leaving")

	a := f.follow(t, f.config(t), kube.AttachmentsOptions{Attachers: map[string]string{"side.csi.example": "sidecar.csi.example"}})
	for _, tc := range []struct {
		node string
		id   dek.ID
		why  string // "": allowed
	}{
		{node1, ebs + "/vol-a", ""},
		{node2, ebs + "/vol-b", ""},
		{node1, ebs + "/vol-b", "no VolumeAttachment joins PersistentVolume b and node node-1"},
		{node2, ebs + "/vol-a", "no VolumeAttachment joins"},
		{"node-3", ebs + "/vol-a", "no VolumeAttachment joins"},
		{"", ebs + "/vol-a", "no node"},
		{node1, "", "names no DEK"},
		{node1, ebs + "/vol-waiting", "not attached yet"},
		{node1, ebs + "/vol-leaving", "being deleted"},
		{node1, ebs + "/vol-other", "attacher another.csi.example"},
		{node1, "side.csi.example/vol-side", ""},
		{node1, ebs + "/vol-inline", ""},
		{node2, ebs + "/vol-inline", "no PersistentVolume"},
		{node1, "taken/over", ""},
		{node2, "taken/over", "no VolumeAttachment joins PersistentVolume named"},
		{node1, ebs + "/vol-named", "no PersistentVolume"}, // its one ID is the other
		{node1, "snap:" + ebs + "/s", "no PersistentVolume"},
		{node1, ebs + "/vol-snap", "no PersistentVolume"},
		{node1, "white space", "no PersistentVolume"},
		{node1, ebs + "/vol-nonsense", "no PersistentVolume"},
		{node1, ebs + "/", "no PersistentVolume"},
		{node1, ebs + "/vol-no-pv", "no PersistentVolume"},
		{node1, ebs, "no PersistentVolume"},
		{node1, ebs + "/vol", "no PersistentVolume"},
		{node1, "another.csi.example/vol-a", "no PersistentVolume"},
		{node1 + " a", ebs + "/vol-a", "no node"},
	} {
		err := a.Allowed(t.Context(), tc.node, tc.id)
		if tc.why == "" {
			must(t, fmt.Sprintf("%s for %s", tc.id, tc.node), err)
		} else {
			mustBe(t, fmt.Sprintf("%s for %s", tc.id, tc.node), err, errdefs.ErrDenied, tc.why)
		}
	}

	f.deleteVA(t, attachmentName("vol-no-pv", ebs, node1))

	// What it waits for happens.
	waiting, err := f.Client.StorageV1().VolumeAttachments().Get(t.Context(), "waiting", metav1.GetOptions{})
	must(t, "get", err)
	waiting.Status.Attached = true
	_, err = f.Client.StorageV1().VolumeAttachments().UpdateStatus(t.Context(), waiting, metav1.UpdateOptions{})
	must(t, "update", err)
	mustAllow(t, "what is attached now", a, node1, ebs+"/vol-waiting")
	leaving, err = f.Client.StorageV1().VolumeAttachments().Get(t.Context(), "leaving", metav1.GetOptions{})
	must(t, "get", err)
	leaving.Finalizers = nil
	_, err = f.Client.StorageV1().VolumeAttachments().Update(t.Context(), leaving, metav1.UpdateOptions{})
	must(t, "update", err)
}

// withoutAttach: a driver without attach gives by node affinity.
func (f fixture) withoutAttach(t *testing.T) {
	zone := func(values ...string) *corev1.VolumeNodeAffinity {
		return &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "zone", Operator: corev1.NodeSelectorOpIn, Values: values}},
		}}}}
	}
	in := func(v *corev1.PersistentVolume, affinity *corev1.VolumeNodeAffinity) *corev1.PersistentVolume {
		v.Spec.NodeAffinity = affinity
		return v
	}
	available := in(pv("l-available", local, "available"), zone("a"))
	available.Status.Phase = corev1.VolumeAvailable
	for _, v := range []*corev1.PersistentVolume{
		in(pv("l-a", local, "a"), zone("a")), pv("l-any", local, "any"), available,
		in(pv("l-ebs", ebs, "zonal"), zone("a")), in(pv("l-unknown", "unknown.csi.example", "zonal"), zone("a")),
	} {
		f.createPV(t, v)
	}
	a := f.follow(t, f.config(t), kube.AttachmentsOptions{})
	mustAllow(t, "affinity", a, node1, local+"/a")
	for _, tc := range []struct {
		node string
		id   dek.ID
		why  string
	}{
		{node2, local + "/a", "does not satisfy the node affinity of PersistentVolume l-a"},
		{"node-3", local + "/a", "there is no Node node-3"},
		{node1, local + "/any", "prefix policy"},
		{node1, local + "/available", "not bound"},
		{node1, ebs + "/zonal", "no VolumeAttachment"},
		{node1, "unknown.csi.example/zonal", "no VolumeAttachment"},
	} {
		mustBe(t, fmt.Sprintf("%s for %s", tc.id, tc.node), a.Allowed(t.Context(), tc.node, tc.id), errdefs.ErrDenied, tc.why)
	}

	// Memory says no, but the truth has changed a moment ago.
	available, err := f.Client.CoreV1().PersistentVolumes().Get(t.Context(), "l-available", metav1.GetOptions{})
	must(t, "get", err)
	available.Status.Phase = corev1.VolumeBound
	_, err = f.Client.CoreV1().PersistentVolumes().UpdateStatus(t.Context(), available, metav1.UpdateOptions{})
	must(t, "update", err)
	mustAllow(t, "bound a moment ago", a, node1, local+"/available")
	label := func(zone string) {
		n, err := f.Client.CoreV1().Nodes().Get(t.Context(), node2, metav1.GetOptions{})
		must(t, "get", err)
		n.Labels["zone"] = zone
		_, err = f.Client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{})
		must(t, "update", err)
	}
	label("a")
	mustAllow(t, "labelled a moment ago", a, node2, local+"/a")
	label("b")
	within(t, time.Second, "the label to count", func() bool {
		return errors.Is(a.Allowed(t.Context(), node2, local+"/a"), errdefs.ErrDenied)
	})
}

// detachCloses: what was detached is refused within a second, counted from when
// another watcher hears of it.
func (f fixture) detachCloses(t *testing.T) {
	a := f.follow(t, f.config(t), kube.AttachmentsOptions{})
	var longest time.Duration
	for n := range 10 {
		name := fmt.Sprintf("door-%d", n)
		id := dek.ID(ebs + "/" + name)
		f.createPV(t, pv(name, ebs, name))
		f.createVA(t, va(name, ebs, node1, name))
		within(t, time.Second, "the attachment", func() bool { return a.Allowed(t.Context(), node1, id) == nil })
		w, err := f.Client.StorageV1().VolumeAttachments().Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		must(t, "watch", err)
		f.deleteVA(t, name)
		for e := range w.ResultChan() {
			if e.Type == "DELETED" {
				break
			}
		}
		longest = max(longest, within(t, time.Second, "the door to close", func() bool {
			return errors.Is(a.Allowed(t.Context(), node1, id), errdefs.ErrDenied)
		}))
		w.Stop()
	}
	t.Logf("closed at most %v after the event", longest)
}

// gate holds what watches say while it is closed.
type gate struct {
	mu     sync.Mutex
	closed chan struct{} // nil: open
}

func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = make(chan struct{})
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.closed)
	g.closed = nil
}

func (g *gate) wait(ctx context.Context) {
	g.mu.Lock()
	closed := g.closed
	g.mu.Unlock()
	if closed == nil {
		return
	}
	select {
	case <-closed:
	case <-ctx.Done():
	}
}

func (g *gate) config(config *rest.Config) *rest.Config {
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := next.RoundTrip(r)
			if err == nil && r.URL.Query().Has("watch") {
				resp.Body = &gatedBody{resp.Body, r.Context(), g}
			}
			return resp, err
		})
	})
	return config
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type gatedBody struct {
	io.ReadCloser
	ctx  context.Context
	gate *gate
}

func (b *gatedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.gate.wait(b.ctx)
	return n, err
}

// freshAttachment: while the watch is behind, an attachment counts all the same.
func (f fixture) freshAttachment(t *testing.T) {
	f.createPV(t, pv("known", ebs, "vol-known"))
	named := pv("fresh-named", ebs, "vol-fresh-named")
	named.Spec.CSI.VolumeAttributes = map[string]string{kube.AttributeDEKID: "fresh/named"}
	f.createPV(t, named)
	g := &gate{}
	c := &clock{}
	a := f.follow(t, g.config(f.config(t)), kube.AttachmentsOptions{Now: c.now})
	g.close()

	f.createVA(t, va(attachmentName("vol-known", ebs, node1), ebs, node1, "known"))
	mustAllow(t, "a fresh attachment", a, node1, ebs+"/vol-known")
	mustBe(t, "another node", a.Allowed(t.Context(), node2, ebs+"/vol-known"), errdefs.ErrDenied, "no VolumeAttachment")

	f.createVA(t, va(attachmentName("vol-fresh-named", ebs, node1), ebs, node1, "fresh-named"))
	mustAllow(t, "a fresh attachment of a volume with another ID", a, node1, "fresh/named")
	mustBe(t, "its handle", a.Allowed(t.Context(), node1, ebs+"/vol-fresh-named"), errdefs.ErrDenied, "no PersistentVolume")

	f.createPV(t, pv("fresh", ebs, "vol-fresh"))
	waiting := va(attachmentName("vol-fresh", ebs, node1), ebs, node1, "fresh")
	waiting.Status.Attached = false
	f.createVA(t, waiting)
	mustBe(t, "before it is attached", a.Allowed(t.Context(), node1, ebs+"/vol-fresh"), errdefs.ErrDenied, "not attached yet")
	f.deleteVA(t, waiting.Name)
	waiting.Status.Attached = true
	f.createVA(t, waiting)
	mustAllow(t, "a fresh volume", a, node1, ebs+"/vol-fresh")
	// Kubernetes' name for an attachment, but what it says is of another node.
	f.createPV(t, pv("lying", ebs, "vol-lying"))
	f.createVA(t, va(attachmentName("vol-lying", ebs, node1), ebs, node2, "lying"))
	mustBe(t, "an attachment of another node", a.Allowed(t.Context(), node1, ebs+"/vol-lying"), errdefs.ErrDenied, "no PersistentVolume")

	// It must not go on like that: what was detached meanwhile still counts.
	c.forward(3 * time.Minute)
	mustBe(t, "with what is out of date", a.Allowed(t.Context(), node1, ebs+"/vol-known"), errdefs.ErrUnavailable, "out of date")
	mustBe(t, "Ready", a.Ready(), errdefs.ErrUnavailable, "told us nothing")
	g.open()
	for _, name := range []string{"vol-known", "vol-fresh", "vol-fresh-named", "vol-lying"} {
		f.deleteVA(t, attachmentName(name, ebs, node1))
	}
}

// tooManyReads: a node that asks for everything is slowed down, and no other.
func (f fixture) tooManyReads(t *testing.T) {
	f.createPV(t, pv("honest", ebs, "vol-honest"))
	f.createVA(t, va("honest", ebs, node1, "honest"))
	a := f.follow(t, f.config(t), kube.AttachmentsOptions{})
	var denied int
	for n := 0; ; n++ {
		err := a.Allowed(t.Context(), node2, dek.ID(fmt.Sprintf("%s/guess-%d", ebs, n)))
		if errors.Is(err, errdefs.ErrUnavailable) {
			mustBe(t, "guess", err, errdefs.ErrUnavailable, "too many")
			break
		}
		mustBe(t, "guess", err, errdefs.ErrDenied, "no PersistentVolume")
		if denied++; denied > 5000 {
			t.Fatal("a node may ask without end")
		}
	}
	if denied < 50 {
		t.Errorf("a node was slowed down after %d", denied)
	}
	mustAllow(t, "an honest node", a, node1, ebs+"/vol-honest")
	mustBe(t, "an honest node's mistake", a.Allowed(t.Context(), node1, ebs+"/nothing"), errdefs.ErrDenied, "")
}

// staleClaim: a claim is stale only where the API server has no attachment.
func (f fixture) staleClaim(t *testing.T) {
	for _, name := range []string{"claimed", "detached", "going", "blind"} {
		f.createPV(t, pv(name, ebs, name))
	}
	f.createPV(t, pv("claimed-local", local, "claimed-local"))
	f.createVA(t, va("claimed", ebs, node1, "claimed"))
	going := va("going", ebs, node1, "going")
	going.Finalizers = []string{"cryptcsi.io/test"}
	f.createVA(t, going)
	f.deleteVA(t, "going")
	g := &gate{}
	a := f.follow(t, g.config(f.config(t)), kube.AttachmentsOptions{})
	g.close()
	defer g.open()
	f.createVA(t, va("blind", ebs, node1, "blind")) // memory cannot know

	stale := func(node string, id dek.ID) (ok bool) {
		t.Helper()
		within(t, 20*time.Second, "an answer", func() bool {
			var err error
			ok, err = a.StaleClaim(t.Context(), node, id)
			if err != nil && !strings.Contains(err.Error(), "too many claims") {
				t.Fatal(err)
			}
			return err == nil
		})
		return ok
	}
	for _, tc := range []struct {
		node string
		id   dek.ID
		want bool
	}{
		{node1, ebs + "/claimed", false},
		{node2, ebs + "/claimed", true},
		{node1, ebs + "/detached", true},
		{node1, ebs + "/going", false},
		{node1, ebs + "/blind", false},
		{node2, ebs + "/blind", true},
		{node1, local + "/claimed-local", false},
		{node2, local + "/claimed-local", false},
		{node1, ebs + "/no-such-volume", false},
	} {
		if got := stale(tc.node, tc.id); got != tc.want {
			t.Errorf("StaleClaim(%s, %s) = %v", tc.node, tc.id, got)
		}
	}
	// An attachment to something that cannot be looked up proves nothing.
	f.createVA(t, va("riddle", ebs, node2, "gone"))
	if stale(node2, ebs+"/claimed") {
		t.Error("a claim is stale although its node has an attachment to who knows what")
	}
	f.deleteVA(t, "riddle")
	going, err := f.Client.StorageV1().VolumeAttachments().Get(t.Context(), "going", metav1.GetOptions{})
	must(t, "get", err)
	going.Finalizers = nil
	_, err = f.Client.StorageV1().VolumeAttachments().Update(t.Context(), going, metav1.UpdateOptions{})
	must(t, "update", err)
}

// serverAway: answers go on for a while without the API server, then end, and
// come back with it, by a clock that is put forward and by the real one.
func (f fixture) serverAway(t *testing.T, quick steady) {
	const id = awayID
	c := &clock{}
	a := f.follow(t, f.config(t), kube.AttachmentsOptions{Now: c.now})
	quick.stop()

	f.Kill(t)
	killed := time.Now()
	mustAllow(t, "without a server", a, node1, id)
	mustAllow(t, "without a server", quick.Attachments, node1, id)
	mustBe(t, "what memory denies", a.Allowed(t.Context(), node2, id), errdefs.ErrUnavailable, "cannot be asked")
	c.forward(30*time.Second - time.Since(killed))
	mustAllow(t, "some time later", a, node1, id)
	c.forward(2 * time.Minute)
	mustBe(t, "when it is too old", a.Allowed(t.Context(), node1, id), errdefs.ErrUnavailable, "out of date")
	_, _, err := kube.NewNotes(a).Note(t.Context(), id)
	mustBe(t, "Note", err, errdefs.ErrUnavailable, "out of date")
	within(t, 9*time.Second, "the end of answers", func() bool {
		return errors.Is(quick.Allowed(t.Context(), node1, id), errdefs.ErrUnavailable)
	})
	if after := time.Since(killed); after < 1500*time.Millisecond {
		t.Errorf("answers ended %v after the server, want a quarter of 8 s at least", after)
	}

	f.Run(t)
	f.deleteVA(t, "away")
	for what, a := range map[string]*kube.Attachments{"slow": a, "quick": quick.Attachments} {
		took := within(t, 20*time.Second, "the server to be heard again", func() bool { return a.Ready() == nil })
		mustBe(t, "detached while we were blind", a.Allowed(t.Context(), node1, id), errdefs.ErrDenied, "no VolumeAttachment")
		t.Logf("%s: answers again after %v", what, took)
	}
}

// permissions: each verb of the documented role is needed, but for those of
// listing, which older servers need.
func (f fixture) permissions(t *testing.T) {
	const user = "less"
	f.createPV(t, pv("less", ebs, "vol-less"))
	f.createPV(t, pv("less-local", local, "vol-less"))
	f.createPV(t, pv("less-detached", ebs, "vol-less-detached"))
	f.createVA(t, va("less", ebs, node1, "less"))
	config := f.configOf(t, user)
	all := peers.DocumentedRules(t, "kube.go", "")
	for i, rule := range all {
		for _, verb := range rule.Verbs {
			if verb == "list" && rule.Resources[0] != "volumeattachments" {
				continue
			}
			rules := peers.DocumentedRules(t, "kube.go", "")
			rules[i].Verbs = slices.DeleteFunc(append(rules[i].Verbs, "deletecollection"), func(v string) bool {
				return v == verb || verb == "watch" && v == "list" // by which it would go on, if slowly
			})
			f.AllowCluster(t, user, rules...)
			if err := f.everything(t, config, time.Second); err == nil {
				t.Errorf("nobody needs to %s %s", verb, rule.Resources[0])
			}
		}
	}
	f.AllowCluster(t, user, all...)
	must(t, "with all of it", f.everything(t, config, 20*time.Second))
	f.deleteVA(t, "less")
}

// everything does what the key service does, and says what failed for want of a
// right: that of listing is missing where there is no listing for so long.
func (f fixture) everything(t *testing.T, config *rest.Config, patience time.Duration) error {
	a, err := kube.NewAttachments(config, kube.AttachmentsOptions{})
	must(t, "NewAttachments", err)
	run(t, a)
	for end := time.Now().Add(patience); !a.HasSynced(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return a.Ready()
		}
	}
	tokens, err := kube.NewTokens(config, kube.TokensOptions{Audiences: []string{"x"}})
	must(t, "NewTokens", err)
	denied := func(err error) error {
		if errors.Is(err, errdefs.ErrDenied) {
			return nil
		}
		return err
	}
	_, err = tokens.Review(t.Context(), "a.b.c")
	_, claimErr := a.StaleClaim(t.Context(), node1, ebs+"/vol-less-detached")
	notes := kube.NewNotes(a)
	ok, noteErr := notes.Confirm(t.Context(), ebs+"/vol-less", dek.HeaderID{UUID: dek.NewUUID()})
	if noteErr != nil && errors.Is(noteErr, errdefs.ErrState) {
		ok, noteErr = true, nil // from the time before
	}
	if noteErr == nil && !ok {
		return errors.New("not noted")
	}
	// Raised from what is there now.
	if h, noted, err := notes.Note(t.Context(), ebs+"/vol-less"); err == nil && noted {
		h.Sequence++
		_, noteErr = notes.Confirm(t.Context(), ebs+"/vol-less", h)
	}
	return errors.Join(denied(err), claimErr, noteErr,
		a.Allowed(t.Context(), node1, ebs+"/vol-less"),
		denied(a.Allowed(t.Context(), node2, ebs+"/vol-less")),
		denied(a.Allowed(t.Context(), node1, local+"/vol-less")), // reads the node, for want of affinity
	)
}

// TestAttachmentsBeforeRun: nothing is believed before it was heard.
func TestAttachmentsBeforeRun(t *testing.T) {
	config := &rest.Config{Host: "http://" + peers.Addr(t), QPS: -1}
	_, err := kube.NewAttachments(config, kube.AttachmentsOptions{Staleness: time.Second})
	mustBe(t, "staleness", err, errdefs.ErrInvalid, "too short")
	a, err := kube.NewAttachments(config, kube.AttachmentsOptions{})
	must(t, "NewAttachments", err)
	if a.HasSynced() {
		t.Error("synced without having run")
	}
	notes := kube.NewNotes(a)
	_, claimErr := a.StaleClaim(t.Context(), node1, "x/y")
	_, _, noteErr := notes.Note(t.Context(), "x/y")
	_, confirmErr := notes.Confirm(t.Context(), "x/y", dek.HeaderID{UUID: dek.NewUUID()})
	for what, err := range map[string]error{
		"Allowed": a.Allowed(t.Context(), node1, "x/y"), "StaleClaim": claimErr, "Note": noteErr, "Confirm": confirmErr,
	} {
		mustBe(t, what, err, errdefs.ErrUnavailable, "has not told us")
	}
}
