package offload

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

const (
	tcpFIN, tcpPSH, tcpACK, tcpCWR = 0x01, 0x08, 0x10, 0x80
	udpLen                         = 8
)

// packet is where things lie in a packet with its link header: IPv4 without
// options and not a fragment, or IPv6 without extension headers, and TCP or UDP.
type packet struct {
	b        []byte
	ip, l4   int // offsets of the headers
	head     int // all headers
	protocol byte
}

func (p *packet) v6() bool { return p.b[p.ip]>>4 == 6 }

// addresses are what the pseudo-header has of them.
func (p *packet) addresses() []byte {
	if p.v6() {
		return p.b[p.ip+8 : p.ip+40]
	}
	return p.b[p.ip+12 : p.ip+20]
}

// checksum is the field of TCP or UDP.
func (p *packet) checksum() []byte {
	if p.protocol == unix.IPPROTO_UDP {
		return p.b[p.l4+6 : p.l4+8]
	}
	return p.b[p.l4+16 : p.l4+18]
}

// pseudo is the sum of the pseudo-header for n bytes of TCP or UDP.
func (p *packet) pseudo(n int) uint64 { return sum(p.addresses(), word(int(p.protocol))+word(n)) }

// valid reports that the checksum is there and right.
func (p *packet) valid() bool {
	if c := p.checksum(); p.protocol == unix.IPPROTO_UDP && c[0] == 0 && c[1] == 0 {
		return false
	}
	return fold(sum(p.b[p.l4:], p.pseudo(len(p.b)-p.l4))) == 0
}

// setLength writes the lengths of the headers for n bytes behind the link header,
// and the checksum of an IPv4 header.
func (p *packet) setLength(n int) {
	ip := p.b[p.ip:]
	if p.v6() {
		binary.BigEndian.PutUint16(ip[4:], uint16(n-40))
	} else {
		binary.BigEndian.PutUint16(ip[2:], uint16(n))
		ip[10], ip[11] = 0, 0
		putSum(ip[10:], fold(sum(ip[:p.l4-p.ip], 0)))
	}
	if p.protocol == unix.IPPROTO_UDP {
		binary.BigEndian.PutUint16(p.b[p.l4+4:], uint16(n-(p.l4-p.ip)))
	}
}

// locate finds the headers in b, which begins with a link header of a length. A
// packet whose lengths don't agree is none, nor is one whose IPv4 header is damaged.
func locate(b []byte, link int) (p packet, ok bool) {
	if len(b) < link+28 {
		return p, false
	}
	p = packet{b: b, ip: link}
	ip := b[link:]
	switch ip[0] >> 4 {
	case 4:
		p.protocol, p.l4 = ip[9], link+20
		if ip[0] != 0x45 || ip[6]&^0x40 != 0 || ip[7] != 0 || int(binary.BigEndian.Uint16(ip[2:])) != len(ip) || fold(sum(ip[:20], 0)) != 0 {
			return p, false
		}
	case 6:
		if len(ip) < 48 || int(binary.BigEndian.Uint16(ip[4:])) != len(ip)-40 {
			return p, false
		}
		p.protocol, p.l4 = ip[6], link+40
	default:
		return p, false
	}
	if link == EthernetLen && binary.BigEndian.Uint16(b[12:]) != etherType(ip[0]>>4) {
		return p, false
	}
	switch p.protocol {
	case unix.IPPROTO_TCP:
		if len(b) < p.l4+20 {
			return p, false
		}
		p.head = p.l4 + int(b[p.l4+12]>>4)*4
		return p, p.head >= p.l4+20 && p.head <= len(b)
	case unix.IPPROTO_UDP:
		p.head = p.l4 + udpLen
		return p, int(binary.BigEndian.Uint16(b[p.l4+4:])) == len(b)-p.l4
	}
	return p, false
}

func etherType(version byte) uint16 {
	if version == 4 {
		return 0x0800
	}
	return 0x86dd
}
