package awskms

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"golang.org/x/sync/errgroup"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	// Limits of AWS: rotation period and key policy.
	minRotation, maxRotation = 90, 2560 // days
	maxPolicy                = 32 << 10 // bytes
	day                      = 24 * time.Hour

	// A key that is destroyed can be rescued for 30 days; one that was made
	// a moment ago and never used, for AWS's minimum.
	deletionWindow, abandonWindow = 30, 7

	// What listings read at most: pages of one key's tags and rotations, and
	// keys of an account. atOnce is how many calls listing makes at a time.
	maxPages, maxKeys, atOnce = 10, 10_000, 8

	// AWS rotates, and shows what was made, a moment later: how long between looks.
	firstLook, lastLook = 50 * time.Millisecond, time.Second
)

// Permissions is part of kms.Permitter.
func (b *Backend) Permissions() map[string]string {
	const describe = "kms:DescribeKey, kms:ListResourceTags, kms:GetKeyRotationStatus, kms:ListKeyRotations"
	unwrap := "kms:Decrypt"
	if b.target.alias != "" {
		unwrap += ", kms:DescribeKey"
	}
	return map[string]string{
		kms.OpWrap:         "kms:Encrypt, kms:DescribeKey",
		kms.OpUnwrap:       unwrap,
		kms.OpCurrentKeyID: "kms:DescribeKey",
		kms.OpCreate:       "kms:CreateKey, kms:TagResource, kms:EnableKeyRotation, kms:CreateAlias, kms:ScheduleKeyDeletion, " + describe,
		kms.OpDescribe:     describe,
		kms.OpRotate:       "kms:RotateKeyOnDemand, " + describe,
		kms.OpSetVersion:   "kms:EnableKey, kms:DisableKey, kms:ScheduleKeyDeletion, kms:CancelKeyDeletion, kms:DescribeKey",
		kms.OpList:         "kms:ListKeys, " + describe,
		kms.OpLabel:        "kms:TagResource, kms:DescribeKey",
	}
}

// Create is part of kms.Manager. The URI must name an alias: AWS chooses key
// IDs itself. The alias is made last, so a key exists for others when it is
// complete. A process that dies before leaves a key without alias, which List
// shows and nobody has wrapped anything under.
func (b *Backend) Create(ctx context.Context, n kms.NewKey) (kms.Key, error) {
	if b.target.alias == "" {
		return kms.Key{}, errdefs.Errorf(errdefs.ErrInvalid, "AWS chooses the IDs of keys: name the new one by an alias, %s:///alias/NAME?region=REGION", Scheme)
	}
	if err := checkNew(n); err != nil {
		return kms.Key{}, err
	}
	key, err := b.Describe(ctx)
	switch {
	case err == nil:
		return ours(key, n)
	case !errors.Is(err, errdefs.ErrNotFound):
		return kms.Key{}, err
	}
	keyARN, err := b.make(ctx, n)
	if err != nil {
		return kms.Key{}, err
	}
	if err := b.commit(ctx, keyARN); err != nil {
		return kms.Key{}, err
	}
	err = visible(ctx, func() (err error) { key, err = b.Describe(ctx); return err })
	if err != nil {
		return kms.Key{}, err
	}
	return ours(key, n) // where another process won, it is that one's
}

func checkNew(n kms.NewKey) error {
	if p := n.RotationPeriod; p != 0 && (p < minRotation*day || p > maxRotation*day || p%day != 0) {
		return errdefs.Errorf(errdefs.ErrInvalid, "a rotation period of %v: AWS KMS rotates every %d to %d whole days", p, minRotation, maxRotation)
	}
	if n.Policy != nil && (len(n.Policy) > maxPolicy || !json.Valid(n.Policy)) {
		return errdefs.Errorf(errdefs.ErrInvalid, "the key policy must be JSON of at most %d bytes", maxPolicy)
	}
	return nil
}

// ours returns the key that is there already if it is what n asks for.
func ours(key kms.Key, n kms.NewKey) (kms.Key, error) {
	for _, label := range []string{kms.LabelCluster, kms.LabelPurpose} {
		if key.Labels[label] != n.Labels[label] {
			return kms.Key{}, errdefs.Errorf(errdefs.ErrExists, "the alias belongs to %s, whose tag %s is %q and not %q: choose another alias", key.URI, label, key.Labels[label], n.Labels[label])
		}
	}
	return key, nil
}

