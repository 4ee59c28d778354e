// Package offload stands for the network card that the kernel takes us for: it hands
// over what one sender sends in large packets, with a header that says how to cut them
// (virtio_net_hdr), and takes large packets in the same form.
package offload

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// HeaderLen is the length of a virtio_net_hdr, which is in host byte order.
const HeaderLen = 10

// EthernetLen is the length of an Ethernet header.
const EthernetLen = 14

// MaxRead is the most that the kernel hands over at once.
const MaxRead = HeaderLen + EthernetLen + 4 + 1<<16

// maxSegments is more than a sender makes of one packet: 64 KiB for the smallest link that
// matters (576 bytes) are 122, and programs get at most 128 datagrams of one call (UDP_SEGMENT).
// But who shares a kernel or a hypervisor with us can say any size, and make 64,000 packets
// of one at no cost of its own.
const maxSegments = 256

const (
	vnetNeedsChecksum = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	vnetTCP4          = unix.VIRTIO_NET_HDR_GSO_TCPV4
	vnetTCP6          = unix.VIRTIO_NET_HDR_GSO_TCPV6
	vnetUDP           = unix.VIRTIO_NET_HDR_GSO_UDP_L4
)

// packetError is about one packet: reading goes on.
type packetError struct{}

func (packetError) Error() string   { return "malformed packet from the kernel" }
func (packetError) Temporary() bool { return true }

// ErrPacket says that one packet was lost.
var ErrPacket error = packetError{}

// Segmenter cuts what was read from the kernel into packets, one at a time. Link
// is the length of the link header: 0 of a TUN, [EthernetLen] of others.
type Segmenter struct {
	Link int

	p       packet
	kind    byte
	size    int // payload of a segment
	off     int // payload that was taken
	pending bool
}

// Start takes what was read, with its virtio_net_hdr. It stays in use until
// [Segmenter.Next] has given everything.
func (s *Segmenter) Start(b []byte) error {
	s.pending = false
	if len(b) < HeaderLen+s.Link+1 {
		return ErrPacket
	}
	h, b := b[:HeaderLen], b[HeaderLen:]
	u16 := func(i int) int { return int(binary.NativeEndian.Uint16(h[i:])) }
	s.p, s.kind, s.size, s.off = packet{b: b, ip: s.Link, l4: u16(6)}, h[1]&^unix.VIRTIO_NET_HDR_GSO_ECN, u16(4), 0
	if s.kind == unix.VIRTIO_NET_HDR_GSO_NONE {
		if h[0]&vnetNeedsChecksum != 0 {
			start, field := u16(6), u16(6)+u16(8)
			if start >= len(b) || field+2 > len(b) {
				return ErrPacket
			}
			// The field holds the sum of the pseudo-header already.
			putSum(b[field:], fold(sum(b[start:], 0)))
		}
		s.pending = true
		return nil
	}
	p := &s.p
	ipLen := 20
	if p.v6() {
		ipLen = 40
	}
	if h[0]&vnetNeedsChecksum == 0 { // merged by hardware, which has seen the checksums
		if p.l4 = s.Link + ipLen; !p.v6() {
			p.l4 = s.Link + int(b[p.ip]&15)*4
		}
	}
	if p.l4 < s.Link+ipLen || p.l4 >= len(b) || s.size == 0 || b[p.ip]>>4 != 4 && !p.v6() ||
		s.Link == EthernetLen && binary.BigEndian.Uint16(b[12:]) != etherType(b[p.ip]>>4) {
		return ErrPacket
	}
	switch s.kind {
	case vnetTCP4, vnetTCP6:
		p.protocol = unix.IPPROTO_TCP
		if p.l4+20 > len(b) || p.v6() != (s.kind == vnetTCP6) {
			return ErrPacket
		}
		p.head = p.l4 + int(b[p.l4+12]>>4)*4
		if p.head < p.l4+20 {
			return ErrPacket
		}
	case vnetUDP:
		p.protocol = unix.IPPROTO_UDP
		p.head = p.l4 + udpLen
	default:
		return ErrPacket
	}
	if p.head >= len(b) || len(b)-p.head > maxSegments*s.size {
		return ErrPacket
	}
	s.pending = true
	return nil
}

// Pending reports that Next has something to give.
func (s *Segmenter) Pending() bool { return s.pending }

// Next writes the next packet to out and returns its length. If it doesn't fit,
// the rest of what was read is lost.
func (s *Segmenter) Next(out []byte) (int, error) {
	p := &s.p
	if s.kind == unix.VIRTIO_NET_HDR_GSO_NONE {
		s.pending = false
		if len(p.b) > len(out) {
			return 0, ErrPacket
		}
		return copy(out, p.b), nil
	}
	index, payload := s.off/s.size, p.b[p.head+s.off:]
	last := len(payload) <= s.size
	payload = payload[:min(s.size, len(payload))]
	n := p.head + len(payload)
	if n > len(out) {
		s.pending = false
		return 0, ErrPacket
	}
	q := *p
	q.b = out[:n]
	copy(q.b, p.b[:p.head])
	copy(q.b[p.head:], payload)
	if !p.v6() {
		id := q.b[p.ip+4:]
		binary.BigEndian.PutUint16(id, binary.BigEndian.Uint16(id)+uint16(index))
	}
	if q.protocol == unix.IPPROTO_TCP {
		t := q.b[q.l4:]
		binary.BigEndian.PutUint32(t[4:], binary.BigEndian.Uint32(t[4:])+uint32(s.off))
		if !last {
			t[13] &^= tcpFIN | tcpPSH
		}
		if index > 0 { // it answers once (RFC 3168 §6.1.2)
			t[13] &^= tcpCWR
		}
	}
	q.setLength(n - q.ip)
	c := q.checksum()
	c[0], c[1] = 0, 0
	putSum(c, fold(sum(q.b[q.l4:], q.pseudo(n-q.l4))))
	s.off += len(payload)
	s.pending = !last
	return n, nil
}
