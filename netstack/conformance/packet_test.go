package conformance

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Protocols and TCP flags as the rows name them.
const (
	protoICMP   = uint8(header.ICMPv4ProtocolNumber)
	protoTCP    = uint8(header.TCPProtocolNumber)
	protoUDP    = uint8(header.UDPProtocolNumber)
	protoICMPv6 = uint8(header.ICMPv6ProtocolNumber)

	fin = header.TCPFlagFin
	syn = header.TCPFlagSyn
	rst = header.TCPFlagRst
	psh = header.TCPFlagPsh
	ack = header.TCPFlagAck
	urg = header.TCPFlagUrg
)

func tcpipAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// edit changes an IP packet; the header checksum is computed anew afterwards.
type edit func(b []byte) []byte

func ttl(n uint8) edit {
	return func(b []byte) []byte {
		if isV6(b) {
			b[7] = n
		} else {
			b[8] = n
		}
		return b
	}
}

func tos(n uint8) edit {
	return func(b []byte) []byte {
		if isV6(b) {
			_, label := header.IPv6(b).TOS()
			header.IPv6(b).SetTOS(n, label)
		} else {
			b[1] = n
		}
		return b
	}
}

func ipid(n uint16) edit {
	return func(b []byte) []byte { binary.BigEndian.PutUint16(b[4:], n); return b }
}

// df sets don't-fragment.
func df(b []byte) []byte { b[6] |= 0x40; return b }

// options puts IPv4 options behind the header.
func options(o ...byte) edit {
	return func(b []byte) []byte {
		for len(o)%4 != 0 {
			o = append(o, 0)
		}
		ihl := int(b[0]&15) * 4
		b = append(append(append([]byte(nil), b[:ihl]...), o...), b[ihl:]...)
		b[0] = 0x40 | byte((ihl+len(o))/4)
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		return b
	}
}

// extension puts IPv6 extension headers in front of the transport header. body is
// the header without its next-header byte.
func extension(kind uint8, body ...byte) edit {
	return func(b []byte) []byte {
		h := append([]byte{b[6]}, body...)
		b = append(append(append([]byte(nil), b[:40]...), h...), b[40:]...)
		b[6] = kind
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
		return b
	}
}

// badSum spoils the transport checksum.
func badSum(b []byte) []byte {
	if at := sumOffset(b); at > 0 {
		b[at] ^= 0x55
		b[at+1] ^= 0x0f
	}
	return b
}

func isV6(b []byte) bool { return b[0]>>4 == 6 }

func with(b []byte, edits ...edit) []byte {
	for _, e := range edits {
		b = e(b)
	}
	if !isV6(b) {
		fixHeader(b)
	}
	return b
}

func fixHeader(b []byte) {
	h := header.IPv4(b)
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
}

// l4 returns protocol and offset of the transport header.
func l4(b []byte) (proto uint8, at int) {
	if !isV6(b) {
		return b[9], int(b[0]&15) * 4
	}
	proto, at = b[6], 40
	for at+8 <= len(b) {
		switch proto {
		case 0, 43, 60:
			proto, at = b[at], at+8+int(b[at+1])*8
		case 44:
			proto, at = b[at], at+8
		default:
			return proto, at
		}
	}
	return proto, at
}

func sumOffset(b []byte) int {
	proto, at := l4(b)
	switch proto {
	case protoTCP:
		return at + 16
	case protoUDP:
		return at + 6
	case protoICMP, protoICMPv6:
		return at + 2
	}
	return 0
}

// transportSum computes what the transport checksum of a whole packet should be.
func transportSum(b []byte) uint16 {
	proto, at := l4(b)
	off := sumOffset(b)
	body := append([]byte(nil), b[at:]...)
	body[off-at], body[off-at+1] = 0, 0
	var start uint16
	if proto != protoICMP {
		p := parse(b)
		start = header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(proto), tcpipAddr(p.src), tcpipAddr(p.dst), uint16(len(body)))
	}
	if proto == protoUDP {
		body = body[:min(len(body), max(8, int(binary.BigEndian.Uint16(body[4:]))))]
	}
	sum := ^checksum.Checksum(body, start)
	if proto == protoUDP && sum == 0 {
		sum = 0xffff
	}
	return sum
}

