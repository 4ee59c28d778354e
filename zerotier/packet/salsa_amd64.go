//go:build !purego

package packet

import "golang.org/x/sys/cpu"

// salsaStep is what one round of the vector loop makes: 4 blocks.
const salsaStep = 256

// salsaScratch is the work space of the vector code.
type salsaScratch struct {
	diagonals [16]uint32
	tail      [salsaStep]byte
}

// xorWide applies the key stream to the start of b with vector instructions and
// returns how much that was; fewer than two blocks may be left.
func (s *salsa12) xorWide(b []byte) int {
	if !cpu.X86.HasAVX2 || len(b) <= 64 {
		return 0
	}
	i := &s.state
	s.wide.diagonals = [16]uint32{
		i[0], i[5], i[10], i[15],
		i[4], i[9], i[14], i[3],
		i[8], i[13], i[2], i[7],
		i[12], i[1], i[6], i[11],
	}
	full := len(b) &^ (salsaStep - 1)
	if full > 0 {
		salsa12XORAVX2(&s.wide.diagonals, &b[0], full)
		s.state[8] += uint32(full / 64)
	}
	if len(b)-full <= 64 {
		return full
	}
	s.wide.diagonals[8] = s.state[8]
	n := copy(s.wide.tail[:], b[full:])
	salsa12XORAVX2(&s.wide.diagonals, &s.wide.tail[0], salsaStep)
	s.state[8] += uint32((n + 63) / 64)
	return full + copy(b[full:], s.wide.tail[:n])
}

// salsa12XORAVX2 applies n bytes of key stream to b, n a positive multiple of
// salsaStep. The state comes as its four diagonals; the upper half of the block
// counter is zero and its lower half does not wrap: packets are short.
//
//go:noescape
func salsa12XORAVX2(diagonals *[16]uint32, b *byte, n int)
