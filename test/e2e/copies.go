package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
)

// copies makes a volume from the snapshot files, one from the volume itself, and
// looks for the data and for keys of their own.
func (t *tester) copies(ctx context.Context) (string, error) {
	group := "snapshot.storage.k8s.io"
	restored := want{name: "restored", class: "encrypted", size: "256Mi", source: &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: "files"}}
	cloned := want{name: "cloned", class: "encrypted", size: "256Mi", source: &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: "files"}}
	if err := errors.Join(t.up(ctx, restored, cloned), t.reads(ctx, restored), t.reads(ctx, cloned)); err != nil {
		return "", err
	}
	keys := map[string]string{}
	for _, name := range []string{"files", "restored", "cloned"} {
		r, err := t.recordOf(ctx, name)
		if err != nil {
			return "", err
		}
		if r.State != "formatted" || len(r.Wrapped.Ciphertext) == 0 {
			return "", fmt.Errorf("%s: its record is in state %s and has a key of %d bytes", name, r.State, len(r.Wrapped.Ciphertext))
		}
		if other, ok := keys[string(r.Wrapped.Ciphertext)]; ok {
			return "", fmt.Errorf("%s and %s have the same key", name, other)
		}
		keys[string(r.Wrapped.Ciphertext)] = name
	}
	err := errors.Join(t.noPlaintext(ctx, "restored"), t.noPlaintext(ctx, "cloned"), t.headersDiffer(ctx))
	return "each has a record and a key of its own", errors.Join(err, t.discard(ctx, "restored", "cloned"))
}

// storedRecord is what the test reads of a record in the store.
type storedRecord struct {
	ID      string `json:"id"`
	State   string `json:"state"`
	Wrapped struct {
		Ciphertext []byte `json:"ciphertext"`
	} `json:"wrapped"`
}

// recordOf is the record of a claim's volume.
func (t *tester) recordOf(ctx context.Context, claim string) (r storedRecord, err error) {
	v, err := t.volume(ctx, claim)
	if err != nil {
		return r, err
	}
	text, err := t.record(ctx, v.Spec.CSI.VolumeHandle)
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal([]byte(text), &r)
}

// headersDiffer looks whether the copies' LUKS headers are others than that of
// what they were copied from: a wrapped key differs even where the key does not.
func (t *tester) headersDiffer(ctx context.Context) error {
	seen := map[string]string{}
	for _, name := range []string{"files", "restored", "cloned"} {
		v, err := t.volume(ctx, name)
		if err != nil {
			return err
		}
		// Behind both copies of the header's text lies the keyslots' area.
		sum, err := t.kubectl(ctx, "exec", "-n", "kube-system", "disks", "--", "sh", "-ec", "dd if=/disks/volumes/"+v.Spec.CSI.VolumeHandle+".img bs=32k skip=1 count=8 2>/dev/null | sha256sum")
		if err != nil {
			return err
		}
		if other, ok := seen[sum]; ok {
			return fmt.Errorf("%s and %s have the same keyslots", name, other)
		}
		seen[sum] = name
	}
	return nil
}
