package azurekeyvault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	day = 24 * time.Hour
	// minPeriod is the shortest rotation period that Key Vault takes.
	minPeriod = 7 * day
	// maxListed bounds what one list may have.
	maxListed = 10000

	rsaBits = 3072
	aesBits = 256
)

var iso8601 = regexp.MustCompile(`^P(?:(\d{1,3})Y)?(?:(\d{1,4})M)?(?:(\d{1,5})D)?$`)

// Create makes the key. There is no policy of a single key. In the service a
// create of a key that exists makes a new version, so it is asked for first; of
// two that race both versions unwrap.
func (b *Backend) Create(ctx context.Context, n kms.NewKey) (kms.Key, error) {
	if n.Policy != nil {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "Key Vault keys have no policy document: assign a role with the key as its scope (az role assignment create, az keyvault role assignment create)")
	}
	if n.RotationPeriod != 0 && (n.RotationPeriod < minPeriod || n.RotationPeriod%day != 0) {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "rotation period %v: Key Vault takes whole days, and %v at least", n.RotationPeriod, minPeriod)
	}
	existing, err := b.get(ctx)
	switch {
	case err == nil:
		return b.adopt(ctx, n, labels(existing.Tags))
	case !errors.Is(err, errdefs.ErrNotFound):
		return kms.Key{}, err
	}
	_, err = call(ctx, func(ctx context.Context) (azkeys.CreateKeyResponse, error) {
		return b.client.CreateKey(once(ctx), b.name, b.newKey(n), nil)
	})
	if err != nil {
		return kms.Key{}, fail(err, errdefs.ErrInvalid)
	}
	if err := b.setPeriod(ctx, n.RotationPeriod); err != nil {
		return kms.Key{}, err
	}
	return b.Describe(ctx)
}

// adopt returns the key that exists, if it was made for the same. What an
// interrupted Create left out is made up for.
func (b *Backend) adopt(ctx context.Context, n kms.NewKey, has map[string]string) (kms.Key, error) {
	if n.Labels[kms.LabelCluster] == "" || has[kms.LabelCluster] != n.Labels[kms.LabelCluster] || has[kms.LabelPurpose] != n.Labels[kms.LabelPurpose] {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrExists, "the key exists, with %s %q and %s %q: take another name, or set these tags if it is yours",
			kms.LabelCluster, has[kms.LabelCluster], kms.LabelPurpose, has[kms.LabelPurpose])
	}
	key, err := b.Describe(ctx)
	if err != nil || key.RotationPeriod != 0 || n.RotationPeriod == 0 {
		return key, err
	}
	if err := b.setPeriod(ctx, n.RotationPeriod); err != nil {
		return kms.Key{}, err
	}
	return b.Describe(ctx)
}

// newKey allows no more operations than serving needs.
func (b *Backend) newKey(n kms.NewKey) azkeys.CreateKeyParameters {
	size := int32(rsaBits)
	ops := []azkeys.KeyOperation{azkeys.KeyOperationWrapKey, azkeys.KeyOperationUnwrapKey}
	if b.keyType == azkeys.KeyTypeOctHSM {
		size = aesBits
		if !b.fixed || b.algorithm == azkeys.EncryptionAlgorithmA256GCM {
			ops = []azkeys.KeyOperation{azkeys.KeyOperationEncrypt, azkeys.KeyOperationDecrypt}
		}
	}
	return azkeys.CreateKeyParameters{
		Kty: &b.keyType, KeySize: &size, KeyOps: []*azkeys.KeyOperation{&ops[0], &ops[1]}, Tags: tags(n.Labels),
	}
}

// setPeriod makes the service rotate by itself; 0 leaves the policy alone.
func (b *Backend) setPeriod(ctx context.Context, period time.Duration) error {
	if period == 0 {
		return nil
	}
	rotate, after := azkeys.KeyRotationPolicyActionRotate, fmt.Sprintf("P%dD", period/day)
	_, err := call(ctx, func(ctx context.Context) (azkeys.UpdateKeyRotationPolicyResponse, error) {
		return b.client.UpdateKeyRotationPolicy(ctx, b.name, azkeys.KeyRotationPolicy{LifetimeActions: []*azkeys.LifetimeAction{{
			Action:  &azkeys.LifetimeActionType{Type: &rotate},
			Trigger: &azkeys.LifetimeActionTrigger{TimeAfterCreate: &after},
		}}}, nil)
	})
	return fail(err, errdefs.ErrInvalid)
}

