package network_test

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"ztgate/zerotier/packet"
	"ztgate/zerotier/simnet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// table has size entries of which only the last two decide about a UDP frame.
func table(size int) []vl2.Rule {
	switch size {
	case 1:
		return []vl2.Rule{{Type: vl2.ActionAccept}}
	case 5: // the default of a new network
		return []vl2.Rule{
			{Type: vl2.MatchEtherType, Not: true, Field: []byte{8, 0}}, {Type: vl2.MatchEtherType, Not: true, Field: []byte{8, 6}},
			{Type: vl2.MatchEtherType, Not: true, Field: []byte{0x86, 0xdd}}, {Type: vl2.ActionDrop}, {Type: vl2.ActionAccept},
		}
	}
	var out []vl2.Rule
	for i := 0; len(out)+4 <= size; i++ {
		out = append(out, vl2.Rule{Type: vl2.MatchDestinationPort, Field: binary.BigEndian.AppendUint16([]byte{byte(i >> 8), byte(i)}, uint16(i))},
			vl2.Rule{Type: vl2.ActionDrop})
	}
	return append(out, vl2.Rule{Type: vl2.MatchIPProtocol, Field: []byte{17}}, vl2.Rule{Type: vl2.ActionAccept})
}

// line is two members that know each other, with a table of rules, and a batch of
// frames from one to the other.
type line struct {
	n     *simnet.Net
	a, b  *host
	id    vl2.NetworkID
	clean [][]byte
	bufs  [][]byte
	sizes []int
}

const lineBatch = 64

func newLine(t testing.TB, size int) *line {
	n, r, a, b, id := lab(t)
	r.ctl.authorized[a.id.Address()], r.ctl.authorized[b.id.Address()] = true, true
	r.ctl.config = func(c *vl2.NetworkConfig) { c.Rules = table(size) }
	a.join(t, n, id)
	b.join(t, n, id)
	n.Run(3 * time.Second)
	l := &line{n: n, a: a, b: b, id: id}
	frame := make([]byte, 64+14+1372)
	src, dst := vl2.MACOf(id, a.id.Address()), vl2.MACOf(id, b.id.Address())
	copy(frame[64:], dst[:])
	copy(frame[70:], src[:])
	frame[76], frame[78], frame[87] = 8, 0x45, 17
	binary.BigEndian.PutUint16(frame[64+14+22:], 0xffff)
	for range lineBatch {
		l.clean = append(l.clean, frame)
		l.bufs = append(l.bufs, append([]byte(nil), frame...))
		l.sizes = append(l.sizes, len(frame)-64)
	}
	for range 3 {
		l.write(a.port)
		n.Run(5 * time.Second)
	}
	if len(b.got) == 0 {
		t.Fatal("no frame arrived")
	}
	return l
}

func (l *line) write(out vl1.Out) int {
	for i := range l.bufs {
		copy(l.bufs[i][60:108], l.clean[i][60:108])
	}
	return l.a.layer.WriteFrames(l.a.tx.Begin(out, l.n.Now), l.id, l.bufs, l.sizes, 64)
}

// receive hands B a packet as the peer layer does, from A.
func (l *line) receive(p packet.Packet) {
	l.b.layer.HandlePacket(l.b.w.Begin(nil, l.n.Now), l.b.core.Peer(l.a.id.Address()), p, vl1.Source{})
}

func (l *line) packet() packet.Packet {
	p := packet.Packet(append(append(make([]byte, packet.HeaderLen), l.id.Append(nil)...), l.clean[0][76:]...))
	packet.PutHeader(p, 1, l.b.id.Address(), l.a.id.Address(), packet.VerbFrame)
	return p
}

func TestRulesDoNotAllocate(t *testing.T) {
	for _, size := range []int{5, 1024} {
		l := newLine(t, size)
		out := &sink{}
		l.write(out)
		if got := testing.AllocsPerRun(20, func() {
			if l.write(out) != lineBatch {
				t.Fatal("not accepted")
			}
		}); got != 0 {
			t.Errorf("%d rules: %v allocations a batch outbound", size, got)
		}
		p := l.packet()
		before := l.b.layer.Stats().FramesIn
		if got := testing.AllocsPerRun(60, func() { l.receive(p) }); got != 0 {
			t.Errorf("%d rules: %v allocations a frame inbound", size, got)
		}
		if got := l.b.layer.Stats().FramesIn - before; got != 61 {
			t.Errorf("%d rules: %d frames delivered", size, got)
		}
		l.b.layer.Flush(l.b.nw)
	}
}

// BenchmarkRules is the network layer's whole work on a received frame, per size of
// the rules table; 1 is one ACCEPT, 5 the default of new networks.
func BenchmarkRules(b *testing.B) {
	for _, size := range []int{1, 5, 64, 1024} {
		l := newLine(b, size)
		p := l.packet()
		l.b.discard = true
		b.Run(fmt.Sprintf("rules=%d", size), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				l.receive(p)
			}
		})
	}
}