// make makes a key without alias.
func (b *Backend) make(ctx context.Context, n kms.NewKey) (keyARN string, err error) {
	in := &awskms.CreateKeyInput{
		Description: aws.String("cryptcsi KEK " + b.target.alias), Tags: tags(n.Labels),
		KeySpec: types.KeySpecSymmetricDefault, KeyUsage: types.KeyUsageTypeEncryptDecrypt,
	}
	if n.Policy != nil {
		in.Policy = aws.String(string(n.Policy))
	}
	made, err := b.client.CreateKey(ctx, in, func(o *awskms.Options) { o.Retryer = aws.NopRetryer{} }) // twice would make two
	switch {
	case err != nil:
		return "", classify(err)
	case made.KeyMetadata == nil || made.KeyMetadata.Arn == nil:
		return "", errdefs.Errorf(errdefs.ErrState, "AWS KMS made a key and did not say which")
	}
	keyARN = *made.KeyMetadata.Arn
	if n.RotationPeriod == 0 {
		return keyARN, nil
	}
	err = visible(ctx, func() error {
		_, err := b.client.EnableKeyRotation(ctx, &awskms.EnableKeyRotationInput{KeyId: &keyARN, RotationPeriodInDays: aws.Int32(int32(n.RotationPeriod / day))})
		return classifyIf(err)
	})
	if err != nil {
		return "", b.abandon(ctx, keyARN, err)
	}
	return keyARN, nil
}

// commit gives the key its alias. Where the answer is lost, or another process
// was first, the alias itself tells what happened.
func (b *Backend) commit(ctx context.Context, keyARN string) error {
	err := visible(ctx, func() error {
		_, err := b.client.CreateAlias(ctx, &awskms.CreateAliasInput{AliasName: &b.target.alias, TargetKeyId: &keyARN})
		return classifyIf(err)
	})
	if err == nil {
		return nil
	}
	meta, look := b.describe(ctx)
	if errors.Is(err, errdefs.ErrExists) { // of somebody, perhaps ours, perhaps not shown yet
		look = visible(ctx, func() (err error) { meta, err = b.describe(ctx); return err })
	}
	switch {
	case look == nil && *meta.Arn == keyARN:
		return nil
	case look == nil: // another key has the alias; ours can go
		return b.abandon(ctx, keyARN, nil)
	case errors.Is(err, errdefs.ErrUnavailable) || !errors.Is(look, errdefs.ErrNotFound): // the alias may yet turn up
		return errdefs.Errorf(errdefs.ErrUnavailable, "it is not known whether key %s got its alias: create again (%w)", keyARN, err)
	}
	return b.abandon(ctx, keyARN, err)
}

// abandon schedules the deletion of a key that has no alias, and returns err
// with what became of it. nil stays nil.
func (b *Backend) abandon(ctx context.Context, keyARN string, err error) error {
	_, failed := b.client.ScheduleKeyDeletion(ctx, &awskms.ScheduleKeyDeletionInput{KeyId: &keyARN, PendingWindowInDays: aws.Int32(abandonWindow)})
	switch {
	case err == nil:
		return nil // a key too many is no reason to fail
	case failed != nil:
		return errdefs.Errorf(errdefs.Class(err), "%w; key %s was made, is not used, and could not be deleted: delete it", err, keyARN)
	}
	return errdefs.Errorf(errdefs.Class(err), "%w; the new key %s will be deleted", err, keyARN)
}

// Describe is part of kms.Manager.
func (b *Backend) Describe(ctx context.Context) (kms.Key, error) {
	meta, err := b.describe(ctx)
	if err != nil {
		return kms.Key{}, err
	}
	labels, err := b.labels(ctx, *meta.Arn)
	if err != nil {
		return kms.Key{}, err
	}
	return b.details(ctx, meta, labels)
}

// details adds what further calls tell.
func (b *Backend) details(ctx context.Context, meta types.KeyMetadata, labels map[string]string) (kms.Key, error) {
	key := kms.Key{URI: b.uri(*meta.Arn), Labels: labels, Created: aws.ToTime(meta.CreationDate)}
	status, err := b.client.GetKeyRotationStatus(ctx, &awskms.GetKeyRotationStatusInput{KeyId: meta.Arn})
	switch {
	case err == nil && status.KeyRotationEnabled:
		key.RotationPeriod = time.Duration(aws.ToInt32(status.RotationPeriodInDays)) * day
	case err != nil && !unsupported(err):
		return kms.Key{}, classify(err)
	}
	key.Versions, err = b.versions(ctx, meta)
	return key, err
}

// unsupported says that a key's kind or state has no such thing: custom key
// stores, keys that are being deleted.
func unsupported(err error) bool {
	invalidState := &types.KMSInvalidStateException{}
	notOffered := &types.UnsupportedOperationException{}
	return errors.As(err, &invalidState) || errors.As(err, &notOffered)
}

