package network

import (
	"sync"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// accepts reports whether the rules accept all frames of an ethertype and do
// nothing else with them, so that they need not be asked.
func (s *state) accepts(etherType uint16) bool {
	switch etherType {
	case vl2.EtherTypeIPv4:
		return s.acceptIPv4
	case vl2.EtherTypeIPv6:
		return s.acceptIPv6
	case vl2.EtherTypeARP:
		return s.acceptARP
	}
	return s.acceptAll
}

// filterIn judges a received frame by the rules and sends the copies they order.
// It allocates nothing unless there are some.
func (n *joined) filterIn(s *state, src vl1.Source, out vl1.Out, now time.Time, from identity.Address, dst, source vl2.MAC, etherType uint16, data []byte) vl2.FilterResult {
	if s.accepts(etherType) {
		return vl2.FilterAccept
	}
	f := vl2.FrameInfo{
		Inbound: true, Source: from, Destination: n.l.self, SourceMAC: source, DestinationMAC: dst, EtherType: etherType, Data: data,
	}
	d := vl2.Inbound(&f, s.cfg, n.record(from))
	if len(d.Diversions()) > 0 {
		n.divert(s, src.Worker, out, now, &f, &d)
	}
	return d.Result
}

// filterOut judges a frame of the host by the rules; to is 0 if nobody in
// particular gets it. second is as in [vl2.Outbound].
func (n *joined) filterOut(s *state, w *vl1.Worker, out vl1.Out, now time.Time, to identity.Address, dst, source vl2.MAC, etherType uint16, data []byte, second bool) bool {
	if s.accepts(etherType) {
		return true
	}
	f := vl2.FrameInfo{Source: n.l.self, Destination: to, SourceMAC: source, DestinationMAC: dst, EtherType: etherType, Data: data}
	d := vl2.Outbound(&f, s.cfg, n.record(to), second)
	if len(d.Diversions()) > 0 {
		n.divert(s, w, out, now, &f, &d)
	}
	return d.Result != vl2.FilterDrop
}

// record returns what we hold of a member's credentials, nil for nothing.
func (n *joined) record(a identity.Address) *vl2.Membership {
	if a == 0 {
		return nil
	}
	if m := n.member(a); m != nil {
		return m.record.Load()
	}
	return nil
}

var payloads = sync.Pool{New: func() any { return new([]byte) }}

// divert sends the copies and redirections that rules order. There is a limit per
// frame source: rules of three nodes can form a ring.
func (n *joined) divert(s *state, w *vl1.Worker, out vl1.Out, now time.Time, f *vl2.FrameInfo, d *vl2.Decision) {
	buf := payloads.Get().(*[]byte)
	defer payloads.Put(buf)
	for _, x := range d.Diversions() {
		if x.To.Reserved() || x.To == n.l.self || !n.l.diverts.Take(f.Source, now) || !n.maySendTo(w, out, now, s, x.To) {
			n.l.stats.divertsRefused.Add(1)
			continue
		}
		n.l.stats.diverted.Add(1)
		*buf = vl2.AppendExtFrame((*buf)[:0], n.id, x.Flags, f.DestinationMAC, f.SourceMAC, f.EtherType, f.Data[:x.Length])
		n.l.peers.Send(w, out, now, x.To, packet.VerbExtFrame, *buf, vl1.SendOpts{Compress: true})
	}
}