func fixTransport(b []byte) []byte {
	if off := sumOffset(b); off > 0 && len(b) >= off+2 {
		binary.BigEndian.PutUint16(b[off:], transportSum(b))
	}
	return b
}

// ipPacket builds an IP packet around a transport header and payload.
func ipPacket(src, dst netip.Addr, proto uint8, body []byte, edits ...edit) []byte {
	var b []byte
	if src.Is4() {
		b = append(make([]byte, header.IPv4MinimumSize), body...)
		header.IPv4(b).Encode(&header.IPv4Fields{
			TotalLength: uint16(len(b)), ID: nextID(), TTL: 64, Protocol: proto, SrcAddr: tcpipAddr(src), DstAddr: tcpipAddr(dst)})
	} else {
		b = append(make([]byte, header.IPv6MinimumSize), body...)
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(body)), TransportProtocol: tcpip.TransportProtocolNumber(proto), HopLimit: 64,
			SrcAddr: tcpipAddr(src), DstAddr: tcpipAddr(dst)})
	}
	switch proto {
	case protoTCP, protoUDP, protoICMP, protoICMPv6:
		if len(body) >= 8 {
			fixTransport(b)
		}
	}
	return with(b, edits...)
}

// udp builds a datagram.
func udp(from, to netip.AddrPort, payload string, edits ...edit) []byte {
	b := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(payload))
	header.UDP(b).Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(len(b) + len(payload))})
	return ipPacket(from.Addr(), to.Addr(), protoUDP, append(b, payload...), edits...)
}

// segment is the TCP part of a packet.
type segment struct {
	flags    header.TCPFlags
	seq, ack uint32
	window   uint16 // 0 = 64240
	urgent   uint16
	opts     []byte
	data     string
}

// tcp builds a segment.
func tcp(from, to netip.AddrPort, s segment, edits ...edit) []byte {
	if s.window == 0 {
		s.window = 64240
	}
	for len(s.opts)%4 != 0 {
		s.opts = append(s.opts, 0)
	}
	b := make([]byte, header.TCPMinimumSize)
	header.TCP(b).Encode(&header.TCPFields{SrcPort: from.Port(), DstPort: to.Port(), SeqNum: s.seq, AckNum: s.ack,
		DataOffset: uint8(len(b) + len(s.opts)), Flags: s.flags, WindowSize: s.window, UrgentPointer: s.urgent})
	return ipPacket(from.Addr(), to.Addr(), protoTCP, append(append(b, s.opts...), s.data...), edits...)
}

// icmp builds an ICMP message of the family of src; rest is bytes 4 to 7.
func icmp(src, dst netip.Addr, typ, code uint8, rest uint32, body []byte, edits ...edit) []byte {
	b := append([]byte{typ, code, 0, 0}, binary.BigEndian.AppendUint32(nil, rest)...)
	proto := protoICMP
	if src.Is6() {
		proto = protoICMPv6
	}
	return ipPacket(src, dst, proto, append(b, body...), edits...)
}

// ping builds an echo request, pong a reply.
func ping(src, dst netip.Addr, id, seq uint16, data string, edits ...edit) []byte {
	return echo(src, dst, 8, 128, id, seq, data, edits)
}

func pong(src, dst netip.Addr, id, seq uint16, data string, edits ...edit) []byte {
	return echo(src, dst, 0, 129, id, seq, data, edits)
}

func echo(src, dst netip.Addr, v4, v6 uint8, id, seq uint16, data string, edits []edit) []byte {
	if src.Is6() {
		v4 = v6
	}
	return icmp(src, dst, v4, 0, uint32(id)<<16|uint32(seq), []byte(data), edits...)
}

// icmpError builds an error from src about a packet that src received, to the
// packet's sender, quoting its header and n bytes behind it.
func icmpError(src netip.Addr, typ, code uint8, rest uint32, about []byte, n int, edits ...edit) []byte {
	at := 40
	if !isV6(about) {
		at = int(about[0]&15) * 4
	}
	quote := append([]byte(nil), about[:min(at+n, len(about))]...)
	return icmp(src, parse(about).src, typ, code, rest, quote, edits...)
}