// Describe returns the key. One that is deleted and not purged yet has its
// last version only, which is Destroying.
func (b *Backend) Describe(ctx context.Context) (kms.Key, error) {
	current, err := b.get(ctx)
	if errors.Is(err, errdefs.ErrNotFound) {
		return b.deleted(ctx, err)
	}
	if err != nil {
		return kms.Key{}, err
	}
	kid, err := b.own(current.Key.KID)
	if err != nil {
		return kms.Key{}, err
	}
	key := kms.Key{URI: b.uri(b.name), Labels: labels(current.Tags)}
	if key.Versions, err = b.versions(ctx, kid); err != nil {
		return kms.Key{}, err
	}
	key.Created = key.Versions[0].Created
	rotation, err := call(ctx, func(ctx context.Context) (azkeys.GetKeyRotationPolicyResponse, error) {
		return b.client.GetKeyRotationPolicy(ctx, b.name, nil)
	})
	if err != nil {
		return kms.Key{}, fail(err, errdefs.ErrInvalid)
	}
	key.RotationPeriod = period(rotation.KeyRotationPolicy)
	return key, nil
}

// deleted describes a key in the state between deletion and purge; where there
// is none, or it may not be known, notFound.
func (b *Backend) deleted(ctx context.Context, notFound error) (kms.Key, error) {
	key, err := call(ctx, func(ctx context.Context) (azkeys.GetDeletedKeyResponse, error) {
		return b.client.GetDeletedKey(ctx, b.name, nil)
	})
	switch err = fail(err, errdefs.ErrInvalid); {
	case errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrDenied):
		return kms.Key{}, notFound
	case err != nil:
		return kms.Key{}, err
	case key.Key == nil:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrState, "the service answered a deleted key without its properties")
	}
	kid, err := b.own(key.Key.KID)
	if err != nil {
		return kms.Key{}, err
	}
	v := kms.Version{KeyID: kid, State: kms.Destroying, Current: true, Created: created(key.Attributes)}
	if key.ScheduledPurgeDate != nil {
		v.Until = *key.ScheduledPurgeDate
	}
	return kms.Key{URI: b.uri(b.name), Labels: labels(key.Tags), Versions: []kms.Version{v}, Created: v.Created}, nil
}

// versions returns all versions, the oldest first and the current one last.
func (b *Backend) versions(ctx context.Context, current string) ([]kms.Version, error) {
	items, err := listed(ctx, b.client.NewListKeyPropertiesVersionsPager(b.name, nil),
		func(p azkeys.ListKeyPropertiesVersionsResponse) []*azkeys.KeyProperties { return p.Value })
	if err != nil {
		return nil, err
	}
	var versions []kms.Version
	for _, item := range items {
		kid, err := b.own(item.KID)
		if err != nil {
			return nil, err
		}
		v := kms.Version{KeyID: kid, State: kms.Disabled, Current: kid == current, Created: created(item.Attributes)}
		if item.Attributes != nil && item.Attributes.Enabled != nil && *item.Attributes.Enabled {
			v.State = kms.Enabled
		}
		versions = append(versions, v)
	}
	slices.SortStableFunc(versions, func(x, y kms.Version) int {
		switch {
		case x.Current:
			return 1
		case y.Current:
			return -1
		}
		return x.Created.Compare(y.Created)
	})
	if len(versions) == 0 || !versions[len(versions)-1].Current {
		return nil, errdefs.Errorf(errdefs.ErrUnavailable, "the key was rotated while its versions were listed: try again")
	}
	return versions, nil
}

// Rotate makes a new version. It is asked for once: a lost answer shows in the
// versions.
func (b *Backend) Rotate(ctx context.Context) (kms.Key, error) {
	_, err := call(ctx, func(ctx context.Context) (azkeys.RotateKeyResponse, error) {
		return b.client.RotateKey(once(ctx), b.name, nil)
	})
	if err != nil {
		return kms.Key{}, fail(err, errdefs.ErrInvalid)
	}
	return b.Describe(ctx)
}

