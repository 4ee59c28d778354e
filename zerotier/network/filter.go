package network

import (
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
)

// emitter sends the copies and redirections that rules order.
func (n *joined) emitter(w *vl1.Worker, out vl1.Out, now time.Time, f *vl2.FrameInfo) vl2.Emit {
	return func(to identity.Address, flags byte, data []byte) {
		payload := vl2.AppendExtFrame(nil, n.id, flags, f.DestinationMAC, f.SourceMAC, f.EtherType, data)
		n.l.peers.Send(w, out, now, to, packet.VerbExtFrame, payload, vl1.SendOpts{Compress: true})
	}
}

// filterIn judges a received frame by the rules.
func (n *joined) filterIn(s *state, src vl1.Source, out vl1.Out, now time.Time, from identity.Address, dst, source vl2.MAC, etherType uint16, data []byte) vl2.FilterResult {
	f := &vl2.FrameInfo{
		Inbound: true, Source: from, Destination: n.l.self, SourceMAC: source, DestinationMAC: dst, EtherType: etherType, Data: data,
	}
	var record *vl2.Membership
	if m := n.member(from); m != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		record = &m.record
	}
	return vl2.FilterInbound(f, s.cfg, record, n.emitter(src.Worker, out, now, f))
}

// filterOut judges a frame of the host by the rules; to is 0 if nobody in
// particular gets it.
func (n *joined) filterOut(s *state, w *vl1.Worker, out vl1.Out, now time.Time, to identity.Address, dst, source vl2.MAC, etherType uint16, data []byte, second bool) bool {
	f := &vl2.FrameInfo{Source: n.l.self, Destination: to, SourceMAC: source, DestinationMAC: dst, EtherType: etherType, Data: data}
	var record *vl2.Membership
	if m := n.member(to); m != nil {
		m.mu.Lock()
		defer m.mu.Unlock()
		record = &m.record
	}
	return vl2.FilterOutbound(f, s.cfg, record, second, n.emitter(w, out, now, f))
}
