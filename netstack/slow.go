package netstack

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"ztgate/netstack/internal/frag"
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
)

// unknown judges a packet that belongs to no flow. It returns the flow it opened,
// nil if the packet goes no further.
func (w *worker) unknown(side Side, p *port, v *ipkt.View, k *nat.Key) (*nat.Flow, int) {
	e, l := w.e, legOf(side)
	t := tupleOf(v)
	d := e.decide(w.set, side, p, &t)
	if d.do == doOpen || d.do == doReject && d.reason == dropPolicy {
		if v.TTL <= 1 { // before the policy answers: traceroute shows this hop
			e.refuse(w.now, l, dropTTL, ipkt.TimeExceeded, v)
			return nil, 0
		}
	}
	switch d.do {
	case doLocal:
		w.toLocal(l, p, v)
		return nil, 0
	case doDrop:
		e.countRule(&d)
		e.drop(l, d.reason)
		return nil, 0
	case doReject:
		e.countRule(&d)
		if d.reason == dropPolicy && v.Proto == ipkt.TCP {
			e.reset(w.now, l, v)
		} else {
			e.refuse(w.now, l, d.reason, d.answer, v)
		}
		return nil, 0
	}
	if !v.ChecksumOK() {
		e.drop(l, dropChecksum)
		return nil, 0
	}
	d.flow.Generation = w.set.generation
	f, dir, why := e.table.Open(w.now, k, v, &d.flow)
	if why != nat.Accepted {
		e.refused(w.now, l, v, why)
		return nil, 0
	}
	e.countRule(&d)
	return f, dir
}

func (e *Engine) countRule(d *decision) {
	if d.rule != ruleNone {
		e.pol.Load().Count(d.rule)
	}
}

// refused counts why a flow couldn't be opened and tells the sender, if it came
// from the VPC, that there is no room (decision D3).
func (e *Engine) refused(now int64, l leg, v *ipkt.View, why nat.Refusal) {
	d := dropOfProtocol(v.Proto)
	switch why {
	case nat.TableFull:
		d = dropTableFull
	case nat.ClientFull, nat.ClientPorts, nat.ClientRate:
		d = dropClientLimit
	case nat.NoPort, nat.Clash:
		d = dropNoPort
	case nat.NotFirst:
		e.drop(l, dropNotFirst)
		return
	case nat.Protocol:
		e.drop(l, d)
		return
	}
	e.logRefusals(now, d)
	if l == legVPC {
		e.refuse(now, l, d, ipkt.HostUnreachable, v)
		return
	}
	e.drop(l, d)
}

func (e *Engine) refuse(now int64, l leg, d drop, kind ipkt.ErrorKind, v *ipkt.View) {
	e.drop(l, d)
	e.sendError(now, l, kind, v, 0)
}

// reset refuses a TCP connection as its opener understands it best.
func (e *Engine) reset(now int64, l leg, v *ipkt.View) {
	e.drop(l, dropPolicy)
	if v.Flags&ipkt.RST != 0 || !e.errors.allow(now, v.Source(), false) {
		return
	}
	b := ipkt.AppendReset(nil, v)
	if l == legVPC {
		e.writeVPC(b)
		return
	}
	var r ipkt.View
	if ipkt.Parse(b, &r) == ipkt.OK {
		e.sendIP(now, e.set.Load(), &r)
	}
}

// toLocal hands a packet to the gateway's own stack. From the overlay only what is
// expected there: the stack would answer everything else.
func (w *worker) toLocal(l leg, p *port, v *ipkt.View) {
	if l == legOverlay && v.First && (v.Proto == ipkt.TCP || v.Proto == ipkt.UDP) && !w.e.local.expects(v) {
		w.e.drop(l, dropNoFlow)
		return
	}
	if !w.e.local.inject(v.B) {
		w.e.drop(l, dropLocal)
		return
	}
	w.countLocal(l, p, uint16(v.Proto), len(v.B), v.V6)
}

// countLocal counts a packet for ourselves.
func (w *worker) countLocal(l leg, p *port, proto uint16, n int, v6 bool) {
	fwd := &w.e.stats.vpc
	if l == legOverlay {
		fwd = p.fwd
	}
	class := nat.ClassOther
	if proto < 256 {
		class = nat.ClassOf(uint8(proto))
	}
	fwd.countClass(makeClass(wayLocal, v6, class), 1, uint64(n))
}

