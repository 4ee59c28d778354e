package vl1

import (
	"time"

	"ztgate/zerotier/identity"
)

// DirectLatency returns the latency of the direct path in use; false without one
// or while it is unknown.
func (p *Peer) DirectLatency() (time.Duration, bool) {
	r := p.route.Load()
	if r == nil || r.relay {
		return 0, false
	}
	l := time.Duration(r.path.latency.Load())
	return l, l > 0
}

// Reachable reports whether a packet for a could be sent now, directly or through a
// root.
func (c *Core) Reachable(a identity.Address) bool {
	p := c.Peer(a)
	return p != nil && p.route.Load() != nil
}

// NewPeer makes a peer that belongs to no [Core]: for tests of the layer above.
func NewPeer(id *identity.Identity) *Peer { return &Peer{id: id.Public(), addr: id.Address()} }
