package nat

import (
	"math"
	"math/bits"
	"net/netip"
	"sync/atomic"

	"ztgate/netstack/internal/ipkt"
)

// Coarse time: flows keep the time of their last packet in units of 2^26 ns
// (67 ms), so that packets rarely write it. 32 bits last for nine years.
const coarseShift = 26

// Coarse turns nanoseconds into coarse time.
func Coarse(now int64) uint32 { return uint32(now >> coarseShift) }

// Flags of a flow, fixed when it opens.
const (
	flagSource      uint8 = 1 << iota // the source is translated
	flagDestination                   // the destination is translated
	flagMapped                        // holds a reference to a mapping of its pool
	flagFiltered                      // nothing passes to the server before it sent something itself
)

// Directions of a flow.
const (
	FromClient = 0
	FromServer = 1
)

// The ends of a flow: the first packet as it came, and as it went.
const (
	endClient   = iota // its source
	endTarget          // its destination
	endServer          // its destination behind us
	endExternal        // its source behind us
	numEnds
)

// Flow is one flow with both its directions. It has no pointers and fills three
// cache lines: what IPv6 and rare events need; what identifies and translates IPv4
// packets, and the state, which are read for every packet and rarely written; what
// packets count. The two directions share the third line, because the TCP window
// check of either needs both.
//
// Fields without atomics don't change while the flow can be found. A flow is
// valid until its reader leaves, see [Reader].
type Flow struct {
	hi           [numEnds][12]byte // the first twelve bytes of the ends' addresses, the last four are in tuples
	created      uint32            // coarse
	lprev, lnext uint32            // list of its client's half-open or its pool's closed flows; free list
	pool         uint16
	flags        uint8

	tuples     [2]tuple      // of client and target, server and external
	Hop        atomic.Uint64 // next hop on the overlay, in the engine's own form
	next       [2]atomic.Uint32
	Generation atomic.Uint32 // of policy and routes when it was judged
	state      atomic.Uint32
	last       atomic.Uint32 // coarse
	Slot       uint16        // the network, as the engine numbers them
	addrDelta  uint16        // to the IPv4 header checksum, from the client

	dir [2]direction
}

// tuple is what packets of a direction have in their headers when they come, in
// the byte order of the wire, as little-endian words read it. What they have when
// they go is the other direction's with its halves exchanged.
type tuple struct {
	addrs uint64 // source and destination, of IPv6 their last four bytes
	ports uint32 // or an echo identifier
	kind  uint16 // see kindOf
	delta uint16 // to the transport checksum
}

// kindOf puts protocol, side and family into a number.
func kindOf(proto uint8, side Side, v6 bool) uint16 {
	k := uint16(proto) | uint16(side)<<8
	if v6 {
		k |= 1 << 9
	}
	return k
}

func (t *tuple) proto() uint8 { return uint8(t.kind) }
func (t *tuple) side() Side   { return Side(t.kind >> 8 & 1) }

// addr returns the address of an end.
func (f *Flow) addr(end int) (a [16]byte) {
	copy(a[:], f.hi[end][:])
	le.PutUint32(a[12:], uint32(f.tuples[end>>1].addrs>>(end&1*32)))
	return a
}

// port returns the port of an end.
func (f *Flow) port(end int) uint16 {
	return bits.ReverseBytes16(uint16(f.tuples[end>>1].ports >> (end & 1 * 16)))
}

func (f *Flow) setAddr(end int, a [16]byte) {
	t, shift := &f.tuples[end>>1], end&1*32
	copy(f.hi[end][:], a[:])
	t.addrs = t.addrs&^(math.MaxUint32<<shift) | uint64(le.Uint32(a[12:]))<<shift
}

func (f *Flow) setPort(end int, p uint16) {
	t, shift := &f.tuples[end>>1], end&1*16
	t.ports = t.ports&^(math.MaxUint16<<shift) | uint32(bits.ReverseBytes16(p))<<shift
}

// Client and ClientPort, or echo identifier, are the source of the first packet as it came.
func (f *Flow) Client() [16]byte   { return f.addr(endClient) }
func (f *Flow) ClientPort() uint16 { return f.port(endClient) }

// Target and TargetPort are its destination.
func (f *Flow) Target() [16]byte   { return f.addr(endTarget) }
func (f *Flow) TargetPort() uint16 { return f.port(endTarget) }

// Server and ServerPort are its destination as it went.
func (f *Flow) Server() [16]byte   { return f.addr(endServer) }
func (f *Flow) ServerPort() uint16 { return f.port(endServer) }

// External and ExtPort are its source as it went.
func (f *Flow) External() [16]byte { return f.addr(endExternal) }
func (f *Flow) ExtPort() uint16    { return f.port(endExternal) }

// direction is what one direction of a flow counts and announces.
type direction struct {
	packets, bytes atomic.Uint64
	end            atomic.Uint32 // TCP: highest sequence number sent, and one
	limit          atomic.Uint32 // TCP: up to which the other side may send
	window         atomic.Uint32 // TCP: largest window announced, its scale, flags
	timer          uint32        // link in the timer wheel: next of 0, previous of 1; of a removed flow 0 has the epoch of its end
}

