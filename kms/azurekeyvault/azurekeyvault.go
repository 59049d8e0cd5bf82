// Package azurekeyvault is a KEK in an Azure Key Vault or a Managed HSM.
//
// # URI
//
//	azurekeyvault://myvault.vault.azure.net/keys/mykey
//	azurekeyvault://myhsm.managedhsm.azure.net/keys/mykey?algorithm=A256KW
//
// The host says whether it is a Key Vault or a Managed HSM, and in which cloud
// (azure.net, azure.cn, usgovcloudapi.net). A private endpoint keeps the
// vault's own name and needs nothing more. The key is named without a version.
// Parameters:
//
//   - algorithm: RSA-OAEP-256, A256GCM or A256KW; by default what suits the
//     key, see Wrapping
//   - resource: the audience of the vault's tokens, for a host name that is
//     none of Azure's (a proxy, another cloud): https://vault.azure.net or
//     https://managedhsm.azure.net. No token for another audience is ever sent.
//   - former-host: a vault from whose backup this key was restored. Records
//     name the vault that wrapped; only its and this one's are accepted.
//   - key-type: RSA, RSA-HSM or oct-HSM: what `kek create` makes; by default
//     RSA (3072 bits) in a Key Vault and oct-HSM (256 bits) in a Managed HSM
//   - those of credentials, and ca-file, cloud and authority-host, below
//
// # Credentials
//
// Files that the URI names, read again for each token: client-secret-file or
// client-certificate-file (PEM or PFX with its key) with tenant-id and
// client-id, or token-file for workload identity. client-id alone is a workload
// or managed identity. Otherwise Azure's default chain: environment, workload
// identity, managed identity, command line tools. cloud (public, china, usgov)
// or authority-host say which token service where the host does not; ca-file
// names certificates to trust besides the system's.
//
// # Wrapping
//
// In a Key Vault all keys that can wrap are RSA: RSA-OAEP with SHA-256 (the
// service's RSA-OAEP-256; mechanism rsa-oaep-256). That is a public-key
// operation: whoever has the public key can make such a wrap, so records need an
// authenticator of their own. With an oct-HSM key in a Managed HSM it is
// AES-256-GCM with the DEK's ID as associated data (a256gcm; the ciphertext is
// the 12-byte IV that the HSM chose, the encrypted key, the 16-byte tag), or
// AES-KW (a256kw, RFC 3394, deterministic and without associated data) where the
// key allows no encrypt and decrypt. Which it is is asked of the service at the
// first wrap; a record says how it was made and is unwrapped only that way.
//
// # Permissions
//
// Serving needs, as access policy, role action or local RBAC (Managed HSM):
//
//	keys/get                        vaults/keys/read           managedHsm/keys/read/action
//	keys/wrapKey, keys/unwrapKey    vaults/keys/wrap/action    managedHsm/keys/wrap/action
//	                                vaults/keys/unwrap/action  managedHsm/keys/unwrap/action
//	A256GCM instead of wrap:        managedHsm/keys/encrypt/action, …/keys/decrypt/action
//
// The role "Key Vault Crypto Service Encryption User" has them for RSA;
// "Managed HSM Crypto Service Encryption User" those for A256KW, "Managed HSM
// Crypto User" those for A256GCM. `key-service kek` needs also keys/list,
// create, update, delete, recover, rotate, getrotationpolicy and
// setrotationpolicy, as far as it is used.
//
// # Rotation
//
// A rotation makes a new version of the key, which wraps from then on; each
// record names its version and is unwrapped by that one. Rewrap the records,
// then disable the older versions. Key Vault cannot destroy a single version;
// the whole key can be deleted and is then recoverable until its purge date.
// Nothing here purges.
//
// # Audit
//
// Diagnostic logs (AuditEvent) of the vault show each call with caller, key,
// version and result, but not the
// associated data.
package azurekeyvault

import (
	"bytes"
	"context"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/azureconfig"
	"github.com/cryptcsi/cryptcsi/kms"
)

// Scheme of the URI.
const Scheme = "azurekeyvault"

// The mechanisms of wrapped keys.
const (
	MechanismRSA = kms.PublicKeyPrefix + "oaep-256"
	MechanismGCM = "a256gcm"
	MechanismKW  = "a256kw"
)

// Lengths in an A256GCM ciphertext.
const (
	ivSize  = 12
	tagSize = 16
)

// mechanisms by the service's names of their algorithms.
var mechanisms = map[azkeys.EncryptionAlgorithm]string{
	azkeys.EncryptionAlgorithmRSAOAEP256: MechanismRSA,
	azkeys.EncryptionAlgorithmA256GCM:    MechanismGCM,
	azkeys.EncryptionAlgorithmA256KW:     MechanismKW,
}

