// Package awskms is a KEK in AWS KMS: a symmetric encryption key (AES-256-GCM
// inside AWS's HSMs, or those of its custom key stores).
//
// # URI
//
//	awskms:///arn:aws:kms:eu-central-1:111122223333:key/1234abcd-…
//	awskms:///1234abcd-12ab-34cd-56ef-1234567890ab?region=eu-central-1
//	awskms:///alias/cryptcsi?region=eu-central-1
//
// The path is a key's ARN, its ID (of the caller's account), an alias or an
// alias's ARN. An ARN names its region; otherwise it comes from the parameter
// region, AWS_REGION or the profile. endpoint (https, or http on loopback)
// replaces the service's address. The ARN of the key is the best name: whoever
// may change an alias (kms:UpdateAlias) says which key new DEKs are wrapped under.
//
// # Credentials
//
// The SDK's default chain, or what the parameters profile, credentials-file,
// role-arn and web-identity-token-file name: see internal/awsconfig.
//
// # Permissions
//
// Serving needs kms:DescribeKey, kms:Encrypt and kms:Decrypt on the key and
// nothing else; they can be limited to requests that have the encryption
// context key cryptcsi-dek-id. What the operator's verbs need besides:
//
//	create    kms:CreateKey, kms:TagResource, kms:EnableKeyRotation, kms:CreateAlias, kms:ScheduleKeyDeletion
//	describe  kms:ListResourceTags, kms:GetKeyRotationStatus, kms:ListKeyRotations
//	rotate    kms:RotateKeyOnDemand
//	enable, disable, destroy   kms:EnableKey, kms:DisableKey, kms:ScheduleKeyDeletion, kms:CancelKeyDeletion
//	list      kms:ListKeys, and what describe needs
//	keep-alive   kms:TagResource
//
// A key that is created without a policy gets AWS's default one: the account
// decides by IAM policies who may do what.
//
// # Wrapping
//
// Encrypt and Decrypt with the encryption context {"cryptcsi-dek-id": ID}. A
// key ID is the key's ARN, '#', and the ID of its current key material, so that
// a rotation can be seen; without '#' where AWS names no material (custom key
// stores). Encrypt does not say which material it used, so the key is described
// before: a rotation in between makes a key look older than it is, which costs
// one rewrap, and never newer.
//
// Unwrap names the configured key to AWS, never one from the record. A record
// that names another key is refused. The replicas of a multi-Region key are one
// key: their ARNs differ in the region alone and each opens what others wrapped.
//
// # Rotation
//
// By AWS, every 90 to 2560 days (create) or on demand (rotate, at most 25 times
// in a key's life). AWS keeps all key materials as long as the key, and
// disables and deletes whole keys only. A rotation takes AWS a while.
//
// Pointing an alias at another key is no rotation but another KEK: what the
// former key wrapped is refused, by a message that names it, until its ARN is
// configured as a second KEK, or the alias points back. An alias is therefore
// resolved at every call and not remembered.
//
// # Audit
//
// CloudTrail has every call with the caller, and with the ID of the DEK as
// encryption context, in clear text.
package awskms

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	awskms "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/awsconfig"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	// Scheme of the URI.
	Scheme = "awskms"
	// Mechanism of every wrapped key.
	Mechanism = "aws-symmetric-default"

	// contextKey is the name of the DEK's ID in the encryption context.
	contextKey = "cryptcsi-dek-id"
	// maxCiphertext is AWS's limit for Decrypt, in bytes.
	maxCiphertext = 6144
)

// Backend is a kms.Backend, Manager, Fleet and Permitter.
type Backend struct {
	client   *awskms.Client
	target   target
	endpoint string // of the URI; "" where it has none
	close    func()
}

var (
	_ kms.Manager   = (*Backend)(nil)
	_ kms.Fleet     = (*Backend)(nil)
	_ kms.Permitter = (*Backend)(nil)
)

