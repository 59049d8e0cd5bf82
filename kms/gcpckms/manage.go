package gcpckms

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/iam/apiv1/iampb"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"golang.org/x/sync/errgroup"
	"google.golang.org/api/iterator"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	pageSize    = 100
	maxList     = 10_000 // keys of a ring, or versions of a key
	listWorkers = 8      // keys whose versions are asked for at the same time
	setAttempts = 5      // to set a policy that others change too
)

// Permissions is part of kms.Permitter. The package comment says what each is for.
func (b *Backend) Permissions() map[string]string {
	const (
		key     = "cloudkms.cryptoKeys."
		version = "cloudkms.cryptoKeyVersions."
	)
	return map[string]string{
		kms.OpWrap:         version + "useToEncrypt",
		kms.OpUnwrap:       version + "useToDecrypt",
		kms.OpCurrentKeyID: key + "get",
		kms.OpCreate:       key + "create, " + key + "get, " + version + "list, " + key + "getIamPolicy, " + key + "setIamPolicy",
		kms.OpDescribe:     key + "get, " + version + "list",
		kms.OpRotate:       version + "create, " + key + "update, " + version + "list",
		kms.OpSetVersion:   key + "get, " + version + "list, " + version + "update, " + version + "destroy, " + version + "restore, " + key + "update",
		kms.OpList:         key + "list, " + version + "list",
		kms.OpLabel:        key + "get, " + key + "update",
	}
}

// Create is part of kms.Manager.
func (b *Backend) Create(ctx context.Context, n kms.NewKey) (kms.Key, error) {
	policy, err := b.policy(ctx, n.Policy) // first, so that a bad one leaves no key behind
	if err != nil {
		return kms.Key{}, err
	}
	ring, id, _ := strings.Cut(b.key, "/cryptoKeys/")
	key, err := b.client.CreateCryptoKey(ctx, &kmspb.CreateCryptoKeyRequest{Parent: ring, CryptoKeyId: id, CryptoKey: newKey(n)})
	switch status.Code(err) {
	case codes.OK:
	case codes.AlreadyExists:
		if key, err = b.existing(ctx, n); err != nil {
			return kms.Key{}, err
		}
	case codes.NotFound:
		return kms.Key{}, errdefs.Errorf(errdefs.ErrNotFound, "%s: make the key ring first, `gcloud kms keyrings create`", brief(err))
	default:
		return kms.Key{}, b.fault(ctx, err, managing())
	}
	if err := b.setPolicy(ctx, policy); err != nil {
		return kms.Key{}, err
	}
	return b.describe(ctx, key)
}

func newKey(n kms.NewKey) *kmspb.CryptoKey {
	key := &kmspb.CryptoKey{
		Purpose:         kmspb.CryptoKey_ENCRYPT_DECRYPT,
		VersionTemplate: &kmspb.CryptoKeyVersionTemplate{Algorithm: kmspb.CryptoKeyVersion_GOOGLE_SYMMETRIC_ENCRYPTION},
		Labels:          n.Labels,
	}
	if n.RotationPeriod > 0 {
		key.RotationSchedule = &kmspb.CryptoKey_RotationPeriod{RotationPeriod: durationpb.New(n.RotationPeriod)}
		key.NextRotationTime = timestamppb.New(time.Now().Add(n.RotationPeriod))
	}
	return key
}

// existing returns the key that is there already, if it is the one that was wanted.
func (b *Backend) existing(ctx context.Context, n kms.NewKey) (*kmspb.CryptoKey, error) {
	key, err := b.get(ctx)
	if err != nil {
		return nil, err
	}
	has := key.GetLabels()
	switch {
	case key.GetPurpose() != kmspb.CryptoKey_ENCRYPT_DECRYPT:
		return nil, errdefs.Errorf(errdefs.ErrExists, "the key exists and its purpose is %v", key.GetPurpose())
	case has[kms.LabelCluster] == "" || has[kms.LabelCluster] != n.Labels[kms.LabelCluster] || has[kms.LabelPurpose] != n.Labels[kms.LabelPurpose]:
		return nil, errdefs.Errorf(errdefs.ErrExists, "the key exists and belongs to cluster %.70q for %.70q (labels %s and %s): name another",
			has[kms.LabelCluster], has[kms.LabelPurpose], kms.LabelCluster, kms.LabelPurpose)
	}
	return key, nil
}

