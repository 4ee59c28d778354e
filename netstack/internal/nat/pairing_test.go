package nat

import (
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// checkPairs holds the pairs of clients against the mappings.
func (p *player) checkPairs() {
	t := p.tab
	want := map[*group]map[[16]byte]pair{}
	for _, g := range t.groups {
		want[g] = map[[16]byte]pair{}
	}
	for _, pool := range t.pools[1:] {
		if pool.group != t.groups[pool.key.ext] || (pool.group == nil) != (pool.paired == nil) {
			p.t.Errorf("the pool of %v is in another group than its address", ipkt.Addr(pool.key.ext))
		}
		if pool.group == nil {
			continue
		}
		for port := range 1 << 16 {
			if !pool.paired.has(uint16(port)) {
				continue
			}
			client := pool.at(uint16(port)).client
			had := want[pool.group][client]
			if !pool.used.has(uint16(port)) || had.mappings > 0 && pool.group.addrs[had.at] != pool.key.ext {
				p.t.Errorf("port %d of %v holds no address of %v", port, ipkt.Addr(pool.key.ext), ipkt.Addr(client))
			}
			for i, a := range pool.group.addrs {
				if a == pool.key.ext {
					had.at = i
				}
			}
			had.mappings++
			want[pool.group][client] = had
		}
	}
	for g := range want {
		clients := make([]int, len(g.addrs))
		for _, had := range want[g] {
			clients[had.at]++
		}
		if !slices.Equal(clients, g.clients) {
			p.t.Errorf("addresses %v have %v clients, counted %v", g.Addresses, clients, g.clients)
		}
		if !maps.Equal(want[g], g.pairs) {
			p.t.Errorf("clients have %d addresses of %v, by their mappings %d", len(g.pairs), g.Addresses, len(want[g]))
		}
	}
}

func addresses(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// newPaired is a player whose flows leave from one of some addresses, external first.
func newPaired(t testing.TB, s Settings, list ...string) *player {
	p := newPlayer(t, s)
	p.paired = true
	p.tab.SetGroups([]Group{{Addresses: addresses(list...)}})
	return p
}

// from opens a flow of each kind and returns the address that they all leave from.
func (p *player) from(client string) netip.Addr {
	p.t.Helper()
	var at netip.Addr
	c := pkttest.Addr(client)
	for i, b := range [][]byte{pkttest.UDP(client, o1, "x"), pkttest.TCP(client, o1, ipkt.SYN, 1, 0, ""),
		pkttest.Echo(c.Addr().String(), pkttest.Addr(o1).Addr().String(), false, c.Port(), "x")} {
		before := pkttest.Describe(b)
		p.mustPass(before, VPC, b)
		a := netip.AddrFrom4([4]byte(b[12:16]))
		if i > 0 && a != at {
			p.t.Errorf("%s leaves from %v, others from %v", before, a, at)
		}
		at = a
	}
	return at
}

// TestPaired: a client leaves from one address, whatever its protocols and ports, and
// clients are shared out among the addresses.
func TestPaired(t *testing.T) {
	p := newPaired(t, Settings{}, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	at, of := map[string]netip.Addr{}, map[netip.Addr]int{}
	for port := 4000; port < 4003; port++ {
		for i := range 90 {
			client := fmt.Sprintf("172.31.0.%d", 10+i)
			a := p.from(fmt.Sprintf("%s:%d", client, port))
			if had, ok := at[client]; !ok {
				at[client] = a
				of[a]++
			} else if had != a {
				t.Errorf("%s leaves from %v, and at port %d from %v", client, had, port, a)
			}
		}
	}
	for a, n := range of {
		if n != 30 || len(of) != 3 {
			t.Errorf("%d clients have %v of %d addresses, want 30", n, a, len(of))
		}
	}
	p.check()
	// In quarantine, too; then nothing is kept.
	for p.sleep(5*time.Minute + time.Second); p.tab.Len() > 0; {
		p.sleep(time.Second)
	}
	for client, had := range at {
		if a := p.from(client + ":5000"); a != had {
			t.Errorf("%s left from %v, and at once afterwards from %v", client, had, a)
		}
	}
	p.check()
	for range 3 {
		p.sleep(10 * time.Minute)
	}
	if g := p.tab.groups[ipkt.Bytes(external)]; len(g.pairs) > 0 {
		p.tab.mu.Lock()
		for _, pool := range p.tab.pools[1:] {
			pool.expire(p.tab, p.tab.now, 1<<16)
		}
		p.tab.mu.Unlock()
		if len(g.pairs) > 0 {
			t.Errorf("%d pairs of clients that are gone", len(g.pairs))
		}
	}
	p.check()
}

// TestPairedOthers: neither clients of the overlay nor flows that leave from a certain
// address change whom an address belongs to.
func TestPairedOthers(t *testing.T) {
	p := newPaired(t, Settings{}, "10.0.0.1", "10.0.0.2")
	p.from(v1)
	open := func(side Side, b []byte, n NewFlow) {
		t.Helper()
		var v ipkt.View
		var k Key
		if ipkt.Parse(b, &v) != ipkt.OK || !p.tab.KeyOf(side, &v, &k) {
			t.Fatal("no packet")
		}
		p.r.Enter()
		defer p.r.Leave()
		if _, _, why := p.tab.Open(p.now, &k, &v, &n); why != Accepted {
			t.Fatalf("refused: %s", RefusalNames[why])
		}
	}
	for _, a := range []string{"10.0.0.1", "10.0.0.2"} {
		open(VPC, pkttest.UDP(v1, a+":53", "x"), NewFlow{To: VPC, Source: Masquerade, Address: ipkt.Bytes(netip.MustParseAddr(a))})
		open(Overlay, pkttest.UDP(o1, a+":53", "x"), NewFlow{To: VPC, Source: Masquerade, Address: ipkt.Bytes(netip.MustParseAddr(a))})
	}
	p.check()
	if g := p.tab.groups[ipkt.Bytes(external)]; len(g.pairs) != 1 {
		t.Errorf("%d clients have an address, want 1", len(g.pairs))
	}
}

// TestGroupChanges: an address that comes is for those who have none yet; one that goes
// is replaced for those who had it, and others stay where they are.
func TestGroupChanges(t *testing.T) {
	p := newPaired(t, Settings{}, "10.0.0.1", "10.0.0.2")
	at, port := map[string]netip.Addr{}, 4000
	again := func(what string, gone netip.Addr) {
		t.Helper()
		port += 100
		for client, had := range at {
			a := p.from(fmt.Sprintf("%s:%d", client, port)) // those before are the engine's to end
			if had == gone {
				if a == gone {
					t.Errorf("%s: %s still leaves from %v", what, client, a)
				}
			} else if a != had {
				t.Errorf("%s: %s left from %v, now from %v", what, client, had, a)
			}
			at[client] = a
		}
		p.check()
	}
	for i := range 40 {
		client := fmt.Sprintf("172.31.0.%d", 10+i)
		at[client] = p.from(client + ":4000")
	}
	p.tab.SetGroups([]Group{{Addresses: addresses("10.0.0.1", "10.0.0.2", "10.0.0.3")}})
	again("one more", netip.Addr{})
	for i := range 20 {
		if a := p.from(fmt.Sprintf("172.31.1.%d:4000", 10+i)); a.String() != "10.0.0.3" {
			t.Errorf("a new client got %v, where others have more", a)
		}
	}
	p.tab.SetGroups([]Group{{Addresses: addresses("10.0.0.1", "10.0.0.3")}})
	again("one less", netip.MustParseAddr("10.0.0.2"))
	p.tab.SetGroups([]Group{{Addresses: addresses("10.0.0.1", "10.0.0.3")}})
	again("the same", netip.Addr{})
	p.tab.SetGroups(nil)
	p.check()
	p.paired = false
	for client := range at {
		if a := p.from(client + ":5200"); a != external {
			t.Errorf("without a group %s leaves from %v", client, a)
		}
	}
	// What has gone, as with a network that was down, is back.
	p.paired = true
	p.tab.SetGroups([]Group{{Addresses: addresses("10.0.0.1", "10.0.0.3")}})
	p.check()
}

// TestGroupRestart: after a restart clients have the addresses that they had, also for
// endpoints that are new.
func TestGroupRestart(t *testing.T) {
	list := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}
	old := newPaired(t, Settings{}, list...)
	at := map[string]netip.Addr{}
	for i := range 60 {
		client := fmt.Sprintf("172.31.0.%d", 10+i)
		at[client] = old.from(client + ":4000")
	}
	p := newPlayer(t, Settings{Seed: [32]byte{9}})
	p.paired = true
	if n := p.tab.Import(p.now, old.tab.Mappings()); n != 180 {
		t.Fatalf("%d mappings taken", n)
	}
	p.tab.SetGroups([]Group{{Addresses: addresses(list...)}}) // as the networks come
	p.check()
	for client, had := range at {
		if a := p.from(client + ":5000"); a != had {
			t.Errorf("%s left from %v, after a restart from %v", client, had, a)
		}
		if a := p.from(client + ":4000"); a != had {
			t.Errorf("%s left from %v, after a restart at the same port from %v", client, had, a)
		}
	}
	p.check()
}

// TestGroupFull: whose address is full is refused, and others get another one.
func TestGroupFull(t *testing.T) {
	p := newPaired(t, Settings{MaxPortsPerClient: 10000}, "10.0.0.1", "10.0.0.2")
	var taken []netip.AddrPort // all high ports but 50 of each address
	for _, a := range addresses("10.0.0.1", "10.0.0.2") {
		for port := 1024 + 50; port < 1<<16; port++ {
			taken = append(taken, netip.AddrPortFrom(a, uint16(port)))
		}
	}
	p.tab.Reserve(ipkt.UDP, taken)
	opened := 0
	for i := range 60 { // each an established flow, so that it makes no room
		b := pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 2000+i), o1, "x")
		got, why := p.send(VPC, b)
		if why == Accepted {
			opened++
			ext := got[4 : len(got)-len(" > "+o1)]
			p.mustPass("answer", Overlay, pkttest.UDP(o1, ext, "x"))
			p.mustPass("more", VPC, pkttest.UDP(fmt.Sprintf("172.31.0.10:%d", 2000+i), o1, "x"))
		} else if why != NoPort {
			t.Errorf("refused with %s", RefusalNames[why])
		}
	}
	if opened != 50 {
		t.Errorf("%d flows at an address with 50 ports", opened)
	}
	for i := range 50 {
		client := fmt.Sprintf("172.31.0.11:%d", 2000+i)
		p.mustPass("another client", VPC, pkttest.UDP(client, o1, "x"))
	}
	p.check()
}

