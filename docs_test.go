package cryptcsi_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDocuments: links lead to files and headings that there are, and commands and
// tests that a document names exist.
func TestDocuments(t *testing.T) {
	pages := tracked(t, "*.md")
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := firsts(`(?m)^([a-z0-9-]+):`, string(makefile))
	var tests []string
	for _, file := range goTests(t) {
		tests = append(tests, firsts(`(?m)^func ((?:Test|Fuzz)\w+)\(`, file)...)
	}
	documents := map[string]string{}
	for _, name := range pages {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		documents[name] = string(text)
	}
	for name, text := range documents {
		for _, link := range firsts(`\]\(([^)\s]+)\)`, text) {
			if strings.HasPrefix(link, "http") {
				continue
			}
			file, heading, _ := strings.Cut(link, "#")
			to := name
			if file != "" {
				to = filepath.Join(filepath.Dir(name), file)
			}
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %s leads nowhere: %v", name, link, err)
			} else if heading != "" && !slices.Contains(anchors(documents[to]), heading) {
				t.Errorf("%s: %s: there is no such heading", name, link)
			}
		}
		for _, target := range firsts("`make ([a-z0-9-]+)", text) {
			if !slices.Contains(targets, target) {
				t.Errorf("%s: there is no make %s", name, target)
			}
		}
		for _, test := range firsts(`\b((?:Test|Fuzz)[A-Z]\w+)`, text) {
			if !slices.ContainsFunc(tests, func(known string) bool { return strings.HasPrefix(known, test) }) {
				t.Errorf("%s: there is no %s", name, test)
			}
		}
	}
	if len(documents) < 10 || len(tests) < 100 || len(targets) < 20 {
		t.Errorf("only %d documents, %d tests, %d targets: is this looking at the right place?", len(documents), len(tests), len(targets))
	}
}

// firsts are the first groups of all matches.
func firsts(expression, text string) []string {
	var all []string
	for _, m := range regexp.MustCompile(expression).FindAllStringSubmatch(text, -1) {
		all = append(all, m[1])
	}
	return all
}

// anchors are the headings of a document as links name them.
func anchors(text string) []string {
	var all []string
	for _, heading := range firsts(`(?m)^#+ (.*)$`, text) {
		plain := regexp.MustCompile(`[^\w\- ]`).ReplaceAllString(strings.ToLower(heading), "")
		all = append(all, strings.ReplaceAll(plain, " ", "-"))
	}
	return all
}

// goTests are the texts of all files with tests.
func goTests(t *testing.T) []string {
	t.Helper()
	var all []string
	for _, name := range tracked(t, "*_test.go") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(text))
	}
	return all
}
