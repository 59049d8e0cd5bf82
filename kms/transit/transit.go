// Package transit is a KEK in the transit engine of HashiCorp Vault or OpenBao.
//
// # URI
//
//	transit://vault.example.com:8200/transit/kek?ca-file=/etc/cryptcsi/ca.pem&auth=kubernetes&role=cryptcsi
//
// Host and port (8200 where there is none), the path where the engine is
// mounted (one element or several), and last the key's name. Always HTTPS,
// TLS 1.2 at least; plaintext=true speaks HTTP instead, and only with this
// machine (127.0.0.0/8, ::1, localhost), for an agent beside us. What VAULT_*
// and BAO_* say in the environment counts for nothing, one token apart (below).
//
//	ca-file              PEM, signs the server's certificate; else the system's
//	cert-file, key-file  client certificate, PEM; both read again at each handshake
//	namespace            of the engine and of the login
//
// # Credentials
//
// One of:
//
//   - token-file: a file with a token. It is read at every call, so whoever
//     writes it (Vault Agent, a Secret that is synchronised) may replace it at
//     any time. It is not renewed by us.
//   - auth=approle with role-id-file, and secret-id-file where the role wants one.
//   - auth=kubernetes with role; the service account's token comes from jwt-file,
//     else from /var/run/secrets/kubernetes.io/serviceaccount/token.
//   - auth=jwt with jwt-file, which is as for kubernetes, and role or none.
//   - auth=cert with cert-file and key-file, and role or none.
//   - None of these: the token in BAO_TOKEN, else VAULT_TOKEN, as it was when
//     the KEK was opened; with plaintext=true also none, for an agent that adds
//     its own.
//
// auth-mount is where the auth method is mounted, without "auth/"; else its
// kind. We log in at the first call, renew the token when two thirds of its
// life are over, and log in again where it cannot be renewed for much longer;
// files are read again for that. So nobody is needed after a restart, neither
// ours nor the server's (which must be unsealed, by itself or by its people). A
// token that the server refuses is replaced by another login, or by what the
// file holds now, once per call. Tokens are left to end by themselves.
//
// # Permissions
//
// Serving needs this policy and no more:
//
//	path "transit/keys/kek"    { capabilities = ["read"] }
//	path "transit/encrypt/kek" { capabilities = ["update"] }
//	path "transit/decrypt/kek" { capabilities = ["update"] }
//
// A login's token also renews itself and looks itself up, which the server's
// policy "default" allows. Do not give "create" on encrypt: a token that has it makes the server create
// a key that is missing when something is encrypted. We look before each wrap
// whether the key is there and refuse where not; the policy, or once for all
// keys `bao write transit/config/keys disable_upsert=true`, also closes the
// moment in between. An operator who manages the key needs besides:
//
//	path "transit/keys/kek"                     { capabilities = ["read", "update", "delete"] }
//	path "transit/keys/kek/rotate"              { capabilities = ["update"] }
//	path "transit/keys/kek/config"              { capabilities = ["update"] }
//	path "transit/keys/kek/trim"                { capabilities = ["update"] }
//	path "transit/keys/kek/soft-delete"         { capabilities = ["delete"] }
//	path "transit/keys/kek/soft-delete-restore" { capabilities = ["update"] }
//
// # Wrapping
//
// The key is of type aes256-gcm96, chacha20-poly1305 or xchacha20-poly1305,
// which is the mechanism, and neither derived nor convergent. The ID is the
// associated data. A ciphertext is the server's own, "vault:v3:…", so that it
// can be decrypted by hand. The key ID is "kek:v3", the key's name and version
// without the mount: an engine that was moved or restored elsewhere unwraps as
// before, and one that holds another key of that name does not.
//
// # Rotation
//
// By hand, or by the server itself (auto_rotate_period, at least an hour). Then
// rewrap. Versions are disabled oldest first (min_decryption_version) and
// destroyed oldest first (trim), because the server knows no holes; enabled in
// the opposite order. The whole key is disabled by soft-delete (OpenBao only)
// and destroyed only where deletion_allowed was set on it, which we leave to a
// person. Transit keeps no labels and no policy with a key: labels given to
// Create are dropped, keys are not listed, and keep-alive is not offered.
//
// # Audit
//
// The server's audit devices record every request with the token's identity,
// the path (so the key) and, hashed with HMAC, plaintext, ciphertext and
// associated data. To find a volume's calls hash its base64-encoded ID with
// sys/audit-hash, or let the mount show it: audit_non_hmac_request_keys=associated_data.
package transit

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/openbao/openbao/api/v2"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	// Scheme of the URI.
	Scheme = "transit"

	// minSealed is the shortest ciphertext in bytes: nonce, a byte, tag.
	minSealed = 12 + 1 + 16
)

