package netstack

import (
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
	// Whoever sent it, it is about a flow or it isn't: only impossible sources are
	// refused (RFC 4787 REQ-12 a).
	bad := drop(0)
	switch {
	case v.Proto == ipkt.ICMP && v.ICMPType == 4: // source quench (RFC 6633)
		bad = dropICMPType
	case s.isOwnOn(at, src):
		bad = dropSpoofed
	case !forwardable(dst):
		bad = dropForbidden
	case !forwardable(src):
		bad = dropSource
	case at == nil:
		bad = s.checkVPC(src, dst)
	case !at.hop(src).IsValid() && s.likeVPC(at, src):
		bad = dropSpoofed
	}
	if bad != 0 {
		e.drop(side, bad)
		return
	}
	f, dir := e.table.TranslateError(w.now, side, v)
	if f == nil {
		if s.isOwnOn(at, dst) {
			w.toLocal(at, v)
			return
		}
		e.drop(side, dropNoFlow)
		return
	}
	if at != nil && f.Slot != at.slot {
		e.drop(side, dropSpoofed)
		return
	}
	if at != nil && v.Source() == src { // the receiver sees who sent it
		if s.likeVPC(at, src) {
			e.drop(side, dropSpoofed)
			return
		}
		if alias, m := s.seen(at, src); m != nil {
			nat.SetErrorSource(v, ipkt.Bytes(alias))
		}
	}
	if v.TTL <= 1 {
		e.drop(side, dropTTL)
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
		e.drop(side, dropNetwork)
	default:
		w.toOverlay(out, f, dir, class, v, nil)
	}
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

// unresolved tells the sender of a packet that its next hop doesn't answer.
func (e *Engine) unresolved(now int64, p neigh.Waiting) {
	if p.Class == noClass {
		return // our own: it never came in
	}
	w := e.worker()
	defer e.release(w)
	// All that goes to the overlay comes from the VPC.
	var v ipkt.View
	if ipkt.Parse(p.Packet, &v) != ipkt.OK {
		e.drop(VPCSide, dropUnresolved)
		return
	}
	// The packet is translated already: turn that back for its sender.
	var k nat.Key
	if r := reversed(&v); e.table.KeyOf(OverlaySide, r, &k) {
		if f, dir := e.table.Find(now, &k); f != nil {
			f.Undo(1-dir, &v)
			e.refuse(now, nil, dropUnresolved, ipkt.HostUnreachable, &v)
			return
		}
	}
	e.drop(VPCSide, dropUnresolved)
}
