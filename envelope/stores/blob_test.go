package stores_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/storage"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"google.golang.org/api/iterator"

	"github.com/cryptcsi/cryptcsi/envelope"
	"github.com/cryptcsi/cryptcsi/envelope/envelopetest"
	"github.com/cryptcsi/cryptcsi/envelope/stores"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/test/peers"
)

// service is one that object stores are tested against. bucket makes a bucket,
// uri names one; at and deny are the same service behind another URL, and for
// somebody without some permissions.
type service struct {
	url    string
	bucket func(t *testing.T) string
	uri    func(bucket string) string
	at     func(t *testing.T, endpoint string) service
	deny   func(t *testing.T, permissions ...string) service
}

func s3Service(s *peers.S3) service {
	return service{
		url:    s.URL,
		bucket: func(t *testing.T) string { return s.Bucket(t) },
		uri:    s.URI,
		at:     func(_ *testing.T, endpoint string) service { return s3Service(s.At(endpoint)) },
		deny:   func(t *testing.T, p ...string) service { return s3Service(peers.DenyS3(t, s, p...)) },
	}
}

func gcsService(g *peers.GCS) service {
	return service{
		url:    g.URL,
		bucket: func(t *testing.T) string { return g.Bucket(t) },
		uri:    g.URI,
		at:     func(_ *testing.T, endpoint string) service { return gcsService(g.At(endpoint)) },
		deny:   func(t *testing.T, p ...string) service { return gcsService(peers.DenyGCS(t, g, p...)) },
	}
}

func azureService(a *peers.Azure) service {
	return service{
		url:    a.URL,
		bucket: func(t *testing.T) string { return a.Container(t) },
		uri:    a.URI,
		at:     func(t *testing.T, endpoint string) service { return azureService(a.At(t, endpoint)) },
		deny:   func(t *testing.T, p ...string) service { return azureService(peers.DenyAzure(t, a, p...)) },
	}
}

// TestServices runs everything that is the same for all services.
func TestServices(t *testing.T) {
	for _, p := range []struct {
		name  string
		start func(t *testing.T) service
	}{
		{"versitygw", func(t *testing.T) service { return s3Service(peers.VersityGW(t)) }},
		{"gofakes3", func(t *testing.T) service { return s3Service(peers.GoFakeS3(t)) }},
		{"fake-gcs-server", func(t *testing.T) service { return gcsService(peers.FakeGCS(t)) }},
		{"azurite", func(t *testing.T) service { return azureService(peers.Azurite(t)) }},
	} {
		t.Run(p.name, func(t *testing.T) {
			s := p.start(t)
			for _, test := range []struct {
				name string
				run  func(t *testing.T, s service)
			}{
				{"Store", testStore},
				{"WithoutPrefix", testWithoutPrefix},
				{"MissingBucket", testMissingBucket},
				{"Make", testMake},
				{"Denied", testDenied},
				{"DeniedReadOfNothing", testDeniedReadOfNothing},
				{"LostAnswer", testLostAnswer},
				{"OddAnswers", testOddAnswers},
				{"Unreachable", testUnreachable},
				{"EndlessAnswer", testEndlessAnswer},
				{"HostileAnswers", testHostileAnswers},
			} {
				t.Run(test.name, func(t *testing.T) { test.run(t, s) })
			}
		})
	}
}

func open(t *testing.T, uri string) envelope.Store {
	t.Helper()
	s, err := stores.Mux().Open(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.(io.Closer).Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustBe checks an error's class and that its text has all the words.
func mustBe(t *testing.T, err, class error, words ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Errorf("%v, want %v", err, class)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q says nothing of %q", err, w)
		}
	}
}

func testStore(t *testing.T, s service) {
	envelopetest.RunStore(t, func(t *testing.T) (a, b envelope.Store) {
		// What lies around the prefix is not ours.
		bucket := s.bucket(t)
		for _, prefix := range []string{"", "&prefix=clusters/", "&prefix=clusters/a/b/"} {
			must(t, open(t, s.uri(bucket)+prefix).Create(t.Context(), "foreign", []byte("x")))
		}
		uri := s.uri(bucket) + "&prefix=clusters/a/"
		return open(t, uri), open(t, uri)
	})
}

