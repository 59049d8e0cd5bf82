package kmstest

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Abilities are what a service can do with its keys, beyond Create, Describe
// and Rotate. What it cannot is ErrInvalid.
type Abilities struct {
	Labels, Rotation, Disable, Destroy, List bool
}

// RunManager proves what kms.Manager and kms.Fleet promise. open opens a KEK
// whose key does not exist yet, another one at each call, twice the same KEK
// with both results.
func RunManager(t *testing.T, can Abilities, open func(t *testing.T) (a, b *kms.KEK)) {
	a, b := open(t)
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	n := kms.NewKey{}
	if can.Labels {
		n.Labels = map[string]string{kms.LabelCluster: "one", kms.LabelPurpose: "kek"}
	}
	if can.Rotation {
		n.RotationPeriod = 365 * 24 * time.Hour
	}

	if _, err := a.DescribeKey(t.Context()); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatalf("DescribeKey of nothing: %v, want ErrNotFound", err)
	}
	made, err := a.CreateKey(t.Context(), n)
	if err != nil {
		t.Fatalf("CreateKey: %v", err)
	}
	again, err := b.CreateKey(t.Context(), n)
	if err != nil || current(t, again) != current(t, made) {
		t.Errorf("CreateKey again = %+v, %v; want the key that was made", again, err)
	}
	if can.Labels {
		stranger := n
		stranger.Labels = map[string]string{kms.LabelCluster: "two", kms.LabelPurpose: "kek"}
		if _, err := b.CreateKey(t.Context(), stranger); !errors.Is(err, errdefs.ErrExists) {
			t.Errorf("CreateKey for another cluster: %v, want ErrExists", err)
		}
		if made.Labels[kms.LabelCluster] != "one" {
			t.Errorf("labels %v", made.Labels)
		}
	}
	if made.RotationPeriod != n.RotationPeriod {
		t.Errorf("rotation period %v, want %v", made.RotationPeriod, n.RotationPeriod)
	}
	versions(t, can, a, b)
	fleet(t, can, a, b)
}

// versions: rotation makes one, older ones can be switched off, the current
// one cannot.
func versions(t *testing.T, can Abilities, a, b *kms.KEK) {
	s := &suite{}
	key := s.key(t)
	old := s.wrap(t, a, id, key)
	rotated, err := a.RotateKey(t.Context())
	if err != nil {
		t.Fatalf("RotateKey: %v", err)
	}
	if len(rotated.Versions) != 2 || current(t, rotated) == old.KeyID {
		t.Fatalf("after one rotation: %+v, want two versions and not %s current", rotated.Versions, old.KeyID)
	}
	seen, err := b.DescribeKey(t.Context())
	if err != nil || current(t, seen) != current(t, rotated) {
		t.Errorf("DescribeKey elsewhere: %+v, %v", seen, err)
	}
	renewed := s.wrap(t, b, id, key)
	if renewed.KeyID != current(t, rotated) {
		t.Errorf("wrapped under %s after rotation to %s", renewed.KeyID, current(t, rotated))
	}
	s.mustUnwrap(t, b, id, old, key)

	for _, state := range []kms.VersionState{kms.Disabled, kms.Destroyed} {
		if err := a.SetVersion(t.Context(), current(t, rotated), state); !errors.Is(err, errdefs.ErrState) && !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("SetVersion(current, %s): %v, want ErrState", state, err)
		}
	}
	s.mustUnwrap(t, a, id, renewed, key)

	err = a.SetVersion(t.Context(), old.KeyID, kms.Disabled)
	if !can.Disable {
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("SetVersion(disabled): %v, want ErrInvalid", err)
		}
	} else {
		if err != nil {
			t.Fatalf("SetVersion(disabled): %v", err)
		}
		s.mustFail(t, "a disabled version's key", a, id, old, errdefs.ErrDenied)
		s.mustUnwrap(t, a, id, renewed, key)
		if err := a.SetVersion(t.Context(), old.KeyID, kms.Enabled); err != nil {
			t.Fatalf("SetVersion(enabled): %v", err)
		}
		s.mustUnwrap(t, a, id, old, key)
	}

	err = a.SetVersion(t.Context(), old.KeyID, kms.Destroyed)
	if !can.Destroy {
		if !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("SetVersion(destroyed): %v, want ErrInvalid", err)
		}
		return
	}
	if err != nil {
		t.Fatalf("SetVersion(destroyed): %v", err)
	}
	s.mustFail(t, "a destroyed version's key", a, id, old, errdefs.ErrDenied)
	s.mustUnwrap(t, a, id, renewed, key)
}

// fleet: the key is found among those with our labels, with labels that were set later.
func fleet(t *testing.T, can Abilities, a, b *kms.KEK) {
	if !can.List {
		if _, err := a.ListKeys(t.Context()); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("ListKeys: %v, want ErrInvalid", err)
		}
		return
	}
	me, err := a.DescribeKey(t.Context())
	if err != nil {
		t.Fatalf("DescribeKey: %v", err)
	}
	if can.Labels {
		if err := a.LabelKey(t.Context(), map[string]string{kms.LabelActive: "1700000000"}); err != nil {
			t.Fatalf("LabelKey: %v", err)
		}
	}
	keys, err := b.ListKeys(t.Context())
	if err != nil {
		t.Fatalf("ListKeys: %v", err)
	}
	i := slices.IndexFunc(keys, func(k kms.Key) bool { return k.URI == me.URI })
	if i < 0 {
		t.Fatalf("%s is not among %+v", me.URI, keys)
	}
	if l := keys[i].Labels; can.Labels && (l[kms.LabelActive] != "1700000000" || l[kms.LabelCluster] != "one") {
		t.Errorf("labels %v", l)
	}
}

// current returns the key ID of the one current version.
func current(t *testing.T, k kms.Key) string {
	t.Helper()
	ids := map[bool][]string{}
	for _, v := range k.Versions {
		ids[v.Current] = append(ids[v.Current], v.KeyID)
	}
	if len(ids[true]) != 1 {
		t.Fatalf("%d current versions in %+v", len(ids[true]), k.Versions)
	}
	return ids[true][0]
}
