// Package gcpckms is a KEK in Google Cloud KMS: a symmetric CryptoKey, with
// any protection level (software, HSM, external).
//
// # URI
//
//	gcpckms://projects/P/locations/L/keyRings/R/cryptoKeys/K
//
// names the CryptoKey, with the project by its ID (not its number). Parameters:
//
//	credentials-file  a JSON file, see below
//	endpoint          host:port instead of cloudkms.googleapis.com:443 (Private
//	                  Service Connect, a proxy); http://ADDRESS:PORT talks
//	                  plaintext and sends no credentials, to loopback
//	                  addresses only (emulators)
//	ca-file           PEM certificates to trust instead of the system's
//
// # Wrapping
//
// Encrypt with the ID as additional authenticated data. The service verifies
// the CRC32C of what it got and says so, and the CRC32C of what it answers is
// checked; where one is wrong nothing is used and the error is ErrUnavailable.
// The key ID is the full name of the CryptoKeyVersion. Decrypt always goes to
// the URI's CryptoKey, which finds the version in the ciphertext; a record
// that names a version of another key is refused before the service is asked.
//
// # Credentials
//
// credentials-file, or else application default credentials: the file that
// GOOGLE_APPLICATION_CREDENTIALS names, gcloud's own
// (~/.config/gcloud/application_default_credentials.json), or the service
// account that the metadata server of a VM or of GKE answers for. A file is of
// type service_account, external_account (workload identity federation; its
// credential_source may be a file, a URL or AWS, but no program to run),
// impersonated_service_account or authorized_user. It is read again for every
// new access token, hourly at the latest, and so is the token file that it may
// name: both can rotate. HTTPS_PROXY and NO_PROXY are obeyed.
//
// # Permissions
//
// Serving needs, on the CryptoKey,
//
//	cloudkms.cryptoKeyVersions.useToEncrypt  to wrap
//	cloudkms.cryptoKeyVersions.useToDecrypt  to unwrap
//	cloudkms.cryptoKeys.get                  to ask which version is current
//
// of which the role cloudkms.cryptoKeyEncrypterDecrypter holds the first two
// and cloudkms.viewer the third. Managing needs, in the order of the
// operations:
//
//	create       cloudkms.cryptoKeys.create (on the key ring),
//	             cloudkms.cryptoKeys.get, cloudkms.cryptoKeyVersions.list,
//	             cloudkms.cryptoKeys.getIamPolicy, cloudkms.cryptoKeys.setIamPolicy
//	describe     cloudkms.cryptoKeys.get, cloudkms.cryptoKeyVersions.list
//	rotate       cloudkms.cryptoKeyVersions.create, cloudkms.cryptoKeys.update,
//	             cloudkms.cryptoKeyVersions.list
//	set-version  cloudkms.cryptoKeys.get, cloudkms.cryptoKeyVersions.list,
//	             cloudkms.cryptoKeyVersions.update, .destroy and .restore, and
//	             for a whole key cloudkms.cryptoKeys.update
//	list         cloudkms.cryptoKeys.list (on the key ring), cloudkms.cryptoKeyVersions.list
//	label        cloudkms.cryptoKeys.get, cloudkms.cryptoKeys.update
//
// Create makes the key, not its key ring (`gcloud kms keyrings create`), and
// gives the key an IAM policy: what kms.NewKey.Policy says, version 3 JSON, or
//
//	{"version": 3, "bindings": [
//	  {"role": "roles/cloudkms.cryptoKeyEncrypterDecrypter", "members": ["serviceAccount:EMAIL"]},
//	  {"role": "roles/cloudkms.viewer", "members": ["serviceAccount:EMAIL"]}]}
//
// for the service account that the credentials belong to. A policy without
// bindings leaves the key to what it inherits from key ring and project. A key
// that has bindings already keeps them.
//
// # Rotation
//
// Rotate makes a version and then makes it the primary one; a rotation period
// lets the service do both. Older versions unwrap for as long as they are
// enabled. Cloud KMS takes about a minute, and up to three hours, until a new
// primary version is used everywhere and until a disabled version is refused
// everywhere; every wrapped key names the version that really wrapped it. A
// destroyed version stays in "destroying" for 30 days (the key's
// destroy_scheduled_duration) and can be enabled again until then. Whole keys
// and their names cannot be deleted. Switching a whole key off (disable,
// destroy) also ends its automatic rotation, which enabling does not start again.
//
// # Audit
//
// Cloud Audit Logs: administration always, Encrypt and Decrypt where data
// access logs are switched on for Cloud KMS. They name caller, key and version,
// not the additional authenticated data.
package gcpckms

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"hash/crc32"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"time"

	kmsapi "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/gcpconfig"
	"github.com/cryptcsi/cryptcsi/kms"
)

