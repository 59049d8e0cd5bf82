package stores

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/streaming"
	azblobblob "github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blockblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"gocloud.dev/blob"
	"gocloud.dev/blob/azureblob"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/azureconfig"
)

const (
	azStorageAccount   = "storage-account"
	azDomain           = "domain"
	azEndpoint         = "endpoint"
	azConnectionString = "connection-string-file"
)

// openAzblob opens a container of Azure Blob Storage:
//
//	azblob://CONTAINER?storage-account=NAME&prefix=clusters/prod/
//	azblob://CONTAINER?storage-account=NAME&domain=blob.core.chinacloudapi.cn&cloud=china
//	azblob://CONTAINER?endpoint=https://HOST/
//	azblob://CONTAINER?connection-string-file=/etc/cryptcsi/azure
//
// domain follows the account's name (default: that of cloud); endpoint takes
// the place of both, for private names. Credentials are Azure's, see
// internal/azureconfig, or those in the connection string, which is read once.
// A version is the blob's ETag.
func openAzblob(ctx context.Context, u *url.URL) (envelope.Store, error) {
	name, err := bucketOf(u, `^[a-z0-9](-?[a-z0-9]){2,62}$`, "azblob://CONTAINER")
	if err != nil {
		return nil, err
	}
	params, err := paramsOf(u, azureconfig.Params(), azStorageAccount, azDomain, azEndpoint, azConnectionString, "prefix")
	if err != nil {
		return nil, err
	}
	options, err := azureconfig.ClientOptions(params)
	if err != nil {
		return nil, err
	}
	transport := options.Transport
	options.Transport = azureconfig.Bounded(transport, maxAnswer)
	client, err := azContainer(params, name, options)
	if err != nil {
		return nil, err
	}
	b, err := azureblob.OpenBucket(ctx, client, nil)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	const blobs = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs/"
	return &bucketStore{
		service: &azService{client: client, transport: transport},
		bucket:  b, prefix: params["prefix"], where: "container " + name,
		needs: map[string]string{
			envelope.OpCreate:  blobs + "write",
			envelope.OpRead:    blobs + "read",
			envelope.OpReplace: blobs + "write",
			envelope.OpDelete:  blobs + "delete",
			envelope.OpList:    blobs + "read",
			envelope.OpErase:   blobs + "read, " + blobs + "delete, " + blobs + "deleteBlobVersion/action",
			envelope.OpMake:    "Microsoft.Storage/storageAccounts/blobServices/containers/write",
		},
	}, nil
}

// azContainer returns a client for the container.
func azContainer(params map[string]string, name string, o azcore.ClientOptions) (*container.Client, error) {
	options := &container.ClientOptions{ClientOptions: o}
	if file, given := params[azConnectionString]; given {
		for other := range params {
			if other != azConnectionString && other != "prefix" && other != "ca-file" {
				return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameters %q and %q do not go together: the connection string says where and who", azConnectionString, other)
			}
		}
		return azFromConnectionString(file, name, options)
	}
	service, err := azServiceURL(params)
	if err != nil {
		return nil, err
	}
	credential, err := azureconfig.Credential(params, o)
	if err != nil {
		return nil, err
	}
	client, err := container.NewClient(service+name, credential, options)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return client, nil
}

// azServiceURL returns the URL of the service, with a slash at the end.
func azServiceURL(params map[string]string) (string, error) {
	account, domain, endpoint := params[azStorageAccount], params[azDomain], params[azEndpoint]
	switch {
	case (account == "") == (endpoint == ""):
		return "", errdefs.Errorf(errdefs.ErrInvalid, "one of the URI parameters %q, %q and %q is needed", azStorageAccount, azEndpoint, azConnectionString)
	case endpoint != "":
		u, err := url.Parse(endpoint)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || domain != "" {
			return "", errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be the https URL of the account, and takes no %q", azEndpoint, azDomain)
		}
		return strings.TrimSuffix(endpoint, "/") + "/", nil
	case !regexp.MustCompile(`^[a-z0-9]{3,24}$`).MatchString(account):
		return "", errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be the name of an account: 3 to 24 lower-case letters and digits", azStorageAccount)
	case domain == "":
		domain = map[string]string{"china": "blob.core.chinacloudapi.cn", "usgov": "blob.core.usgovcloudapi.net"}[params["cloud"]]
		if domain == "" {
			domain = "blob.core.windows.net"
		}
	case !regexp.MustCompile(`^[a-z0-9-]+(\.[a-z0-9-]+)+$`).MatchString(domain):
		return "", errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be like blob.core.windows.net", azDomain)
	}
	return "https://" + account + "." + domain + "/", nil
}

