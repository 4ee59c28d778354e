package gatewaytest

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Flags of a TCP segment.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

const (
	ipLen  = 20 // without options
	tcpLen = 20
	udpLen = 8
)

// UDP makes an IPv4 packet with a datagram.
func UDP(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, udpLen, udpLen+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(udpLen+len(payload)))
	return ipv4(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), 6, append(b, payload...))
}

// TCP makes an IPv4 packet with a segment.
func TCP(src, dst netip.AddrPort, flags uint8, seq, ack uint32, payload []byte) []byte {
	b := make([]byte, tcpLen, tcpLen+len(payload))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = tcpLen/4<<4, flags
	binary.BigEndian.PutUint16(b[14:], 0xffff)
	return ipv4(unix.IPPROTO_TCP, src.Addr(), dst.Addr(), 16, append(b, payload...))
}

// echoReply makes the answer to an echo request.
func echoReply(src, dst netip.Addr, request []byte) []byte {
	b := append([]byte{0, 0, 0, 0}, request[4:]...)
	return ipv4(unix.IPPROTO_ICMP, src, dst, 2, b)
}

// ipv4 puts a header in front of a message and fills in its checksum at sum.
func ipv4(proto uint8, src, dst netip.Addr, sum int, message []byte) []byte {
	b := make([]byte, ipLen, ipLen+len(message))
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(ipLen+len(message)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], Checksum(b))
	var pseudo []byte
	if proto != unix.IPPROTO_ICMP {
		pseudo = append(append(pseudo, b[12:ipLen]...), 0, proto)
		pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(message)))
	}
	binary.BigEndian.PutUint16(message[sum:], Checksum(append(pseudo, message...)))
	return append(b, message...)
}

// Checksum is that of RFC 1071.
func Checksum(b []byte) uint16 {
	var n uint32
	for i, c := range b {
		n += uint32(c) << (8 * (1 - i%2))
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return ^uint16(n)
}
