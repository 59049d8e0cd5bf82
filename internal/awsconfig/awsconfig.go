// Package awsconfig is what the clients of AWS services have in common: where
// credentials and region come from, retries, bounds, and which class an error
// of AWS has.
//
// # Credentials
//
// Nothing of them stands in a URI. Without a parameter they come from the
// SDK's own chain: environment, shared files, web identity (IRSA), container
// (EKS Pod Identity) and instance metadata. A parameter wins over the environment:
//
//	profile                   a profile of the shared files
//	credentials-file          a shared-credentials file with an access key in
//	                          the profile (default: default); read again every minute
//	web-identity-token-file   a token that role-arn is assumed with; read again
//	                          whenever the role's credentials expire
//	role-arn                  a role that is assumed, with that token or else
//	                          with the credentials found otherwise
package awsconfig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/arn"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/cryptcsi/cryptcsi/errdefs"
)

const (
	region           = "region"
	endpoint         = "endpoint"
	profile          = "profile"
	credentialsFile  = "credentials-file"
	roleARN          = "role-arn"
	webIdentityToken = "web-identity-token-file"

	// maxAttempts and maxBackoff bound what a client does before it reports
	// an error; ctx may end it earlier.
	maxAttempts = 3
	maxBackoff  = 300 * time.Millisecond
	// credentialsTimeout bounds one request for credentials.
	credentialsTimeout = 10 * time.Second
	// maxResponse is the longest answer that is read, in bytes.
	maxResponse = 8 << 20
	// fileLife is how long the content of credentials-file is used, and
	// sessionName is what CloudTrail calls an assumed role's session.
	fileLife    = time.Minute
	sessionName = "cryptcsi"
)

// Params returns the names of the URI parameters that Load understands.
func Params() []string {
	return []string{region, endpoint, profile, credentialsFile, roleARN, webIdentityToken}
}

// Load returns the configuration that the parameters in p ask for; parameters
// with other names are not looked at. It reads files and calls no service.
// ErrInvalid for what cannot work. The configuration has a region, retries a
// few times and never longer than ctx, follows no redirect, and reads answers
// of at most 8 MiB. Its credentials fail with ErrDenied, or ErrUnavailable
// where who gives them could not be asked.
func Load(ctx context.Context, p map[string]string) (aws.Config, error) {
	if err := check(p); err != nil {
		return aws.Config{}, err
	}
	options := []func(*config.LoadOptions) error{
		config.WithRegion(p[region]),
		config.WithLogger(logging.Nop{}), // what matters comes as an error
		// "auto" in the environment would ask the metadata service here.
		config.WithDefaultsMode(aws.DefaultsModeStandard),
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) { o.MaxAttempts, o.MaxBackoff = maxAttempts, maxBackoff })
		}),
		// The SDK fetches credentials for all callers at once, and so without
		// the context of any: a timeout of its own ends that.
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTimeout(credentialsTimeout).
			WithDialerOptions(func(d *net.Dialer) { d.Timeout = credentialsTimeout / 2 })),
	}
	file := fileCredentials{p[credentialsFile], p[profile]}
	if file.profile == "" && file.path != "" {
		file.profile = "default" // and not what AWS_PROFILE says
	}
	if file.profile != "" {
		options = append(options, config.WithSharedConfigProfile(file.profile))
	}
	if file.path != "" {
		if _, err := file.Retrieve(ctx); err != nil {
			return aws.Config{}, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
		}
		options = append(options, config.WithSharedCredentialsFiles([]string{file.path}), config.WithCredentialsProvider(file))
	}
	cfg, err := config.LoadDefaultConfig(ctx, options...)
	switch {
	case err != nil:
		return aws.Config{}, errdefs.Errorf(errdefs.ErrInvalid, "the AWS configuration (environment, shared files) does not load: %w", err)
	case cfg.Region == "":
		return aws.Config{}, errdefs.Errorf(errdefs.ErrInvalid, "the AWS region is not known: give URI parameter %q, or AWS_REGION, or a profile that has one", region)
	}
	assumeRole(&cfg, p)
	cfg.Credentials = aws.NewCredentialsCache(classified{cfg.Credentials})
	if buildable, ok := cfg.HTTPClient.(*awshttp.BuildableClient); ok {
		cfg.HTTPClient = newHTTPClient(buildable.GetTransport())
	}
	if p[endpoint] != "" { // only now: it is not meant for the clients that get credentials
		cfg.BaseEndpoint = aws.String(p[endpoint])
		cfg.ConfigSources = append([]any{endpointSource(p[endpoint])}, cfg.ConfigSources...)
	}
	return cfg, nil
}