// SetVersion enables or disables a version. A single one cannot be destroyed. The
// whole key is destroyed by deleting it, which the service holds for its
// retention period; enabling takes that back.
func (b *Backend) SetVersion(ctx context.Context, keyID string, s kms.VersionState) error {
	switch {
	case s != kms.Enabled && s != kms.Disabled && s != kms.Destroyed:
		return errdefs.Errorf(errdefs.ErrInvalid, "state %q cannot be set", s)
	case keyID == "" && s == kms.Destroyed:
		return b.delete(ctx)
	case keyID == "":
		return b.setAll(ctx, s)
	case s == kms.Destroyed:
		return errdefs.Errorf(errdefs.ErrInvalid, "Key Vault cannot destroy one version of a key: disable it, and delete the whole key when nothing needs it")
	}
	version, err := b.version(keyID)
	if err != nil {
		return err
	}
	current, err := b.CurrentKeyID(ctx)
	if err != nil {
		return err
	}
	if keyID == current && s == kms.Disabled {
		return errdefs.Errorf(errdefs.ErrState, "version %s is the current one, new keys are wrapped under it: rotate first", version)
	}
	return b.setEnabled(ctx, version, s == kms.Enabled)
}

// delete deletes the key; the service purges it when its retention is over.
func (b *Backend) delete(ctx context.Context) error {
	_, err := call(ctx, func(ctx context.Context) (azkeys.DeleteKeyResponse, error) {
		return b.client.DeleteKey(ctx, b.name, nil)
	})
	err = fail(err, errdefs.ErrInvalid)
	if errors.Is(err, errdefs.ErrNotFound) {
		_, err = b.deleted(ctx, err) // being destroyed already is no error
	}
	return err
}

// setAll enables or disables every version, and recovers a deleted key that is
// to be enabled.
func (b *Backend) setAll(ctx context.Context, s kms.VersionState) error {
	current, err := b.CurrentKeyID(ctx)
	if errors.Is(err, errdefs.ErrNotFound) && s == kms.Enabled {
		_, err := call(ctx, func(ctx context.Context) (azkeys.RecoverDeletedKeyResponse, error) {
			return b.client.RecoverDeletedKey(ctx, b.name, nil)
		})
		return fail(err, errdefs.ErrInvalid)
	}
	if err != nil {
		return err
	}
	versions, err := b.versions(ctx, current)
	if err != nil {
		return err
	}
	for _, v := range versions {
		if v.State == s {
			continue
		}
		version, err := b.version(v.KeyID)
		if err != nil {
			return err
		}
		if err := b.setEnabled(ctx, version, s == kms.Enabled); err != nil {
			return err
		}
	}
	return nil
}

func (b *Backend) setEnabled(ctx context.Context, version string, enabled bool) error {
	return b.update(ctx, version, azkeys.UpdateKeyParameters{KeyAttributes: &azkeys.KeyAttributes{Enabled: &enabled}})
}

func (b *Backend) update(ctx context.Context, version string, p azkeys.UpdateKeyParameters) error {
	_, err := call(ctx, func(ctx context.Context) (azkeys.UpdateKeyResponse, error) {
		return b.client.UpdateKey(ctx, b.name, version, p, nil)
	})
	return fail(err, errdefs.ErrInvalid)
}

// List returns the keys of the vault that have our labels; without versions and
// rotation period, which would be three calls for each.
func (b *Backend) List(ctx context.Context) ([]kms.Key, error) {
	items, err := listed(ctx, b.client.NewListKeyPropertiesPager(nil),
		func(p azkeys.ListKeyPropertiesResponse) []*azkeys.KeyProperties { return p.Value })
	if err != nil {
		return nil, err
	}
	var keys []kms.Key
	for _, item := range items {
		l := labels(item.Tags)
		if len(l) == 0 || item.KID == nil {
			continue
		}
		_, path, _ := strings.Cut(string(*item.KID), "/keys/")
		name, _, _ := strings.Cut(path, "/")
		keys = append(keys, kms.Key{URI: b.uri(name), Labels: l, Created: created(item.Attributes)})
	}
	return keys, nil
}

// Label sets tags of the current version, which a rotation takes over. The
// service replaces all tags at once: of two that label one key at the same time
// one may lose.
func (b *Backend) Label(ctx context.Context, l map[string]string) error {
	key, err := b.get(ctx)
	if err != nil {
		return err
	}
	merged := maps.Clone(key.Tags)
	if merged == nil {
		merged = map[string]*string{}
	}
	maps.Copy(merged, tags(l))
	return b.update(ctx, "", azkeys.UpdateKeyParameters{Tags: merged})
}

