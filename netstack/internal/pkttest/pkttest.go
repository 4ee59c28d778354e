// Package pkttest builds and checks packets for the tests of the forwarding
// plane.
package pkttest

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"ztgate/netstack/internal/ipkt"
)

// Packet describes a packet. Zero fields have useful meanings.
type Packet struct {
	Src, Dst     netip.AddrPort // port of Src is the identifier of echo
	Proto        uint8          // 0 = UDP
	TTL, TOS     uint8          // TTL 0 = 64
	ID           uint16
	DF, More     bool
	Offset       int // of a fragment, in bytes; its payload is raw
	Flags        uint8
	Seq, Ack     uint32
	Window       uint16 // 0 = 65535
	Options      []byte // of TCP, padded by the caller
	IPOptions    []byte // padded by the caller
	Type, Code   uint8  // of ICMP
	Payload      []byte
	NoChecksum   bool // UDP
	BadChecksum  bool // of the transport header
	TrailingJunk int
}

// Addr parses "10.0.0.1:80" or "10.0.0.1".
func Addr(s string) netip.AddrPort {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 0)
	}
	return netip.MustParseAddrPort(s)
}

// UDP makes a UDP packet.
func UDP(src, dst, payload string) []byte {
	return Packet{Src: Addr(src), Dst: Addr(dst), Payload: []byte(payload)}.Bytes()
}

// TCP makes a TCP segment.
func TCP(src, dst string, flags uint8, seq, ack uint32, payload string) []byte {
	return Packet{Proto: ipkt.TCP, Src: Addr(src), Dst: Addr(dst), Flags: flags, Seq: seq, Ack: ack, Payload: []byte(payload)}.Bytes()
}

// Echo makes an echo request, or a reply, of IPv4 or IPv6.
func Echo(src, dst string, reply bool, id uint16, payload string) []byte {
	p := Packet{Proto: ipkt.ICMP, Src: netip.AddrPortFrom(netip.MustParseAddr(src), id), Dst: Addr(dst), Type: 8, Payload: []byte(payload)}
	if reply {
		p.Type = 0
	}
	if p.Src.Addr().Is6() {
		p.Proto, p.Type = ipkt.ICMPv6, 128
		if reply {
			p.Type = 129
		}
	}
	return p.Bytes()
}

// ICMPError makes an error of a router about a packet, quoting at most max bytes.
func ICMPError(src, dst string, typ, code uint8, rest uint32, quote []byte, limit int) []byte {
	p := Packet{Proto: ipkt.ICMP, Src: Addr(src), Dst: Addr(dst), Type: typ, Code: code, Seq: rest, Payload: quote[:min(limit, len(quote))]}
	if p.Src.Addr().Is6() {
		p.Proto = ipkt.ICMPv6
	}
	return p.Bytes()
}

// Bytes builds the packet with right checksums.
func (p Packet) Bytes() []byte {
	if p.Proto == 0 {
		p.Proto = ipkt.UDP
	}
	if p.TTL == 0 {
		p.TTL = 64
	}
	if p.Window == 0 {
		p.Window = 65535
	}
	v6 := p.Src.Addr().Is6()
	l4 := p.transport(v6)
	var b []byte
	if v6 {
		b = binary.BigEndian.AppendUint32(nil, 6<<28|uint32(p.TOS)<<20)
		n := len(l4)
		frag := p.Offset > 0 || p.More
		next := p.Proto
		if frag {
			n, next = n+8, 44
		}
		b = binary.BigEndian.AppendUint16(b, uint16(n))
		b = append(b, next, p.TTL)
		s, d := p.Src.Addr().As16(), p.Dst.Addr().As16()
		b = append(append(b, s[:]...), d[:]...)
		if frag {
			off := uint16(p.Offset)
			if p.More {
				off |= 1
			}
			b = append(b, p.Proto, 0)
			b = binary.BigEndian.AppendUint16(b, off)
			b = binary.BigEndian.AppendUint32(b, uint32(p.ID))
		}
		return append(append(b, l4...), make([]byte, p.TrailingJunk)...)
	}
	hl := 20 + len(p.IPOptions)
	b = append(b, 0x40|byte(hl/4), p.TOS)
	b = binary.BigEndian.AppendUint16(b, uint16(hl+len(l4)))
	b = binary.BigEndian.AppendUint16(b, p.ID)
	frag := uint16(p.Offset / 8)
	if p.More {
		frag |= 0x2000
	}
	if p.DF {
		frag |= 0x4000
	}
	b = binary.BigEndian.AppendUint16(b, frag)
	b = append(b, p.TTL, p.Proto, 0, 0)
	s, d := p.Src.Addr().As4(), p.Dst.Addr().As4()
	b = append(append(b, s[:]...), d[:]...)
	b = append(b, p.IPOptions...)
	ipkt.FixHeader(b)
	return append(append(b, l4...), make([]byte, p.TrailingJunk)...)
}

