package vl1

import (
	"math/rand/v2"
	"sync/atomic"

	"ztgate/zerotier/packet"
)

// repeats remembers the IDs of the latest packets of all peers, so that one that was
// captured is not taken again. Each place of the table holds two, the latest of those that
// fall there by chance: of the last 10,000 packets 19 in 20 are known, of the last 1,000
// all but one in 2,000. A new packet is taken for a repeat once in a billion.
type repeats struct {
	key    uint64 // odd
	places []atomic.Uint64
}

const (
	repeatBits = 15
	repeatSize = 1 << repeatBits // 256 KiB, which stay near the processor
)

func newRepeats() repeats {
	return repeats{key: rand.Uint64() | 1, places: make([]atomic.Uint64, repeatSize)}
}

// place returns where a packet belongs, and its mark.
func (r *repeats) place(id packet.ID) (*atomic.Uint64, uint32) {
	// IDs that count up, as most do, are spread whatever the key is: times a number alone
	// they would lie in rows.
	h := uint64(id)
	h = (h ^ h>>32) * r.key
	h = (h ^ h>>29) * 0xbf58476d1ce4e5b9
	h ^= h >> 32
	h *= 0x94d049bb133111eb
	return &r.places[h>>(64-repeatBits)], uint32(h>>(32-repeatBits)) | 1 // 0 is for nothing
}

// trace is where a packet is remembered, and what was there.
type trace struct {
	place *atomic.Uint64
	there uint64
	mark  uint32
}

// look finds the trace of a packet that may be forged. Between this and seen there is
// time to get it from memory.
func (r *repeats) look(id packet.ID) trace {
	place, mark := r.place(id)
	return trace{place, place.Load(), mark}
}

// seen notes an authentic packet, and reports whether it was seen before.
func (t trace) seen() bool {
	for {
		if uint32(t.there) == t.mark || uint32(t.there>>32) == t.mark {
			return true
		}
		if t.place.CompareAndSwap(t.there, t.there<<32|uint64(t.mark)) {
			return false
		}
		t.there = t.place.Load()
	}
}
