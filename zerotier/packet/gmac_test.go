package packet

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"math/rand/v2"
	"testing"
)

// checkGMAC compares with crypto/cipher.
func checkGMAC(t *testing.T, key, nonce, data []byte) {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	want := aead.Seal(nil, nonce, nil, data)
	before := bytes.Clone(data)
	for _, variant := range gmacVariants() {
		s := &Scratch{nonce: [12]byte(nonce)}
		variant.make(key).sum(data, s)
		if !bytes.Equal(s.tag[:], want) {
			t.Fatalf("%s: %d bytes: tag %x, want %x", variant.name, len(data), s.tag, want)
		}
		if !bytes.Equal(data, before) {
			t.Fatalf("%s: %d bytes: data changed", variant.name, len(data))
		}
	}
}

type gmacVariant struct {
	name string
	make func(key []byte) *gmac
}

func TestGMAC(t *testing.T) {
	r := rand.NewChaCha8([32]byte{3})
	key, nonce, data := make([]byte, 32), make([]byte, 12), make([]byte, MaxPacket)
	_, _ = r.Read(data)
	for n := range 1600 {
		_, _ = r.Read(nonce)
		if n%16 == 0 {
			_, _ = r.Read(key)
		}
		checkGMAC(t, key, nonce, data[:n])
	}
	for i := range data {
		data[i] = 0xff
	}
	checkGMAC(t, key, nonce, data)
	checkGMAC(t, key, nonce, make([]byte, MaxPacket))
}

func FuzzGMAC(f *testing.F) {
	f.Add(make([]byte, 32), make([]byte, 12), make([]byte, 300))
	f.Fuzz(func(t *testing.T, key, nonce, data []byte) {
		if len(key) == 32 && len(nonce) == 12 && len(data) <= MaxPacket {
			checkGMAC(t, key, nonce, data)
		}
	})
}

func BenchmarkGMAC(b *testing.B) {
	data := make([]byte, 1411)
	for _, variant := range gmacVariants() {
		b.Run(variant.name, func(b *testing.B) {
			g, s := variant.make(make([]byte, 32)), new(Scratch)
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				g.sum(data, s)
			}
		})
	}
}