// check checks the parameters one by one and together.
func check(p map[string]string) error {
	for _, name := range Params() {
		if value, given := p[name]; given && value == "" {
			return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is empty", name)
		}
	}
	// The region becomes part of a host name.
	if r := p[region]; r != "" && !regexp.MustCompile(`^[a-z][a-z0-9-]{1,40}$`).MatchString(r) {
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q is no region like eu-central-1", region)
	}
	if e := p[endpoint]; e != "" {
		u, err := url.Parse(e)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be like https://host:port", endpoint)
		}
	}
	role := p[roleARN]
	if a, err := arn.Parse(role); role != "" && (err != nil || a.Service != "iam") {
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be a role's ARN like arn:aws:iam::111122223333:role/name", roleARN)
	}
	token := p[webIdentityToken]
	if token == "" {
		return nil
	}
	switch info, err := os.Stat(token); {
	case role == "":
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q needs %q: the role to assume", webIdentityToken, roleARN)
	case p[credentialsFile] != "" || p[profile] != "":
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q does not go together with %q and %q: which credentials are meant?", webIdentityToken, credentialsFile, profile)
	case err != nil:
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q: %w", webIdentityToken, err)
	case !info.Mode().IsRegular():
		return errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q: %s is no regular file", webIdentityToken, token)
	}
	return nil
}

// assumeRole puts the role of the parameters, if any, in front of cfg's credentials.
func assumeRole(cfg *aws.Config, p map[string]string) {
	switch {
	case p[webIdentityToken] != "":
		cfg.Credentials = stscreds.NewWebIdentityRoleProvider(sts.NewFromConfig(*cfg), p[roleARN], stscreds.IdentityTokenFile(p[webIdentityToken]),
			func(o *stscreds.WebIdentityRoleOptions) { o.RoleSessionName = sessionName })
	case p[roleARN] != "":
		cfg.Credentials = stscreds.NewAssumeRoleProvider(sts.NewFromConfig(*cfg), p[roleARN],
			func(o *stscreds.AssumeRoleOptions) { o.RoleSessionName = sessionName })
	}
}

// endpointSource is asked before the environment's AWS_ENDPOINT_URL_….
type endpointSource string

// GetServiceBaseEndpoint is what the service clients ask for.
func (e endpointSource) GetServiceBaseEndpoint(context.Context, string) (string, bool, error) {
	return string(e), true, nil
}

// fileCredentials are those in a profile of a shared-credentials file.
type fileCredentials struct{ path, profile string }

// Retrieve reads the file.
func (f fileCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	switch info, err := os.Stat(f.path); { // a file that is missing would be taken for an empty one
	case err != nil:
		return aws.Credentials{}, errdefs.Errorf(errdefs.ErrDenied, "the AWS credentials file: %w", err)
	case !info.Mode().IsRegular():
		return aws.Credentials{}, errdefs.Errorf(errdefs.ErrDenied, "the AWS credentials file %s is no regular file", f.path)
	}
	shared, err := config.LoadSharedConfigProfile(ctx, f.profile, func(o *config.LoadSharedConfigOptions) {
		o.CredentialsFiles, o.ConfigFiles = []string{f.path}, []string{}
	})
	if err != nil || !shared.Credentials.HasKeys() {
		return aws.Credentials{}, errdefs.Errorf(errdefs.ErrDenied, "the AWS credentials file %s has no aws_access_key_id and aws_secret_access_key in profile [%s]", f.path, f.profile)
	}
	c := shared.Credentials
	c.CanExpire, c.Expires = true, time.Now().Add(fileLife)
	return c, nil
}

