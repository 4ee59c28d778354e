package nat

import (
	"encoding/binary"

	"ztgate/netstack/internal/ipkt"
)

// coversAddresses reports protocols whose checksum includes the addresses.
func coversAddresses(proto uint8) bool {
	return proto == ipkt.TCP || proto == ipkt.UDP || proto == ipkt.ICMPv6
}

func portDelta(old, new uint16) uint16 {
	s := uint32(^old) + uint32(new)
	return uint16(s&0xffff + s>>16)
}

// deltas computes in advance what translation changes in the checksums.
func (f *Flow) deltas() {
	cl, tg, sv, ex := f.Client(), f.Target(), f.Server(), f.External()
	addr := ipkt.AddDelta(ipkt.Delta(cl[:], ex[:]), ipkt.Delta(tg[:], sv[:]))
	ports := portDelta(f.ClientPort(), f.ExtPort())
	if p := f.Proto(); p == ipkt.TCP || p == ipkt.UDP {
		ports = ipkt.AddDelta(ports, portDelta(f.TargetPort(), f.ServerPort()))
	}
	f.addrDelta = addr
	if !coversAddresses(f.Proto()) {
		addr = 0
	}
	l4 := ipkt.AddDelta(addr, ports)
	f.tuples[FromClient].delta, f.tuples[FromServer].delta = l4, ^l4
}

// headerDelta returns what a packet of a direction adds to its IPv4 header's sum.
func (f *Flow) headerDelta(dir int) uint16 {
	if dir == FromClient {
		return f.addrDelta
	}
	return ^f.addrDelta
}

// adjust applies a delta, unless it is one of the two zeros of ones' complement:
// a checksum that needs no change stays as it is (RFC 6296 §2.6).
func adjust(sum []byte, delta uint16) {
	if delta != 0 && delta != 0xffff {
		ipkt.AdjustDelta(sum, delta)
	}
}

// adjustUDP is adjust for the checksum of UDP, where 0 means that there
// is none.
func adjustUDP(b []byte, delta uint16) {
	sum := binary.BigEndian.Uint16(b)
	if sum == 0 || delta == 0 || delta == 0xffff {
		return
	}
	if sum = ipkt.AddDelta(^sum, delta); sum != 0xffff {
		sum = ^sum
	}
	binary.BigEndian.PutUint16(b, sum)
}

// Rewrite translates a packet of a direction in place: addresses, ports and
// checksums. A wrong checksum stays wrong.
func (f *Flow) Rewrite(dir int, v *ipkt.View) {
	if f.flags&(flagSource|flagDestination) == 0 {
		return
	}
	from := 2 * (1 - dir)
	f.replace(v, from+1, from, f.headerDelta(dir), f.tuples[dir].delta)
}

// Undo turns the translation of a packet of a direction back, so that it can be
// quoted to who sent it. The view is changed too.
func (f *Flow) Undo(dir int, v *ipkt.View) {
	src, dst := 2*dir, 2*dir+1
	f.replace(v, src, dst, f.headerDelta(1-dir), f.tuples[1-dir].delta)
	v.Src, v.Dst, v.SPort, v.DPort = f.addr(src), f.addr(dst), f.port(src), f.port(dst)
}

// replace puts two ends of the flow into a packet.
func (f *Flow) replace(v *ipkt.View, src, dst int, addr, l4 uint16) {
	b := v.B
	s, d := f.addr(src), f.addr(dst)
	if v.V6 {
		copy(b[8:24], s[:])
		copy(b[24:40], d[:])
	} else {
		copy(b[12:16], s[12:])
		copy(b[16:20], d[12:])
		adjust(b[10:], addr)
	}
	if !v.First {
		return
	}
	h := b[v.L4:]
	switch v.Proto {
	case ipkt.TCP, ipkt.UDP:
		binary.BigEndian.PutUint16(h, f.port(src))
		binary.BigEndian.PutUint16(h[2:], f.port(dst))
		if v.Proto == ipkt.TCP {
			adjust(h[16:], l4)
		} else {
			adjustUDP(h[6:], l4)
		}
	case ipkt.ICMP, ipkt.ICMPv6:
		id := src // the end that has the identifier
		if src == endTarget || src == endServer {
			id = dst
		}
		binary.BigEndian.PutUint16(h[4:], f.port(id))
		adjust(h[2:], l4)
	}
}
