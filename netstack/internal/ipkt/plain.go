package ipkt

import (
	"encoding/binary"
	"math/bits"
)

// Head4 and Head6 are what a plain packet has at least: the IP header and the
// first eight bytes of its transport header.
type (
	Head4 = [28]byte
	Head6 = [48]byte
)

// Plain4 recognises the packets that routers mostly see: whole, TCP or UDP, without
// options, with a TTL above 1. b begins with 0x45. It accepts nothing that [Parse]
// refuses, and reads words where Parse reads fields. The size is that of the packet
// without what may follow it in b, 0 if it isn't plain.
func Plain4(b []byte) (size int, proto uint8) {
	if len(b) < len(Head4{}) {
		return 0, 0
	}
	h := (*Head4)(b)
	le := binary.LittleEndian
	w0, w1, w2 := le.Uint64(h[:]), le.Uint64(h[8:]), le.Uint32(h[16:])
	const fragment = 0xff3f << 48 // more fragments, and the offset
	if w0&fragment != 0 || uint8(w1) <= 1 {
		return 0, 0
	}
	s := w0&0xffffffff + w0>>32 + w1&0xffffffff + w1>>32 + uint64(w2) // see headerOK
	s = s&0xffff + s>>16&0xffff + s>>32
	if s&0xffff+s>>16 != 0xffff {
		return 0, 0
	}
	src, dst := uint8(w1>>32), uint8(w2)
	if src-1 >= 223 || src == 127 || dst == 0 || dst == 127 || uint32(w1>>32) == w2 { // see validPair4
		return 0, 0
	}
	size = int(bits.ReverseBytes16(uint16(w0 >> 16)))
	if size < len(h) || size > len(b) {
		return 0, 0
	}
	proto = uint8(w1 >> 8) // as in Plain6: one function for both costs each packet some nanoseconds
	if proto == UDP {
		if n := int(binary.BigEndian.Uint16(h[24:])); n < 8 || n > size-20 {
			return 0, 0
		}
		return size, UDP
	}
	if proto != TCP || !plainTCP(b[20:size]) {
		return 0, 0
	}
	return size, TCP
}

// Plain6 is Plain4 for IPv6 without extension headers, up to 65,535 bytes.
func Plain6(b []byte) (size int, proto uint8) {
	if len(b) < len(Head6{}) {
		return 0, 0
	}
	h := (*Head6)(b)
	le := binary.LittleEndian
	s, d := le.Uint64(h[8:]), le.Uint64(h[24:])
	// See validPair6: of addresses with eight zeros in front some are refused.
	if h[7] <= 1 || s == 0 || d == 0 || h[8] == 0xff || s == d && le.Uint64(h[16:]) == le.Uint64(h[32:]) {
		return 0, 0
	}
	size = 40 + int(binary.BigEndian.Uint16(h[4:]))
	if size < len(h) || size > min(len(b), 0xffff) {
		return 0, 0
	}
	if h[6] == UDP {
		if n := int(binary.BigEndian.Uint16(h[44:])); n < 8 || n > size-40 {
			return 0, 0
		}
		return size, UDP
	}
	if h[6] != TCP || !plainTCP(b[40:size]) {
		return 0, 0
	}
	return size, TCP
}

// plainTCP checks the length of a TCP header.
func plainTCP(t []byte) bool {
	if len(t) < 20 {
		return false
	}
	n := int(t[12]>>4) * 4
	return n >= 20 && n <= len(t)
}
