package azurekeyvault

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/azureconfig"
)

// The URI parameters that are this package's own.
const (
	paramAlgorithm  = "algorithm"
	paramResource   = "resource"
	paramFormerHost = "former-host"
	paramKeyType    = "key-type"
)

// maxAnswer bounds one answer of the service, in bytes.
const maxAnswer = 1 << 20

var (
	keyName        = regexp.MustCompile(`^[0-9A-Za-z-]{1,127}$`)
	challengeValue = regexp.MustCompile(`(\w+)="([^"]*)"`)
	tenantURL      = regexp.MustCompile(`^https://[^/\s"]+/([0-9A-Za-z.-]+)/?$`)
)

// parse reads what the URI says of the key, and adds the cloud to params where
// only the host tells it.
func parse(u *url.URL, params map[string]string) (*Backend, error) {
	b := &Backend{host: strings.ToLower(u.Host), resource: params[paramResource], formerHost: params[paramFormerHost]}
	name, ok := strings.CutPrefix(u.Path, "/keys/")
	if !ok || u.Host == "" || !keyName.MatchString(name) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the URI must name a vault and a key, without a version: azurekeyvault://<vault>.vault.azure.net/keys/<name>")
	}
	b.name = name
	if b.resource == "" {
		if b.resource = serviceOf(b.host); b.resource == "" {
			return nil, errdefs.Errorf(errdefs.ErrInvalid, "host %s is none of Azure's: if a vault is behind it, give the audience of its tokens as URI parameter %q, like https://vault.azure.net or https://managedhsm.azure.net",
				u.Host, paramResource)
		}
	}
	if r, err := url.Parse(b.resource); err != nil || r.Scheme != "https" || r.Host == "" || "https://"+r.Host != b.resource {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be like https://vault.azure.net", paramResource)
	}
	b.algorithm = azkeys.EncryptionAlgorithm(params[paramAlgorithm])
	b.fixed = b.algorithm != ""
	if b.fixed && mechanisms[b.algorithm] == "" {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is %.32q, must be RSA-OAEP-256, A256GCM or A256KW", paramAlgorithm, b.algorithm)
	}
	b.keyType = b.typeFor(azkeys.KeyType(params[paramKeyType]))
	isRSA := b.keyType == azkeys.KeyTypeRSA || b.keyType == azkeys.KeyTypeRSAHSM
	if !isRSA && b.keyType != azkeys.KeyTypeOctHSM {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is %.32q, must be RSA, RSA-HSM or oct-HSM", paramKeyType, b.keyType)
	}
	if b.fixed && isRSA != (b.algorithm == azkeys.EncryptionAlgorithmRSAOAEP256) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "algorithm %s does not go with keys of type %s", b.algorithm, b.keyType)
	}
	b.shown = shown(params, paramAlgorithm, paramResource, paramFormerHost, "cloud")
	if params["cloud"] == "" {
		params["cloud"] = azureconfig.CloudOf(u.Hostname())
	}
	return b, nil
}

// typeFor returns the type of keys to make: what is given, or what suits
// service and algorithm.
func (b *Backend) typeFor(given azkeys.KeyType) azkeys.KeyType {
	switch {
	case given != "":
		return given
	case b.algorithm == azkeys.EncryptionAlgorithmA256GCM || b.algorithm == azkeys.EncryptionAlgorithmA256KW:
		return azkeys.KeyTypeOctHSM
	case !b.hsm():
		return azkeys.KeyTypeRSA
	case b.algorithm == azkeys.EncryptionAlgorithmRSAOAEP256:
		return azkeys.KeyTypeRSAHSM
	}
	return azkeys.KeyTypeOctHSM
}

// shown returns the query of a URI with those of the parameters that are given.
func shown(params map[string]string, names ...string) string {
	var given []string
	for _, name := range names {
		if params[name] != "" {
			given = append(given, name+"="+url.QueryEscape(params[name]))
		}
	}
	if len(given) == 0 {
		return ""
	}
	return "?" + strings.Join(given, "&")
}

// hsm tells whether the service is a Managed HSM.
func (b *Backend) hsm() bool { return strings.HasPrefix(b.resource, "https://managedhsm.") }

// serviceOf returns the audience of the service that a host of Azure's belongs
// to, empty for other hosts.
func serviceOf(host string) string {
	for _, service := range []string{
		"vault.azure.net", "managedhsm.azure.net", "vault.azure.cn", "managedhsm.azure.cn", "vault.usgovcloudapi.net", "managedhsm.usgovcloudapi.net",
	} {
		if name, ok := strings.CutSuffix(host, "."+service); ok && name != "" && !strings.Contains(name, ".") {
			return "https://" + service
		}
	}
	return ""
}

