package stores

import (
	"context"
	"errors"
	"hash/crc32"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"cloud.google.com/go/storage"
	"github.com/googleapis/gax-go/v2"
	"gocloud.dev/blob"
	"gocloud.dev/blob/gcsblob"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"
	"google.golang.org/api/option"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/errdefs"
)

// openGS opens a bucket of Google Cloud Storage:
//
//	gs://BUCKET?prefix=clusters/prod/
//	gs://BUCKET?credentials-file=/etc/cryptcsi/gcp.json
//	gs://BUCKET?project=my-project&region=europe-west3   for making the bucket
//
// Credentials are application default ones, or those in the JSON file, which
// is read again when it changes. endpoint is for private endpoints
// (https://HOST); with http://, on loopback only, it is a server for tests and
// no credentials are sent. A version is the object's generation.
func openGS(ctx context.Context, u *url.URL) (envelope.Store, error) {
	const file, endpoint, project, region, prefix = "credentials-file", "endpoint", "project", "region", "prefix"
	bucket, err := bucketOf(u, `^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$`, "gs://BUCKET")
	if err != nil {
		return nil, err
	}
	params, err := paramsOf(u, []string{file, endpoint, project, region, prefix})
	if err != nil {
		return nil, err
	}
	plain, err := checkEndpoint(params[endpoint])
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 10,
		IdleConnTimeout:     90 * time.Second,
	}
	rt := &gcpTransport{next: transport}
	if !plain {
		if rt.credentials, err = newGCPCredentials(params[file]); err != nil {
			return nil, err
		}
	}
	options := []option.ClientOption{
		option.WithHTTPClient(&http.Client{
			Transport:     rt,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}),
		storage.WithJSONReads(),
	}
	if params[endpoint] != "" {
		options = append(options, option.WithEndpoint(params[endpoint]+"/storage/v1/"))
	}
	client, err := storage.NewClient(ctx, options...)
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	client.SetRetry(storage.WithMaxAttempts(3), storage.WithBackoff(gax.Backoff{Initial: 200 * time.Millisecond, Max: 2 * time.Second}))
	b, err := gcsblob.OpenBucket(ctx, nil, bucket, &gcsblob.Options{Client: client})
	if err != nil {
		return nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	return &bucketStore{
		service: &gsService{client: client, bucket: client.Bucket(bucket), name: bucket, project: params[project], region: params[region], transport: transport},
		bucket:  b, prefix: params[prefix], where: "bucket " + bucket,
		needs: map[string]string{
			envelope.OpCreate:  "storage.objects.create",
			envelope.OpRead:    "storage.objects.get, storage.objects.list",
			envelope.OpReplace: "storage.objects.create, storage.objects.delete",
			envelope.OpDelete:  "storage.objects.delete",
			envelope.OpList:    "storage.objects.list",
			envelope.OpErase:   "storage.objects.list, storage.objects.delete, storage.buckets.get",
			envelope.OpMake:    "storage.buckets.create, storage.buckets.list",
		},
		deniedRead: " (without storage.objects.list an object that does not exist is refused like this too)",
	}, nil
}

// checkEndpoint says whether an endpoint is a server for tests.
func checkEndpoint(endpoint string) (plain bool, err error) {
	if endpoint == "" {
		return false, nil
	}
	u, err := url.Parse(endpoint)
	if err == nil && u.Host != "" && u.User == nil && u.Path == "" && u.RawQuery == "" && u.Fragment == "" {
		if u.Scheme == "https" {
			return false, nil
		}
		if u.Scheme == "http" && loopback(u.Hostname()) {
			return true, nil
		}
	}
	return false, errdefs.Errorf(errdefs.ErrInvalid, `URI parameter "endpoint" must be like https://HOST; http:// is for a server on loopback only`)
}

// loopback says whether a host is this machine by its address.
func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

type gsService struct {
	client    *storage.Client
	bucket    *storage.BucketHandle
	name      string
	project   string
	region    string
	transport *http.Transport
}

// object returns the object of that version, "" for one that does not exist.
// Nothing is sent again: when the answer to the first request was lost, that
// to the second would not tell what happened.
func (s *gsService) object(key, version string) *storage.ObjectHandle {
	generation, _ := strconv.ParseInt(version, 10, 64)
	return s.bucket.Object(key).Retryer(storage.WithPolicy(storage.RetryNever)).
		If(storage.Conditions{GenerationMatch: generation, DoesNotExist: version == ""})
}

func (s *gsService) put(ctx context.Context, key string, data []byte, version string) error {
	w := s.object(key, version).NewWriter(ctx)
	w.ChunkSize = 0 // one request
	w.ContentType = contentType
	w.CRC32C, w.SendCRC32C = crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli)), true
	_, err := w.Write(data)
	if closeErr := w.Close(); closeErr != nil {
		err = closeErr // says why writing failed
	}
	return err
}

func (s *gsService) remove(ctx context.Context, key, version string) error {
	return s.object(key, version).Delete(ctx)
}

func (s *gsService) version(r *blob.Reader) string {
	var got *storage.Reader
	if !r.As(&got) || got.Attrs.Generation <= 0 {
		return ""
	}
	return strconv.FormatInt(got.Attrs.Generation, 10)
}

func (s *gsService) isVersion(v string) bool {
	generation, err := strconv.ParseInt(v, 10, 64)
	return err == nil && generation > 0
}

