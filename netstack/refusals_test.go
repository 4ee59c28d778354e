package netstack

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
	"ztgate/netstack/policy"
)

// TestReasons: every reason is explained, here and in the manual, by the same words.
func TestReasons(t *testing.T) {
	manual, err := os.ReadFile("../docs/operator.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, r := range Reasons() {
		seen[r.Name] = true
		remedy := r.Remedy
		if remedy == "" {
			remedy = "–"
		}
		if !strings.HasSuffix(r.Meaning, ".") || strings.Count(r.Meaning, ". ") > 0 || r.Remedy != "" && !strings.HasSuffix(r.Remedy, ".") {
			t.Errorf("%s: %q, %q", r.Name, r.Meaning, r.Remedy)
		}
		if row := fmt.Sprintf("| `%s` | %s | %s |", r.Name, r.Meaning, remedy); !strings.Contains(string(manual), row+"\n") {
			t.Errorf("docs/operator.md lacks the row\n%s", row)
		}
	}
	for name := range meanings {
		if !seen[name] {
			t.Errorf("%s is no reason", name)
		}
	}
}

func find(list []Refusal, reason string) (out []Refusal) {
	for _, x := range list {
		if x.Reason == reason {
			out = append(out, x)
		}
	}
	return out
}

// TestRefusals: what is refused is shown with whose it was, as it came, and how often.
func TestRefusals(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 22, Last: 22}}}})
	})
	start := r.now
	for i := range 5 {
		r.fromVPC(pkttest.TCP(fmt.Sprintf("172.31.0.10:%d", 4000+i), "10.0.0.10:22", ipkt.SYN, 1, 0, ""))
		r.sleep(time.Second)
	}
	r.fromMember(officeMAC, pkttest.UDP("10.0.0.10:53", "10.0.0.1:4000", "unasked"), pkttest.UDP("172.31.0.9:53", "10.0.0.1:4000", "forged"))
	r.fromVPC(pkttest.UDP("192.0.2.1:53", "10.0.0.10:53", "x"))
	r.overlay.silent[netip.MustParseAddr("10.0.0.66")] = true
	r.fromVPC(pkttest.UDP("172.31.0.10:4000", "10.0.0.66:53", "x"))
	for range 8 {
		r.sleep(time.Second)
	}
	r.e.Deliver(testNet+1, [][]byte{make([]byte, 20)})
	got := r.e.Refusals()
	want := map[string]Refusal{
		"policy": {Protocol: "tcp", Source: pkttest.Addr("172.31.0.10:4004"), Destination: pkttest.Addr("10.0.0.10:22"), Count: 5,
			First: start, Last: start.Add(4 * time.Second)},
		"no_flow":            {Side: OverlaySide, Network: testNet, MAC: officeMAC, Protocol: "udp", Source: pkttest.Addr("10.0.0.10:53"), Destination: pkttest.Addr("10.0.0.1:4000"), Count: 1},
		"spoofed_source":     {Side: OverlaySide, Network: testNet, MAC: officeMAC, Protocol: "udp", Source: pkttest.Addr("172.31.0.9:53"), Destination: pkttest.Addr("10.0.0.1:4000"), Count: 1},
		"source_not_allowed": {Protocol: "udp", Source: pkttest.Addr("192.0.2.1:53"), Destination: pkttest.Addr("10.0.0.10:53"), Count: 1},
		"unresolved":         {Network: testNet, Protocol: "udp", Source: pkttest.Addr("172.31.0.10:4000"), Destination: pkttest.Addr("10.0.0.66:53"), Count: 1},
		"network":            {Side: OverlaySide, Count: 1},
	}
	for reason, w := range want {
		list := find(got, reason)
		if len(list) != 1 {
			t.Errorf("%s: %+v", reason, list)
			continue
		}
		g := list[0]
		w.Reason = reason
		if w.First.IsZero() {
			w.First, w.Last = g.First, g.Last
		}
		g.First, g.Last = g.First.Round(time.Millisecond), g.Last.Round(time.Millisecond)
		w.First, w.Last = w.First.Round(time.Millisecond), w.Last.Round(time.Millisecond)
		if g != w {
			t.Errorf("%s:\n got %+v\nwant %+v", reason, g, w)
		}
	}
	if len(got) != len(want) || got[0].Last.Before(got[len(got)-1].Last) {
		t.Errorf("%d refusals, want %d, the latest first: %+v", len(got), len(want), got)
	}
	r.account()
}

