package monitoring_test

import (
	"encoding/json"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/test/peers"
)

// firing returns the alerts that fire five hours after the first sample.
func firing(t *testing.T, series []string) []string {
	t.Helper()
	in, err := json.Marshal(map[string]any{"series": series, "minute": 300})
	must(t, "scenario", err)
	cmd := exec.CommandContext(t.Context(), peers.Program(t, "promql"), "fires", "rules.yaml")
	cmd.Stdin = strings.NewReader(string(in))
	out, err := cmd.Output()
	must(t, "promql fires", err)
	var found map[string]any
	must(t, "promql fires", json.Unmarshal(out, &found))
	return slices.Sorted(maps.Keys(found))
}

// TestFiring: in a healthy cluster no alert fires, and each of them, alone, where
// firing_test.yaml says.
func TestFiring(t *testing.T) {
	var cases struct {
		Healthy []string
		Alerts  map[string]struct{ Series, Without []string }
	}
	read(t, "firing_test.yaml", &cases)
	if found := firing(t, cases.Healthy); len(found) > 0 {
		t.Errorf("in a healthy cluster %v fire", found)
	}
	for name, c := range cases.Alerts {
		series := slices.Clone(c.Series)
		for _, s := range cases.Healthy {
			metric, _, _ := strings.Cut(s, " ")
			instead := func(other string) bool { return strings.HasPrefix(other, metric+" ") }
			if !slices.ContainsFunc(c.Series, instead) && !slices.ContainsFunc(c.Without, func(w string) bool { return strings.Contains(s, w) }) {
				series = append(series, s)
			}
		}
		if found := firing(t, series); !slices.Equal(found, []string{name}) {
			t.Errorf("%v fire, want %s", found, name)
		}
	}
	var file rules
	read(t, "rules.yaml", &file)
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if _, ok := cases.Alerts[r.Alert]; !ok {
				t.Errorf("nothing says when %s fires", r.Alert)
			}
		}
	}
}
