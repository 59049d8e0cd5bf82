package envelope

import (
	"slices"
	"strings"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// checkNames checks the names of that many KEKs. ErrInvalid.
func checkNames(names []string, keks int) error {
	if len(names) > keks {
		return errdefs.Errorf(errdefs.ErrInvalid, "%d names for %d KEKs", len(names), keks)
	}
	for i, name := range names {
		if name == "" {
			continue
		}
		if err := dek.CheckKEK(name); err != nil {
			return errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
		}
		if slices.Contains(names[:i], name) {
			return errdefs.Errorf(errdefs.ErrInvalid, "two KEKs are named %q: nobody could tell which one a record means", name)
		}
	}
	return nil
}

// KEKNames returns the names that a spec may have as its KEK, sorted.
func (k *Keyring) KEKNames() []string {
	names := slices.DeleteFunc(slices.Clone(k.names), func(name string) bool { return name == "" })
	slices.Sort(names)
	return names
}

// kekOf returns the index of the KEK that wraps r's keys. ErrInvalid where none
// has the name that r's spec says.
func (k *Keyring) kekOf(r *record) (int, error) {
	if r.Spec.KEK == "" {
		return 0, nil
	}
	i := slices.Index(k.names, r.Spec.KEK)
	if i >= 0 {
		return i, nil
	}
	known := strings.Join(k.KEKNames(), ", ")
	if known == "" {
		known = "none has a name"
	}
	return 0, errdefs.Errorf(errdefs.ErrInvalid, "no KEK is named %q (%s): name one with --kms-uri %s=…", r.Spec.KEK, known, r.Spec.KEK)
}
