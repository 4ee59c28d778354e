package nat

import (
	"encoding/binary"
	"math/bits"

	"ztgate/netstack/internal/ipkt"
)

// The fast path of packets that [ipkt.Plain4] or [ipkt.Plain6] accept and whose flow
// is established: what Find, Track and Rewrite do, in few steps and on whole words.
// It is left before anything has changed when a packet needs more than that. Hash, Begin and
// Touch are called for all packets of a batch, one after the other, then Match: so
// a batch waits for memory once and not once per packet.

var le = binary.LittleEndian

// Hash4 returns the hash of the tuple of a plain packet from a side.
func (t *Table) Hash4(side Side, h *ipkt.Head4) uint32 {
	x := mix(mapped(le.Uint32(h[12:]))^t.seed[0], mapped(le.Uint32(h[16:]))^t.seed[1])
	return t.sumPorts(x, uint64(binary.BigEndian.Uint32(h[20:]))<<16|uint64(h[9])<<8|uint64(side))
}

// Hash6 is Hash4 for IPv6.
func (t *Table) Hash6(side Side, h *ipkt.Head6) uint32 {
	x := mix(le.Uint64(h[16:])^t.seed[0], le.Uint64(h[32:])^t.seed[1]) ^ mix(le.Uint64(h[8:])^t.seed[2], le.Uint64(h[24:])^t.seed[3])
	return t.sumPorts(x, uint64(binary.BigEndian.Uint32(h[40:]))<<16|uint64(h[6])<<8|uint64(side))
}

// mapped returns the last eight bytes of an IPv4 address in the mapped form.
func mapped(a uint32) uint64 { return uint64(a)<<32 | 0xffff<<16 }

// Ref is where a lookup begins; 0 if there is nothing.
type Ref uint32

// Begin loads where the lookup of a hash begins.
func (t *Table) Begin(hash uint32) Ref { return Ref(t.bucket(hash).Load()) }

// Touch loads what a lookup needs next. Its result is of no use but must be used.
func (t *Table) Touch(ref Ref, v6 bool) uint32 {
	f := t.flow(uint32(ref) >> 1)
	x := f.state.Load() ^ f.dir[0].end.Load()
	if v6 {
		x ^= uint32(f.hi[0][0])
	}
	return x
}

// Match4 returns the flow of a plain packet and the packet's direction, nil if it
// isn't among those that begin at ref. It may have ended.
func (t *Table) Match4(ref Ref, side Side, h *ipkt.Head4) (*Flow, int) {
	addrs, ports, kind := le.Uint64(h[12:]), le.Uint32(h[20:]), kindOf(h[9], side, false)
	for ref != 0 {
		f, dir := t.flow(uint32(ref)>>1), int(ref&1)
		if w := &f.tuples[dir]; w.addrs == addrs && w.ports == ports && w.kind == kind {
			return f, dir
		}
		ref = Ref(f.next[dir].Load())
	}
	return nil, 0
}

// Match6 is Match4 for IPv6.
func (t *Table) Match6(ref Ref, side Side, h *ipkt.Head6) (*Flow, int) {
	addrs := uint64(le.Uint32(h[20:])) | uint64(le.Uint32(h[36:]))<<32
	ports, kind := le.Uint32(h[40:]), kindOf(h[6], side, true)
	for ref != 0 {
		f, dir := t.flow(uint32(ref)>>1), int(ref&1)
		if w := &f.tuples[dir]; w.addrs == addrs && w.ports == ports && w.kind == kind && f.hi[2*dir] == [12]byte(h[8:20]) && f.hi[2*dir+1] == [12]byte(h[24:36]) {
			return f, dir
		}
		ref = Ref(f.next[dir].Load())
	}
	return nil, 0
}

// PassUDP notes a plain packet of a flow and reports whether it may go on. If not,
// nothing is noted, and only Find and Track know why. now is [Coarse].
func (t *Table) PassUDP(now uint32, f *Flow, dir int) bool {
	state := f.state.Load()
	// Before the flow is established, only a client that goes on asking and a server that
	// goes on answering change nothing: the states follow each other as the directions do.
	if state != stateEstablished && (state != stateNew+uint32(dir) || f.flags&flagFiltered != 0) {
		return false
	}
	if idle := int32(now - f.last.Load()); idle > 0 {
		if idle > int32(t.idle[ClassUDP][state]) {
			return false
		}
		f.last.Store(now)
	}
	return true
}

// PassTCP is PassUDP for a segment.
func (t *Table) PassTCP(now uint32, f *Flow, dir int, segment []byte) bool {
	h := (*[20]byte)(segment)
	if f.state.Load()&stateMask != stateEstablished || h[13]&(tcpSYN|tcpRST|tcpFIN) != 0 || !validFlags[h[13]&0x3f] {
		return false
	}
	idle := int32(now - f.last.Load())
	if idle > int32(t.idle[ClassTCP][stateEstablished]) {
		return false
	}
	s := segmentOf(segment, false)
	if !t.inWindow(f, dir, &s) {
		return false
	}
	f.note(dir, &s)
	if idle > 0 {
		f.last.Store(now)
	}
	return true
}

// Forward4 translates a plain packet of a flow and takes one off its TTL.
func (f *Flow) Forward4(dir int, b []byte) {
	h := (*ipkt.Head4)(b)
	from, to := &f.tuples[dir&1], &f.tuples[^dir&1]
	le.PutUint64(h[12:], bits.RotateLeft64(to.addrs, 32))
	le.PutUint32(h[20:], bits.RotateLeft32(to.ports, 16))
	// A TTL one lower takes 0x100 off the sum. A header's sum is never zero, so that
	// it doesn't matter how zero is written.
	h[8]--
	s := uint32(^binary.BigEndian.Uint16(h[10:])) + uint32(f.headerDelta(dir)) + 0xfeff
	s = s&0xffff + s>>16
	s = s&0xffff + s>>16
	binary.BigEndian.PutUint16(h[10:], ^uint16(s))
	if from.proto() == ipkt.UDP {
		adjustUDP(h[26:28], from.delta)
	} else {
		adjust(b[36:38], from.delta)
	}
}

// Forward6 is Forward4 for IPv6.
func (f *Flow) Forward6(dir int, b []byte) {
	h := (*ipkt.Head6)(b)
	from, to := &f.tuples[dir&1], &f.tuples[^dir&1]
	end := 2 * (^dir & 1)
	*(*[12]byte)(h[8:]) = f.hi[end+1]
	le.PutUint32(h[20:], uint32(to.addrs>>32))
	*(*[12]byte)(h[24:]) = f.hi[end]
	le.PutUint32(h[36:], uint32(to.addrs))
	le.PutUint32(h[40:], bits.RotateLeft32(to.ports, 16))
	h[7]--
	if from.proto() == ipkt.UDP {
		adjustUDP(h[46:48], from.delta)
	} else {
		adjust(b[56:58], from.delta)
	}
}
