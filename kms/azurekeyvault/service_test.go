package azurekeyvault

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/azureconfig"
	"github.com/cryptcsi/cryptcsi/kms"
)

// TestSovereign: a host's service and cloud.
func TestSovereign(t *testing.T) {
	for _, tt := range []struct {
		host, cloud, resource, authority string
		hsm                              bool
	}{
		{"v.vault.azure.net", "", "https://vault.azure.net", "https://login.microsoftonline.com/", false},
		{"V.Vault.Azure.Net", "", "https://vault.azure.net", "https://login.microsoftonline.com/", false},
		{"v.managedhsm.azure.net", "", "https://managedhsm.azure.net", "https://login.microsoftonline.com/", true},
		{"v.vault.azure.cn", "", "https://vault.azure.cn", "https://login.chinacloudapi.cn/", false},
		{"v.managedhsm.azure.cn", "", "https://managedhsm.azure.cn", "https://login.chinacloudapi.cn/", true},
		{"v.vault.usgovcloudapi.net", "", "https://vault.usgovcloudapi.net", "https://login.microsoftonline.us/", false},
		{"v.managedhsm.usgovcloudapi.net", "", "https://managedhsm.usgovcloudapi.net", "https://login.microsoftonline.us/", true},
		{"v.vault.azure.net", "usgov", "https://vault.azure.net", "https://login.microsoftonline.us/", false},
	} {
		u := &url.URL{Scheme: Scheme, Host: tt.host, Path: "/keys/kek"}
		params := map[string]string{"cloud": tt.cloud}
		b, err := parse(u, params)
		if err != nil {
			t.Errorf("%s: %v", tt.host, err)
			continue
		}
		options, err := azureconfig.ClientOptions(params)
		if err != nil || options.Cloud.ActiveDirectoryAuthorityHost != tt.authority {
			t.Errorf("%s: authority %s, %v; want %s", tt.host, options.Cloud.ActiveDirectoryAuthorityHost, err, tt.authority)
		}
		if b.resource != tt.resource || b.hsm() != tt.hsm {
			t.Errorf("%s: resource %s, HSM %v", tt.host, b.resource, b.hsm())
		}
		prefix, keyType := "keys/", azkeys.KeyTypeRSA
		if tt.hsm {
			prefix, keyType = "Microsoft.KeyVault/managedHsm/keys/", azkeys.KeyTypeOctHSM
		}
		if p := b.Permissions()[kms.OpCurrentKeyID]; !strings.HasPrefix(p, prefix) || b.keyType != keyType {
			t.Errorf("%s: permission %s, key type %s", tt.host, p, b.keyType)
		}
	}
}

// TestKeyType: what `kek create` makes.
func TestKeyType(t *testing.T) {
	for _, tt := range []struct {
		host, algorithm, given, want, ops string
		bits                              int32
	}{
		{"v.vault.azure.net", "", "", "RSA", "wrapKey", 3072},
		{"v.vault.azure.net", "", "RSA-HSM", "RSA-HSM", "wrapKey", 3072},
		{"v.managedhsm.azure.net", "", "", "oct-HSM", "encrypt", 256},
		{"v.managedhsm.azure.net", "A256GCM", "", "oct-HSM", "encrypt", 256},
		{"v.managedhsm.azure.net", "A256KW", "", "oct-HSM", "wrapKey", 256},
		{"v.managedhsm.azure.net", "RSA-OAEP-256", "", "RSA-HSM", "wrapKey", 3072},
	} {
		u := &url.URL{Scheme: Scheme, Host: tt.host, Path: "/keys/kek"}
		b, err := parse(u, map[string]string{paramAlgorithm: tt.algorithm, paramKeyType: tt.given})
		if err != nil {
			t.Errorf("%+v: %v", tt, err)
			continue
		}
		p := b.newKey(kms.NewKey{})
		if string(*p.Kty) != tt.want || *p.KeySize != tt.bits || len(p.KeyOps) != 2 || string(*p.KeyOps[0]) != tt.ops {
			t.Errorf("%+v: %s of %d bits for %s", tt, *p.Kty, *p.KeySize, *p.KeyOps[0])
		}
	}
}

// transport answers as a test says.
type transport func(*http.Request) (*http.Response, error)

func (f transport) Do(r *http.Request) (*http.Response, error) { return f(r) }

