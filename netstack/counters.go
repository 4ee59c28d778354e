package netstack

import (
	"sync/atomic"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

const numSides = nat.NumSides

var sideNames = [numSides]string{"vpc", "overlay"}

// Directions, seen from the process.
const (
	rx = iota
	tx
	numDirections
)

var directionNames = [numDirections]string{"rx", "tx"}

const (
	pathVPCToOverlay = iota
	pathOverlayToVPC
	pathLocal    // for the gateway itself
	pathVPCToVPC // hairpin
	numPaths
)

var pathNames = [numPaths]string{"vpc_to_overlay", "overlay_to_vpc", "local", "vpc_to_vpc"}

// A class says how a packet is counted: path, family and protocol in one number.
const (
	classProto = 1<<2 - 1
	classV6    = 1 << 2
	classShift = 3 // of the path
	numClasses = numPaths << classShift
	noClass    = 0xff // not at all
)

func makeClass(path int, v6 bool, proto int) uint8 {
	c := uint8(path)<<classShift | uint8(proto)
	if v6 {
		c |= classV6
	}
	return c
}

// classOf returns the class of a packet that is forwarded.
func classOf(from, to Side, v *ipkt.View) uint8 {
	path := pathVPCToVPC
	switch {
	case from == OverlaySide:
		path = pathOverlayToVPC
	case to == OverlaySide:
		path = pathVPCToOverlay
	}
	return makeClass(path, v.V6, nat.ClassOf(v.Proto))
}

// traffic counts packets and bytes. Each has a cache line of its own, since
// workers of both directions count at the same time.
type traffic struct {
	packets, bytes atomic.Uint64
	_              [48]byte
}

func (t *traffic) add(packets, bytes uint64) {
	t.packets.Add(packets)
	t.bytes.Add(bytes)
}

// pathCounters count what a network carried.
type pathCounters struct{ t [numClasses]traffic }

func (f *pathCounters) countClass(class uint8, packets, bytes uint64) {
	if class != noClass {
		f.t[class].add(packets, bytes)
	}
}

// local returns how many packets were for the gateway itself.
func (f *pathCounters) local() (n uint64) {
	for i := pathLocal << classShift; i < (pathLocal+1)<<classShift; i++ {
		n += f.t[i].packets.Load()
	}
	return n
}

// tally adds up a batch before it is counted. Packets of a class mostly come in a
// row.
type tally struct {
	to             *pathCounters
	class          uint8
	packets, bytes uint64
	used           [numClasses]struct{ packets, bytes uint64 }
}

func (t *tally) add(class uint8, bytes uint64) {
	if class != t.class {
		t.turn(class)
	}
	t.packets++
	t.bytes += bytes
}

// turn begins another row.
func (t *tally) turn(class uint8) {
	if t.class != noClass {
		u := &t.used[t.class]
		u.packets += t.packets
		u.bytes += t.bytes
	}
	t.class, t.packets, t.bytes = class, 0, 0
}

func (t *tally) flush() {
	t.turn(noClass)
	for class := range t.used {
		if u := &t.used[class]; u.packets > 0 {
			t.to.t[class].add(u.packets, u.bytes)
		}
	}
}

var batchBounds = [...]int{1, 2, 4, 8, 16, 32, 64, 128}

// histogram counts batch sizes.
type histogram struct {
	buckets [len(batchBounds)]atomic.Uint64
	count   atomic.Uint64
	sum     atomic.Uint64
}

func (h *histogram) observe(n int) {
	if n == 0 {
		return
	}
	h.count.Add(1)
	h.sum.Add(uint64(n))
	for i, b := range batchBounds {
		if n <= b {
			h.buckets[i].Add(1)
			return
		}
	}
}

type counters struct {
	traffic      [numSides][numDirections]traffic
	vpc          pathCounters // what belongs to no network: packets from the VPC to ourselves or back into it
	drops        [numSides][numDrops]atomic.Uint64
	hits, misses atomic.Uint64
	clamped      [numSides]atomic.Uint64
	resets       [numSides]atomic.Uint64 // RSTs sent
	errors       [numSides][ipkt.NumErrorKinds]atomic.Uint64
	deviceErrors atomic.Uint64
	batches      [numSides]histogram
}

// drop is the only place where packets end: nothing vanishes uncounted.
func (e *Engine) drop(side Side, d drop) { e.stats.drops[side][d].Add(1) }

func (e *Engine) dropN(side Side, d drop, n int) {
	if n > 0 {
		e.stats.drops[side][d].Add(uint64(n))
	}
}
