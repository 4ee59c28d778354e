package identity

import (
	"crypto/sha512"
	"encoding/binary"
	"sync"

	"golang.org/x/crypto/salsa20/salsa" //lint:ignore SA1019 the hash needs the bare key stream
)

// Sizes of the memory-hard address hash (chapter 01 §2.2).
const (
	hashMemory    = 2 << 20
	hashWords     = hashMemory / 8
	keystreamStep = 64 << 10 // produced at once: per-block calls cost twice as much
)

// hashBuffer is the work space of one address hash.
type hashBuffer struct {
	table  [hashMemory]byte
	stream [keystreamStep]byte
}

var hashBuffers = sync.Pool{New: func() any { return new(hashBuffer) }}

// keystream yields Salsa20/20 key stream in large pieces.
type keystream struct {
	key     [32]byte
	counter [16]byte // IV, then block counter
	block   uint64
}

func (k *keystream) next(dst []byte) {
	binary.LittleEndian.PutUint64(k.counter[8:], k.block)
	clear(dst)
	salsa.XORKeyStream(dst, dst, &k.counter, &k.key)
	k.block += uint64(len(dst) / 64)
}

// addressHash computes the digest from which an address is derived. It takes
// 12 to 35 ms and 2 MiB.
func addressHash(public *[publicLen]byte) [sha512.Size]byte {
	buf := hashBuffers.Get().(*hashBuffer)
	defer hashBuffers.Put(buf)
	return buf.sum(public, nil)
}

// sum runs the hash; trace, if not nil, sees the digest after every swap.
func (b *hashBuffer) sum(public *[publicLen]byte, trace func(iteration, digestWord, memoryWord int, digest []byte)) [sha512.Size]byte {
	digest := sha512.Sum512(public[:])
	ks := keystream{}
	copy(ks.key[:], digest[:32])
	copy(ks.counter[:8], digest[32:40])
	b.fill(&ks)
	for w := 0; w < hashWords; {
		ks.next(b.stream[:])
		for off := 0; off < keystreamStep; off += 64 {
			x := int(binary.BigEndian.Uint64(b.table[8*w:]) % 8)
			y := int(binary.BigEndian.Uint64(b.table[8*(w+1):]) % hashWords)
			d, t := digest[8*x:8*x+8], b.table[8*y:8*y+8]
			dv, tv := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint64(t)
			binary.LittleEndian.PutUint64(d, tv)
			binary.LittleEndian.PutUint64(t, dv)
			xor64(digest[:], b.stream[off:off+64])
			w += 2
			if trace != nil {
				trace(w/2, x, y, digest[:])
			}
		}
	}
	return digest
}

// fill makes every 64-byte block the previous one xor the next key stream block.
func (b *hashBuffer) fill(ks *keystream) {
	var prev [64]byte
	for i := 0; i < hashMemory; i += keystreamStep {
		part := b.table[i : i+keystreamStep]
		ks.next(part)
		for off := 0; off < keystreamStep; off += 64 {
			xor64(part[off:off+64], prev[:])
			copy(prev[:], part[off:off+64])
		}
	}
}

func xor64(dst, src []byte) {
	_, _ = dst[63], src[63]
	for i := 0; i < 64; i += 8 {
		binary.LittleEndian.PutUint64(dst[i:], binary.LittleEndian.Uint64(dst[i:])^binary.LittleEndian.Uint64(src[i:]))
	}
}
