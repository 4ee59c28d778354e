package network_test

import (
	"net/netip"
	"testing"

	"ztgate/zerotier/vl2"
)

// TestOwns: an address is proven by the controller's certificate, which members show to
// each other, until it is out of date, or by the member's address in it.
func TestOwns(t *testing.T) {
	b := newBoard(t, 3)
	n := b.create(nil)
	x, y, z := b.order[1], b.order[2], b.order[3]
	b.join(n, x, y, z)
	ip := y.ip4(t, n)
	owns := func(s *seat, a netip.Addr) bool { return x.layer.Owns(n, s.mac(n), a) }
	b.talk(n, x, y)
	b.talk(n, x, z)
	for what, tt := range map[string]struct {
		got, want bool
	}{
		"its own":               {owns(y, ip), true},
		"another's":             {owns(z, ip), false},
		"not assigned":          {owns(y, netip.MustParseAddr("10.9.255.251")), false},
		"a MAC behind a bridge": {x.layer.Owns(n, vl2.MAC{0x52, 1, 2, 3, 4, 5}, ip), false},
		"another network":       {x.layer.Owns(n+1, y.mac(n), ip), false},
		"made of its address":   {owns(y, vl2.RFC4193(n, y.address()).Addr()), true},
		"made of another's":     {owns(z, vl2.RFC4193(n, y.address()).Addr()), false},
		"6PLANE":                {owns(y, vl2.SixPlane(n, y.address()).Addr()), true},
		"6PLANE, a container":   {owns(y, vl2.SixPlane(n, y.address()).Addr().Next()), true},
		"6PLANE of another":     {owns(z, vl2.SixPlane(n, y.address()).Addr().Next()), false},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %v, want %v", what, tt.got, tt.want)
		}
	}
}
