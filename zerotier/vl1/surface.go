package vl1

import (
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// surfaceKey and surfaceEntry hold reports of our external addresses (chapter 02
// §4.9).
type surfaceKey struct {
	reporter identity.Address
	sock     SocketID
	ep       netip.AddrPort
	scope    packet.Scope
}

type surfaceEntry struct {
	addr    netip.AddrPort
	at      int64
	trusted bool
}

// noteSurface handles a report of our own external address.
func (c *Core) noteSurface(w *Worker, from *Peer, src Source, mine netip.AddrPort) {
	t := w.t
	scope := packet.ScopeOf(mine.Addr())
	if scope != packet.ScopeOf(src.Endpoint.Addr()) || scope <= packet.ScopeLoopback {
		return
	}
	root := c.IsUpstream(from.addr)
	if !root && !from.trusted(t) {
		return // a stranger must not make us advertise a victim's address
	}
	key := surfaceKey{from.addr, src.Socket, src.Endpoint, scope}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, had := c.surface[key]
	if !had && len(c.surface) >= maxSurface {
		if !root {
			return
		}
		for k, e := range c.surface { // roots count for more
			if !e.trusted {
				delete(c.surface, k)
				break
			}
		}
		if len(c.surface) >= maxSurface {
			return
		}
	}
	c.surface[key] = surfaceEntry{mine, t, root}
	if !had || !root || since(t, old.at) >= surfaceLifetime || old.addr.Addr() == mine.Addr() {
		return
	}
	c.log.Info("external address changed", "old", old.addr.Addr(), "new", mine.Addr())
	for k := range c.surface {
		if k.scope == scope && k.ep != src.Endpoint {
			delete(c.surface, k)
		}
	}
	c.eachPeer(func(p *Peer) {
		for _, pa := range p.paths {
			if pa.scope == scope && pa.ep.Addr().Is4() == mine.Addr().Is4() && pa.ep != src.Endpoint {
				pa.dead.Store(true) // unproven until a packet arrives again
				pa.noteProbe(t)
				c.probe(w, p, pa.sock, pa.ep)
			}
		}
		c.updateRoute(p, t)
	})
}

func (c *Core) surfaceLocked() (out []netip.AddrPort) {
	for _, e := range c.surface {
		if !slices.Contains(out, e.addr) {
			out = append(out, e.addr)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}
