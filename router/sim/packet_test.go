package sim

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"ztgate/router/gateway/gatewaytest"
	"ztgate/zerotier/ztnode"
)

const (
	headroom    = 64 // that a node needs before a frame
	ethernetLen = 14
	ipLen       = 20
)

// packet is a parsed IPv4 packet.
type packet struct {
	src, dst     netip.AddrPort // ports of ICMP are its identifier
	proto        byte
	flags        byte // of TCP
	seq, ack     uint32
	icmp         byte
	payload, raw []byte
}

// parse reads a packet; what isn't whole is none.
func parse(b []byte) (p packet, ok bool) {
	if len(b) < ipLen || b[0]>>4 != 4 {
		return p, false
	}
	head, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if head < ipLen || total > len(b) || total < head {
		return p, false
	}
	b = b[:total]
	p.raw, p.proto = b, b[9]
	m := b[head:]
	src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	var sport, dport uint16
	switch p.proto {
	case unix.IPPROTO_TCP:
		if len(m) < 20 || len(m) < int(m[12]>>4)*4 {
			return p, false
		}
		sport, dport = binary.BigEndian.Uint16(m), binary.BigEndian.Uint16(m[2:])
		p.seq, p.ack, p.flags, p.payload = binary.BigEndian.Uint32(m[4:]), binary.BigEndian.Uint32(m[8:]), m[13], m[int(m[12]>>4)*4:]
	case unix.IPPROTO_UDP:
		if len(m) < 8 {
			return p, false
		}
		sport, dport, p.payload = binary.BigEndian.Uint16(m), binary.BigEndian.Uint16(m[2:]), m[8:]
	case unix.IPPROTO_ICMP:
		if len(m) < 8 {
			return p, false
		}
		p.icmp, p.payload = m[0], m[8:]
		sport = binary.BigEndian.Uint16(m[4:])
		dport = sport
	}
	p.src, p.dst = netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport)
	return p, true
}

// echo makes an echo request or reply; the port of src is its identifier.
func echo(typ byte, src netip.AddrPort, dst netip.Addr, payload []byte) []byte {
	// A datagram has a header of the same length, and the same header before it.
	b := gatewaytest.UDP(src, netip.AddrPortFrom(dst, 0), payload)
	b[9] = unix.IPPROTO_ICMP
	binary.BigEndian.PutUint16(b[10:], 0)
	binary.BigEndian.PutUint16(b[10:], gatewaytest.Checksum(b[:ipLen]))
	m := b[ipLen:]
	copy(m, []byte{typ, 0, 0, 0})
	binary.BigEndian.PutUint16(m[4:], src.Port())
	binary.BigEndian.PutUint16(m[6:], 1)
	binary.BigEndian.PutUint16(m[2:], gatewaytest.Checksum(m))
	return b
}

// frame makes an Ethernet frame with its headroom before it.
func frame(dst, src ztnode.MAC, etherType uint16, payload []byte) []byte {
	b := make([]byte, headroom+ethernetLen, headroom+ethernetLen+len(payload))
	f := b[headroom:]
	copy(f, dst[:])
	copy(f[6:], src[:])
	binary.BigEndian.PutUint16(f[12:], etherType)
	return append(b, payload...)
}

// arp makes an ARP message: op 1 asks, 2 answers.
func arp(op uint16, mac ztnode.MAC, from netip.Addr, toMAC ztnode.MAC, to netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, 0}
	binary.BigEndian.PutUint16(b[6:], op)
	b = append(b, mac[:]...)
	b = append(b, from.AsSlice()...)
	b = append(b, toMAC[:]...)
	return append(b, to.AsSlice()...)
}

func addrOf(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b)) }
