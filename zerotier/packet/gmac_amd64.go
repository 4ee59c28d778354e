//go:build !purego

package packet

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"

	"golang.org/x/sys/cpu"
)

// gmac is GMAC with 96-bit nonces. [cipher.NewGCM] has it as the sealing of
// additional data alone; the wide forms multiply several blocks with one instruction.
type gmac struct {
	keys  ghashKeys
	aes   [aesRoundKeys * 16]byte
	width gmacWidth
	aead  cipher.AEAD // if not wide
}

// ghashKeys are H^17 to H^1 and zeros, so that four may be read from each place.
type ghashKeys [ghashPowers*16 + 64]byte

const (
	ghashPowers = 17
	ghashStep   = 128 // bytes per round of the 256-bit loop
)

// gmacWidth is the set of instructions in use.
type gmacWidth uint8

const (
	gmacNone   gmacWidth = iota
	gmacVEX              // VPCLMULQDQ on 256 bits, 8 blocks at a time
	gmacAVX512           // VPCLMULQDQ on 512 bits, 16 blocks at a time
)

// gmacScratch is the work space of gmac.
type gmacScratch struct {
	tail [2 * ghashStep]byte
	y    [16]byte
}

// widestGMAC is what the processor can do.
func widestGMAC() gmacWidth {
	switch {
	case hasVAES && cpu.X86.HasAVX512VPCLMULQDQ && cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasBMI2:
		return gmacAVX512
	case hasVAES && cpuid7ECX()&(1<<10) != 0:
		return gmacVEX
	}
	return gmacNone
}

func (g *gmac) init(key []byte) error { return g.initWidth(widestGMAC(), key) }

func (g *gmac) initWidth(width gmacWidth, key []byte) error {
	if g.width = width; width != gmacNone {
		expandAES(&g.aes, key)
		g.expand()
		return nil
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		return err
	}
	g.aead, err = cipher.NewGCM(b)
	return err
}

// expand makes the keys H^17 to H^1, each divided by x, which makes up for the shift
// of a product of reflected polynomials.
func (g *gmac) expand() {
	var h [16]byte
	aesEncrypt(&g.aes, &h, 0, 0)
	first := gf128{binary.BigEndian.Uint64(h[:8]), binary.BigEndian.Uint64(h[8:])}
	power := first
	for i := 16 * (ghashPowers - 1); i >= 0; i -= 16 {
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
	le := binary.LittleEndian
	aesEncrypt(&g.aes, &s.tag, le.Uint64(s.nonce[:]), uint64(le.Uint32(s.nonce[8:]))|1<<56)
	if g.width == gmacAVX512 && len(data) > 0 {
		ghashAVX512(&g.keys, &s.tag, &data[0], len(data))
		return
	}
	m := &s.mac
	m.y = [16]byte{}
	bitLen := uint64(len(data)) * 8
	if full := len(data) &^ (ghashStep - 1); full > 0 {
		ghashVPCLMUL(g.last8(), &m.y, &data[0], full)
		data = data[full:]
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
	ghashVPCLMUL(g.last8(), &m.y, &buf[0], len(buf))
	subtle.XORBytes(s.tag[:], s.tag[:], m.y[:])
}

// last8 are the keys of the 256-bit loop.
func (g *gmac) last8() *[ghashStep]byte {
	return (*[ghashStep]byte)(g.keys[16*ghashPowers-ghashStep:])
}

// ghashVPCLMUL adds n bytes to the GHASH y, n a positive multiple of ghashStep.
//
//go:noescape
func ghashVPCLMUL(keys *[ghashStep]byte, y *[16]byte, b *byte, n int)

// ghashAVX512 adds the GHASH of n > 0 bytes, with their length, to tag.
//
//go:noescape
func ghashAVX512(keys *ghashKeys, tag *[16]byte, b *byte, n int)
