package config_test

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cryptcsi/cryptcsi/internal/config"
)

// load parses args and a file with that content, and shows what came out.
func load(t *testing.T, content string, args ...string) (string, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	fs := flag.NewFlagSet("test", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var file config.File
	file.Add(fs)
	var uris []config.Item
	name := fs.String("name", "none", "")
	count := fs.Int("count", 0, "")
	force := fs.Bool("force", false, "")
	wait := fs.Duration("wait", 0, "")
	fs.Var(&config.List{Items: &uris, Kind: "uri"}, "uri", "")
	fs.Var(&config.List{Items: &uris, Kind: "file"}, "uri-file", "")
	if err := fs.Parse(append(args, "--config", path)); err != nil {
		t.Fatal(err)
	}
	err := file.Load(fs)
	return fmt.Sprintf("%s %d %v %v %v", *name, *count, *force, *wait, uris), err
}

func TestLoad(t *testing.T) {
	for _, tt := range []struct {
		name, content string
		args          []string
		want          string
	}{
		{"empty", "", nil, "none 0 false 0s []"},
		{"each kind", "name: a b\ncount: 3\nforce: true\nwait: 90s\nuri: [u1, u2]\nuri-file: /f\n", nil, "a b 3 true 1m30s [{uri u1} {uri u2} {file /f}]"},
		{"JSON", `{"name": "a", "count": 3}`, nil, "a 3 false 0s []"},
		{"a number as text", "name: \"12\"\ncount: \"7\"", nil, "12 7 false 0s []"},
		{"the command line wins", "name: a\ncount: 3\nuri: [u1, u2]", []string{"--name", "b", "--uri", "u3"}, "b 3 false 0s [{uri u3}]"},
	} {
		got, err := load(t, tt.content, tt.args...)
		if err != nil || got != tt.want {
			t.Errorf("%s: %s, %v; want %s", tt.name, got, err, tt.want)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	const s = "S3CR3T"
	for _, tt := range []struct{ name, content, want string }{
		{"unknown", "title: " + s, `no flag "title"`},
		{"itself", "config: " + s, `no flag "config"`},
		{"twice", "name: " + s + "\nname: b", "twice"},
		{"no mapping", "- " + s, "not a YAML mapping"},
		{"no YAML", "name: [" + s, "not a YAML mapping"},
		{"a list for one", "name: [" + s + ", b]", "name takes one value"},
		{"a wrong value", "count: " + s, "count does not take that value"},
		{"a mapping", "name: {a: " + s + "}", "name: must be a text"},
		{"null", "name: null", "name: must be a text"},
		{"null in a list", "uri: [null]", "uri: must be a text"},
		{"an empty URI", "uri: ''", "uri does not take"},
	} {
		_, err := load(t, tt.content)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v, want an error with %q and without the value", tt.name, err, tt.want)
		}
	}
	fs := flag.NewFlagSet("test", flag.ContinueOnError)
	var file config.File
	file.Add(fs)
	if err := fs.Parse([]string{"--config", "/does/not/exist"}); err != nil {
		t.Fatal(err)
	}
	if err := file.Load(fs); err == nil {
		t.Error("a missing file is no error")
	}
}
