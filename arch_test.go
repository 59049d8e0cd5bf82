// Package cryptcsi_test keeps the architecture as docs/design.md draws it: who
// may import whom, what a program may link, and no state or side effects at
// package level. It reads the source tree; nothing of it is compiled.
package cryptcsi_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/cryptcsi/cryptcsi"

// A rule says what the packages that match its pattern may import of ours. In
// patterns "/*" at the end stands for any one element, "/..." for any number,
// and none too. The first rule whose pattern matches counts; a new edge comes
// with its reason in docs/design.md.
type rule struct {
	pattern string
	imports []string
	reason  string
}

func importRules() []rule {
	values := []string{"dek", "errdefs", "secret"}
	with := func(more ...string) []string { return append(more, values...) }
	return []rule{
		{"secret", nil, "key bytes depend on nothing, so that everybody can hold them"},
		{"errdefs", nil, "the vocabulary of errors is below all who speak it"},
		{"errdefs/errgrpc", []string{"errdefs"}, "the classes' translation into gRPC codes, apart so that crypt-worker links no gRPC"},
		{"api/...", nil, "generated code"},
		{"internal/grpcproxy", nil, "forwards frames; knows no CSI and no class of error"},
		{"dek", []string{"secret"}, "values only"},
		{"internal/grpcserver", []string{"errdefs", "errdefs/errgrpc"}, "translates errors at the edge"},

		{"kms", []string{"errdefs", "secret"}, "IDs are strings here: others use kms without our DEKs"},
		{"kms/all", []string{"kms", "kms/*", "errdefs", "secret"}, "the one list of schemes"},
		{"kms/kmstest/...", []string{"kms", "kms/kmstest", "errdefs", "secret"}, "fakes of services"},
		{"kms/*", []string{"kms", "errdefs", "secret", "internal/awsconfig", "internal/azureconfig", "internal/gcpconfig"}, "backends do not know each other"},
		{"internal/authority", []string{"errdefs"}, "certificates in, certificates out; knows no cluster"},
		{"internal/config", []string{"errdefs"}, "flags and a file; knows no flag"},
		{"internal/logging", []string{"errdefs"}, "flags and a log"},
		{"internal/metrics", []string{"errdefs", "kms"}, "counts what all programs count: calls served, calls to a KMS"},
		{"internal/keyconfig", []string{"dek", "envelope", "envelope/stores", "errdefs", "internal/config", "kms", "kms/all", "secret"}, "the flags that programs with keys share"},
		{"internal/awsconfig", []string{"errdefs", "kms"}, "what KMS and stores of one cloud have in common"},
		{"internal/azureconfig", []string{"errdefs", "kms"}, "what KMS and stores of one cloud have in common"},
		{"internal/gcpconfig", []string{"errdefs"}, "what KMS and stores of one cloud have in common"},
		{"kube", []string{"dek", "errdefs"}, "talks to the API server"},
		{"envelope/stores", []string{"envelope", "errdefs", "kms", "kube", "internal/awsconfig", "internal/azureconfig", "internal/gcpconfig"}, "the one list of stores, thin adapters"},
		{"envelope", with("kms"), "policy over one KEK and one store"},
		{"envelope/envelopetest", with("envelope", "kms", "kms/kmstest"), "tests what it imports"},

		{"keyservice", with("api/...", "errdefs/errgrpc"), "serves an interface of its own; main plugs envelope in"},
		{"keyclient", with("api/...", "errdefs/errgrpc"), "knows the wire, not the server"},
		{"keyclient/keyclienttest", with("keyclient"), "the contract of everything that has the client's methods"},

		{"cryptmapper", with("cryptmapper/dm", "cryptmapper/luks2"), "supervises workers and asks the kernel; never calls libcryptsetup"},
		{"cryptmapper/dm", []string{"errdefs"}, "queries of the device-mapper"},
		{"cryptmapper/luks2", values, "the header's format"},
		{"cryptmapper/worker", with("cryptmapper", "cryptmapper/dm", "cryptmapper/luks2"), "the only package that calls libcryptsetup"},

		{"driver", with("errdefs/errgrpc", "internal/grpcproxy"), "owns the interfaces to keys and mapper; main joins them"},
		{"driver/drivertest", with("driver", "errdefs/errgrpc", "internal/grpcproxy", "internal/grpcserver"), "fakes of what driver needs"},
		{"kube", []string{"dek", "errdefs"}, "talks to the API server, holds no keys"},

		{"cmd/crypt-worker", with("cryptmapper", "cryptmapper/..."), "sees keys: links as little as possible"},
		{"cmd/*", []string{
			"api/...", "cryptmapper", "cryptmapper/dm", "cryptmapper/luks2", "dek", "driver", "envelope", "envelope/stores", "errdefs",
			"internal/...", "keyclient", "keyservice", "kms", "kms/all", "kube", "secret",
		}, "mains wire; packages of tests and the worker's half stay out"},
		{"deploy/kubernetes", nil, "manifests; the Go there is a test of them"},
		{"deploy/kubernetes/cluster", nil, "a test of them against a real API server"},
		{"deploy/kubernetes/components/monitoring", nil, "a test of alerts and dashboard"},
		{"test/...", []string{"..."}, "tests may look at everything"},
	}
}

