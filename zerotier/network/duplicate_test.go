package network_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// Only what a controller answers newly, several times and not all at once, tells of another
// node with our identity.
func TestSignsOfDuplicate(t *testing.T) {
	type sign struct {
		from *seat
		p    packet.Packet
	}
	for name, tt := range map[string]struct {
		every time.Duration
		turns func(signs []sign, other *seat) []sign
		want  bool
		other bool // they are for another member
	}{
		"three":           {3 * time.Second, func(l []sign, _ *seat) []sign { return l }, true, false},
		"all at once":     {time.Second, func(l []sign, _ *seat) []sign { return l }, false, false},
		"two":             {6 * time.Second, func(l []sign, _ *seat) []sign { return l[:2] }, false, false},
		"the same again":  {3 * time.Second, func(l []sign, _ *seat) []sign { return slices.Concat(l[:1], l[:1], l[:1], l[:1]) }, false, false},
		"older and older": {3 * time.Second, func(l []sign, _ *seat) []sign { slices.Reverse(l); return l }, false, false},
		"from a member": {3 * time.Second, func(l []sign, other *seat) []sign {
			for i := range l {
				l[i].from = other
			}
			return l
		}, false, false},
		"with a bad signature": {3 * time.Second, func(l []sign, _ *seat) []sign {
			for i := range l {
				l[i].p[len(l[i].p)-1] ^= 1
			}
			return l
		}, false, false},
		"for another member": {3 * time.Second, func(l []sign, _ *seat) []sign { return l }, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBoard(t, 2)
			x, y := b.order[1], b.order[2]
			asks := x
			if tt.other {
				asks = y
			}
			n := b.create(nil)
			b.join(n, x, y)
			var signs []sign
			for i := range 3 {
				b.run(1100*time.Millisecond, 100*time.Millisecond)
				b.ctl.HandleRequest(asks.id, packet.ID(1000+i), n, vl2.RequestMetadata())
				b.ctl.Work(b.now)
				for _, q := range b.queue {
					if q.to == asks.address() && q.p.Verb() == packet.VerbOK {
						signs = append(signs, sign{b.nodes[q.from], q.p})
					}
				}
				b.queue = nil
			}
			if len(signs) != 3 {
				t.Fatalf("%d answers", len(signs))
			}
			for _, s := range tt.turns(signs, y) {
				x.layer.HandlePacket(x.worker.Begin(nil, b.now), s.from.peer, packet.Packet(bytes.Clone(s.p)), vl1.Source{Unasked: true})
				b.run(tt.every, 100*time.Millisecond)
			}
			got, _ := x.layer.Network(n)
			if !got.Duplicate.IsZero() != tt.want {
				t.Errorf("noticed at %v, want %v", got.Duplicate, tt.want)
			}
			b.run(6*time.Minute, time.Second)
			if got, _ := x.layer.Network(n); !got.Duplicate.IsZero() {
				t.Error("still noticed long after")
			}
		})
	}
}
