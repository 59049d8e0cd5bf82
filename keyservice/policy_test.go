package keyservice_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/cryptcsi/cryptcsi/dek"
	"github.com/cryptcsi/cryptcsi/errdefs"
	"github.com/cryptcsi/cryptcsi/keyservice"
)

func openPrefix(t *testing.T, path, content string, log *lines) *keyservice.Prefix {
	t.Helper()
	must(t, "writing", os.WriteFile(path, []byte(content), 0o600))
	p, err := keyservice.OpenPrefix(path, log.logger())
	must(t, "OpenPrefix", err)
	return p
}

func TestPrefix(t *testing.T) {
	p := openPrefix(t, filepath.Join(t.TempDir(), "policy.yaml"), `
# a comment
spiffe://example.org/node/worker-1: ["driver.example.com/*", disk-uuid]
joinservice: [measurementSecret]
all: ["*"]
almost: ["measurementSecre*", "cluster*"]
nothing: []
null-is-nothing:
`, &lines{})
	const worker = "spiffe://example.org/node/worker-1"
	for _, tt := range []struct {
		who  string
		id   dek.ID
		want bool
	}{
		{worker, "driver.example.com/vol-1", true},
		{worker, "driver.example.com/", true},
		{worker, "driver.example.comx/vol-1", false},
		{worker, "disk-uuid", true},
		{worker, "disk-uuid2", false},
		{worker, "disk-uui", false},
		{"spiffe://example.org/node/worker-10", "disk-uuid", false},
		{"joinservice", "measurementSecret", true},
		{"joinservice", "measurementSecret2", false},
		{"joinservice", "clusterID", false},
		{"all", "anything/at-all", true},
		{"all", "measurementSecret", false},
		{"all", "clusterID", false},
		{"almost", "measurementSecret", false},
		{"almost", "measurementSecreT", true},
		{"almost", "clusterID", false},
		{"nothing", "x", false},
		{"null-is-nothing", "x", false},
		{"", "x", false},
		{"stranger", "x", false},
	} {
		err := p.Allowed(t.Context(), keyservice.Identity{Name: tt.who}, tt.id)
		if (err == nil) != tt.want || err != nil && !errors.Is(err, errdefs.ErrDenied) {
			t.Errorf("may %q have %q? %v, want %v", tt.who, tt.id, err, tt.want)
		}
	}
}

func TestPrefixRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.yaml")
	for what, content := range map[string]string{
		"a list":             `[a]`,
		"text":               `a`,
		"one pattern":        `{a: "b"}`,
		"a nested mapping":   `{a: {b: [c]}}`,
		"an identity twice":  "a: [b]\na: [c]",
		"a star inside":      `{a: ["b*c"]}`,
		"two stars":          `{a: ["b**"]}`,
		"an empty pattern":   `{a: [""]}`,
		"a space":            `{a: ["b c"]}`,
		"a bad prefix":       `{a: ["ü*"]}`,
		"a bad identity":     `{"a b": [c]}`,
		"an empty identity":  `{"": [c]}`,
		"no pattern":         `{a: [{}]}`,
		"a number":           `{a: [12e4]}`,
		"a truth value":      `{a: [yes]}`,
		"a long pattern":     `{a: ["` + strings.Repeat("x", dek.MaxID+1) + `"]}`,
		"more than one file": "a: [b]\n---\nc: [d]",
	} {
		must(t, "writing", os.WriteFile(path, []byte(content), 0o600))
		if _, err := keyservice.OpenPrefix(path, nil); !errors.Is(err, errdefs.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := keyservice.OpenPrefix(path+"-none", nil); !errors.Is(err, errdefs.ErrInvalid) {
		t.Errorf("no file: %v", err)
	}
}

func TestPrefixIsReadAgain(t *testing.T) {
	path, log := filepath.Join(t.TempDir(), "policy.yaml"), &lines{}
	p := openPrefix(t, path, `{a: [x]}`, log)
	may := func(id dek.ID) bool { return p.Allowed(t.Context(), keyservice.Identity{Name: "a"}, id) == nil }
	if !may("x") || may("w") {
		t.Fatal("the first file is not in force")
	}
	must(t, "writing", os.WriteFile(path, []byte(`{a: [w]}`), 0o600))
	if may("x") || !may("w") {
		t.Error("the second file is not in force")
	}
	// Faster than the clock of file systems, and of the same size.
	for i := range 100 {
		id := dek.ID("abcdefgh"[i%8 : i%8+1])
		must(t, "writing", os.WriteFile(path, []byte(`{a: [`+id+`]}`), 0o600))
		if !may(id) {
			t.Fatalf("change %d is not in force", i)
		}
	}
	must(t, "writing", os.WriteFile(path, []byte(`{a: [w]}`), 0o600))
	if !may("w") {
		t.Error("the last file is not in force")
	}
	must(t, "writing", os.WriteFile(path, []byte(`{a: [z`), 0o600))
	for range 3 {
		if !may("w") || may("z") {
			t.Error("a broken file changed something")
		}
	}
	if n := strings.Count(log.String(), "not used"); n != 1 {
		t.Errorf("the broken file was told of %d times: %s", n, log)
	}
	must(t, "removing", os.Remove(path))
	if !may("w") {
		t.Error("a file that went away changed something")
	}
	// As Kubernetes replaces what it mounts: by a link to another folder.
	must(t, "writing", os.WriteFile(path+"-2", []byte(`{a: [z]}`), 0o600))
	must(t, "linking", os.Symlink(path+"-2", path))
	if may("w") || !may("z") {
		t.Error("the file behind the link is not in force")
	}
}

// TestPoliciesTogether: what one allows is allowed; where one cannot tell and
// none allows, nobody can.
func TestPoliciesTogether(t *testing.T) {
	denied, away := errdefs.Errorf(errdefs.ErrDenied, "no"), errdefs.Errorf(errdefs.ErrUnavailable, "no API server")
	odd := errors.New("whatever")
	for _, tt := range []struct {
		what               string
		attached, prefixes error
		node, other        codes.Code
	}{
		{"both", nil, nil, codes.OK, codes.OK},
		{"attached alone", nil, denied, codes.OK, codes.PermissionDenied},
		{"prefixes alone", denied, nil, codes.OK, codes.OK},
		{"neither", denied, denied, codes.PermissionDenied, codes.PermissionDenied},
		{"attached cannot tell", away, denied, codes.Unavailable, codes.PermissionDenied},
		{"prefixes cannot tell", denied, away, codes.Unavailable, codes.Unavailable},
		{"attached cannot tell, prefixes allow", away, nil, codes.OK, codes.OK},
		{"attached allows, prefixes cannot tell", nil, away, codes.OK, codes.Unavailable},
		{"an error of no class", odd, denied, codes.Unavailable, codes.PermissionDenied},
	} {
		w := start(t, func(_ *world, cfg *keyservice.Config) {
			cfg.Policy.Attached = volumesFunc(func(who keyservice.Identity, _ dek.ID) error {
				if who.Node == "" {
					t.Errorf("%s: asked whether a DEK is attached to no node", tt.what)
				}
				return tt.attached
			})
			cfg.Policy.Prefixes = volumesFunc(func(keyservice.Identity, dek.ID) error { return tt.prefixes })
		})
		w.create(t, vol)
		_, _, err := w.as(t, node).get(t.Context(), vol)
		mustCode(t, tt.what+", a node", err, tt.node)
		_, _, err = w.as(t, "other").get(t.Context(), vol)
		mustCode(t, tt.what+", another", err, tt.other)
	}
	// The zero policy allows nothing.
	w := start(t, nil)
	w.create(t, vol)
	_, _, err := w.as(t, node).get(t.Context(), vol)
	mustCode(t, "no policy", err, codes.PermissionDenied)
}