// policy parses an IAM policy, or makes the default one.
func (b *Backend) policy(ctx context.Context, document []byte) (*iampb.Policy, error) {
	if document == nil {
		email, err := b.caller.Email(ctx)
		if err != nil {
			return nil, errdefs.Errorf(errdefs.Class(err), "the default policy needs an account: %w; give a policy (version 3 JSON)", err)
		}
		members := []string{"serviceAccount:" + email}
		return &iampb.Policy{Version: 3, Bindings: []*iampb.Binding{
			{Role: "roles/cloudkms.cryptoKeyEncrypterDecrypter", Members: members},
			{Role: "roles/cloudkms.viewer", Members: members},
		}}, nil
	}
	policy := &iampb.Policy{}
	if err := protojson.Unmarshal(document, policy); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the policy is no IAM policy in JSON: %w", err)
	}
	switch {
	case policy.GetVersion() != 3:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the policy's version is %d, must be 3", policy.GetVersion())
	case len(policy.GetAuditConfigs()) > 0:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the policy has auditConfigs, which a key cannot have: set them on the project")
	}
	return policy, nil
}

// setPolicy gives the key a policy unless it has bindings: a second Create
// finishes what a crash left undone and takes back nothing that others changed.
func (b *Backend) setPolicy(ctx context.Context, policy *iampb.Policy) error {
	if len(policy.GetBindings()) == 0 {
		return nil
	}
	var err error
	for range setAttempts {
		var now *iampb.Policy
		now, err = b.client.GetIamPolicy(ctx, &iampb.GetIamPolicyRequest{
			Resource: b.key, Options: &iampb.GetPolicyOptions{RequestedPolicyVersion: 3},
		})
		if err == nil && len(now.GetBindings()) > 0 {
			return nil
		}
		if err == nil {
			policy.Etag = now.GetEtag()
			_, err = b.client.SetIamPolicy(ctx, &iampb.SetIamPolicyRequest{Resource: b.key, Policy: policy})
		}
		if status.Code(err) != codes.Aborted { // the etag is not the current one
			break
		}
	}
	if err != nil {
		fault := b.fault(ctx, err, managing())
		return errdefs.Errorf(errdefs.Class(fault), "the key exists, its IAM policy is not set (create it again to do that): %w", fault)
	}
	return nil
}

// Describe is part of kms.Manager.
func (b *Backend) Describe(ctx context.Context) (kms.Key, error) {
	key, err := b.get(ctx)
	if err != nil {
		return kms.Key{}, err
	}
	return b.describe(ctx, key)
}

func (b *Backend) get(ctx context.Context) (*kmspb.CryptoKey, error) {
	key, err := b.client.GetCryptoKey(ctx, &kmspb.GetCryptoKeyRequest{Name: b.key})
	if err != nil {
		return nil, b.fault(ctx, err, managing())
	}
	return key, nil
}

// describe adds the versions to what the service says of a key.
func (b *Backend) describe(ctx context.Context, key *kmspb.CryptoKey) (kms.Key, error) {
	versions, err := b.versions(ctx, key.GetName())
	if err != nil {
		return kms.Key{}, err
	}
	k := kms.Key{
		URI:            Scheme + "://" + key.GetName() + b.where,
		Labels:         maps.Clone(key.GetLabels()),
		Created:        moment(key.GetCreateTime()),
		RotationPeriod: key.GetRotationPeriod().AsDuration(),
	}
	maps.DeleteFunc(k.Labels, func(name, _ string) bool { return !strings.HasPrefix(name, kms.LabelPrefix) })
	for _, v := range versions {
		k.Versions = append(k.Versions, kms.Version{
			KeyID: v.GetName(), State: stateOf(v), Current: v.GetName() == key.GetPrimary().GetName(),
			Created: moment(v.GetCreateTime()), Until: until(v),
		})
	}
	return k, nil
}

