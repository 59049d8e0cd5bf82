// Package kmip is a KEK in a KMIP server (a hardware security module, an
// appliance, a key manager), over KMIP 1.0 to 1.4 as the server speaks.
//
// # URI
//
//	kmip://kms.example.com:5696/3f2c…?ca-file=/etc/kmip/ca.pem&cert-file=/etc/kmip/tls.crt&key-file=/etc/kmip/tls.key
//	kmip://kms.example.com/?name=cluster-one&ca-file=…&cert-file=…&key-file=…
//
// The path is the unique identifier of an AES-256 key, or name its Name
// attribute; exactly one of them. An identifier is one key for ever. A name is
// what can be created and rotated: its newest active version wraps, see
// Rotation. The port is 5696 where none is given.
//
//   - cert-file, key-file (required): the client certificate with its chain,
//     and its key, PEM.
//   - ca-file: the authorities that the server's certificate is checked
//     against, PEM; the system's where absent.
//   - server-name: the name in the server's certificate where it is not the
//     URI's host.
//   - protocol-version: 1.0, 1.1, 1.2, 1.3 or 1.4 instead of asking the server.
//   - allow-kek-export=true: see Wrapping. Off by default.
//
// # Credentials
//
// Mutual TLS, 1.2 or newer. The server knows us by the client certificate,
// which needs the extended key usage "client authentication"; what it takes
// for our name (the common name, an alternative name, the fingerprint) is its
// configuration. User names and passwords are not sent. The three files are
// read again for every request, and connections made with older ones are
// closed: renewing a certificate needs no restart. An expired one is
// ErrDenied, which names its file.
//
// Can a cluster recover without a human? Yes, if each start of a node or key
// service obtains cert-file and key-file without one, and the KMIP server is
// outside of the cluster, reachable before any encrypted volume is. Two ways:
//
//   - The certificate is issued to the attested VM: an issuer (for example a
//     SPIFFE agent, or a step of the attestation service) checks the VM's
//     report and signs a short-lived client certificate for a key that was
//     made inside the VM. Nothing is stored, a stolen disk image has nothing,
//     and a VM that does not attest gets nothing. This is the recommended way.
//   - The certificate lies where only the attested VM reads it: sealed to its
//     measurements (vTPM), in the confidential VM's own encrypted state disk,
//     or released by a key broker after attestation. It must be renewed
//     before it expires, by something that runs without a human too.
//
// No, if the certificate stands only in a Kubernetes Secret of the cluster
// whose etcd lies on a volume that this KEK protects, if its key needs a
// passphrase, or if the server asks an operator to approve each new client.
// KMIP itself attests nobody: whoever holds the certificate's key is us.
//
// # Wrapping
//
// The server's Encrypt and Decrypt operations do the work: AES-GCM with a
// random 96-bit IV from us, a 128-bit tag, and the DEK's ID as additional
// data. The KEK never leaves the server. A ciphertext is IV ‖ encrypted ‖ tag,
// the mechanism "aes-256-gcm", the key ID the unique identifier of the key
// version. NIST SP 800-38D allows 2^32 wraps under one key. Only KMIP 1.4 has
// additional data and tag, so that an older server counts as one without
// Encrypt. Unwrap uses the configured identifier, or those that the server
// lists as versions of the configured name, and no other.
//
// A server without Encrypt is ErrInvalid. With allow-kek-export=true, and only
// where the server said that it does not support the operation, the KEK itself
// is fetched (Get) for each wrap and unwrap, used in this process's memory and
// wiped; the mechanism is then "kek-export+aes-256-gcm".
//
// WARNING: with allow-kek-export=true whoever reads this process's memory
// once has the KEK, and with it every DEK in every copy of the store, also
// those of times to come, unseen by the server's audit log. It gives up what a
// KMS is for. Use a server that encrypts if there is one.
//
// # Permissions
//
// Serving needs Encrypt, Decrypt and Get Attributes on the key, with a name
// Locate too, with allow-kek-export=true Get. The key's usage mask must have
// Encrypt and Decrypt, its state must be Active. Creating and rotating need
// Create, Activate, Locate and Get Attributes, destroying Revoke and Destroy,
// labels Modify Attribute and Add Attribute. Many servers give every operation
// to the client that created a key (the owner), whatever these names say: let
// one certificate create and another serve where the server can share keys.
//
// A name is as good as the server's rules about who may use it: whoever can
// make a key that this client finds under it can have DEKs wrapped under a key
// of theirs. Where strangers share the server, use the unique identifier.
//
// # Rotation
//
// The versions of the name N are the keys with the Name N (version 1; made by
// whomever) and N-v2, N-v3, … of the Object Group "cryptcsi:N". KMIP wants
// Names to be unique; where a server lets two clients create the same one at
// the same time both are versions, the newer one wraps. The current version is
// the last active one, in the order of version, Initial Date, identifier.
// Rotating creates and activates the next one; the operation Re-key is not
// used, because servers without it exist and because it moves the Name away
// from the older key. Older versions stay active, as servers disagree on
// whether a deactivated key decrypts. A version cannot be disabled, as KMIP
// cannot reactivate; destroying is Revoke (cessation of operation), then Destroy.
// New keys are Sensitive and not Extractable where the server knows these
// attributes (KMIP 1.4), unless allow-kek-export=true. Labels are Application
// Specific Information, the namespace being the label's name. There is no
// rotation by the server itself, and no policy document.
//
// # Audit
//
// The server logs operation, key and client. The DEK's ID is in the additional
// data of Encrypt and Decrypt, which few servers log.
package kmip

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync"

	"github.com/ovh/kmip-go"
	"github.com/ovh/kmip-go/payloads"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/kms"
	"github.com/cryptcsi/cryptcsi/secret"
)