// Open is the kms.Opener. It reads the files that credentials come from and
// does not call AWS.
func Open(ctx context.Context, u *url.URL) (kms.Backend, error) {
	params, err := kms.Params(u, awsconfig.Params()...)
	if err != nil {
		return nil, err
	}
	if u.Host != "" || u.Opaque != "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must have three slashes before the key: %s:///KEY", Scheme)
	}
	t, err := parseTarget(strings.TrimPrefix(u.Path, "/"))
	if err != nil {
		return nil, err
	}
	params = maps.Clone(params)
	switch {
	case t.region != "" && params["region"] == "":
		params["region"] = t.region
	case t.region != "" && params["region"] != t.region:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter \"region\" is not the region of the ARN, %s: leave it out", t.region)
	}
	cfg, err := awsconfig.Load(ctx, params)
	if err != nil {
		return nil, err
	}
	b := &Backend{client: awskms.NewFromConfig(cfg), target: t, endpoint: params["endpoint"], close: func() {}}
	if c, ok := cfg.HTTPClient.(interface{ CloseIdleConnections() }); ok {
		b.close = c.CloseIdleConnections
	}
	// Asked of the client: the environment may have set one too.
	if err := checkEndpoint(aws.ToString(b.client.Options().BaseEndpoint)); err != nil {
		return nil, err
	}
	return b, nil
}

// checkEndpoint refuses to send DEKs over the network unencrypted.
func checkEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err == nil && (endpoint == "" || u.Scheme == "https" || net.ParseIP(u.Hostname()).IsLoopback()) {
		return nil
	}
	return errdefs.Errorf(errdefs.ErrInvalid, "the endpoint of AWS KMS must be https (http on a loopback address only): DEKs would cross the network in the clear")
}

// target is the key that the URI names.
type target struct {
	name   string // what AWS takes as KeyId
	region string // of an ARN, else ""
	alias  string // "alias/…" where it is one, else ""
}

func parseTarget(name string) (target, error) {
	t := target{name: name}
	resource := "key/" + name
	if strings.HasPrefix(name, "alias/") {
		resource = name
	}
	if strings.HasPrefix(name, "arn:") {
		a, err := arn.Parse(name)
		if err != nil || a.Service != "kms" || a.Region == "" || a.AccountID == "" {
			return target{}, errdefs.Errorf(errdefs.ErrInvalid, "the ARN in the URI is none of a KMS key or alias")
		}
		t.region, resource = a.Region, a.Resource
	}
	key := regexp.MustCompile(`^key/(mrk-[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})$`)
	alias := regexp.MustCompile(`^alias/[a-zA-Z0-9/_-]{1,250}$`)
	switch {
	case alias.MatchString(resource):
		t.alias = resource
	case !key.MatchString(resource):
		return target{}, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name a key by ARN, key ID or alias/NAME: %s:///alias/NAME?region=REGION", Scheme)
	}
	return t, nil
}

// names says whether an ARN is that of the target, which is no alias.
func (t target) names(keyARN string) bool {
	got, err := arn.Parse(keyARN)
	if err != nil || got.Service != "kms" {
		return false
	}
	want, err := arn.Parse(t.name)
	if err != nil { // a key ID
		return got.Resource == "key/"+t.name
	}
	if strings.HasPrefix(want.Resource, "key/mrk-") {
		got.Region = want.Region
	}
	return got == want
}

// Wrap is part of kms.Backend.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	meta, err := b.describe(ctx)
	if err != nil {
		return kms.Wrapped{}, err
	}
	out, err := b.client.Encrypt(ctx, &awskms.EncryptInput{
		KeyId: meta.Arn, Plaintext: plaintext, EncryptionContext: map[string]string{contextKey: string(aad)},
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
	})
	if err != nil {
		return kms.Wrapped{}, classify(err)
	}
	if aws.ToString(out.KeyId) != *meta.Arn {
		return kms.Wrapped{}, errdefs.Errorf(errdefs.ErrState, "AWS KMS wrapped under %.200q, asked for was %s", aws.ToString(out.KeyId), *meta.Arn)
	}
	return kms.Wrapped{Ciphertext: out.CiphertextBlob, KeyID: keyID(*meta.Arn, meta.CurrentKeyMaterialId), Mechanism: Mechanism}, nil
}

