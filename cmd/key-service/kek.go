package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/keyconfig"
	"github.com/cryptcsi/cryptcsi/kms"
)

// stale is when a KEK that nobody labelled as in use counts as abandoned: a
// serving process does it every 6 hours.
const stale = 14 * 24 * time.Hour

// kek opens the KEK that --kek names, or the first of the configuration.
func (c *command) kek(ctx context.Context) (*keyconfig.Keys, *kms.KEK, error) {
	keys, kek, err := c.openedKEK(ctx)
	if err != nil {
		return nil, nil, err
	}
	return keys, kek.It, nil
}

func (c *command) openedKEK(ctx context.Context) (*keyconfig.Keys, *keyconfig.Opened[*kms.KEK], error) {
	name := c.String("kek", "", "name of the KEK (--kms-uri NAME=…); empty is the first one")
	keys, err := c.open(ctx, 0, 0)
	if err != nil {
		return nil, nil, err
	}
	kek, err := keys.KEK(*name)
	if err != nil {
		return nil, nil, errors.Join(err, keys.Close())
	}
	return keys, kek, nil
}

func kekCreate(ctx context.Context, c *command) error {
	cluster := c.String("cluster-id", "", "the cluster that the KEK is for, e.g. the UID of its kube-system namespace")
	clusterFile := c.String("cluster-id-file", "", "file that holds --cluster-id")
	policyFile := c.String("policy-file", "", "the KMS's own policy document for the key; empty takes the backend's default")
	rotation := c.Duration("rotation-period", 0, "let the KMS rotate the key by itself that often, e.g. 8760h; 0 does not")
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	id, err := clusterID(*cluster, *clusterFile)
	if err != nil {
		return err
	}
	n := kms.NewKey{
		// Without a time of last use: nobody may count the KEK as abandoned
		// before somebody keeps that time up to date.
		Labels:         map[string]string{kms.LabelCluster: id, kms.LabelPurpose: "kek"},
		RotationPeriod: *rotation,
	}
	if *policyFile != "" {
		if n.Policy, err = os.ReadFile(*policyFile); err != nil {
			return fmt.Errorf("--policy-file: %w", err)
		}
	}
	key, err := kek.CreateKey(ctx, n)
	if err != nil {
		return err
	}
	return c.printKey(key)
}

// clusterID returns the value of a label, from a flag or a file.
func clusterID(value, file string) (string, error) {
	if file != "" {
		if value != "" {
			return "", usageError("kek create: --cluster-id and --cluster-id-file exclude each other")
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("--cluster-id-file: %w", err)
		}
		value = strings.TrimSpace(string(data))
	}
	if !regexp.MustCompile(`^[a-z0-9_-]{1,63}$`).MatchString(value) {
		return "", usageError("kek create: --cluster-id (or --cluster-id-file) is required: 1 to 63 lower-case letters, digits, '-' and '_', which every KMS takes as a label")
	}
	return value, nil
}

func kekDescribe(ctx context.Context, c *command) error {
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	key, err := kek.DescribeKey(ctx)
	if err != nil {
		return err
	}
	return c.printKey(key)
}

func (c *command) printKey(k kms.Key) error {
	fmt.Fprintf(c.stdout, "URI       %s\ncreated   %s\nrotation  %s\n", k.URI, moment(k.Created), period(k.RotationPeriod))
	names := make([]string, 0, len(k.Labels))
	for name := range k.Labels {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(c.stdout, "label     %s=%s\n", name, k.Labels[name])
	}
	fmt.Fprintln(c.stdout)
	return c.printVersions(k, nil)
}

