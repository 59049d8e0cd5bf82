package main

import (
	"errors"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cryptcsi/cryptcsi/cryptmapper"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyclient"
)

// TestKeyServiceInMetrics: an operator sees that the key service is away, and
// how often it was asked again.
func TestKeyServiceInMetrics(t *testing.T) {
	m := newMeasured("2.6.1", func() ([]cryptmapper.Mapping, error) { return nil, nil }, func() []string { return nil })
	c, err := keyclient.New(keyclient.Config{Address: "unix://" + filepath.Join(t.TempDir(), "none.sock"),
		Attempts: 3, Timeout: 50 * time.Millisecond, Backoff: time.Millisecond, Observe: m.keyCall})
	if err != nil {
		t.Fatal(err)
	}
	m.watchKeyService(c.State)
	if _, err := c.GetDEK(t.Context(), "d/v"); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatalf("GetDEK from nobody: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	page := httptest.NewRecorder()
	m.Handler(nil).ServeHTTP(page, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	for _, line := range []string{
		`cryptcsi_key_service_state{state="shutdown"} 1`, `cryptcsi_key_service_state{state="ready"} 0`,
		`cryptcsi_key_service_state{state="idle"} 0`, `cryptcsi_key_service_state{state="transient_failure"} 0`, `cryptcsi_key_service_state{state="connecting"} 0`,
		`cryptcsi_key_service_retries_total{method="GetDEK"} 2`,
		`cryptcsi_key_service_call_seconds_count{code="DeadlineExceeded",method="GetDEK"} 3`,
	} {
		if !strings.Contains(page.Body.String(), "\n"+line+"\n") {
			t.Errorf("no line %q in\n%s", line, page.Body)
		}
	}
}
