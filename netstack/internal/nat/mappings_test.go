package nat

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

// TestMappingsAll: as many mappings as there are, wherever their ports are.
func TestMappingsAll(t *testing.T) {
	p := newPlayer(t, Settings{})
	want := map[netip.AddrPort]bool{}
	for i := range 1500 {
		client := fmt.Sprintf("172.31.0.%d:%d", 10+i%100, 4000+i/100*700+i%100)
		p.out(client)
		want[pkttest.Addr(client)] = true
	}
	list := p.tab.Mappings()
	for _, m := range list {
		delete(want, m.Client)
	}
	if len(list) != 1500 || len(want) > 0 {
		t.Errorf("%d mappings are listed of 1500, and %d clients have none", len(list), len(want))
	}
}

// TestImport: mappings of an earlier table belong to their owners, whoever comes
// first.
func TestImport(t *testing.T) {
	old := newPlayer(t, Settings{})
	old.want("V1", VPC, pkttest.UDP(v1, o1, "x"), "udp 10.0.0.1:4000 > 10.0.0.10:80")
	replaced := old.out(v2)
	kept := old.tab.Mappings()
	want := []Mapping{
		{Proto: ipkt.UDP, Client: pkttest.Addr(v1), External: netip.MustParseAddrPort("10.0.0.1:4000")},
		{Proto: ipkt.UDP, Client: pkttest.Addr(v2), External: netip.MustParseAddrPort(replaced)},
	}
	slices.SortFunc(kept, func(a, b Mapping) int { return a.Client.Compare(b.Client) })
	if !slices.Equal(kept, want) {
		t.Fatalf("exported %v, want %v", kept, want)
	}

	p := newPlayer(t, Settings{})
	if n := p.tab.Import(p.now, append(kept, kept...)); n != 2 {
		t.Errorf("took %d mappings, want 2", n)
	}
	p.check()
	if got := p.out("172.31.0.12:4000"); got == "10.0.0.1:4000" || got == replaced {
		t.Errorf("a stranger got %s", got)
	}
	if got := p.out(v2); got != replaced {
		t.Errorf("V2 has %s, want %s", got, replaced)
	}
	if got := p.out(v1); got != "10.0.0.1:4000" {
		t.Errorf("V1 has %s", got)
	}
	p.check()

	p = newPlayer(t, Settings{})
	p.tab.Import(p.now, kept)
	p.sleep(3 * time.Minute)
	if got := p.out("172.31.0.12:4000"); got != "10.0.0.1:4000" {
		t.Errorf("after the rest the port is still kept: %s", got)
	}

	p = newPlayer(t, Settings{})
	p.tab.Import(p.now, kept)
	p.tab.Reserve(ipkt.UDP, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:4000")})
	if got := p.out(v1); got == "10.0.0.1:4000" {
		t.Error("V1 got a port that is forwarded now")
	}
	p.check()
}

// out opens a UDP flow of a client and returns its external endpoint.
func (p *player) out(client string) (ext string) {
	p.t.Helper()
	got, why := p.send(VPC, pkttest.UDP(client, o1, "x"))
	if _, err := fmt.Sscanf(got, "udp %s >", &ext); err != nil {
		p.t.Fatalf("%s: %q (%d)", client, got, why)
	}
	return ext
}

func TestImportRefuses(t *testing.T) {
	p := newPlayer(t, Settings{MaxFlows: 1000})
	m := func(proto uint8, client, ext string) Mapping {
		return Mapping{Proto: proto, Client: netip.MustParseAddrPort(client), External: netip.MustParseAddrPort(ext)}
	}
	if n := p.tab.Import(p.now, []Mapping{
		{},
		{Proto: ipkt.TCP, Client: pkttest.Addr(v1)},
		m(ipkt.TCP, v1, "10.0.0.1:0"),
		m(ipkt.TCP, v1, "10.0.0.1:61500"),
		m(ipkt.TCP, v1, "10.0.0.1:80"),
		m(ipkt.TCP, v1, "[fd00::1]:4000"),
		m(ipkt.TCP, "[::ffff:172.31.0.10]:4000", "[fd00::1]:4000"),
		m(ipkt.ICMPv6, v1, "10.0.0.1:4000"),
		m(47, v1, "10.0.0.1:4000"),
	}); n != 0 {
		t.Errorf("took %d wrong mappings", n)
	}
	var many []Mapping
	for i := range 500 {
		many = append(many, m(ipkt.TCP, v1, fmt.Sprintf("10.0.%d.%d:4000", i/200, 1+i%200)))
	}
	if n := p.tab.Import(p.now, many); n != maxImportedPools {
		t.Errorf("made %d pools, want %d", n, maxImportedPools)
	}
	many = many[:0]
	for i := range 2000 {
		many = append(many, m(ipkt.TCP, fmt.Sprintf("172.31.0.20:%d", 2000+i), fmt.Sprintf("10.0.0.1:%d", 5000+i)))
	}
	if n := p.tab.Import(p.now, many); n != 1000 {
		t.Errorf("took %d mappings, want as many as flows", n)
	}
	p.check()
}
