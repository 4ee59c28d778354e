package docs

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// mayImport lists what a room may import of ours besides itself and what lies below
// it in the picture of design.md; the longest prefix of a package counts. Rooms that
// aren't here may import whatever lies below them.
var mayImport = map[string][]string{
	"internal": {},
	"netstack": {"internal"},
	"zerotier": {"internal"},
	// The node on libzt shares words and formats with the other one, and no code
	// that acts.
	"bindings": {"internal", "zerotier/identity", "zerotier/vl1", "zerotier/vl2", "zerotier/ztnode"},
	// Only gateway joins a forwarding plane and a node.
	"router":         {"router", "internal", "zerotier/identity", "zerotier/packet", "zerotier/vl1", "zerotier/ztnode"},
	"router/admin":   {"router", "internal", "zerotier/controller", "zerotier/identity", "zerotier/vl1", "zerotier/ztnode"},
	"router/gateway": {"router", "internal", "zerotier", "netstack", "bindings"},
}

// onlyIn lists the rooms that alone may import something of others.
var onlyIn = map[string][]string{
	"gvisor.dev/": {"netstack", "bench/plane"},
	"C":           {"bindings"},
}

// TestRooms checks that the picture of the rooms in design.md lists every package,
// and that imports go down it only.
func TestRooms(t *testing.T) {
	var order []string
	_, text, _ := strings.Cut(read(t, "design.md"), "\n## Rooms\n")
	_, text, _ = strings.Cut(text, "\n```\n")
	text, _, _ = strings.Cut(text, "\n```\n")
	for _, m := range regexp.MustCompile(`(?m)^([a-z0-9/]+)  +\S`).FindAllStringSubmatch(text, -1) {
		if slices.Contains(order, m[1]) {
			t.Errorf("design.md lists %s twice", m[1])
		}
		order = append(order, m[1])
	}
	files := sources(t)
	for _, p := range order {
		if files[p] == nil {
			t.Errorf("design.md lists %s, which has no code", p)
		}
	}
	for p, list := range files {
		place := slices.Index(order, p)
		if place < 0 {
			t.Errorf("design.md doesn't list %s", p)
			continue
		}
		for _, f := range list {
			for _, i := range imports(t, f) {
				test := strings.HasSuffix(f, "_test.go")
				to, ours := strings.CutPrefix(i, "ztgate/")
				switch {
				case !ours && !allowed(onlyRooms(i), p):
					t.Errorf("%s imports %s, which is for %v alone", f, i, onlyRooms(i))
				case !ours || to == p:
				case !test && slices.Index(order, to) < place:
					t.Errorf("%s imports %s, which lies above %s in design.md", f, to, p)
				// Tests of the other rooms may put things together.
				case test && !allowed([]string{"netstack", "zerotier"}, p):
				case !allowed(rulesFor(p), to) && !allowed([]string{room(p)}, to):
					t.Errorf("%s imports %s, which %s knows nothing of", f, to, room(p))
				}
			}
		}
	}
}

// room returns the top-level folder of a package.
func room(p string) string { r, _, _ := strings.Cut(p, "/"); return r }

// rulesFor returns what a package may import of other rooms.
func rulesFor(p string) []string {
	for q := p; q != "."; q = path.Dir(q) {
		if list, ok := mayImport[q]; ok {
			return list
		}
	}
	return []string{""} // all
}

func onlyRooms(imported string) []string {
	for prefix, rooms := range onlyIn {
		if imported == prefix || strings.HasSuffix(prefix, "/") && strings.HasPrefix(imported, prefix) {
			return rooms
		}
	}
	return []string{""}
}

// allowed reports whether one of the folders is p or has it.
func allowed(folders []string, p string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return f == "" || p == f || strings.HasPrefix(p, f+"/") })
}

// sources lists the Go files of all packages, for every platform and build tag.
func sources(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	err := filepath.WalkDir("..", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || d.Name() != ".." && strings.HasPrefix(d.Name(), ".")) {
			return fs.SkipDir
		}
		if p, err := filepath.Rel("..", filepath.Dir(name)); err == nil && filepath.Ext(name) == ".go" {
			out[filepath.ToSlash(p)] = append(out[filepath.ToSlash(p)], name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func imports(t *testing.T, name string) (out []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range f.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}