func testWithoutPrefix(t *testing.T, s service) {
	uri := s.uri(s.bucket(t))
	store := open(t, uri)
	for _, name := range []string{"d", "b", "e"} {
		must(t, store.Create(t.Context(), name, []byte("x")))
	}
	for _, foreign := range []string{"a/", "c/", "f/"} {
		must(t, open(t, uri+"&prefix="+foreign).Create(t.Context(), "foreign", []byte("x")))
	}
	for limit := range 4 {
		var all []string
		for token, more := "", true; more; more = token != "" {
			names, next, err := store.List(t.Context(), token, limit)
			must(t, err)
			all, token = append(all, names...), next
		}
		if got := strings.Join(all, " "); got != "b d e" {
			t.Errorf("List by %d: %s", limit, got)
		}
	}
}

// Real services, where an environment variable names a store; what is in it is
// deleted first.
func TestRealClouds(t *testing.T) {
	for _, name := range []string{"S3", "GS", "AZBLOB"} {
		uri := os.Getenv("TEST_STORE_URI_" + name)
		if uri == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			envelopetest.RunStore(t, func(t *testing.T) (a, b envelope.Store) {
				a = open(t, uri)
				empty(t, a)
				return a, open(t, uri)
			})
		})
	}
}

func empty(t *testing.T, s envelope.Store) {
	t.Helper()
	for {
		names, _, err := s.List(t.Context(), "", 100)
		must(t, err)
		if len(names) == 0 {
			return
		}
		for _, name := range names {
			_, version, err := s.Read(t.Context(), name)
			must(t, err)
			must(t, s.Delete(t.Context(), name, version))
		}
	}
}

// every returns each operation.
func every(ctx context.Context, s envelope.Store, version string) map[string]func() error {
	return map[string]func() error{
		envelope.OpCreate: func() error { return s.Create(ctx, "two", []byte("x")) },
		envelope.OpRead: func() error {
			_, _, err := s.Read(ctx, "one")
			return err
		},
		envelope.OpReplace: func() error { return s.Replace(ctx, "one", []byte("y"), version) },
		envelope.OpDelete:  func() error { return s.Delete(ctx, "one", version) },
		envelope.OpList: func() error {
			_, _, err := s.List(ctx, "", 10)
			return err
		},
		envelope.OpErase: func() error {
			_, err := s.(envelope.Eraser).EraseHistory(ctx, "one")
			return err
		},
	}
}

// put makes the object "one" and returns its version.
func put(t *testing.T, s envelope.Store) (version string) {
	t.Helper()
	must(t, s.Create(t.Context(), "one", []byte("first")))
	_, version, err := s.Read(t.Context(), "one")
	must(t, err)
	return version
}

// A bucket that is missing must never look like an object that is missing.
func testMissingBucket(t *testing.T, s service) {
	version := put(t, open(t, s.uri(s.bucket(t))))
	for op, do := range every(t.Context(), open(t, s.uri(peers.BucketName())), version) {
		t.Run(op, func(t *testing.T) { mustBe(t, do(), errdefs.ErrState, "key-service store create") })
	}
}

func testMake(t *testing.T, s service) {
	store := open(t, s.uri(peers.BucketName()))
	must(t, store.(envelope.Maker).Make(t.Context()))
	version := put(t, store)
	must(t, store.(envelope.Maker).Make(t.Context()))
	data, again, err := store.Read(t.Context(), "one")
	if err != nil || string(data) != "first" || again != version {
		t.Errorf("after Make again: %q, %v", data, err)
	}
}