const (
	// Scheme of the URI.
	Scheme = "gcpckms"
	// Mechanism of every wrapped key.
	Mechanism = "google-symmetric-encryption"

	paramEndpoint, paramCA = "endpoint", "ca-file"

	maxAnswer = 4 << 20  // of one call, in bytes: a page of a list is far smaller
	maxHeader = 64 << 10 // of its metadata
)

// keyPath is the path of a CryptoKey below "projects/".
var keyPath = regexp.MustCompile(`^/[a-z][a-z0-9.:-]*/locations/[a-z0-9-]+/keyRings/[A-Za-z0-9_-]{1,63}/cryptoKeys/[A-Za-z0-9_-]{1,63}$`)

// Backend is a kms.Backend, kms.Manager, kms.Fleet and kms.Permitter. It has
// one connection, which is made by the first call.
type Backend struct {
	client *kmsapi.KeyManagementClient
	key    string // the CryptoKey's resource name
	where  string // what of the URI's query belongs into kms.Key.URI
	caller gcpconfig.Caller
	tokens *gcpconfig.Tokens // nil over plaintext
}

// Open is the kms.Opener. It reads the files and does not call the service.
func Open(ctx context.Context, u *url.URL) (kms.Backend, error) {
	params, err := kms.Params(u, gcpconfig.ParamFile, paramEndpoint, paramCA)
	if err != nil {
		return nil, err
	}
	if u.Host != "projects" || !keyPath.MatchString(u.Path) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid,
			"the URI must name a CryptoKey, its project by ID and without a version: %s://projects/P/locations/L/keyRings/R/cryptoKeys/K", Scheme)
	}
	b := &Backend{key: u.Host + u.Path, where: query(params, paramEndpoint, paramCA)}
	if b.caller, err = gcpconfig.FindCaller(params[gcpconfig.ParamFile]); err != nil {
		return nil, err
	}
	target, security, err := b.transport(params[paramEndpoint], params[paramCA])
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(target, append(security,
		grpc.WithDisableServiceConfig(), // which DNS would answer
		grpc.WithDisableRetry(),
		grpc.WithMaxHeaderListSize(maxHeader),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		// A service that comes back is found within seconds, and a
		// connection that no longer answers is given up.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: time.Minute, Timeout: 10 * time.Second}),
	)...)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the endpoint: %w", err)
	}
	// The SDK's own logger prints requests, plaintexts included, where the
	// environment says so.
	b.client, err = kmsapi.NewKeyManagementClient(ctx, option.WithGRPCConn(conn), option.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		_ = conn.Close()
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	b.client.CallOptions = &kmsapi.KeyManagementCallOptions{} // no retries: the caller has its own
	return b, nil
}

// query is a URI's query of those parameters that are there.
func query(params map[string]string, names ...string) string {
	sep, q := "?", ""
	for _, name := range names {
		if v, ok := params[name]; ok {
			q += sep + name + "=" + strings.ReplaceAll(url.QueryEscape(v), "+", "%20")
			sep = "&"
		}
	}
	return q
}

