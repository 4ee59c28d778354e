package packet

import (
	"bytes"
	"net/netip"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/internal/testvec"
)

// Packets are cut at small MTUs as the reference does it, but never into more datagrams than
// a receiver takes, and are put together again whatever the sender's MTU.
func TestSmallMTU(t *testing.T) {
	var v struct {
		Cases []struct {
			MTU       int         `json:"effective_mtu"`
			Size      int         `json:"packet_size"`
			Session   testvec.Hex `json:"session_key"`
			Plain     testvec.Hex `json:"plaintext_from_verb"`
			Lengths   []int       `json:"datagram_lengths"`
			Datagrams []testvec.Hex
			Accepted  bool `json:"accepted_by_receiver"`
		}
	}
	testvec.Load(t, "mtu-510.json", &v)
	count := testvec.Count(t, "mtu-510.json", "cases")
	s := new(Scratch)
	for _, c := range v.Cases {
		count.Judge()
		total := Datagrams(c.Size, c.MTU)
		if total != len(c.Lengths) || c.Accepted != (total <= MaxFragments) {
			t.Errorf("%d bytes at %d: %d datagrams, want %d", c.Size, c.MTU, total, len(c.Lengths))
		}
		if !c.Accepted {
			continue // never sent
		}
		var r Reassembler
		now, src := time.Unix(1, 0), netip.MustParseAddr("192.0.2.1")
		whole := []byte(bytes.Clone(c.Datagrams[0]))
		for i, d := range c.Datagrams[1:] {
			f, err := ParseFragment(bytes.Clone(d))
			if err != nil {
				t.Fatalf("%d bytes at %d: %v", c.Size, c.MTU, err)
			}
			b, ok := r.AddFragment(now, src, f, nil)
			if i == 0 {
				b, ok = r.AddHead(now, src, Packet(whole), nil)
			}
			if ok != (i == len(c.Datagrams)-2) {
				t.Fatalf("%d bytes at %d: whole after %d datagrams: %v", c.Size, c.MTU, i+2, ok)
			}
			if ok {
				whole = b
			}
		}
		p := Packet(bytes.Clone(whole))
		if err := NewKeys([48]byte(c.Session)).Open(p, s); err != nil || !bytes.Equal(p[HeaderLen-1:], c.Plain) {
			t.Errorf("%d bytes at %d: %v", c.Size, c.MTU, err)
		}
		var lengths []int
		var hdr [FragmentHeaderLen]byte
		var again []byte
		Split(Packet(whole), c.MTU, false, &hdr, func(head, data []byte) {
			again = append(append(again, head...), data...)
			lengths = append(lengths, len(head)+len(data))
		})
		var want []byte
		for _, d := range c.Datagrams {
			want = append(want, d...)
		}
		if !slices.Equal(lengths, c.Lengths) || !bytes.Equal(again, want) {
			t.Errorf("%d bytes at %d: cut into %v, want %v", c.Size, c.MTU, lengths, c.Lengths)
		}
		Split(Packet(whole), c.MTU, true, &hdr, func(head, data []byte) {
			if len(head)+len(data) > c.MTU {
				t.Errorf("%d bytes at %d: a datagram of %d", c.Size, c.MTU, len(head)+len(data))
			}
		})
	}
}
