package hostproxy

import (
	"net"
	"net/netip"
	"time"
)

// Connection is a TCP connection or a UDP session that is carried.
type Connection struct {
	Proto    string
	Client   netip.AddrPort
	At       netip.AddrPort // where the client connected to; its address is invalid if nobody told
	Behind   netip.Addr     // the load balancer that says so; invalid = none
	Source   netip.AddrPort // as the host sees it; invalid = not connected yet
	To       netip.AddrPort // the host
	Answered bool
	Age      time.Duration
	Idle     time.Duration
	In, Out  uint64 // bytes to the client and to the host
}

// Connections lists what is carried.
func (r *Proxy) Connections() []Connection {
	r.mu.Lock()
	var all []*entry
	for _, s := range []*shares{r.tcp, r.udp} {
		for e := range s.open {
			all = append(all, e)
		}
	}
	r.mu.Unlock()
	now := r.now()
	out := make([]Connection, len(all))
	for i, e := range all {
		out[i] = e.about()
		out[i].Age, out[i].Idle = now-e.began, e.idle(now)
		out[i].Answered, out[i].In, out[i].Out = e.answered.Load(), e.in.Load(), e.out.Load()
	}
	return out
}

func (c *conn) connection() Connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Connection{Proto: "tcp", Client: c.from, At: c.to, Behind: c.behind.Addr(), Source: sourceOf(c.host), To: c.forward.To}
}

func (x *session) connection() Connection {
	x.mu.Lock()
	defer x.mu.Unlock()
	return Connection{Proto: "udp", Client: x.from, At: netip.AddrPortFrom(x.local, x.forward.Listen.Port()), Source: sourceOf(x.host), To: x.forward.To}
}

// sourceOf is our end of a connection to a host, if it is there.
func sourceOf(host net.Conn) netip.AddrPort {
	if host == nil {
		return netip.AddrPort{}
	}
	if a, ok := host.LocalAddr().(interface{ AddrPort() netip.AddrPort }); ok {
		return unmapped(a)
	}
	return netip.AddrPort{}
}
