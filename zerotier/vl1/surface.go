package vl1

import (
	"net/netip"
	"slices"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// surface is what others report of our external addresses (chapter 02 §4.9).
type surface struct {
	m map[surfaceKey]surfaceEntry
}

// surfaceKey says who reported an address, and of what.
type surfaceKey struct {
	reporter identity.Address
	sock     SocketID
	ep       netip.AddrPort
	scope    packet.Scope
}

type surfaceEntry struct {
	addr netip.AddrPort
	at   int64
	root bool // by a root
}

// note remembers a report. It returns the address that the same root reported before
// if that was lately and another one.
func (s *surface) note(k surfaceKey, e surfaceEntry) (old netip.AddrPort, changed bool) {
	before, had := s.m[k]
	if !had && !s.room(e.root) {
		return netip.AddrPort{}, false
	}
	s.m[k] = e
	changed = had && e.root && since(e.at, before.at) < surfaceLifetime && before.addr.Addr() != e.addr.Addr()
	return before.addr, changed
}

// room reports whether another report can be remembered. Those of roots count for
// more than others'.
func (s *surface) room(root bool) bool {
	if len(s.m) < maxSurface {
		return true
	}
	if !root {
		return false
	}
	for k, e := range s.m {
		if !e.root {
			delete(s.m, k)
			return true
		}
	}
	return false
}

// forgetOthers forgets reports of a scope that did not come from an endpoint.
func (s *surface) forgetOthers(scope packet.Scope, ep netip.AddrPort) {
	for k := range s.m {
		if k.scope == scope && k.ep != ep {
			delete(s.m, k)
		}
	}
}

func (s *surface) expire(t int64) {
	for k, e := range s.m {
		if since(t, e.at) >= surfaceLifetime {
			delete(s.m, k)
		}
	}
}

// list returns the addresses, each once and in order.
func (s *surface) list() (out []netip.AddrPort) {
	for _, e := range s.m {
		if !slices.Contains(out, e.addr) {
			out = append(out, e.addr)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}

// noteSurface handles a report of our own external address.
func (c *Core) noteSurface(w *Worker, from *Peer, src Source, mine netip.AddrPort) {
	scope := packet.ScopeOf(mine.Addr())
	if scope != packet.ScopeOf(src.Endpoint.Addr()) || scope <= packet.ScopeLoopback {
		return
	}
	root := c.IsUpstream(from.addr)
	if !root && !from.trusted(w.t) {
		return // a stranger must not make us advertise a victim's address
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	old, changed := c.surface.note(surfaceKey{from.addr, src.Socket, src.Endpoint, scope}, surfaceEntry{mine, w.t, root})
	if !changed {
		return
	}
	c.log.Info("external address changed", "old", old.Addr(), "new", mine.Addr())
	c.surface.forgetOthers(scope, src.Endpoint)
	c.doubtPathsLocked(w, scope, mine.Addr().Is4(), src.Endpoint)
}

// doubtPathsLocked holds the paths of a scope and family for dead until they are heard
// again, but those to an endpoint that was heard just now.
func (c *Core) doubtPathsLocked(w *Worker, scope packet.Scope, v4 bool, heard netip.AddrPort) {
	c.eachPeer(func(p *Peer) {
		for _, pa := range p.paths {
			if pa.scope == scope && pa.ep.Addr().Is4() == v4 && pa.ep != heard {
				pa.dead.Store(true)
				pa.noteProbeLocked(w.t)
				c.probeLocked(w, p, pa.sock, pa.ep)
			}
		}
		c.updateRouteLocked(p, w.t)
	})
}
