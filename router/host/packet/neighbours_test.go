package packet

import (
	"net/netip"
	"testing"
)

func client(i int) addressKey {
	return keyOf(netip.AddrFrom4([4]byte{172, 31, byte(i >> 8), byte(i)}))
}

func TestNeighbours(t *testing.T) {
	const alice, mallory = 0x02aaaaaaaaaa, 0x02ffffffffff
	who := func(n *neighbours, now int64, i int) uint64 {
		mac, ok := n.lookup(now, client(i))
		if !ok {
			return 0
		}
		return mac
	}
	t.Run("the one who asked", func(t *testing.T) {
		n := newNeighbours()
		n.learn(1, client(1), alice)
		if who(n, 1, 1) != alice || who(n, 1, 2) != 0 {
			t.Error("not remembered")
		}
	})
	t.Run("silence", func(t *testing.T) {
		n := newNeighbours()
		n.learn(1, client(1), alice)
		if got := who(n, 1+neighbourLifetime, 1); got != 0 {
			t.Errorf("%x after a minute of silence", got)
		}
	})
	t.Run("moved", func(t *testing.T) {
		n := newNeighbours()
		n.learn(1, client(1), alice)
		n.learn(1+neighbourMoves, client(1), mallory)
		if got := who(n, 1+neighbourMoves, 1); got != mallory {
			t.Errorf("%x", got)
		}
	})
	// Somebody who sends in a client's name gets none of its answers.
	t.Run("two at a time", func(t *testing.T) {
		n := newNeighbours()
		now := int64(1)
		for ; now < 100; now++ {
			n.learn(now, client(1), alice)
			n.learn(now, client(1), mallory)
			if got := who(n, now, 1); got != 0 {
				t.Fatalf("answers go to %x", got)
			}
		}
		for end := now + neighbourDoubts; now < end; now++ {
			n.learn(now, client(1), alice)
		}
		if got := who(n, now, 1); got != alice {
			t.Errorf("%x when it is over", got)
		}
	})
	// Somebody who uses all addresses takes the places of his own, in the main.
	t.Run("flood", func(t *testing.T) {
		n := newNeighbours()
		const others = 1000
		for i := range others {
			n.learn(1, client(i), uint64(0x020000000000+i))
		}
		for i := others; i < 65536; i++ {
			n.learn(2, client(i), mallory)
		}
		left := 0
		for i := range others {
			if who(n, 2, i) == uint64(0x020000000000+i) {
				left++
			}
		}
		if left < others*95/100 {
			t.Errorf("%d of %d are left", left, others)
		}
	})
}