// Permissions returns the names of access policies, or the actions of a Managed
// HSM's local RBAC.
func (b *Backend) Permissions() map[string]string {
	b.mu.Lock()
	algorithm := b.algorithm
	b.mu.Unlock()
	wrap, unwrap := "wrap/action", "unwrap/action"
	if algorithm == azkeys.EncryptionAlgorithmA256GCM || algorithm == "" {
		wrap, unwrap = "encrypt/action", "decrypt/action"
	}
	if !b.hsm() {
		return map[string]string{
			kms.OpWrap: "keys/wrapKey", kms.OpUnwrap: "keys/unwrapKey", kms.OpCurrentKeyID: "keys/get",
			kms.OpCreate:     "keys/get, keys/list, keys/create, keys/getrotationpolicy, keys/setrotationpolicy",
			kms.OpDescribe:   "keys/get, keys/list, keys/getrotationpolicy",
			kms.OpRotate:     "keys/rotate, keys/get, keys/list, keys/getrotationpolicy",
			kms.OpSetVersion: "keys/get, keys/list, keys/update, keys/delete, keys/recover",
			kms.OpList:       "keys/list", kms.OpLabel: "keys/get, keys/update",
		}
	}
	const p = "Microsoft.KeyVault/managedHsm/keys/"
	return map[string]string{
		kms.OpWrap: p + wrap, kms.OpUnwrap: p + unwrap, kms.OpCurrentKeyID: p + "read/action",
		kms.OpCreate:     p + "read/action, " + p + "create, " + p + "write/action",
		kms.OpDescribe:   p + "read/action",
		kms.OpRotate:     p + "rotate/action, " + p + "read/action",
		kms.OpSetVersion: p + "read/action, " + p + "write/action, " + p + "delete, " + p + "deletedKeys/recover/action",
		kms.OpList:       p + "read/action", kms.OpLabel: p + "read/action, " + p + "write/action",
	}
}

// uri opens a key of this vault.
func (b *Backend) uri(name string) string {
	return Scheme + "://" + b.host + "/keys/" + name + b.shown
}

// once makes the SDK try a call only once.
func once(ctx context.Context) context.Context {
	return policy.WithRetryOptions(ctx, policy.RetryOptions{MaxRetries: -1})
}

// listed returns the items of all pages.
func listed[P any](ctx context.Context, pager *runtime.Pager[P], items func(P) []*azkeys.KeyProperties) ([]*azkeys.KeyProperties, error) {
	var all []*azkeys.KeyProperties
	for pages := 0; pager.More(); pages++ {
		page, err := call(ctx, pager.NextPage)
		if err != nil {
			return nil, fail(err, errdefs.ErrInvalid)
		}
		all = append(all, items(page)...)
		if len(all) > maxListed || pages > maxListed {
			return nil, errdefs.Errorf(errdefs.ErrState, "the service lists more than %d items", maxListed)
		}
	}
	return slices.DeleteFunc(all, func(p *azkeys.KeyProperties) bool { return p == nil }), nil
}

func created(a *azkeys.KeyAttributes) time.Time {
	if a == nil || a.Created == nil {
		return time.Time{}
	}
	return *a.Created
}

func tags(labels map[string]string) map[string]*string {
	t := map[string]*string{}
	for name, value := range labels {
		t[name] = &value
	}
	return t
}

// labels returns those of the tags that are ours.
func labels(tags map[string]*string) map[string]string {
	l := map[string]string{}
	for name, value := range tags {
		if strings.HasPrefix(name, kms.LabelPrefix) && value != nil {
			l[name] = *value
		}
	}
	return l
}

// period returns after which time the service rotates a key, 0 where it does not.
func period(p azkeys.KeyRotationPolicy) time.Duration {
	for _, a := range p.LifetimeActions {
		if a == nil || a.Action == nil || a.Action.Type == nil || a.Trigger == nil || !strings.EqualFold(string(*a.Action.Type), string(azkeys.KeyRotationPolicyActionRotate)) {
			continue
		}
		if a.Trigger.TimeAfterCreate != nil {
			return duration(*a.Trigger.TimeAfterCreate)
		}
		if a.Trigger.TimeBeforeExpiry != nil && p.Attributes != nil && p.Attributes.ExpiryTime != nil {
			return max(0, duration(*p.Attributes.ExpiryTime)-duration(*a.Trigger.TimeBeforeExpiry))
		}
	}
	return 0
}

// duration reads an ISO 8601 duration of years (of 365 days), months (of 30) and
// days; 0 for another.
func duration(s string) time.Duration {
	m := iso8601.FindStringSubmatch(s)
	if m == nil {
		return 0
	}
	var days time.Duration
	for i, unit := range []time.Duration{365, 30, 1} {
		n, _ := strconv.Atoi(m[i+1]) // empty where absent
		days += time.Duration(n) * unit
	}
	return days * day
}
