package azureconfig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

// maxTokenAnswer bounds one answer of the token service, in bytes.
const maxTokenAnswer = 1 << 20

// Credential returns what proves who we are:
//
//   - with client-secret-file, client-certificate-file or token-file: the
//     application that tenant-id and client-id name (the two may come from
//     AZURE_TENANT_ID and AZURE_CLIENT_ID for token-file)
//   - with client-id alone: workload identity where AZURE_FEDERATED_TOKEN_FILE
//     is set, else that managed identity
//   - else Azure's default chain: environment, workload identity, managed
//     identity, command line tools
//
// o are ClientOptions' for the same parameters. ErrInvalid where something is
// missing or a file cannot be read; no call is made. Its GetToken answers
// ErrUnavailable where the token service was not reached or is overloaded, and
// ErrDenied where there is nothing to prove it with or it was refused.
//
// Each token is asked for anew and the files are read for it, so that a rotated
// secret, or a token that the service does not take any more, needs no restart:
// the clients themselves keep tokens until shortly before they expire. (Azure's
// library keeps those of managed identities, whoever asks.)
func Credential(p map[string]string, o azcore.ClientOptions) (azcore.TokenCredential, error) {
	if o.Transport == nil {
		client, err := httpClient(p[caFile])
		if err != nil {
			return nil, err
		}
		o.Transport = client
	}
	source, err := sourceOf(p)
	if err != nil {
		return nil, err
	}
	if _, err := source.open(o); err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "credentials from %s: %w", source.name, err)
	}
	return &credential{source: source, options: o}, nil
}

// source is one kind of credential: its name in messages, and how to make it,
// which reads its files.
type source struct {
	name string
	open func(azcore.ClientOptions) (azcore.TokenCredential, error)
}

// sourceOf chooses by the parameters.
func sourceOf(p map[string]string) (source, error) {
	var given []string
	for _, name := range []string{secretFile, certificateFile, tokenFile} {
		if p[name] != "" {
			given = append(given, name)
		}
	}
	switch {
	case len(given) > 1:
		return source{}, errdefs.Errorf(errdefs.ErrInvalid, "URI parameters %s: give one of them", strings.Join(given, " and "))
	case len(given) == 1 && given[0] != tokenFile && (p[tenantID] == "" || p[clientID] == ""):
		return source{}, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q needs %q and %q too", given[0], tenantID, clientID)
	case p[secretFile] != "":
		return clientSecret(p), nil
	case p[certificateFile] != "":
		return clientCertificate(p), nil
	case p[tokenFile] != "" || p[clientID] != "" && os.Getenv("AZURE_FEDERATED_TOKEN_FILE") != "":
		return workloadIdentity(p), nil
	case p[clientID] != "":
		return managedIdentity(p), nil
	}
	return defaultChain(p), nil
}

// private says that the token service is not one that Azure's own list knows,
// so that the list is not asked for it.
func private(p map[string]string) bool { return p[authorityHost] != "" }

func clientSecret(p map[string]string) source {
	return source{"the client secret in " + p[secretFile], func(o azcore.ClientOptions) (azcore.TokenCredential, error) {
		b, err := readFile(p[secretFile])
		if err != nil {
			return nil, err
		}
		defer clear(b)
		return azidentity.NewClientSecretCredential(p[tenantID], p[clientID], strings.TrimSpace(string(b)),
			&azidentity.ClientSecretCredentialOptions{ClientOptions: o, DisableInstanceDiscovery: private(p)})
	}}
}

func clientCertificate(p map[string]string) source {
	return source{"the client certificate in " + p[certificateFile], func(o azcore.ClientOptions) (azcore.TokenCredential, error) {
		b, err := readFile(p[certificateFile])
		if err != nil {
			return nil, err
		}
		defer clear(b)
		certs, key, err := azidentity.ParseCertificates(b, nil)
		if err != nil {
			return nil, fmt.Errorf("the file must hold a certificate and its key, PEM or PFX without a password: %w", err)
		}
		return azidentity.NewClientCertificateCredential(p[tenantID], p[clientID], certs, key,
			&azidentity.ClientCertificateCredentialOptions{ClientOptions: o, DisableInstanceDiscovery: private(p)})
	}}
}

