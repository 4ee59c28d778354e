package netstack

import (
	"net/netip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
)

// writer collects packets for the device. Its buffers are large so that the
// device can merge segments into the first one.
type writer struct {
	view ipkt.View
	bufs [][]byte // full capacity
	out  [][]byte
	n    int
}

// add appends a copy of a packet; false if the batch is full.
func (w *writer) add(b []byte) bool {
	if w.n == maxBatch {
		return false
	}
	if w.n == len(w.bufs) {
		w.bufs = append(w.bufs, make([]byte, writeSize))
	}
	buf := w.bufs[w.n][:writeStart+len(b)]
	copy(buf[writeStart:], b)
	w.out = append(w.out, buf)
	w.n++
	return true
}

func (e *Engine) flushWriter(w *writer) {
	if w.n == 0 {
		return
	}
	for _, b := range w.out {
		e.stats.count(legVPC, tx, len(b)-writeStart)
	}
	if _, err := e.dev.Write(w.out, writeStart); err != nil {
		e.drop(legVPC, dropDevice)
	}
	clear(w.out)
	w.out, w.n = w.out[:0], 0
}

// writeVPC sends one packet to the VPC side; for everything but established
// flows.
func (e *Engine) writeVPC(b []byte) {
	w := e.writers.Get().(*writer)
	if len(b) <= writeSize-writeStart {
		w.add(b)
		e.flushWriter(w)
	}
	e.writers.Put(w)
}

// Deliver handles frames from a network. Several goroutines may call it at the
// same time; frames are changed in place and not kept.
func (e *Engine) Deliver(nwid uint64, frames [][]byte) {
	now := e.clock()
	set := e.set.Load()
	p := set.ports[nwid]
	w := e.writers.Get().(*writer)
	e.stats.batches[legOverlay].observe(len(frames))
	for _, f := range frames {
		e.stats.count(legOverlay, rx, max(len(f)-ethernetLen, 0))
		switch {
		case p == nil:
			e.drop(legOverlay, dropNetwork)
		case len(f) < ethernetLen:
			e.drop(legOverlay, dropMalformed)
		case [6]byte(f[:6]) != p.MAC && f[0]&1 == 0:
			e.drop(legOverlay, dropNotForUs)
		default:
			e.fromOverlay(now, set, p, w, f)
		}
	}
	e.flushWriter(w)
	e.writers.Put(w)
}

func (e *Engine) fromOverlay(now int64, set *netSet, p *port, w *writer, frame []byte) {
	switch uint16(frame[12])<<8 | uint16(frame[13]) {
	case 0x0800, 0x86dd:
	case 0x0806:
		e.stats.local.Add(1)
		ready, from := p.neigh.HandleARP(now, frame[ethernetLen:])
		e.sendReady(now, p, ready, from)
		return
	default:
		e.drop(legOverlay, dropEtherType)
		return
	}
	v := &w.view
	if r := ipkt.Parse(frame[ethernetLen:], v); r != ipkt.OK {
		e.drop(legOverlay, drop(r))
		return
	}
	f, forward := e.table.Lookup(now, nat.Overlay, v)
	if f == nil || frame[0]&1 != 0 {
		e.noFlow(now, set, p, w, v)
		return
	}
	if f.Network != p.ID {
		e.drop(legOverlay, dropSpoofed)
		return
	}
	if f.Generation.Load() != set.generation && !e.stillAllowed(set, f) {
		e.table.Remove(f)
		e.drop(legOverlay, dropPolicy)
		return
	}
	e.stats.hits.Add(1)
	e.toVPC(now, p, w, f, forward, v)
}

// toVPC sends a packet of a flow to the VPC side.
func (e *Engine) toVPC(now int64, p *port, w *writer, f *nat.Flow, forward bool, v *ipkt.View) {
	switch {
	case v.TTL <= 1:
		e.refuse(legOverlay, dropTTL, ipkt.TimeExceeded, v)
		return
	case len(v.B) > e.vpcMTU && v.DontFrag:
		e.drop(legOverlay, dropTooBig)
		e.sendError(legOverlay, ipkt.TooBig, v, e.vpcMTU)
		return
	}
	if v.Proto == ipkt.TCP && v.Flags&ipkt.SYN != 0 {
		e.clamp(legOverlay, p, v)
	}
	f.Apply(now, forward, v)
	v.DecrementTTL()
	p.fwd.count(overlayToVPC, v)
	if len(v.B) > e.vpcMTU {
		ipkt.Fragment4(v, e.vpcMTU, func(b []byte) { e.append(w, b) })
		return
	}
	e.append(w, v.B)
}

func (e *Engine) append(w *writer, b []byte) {
	if !w.add(b) {
		e.flushWriter(w)
		w.add(b)
	}
}

// noFlow handles packets from the overlay that belong to no flow: for the gateway
// itself, ICMP errors, neighbour discovery; everything else is unsolicited.
func (e *Engine) noFlow(now int64, set *netSet, p *port, w *writer, v *ipkt.View) {
	if neigh.IsNDP(v) {
		e.stats.local.Add(1)
		ready, from := p.neigh.HandleNDP(now, v)
		e.sendReady(now, p, ready, from)
		return
	}
	if v.IsICMPError() && v.TTL > 1 {
		if f, _ := e.table.TranslateError(nat.Overlay, v); f != nil {
			if f.Network != p.ID {
				e.drop(legOverlay, dropSpoofed)
				return
			}
			v.DecrementTTL()
			p.fwd.count(overlayToVPC, v)
			e.append(w, v.B)
			return
		}
	}
	dst := v.Destination()
	if _, own := set.own[dst]; own && (dst == p.v4 || dst == p.v6 || containsAddr(p.Addresses, dst)) {
		e.local.inject(v.B)
		e.stats.local.Add(1)
		return
	}
	switch {
	case dst.IsMulticast() || dst.Is4() && dst.As4() == [4]byte{255, 255, 255, 255}:
		e.drop(legOverlay, dropForbidden)
	case !v.First:
		e.drop(legOverlay, dropFragment)
	default:
		e.stats.misses.Add(1)
		e.drop(legOverlay, dropNoFlow)
	}
}

func containsAddr(list []netip.Prefix, a netip.Addr) bool {
	for _, p := range list {
		if p.Addr() == a {
			return true
		}
	}
	return false
}

// sendReady sends packets that waited for a neighbour.
func (e *Engine) sendReady(now int64, p *port, packets [][]byte, hop netip.Addr) {
	for _, b := range packets {
		var v ipkt.View
		if ipkt.Parse(b, &v) != ipkt.OK {
			continue
		}
		if h := e.resolve(now, p, hop, &v); h != nil {
			if len(v.B) > p.MTU {
				ipkt.Fragment4(&v, p.MTU, func(b []byte) { e.writeFrame(p.ID, append(h.Ethernet[:], b...)) })
				continue
			}
			e.writeFrame(p.ID, append(h.Ethernet[:], v.B...))
		}
	}
}