// classified gives the errors of credentials a class, and words for people.
type classified struct{ aws.CredentialsProvider }

// Retrieve asks the provider.
func (c classified) Retrieve(ctx context.Context) (aws.Credentials, error) {
	if c.CredentialsProvider == nil {
		return aws.Credentials{}, errdefs.Errorf(errdefs.ErrDenied, "there are no AWS credentials in this configuration")
	}
	got, err := c.CredentialsProvider.Retrieve(ctx)
	switch {
	case err == nil:
		return got, nil
	case errdefs.Class(err) != nil:
		return got, err
	case errors.Is(Class(err), errdefs.ErrUnavailable):
		return got, errdefs.Errorf(errdefs.ErrUnavailable, "AWS credentials: none are in environment or files, and who gives them at run time does not answer: %s", Text(err))
	}
	return got, errdefs.Errorf(errdefs.ErrDenied, "AWS credentials: none that work are in environment (AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE, AWS_PROFILE), shared files or instance metadata: %s", Text(err))
}

// Class returns the class of an error that a client of this configuration
// gave, as far as that is the same for every service: ErrDenied for
// permissions and credentials, ErrUnavailable for transport, throttling and
// faults of the server; nil for the rest.
func Class(err error) error {
	if class := errdefs.Class(err); class != nil {
		return class
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		switch api.ErrorCode() {
		case "AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AuthFailure", "OptInRequired",
			"ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidToken", "InvalidClientTokenId", "InvalidAccessKeyId", "UnrecognizedClientException",
			"InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature", "IncompleteSignatureException", "MissingAuthenticationToken", "MissingAuthenticationTokenException",
			"InvalidIdentityToken", "IDPRejectedClaim", "RequestTimeTooSkewed":
			return errdefs.ErrDenied
		}
		if retry.IsErrorThrottles(retry.DefaultThrottles).IsErrorThrottle(err) == aws.TrueTernary || api.ErrorFault() == smithy.FaultServer {
			return errdefs.ErrUnavailable
		}
	}
	// Without a status nothing was answered, and the cause is further down.
	if answer, ok := errors.AsType[*smithyhttp.ResponseError](err); ok && answer.HTTPStatusCode() != 0 {
		if code := answer.HTTPStatusCode(); code >= 500 || code == http.StatusTooManyRequests || code == http.StatusRequestTimeout {
			return errdefs.ErrUnavailable
		}
		return nil
	}
	if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return errdefs.ErrUnavailable
	}
	if _, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		return errdefs.ErrUnavailable
	}
	return nil
}

// Text tells a person what an error of such a client says, on one line and in
// at most a few hundred characters where it is AWS's own. It leaves out what
// AWS answers to a bad signature: that repeats the request with its session token.
func Text(err error) string {
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok || errdefs.Class(err) != nil {
		return err.Error()
	}
	switch api.ErrorCode() {
	case "InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature", "IncompleteSignatureException":
		return api.ErrorCode() + ": AWS does not accept the request's signature: is the secret access key right, and this machine's clock?"
	}
	text := strings.Join(strings.Fields(api.ErrorMessage()), " ")
	if text == "" {
		return api.ErrorCode()
	}
	return fmt.Sprintf("%.64s: %.400s", api.ErrorCode(), text)
}

// newHTTPClient returns a client that reads answers of bounded length only and
// follows no redirect, which no service needs and which would take a request's
// body to another host.
func newHTTPClient(t *http.Transport) *http.Client {
	return &http.Client{
		Transport:     bounded{t},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

type bounded struct{ *http.Transport }

// RoundTrip bounds the response's body.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := b.Transport.RoundTrip(r)
	if err == nil {
		answer.Body = &boundedBody{answer.Body, maxResponse}
	}
	return answer, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

// Read fails where more than the bound comes.
func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, fmt.Errorf("the answer is longer than %d bytes", maxResponse)
	}
	return n, err
}
