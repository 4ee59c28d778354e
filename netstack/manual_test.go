package netstack

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ztgate/netstack/internal/nat"
)

// TestManualReasons holds the manual's tables of reasons against those that there are.
func TestManualReasons(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "docs", "operator.md"))
	if err != nil {
		t.Fatal(err)
	}
	var dropped, refused []string
	for _, d := range drops() {
		dropped = append(dropped, d.String())
	}
	for _, name := range nat.RefusalNames {
		if name != "" {
			refused = append(refused, name)
		}
	}
	for heading, want := range map[string][]string{"Dropped by the forwarding plane": dropped, "Refused flows": refused} {
		_, text, ok := strings.Cut(string(b), "\n### "+heading+"\n")
		if !ok {
			t.Errorf("the manual has no chapter %q", heading)
		}
		text, _, _ = strings.Cut(text, "\n##")
		var got []string
		for _, row := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(text, -1) {
			got = append(got, strings.Split(strings.Trim(row[1], "`"), "`, `")...)
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: the manual has\n%q\nwant\n%q", heading, got, want)
		}
	}
}