func isNDP(v *ipkt.View) bool { return neigh.IsNDP(v) }

// group handles what came to all members of a network, and neighbour discovery:
// nothing of it is forwarded (RFC 1812 §5.3.4).
func (w *worker) group(p *port, v *ipkt.View) {
	if isNDP(v) {
		w.countLocal(legOverlay, p, ipkt.ICMPv6, len(v.B), true)
		ready, from := p.neigh.HandleNDP(w.now, v)
		w.e.sendReady(w.now, p, ready, from)
		return
	}
	w.e.drop(legOverlay, dropForbidden)
}

// odd handles fragments and ICMP messages that are no queries.
func (w *worker) odd(side Side, p *port, v *ipkt.View) {
	l := legOf(side)
	switch {
	case v.Fragment:
		w.fragment(side, p, v)
	case v.IsICMPError():
		w.icmpError(side, p, v)
	default:
		w.e.drop(l, dropICMPType)
	}
}

// fragment holds a fragment back. When its packet is complete all of them go on,
// each by itself.
func (w *worker) fragment(side Side, p *port, v *ipkt.View) {
	e, l := w.e, legOf(side)
	if v.First && v.TTL <= 1 && !w.set.isOwn(v.Destination()) {
		e.refuse(w.now, l, dropTTL, ipkt.TimeExceeded, v)
		return
	}
	parts, res := e.frags.Add(w.now, uint8(side), v)
	switch res {
	case frag.Duplicate:
		e.drop(l, dropDuplicate)
	case frag.Overlap:
		e.drop(l, dropOverlap)
	case frag.TooMany:
		e.drop(l, dropFragment)
	}
	if len(parts) > 0 {
		w.whole(side, p, parts)
	}
}

// whole sends the fragments of one packet on. The first one decides.
func (w *worker) whole(side Side, p *port, parts [][]byte) {
	e, l := w.e, legOf(side)
	var first, v ipkt.View
	var k nat.Key
	if ipkt.Parse(parts[0], &first) != ipkt.OK || !e.table.KeyOf(side, &first, &k) {
		e.dropN(l, dropICMPType, len(parts)) // a fragmented ICMP error
		return
	}
	f, dir := e.table.Find(w.now, &k)
	if f != nil && f.Generation.Load() != w.set.generation && !e.stillAllowed(w.set, f) {
		e.table.Remove(f)
		f = nil
	}
	if f == nil {
		t := tupleOf(&first)
		if d := e.decide(w.set, side, p, &t); d.do == doLocal {
			for _, b := range parts {
				if ipkt.Parse(b, &v) == ipkt.OK {
					w.toLocal(l, p, &v)
				}
			}
			return
		}
		if f, dir = w.unknown(side, p, &first, &k); f == nil {
			e.dropN(l, dropFragment, len(parts)-1)
			return
		}
	}
	if p != nil && f.Slot != p.slot {
		e.dropN(l, dropSpoofed, len(parts))
		return
	}
	for _, b := range parts {
		if ipkt.Parse(b, &v) != ipkt.OK { // it did before
			e.drop(l, dropMalformed)
			continue
		}
		w.forward(side, f, dir, &v, nil)
	}
}

// icmpError translates an ICMP error about a packet of a flow, or hands it to our
// own stack.
func (w *worker) icmpError(side Side, p *port, v *ipkt.View) {
	e, l, s := w.e, legOf(side), w.set
	src, dst := v.Source(), v.Destination()
	// Whoever sent it, it is about a flow or it isn't: only impossible sources are
	// refused (RFC 4787 REQ-12 a).
	bad := drop(0)
	switch {
	case v.Proto == ipkt.ICMP && v.ICMPType == 4: // source quench (RFC 6633)
		bad = dropICMPType
	case s.isOwn(src):
		bad = dropSpoofed
	case !forwardable(dst):
		bad = dropForbidden
	case !forwardable(src):
		bad = dropSource
	case side == nat.VPC:
		bad = e.checkVPC(s, src, dst)
	case e.inVPC(s, src):
		bad = dropSpoofed
	}
	if bad != 0 {
		e.drop(l, bad)
		return
	}
	f, dir := e.table.TranslateError(w.now, side, v)
	if f == nil {
		if s.isOwn(dst) && (side == nat.VPC || s.owner(dst) == p) {
			w.toLocal(l, p, v)
			return
		}
		e.drop(l, dropNoFlow)
		return
	}
	if p != nil && f.Slot != p.slot {
		e.drop(l, dropSpoofed)
		return
	}
	if v.TTL <= 1 {
		e.drop(l, dropTTL)
		return
	}
	v.DecrementTTL()
	exit := f.Exit(dir)
	class := classOf(side, exit, v)
	out := (*port)(nil)
	if int(f.Slot) < len(s.slots) {
		out = s.slots[f.Slot]
	}
	switch {
	case exit == nat.VPC:
		w.toVPC(out, class, v, 65535, nil)
	case out == nil:
		e.drop(l, dropNetwork)
	default:
		w.toOverlay(out, f, dir, class, v, nil)
	}
}