// split cuts a packet into fragments after the given numbers of transport bytes.
func split(b []byte, id uint32, sizes ...int) (out [][]byte) {
	at := 20
	if isV6(b) {
		at = 40
	}
	rest, off := b[at:], 0
	for i := 0; len(rest) > 0; i++ {
		n := len(rest)
		if i < len(sizes) {
			n = min(n, sizes[i])
		}
		out = append(out, fragment(b, id, off, n < len(rest), rest[:n]))
		off += n
		rest = rest[n:]
	}
	return out
}

// fragment makes one fragment of the datagram that b is.
func fragment(b []byte, id uint32, off int, more bool, body []byte) []byte {
	if isV6(b) {
		f := append(append([]byte(nil), b[:40]...), b[6], 0, 0, 0, 0, 0, 0, 0)
		f[6] = 44
		word := uint16(off)
		if more {
			word |= 1
		}
		binary.BigEndian.PutUint16(f[42:], word)
		binary.BigEndian.PutUint32(f[44:], id)
		f = append(f, body...)
		binary.BigEndian.PutUint16(f[4:], uint16(len(f)-40))
		return f
	}
	f := append(append([]byte(nil), b[:20]...), body...)
	binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
	binary.BigEndian.PutUint16(f[4:], uint16(id))
	word := binary.BigEndian.Uint16(b[6:])&0xc000 | uint16(off/8)
	if more {
		word |= 0x2000
	}
	binary.BigEndian.PutUint16(f[6:], word)
	fixHeader(f)
	return f
}

// packet is a received packet with its fields; ports of echo are its identifier.
type packet struct {
	b            []byte
	src, dst     netip.Addr
	proto        uint8
	ttl, tos     uint8
	id           uint16
	flags        uint8 // of the IPv4 header: 4 reserved, 2 DF, 1 MF
	off          int
	l4           int
	sport, dport uint16
	typ, code    uint8 // ICMP
	mtu          int   // ICMP: the last two bytes of the second word, of ICMPv6 all
	seq          uint16
	payload      []byte // behind the transport header
}

func (p *packet) from() netip.AddrPort { return netip.AddrPortFrom(p.src, p.sport) }
func (p *packet) to() netip.AddrPort   { return netip.AddrPortFrom(p.dst, p.dport) }
func (p *packet) fragment() bool       { return p.off > 0 || p.flags&1 != 0 }
func (p *packet) icmpError() bool {
	return p.proto == protoICMP && (p.typ == 3 || p.typ == 4 || p.typ == 5 || p.typ == 11 || p.typ == 12) || p.proto == protoICMPv6 && p.typ < 128
}
func (p *packet) tcp() header.TCP { return header.TCP(p.b[p.l4:]) }

// quoted returns the packet that an error quotes.
func (p *packet) quoted() *packet {
	if len(p.payload) < 20 || isV6(p.payload) && len(p.payload) < 40 {
		return &packet{}
	}
	return parse(p.payload)
}

func (p *packet) String() string {
	s := fmt.Sprintf("%s > %s proto %d, %d bytes, ttl %d", p.from(), p.to(), p.proto, len(p.b), p.ttl)
	switch p.proto {
	case protoTCP:
		if p.off == 0 && len(p.b) >= p.l4+20 {
			s += fmt.Sprintf(", flags %s", p.tcp().Flags())
		}
	case protoICMP, protoICMPv6:
		s += fmt.Sprintf(", %d/%d", p.typ, p.code)
	}
	if p.fragment() {
		s += fmt.Sprintf(", fragment id %#x at %d", p.id, p.off)
	}
	return s
}

