package netstack

import (
	"fmt"
	"net/netip"
	"slices"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/neigh"
)

// netSet is everything that packets are judged and routed by. It is immutable.
type netSet struct {
	generation  uint32
	attachments map[uint64]*attachment
	slots       []*attachment           // by number; nil = not joined
	routes      []overlayRoute          // longest prefix first
	own         map[netip.Addr]struct{} // addresses of the gateway on any side
	broadcasts  map[netip.Addr]struct{} // of attached subnets
	forwards    map[forwardKey]*PortForward
	backwards   map[forwardKey]*PortForward // by target, those without masquerading
	maps        []AddressMap
	vpc4, vpc6  netip.Addr // of the gateway on the VPC side
	conflicts   int        // overlay routes that would lead VPC traffic astray
}

type forwardKey struct {
	addr  netip.Addr
	port  uint16
	proto uint8
}

type overlayRoute struct {
	target netip.Prefix
	via    netip.Addr
	at     *attachment // nil = the VPC side
}

// attachment is how the gateway takes part in one network.
type attachment struct {
	Network
	mac    uint64 // MAC as a number
	slot   uint16
	neigh  *neigh.Table
	v4, v6 netip.Addr    // ours on the network
	fwd    *pathCounters // kept when the network's configuration changes
}

// address returns our address of a family on the network.
func (at *attachment) address(v6 bool) netip.Addr {
	if v6 {
		return at.v6
	}
	return at.v4
}

func (e *Engine) setNetworks(nets []Network) error {
	old := e.set.Load()
	e.generation++
	s := &netSet{generation: e.generation, attachments: make(map[uint64]*attachment), own: make(map[netip.Addr]struct{}),
		broadcasts: make(map[netip.Addr]struct{}), maps: e.maps}
	var local []netip.Prefix
	own := func(a netip.Prefix) {
		s.own[a.Addr()] = struct{}{}
		local = append(local, a)
		s.addBroadcast(a)
	}
	for _, a := range e.cfg.VPC.Addresses {
		own(a)
		if a.Addr().Is4() && !s.vpc4.IsValid() {
			s.vpc4 = a.Addr()
		} else if a.Addr().Is6() && !s.vpc6.IsValid() {
			s.vpc6 = a.Addr()
		}
	}
	for _, p := range e.cfg.VPC.Sources {
		s.addBroadcast(p)
		if p.Bits() > 0 {
			s.routes = append(s.routes, overlayRoute{target: p.Masked()})
		}
	}
	for _, n := range nets {
		at, err := e.attach(old, n)
		if err != nil {
			return err
		}
		s.attachments[n.ID] = at
		s.conflicts += n.Conflicts
		for _, a := range n.Addresses {
			own(a)
			e.addRoute(s, overlayRoute{target: a.Masked(), at: at})
		}
		for _, r := range n.Routes {
			if _, mine := s.own[r.Via]; !mine {
				e.addRoute(s, overlayRoute{r.Target.Masked(), r.Via, at})
			}
		}
	}
	// Stable: where prefixes are equal, the VPC's come first.
	slices.SortStableFunc(s.routes, func(a, b overlayRoute) int { return b.target.Bits() - a.target.Bits() })
	s.slots = make([]*attachment, len(e.slots))
	for _, at := range s.attachments {
		s.slots[at.slot] = at
		at.neigh.SetProxy(s.aliases(at.ID))
	}
	e.setForwards(s)
	if err := e.local.setAddresses(local); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	e.set.Store(s)
	for _, at := range s.attachments {
		for _, a := range at.Addresses {
			if _, had := old.ownOn(at.ID)[a.Addr()]; !had {
				at.neigh.Announce(a.Addr())
			}
		}
	}
	return nil
}

// ownOn returns our addresses on a network.
func (s *netSet) ownOn(network uint64) map[netip.Addr]struct{} {
	if s == nil || s.attachments[network] == nil {
		return nil
	}
	out := make(map[netip.Addr]struct{})
	for _, a := range s.attachments[network].Addresses {
		out[a.Addr()] = struct{}{}
	}
	return out
}

// addRoute adds a route of a network, unless it is one to a part of the VPC: its
// traffic keeps its own way (RFC 4787 REQ-7). An address map is the remedy.
func (e *Engine) addRoute(s *netSet, r overlayRoute) {
	for _, p := range e.cfg.VPC.Sources {
		if p.Bits() > 0 && r.target.Bits() >= p.Bits() && p.Overlaps(r.target) {
			s.conflicts++
			e.log.Warn("overlay route overlaps the VPC and is not used", "network", networkLabel(r.at.ID), "route", r.target, "vpc", p)
			return
		}
		if r.target.Bits() > 0 && p.Bits() > 0 && p.Overlaps(r.target) {
			s.conflicts++
			e.log.Warn("overlay route surrounds the VPC, whose own traffic doesn't use it", "network", networkLabel(r.at.ID), "route", r.target, "vpc", p)
		}
	}
	s.routes = append(s.routes, r)
}