// serverOf returns where packets of a direction go on the overlay.
func serverOf(f *nat.Flow, dir int) netip.Addr {
	if dir == nat.FromClient {
		return ipkt.Addr(f.Server())
	}
	return ipkt.Addr(f.Client())
}

// jumboMSS is what a VPC client with a large MTU announces: its segments then
// fill the overlay's MTU, which is two full datagrams.
const jumboMSS = 2760

// clamp lowers the MSS of a SYN so that segments of both directions fit both
// sides: one datagram on the wire, unless the client's MTU allows whole frames.
func (e *Engine) clamp(l leg, p *port, v *ipkt.View) {
	headers := 40
	if v.V6 {
		headers = 60
	}
	limit := min(p.MTU, e.vpcMTU) - headers
	if p.Direct > headers && v.MSS() < jumboMSS {
		limit = min(limit, p.Direct-headers)
	}
	if v.ClampMSS(uint16(min(limit, 65535))) {
		e.stats.clamped[l].Add(1)
	}
}

// unresolved tells the sender of a packet that its next hop doesn't answer.
func (e *Engine) unresolved(now int64, p neigh.Waiting) {
	if p.Class == noClass {
		return // our own: it never came in
	}
	w := e.worker()
	defer e.release(w)
	const l = legVPC // all that goes to the overlay comes from there
	var v ipkt.View
	if ipkt.Parse(p.Packet, &v) != ipkt.OK {
		e.drop(l, dropUnresolved)
		return
	}
	// The packet is translated already: turn that back for its sender.
	var k nat.Key
	if r := turned(&v); e.table.KeyOf(nat.Overlay, r, &k) {
		if f, dir := e.table.Find(now, &k); f != nil {
			f.Undo(1-dir, &v)
			e.refuse(now, l, dropUnresolved, ipkt.HostUnreachable, &v)
			return
		}
	}
	e.drop(l, dropUnresolved)
}