// TestGroupSpread: who has much takes no address from new clients, each of whom gets one of
// its own as long as there are any; and nobody new gets one that is nearly full.
func TestGroupSpread(t *testing.T) {
	p := newPaired(t, Settings{MaxFlows: 1 << 17, MaxFlowsPerClient: 1 << 17, MaxPortsPerClient: 60000}, "10.0.0.1", "10.0.0.2", "10.0.0.3")
	of := map[string]int{}
	out := func(client string) string {
		return pkttest.Addr(p.out(client)).Addr().String()
	}
	for i := range 200 {
		of[out(fmt.Sprintf("172.31.0.10:%d", 2000+i))]++
	}
	for i := range 2 {
		of[out(fmt.Sprintf("172.31.0.%d:4000", 11+i))]++
	}
	if len(of) != 3 {
		t.Errorf("three clients leave from %v", of)
	}
	full := out("172.31.0.10:2000")
	for i := range 46000 {
		if a := out(fmt.Sprintf("172.31.0.10:%d", 2200+i)); a != full {
			t.Fatalf("it leaves from %s and %s", full, a)
		}
	}
	for i := range 30 {
		if a := out(fmt.Sprintf("172.31.1.%d:4000", 1+i)); a == full {
			t.Errorf("a new client gets %s, which is nearly full", a)
		}
	}
	p.check()
}

