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
	addr := ipkt.AddDelta(ipkt.Delta(f.Client[:], f.External[:]), ipkt.Delta(f.Target[:], f.Server[:]))
	ports := portDelta(f.ClientPort, f.ExtPort)
	if f.Proto == ipkt.TCP || f.Proto == ipkt.UDP {
		ports = ipkt.AddDelta(ports, portDelta(f.TargetPort, f.ServerPort))
	}
	f.addrDelta = addr
	if !coversAddresses(f.Proto) {
		addr = 0
	}
	f.l4Delta = ipkt.AddDelta(addr, ports)
}

// adjust applies a delta, unless it is one of the two zeros of ones' complement:
// a checksum that needs no change stays as it is (RFC 6296 §2.6).
func adjust(sum []byte, delta uint16) {
	if delta != 0 && delta != 0xffff {
		ipkt.AdjustDelta(sum, delta)
	}
}

// Rewrite translates a packet of a direction in place: addresses, ports and
// checksums. A wrong checksum stays wrong.
func (f *Flow) Rewrite(dir int, v *ipkt.View) {
	if f.flags&(flagSource|flagDestination) == 0 {
		return
	}
	addr, l4 := f.addrDelta, f.l4Delta
	src, dst, sport, dport := &f.External, &f.Server, f.ExtPort, f.ServerPort
	id := sport
	if dir == FromServer {
		addr, l4 = ^addr, ^l4
		src, dst, sport, dport = &f.Target, &f.Client, f.TargetPort, f.ClientPort
		id = dport
	}
	f.replace(v, src, dst, sport, dport, id, addr, l4)
}

// Undo turns the translation of a packet of a direction back, so that it can be
// quoted to who sent it. The view is changed too.
func (f *Flow) Undo(dir int, v *ipkt.View) {
	addr, l4 := ^f.addrDelta, ^f.l4Delta
	src, dst, sport, dport := &f.Client, &f.Target, f.ClientPort, f.TargetPort
	id := sport
	if dir == FromServer {
		addr, l4 = ^addr, ^l4
		src, dst, sport, dport = &f.Server, &f.External, f.ServerPort, f.ExtPort
		id = dport
	}
	f.replace(v, src, dst, sport, dport, id, addr, l4)
	v.Src, v.Dst, v.SPort, v.DPort = *src, *dst, sport, dport
}

func (f *Flow) replace(v *ipkt.View, src, dst *[16]byte, sport, dport, id, addr, l4 uint16) {
	b := v.B
	if v.V6 {
		copy(b[8:24], src[:])
		copy(b[24:40], dst[:])
	} else {
		copy(b[12:16], src[12:])
		copy(b[16:20], dst[12:])
		adjust(b[10:], addr)
	}
	if !v.First {
		return
	}
	t := b[v.L4:]
	switch v.Proto {
	case ipkt.TCP:
		binary.BigEndian.PutUint16(t, sport)
		binary.BigEndian.PutUint16(t[2:], dport)
		adjust(t[16:], l4)
	case ipkt.UDP:
		binary.BigEndian.PutUint16(t, sport)
		binary.BigEndian.PutUint16(t[2:], dport)
		if t[6] != 0 || t[7] != 0 { // 0 = no checksum
			adjust(t[6:], l4)
			if t[6] == 0 && t[7] == 0 {
				t[6], t[7] = 0xff, 0xff
			}
		}
	case ipkt.ICMP, ipkt.ICMPv6:
		binary.BigEndian.PutUint16(t[4:], id)
		adjust(t[2:], l4)
	}
}
