package vl1

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"ztgate/zerotier/packet"
)

// PhysicalNetwork is what the operator knows about a network that carries our
// datagrams (chapter 02 §4.13, §8.6). Of several that contain an address the first
// counts.
type PhysicalNetwork struct {
	Prefix    netip.Prefix
	MTU       int  // UDP payload, at most; 510 to 10324; 0 = 1432
	Blacklist bool // no paths through it
	// TrustedPath, if not 0, lets packets to and from the network go unencrypted and
	// unauthenticated, for peers that have the same number configured.
	TrustedPath uint64
}

// VirtualPeer is what the operator knows about a peer (chapter 02 §8.6).
type VirtualPeer struct {
	Try       []netip.AddrPort // tried while there is no path
	Blacklist []netip.Prefix   // no paths through them
}

// Bounds of local settings (chapter 02 §4.13).
const (
	maxPhysical = 32
	minMTU      = 510
	maxMTU      = 10324
)

// physical returns the settings for an address, nil without.
func (c *Core) physical(a netip.Addr) *PhysicalNetwork {
	for i := range c.cfg.Physical {
		if n := &c.cfg.Physical[i]; n.Prefix.Contains(a) {
			return n
		}
	}
	return nil
}

// mtu returns the size of datagrams to an address.
func (c *Core) mtu(a netip.Addr) int {
	if n := c.physical(a); n != nil && n.MTU > 0 {
		return min(max(n.MTU, minMTU), maxMTU)
	}
	return packet.DefaultMTU
}

// trustedPath returns the trusted path ID of an address, 0 if it has none. ID 0 is
// never trusted.
func (c *Core) trustedPath(a netip.Addr) uint64 {
	if n := c.physical(a); n != nil {
		return n.TrustedPath
	}
	return 0
}

// blacklisted reports whether the operator forbids a path to p.
func (c *Core) blacklisted(p *Peer, a netip.Addr) bool {
	if n := c.physical(a); n != nil && n.Blacklist {
		return true
	}
	v, ok := c.cfg.Virtual[p.addr]
	return ok && slices.ContainsFunc(v.Blacklist, func(x netip.Prefix) bool { return x.Contains(a) })
}

// suiteFor is what we send to p over a route. A trusted path is used only where it
// is the peer's own, not a relay's, and never towards roots (chapter 02 §2.4, §4.8).
func (c *Core) suiteFor(p *Peer, r *route) packet.Suite {
	if len(c.cfg.Physical) > 0 && !r.relay && c.trustedPath(r.path.ep.Addr()) != 0 && !c.IsUpstream(p.addr) {
		return packet.SuiteTrusted
	}
	return p.suite()
}

const tryEvery = 30 * time.Second

// tryConfiguredLocked sends HELLO to one of the endpoints that the operator gave for a
// peer, if there is no path (chapter 02 §4.7).
func (c *Core) tryConfiguredLocked(w *Worker, p *Peer) {
	v, ok := c.cfg.Virtual[p.addr]
	if !ok || len(v.Try) == 0 || p.lastTry != 0 && since(w.t, p.lastTry) < tryEvery || p.bestPathLocked(w.t) != nil {
		return
	}
	p.lastTry = w.t
	if ep := v.Try[rand.IntN(len(v.Try))]; c.allowed(p, ep) {
		c.sendHelloLocked(w, p, 0, ep)
	}
}