// transport returns where to connect to and how.
func (b *Backend) transport(endpoint, caFile string) (target string, security []grpc.DialOption, err error) {
	if plain, ok := strings.CutPrefix(endpoint, "http://"); ok {
		addr, err := netip.ParseAddrPort(plain)
		switch {
		case err != nil || !addr.Addr().IsLoopback():
			return "", nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q: plaintext (http://) goes to a loopback address with a port only, like http://127.0.0.1:8080", paramEndpoint)
		case caFile != "":
			return "", nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q makes no sense with a plaintext %s", paramCA, paramEndpoint)
		}
		return "passthrough:///" + plain, []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, nil
	}
	if endpoint == "" {
		endpoint = "cloudkms." + b.caller.Universe() + ":443"
	}
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil || host == "" || port == "" || strings.ContainsAny(endpoint, "/?#") {
		return "", nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be host:port, or http:// and a loopback address with a port", paramEndpoint)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		if config.RootCAs, err = readCA(caFile); err != nil {
			return "", nil, err
		}
	}
	if b.tokens, err = b.caller.Tokens(gcpconfig.Need{Scopes: kmsapi.DefaultAuthScopes(), SelfSigned: true}); err != nil {
		return "", nil, err
	}
	return "dns:///" + endpoint, []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithPerRPCCredentials(perCall{b.tokens}),
	}, nil
}

func readCA(file string) (*x509.CertPool, error) {
	data, err := gcpconfig.ReadFile(paramCA, file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the %s %s holds no certificate (PEM)", paramCA, file)
	}
	return pool, nil
}

// perCall is credentials.PerRPCCredentials: an access token with every call.
type perCall struct{ *gcpconfig.Tokens }

// RequireTransportSecurity keeps tokens off plaintext connections.
func (perCall) RequireTransportSecurity() bool { return true }

// GetRequestMetadata returns the headers of a call. Its errors are gRPC's.
func (p perCall) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	headers, err := p.Headers(ctx)
	switch {
	case errors.Is(err, errdefs.ErrDenied):
		return nil, status.Error(codes.PermissionDenied, err.Error())
	case err != nil:
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return headers, nil
}

// Wrap encrypts under the primary version.
func (b *Backend) Wrap(ctx context.Context, plaintext, aad []byte) (kms.Wrapped, error) {
	resp, err := b.client.Encrypt(ctx, &kmspb.EncryptRequest{
		Name: b.key, Plaintext: plaintext, AdditionalAuthenticatedData: aad,
		PlaintextCrc32C: checksum(plaintext), AdditionalAuthenticatedDataCrc32C: checksum(aad),
	})
	switch {
	case err != nil:
		return kms.Wrapped{}, b.fault(ctx, err, serving(errdefs.ErrInvalid))
	case !resp.GetVerifiedPlaintextCrc32C() || !resp.GetVerifiedAdditionalAuthenticatedDataCrc32C():
		return kms.Wrapped{}, damaged("the service did not verify what it was sent")
	case !matches(resp.GetCiphertext(), resp.GetCiphertextCrc32C()):
		return kms.Wrapped{}, damaged("the ciphertext is not what the service sent")
	case !b.mine(resp.GetName()):
		return kms.Wrapped{}, errdefs.Errorf(errdefs.ErrState, "the service encrypted under %.200q, which is no version of this key", resp.GetName())
	}
	return kms.Wrapped{Ciphertext: resp.GetCiphertext(), KeyID: resp.GetName(), Mechanism: Mechanism}, nil
}

// Unwrap decrypts with the URI's key.
func (b *Backend) Unwrap(ctx context.Context, w kms.Wrapped, aad []byte) ([]byte, error) {
	if w.Mechanism != Mechanism {
		return nil, errdefs.Errorf(errdefs.ErrCorrupt, "mechanism %.64q is not %s", w.Mechanism, Mechanism)
	}
	if !b.mine(w.KeyID) {
		return nil, errdefs.Errorf(errdefs.ErrDenied, "the key was wrapped under %.300q, which is no version of this KEK: configure that one too, or rewrap", w.KeyID)
	}
	resp, err := b.client.Decrypt(ctx, &kmspb.DecryptRequest{
		Name: b.key, Ciphertext: w.Ciphertext, AdditionalAuthenticatedData: aad,
		CiphertextCrc32C: checksum(w.Ciphertext), AdditionalAuthenticatedDataCrc32C: checksum(aad),
	})
	switch {
	case err != nil:
		return nil, b.fault(ctx, err, serving(errdefs.ErrCorrupt))
	case !matches(resp.GetPlaintext(), resp.GetPlaintextCrc32C()):
		clear(resp.GetPlaintext())
		return nil, damaged("the plaintext is not what the service sent")
	}
	return resp.GetPlaintext(), nil
}