// turned returns the view of the reply to v.
func turned(v *ipkt.View) *ipkt.View {
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

// sendIP sends a packet of our own by its destination.
func (e *Engine) sendIP(now int64, s *netSet, v *ipkt.View) {
	p, hop := s.route(v.Destination())
	if p == nil {
		e.writeVPC(v.B)
		return
	}
	mac, ok := p.neigh.Lookup(now, hop)
	if !ok {
		p.neigh.Resolve(now, hop, v.B, noClass)
		return
	}
	h := ethernetHeader(mac, p.MAC, v.V6)
	e.writeFrame(p.ID, append(h[:], v.B...))
}

// writeFrame sends one frame; for everything but established flows.
func (e *Engine) writeFrame(nwid uint64, frame []byte) bool {
	buf := append(make([]byte, vpcOffset-ethernetLen, vpcOffset+len(frame)), frame...)
	n, err := e.cfg.Overlay.WriteFrames(nwid, [][]byte{buf}, []int{len(frame)}, vpcOffset-ethernetLen)
	if err != nil || n == 0 {
		return false
	}
	e.stats.traffic[legOverlay][tx].add(1, uint64(len(frame)-ethernetLen))
	return true
}

// writeVPC sends one packet of our own to the VPC side.
func (e *Engine) writeVPC(b []byte) {
	w := e.worker()
	w.vpc.copy(&e.stats.vpc, noClass, b)
	e.release(w)
}

// sendReady sends packets that waited for a neighbour.
func (e *Engine) sendReady(now int64, p *port, packets []neigh.Waiting, hop netip.Addr) {
	if len(packets) == 0 {
		return
	}
	mac, ok := p.neigh.Lookup(now, hop)
	for _, waiting := range packets {
		class := waiting.Class
		var v ipkt.View
		if !ok || ipkt.Parse(waiting.Packet, &v) != ipkt.OK {
			if class != noClass {
				e.drop(legVPC, dropUnresolved)
			}
			continue
		}
		h := ethernetHeader(mac, p.MAC, v.V6)
		each := func(b []byte) {
			switch {
			case e.writeFrame(p.ID, append(h[:], b...)):
				p.fwd.countClass(class, 1, uint64(len(b)))
			case class != noClass:
				e.drop(legVPC, dropOverlay)
			}
			class = noClass
		}
		if len(v.B) > p.MTU {
			ipkt.Fragment4(&v, p.MTU, each)
			continue
		}
		each(v.B)
	}
}

// sendLocal takes packets of the local stack.
func (e *Engine) sendLocal(b []byte) {
	var v ipkt.View
	if ipkt.Parse(b, &v) == ipkt.OK {
		e.sendIP(e.clock(), e.set.Load(), &v)
	}
}

// sendError sends an ICMP error about a packet from a leg back to its sender, from
// our address on that leg.
func (e *Engine) sendError(now int64, l leg, kind ipkt.ErrorKind, v *ipkt.View, mtu int) {
	s := e.set.Load()
	to := v.Source()
	if !v.MayAnswer() || s.isBroadcast(to) || s.isBroadcast(v.Destination()) || !forwardable(to) ||
		!e.errors.allow(now, to, kind == ipkt.TooBig) {
		return
	}
	src := s.vpc4
	if v.V6 {
		src = s.vpc6
	}
	if l == legOverlay {
		if p, _ := s.route(to); p != nil {
			src = p.address(v.V6)
		}
	}
	if !src.IsValid() {
		for _, p := range s.ports {
			if src = p.address(v.V6); src.IsValid() {
				break
			}
		}
	}
	if !src.IsValid() {
		return
	}
	e.stats.errors[l][kind].Add(1)
	b := ipkt.AppendError(nil, kind, ipkt.Bytes(src), v, mtu)
	if l == legVPC {
		e.writeVPC(b)
		return
	}
	var ev ipkt.View
	if ipkt.Parse(b, &ev) == ipkt.OK {
		e.sendIP(now, s, &ev)
	}
}

// idTable remembers whose fragmented packets lately used an IPv4 ID, so that two
// clients behind one address don't use the same at the same time (RFC 6864,
// RFC 7857 §11).
type idTable struct {
	mu    sync.Mutex
	slots [4096]idSlot
	next  uint16
}

type idSlot struct {
	src, dst [16]byte
	proto    uint8
	id       uint16
	owner    [16]byte
	original uint16
	at       int64
}

const idLifetime = int64(30 * time.Second)

// uniqueID gives a translated IPv4 packet that is in fragments, or will be,
// another ID if a different client uses it already.
func (e *Engine) uniqueID(now int64, f *nat.Flow, dir int, v *ipkt.View) {
	if v.V6 || dir != nat.FromClient || !f.Translated() {
		return
	}
	id := binary.BigEndian.Uint16(v.B[4:])
	new := e.ids.choose(now, f, id)
	if new != id {
		binary.BigEndian.PutUint16(v.B[4:], new)
		ipkt.Adjust16(v.B[10:], id, new)
	}
}

func (t *idTable) choose(now int64, f *nat.Flow, id uint16) uint16 {
	t.mu.Lock()
	defer t.mu.Unlock()
	want := idSlot{src: f.External(), dst: f.Server(), proto: f.Proto(), owner: f.Client(), original: id}
	// A packet that got another ID keeps it for all its fragments.
	for i, c := 0, id; i < 8; i++ {
		s := &t.slots[(uint32(c)*0x9e37+uint32(want.dst[15])*0x85eb+uint32(want.proto))%uint32(len(t.slots))]
		same := s.src == want.src && s.dst == want.dst && s.proto == want.proto && s.id == c
		if !same || now-s.at >= idLifetime || s.owner == want.owner && s.original == id {
			want.id, want.at = c, now
			*s = want
			return c
		}
		c = uint16(uint32(id)*0x6487 + uint32(i+1)*0x9e37 + uint32(t.next))
	}
	t.next++
	return id
}