// Every operation that is refused says which permission it needs, and every
// permission that is named is one that the operation needs.
func testDenied(t *testing.T, s service) {
	bucket := s.bucket(t)
	version := put(t, open(t, s.uri(bucket)))
	named := open(t, s.uri(bucket)).(envelope.Permitter).Permissions()
	for op, permissions := range named {
		for permission := range strings.SplitSeq(permissions, ", ") {
			if seldom(op, permission) {
				continue
			}
			t.Run(op+"/"+permission[strings.LastIndexAny(permission, ":/")+1:], func(t *testing.T) {
				store := open(t, s.deny(t, permission).uri(bucket))
				var err error
				if op == envelope.OpMake {
					fresh := open(t, s.deny(t, permission).uri(peers.BucketName()))
					err = fresh.(envelope.Maker).Make(t.Context())
				} else {
					err = every(t.Context(), store, version)[op]()
				}
				mustBe(t, err, errdefs.ErrDenied, permission)
			})
		}
	}
	data, again, err := open(t, s.uri(bucket)).Read(t.Context(), "one")
	if err != nil || string(data) != "first" || again != version {
		t.Errorf("afterwards: %q, %v", data, err)
	}
}

// seldom says that the operation needs the permission only where there is
// something special: nothing to read, versions to delete, a bucket already.
func seldom(op, permission string) bool {
	return strings.Contains(strings.Join([]string{
		"read s3:ListBucket", "read storage.objects.list",
		"make storage.buckets.list", "make s3:PutBucketPublicAccessBlock",
		"erase-history s3:DeleteObjectVersion", "erase-history s3:GetObjectRetention", "erase-history s3:GetObjectLegalHold",
		"erase-history storage.objects.delete", "erase-history storage.buckets.get",
		"erase-history " + peers.AzureBlobs + "delete", "erase-history " + peers.AzureBlobs + "deleteBlobVersion/action",
	}, "\n"), op+" "+permission)
}

// Who may not list is told "denied" for what does not exist.
func testDeniedReadOfNothing(t *testing.T, s service) {
	bucket := s.bucket(t)
	scheme, _, _ := strings.Cut(s.uri(bucket), ":")
	permission := map[string]string{"s3": "s3:ListBucket", "gs": "storage.objects.list"}[scheme]
	_, _, err := open(t, s.deny(t, permission).uri(bucket)).Read(t.Context(), "one")
	if permission == "" {
		mustBe(t, err, errdefs.ErrNotFound)
	} else {
		mustBe(t, err, errdefs.ErrDenied, permission)
	}
}

// When an answer is lost nothing is said of what happened, and reading tells.
func testLostAnswer(t *testing.T, s service) {
	var lose atomic.Bool
	var writes atomic.Int32
	lossy := s.at(t, peers.Proxy(t, s.url, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if lose.Load() && r.Method != http.MethodGet {
			writes.Add(1)
			peers.LoseAnswer(r, pass)
		}
		pass.ServeHTTP(w, r)
	}))
	store := open(t, lossy.uri(s.bucket(t)))
	lost := func(what string, err error, want string) (version string) {
		t.Helper()
		lose.Store(false)
		mustBe(t, err, errdefs.ErrUnavailable)
		if n := writes.Swap(0); n != 1 {
			t.Errorf("%s: %d requests, want 1", what, n)
		}
		data, version, err := store.Read(t.Context(), "one")
		if string(data) != want || want != "" && err != nil {
			t.Fatalf("after %s: %q, %v", what, data, err)
		}
		lose.Store(true)
		return version
	}
	lose.Store(true)
	version := lost("Create", store.Create(t.Context(), "one", []byte("first")), "first")
	version = lost("Replace", store.Replace(t.Context(), "one", []byte("second"), version), "second")
	lost("Delete", store.Delete(t.Context(), "one", version), "")
	_, _, err := store.Read(t.Context(), "one")
	mustBe(t, err, errdefs.ErrNotFound)
}

// Whatever else is answered, it is never "not found", and nothing is done.
func testOddAnswers(t *testing.T, s service) {
	bucket := s.bucket(t)
	version := put(t, open(t, s.uri(bucket)))
	for _, tc := range []struct {
		name   string
		answer http.HandlerFunc
		class  error
	}{
		{"a web server's 404", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, "<html>no such page</html>")
		}, errdefs.ErrState},
		{"500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }, errdefs.ErrUnavailable},
		{"503", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, errdefs.ErrUnavailable},
		{"429", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) }, errdefs.ErrUnavailable},
		{"403", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, errdefs.ErrDenied},
		{"dropped", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, errdefs.ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting before another try
			odd := s.at(t, peers.Proxy(t, s.url, func(w http.ResponseWriter, r *http.Request, _ http.Handler) { tc.answer(w, r) }))
			var wg sync.WaitGroup
			for op, do := range every(t.Context(), open(t, odd.uri(bucket)), version) {
				wg.Go(func() {
					if err := do(); !errors.Is(err, tc.class) {
						t.Errorf("%s: %v, want %v", op, err, tc.class)
					}
				})
			}
			wg.Wait()
		})
	}
}