const (
	// Scheme of the URI.
	Scheme = "kmip"
	// Mechanism of a key that the server wrapped.
	Mechanism = "aes-256-gcm"
	// MechanismExport is that of a key wrapped here, with the KEK in our memory.
	MechanismExport = "kek-export+aes-256-gcm"

	defaultPort = "5696"

	ivSize  = 12
	tagSize = 16
	// maxPlaintext is what a KEK wraps at most, in bytes.
	maxPlaintext = 64
)

// Backend is a kms.Backend, a kms.Manager, a kms.Fleet and a kms.Permitter.
type Backend struct {
	pool        *pool
	id          string // the unique identifier, or else
	name        string // the Name
	allowExport bool

	mu    sync.Mutex
	known map[string]bool // identifiers that a lookup by name found last
}

var (
	_ kms.Manager   = (*Backend)(nil)
	_ kms.Fleet     = (*Backend)(nil)
	_ kms.Permitter = (*Backend)(nil)
)

// Open is the kms.Opener. It reads the files and does not call the server.
func Open(_ context.Context, u *url.URL) (kms.Backend, error) {
	const name, version, export = "name", "protocol-version", "allow-kek-export"
	params, err := kms.Params(u, name, "ca-file", "cert-file", "key-file", "server-name", version, export)
	if err != nil {
		return nil, err
	}
	id := strings.TrimPrefix(u.Path, "/")
	switch {
	case u.Opaque != "" || u.Hostname() == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name the server: kmip://host:5696/<unique identifier>?… or kmip://host:5696/?name=<name>&…")
	case (id == "") == (params[name] == ""):
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name the key, either by its unique identifier (kmip://host/<identifier>) or by its Name attribute (kmip://host/?name=<name>)")
	case len(id) > kms.MaxName || len(params[name]) > maxKeyName:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the key's name is too long: at most %d bytes, an identifier at most %d", maxKeyName, kms.MaxName)
	case params["cert-file"] == "" || params["key-file"] == "":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameters %q and %q are required: a KMIP server knows its clients by their certificates", "cert-file", "key-file")
	case params[export] != "" && params[export] != "true" && params[export] != "false":
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be true or false", export)
	}
	p := &pool{slots: make(chan struct{}, maxConns), files: tlsFiles{
		ca: params["ca-file"], cert: params["cert-file"], key: params["key-file"], serverName: params["server-name"]}}
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	p.addr = net.JoinHostPort(u.Hostname(), port)
	if p.files.serverName == "" {
		p.files.serverName = u.Hostname()
	}
	if v := params[version]; v != "" {
		if p.version, err = parseProtocol(v); err != nil {
			return nil, err
		}
	}
	if _, _, err := p.files.load(); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return &Backend{pool: p, id: id, name: params[name], allowExport: params[export] == "true"}, nil
}

func parseProtocol(s string) (*kmip.ProtocolVersion, error) {
	for _, v := range []struct {
		name    string
		version kmip.ProtocolVersion
	}{{"1.0", kmip.V1_0}, {"1.1", kmip.V1_1}, {"1.2", kmip.V1_2}, {"1.3", kmip.V1_3}, {"1.4", kmip.V1_4}} {
		if v.name == s {
			return &v.version, nil
		}
	}
	return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be 1.0, 1.1, 1.2, 1.3 or 1.4", "protocol-version")
}

// Wrap wraps under the current version.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	id, err := b.CurrentKeyID(ctx)
	if err != nil {
		return kms.Wrapped{}, err
	}
	w := kms.Wrapped{KeyID: id, Mechanism: Mechanism}
	w.Ciphertext, err = b.encrypt(ctx, id, plaintext, aad)
	if unsupported(err) {
		if !b.allowExport {
			return kms.Wrapped{}, errdefs.Errorf(errdefs.ErrInvalid, "the server does not encrypt (%w): use one that does AES-GCM over KMIP 1.4, or accept with allow-kek-export=true that the KEK leaves it", err)
		}
		w.Mechanism = MechanismExport
		w.Ciphertext, err = b.seal(ctx, id, plaintext, aad)
	}
	if err != nil {
		return kms.Wrapped{}, err
	}
	return w, nil
}