func match(pattern, pkg string) bool {
	if base, ok := strings.CutSuffix(pattern, "..."); ok {
		return strings.HasPrefix(pkg+"/", base)
	}
	if base, ok := strings.CutSuffix(pattern, "/*"); ok {
		return path.Dir(pkg) == base
	}
	return pattern == pkg
}

// violations says which of pkg's imports (paths inside the module) its rule forbids.
func violations(rules []rule, pkg string, imports []string) []string {
	i := slices.IndexFunc(rules, func(r rule) bool { return match(r.pattern, pkg) })
	if i < 0 {
		return []string{pkg + " is in no row of the import table"}
	}
	var bad []string
	for _, imp := range imports {
		if !slices.ContainsFunc(rules[i].imports, func(p string) bool { return match(p, imp) }) {
			bad = append(bad, fmt.Sprintf("%s imports %s; it %s", pkg, imp, rules[i].reason))
		}
	}
	return bad
}

// goPackage is what `go list` tells.
type goPackage struct {
	ImportPath string
	Dir        string
	Name       string
	Standard   bool
	Imports    []string // without those of tests
	Error      *struct{ Err string }
}

// local returns a path relative to the module, "" for the module itself, and
// whether it is inside the module at all.
func local(importPath string) (string, bool) {
	if importPath == module {
		return "", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

// list returns the packages that match the patterns, with -deps among the
// arguments also all they depend on.
func list(t *testing.T, args ...string) []goPackage {
	t.Helper()
	args = append([]string{"list", "-e", "-json=ImportPath,Dir,Name,Standard,Imports,Error"}, args...)
	out, err := exec.CommandContext(t.Context(), "go", args...).Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatalf("go %s: %v", strings.Join(args, " "), err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func TestImports(t *testing.T) {
	rules := importRules()
	for _, p := range list(t, "./...") {
		if p.Error != nil {
			t.Errorf("%s: %s", p.ImportPath, p.Error.Err)
		}
		pkg, _ := local(p.ImportPath)
		if pkg == "" {
			continue // this test
		}
		var ours []string
		for _, imp := range p.Imports {
			if imp, ok := local(imp); ok {
				ours = append(ours, imp)
			}
		}
		for _, v := range violations(rules, pkg, ours) {
			t.Error(v)
		}
	}
}

// The table has to be able to say no.
func TestImportRulesRefuse(t *testing.T) {
	rules := importRules()
	for _, tc := range []struct {
		pkg, imp string
		want     bool
	}{
		{"envelope", "kms", true},
		{"envelope", "kms/cluster", false},
		{"kms/cluster", "kms", true},
		{"kms/cluster", "kms/kmstest", false},
		{"kms/all", "kms/cluster", true},
		{"driver", "cryptmapper", false},
		{"driver", "keyclient", false},
		{"cryptmapper", "cryptmapper/worker", false},
		{"cmd/csi-plugin", "cryptmapper/worker", false},
		{"cmd/crypt-worker", "cryptmapper/worker", true},
		{"cmd/crypt-worker", "kms", false},
		{"cmd/csi-plugin", "driver/drivertest", false},
		{"cmd/csi-plugin", "test/loopdriver", false},
		{"test/loopdriver", "driver", true},
		{"unheard-of", "secret", false},
	} {
		if got := violations(rules, tc.pkg, []string{tc.imp}) == nil; got != tc.want {
			t.Errorf("may %s import %s? got %v, want %v", tc.pkg, tc.imp, got, tc.want)
		}
	}
}

// A link says what a program may not have in it, or the only things that it may.
type link struct {
	forbidden map[string]string // pattern of a package path → why
	only      []string          // patterns; empty: everything else may be there
}

func linkRules() map[string]link {
	const libcryptsetup = "calls libcryptsetup, which may hang and is not thread-safe: only the worker does"
	const testing = "is for tests"
	serving := link{forbidden: map[string]string{
		"github.com/martinjungblut/go-cryptsetup/...": libcryptsetup,
		module + "/cryptmapper/worker":                libcryptsetup,
		module + "/test/...":                          testing,
		"testing/...":                                 testing,
	}}
	return map[string]link{
		"cmd/csi-plugin":  serving,
		"cmd/key-service": serving,
		// Every package in it can read the DEK, and a small program starts fast.
		"cmd/crypt-worker": {only: []string{
			module + "/cmd/crypt-worker", module + "/cryptmapper/...", module + "/dek", module + "/secret", module + "/errdefs",
			"github.com/martinjungblut/go-cryptsetup", "golang.org/x/sys/unix", "golang.org/x/sys/cpu",
		}},
	}
}

func TestLinked(t *testing.T) {
	rules := linkRules()
	for _, p := range list(t, "./...") {
		main, _ := local(p.ImportPath)
		rule, ok := rules[main]
		if !ok {
			if strings.HasPrefix(main, "cmd/") {
				t.Errorf("%s has no rule that says what it may link", main)
			}
			continue
		}
		for _, dep := range list(t, "-deps", p.ImportPath) {
			for pattern, why := range rule.forbidden {
				if match(pattern, dep.ImportPath) {
					t.Errorf("%s links %s, which %s", main, dep.ImportPath, why)
				}
			}
			allowed := slices.ContainsFunc(rule.only, func(p string) bool { return match(p, dep.ImportPath) })
			if rule.only != nil && !allowed && !dep.Standard {
				t.Errorf("%s links %s, which is not on its list", main, dep.ImportPath)
			}
		}
	}
}

// gRPC codes are translated from and to errdefs' classes in one place. Besides
// it only what sits on the wire itself, and stands-in for foreign servers, know them.
func TestWhoKnowsGRPCCodes(t *testing.T) {
	may := []string{
		"api/...", "errdefs/errgrpc", "internal/grpcproxy", "internal/grpcserver", "driver/drivertest", "keyclient/keyclienttest", "test/...",
		"keyservice",                         // ResourceExhausted and Unauthenticated: said before there is an error of any class
		"kms/gcpckms", "kms/kmstest/gcpfake", // Google Cloud KMS speaks gRPC
	}
	for _, p := range list(t, "./...") {
		pkg, _ := local(p.ImportPath)
		known := slices.ContainsFunc(may, func(pattern string) bool { return match(pattern, pkg) })
		if slices.Contains(p.Imports, "google.golang.org/grpc/codes") && !known {
			t.Errorf("%s imports gRPC's codes; return an error of errdefs' classes", pkg)
		}
	}
}

func TestFolderNames(t *testing.T) {
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		switch base := path.Base(name); {
		case err != nil || !d.IsDir():
			return err
		case len(base) > 1 && base[0] == '.':
			return filepath.SkipDir
		case slices.Contains([]string{"common", "helpers", "pkg", "types", "util", "utils"}, base):
			t.Errorf("%s says nothing about what is in it", name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestTracked: git keeps what people write, and no program that was built by the
// way: each clone would carry it for ever.
func TestTracked(t *testing.T) {
	const most = 1 << 20
	for _, name := range tracked(t) {
		if info, err := os.Lstat(name); err == nil && info.Size() > most {
			t.Errorf("%s has %d bytes, and no file needs more than %d: is it something that was built?", name, info.Size(), most)
		}
	}
}

// tracked are the files that git keeps, of those patterns if there are any. Where
// this is no clone the test is skipped.
func tracked(t *testing.T, patterns ...string) []string {
	t.Helper()
	if _, err := os.Stat(".git"); err != nil {
		t.Skipf("not a clone: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), "git", append([]string{"ls-files", "-z"}, patterns...)...).Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00")
}

// TestPackages looks into the files of every package: one package comment, no
// init, no mutable state.
func TestPackages(t *testing.T) {
	for _, p := range list(t, "./...") {
		pkg, _ := local(p.ImportPath)
		if match("api/...", pkg) {
			continue // generated
		}
		fset := token.NewFileSet()
		source, tests, err := parseDir(fset, p.Dir)
		if err != nil {
			t.Errorf("%s: %v", pkg, err)
			continue
		}
		documented := source
		if len(source) == 0 {
			documented = tests
		}
		if n := packageComments(documented); n != 1 {
			t.Errorf("%s: %d files have a package comment, want exactly one", p.ImportPath, n)
		}
		for _, problem := range packageState(fset, source) {
			t.Error(problem)
		}
	}
}

// parseDir parses all Go files of a folder whatever their build constraints.
func parseDir(fset *token.FileSet, dir string) (source, tests []*ast.File, err error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		f, err := parser.ParseFile(fset, name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return nil, nil, err
		}
		if strings.HasSuffix(name, "_test.go") {
			tests = append(tests, f)
		} else {
			source = append(source, f)
		}
	}
	return source, tests, nil
}

func packageComments(files []*ast.File) int {
	n := 0
	for _, f := range files {
		if f.Doc != nil {
			n++
		}
	}
	return n
}

// packageState lists what a package does or keeps at package level: init
// functions, variables that could be changed, and writes to any of them.
func packageState(fset *token.FileSet, files []*ast.File) []string {
	var bad []string
	report := func(n ast.Node, format string, args ...any) {
		bad = append(bad, fmt.Sprintf("%s: %s", fset.Position(n.Pos()), fmt.Sprintf(format, args...)))
	}
	// The types of imported things do not matter here, so nothing is loaded and
	// the errors that follow from that are no errors.
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: noImporter{}, FakeImportC: true, Error: func(error) {}}
	pkg, _ := conf.Check("p", fset, files, info)

	for _, f := range files {
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.Name == "init" && d.Recv == nil {
					report(d, "init function: what has to be set up is set up by main")
				}
			case *ast.GenDecl:
				for _, s := range d.Specs {
					if v, ok := s.(*ast.ValueSpec); ok && d.Tok == token.VAR && !constant(f, d, v) {
						report(v, "package-level variable %s could hold state: pass it, make it a constant or an unexported table", v.Names[0].Name)
					}
				}
			}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			for _, target := range written(n) {
				if v, ok := info.Uses[target].(*types.Var); ok && pkg != nil && v.Parent() == pkg.Scope() {
					report(target, "package-level variable %s is written to", target.Name)
				}
			}
			return true
		})
	}
	return bad
}

// constant tells whether a package-level variable is one in name only: an
// error, an interface check, an embedded file, a string that the linker sets,
// a table. What is not known here is refused.
func constant(f *ast.File, d *ast.GenDecl, v *ast.ValueSpec) bool {
	if len(v.Values) == 0 {
		typ, _ := v.Type.(*ast.Ident)
		return f.Name.Name == "main" && typ != nil && typ.Name == "string" || embedded(d.Doc) || embedded(v.Doc)
	}
	for i, value := range v.Values {
		if v.Names[i].Name != "_" && !constantValue(value, v.Names[i].IsExported()) {
			return false
		}
	}
	return true
}

func embedded(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
}

func constantValue(e ast.Expr, exported bool) bool {
	switch e := e.(type) {
	case *ast.BasicLit:
		return !exported
	case *ast.CompositeLit:
		return !exported
	case *ast.CallExpr:
		if _, conversion := e.Fun.(*ast.ArrayType); conversion {
			return !exported
		}
		// What these return cannot be changed by anybody.
		return slices.Contains([]string{
			"errors.New", "fmt.Errorf", "errdefs.Errorf", "regexp.MustCompile", "strings.NewReplacer", "strings.Repeat", "base64.StdEncoding.EncodeToString",
		}, types.ExprString(e.Fun))
	}
	return false
}

// written returns the identifiers at the root of what a node changes, or lets
// others change through a pointer.
func written(n ast.Node) []*ast.Ident {
	var targets []ast.Expr
	switch n := n.(type) {
	case *ast.AssignStmt:
		targets = n.Lhs
	case *ast.IncDecStmt:
		targets = []ast.Expr{n.X}
	case *ast.RangeStmt:
		targets = []ast.Expr{n.Key, n.Value}
	case *ast.UnaryExpr:
		if n.Op == token.AND {
			targets = []ast.Expr{n.X}
		}
	case *ast.CallExpr:
		fun, _ := n.Fun.(*ast.Ident)
		if fun != nil && slices.Contains([]string{"append", "clear", "copy", "delete"}, fun.Name) && len(n.Args) > 0 {
			targets = n.Args[:1]
		}
	}
	var roots []*ast.Ident
	for _, e := range targets {
		if id := root(e); id != nil {
			roots = append(roots, id)
		}
	}
	return roots
}

func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.IndexExpr:
			e = x.X
		case *ast.SelectorExpr:
			e = x.X
		case *ast.SliceExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		default:
			return nil
		}
	}
}