func testUnreachable(t *testing.T, s service) {
	bucket := s.bucket(t)
	version := put(t, open(t, s.uri(bucket)))
	t.Run("nobody listens", func(t *testing.T) {
		for op, do := range every(t.Context(), open(t, s.at(t, "http://"+peers.Addr(t)).uri(bucket)), version) {
			if err := do(); !errors.Is(err, errdefs.ErrUnavailable) {
				t.Errorf("%s: %v", op, err)
			}
		}
	})
	t.Run("nobody answers", func(t *testing.T) {
		store := open(t, s.at(t, "http://"+peers.Silent(t)).uri(bucket))
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		_, _, err := store.Read(ctx, "one")
		mustBe(t, err, context.DeadlineExceeded)
		mustBe(t, store.Create(ctx, "two", nil), context.DeadlineExceeded)
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("took %s", d)
		}
	})
}

// An answer without end does not fill the memory.
func testEndlessAnswer(t *testing.T, s service) {
	var sent atomic.Int64
	endless := s.at(t, peers.Proxy(t, s.url, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/xml")
		w.Header().Set("ETag", `"x"`)
		w.Header().Set("X-Goog-Generation", "1")
		for r.Context().Err() == nil {
			n, err := w.Write(make([]byte, 64<<10))
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	}))
	store := open(t, endless.uri(s.bucket(t)))
	_, _, err := store.Read(t.Context(), "one")
	if err == nil || errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("Read: %v", err)
	}
	if _, _, err = store.List(t.Context(), "", 10); err == nil {
		t.Error("List is content with it")
	}
	if n := sent.Load(); n > 200<<20 {
		t.Errorf("%d bytes were read", n)
	}
}

// Nothing that is answered makes us panic, or believe that an object does not exist.
func testHostileAnswers(t *testing.T, s service) {
	bucket := s.bucket(t)
	version := put(t, open(t, s.uri(bucket)))
	for _, body := range []string{
		"", "{}", "null", `{"items":[null]}`, `{"items":[{}],"prefixes":[""]}`, `{"error":{"code":404}}`,
		"<a/>", "<EnumerationResults/>", "<EnumerationResults><Blobs><Blob/></Blobs></EnumerationResults>",
		"<EnumerationResults><Blobs><Blob><Name>one</Name><Snapshot/></Blob></Blobs></EnumerationResults>",
		"<ListBucketResult><Contents/><CommonPrefixes/></ListBucketResult>",
		"<ListVersionsResult><Version/><DeleteMarker/><IsTruncated>true</IsTruncated></ListVersionsResult>",
	} {
		hostile := s.at(t, peers.Proxy(t, s.url, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header()["Content-Type"] = []string{"application/xml"}
			_, _ = io.WriteString(w, body)
		}))
		store := open(t, hostile.uri(bucket))
		for op, do := range every(t.Context(), store, version) {
			if err := do(); errors.Is(err, errdefs.ErrNotFound) || op == envelope.OpRead && err == nil {
				t.Errorf("%s, answered %q: %v", op, body, err)
			}
		}
		_ = store.(envelope.Maker).Make(t.Context())
	}
}

func TestTooLong(t *testing.T) {
	s := peers.VersityGW(t)
	bucket := s.Bucket(t)
	_, err := s.Client.PutObject(t.Context(), &s3.PutObjectInput{Bucket: &bucket, Key: aws.String("one"), Body: strings.NewReader(strings.Repeat("x", envelope.MaxObject+1))})
	must(t, err)
	_, _, err = open(t, s.URI(bucket)).Read(t.Context(), "one")
	mustBe(t, err, errdefs.ErrCorrupt)
}