// Count adds packets of a direction.
func (f *Flow) Count(dir int, packets, bytes uint64) {
	d := &f.dir[dir]
	d.packets.Add(packets)
	d.bytes.Add(bytes)
}

// Counters returns packets and bytes of a direction.
func (f *Flow) Counters(dir int) (packets, bytes uint64) {
	return f.dir[dir].packets.Load(), f.dir[dir].bytes.Load()
}

// Proto returns the IP protocol.
func (f *Flow) Proto() uint8 { return f.tuples[0].proto() }

// From returns the side of the client.
func (f *Flow) From() Side { return f.tuples[0].side() }

// To returns the side of the server.
func (f *Flow) To() Side { return f.tuples[1].side() }

// Exit returns the side to which packets of a direction go.
func (f *Flow) Exit(dir int) Side { return f.tuples[1-dir].side() }

// Translated reports whether the source is another one behind us.
func (f *Flow) Translated() bool { return f.flags&flagSource != 0 }

// Redirected reports whether the destination is another one behind us.
func (f *Flow) Redirected() bool { return f.flags&flagDestination != 0 }

// Holds reports whether the flow keeps back what its client sends, because the other
// side hasn't sent anything yet.
func (f *Flow) Holds(dir int) bool {
	return dir == FromClient && f.flags&flagFiltered != 0 && f.state.Load()&stateMask == stateNew
}

// Mapped reports whether the external port was chosen by the table.
func (f *Flow) Mapped() bool { return f.flags&flagMapped != 0 }

// Key is a packet's tuple as it appears on one side. For ICMP queries the
// identifier is sport on the way out and dport on the way back; the other one
// tells timestamps from echo.
type Key struct {
	src, dst     [16]byte
	sport, dport uint16
	proto        uint8
	side         Side
	hash         uint32
}

// markTimestamp stands for the missing port of timestamp queries.
const markTimestamp = 13

// queryPorts gives ICMP queries something like ports.
func queryPorts(typ uint8, id uint16) (sport, dport uint16, ok bool) {
	switch typ {
	case 8, 128:
		return id, 0, true
	case 0, 129:
		return 0, id, true
	case 13:
		return id, markTimestamp, true
	case 14:
		return markTimestamp, id, true
	}
	return 0, 0, false
}

// isReply reports an ICMP message that can't begin a flow.
func isReply(proto, typ uint8) bool {
	return proto == ipkt.ICMP && (typ == 0 || typ == 14) || proto == ipkt.ICMPv6 && typ == 129
}

// keyOf fills k from a packet; false if it has no tuple.
func keyOf(side Side, v *ipkt.View, k *Key) bool {
	copyWords(&k.src, &v.Src)
	copyWords(&k.dst, &v.Dst)
	k.proto, k.side = v.Proto, side
	switch v.Proto {
	case ipkt.TCP, ipkt.UDP:
		k.sport, k.dport = v.SPort, v.DPort
	case ipkt.ICMP, ipkt.ICMPv6:
		var ok bool
		if k.sport, k.dport, ok = queryPorts(v.ICMPType, v.ICMPID); !ok {
			return false
		}
	default:
		k.sport, k.dport = 0, 0
	}
	return v.First
}

// copyWords copies an address as it was just written, see [ipkt.View].
func copyWords(to, from *[16]byte) {
	a, b := le.Uint64(from[:]), le.Uint64(from[8:])
	le.PutUint64(to[:], a)
	le.PutUint64(to[8:], b)
}

// key returns the tuple of packets of a direction.
func (f *Flow) key(dir int) Key {
	return Key{src: f.addr(2 * dir), dst: f.addr(2*dir + 1), sport: f.port(2 * dir), dport: f.port(2*dir + 1),
		proto: f.Proto(), side: f.tuples[dir].side()}
}

// addrs and ports are those of a flow's tuple.
func (k *Key) addrs() uint64 {
	return uint64(le.Uint32(k.src[12:])) | uint64(le.Uint32(k.dst[12:]))<<32
}

func (k *Key) ports() uint32 { return bits.ReverseBytes32(uint32(k.sport)<<16 | uint32(k.dport)) }

// same reports whether packets of a direction have the same tuple as those of a direction
// of another flow.
func (f *Flow) same(dir int, other *Flow, odir int) bool {
	a, b := &f.tuples[dir], &other.tuples[odir]
	return a.addrs == b.addrs && a.ports == b.ports && a.kind == b.kind &&
		f.hi[2*dir] == other.hi[2*odir] && f.hi[2*dir+1] == other.hi[2*odir+1]
}

// is reports whether k is the tuple of packets of a direction.
func (f *Flow) is(dir int, k *Key) bool {
	t := &f.tuples[dir]
	return t.addrs == k.addrs() && t.ports == k.ports() && t.proto() == k.proto && t.side() == k.side &&
		f.hi[2*dir] == [12]byte(k.src[:]) && f.hi[2*dir+1] == [12]byte(k.dst[:])
}

// TupleKey makes the key of a tuple.
func (t *Table) TupleKey(side Side, proto uint8, src, dst netip.Addr, sport, dport uint16) *Key {
	k := &Key{src: src.As16(), dst: dst.As16(), sport: sport, dport: dport, proto: proto, side: side}
	t.sum(k)
	return k
}
