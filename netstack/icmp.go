package netstack

import (
	"encoding/binary"
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
)

// icmpError translates an ICMP error about a packet of a flow, or hands it to our
// own stack.
func (w *worker) icmpError(side Side, at *attachment, v *ipkt.View) {
	e, s := w.e, w.set
	src, dst := v.Source(), v.Destination()
	// Any router on the flow's way may have sent it (RFC 4787 REQ-12 a): impossible sources
	// are refused, and members that the flow's packets don't go to.
	bad := drop(0)
	switch {
	case v.Proto == ipkt.ICMP && v.ICMPType == 4: // source quench (RFC 6633)
		bad = dropICMPType
	case impossibleMTU(v):
		bad = dropErrorUnlikely
	case s.isOwnOn(at, src):
		bad = dropSpoofed
	case !forwardable(dst):
		bad = dropForbidden
	case !forwardable(src):
		bad = dropSource
	case at == nil:
		if bad = s.checkVPC(src, dst); bad == dropSource && s.isBehind(dst) && s.isBeyond(src) {
			bad = 0 // from the way of a hidden host's packets
		}
	case !at.hop(src).IsValid() && s.likeVPC(at, src):
		bad = dropSpoofed
	}
	if bad != 0 {
		w.drop(bad)
		return
	}
	f, dir, verdict := e.table.TranslateError(w.now, side, v)
	if f == nil {
		if s.isOwnOn(at, dst) {
			if at != nil && !w.onTheWay(at, v) {
				w.drop(dropErrorMember)
				return
			}
			w.toLocal(at, v)
			return
		}
		w.drop(dropNoFlow)
		return
	}
	if at != nil && f.Slot != at.slot {
		w.drop(dropSpoofed)
		return
	}
	if at != nil && f.Hop.Load()>>16 != w.who.mac && !w.ownerOf(at, serverOf(f, 1-dir)) {
		w.drop(dropErrorMember)
		return
	}
	if verdict != nat.Pass {
		w.drop(dropErrorUnlikely)
		return
	}
	if at != nil && v.Source() == src { // the receiver sees who sent it
		if s.likeVPC(at, src) {
			w.drop(dropSpoofed)
			return
		}
		if alias, m := s.seen(at, src); m != nil {
			nat.SetErrorSource(v, ipkt.Bytes(alias))
		}
	}
	if v.TTL <= 1 {
		w.drop(dropTTL)
		return
	}
	v.DecrementTTL()
	exit := f.Exit(dir)
	class := classOf(side, exit, v)
	out := (*attachment)(nil)
	if int(f.Slot) < len(s.slots) {
		out = s.slots[f.Slot]
	}
	switch {
	case exit == VPCSide:
		w.toVPC(out, class, v, 65535, nil)
	case out == nil:
		w.drop(dropNetwork)
	default:
		w.toOverlay(out, f, dir, class, v, nil)
	}
}

// impossibleMTU reports an error that asks for packets smaller than any link's
// (RFC 1191 §3, RFC 8201 §4). Without a size, the receiver has to guess (RFC 1191 §5).
func impossibleMTU(v *ipkt.View) bool {
	b := v.B[v.L4:]
	switch {
	case v.Proto == ipkt.ICMP && v.ICMPType == 3 && v.ICMPCode == 4:
		mtu := binary.BigEndian.Uint16(b[6:])
		return mtu != 0 && mtu < 68
	case v.Proto == ipkt.ICMPv6 && v.ICMPType == 2:
		return binary.BigEndian.Uint32(b[4:]) < minMTU6
	}
	return false
}

// onTheWay reports an error about a packet of our own from the member it went to.
func (w *worker) onTheWay(at *attachment, v *ipkt.View) bool {
	host, ok := nat.QuotedTarget(v)
	return ok && w.ownerOf(at, host)
}

// sendError sends an ICMP error about a packet back to its sender, from our address
// where it came from: a network, or nil for the VPC.
func (e *Engine) sendError(now int64, from *attachment, kind ipkt.ErrorKind, v *ipkt.View, mtu int) {
	s := e.set.Load()
	to := v.Source()
	if !v.MayAnswer() || s.isBroadcastOn(from, to) || s.isBroadcastOn(from, v.Destination()) || !forwardable(to) ||
		!e.errors.allow(now, to, kind == ipkt.TooBig) {
		return
	}
	var src netip.Addr
	if from != nil {
		src = from.address(v.V6)
	}
	if !src.IsValid() {
		src = s.vpcAddress(from, v.V6)
	}
	if !src.IsValid() {
		return
	}
	e.stats.errors[from.side()][kind].Add(1)
	var ev ipkt.View
	if ipkt.Parse(ipkt.AppendError(nil, kind, ipkt.Bytes(src), v, mtu), &ev) == ipkt.OK {
		e.sendIP(now, from, &ev)
	}
}

// reversed returns the view of the reply to v.
func reversed(v *ipkt.View) *ipkt.View {
	r := *v
	r.Src, r.Dst, r.SPort, r.DPort = v.Dst, v.Src, v.DPort, v.SPort
	switch {
	case v.Proto == ipkt.ICMP && v.ICMPType == 8:
		r.ICMPType = 0
	case v.Proto == ipkt.ICMP && v.ICMPType == 13:
		r.ICMPType = 14
	case v.ICMPType == 128:
		r.ICMPType = 129
	}
	return &r
}

// sendReset sends the RST that answers a segment, from where it was sent to.
func (e *Engine) sendReset(now int64, from *attachment, v *ipkt.View) {
	if e.errors.allow(now, v.Source(), false) {
		e.sendRST(now, from, ipkt.AppendReset(nil, v))
	}
}

// sendRST sends a RST to a network, or to the VPC if to is nil.
func (e *Engine) sendRST(now int64, to *attachment, b []byte) {
	var r ipkt.View
	if ipkt.Parse(b, &r) == ipkt.OK {
		e.stats.resets[to.side()].Add(1)
		e.sendIP(now, to, &r)
	}
}

// unresolved tells the sender of a packet that its next hop doesn't answer.
func (e *Engine) unresolved(now int64, at *attachment, p neigh.Waiting) {
	if p.Class == noClass {
		return // our own: it never came in
	}
	w := e.worker()
	defer e.release(w)
	// All that goes to the overlay comes from the VPC.
	w.who = whose{side: VPCSide, at: at}
	var v ipkt.View
	if ipkt.Parse(p.Packet, &v) != ipkt.OK {
		w.drop(dropUnresolved)
		return
	}
	// The packet is translated already: turn that back for its sender.
	var k nat.Key
	if r := reversed(&v); e.table.KeyOf(OverlaySide, r, &k) {
		if f, dir := e.table.Find(now, &k); f != nil {
			f.Undo(1-dir, &v)
			w.who.view = &v
			w.refuse(nil, dropUnresolved, ipkt.HostUnreachable, &v)
			return
		}
	}
	w.who.view = &v
	w.drop(dropUnresolved)
}
