package netstack

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/neigh"
	"ztgate/netstack/policy"
)

// settings are what a snapshot is built from.
type settings struct {
	vpc      VPC // its MTU is known
	networks []Network
	forwards []PortForward
	maps     []AddressMap
	policy   *policy.Policy
}

// netSet is everything that packets are judged and routed by: one snapshot, which
// is replaced as a whole. It is immutable.
type netSet struct {
	settings
	generation  uint32
	attachments map[uint64]*attachment
	numbers     map[uint64]uint16       // of networks, for as long as the engine lives
	slots       []*attachment           // by number; nil = not joined
	routes      []overlayRoute          // longest prefix first
	own         map[netip.Addr]struct{} // addresses of the gateway on any side
	broadcasts  map[netip.Addr]struct{} // of attached subnets
	listeners   map[forwardKey]*PortForward
	backwards   map[forwardKey]*PortForward // by target, those without masquerading
	vpc4, vpc6  netip.Addr                  // of the gateway on the VPC side
	conflicts   []conflict
}

// conflict is an overlay route that overlaps the VPC.
type conflict struct {
	network    uint64
	route, vpc netip.Prefix
	surrounds  bool // the VPC's own traffic doesn't use it; else nothing does
}

// forwardKey is an end of a forward: where its clients send to, or its target.
type forwardKey struct {
	addr  netip.Addr
	port  uint16
	proto uint8
	from  Side // of the clients
}

// listens is the end that clients send to.
func (f *PortForward) listens() forwardKey {
	return forwardKey{f.Listen.Addr(), f.Listen.Port(), f.Proto, f.From}
}

