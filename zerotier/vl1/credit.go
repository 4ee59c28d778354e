package vl1

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/packet"
)

// Bounds of what is sent to addresses that have proven nothing: their senders may be
// faked, and whoever fakes them must not gain by it.
const (
	creditSources  = 4096 // told apart
	creditLifetime = 10 * time.Second
	maxCredit      = 4096 // bytes

	unprovenRate  = 1 << 20 // bytes a second to all of them
	unprovenBurst = 1 << 20
	unprovenTime  = time.Second / unprovenRate

	// Probes of one address that others told us.
	toldEvery = 250 * time.Millisecond
	toldBurst = 16
)

// credit is what may be sent to addresses that have proven nothing: never more bytes than
// came from them in authentic packets.
type credit struct {
	seed maphash.Seed
	sent rate.Shared             // to all of them
	told *rate.Table[netip.Addr] // probes of addresses that others told

	mu    sync.Mutex
	slots []creditSlot
}

// creditSlot belongs to the latest of the addresses that share it.
type creditSlot struct {
	key   uint64
	at    int64
	bytes int
}

func newCredit() credit {
	return credit{seed: maphash.MakeSeed(), told: rate.NewTable[netip.Addr](creditSources), slots: make([]creditSlot, creditSources)}
}

// slotLocked returns the slot of an address, empty if it was another's.
func (c *credit) slotLocked(t int64, a netip.Addr) *creditSlot {
	key := maphash.Comparable(c.seed, a)
	s := &c.slots[key%creditSources]
	if s.key != key || since(t, s.at) >= creditLifetime {
		*s = creditSlot{key: key, at: t}
	}
	return s
}

// add notes bytes that came from an address.
func (c *credit) add(t int64, a netip.Addr, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.slotLocked(t, a)
	s.at, s.bytes = t, min(s.bytes+n, maxCredit)
}

// take reports whether so many bytes may be sent to an address, and notes them.
func (c *credit) take(t int64, a netip.Addr, n int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.slotLocked(t, a)
	if s.bytes < n || !c.sent.Take(t, n, unprovenTime, unprovenBurst) {
		return false
	}
	s.bytes -= n
	return true
}

// mayProbe limits the probes of an address that somebody told us.
func (c *credit) mayProbe(t int64, a netip.Addr) bool {
	return c.told.Of(a).Take(t, 1, toldEvery, toldBurst)
}

// hasPathLocked reports whether an endpoint is that of a path of p, which answered a
// probe.
func (p *Peer) hasPathLocked(ep netip.AddrPort, t int64) bool {
	for _, pa := range p.paths {
		if pa.ep == ep && !pa.expired(t) {
			return true
		}
	}
	return false
}

// provenLocked reports whether the place that a packet came from is proven: it is that of
// a path of the sender, or of a root that relayed the packet. How many relays a packet
// passed is not authenticated.
func (c *Core) provenLocked(p *Peer, src Source, t int64) bool {
	if src.Hops == 0 {
		return p.hasPathLocked(src.Endpoint, t)
	}
	for a := range c.worlds.Load().upstreams {
		if root := c.Peer(a); root != nil && root.hasPathLocked(src.Endpoint, t) {
			return true
		}
	}
	return false
}

// deposit notes an authentic packet that did not come from where its sender was heard
// last.
func (c *Core) deposit(w *Worker, p *Peer, src *Source) {
	if src.Hops > 0 {
		p = c.best.Load()
	}
	if p != nil {
		if pa := p.lastPath.Load(); pa != nil && pa.ep == src.Endpoint && !pa.expired(w.t) {
			return
		}
	}
	c.credit.add(w.t, src.Endpoint.Addr(), src.size)
}

// mayAnswerLocked reports whether so many bytes may be sent to where a packet came from.
func (c *Core) mayAnswerLocked(w *Worker, p *Peer, src Source, size int) bool {
	if c.provenLocked(p, src, w.t) || c.credit.take(w.t, src.Endpoint.Addr(), size) {
		return true
	}
	w.stats.rejects[RejectUnproven].Add(1)
	return false
}

// owedEcho is an ECHO that is answered once its endpoint is proven: without a payload the
// answer is longer than the question.
type owedEcho struct {
	at  int64
	src Source
	id  packet.ID
}
