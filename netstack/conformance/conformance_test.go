package conformance

import (
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	strict = flag.Bool("strict", false, "fail on every binding row that isn't green, also on known ones, and print the table")
	table  = flag.Bool("table", false, "print the table")
	seed   = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of ports, identifiers and payloads")
)

// verdict of a row.
type verdict string

const (
	green   verdict = "green"
	fails   verdict = "fails"
	notA    verdict = "n-a"
	skipped verdict = "not run"
)

// result is one line of the table.
type result struct {
	requirement
	verdict  verdict
	evidence string
}

// report collects results; the table has them in the document's order.
type report struct {
	mu      sync.Mutex
	router  string
	results map[string]result
}

// add records a row, beside what another way of testing it found.
func (r *report) add(q requirement, v verdict, evidence string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := r.results[q.id]; ok {
		switch {
		case old.verdict == fails:
			v = fails
			evidence = old.evidence
		case v == fails || old.verdict == skipped:
		default:
			v = old.verdict
			evidence = old.evidence + "; " + evidence
		}
	}
	r.results[q.id] = result{q, v, evidence}
}

// open lists the binding rows that are neither green nor not applicable.
func (r *report) open() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.results {
		if x.binding() && x.verdict != green && x.verdict != notA {
			out = append(out, x.id)
		}
	}
	slices.Sort(out)
	return out
}

// write prints the table and its totals.
func (r *report) write(w io.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(w, "\n%s, seed %d\n%-22s %-18s %-8s %s\n", r.router, *seed, "row", "level", "verdict", "evidence")
	all := slices.SortedFunc(maps.Values(r.results), func(a, b result) int { return a.n - b.n })
	totals := map[string]map[verdict]int{}
	for _, x := range all {
		fmt.Fprintf(w, "%-22s %-18s %-8s %s\n", x.id, x.level, x.verdict, x.evidence)
		class := levelClass(x.requirement)
		if totals[class] == nil {
			totals[class] = map[verdict]int{}
		}
		totals[class][x.verdict]++
	}
	fmt.Fprintf(w, "\n%-10s %6s %6s %6s %8s\n", "level", green, fails, notA, skipped)
	for _, class := range slices.Sorted(maps.Keys(totals)) {
		t := totals[class]
		fmt.Fprintf(w, "%-10s %6d %6d %6d %8d\n", class, t[green], t[fails], t[notA], t[skipped])
	}
}

func levelClass(q requirement) string {
	switch {
	case strings.Contains(q.level, "MUST"):
		return "MUST"
	case strings.Contains(q.level, "SHOULD"):
		return "SHOULD"
	}
	return q.level
}

// notYet ends a row that needs a feature the router doesn't have yet.
type notYet string

// Tables that TestMain prints when asked for.
var (
	ours       = &report{router: "ztgate netstack", results: map[string]result{}}
	loadReport = &report{router: "loads and faults", results: map[string]result{}}
	kernels    = &report{router: "Linux nftables masquerade", results: map[string]result{}}
)

func TestMain(m *testing.M) {
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue { // rows wait more than they work
		if err := f.Value.Set("12"); err != nil {
			panic(err)
		}
	}
	code := m.Run()
	if *strict || *table {
		for _, r := range []*report{ours, loadReport, kernels} {
			if len(r.results) > 0 {
				r.write(os.Stdout)
			}
		}
	}
	if open := ours.open(); *strict && len(open) > 0 {
		fmt.Printf("\nbinding rows that aren't green: %s\n", strings.Join(open, ", "))
		code = 1
	}
	os.Exit(code)
}

// row is a requirement as a test.
type row struct {
	id   string // its name in the document
	name string // what it asks, in a few words
	run  func(*bench)
}