// TestNotedRefusals: what others refuse by what was explained is shown like a packet, and
// counted as none.
func TestNotedRefusals(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Reject, Ports: []policy.PortRange{{First: 22, Last: 22}}}})
	})
	for _, tt := range []struct {
		proto    uint8
		src, dst string
		reason   string
	}{
		{ipkt.TCP, "172.31.0.10:4000", "10.0.0.10:22", "policy"},
		{ipkt.UDP, "172.31.0.10:4000", "10.0.0.10:22", "policy"},
		{ipkt.TCP, "[fd77:1::50]:4000", "[fd77:100::50]:22", "policy"},
		{ipkt.TCP, "192.0.2.1:4000", "10.0.0.10:80", "source_not_allowed"},
		{ipkt.TCP, "172.31.0.10:4000", "10.77.0.10:80", "no_route"},
	} {
		q := Question{Protocol: tt.proto, Src: pkttest.Addr(tt.src), Dst: pkttest.Addr(tt.dst)}
		x := r.e.Explain(q)
		if x.Verdict == "forward" || x.Reason != tt.reason {
			t.Errorf("%s to %s: %s, %s", tt.src, tt.dst, x.Verdict, x.Reason)
		}
		for range 3 {
			r.e.NoteRefusal(q, x.Reason)
		}
		if got := find(r.e.Refusals(), tt.reason); len(got) == 0 || got[0].Count != 3 || got[0].Source != q.Src || got[0].Destination != q.Dst || got[0].Protocol != protocolName(tt.proto) {
			t.Errorf("%s to %s: %+v", tt.src, tt.dst, got)
		}
		r.sleep(time.Second)
	}
	for _, d := range drops() {
		if n := r.drops(VPCSide, d); n != 0 {
			t.Errorf("%d packets are counted as %s", n, d)
		}
	}
	r.e.NoteRefusal(Question{}, "policy")
	r.e.NoteRefusal(Question{}, "nonsense")
}

// TestRefusalShares: a flood of one source doesn't push out what others are refused, nor
// does one of many sources for one reason; the list is bounded.
func TestRefusalShares(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Policy = policy.New(policy.Accept, []policy.Rule{{Action: policy.Drop, Proto: ipkt.TCP, Ports: []policy.PortRange{{First: 22, Last: 22}}}})
	})
	victims := func() int { return len(find(r.e.Refusals(), "policy")) }
	// All at once: one source doesn't use up what all may do.
	for i := range 2 * maxRefusals {
		r.fromMember(rivalMAC, pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", 20000+i), "x"))
	}
	for i := range 8 {
		r.fromVPC(pkttest.TCP(fmt.Sprintf("172.31.0.%d:4000", 10+i), "10.0.0.10:22", ipkt.SYN, 1, 0, ""))
	}
	for i := range 2 * maxRefusals { // one after the other: nor more than its share of a list with room
		r.sleep(time.Second)
		r.fromMember(rivalMAC, pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", 30000+i), "x"))
	}
	// By chance one of them may share its place in the table of rates with the flood.
	seen := victims()
	if n := len(r.e.Refusals()); n != refusalShare+seen || seen < 7 {
		t.Errorf("%d refusals, want %d of one source and 8", n, refusalShare)
	}
	for round := range 40 {
		var flood, sources [][]byte
		for i := range 128 {
			flood = append(flood, pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", 1024+round*128+i), "x"))
			sources = append(sources, pkttest.UDP(fmt.Sprintf("192.0.%d.%d:53", round, i), "10.0.0.10:53", "x"))
		}
		r.fromMember(rivalMAC, flood...)
		if round%2 == 0 {
			for i := range 16 {
				r.fromVPC(sources[8*i : 8*i+8]...)
			}
		}
		r.sleep(time.Second)
	}
	if n := victims(); n != seen {
		t.Errorf("%d of %d refusals are left after the floods", n, seen)
	}
	got := r.e.Refusals()
	if n := len(find(got, "no_flow")); n == 0 || n > refusalShare {
		t.Errorf("%d refusals of one source, want at most %d", n, refusalShare)
	}
	if len(got) != maxRefusals || len(r.e.ring.index) != maxRefusals {
		t.Errorf("%d refusals, %d indexed, want %d", len(got), len(r.e.ring.index), maxRefusals)
	}
	// One that is refused amid a flood gets a place, too.
	r.fromVPC(pkttest.TCP("172.31.0.99:4000", "10.0.0.10:22", ipkt.SYN, 1, 0, ""))
	if n := victims(); n < seen || n > seen+1 || n < 8 {
		t.Errorf("%d refusals by the policy, want %d", n, seen+1)
	}
}

// TestRefusalsRace lets workers refuse while others read.
func TestRefusalsRace(t *testing.T) {
	r := newRig(t)
	var g sync.WaitGroup
	for i := range 4 {
		g.Go(func() {
			for j := range 200 {
				h := ethernetHeader(ourMAC, [6]byte{2, 9, 9, 9, 9, byte(i)}, false)
				r.e.Deliver(testNet, [][]byte{append(h[:], pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", 1024+j), "x")...)})
				r.e.Refusals()
			}
		})
	}
	g.Wait()
}

// BenchmarkRefused is a flood that is refused: always the same packet, and ever others.
func BenchmarkRefused(b *testing.B) {
	for name, n := range map[string]int{"same": 1, "others": 4096} {
		b.Run(name, func(b *testing.B) {
			r := newRig(b)
			frames := make([][]byte, n)
			for i := range frames {
				h := ethernetHeader(ourMAC, hostMAC, false)
				frames[i] = append(h[:], pkttest.UDP("10.0.0.10:53", fmt.Sprintf("10.0.0.1:%d", 1024+i), "x")...)
			}
			batch := make([][]byte, 64)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				for j := range batch {
					batch[j] = frames[i%n]
					i++
				}
				r.e.Deliver(testNet, batch)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(i), "ns/packet")
		})
	}
}