// azFromConnectionString tells nothing of the file's content in errors.
func azFromConnectionString(file, name string, options *container.ClientOptions) (*container.Client, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the connection string: %w", err)
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, 16<<10))
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the connection string: %w", err)
	}
	client, err := container.NewClientFromConnectionString(strings.TrimSpace(string(content)), name, options)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%s holds no connection string of a storage account (DefaultEndpointsProtocol=https;AccountName=…;AccountKey=…)", file)
	}
	u, err := url.Parse(client.URL())
	if err != nil || u.Scheme != "https" && !(u.Scheme == "http" && loopback(u.Hostname())) {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "the connection string in %s must name a service by https (http is for a server on loopback only)", file)
	}
	return client, nil
}

type azService struct {
	client    *container.Client
	transport policy.Transporter
}

// azOnce keeps the SDK from sending a request again: when the answer to the
// first was lost, that to the second would not tell what happened.
func azOnce(ctx context.Context) context.Context {
	return policy.WithRetryOptions(ctx, policy.RetryOptions{MaxRetries: -1})
}

// azOnly is the condition that the blob is of that version, "" for one that
// does not exist.
func azOnly(version string) *azblobblob.AccessConditions {
	m := &azblobblob.ModifiedAccessConditions{}
	if any, tag := azcore.ETagAny, azcore.ETag(version); version == "" {
		m.IfNoneMatch = &any
	} else {
		m.IfMatch = &tag
	}
	return &azblobblob.AccessConditions{ModifiedAccessConditions: m}
}

func (s *azService) put(ctx context.Context, key string, data []byte, version string) error {
	kind := contentType
	_, err := s.client.NewBlockBlobClient(key).Upload(azOnce(ctx), streaming.NopCloser(bytes.NewReader(data)), &blockblob.UploadOptions{
		HTTPHeaders:      &azblobblob.HTTPHeaders{BlobContentType: &kind},
		AccessConditions: azOnly(version),
	})
	return err
}

// remove takes snapshots along: the service refuses to leave them alone.
func (s *azService) remove(ctx context.Context, key, version string) error {
	include := azblobblob.DeleteSnapshotsOptionTypeInclude
	_, err := s.client.NewBlobClient(key).Delete(azOnce(ctx), &azblobblob.DeleteOptions{DeleteSnapshots: &include, AccessConditions: azOnly(version)})
	return err
}

func (s *azService) version(r *blob.Reader) string {
	var got azblobblob.DownloadStreamResponse
	if !r.As(&got) || got.ETag == nil || !s.isVersion(string(*got.ETag)) {
		return ""
	}
	return string(*got.ETag)
}

func (s *azService) isVersion(v string) bool { return etagForm.MatchString(v) }

func (s *azService) create(ctx context.Context) error {
	_, err := s.client.Create(ctx, nil) // no public access
	if bloberror.HasCode(err, bloberror.ContainerAlreadyExists) {
		return nil // in our account
	}
	return err
}

