package vl1

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

func TestSurface(t *testing.T) {
	ep := netip.MustParseAddrPort
	const lan, wan = packet.ScopePrivate, packet.ScopeGlobal
	s := surface{m: make(map[surfaceKey]surfaceEntry)}
	for _, tt := range []struct {
		name    string
		by      identity.Address
		addr    string
		after   time.Duration
		root    bool
		changed bool
	}{
		{"first report", 1, "192.0.2.1:1", 0, true, false},
		{"the same", 1, "192.0.2.1:1", 1, true, false},
		{"another port", 1, "192.0.2.1:2", 2, true, false},
		{"another address", 1, "192.0.2.2:2", 3, true, true},
		{"of another reporter", 2, "192.0.2.3:2", 3, true, false},
		{"another address, of no root", 2, "192.0.2.4:2", 4, false, false},
		{"another address, long after", 1, "192.0.2.5:2", surfaceLifetime + 3, true, false},
	} {
		e := surfaceEntry{ep(tt.addr), t0 + int64(tt.after), tt.root}
		if _, got := s.note(surfaceKey{reporter: tt.by, ep: ep("203.0.113.1:9993"), scope: wan}, e); got != tt.changed {
			t.Errorf("%s: changed %v", tt.name, got)
		}
	}
	if got := s.list(); !slices.Equal(got, []netip.AddrPort{ep("192.0.2.4:2"), ep("192.0.2.5:2")}) {
		t.Errorf("addresses %v", got)
	}
	s.note(surfaceKey{reporter: 3, ep: ep("10.0.0.1:1"), scope: lan}, surfaceEntry{addr: ep("10.0.0.2:1"), at: t0})
	s.forgetOthers(wan, ep("203.0.113.2:9993"))
	if got := s.list(); !slices.Equal(got, []netip.AddrPort{ep("10.0.0.2:1")}) {
		t.Errorf("after a change: %v", got)
	}
	if s.expire(t0 + int64(surfaceLifetime)); len(s.m) != 0 {
		t.Errorf("%d old reports", len(s.m))
	}
}

func TestSurfaceIsBounded(t *testing.T) {
	s := surface{m: make(map[surfaceKey]surfaceEntry)}
	fill := func(from identity.Address, n int, root bool) {
		for i := range n {
			s.note(surfaceKey{reporter: from + identity.Address(i)}, surfaceEntry{at: t0, root: root})
		}
	}
	roots := func() (n int) {
		for _, e := range s.m {
			if e.root {
				n++
			}
		}
		return n
	}
	fill(1000, 2*maxSurface, false)
	if len(s.m) != maxSurface {
		t.Errorf("%d reports, want %d", len(s.m), maxSurface)
	}
	fill(1, maxSurface/2, true)
	if len(s.m) != maxSurface || roots() != maxSurface/2 {
		t.Errorf("%d reports, %d of roots", len(s.m), roots())
	}
	fill(1, 2*maxSurface, true)
	if len(s.m) != maxSurface || roots() != maxSurface {
		t.Errorf("%d reports, %d of roots, want %d", len(s.m), roots(), maxSurface)
	}
}