// printVersions prints a table; with the number of records that refer to each
// version, where that is known.
func (c *command) printVersions(k kms.Key, records map[string]int) error {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VERSION\tSTATE\tCREATED\tRECORDS")
	for _, v := range k.Versions {
		state := string(v.State)
		if v.Current {
			state += ", current"
		}
		if !v.Until.IsZero() {
			state += " until " + moment(v.Until)
		}
		n := "-"
		if records != nil {
			n = strconv.Itoa(records[v.KeyID])
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", v.KeyID, state, moment(v.Created), n)
	}
	return w.Flush()
}

func kekVersions(ctx context.Context, c *command) error {
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	key, err := kek.DescribeKey(ctx)
	if err != nil {
		return errors.Join(err, keys.Close())
	}
	var records map[string]int
	if len(keys.Stores) > 0 {
		if records, err = references(ctx, keys); err != nil {
			return err
		}
	} else if err := keys.Close(); err != nil {
		return err
	}
	return c.printVersions(key, records)
}

// references counts the records that refer to each key ID, and closes keys.
// One record that cannot be read is an error, and one that names a KEK which is
// not configured: what they need is not known.
func references(ctx context.Context, keys *keyconfig.Keys) (map[string]int, error) {
	keyring, err := keys.Keyring(envelope.Options{})
	if err != nil {
		return nil, errors.Join(err, keys.Close())
	}
	defer func() { _ = errors.Join(keyring.Close(), keys.Close()) }()
	counts, names := map[string]int{}, keyring.KEKNames()
	err = each(ctx, keyring, func(i envelope.Info) error {
		if i.Err != nil {
			return fmt.Errorf("it is not known which version is needed by an unreadable %w", i.Err)
		}
		if name := i.Spec.KEK; name != "" && len(i.Wraps) > 0 && !slices.Contains(names, name) {
			return errdefs.Errorf(errdefs.ErrState, "the record of %s names the KEK %q, which is not configured here: name it with --kms-uri %s=…", i.ID, name, name)
		}
		for _, id := range keyIDs(i) {
			counts[id]++
		}
		return nil
	})
	return counts, err
}

func kekRotate(ctx context.Context, c *command) error {
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	key, err := kek.RotateKey(ctx)
	if err != nil {
		return err
	}
	if err := c.printKey(key); err != nil {
		return err
	}
	fmt.Fprintln(c.stdout, "\nNew keys are wrapped under the current version. Older ones stay readable; to move them:\n  key-service rewrap\n  key-service kek retire")
	return nil
}

// kekRetire takes old versions out of use that no record needs any more.
func kekRetire(ctx context.Context, c *command) error {
	destroy := c.Bool("destroy", false, "destroy them instead: nothing wrapped under them can ever be read again, backups of the store included")
	yes := c.Bool("yes", false, "do it; without, only show what would be done")
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	if len(keys.Stores) == 0 {
		return usageError("kek retire: --storage-uri is required: only the records tell which versions are needed")
	}
	key, err := kek.DescribeKey(ctx)
	if err != nil {
		return err
	}
	records, err := c.needed(ctx, keys)
	if err != nil {
		return err
	}
	needed := 0
	for _, v := range key.Versions {
		needed += records[v.KeyID]
	}
	if needed == 0 {
		return errdefs.Errorf(errdefs.ErrState, "no record in the store refers to any version of this KEK: is it the right store, with the right prefix?")
	}
	state := kms.Disabled
	if *destroy {
		state = kms.Destroyed
	}
	for _, v := range key.Versions {
		gone := v.State == state || v.State == kms.Destroying || v.State == kms.Destroyed
		switch {
		case v.Current || gone:
			continue
		case records[v.KeyID] > 0:
			fmt.Fprintf(c.stdout, "keep      %s: %d records refer to it (key-service rewrap moves them)\n", v.KeyID, records[v.KeyID])
		case *destroy && v.State != kms.Disabled:
			fmt.Fprintf(c.stdout, "keep      %s: it is not disabled yet; run this without --destroy first, and again with it when nothing has missed the version\n", v.KeyID)
		case !*yes:
			fmt.Fprintf(c.stdout, "would be  %s: %s\n", state, v.KeyID)
		default:
			if err := kek.SetVersion(ctx, v.KeyID, state); err != nil {
				return err
			}
			fmt.Fprintf(c.stdout, "%-9s %s\n", state, v.KeyID)
		}
	}
	return nil
}

func kekKeepAlive(ctx context.Context, c *command) error {
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	return keyconfig.LabelActive(ctx, kek, time.Now())
}

func kekList(ctx context.Context, c *command) error {
	older := c.Duration("older-than", stale, "how long ago the last use of a stale KEK was")
	keys, kek, err := c.kek(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	list, err := kek.ListKeys(ctx)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "CLUSTER\tLAST USE\tSTALE\tSTATE\tCREATED\tURI")
	for _, k := range list {
		old, words := isStale(k, *older)
		fmt.Fprintf(w, "%s\t%s\t%v\t%s\t%s\t%s\n", cmp.Or(k.Labels[kms.LabelCluster], "-"), words, old, keyState(k), moment(k.Created), k.URI)
	}
	return w.Flush()
}

// keyState sums up the states of a key's versions.
func keyState(k kms.Key) string {
	if len(k.Versions) == 0 { // a service that lists keys without them
		return "unknown"
	}
	best := kms.Destroyed
	order := []kms.VersionState{kms.Destroyed, kms.Destroying, kms.Disabled, kms.Enabled}
	for _, v := range k.Versions {
		if slices.Index(order, v.State) > slices.Index(order, best) {
			best = v.State
		}
	}
	return string(best)
}

// isStale says whether a key's last use is known and that long ago.
func isStale(k kms.Key, older time.Duration) (stale bool, lastUse string) {
	seconds, err := strconv.ParseInt(k.Labels[kms.LabelActive], 10, 64)
	if err != nil {
		return false, "unknown"
	}
	last := time.Unix(seconds, 0)
	return time.Since(last) > older, moment(last)
}

// kekPrune disables, or destroys, the KEKs of clusters that are gone.
func kekPrune(ctx context.Context, c *command) error {
	older := c.Duration("older-than", stale, "how long ago the last use must be")
	destroy := c.Bool("destroy", false, "destroy them instead of disabling them: every volume of those clusters is lost")
	yes := c.Bool("yes", false, "do it; without, only show what would be done")
	keys, kek, err := c.openedKEK(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	if *older < 24*time.Hour {
		return usageError("kek prune: --older-than must be at least 24h: a serving process says every 6 h that a KEK is in use")
	}
	list, err := kek.It.ListKeys(ctx)
	if err != nil {
		return err
	}
	records, err := c.needed(ctx, keys)
	if err != nil {
		return err
	}
	own := map[string]bool{}
	for _, o := range keys.KEKs {
		if o.Err != nil {
			return o.Err
		}
		key, err := o.It.DescribeKey(ctx)
		if err != nil {
			return err
		}
		own[key.URI] = true
	}
	state := kms.Disabled
	if *destroy {
		state = kms.Destroyed
	}
	var failed []error
	for _, k := range list {
		old, last := isStale(k, *older)
		done := keyState(k)
		if !old || own[k.URI] || done == string(state) || done == string(kms.Destroying) || done == string(kms.Destroyed) {
			continue
		}
		if !*yes {
			fmt.Fprintf(c.stdout, "would be  %s: %s (cluster %s, last use %s)\n", state, k.URI, cmp.Or(k.Labels[kms.LabelCluster], "unknown"), last)
			continue
		}
		if err := (pruning{keys, kek, records}).setWhole(ctx, k.URI, state); err != nil {
			failed = append(failed, err)
			continue
		}
		fmt.Fprintf(c.stdout, "%-9s %s\n", state, k.URI)
	}
	return errors.Join(failed...)
}

// needed is references, where a store is named; nil where none is.
func (c *command) needed(ctx context.Context, keys *keyconfig.Keys) (map[string]int, error) {
	if len(keys.Stores) == 0 {
		return nil, nil
	}
	// The keyring closes what it is made of, so it gets KEKs of its own.
	more, err := c.keys.Open(ctx, keyconfig.Options{}, c.log)
	if err != nil {
		return nil, err
	}
	return references(ctx, more)
}

// pruning is what a run of kek prune knows.
type pruning struct {
	keys    *keyconfig.Keys
	beside  *keyconfig.Opened[*kms.KEK]
	records map[string]int // that refer to each key ID; nil where no store is named
}

// setWhole changes all versions of another key in the same place.
func (p pruning) setWhole(ctx context.Context, uri string, state kms.VersionState) error {
	other, err := p.keys.OpenKEK(ctx, uri, p.beside)
	if err != nil {
		return err
	}
	defer func() { _ = other.Close() }()
	// Looked at again, now: somebody may have begun to use it.
	key, err := other.DescribeKey(ctx)
	if err != nil {
		return err
	}
	if old, last := isStale(key, 24*time.Hour); !old {
		return errdefs.Errorf(errdefs.ErrState, "%s is in use again (%s): nothing was done", uri, last)
	}
	for _, v := range key.Versions {
		if n := p.records[v.KeyID]; n > 0 {
			return errdefs.Errorf(errdefs.ErrState, "%s: %d records refer to its version %s: nothing was done", uri, n, v.KeyID)
		}
	}
	return other.SetVersion(ctx, "", state)
}

func storeCreate(ctx context.Context, c *command) error {
	keys, err := c.open(ctx, 0, 0)
	if err != nil {
		return err
	}
	defer func() { _ = keys.Close() }()
	if len(keys.Stores) == 0 {
		return usageError("store create: --storage-uri (or --storage-uri-file) is required")
	}
	o := keys.Stores[0]
	if o.Err != nil {
		return o.Err
	}
	m, ok := keyconfig.Unprobed(o.It).(envelope.Maker)
	if !ok {
		return errdefs.Errorf(errdefs.ErrInvalid, "%s: key-service has nothing to make for a store of this kind", o.Name)
	}
	if err := m.Make(ctx); err != nil {
		if p, ok := keyconfig.Unprobed(o.It).(envelope.Permitter); ok && errors.Is(err, errdefs.ErrDenied) {
			return fmt.Errorf("%w (needs %s)", err, p.Permissions()[envelope.OpMake])
		}
		return err
	}
	fmt.Fprintf(c.stdout, "%s is there. Next: key-service check\n", o.Name)
	return nil
}

func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04Z")
}

func period(d time.Duration) string {
	if d == 0 {
		return "by hand"
	}
	return "every " + strconv.Itoa(int(d.Hours()/24)) + " days"
}