// Unwrap is part of kms.Backend.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	if w.Mechanism != Mechanism {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.64q is not %s", w.Mechanism, Mechanism)
	}
	if len(w.Ciphertext) > maxCiphertext {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key has %d bytes, those of AWS KMS have at most %d", len(w.Ciphertext), maxCiphertext)
	}
	key := b.target
	if key.alias != "" {
		meta, err := b.describe(ctx)
		if err != nil {
			return nil, err
		}
		key = target{name: *meta.Arn}
	}
	if recorded, _, _ := strings.Cut(w.KeyID, "#"); !key.names(recorded) {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.200q and this KEK is %s: if both are yours, configure that key as a further KEK", recorded, key.name)
	}
	out, err := b.client.Decrypt(ctx, &awskms.DecryptInput{
		KeyId: &key.name, CiphertextBlob: w.Ciphertext, EncryptionContext: map[string]string{contextKey: string(aad)},
		EncryptionAlgorithm: types.EncryptionAlgorithmSpecSymmetricDefault,
	})
	if err != nil {
		return nil, classify(err)
	}
	if used := aws.ToString(out.KeyId); !key.names(used) {
		clear(out.Plaintext)
		return nil, errdefs.Errorf(errdefs.ErrState, "AWS KMS unwrapped with %.200q, asked for was %s", used, key.name)
	}
	return out.Plaintext, nil
}

// CurrentKeyID is part of kms.Backend.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	meta, err := b.describe(ctx)
	if err != nil {
		return "", err
	}
	return keyID(*meta.Arn, meta.CurrentKeyMaterialId), nil
}

// Close closes idle connections.
func (b *Backend) Close() error {
	b.close()
	return nil
}

// describe returns the metadata of the URI's key; its Arn is set. Where the
// URI does not name an alias, it is that of the URI.
func (b *Backend) describe(ctx context.Context) (types.KeyMetadata, error) {
	return b.describeKey(ctx, b.target)
}

func (b *Backend) describeKey(ctx context.Context, t target) (types.KeyMetadata, error) {
	out, err := b.client.DescribeKey(ctx, &awskms.DescribeKeyInput{KeyId: &t.name})
	if err != nil {
		return types.KeyMetadata{}, classify(err)
	}
	if out.KeyMetadata == nil || out.KeyMetadata.Arn == nil || t.alias == "" && !t.names(*out.KeyMetadata.Arn) {
		return types.KeyMetadata{}, errdefs.Errorf(errdefs.ErrState, "AWS KMS described another key than %s", t.name)
	}
	return *out.KeyMetadata, nil
}

// keyID is what records call a key with that key material.
func keyID(keyARN string, material *string) string {
	if aws.ToString(material) == "" {
		return keyARN
	}
	return keyARN + "#" + *material
}

// classify gives an error of the SDK its class and a text for people.
func classify(err error) error {
	class := cmp.Or(awsconfig.Class(err), errdefs.ErrUnavailable)
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok || errdefs.Class(err) != nil { // transport, or credentials
		return errdefs.Errorf(class, "%w", err)
	}
	hint, own := classOf(api.ErrorCode())
	return errdefs.Errorf(cmp.Or(own, class), "%s%s", awsconfig.Text(err), hint)
}

// classOf knows the errors that are AWS KMS's own.
func classOf(code string) (hint string, class error) {
	switch code {
	case "InvalidCiphertextException", "IncorrectKeyException":
		return ": the wrapped key was damaged, moved from another ID, or made with another key", errdefs.ErrCorrupt
	case "NotFoundException":
		return ": is it in this account and region, and was it deleted?", errdefs.ErrNotFound
	case "DisabledException":
		return ": enable the key", errdefs.ErrDenied
	case "KMSInvalidStateException":
		return ": if the key is pending deletion, cancel that and enable the key", errdefs.ErrDenied
	case "InvalidKeyUsageException":
		return ": it must be a symmetric key for encryption", errdefs.ErrInvalid
	case "AlreadyExistsException":
		return "", errdefs.ErrExists
	case "LimitExceededException":
		return ": a quota of AWS is used up", errdefs.ErrState
	case "InvalidArnException", "InvalidAliasNameException", "ValidationException", "MalformedPolicyDocumentException",
		"TagException", "UnsupportedOperationException", "UnknownOperationException", "SerializationException":
		return "", errdefs.ErrInvalid
	case "KeyUnavailableException", "DependencyTimeoutException", "KMSInternalException", "InternalFailure", "ServiceUnavailable", "ConflictException":
		return "", errdefs.ErrUnavailable
	}
	return "", nil
}

// uri opens the key with that ARN where this one was opened.
func (b *Backend) uri(keyARN string) string {
	u := Scheme + ":///" + keyARN
	if b.endpoint != "" {
		u += fmt.Sprintf("?endpoint=%s", url.QueryEscape(b.endpoint))
	}
	return u
}
