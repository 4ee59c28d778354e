package conformance

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// document is docs/nat.md as rows of cells.
func document(t *testing.T) (out [][]string) {
	t.Helper()
	b, err := os.ReadFile("../../docs/nat.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		line = strings.ReplaceAll(strings.TrimSpace(line), `\|`, "¦")
		if !strings.HasPrefix(line, "|") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		out = append(out, cells)
	}
	return out
}

// TestDocument checks that the document has the rows of the tests and no other.
func TestDocument(t *testing.T) {
	var said []requirement
	for _, c := range document(t) {
		if n, err := strconv.Atoi(c[0]); err == nil && len(c) == 8 {
			said = append(said, requirement{n, c[1], c[3], c[4]})
		}
	}
	if len(said) != len(requirements) {
		t.Fatalf("%d rows in the document, %d here", len(said), len(requirements))
	}
	for i, q := range requirements {
		if said[i] != q {
			t.Errorf("the document says %v, the tests %v", said[i], q)
		}
	}
}

// testDirs are where the document's tests are.
var testDirs = map[string]string{
	"": ".", "netstack": "..", "nat": "../internal/nat", "frag": "../internal/frag", "ipkt": "../internal/ipkt",
	"faults": "../../router/faults", "packet": "../../router/host/packet",
}

// TestDocumentTests checks that every row and load names tests that exist.
func TestDocumentTests(t *testing.T) {
	source := map[string]string{}
	for pkg, dir := range testDirs {
		names, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
		if err != nil || len(names) == 0 {
			t.Fatalf("no tests in %s (%v)", dir, err)
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			source[pkg] += string(b)
		}
	}
	name := regexp.MustCompile("`(?:(\\w+)\\.)?(Test\\w+)`")
	row := regexp.MustCompile(`^(\d+|LF-\d+)$`)
	for _, c := range document(t) {
		if !row.MatchString(c[0]) {
			continue
		}
		tests := name.FindAllStringSubmatch(c[len(c)-1], -1)
		if len(tests) == 0 {
			t.Errorf("row %s names no test", c[0])
		}
		for _, m := range tests {
			if !strings.Contains(source[m[1]], "\nfunc "+m[2]+"(t *testing.T) {") {
				t.Errorf("row %s: there is no %s", c[0], m[0])
			}
		}
	}
}

// TestCitations checks that whatever code and tests cite is in the document.
func TestCitations(t *testing.T) {
	known := map[string]bool{}
	for _, c := range document(t) {
		known[c[0]], known[c[1]] = true, true
	}
	cite := regexp.MustCompile(`\b(?:(?:4787|5382|5508|6888)-REQ-\d+(?:[A-Za-z]\d?)?|7857-S\d+(?:\.\d[a-z]?)?|1812-\d[\d.]*\d(?:[a-z]|\.trim)?|` +
		`(?:L|CK|V6)-[A-Z][A-Z0-9-]*[A-Z0-9]|LF-\d+|D[1-5])\b`)
	for _, root := range []string{"../../netstack", "../../router", "../../cmd", "../../docs"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if ext := filepath.Ext(path); err != nil || d.IsDir() || ext != ".go" && ext != ".md" {
				return err
			}
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for _, id := range cite.FindAllString(string(b), -1) {
				if !known[id] {
					t.Errorf("%s cites %s, which is not in docs/nat.md", path, id)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}