// Unwrap unwraps with the version that w names, if it is one of this KEK.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	switch {
	case w.Mechanism != Mechanism && w.Mechanism != MechanismExport:
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.64q is neither %s nor %s", w.Mechanism, Mechanism, MechanismExport)
	case len(w.Ciphertext) <= ivSize+tagSize || len(w.Ciphertext) > ivSize+maxPlaintext+tagSize:
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "a ciphertext of %d bytes, must be %d to %d", len(w.Ciphertext), ivSize+tagSize+1, ivSize+maxPlaintext+tagSize)
	}
	if err := b.pin(ctx, w.KeyID); err != nil {
		return nil, err
	}
	if w.Mechanism == Mechanism {
		plaintext, err := b.decrypt(ctx, w.KeyID, w.Ciphertext, aad)
		if err != nil {
			return nil, b.judge(ctx, w.KeyID, err)
		}
		return plaintext, nil
	}
	if !b.allowExport {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped with the KEK outside of the server, which the URI does not allow: add allow-kek-export=true, and rewrap where the server encrypts now")
	}
	return b.open(ctx, w.KeyID, w.Ciphertext, aad)
}

// pin refuses every key but the versions of this KEK. What is not known is
// looked up by what the URI says; the identifier itself is not sent.
func (b *Backend) pin(ctx context.Context, id string) error {
	if b.name == "" {
		if id != b.id {
			return errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.64q and the URI names %s", id, b.id)
		}
		return nil
	}
	if b.knows(id) {
		return nil
	}
	if _, err := b.versions(ctx); err != nil {
		return hidden(err)
	}
	if !b.knows(id) {
		return errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.64q, which is no version of %s: it was destroyed, or the record belongs to another KEK", id, b.name)
	}
	return nil
}

func (b *Backend) knows(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.known[id]
}

// CurrentKeyID returns the unique identifier of the current version.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	vs, err := b.versions(ctx)
	if err != nil {
		return "", hidden(err)
	}
	v, err := current(vs)
	if err != nil {
		return "", err
	}
	return v.id, nil
}

// hidden makes a key that is not found a refusal: servers hide what a client
// may not see.
func hidden(err error) error {
	if errors.Is(err, errdefs.ErrNotFound) {
		return errdefs.Errorf(errdefs.ErrDenied, "%w, or does not show it to this client", err)
	}
	return err
}

// Close closes the connections.
func (b *Backend) Close() error {
	b.pool.close()
	return nil
}

func gcm() *kmip.CryptographicParameters {
	return &kmip.CryptographicParameters{
		BlockCipherMode: kmip.BlockCipherModeGCM, CryptographicAlgorithm: kmip.CryptographicAlgorithmAES, TagLength: tagSize}
}

// encrypt returns IV ‖ encrypted ‖ tag.
func (b *Backend) encrypt(ctx context.Context, id string, plaintext, aad []byte) ([]byte, error) {
	iv := make([]byte, ivSize)
	_, _ = rand.Read(iv) // never fails, see crypto/rand
	a, err := ask[*payloads.EncryptResponsePayload](ctx, b.pool, &payloads.EncryptRequestPayload{
		UniqueIdentifier: id, CryptographicParameters: gcm(), Data: plaintext, IVCounterNonce: iv, AuthenticatedEncryptionAdditionalData: aad})
	switch {
	case err != nil:
		return nil, err
	case a.UniqueIdentifier != id,
		len(a.Data) != len(plaintext) || len(a.AuthenticatedEncryptionTag) != tagSize,
		len(a.IVCounterNonce) != 0 && !bytes.Equal(a.IVCounterNonce, iv):
		return nil, errdefs.Errorf(errdefs.ErrState, "the server answered %d bytes and a tag of %d bytes for key %.64q: that is not AES-GCM with our IV under key %s",
			len(a.Data), len(a.AuthenticatedEncryptionTag), a.UniqueIdentifier, id)
	}
	return bytes.Join([][]byte{iv, a.Data, a.AuthenticatedEncryptionTag}, nil), nil
}