// The service that the start-up probe must find out.
func TestDeaf(t *testing.T) {
	s := peers.DeafS3(t)
	store := open(t, s.URI(s.Bucket(t)))
	version := put(t, store)
	must(t, store.Create(t.Context(), "one", []byte("second")))
	must(t, store.Replace(t.Context(), "one", []byte("third"), version))
	mustBe(t, store.Delete(t.Context(), "one", version), errdefs.ErrConflict) // compared before
}

func TestOpenRefuses(t *testing.T) {
	t.Setenv("AWS_REGION", "")
	for _, tc := range []struct {
		uri   string
		words string
	}{
		{"s3://", "s3://BUCKET"},
		{"s3://bucket/folder?region=eu-west-1", "prefix"},
		{"s3:bucket", "s3://BUCKET"},
		{"s3://Bucket?region=eu-west-1", "s3://BUCKET"},
		{"s3://bucket", "region"},
		{"s3://bucket?region=eu-west-1&prefix=a", "prefix"},
		{"s3://bucket?region=eu-west-1&prefix=/a/", "prefix"},
		{"s3://bucket?region=eu-west-1&prefix=a//b/", "prefix"},
		{"s3://bucket?region=eu-west-1&prefix=../", "prefix"},
		{"s3://bucket?region=eu-west-1&use_path_style=yes", "use_path_style"},
		{"s3://bucket?region=eu-west-1&secret=x", "secret"},
		{"gs://bucket?endpoint=http://example.com", "loopback"},
		{"gs://bucket?endpoint=ftp://127.0.0.1", "endpoint"},
		{"gs://bucket?credentials-file=/does/not/exist", "credentials file"},
		{"gs://bucket?credentials-file=/dev/null", "regular file"},
		{"gs://b", "gs://BUCKET"},
		{"azblob://container", "storage-account"},
		{"azblob://container?storage-account=a.b", "storage-account"},
		{"azblob://container?storage-account=abc&endpoint=https://x", "storage-account"},
		{"azblob://container?storage-account=abc&domain=a/b", "domain"},
		{"azblob://container?endpoint=http://127.0.0.1:1", "https"},
		{"azblob://container?connection-string-file=/does/not/exist", "connection string"},
		{"azblob://container?connection-string-file=/dev/null", "connection string"},
		{"azblob://container?connection-string-file=/dev/null&storage-account=abc", "together"},
		{"azblob://a--b?storage-account=abc", "azblob://CONTAINER"},
	} {
		t.Run(tc.uri, func(t *testing.T) {
			_, err := stores.Mux().Open(t.Context(), tc.uri)
			mustBe(t, err, errdefs.ErrInvalid, tc.words)
		})
	}
}

// history makes a bucket's object "one" with three old versions.
func history(t *testing.T, store envelope.Store) {
	t.Helper()
	put(t, store)
	for _, text := range []string{"second", "third", "fourth"} {
		_, version, err := store.Read(t.Context(), "one")
		must(t, err)
		must(t, store.Replace(t.Context(), "one", []byte(text), version))
	}
	must(t, store.Create(t.Context(), "one-more", []byte("x")))
	_, version, err := store.Read(t.Context(), "one-more")
	must(t, err)
	must(t, store.Replace(t.Context(), "one-more", []byte("y"), version))
}

