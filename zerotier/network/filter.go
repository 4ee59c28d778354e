package network

import (
	"sync"

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
func (n *joined) filterIn(w *vl1.Worker, s *state, f *vl2.FrameInfo) vl2.FilterResult {
	if s.accepts(f.EtherType) {
		return vl2.FilterAccept
	}
	d := vl2.Inbound(f, s.cfg, n.record(f.Source))
	if len(d.Diversions()) > 0 {
		n.divert(w, s, f, &d)
	}
	return d.Result
}

// filterOut judges a frame of the host by the rules; its destination is 0 if nobody
// in particular gets it. second is as in [vl2.Outbound].
func (n *joined) filterOut(w *vl1.Worker, s *state, f *vl2.FrameInfo, second bool) bool {
	if s.accepts(f.EtherType) {
		return true
	}
	d := vl2.Outbound(f, s.cfg, n.record(f.Destination), second)
	if len(d.Diversions()) > 0 {
		n.divert(w, s, f, &d)
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
func (n *joined) divert(w *vl1.Worker, s *state, f *vl2.FrameInfo, d *vl2.Decision) {
	buf := payloads.Get().(*[]byte)
	defer payloads.Put(buf)
	for _, x := range d.Diversions() {
		if x.To.Reserved() || x.To == n.l.self || !n.l.diverts.Take(f.Source, w.Now()) || !n.maySendTo(w, s, x.To) {
			n.l.stats.divertsRefused.Add(1)
			continue
		}
		n.l.stats.diverted.Add(1)
		*buf = vl2.AppendExtFrame((*buf)[:0], n.id, x.Flags, f.DestinationMAC, f.SourceMAC, f.EtherType, f.Data[:x.Length])
		n.l.peers.Send(w, x.To, packet.VerbExtFrame, *buf, vl1.SendOpts{Compress: true})
	}
}