// keyID is the URL of a key's version: vault, name, version.
var keyID = regexp.MustCompile(`^https://([^/?#@\s]+)/keys/([0-9A-Za-z-]+)/([0-9A-Za-z]{1,64})$`)

// Backend is a kms.Backend, Manager, Fleet and Permitter.
type Backend struct {
	client     *azkeys.Client
	http       *http.Client
	host       string // with port
	name       string // of the key
	resource   string // like https://vault.azure.net
	formerHost string
	keyType    azkeys.KeyType // for Create
	shown      string         // parameters that name what the key is

	mu        sync.Mutex
	algorithm azkeys.EncryptionAlgorithm // empty: ask
	fixed     bool                       // algorithm is the URI's
}

// Open is the kms.Opener. It reads files and calls nobody.
func Open(_ context.Context, u *url.URL) (kms.Backend, error) {
	params, err := kms.Params(u, append(azureconfig.Params(), paramAlgorithm, paramResource, paramFormerHost, paramKeyType)...)
	if err != nil {
		return nil, err
	}
	b, err := parse(u, params)
	if err != nil {
		return nil, err
	}
	options, err := azureconfig.ClientOptions(params)
	if err != nil {
		return nil, err
	}
	credential, err := azureconfig.Credential(params, options)
	if err != nil {
		return nil, err
	}
	b.http, _ = options.Transport.(*http.Client)
	options.Transport = &guard{next: azureconfig.Bounded(options.Transport, maxAnswer), host: b.host, resource: b.resource}
	b.client, err = azkeys.NewClient("https://"+b.host, credential, &azkeys.ClientOptions{
		ClientOptions:                        options,
		DisableChallengeResourceVerification: params[paramResource] != "", // the guard's is stricter
	})
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return b, nil
}

// Wrap wraps under the current version.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	algorithm, err := b.algorithmFor(ctx)
	if err != nil {
		return kms.Wrapped{}, err
	}
	plaintext = bytes.Clone(plaintext) // an abandoned call outlives its caller's
	result, err := call(ctx, func(ctx context.Context) (azkeys.KeyOperationResult, error) {
		defer clear(plaintext)
		p := azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: plaintext}
		if algorithm == azkeys.EncryptionAlgorithmA256GCM {
			p.AdditionalAuthenticatedData = aad
			r, err := b.client.Encrypt(ctx, b.name, "", p, nil)
			return r.KeyOperationResult, err
		}
		r, err := b.client.WrapKey(ctx, b.name, "", p, nil)
		return r.KeyOperationResult, err
	})
	if err != nil {
		b.forget()
		return kms.Wrapped{}, fail(err, errdefs.ErrInvalid)
	}
	kid, err := b.own(result.KID)
	if err != nil {
		return kms.Wrapped{}, err
	}
	w := kms.Wrapped{Ciphertext: result.Result, KeyID: kid, Mechanism: mechanisms[algorithm]}
	if algorithm == azkeys.EncryptionAlgorithmA256GCM {
		if len(result.IV) != ivSize || len(result.AuthenticationTag) != tagSize {
			return kms.Wrapped{}, errdefs.Errorf(errdefs.ErrState, "the service answered an IV of %d bytes and a tag of %d, must be %d and %d",
				len(result.IV), len(result.AuthenticationTag), ivSize, tagSize)
		}
		w.Ciphertext = slices.Concat(result.IV, result.Result, result.AuthenticationTag)
	}
	return w, nil
}

// Unwrap unwraps with the version that w's key ID names, after checking that
// it is one of this key in this vault.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	version, err := b.version(w.KeyID)
	if err != nil {
		return nil, err
	}
	var algorithm azkeys.EncryptionAlgorithm
	for a, mechanism := range mechanisms {
		if mechanism == w.Mechanism {
			algorithm = a
		}
	}
	p := azkeys.KeyOperationParameters{Algorithm: &algorithm, Value: w.Ciphertext}
	switch w.Mechanism {
	case MechanismRSA, MechanismKW:
		result, err := call(ctx, func(ctx context.Context) (azkeys.UnwrapKeyResponse, error) {
			return b.client.UnwrapKey(ctx, b.name, version, p, nil)
		})
		return result.Result, fail(err, errdefs.ErrCorrupt)
	case MechanismGCM:
		end := len(w.Ciphertext) - tagSize
		if end <= ivSize {
			return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key has %d bytes: it was cut", len(w.Ciphertext))
		}
		p.IV, p.Value, p.AuthenticationTag = w.Ciphertext[:ivSize], w.Ciphertext[ivSize:end], w.Ciphertext[end:]
		p.AdditionalAuthenticatedData = aad
		result, err := call(ctx, func(ctx context.Context) (azkeys.DecryptResponse, error) {
			return b.client.Decrypt(ctx, b.name, version, p, nil)
		})
		return result.Result, fail(err, errdefs.ErrCorrupt)
	}
	return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.64q is none of Key Vault's", w.Mechanism)
}

