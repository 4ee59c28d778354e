package sim

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

var (
	plantedTable = flag.String("planted", "", "plant the faults one at a time, and write the table of what was found to this file")
	plantedOnly  = flag.String("only", "", "plant the faults whose name contains this alone")
)

// planted is a fault that is put back into the code.
type planted struct {
	name    string
	file    string
	changes []string // pairs: text that the file has once, and what replaces it
}

// plantedFaults are those that were there once, or that tests of single packages missed
// or could miss. Each must be found by some world.
var plantedFaults = []planted{
	{"prefixes judged by their first address", "router/plan/judge.go", []string{"!packet.Private(p)", "!packet.Private(single(p.Addr()))"}},
	{"assigned addresses aren't judged", "router/plan/plan.go", []string{
		"			why = b.add(&out, ztnode.Route{Target: a})\n",
		"			r := ztnode.Route{Target: a.Masked()}\n			out.Routes = append(out.Routes, r)\n			b.take(r.Target, n.ID)\n			b.out.Routes = append(b.out.Routes, Route{r, n.ID})\n"}},
	{"a later network takes a prefix", "router/plan/judge.go", []string{"return false, overlapping(b.taken, p, id)", "return false, nil"}},
	{"prefixes compared with the VPC's by equality", "router/plan/judge.go", []string{"		if s.Overlaps(p) {\n			return object(\"give", "		if s == p {\n			return object(\"give"}},
	{"single public addresses aren't judged", "router/plan/judge.go", []string{"!packet.Private(p)", "!packet.Private(p) && p.Bits() < 32"}},
	{"sides of forwards are ignored", "netstack/snapshot.go", []string{
		"	if f := s.listeners[forwardKey{a, port,",
		"	for _, f := range s.listeners {\n		if f.Listen.Port() == port && f.Proto == proto {\n			return f\n		}\n	}\n	if f := s.listeners[forwardKey{a, port,"}},
	{"ready without a probe", "router/gateway/health.go", []string{"	checks = append(checks, s.targetChecks(peers)...)\n", ""}},
	{"a target that was up once stays up", "router/gateway/probe.go", []string{"s.Up, s.Error, s.ConnectMS, t.last = err == nil, text,", "s.Up, s.Error, s.ConnectMS, t.last = s.Up || err == nil, text,"}},
	{"nobody looks at the host", "router/gateway/hostcheck.go", []string{"	case !s.Up:\n", "	case !s.Up && s.MTU < 0:\n", "append(checks, g.looker.ways, g.pulse.check())", "append(checks, g.pulse.check())"}},
	{"no masquerade after a reload", "router/gateway/gateway.go", []string{"g.plane.SetNetworks(planeNetworks(cfg, p))", "g.plane.SetNetworks(planeNetworks(g.forgetful(cfg), p))",
		"// enforce carries", "func (g *gateway) forgetful(c *config.Config) *config.Config {\n	if s := g.state.Load(); s != nil && s.plan != nil && g.conf.Load() != g.first {\n		return &config.Config{}\n	}\n	g.first = c\n	return c\n}\n\n// enforce carries",
		"	planning sync.Mutex", "	first *config.Config\n	planning sync.Mutex"}},
	{"half of a file of mappings is used", "router/gateway/mappings.go", []string{"			return nil, fmt.Errorf(\"%s: %w\", f.path, err) // not the part that was read", "			return list, nil"}},
	{"files replaced before they are synced", "internal/atomicfile/atomicfile.go", []string{"	if err = f.Sync(); err != nil {\n		return err\n	}\n", ""}},
	{"a revocation is forgotten", "zerotier/vl2/membership.go", []string{"		m.comVoid = r.Threshold\n", ""}},
	{"the controller announces no revocation", "zerotier/controller/revoke.go", []string{"	if len(list) == 0 {\n		return\n	}\n	for a, m := range n.members {", "	for a, m := range n.members {\n		break"}},
	{"a withdrawn route stays in the kernel", "router/host/link.go", []string{"		if err := k.nl.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {\n			errs =", "		if err := error(nil); err != nil {\n			errs ="}},
	{"a greedy client isn't limited", "netstack/internal/nat/open.go", []string{"t.count >= t.bound(c) && !t.evict(t.expendableFor(c))", "t.count >= t.set.MaxFlows"}},
	{"who has much takes from those who wait", "netstack/internal/nat/open.go", []string{"t.expendableFor(c)", "t.expendable()"}},
	{"a member started anew shows no certificate", "zerotier/network/joined.go", []string{"if len(s.credentials) > 0 && l.shows.Take", "if len(s.credentials) > 99 && l.shows.Take"}},
	{"a clock set back stops the protocol", "zerotier/network/layer.go", []string{"	return int64(t.Sub(*start)) + int64(24*time.Hour)", "	return int64(t.Round(0).Sub(start.Round(0))) + int64(24*time.Hour)"}},
	{"guards go while the network is down", "router/gateway/ingress_tun.go", []string{"t.link.Guard(routes, p.KeepGuards)", "t.link.Guard(routes, false)"}},
	{"no guards", "router/gateway/ingress_tun.go", []string{"t.link.Guard(routes, p.KeepGuards)", "t.link.Guard(nil, false)"}},
	{"an external port is given to two clients", "netstack/internal/nat/port.go", []string{
		"t.endpointHash(client, port, 0)%mappingHeads", "t.endpointHash(&[16]byte{}, port, 0)%mappingHeads",
		"if m.port == port && m.client == client.addr && (", "if m.port == port && (true || "}},
	{"whoever claims an address has it", "netstack/internal/neigh/neigh.go", []string{
		"		told, v = &Conflict{Address: a, Owner: e.mac, Rival: mac}, Refused\n		ask =", "		t.bind(now, a, mac, how, p == nil)\n		ask ="}},
	{"a removed route isn't put back", "router/host/link.go", []string{"		if slices.Contains(present, w) {\n			continue\n		}\n		if err", "		if slices.Contains(present, w) || slices.Contains(k.once, w) {\n			continue\n		}\n		k.once = append(k.once, w)\n		if err",
		"	addrs   []netip.Prefix\n", "	addrs   []netip.Prefix\n	once    []ztnode.Route\n"}},
}

