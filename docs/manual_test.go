package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"ztgate/zerotier/network"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
)

// TestManualReasons holds the manual's tables of reasons against those that the node
// and explain have. Those of the forwarding plane are tested there.
func TestManualReasons(t *testing.T) {
	manual := read(t, "operator.md")
	var networks, sockets, rejected []string
	network.Stats{}.EachDrop(func(reason string, _ uint64) { networks = append(networks, "network_"+reason) })
	networks = append(networks, literals(t, "../router/gateway/node_libzt.go", regexp.MustCompile(`^node_`))...)
	new(transport.Stats).EachDrop(func(reason string, _ uint64) { sockets = append(sockets, reason) })
	for _, r := range vl1.Rejects() {
		rejected = append(rejected, r.String())
	}
	for heading, want := range map[string][]string{
		"Dropped by the joined networks": networks, "Dropped at the sockets": sockets, "Refused packets of the overlay": rejected,
	} {
		if got := firstCells(t, manual, heading); !same(got, want) {
			t.Errorf("%s: the manual has\n%q\nwant\n%q", heading, got, want)
		}
	}
	reasons := literals(t, "../router/gateway/explain.go", regexp.MustCompile(`^reason[A-Z]`))
	cells := firstCells(t, manual, "What `explain` can answer")
	for _, r := range reasons {
		if !slices.Contains(cells, r) {
			t.Errorf("the manual doesn't say what the reason %s of explain means", r)
		}
	}
	if len(reasons) == 0 {
		t.Error("no reasons of explain found")
	}
}

// TestManualMetrics checks that the manual lists the metrics that there are, and no
// others.
func TestManualMetrics(t *testing.T) {
	var want []string
	for dir, files := range sources(t) {
		for _, name := range files {
			if strings.HasPrefix(dir, "netstack") || dir == "router/gateway" || dir == "router/gateway/hostproxy" || dir == "router/gateway/resolver" {
				if !strings.HasSuffix(name, "_test.go") {
					want = append(want, literals(t, name, regexp.MustCompile(`^ztgate_[a-z_]+$`))...)
				}
			}
		}
	}
	_, text, _ := strings.Cut(read(t, "operator.md"), "\n## 7. Metrics\n")
	text, _, _ = strings.Cut(text, "\n## ")
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(text, -1) {
		for _, name := range strings.Split(strings.Trim(row[1], "`"), "`, `") {
			if !strings.HasSuffix(name, "*") {
				got = append(got, "ztgate_"+name)
			}
		}
	}
	slices.Sort(want)
	if want = slices.Compact(want); !same(got, want) {
		t.Errorf("the manual has\n%q\nwant\n%q", got, want)
	}
}

func same(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// firstCells returns what the first cells of the tables under a heading name.
func firstCells(t *testing.T, text, heading string) (out []string) {
	t.Helper()
	_, text, ok := strings.Cut(text, "\n### "+heading+"\n")
	if !ok {
		t.Errorf("the manual has no chapter %q", heading)
	}
	text, _, _ = strings.Cut(text, "\n##")
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(text, -1) {
		out = append(out, strings.Split(strings.Trim(row[1], "`"), "`, `")...)
	}
	return out
}

// literals returns the string literals of a Go file that match, and the values of
// the constants whose names do.
func literals(t *testing.T, name string, match *regexp.Regexp) (out []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			for i, v := range n.Values {
				if l, ok := v.(*ast.BasicLit); ok && match.MatchString(n.Names[i].Name) {
					s, _ := strconv.Unquote(l.Value)
					out = append(out, s)
				}
			}
		case *ast.BasicLit:
			if s, err := strconv.Unquote(n.Value); err == nil && n.Kind == token.STRING && match.MatchString(s) {
				out = append(out, s)
			}
		}
		return true
	})
	return out
}
