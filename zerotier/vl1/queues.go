package vl1

import (
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// flushQueue sends what waited for p.
func (c *Core) flushQueue(w *Worker, p *Peer) {
	if p.route.Load() == nil {
		return
	}
	var mine []queued
	c.mu.Lock()
	c.outQueue = slices.DeleteFunc(c.outQueue, func(q queued) bool {
		if q.dst == p.addr {
			mine = append(mine, q)
			return true
		}
		return false
	})
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
}

func (c *Core) hold(w *Worker, src Source, p packet.Packet) {
	t := w.t
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, q := range c.held {
		if q.src.Endpoint.Addr() == src.Endpoint.Addr() && q.from == p.Source() {
			n++
		}
	}
	if n >= maxHeldSource {
		w.stats.rejects[RejectUnknownSender].Add(1)
		return
	}
	if len(c.held) >= maxHeld {
		w.stats.rejects[RejectUnknownSender].Add(1)
		c.held = slices.Delete(c.held, 0, 1)
	}
	c.held = append(c.held, heldPacket{from: p.Source(), src: src, data: slices.Clone(p), born: t, asked: 1})
	c.askWhois(w, p.Source(), true)
}

// retryPacket is one that the network layer wants to see again.
type retryPacket struct {
	from *Peer
	src  Source
	data []byte
	born int64
}

func (c *Core) keepForRetry(w *Worker, from *Peer, p packet.Packet, src Source) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, q := range c.retries {
		if q.from == from {
			n++
		}
	}
	if n >= maxRetryPeer || len(c.retries) >= maxRetry {
		w.stats.rejects[RejectQueueFull].Add(1)
		return
	}
	c.retries = append(c.retries, retryPacket{from, src, slices.Clone(p), w.t})
}

// retry hands kept packets of a peer (nil: of all) to the network layer again.
func (c *Core) retry(w *Worker, from *Peer) {
	t := w.t
	c.mu.Lock()
	var mine []retryPacket
	c.retries = slices.DeleteFunc(c.retries, func(q retryPacket) bool {
		if since(t, q.born) >= queueTimeout {
			return true
		}
		if from == nil || q.from == from {
			mine = append(mine, q)
			return true
		}
		return false
	})
	c.mu.Unlock()
	for _, q := range mine {
		res := c.cfg.Upper.HandlePacket(w, q.from, packet.Packet(slices.Clone(q.data)), q.src)
		if res.Trust {
			q.from.lastTrust.Store(t)
		}
		if res.Retry {
			c.mu.Lock()
			c.retries = append(c.retries, q)
			c.mu.Unlock()
		}
	}
}