// decrypt undoes encrypt. c is longer than IV and tag.
func (b *Backend) decrypt(ctx context.Context, id string, c, aad []byte) ([]byte, error) {
	tag := len(c) - tagSize
	a, err := ask[*payloads.DecryptResponsePayload](ctx, b.pool, &payloads.DecryptRequestPayload{
		UniqueIdentifier: id, CryptographicParameters: gcm(), Data: c[ivSize:tag], IVCounterNonce: c[:ivSize],
		AuthenticatedEncryptionAdditionalData: aad, AuthenticatedEncryptionTag: c[tag:]})
	if err != nil {
		return nil, err
	}
	return a.Data, nil
}

// judge decides what a failed Decrypt means. Servers have one answer for "the
// tag is wrong" and for "I have a problem" (General Failure), some call the
// former an invalid field. So a key of our own is wrapped and unwrapped: if
// that works, the ciphertext is to blame.
func (b *Backend) judge(ctx context.Context, id string, failed error) error {
	f, refused := errors.AsType[*failure](failed)
	if !refused || errors.Is(f, errdefs.ErrNotFound) || errors.Is(f, errdefs.ErrDenied) || unsupported(f) {
		return failed
	}
	corrupt := errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key does not verify for this ID (%s): it was damaged, or moved from another ID", failed.Error())
	if errors.Is(f, errdefs.ErrCorrupt) {
		return corrupt
	}
	probe := []byte("cryptcsi")
	c, err := b.encrypt(ctx, id, probe, probe)
	if errors.Is(err, errdefs.ErrDenied) {
		return corrupt // the server works: it refuses to wrap under this version
	}
	if err == nil {
		var back []byte
		if back, err = b.decrypt(ctx, id, c, probe); err == nil && bytes.Equal(back, probe) {
			return corrupt
		}
	}
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s; a fresh key does not unwrap either: the server has a problem", failed.Error())
}

// unsupported says that the server lacks the operation.
func unsupported(err error) bool {
	f, ok := errors.AsType[*failure](err)
	return ok && (f.reason == kmip.ResultReasonOperationNotSupported || f.reason == kmip.ResultReasonFeatureNotSupported)
}

// seal is encrypt with the KEK in our hands.
func (b *Backend) seal(ctx context.Context, id string, plaintext, aad []byte) ([]byte, error) {
	aead, err := b.export(ctx, id)
	if err != nil {
		return nil, err
	}
	iv := make([]byte, ivSize, ivSize+len(plaintext)+tagSize)
	_, _ = rand.Read(iv)
	return aead.Seal(iv, iv, plaintext, aad), nil
}

// open is decrypt with the KEK in our hands.
func (b *Backend) open(ctx context.Context, id string, c, aad []byte) ([]byte, error) {
	aead, err := b.export(ctx, id)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, c[:ivSize], c[ivSize:], aad)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "the wrapped key does not verify for this ID: it was damaged, or moved from another ID")
	}
	return plaintext, nil
}

// export fetches the KEK, and asks for its state, which Get ignores. What AES
// expanded from it stays in memory until the garbage collector takes it.
func (b *Backend) export(ctx context.Context, id string) (cipher.AEAD, error) {
	items, err := b.pool.do(ctx, askAttributes(id), &payloads.GetRequestPayload{UniqueIdentifier: id, KeyFormatType: kmip.KeyFormatTypeRaw})
	if err != nil {
		return nil, err
	}
	attributes, err := answer[*payloads.GetAttributesResponsePayload](&items[0])
	if err != nil {
		return nil, err
	}
	got, err := answer[*payloads.GetResponsePayload](&items[1])
	if err != nil {
		return nil, err
	}
	material, err := got.SymmetricKey()
	kek := secret.Take(material)
	defer kek.Wipe()
	v := parseVersionOf(id, attributes.Attribute)
	switch {
	case v.state != kmip.StateActive:
		return nil, v.inactive()
	case err != nil || !v.aes256 || kek.Len() != 32:
		return nil, errdefs.Errorf(errdefs.ErrState, "the server gave something else than a raw AES-256 key for %s", id)
	}
	return secret.AEAD(kek, cipher.NewGCM)
}
