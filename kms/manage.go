package kms

import (
	"context"
	"errors"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// The operations, as Call.Op and Permissions name them.
const (
	OpWrap         = "wrap"
	OpUnwrap       = "unwrap"
	OpCurrentKeyID = "current-key-id"
	OpDerive       = "derive"
	OpCreate       = "create"
	OpDescribe     = "describe"
	OpRotate       = "rotate"
	OpSetVersion   = "set-version"
	OpList         = "list"
	OpLabel        = "label"
)

// Labels (tags) that we put on KEKs. Values are 1 to 63 lower-case letters,
// digits, '-' and '_', which every service takes.
const (
	LabelPrefix = "cryptcsi-"
	// LabelCluster names the cluster that a KEK belongs to.
	LabelCluster = LabelPrefix + "cluster"
	// LabelPurpose says what it is for: "kek".
	LabelPurpose = LabelPrefix + "purpose"
	// LabelActive is when the KEK was last known to be in use, in Unix seconds.
	LabelActive = LabelPrefix + "active"
)

// NewKey is what Create makes.
type NewKey struct {
	// Labels for the key, with names that begin with LabelPrefix. A service
	// that has no labels is given none, and is no worse for it.
	Labels map[string]string
	// Policy is the service's own policy document (IAM, key policy); nil
	// takes the backend's default, which its documentation shows.
	Policy []byte
	// RotationPeriod makes the service rotate by itself; 0 does not.
	RotationPeriod time.Duration
}

// Key is what a service tells of a KEK.
type Key struct {
	// URI opens the KEK. It holds what names the key and where it is, and
	// no parameter for credentials.
	URI string
	// Versions, the oldest first.
	Versions []Version
	// Labels are those that begin with LabelPrefix; nil where the service has none.
	Labels map[string]string
	// Created is zero where the service does not say.
	Created time.Time
	// RotationPeriod is 0 where the service does not rotate by itself.
	RotationPeriod time.Duration
}

// Version is one version of a KEK.
type Version struct {
	KeyID   string // as in Wrapped.KeyID
	State   VersionState
	Current bool      // new keys are wrapped under it
	Created time.Time // zero where the service does not say
	Until   time.Time // of Destroying: when it is gone for good
}

// VersionState is what a version can be used for.
type VersionState string

// The states.
const (
	Enabled    VersionState = "enabled"
	Disabled   VersionState = "disabled" // unwraps nothing until it is enabled again
	Destroying VersionState = "destroying"
	Destroyed  VersionState = "destroyed"
)

// Manager is a Backend that can manage its key in the service. ErrInvalid for
// what the service cannot do, with words that name what it can instead.
type Manager interface {
	// Create makes the key that the URI names. Where it exists with the
	// same cluster and purpose labels it is returned as it is (a lost
	// answer is not an error); with others, or none, ErrExists.
	Create(ctx context.Context, n NewKey) (Key, error)
	// Describe returns the key; ErrNotFound where there is none.
	Describe(ctx context.Context) (Key, error)
	// Rotate makes a new version, which wraps from now on, and returns the
	// key with it. Older versions still unwrap.
	Rotate(ctx context.Context) (Key, error)
	// SetVersion enables, disables or destroys one version; never the
	// current one (ErrState). An empty keyID stands for the whole key, the
	// current version included: every key wrapped under it goes the same way.
	// Destroying what is being destroyed already is no error.
	SetVersion(ctx context.Context, keyID string, s VersionState) error
}

// Fleet is a Backend that knows the other keys in the place where its own is
// (account and region, vault, key ring, mount, token).
type Fleet interface {
	// List returns all keys there that have our labels.
	List(ctx context.Context) ([]Key, error)
	// Label sets labels of the URI's key and keeps its others.
	Label(ctx context.Context, labels map[string]string) error
}

// Permitter is a Backend whose service names its permissions.
type Permitter interface {
	// Permissions returns the permission, or several separated by ", ",
	// that each operation needs.
	Permissions() map[string]string
}

// CreateKey is Manager.Create.
func (k *KEK) CreateKey(ctx context.Context, n NewKey) (Key, error) {
	return manage(ctx, k, OpCreate, func(ctx context.Context, m Manager) (Key, error) { return m.Create(ctx, n) })
}

// DescribeKey is Manager.Describe.
func (k *KEK) DescribeKey(ctx context.Context) (Key, error) {
	return manage(ctx, k, OpDescribe, func(ctx context.Context, m Manager) (Key, error) { return m.Describe(ctx) })
}

// RotateKey is Manager.Rotate.
func (k *KEK) RotateKey(ctx context.Context) (Key, error) {
	return manage(ctx, k, OpRotate, func(ctx context.Context, m Manager) (Key, error) { return m.Rotate(ctx) })
}

// SetVersion is Manager.SetVersion.
func (k *KEK) SetVersion(ctx context.Context, keyID string, s VersionState) error {
	_, err := manage(ctx, k, OpSetVersion, func(ctx context.Context, m Manager) (Key, error) { return Key{}, m.SetVersion(ctx, keyID, s) })
	return err
}

// ListKeys is Fleet.List.
func (k *KEK) ListKeys(ctx context.Context) (keys []Key, err error) {
	_, err = manage(ctx, k, OpList, func(ctx context.Context, f Fleet) (Key, error) {
		keys, err = f.List(ctx)
		return Key{}, err
	})
	return keys, err
}

// LabelKey is Fleet.Label.
func (k *KEK) LabelKey(ctx context.Context, labels map[string]string) error {
	_, err := manage(ctx, k, OpLabel, func(ctx context.Context, f Fleet) (Key, error) { return Key{}, f.Label(ctx, labels) })
	return err
}

// manage calls the backend as an M. Unlike the calls that serve, an operator's
// may answer ErrNotFound and ErrExists, which speak of the KEK here.
func manage[M any](ctx context.Context, k *KEK, op string, f func(context.Context, M) (Key, error)) (Key, error) {
	m, ok := k.backend.(M)
	if !ok {
		return Key{}, errdefs.Errorf(errdefs.ErrInvalid, "KEK %s: %s: not offered for scheme %s: do it with the service's own tools", k.name, op, k.scheme)
	}
	var key Key
	var answer error
	err := k.call(ctx, op, func(ctx context.Context) error {
		key, answer = f(ctx, m)
		return answer
	})
	for _, class := range []error{errdefs.ErrNotFound, errdefs.ErrExists} {
		if err != nil && errors.Is(answer, class) {
			err = errdefs.Errorf(class, "%s", err.Error())
		}
	}
	return key, err
}