// TestGuard: what is made of challenges, and where requests may go.
func TestGuard(t *testing.T) {
	const vault = "v.vault.azure.net"
	g := guard{host: vault, resource: "https://vault.azure.net"}
	for challenge, want := range map[string]string{
		`Bearer authorization="https://login.microsoftonline.com/t-1", resource="https://vault.azure.net"`:      `Bearer authorization="https://login/t-1", resource="https://vault.azure.net"`,
		`Bearer authorization="https://login.windows.net/t-1/", scope="https://vault.azure.net/.default"`:       `Bearer authorization="https://login/t-1", resource="https://vault.azure.net"`,
		`Bearer realm="", authorization_uri="https://x/", error="insufficient_claims", claims="eyJhIjoxfQ=="`:   `Bearer error="insufficient_claims", claims="eyJhIjoxfQ=="`,
		`Bearer authorization="https://login.microsoftonline.com/t-1", resource="https://management.azure.com"`: "",
		`Bearer authorization="https://login.microsoftonline.com/t-1", resource="https://azure.net"`:            "",
		`Bearer authorization="https://login.microsoftonline.com/t-1"`:                                          "",
		`Bearer authorization="x", resource="https://vault.azure.net"`:                                          "",
		`Bearer authorization="https://login.microsoftonline.com", resource="https://vault.azure.net"`:          "",
		`Bearer authorization="https://login.microsoftonline.com/t 1", resource="https://vault.azure.net"`:      "",
		`Bearer resource="https://vault.azure.net"`:                                                             "",
		`Bearer error="insufficient_claims", claims="%%%"`:                                                      "",
		`Basic realm="x"`: "",
		"":                "",
	} {
		closed := false
		g.next = transport(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: http.StatusUnauthorized, Body: closer{closed: &closed}, Header: http.Header{"Www-Authenticate": {challenge}}}, nil
		})
		got, err := get(t, &g, "https://"+vault+"/keys/kek")
		if err != nil {
			var never interface{ NonRetriable() }
			if want != "" || errdefs.Class(err) == nil || !errors.As(err, &never) || !closed {
				t.Errorf("%s: %v, closed %v; want %q", challenge, err, closed, want)
			}
			continue
		}
		if got != want {
			t.Errorf("%s: %q, want %q", challenge, got, want)
		}
	}
	g.next = transport(func(*http.Request) (*http.Response, error) { return nil, errors.New("was sent") })
	for _, elsewhere := range []string{"https://evil.example.com/keys", "http://" + vault + "/keys", "https://" + vault + ":444/keys", "https://" + vault + ".evil/keys"} {
		if _, err := get(t, &g, elsewhere); !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("a request to %s: %v", elsewhere, err)
		}
	}
}

type closer struct{ closed *bool }

func (closer) Read([]byte) (int, error) { return 0, io.EOF }
func (c closer) Close() error           { *c.closed = true; return nil }

// get returns the challenge that comes through.
func get(t *testing.T, g *guard, to string) (string, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, to, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := g.Do(r)
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	return resp.Header.Get("WWW-Authenticate"), nil
}

// TestFail: statuses and their classes; nothing is shown at length.
func TestFail(t *testing.T) {
	for status, want := range map[int]error{
		302: errdefs.ErrUnavailable, 400: errdefs.ErrCorrupt, 401: errdefs.ErrDenied, 403: errdefs.ErrDenied, 404: errdefs.ErrNotFound,
		408: errdefs.ErrUnavailable, 409: errdefs.ErrExists, 429: errdefs.ErrUnavailable, 500: errdefs.ErrUnavailable, 503: errdefs.ErrUnavailable,
	} {
		body := `{"error":{"code":"Code","message":"` + strings.Repeat(`long\n`, 1<<15) + `","innererror":{"code":"Inner"}}}`
		resp := &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(body))}
		err := fail(fmt.Errorf("in between: %w", &azcore.ResponseError{StatusCode: status, ErrorCode: "Code", RawResponse: resp}), errdefs.ErrCorrupt)
		if !errors.Is(err, want) || len(err.Error()) > 1000 || strings.Contains(err.Error(), "\n") {
			t.Errorf("%d: %.200v, want %v", status, err, want)
		}
	}
	kept := errdefs.Errorf(errdefs.ErrState, "kept")
	if err := fail(final{kept}, errdefs.ErrCorrupt); !errors.Is(err, errdefs.ErrState) {
		t.Errorf("%v", err)
	}
	if err := fail(io.ErrUnexpectedEOF, errdefs.ErrCorrupt); !errors.Is(err, errdefs.ErrUnavailable) || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v", err)
	}
	if fail(nil, errdefs.ErrCorrupt) != nil {
		t.Error("an error out of none")
	}
}

// TestPeriod: rotation policies as others write them.
func TestPeriod(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"P90D": 90 * day, "P1Y": 365 * day, "P18M": 540 * day, "P1Y2M3D": 428 * day, "P": 0, "": 0, "PT1H": 0, "90": 0, "P-1D": 0, "P999999D": 0,
	} {
		if got := duration(s); got != want {
			t.Errorf("duration(%q) = %v, want %v", s, got, want)
		}
	}
	action := func(kind azkeys.KeyRotationPolicyAction, after, before string) *azkeys.LifetimeAction {
		a := &azkeys.LifetimeAction{Action: &azkeys.LifetimeActionType{Type: &kind}, Trigger: &azkeys.LifetimeActionTrigger{}}
		if after != "" {
			a.Trigger.TimeAfterCreate = &after
		}
		if before != "" {
			a.Trigger.TimeBeforeExpiry = &before
		}
		return a
	}
	year := "P1Y"
	for i, tt := range []struct {
		policy azkeys.KeyRotationPolicy
		want   time.Duration
	}{
		{azkeys.KeyRotationPolicy{}, 0},
		{azkeys.KeyRotationPolicy{LifetimeActions: []*azkeys.LifetimeAction{nil, {}, action("Notify", "P10D", "")}}, 0},
		{azkeys.KeyRotationPolicy{LifetimeActions: []*azkeys.LifetimeAction{action("Notify", "", "P30D"), action("rotate", "P90D", "")}}, 90 * day},
		{azkeys.KeyRotationPolicy{LifetimeActions: []*azkeys.LifetimeAction{action("Rotate", "", "P30D")}, Attributes: &azkeys.KeyRotationPolicyAttributes{ExpiryTime: &year}}, 335 * day},
		{azkeys.KeyRotationPolicy{LifetimeActions: []*azkeys.LifetimeAction{action("Rotate", "", "P30D")}}, 0},
	} {
		if got := period(tt.policy); got != tt.want {
			t.Errorf("policy %d: %v, want %v", i, got, tt.want)
		}
	}
}