// rows are all rows that can be run against a router, by name.
func rows() map[string]row {
	all := map[string]row{}
	for _, section := range []func() []row{
		udpMapping, udpTimers, udpBehaviour, udpErrors, udpFragments,
		tcpConnections, tcpFiltering, tcpTimers, tcpOther,
		icmpQueries, icmpValidation, icmpTranslation, icmpRouter, icmpForm,
		updateTCP, updateMapping, updateRefresh, updateIdentifiers,
		carrierClients, carrierPorts, carrierResources,
		ipv4Headers, ipv4Errors, ipv4Silence, ipv4Local, ipv4Addresses, ipv4Options, ipv4Fields,
		ipv6Headers, ipv6Fragments, ipv6Fields, ipv6Errors, ipv6Addresses, ipv6Translation,
		userPorts, userPing, userTraceroute, userPathMTU, userFragments, userResets, userSegments,
		userLimits, userChanges, userRestarts, userForwards, userLeaks, userProtocols, userPrograms, userNeighbours,
		sumECN, sumChecksums, inbound,
	} {
		for _, r := range section() {
			if _, twice := all[r.id]; twice {
				panic("two rows " + r.id)
			}
			all[r.id] = r
		}
	}
	return all
}

// testName is a row's name as a subtest.
func testName(q requirement) string {
	return strings.ReplaceAll(q.id, "/", "-") + " " + rows()[q.id].name
}

func TestEveryRowIsThere(t *testing.T) {
	have := rows()
	for _, q := range requirements {
		if r, ok := have[q.id]; !ok || r.run == nil || r.name == "" {
			t.Errorf("row %d %s has no test", q.n, q.id)
		}
		delete(have, q.id)
	}
	for id := range have {
		t.Errorf("%s is no row of the document", id)
	}
	for id := range knownFailures {
		if !strings.HasPrefix(id, "LF-") && !slices.ContainsFunc(requirements, func(q requirement) bool { return q.id == id }) {
			t.Errorf("known failure %s is no row of the document", id)
		}
	}
}

// TestConformance runs every row against an engine in memory.
func TestConformance(t *testing.T) {
	make := func(t *testing.T, s setup) router { return newEngineRouter(t, s) }
	for _, q := range requirements {
		t.Run(testName(q), func(t *testing.T) {
			t.Parallel()
			v, evidence := runRow(t, q, make)
			ours.add(q, v, evidence)
			judge(t, q, v, evidence)
		})
	}
}

// judge fails the test of a row that should be green.
func judge(t *testing.T, q requirement, v verdict, evidence string) {
	reason, known := knownFailures[q.id]
	switch {
	case v == fails && *strict && q.binding():
		t.Error(evidence)
	case v == fails && (known || *strict):
		t.Skipf("known: %s: %s", reason, evidence)
	case v == fails:
		t.Error(evidence)
	case v == notA || v == skipped:
		t.Skip(evidence)
	case known:
		t.Logf("passes now: remove it from the known failures (%s)", reason)
	}
}

// runRow runs one row on a router of its own.
func runRow(t *testing.T, q requirement, make func(*testing.T, setup) router) (v verdict, evidence string) {
	return runFunc(t, q, make, rows()[q.id].run)
}

func runFunc(t *testing.T, q requirement, make func(*testing.T, setup) router, row func(*bench)) (v verdict, evidence string) {
	b := &bench{t: t, make: make, seed: *seed + uint64(q.n)}
	b.short = testing.Short()
	b.rng = rand.New(rand.NewPCG(b.seed, 1))
	defer func() {
		switch r := recover().(type) {
		case nil:
		case fatal:
			v, evidence = fails, r.reason
		case notApplicable:
			v, evidence = notA, string(r)
		case notHere:
			v, evidence = skipped, string(r)
		case notYet:
			v, evidence = fails, "not there yet: "+string(r)
		default:
			panic(r)
		}
		if b.r != nil {
			if err := b.r.close(); err != nil && v == green {
				v, evidence = fails, fmt.Sprintf("router ended with: %v", err)
			}
		}
	}()
	row(b)
	return green, strings.Join(b.notes, "; ")
}

// same runs the rows that stand for this one.
func same(ids ...string) func(*bench) {
	return func(b *bench) {
		for _, id := range ids {
			rows()[id].run(b)
			b.stop()
		}
		b.note("as %s", strings.Join(ids, ", "))
	}
}

// na marks a row that doesn't apply, with the document's reason.
func na(reason string) func(*bench) { return func(*bench) { panic(notApplicable(reason)) } }
