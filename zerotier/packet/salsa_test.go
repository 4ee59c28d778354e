package packet

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// checkSalsa compares a run from a given block on with the scalar code.
func checkSalsa(t *testing.T, key [32]byte, iv [8]byte, skip int, data []byte) {
	t.Helper()
	var want, got salsa12
	want.init(&key, iv[:])
	got.init(&key, iv[:])
	var ks [64]byte
	for range skip {
		want.block(&ks)
		got.block(&ks)
	}
	plain := bytes.Clone(data)
	for i := range plain {
		if i%64 == 0 {
			want.block(&ks)
		}
		plain[i] ^= ks[i%64]
	}
	const margin = 64
	buf := bytes.Repeat([]byte{0x5a}, len(data)+2*margin)
	copy(buf[margin:], data)
	got.xor(buf[margin:margin+len(data)], &ks)
	if !bytes.Equal(buf[margin:margin+len(data)], plain) {
		t.Fatalf("%d bytes from block %d: wrong key stream", len(data), skip)
	}
	for _, b := range append(bytes.Clone(buf[:margin]), buf[margin+len(data):]...) {
		if b != 0x5a {
			t.Fatalf("%d bytes: wrote outside the buffer", len(data))
		}
	}
	if got.state != want.state {
		t.Fatalf("%d bytes from block %d: counter %d, want %d", len(data), skip, got.state[8], want.state[8])
	}
}

func TestSalsa(t *testing.T) {
	r := rand.New(rand.NewChaCha8([32]byte{3}))
	data := make([]byte, MaxPacket)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	var key [32]byte
	var iv [8]byte
	for n := range 2100 {
		copy(key[:], data[n:])
		copy(iv[:], data[n+40:])
		checkSalsa(t, key, iv, n%3, data[:n])
	}
	checkSalsa(t, key, iv, 1, data)
}

func FuzzSalsa(f *testing.F) {
	f.Add(make([]byte, 40), uint8(1), make([]byte, 700))
	f.Fuzz(func(t *testing.T, keyIV []byte, skip uint8, data []byte) {
		if len(keyIV) < 40 || len(data) > MaxPacket {
			return
		}
		checkSalsa(t, [32]byte(keyIV), [8]byte(keyIV[32:]), int(skip%8), data)
	})
}
