package peers

import (
	"crypto/rand"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sys/unix"
)

// S3 is a service like Amazon S3.
type S3 struct {
	// URL is http://127.0.0.1:PORT.
	URL string
	// CredentialsFile is a shared-credentials file.
	CredentialsFile string
	// Client may do everything.
	Client *s3.Client
}

const (
	s3Access, s3Secret, s3Region = "test", "testtest", "us-east-1"
)

// VersityGW starts versitygw, which checks signatures, keeps versions where a
// bucket asks for it, and knows object lock.
func VersityGW(t testing.TB) *S3 {
	t.Helper()
	program, addr, dir := Program(t, "versitygw"), Addr(t), t.TempDir()
	data, versions := filepath.Join(dir, "data"), filepath.Join(dir, "versions")
	must(t, os.Mkdir(data, 0o700))
	must(t, os.Mkdir(versions, 0o700))
	args := []string{"--access", s3Access, "--secret", s3Secret, "--region", s3Region, "--port", addr, "--keep-alive", "--quiet", "posix", "--versioning-dir", versions}
	if err := unix.Setxattr(data, "user.test", []byte("x"), 0); err != nil {
		sidecar := filepath.Join(dir, "sidecar")
		must(t, os.Mkdir(sidecar, 0o700))
		args = append(args, "--sidecar", sidecar)
	}
	Start(t, addr, exec.Command(program, append(args, data)...))
	return newS3(t, "http://"+addr)
}

// GoFakeS3 starts gofakes3, which takes any signature.
func GoFakeS3(t testing.TB) *S3 {
	t.Helper()
	program, addr := Program(t, "gofakes3"), Addr(t)
	Start(t, addr, exec.Command(program, "-backend", "memory", "-host", addr))
	return newS3(t, "http://"+addr)
}

func newS3(t testing.TB, endpoint string) *S3 {
	t.Helper()
	file := filepath.Join(t.TempDir(), "credentials")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n", s3Access, s3Secret), 0o600))
	return &S3{URL: endpoint, CredentialsFile: file, Client: s3.New(s3.Options{
		Region: s3Region, BaseEndpoint: &endpoint, UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(s3Access, s3Secret, ""),
	})}
}

// At is the same service behind another URL.
func (s *S3) At(endpoint string) *S3 {
	return &S3{URL: endpoint, CredentialsFile: s.CredentialsFile, Client: s.Client}
}

// URI returns the store URI of a bucket, which may not exist.
func (s *S3) URI(bucket string) string {
	return "s3://" + bucket + "?region=" + s3Region + "&use_path_style=true&endpoint=" + s.URL + "&credentials-file=" + url.PathEscape(s.CredentialsFile)
}

// Bucket makes a new one, without versions, and returns its name.
func (s *S3) Bucket(t testing.TB) string {
	t.Helper()
	name := BucketName()
	_, err := s.Client.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: &name})
	must(t, err)
	return name
}

// VersionedBucket makes a new one that keeps versions; with lock, objects in it
// can be locked.
func (s *S3) VersionedBucket(t testing.TB, lock bool) string {
	t.Helper()
	name := BucketName()
	_, err := s.Client.CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: &name, ObjectLockEnabledForBucket: aws.Bool(lock)})
	must(t, err)
	_, err = s.Client.PutBucketVersioning(t.Context(), &s3.PutBucketVersioningInput{
		Bucket: &name, VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled},
	})
	must(t, err)
	return name
}

// BucketName is a name for a new bucket, which every service takes.
func BucketName() string { return "test-" + strings.ToLower(rand.Text()[:16]) }

// DeafS3 starts a service that ignores conditions, as some do.
func DeafS3(t testing.TB) *S3 {
	t.Helper()
	s := GoFakeS3(t) // it does not mind that signed headers are missing
	return s.At(Proxy(t, s.URL, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		r.Header.Del("If-Match")
		r.Header.Del("If-None-Match")
		pass.ServeHTTP(w, r)
	}))
}

// DenyS3 is s for someone who lacks the permissions that are named ("s3:PutObject"),
// and what AWS answers then.
func DenyS3(t testing.TB, s *S3, permissions ...string) *S3 {
	t.Helper()
	return s.At(Proxy(t, s.URL, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		needed := s3Permissions(r)
		for _, permission := range needed {
			if slices.Contains(permissions, permission) {
				denyS3(w, r, permission)
				return
			}
		}
		answer := httptest.NewRecorder()
		pass.ServeHTTP(answer, r)
		if needed[0] == "s3:GetObject" && answer.Code == http.StatusNotFound && slices.Contains(permissions, "s3:ListBucket") {
			denyS3(w, r, "s3:ListBucket") // who may not list may not learn what is missing
			return
		}
		copyAnswer(w, answer)
	}))
}

// s3Permissions are what a request needs. Conditions on an object's content
// are reading too.
func s3Permissions(r *http.Request) []string {
	_, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	q, verb := r.URL.Query(), map[string]string{
		http.MethodPut: "Put", http.MethodDelete: "Delete", http.MethodGet: "Get", http.MethodHead: "Get",
	}[r.Method]
	switch {
	case key != "" && q.Has("retention"):
		return []string{"s3:" + verb + "ObjectRetention"}
	case key != "" && q.Has("legal-hold"):
		return []string{"s3:" + verb + "ObjectLegalHold"}
	case key != "" && q.Has("versionId"):
		return []string{"s3:" + verb + "ObjectVersion"}
	case key != "" && r.Header.Get("If-Match") != "":
		return []string{"s3:" + verb + "Object", "s3:GetObject"}
	case key != "":
		return []string{"s3:" + verb + "Object"}
	case q.Has("versions"):
		return []string{"s3:ListBucketVersions"}
	case q.Has("publicAccessBlock"):
		return []string{"s3:" + verb + "BucketPublicAccessBlock"}
	case r.Method == http.MethodPut:
		return []string{"s3:CreateBucket"}
	}
	return []string{"s3:ListBucket"}
}

func denyS3(w http.ResponseWriter, r *http.Request, permission string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(http.StatusForbidden)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>AccessDenied</Code><Message>User: arn:aws:iam::111122223333:user/test is not authorized to perform: %[1]s on resource: "arn:aws:s3:::%[2]s" because no identity-based policy allows the %[1]s action</Message><RequestId>TEST</RequestId><HostId>TEST</HostId></Error>`,
		permission, strings.TrimPrefix(r.URL.Path, "/"))
}

func copyAnswer(w http.ResponseWriter, answer *httptest.ResponseRecorder) {
	maps.Copy(w.Header(), answer.Header())
	w.WriteHeader(answer.Code)
	_, _ = w.Write(answer.Body.Bytes())
}
