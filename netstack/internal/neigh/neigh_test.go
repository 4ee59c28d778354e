package neigh

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/pkttest"
)

var (
	own  = netip.MustParseAddr("10.0.0.1")
	peer = netip.MustParseAddr("10.0.0.10")
	mac  = MAC{2, 0, 0, 0, 0, 10}
	us   = MAC{2, 0, 0, 0, 0, 1}
)

// answer is the payload of an ARP answer of the peer.
func answer() []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 2}
	b = append(append(b, mac[:]...), peer.AsSlice()...)
	return append(append(b, 2, 0, 0, 0, 0, 1), own.AsSlice()...)
}

// TestRefresh: a used entry is asked for again, stays while it is answered for, and
// is forgotten within seconds when it isn't.
func TestRefresh(t *testing.T) {
	asked := 0
	tab := New(Config{MAC: us, Send: func(f []byte) {
		if binary.BigEndian.Uint16(f[20:]) == 1 {
			asked++
		}
	}}, []netip.Addr{own})
	now := int64(1)
	pass := func(d time.Duration) { now += int64(d) }
	known := func() bool { _, ok := tab.Lookup(now, peer); return ok }
	tab.Resolve(now, peer, []byte{0x45}, 0)
	if ready, _, _ := tab.HandleARP(now, mac, answer()); len(ready) != 1 || !known() {
		t.Fatalf("%d packets waited, known %v", len(ready), known())
	}
	asked = 0
	for range 10 { // answered each time
		pass(31 * time.Second)
		before := asked
		if !known() || asked != before+1 {
			t.Fatalf("after 31 s: known %v, asked %d times", known(), asked-before)
		}
		if known(); asked != before+1 {
			t.Errorf("asked again at once")
		}
		tab.HandleARP(now, mac, answer())
	}
	pass(31 * time.Second)
	for s := 0; known(); s++ {
		if s > maxTries {
			t.Fatalf("still known %d s after the first question, asked %d times", s, asked)
		}
		pass(time.Second)
		if failed, _ := tab.Tick(now); len(failed) > 0 {
			t.Errorf("%d packets failed, none waited", len(failed))
		}
	}
	if owner, ok := tab.Owner(peer); owner != mac || !ok || len(tab.waiting) != 0 {
		t.Errorf("the address is %v's (%v), %d questions left", owner, ok, len(tab.waiting))
	}
	if was, silent := tab.Silent(peer); !silent || was != mac {
		t.Errorf("silent %v, was %x", silent, was)
	}
	tab.Resolve(now, peer, []byte{0x45}, 0)
	for range maxTries + 1 { // asked in vain again
		pass(time.Second)
		tab.Tick(now)
	}
	if was, silent := tab.Silent(peer); !silent || was != mac {
		t.Errorf("silent %v, was %x", silent, was)
	}
	tab.Resolve(now, peer, []byte{0x45}, 0)
	if ready, _, _ := tab.HandleARP(now, mac, answer()); len(ready) != 1 || !known() {
		t.Error("a neighbour that is back isn't found")
	}
	if _, silent := tab.Silent(peer); silent {
		t.Error("a neighbour that is back is silent")
	}
	for i := range 2 * maxSilent {
		tab.Resolve(now, netip.AddrFrom4([4]byte{10, 0, 1 + byte(i>>8), byte(i)}), []byte{0x45}, 0)
		for range maxTries + 1 {
			pass(time.Second)
			tab.Tick(now)
		}
	}
	if len(tab.silent) != maxSilent {
		t.Errorf("%d silent addresses are kept", len(tab.silent))
	}
}

var (
	rival = MAC{2, 0, 0, 0, 0, 66}
	own6  = netip.MustParseAddr("fd77::1")
	peer6 = netip.MustParseAddr("fd77::10")
)

// bench is a table, what it sends and what it says of conflicts.
type bench struct {
	*Table
	t    *testing.T
	now  int64
	sent [][]byte
	told []Conflict
}