func (s *gsService) create(ctx context.Context) error {
	if s.project == "" {
		return errdefs.Errorf(errdefs.ErrInvalid, `making a bucket needs URI parameter "project": the ID of the project that it shall belong to`)
	}
	err := s.bucket.Create(ctx, s.project, &storage.BucketAttrs{
		Location:                 s.region,
		UniformBucketLevelAccess: storage.UniformBucketLevelAccess{Enabled: true},
		PublicAccessPrevention:   storage.PublicAccessPreventionEnforced,
	})
	if answer, ok := errors.AsType[*googleapi.Error](err); !ok || answer.Code != http.StatusConflict {
		return err
	}
	buckets := s.client.Buckets(ctx, s.project) // is it ours?
	buckets.Prefix = s.name
	for {
		b, listErr := buckets.Next()
		switch {
		case errors.Is(listErr, iterator.Done):
			return err
		case listErr != nil:
			return listErr
		case b != nil && b.Name == s.name:
			return nil
		}
	}
}

func (s *gsService) erase(ctx context.Context, key string) (until time.Time, err error) {
	err = s.each(ctx, &storage.Query{Prefix: key, Versions: true}, key, func(o *storage.ObjectAttrs) error {
		if o.Deleted.IsZero() {
			return nil // the current one
		}
		err := s.bucket.Object(key).Generation(o.Generation).Delete(ctx)
		kept := o.RetentionExpirationTime
		if o.Retention != nil {
			kept = later(kept, o.Retention.RetainUntil)
		}
		switch answer, _ := errors.AsType[*googleapi.Error](err); {
		case err == nil || answer != nil && answer.Code == http.StatusNotFound:
			return nil
		case o.TemporaryHold || o.EventBasedHold:
			return errdefs.Errorf(errdefs.ErrDenied, "generation %d of %s has a hold: it stays until someone releases that", o.Generation, key)
		case kept.After(time.Now()):
			until = later(until, kept)
			return nil
		}
		return err
	})
	if err != nil {
		return time.Time{}, err
	}
	soft, err := s.softDeleted(ctx, key)
	return later(until, soft), err
}

// softDeleted returns when the last generation that the bucket's soft delete
// policy keeps is gone, zero where there is none.
func (s *gsService) softDeleted(ctx context.Context, key string) (until time.Time, err error) {
	err = s.each(ctx, &storage.Query{Prefix: key, SoftDeleted: true}, key, func(o *storage.ObjectAttrs) error {
		until = later(until, o.HardDeleteTime)
		return nil
	})
	answer, ok := errors.AsType[*googleapi.Error](err)
	if !ok || answer.Code != http.StatusBadRequest && answer.Code != http.StatusPreconditionFailed {
		return until, err
	}
	// The service refuses the question where the bucket has no such policy.
	attrs, attrsErr := s.bucket.Attrs(ctx)
	switch {
	case attrsErr != nil:
		return time.Time{}, attrsErr
	case attrs.SoftDeletePolicy == nil || attrs.SoftDeletePolicy.RetentionDuration == 0:
		return time.Time{}, nil
	}
	return time.Time{}, err
}

// each calls f for what is listed of one object, which comes first among those
// that its key is a prefix of.
func (s *gsService) each(ctx context.Context, q *storage.Query, key string, f func(*storage.ObjectAttrs) error) error {
	objects := s.bucket.Objects(ctx, q)
	for {
		o, err := objects.Next()
		switch {
		case errors.Is(err, iterator.Done):
			return nil
		case err != nil:
			return err
		case o == nil || o.Name != key:
			return nil
		}
		if err := f(o); err != nil {
			return err
		}
	}
}

func (s *gsService) fault(ctx context.Context, err error) (verdict, string) {
	answer, ok := errors.AsType[*googleapi.Error](err)
	switch {
	case errors.Is(err, storage.ErrBucketNotExist):
		return noBucket, "404"
	case !ok && errors.Is(err, storage.ErrObjectNotExist):
		return s.missing(ctx)
	case !ok:
		return unanswered, said(err)
	}
	words := cut(strconv.Itoa(answer.Code) + ": " + answer.Message)
	switch {
	case answer.Code == http.StatusNotFound:
		return s.missing(ctx)
	case answer.Code == http.StatusPreconditionFailed:
		return conditionFail, words
	case answer.Code == http.StatusForbidden:
		return denied, words
	case answer.Code == http.StatusUnauthorized:
		return refused, "the credentials are not accepted (" + words + ")"
	case answer.Code == http.StatusConflict:
		return taken, words
	case answer.Code >= 500 || answer.Code == http.StatusTooManyRequests || answer.Code == http.StatusRequestTimeout:
		return unanswered, words
	}
	return odd, words
}

// missing tells a missing object from a missing bucket, which look the same:
// only a bucket that is there can be listed.
func (s *gsService) missing(ctx context.Context) (verdict, string) {
	objects := s.bucket.Objects(ctx, &storage.Query{Delimiter: "/"})
	objects.PageInfo().MaxSize = 1
	err := guarded(func() error {
		_, err := objects.Next()
		return err
	})
	switch {
	case err == nil || errors.Is(err, iterator.Done):
		return noObject, ""
	case errors.Is(err, storage.ErrBucketNotExist):
		return noBucket, "404"
	}
	if answer, ok := errors.AsType[*googleapi.Error](err); ok && answer.Code == http.StatusNotFound {
		return noBucket, "404"
	} else if ok && answer.Code == http.StatusForbidden {
		return denied, cut("asking whether the bucket exists: " + answer.Message)
	}
	return unanswered, said(err)
}

func (s *gsService) idle() { s.transport.CloseIdleConnections() }