// versions are the key materials, the oldest first; all have the key's state.
func (b *Backend) versions(ctx context.Context, meta types.KeyMetadata) ([]kms.Version, error) {
	version := kms.Version{State: kms.Disabled, Until: aws.ToTime(meta.DeletionDate)}
	switch meta.KeyState {
	case types.KeyStateEnabled:
		version.State = kms.Enabled
	case types.KeyStatePendingDeletion, types.KeyStatePendingReplicaDeletion:
		version.State = kms.Destroying
	}
	var versions []kms.Version
	in := &awskms.ListKeyRotationsInput{KeyId: meta.Arn, IncludeKeyMaterial: types.IncludeKeyMaterialAllKeyMaterial}
	for page := 0; ; page++ {
		out, err := b.client.ListKeyRotations(ctx, in)
		if err != nil && !unsupported(err) {
			return nil, classify(err)
		} else if err != nil {
			break
		}
		for _, r := range out.Rotations {
			v := version
			v.KeyID, v.Created = keyID(*meta.Arn, r.KeyMaterialId), aws.ToTime(r.RotationDate)
			v.Current = r.KeyMaterialState == types.KeyMaterialStateCurrent
			if v.Current || r.KeyMaterialState == types.KeyMaterialStateNonCurrent {
				versions = append(versions, v)
			}
		}
		if !out.Truncated || page == maxPages || aws.ToString(out.NextMarker) == "" {
			break
		}
		in.Marker = out.NextMarker
	}
	slices.SortStableFunc(versions, func(a, b kms.Version) int { return a.Created.Compare(b.Created) })
	if len(versions) == 0 {
		version.KeyID, version.Current = keyID(*meta.Arn, meta.CurrentKeyMaterialId), true
		versions = []kms.Version{version}
	}
	if versions[0].Created.IsZero() { // the first material is as old as the key
		versions[0].Created = aws.ToTime(meta.CreationDate)
	}
	return versions, nil
}

// Rotate is part of kms.Manager. AWS answers before it has rotated; where it
// takes longer than ctx, ErrUnavailable says so.
func (b *Backend) Rotate(ctx context.Context) (kms.Key, error) {
	before, err := b.describe(ctx)
	if err != nil {
		return kms.Key{}, err
	}
	_, err = b.client.RotateKeyOnDemand(ctx, &awskms.RotateKeyOnDemandInput{KeyId: before.Arn})
	running := &types.ConflictException{}
	used := &types.LimitExceededException{}
	switch {
	case errors.As(err, &used):
		return kms.Key{}, errdefs.Errorf(errdefs.ErrState, "the key was rotated on demand as often as AWS allows (25 times): let AWS rotate it by itself, or make a new key")
	case err != nil && !errors.As(err, &running): // else it goes on already
		return kms.Key{}, classify(err)
	}
	for wait := firstLook; before.CurrentKeyMaterialId != nil; wait = min(2*wait, lastLook) {
		after, err := b.describe(ctx)
		switch {
		case err == nil && aws.ToString(after.CurrentKeyMaterialId) != *before.CurrentKeyMaterialId:
			return b.Describe(ctx)
		case err != nil && !errors.Is(err, errdefs.ErrUnavailable):
			return kms.Key{}, err
		}
		if !sleep(ctx, wait) {
			return kms.Key{}, errdefs.Errorf(errdefs.ErrUnavailable, "AWS has begun to rotate %s and is not done: nothing is to be done but to look again (describe) until there is a new version, then rewrap", *before.Arn)
		}
	}
	return b.Describe(ctx)
}

// SetVersion is part of kms.Manager.
func (b *Backend) SetVersion(ctx context.Context, keyID string, s kms.VersionState) error {
	if keyID != "" {
		return errdefs.Errorf(errdefs.ErrInvalid, "AWS KMS enables, disables and deletes whole keys only, and keeps older key materials as long as the key")
	}
	meta, err := b.describe(ctx)
	if err != nil {
		return err
	}
	dying := meta.KeyState == types.KeyStatePendingDeletion || meta.KeyState == types.KeyStatePendingReplicaDeletion
	switch {
	case s == kms.Destroying || s == kms.Destroyed:
		if dying {
			return nil
		}
		_, err = b.client.ScheduleKeyDeletion(ctx, &awskms.ScheduleKeyDeletionInput{KeyId: meta.Arn, PendingWindowInDays: aws.Int32(deletionWindow)})
		return classifyIf(err)
	case s != kms.Enabled && s != kms.Disabled:
		return errdefs.Errorf(errdefs.ErrInvalid, "%q is no state of a key", s)
	}
	if dying {
		if _, err = b.client.CancelKeyDeletion(ctx, &awskms.CancelKeyDeletionInput{KeyId: meta.Arn}); err != nil {
			return classify(err)
		}
	}
	if s == kms.Enabled {
		_, err = b.client.EnableKey(ctx, &awskms.EnableKeyInput{KeyId: meta.Arn})
	} else {
		_, err = b.client.DisableKey(ctx, &awskms.DisableKeyInput{KeyId: meta.Arn})
	}
	return classifyIf(err)
}