func newBench(t *testing.T, owns func(MAC, netip.Addr) bool) *bench {
	b := &bench{t: t, now: int64(time.Hour)}
	b.Table = New(Config{MAC: us, Owns: owns, Send: func(f []byte) { b.sent = append(b.sent, f) },
		Conflict: func(c Conflict) { b.told = append(b.told, c) }}, []netip.Addr{own, own6})
	return b
}

// says is what a MAC says of an address, to us or, unasked, to all.
func (b *bench) says(a netip.Addr, m MAC, toUs bool) Verdict {
	if a.Is4() {
		msg := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, m[:]...)
		target := a
		if toUs {
			target = own
		}
		msg = append(append(append(msg, a.AsSlice()...), us[:]...), target.AsSlice()...)
		_, _, v := b.HandleARP(b.now, m, msg)
		return v
	}
	v := b.view(pkttest.Packet{Type: advertisement, Src: netip.MustParseAddrPort("[fe80::1]:0"), Payload: append(append(a.AsSlice(), optTarget, 1), m[:]...)})
	_, _, verdict := b.HandleNDP(b.now, m, v)
	return verdict
}

func (b *bench) view(p pkttest.Packet) *ipkt.View {
	b.t.Helper()
	p.Proto, p.Dst = ipkt.ICMPv6, netip.AddrPortFrom(own6, 0)
	if p.TTL == 0 {
		p.TTL = 255
	}
	var v ipkt.View
	if r := ipkt.Parse(p.Bytes(), &v); r != ipkt.OK {
		b.t.Fatal(r)
	}
	return &v
}

func (b *bench) pass(d time.Duration) {
	for range d / (500 * time.Millisecond) {
		b.now += int64(500 * time.Millisecond)
		b.Tick(b.now)
	}
}

func (b *bench) owner(want MAC) {
	b.t.Helper()
	for _, a := range []netip.Addr{peer, peer6} {
		if got, ok := b.Owner(a); !ok || got != want {
			b.t.Errorf("%v is %v's (%v), want %v", a, got, ok, want)
		}
	}
}

// TestContest: a claim of another's address makes us ask its owner, and nobody else. It
// keeps the address by answering, by ARP or by sending anything; it loses it in 3 s of
// silence.
func TestContest(t *testing.T) {
	for _, a := range []netip.Addr{peer, peer6} {
		b := newBench(t, nil)
		b.Resolve(b.now, a, []byte{0x45}, 0)
		if v := b.says(a, mac, true); v != Fine {
			t.Fatalf("%v: verdict %d", a, v)
		}
		for round, defend := range []func(){func() { b.says(a, mac, true) }, func() { b.From(b.now, a, mac) }} {
			b.sent = nil
			if v := b.says(a, rival, round == 0); v != Refused {
				t.Errorf("%v: verdict %d of a claim", a, v)
			}
			b.pass(2 * time.Second)
			if len(b.sent) != 3 {
				t.Errorf("%v: %d questions in 2 s, want 3", a, len(b.sent))
			}
			for _, f := range b.sent {
				if MAC(f) != mac {
					t.Errorf("%v: asked %x, want the owner", a, f[:6])
				}
			}
			defend()
			b.sent = nil
			for range 4 { // asked a moment ago
				b.says(a, rival, true)
				b.pass(time.Second)
			}
			if got, _ := b.Owner(a); got != mac || len(b.sent) != 0 {
				t.Errorf("%v: it is %v's, %d more questions", a, got, len(b.sent))
			}
			b.pass(2 * time.Second)
		}
		b.Resolve(b.now, a, []byte{0x45}, 0)
		b.says(a, rival, true)
		b.pass(3*time.Second + 500*time.Millisecond)
		if got, ok := b.Lookup(b.now, a); !ok || got != rival {
			t.Errorf("%v: it is %v's (%v) after silence", a, got, ok)
		}
		if last := b.told[len(b.told)-1]; last != (Conflict{a, mac, rival, true}) {
			t.Errorf("%v: told %+v", a, last)
		}
		if len(b.contests) != 0 || len(b.waiting) != 0 {
			t.Errorf("%v: %d contests and %d questions left", a, len(b.contests), len(b.waiting))
		}
	}
}

