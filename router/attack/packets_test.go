//go:build e2e

package attack

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

var be = binary.BigEndian

// TCP flags.
const (
	fin, syn, rst, ack = 1, 2, 4, 16
)

// ip4 returns an IPv4 packet. fragment is the field with flags and offset.
func ip4(src, dst netip.Addr, proto byte, id, fragment uint16, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 64, proto
	be.PutUint16(b[2:], uint16(20+len(payload)))
	be.PutUint16(b[4:], id)
	be.PutUint16(b[6:], fragment)
	s, d := src.As4(), dst.As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	be.PutUint16(b[10:], sum(b, 0))
	return append(b, payload...)
}

// sum is the Internet checksum.
func sum(b []byte, start uint32) uint16 {
	for ; len(b) > 1; b = b[2:] {
		start += uint32(be.Uint16(b))
	}
	if len(b) == 1 {
		start += uint32(b[0]) << 8
	}
	for start > 0xffff {
		start = start&0xffff + start>>16
	}
	return ^uint16(start)
}

// pseudo is the sum of the pseudo header.
func pseudo(src, dst netip.Addr, proto byte, n int) (s uint32) {
	for _, a := range [][]byte{src.AsSlice(), dst.AsSlice()} {
		for ; len(a) > 0; a = a[2:] {
			s += uint32(be.Uint16(a))
		}
	}
	return s + uint32(proto) + uint32(n)
}

func tcp(src, dst netip.AddrPort, flags byte, seq, acked uint32) []byte {
	b := make([]byte, 20)
	be.PutUint16(b, src.Port())
	be.PutUint16(b[2:], dst.Port())
	be.PutUint32(b[4:], seq)
	be.PutUint32(b[8:], acked)
	b[12], b[13] = 5<<4, flags
	be.PutUint16(b[14:], 64240)
	be.PutUint16(b[16:], sum(b, pseudo(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, len(b))))
	return ip4(src.Addr(), dst.Addr(), unix.IPPROTO_TCP, 0, 0x4000, b)
}

func udp(src, dst netip.AddrPort, data []byte) []byte {
	b := make([]byte, 8, 8+len(data))
	be.PutUint16(b, src.Port())
	be.PutUint16(b[2:], dst.Port())
	be.PutUint16(b[4:], uint16(8+len(data)))
	b = append(b, data...)
	be.PutUint16(b[6:], sum(b, pseudo(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, len(b))))
	return ip4(src.Addr(), dst.Addr(), unix.IPPROTO_UDP, 0, 0, b)
}

func icmp4(src, dst netip.Addr, typ, code byte, rest uint32, data []byte) []byte {
	b := append([]byte{typ, code, 0, 0}, be.AppendUint32(nil, rest)...)
	b = append(b, data...)
	be.PutUint16(b[2:], sum(b, 0))
	return ip4(src, dst, unix.IPPROTO_ICMP, 0, 0, b)
}

// icmpErrors are errors about a packet, of all the kinds that a host acts on.
func icmpErrors(from, to netip.Addr, about []byte) (out [][]byte) {
	for _, e := range []struct {
		typ, code byte
		rest      uint32
	}{{3, 0, 0}, {3, 1, 0}, {3, 2, 0}, {3, 3, 0}, {3, 4, 576}, {3, 4, 68}, {3, 10, 0}, {3, 13, 0}, {4, 0, 0}, {5, 1, 0x0a000042}, {11, 0, 0}, {12, 0, 0}} {
		out = append(out, icmp4(from, to, e.typ, e.code, e.rest, about[:min(len(about), 28)]))
	}
	return out
}

// arp returns the body of an ARP packet.
func arp(op uint16, sendMAC [6]byte, sendIP netip.Addr, wantMAC [6]byte, wantIP netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4}
	b = be.AppendUint16(b, op)
	b = append(append(b, sendMAC[:]...), sendIP.AsSlice()...)
	return append(append(b, wantMAC[:]...), wantIP.AsSlice()...)
}

// advertise returns an unsolicited neighbour advertisement, an IPv6 packet.
func advertise(mac [6]byte, a, to netip.Addr) []byte {
	body := append([]byte{136, 0, 0, 0, 0xa0, 0, 0, 0}, a.AsSlice()...)
	body = append(append(body, 2, 1), mac[:]...)
	be.PutUint16(body[2:], sum(body, pseudo(a, to, unix.IPPROTO_ICMPV6, len(body))))
	b := []byte{0x60, 0, 0, 0, 0, byte(len(body)), unix.IPPROTO_ICMPV6, 255}
	b = append(append(b, a.AsSlice()...), to.AsSlice()...)
	return append(b, body...)
}

