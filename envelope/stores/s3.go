package stores

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"gocloud.dev/blob"
	"gocloud.dev/blob/s3blob"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/awsconfig"
)

// openS3 opens a bucket of Amazon S3 or of a service like it:
//
//	s3://BUCKET?region=eu-central-1&prefix=clusters/prod/
//	s3://BUCKET?region=us-east-1&endpoint=https://minio.example:9000&use_path_style=true
//
// Credentials are AWS's, see internal/awsconfig. A version is the object's
// ETag. Objects are written with If-None-Match and If-Match; a service that
// ignores these is no store. Deleting compares first and sends If-Match too;
// where the service refuses that header, or ignores it, a change by somebody
// else in the moment between the two would be deleted with the object.
func openS3(ctx context.Context, u *url.URL) (envelope.Store, error) {
	const pathStyle, prefix = "use_path_style", "prefix"
	bucket, err := bucketOf(u, `^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`, "s3://BUCKET")
	if err != nil {
		return nil, err
	}
	params, err := paramsOf(u, awsconfig.Params(), pathStyle, prefix)
	if err != nil {
		return nil, err
	}
	switch params[pathStyle] {
	case "", "false", "true":
	default:
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "URI parameter %q must be true or false", pathStyle)
	}
	cfg, err := awsconfig.Load(ctx, params)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(cfg, func(o *s3.Options) {
		o.UsePathStyle = params[pathStyle] == "true"
		// Some services like S3 do not understand the SDK's checksums in
		// trailers; ours is a header.
		o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
	})
	b, err := s3blob.OpenBucket(ctx, client, bucket, nil)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return &bucketStore{
		service: &s3Service{client: client, bucket: bucket, region: cfg.Region, http: cfg.HTTPClient},
		bucket:  b, prefix: params[prefix], where: "bucket " + bucket,
		needs: map[string]string{
			envelope.OpCreate:  "s3:PutObject",
			envelope.OpRead:    "s3:GetObject, s3:ListBucket",
			envelope.OpReplace: "s3:PutObject, s3:GetObject",
			envelope.OpDelete:  "s3:DeleteObject, s3:GetObject",
			envelope.OpList:    "s3:ListBucket",
			envelope.OpErase:   "s3:ListBucketVersions, s3:DeleteObjectVersion, s3:GetObjectRetention, s3:GetObjectLegalHold",
			envelope.OpMake:    "s3:CreateBucket, s3:PutBucketPublicAccessBlock",
		},
		deniedRead: " (without s3:ListBucket an object that does not exist is refused like this too)",
	}, nil
}

type s3Service struct {
	client *s3.Client
	bucket string
	region string
	http   aws.HTTPClient
}

// once keeps the SDK from sending a request again: when the answer to the
// first was lost, that to the second would not tell what happened.
func once(o *s3.Options) { o.Retryer = aws.NopRetryer{} }

func (s *s3Service) put(ctx context.Context, key string, data []byte, version string) error {
	digest := sha256.Sum256(data)
	in := &s3.PutObjectInput{
		Bucket: &s.bucket, Key: &key, Body: bytes.NewReader(data), ContentType: aws.String(contentType),
		ChecksumSHA256: aws.String(base64.StdEncoding.EncodeToString(digest[:])), // object lock wants one
	}
	if version == "" {
		in.IfNoneMatch = aws.String("*")
	} else {
		in.IfMatch = &version
	}
	_, err := s.client.PutObject(ctx, in, once)
	return err
}

func (s *s3Service) remove(ctx context.Context, key, version string) error {
	got, err := s.client.GetObject(ctx, &s3.GetObjectInput{Bucket: &s.bucket, Key: &key})
	if err != nil {
		return err
	}
	_ = got.Body.Close()
	if aws.ToString(got.ETag) != version {
		return errChanged()
	}
	in := &s3.DeleteObjectInput{Bucket: &s.bucket, Key: &key, IfMatch: &version}
	_, err = s.client.DeleteObject(ctx, in, once)
	if codeOf(err) == "NotImplemented" {
		in.IfMatch = nil
		_, err = s.client.DeleteObject(ctx, in, once)
	}
	return err
}

