package vl1

import (
	"slices"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// queued is a packet that cannot be sent yet (chapter 02 §5.1).
type queued struct {
	dst     identity.Address
	verb    packet.Verb
	payload []byte
	opts    SendOpts
	born    int64
}

// outQueue holds packets for peers that are unknown or unreachable.
type outQueue struct{ list []queued }

// add queues a copy of a packet, in place of the oldest one if there is no room. It reports
// whether the packet was queued, and whether one, it or another, was lost.
func (o *outQueue) add(q queued) (ok, lost bool) {
	mine := 0
	for _, x := range o.list {
		if x.dst == q.dst {
			mine++
		}
	}
	if mine >= maxOutQueuePeer {
		return false, true
	}
	if lost = len(o.list) >= maxOutQueue; lost {
		o.list = slices.Delete(o.list, 0, 1)
	}
	q.payload = slices.Clone(q.payload)
	o.list = append(o.list, q)
	return true, lost
}

// take removes what is for a peer, and returns it.
func (o *outQueue) take(dst identity.Address) (mine []queued) {
	o.list, mine = split(o.list, func(q queued) bool { return q.dst == dst })
	return mine
}

func (o *outQueue) expire(t int64) {
	o.list = slices.DeleteFunc(o.list, func(q queued) bool { return since(t, q.born) >= queueTimeout })
}

// split takes out of a list what belongs together.
func split[T any](list []T, mine func(T) bool) (rest, taken []T) {
	rest = slices.DeleteFunc(list, func(x T) bool {
		if !mine(x) {
			return false
		}
		taken = append(taken, x)
		return true
	})
	return rest, taken
}

// flushQueue sends what waited for p.
func (c *Core) flushQueue(w *Worker, p *Peer) {
	if p.route.Load() == nil {
		return
	}
	c.mu.Lock()
	mine := c.queue.take(p.addr)
	c.mu.Unlock()
	for _, q := range mine {
		c.sendNow(w, p, q.verb, q.payload, q.opts)
	}
}

// maxAsked marks held packets that cause no question.
const maxAsked = 3

// heldPacket is a packet whose sender isn't known yet (chapter 01 §7.3).
type heldPacket struct {
	from  identity.Address
	src   Source
	data  []byte
	born  int64
	asked int

	opened bool // it was a sealed HELLO
}

// heldQueue holds packets of unknown senders.
type heldQueue struct{ list []heldPacket }

// full reports whether another packet would displace one.
func (h *heldQueue) full() bool { return len(h.list) >= maxHeld }

// add holds a copy of a packet, in place of the oldest one if there is no room. It reports
// whether the packet is held, and whether one, it or another, was lost.
func (h *heldQueue) add(q heldPacket) (ok, lost bool) {
	n := 0
	for _, x := range h.list {
		if x.src.Endpoint.Addr() == q.src.Endpoint.Addr() && x.from == q.from {
			n++
		}
	}
	if n >= maxHeldSource {
		return false, true
	}
	if lost = h.full(); lost {
		h.list = slices.Delete(h.list, 0, 1)
	}
	q.data = slices.Clone(q.data)
	h.list = append(h.list, q)
	return true, lost
}

// addChecked holds a copy of the HELLO of a stranger whose identity is being checked. The
// caller knows that there is room.
func (h *heldQueue) addChecked(q heldPacket) {
	q.asked, q.data = maxAsked, slices.Clone(q.data)
	h.list = append(h.list, q)
}

// dropChecked forgets the HELLO of a stranger whose identity is wrong.
func (h *heldQueue) dropChecked(from identity.Address) {
	h.list = slices.DeleteFunc(h.list, func(q heldPacket) bool { return q.from == from && q.asked == maxAsked })
}

// take removes the packets of a sender, and returns them.
func (h *heldQueue) take(from identity.Address) (mine []heldPacket) {
	h.list, mine = split(h.list, func(q heldPacket) bool { return q.from == from })
	return mine
}

// due drops what waited too long and returns the senders to be asked for once more.
func (h *heldQueue) due(t int64) (ask []identity.Address) {
	h.list = slices.DeleteFunc(h.list, func(q heldPacket) bool { return since(t, q.born) >= queueTimeout })
	for i := range h.list {
		q := &h.list[i]
		age := since(t, q.born)
		if q.asked == 1 && age >= time.Second || q.asked == 2 && age >= 3*time.Second {
			q.asked++
			ask = append(ask, q.from)
		}
	}
	return ask
}

func (c *Core) hold(w *Worker, src Source, p packet.Packet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ok, lost := c.held.add(heldPacket{from: p.Source(), src: src, data: p, born: w.t, asked: 1})
	if lost {
		w.stats.rejects[RejectUnknownSender].Add(1)
	}
	if ok {
		c.askWhoisLocked(w, p.Source(), true)
	}
}

// retryPacket is one that the network layer wants to see again.
type retryPacket struct {
	from *Peer
	src  Source
	data []byte
	born int64
}

// retryQueue holds packets that the network layer wants to see again.
type retryQueue struct{ list []retryPacket }

// add keeps a copy of a packet; false if there is no room.
func (r *retryQueue) add(q retryPacket) bool {
	n := 0
	for _, x := range r.list {
		if x.from == q.from {
			n++
		}
	}
	if n >= maxRetryPeer || len(r.list) >= maxRetry {
		return false
	}
	q.data = slices.Clone(q.data)
	r.list = append(r.list, q)
	return true
}

// putBack keeps a packet that was taken.
func (r *retryQueue) putBack(q retryPacket) { r.list = append(r.list, q) }

// take removes the packets of a peer, nil: of all, and returns those that are not too
// old.
func (r *retryQueue) take(t int64, from *Peer) (mine []retryPacket) {
	r.list = slices.DeleteFunc(r.list, func(q retryPacket) bool { return since(t, q.born) >= queueTimeout })
	r.list, mine = split(r.list, func(q retryPacket) bool { return from == nil || q.from == from })
	return mine
}

func (c *Core) keepForRetry(w *Worker, from *Peer, p packet.Packet, src Source) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.retries.add(retryPacket{from, src, p, w.t}) {
		w.stats.rejects[RejectQueueFull].Add(1)
	}
}

// retry hands kept packets of a peer (nil: of all) to the network layer again.
func (c *Core) retry(w *Worker, from *Peer) {
	c.mu.Lock()
	mine := c.retries.take(w.t, from)
	c.mu.Unlock()
	for _, q := range mine {
		res := c.cfg.Upper.HandlePacket(w, q.from, packet.Packet(slices.Clone(q.data)), q.src)
		if res.Trust {
			c.trusts(w, q.from)
		}
		if res.Retry {
			c.mu.Lock()
			c.retries.putBack(q)
			c.mu.Unlock()
		}
	}
}
