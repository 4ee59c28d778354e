//go:build !purego

package packet

import (
	"crypto/cipher"
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/cpu"
)

// ctr is AES-256-CTR with a new start block for every packet. [cipher.NewCTR]
// allocates a stream per packet; this does not, and it uses the widest AES
// instructions of the processor.
//
// The lowest 32 bits of the counter must not wrap: chapter 01 §5.5 clears their
// top bit at the start, and no packet has 2^31 blocks.
type ctr struct {
	width ctrWidth
	block cipher.Block // without AES instructions
	keys  [aesRoundKeys * 16]byte
}

// ctrWidth is the set of instructions in use.
type ctrWidth uint8

const (
	ctrNone   ctrWidth = iota
	ctrAESNI           // 8 blocks in parallel
	ctrVAES            // VAES on 256 bits, 16 blocks in parallel
	ctrAVX512          // VAES on 512 bits, 32 blocks in parallel
)

const (
	aesRoundKeys = 15  // of AES-256
	aesniStep    = 128 // bytes per round of the AES-NI loop
	vaesStep     = 256 // bytes per round of the 256-bit loop
)

// ctrScratch is the work space of ctr.
type ctrScratch struct {
	tail [vaesStep]byte
}

func (c *ctr) init(b cipher.Block, key []byte) {
	c.block = b
	switch {
	case cpu.X86.HasAVX512VAES && cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW && cpu.X86.HasBMI2 && cpu.X86.HasAES:
		c.width = ctrAVX512
	case hasVAES:
		c.width = ctrVAES
	case cpu.X86.HasAES && cpu.X86.HasSSE41:
		c.width = ctrAESNI
	default:
		return
	}
	expandAES(&c.keys, key)
}

// expandAES makes the round keys (FIPS 197 §5.2); words are little-endian.
func expandAES(keys *[aesRoundKeys * 16]byte, key []byte) {
	le := binary.LittleEndian
	copy(keys[:], key[:32])
	rcon := uint32(1)
	for i := 32; i < len(keys); i += 4 {
		t := le.Uint32(keys[i-4:])
		switch i % 32 {
		case 0:
			t = aesSubWord(bits.RotateLeft32(t, -8)) ^ rcon
			rcon <<= 1
		case 16:
			t = aesSubWord(t)
		}
		le.PutUint32(keys[i:], t^le.Uint32(keys[i-32:]))
	}
}

// encrypt encrypts one block in place.
func (c *ctr) encrypt(b *[16]byte) {
	if c.width == ctrNone {
		c.block.Encrypt(b[:], b[:])
		return
	}
	aesEncrypt(&c.keys, b, binary.LittleEndian.Uint64(b[:8]), binary.LittleEndian.Uint64(b[8:]))
}

// xor applies the key stream that starts at counter block s.ctr to b.
func (c *ctr) xor(b []byte, s *Scratch) {
	if len(b) == 0 {
		return
	}
	switch c.width {
	case ctrAVX512:
		ctrXORAVX512(&c.keys, &s.ctr, &b[0], len(b))
	case ctrVAES:
		if full := len(b) &^ (vaesStep - 1); full > 0 {
			ctrXORVAES(&c.keys, &s.ctr, &b[0], full)
			b = b[full:]
		}
		if len(b) > aesniStep { // one wide round takes no longer than a narrow one
			n := copy(s.stream.tail[:], b)
			ctrXORVAES(&c.keys, &s.ctr, &s.stream.tail[0], vaesStep)
			copy(b, s.stream.tail[:n])
			return
		}
		c.xorAESNI(b, s)
	case ctrAESNI:
		c.xorAESNI(b, s)
	default:
		cipher.NewCTR(c.block, s.ctr[:]).XORKeyStream(b, b)
	}
}

func (c *ctr) xorAESNI(b []byte, s *Scratch) {
	if full := len(b) &^ (aesniStep - 1); full > 0 {
		ctrXORAESNI(&c.keys, &s.ctr, &b[0], full)
		b = b[full:]
	}
	if len(b) > 0 {
		tail := s.stream.tail[:]
		n := copy(tail, b)
		ctrXORAESNI(&c.keys, &s.ctr, &tail[0], aesniStep)
		copy(b, tail[:n])
	}
}

// hasVAES reports whether the processor has AES on 256-bit registers; package cpu
// tells that only for those with AVX-512.
var hasVAES = cpu.X86.HasAVX2 && cpu.X86.HasAES && cpu.X86.HasSSE41 && cpuid7ECX()&(1<<9) != 0

// cpuid7ECX returns the feature bits in ECX of CPUID leaf 7, which a processor with
// AVX2 has.
func cpuid7ECX() uint32

// aesSubWord applies the AES S-box to every byte of x.
//
//go:noescape
func aesSubWord(x uint32) uint32

// aesEncrypt encrypts the block of two little-endian words. They come in registers: a
// block just written in parts would have to reach the cache first.
//
//go:noescape
func aesEncrypt(keys *[aesRoundKeys * 16]byte, dst *[16]byte, low, high uint64)

// ctrXORAESNI applies n bytes of key stream to b, n a positive multiple of
// aesniStep, and advances iv.
//
//go:noescape
func ctrXORAESNI(keys *[aesRoundKeys * 16]byte, iv *[16]byte, b *byte, n int)

// ctrXORVAES applies n bytes of key stream to b, n a positive multiple of
// vaesStep, and advances iv.
//
//go:noescape
func ctrXORVAES(keys *[aesRoundKeys * 16]byte, iv *[16]byte, b *byte, n int)

// ctrXORAVX512 applies n > 0 bytes of key stream to b. It leaves iv alone.
//
//go:noescape
func ctrXORAVX512(keys *[aesRoundKeys * 16]byte, iv *[16]byte, b *byte, n int)