// CurrentKeyID returns the name of the primary version.
func (b *Backend) CurrentKeyID(ctx context.Context) (string, error) {
	key, err := b.client.GetCryptoKey(ctx, &kmspb.GetCryptoKeyRequest{Name: b.key})
	if err != nil {
		return "", b.fault(ctx, err, serving(errdefs.ErrInvalid))
	}
	primary := key.GetPrimary()
	switch {
	case key.GetPurpose() != kmspb.CryptoKey_ENCRYPT_DECRYPT:
		return "", errdefs.Errorf(errdefs.ErrInvalid, "the key's purpose is %v, must be %v", key.GetPurpose(), kmspb.CryptoKey_ENCRYPT_DECRYPT)
	case !b.mine(primary.GetName()):
		return "", errdefs.Errorf(errdefs.ErrState, "the key has no primary version: rotate it")
	case primary.GetState() != kmspb.CryptoKeyVersion_ENABLED:
		return "", errdefs.Errorf(errdefs.ErrDenied, "the primary version %s is %v: enable it, or rotate the key", primary.GetName(), primary.GetState())
	}
	return primary.GetName(), nil
}

// Close closes the connection.
func (b *Backend) Close() error { return b.client.Close() }

// mine says whether name is that of a version of the URI's key.
func (b *Backend) mine(name string) bool {
	version, ok := strings.CutPrefix(name, b.key+"/cryptoKeyVersions/")
	return ok && version != "" && len(version) < 20 && strings.Trim(version, "0123456789") == ""
}

func crc(data []byte) int64 { return int64(crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))) }

func checksum(data []byte) *wrapperspb.Int64Value { return wrapperspb.Int64(crc(data)) }

// matches demands that the checksum is there.
func matches(data []byte, sum *wrapperspb.Int64Value) bool {
	return sum != nil && sum.GetValue() == crc(data)
}

func damaged(what string) error {
	return errdefs.Errorf(errdefs.ErrUnavailable, "%s (CRC32C): something on the way damages data; nothing of it was used", what)
}

// classes say what a refusal means for one kind of call.
type classes struct {
	argument error // InvalidArgument
	state    error // FailedPrecondition
}

// serving: a key that is not enabled is a refusal.
func serving(argument error) classes { return classes{argument: argument, state: errdefs.ErrDenied} }

// managing: it is what an operator has to look at.
func managing() classes { return classes{argument: errdefs.ErrInvalid, state: errdefs.ErrState} }

// fault gives the service's error its class.
func (b *Backend) fault(ctx context.Context, err error, c classes) error {
	if ctx.Err() != nil {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w (%s)", ctx.Err(), brief(err))
	}
	switch text := brief(err); status.Code(err) {
	case codes.PermissionDenied:
		return errdefs.Errorf(errdefs.ErrDenied, "%s", text)
	case codes.Unauthenticated:
		if b.tokens != nil {
			b.tokens.Forget()
		}
		return errdefs.Errorf(errdefs.ErrDenied, "credentials from %s: %s", b.caller, text)
	case codes.NotFound:
		return errdefs.Errorf(errdefs.ErrNotFound, "%s", text)
	case codes.AlreadyExists:
		return errdefs.Errorf(errdefs.ErrExists, "%s", text)
	case codes.FailedPrecondition:
		return errdefs.Errorf(c.state, "%s", text)
	case codes.InvalidArgument:
		if strings.Contains(strings.ToLower(text), "crc32c") { // it got something else than we sent
			return damaged(text)
		}
		return errdefs.Errorf(c.argument, "%s", text)
	default:
		return errdefs.Errorf(errdefs.ErrUnavailable, "%s", text)
	}
}

// brief is the message of an error from outside, bounded and on one line.
func brief(err error) string {
	text := err.Error()
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		text = s.GRPCStatus().Message()
	}
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "?")), " ")
	if r := []rune(text); len(r) > 600 {
		text = string(r[:600]) + "…"
	}
	return text
}