func (s *s3Service) version(r *blob.Reader) string {
	var got s3.GetObjectOutput
	if !r.As(&got) || !s.isVersion(aws.ToString(got.ETag)) {
		return ""
	}
	return *got.ETag
}

var etagForm = regexp.MustCompile(`^"[!#-~]{1,200}"$`)

func (s *s3Service) isVersion(v string) bool { return etagForm.MatchString(v) }

// create leaves the settings of a bucket that is ours already as they are.
func (s *s3Service) create(ctx context.Context) error {
	in := &s3.CreateBucketInput{Bucket: &s.bucket}
	if s.region != "us-east-1" {
		in.CreateBucketConfiguration = &types.CreateBucketConfiguration{LocationConstraint: types.BucketLocationConstraint(s.region)}
	}
	_, err := s.client.CreateBucket(ctx, in)
	if code := codeOf(err); code == "BucketAlreadyOwnedByYou" || code == "BucketAlreadyExists" && s.ours(ctx) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = s.client.PutPublicAccessBlock(ctx, &s3.PutPublicAccessBlockInput{
		Bucket: &s.bucket,
		PublicAccessBlockConfiguration: &types.PublicAccessBlockConfiguration{
			BlockPublicAcls: aws.Bool(true), BlockPublicPolicy: aws.Bool(true), IgnorePublicAcls: aws.Bool(true), RestrictPublicBuckets: aws.Bool(true),
		},
	})
	if err == nil {
		return nil
	}
	if v, _ := s.fault(ctx, err); v == denied || v == refused || v == unanswered && statusOf(err) != http.StatusNotImplemented {
		return err
	}
	return nil // it is a service like S3 that does not know this
}

// ours says whether the bucket is listed among our own: some services like S3
// do not tell it apart from somebody else's when it cannot be made.
func (s *s3Service) ours(ctx context.Context) bool {
	all, err := s.client.ListBuckets(ctx, &s3.ListBucketsInput{})
	return err == nil && slices.ContainsFunc(all.Buckets, func(b types.Bucket) bool { return aws.ToString(b.Name) == s.bucket })
}

// history is what a bucket keeps of one object.
type history struct {
	versions, markers []string // IDs; markers are those of deletions
	newest            string   // of markers, where the object is deleted
}

// erase removes markers after versions, and the newest marker, which hides the
// versions, only if none of them is left.
func (s *s3Service) erase(ctx context.Context, key string) (until time.Time, err error) {
	h, err := s.history(ctx, key)
	if err != nil {
		return time.Time{}, err
	}
	for _, id := range slices.Concat(h.versions, h.markers) {
		kept, err := s.eraseVersion(ctx, key, id)
		if err != nil {
			return time.Time{}, err
		}
		until = later(until, kept)
	}
	if h.newest != "" && until.IsZero() {
		_, err = s.eraseVersion(ctx, key, h.newest)
	}
	return until, err
}

// history lists all but the current version. The object comes first among
// those that its key is a prefix of.
func (s *s3Service) history(ctx context.Context, key string) (h history, err error) {
	in := &s3.ListObjectVersionsInput{Bucket: &s.bucket, Prefix: &key}
	for {
		page, err := s.client.ListObjectVersions(ctx, in)
		if err != nil {
			return history{}, err
		}
		for _, v := range page.Versions {
			if aws.ToString(v.Key) == key && !aws.ToBool(v.IsLatest) {
				h.versions = append(h.versions, aws.ToString(v.VersionId))
			}
		}
		for _, m := range page.DeleteMarkers {
			switch {
			case aws.ToString(m.Key) != key:
			case aws.ToBool(m.IsLatest):
				h.newest = aws.ToString(m.VersionId)
			default:
				h.markers = append(h.markers, aws.ToString(m.VersionId))
			}
		}
		next, version := aws.ToString(page.NextKeyMarker), aws.ToString(page.NextVersionIdMarker)
		if !aws.ToBool(page.IsTruncated) || next != key || version == aws.ToString(in.VersionIdMarker) {
			return h, nil
		}
		in.KeyMarker, in.VersionIdMarker = &next, &version
	}
}

