package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A path in a document leads to a file or folder.
func TestPaths(t *testing.T) {
	path := regexp.MustCompile("`((?:router|netstack|zerotier|bindings|cmd|internal|bench|docs|deploy)/[a-z0-9_/.-]+)`")
	for _, name := range []string{"../README.md", "../CONTRIBUTING.md", "../SECURITY.md", "design.md", "operator.md", "libzt.md", "nat.md"} {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		found := path.FindAllStringSubmatch(string(b), -1)
		for _, m := range found {
			if strings.Contains(m[1], "...") {
				continue
			}
			if _, err := os.Stat(filepath.Join("..", m[1])); err != nil {
				t.Errorf("%s: %s leads nowhere", name, m[1])
			}
		}
	}
}
