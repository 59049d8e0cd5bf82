package metrics_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/internal/metrics"
	"github.com/cryptcsi/cryptcsi/kms"
)

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func TestServe(t *testing.T) {
	s := metrics.New([]float64{.1, 1}, map[string]string{"version": "v1"})
	s.RPC("/a/B", "OK", 50*time.Millisecond)
	s.KMS(kms.Call{Scheme: "static", Op: "unwrap", Duration: 2 * time.Second, Err: errdefs.Errorf(errdefs.ErrDenied, "no")})
	s.Gauge("cryptcsi_seven", "Seven.", func() float64 { return 7 })
	var away atomic.Bool
	server := httptest.NewServer(s.Handler(func(context.Context) error {
		if away.Load() {
			return errors.New("the driver is away")
		}
		return nil
	}))
	defer server.Close()
	url := server.URL
	_, text := get(t, url+"/metrics")
	for _, line := range []string{
		`cryptcsi_rpc_seconds_bucket{code="OK",method="/a/B",le="0.1"} 1`,
		`cryptcsi_kms_call_seconds_bucket{operation="unwrap",result="permission denied",scheme="static",le="1"} 0`,
		`cryptcsi_kms_call_seconds_count{operation="unwrap",result="permission denied",scheme="static"} 1`,
		`cryptcsi_build_info{version="v1"} 1`, "cryptcsi_seven 7", "process_open_fds ", "go_goroutines ",
	} {
		if !strings.Contains(text, "\n"+line) {
			t.Errorf("no line %q in\n%s", line, text)
		}
	}
	for _, want := range []struct {
		path, body string
		code       int
		away       bool
	}{
		{"/healthz", "ok\n", 200, false}, {"/readyz", "ok\n", 200, false},
		{"/healthz", "ok\n", 200, true}, {"/readyz", "the driver is away\n", 503, true},
	} {
		away.Store(want.away)
		if code, body := get(t, url+want.path); code != want.code || body != want.body {
			t.Errorf("%s (away: %v) is %d %q", want.path, want.away, code, body)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Serve(ctx, "127.0.0.1:0", nil); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("Serve that was stopped: %v", err)
	}
	if err := s.Serve(t.Context(), "nowhere", nil); err == nil || !strings.Contains(err.Error(), "--metrics-address") {
		t.Errorf("an address that is none: %v", err)
	}
}

func TestResult(t *testing.T) {
	for want, err := range map[string]error{
		"ok":                         nil,
		"unavailable":                fmt.Errorf("x: %w", errdefs.Errorf(errdefs.ErrUnavailable, "y")),
		"not found":                  errdefs.ErrNotFound,
		"already exists and differs": errdefs.ErrExists,
		"operation in progress":      errdefs.ErrConflict,
		context.Canceled.Error():     fmt.Errorf("x: %w", context.Canceled),
		"other":                      errors.New("whatever"),
	} {
		if got := metrics.Result(err); got != want {
			t.Errorf("%v is %q, want %q", err, got, want)
		}
	}
}
