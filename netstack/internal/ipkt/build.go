package ipkt

import (
	"encoding/binary"
	"net/netip"
)

// ErrorKind is an ICMP error that a router sends.
type ErrorKind uint8

// Kinds.
const (
	TimeExceeded ErrorKind = iota
	TooBig
	NoRoute
	HostUnreachable
	Prohibited
	PortUnreachable
	numErrorKinds
)

// NumErrorKinds is the number of kinds.
const NumErrorKinds = int(numErrorKinds)

// String returns the label used in metrics.
func (k ErrorKind) String() string {
	return [numErrorKinds]string{"time_exceeded", "too_big", "no_route", "host_unreachable", "prohibited", "port_unreachable"}[k]
}

// types of the kinds: ICMP type and code, ICMPv6 type and code.
var errorTypes = [numErrorKinds][4]uint8{
	TimeExceeded:    {11, 0, 3, 0},
	TooBig:          {3, 4, 2, 0},
	NoRoute:         {3, 0, 1, 0},
	HostUnreachable: {3, 1, 1, 3},
	Prohibited:      {3, 13, 1, 1},
	PortUnreachable: {3, 3, 1, 4},
}

// Sizes of the errors we make: IPv4 as RFC 1812 §4.3.2.3 asks, IPv6 up to the
// minimum MTU (RFC 4443 §2.4).
const (
	maxError4 = 576
	maxError6 = 1280
)

// MayAnswer reports whether an ICMP error may be sent about a packet (RFC 1122
// §3.2.2, RFC 4443 §2.4 e).
func (v *View) MayAnswer() bool {
	if !v.First || v.IsICMPError() {
		return false
	}
	if v.Proto == ICMP && v.ICMPType != 8 && v.ICMPType != 0 && (v.ICMPType < 13 || v.ICMPType > 18) {
		return false
	}
	if v.Proto == ICMPv6 && v.ICMPType == 137 { // redirect
		return false
	}
	src, dst := v.Source(), v.Destination()
	return !src.IsUnspecified() && !src.IsMulticast() && !src.IsLoopback() && !dst.IsMulticast() &&
		!(src.Is4() && src.As4() == [4]byte{255, 255, 255, 255}) && !(dst.Is4() && dst.As4() == [4]byte{255, 255, 255, 255})
}

// AppendError appends an ICMP error from src about packet v to b.
func AppendError(b []byte, kind ErrorKind, src [16]byte, v *View, mtu int) []byte {
	start := len(b)
	t := errorTypes[kind]
	if v.V6 {
		quote := v.B[:min(len(v.B), maxError6-48)]
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(quote)))
		b = append(b, ICMPv6, 64)
		b = append(append(b, src[:]...), v.Src[:]...)
		b = append(b, t[2], t[3], 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(mtu))
		b = append(b, quote...)
		sum := PseudoSum(true, src, v.Src, ICMPv6, len(b)-start-40)
		binary.BigEndian.PutUint16(b[start+42:], Checksum(b[start+40:], sum))
		return b
	}
	quote := v.B[:min(len(v.B), maxError4-28)]
	b = append(b, 0x45, 0xc0)
	b = binary.BigEndian.AppendUint16(b, uint16(28+len(quote)))
	b = append(b, 0, 0, 0, 0, 64, ICMP, 0, 0)
	b = append(append(b, src[12:]...), v.Src[12:]...)
	b = append(b, t[0], t[1], 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(mtu))
	b = append(b, quote...)
	FixHeader(b[start:])
	binary.BigEndian.PutUint16(b[start+22:], Checksum(b[start+20:], 0))
	return b
}

// AppendReset appends the RST that refuses TCP segment v to b (RFC 9293 §3.10.7).
func AppendReset(b []byte, v *View) []byte {
	t := v.B[v.L4:]
	seq, ack, flags := uint32(0), binary.BigEndian.Uint32(t[4:]), byte(RST|ACK)
	if v.Flags&ACK != 0 {
		seq, ack, flags = binary.BigEndian.Uint32(t[8:]), 0, RST
	} else {
		ack += uint32(len(t) - int(t[12]>>4)*4)
		if v.Flags&SYN != 0 {
			ack++
		}
	}
	return appendRST(b, v, v.Dst, v.Src, v.DPort, v.SPort, seq, ack, flags)
}

// AppendResetOn appends the RST that ends the connection of TCP segment v at its
// receiver, as if the segment's sender had sent it from src to dst.
func AppendResetOn(b []byte, v *View, src, dst netip.AddrPort) []byte {
	t := v.B[v.L4:]
	return appendRST(b, v, Bytes(src.Addr()), Bytes(dst.Addr()), src.Port(), dst.Port(),
		binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:]), RST|v.Flags&ACK)
}