// Backend is a kms.Backend, a kms.Manager and a kms.Permitter.
type Backend struct {
	mount, key string
	uri        string // without parameters for credentials or files
	tokens     tokens
	web        *http.Transport
}

// Open is the kms.Opener. It reads the files and does not call the server.
func Open(_ context.Context, u *url.URL) (kms.Backend, error) {
	params, err := kms.Params(u, append([]string{
		paramCA, paramCert, paramKey, paramNamespace, paramPlaintext, paramTokenFile,
	}, loginParams()...)...)
	if err != nil {
		return nil, err
	}
	elements := strings.Split(strings.TrimPrefix(u.Path, "/"), "/")
	if u.Host == "" || u.Opaque != "" || len(elements) < 2 || slices.ContainsFunc(elements, badElement) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name server, mount and key, of letters, digits, '_', '-' and '.': transit://host:8200/transit/key")
	}
	last := len(elements) - 1
	b := &Backend{mount: strings.Join(elements[:last], "/"), key: elements[last], uri: bare(u, params)}
	s, err := newServer(u, params)
	if err != nil {
		return nil, err
	}
	b.web = s.web
	b.tokens, err = newTokens(s, params)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// badElement says whether e cannot be an element of a mount or the name of a key.
func badElement(e string) bool {
	return strings.Trim(e, ".") == "" || strings.ContainsFunc(e, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-.", r))
	})
}

// bare is what names the key and where it is.
func bare(u *url.URL, params map[string]string) string {
	uri, sign := kms.Redact(u), "?"
	for _, name := range []string{paramNamespace, paramPlaintext} {
		if params[name] != "" {
			uri += sign + name + "=" + url.PathEscape(params[name])
			sign = "&"
		}
	}
	return uri
}

// Close closes idle connections.
func (b *Backend) Close() error {
	b.web.CloseIdleConnections()
	return nil
}

// keyID names a version of the key.
func (b *Backend) keyID(version int) string { return b.key + ":v" + strconv.Itoa(version) }

// version is the reverse of keyID; false where id names another key.
func (b *Backend) version(id string) (int, bool) {
	digits, ok := strings.CutPrefix(id, b.key+":v")
	n, err := strconv.Atoi(digits)
	return n, ok && err == nil && n > 0 && id == b.keyID(n)
}

// Wrap encrypts under the newest version, if the key exists.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	k, err := b.usable(ctx)
	if err != nil {
		return kms.Wrapped{}, err
	}
	secret, err := b.write(ctx, b.mount+"/encrypt/"+b.key, map[string]any{
		"plaintext":       base64.StdEncoding.EncodeToString(plaintext),
		"associated_data": base64.StdEncoding.EncodeToString(aad),
	})
	if err != nil {
		return kms.Wrapped{}, err
	}
	var answer struct {
		Ciphertext string `json:"ciphertext"`
	}
	if err := decode(secret, &answer); err != nil {
		return kms.Wrapped{}, err
	}
	n, ok := ciphertextVersion(answer.Ciphertext)
	switch {
	case !ok:
		return kms.Wrapped{}, errdefs.Errorf(errdefs.ErrState, "the server answered a ciphertext that does not have the form vault:v1:…")
	case n < k.Latest:
		return kms.Wrapped{}, errdefs.Errorf(errdefs.ErrState, "the server wrapped under version %d, and the key was at version %d a moment ago: was it deleted and made anew?", n, k.Latest)
	}
	return kms.Wrapped{Ciphertext: []byte(answer.Ciphertext), KeyID: b.keyID(n), Mechanism: k.Type}, nil
}

