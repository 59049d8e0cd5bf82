package peers

import (
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"
)

// DocumentedRules are those of the ClusterRole in a Go file's comments: in that
// of the package, or of the type of that name where one is given. It fails the
// test where there are none.
func DocumentedRules(t testing.TB, file, typeName string) []rbacv1.PolicyRule {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comment := parsed.Doc
	for _, d := range parsed.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.TYPE && g.Specs[0].(*ast.TypeSpec).Name.Name == typeName {
			comment = g.Doc
		}
	}
	var lines []string
	for line := range strings.Lines(comment.Text()) {
		if code, ok := strings.CutPrefix(line, "\t"); ok {
			lines = append(lines, code)
		}
	}
	var role rbacv1.ClusterRole
	if err := yaml.UnmarshalStrict([]byte(strings.Join(lines, "")), &role); err != nil || len(role.Rules) == 0 {
		t.Fatalf("the rules in %s %s: %v", file, typeName, err)
	}
	return role.Rules
}
