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
	var g gmac
	if err := g.init(block); err != nil {
		t.Fatal(err)
	}
	s := &Scratch{nonce: [12]byte(nonce)}
	before := bytes.Clone(data)
	g.sum(data, s)
	if want := aead.Seal(nil, nonce, nil, data); !bytes.Equal(s.tag[:], want) {
		t.Fatalf("%d bytes: tag %x, want %x", len(data), s.tag, want)
	}
	if !bytes.Equal(data, before) {
		t.Fatalf("%d bytes: data changed", len(data))
	}
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
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	data := make([]byte, 1411)
	b.Run("this", func(b *testing.B) {
		var g gmac
		if err := g.init(block); err != nil {
			b.Fatal(err)
		}
		s := new(Scratch)
		b.SetBytes(int64(len(data)))
		b.ReportAllocs()
		for b.Loop() {
			g.sum(data, s)
		}
	})
	b.Run("cipher", func(b *testing.B) {
		g, err := cipher.NewGCM(block)
		if err != nil {
			b.Fatal(err)
		}
		tag, nonce := make([]byte, 0, 16), make([]byte, 12)
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			g.Seal(tag, nonce, nil, data)
		}
	})
}