// Unwrap decrypts with the version that w names, of this key alone.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	named, ours := b.version(w.KeyID)
	sealed, wellFormed := ciphertextVersion(string(w.Ciphertext))
	switch {
	case !slices.Contains(mechanisms(), w.Mechanism):
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.64q is none of %s", w.Mechanism, strings.Join(mechanisms(), ", "))
	case !ours:
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.64q, and this KEK is %s", w.KeyID, b.key)
	case !wellFormed || sealed != named:
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key is no ciphertext of version %d", named)
	}
	secret, err := b.write(ctx, b.mount+"/decrypt/"+b.key, map[string]any{
		"ciphertext":      string(w.Ciphertext),
		"associated_data": base64.StdEncoding.EncodeToString(aad),
	})
	if err != nil {
		return nil, err
	}
	var answer struct {
		Plaintext []byte `json:"plaintext"`
	}
	err = decode(secret, &answer)
	return answer.Plaintext, err
}

// CurrentKeyID asks for the newest version.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	k, err := b.usable(ctx)
	if err != nil {
		return "", err
	}
	return b.keyID(k.Latest), nil
}

// ciphertextVersion takes a ciphertext apart. Only one spelling of the same
// bytes passes, since the server's base64 takes several.
func ciphertextVersion(s string) (version int, ok bool) {
	digits, encoded, _ := strings.Cut(strings.TrimPrefix(s, "vault:v"), ":")
	version, err := strconv.Atoi(digits)
	if err != nil || version < 1 {
		return 0, false
	}
	sealed, err := base64.StdEncoding.DecodeString(encoded)
	canonical := "vault:v" + strconv.Itoa(version) + ":" + base64.StdEncoding.EncodeToString(sealed)
	return version, err == nil && len(sealed) >= minSealed && s == canonical
}

// mechanisms are the types of keys that take associated data and have 256 bits.
func mechanisms() []string {
	return []string{"aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"}
}

// key is what the server tells of a key.
type key struct {
	Type            string                     `json:"type"`
	Derived         bool                       `json:"derived"`
	Exportable      bool                       `json:"exportable"`
	PlaintextBackup bool                       `json:"allow_plaintext_backup"`
	DeletionAllowed bool                       `json:"deletion_allowed"`
	SoftDeleted     *bool                      `json:"soft_deleted"` // nil: the server knows no such thing
	Latest          int                        `json:"latest_version"`
	MinAvailable    int                        `json:"min_available_version"`
	MinDecryption   int                        `json:"min_decryption_version"`
	MinEncryption   int                        `json:"min_encryption_version"`
	AutoRotate      int64                      `json:"auto_rotate_period"` // seconds
	Versions        map[string]json.RawMessage `json:"keys"`               // Unix times, of those that decrypt
}

func (k *key) softDeleted() bool { return k.SoftDeleted != nil && *k.SoftDeleted }

// read returns the key; ErrNotFound where there is none.
func (b *Backend) read(ctx context.Context) (*key, error) {
	path := b.mount + "/keys/" + b.key
	secret, err := b.call(ctx, path, func(l *api.Logical) (*api.Secret, error) {
		resp, err := l.ReadRawWithContext(ctx, path)
		if resp != nil {
			defer resp.Body.Close()
		}
		if err != nil {
			return nil, err
		}
		return api.ParseSecret(resp.Body)
	})
	if err != nil {
		return nil, err
	}
	k := &key{}
	if err := decode(secret, k); err != nil {
		return nil, err
	}
	if k.Latest < 1 || k.Latest > maxVersions {
		return nil, errdefs.Errorf(errdefs.ErrState, "the server says that the key has %d versions, which cannot be", k.Latest)
	}
	return k, nil
}

// usable returns the key if it is one that a KEK can be.
func (b *Backend) usable(ctx context.Context) (*key, error) {
	k, err := b.read(ctx)
	switch {
	case err != nil:
		return nil, err
	case !slices.Contains(mechanisms(), k.Type):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the key is of type %.64q, must be one of %s", k.Type, strings.Join(mechanisms(), ", "))
	case k.Derived:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the key is a derived (or convergent) one: take one that was made with derived=false")
	case k.softDeleted():
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key is soft-deleted: restore it with %s/keys/%s/soft-delete-restore", b.mount, b.key)
	}
	return k, nil
}

// decode reads the data of an answer.
func decode(secret *api.Secret, into any) error {
	if secret == nil || secret.Data == nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "the server answered nothing: is it a Vault or an OpenBao?")
	}
	raw, err := json.Marshal(secret.Data)
	defer clear(raw)
	if err == nil {
		err = json.Unmarshal(raw, into)
	}
	if err != nil { // not shown: it may quote what was decrypted
		return errdefs.Errorf(errdefs.ErrUnavailable, "the server's answer does not have the form of a transit engine's")
	}
	return nil
}
