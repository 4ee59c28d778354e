package packet

import (
	"encoding/binary"
	"math/bits"
)

// salsa12 is the Salsa20/12 key stream of one packet (chapter 01 §5.2).
type salsa12 struct {
	state [16]uint32
	wide  salsaScratch
}

func (s *salsa12) init(key *[32]byte, iv []byte) {
	le := binary.LittleEndian
	s.state = [16]uint32{
		0x61707865, le.Uint32(key[0:]), le.Uint32(key[4:]), le.Uint32(key[8:]),
		le.Uint32(key[12:]), 0x3320646e, le.Uint32(iv[0:]), le.Uint32(iv[4:]),
		0, 0, 0x79622d32, le.Uint32(key[16:]),
		le.Uint32(key[20:]), le.Uint32(key[24:]), le.Uint32(key[28:]), 0x6b206574,
	}
}

// block writes the next 64 bytes of key stream.
func (s *salsa12) block(out *[64]byte) {
	i := &s.state
	x0, x1, x2, x3, x4, x5, x6, x7 := i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]
	x8, x9, x10, x11, x12, x13, x14, x15 := i[8], i[9], i[10], i[11], i[12], i[13], i[14], i[15]
	for range 6 {
		x4 ^= bits.RotateLeft32(x0+x12, 7)
		x8 ^= bits.RotateLeft32(x4+x0, 9)
		x12 ^= bits.RotateLeft32(x8+x4, 13)
		x0 ^= bits.RotateLeft32(x12+x8, 18)
		x9 ^= bits.RotateLeft32(x5+x1, 7)
		x13 ^= bits.RotateLeft32(x9+x5, 9)
		x1 ^= bits.RotateLeft32(x13+x9, 13)
		x5 ^= bits.RotateLeft32(x1+x13, 18)
		x14 ^= bits.RotateLeft32(x10+x6, 7)
		x2 ^= bits.RotateLeft32(x14+x10, 9)
		x6 ^= bits.RotateLeft32(x2+x14, 13)
		x10 ^= bits.RotateLeft32(x6+x2, 18)
		x3 ^= bits.RotateLeft32(x15+x11, 7)
		x7 ^= bits.RotateLeft32(x3+x15, 9)
		x11 ^= bits.RotateLeft32(x7+x3, 13)
		x15 ^= bits.RotateLeft32(x11+x7, 18)

		x1 ^= bits.RotateLeft32(x0+x3, 7)
		x2 ^= bits.RotateLeft32(x1+x0, 9)
		x3 ^= bits.RotateLeft32(x2+x1, 13)
		x0 ^= bits.RotateLeft32(x3+x2, 18)
		x6 ^= bits.RotateLeft32(x5+x4, 7)
		x7 ^= bits.RotateLeft32(x6+x5, 9)
		x4 ^= bits.RotateLeft32(x7+x6, 13)
		x5 ^= bits.RotateLeft32(x4+x7, 18)
		x11 ^= bits.RotateLeft32(x10+x9, 7)
		x8 ^= bits.RotateLeft32(x11+x10, 9)
		x9 ^= bits.RotateLeft32(x8+x11, 13)
		x10 ^= bits.RotateLeft32(x9+x8, 18)
		x12 ^= bits.RotateLeft32(x15+x14, 7)
		x13 ^= bits.RotateLeft32(x12+x15, 9)
		x14 ^= bits.RotateLeft32(x13+x12, 13)
		x15 ^= bits.RotateLeft32(x14+x13, 18)
	}
	le := binary.LittleEndian
	for n, x := range [16]uint32{x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15} {
		le.PutUint32(out[4*n:], x+i[n])
	}
	if i[8]++; i[8] == 0 {
		i[9]++
	}
}

// xor applies the key stream from the next block on.
func (s *salsa12) xor(b []byte, ks *[64]byte) {
	b = b[s.xorWide(b):]
	for len(b) >= 64 {
		s.block(ks)
		for i := 0; i < 64; i += 8 {
			le := binary.LittleEndian
			le.PutUint64(b[i:], le.Uint64(b[i:])^le.Uint64(ks[i:]))
		}
		b = b[64:]
	}
	if len(b) > 0 {
		s.block(ks)
		for i := range b {
			b[i] ^= ks[i]
		}
	}
}
