package neigh

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"
)

var (
	own  = netip.MustParseAddr("10.0.0.1")
	peer = netip.MustParseAddr("10.0.0.10")
	mac  = MAC{2, 0, 0, 0, 0, 10}
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
	tab := New(MAC{2, 0, 0, 0, 0, 1}, []netip.Addr{own}, func(f []byte) {
		if binary.BigEndian.Uint16(f[20:]) == 1 {
			asked++
		}
	})
	now := int64(1)
	pass := func(d time.Duration) { now += int64(d) }
	known := func() bool { _, ok := tab.Lookup(now, peer); return ok }
	tab.Resolve(now, peer, []byte{0x45}, 0)
	if ready, _ := tab.HandleARP(now, answer()); len(ready) != 1 || !known() {
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
		tab.HandleARP(now, answer())
	}
	pass(31 * time.Second)
	for s := 0; known(); s++ {
		if s > maxTries {
			t.Fatalf("still known %d s after the first question, asked %d times", s, asked)
		}
		pass(time.Second)
		if failed := tab.Tick(now); len(failed) > 0 {
			t.Errorf("%d packets failed, none waited", len(failed))
		}
	}
	if tab.Len() != 0 || len(tab.waiting) != 0 {
		t.Errorf("%d entries and %d questions left", tab.Len(), len(tab.waiting))
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
	if ready, _ := tab.HandleARP(now, answer()); len(ready) != 1 || !known() {
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