// eraseVersion returns until when a lock keeps the version, zero where it is gone.
func (s *s3Service) eraseVersion(ctx context.Context, key, id string) (time.Time, error) {
	_, err := s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: &key, VersionId: &id})
	if err == nil || codeOf(err) == "NoSuchVersion" {
		return time.Time{}, nil
	}
	if v, _ := s.fault(ctx, err); v != denied && codeOf(err) != "ObjectLocked" {
		return time.Time{}, err
	}
	hold, holdErr := s.client.GetObjectLegalHold(ctx, &s3.GetObjectLegalHoldInput{Bucket: &s.bucket, Key: &key, VersionId: &id})
	if holdErr == nil && hold.LegalHold != nil && hold.LegalHold.Status == types.ObjectLockLegalHoldStatusOn {
		return time.Time{}, errdefs.Errorf(errdefs.ErrDenied, "version %s of %s has a legal hold: it stays until someone lifts that", id, key)
	}
	lock, lockErr := s.client.GetObjectRetention(ctx, &s3.GetObjectRetentionInput{Bucket: &s.bucket, Key: &key, VersionId: &id})
	if lockErr == nil && lock.Retention != nil && aws.ToTime(lock.Retention.RetainUntilDate).After(time.Now()) {
		return *lock.Retention.RetainUntilDate, nil
	}
	return time.Time{}, err
}

func (s *s3Service) fault(_ context.Context, err error) (verdict, string) {
	api, ok := errors.AsType[smithy.APIError](err)
	if !ok {
		return unanswered, said(err)
	}
	words := cut(api.ErrorCode() + ": " + api.ErrorMessage())
	if v, ok := s3Verdicts()[api.ErrorCode()]; ok {
		return v, words
	}
	switch class, status := awsconfig.Class(err), statusOf(err); {
	case errors.Is(class, errdefs.ErrUnavailable):
		return unanswered, words
	case errors.Is(class, errdefs.ErrDenied) || status == http.StatusUnauthorized:
		return refused, words
	case status == http.StatusForbidden:
		return denied, words
	case status == http.StatusPreconditionFailed:
		return conditionFail, words
	case status == http.StatusMovedPermanently || status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect:
		return impossible, "the bucket is in another region, or behind another endpoint: correct the URI (" + words + ")"
	}
	return odd, words
}

// s3Verdicts are those that the code alone tells. A 404 without one of these
// codes (a proxy's, a web server's) is nothing that S3 said about an object.
func s3Verdicts() map[string]verdict {
	return map[string]verdict{
		"NoSuchKey":                          noObject,
		"NoSuchBucket":                       noBucket,
		"PreconditionFailed":                 conditionFail,
		"ConditionalRequestConflict":         busy,
		"OperationAborted":                   unanswered,
		"AccessDenied":                       denied,
		"AllAccessDisabled":                  refused,
		"BucketAlreadyExists":                taken,
		"AuthorizationHeaderMalformed":       impossible, // tells the right region
		"IllegalLocationConstraintException": impossible,
		"InvalidBucketName":                  impossible,
	}
}

// codeOf returns S3's code of an error, "" where there is none.
func codeOf(err error) string {
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		return api.ErrorCode()
	}
	return ""
}

// statusOf returns the HTTP status of an error, 0 where there is none.
func statusOf(err error) int {
	if answer, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		return answer.HTTPStatusCode()
	}
	return 0
}

func (s *s3Service) idle() {
	if c, ok := s.http.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
