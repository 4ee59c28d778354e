package vl1

import (
	"net/netip"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// A second node with our identity takes turns with us: who wants us gets whichever a root
// heard last, and nobody says so. Both could see it only in what comes to their own
// address from their own address. So each node now and then says HELLO to itself
// through its roots, with a number of its own in place of a planet's revision and the
// address at which the root sees it: it comes back to itself, or to the other.
const (
	selfEvery    = time.Minute
	selfEveryLow = 10 * time.Minute // in low bandwidth mode
	selfFirst    = 10 * time.Second // after the start
	selfRelay    = 5 * time.Second  // between those of one node that a root passes to all its paths
	selfBurst    = 4
	selfSay      = 10 * time.Minute // between messages in the log
)

// twin is what is known of another node with our identity.
type twin struct {
	keys     *packet.Keys // shared with ourselves
	instance int64        // tells this process from others
	last     int64        // when we said HELLO to ourselves
	answered int64
	said     int64
	seen     Duplicate
	at       int64
}

// Duplicate says that another node uses our identity, or our address with another
// identity.
type Duplicate struct {
	At        time.Time      // last; zero = never
	Endpoint  netip.AddrPort // where it is, as a root sees it; invalid = unknown
	Collision bool           // it has another identity
}

// Duplicate returns the latest evidence of another node in our place.
func (c *Core) Duplicate() Duplicate {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.twin.seen
	d.At = c.timeOf(c.twin.at)
	return d
}

// seeTwinLocked notes evidence of another node in our place.
func (c *Core) seeTwinLocked(t int64, d Duplicate) {
	w := &c.twin
	if w.said == 0 || since(t, w.said) >= selfSay || w.seen != d {
		w.said = t
		if d.Collision {
			c.log.Error("another node uses the address of our identity; this node is not reachable until one of them gets a new identity", "address", c.self)
		} else {
			c.log.Error("another node uses our identity: stop one of them, or give it an identity of its own", "address", c.self, "endpoint", d.Endpoint)
		}
	}
	w.seen, w.at = d, t
}

// helloSelfLocked says HELLO to ourselves through the roots.
func (c *Core) helloSelfLocked(w *Worker) {
	every := selfEvery
	if c.cfg.LowBandwidth {
		every = selfEveryLow
	}
	due := c.twin.last == 0 && w.t >= int64(time.Hour+selfFirst) || c.twin.last != 0 && since(w.t, c.twin.last) >= every
	if !due || c.IsRoot() {
		return
	}
	c.twin.last = w.t
	for a := range c.worlds.Load().upstreams {
		if p := c.Peer(a); p != nil {
			if pa := p.directPath(); pa != nil {
				c.sendSelfLocked(w, pa.sock, pa.ep, c.surface.reported(a))
			}
		}
	}
}

func (c *Core) sendSelfLocked(w *Worker, sock SocketID, to, seenAt netip.AddrPort) {
	h := hello{version: c.version, timestamp: c.clock.stamp(w.t), identity: c.id, sentTo: seenAt, planetTimestamp: c.twin.instance}
	b := packet.Packet(h.append(make([]byte, packet.HeaderLen, 256)))
	packet.PutHeader(b, packet.ID(w.random.Uint64()), c.self, c.self, packet.VerbHello)
	c.twin.keys.MaskHello(b, h.masked, &w.scratch)
	c.twin.keys.Seal(b, packet.SuitePoly1305, &w.scratch)
	w.stats.txPackets.Add(1)
	w.stats.txBytes.Add(uint64(len(b)))
	w.out.Send(sock, to, nil, b)
}

// receiveSelf handles a packet from our own address: ours that came back, that of another
// node with our identity, or a forgery.
func (c *Core) receiveSelf(w *Worker, src Source, p packet.Packet) {
	if p.Destination() != c.self || p.Suite() != packet.SuitePoly1305 || p.Fragmented() || p.Verb() != packet.VerbHello || p.Compressed() {
		w.stats.rejects[RejectOwnAddress].Add(1)
		return
	}
	src.Hops = p.Hops()
	h, ok := parseHello(p.Payload())
	if !ok || c.twin.keys.Open(p, &w.scratch) != nil || !h.identity.Equal(c.id) {
		w.stats.rejects[RejectOwnAddress].Add(1)
		return
	}
	if h.planetTimestamp == c.twin.instance || h.timestamp < c.clock.stamp(int64(time.Hour)) || c.repeat.seen(p.ID()) {
		return // ours, of before our start, or captured
	}
	d := Duplicate{Endpoint: src.Endpoint}
	if src.Hops > 0 {
		d.Endpoint = h.sentTo
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seeTwinLocked(w.t, d)
	// A root may lead everything to us: let the other know too.
	if src.Hops > 0 && d.Endpoint.IsValid() && (c.twin.answered == 0 || since(w.t, c.twin.answered) >= selfEvery/2) && c.credit.mayProbe(w.t, d.Endpoint.Addr()) {
		c.twin.answered = w.t
		c.sendSelfLocked(w, 0, d.Endpoint, netip.AddrPort{})
	}
}

// relaySelf passes on, as a root, what a node says to itself: to all its paths but the one it
// came by. Nobody can check it, so that it is done seldom.
func (c *Core) relaySelf(w *Worker, src Source, p packet.Packet) {
	peer := c.Peer(p.Source())
	if peer == nil || len(p) > packet.DefaultMTU/4 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !peer.selves.Take(w.t, selfRelay, selfBurst) {
		w.stats.rejects[RejectRelayRate].Add(1)
		return
	}
	for _, pa := range peer.paths {
		if pa.ep != src.Endpoint && !pa.expired(w.t) {
			w.out.Send(pa.sock, pa.ep, nil, p)
			c.stats.relayed.Add(1)
		}
	}
}

// reported returns where a node sees us, the zero value if it has not said.
func (s *surface) reported(by identity.Address) netip.AddrPort {
	var latest surfaceEntry
	for k, e := range s.m {
		if k.reporter == by && e.at >= latest.at {
			latest = e
		}
	}
	return latest.addr
}
