package kube

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/cryptcsi/cryptcsi/dek"
)

type answers func(*http.Request) (*http.Response, error)

func (f answers) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestAge: what proves how old a table is, and what does not.
func TestAge(t *testing.T) {
	now := time.Unix(1000, 0)
	a := newAge(2*time.Minute, func() time.Time { return now })
	var body io.Reader
	code := http.StatusOK
	client := timed{answers(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: code, Body: io.NopCloser(body)}, nil
	}), a}
	request := func(query string) *http.Response {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://api/x?"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	check := func(what string, want time.Duration, known bool) {
		t.Helper()
		if got, ok := a.get(); ok != known || ok && got != want {
			t.Errorf("%s: age %v (%v), want %v (%v)", what, got, ok, want, known)
		}
	}
	watch := func(lasted time.Duration, end io.Reader) {
		if got := a.next(false); got > 30*time.Second {
			t.Errorf("a watch is to run for %v", got)
		}
		body = io.MultiReader(strings.NewReader("events"), end)
		resp := request("watch=true")
		now = now.Add(lasted)
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
	nothing, broken := strings.NewReader(""), io.MultiReader(errReader{io.ErrUnexpectedEOF})

	check("nothing asked", 0, false)
	body = nothing
	_ = request("").Body.Close()
	now = now.Add(time.Second)
	check("a listing asked for", 0, false)
	a.listed()
	check("a listing complete", time.Second, true) // counted from its request
	watch(29*time.Second, nothing)
	check("a watch that ended early", 30*time.Second, true)
	watch(30*time.Second, broken)
	check("a watch that broke", time.Minute, true)
	code = http.StatusInternalServerError
	watch(30*time.Second, nothing)
	check("a watch that failed", 90*time.Second, true)
	code = http.StatusOK
	watch(time.Second, nothing)
	check("a short watch that ended early", 91*time.Second, true)
	watch(2*time.Second, nothing)
	check("a short watch, as it is late", 2*time.Second, true)
	watch(31*time.Second, nothing)
	check("a watch that ended in its time", 31*time.Second, true)
	a.listed()
	check("what was proven before", 31*time.Second, true)
	if got := a.next(true); got != time.Minute {
		t.Errorf("a watch that lists is to run for %v", got)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// TestTable: whatever the order of events, what is found is what there is.
func TestTable(t *testing.T) {
	a := newAge(time.Minute, time.Now)
	table := newTable("PersistentVolumes", a, keepVolume, func(v volume) string { return string(v.id) })
	at := func(name, handle string) *corev1.PersistentVolume {
		return &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
				CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: handle},
			}},
		}
	}
	find := func(id string) (names string) {
		for _, v := range table.under(id) {
			names += v.name
		}
		return names
	}
	for i, step := range []struct {
		do         func() error
		one, other string
	}{
		{func() error { return table.Add(at("a", "1")) }, "a", ""},
		{func() error { return table.Update(at("a", "2")) }, "", "a"}, // deleted and made again
		{func() error { return table.Update(at("a", "")) }, "", ""},   // and is none of ours
		{func() error { return table.Add(at("a", "1")) }, "a", ""},
		{func() error { return table.Delete(at("b", "1")) }, "a", ""},
		{func() error { return table.Replace([]any{at("c", "1"), at("d", "2")}, "") }, "c", "d"},
		{func() error { return table.Add(at("d", "2")) }, "c", "d"},
		{func() error { return table.Delete(at("c", "1")) }, "", "d"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if one, other := find("d/1"), find("d/2"); one != step.one || other != step.other {
			t.Errorf("step %d: found %q and %q, want %q and %q", i, one, other, step.one, step.other)
		}
	}
	if _, ok := table.get("c"); ok || len(table.names) != 1 || len(table.keys) != 1 {
		t.Errorf("left over: %v, %v", table.names, table.keys)
	}
}

