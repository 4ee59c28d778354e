package policy

import (
	"net/netip"
	"testing"
)

func TestDecide(t *testing.T) {
	db := []netip.Prefix{netip.MustParsePrefix("10.0.0.10/32")}
	p := New(Reject, []Rule{
		{Action: Drop, From: []netip.Prefix{netip.MustParsePrefix("172.31.9.0/24")}},
		{Action: Accept, Proto: 6, To: db, Ports: []PortRange{{443, 443}, {8000, 8100}}},
		{Action: Accept, Proto: 1},
	})
	a, d := netip.MustParseAddr("172.31.0.10"), netip.MustParseAddr("10.0.0.10")
	for _, tt := range []struct {
		name  string
		proto uint8
		src   netip.Addr
		dst   netip.Addr
		port  uint16
		want  Action
		rule  int
	}{
		{"listed port", 6, a, d, 443, Accept, 1},
		{"end of range", 6, a, d, 8100, Accept, 1},
		{"other port", 6, a, d, 80, Reject, -1},
		{"other protocol", 17, a, d, 443, Reject, -1},
		{"other host", 6, a, a, 443, Reject, -1},
		{"ping", 1, a, d, 0, Accept, 2},
		{"ping6", 58, netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2"), 0, Accept, 2},
		{"dropped source", 6, netip.MustParseAddr("172.31.9.1"), d, 443, Drop, 0},
	} {
		got, rule := p.Match(&Flow{Proto: tt.proto, Src: tt.src, Dst: tt.dst, Port: tt.port})
		p.Count(rule)
		if got != tt.want || rule != tt.rule {
			t.Errorf("%s: %v by rule %d, want %v by %d", tt.name, got, rule, tt.want, tt.rule)
		}
	}
	if p.Hits(1) != 2 || p.Hits(-1) != 3 {
		t.Errorf("hits %d and %d, want 2 and 3", p.Hits(1), p.Hits(-1))
	}
}

func TestDirectionAndNetwork(t *testing.T) {
	p := New(Drop, []Rule{{Action: Accept, Direction: In, Network: 1}, {Action: Reject, Direction: Out}})
	for _, tt := range []struct {
		f    Flow
		want Action
	}{
		{Flow{Direction: In, Network: 1}, Accept},
		{Flow{Direction: In, Network: 2}, Drop},
		{Flow{Direction: Out, Network: 1}, Reject},
	} {
		if got, _ := p.Match(&tt.f); got != tt.want {
			t.Errorf("%+v: %v, want %v", tt.f, got, tt.want)
		}
	}
}