// TCPData returns how many bytes a TCP segment carries.
func (v *View) TCPData() int {
	t := v.B[v.L4:]
	return len(t) - int(t[12]>>4)*4
}

func appendRST(b []byte, v *View, src, dst [16]byte, sport, dport uint16, seq, ack uint32, flags byte) []byte {
	start := len(b)
	if v.V6 {
		b = append(b, 0x60, 0, 0, 0, 0, 20, TCP, 64)
		b = append(append(b, src[:]...), dst[:]...)
	} else {
		b = append(b, 0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0)
		b = append(append(b, src[12:]...), dst[12:]...)
		FixHeader(b[start:])
	}
	l4 := len(b)
	b = binary.BigEndian.AppendUint16(b, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, ack)
	b = append(b, 0x50, flags, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(b[l4+16:], Checksum(b[l4:], PseudoSum(v.V6, src, dst, TCP, 20)))
	return b
}

// Fragment4 cuts an IPv4 packet into fragments of at most mtu bytes (RFC 791
// §3.2). Options are copied to all, which receivers tolerate.
func Fragment4(v *View, mtu int, emit func(b []byte)) {
	ihl := v.headerLen()
	chunk := (mtu - ihl) &^ 7
	if chunk <= 0 {
		return
	}
	data := v.B[ihl:]
	base := binary.BigEndian.Uint16(v.B[6:])
	for off := 0; off < len(data); off += chunk {
		part := data[off:min(off+chunk, len(data))]
		b := append(append(make([]byte, 0, ihl+len(part)), v.B[:ihl]...), part...)
		more := base & 0x2000
		if off+chunk < len(data) {
			more = 0x2000
		}
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		binary.BigEndian.PutUint16(b[6:], base&0x1fff+uint16(off/8)|more)
		FixHeader(b)
		emit(b)
	}
}

func (v *View) headerLen() int { return int(v.B[0]&15) * 4 }

// appendHeader appends an IP header of a packet of our own, with n bytes behind it.
func appendHeader(b []byte, src, dst netip.Addr, proto uint8, n int) []byte {
	if src.Is6() {
		b = append(b, 0x60, 0, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(n))
		b = append(b, proto, 64)
		return append(append(b, src.AsSlice()...), dst.AsSlice()...)
	}
	start := len(b)
	b = append(b, 0x45, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(20+n))
	b = append(b, 0, 0, 0, 0, 64, proto, 0, 0)
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	FixHeader(b[start:])
	return b
}

// AppendUDP appends a datagram to b.
func AppendUDP(b []byte, src, dst netip.AddrPort, data []byte) []byte {
	n := 8 + len(data)
	b = appendHeader(b, src.Addr(), dst.Addr(), UDP, n)
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, src.Port())
	b = binary.BigEndian.AppendUint16(b, dst.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(n))
	b = append(append(b, 0, 0), data...)
	sum := Checksum(b[at:], PseudoSum(src.Addr().Is6(), Bytes(src.Addr()), Bytes(dst.Addr()), UDP, n))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[at+6:], sum)
	return b
}

// AppendEchoReply appends an answer to an echo request to b.
func AppendEchoReply(b []byte, src, dst netip.Addr, id, seq uint16, data []byte) []byte {
	n, typ, proto := 8+len(data), byte(0), uint8(ICMP)
	if src.Is6() {
		typ, proto = 129, ICMPv6
	}
	b = appendHeader(b, src, dst, proto, n)
	at := len(b)
	b = append(b, typ, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, id)
	b = append(binary.BigEndian.AppendUint16(b, seq), data...)
	var sum uint32
	if src.Is6() {
		sum = PseudoSum(true, Bytes(src), Bytes(dst), ICMPv6, n)
	}
	binary.BigEndian.PutUint16(b[at+2:], Checksum(b[at:], sum))
	return b
}

// Fragment cuts a packet of our own, which has no options, into fragments of at most mtu
// bytes that have an identification.
func Fragment(v *View, mtu int, id uint32, emit func(b []byte)) {
	if !v.V6 {
		binary.BigEndian.PutUint16(v.B[4:], uint16(id))
		Fragment4(v, mtu, emit)
		return
	}
	const headers = 40 + 8
	chunk := (mtu - headers) &^ 7
	if chunk <= 0 {
		return
	}
	data := v.B[40:]
	for off := 0; off < len(data); off += chunk {
		part := data[off:min(off+chunk, len(data))]
		b := append(make([]byte, 0, headers+len(part)), v.B[:40]...)
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(part)))
		more := uint16(1)
		if off+chunk >= len(data) {
			more = 0
		}
		next := b[6]
		b[6] = 44
		b = binary.BigEndian.AppendUint16(append(b, next, 0), uint16(off)|more)
		b = append(binary.BigEndian.AppendUint32(b, id), part...)
		emit(b)
	}
}