// target is the end that they reach.
func (f *PortForward) target() forwardKey {
	return forwardKey{f.To.Addr(), f.To.Port(), f.Proto, f.From}
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

// conflictCount counts the overlay routes that overlap the VPC, with those that were
// left out already.
func (s *netSet) conflictCount() int {
	n := len(s.conflicts)
	for _, at := range s.attachments {
		n += at.Conflicts
	}
	return n
}

// sendFrame sends one frame to a network.
type sendFrame func(network uint64, frame []byte) bool

// build makes a snapshot from settings. It changes nothing: what goes on from the
// snapshot before, neighbours and counters, is shared with it.
func build(in settings, old *netSet, send sendFrame) (*netSet, error) {
	s := &netSet{settings: in, attachments: make(map[uint64]*attachment), numbers: make(map[uint64]uint16),
		own: make(map[netip.Addr]struct{}), broadcasts: make(map[netip.Addr]struct{})}
	if old != nil {
		s.generation = old.generation + 1
		maps.Copy(s.numbers, old.numbers)
	}
	if err := checkMTU("the VPC device", in.vpc.MTU, in.vpc.Addresses); err != nil {
		return nil, err
	}
	s.addVPC()
	for _, n := range in.networks {
		if err := s.addNetwork(n, old, send); err != nil {
			return nil, err
		}
	}
	// Stable: where prefixes are equal, the VPC's come first.
	slices.SortStableFunc(s.routes, func(a, b overlayRoute) int { return b.target.Bits() - a.target.Bits() })
	s.slots = make([]*attachment, len(s.numbers))
	for _, at := range s.attachments {
		s.slots[at.slot] = at
	}
	s.addForwards()
	return s, nil
}

// change puts edited settings into force.
func (e *Engine) change(edit func(*settings)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.set.Load()
	in := old.settings
	edit(&in)
	return e.swap(in, old)
}

// swap puts settings into force. e.mu is held, unless nobody knows the engine yet.
func (e *Engine) swap(in settings, old *netSet) error {
	s, err := build(in, old, e.writeFrame)
	if err != nil {
		return err
	}
	if err := e.local.setAddresses(slices.Collect(maps.Keys(s.own))); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	for _, c := range s.conflicts {
		text := "overlay route overlaps the VPC and is not used"
		if c.surrounds {
			text = "overlay route surrounds the VPC, whose own traffic doesn't use it"
		}
		e.log.Warn(text, "network", networkLabel(c.network), "route", c.route, "vpc", c.vpc)
	}
	for _, proto := range []uint8{ipkt.TCP, ipkt.UDP} {
		e.table.Reserve(proto, s.reserved(proto))
	}
	for _, at := range s.attachments {
		at.neigh.SetOwn(at.own())
		at.neigh.SetProxy(s.aliases(at.ID))
	}
	e.set.Store(s)
	for _, at := range s.attachments {
		var had []netip.Addr
		if old != nil && old.attachments[at.ID] != nil {
			had = old.attachments[at.ID].own()
		}
		for _, a := range at.own() {
			if !slices.Contains(had, a) {
				at.neigh.Announce(a)
			}
		}
	}
	return nil
}

// addVPC adds what belongs to the VPC side.
func (s *netSet) addVPC() {
	for _, a := range s.vpc.Addresses {
		s.addOwn(a)
		if a.Addr().Is4() && !s.vpc4.IsValid() {
			s.vpc4 = a.Addr()
		} else if a.Addr().Is6() && !s.vpc6.IsValid() {
			s.vpc6 = a.Addr()
		}
	}
	for _, p := range s.vpc.Sources {
		s.addBroadcast(p)
		if p.Bits() > 0 {
			s.routes = append(s.routes, overlayRoute{target: p.Masked()})
		}
	}
}

// addNetwork attaches a network.
func (s *netSet) addNetwork(n Network, old *netSet, send sendFrame) error {
	if err := checkMTU("network "+networkLabel(n.ID), n.MTU, n.Addresses); err != nil {
		return err
	}
	slot, ok := s.numbers[n.ID]
	if !ok {
		const maxNumbers = 1 << 12
		if len(s.numbers) == maxNumbers {
			return fmt.Errorf("netstack: more than %d networks", maxNumbers)
		}
		slot = uint16(len(s.numbers))
		s.numbers[n.ID] = slot
	}
	at := newAttachment(n, slot, old, send)
	s.attachments[n.ID] = at
	for _, a := range n.Addresses {
		s.addOwn(a)
		s.addRoute(overlayRoute{target: a.Masked(), at: at})
	}
	for _, r := range n.Routes {
		if !s.isOwn(r.Via) {
			s.addRoute(overlayRoute{r.Target.Masked(), r.Via, at})
		}
	}
	return nil
}

func (s *netSet) addOwn(a netip.Prefix) {
	s.own[a.Addr()] = struct{}{}
	s.addBroadcast(a)
}

// addRoute adds a route of a network, unless it is one to a part of the VPC: its
// traffic keeps its own way (RFC 4787 REQ-7). An address map is the remedy.
func (s *netSet) addRoute(r overlayRoute) {
	for _, p := range s.vpc.Sources {
		switch {
		case p.Bits() == 0 || !p.Overlaps(r.target):
		case r.target.Bits() >= p.Bits():
			s.conflicts = append(s.conflicts, conflict{network: r.at.ID, route: r.target, vpc: p})
			return
		case r.target.Bits() > 0:
			s.conflicts = append(s.conflicts, conflict{network: r.at.ID, route: r.target, vpc: p, surrounds: true})
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

// addForwards fills the tables of forwards.
func (s *netSet) addForwards() {
	s.listeners, s.backwards = make(map[forwardKey]*PortForward), make(map[forwardKey]*PortForward)
	for i := range s.forwards {
		f := &s.forwards[i]
		s.listeners[f.listens()] = f
		if !f.Masquerade {
			s.backwards[f.target()] = f
		}
	}
}

// reserved lists the ports that flows don't get because forwards listen there.
func (s *netSet) reserved(proto uint8) (out []netip.AddrPort) {
	for _, f := range s.forwards {
		if f.Proto != proto {
			continue
		}
		for a := range s.own {
			if l := f.Listen.Addr(); l == a || l.IsUnspecified() && l.Is4() == a.Is4() {
				out = append(out, netip.AddrPortFrom(a, f.Listen.Port()))
			}
		}
	}
	return out
}

// forward returns the forward that clients of a side reach at an address of ours.
func (s *netSet) forward(from Side, proto uint8, a netip.Addr, port uint16) *PortForward {
	if len(s.listeners) == 0 {
		return nil
	}
	if f := s.listeners[forwardKey{a, port, proto, from}]; f != nil {
		return f
	}
	any := netip.IPv4Unspecified()
	if a.Is6() {
		any = netip.IPv6Unspecified()
	}
	return s.listeners[forwardKey{any, port, proto, from}]
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

// newAttachment makes the attachment to a network, with the neighbours and counters
// of the one before.
func newAttachment(n Network, slot uint16, old *netSet, send sendFrame) *attachment {
	at := &attachment{Network: n, mac: macNumber(n.MAC), slot: slot}
	for _, a := range at.own() {
		if a.Is4() && !at.v4.IsValid() {
			at.v4 = a
		} else if a.Is6() && !at.v6.IsValid() {
			at.v6 = a
		}
	}
	if old != nil {
		if was := old.attachments[n.ID]; was != nil && was.MAC == n.MAC {
			at.neigh, at.fwd = was.neigh, was.fwd
			return at
		}
	}
	at.fwd = &pathCounters{}
	at.neigh = neigh.New(n.MAC, at.own(), func(frame []byte) { send(n.ID, frame) })
	return at
}

// own lists our addresses on the network.
func (at *attachment) own() (out []netip.Addr) {
	for _, a := range at.Addresses {
		out = append(out, a.Addr())
	}
	return out
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
