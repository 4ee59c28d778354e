package netstack

import (
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// quick is the lookup of a plain packet of a batch. Nearly all packets are plain
// and belong to an established flow; the others take the long way, which knows
// everything, see [worker.packet].
type quick struct {
	ref   nat.Ref // the hash at first
	size  uint16  // of the packet; 0 = not for the quick way
	class uint8   // without its way
}

func (q *quick) v6() bool { return q.class&classV6 != 0 }

// begin looks at a packet for the first time.
func (q *quick) begin(t *nat.Table, side Side, b []byte) {
	q.size = 0
	if len(b) == 0 {
		return
	}
	switch {
	case b[0] == 0x45:
		if size, proto := ipkt.Plain4(b); size != 0 {
			q.size, q.class = uint16(size), uint8(nat.ClassOf(proto))
			q.ref = nat.Ref(t.Hash4(side, (*ipkt.Head4)(b)))
		}
	case b[0]>>4 == 6:
		if size, proto := ipkt.Plain6(b); size != 0 {
			q.size, q.class = uint16(size), classV6|uint8(nat.ClassOf(proto))
			q.ref = nat.Ref(t.Hash6(side, (*ipkt.Head6)(b)))
		}
	}
}

// lookUp begins the lookups of a batch, in short loops of their own: so the
// processor waits for many packets at once.
func (w *worker) lookUp(n int) {
	t := w.table
	batch := w.quick[:n]
	for i := range batch {
		if q := &batch[i]; q.size != 0 {
			if q.ref = t.Begin(uint32(q.ref)); q.ref == 0 {
				q.size = 0
			}
		}
	}
	sink := uint32(0)
	for i := range batch {
		if q := &batch[i]; q.size != 0 {
			sink += t.Touch(q.ref, q.v6())
		}
	}
	w.sink = sink
}

// takes reports a frame for us with an IP packet.
func (p *port) takes(f []byte) bool {
	if len(f) < ethernetLen {
		return false
	}
	typ := uint16(f[12])<<8 | uint16(f[13])
	return macAt(f) == p.mac && (typ == 0x0800 || typ == 0x86dd)
}

// quickOut sends a plain packet of a known flow from the VPC, at vpcOffset in buf,
// to the overlay. If it returns false nothing has happened yet.
func (w *worker) quickOut(q *quick, buf []byte) bool {
	if q.size == 0 {
		return false
	}
	b := buf[vpcOffset : vpcOffset+int(q.size)]
	f, dir := w.match(q, nat.VPC, b)
	if f == nil || f.Generation.Load() != w.generation || f.Exit(dir) != nat.Overlay || int(f.Slot) >= len(w.slots) {
		return false
	}
	p := w.slots[f.Slot]
	if p == nil || len(b) > p.MTU {
		return false
	}
	mac, ok := freshHop(w.second, f.Hop.Load())
	if !ok || !w.pass(q, f, dir, b) {
		return false
	}
	w.out.add(p, wayVPCToOverlay<<classShift|q.class, buf, len(b), mac, q.v6())
	return true
}

// quickIn sends a plain packet of a known flow from the overlay, in a frame, to the
// VPC. If it returns false nothing has happened yet.
func (w *worker) quickIn(p *port, q *quick, frame []byte) bool {
	if q.size == 0 {
		return false
	}
	b := frame[ethernetLen : ethernetLen+int(q.size)]
	f, dir := w.match(q, nat.Overlay, b)
	if f == nil || f.Generation.Load() != w.generation || f.Exit(dir) != nat.VPC || f.Slot != p.slot {
		return false
	}
	// A flow's packets come from its next hop, see known.
	if f.Hop.Load()>>16 != macAt(frame[6:]) || len(b) > w.e.vpcMTU || !w.pass(q, f, dir, b) {
		return false
	}
	w.vpc.add(p.fwd, wayOverlayToVPC<<classShift|q.class, frame[:ethernetLen+len(b)])
	return true
}

func (w *worker) match(q *quick, side Side, b []byte) (*nat.Flow, int) {
	if q.v6() {
		return w.table.Match6(q.ref, side, (*ipkt.Head6)(b))
	}
	return w.table.Match4(q.ref, side, (*ipkt.Head4)(b))
}

// pass lets the flow judge the packet, and translates it.
func (w *worker) pass(q *quick, f *nat.Flow, dir int, b []byte) bool {
	l4 := 20
	if q.v6() {
		l4 = 40
	}
	if q.class&classProto == nat.ClassTCP {
		if !w.table.PassTCP(w.coarse, f, dir, b[l4:]) {
			return false
		}
	} else if !w.table.PassUDP(w.coarse, f, dir) {
		return false
	}
	if q.v6() {
		f.Forward6(dir, b)
	} else {
		f.Forward4(dir, b)
	}
	w.hits++
	w.run.add(f, dir, len(b))
	return true
}