// guard is a transport that keeps tokens and keys where they belong: no request
// goes to another host (a next page's address is the service's word), and a
// challenge may ask for a token of the configured audience only.
type guard struct {
	next     policy.Transporter
	host     string
	resource string
}

// Do is part of policy.Transporter.
func (g *guard) Do(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" || !strings.EqualFold(r.URL.Host, g.host) {
		return nil, final{errdefs.Errorf(errdefs.ErrDenied, "the service sends us to another host, %.200q: not followed", r.URL.Host)}
	}
	resp, err := g.next.Do(r)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	challenge, err := g.check(strings.Join(resp.Header.Values("WWW-Authenticate"), ", "))
	if err != nil {
		_ = resp.Body.Close() // nothing of it is read
		return nil, final{err}
	}
	resp.Header.Set("WWW-Authenticate", challenge)
	return resp, nil
}

// check returns the challenge as the SDK reads it safely: with a tenant, and
// with our audience or claims and nothing else.
func (g *guard) check(challenge string) (string, error) {
	values := map[string]string{}
	for _, m := range challengeValue.FindAllStringSubmatch(challenge, -1) {
		values[m[1]] = m[2]
	}
	if claims := values["claims"]; claims != "" && values["error"] == "insufficient_claims" {
		if _, err := base64.StdEncoding.DecodeString(claims); err == nil {
			return fmt.Sprintf(`Bearer error="insufficient_claims", claims="%s"`, claims), nil
		}
	}
	audience := values["resource"]
	if audience == "" {
		audience = strings.TrimSuffix(values["scope"], "/.default")
	}
	if strings.TrimSuffix(audience, "/") != g.resource {
		return "", errdefs.Errorf(errdefs.ErrDenied, "%s wants a token for %.200q, and this vault's are for %s: is that host the vault? (URI parameter %q)",
			g.host, audience, g.resource, paramResource)
	}
	m := tenantURL.FindStringSubmatch(values["authorization"])
	if m == nil {
		return "", errdefs.Errorf(errdefs.ErrState, "%s names no tenant in its challenge: is that host a vault?", g.host)
	}
	return fmt.Sprintf(`Bearer authorization="https://login/%s", resource="%s"`, m[1], g.resource), nil
}

// final is an error that the SDK does not try again.
type final struct{ error }

// NonRetriable is part of the SDK's interface.
func (final) NonRetriable() {}

// Unwrap is part of errors.Unwrap's contract.
func (f final) Unwrap() error { return f.error }

// fail returns an error of the SDK with its class. refused is the class of a
// request that the service calls bad.
func fail(err, refused error) error {
	if err == nil || errdefs.Class(err) != nil {
		return err
	}
	answer, ok := errors.AsType[*azcore.ResponseError](err)
	if !ok {
		return errdefs.Errorf(errdefs.ErrUnavailable, "%w", err)
	}
	class, hint := errdefs.ErrUnavailable, ""
	switch answer.StatusCode {
	case http.StatusBadRequest:
		class = refused
	case http.StatusUnauthorized, http.StatusForbidden:
		class = errdefs.ErrDenied
	case http.StatusNotFound:
		class, hint = errdefs.ErrNotFound, " (is the key's name right? `key-service kek create` makes it)"
	case http.StatusConflict:
		class = errdefs.ErrExists
	}
	return errdefs.Errorf(class, "the service answered %d %.64s: %s%s", answer.StatusCode, answer.ErrorCode, message(answer), hint)
}

// message returns the service's words, on one line.
func message(answer *azcore.ResponseError) string {
	var body struct {
		Error struct {
			Message string `json:"message"`
			Inner   struct {
				Code string `json:"code"`
			} `json:"innererror"`
		} `json:"error"`
	}
	if answer.RawResponse == nil {
		return "nothing more"
	}
	b, err := runtime.Payload(answer.RawResponse)
	if err != nil || json.Unmarshal(b, &body) != nil || body.Error.Message == "" {
		return "nothing that Key Vault would say: is that host the vault?"
	}
	text := strings.Join(strings.Fields(body.Error.Message), " ")
	if body.Error.Inner.Code != "" {
		text += " (" + body.Error.Inner.Code + ")"
	}
	return fmt.Sprintf("%.800s", text)
}