func (s *netSet) addBroadcast(p netip.Prefix) {
	if !p.Addr().Is4() || p.Bits() >= 31 || p.Bits() == 0 {
		return
	}
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	s.broadcasts[netip.AddrFrom4(b)] = struct{}{}
}

// setForwards fills the tables of forwards and keeps their ports free of others.
func (e *Engine) setForwards(s *netSet) {
	s.forwards, s.backwards = make(map[forwardKey]*PortForward), make(map[forwardKey]*PortForward)
	reserved := map[uint8][]netip.AddrPort{}
	for i := range e.forwards {
		f := &e.forwards[i]
		s.forwards[forwardKey{f.Listen.Addr(), f.Listen.Port(), f.Proto}] = f
		if !f.Masquerade {
			s.backwards[forwardKey{f.To.Addr(), f.To.Port(), f.Proto}] = f
		}
		for a := range s.own {
			if l := f.Listen.Addr(); l == a || l.IsUnspecified() && l.Is4() == a.Is4() {
				reserved[f.Proto] = append(reserved[f.Proto], netip.AddrPortFrom(a, f.Listen.Port()))
			}
		}
	}
	for _, proto := range []uint8{ipkt.TCP, ipkt.UDP} {
		e.table.Reserve(proto, reserved[proto])
	}
}

// forward returns the forward that listens on an address of ours.
func (s *netSet) forward(proto uint8, a netip.Addr, port uint16) *PortForward {
	if len(s.forwards) == 0 {
		return nil
	}
	if f := s.forwards[forwardKey{a, port, proto}]; f != nil {
		return f
	}
	any := netip.IPv4Unspecified()
	if a.Is6() {
		any = netip.IPv6Unspecified()
	}
	return s.forwards[forwardKey{any, port, proto}]
}

// minMTU6 is what every link must carry where IPv6 is used (RFC 8200 §5).
const minMTU6 = 1280

func checkMTU(what string, mtu int, addresses []netip.Prefix) error {
	least := 68 // RFC 791 §3.2
	for _, a := range addresses {
		if a.Addr().Is6() {
			least = minMTU6
		}
	}
	if mtu < least {
		return fmt.Errorf("netstack: MTU %d of %s: want at least %d", mtu, what, least)
	}
	return nil
}

func (e *Engine) attach(old *netSet, n Network) (*attachment, error) {
	if err := checkMTU("network "+networkLabel(n.ID), n.MTU, n.Addresses); err != nil {
		return nil, err
	}
	slot, ok := e.slots[n.ID]
	if !ok {
		const maxSlots = 1 << 12
		if len(e.slots) == maxSlots {
			return nil, fmt.Errorf("netstack: more than %d networks", maxSlots)
		}
		slot = uint16(len(e.slots))
		e.slots[n.ID] = slot
	}
	at := &attachment{Network: n, mac: macNumber(n.MAC), slot: slot}
	var own []netip.Addr
	for _, a := range n.Addresses {
		own = append(own, a.Addr())
		if a.Addr().Is4() && !at.v4.IsValid() {
			at.v4 = a.Addr()
		} else if a.Addr().Is6() && !at.v6.IsValid() {
			at.v6 = a.Addr()
		}
	}
	if old != nil && old.attachments[n.ID] != nil && old.attachments[n.ID].MAC == n.MAC {
		at.neigh, at.fwd = old.attachments[n.ID].neigh, old.attachments[n.ID].fwd
		at.neigh.SetOwn(own)
		return at, nil
	}
	at.fwd = &pathCounters{}
	at.neigh = neigh.New(n.MAC, own, func(frame []byte) { e.writeFrame(n.ID, frame) })
	return at, nil
}

// route finds the network and next hop of an address; nil if it isn't on the
// overlay.
func (s *netSet) route(a netip.Addr) (at *attachment, hop netip.Addr) {
	if r := s.lookup(a); r != nil && r.at != nil {
		if r.via.IsValid() {
			return r.at, r.via
		}
		return r.at, a
	}
	return nil, netip.Addr{}
}

func (s *netSet) lookup(a netip.Addr) *overlayRoute {
	for i := range s.routes {
		if s.routes[i].target.Contains(a) {
			return &s.routes[i]
		}
	}
	return nil
}
