package identity

import (
	"bytes"
	"crypto/sha512"
	"testing"

	"ztgate/zerotier/internal/testvec"
)

func TestAddressHash(t *testing.T) {
	var v struct {
		Cases []struct {
			PublicKey  testvec.Hex `json:"public_key"`
			AfterFill  testvec.Hex `json:"memory_sha512_after_fill"`
			AtEnd      testvec.Hex `json:"memory_sha512_at_end"`
			Digest     testvec.Hex
			Iterations []struct {
				Iteration   int
				DigestWord  int         `json:"digest_word"`
				MemoryWord  int         `json:"memory_word"`
				DigestAfter testvec.Hex `json:"digest_after"`
			}
		}
	}
	testvec.Load(t, "address-hash.json", &v)
	count := testvec.Count(t, "address-hash.json", "cases")
	for _, tt := range v.Cases {
		count.Judge()
		var buf hashBuffer
		seen := 0
		got := buf.sum((*[64]byte)(tt.PublicKey), func(iteration, dw, mw int, digest []byte) {
			for _, want := range tt.Iterations {
				if want.Iteration != iteration {
					continue
				}
				seen++
				if dw != want.DigestWord || mw != want.MemoryWord || !bytes.Equal(digest, want.DigestAfter) {
					t.Errorf("iteration %d: words %d %d digest %x", iteration, dw, mw, digest)
				}
			}
		})
		if seen != len(tt.Iterations) {
			t.Errorf("saw %d of %d iterations", seen, len(tt.Iterations))
		}
		if !bytes.Equal(got[:], tt.Digest) {
			t.Errorf("digest %x, want %x", got, tt.Digest)
		}
		if sum := sha512.Sum512(buf.table[:]); !bytes.Equal(sum[:], tt.AtEnd) {
			t.Errorf("table at end differs")
		}
		first := sha512.Sum512(tt.PublicKey)
		ks := keystream{key: [32]byte(first[:32])}
		copy(ks.counter[:8], first[32:40])
		buf.fill(&ks)
		if sum := sha512.Sum512(buf.table[:]); !bytes.Equal(sum[:], tt.AfterFill) {
			t.Errorf("table after fill differs")
		}
	}
}
