package router

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// The kernel hands a TCP sender's data over in large frames with a header that
// says how to cut them (virtio_net_hdr, in host byte order).
const (
	vnetLen = 10

	vnetNeedsChecksum = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
	vnetTCP4          = unix.VIRTIO_NET_HDR_GSO_TCPV4
	vnetTCP6          = unix.VIRTIO_NET_HDR_GSO_TCPV6
)

var errFrame = errors.New("malformed frame from the kernel")

// segment cuts what was read from a TAP into frames. next returns the room for
// the next frame, done is told how much of it was used.
func segment(b []byte, next func() []byte, done func(n int)) error {
	if len(b) < vnetLen+14 {
		return errFrame
	}
	h, frame := b[:vnetLen], b[vnetLen:]
	u16 := func(i int) int { return int(binary.NativeEndian.Uint16(h[i:])) }
	start, field := u16(6), u16(6)+u16(8)
	if h[1] == unix.VIRTIO_NET_HDR_GSO_NONE {
		if h[0]&vnetNeedsChecksum != 0 {
			if start >= len(frame) || field+2 > len(frame) {
				return errFrame
			}
			// The field holds the sum of the pseudo-header already.
			putChecksum(frame[field:], fold(sum(frame[start:], 0)))
		}
		out := next()
		if len(frame) > len(out) {
			return errFrame
		}
		done(copy(out, frame))
		return nil
	}
	return segmentTCP(h[1], frame, start, u16(4), next, done)
}

const (
	tcpFIN, tcpPSH = 0x01, 0x08
	ethLen         = 14
)

func segmentTCP(kind byte, frame []byte, tcp, size int, next func() []byte, done func(n int)) error {
	v4 := kind == vnetTCP4
	if !v4 && kind != vnetTCP6 || size == 0 || tcp+20 > len(frame) ||
		v4 && (tcp < ethLen+20 || frame[12] != 0x08 || frame[13] != 0x00) ||
		!v4 && (tcp < ethLen+40 || frame[12] != 0x86 || frame[13] != 0xdd) {
		return errFrame
	}
	head := tcp + int(frame[tcp+12]>>4)*4
	if head < tcp+20 || head > len(frame) {
		return errFrame
	}
	ip, payload := frame[ethLen:], frame[head:]
	seq, id := binary.BigEndian.Uint32(frame[tcp+4:]), binary.BigEndian.Uint16(ip[4:])
	flags := frame[tcp+13]
	addresses := ip[12:20]
	if !v4 {
		addresses = ip[8:40]
	}
	pseudo := sum(addresses, unix.IPPROTO_TCP)
	for off := 0; off < len(payload); off += size {
		part := payload[off:min(off+size, len(payload))]
		out := next()
		if head+len(part) > len(out) {
			return errFrame
		}
		out = out[:head+len(part)]
		copy(out, frame[:head])
		copy(out[head:], part)
		oip, otcp := out[ethLen:], out[tcp:]
		if v4 {
			binary.BigEndian.PutUint16(oip[2:], uint16(len(oip)))
			binary.BigEndian.PutUint16(oip[4:], id+uint16(off/size))
			oip[10], oip[11] = 0, 0
			putChecksum(oip[10:], fold(sum(oip[:tcp-ethLen], 0)))
		} else {
			binary.BigEndian.PutUint16(oip[4:], uint16(len(oip)-40))
		}
		binary.BigEndian.PutUint32(otcp[4:], seq+uint32(off))
		if off+size < len(payload) {
			otcp[13] = flags &^ (tcpFIN | tcpPSH)
		}
		otcp[16], otcp[17] = 0, 0
		putChecksum(otcp[16:], fold(sum(otcp, pseudo+uint64(len(otcp)))))
		done(len(out))
	}
	return nil
}

// sum adds b to a sum of 16-bit words (RFC 1071), eight bytes at a time.
func sum(b []byte, s uint64) uint64 {
	for len(b) >= 8 {
		v := binary.BigEndian.Uint64(b)
		s += v>>32 + v&0xffffffff
		b = b[8:]
	}
	for len(b) >= 2 {
		s += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		s += uint64(b[0]) << 8
	}
	return s
}

func fold(s uint64) uint16 {
	for s>>16 != 0 {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// putChecksum stores a checksum; in UDP zero would mean that there is none, and
// its complement is as good everywhere.
func putChecksum(b []byte, c uint16) {
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(b, c)
}
