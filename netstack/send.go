package netstack

import (
	"cmp"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/neigh"
)

// sendIP sends a packet of our own to a network, or to the VPC if at is nil.
func (e *Engine) sendIP(now int64, at *attachment, v *ipkt.View) {
	if at == nil {
		e.writeVPC(v.B)
		return
	}
	hop := at.hop(v.Destination())
	if !hop.IsValid() {
		return // it has gone since
	}
	mac, ok := at.neigh.Lookup(now, hop)
	if !ok {
		at.neigh.Resolve(now, hop, v.B, noClass)
		return
	}
	h := ethernetHeader(mac, at.MAC, v.V6)
	e.writeFrame(at.ID, append(h[:], v.B...))
}

// writeFrame sends one frame; for everything but established flows.
func (e *Engine) writeFrame(nwid uint64, frame []byte) bool {
	buf := append(make([]byte, vpcOffset-ethernetLen, vpcOffset+len(frame)), frame...)
	n, err := e.cfg.Overlay.WriteFrames(nwid, [][]byte{buf}, []int{len(frame)}, vpcOffset-ethernetLen)
	if err != nil || n == 0 {
		return false
	}
	e.stats.traffic[OverlaySide][tx].add(1, uint64(len(frame)-ethernetLen))
	return true
}

// writeVPC sends one packet of our own to the VPC side.
func (e *Engine) writeVPC(b []byte) {
	w := e.worker()
	w.vpc.copy(&e.stats.vpc, noClass, b)
	e.release(w)
}

// sendReady sends packets that waited for a neighbour.
func (e *Engine) sendReady(now int64, at *attachment, packets []neigh.Waiting, hop netip.Addr) {
	if len(packets) == 0 {
		return
	}
	mac, ok := at.neigh.Lookup(now, hop)
	for _, waiting := range packets {
		class := waiting.Class
		var v ipkt.View
		if !ok || ipkt.Parse(waiting.Packet, &v) != ipkt.OK {
			if class != noClass {
				e.drop(VPCSide, dropUnresolved)
			}
			continue
		}
		if v.Proto == ipkt.TCP && v.First && v.Flags&ipkt.SYN != 0 && e.clampFor(at, macNumber(mac), at.MTU, &v) { // the member wasn't known before
			e.stats.clamped[VPCSide].Add(1)
		}
		h := ethernetHeader(mac, at.MAC, v.V6)
		each := func(b []byte) {
			switch {
			case e.writeFrame(at.ID, append(h[:], b...)):
				at.fwd.countClass(class, 1, uint64(len(b)))
			case class != noClass:
				e.drop(VPCSide, dropOverlay)
			}
			class = noClass
		}
		if len(v.B) > at.MTU {
			ipkt.Fragment4(&v, at.MTU, each)
			continue
		}
		each(v.B)
	}
}

// sendLocal takes packets of the local stack from one of its interfaces.
func (e *Engine) sendLocal(nic tcpip.NICID, b []byte) {
	at := e.set.Load().ofNIC(nic)
	if at == nil && nic != vpcNIC {
		return // the network has gone
	}
	var v ipkt.View
	if ipkt.Parse(b, &v) == ipkt.OK {
		e.sendIP(e.clock(), at, &v)
	}
}

// sendAnswer takes packets of the stack that clients see as the hosts they speak to: answers,
// which go as long as what the client sends would be handed over, as the policy is now.
func (e *Engine) sendAnswer(nic tcpip.NICID, b []byte) {
	s := e.set.Load()
	at := s.ofNIC(nic)
	var v ipkt.View
	if at == nil || ipkt.Parse(b, &v) != ipkt.OK {
		return
	}
	if v.First && (v.Proto == ipkt.TCP || v.Proto == ipkt.UDP) {
		asked := tuple{v.Proto, v.Destination(), v.Source(), v.DPort, v.SPort}
		if d := e.decideOverlay(s, at, &asked); d.do != actHost {
			e.drop(VPCSide, cmp.Or(d.reason, dropNoFlow))
			return
		}
	}
	e.sendIP(e.clock(), at, &v)
}

// ofNIC returns the network of an interface of a stack, nil if it is the VPC's or gone.
func (s *netSet) ofNIC(nic tcpip.NICID) *attachment {
	if slot := int(nic - firstNIC); nic != vpcNIC && slot < len(s.slots) {
		return s.slots[slot]
	}
	return nil
}
