package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"ztgate/netstack"
	"ztgate/router/control"
)

const (
	beatEvery = 5 * time.Second
	// beatsMissed in a row mean that the plane has stopped working.
	beatsMissed = 3
)

// pulse tells whether the forwarding plane goes on: its timers, and the reader of the
// interface. When nobody else sends packets, it does.
type pulse struct {
	read  func() netstack.Pulse
	knock func() error // sends a packet that the plane reads

	mu     sync.Mutex
	last   netstack.Pulse
	fresh  bool // last is of one beat ago, and there has been a packet to read since
	missed int
	what   string // that stands still
}

// run beats until ctx ends.
func (p *pulse) run(ctx context.Context) error {
	t := time.NewTicker(beatEvery)
	defer t.Stop()
	for {
		p.beat()
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (p *pulse) beat() {
	now := p.read()
	// Whatever keeps a packet from being sent is somebody else's fault.
	knocked := p.knock() == nil
	p.mu.Lock()
	defer p.mu.Unlock()
	reads := now.Packets != p.last.Packets || !p.fresh
	ticks := now.Rounds != p.last.Rounds || p.last == (netstack.Pulse{})
	p.last, p.fresh = now, knocked
	switch {
	case reads && ticks:
		p.missed, p.what = 0, ""
		return
	case !ticks:
		p.what = "its timers stand still"
	default:
		p.what = "it reads nothing"
	}
	p.missed++
}

// alive reports whether the plane goes on, as far as is known.
func (p *pulse) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.missed < beatsMissed
}

func (p *pulse) check() control.Check {
	const name = "data_path"
	if p.alive() {
		return control.Passed(name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return control.Failed(name, control.Down, fmt.Sprintf("the forwarding plane doesn't work: %s", p.what), "restart ztgate; a service manager does so by itself")
}

// knockPort is where nobody listens (discard).
const knockPort = 9

// errNoKnock: a packet to anybody else would be refused, and shown as a client's.
var errNoKnock = errors.New("the plane has no address that answers this host")

// knock sends a packet through the interface to the plane, to its own address on a network,
// where it is answered.
func (g *gateway) knock() error {
	dst := g.ownAddress()
	if !dst.IsValid() {
		return errNoKnock
	}
	return g.in.knock(netip.AddrPortFrom(dst, knockPort))
}

// ownAddress returns an address of the plane on a network, of the family that this host
// has an address of on the interface if there is one; invalid without any.
func (g *gateway) ownAddress() (own netip.Addr) {
	for _, n := range g.planned().Networks {
		for _, p := range n.Addresses {
			if a := p.Addr(); !own.IsValid() || g.vpcAddress(a.Is6()).IsValid() && !g.vpcAddress(own.Is6()).IsValid() {
				own = a
			}
		}
	}
	return own
}

// vpcAddress returns this host's address on the interface, invalid if it has none.
func (g *gateway) vpcAddress(v6 bool) netip.Addr {
	for _, p := range g.config().VPC.Address {
		if p.Addr().Is6() == v6 {
			return p.Addr()
		}
	}
	return netip.Addr{}
}
