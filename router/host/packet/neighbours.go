package packet

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
)

const (
	neighbourSets = 2048
	neighbourWays = 8 // of a set

	// A neighbour that was silent for so long is looked for by the kernel, in s.
	neighbourLifetime = 60
	// Another MAC takes an address over when the one before has been silent for so long,
	// in s. Until then, and some time longer, who has it is for the kernel to say.
	neighbourMoves  = 3
	neighbourDoubts = 30
)

// neighbours remembers which MAC hosts of the VPC send from, so that answers go back by
// the way that questions come. It holds 16,384 addresses; packets to others take a slower
// way (see [Device.Write]), so that nobody is cut off by somebody who fills it. One
// goroutine learns, any may look up.
type neighbours struct {
	seed uint64
	sets [neighbourSets][neighbourWays]atomic.Pointer[neighbour]
	last *neighbour // that was learned
}

type neighbour struct {
	key     addressKey
	mac     uint64       // in its lower 48 bits
	seen    atomic.Int64 // s
	doubted atomic.Int64 // until then
}

// addressKey is an address; one of IPv4 is mapped into IPv6.
type addressKey struct{ hi, lo uint64 }

func keyOf(a netip.Addr) addressKey {
	b := a.As16()
	return key16(b[:])
}

func key4(b []byte) addressKey {
	return addressKey{0, 0xffff<<32 | uint64(binary.BigEndian.Uint32(b))}
}

func key16(b []byte) addressKey {
	return addressKey{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func newNeighbours() *neighbours { return &neighbours{seed: rand.Uint64()} }

func (t *neighbours) set(k addressKey) *[neighbourWays]atomic.Pointer[neighbour] {
	const odd = 0x9e3779b97f4a7c15
	h := (k.hi ^ t.seed) * odd
	h = (h ^ h>>32 ^ k.lo) * odd
	return &t.sets[h>>32%neighbourSets]
}

// learn notes that a host sends from a MAC now.
func (t *neighbours) learn(now int64, k addressKey, mac uint64) {
	if n := t.last; n != nil && n.key == k && n.mac == mac {
		if n.seen.Load() != now {
			n.seen.Store(now)
		}
		return
	}
	set := t.set(k)
	place := -1
	for i := range set {
		switch n := set[i].Load(); {
		case n == nil:
			if place < 0 {
				place = i
			}
		case n.key != k:
		case n.mac == mac:
			n.seen.Store(now)
			t.last = n
			return
		case now-n.seen.Load() < neighbourMoves:
			n.doubted.Store(now + neighbourDoubts)
			return
		default:
			place = i
			t.put(set, place, now, k, mac)
			return
		}
	}
	if place < 0 {
		place = victim(set, mac)
	}
	t.put(set, place, now, k, mac)
}

func (t *neighbours) put(set *[neighbourWays]atomic.Pointer[neighbour], i int, now int64, k addressKey, mac uint64) {
	n := &neighbour{key: k, mac: mac}
	n.seen.Store(now)
	set[i].Store(n)
	t.last = n
}

// victim returns who makes room for an address of mac in a full set: the oldest of the
// MAC that has most there with it.
func victim(set *[neighbourWays]atomic.Pointer[neighbour], mac uint64) (out int) {
	most, oldest := 0, int64(0)
	for i := range set {
		n, count := set[i].Load(), 0
		if n.mac == mac {
			count = 1 // the new one
		}
		for j := range set {
			if set[j].Load().mac == n.mac {
				count++
			}
		}
		if seen := n.seen.Load(); count > most || count == most && seen < oldest {
			out, most, oldest = i, count, seen
		}
	}
	return out
}

// lookup returns the MAC of a host, false if that isn't known for sure.
func (t *neighbours) lookup(now int64, k addressKey) (mac uint64, ok bool) {
	set := t.set(k)
	for i := range set {
		if n := set[i].Load(); n != nil && n.key == k {
			return n.mac, now-n.seen.Load() < neighbourLifetime && n.doubted.Load() <= now
		}
	}
	return 0, false
}
