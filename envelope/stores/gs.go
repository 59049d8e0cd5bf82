package stores

import (
	"cmp"
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
	"github.com/cryptcsi/cryptcsi/internal/gcpconfig"
)

// openGS opens a bucket of Google Cloud Storage:
//
//	gs://BUCKET?prefix=clusters/prod/
//	gs://BUCKET?credentials-file=/etc/cryptcsi/gcp.json
//	gs://BUCKET?project=my-project&region=europe-west3   for making the bucket
//
// Credentials are found as for gcpckms. The file is read again for every new
// access token, hourly at the latest and when a token was refused. endpoint is
// for private endpoints (https://HOST); with http://, on loopback only, it is a
// server for tests and no credentials are sent. HTTPS_PROXY and NO_PROXY are
// obeyed. A version is the object's generation.
func openGS(ctx context.Context, u *url.URL) (envelope.Store, error) {
	const file, endpoint, project, region, prefix = gcpconfig.ParamFile, "endpoint", "project", "region", "prefix"
	bucket, err := bucketOf(u, `^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$`, "gs://BUCKET")
	if err != nil {
		return nil, err
	}
	params, err := paramsOf(u, []string{file, endpoint, project, region, prefix})
	if err != nil {
		return nil, err
	}
	client, transport, err := newGSClient(ctx, params[file], params[endpoint])
	if err != nil {
		return nil, err
	}
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

// newGSClient returns a client and what its connections are in.
func newGSClient(ctx context.Context, file, endpoint string) (*storage.Client, *http.Transport, error) {
	plain, err := checkEndpoint(endpoint)
	if err != nil {
		return nil, nil, err
	}
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 10,
		IdleConnTimeout:     90 * time.Second,
	}
	bounded := gsTransport{next: transport}
	if !plain {
		caller, err := gcpconfig.FindCaller(file)
		if err != nil {
			return nil, nil, err
		}
		if bounded.tokens, err = caller.Tokens(gcpconfig.Need{Scopes: []string{"https://www.googleapis.com/auth/cloud-platform"}}); err != nil {
			return nil, nil, err
		}
		endpoint = cmp.Or(endpoint, "https://storage."+caller.Universe())
	}
	client, err := storage.NewClient(ctx,
		option.WithHTTPClient(&http.Client{
			Transport:     bounded,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}),
		option.WithoutAuthentication(),               // or it looks for credentials of its own
		option.WithEndpoint(endpoint+"/storage/v1/"), // or the environment has a say
		storage.WithJSONReads(),
	)
	if err != nil {
		return nil, nil, errdefs.Errorf(errdefs.ErrInvalid, "%w", err)
	}
	client.SetRetry(storage.WithMaxAttempts(3), storage.WithBackoff(gax.Backoff{Initial: 200 * time.Millisecond, Max: 2 * time.Second}))
	return client, transport, nil
}

// gsTransport sends requests with an access token, and bounds what is answered.
type gsTransport struct {
	next   http.RoundTripper
	tokens *gcpconfig.Tokens // nil: a server for tests
}

// RoundTrip is part of http.RoundTripper.
func (t gsTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.tokens != nil {
		headers, err := t.tokens.Headers(r.Context())
		if err != nil {
			if r.Body != nil {
				_ = r.Body.Close()
			}
			return nil, err
		}
		r = r.Clone(r.Context())
		for name, value := range headers {
			r.Header.Set(name, value)
		}
	}
	answer, err := t.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode == http.StatusUnauthorized && t.tokens != nil {
		t.tokens.Forget()
	}
	answer.Body = http.MaxBytesReader(nil, answer.Body, maxAnswer)
	return answer, nil
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