func moment(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func until(v *kmspb.CryptoKeyVersion) time.Time {
	if v.GetState() != kmspb.CryptoKeyVersion_DESTROY_SCHEDULED {
		return time.Time{}
	}
	return moment(v.GetDestroyTime())
}

// stateOf: what is pending or failed unwraps nothing.
func stateOf(v *kmspb.CryptoKeyVersion) kms.VersionState {
	switch v.GetState() {
	case kmspb.CryptoKeyVersion_ENABLED:
		return kms.Enabled
	case kmspb.CryptoKeyVersion_DESTROY_SCHEDULED:
		return kms.Destroying
	case kmspb.CryptoKeyVersion_DESTROYED:
		return kms.Destroyed
	default:
		return kms.Disabled
	}
}

// versions returns a key's versions, the oldest first.
func (b *Backend) versions(ctx context.Context, key string) ([]*kmspb.CryptoKeyVersion, error) {
	versions, err := collect(b.client.ListCryptoKeyVersions(ctx, &kmspb.ListCryptoKeyVersionsRequest{Parent: key, PageSize: pageSize}).Next)
	if err != nil {
		return nil, b.fault(ctx, err, managing())
	}
	slices.SortFunc(versions, func(a, b *kmspb.CryptoKeyVersion) int { return cmp.Compare(number(a), number(b)) })
	return versions, nil
}

func number(v *kmspb.CryptoKeyVersion) uint64 {
	n, _ := strconv.ParseUint(path.Base(v.GetName()), 10, 64)
	return n
}

// collect reads all pages of a list.
func collect[T any](next func() (T, error)) ([]T, error) {
	var all []T
	for {
		one, err := next()
		switch {
		case errors.Is(err, iterator.Done):
			return all, nil
		case err != nil:
			return nil, err
		case len(all) == maxList:
			return nil, status.Errorf(codes.FailedPrecondition, "the list has more than %d entries: use a key ring of its own", maxList)
		}
		all = append(all, one)
	}
}

// Rotate is part of kms.Manager.
func (b *Backend) Rotate(ctx context.Context) (kms.Key, error) {
	v, err := b.client.CreateCryptoKeyVersion(ctx, &kmspb.CreateCryptoKeyVersionRequest{Parent: b.key, CryptoKeyVersion: &kmspb.CryptoKeyVersion{}})
	if err != nil {
		return kms.Key{}, b.fault(ctx, err, managing())
	}
	key, err := b.client.UpdateCryptoKeyPrimaryVersion(ctx, &kmspb.UpdateCryptoKeyPrimaryVersionRequest{Name: b.key, CryptoKeyVersionId: path.Base(v.GetName())})
	if err != nil {
		fault := b.fault(ctx, err, managing())
		return kms.Key{}, errdefs.Errorf(errdefs.Class(fault), "version %s was made and is not primary: %w", v.GetName(), fault)
	}
	return b.describe(ctx, key)
}

// SetVersion is part of kms.Manager. Enabling a version that is being
// destroyed takes its destruction back.
func (b *Backend) SetVersion(ctx context.Context, keyID string, s kms.VersionState) error {
	if s != kms.Enabled && s != kms.Disabled && s != kms.Destroyed {
		return errdefs.Errorf(errdefs.ErrInvalid, "a version can be made %s, %s or %s, not %q", kms.Enabled, kms.Disabled, kms.Destroyed, s)
	}
	key, err := b.get(ctx)
	if err != nil {
		return err
	}
	if keyID == "" {
		return b.setAll(ctx, key, s)
	}
	if !b.mine(keyID) {
		return errdefs.Errorf(errdefs.ErrInvalid, "%.300q is no version of this key", keyID)
	}
	if keyID == key.GetPrimary().GetName() && s != kms.Enabled {
		return errdefs.Errorf(errdefs.ErrState, "version %s is the primary one: rotate the key first", keyID)
	}
	versions, err := b.versions(ctx, b.key)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(versions, func(v *kmspb.CryptoKeyVersion) bool { return v.GetName() == keyID })
	if i < 0 {
		return errdefs.Errorf(errdefs.ErrNotFound, "the key has no version %s", keyID)
	}
	if state := stateOf(versions[i]); s == kms.Disabled && (state == kms.Destroying || state == kms.Destroyed) {
		return errdefs.Errorf(errdefs.ErrState, "version %s is %s already", keyID, state)
	}
	return b.set(ctx, versions[i], s)
}

// setAll sets every version, the primary one too, as far as each can still go.
func (b *Backend) setAll(ctx context.Context, key *kmspb.CryptoKey, s kms.VersionState) error {
	if s != kms.Enabled && (key.GetRotationPeriod() != nil || key.GetNextRotationTime() != nil) {
		// Else the service would soon make a version that wraps.
		_, err := b.client.UpdateCryptoKey(ctx, &kmspb.UpdateCryptoKeyRequest{
			CryptoKey:  &kmspb.CryptoKey{Name: b.key},
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"rotation_period", "next_rotation_time"}},
		})
		if err != nil {
			return b.fault(ctx, err, managing())
		}
	}
	versions, err := b.versions(ctx, b.key)
	if err != nil {
		return err
	}
	for _, v := range versions {
		state := stateOf(v)
		if state == kms.Destroyed || s == kms.Disabled && state == kms.Destroying {
			continue
		}
		if err := b.set(ctx, v, s); err != nil {
			return err
		}
	}
	return nil
}

