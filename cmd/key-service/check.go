package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

// checkID is the ID that check wraps a random key for. No volume has it.
const checkID = "check.cryptcsi.io/check"

// finding is one row of check's table.
type finding struct {
	what, step string
	needs      string // the permission, if it is one that is missing
	err        error
	skipped    bool
}

// check tries everything that serving will need.
func check(ctx context.Context, c *command) error {
	keys, err := c.open(ctx, 0, 0)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	var all []finding
	for _, k := range keys.KEKs {
		all = append(all, checkKEK(ctx, k, keys.RecordAuth())...)
	}
	for _, s := range keys.Stores {
		all = append(all, checkStore(ctx, s)...)
	}
	if len(keys.Stores) == 0 {
		all = append(all, finding{what: "store", step: "open", err: errdefs.Errorf(errdefs.ErrInvalid, "there is none: wrapped keys need one; give --storage-uri")})
	}
	return c.report(all)
}

// report prints the table, and a last line with all that is missing.
func (c *command) report(all []finding) error {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHAT\tSTEP\tRESULT\tMISSING")
	failed := 0
	var missing []string
	for _, f := range all {
		result := "ok"
		switch {
		case f.skipped:
			result = "skipped"
		case f.err != nil:
			result = "FAILED"
			failed++
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", f.what, f.step, result, f.needs)
		if f.needs != "" && !slices.Contains(missing, f.needs) {
			missing = append(missing, f.needs)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, f := range all {
		if f.err != nil && !f.skipped {
			fmt.Fprintf(c.stdout, "\n%s, %s:\n  %s\n", f.what, f.step, strings.ReplaceAll(f.err.Error(), "\n", "\n  "))
		}
	}
	if failed == 0 {
		fmt.Fprintf(c.stdout, "\nall %d steps are right\n", len(all))
		return nil
	}
	if missing != nil {
		return fmt.Errorf("%d of %d steps failed; missing: %s", failed, len(all), strings.Join(missing, ", "))
	}
	return fmt.Errorf("%d of %d steps failed", failed, len(all))
}

// checkKEK wraps and unwraps a key.
func checkKEK(ctx context.Context, o keyconfig.Opened[*kms.KEK], recordAuth bool) []finding {
	if o.Err != nil {
		return []finding{{what: o.Name, step: "open", err: o.Err}}
	}
	found := []finding{{what: o.Name, step: "open"}}
	add := func(op string, err error) {
		f := finding{what: o.Name, step: op, err: err}
		if errors.Is(err, errdefs.ErrDenied) {
			f.needs = o.It.Permissions()[op]
		}
		found = append(found, f)
	}
	_, err := o.It.CurrentKeyID(ctx)
	add(kms.OpCurrentKeyID, err)
	key := secret.Random(kms.KeySize)
	defer key.Wipe()
	w, err := o.It.Wrap(ctx, checkID, key)
	add(kms.OpWrap, err)
	if err != nil {
		return append(found, finding{what: o.Name, step: kms.OpUnwrap, skipped: true})
	}
	again, err := o.It.Unwrap(ctx, checkID, w)
	defer again.Wipe()
	if err == nil && !again.Equal(key) {
		err = errdefs.Errorf(errdefs.ErrState, "another key came back than was wrapped")
	}
	add(kms.OpUnwrap, err)
	if w.PublicKey() && !recordAuth {
		found = append(found, finding{what: o.Name, step: "record authenticator", err: errdefs.Errorf(errdefs.ErrInvalid,
			"this KEK wraps with a public key (%s), so whoever writes the store could plant keys: make a random secret that only the cluster has and give it as --record-auth-secret-file", w.Mechanism)})
	}
	return found
}

// checkStore makes, changes and removes an object.
func checkStore(ctx context.Context, o keyconfig.Opened[envelope.Store]) []finding {
	if o.Err != nil {
		return []finding{{what: o.Name, step: "open", err: o.Err}}
	}
	var permissions map[string]string
	if p, ok := keyconfig.Unprobed(o.It).(envelope.Permitter); ok {
		permissions = p.Permissions()
	}
	found := []finding{{what: o.Name, step: "open"}}
	for _, s := range envelope.CheckStore(ctx, keyconfig.Unprobed(o.It)) {
		f := finding{what: o.Name, step: s.What, err: s.Err, skipped: s.Skipped}
		if errors.Is(s.Err, errdefs.ErrDenied) {
			f.needs = permissions[s.Op]
		}
		found = append(found, f)
	}
	return found
}
