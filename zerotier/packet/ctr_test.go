package packet

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"math/rand/v2"
	"testing"
)

// checkCTR compares one run with crypto/cipher; the bytes around the buffer must
// stay as they are.
func checkCTR(t *testing.T, c *ctr, key []byte, iv [16]byte, data []byte) {
	t.Helper()
	iv[12] &= 0x7f
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, len(data))
	cipher.NewCTR(block, iv[:]).XORKeyStream(want, data)

	const margin = 64
	buf := bytes.Repeat([]byte{0xa5}, len(data)+2*margin)
	copy(buf[margin:], data)
	s := &Scratch{ctr: iv}
	c.xor(buf[margin:margin+len(data)], s)
	if !bytes.Equal(buf[margin:margin+len(data)], want) {
		t.Fatalf("%d bytes, start %x: wrong key stream", len(data), iv)
	}
	for _, b := range append(bytes.Clone(buf[:margin]), buf[margin+len(data):]...) {
		if b != 0xa5 {
			t.Fatalf("%d bytes: wrote outside the buffer", len(data))
		}
	}
}

func TestCTR(t *testing.T) {
	r := rand.New(rand.NewChaCha8([32]byte{1}))
	random := func(b []byte) {
		for i := range b {
			b[i] = byte(r.Uint32())
		}
	}
	var key [32]byte
	var iv [16]byte
	data := make([]byte, MaxPacket)
	random(data)
	for _, variant := range ctrVariants() {
		t.Run(variant.name, func(t *testing.T) {
			for n := range 2100 {
				if n%50 == 0 {
					random(key[:])
				}
				random(iv[:])
				checkCTR(t, variant.make(key[:]), key[:], iv, data[:n])
			}
			// The counter carries through all four bytes, and no further.
			copy(iv[12:], []byte{0x7f, 0xff, 0xff, 0xff - 200})
			checkCTR(t, variant.make(key[:]), key[:], iv, data[:200*16])
			copy(iv[12:], []byte{0x00, 0xff, 0xff, 0xf0})
			checkCTR(t, variant.make(key[:]), key[:], iv, data)
		})
	}
}

func FuzzCTR(f *testing.F) {
	f.Add(make([]byte, 32), make([]byte, 16), make([]byte, 700))
	f.Fuzz(func(t *testing.T, key, iv, data []byte) {
		if len(key) < 32 || len(iv) < 16 || len(data) > MaxPacket {
			return
		}
		for _, variant := range ctrVariants() {
			checkCTR(t, variant.make(key[:32]), key[:32], [16]byte(iv), data)
		}
	})
}

type ctrVariant struct {
	name string
	make func(key []byte) *ctr
}

func newCTR(key []byte) *ctr {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	c := new(ctr)
	c.init(block, key)
	return c
}

func TestNoAllocsAES(t *testing.T) {
	k, s := testKeys(), new(Scratch)
	if k.ctr.allocates() {
		t.Skip("no AES instructions")
	}
	for _, n := range []int{HeaderLen, 100, 1432, 2838, MaxPacket} {
		p := make(Packet, n)
		if got := testing.AllocsPerRun(100, func() {
			PutHeader(p, 7, 1, 2, VerbFrame)
			k.Seal(p, SuiteAES, s)
			if k.Open(p, s) != nil {
				t.Fatal("open failed")
			}
		}); got != 0 {
			t.Errorf("%d bytes: %v allocations", n, got)
		}
	}
}

func BenchmarkCTR(b *testing.B) {
	for _, variant := range ctrVariants() {
		b.Run(variant.name, func(b *testing.B) {
			c, s := variant.make(make([]byte, 32)), new(Scratch)
			data := make([]byte, 1411)
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				c.xor(data, s)
			}
		})
	}
}
