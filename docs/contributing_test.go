package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestGoroutinesAndLocks checks that CONTRIBUTING.md names every file that starts a
// goroutine, and every mutex.
func TestGoroutinesAndLocks(t *testing.T) {
	text := read(t, "../CONTRIBUTING.md")
	goroutines, locks := tableFiles(t, text, "Goroutines"), tableFiles(t, text, "Locks")
	for dir, files := range sources(t) {
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") || strings.HasSuffix(dir, "gatewaytest") {
				continue
			}
			file := path.Join(dir, filepath.Base(name))
			starts, mutexes := concurrency(t, name)
			if _, ok := goroutines[file]; ok != starts {
				t.Errorf("%s starts a goroutine: %v; in the table of goroutines: %v", file, starts, ok)
			}
			for _, m := range mutexes {
				if !slices.ContainsFunc(locks[file], func(row string) bool { return strings.Contains(row, "`"+m+"`") }) {
					t.Errorf("%s: the table of locks lacks %s", file, m)
				}
			}
		}
	}
}

// tableFiles returns the rows of the table under a heading by the files that their
// first cells name. A name without a folder is in that of the file before it.
func tableFiles(t *testing.T, text, heading string) map[string][]string {
	t.Helper()
	_, text, ok := strings.Cut(text, "\n## "+heading+"\n")
	if !ok {
		t.Fatalf("no chapter %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n## ")
	out := map[string][]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| (.*?) \|.*$`).FindAllStringSubmatch(text, -1) {
		dir := ""
		for _, m := range regexp.MustCompile("`([a-z0-9_/]+\\.go)`").FindAllStringSubmatch(row[1], -1) {
			file := m[1]
			if strings.Contains(file, "/") {
				dir = path.Dir(file)
			} else {
				file = path.Join(dir, file)
			}
			out[file] = append(out[file], row[0])
		}
	}
	return out
}

// concurrency reports whether a file starts goroutines, and lists its mutexes:
// fields as Type.field, variables by name.
func concurrency(t *testing.T, name string) (starts bool, mutexes []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	isMutex := func(e ast.Expr) bool {
		s, ok := e.(*ast.SelectorExpr)
		return ok && (s.Sel.Name == "Mutex" || s.Sel.Name == "RWMutex")
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			starts = true
		case *ast.SelectorExpr: // also as a value, as in spawn(g.Go)
			starts = starts || n.Sel.Name == "Go" || n.Sel.Name == "AfterFunc"
		case *ast.TypeSpec:
			if s, ok := n.Type.(*ast.StructType); ok {
				for _, field := range s.Fields.List {
					for _, id := range field.Names {
						if isMutex(field.Type) {
							mutexes = append(mutexes, n.Name.Name+"."+id.Name)
						}
					}
				}
			}
		case *ast.ValueSpec:
			for _, id := range n.Names {
				if isMutex(n.Type) {
					mutexes = append(mutexes, id.Name)
				}
			}
		}
		return true
	})
	return starts, mutexes
}
