package kube

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// AnnotationFormatted of a PersistentVolume is the note that it is formatted:
// "<header's UUID>:<sequence>", the sequence decimal.
const AnnotationFormatted = "cryptcsi.io/formatted"

const attempts = 30 // to change an object that others change

// Notes keeps the floor of a volume's header on its PersistentVolume, in
// AnnotationFormatted. A note is what the API server says, which is trusted,
// so a record that is behind it, or gone, was rolled back. Where several
// PersistentVolumes have one DEK ID all of them get the note, and the highest
// counts. Methods may be called concurrently, by several processes too.
type Notes struct{ a *Attachments }

// NewNotes returns Notes that read what a follows.
func NewNotes(a *Attachments) *Notes { return &Notes{a} }

// Note returns the floor (UUID and Sequence), and false where none is noted. It
// answers from memory and may miss what was written in the last moments: so
// ask for the note first and for the record then, which is never behind. ErrState
// where somebody else wrote the annotation or two volumes' notes contradict
// each other; ErrUnavailable while memory is not to be believed.
func (n *Notes) Note(ctx context.Context, id dek.ID) (dek.HeaderID, bool, error) {
	if err := n.a.volumes.ready(); err != nil {
		return dek.HeaderID{}, false, err
	}
	volumes := n.a.volumes.under(string(id))
	if len(volumes) == 0 {
		for _, name := range n.a.names(id) { // that Allowed had to read
			v, err := n.a.readVolume(ctx, attachment{volume: name})
			if err != nil {
				return dek.HeaderID{}, false, err
			}
			if v.id == id {
				volumes = append(volumes, v)
			}
		}
	}
	var highest dek.HeaderID
	noted := false
	for _, v := range volumes {
		if !v.noted {
			continue
		}
		h, err := parseNote(v)
		switch {
		case err != nil:
			return dek.HeaderID{}, false, err
		case noted && h.UUID != highest.UUID:
			return dek.HeaderID{}, false, errdefs.Errorf(errdefs.ErrState, "PersistentVolumes with the DEK ID %s have notes of different headers, %s and %s: remove the annotation %s that is wrong", id, highest.UUID, h.UUID, AnnotationFormatted)
		case !noted || h.Sequence > highest.Sequence:
			highest, noted = h, true
		}
	}
	return highest, noted, nil
}

// Confirm raises the floor to h, on all PersistentVolumes with that DEK ID; it
// never lowers it. False where there is none, which is no error: there are DEKs
// outside of Kubernetes. ErrState where a note names another header; otherwise
// ErrUnavailable means that a part may have happened, and calling again is right.
func (n *Notes) Confirm(ctx context.Context, id dek.ID, h dek.HeaderID) (bool, error) {
	if dek.CheckUUID(h.UUID) != nil {
		return false, errdefs.Errorf(errdefs.ErrInvalid, "header %.40q is not a UUID of lower-case hex and dashes", h.UUID)
	}
	if err := n.a.volumes.ready(); err != nil {
		return false, err
	}
	noted := false
	for _, name := range n.a.names(id) {
		ok, err := n.raise(ctx, name, id, h)
		if err != nil {
			return false, err
		}
		noted = noted || ok
	}
	return noted, nil
}

// raise raises one PersistentVolume's note; false where it is gone.
func (n *Notes) raise(ctx context.Context, name string, id dek.ID, h dek.HeaderID) (bool, error) {
	return settled(ctx, "PersistentVolume "+name, func() (bool, error) { return n.tryRaise(ctx, name, id, h) })
}

// settled repeats a change of something that others change too until it is not
// ErrConflict, for a while; then it is ErrUnavailable.
func settled(ctx context.Context, what string, try func() (bool, error)) (bool, error) {
	for attempt := range attempts {
		ok, err := try()
		if !errors.Is(err, errdefs.ErrConflict) {
			return ok, err
		}
		select {
		case <-time.After(rand.N(time.Duration(attempt+1) * 5 * time.Millisecond)):
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	return false, errdefs.Errorf(errdefs.ErrUnavailable, "%s is changed by others all the time: call again later", what)
}

// tryRaise is ErrConflict where the volume was changed between reading and writing.
func (n *Notes) tryRaise(ctx context.Context, name string, id dek.ID, h dek.HeaderID) (bool, error) {
	pv, err := n.a.core.PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, asked(ctx, "get persistentvolumes", err)
	}
	v, _ := keepVolume(pv)
	if v.id != id {
		return false, nil
	}
	if v.noted {
		old, err := parseNote(v)
		switch {
		case err != nil:
			return false, err
		case old.UUID != h.UUID:
			return false, errdefs.Errorf(errdefs.ErrState, "PersistentVolume %s has a note of header %s, now it is to be %s: is this another disk?", name, old.UUID, h.UUID)
		case old.Sequence >= h.Sequence:
			return true, nil
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pv.UID, "resourceVersion": pv.ResourceVersion, // only if it still is that
		"annotations": map[string]string{AnnotationFormatted: h.UUID + ":" + strconv.FormatUint(h.Sequence, 10)},
	}})
	if err != nil {
		return false, err
	}
	_, err = n.a.core.PersistentVolumes().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: ManagedBy})
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case apierrors.IsConflict(err):
		return false, errdefs.Errorf(errdefs.ErrConflict, "PersistentVolume %s was changed", name)
	case err != nil:
		return false, asked(ctx, "patch persistentvolumes", err)
	}
	return true, nil
}

// asked is unasked, and ctx's error where that is the reason.
func asked(ctx context.Context, request string, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return unasked(request, err)
}

// parseNote accepts what Confirm writes and nothing else.
func parseNote(v volume) (dek.HeaderID, error) {
	uuid, digits, _ := strings.Cut(v.note, ":")
	sequence, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || dek.CheckUUID(uuid) != nil || strconv.FormatUint(sequence, 10) != digits {
		return dek.HeaderID{}, errdefs.Errorf(errdefs.ErrState, "PersistentVolume %s: annotation %s is %.80q, which is no note of ours: somebody changed it and has to put it back", v.name, AnnotationFormatted, v.note)
	}
	return dek.HeaderID{UUID: uuid, Sequence: sequence}, nil
}