func TestMatches(t *testing.T) {
	has := map[string]string{"zone": "a", "size": "10"}
	expr := func(key string, op corev1.NodeSelectorOperator, values ...string) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: op, Values: values}}}
	}
	field := func(key string, op corev1.NodeSelectorOperator, values ...string) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{{Key: key, Operator: op, Values: values}}}
	}
	both := func(a, b corev1.NodeSelectorTerm) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: append(a.MatchExpressions, b.MatchExpressions...), MatchFields: append(a.MatchFields, b.MatchFields...)}
	}
	for i, tc := range []struct {
		want  bool
		terms []corev1.NodeSelectorTerm
	}{
		{false, nil},
		{false, []corev1.NodeSelectorTerm{{}}},
		{true, []corev1.NodeSelectorTerm{{}, expr("zone", "In", "a")}},
		{true, []corev1.NodeSelectorTerm{expr("zone", "In", "b", "a")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "In", "b")}},
		{true, []corev1.NodeSelectorTerm{expr("zone", "In", "b"), expr("size", "Exists")}},
		{false, []corev1.NodeSelectorTerm{both(expr("zone", "In", "b"), expr("size", "Exists"))}},
		{true, []corev1.NodeSelectorTerm{both(expr("zone", "In", "a"), expr("size", "Exists"))}},
		{true, []corev1.NodeSelectorTerm{expr("zone", "NotIn", "b")}},
		{true, []corev1.NodeSelectorTerm{expr("none", "NotIn", "b")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "NotIn", "a")}},
		{true, []corev1.NodeSelectorTerm{expr("none", "DoesNotExist")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "DoesNotExist")}},
		{true, []corev1.NodeSelectorTerm{expr("size", "Gt", "9")}},
		{false, []corev1.NodeSelectorTerm{expr("size", "Gt", "10")}},
		{true, []corev1.NodeSelectorTerm{expr("size", "Lt", "11")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "Lt", "11")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "Like", "a")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "", "a")}},
		{false, []corev1.NodeSelectorTerm{expr("zone", "In")}},
		{true, []corev1.NodeSelectorTerm{field("metadata.name", "In", "node-1")}},
		{false, []corev1.NodeSelectorTerm{field("metadata.name", "In", "node-2")}},
		{true, []corev1.NodeSelectorTerm{field("metadata.name", "NotIn", "node-2")}},
		{false, []corev1.NodeSelectorTerm{field("metadata.name", "NotIn", "node-1")}},
		{false, []corev1.NodeSelectorTerm{field("metadata.namespace", "NotIn", "x")}},
		{false, []corev1.NodeSelectorTerm{both(expr("zone", "In", "a"), field("metadata.name", "In", "node-2"))}},
	} {
		if got := matches(&corev1.NodeSelector{NodeSelectorTerms: tc.terms}, "node-1", has); got != tc.want {
			t.Errorf("case %d, %+v: %v", i, tc.terms, got)
		}
	}
}

// BenchmarkAllowed: 30000 attachments on 1000 nodes.
func BenchmarkAllowed(b *testing.B) {
	a, err := NewAttachments(&rest.Config{Host: "http://127.0.0.1:1"}, AttachmentsOptions{})
	if err != nil {
		b.Fatal(err)
	}
	const volumes, nodes = 30000, 1000
	var pvs, vas []any
	var ids []dek.ID
	var names []string
	for n := range nodes {
		names = append(names, fmt.Sprintf("node-%d", n))
	}
	for n := range volumes {
		ids = append(ids, dek.ID(fmt.Sprintf("ebs.csi.aws.com/vol-%017x", n)))
		name := fmt.Sprintf("pvc-%08x-0000-4000-8000-000000000000", n)
		pvs = append(pvs, &corev1.PersistentVolume{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
				CSI: &corev1.CSIPersistentVolumeSource{Driver: "ebs.csi.aws.com", VolumeHandle: fmt.Sprintf("vol-%017x", n)},
			}},
		})
		vas = append(vas, &storagev1.VolumeAttachment{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("csi-%064x", n)},
			Spec: storagev1.VolumeAttachmentSpec{
				Attacher: "ebs.csi.aws.com", NodeName: names[n%nodes],
				Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &name},
			},
			Status: storagev1.VolumeAttachmentStatus{Attached: true},
		})
	}
	for _, a := range []*age{a.attachments.age, a.volumes.age, a.drivers.age, a.nodes.age} {
		a.begun = time.Now()
	}
	for _, err := range []error{a.volumes.Replace(pvs, ""), a.attachments.Replace(vas, ""), a.drivers.Replace(nil, ""), a.nodes.Replace(nil, "")} {
		if err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for n := 0; pb.Next(); n = (n + 7919) % volumes {
			if err := a.Allowed(b.Context(), names[n%nodes], ids[n]); err != nil {
				b.Fatal(err)
			}
		}
	})
}
