package nat

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"

	"ztgate/netstack/internal/ipkt"
)

// Coarse time: flows keep the time of their last packet in units of 2^26 ns
// (67 ms), so that packets rarely write it. 32 bits last for nine years.
const coarseShift = 26

func coarse(now int64) uint32 { return uint32(now >> coarseShift) }

// idFlags of a flow, fixed when it opens.
const (
	flagFromOverlay uint8 = 1 << iota // the side of its client
	flagToOverlay                     // the side of its server
	flagV6
	flagSource      // the source is translated
	flagDestination // the destination is translated
	flagMapped      // holds a reference to a mapping of its pool
	flagFiltered    // nothing passes to the server before it sent something itself
)

// Directions of a flow.
const (
	FromClient = 0
	FromServer = 1
)

// Flow is one flow with both its directions. It has no pointers and fills three
// cache lines: what identifies it; how it is translated and its state, which are
// read for every packet and rarely written; what packets count. The two
// directions share the third line, because the TCP window check of either needs
// both.
//
// Fields without atomics don't change while the flow can be found. A flow is
// valid until its reader leaves, see [Reader].
type Flow struct {
	Client, Target   [16]byte // the first packet as it came
	Server, External [16]byte // and as it went: destination and source

	ClientPort, TargetPort uint16 // or echo identifier
	ServerPort, ExtPort    uint16
	Proto                  uint8
	flags                  uint8
	Slot                   uint16 // the network, as the engine numbers them
	pool                   uint16
	addrDelta              uint16        // to the IPv4 header checksum, from the client
	l4Delta                uint16        // to the transport checksum
	Generation             atomic.Uint32 // of policy and routes when it was judged
	state                  atomic.Uint32
	last                   atomic.Uint32 // coarse
	next                   [2]atomic.Uint32
	Hop                    atomic.Uint64 // next hop on the overlay, in the engine's own form
	created                uint32        // coarse
	lprev, lnext           uint32        // list of its client's half-open or its pool's closed flows; free list

	dir [2]direction
}

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

// From returns the side of the client, To that of the server.
func (f *Flow) From() Side { return Side(f.flags & flagFromOverlay) }

// To returns the side of the server.
func (f *Flow) To() Side { return Side(f.flags & flagToOverlay >> 1) }

// Exit returns the side to which packets of a direction go.
func (f *Flow) Exit(dir int) Side {
	if dir == FromClient {
		return f.To()
	}
	return f.From()
}

// V6 reports an IPv6 flow.
func (f *Flow) V6() bool { return f.flags&flagV6 != 0 }

// Translated reports whether the source is another one behind us.
func (f *Flow) Translated() bool { return f.flags&flagSource != 0 }

// Redirected reports whether the destination is another one behind us.
func (f *Flow) Redirected() bool { return f.flags&flagDestination != 0 }

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
	le := binary.LittleEndian
	a, b := le.Uint64(from[:]), le.Uint64(from[8:])
	le.PutUint64(to[:], a)
	le.PutUint64(to[8:], b)
}

// key returns the tuple of packets of a direction.
func (f *Flow) key(dir int) (k Key) {
	k.proto = f.Proto
	if dir == FromClient {
		k.src, k.dst, k.sport, k.dport, k.side = f.Client, f.Target, f.ClientPort, f.TargetPort, f.From()
	} else {
		k.src, k.dst, k.sport, k.dport, k.side = f.Server, f.External, f.ServerPort, f.ExtPort, f.To()
	}
	return k
}

// is reports whether k is the tuple of packets of a direction.
func (f *Flow) is(dir int, k *Key) bool {
	if dir == FromClient {
		return f.Client == k.src && f.Target == k.dst && f.ClientPort == k.sport && f.TargetPort == k.dport &&
			f.Proto == k.proto && f.From() == k.side
	}
	return f.Server == k.src && f.External == k.dst && f.ServerPort == k.sport && f.ExtPort == k.dport &&
		f.Proto == k.proto && f.To() == k.side
}

// TupleKey makes the key of a tuple.
func (t *Table) TupleKey(side Side, proto uint8, src, dst netip.Addr, sport, dport uint16) *Key {
	k := &Key{src: src.As16(), dst: dst.As16(), sport: sport, dport: dport, proto: proto, side: side}
	t.sum(k)
	return k
}
