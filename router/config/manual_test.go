package config

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// configurationChapter returns the manual's chapter about the configuration.
func configurationChapter(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "operator.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "\n## 3. Configuration\n")
	if !ok {
		t.Fatal("the manual has no chapter 3. Configuration")
	}
	text, _, _ = strings.Cut(text, "\n## ")
	return text
}

var tableRow = regexp.MustCompile("(?m)^\\| `([a-z0-9_.]+)` \\| (.+) \\|$")

// tableRows returns the cells behind the first one of the tables in a text, by key.
func tableRows(t *testing.T, text string) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for _, m := range tableRow.FindAllStringSubmatch(text, -1) {
		if out[m[1]] != nil {
			t.Errorf("%s is in the manual twice", m[1])
		}
		out[m[1]] = strings.Split(m[2], " | ")
	}
	return out
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// TestManualSettings holds the manual's tables against the settings.
func TestManualSettings(t *testing.T) {
	text, _, ok := strings.Cut(configurationChapter(t), "\n### Lists\n")
	if !ok {
		t.Fatal("the chapter has no part about lists")
	}
	rows := tableRows(t, text)
	for _, s := range settings {
		row := rows[s.key]
		delete(rows, s.key)
		if s.key == "networks" { // stands among the lists
			continue
		}
		if len(row) != 3 || row[2] == "" {
			t.Errorf("%s: the manual has %q, want default, reload and meaning", s.key, row)
			continue
		}
		if row[1] != yesNo(s.live) {
			t.Errorf("%s: reload is %q in the manual, want %s", s.key, row[1], yesNo(s.live))
		}
		if want := strings.Join(s.def, ","); !sameDefault(row[0], want) {
			t.Errorf("%s: the default is %q in the manual, want %s", s.key, row[0], want)
		}
	}
	for key := range rows {
		t.Errorf("%s is in the manual, but no setting", key)
	}
}

// sameDefault compares a default with a cell, which may say more. Values that stand
// for something else, as 0 for another setting's, are described in words.
func sameDefault(cell, want string) bool {
	word, _, _ := strings.Cut(strings.TrimPrefix(cell, "`"), "`")
	if !strings.HasPrefix(cell, "`") || want == "" {
		return want == "" || want == "0" || want == "0s"
	}
	if d, err := time.ParseDuration(want); err == nil {
		shown, err := time.ParseDuration(word)
		return err == nil && shown == d || d == 0
	}
	return word == want
}

// TestManualLists holds the manual's tables against the keys of records.
func TestManualLists(t *testing.T) {
	_, text, _ := strings.Cut(configurationChapter(t), "\n### Lists\n")
	for _, s := range sections {
		_, part, ok := strings.Cut(text, "\n#### `"+s.name()+"`\n")
		if !ok {
			t.Errorf("the manual says nothing of %s", s.name())
			continue
		}
		part, _, _ = strings.Cut(part, "\n###")
		if !strings.Contains(strings.Join(strings.Fields(part), " "), "Reload: "+yesNo(s.isLive())) {
			t.Errorf("%s: want Reload: %s in the manual", s.name(), yesNo(s.isLive()))
		}
		rows := tableRows(t, part)
		for _, key := range s.keys() {
			key = strings.TrimPrefix(key, s.name()+".")
			if row := rows[key]; len(row) != 2 || row[0] == "" || row[1] == "" {
				t.Errorf("%s.%s: the manual has %q, want default and meaning", s.name(), key, row)
			}
			delete(rows, key)
		}
		for key := range rows {
			t.Errorf("%s.%s is in the manual, but no key", s.name(), key)
		}
	}
}

// TestManualExamples loads the manual's files.
func TestManualExamples(t *testing.T) {
	var files []string
	for i, part := range strings.Split(configurationChapter(t), "```") {
		if text, ok := strings.CutPrefix(part, "yaml\n"); ok && i%2 == 1 {
			files = append(files, text)
		}
	}
	if len(files) < 2 {
		t.Fatalf("the chapter has %d examples, want at least two", len(files))
	}
	for _, text := range files {
		if c, err := Load(Sources{Flags: map[string][]string{"config": {writeFile(t, text)}}}); err != nil || len(c.Warnings) > 0 {
			t.Errorf("%v:\n%s", err, text)
		}
	}
}

// TestManualAllow loads what the manual has as entries of policy.allow.
func TestManualAllow(t *testing.T) {
	entry := regexp.MustCompile("`((?:tcp|udp|icmp):[^/`][^`]*)`")
	var found []string
	for _, m := range entry.FindAllStringSubmatch(configurationChapter(t), -1) {
		found = append(found, m[1])
	}
	if len(found) < 3 || !slices.ContainsFunc(found, func(s string) bool { return strings.Contains(s, "[") }) {
		t.Fatalf("examples %q, want several", found)
	}
	for _, s := range found {
		if _, err := ParseAllow(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
}