// CurrentKeyID returns the URL of the newest version.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	key, err := b.get(ctx)
	if err != nil {
		return "", err
	}
	return b.own(key.Key.KID)
}

// Close drops idle connections.
func (b *Backend) Close() error {
	if b.http != nil {
		b.http.CloseIdleConnections()
	}
	return nil
}

// get returns the newest version; its Key is set.
func (b *Backend) get(ctx context.Context) (azkeys.KeyBundle, error) {
	key, err := call(ctx, func(ctx context.Context) (azkeys.GetKeyResponse, error) {
		return b.client.GetKey(ctx, b.name, "", nil)
	})
	if err != nil {
		return azkeys.KeyBundle{}, fail(err, errdefs.ErrInvalid)
	}
	if key.Key == nil {
		return azkeys.KeyBundle{}, errdefs.Errorf(errdefs.ErrState, "the service answered a key without its properties")
	}
	return key.KeyBundle, nil
}

// algorithmFor returns what Wrap uses: the URI's, or what suits the key. That
// is asked once, and again after a wrap that failed, because a key of the same
// name may have been made anew with another type.
func (b *Backend) algorithmFor(ctx context.Context) (azkeys.EncryptionAlgorithm, error) {
	b.mu.Lock()
	algorithm := b.algorithm
	b.mu.Unlock()
	if algorithm != "" {
		return algorithm, nil
	}
	key, err := b.get(ctx)
	if err != nil {
		return "", errdefs.Errorf(errdefs.Class(err), "asking for the key's type (needs %s): %w", b.Permissions()[kms.OpCurrentKeyID], err)
	}
	algorithm, err = suiting(key.Key)
	if err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.algorithm = algorithm
	return algorithm, nil
}

func (b *Backend) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.fixed {
		b.algorithm = ""
	}
}

// suiting returns the algorithm for a key: for AES keys A256GCM, which binds
// associated data, unless the key allows wrapping only.
func suiting(key *azkeys.JSONWebKey) (azkeys.EncryptionAlgorithm, error) {
	var kty azkeys.KeyType
	if key.Kty != nil {
		kty = *key.Kty
	}
	allows := func(op azkeys.KeyOperation) bool {
		return slices.ContainsFunc(key.KeyOps, func(o *azkeys.KeyOperation) bool { return o != nil && *o == op })
	}
	switch {
	case kty == azkeys.KeyTypeRSA || kty == azkeys.KeyTypeRSAHSM:
		return azkeys.EncryptionAlgorithmRSAOAEP256, nil
	case kty != azkeys.KeyTypeOctHSM:
		return "", errdefs.Errorf(errdefs.ErrInvalid, "a key of type %.16q cannot wrap keys: make one of type RSA, RSA-HSM or oct-HSM", kty)
	case !allows(azkeys.KeyOperationEncrypt) && allows(azkeys.KeyOperationWrapKey):
		return azkeys.EncryptionAlgorithmA256KW, nil
	}
	return azkeys.EncryptionAlgorithmA256GCM, nil
}

// version returns the version that a key ID names, if the ID is one of this
// key: ErrCorrupt where it is no key ID, ErrDenied where it is another key's.
func (b *Backend) version(kid string) (string, error) {
	m := keyID.FindStringSubmatch(kid)
	if m == nil {
		return "", errdefs.Errorf(errdefs.ErrCorrupt, "key ID %.200q is not like https://<vault>/keys/<name>/<version>", kid)
	}
	host, name, version := m[1], m[2], m[3]
	if !strings.EqualFold(name, b.name) || !b.ours(host) {
		return "", errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.200q, and this KEK is key %s in %s: open that one, or give %s where the key was restored from a backup",
			kid, b.name, b.host, paramFormerHost)
	}
	return version, nil
}

// ours tells whether a vault's host is this vault. Behind a name of somebody
// else's the vault calls itself by its own, below its resource.
func (b *Backend) ours(host string) bool {
	return strings.EqualFold(host, b.host) || b.formerHost != "" && strings.EqualFold(host, b.formerHost) ||
		serviceOf(b.host) == "" && strings.HasSuffix(strings.ToLower(host), "."+strings.TrimPrefix(b.resource, "https://"))
}

// own checks a key ID that the service answered.
func (b *Backend) own(kid *azkeys.ID) (string, error) {
	if kid == nil {
		return "", errdefs.Errorf(errdefs.ErrState, "the service answered no key ID")
	}
	if _, err := b.version(string(*kid)); err != nil {
		return "", errdefs.Errorf(errdefs.ErrState, "the service answered for another key: %w", err)
	}
	return string(*kid), nil
}

// call runs f and returns when it does or ctx ends, whichever is first: those
// who wait inside the SDK for a token that another call asks for do not look at
// their contexts.
func call[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}