func workloadIdentity(p map[string]string) source {
	name := "workload identity (token-file)"
	if p[tokenFile] == "" {
		name = "workload identity (AZURE_FEDERATED_TOKEN_FILE)"
	}
	return source{name, func(o azcore.ClientOptions) (azcore.TokenCredential, error) {
		if p[tokenFile] != "" {
			b, err := readFile(p[tokenFile]) // the library reads it when it is too late to say so
			if err != nil {
				return nil, err
			}
			clear(b)
		}
		return azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: o, DisableInstanceDiscovery: private(p),
			TenantID: p[tenantID], ClientID: p[clientID], TokenFilePath: p[tokenFile],
		})
	}}
}

func managedIdentity(p map[string]string) source {
	return source{"managed identity " + p[clientID], func(o azcore.ClientOptions) (azcore.TokenCredential, error) {
		return azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{ClientOptions: o, ID: azidentity.ClientID(p[clientID])})
	}}
}

func defaultChain(p map[string]string) source {
	const name = "Azure's default chain (environment, workload identity, managed identity, command line tools)"
	return source{name, func(o azcore.ClientOptions) (azcore.TokenCredential, error) {
		return azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
			ClientOptions: o, DisableInstanceDiscovery: private(p), TenantID: p[tenantID],
		})
	}}
}

// credential is an azcore.TokenCredential.
type credential struct {
	source  source
	options azcore.ClientOptions
}

// GetToken is part of azcore.TokenCredential.
func (c *credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	seen := &watch{next: Bounded(c.options.Transport, maxTokenAnswer)}
	options := c.options
	options.Transport = seen
	cred, err := c.source.open(options)
	if err != nil {
		return azcore.AccessToken{}, errdefs.Errorf(errdefs.ErrDenied, "credentials from %s: %w", c.source.name, err)
	}
	token, err := cred.GetToken(ctx, o)
	switch trouble := seen.trouble(); {
	case err == nil:
		return token, nil
	case ctx.Err() != nil:
		return azcore.AccessToken{}, errdefs.Errorf(errdefs.ErrUnavailable, "waiting for a token with %s: %w", c.source.name, ctx.Err())
	case trouble != nil:
		return azcore.AccessToken{}, errdefs.Errorf(errdefs.ErrUnavailable, "no token with %s: %w", c.source.name, trouble)
	}
	return azcore.AccessToken{}, errdefs.Errorf(errdefs.ErrDenied, "no token with %s: %s", c.source.name, words(err))
}

// watch is a transport that remembers whether the last call failed for want of
// a service: the credentials' own errors do not tell.
type watch struct {
	next policy.Transporter

	mu   sync.Mutex
	last error
}

// Do is part of policy.Transporter.
func (w *watch) Do(r *http.Request) (*http.Response, error) {
	resp, err := w.next.Do(r)
	last := err
	if err == nil && (resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= http.StatusInternalServerError) {
		last = fmt.Errorf("%s answered %d", r.URL.Host, resp.StatusCode)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = last
	return resp, err
}

func (w *watch) trouble() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// words is what a person needs of a credential's error, on one line.
func words(err error) string {
	text := err.Error()
	if failed, ok := errors.AsType[*azidentity.AuthenticationFailedError](err); ok && failed.RawResponse != nil {
		var answer struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}
		if body, err := runtime.Payload(failed.RawResponse); err == nil && json.Unmarshal(body, &answer) == nil {
			text = fmt.Sprintf("the token service answered %d %s: %s", failed.RawResponse.StatusCode, answer.Error, answer.Description)
		}
	}
	text = strings.Join(strings.Fields(text), " ")
	return fmt.Sprintf("%.1500s", text)
}