// noImporter stands for every import by an empty package.
type noImporter struct{}

func (noImporter) Import(name string) (*types.Package, error) {
	p := types.NewPackage(name, path.Base(name))
	p.MarkComplete()
	return p, nil
}

func TestPackageStateIsSeen(t *testing.T) {
	const header = "package p\nimport (\"errors\"; \"sync\"; \"embed\")\n"
	for _, tc := range []struct {
		name, source string
		want         []string // what is said about which line
	}{
		{"sentinel", `var ErrGone = errors.New("gone")`, nil},
		{"table", `var table = map[string]int{"a": 1}` + "\nfunc f() int { return table[\"a\"] }", nil},
		{"interface check", `var _ error = (*int)(nil)`, nil},
		{"embed", "//go:embed x\nvar files embed.FS", nil},
		{"local of the same name", "var table = []int{1}\nfunc f() { table := []int{2}; table[0] = 3 }", nil},
		{"init", "func init() {}", []string{"init function"}},
		{"method called init", "type t int\nfunc (t) init() {}", nil},
		{"map", "var m = make(map[string]int)", []string{"m could hold state"}},
		{"pointer", "var p = new(int)", []string{"p could hold state"}},
		{"address of a literal", "type s struct{}\nvar p = &s{}", []string{"p could hold state"}},
		{"lock", "var mu sync.Mutex", []string{"mu could hold state"}},
		{"declared only", "var handler func()", []string{"handler could hold state"}},
		{"from a call", "var c = errors.Unwrap(nil)", []string{"c could hold state"}},
		{"exported table", "var Table = []int{1}", []string{"Table could hold state"}},
		{"second of two", "var a, b = 1, new(int)", []string{"a could hold state"}},
		{"counter", "var n = 1\nfunc f() { n++ }", []string{"n is written to"}},
		{"element", "var t = []int{1}\nfunc f() { t[0] = 2 }", []string{"t is written to"}},
		{"deleted", "var t = map[int]int{1: 1}\nfunc f() { delete(t, 1) }", []string{"t is written to"}},
		{"by its address", "var n = 1\nfunc f() *int { return &n }", []string{"n is written to"}},
		{"in another's body", "var n = 1\nfunc f() func() { return func() { n = 2 } }", []string{"n is written to"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, "x.go", header+tc.source, parser.ParseComments|parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, problem := range packageState(fset, []*ast.File{f}) {
				for _, want := range tc.want {
					if strings.Contains(problem, want) {
						problem = want
					}
				}
				got = append(got, problem)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}
