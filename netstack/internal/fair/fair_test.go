package fair

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
)

type holder struct {
	addr netip.Addr
	at   int
	s    Share[holder]
}

var hash = Hash{0x243f6a8885a308d3, 0x13198a2e03707344}

func (h *Hash) holder(origin uint64, a netip.Addr) *holder {
	b := a.As16()
	x := &holder{addr: a}
	x.s = Share[holder]{Of: x, At: h.Place(origin, &b)}
	return x
}

func older(a, b *holder) bool { return a.at < b.at }

func v4(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// TestGreediest takes from floods of many kinds what a few others don't lose.
func TestGreediest(t *testing.T) {
	const flood = 20000
	for name, tt := range map[string]struct {
		origin uint64
		addr   func(i int) netip.Addr
	}{
		"one address": {0, func(int) netip.Addr { return v4(0xac1f0001) }},
		"a /24":       {0, func(i int) netip.Addr { return v4(0xac1f0100 + uint32(i)%256) }},
		"a /16":       {0, func(i int) netip.Addr { return v4(0xac1e0000 + uint32(i)) }},
		"a /48": {0, func(i int) netip.Addr {
			return netip.AddrFrom16([16]byte{0xfd, 1, 0, 0, 0, 0, byte(i >> 8), byte(i), 15: 1})
		}},
		"a member's":     {77, func(i int) netip.Addr { return v4(0x0a000000 + uint32(i)*999) }},
		"of a member /8": {78, func(i int) netip.Addr { return v4(0x0b000000 + uint32(i)*777) }},
	} {
		var tree Tree[holder]
		var victims []*holder
		mine := map[*holder]bool{}
		one := map[netip.Addr]*holder{}
		add := func(i int) {
			a := tt.addr(i)
			h := one[a]
			if h == nil {
				h = hash.holder(tt.origin, a)
				h.at = i
				one[a] = h
			}
			tree.Add(&h.s, 1)
		}
		for i := range flood {
			add(i)
			if i%500 == 0 {
				h := hash.holder(0, v4(0xac10_0a00+uint32(i)))
				h.at = i
				victims = append(victims, h)
				mine[h] = true
				tree.Add(&h.s, 1)
			}
		}
		for i := range flood / 2 { // each new one takes the place of another
			h := tree.Greediest(older)
			if mine[h] {
				t.Fatalf("%s: %v lost its only one after %d", name, h.addr, i)
			}
			tree.Add(&h.s, -1)
			add(i)
		}
		for _, h := range victims {
			tree.Add(&h.s, -1)
		}
		for _, h := range one {
			tree.Add(&h.s, -h.s.Count())
		}
		if tree.n != 0 || tree.Greediest(older) != nil {
			t.Errorf("%s: %d left", name, tree.n)
		}
	}
}

// TestOldest: among many that have one each, all of one network, who came first gives
// first.
func TestOldest(t *testing.T) {
	var tree Tree[holder]
	var all []*holder
	for i := range 250 {
		h := hash.holder(0, v4(0xac1f0100+uint32(i)))
		all = append(all, h)
		tree.Add(&h.s, 1)
	}
	for i, want := range all {
		h := tree.Greediest(older)
		if h != want {
			t.Fatalf("%d: %v, want %v", i, h.addr, want.addr)
		}
		tree.Add(&h.s, -1)
	}
}

// TestRandom keeps the sums right whatever comes.
func TestRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	var tree Tree[holder]
	var all []*holder
	for range 3000 {
		all = append(all, hash.holder(uint64(rng.IntN(20)), v4(rng.Uint32())))
	}
	for range 200000 {
		h := all[rng.IntN(len(all))]
		tree.Add(&h.s, rng.IntN(100)-min(h.s.Count(), 50))
	}
	sum, listed := 0, 0
	for _, h := range all {
		sum += h.s.Count()
	}
	narrow := 0
	for p := range origins * fanout * fanout {
		b := tree.below[p/fanout]
		if b == nil || b.nodes[p%fanout] == nil {
			continue
		}
		d := b.nodes[p%fanout]
		here := 0
		for i := range d.lists {
			for s := d.lists[i].first; s != nil; s = s.next {
				if s.n>>i != 1 {
					t.Fatalf("%d in list %d", s.n, i)
				}
				here += s.Count()
				listed++
			}
			if (d.lists[i].first != nil) != (d.some>>i&1 == 1) {
				t.Fatalf("list %d of %d is marked wrongly", i, p)
			}
		}
		if n := int(b.narrow.n[p%fanout]); here != n {
			t.Fatalf("place %d has %d, counted %d", p, here, n)
		}
		narrow += here
	}
	if sum != tree.n || narrow != sum {
		t.Fatalf("%d in all, %d in lists, counted %d", sum, narrow, tree.n)
	}
}