// patched returns a file with a fault in it.
func (p *planted) patched(t *testing.T) (string, bool) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../..", p.file))
	if err != nil {
		t.Error(err)
		return "", false
	}
	text := string(b)
	for i := 0; i < len(p.changes); i += 2 {
		if n := strings.Count(text, p.changes[i]); n != 1 {
			t.Errorf("%s: %s has %q %d times, want once: plant it where it is now", p.name, p.file, p.changes[i], n)
			return "", false
		}
		text = strings.Replace(text, p.changes[i], p.changes[i+1], 1)
	}
	return text, true
}

// TestPlanted checks that the planted faults fit the code, and with -planted that worlds
// find them.
func TestPlanted(t *testing.T) {
	var table strings.Builder
	for _, p := range plantedFaults {
		if !strings.Contains(p.name, *plantedOnly) {
			continue
		}
		text, ok := p.patched(t)
		if !ok || *plantedTable == "" {
			continue
		}
		began := time.Now()
		by, seed, at := plant(t, p.file, text)
		if by == "" {
			t.Errorf("%s: not found", p.name)
			by = "not found"
		}
		line := fmt.Sprintf("| %s | `%s` | %s | %s | %s |", p.name, p.file, by, seed, at)
		t.Log(line, time.Since(began).Round(time.Second))
		fmt.Fprintln(&table, line)
	}
	if *plantedTable == "" {
		return
	}
	head := fmt.Sprintf("# What the simulator finds\n\n"+
		"Faults that were there once, or could be, are put back into the code one at a time, and worlds of `router/sim` run until one finds something\n"+
		"(`make simulate-faults`, at most %d worlds). The second last column says which world that was, and the last one when in its history. "+
		"The invariants\nare in [docs/design.md](../../docs/design.md), and the changes in `router/sim/planted_test.go`. Without a fault none of these worlds finds anything.\n\n", plantedSeeds) +
		"| fault | where | found by | seeds | simulated time |\n| --- | --- | --- | --- | --- |\n"
	if err := os.WriteFile(*plantedTable, []byte(head+table.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// plantedSeeds is how many worlds may pass before a fault is found.
const plantedSeeds = 40

var foundLine = regexp.MustCompile(`first found: (\w+) by seed (\d+) after (\S+)`)

// plant runs worlds on code in which one file is another.
func plant(t *testing.T, file, text string) (by, seed, at string) {
	t.Helper()
	dir := t.TempDir()
	path, err := filepath.Abs(filepath.Join("../..", file))
	if err != nil {
		t.Fatal(err)
	}
	other, overlay := filepath.Join(dir, filepath.Base(file)), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]map[string]string{"Replace": {path: other}})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{other: []byte(text), overlay: list} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-overlay", overlay, "-count=1", "-run", "^TestWorlds$", "-v", ".",
		"-seeds", fmt.Sprint(plantedSeeds), "-until", "-quiet", "1h")
	out, err := cmd.CombinedOutput()
	m := foundLine.FindStringSubmatch(string(out))
	if m == nil {
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return "", "", ""
	}
	return m[1], m[2], m[3]
}
