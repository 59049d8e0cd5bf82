package kube_test

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kube"
)

const (
	uuid1 = "11111111-2222-4333-8444-555555555555"
	uuid2 = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
)

// annotation is what a PersistentVolume's note is in the API server.
func (f fixture) annotation(t *testing.T, name string) string {
	t.Helper()
	v, err := f.Client.CoreV1().PersistentVolumes().Get(t.Context(), name, metav1.GetOptions{})
	must(t, "get", err)
	return v.Annotations["cryptcsi.io/formatted"]
}

func (f fixture) annotate(t *testing.T, name, note string) {
	t.Helper()
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"cryptcsi.io/formatted":%q}}}`, note)
	_, err := f.Client.CoreV1().PersistentVolumes().Patch(t.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{})
	must(t, "patch", err)
}

// awaitNote waits until memory has what the API server has.
func awaitNote(t *testing.T, n *kube.Notes, id dek.ID, want dek.HeaderID) {
	t.Helper()
	var got dek.HeaderID
	var err error
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		var ok bool
		if got, ok, err = n.Note(t.Context(), id); err == nil && ok && got == want {
			return
		}
	}
	t.Errorf("Note is %+v, %v; want %+v", got, err, want)
}

func (f fixture) notes(t *testing.T) {
	for _, name := range []string{"noted", "unnoted"} {
		f.createPV(t, pv(name, ebs, name))
	}
	f.createPV(t, pv("twin-1", ebs, "twins"))
	f.createPV(t, pv("twin-2", ebs, "twins"))
	other := pv("elsewhere", ebs, "elsewhere")
	other.Annotations = map[string]string{"a": "b"}
	f.createPV(t, other)
	a := f.follow(t, f.config(t), kube.AttachmentsOptions{})
	n := kube.NewNotes(a)
	confirm := func(id dek.ID, h dek.HeaderID) {
		t.Helper()
		if ok, err := n.Confirm(t.Context(), id, h); err != nil || !ok {
			t.Errorf("Confirm(%s, %+v) = %v, %v", id, h, ok, err)
		}
	}

	if _, ok, err := n.Note(t.Context(), ebs+"/noted"); ok || err != nil {
		t.Errorf("Note of nothing: %v, %v", ok, err)
	}
	confirm(ebs+"/noted", dek.HeaderID{UUID: uuid1, Sequence: 5, Fingerprint: "not kept"})
	awaitNote(t, n, ebs+"/noted", dek.HeaderID{UUID: uuid1, Sequence: 5})
	if got := f.annotation(t, "noted"); got != uuid1+":5" {
		t.Errorf("annotation %q", got)
	}
	for _, sequence := range []uint64{4, 0, 5} {
		confirm(ebs+"/noted", dek.HeaderID{UUID: uuid1, Sequence: sequence})
		if got := f.annotation(t, "noted"); got != uuid1+":5" {
			t.Errorf("annotation was changed to %q by %d", got, sequence)
		}
	}
	confirm(ebs+"/noted", dek.HeaderID{UUID: uuid1, Sequence: math.MaxUint64})
	awaitNote(t, n, ebs+"/noted", dek.HeaderID{UUID: uuid1, Sequence: math.MaxUint64})
	_, err := n.Confirm(t.Context(), ebs+"/noted", dek.HeaderID{UUID: uuid2, Sequence: math.MaxUint64})
	mustBe(t, "another header", err, errdefs.ErrState, uuid2)
	_, err = n.Confirm(t.Context(), ebs+"/noted", dek.HeaderID{UUID: "x"})
	mustBe(t, "no UUID", err, errdefs.ErrInvalid, "UUID")
	confirm(ebs+"/elsewhere", dek.HeaderID{UUID: uuid1})
	awaitNote(t, n, ebs+"/elsewhere", dek.HeaderID{UUID: uuid1})
	v, err := f.Client.CoreV1().PersistentVolumes().Get(t.Context(), "elsewhere", metav1.GetOptions{})
	must(t, "get", err)
	if v.Annotations["a"] != "b" || v.Status.Phase != "Bound" {
		t.Errorf("more was changed than the note: %+v", v)
	}

	if ok, err := n.Confirm(t.Context(), "state-disk", dek.HeaderID{UUID: uuid1}); ok || err != nil {
		t.Errorf("Confirm outside of Kubernetes: %v, %v", ok, err)
	}
	if _, ok, err := n.Note(t.Context(), "state-disk"); ok || err != nil {
		t.Errorf("Note outside of Kubernetes: %v, %v", ok, err)
	}

	// Several PersistentVolumes of one volume.
	confirm(ebs+"/twins", dek.HeaderID{UUID: uuid1, Sequence: 7})
	if a, b := f.annotation(t, "twin-1"), f.annotation(t, "twin-2"); a != uuid1+":7" || b != a {
		t.Errorf("notes %q and %q", a, b)
	}
	f.annotate(t, "twin-2", uuid1+":9")
	awaitNote(t, n, ebs+"/twins", dek.HeaderID{UUID: uuid1, Sequence: 9})
	f.annotate(t, "twin-2", uuid2+":9")
	within(t, 2*time.Second, "the contradiction", func() bool {
		_, _, err := n.Note(t.Context(), ebs+"/twins")
		return errors.Is(err, errdefs.ErrState)
	})

	for _, bad := range []string{
		"", ":", uuid1, uuid1 + ":", uuid1 + ":-1", uuid1 + ":+1", uuid1 + ":01", uuid1 + ":1 ", uuid1 + ":1:2", uuid1 + ":0x1",
		uuid1 + ":18446744073709551616", "11111111-2222-4333-8444-55555555555G:1", "11111111-2222-4333-8444-55555555555A:1", "x" + uuid1 + ":1", ":1",
	} {
		f.annotate(t, "unnoted", bad)
		_, err := n.Confirm(t.Context(), ebs+"/unnoted", dek.HeaderID{UUID: uuid1, Sequence: 1})
		mustBe(t, "Confirm over "+bad, err, errdefs.ErrState, "no note of ours")
		within(t, 2*time.Second, "memory to have "+bad, func() bool {
			_, _, err := n.Note(t.Context(), ebs+"/unnoted")
			return errors.Is(err, errdefs.ErrState)
		})
		if got := f.annotation(t, "unnoted"); got != bad {
			t.Errorf("%q was changed to %q", bad, got)
		}
	}
	must(t, "delete", f.Client.CoreV1().PersistentVolumes().Delete(t.Context(), "unnoted", metav1.DeleteOptions{}))
}

// notesRace: many writers of two processes, and others who change the same
// PersistentVolume: the note only rises, and ends at the highest.
func (f fixture) notesRace(t *testing.T) {
	f.createPV(t, pv("race", ebs, "race"))
	const writers, each = 8, 8
	var notes []*kube.Notes
	for range 2 {
		notes = append(notes, kube.NewNotes(f.follow(t, f.config(t), kube.AttachmentsOptions{})))
	}
	w, err := f.Client.CoreV1().PersistentVolumes().Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=race"})
	must(t, "watch", err)
	var seen []uint64
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for e := range w.ResultChan() {
			m, ok := e.Object.(metav1.Object)
			if !ok || m.GetAnnotations()["cryptcsi.io/formatted"] == "" {
				continue
			}
			var n uint64
			if _, err := fmt.Sscanf(m.GetAnnotations()["cryptcsi.io/formatted"], uuid1+":%d", &n); err != nil {
				t.Errorf("note %q: %v", m.GetAnnotations()["cryptcsi.io/formatted"], err)
			}
			if seen = append(seen, n); n == writers*each {
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for j := range each {
				h := dek.HeaderID{UUID: uuid1, Sequence: uint64(j*writers + (i+j)%writers + 1)}
				ok, err := notes[i%2].Confirm(t.Context(), ebs+"/race", h)
				if err != nil || !ok {
					t.Errorf("Confirm %d: %v, %v", h.Sequence, ok, err)
				}
			}
		})
	}
	wg.Go(func() {
		for n := range 20 {
			patch := fmt.Appendf(nil, `{"metadata":{"labels":{"n":"%d"}}}`, n)
			if _, err := f.Client.CoreV1().PersistentVolumes().Patch(t.Context(), "race", types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	<-watched
	w.Stop()
	for i := range seen {
		if i > 0 && seen[i] < seen[i-1] {
			t.Errorf("the note fell from %d to %d", seen[i-1], seen[i])
		}
	}
	if got := f.annotation(t, "race"); got != fmt.Sprintf("%s:%d", uuid1, writers*each) {
		t.Errorf("annotation %q", got)
	}
}

// notesOfFreshVolume: a volume that only a read found has a note too.
func (f fixture) notesOfFreshVolume(t *testing.T) {
	g := &gate{}
	a := f.follow(t, g.config(f.config(t)), kube.AttachmentsOptions{})
	n := kube.NewNotes(a)
	g.close()
	defer g.open()
	const id = ebs + "/vol-new"
	f.createPV(t, pv("new", ebs, "vol-new"))
	f.createVA(t, va(attachmentName("vol-new", ebs, node1), ebs, node1, "new"))
	if ok, err := n.Confirm(t.Context(), id, dek.HeaderID{UUID: uuid1, Sequence: 3}); ok || err != nil {
		t.Errorf("Confirm of what nobody knows: %v, %v", ok, err)
	}
	mustAllow(t, "a fresh attachment", a, node1, id)
	if ok, err := n.Confirm(t.Context(), id, dek.HeaderID{UUID: uuid1, Sequence: 3}); !ok || err != nil {
		t.Errorf("Confirm: %v, %v", ok, err)
	}
	if h, ok, err := n.Note(t.Context(), id); err != nil || !ok || h != (dek.HeaderID{UUID: uuid1, Sequence: 3}) {
		t.Errorf("Note: %+v, %v, %v", h, ok, err)
	}
}
