// Package monitoring_test checks alerts and dashboard: that Prometheus reads
// them, and that the programs have the metrics and labels that they ask for.
package monitoring_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/cryptcsi/cryptcsi/test/peers"
)

//go:generate sh -ec "{ printf 'apiVersion: monitoring.coreos.com/v1\\nkind: PrometheusRule\\nmetadata:\\n  name: cryptcsi\\n  namespace: cryptcsi\\n  labels:\\n    app.kubernetes.io/name: cryptcsi\\nspec:\\n'; sed -e '/^#/d' -e 's/^/  /' rules.yaml; } >prometheusrule.yaml"

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func read(t *testing.T, file string, into any) {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, file, err)
	must(t, file, yaml.UnmarshalStrict(text, into))
}

// use is what test/peers/promql finds in an expression.
type use struct {
	Where, Metric string
	Labels        []string
}

// promql reads a file of rules, or expressions from in.
func promql(t *testing.T, in string, args ...string) []use {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), peers.Program(t, "promql"), args...)
	cmd.Stdin = strings.NewReader(in)
	out, err := cmd.Output()
	if exit := (&exec.ExitError{}); errors.As(err, &exit) {
		err = fmt.Errorf("%s", exit.Stderr)
	}
	must(t, "promql", err)
	var uses []use
	must(t, "promql", json.Unmarshal(out, &uses))
	if len(uses) == 0 {
		t.Fatal("nothing is asked for")
	}
	return uses
}

// checkUses: each metric is one of metrics.yaml, with those labels, besides
// those that Prometheus and its operator give.
func checkUses(t *testing.T, uses []use) {
	t.Helper()
	var programs map[string]map[string][]string
	read(t, "metrics.yaml", &programs)
	for _, u := range uses {
		var has []string
		known, histogram := u.Metric == "up", false // Prometheus' own
		for _, metrics := range programs {
			for name, labels := range metrics {
				rest, ok := strings.CutPrefix(u.Metric, name)
				isHistogram := ok && slices.Contains([]string{"_bucket", "_count", "_sum"}, rest)
				if ok && rest == "" || isHistogram {
					known, histogram, has = true, rest == "_bucket", append(has, labels...)
				}
			}
		}
		if !known {
			t.Errorf("%s: no program has a metric %s", u.Where, u.Metric)
		}
		for _, l := range u.Labels {
			if !slices.Contains(append(has, "namespace", "pod"), l) && (l != "le" || !histogram) {
				t.Errorf("%s: %s has no label %s", u.Where, u.Metric, l)
			}
		}
	}
}

type rules struct {
	Groups []struct {
		Name  string
		Rules []struct {
			Alert, Expr, For    string
			Labels, Annotations map[string]string
		}
	}
}

// runbook is where alerts send people.
const runbook = "https://github.com/cryptcsi/cryptcsi/blob/main/docs/operations.md"

// operations are the headings of the third level that say something.
func operations(t *testing.T) map[string]bool {
	t.Helper()
	text, err := os.ReadFile("../../../../docs/operations.md")
	must(t, "operations.md", err)
	headings := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^### (.*)\n\n[^#\s].{40}`).FindAllStringSubmatch(string(text), -1) {
		headings[m[1]] = true
	}
	return headings
}

// TestAlerts: Prometheus takes the file, and each alert says what is wrong and
// what to do, with labels that it has, and has a section of docs/operations.md.
func TestAlerts(t *testing.T) {
	uses := promql(t, "", "rules.yaml")
	checkUses(t, uses)
	var file rules
	read(t, "rules.yaml", &file)
	label := regexp.MustCompile(`\$labels\.(\w+)`)
	names := map[string]bool{}
	sections := operations(t)
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if names[r.Alert] {
				t.Errorf("two alerts %s", r.Alert)
			}
			names[r.Alert] = true
			if r.Annotations["summary"] == "" || len(r.Annotations["description"]) < 80 || !slices.Contains([]string{"warning", "critical"}, r.Labels["severity"]) {
				t.Errorf("%s lacks a summary, a description or a severity", r.Alert)
			}
			if want := runbook + "#" + strings.ToLower(r.Alert); r.Annotations["runbook_url"] != want || !sections[r.Alert] {
				t.Errorf("%s: runbook_url is %q, want %q, and a section there: %v", r.Alert, r.Annotations["runbook_url"], want, sections[r.Alert])
			}
			delete(sections, r.Alert)
			for _, m := range label.FindAllStringSubmatch(r.Annotations["description"], -1) {
				if !strings.Contains(r.Expr, m[1]) && strings.Contains(r.Expr, " by ") {
					t.Errorf("%s: its description shows the label %s, which its expression drops", r.Alert, m[1])
				}
			}
		}
	}
	for name := range sections {
		if strings.HasPrefix(name, "Cryptcsi") {
			t.Errorf("docs/operations.md has a section for %s, which is no alert", name)
		}
	}
	var operators struct {
		APIVersion, Kind string
		Metadata         map[string]any
		Spec             rules
	}
	read(t, "prometheusrule.yaml", &operators)
	if !reflect.DeepEqual(operators.Spec, file) || len(names) == 0 {
		t.Error("prometheusrule.yaml is not made of rules.yaml: run make generate")
	}
}

// TestDashboard: every panel has its place, and asks for what there is.
func TestDashboard(t *testing.T) {
	var dashboard struct {
		Panels []struct {
			ID          int
			Type, Title string
			GridPos     struct{ X, Y, W, H int }
			Targets     []struct{ RefID, Expr string }
		}
	}
	text, err := os.ReadFile("dashboard.json")
	must(t, "dashboard", err)
	must(t, "dashboard", json.Unmarshal(text, &dashboard))
	var exprs []string
	taken, ids := map[[2]int]string{}, map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" || p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %d %q has another's ID, no title, or shows nothing", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				at := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if other := taken[at]; other != "" || at[0] >= 24 {
					t.Fatalf("panel %q lies on %q or outside", p.Title, other)
				}
				taken[at] = p.Title
			}
		}
		for _, target := range p.Targets {
			exprs = append(exprs, strings.ReplaceAll(target.Expr, "$__rate_interval", "5m"))
		}
	}
	checkUses(t, promql(t, strings.Join(exprs, "\n")))
}