// TestCertificates decide at once, and outlast silence.
func TestCertificates(t *testing.T) {
	b := newBench(t, func(m MAC, _ netip.Addr) bool { return m == mac })
	for _, a := range []netip.Addr{peer, peer6} {
		b.says(a, rival, true)
		b.Resolve(b.now, a, []byte{0x45}, 0)
		b.says(a, rival, true)
	}
	b.From(b.now, peer6, mac) // by a packet
	b.says(peer, mac, false)
	b.owner(mac)
	for range 30 {
		for _, a := range []netip.Addr{peer, peer6} {
			b.Resolve(b.now, a, []byte{0x45}, 0)
			b.says(a, rival, true)
		}
		b.pass(time.Second)
	}
	b.owner(mac)
}

// TestFirstUse: a packet binds its source address until somebody answers for it, or for
// good if it is the only one.
func TestFirstUse(t *testing.T) {
	b := newBench(t, nil)
	for _, a := range []netip.Addr{peer, peer6} {
		if v := b.From(b.now, a, mac); v != Fine {
			t.Errorf("%v: verdict %d of the first packet", a, v)
		}
		if _, ok := b.Lookup(b.now, a); ok {
			t.Errorf("%v: a packet is no answer", a)
		}
		if v := b.From(b.now, a, rival); v != Refused {
			t.Errorf("%v: verdict %d of another's packet", a, v)
		}
	}
	b.owner(mac)
	b.says(peer, mac, true)
	b.says(peer6, mac, true)
	if _, ok := b.Lookup(b.now, peer); !ok {
		t.Error("the answer of the first is not taken")
	}
	b.pass(3 * time.Minute) // silent, but nobody asks
	b.owner(mac)
	if v := b.says(peer, rival, false); v != Refused {
		t.Errorf("verdict %d of a claim of an address that was idle", v)
	}
}

// TestRouter: what comes for others must come from the router, who is asked for.
func TestRouter(t *testing.T) {
	b := newBench(t, nil)
	if v := b.Through(b.now, peer, mac); v != Fine || len(b.sent) != 1 {
		t.Errorf("verdict %d, %d questions before the router is known", v, len(b.sent))
	}
	b.says(peer, mac, true)
	b.sent = nil
	for range 100 {
		if v := b.Through(b.now, peer, rival); v != Refused {
			t.Fatalf("verdict %d of what another sends on", v)
		}
	}
	if v := b.Through(b.now, peer, mac); v != Fine || len(b.sent) != 1 {
		t.Errorf("verdict %d, %d questions for 100 packets of another", v, len(b.sent))
	}
}