// parse reads a packet as far as it goes.
func parse(b []byte) *packet {
	p := &packet{b: b}
	if isV6(b) {
		h := header.IPv6(b)
		p.src, p.dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.ttl = h.HopLimit()
		p.tos, _ = h.TOS()
		if b[6] == 44 && len(b) >= 48 {
			word := binary.BigEndian.Uint16(b[42:])
			p.off, p.flags, p.id = int(word&^7), uint8(word&1), binary.BigEndian.Uint16(b[46:])
		}
	} else {
		h := header.IPv4(b)
		p.src, p.dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.ttl, p.tos, p.id, p.flags, p.off = b[8], b[1], h.ID(), b[6]>>5, int(h.FragmentOffset())
	}
	p.proto, p.l4 = l4(b)
	if p.off > 0 || p.l4+8 > len(b) {
		return p
	}
	t := b[p.l4:]
	p.payload = t[8:]
	switch p.proto {
	case protoTCP:
		p.sport, p.dport = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
		if o := int(t[min(12, len(t)-1)]>>4) * 4; len(t) >= 20 && o <= len(t) {
			p.payload = t[o:]
		}
	case protoUDP:
		p.sport, p.dport = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	case protoICMP, protoICMPv6:
		p.typ, p.code = t[0], t[1]
		switch {
		case p.typ == 8 || p.typ == 0 || p.typ >= 13 && p.typ <= 18 || p.typ == 128 || p.typ == 129:
			p.sport, p.dport = binary.BigEndian.Uint16(t[4:]), binary.BigEndian.Uint16(t[4:])
			p.seq = binary.BigEndian.Uint16(t[6:])
		case p.proto == protoICMP:
			p.mtu = int(binary.BigEndian.Uint16(t[6:]))
		default:
			p.mtu = int(binary.BigEndian.Uint32(t[4:]))
		}
	}
	return p
}

// sumsRight checks length and every checksum of a received packet. Transport sums
// of fragments can't be checked here.
func (p *packet) sumsRight() error {
	b := p.b
	if isV6(b) {
		if int(binary.BigEndian.Uint16(b[4:]))+40 != len(b) {
			return fmt.Errorf("payload length %d in %d bytes", binary.BigEndian.Uint16(b[4:]), len(b))
		}
	} else {
		h := header.IPv4(b)
		if int(h.TotalLength()) != len(b) {
			return fmt.Errorf("total length %d in %d bytes", h.TotalLength(), len(b))
		}
		if !h.IsChecksumValid() {
			return fmt.Errorf("header checksum %#x is wrong", h.Checksum())
		}
	}
	at := sumOffset(b)
	if p.fragment() || at == 0 {
		return nil
	}
	if len(b) < at+2 {
		return fmt.Errorf("transport header cut")
	}
	got := binary.BigEndian.Uint16(b[at:])
	if p.proto == protoUDP && got == 0 {
		if isV6(b) {
			return nil // RFC 6936: the receiver's business
		}
		return nil
	}
	if want := transportSum(b); got != want && !(got^want == 0xffff && (got == 0 || want == 0)) {
		return fmt.Errorf("transport checksum %#04x, want %#04x", got, want)
	}
	return nil
}

// reassemble puts the fragments of one datagram together; nil if there is a hole.
func reassemble(parts []*packet) *packet {
	var body []byte
	total, head := -1, []byte(nil)
	for _, p := range parts {
		at := 20
		if isV6(p.b) {
			at = 48
		}
		data := p.b[at:]
		if need := p.off + len(data); need > len(body) {
			body = append(body, make([]byte, need-len(body))...)
		}
		copy(body[p.off:], data)
		if p.flags&1 == 0 {
			total = p.off + len(data)
		}
		if p.off == 0 {
			head = append([]byte(nil), p.b[:at]...)
		}
	}
	if head == nil || total != len(body) {
		return nil
	}
	seen := make([]bool, total)
	for _, p := range parts {
		at := 20
		if isV6(p.b) {
			at = 48
		}
		for i := range len(p.b) - at {
			seen[p.off+i] = true
		}
	}
	for _, ok := range seen {
		if !ok {
			return nil
		}
	}
	if isV6(head) {
		head[6] = head[40]
		head = head[:40]
		binary.BigEndian.PutUint16(head[4:], uint16(total))
	} else {
		binary.BigEndian.PutUint16(head[2:], uint16(20+total))
		head[6], head[7] = head[6]&0xc0, 0
	}
	b := append(head, body...)
	if !isV6(b) {
		fixHeader(b)
	}
	return parse(b)
}