// List is part of kms.Fleet: the keys of the account and region. Those whose
// tags the caller may not read are left out; ErrDenied where that is all of them.
func (b *Backend) List(ctx context.Context) ([]kms.Key, error) {
	arns, err := b.keys(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var found []kms.Key
	var denied []error
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for _, keyARN := range arns {
		group.Go(func() error {
			key, err := b.fleetKey(ctx, keyARN)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, errdefs.ErrDenied):
				denied = append(denied, err)
				return nil
			case errors.Is(err, errdefs.ErrNotFound): // deleted meanwhile
				return nil
			case err == nil && key.Labels != nil:
				found = append(found, key)
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if len(denied) > 0 && len(denied) == len(arns) {
		return nil, denied[0]
	}
	slices.SortFunc(found, func(a, b kms.Key) int { return cmp.Compare(a.URI, b.URI) })
	return found, nil
}

// keys returns the ARNs of all keys of account and region.
func (b *Backend) keys(ctx context.Context) ([]string, error) {
	var arns []string
	pages := awskms.NewListKeysPaginator(b.client, &awskms.ListKeysInput{Limit: aws.Int32(1000)})
	for pages.HasMorePages() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, classify(err)
		}
		for _, k := range page.Keys {
			arns = append(arns, aws.ToString(k.KeyArn))
		}
		if len(arns) > maxKeys {
			return nil, errdefs.Errorf(errdefs.ErrState, "the account has more than %d keys in this region: list those with the tag %s by AWS's Tag Editor", maxKeys, kms.LabelCluster)
		}
	}
	return arns, nil
}

// fleetKey returns a key if it has labels of ours, else one without Labels.
func (b *Backend) fleetKey(ctx context.Context, keyARN string) (kms.Key, error) {
	labels, err := b.labels(ctx, keyARN)
	if err != nil || len(labels) == 0 {
		return kms.Key{}, err
	}
	meta, err := b.describeKey(ctx, target{name: keyARN})
	if err != nil {
		return kms.Key{}, err
	}
	return b.details(ctx, meta, labels)
}

// labels are a key's tags that are ours.
func (b *Backend) labels(ctx context.Context, keyARN string) (map[string]string, error) {
	labels := map[string]string{}
	pages := awskms.NewListResourceTagsPaginator(b.client, &awskms.ListResourceTagsInput{KeyId: &keyARN})
	for n := 0; pages.HasMorePages() && n < maxPages; n++ {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return nil, classify(err)
		}
		for _, t := range page.Tags {
			if name := aws.ToString(t.TagKey); strings.HasPrefix(name, kms.LabelPrefix) {
				labels[name] = aws.ToString(t.TagValue)
			}
		}
	}
	return labels, nil
}

// Label is part of kms.Fleet.
func (b *Backend) Label(ctx context.Context, labels map[string]string) error {
	meta, err := b.describe(ctx)
	if err != nil {
		return err
	}
	_, err = b.client.TagResource(ctx, &awskms.TagResourceInput{KeyId: meta.Arn, Tags: tags(labels)})
	return classifyIf(err)
}

func tags(labels map[string]string) []types.Tag {
	var tags []types.Tag
	for name, value := range labels {
		tags = append(tags, types.Tag{TagKey: aws.String(name), TagValue: aws.String(value)})
	}
	slices.SortFunc(tags, func(a, b types.Tag) int { return cmp.Compare(*a.TagKey, *b.TagKey) })
	return tags
}

func classifyIf(err error) error {
	if err == nil {
		return nil
	}
	return classify(err)
}

// visible repeats f while AWS does not know yet what was made a moment ago.
func visible(ctx context.Context, f func() error) error {
	for wait := firstLook; ; wait = min(2*wait, lastLook) {
		err := f()
		if !errors.Is(err, errdefs.ErrNotFound) {
			return err
		}
		if !sleep(ctx, wait) {
			return errdefs.Errorf(errdefs.ErrUnavailable, "AWS KMS does not show yet what was made: create again (%w)", err)
		}
	}
}

// sleep says whether it slept as long as that.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
