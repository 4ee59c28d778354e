// Package docs checks the citations of the documents.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestChapters checks that the sections of the protocol's chapters that code and
// documents cite exist.
func TestChapters(t *testing.T) {
	sections := map[string]bool{}
	files, err := filepath.Glob("protocol/0*.md")
	if err != nil || len(files) == 0 {
		t.Fatalf("no chapters: %v", err)
	}
	heading := regexp.MustCompile(`(?m)^##+ (\d+(?:\.\d+)?)\.? `)
	for _, name := range files {
		chapter := filepath.Base(name)[:2]
		sections[chapter] = true
		for _, m := range heading.FindAllStringSubmatch(read(t, name), -1) {
			sections[chapter+" §"+m[1]] = true
		}
	}
	// "chapter 03 §1.3, §5.7 to §5.8" in comments, which may break anywhere, and
	// "03 §1.3" in documents.
	cite := regexp.MustCompile(`(?:[Cc]hapter )(0\d)((?:(?:,| and| to)? ?§\d+(?:\.\d+)?)*)`)
	brief := regexp.MustCompile(`\b(0\d)((?:(?:,| and| to)? ?§\d+(?:\.\d+)?)+)`)
	one := regexp.MustCompile(`§\d+(?:\.\d+)?`)
	comment := regexp.MustCompile(`\s*\n\s*(?://|#|\*)?\s*`)
	cited := 0
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && (d.Name() == ".git" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !slices.Contains([]string{".go", ".md", ".c", ".h", ".s"}, filepath.Ext(path)) {
			return nil
		}
		text := comment.ReplaceAllString(read(t, path), " ")
		found := cite.FindAllStringSubmatch(text, -1)
		if strings.HasSuffix(path, ".md") {
			found = append(found, brief.FindAllStringSubmatch(text, -1)...)
		}
		for _, m := range found {
			if cited++; !sections[m[1]] {
				t.Errorf("%s cites chapter %s, which isn't there", path, m[1])
			}
			for _, s := range one.FindAllString(m[2], -1) {
				if !sections[m[1]+" "+s] {
					t.Errorf("%s cites chapter %s %s, which isn't there", path, m[1], s)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if cited < 100 {
		t.Errorf("only %d citations found", cited)
	}
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
