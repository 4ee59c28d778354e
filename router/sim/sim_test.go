package sim

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"ztgate/router/config"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

var (
	oneSeed = flag.Uint64("seed", 0, "run this seed alone; with -v its events are printed")
	seeds   = flag.Int("seeds", 0, "how many seeds to run; 0 = a few")
	first   = flag.Uint64("first", 1, "the first seed")
	lasts   = flag.Duration("sim", 0, "how long to run seeds, instead of a number of them")
	until   = flag.Bool("until", false, "stop at the first world in which something is found")
	traced  = flag.Bool("trace", false, "with -v, print every packet too")
	rounds  = flag.Int("rounds", 12, "times that something goes wrong in a world")
	quiet   = flag.Duration("quiet", 12*time.Hour, "how long worlds go on after that, with nights")
)

// setting is what all worlds have.
type setting struct {
	ids     []*identity.Identity
	configs []*config.Config
}

func newSetting(t testing.TB) *setting {
	t.Helper()
	b, err := os.ReadFile("../../zerotier/testdata/vectors/identity.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Valid []struct {
			Secret string `json:"text_secret"`
		}
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	s := &setting{}
	for _, x := range v.Valid {
		id, err := identity.Parse(x.Secret)
		if err != nil {
			t.Fatal(err)
		}
		s.ids = append(s.ids, id)
	}
	n := ztnode.NetworkID(uint64(s.ids[1].Address()) << 24)
	const base = `
networks: [{id: %q}, {id: %q}]
vpc: {sources: [172.31.0.0/16], tun: ztg0}
nat: {max_flows: 4096, addresses: %s}
forwards:
  - {listen: "udp/5353", to: "172.31.0.20:53", from: overlay}
  - {listen: "udp/10.0.0.200:7000", to: "10.0.0.10:7000"}
targets: ["icmp://10.0.0.10"]
`
	for i, more := range []struct{ pool, policy string }{
		{"[]", "policy: {default: accept, rules: [{action: accept, direction: in}]}"},
		{"[10.0.0.1, 10.51.0.2]", "policy: {default: drop, rules: [{action: accept, direction: in}, {action: accept, to: 10.0.0.0/8}]}"},
		{"[10.51.0.1, 10.51.0.2, 10.0.0.1]", "policy: {default: accept, rules: [{action: reject, to: 10.0.0.77/32}, {action: accept, direction: in}]}"},
	} {
		path := filepath.Join(t.TempDir(), fmt.Sprint(i))
		if err := os.WriteFile(path, fmt.Appendf(nil, base+more.policy+"\n", n|1, n|2, more.pool), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := config.Load(config.Sources{Flags: map[string][]string{"config": {path}, "home": {home}}})
		if err != nil {
			t.Fatal(err)
		}
		s.configs = append(s.configs, cfg)
	}
	return s
}

// play runs a world. Random numbers of the process follow the seed too.
func (s *setting) play(t *testing.T, seed uint64, show bool) *world {
	t.Helper()
	var w *world
	t.Run(fmt.Sprint(seed), func(t *testing.T) {
		cryptotest.SetGlobalRandom(t, seed)
		w = newWorld(seed, s.ids, s.configs)
		if show {
			w.log.all = func(line string) { fmt.Println(line) }
		}
		w.run(*rounds, *quiet)
		w.end()
	})
	return w
}

func (w *world) report(t *testing.T) {
	t.Helper()
	if len(w.findings) == 0 {
		return
	}
	var b strings.Builder
	for _, line := range w.log.recent[max(0, len(w.log.recent)-60):] {
		fmt.Fprintln(&b, line)
	}
	for _, f := range w.findings {
		fmt.Fprintf(&b, "%12v  %s: %s\n", f.at, f.invariant, f.text)
	}
	t.Errorf("seed %d:\n%s", w.seed, &b)
}

// TestWorlds runs worlds, and finds nothing.
func TestWorlds(t *testing.T) {
	s := newSetting(t)
	if *oneSeed != 0 {
		s.play(t, *oneSeed, testing.Verbose()).report(t)
		return
	}
	debug.SetGCPercent(400) // little is kept, and much thrown away
	n := *seeds
	switch {
	case n > 0 || *lasts > 0:
	case testing.Short():
		n, *rounds, *quiet = 2, 3, 10*time.Minute
	default:
		n, *quiet = 12, 4*time.Hour
	}
	var sum totals
	began := time.Now()
	for seed := *first; ; seed++ {
		if *lasts > 0 && time.Since(began) >= *lasts || *lasts == 0 && seed >= *first+uint64(n) {
			break
		}
		w := s.play(t, seed, false)
		sum.add(w, time.Since(began))
		w.report(t)
		if *lasts > 0 && sum.minutes() {
			fmt.Printf("seeds from %d: %s\n", *first, &sum)
		}
		if *until && len(w.findings) > 0 {
			t.Logf("first found: %s by seed %d after %v", w.findings[0].invariant, seed-*first+1, w.findings[0].at.Round(time.Second))
			break
		}
	}
	if t.Log(&sum); *lasts > 0 {
		fmt.Printf("seeds from %d: %s\n", *first, &sum)
	}
}

// totals are what worlds did together.
type totals struct {
	worlds, events, connections, faults, findings int
	simulated, slowest                            time.Duration
	real, told                                    time.Duration
}

func (s *totals) add(w *world, real time.Duration) {
	s.real = real
	s.worlds++
	s.events += w.log.n
	s.connections += w.connections
	s.faults += w.faults
	s.simulated += w.net.Now.Sub(epoch)
	s.slowest = max(s.slowest, w.slowest)
	if len(w.findings) > 0 {
		s.findings++
	}
}

// minutes reports, once for each, that a minute has passed.
func (s *totals) minutes() bool {
	passed := s.real-s.told >= time.Minute
	if passed {
		s.told = s.real
	}
	return passed
}

func (s *totals) String() string {
	days := s.simulated.Hours() / 24
	return fmt.Sprintf("%d worlds, %.1f simulated days in %v (%.0f days an hour), %d faults, %d connections, %.0f events a second, slowest recovery %v, worlds with findings: %d",
		s.worlds, days, s.real.Round(time.Millisecond), days/s.real.Hours(), s.faults, s.connections, float64(s.events)/s.real.Seconds(), s.slowest, s.findings)
}

// TestReplay runs a seed twice, and the same happens.
func TestReplay(t *testing.T) {
	s := newSetting(t)
	defer func(r int, q time.Duration) { *rounds, *quiet = r, q }(*rounds, *quiet)
	*rounds, *quiet = 6, time.Hour
	if testing.Short() {
		*rounds = 2
	}
	a, b := s.play(t, 3, false), s.play(t, 3, false)
	if a.log.sum != b.log.sum || a.log.n != b.log.n {
		t.Errorf("the first time %d events with the sum %x, then %d with %x", a.log.n, a.log.sum, b.log.n, b.log.sum)
	}
	if c := s.play(t, 4, false); c.log.sum == a.log.sum {
		t.Error("two seeds have the same history")
	}
}
