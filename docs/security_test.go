package docs

import (
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestSecurity checks that each row of the tables of SECURITY.md names a test or an
// attack, and that all it names are there.
func TestSecurity(t *testing.T) {
	tests := map[string]bool{} // also with the package
	attacks := []string{}
	declared := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	row := regexp.MustCompile(`\{name: "([^"]+)"`)
	for p, files := range sources(t) {
		for _, f := range files {
			if !strings.HasSuffix(f, "_test.go") {
				continue
			}
			for _, m := range declared.FindAllStringSubmatch(read(t, f), -1) {
				tests[m[1]], tests[filepath.Base(p)+"."+m[1]] = true, true
			}
			if p == "router/attack" {
				for _, m := range row.FindAllStringSubmatch(read(t, f), -1) {
					attacks = append(attacks, m[1])
				}
			}
		}
	}
	test := regexp.MustCompile("`((?:[a-z0-9]+\\.)?(?:Test|Fuzz)\\w+)`")
	attack := regexp.MustCompile("`([a-z -]+/[^`]*)`")
	rows := 0
	for line := range strings.Lines(read(t, "../SECURITY.md")) {
		for _, m := range test.FindAllStringSubmatch(line, -1) {
			if !tests[m[1]] {
				t.Errorf("there is no %s, which SECURITY.md names", m[1])
			}
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "| ---") || strings.HasPrefix(strings.TrimSpace(cells[len(cells)-1]), "test") {
			continue
		}
		rows++
		proof := cells[len(cells)-1]
		named := attack.FindAllStringSubmatch(proof, -1)
		for _, m := range named {
			prefix := strings.TrimSuffix(m[1], "…")
			if !slices.ContainsFunc(attacks, func(a string) bool { return strings.HasPrefix(a, prefix) }) {
				t.Errorf("there is no attack %s, which SECURITY.md names", m[1])
			}
		}
		if len(named) == 0 && !test.MatchString(proof) {
			t.Errorf("no test is named for %q", strings.TrimSpace(cells[0]))
		}
	}
	if rows < 60 {
		t.Errorf("only %d rows found", rows)
	}
}
