package simnet

import (
	"net/netip"
	"time"
)

// Mapping is how a NAT chooses the outside port (RFC 4787 §4.1).
type Mapping uint8

// Mappings.
const (
	EndpointIndependent Mapping = iota // one port per inside endpoint
	Symmetric                          // one port per inside endpoint and destination
)

// NAT is a home router. From outside it lets in only what comes from an address
// and port that was sent to (address and port-dependent filtering).
type NAT struct {
	net     *Net
	public  netip.Addr
	mapping Mapping
	timeout time.Duration
	port    uint16
	out     map[flow]netip.AddrPort
	in      map[netip.AddrPort]*mapped
}

// flow is what a mapping is for; to is the zero value without symmetry.
type flow struct{ from, to netip.AddrPort }

type mapped struct {
	flow    flow
	inside  netip.AddrPort
	allowed map[netip.AddrPort]time.Time // last datagram sent there
}

// natTimeout is short for a home router, to make keep-alives matter.
const natTimeout = 30 * time.Second

// NewNAT adds a NAT with a public address.
func (n *Net) NewNAT(public netip.Addr, m Mapping) *NAT {
	nat := &NAT{net: n, mapping: m, timeout: natTimeout}
	nat.Renumber(public)
	return nat
}

// Renumber gives the NAT another public address; all mappings are lost.
func (a *NAT) Renumber(public netip.Addr) {
	delete(a.net.nats, a.public)
	a.public = public
	a.net.nats[public] = a
	a.out, a.in = make(map[flow]netip.AddrPort), make(map[netip.AddrPort]*mapped)
}

// Mappings returns how many mappings are in use.
func (a *NAT) Mappings() int { return len(a.in) }

// outward returns the source that a datagram has outside.
func (a *NAT) outward(now time.Time, from, to netip.AddrPort) netip.AddrPort {
	a.expire(now)
	f := flow{from: from}
	if a.mapping == Symmetric {
		f.to = to
	}
	public, ok := a.out[f]
	if !ok {
		a.port++
		public = netip.AddrPortFrom(a.public, 30000+a.port%30000)
		a.out[f] = public
		a.in[public] = &mapped{flow: f, inside: from, allowed: make(map[netip.AddrPort]time.Time)}
	}
	a.in[public].allowed[to] = now
	return public
}

// inward returns where a datagram from outside goes, if anywhere.
func (a *NAT) inward(now time.Time, from, to netip.AddrPort) (netip.AddrPort, bool) {
	a.expire(now)
	m := a.in[to]
	if m == nil {
		return netip.AddrPort{}, false
	}
	if _, ok := m.allowed[from]; !ok {
		return netip.AddrPort{}, false
	}
	return m.inside, true
}

// expire forgets what nothing was sent to for the timeout; what comes in does not
// refresh (RFC 4787 REQ-6 leaves that to the NAT).
func (a *NAT) expire(now time.Time) {
	for public, m := range a.in {
		for ep, at := range m.allowed {
			if now.Sub(at) >= a.timeout {
				delete(m.allowed, ep)
			}
		}
		if len(m.allowed) == 0 {
			delete(a.in, public)
			delete(a.out, m.flow)
		}
	}
}