func (p Packet) transport(v6 bool) []byte {
	if p.Offset > 0 {
		return p.Payload
	}
	var b []byte
	sum := 0
	switch p.Proto {
	case ipkt.UDP:
		b = binary.BigEndian.AppendUint16(b, p.Src.Port())
		b = binary.BigEndian.AppendUint16(b, p.Dst.Port())
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(p.Payload)))
		b, sum = append(b, 0, 0), 6
	case ipkt.TCP:
		b = binary.BigEndian.AppendUint16(b, p.Src.Port())
		b = binary.BigEndian.AppendUint16(b, p.Dst.Port())
		b = binary.BigEndian.AppendUint32(b, p.Seq)
		b = binary.BigEndian.AppendUint32(b, p.Ack)
		b = append(b, byte(20+len(p.Options))/4<<4, p.Flags)
		b = binary.BigEndian.AppendUint16(b, p.Window)
		b = append(append(b, 0, 0, 0, 0), p.Options...)
		sum = 16
	case ipkt.ICMP, ipkt.ICMPv6:
		b = append(b, p.Type, p.Code, 0, 0)
		if p.Type == 8 || p.Type == 0 || p.Type == 13 || p.Type == 14 || p.Type == 128 || p.Type == 129 {
			b = binary.BigEndian.AppendUint16(b, p.Src.Port())
			b = binary.BigEndian.AppendUint16(b, uint16(p.Seq))
		} else {
			b = binary.BigEndian.AppendUint32(b, p.Seq)
		}
		sum = 2
	default:
		return p.Payload
	}
	b = append(b, p.Payload...)
	if p.NoChecksum || p.More {
		return b
	}
	var pseudo uint32
	if p.Proto != ipkt.ICMP {
		pseudo = ipkt.PseudoSum(v6, p.Src.Addr().As16(), p.Dst.Addr().As16(), p.Proto, len(b))
	}
	c := ipkt.Checksum(b, pseudo)
	if c == 0 && p.Proto == ipkt.UDP {
		c = 0xffff
	}
	if p.BadChecksum {
		c ^= 0x1234
	}
	binary.BigEndian.PutUint16(b[sum:], c)
	return b
}

// Fragments cuts an IPv4 packet; sizes are those of the data parts, the last one
// gets the rest.
func Fragments(b []byte, sizes ...int) (out [][]byte) {
	data, off := b[20:], 0
	for i := 0; len(data) > 0; i++ {
		n := len(data)
		if i < len(sizes) {
			n = min(n, sizes[i])
		}
		f := append(append([]byte(nil), b[:20]...), data[:n]...)
		data = data[n:]
		field := binary.BigEndian.Uint16(b[6:])&0x4000 | uint16(off/8)
		if len(data) > 0 {
			field |= 0x2000
		}
		binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
		binary.BigEndian.PutUint16(f[6:], field)
		ipkt.FixHeader(f)
		out = append(out, f)
		off += n
	}
	return out
}

// Describe says in short what a packet is, and finds wrong checksums.
func Describe(b []byte) string {
	var v ipkt.View
	if r := ipkt.Parse(b, &v); r != ipkt.OK {
		return "malformed: " + r.String()
	}
	s := ""
	switch v.Proto {
	case ipkt.TCP, ipkt.UDP:
		name := map[uint8]string{ipkt.TCP: "tcp", ipkt.UDP: "udp"}[v.Proto]
		if !v.First {
			s = fmt.Sprintf("%s %s > %s +%d", name, v.Source(), v.Destination(), v.FragOffset)
			break
		}
		s = fmt.Sprintf("%s %s > %s", name, netip.AddrPortFrom(v.Source(), v.SPort), netip.AddrPortFrom(v.Destination(), v.DPort))
	case ipkt.ICMP, ipkt.ICMPv6:
		s = fmt.Sprintf("icmp %d/%d %s > %s", v.ICMPType, v.ICMPCode, v.Source(), v.Destination())
		if v.IsEcho() {
			s += fmt.Sprintf(" id %d", v.ICMPID)
		}
		if v.IsICMPError() {
			s += " [" + describeQuote(v.B[v.L4+8:]) + "]"
		}
	default:
		s = fmt.Sprintf("proto %d %s > %s", v.Proto, v.Source(), v.Destination())
	}
	if !v.ChecksumOK() {
		s += " BAD CHECKSUM"
	}
	return s
}

func describeQuote(b []byte) string {
	if len(b) < 28 {
		return "short"
	}
	l4, proto := int(b[0]&15)*4, b[9]
	src, dst := netip.Addr{}, netip.Addr{}
	if b[0]>>4 == 6 {
		if len(b) < 48 {
			return "short"
		}
		l4, proto = 40, b[6]
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	} else {
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	}
	if l4 < 20 || len(b) < l4+8 {
		return "short"
	}
	t := b[l4:]
	switch proto {
	case ipkt.TCP, ipkt.UDP:
		return fmt.Sprintf("%d %s > %s", proto, netip.AddrPortFrom(src, binary.BigEndian.Uint16(t)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(t[2:])))
	}
	return fmt.Sprintf("%d %s > %s id %d", proto, src, dst, binary.BigEndian.Uint16(t[4:]))
}