// TestLies: messages that say another MAC than their frame, or that passed a router, are
// nothing; nor are claims of our own addresses.
func TestLies(t *testing.T) {
	b := newBench(t, nil)
	b.SetProxy([]netip.Prefix{netip.MustParsePrefix("10.0.0.32/28")})
	if _, _, v := b.HandleARP(b.now, rival, answer()); v != Invalid {
		t.Errorf("ARP with another MAC: verdict %d", v)
	}
	option := func(m MAC) []byte { return append(append(peer6.AsSlice(), optTarget, 1), m[:]...) }
	for what, p := range map[string]pkttest.Packet{
		"another MAC":  {Type: advertisement, Src: netip.AddrPortFrom(peer6, 0), Payload: option(mac)},
		"by a router":  {Type: advertisement, Src: netip.AddrPortFrom(peer6, 0), Payload: option(rival), TTL: 254},
		"code":         {Type: advertisement, Code: 1, Src: netip.AddrPortFrom(peer6, 0), Payload: option(rival)},
		"bad checksum": {Type: advertisement, Src: netip.AddrPortFrom(peer6, 0), Payload: option(rival), BadChecksum: true},
		"solicitation": {Type: solicitation, Src: netip.AddrPortFrom(peer6, 0), Payload: append(append(own6.AsSlice(), optSource, 1), mac[:]...)},
	} {
		b.Resolve(b.now, peer6, []byte{0x60}, 0)
		if _, _, v := b.HandleNDP(b.now, rival, b.view(p)); v != Invalid {
			t.Errorf("%s: verdict %d", what, v)
		}
	}
	for _, a := range []netip.Addr{own, own6, netip.MustParseAddr("10.0.0.40")} {
		if v := b.says(a, rival, true); v != Refused {
			t.Errorf("claim of %v, which is ours: verdict %d", a, v)
		}
	}
	if b.Len() != 0 {
		t.Errorf("%d addresses are bound", b.Len())
	}
	// A unicast answer may leave its MAC out.
	if _, _, v := b.HandleNDP(b.now, mac, b.view(pkttest.Packet{Type: advertisement, Src: netip.AddrPortFrom(peer6, 0), Payload: peer6.AsSlice()})); v != Fine {
		t.Errorf("answer without MAC: verdict %d", v)
	}
	if got, _ := b.Lookup(b.now, peer6); got != mac {
		t.Errorf("answer without MAC: it is %v's", got)
	}
}

// TestShares: what one MAC claims leaves room for others.
func TestShares(t *testing.T) {
	b := newBench(t, nil)
	addr := func(net, i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(net), byte(i >> 8), byte(i)}) }
	for i := range 1000 {
		b.says(addr(1, i), rival, true)
		b.From(b.now, addr(2, i), rival)
	}
	if n := b.Len(); n != maxUninvited {
		t.Errorf("%d addresses are bound to one, want %d", n, maxUninvited)
	}
	for i := range maxUninvited / 2 {
		b.says(addr(3, i), mac, true)
	}
	for i := range maxUninvited / 2 {
		b.says(addr(3, i), rival, true)
	}
	if n := len(b.contests); n != maxRivals {
		t.Errorf("%d addresses are contested by one, want %d", n, maxRivals)
	}
	other := MAC{2, 0, 0, 0, 0, 67}
	if b.says(addr(3, maxRivals), other, true); b.contests[addr(3, maxRivals)] == nil {
		t.Error("another can't contest an address")
	}
	for i := range 3 * maxEntries { // by many
		b.says(addr(4+i>>16, i), MAC{2, 1, 0, byte(i >> 16), byte(i >> 8), byte(i)}, true)
	}
	if n := b.Len(); n != maxEntries {
		t.Errorf("%d addresses are bound, want %d", n, maxEntries)
	}
	b.pass(3 * time.Minute)
	b.Resolve(b.now, peer, []byte{0x45}, 0)
	if b.says(peer, mac, true); b.Len() > 1 {
		t.Errorf("%d addresses are bound after those that don't answer made room", b.Len())
	}
	for _, guests := range b.guests {
		t.Errorf("%d uninvited addresses left", guests)
	}
}

// TestWaitingIsBounded: packets that wait for addresses which nobody has are few, and others
// still get a place when these are given up.
func TestWaitingIsBounded(t *testing.T) {
	b := newBench(t, nil)
	kept := 0
	for i := range 10 * maxPending {
		if b.Resolve(b.now, netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), []byte{0x45}, 0) {
			kept++
		}
	}
	if kept != maxPending || len(b.waiting) != maxPending {
		t.Errorf("%d addresses are waited for, want %d", kept, maxPending)
	}
	b.pass((maxTries + 1) * time.Second)
	kept = 0
	for range 10 * maxQueued {
		if b.Resolve(b.now, peer, []byte{0x45}, 0) {
			kept++
		}
	}
	if kept != maxQueued {
		t.Errorf("%d packets wait for one address, want %d", kept, maxQueued)
	}
	if ready, _, _ := b.HandleARP(b.now, mac, answer()); len(ready) != maxQueued {
		t.Errorf("%d of them are sent", len(ready))
	}
}
