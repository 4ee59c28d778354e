package vl2_test

import (
	"bytes"
	"crypto/rand"
	"testing"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
)

// Chunks fit the packets that reach a member, and make the same dictionary whatever
// their size.
func TestChunkLimit(t *testing.T) {
	ctrl, err := identity.Generate(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	n := vl2.NetworkID(uint64(ctrl.Address())<<24 | 1)
	dict := bytes.Repeat([]byte("0123456789abcdef"), 3000)
	for limit, chunks := range map[int]int{0: 5, packet.MaxPacket: 5, 3677: 14, 1: 47} {
		payloads, err := vl2.AppendChunks(ctrl, n, dict, 7, limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(payloads) != chunks {
			t.Errorf("limit %d: %d chunks, want %d", limit, len(payloads), chunks)
		}
		var all vl2.Assembler
		var got []byte
		for _, p := range payloads {
			if size := packet.HeaderLen + 9 + len(p); limit > 2000 && size > limit {
				t.Errorf("limit %d: a packet of %d bytes", limit, size)
			}
			c, err := vl2.ParseChunk(p)
			if err != nil || !c.Verify(ctrl) {
				t.Fatal(err)
			}
			if d, _ := all.Add(time.Unix(1, 0), c); d != nil {
				got = d
			}
		}
		if !bytes.Equal(got, dict) {
			t.Errorf("limit %d: %d bytes put together", limit, len(got))
		}
	}
}
