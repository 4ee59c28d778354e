//go:build !purego

package packet

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"

	"golang.org/x/sys/cpu"
)

// gmac is GMAC with 96-bit nonces. [cipher.NewGCM] has it as the sealing of
// additional data alone; the wide forms multiply several blocks with one instruction.
type gmac struct {
	keys  [wideStep]byte
	width gmacWidth
	block cipher.Block
	aead  cipher.AEAD // if not wide
}

// gmacWidth is the set of instructions in use.
type gmacWidth uint8

const (
	gmacNone   gmacWidth = iota
	gmacVEX              // VPCLMULQDQ on 256 bits, 8 blocks at a time
	gmacAVX512           // VPCLMULQDQ on 512 bits, 16 blocks at a time
)

const (
	ghashStep = 128 // bytes per round of the 256-bit loop
	wideStep  = 256 // and of the 512-bit loop
)

// gmacScratch is the work space of gmac.
type gmacScratch struct {
	tail    [wideStep]byte
	y, mask [16]byte
}

// widestGMAC is what the processor can do.
func widestGMAC() gmacWidth {
	switch {
	case hasVAES && cpu.X86.HasAVX512VPCLMULQDQ && cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW:
		return gmacAVX512
	case hasVAES && cpuid7ECX()&(1<<10) != 0:
		return gmacVEX
	}
	return gmacNone
}

func (g *gmac) init(b cipher.Block) error {
	g.block = b
	if g.width = widestGMAC(); g.width != gmacNone {
		g.expand()
		return nil
	}
	var err error
	g.aead, err = cipher.NewGCM(b)
	return err
}

// expand makes the keys H^16 to H^1, each divided by x, which makes up for the shift
// of a product of reflected polynomials.
func (g *gmac) expand() {
	var zero, h [16]byte
	g.block.Encrypt(h[:], zero[:])
	first := gf128{binary.BigEndian.Uint64(h[:8]), binary.BigEndian.Uint64(h[8:])}
	power := first
	for i := len(g.keys) - 16; i >= 0; i -= 16 {
		k := power.divX()
		// The byte-reversed block as a little-endian number.
		binary.LittleEndian.PutUint64(g.keys[i:], k.low)
		binary.LittleEndian.PutUint64(g.keys[i+8:], k.high)
		power = power.mul(first)
	}
}

// gf128 is an element of the field of GHASH (NIST SP 800-38D §6.3) as a big-endian
// number: its highest bit is the coefficient of x^0.
type gf128 struct{ high, low uint64 }

// divX divides by x.
func (a gf128) divX() gf128 {
	carry := -(a.high >> 63)
	return gf128{a.high<<1 | a.low>>63 ^ carry&(0xc2<<56), a.low<<1 ^ carry&1}
}

// mul multiplies in constant time.
func (a gf128) mul(b gf128) (z gf128) {
	for _, word := range [...]uint64{a.high, a.low} {
		for i := range 64 {
			m := -(word >> (63 - i) & 1)
			z.high ^= b.high & m
			z.low ^= b.low & m
			carry := -(b.low & 1)
			b = gf128{b.high>>1 ^ carry&(0xe1<<56), b.low>>1 | b.high<<63}
		}
	}
	return z
}

// sum leaves the tag of data in s.tag. The nonce is s.nonce.
func (g *gmac) sum(data []byte, s *Scratch) {
	if g.width == gmacNone {
		g.aead.Seal(s.tag[:0], s.nonce[:], nil, data)
		return
	}
	m := &s.mac
	copy(m.mask[:12], s.nonce[:])
	binary.BigEndian.PutUint32(m.mask[12:], 1)
	g.block.Encrypt(m.mask[:], m.mask[:]) // needed last: the processor does it beside what follows
	m.y = [16]byte{}
	bitLen := uint64(len(data)) * 8
	if g.width == gmacAVX512 {
		if full := len(data) &^ (wideStep - 1); full > 0 {
			ghashAVX512(&g.keys, &m.y, &data[0], full)
			data = data[full:]
		}
	}
	if len(data) > wideStep-16 || g.width == gmacVEX { // else what is left and the length fit the buffer
		if full := len(data) &^ (ghashStep - 1); full > 0 {
			ghashVPCLMUL(g.last8(), &m.y, &data[0], full)
			data = data[full:]
		}
	}
	// The rest and the length block at the end of a buffer: zeros before them
	// change nothing if what was summed so far is added to the first block.
	blocks := (len(data)+15)/16 + 1
	buf := m.tail[:]
	if blocks <= ghashStep/16 {
		buf = buf[ghashStep:]
	}
	clear(buf)
	from := buf[len(buf)-16*blocks:]
	copy(from, data)
	binary.BigEndian.PutUint64(from[16*(blocks-1):], bitLen)
	subtle.XORBytes(from[:16], from[:16], m.y[:])
	m.y = [16]byte{}
	if len(buf) == wideStep && g.width == gmacAVX512 {
		ghashAVX512(&g.keys, &m.y, &buf[0], wideStep)
	} else {
		ghashVPCLMUL(g.last8(), &m.y, &buf[0], len(buf))
	}
	subtle.XORBytes(s.tag[:], m.y[:], m.mask[:])
}

// last8 are the keys of the 256-bit loop.
func (g *gmac) last8() *[ghashStep]byte { return (*[ghashStep]byte)(g.keys[wideStep-ghashStep:]) }

// ghashVPCLMUL adds n bytes to the GHASH y, n a positive multiple of ghashStep.
//
//go:noescape
func ghashVPCLMUL(keys *[ghashStep]byte, y *[16]byte, b *byte, n int)

// ghashAVX512 adds n bytes to the GHASH y, n a positive multiple of wideStep.
//
//go:noescape
func ghashAVX512(keys *[wideStep]byte, y *[16]byte, b *byte, n int)