func TestEraseHistoryS3(t *testing.T) {
	for name, s := range map[string]*peers.S3{"versitygw": peers.VersityGW(t), "gofakes3": peers.GoFakeS3(t)} {
		t.Run(name, func(t *testing.T) {
			bucket := s.VersionedBucket(t, false)
			store := open(t, s.URI(bucket))
			kept := func() (one, more int) {
				t.Helper()
				all, err := s.Client.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: &bucket})
				must(t, err)
				for _, v := range all.Versions {
					if *v.Key == "one" {
						one++
					} else {
						more++
					}
				}
				for _, m := range all.DeleteMarkers {
					if *m.Key == "one" {
						one++
					}
				}
				return one, more
			}
			history(t, store)
			if one, more := kept(); one != 4 || more != 2 {
				t.Fatalf("the bucket keeps %d and %d versions, want 4 and 2: is it versioned?", one, more)
			}
			until, err := store.(envelope.Eraser).EraseHistory(t.Context(), "one")
			must(t, err)
			if one, more := kept(); one != 1 || more != 2 || !until.IsZero() {
				t.Errorf("%d and %d versions are left, want 1 and 2; until %s", one, more, until)
			}
			data, version, err := store.Read(t.Context(), "one")
			if err != nil || string(data) != "fourth" {
				t.Errorf("the current version is %q, %v", data, err)
			}
			must(t, store.Delete(t.Context(), "one", version))
			until, err = store.(envelope.Eraser).EraseHistory(t.Context(), "one")
			must(t, err)
			if one, more := kept(); one != 0 || more != 2 || !until.IsZero() {
				t.Errorf("after Delete %d and %d versions are left, want 0 and 2; until %s", one, more, until)
			}
			_, _, err = store.Read(t.Context(), "one")
			mustBe(t, err, errdefs.ErrNotFound)
		})
	}
}

func TestEraseHistoryLocked(t *testing.T) {
	s := peers.VersityGW(t)
	bucket := s.VersionedBucket(t, true)
	store := open(t, s.URI(bucket))
	history(t, store)
	all, err := s.Client.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: &bucket, Prefix: aws.String("one")})
	must(t, err)
	lockedUntil := time.Now().Add(time.Hour).Truncate(time.Second)
	var old []types.ObjectVersion
	for _, v := range all.Versions {
		if *v.Key == "one" && !*v.IsLatest {
			old = append(old, v)
		}
	}
	_, err = s.Client.PutObjectRetention(t.Context(), &s3.PutObjectRetentionInput{
		Bucket: &bucket, Key: old[0].Key, VersionId: old[0].VersionId,
		Retention: &types.ObjectLockRetention{Mode: types.ObjectLockRetentionModeCompliance, RetainUntilDate: &lockedUntil},
	})
	must(t, err)
	until, err := store.(envelope.Eraser).EraseHistory(t.Context(), "one")
	if err != nil || !until.Equal(lockedUntil) {
		t.Errorf("EraseHistory: %s, %v, want %s", until, err, lockedUntil)
	}
	left, err := s.Client.ListObjectVersions(t.Context(), &s3.ListObjectVersionsInput{Bucket: &bucket, Prefix: aws.String("one")})
	must(t, err)
	if n := len(left.Versions); n != 2+2 { // the current one and the locked one; another object's two
		t.Errorf("%d versions are left", n)
	}
	// Deleted, the object stays deleted, though the marker is not the last thing that is left.
	_, version, err := store.Read(t.Context(), "one")
	must(t, err)
	must(t, store.Delete(t.Context(), "one", version))
	until, err = store.(envelope.Eraser).EraseHistory(t.Context(), "one")
	if err != nil || !until.Equal(lockedUntil) {
		t.Errorf("EraseHistory after Delete: %s, %v, want %s", until, err, lockedUntil)
	}
	_, _, err = store.Read(t.Context(), "one")
	mustBe(t, err, errdefs.ErrNotFound)
}

func TestEraseHistoryGCS(t *testing.T) {
	s := peers.FakeGCS(t)
	bucket := s.VersionedBucket(t)
	store := open(t, s.URI(bucket))
	kept := func() (one, more int) {
		t.Helper()
		all := s.Client.Bucket(bucket).Objects(t.Context(), &storage.Query{Versions: true})
		for {
			o, err := all.Next()
			if errors.Is(err, iterator.Done) {
				return one, more
			}
			must(t, err)
			if o.Name == "one" {
				one++
			} else {
				more++
			}
		}
	}
	history(t, store)
	if one, more := kept(); one != 4 || more != 2 {
		t.Fatalf("the bucket keeps %d and %d generations, want 4 and 2: is it versioned?", one, more)
	}
	until, err := store.(envelope.Eraser).EraseHistory(t.Context(), "one")
	must(t, err)
	if one, more := kept(); one != 1 || more != 2 || !until.IsZero() {
		t.Errorf("%d and %d generations are left, want 1 and 2; until %s", one, more, until)
	}
	data, version, err := store.Read(t.Context(), "one")
	if err != nil || string(data) != "fourth" {
		t.Errorf("the current one is %q, %v", data, err)
	}
	must(t, store.Delete(t.Context(), "one", version))
	if _, err = store.(envelope.Eraser).EraseHistory(t.Context(), "one"); err != nil {
		t.Error(err)
	}
	if one, more := kept(); one != 0 || more != 2 {
		t.Errorf("after Delete %d and %d generations are left, want 0 and 2", one, more)
	}
}