// BenchmarkOpenPaired is what a group costs the first flow of a client: cpu-ns/op is the
// processor time.
func BenchmarkOpenPaired(b *testing.B) {
	for _, n := range []int{1, 2, 64} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := newPlayer(b, Settings{MaxFlows: 1 << 20})
			var list []netip.Addr
			for i := range n {
				list = append(list, netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)}))
			}
			if n > 1 {
				p.tab.SetGroups([]Group{{Addresses: list}})
			}
			template := pkttest.UDP(v1, o1, "")
			var v ipkt.View
			ipkt.Parse(template, &v)
			p.r.Enter()
			defer p.r.Leave()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			b.ReportAllocs()
			start := threadTime()
			for i := 0; b.Loop(); i++ {
				var k Key
				v.Src[13], v.Src[14], v.Src[15] = byte(i>>15), byte(i>>7), byte(i&127)
				v.SPort, v.DPort = uint16(1024+i*7%50000), uint16(1+i%60000)
				p.tab.KeyOf(VPC, &v, &k)
				_, _, _ = p.tab.Open(p.now, &k, &v, &NewFlow{To: Overlay, Source: Masquerade, Address: ipkt.Bytes(list[0]), Paired: n > 1})
			}
			b.ReportMetric(float64(threadTime()-start)/float64(b.N), "cpu-ns/op")
		})
	}
}
