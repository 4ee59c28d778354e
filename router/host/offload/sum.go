package offload

import (
	"encoding/binary"
	"math/bits"
)

// sum adds the 16-bit words of b to a sum that [fold] completes (RFC 1071). The
// words are in the processor's order, which the ones' complement sum doesn't mind
// (RFC 1071 §2 B): numbers are put in with [word].
func sum(b []byte, s uint64) uint64 {
	var c uint64
	for len(b) >= 64 {
		p := (*[64]byte)(b)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[0:]), 0)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[8:]), c)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[16:]), c)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[24:]), c)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[32:]), c)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[40:]), c)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[48:]), c)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(p[56:]), c)
		s += c
		b = b[64:]
	}
	for len(b) >= 8 {
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(b), 0)
		s += c
		b = b[8:]
	}
	if len(b) > 0 {
		var last [8]byte
		copy(last[:], b)
		s, c = bits.Add64(s, binary.NativeEndian.Uint64(last[:]), 0)
		s += c
	}
	return s
}

// word is what a 16-bit number adds to a sum.
func word(n int) uint64 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], uint16(n))
	return uint64(binary.NativeEndian.Uint16(b[:]))
}

// fold returns the complemented sum, in the processor's order: see [putSum].
func fold(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return ^uint16(s)
}

// putSum stores what [fold] returned. In UDP zero would mean that there is no
// checksum, and its complement is as good everywhere.
func putSum(b []byte, c uint16) {
	if c == 0 {
		c = 0xffff
	}
	binary.NativeEndian.PutUint16(b, c)
}