// nowhere is behind a proxy that answers everything by itself.
const nowhere = "http://127.0.0.1:1"

// What the fake does not have: retention, holds, soft delete.
func TestEraseHistoryGCSKept(t *testing.T) {
	soon, late := time.Now().Add(time.Hour).Truncate(time.Second), time.Now().Add(48*time.Hour).Truncate(time.Second)
	item := func(name string, generation int, more string) string {
		return fmt.Sprintf(`{"name":%q,"generation":"%d"%s}`, name, generation, more)
	}
	const deleted = `,"timeDeleted":"2020-01-01T00:00:00Z"`
	at := func(name string, when time.Time) string {
		return fmt.Sprintf(`,%q:%q`, name, when.Format(time.RFC3339))
	}
	for _, tc := range []struct {
		name           string
		versions, soft []string
		policy         int // status of listing what is soft-deleted
		until          time.Time
		class          error
	}{
		{"retention", []string{item("one", 1, deleted+at("retentionExpirationTime", soon)), item("one", 2, "")}, nil, 200, soon, nil},
		{"the latest counts", []string{item("one", 1, deleted+at("retentionExpirationTime", soon))}, []string{item("one", 1, at("hardDeleteTime", late))}, 200, late, nil},
		{"another object's", nil, []string{item("one-more", 1, at("hardDeleteTime", late))}, 200, time.Time{}, nil},
		{"no policy", nil, nil, 400, time.Time{}, nil},
		{"hold", []string{item("one", 1, deleted+`,"temporaryHold":true`)}, nil, 200, time.Time{}, errdefs.ErrDenied},
		{"no permission", []string{item("one", 1, deleted)}, nil, 200, time.Time{}, errdefs.ErrDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			endpoint := peers.Proxy(t, nowhere, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
				w.Header().Set("Content-Type", "application/json")
				switch q := r.URL.Query(); {
				case r.Method == http.MethodDelete:
					w.WriteHeader(http.StatusForbidden)
				case q.Get("softDeleted") == "true":
					w.WriteHeader(tc.policy)
					fmt.Fprintf(w, `{"items":[%s]}`, strings.Join(tc.soft, ","))
				case q.Get("versions") == "true":
					fmt.Fprintf(w, `{"items":[%s]}`, strings.Join(tc.versions, ","))
				default:
					fmt.Fprint(w, `{"name":"bucket"}`)
				}
			})
			until, err := open(t, (&peers.GCS{}).At(endpoint).URI("bucket")).(envelope.Eraser).EraseHistory(t.Context(), "one")
			if !until.Equal(tc.until) || !errors.Is(err, tc.class) {
				t.Errorf("until %s, %v, want %s, %v", until, err, tc.until, tc.class)
			}
		})
	}
}

