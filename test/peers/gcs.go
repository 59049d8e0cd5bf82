package peers

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/storage"
	"google.golang.org/api/option"
)

// GCS is a service like Google Cloud Storage, without credentials.
type GCS struct {
	// URL is http://127.0.0.1:PORT.
	URL string
	// Client may do everything.
	Client *storage.Client
}

// GCSProject is the project that every bucket belongs to.
const GCSProject = "test-project"

// FakeGCS starts fake-gcs-server. In front of it is what it lacks: the
// condition of deleting.
func FakeGCS(t testing.TB) *GCS {
	t.Helper()
	program, addr := Program(t, "fake-gcs-server"), Addr(t)
	host, port, _ := strings.Cut(addr, ":")
	Start(t, addr, exec.Command(program, "-scheme", "http", "-host", host, "-port", port, "-backend", "memory",
		"-public-host", addr, "-external-url", "http://"+addr, "-log-level", "warn"))
	client, err := storage.NewClient(t.Context(), option.WithEndpoint("http://"+addr+"/storage/v1/"), option.WithoutAuthentication(), storage.WithJSONReads())
	must(t, err)
	t.Cleanup(func() { _ = client.Close() })
	var mu sync.Mutex
	return &GCS{Client: client, URL: Proxy(t, "http://"+addr, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		if want := r.URL.Query().Get("ifGenerationMatch"); r.Method == http.MethodDelete && want != "" {
			mu.Lock()
			defer mu.Unlock()
			bucket, object, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/storage/v1/b/"), "/o/")
			attrs, err := client.Bucket(bucket).Object(object).Attrs(r.Context())
			if err == nil && strconv.FormatInt(attrs.Generation, 10) != want {
				failGCS(w, http.StatusPreconditionFailed, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")
				return
			}
		}
		pass.ServeHTTP(w, r)
	})}
}

// At is the same service behind another URL.
func (g *GCS) At(endpoint string) *GCS { return &GCS{URL: endpoint, Client: g.Client} }

// URI returns the store URI of a bucket, which may not exist.
func (g *GCS) URI(bucket string) string {
	return "gs://" + bucket + "?project=" + GCSProject + "&endpoint=" + g.URL
}

// Bucket makes a new one and returns its name.
func (g *GCS) Bucket(t testing.TB) string {
	t.Helper()
	return g.bucket(t, nil)
}

// VersionedBucket makes a new one that keeps versions.
func (g *GCS) VersionedBucket(t testing.TB) string {
	t.Helper()
	return g.bucket(t, &storage.BucketAttrs{VersioningEnabled: true})
}

func (g *GCS) bucket(t testing.TB, attrs *storage.BucketAttrs) string {
	t.Helper()
	name := BucketName()
	must(t, g.Client.Bucket(name).Create(t.Context(), GCSProject, attrs))
	return name
}

// DenyGCS is g for someone who lacks the permissions that are named
// ("storage.objects.create"), and what Google answers then.
func DenyGCS(t testing.TB, g *GCS, permissions ...string) *GCS {
	t.Helper()
	return g.At(Proxy(t, g.URL, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
		for _, permission := range gcsPermissions(r) {
			if slices.Contains(permissions, permission) {
				denyGCS(w, permission)
				return
			}
		}
		pass.ServeHTTP(w, r)
	}))
}

// gcsPermissions are what a request needs. Overwriting is deleting too.
func gcsPermissions(r *http.Request) []string {
	path := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/upload"), "/storage/v1/b")
	bucket, object, _ := strings.Cut(strings.Trim(path, "/"), "/o")
	generation := r.URL.Query().Get("ifGenerationMatch")
	switch listed := object == ""; {
	case bucket == "" && r.Method == http.MethodPost:
		return []string{"storage.buckets.create"}
	case bucket == "":
		return []string{"storage.buckets.list"}
	case !strings.HasSuffix(path, "/o") && listed:
		return []string{"storage.buckets.get"}
	case r.Method == http.MethodPost && generation != "" && generation != "0":
		return []string{"storage.objects.create", "storage.objects.delete"}
	case r.Method == http.MethodPost:
		return []string{"storage.objects.create"}
	case listed:
		return []string{"storage.objects.list"}
	case r.Method == http.MethodDelete:
		return []string{"storage.objects.delete"}
	}
	return []string{"storage.objects.get"}
}

func denyGCS(w http.ResponseWriter, permission string) {
	failGCS(w, http.StatusForbidden, "forbidden", fmt.Sprintf("test@%s.iam.gserviceaccount.com does not have %[2]s access to the Google Cloud Storage object. Permission '%[2]s' denied on resource (or it may not exist).", GCSProject, permission))
}

func failGCS(w http.ResponseWriter, status int, reason, message string) {
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]any{
		"code": status, "message": message,
		"errors": []any{map[string]any{"domain": "global", "reason": reason, "message": message}},
	}})
}
