package netstack

import (
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/neigh"
)

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