func TestEraseHistoryAzure(t *testing.T) {
	s := peers.Azurite(t)
	name := s.Container(t)
	store := open(t, s.URI(name))
	kept := func(prefix string) (n int) {
		t.Helper()
		pages := s.Client.NewListBlobsFlatPager(name, &azblob.ListBlobsFlatOptions{Prefix: &prefix, Include: azblob.ListBlobsInclude{Snapshots: true}})
		for pages.More() {
			page, err := pages.NextPage(t.Context())
			must(t, err)
			n += len(page.Segment.BlobItems)
		}
		return n
	}
	history(t, store)
	for _, key := range []string{"one", "one", "one-more"} {
		_, err := s.Client.ServiceClient().NewContainerClient(name).NewBlobClient(key).CreateSnapshot(t.Context(), nil)
		must(t, err)
	}
	if n := kept("one"); n != 5 {
		t.Fatalf("%d blobs and snapshots, want 5", n)
	}
	until, err := store.(envelope.Eraser).EraseHistory(t.Context(), "one")
	if err != nil || !until.IsZero() {
		t.Errorf("until %s, %v", until, err)
	}
	if n, more := kept("one"), kept("one-more"); n != 3 || more != 2 {
		t.Errorf("%d blobs and snapshots are left, want 3; %d of another object, want 2", n, more)
	}
	_, err = s.Client.ServiceClient().NewContainerClient(name).NewBlobClient("one").CreateSnapshot(t.Context(), nil)
	must(t, err)
	data, version, err := store.Read(t.Context(), "one")
	if err != nil || string(data) != "fourth" {
		t.Errorf("the current one is %q, %v", data, err)
	}
	must(t, store.Delete(t.Context(), "one", version))
	if n := kept("one"); n != 2 {
		t.Errorf("after Delete %d blobs and snapshots are left, want 2", n)
	}
}

// What Azurite does not have: versions, locks, soft delete.
func TestEraseHistoryAzureKept(t *testing.T) {
	lock := time.Now().Add(time.Hour).Truncate(time.Second)
	version := func(id string, current bool, properties string) string {
		return fmt.Sprintf("<Blob><Name>one</Name><VersionId>%s</VersionId><IsCurrentVersion>%t</IsCurrentVersion><Properties>%s</Properties></Blob>", id, current, properties)
	}
	const soft = "<Blob><Name>one</Name><Deleted>true</Deleted><VersionId>v1</VersionId><Properties><RemainingRetentionDays>6</RemainingRetentionDays></Properties></Blob>"
	for _, tc := range []struct {
		name          string
		before, after string // listed before and after something was deleted
		erased        string // versions
		locked        bool
		least, most   time.Duration // from now
		class         error
	}{
		{"versions", version("v1", false, "") + version("v2", true, ""), version("v2", true, ""), "v1", false, 0, 0, nil},
		{"deleted with versions", version("v1", false, ""), "", "v1", false, 0, 0, nil},
		{"soft delete", version("v1", false, "") + version("v2", true, ""), soft + version("v2", true, ""), "v1", false, 6 * 24 * time.Hour, 7*24*time.Hour + time.Minute, nil},
		{"lock", version("v1", false, "<ImmutabilityPolicyUntilDate>"+lock.UTC().Format(http.TimeFormat)+"</ImmutabilityPolicyUntilDate>"), "", "", true, 59 * time.Minute, time.Hour, nil},
		{"legal hold", version("v1", false, "<LegalHold>true</LegalHold>"), "", "", true, 0, 0, errdefs.ErrDenied},
		{"no permission", version("v1", false, ""), "", "", true, 0, 0, errdefs.ErrDenied},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var erased []string
			endpoint := peers.Proxy(t, nowhere, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
				switch list := tc.before; {
				case r.Method == http.MethodDelete && tc.locked:
					w.Header().Set("X-Ms-Error-Code", "BlobImmutableDueToPolicy")
					w.WriteHeader(http.StatusConflict)
				case r.Method == http.MethodDelete:
					erased = append(erased, r.URL.Query().Get("versionid"))
					w.WriteHeader(http.StatusAccepted)
				default:
					if len(erased) > 0 {
						list = tc.after
					}
					w.Header().Set("Content-Type", "application/xml")
					fmt.Fprintf(w, "<?xml version=\"1.0\"?><EnumerationResults><Blobs>%s</Blobs></EnumerationResults>", list)
				}
			})
			until, err := open(t, (&peers.Azure{}).At(t, endpoint).URI("container")).(envelope.Eraser).EraseHistory(t.Context(), "one")
			if !errors.Is(err, tc.class) || strings.Join(erased, " ") != tc.erased {
				t.Errorf("erased %q, %v, want %q, %v", erased, err, tc.erased, tc.class)
			}
			if d := time.Until(until); until.IsZero() != (tc.most == 0) || !until.IsZero() && (d < tc.least-time.Minute || d > tc.most) {
				t.Errorf("until %s, want in %s to %s", until, tc.least, tc.most)
			}
		})
	}
}
