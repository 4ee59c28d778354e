//go:build e2e

package e2e

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"
)

// row says how one property was for one mix of nodes.
type row struct {
	property, root, controller, member, gateway string
	result                                      string
	took                                        time.Duration
}

// Results.
const (
	passed = "pass"
	failed = "FAIL"
	asReal = "no: all are real"
)

// results are what the tests of a run with real peers found.
var results struct {
	mu   sync.Mutex
	rows []row
}

func record(r row) {
	results.mu.Lock()
	defer results.mu.Unlock()
	results.rows = append(results.rows, r)
}

// recordTest records how a test ends.
func recordTest(t *testing.T, r row) {
	start := time.Now()
	t.Cleanup(func() {
		if !t.Skipped() {
			r.result, r.took = passed, time.Since(start)
			if t.Failed() {
				r.result = failed
			}
			record(r)
		}
	})
}

// TestMain prints the table when all is done. ZTGATE_E2E_TABLE names a file that
// gets it too.
func TestMain(m *testing.M) {
	code := m.Run()
	if rows := merged(results.rows); len(rows) > 0 {
		writeTable(os.Stdout, rows)
		if path := os.Getenv("ZTGATE_E2E_TABLE"); path != "" {
			f, err := os.Create(path)
			if err == nil {
				writeTable(f, rows)
				err = f.Close()
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = max(code, 1)
			}
		}
	}
	os.Exit(code)
}

func writeTable(to io.Writer, rows []row) {
	w := tabwriter.NewWriter(to, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| property\t| root\t| controller\t| member\t| gateway\t| result\t| time\t|")
	fmt.Fprintln(w, "|-\t|-\t|-\t|-\t|-\t|-\t|-\t|")
	for _, r := range rows {
		fmt.Fprintf(w, "| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %.1f s\t|\n", r.property, r.root, r.controller, r.member, r.gateway, r.result, r.took.Seconds())
	}
	_ = w.Flush()
}

// merged makes one row of those that differ in one part only, so that a list in a
// row stands for each of its entries with each of the others. The time is the
// longest.
func merged(rows []row) []row {
	rows = slices.Clone(rows)
	for _, part := range []func(*row) *string{
		func(r *row) *string { return &r.member },
		func(r *row) *string { return &r.gateway },
		func(r *row) *string { return &r.controller },
		func(r *row) *string { return &r.root },
	} {
		var out []row
		at := map[row]int{}
		for _, r := range rows {
			key := r
			key.took = 0
			*part(&key) = ""
			if i, ok := at[key]; ok {
				*part(&out[i]) += "," + *part(&r)
				out[i].took = max(out[i].took, r.took)
				continue
			}
			at[key] = len(out)
			out = append(out, r)
		}
		for i := range out {
			list := strings.Split(*part(&out[i]), ",")
			slices.SortFunc(list, func(a, b string) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(b, a)) })
			*part(&out[i]) = strings.Join(slices.Compact(list), ",")
		}
		rows = out
	}
	order := map[string]int{} // properties in the order in which they were seen
	for i := len(rows) - 1; i >= 0; i-- {
		order[rows[i].property] = i
	}
	slices.SortStableFunc(rows, func(a, b row) int { return cmp.Compare(order[a.property], order[b.property]) })
	return rows
}

// rank puts ours first and libzt last.
func rank(name string) int {
	switch name {
	case nameOurs:
		return 0
	case nameLibzt:
		return 2
	}
	return 1
}

func TestMerged(t *testing.T) {
	var rows []row
	for _, root := range []string{"1.14.1", nameOurs} {
		for _, member := range []string{nameLibzt, nameOurs, "1.12.2"} {
			for i, gateway := range []string{nameOurs, "1.14.1"} {
				r := row{"traffic", root, nameOurs, member, gateway, passed, time.Duration(i) * time.Second}
				if root == nameOurs && member == nameLibzt && i == 1 {
					r.result = failed
				}
				rows = append(rows, r)
			}
		}
	}
	want := []row{
		{"traffic", "1.14.1", nameOurs, "ours,1.12.2,libzt", "ours,1.14.1", passed, time.Second},
		{"traffic", nameOurs, nameOurs, "ours,1.12.2,libzt", nameOurs, passed, 0},
		{"traffic", nameOurs, nameOurs, nameLibzt, "1.14.1", failed, time.Second},
		{"traffic", nameOurs, nameOurs, "ours,1.12.2", "1.14.1", passed, time.Second},
	}
	if got := merged(rows); !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}