// set brings one version into a state, if it is not there.
func (b *Backend) set(ctx context.Context, v *kmspb.CryptoKeyVersion, s kms.VersionState) error {
	var err error
	switch state := stateOf(v); {
	case state == s, s == kms.Destroyed && state == kms.Destroying:
		return nil
	case state == kms.Destroyed:
		return errdefs.Errorf(errdefs.ErrState, "version %s is destroyed for good", v.GetName())
	case s == kms.Destroyed:
		_, err = b.client.DestroyCryptoKeyVersion(ctx, &kmspb.DestroyCryptoKeyVersionRequest{Name: v.GetName()})
	case s == kms.Disabled:
		err = b.update(ctx, v, kmspb.CryptoKeyVersion_DISABLED)
	default:
		if state == kms.Destroying { // comes back as a disabled one
			_, err = b.client.RestoreCryptoKeyVersion(ctx, &kmspb.RestoreCryptoKeyVersionRequest{Name: v.GetName()})
		}
		if err == nil {
			err = b.update(ctx, v, kmspb.CryptoKeyVersion_ENABLED)
		}
	}
	if err != nil {
		return b.fault(ctx, err, managing())
	}
	return nil
}

func (b *Backend) update(ctx context.Context, v *kmspb.CryptoKeyVersion, s kmspb.CryptoKeyVersion_CryptoKeyVersionState) error {
	_, err := b.client.UpdateCryptoKeyVersion(ctx, &kmspb.UpdateCryptoKeyVersionRequest{
		CryptoKeyVersion: &kmspb.CryptoKeyVersion{Name: v.GetName(), State: s},
		UpdateMask:       &fieldmaskpb.FieldMask{Paths: []string{"state"}},
	})
	return err
}

// List is part of kms.Fleet: the keys of the URI's key ring, up to 10,000.
func (b *Backend) List(ctx context.Context) ([]kms.Key, error) {
	ring, _, _ := strings.Cut(b.key, "/cryptoKeys/")
	found, err := collect(b.client.ListCryptoKeys(ctx, &kmspb.ListCryptoKeysRequest{Parent: ring, PageSize: pageSize}).Next)
	if err != nil {
		return nil, b.fault(ctx, err, managing())
	}
	found = slices.DeleteFunc(found, func(key *kmspb.CryptoKey) bool {
		return key.GetPurpose() != kmspb.CryptoKey_ENCRYPT_DECRYPT || !ours(key.GetLabels())
	})
	keys := make([]kms.Key, len(found))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(listWorkers)
	for i, key := range found {
		group.Go(func() (err error) {
			keys[i], err = b.describe(ctx, key)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return keys, nil
}

func ours(labels map[string]string) bool {
	for name := range labels {
		if strings.HasPrefix(name, kms.LabelPrefix) {
			return true
		}
	}
	return false
}

// Label is part of kms.Fleet. The service replaces all labels of a key at once
// and knows no condition for that: of two changes at the same time one is lost.
func (b *Backend) Label(ctx context.Context, labels map[string]string) error {
	key, err := b.get(ctx)
	if err != nil {
		return err
	}
	all := maps.Clone(key.GetLabels())
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, labels)
	_, err = b.client.UpdateCryptoKey(ctx, &kmspb.UpdateCryptoKeyRequest{
		CryptoKey:  &kmspb.CryptoKey{Name: b.key, Labels: all},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels"}},
	})
	if err != nil {
		return b.fault(ctx, err, managing())
	}
	return nil
}