// erase deletes snapshots and earlier versions, and then looks at what soft
// delete keeps.
func (s *azService) erase(ctx context.Context, key string) (until time.Time, err error) {
	erased := 0
	err = s.each(ctx, key, func(b *container.BlobItem) error {
		old, err := s.earlier(b, key)
		if err != nil || old == nil {
			return err
		}
		erased++
		_, err = old.Delete(ctx, nil)
		switch p := b.Properties; {
		case err == nil || bloberror.HasCode(err, bloberror.BlobNotFound):
			return nil
		case p != nil && p.LegalHold != nil && *p.LegalHold:
			return errdefs.Errorf(errdefs.ErrDenied, "an earlier version of %s has a legal hold: it stays until someone clears that", key)
		case p != nil && p.ImmutabilityPolicyExpiresOn != nil && p.ImmutabilityPolicyExpiresOn.After(time.Now()):
			until = later(until, *p.ImmutabilityPolicyExpiresOn)
			return nil
		}
		return err
	})
	if err != nil {
		return time.Time{}, err
	}
	err = s.each(ctx, key, func(b *container.BlobItem) error {
		if b.Deleted != nil && *b.Deleted && b.Properties != nil && b.Properties.RemainingRetentionDays != nil {
			days := time.Duration(*b.Properties.RemainingRetentionDays) + 1 // it is rounded down
			until = later(until, time.Now().Add(days*24*time.Hour))
		}
		return nil
	})
	return until, err
}

// earlier returns a client for what is listed, nil where it is the current
// blob, or deleted already.
func (s *azService) earlier(b *container.BlobItem, key string) (*azblobblob.Client, error) {
	client := s.client.NewBlobClient(key)
	switch {
	case b.Deleted != nil && *b.Deleted:
		return nil, nil
	case b.Snapshot != nil && *b.Snapshot != "":
		return client.WithSnapshot(*b.Snapshot)
	case b.VersionID != nil && *b.VersionID != "" && (b.IsCurrentVersion == nil || !*b.IsCurrentVersion):
		return client.WithVersionID(*b.VersionID)
	}
	return nil, nil
}

// each calls f for all that is listed of one blob, which comes first among
// those that its key is a prefix of.
func (s *azService) each(ctx context.Context, key string, f func(*container.BlobItem) error) error {
	pages := s.client.NewListBlobsFlatPager(&container.ListBlobsFlatOptions{
		Prefix:  &key,
		Include: container.ListBlobsInclude{Versions: true, Snapshots: true, Deleted: true, ImmutabilityPolicy: true, LegalHold: true},
	})
	for pages.More() {
		page, err := pages.NextPage(ctx)
		if err != nil {
			return err
		}
		if page.Segment == nil {
			return nil
		}
		for _, b := range page.Segment.BlobItems {
			if b == nil || b.Name == nil || *b.Name != key {
				return nil
			}
			if err := f(b); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *azService) fault(_ context.Context, err error) (verdict, string) {
	answer, ok := errors.AsType[*azcore.ResponseError](err)
	if !ok {
		return unanswered, said(err)
	}
	words := cut(strconv.Itoa(answer.StatusCode) + " " + answer.ErrorCode)
	if v, ok := azVerdicts()[bloberror.Code(answer.ErrorCode)]; ok {
		return v, words
	}
	switch status := answer.StatusCode; {
	case status == http.StatusForbidden:
		return denied, words
	case status == http.StatusUnauthorized:
		return refused, "the credentials are not accepted (" + words + ")"
	case status >= 500 || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout:
		return unanswered, words
	}
	return odd, words
}

// azVerdicts are those that the code alone tells. A 404 without one of these
// codes is nothing that Blob Storage said about a blob.
func azVerdicts() map[bloberror.Code]verdict {
	return map[bloberror.Code]verdict{
		bloberror.BlobNotFound:             noObject,
		bloberror.ContainerNotFound:        noBucket,
		bloberror.ContainerBeingDeleted:    unanswered,
		bloberror.BlobAlreadyExists:        conditionFail,
		bloberror.ConditionNotMet:          conditionFail,
		bloberror.TargetConditionNotMet:    conditionFail,
		bloberror.AuthenticationFailed:     refused,
		bloberror.BlobImmutableDueToPolicy: refused,
		bloberror.LeaseIDMissing:           refused, // someone leased the blob
		bloberror.AccountIsDisabled:        refused,
		bloberror.ContainerDisabled:        refused,
		bloberror.InvalidResourceName:      impossible,
		bloberror.OperationTimedOut:        unanswered,
	}
}

func (s *azService) idle() {
	if c, ok := s.transport.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