// rawVPC sends IP packets from the VPC to the gateway, as they are.
type rawVPC struct {
	fd int
	to unix.SockaddrLinklayer
}

func (w *world) rawVPC() *rawVPC {
	r := &rawVPC{fd: w.socket(w.VPC, unix.AF_PACKET, unix.SOCK_DGRAM, 0),
		to: unix.SockaddrLinklayer{Protocol: unix.ETH_P_IP<<8&0xff00 | unix.ETH_P_IP>>8, Ifindex: w.vpcIndex, Halen: 6, Addr: w.gwMAC}}
	w.cleanup(func() { _ = unix.Close(r.fd) })
	return r
}

// send drops what the interface has no room for.
func (r *rawVPC) send(b []byte) { _ = unix.Sendto(r.fd, b, 0, &r.to) }

// tinySegments is a TCP packet of which each byte goes into a segment of its own, with a
// virtio_net_hdr that says so and room for an Ethernet header.
func tinySegments(src, dst netip.Addr, payload int) []byte {
	const ethernet, headers = 14, 40
	b := []byte{unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, unix.VIRTIO_NET_HDR_GSO_TCPV4}
	for _, v := range []uint16{ethernet + headers, 1, ethernet + 20, 16} { // headers, size, where the checksum begins and lies
		b = binary.NativeEndian.AppendUint16(b, v)
	}
	segment := tcp(netip.AddrPortFrom(src, 4000), netip.AddrPortFrom(dst, 9), ack, 1, 1)
	b = append(b, make([]byte, ethernet)...)
	return append(b, ip4(src, dst, unix.IPPROTO_TCP, 0, 0x4000, append(segment[20:], make([]byte, payload)...))...)
}

// largeVPC returns how a neighbour of the gateway sends packets with a virtio_net_hdr, as a
// container with NET_RAW or another machine of the same hypervisor does.
func (w *world) largeVPC() (send func(b []byte)) {
	fd := w.socket(w.VPC, unix.AF_PACKET, unix.SOCK_RAW, 0)
	w.cleanup(func() { _ = unix.Close(fd) })
	w.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	return func(b []byte) {
		frame := b[10:]
		copy(frame, w.gwMAC[:6])
		copy(frame[6:], []byte{2, 0, 0, 0, 0, 66, 8, 0})
		_ = unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: w.vpcIndex}) // it drops what it has no room for
	}
}

// rawWire sends UDP datagrams from the stranger's host with any source.
type rawWire struct {
	fd int
	to unix.SockaddrInet4
}

func (w *world) rawWire() *rawWire {
	r := &rawWire{fd: w.socket(w.stranger, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW), to: unix.SockaddrInet4{Addr: netip.MustParseAddrPort(gwWire).Addr().As4()}}
	w.cleanup(func() { _ = unix.Close(r.fd) })
	return r
}

func (r *rawWire) send(src netip.AddrPort, data []byte) int {
	b := udp(src, netip.MustParseAddrPort(gwWire), data)
	if unix.Sendto(r.fd, b, 0, &r.to) != nil {
		return 0
	}
	return len(data)
}

// behind is host i of the networks behind the stranger, each in a /24 of its own as
// long as there are some.
func behind(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{44, byte(i >> 8), byte(i), byte(i>>16) + 1})
}

// watchWire counts the bytes of UDP that arrive for the stranger, whatever address he
// gave, until stop is called.
func (w *world) watchWire() (stop func() (bytes uint64)) {
	fd := w.socket(w.stranger, unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	prog := []unix.SockFilter{ // UDP over IPv4
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET, K: 64},
		{Code: unix.BPF_RET, K: 0},
	}
	w.must(unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}))
	w.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	w.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	w.must(unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: unix.ETH_P_IP<<8&0xff00 | unix.ETH_P_IP>>8}))
	gateway := netip.MustParseAddrPort(gwWire).Addr().As4()
	quit, done := make(chan struct{}), make(chan uint64)
	go func() {
		var total uint64
		b := make([]byte, 64)
		for {
			k, from, err := unix.Recvfrom(fd, b, 0)
			select {
			case <-quit:
				_ = unix.Close(fd)
				done <- total
				return
			default:
			}
			if ll, ok := from.(*unix.SockaddrLinklayer); err == nil && ok && ll.Pkttype != unix.PACKET_OUTGOING && k >= 28 && [4]byte(b[12:16]) == gateway {
				total += uint64(be.Uint16(b[24:]) - 8)
			}
		}
	}()
	return func() uint64 {
		close(quit)
		return <-done
	}
}
