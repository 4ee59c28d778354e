package netstack

import (
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
)

// fastLookup is the lookup of a plain packet of a batch. Nearly all packets are plain
// and belong to an established flow; the others take the slow path, which knows
// everything, see [worker.packet].
type fastLookup struct {
	ref   nat.Ref // the hash at first
	size  uint16  // of the packet; 0 = not for the fast path
	class uint8   // without its path
}

func (l *fastLookup) v6() bool { return l.class&classV6 != 0 }

// begin looks at a packet for the first time.
func (l *fastLookup) begin(t *nat.Table, side Side, b []byte) {
	l.size = 0
	if len(b) == 0 {
		return
	}
	switch {
	case b[0] == 0x45:
		if size, proto := ipkt.Plain4(b); size != 0 {
			l.size, l.class = uint16(size), uint8(nat.ClassOf(proto))
			l.ref = nat.Ref(t.Hash4(side, (*ipkt.Head4)(b)))
		}
	case b[0]>>4 == 6:
		if size, proto := ipkt.Plain6(b); size != 0 {
			l.size, l.class = uint16(size), classV6|uint8(nat.ClassOf(proto))
			l.ref = nat.Ref(t.Hash6(side, (*ipkt.Head6)(b)))
		}
	}
}

// lookUp begins the lookups of a batch, in short loops of their own: so the
// processor waits for many packets at once.
func (w *worker) lookUp(n int) {
	t := w.table
	batch := w.fast[:n]
	for i := range batch {
		if l := &batch[i]; l.size != 0 {
			if l.ref = t.Begin(uint32(l.ref)); l.ref == 0 {
				l.size = 0
			}
		}
	}
	sink := uint32(0)
	for i := range batch {
		if l := &batch[i]; l.size != 0 {
			sink += t.Touch(l.ref, l.v6())
		}
	}
	w.sink = sink
}

// takes reports a frame for us with an IP packet.
func (at *attachment) takes(f []byte) bool {
	if len(f) < ethernetLen {
		return false
	}
	typ := uint16(f[12])<<8 | uint16(f[13])
	return macAt(f) == at.mac && (typ == 0x0800 || typ == 0x86dd)
}

// fastOut sends a plain packet of a known flow from the VPC, at vpcOffset in buf,
// to the overlay. If it returns false nothing has happened yet.
func (w *worker) fastOut(l *fastLookup, buf []byte) bool {
	if l.size == 0 {
		return false
	}
	b := buf[vpcOffset : vpcOffset+int(l.size)]
	f, dir := w.match(l, VPCSide, b)
	if f == nil || f.Generation.Load() != w.generation || f.Exit(dir) != OverlaySide || int(f.Slot) >= len(w.slots) {
		return false
	}
	at := w.slots[f.Slot]
	if at == nil || len(b) > at.MTU {
		return false
	}
	mac, ok := freshHop(w.second, f.Hop.Load())
	if !ok || !w.pass(l, f, dir, b) {
		return false
	}
	w.out.add(at, pathVPCToOverlay<<classShift|l.class, buf, len(b), mac, l.v6())
	return true
}

// fastIn sends a plain packet of a known flow from the overlay, in a frame, to the
// VPC. If it returns false nothing has happened yet.
func (w *worker) fastIn(at *attachment, l *fastLookup, frame []byte) bool {
	if l.size == 0 {
		return false
	}
	b := frame[ethernetLen : ethernetLen+int(l.size)]
	f, dir := w.match(l, OverlaySide, b)
	if f == nil || f.Generation.Load() != w.generation || f.Exit(dir) != VPCSide || f.Slot != at.slot {
		return false
	}
	// A flow's packets come from its next hop, see known.
	if f.Hop.Load()>>16 != macAt(frame[6:]) || len(b) > w.vpcMTU || !w.pass(l, f, dir, b) {
		return false
	}
	w.vpc.add(at.fwd, pathOverlayToVPC<<classShift|l.class, frame[:ethernetLen+len(b)])
	return true
}

func (w *worker) match(l *fastLookup, side Side, b []byte) (*nat.Flow, int) {
	if l.v6() {
		return w.table.Match6(l.ref, side, (*ipkt.Head6)(b))
	}
	return w.table.Match4(l.ref, side, (*ipkt.Head4)(b))
}

// pass lets the flow judge the packet, and translates it.
func (w *worker) pass(l *fastLookup, f *nat.Flow, dir int, b []byte) bool {
	l4 := 20
	if l.v6() {
		l4 = 40
	}
	if l.class&classProto == nat.ClassTCP {
		if !w.table.PassTCP(w.coarse, f, dir, b[l4:]) {
			return false
		}
	} else if !w.table.PassUDP(w.coarse, f, dir) {
		return false
	}
	if l.v6() {
		f.Forward6(dir, b)
	} else {
		f.Forward4(dir, b)
	}
	w.hits++
	w.run.add(f, dir, len(b))
	return true
}
