package netstack

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
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
	// How overlay hosts are hidden from the VPC side.
	masquerade []Masquerade
}

// netSet is everything that packets are judged and routed by: one snapshot, which
// is replaced as a whole. It is immutable.
type netSet struct {
	settings
	generation  uint32
	attachments map[uint64]*attachment
	numbers     map[uint64]uint16          // of networks, for as long as the engine lives
	slots       []*attachment              // by number; nil = not joined
	routes      routeTable                 // of all networks
	own         map[netip.Addr]*attachment // the gateway's addresses as the VPC knows them; nil for those on the VPC side
	broadcasts  map[netip.Addr]struct{}    // as the VPC knows them
	listeners   map[forwardKey]*PortForward
	backwards   map[forwardKey]*PortForward       // by target, those without masquerading
	served      [numSides]map[netip.Addr]struct{} // addresses that forwards of a side name
	vpc4, vpc6  netip.Addr                        // of the gateway on the VPC side
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

// overlayRoute is a route of a network.
type overlayRoute struct {
	target netip.Prefix
	via    netip.Addr // invalid = on the link
	at     *attachment
}

// hop returns the next hop to an address.
func (r *overlayRoute) hop(a netip.Addr) netip.Addr {
	if r.via.IsValid() {
		return r.via
	}
	return a
}

// routeTable is routes with the longest prefixes first.
type routeTable []overlayRoute

// sort is stable: where prefixes are equal, the network named first has it.
func (t routeTable) sort() {
	slices.SortStableFunc(t, func(a, b overlayRoute) int { return b.target.Bits() - a.target.Bits() })
}

func (t routeTable) lookup(a netip.Addr) *overlayRoute {
	for i := range t {
		if t[i].target.Contains(a) {
			return &t[i]
		}
	}
	return nil
}

// attachment is how the gateway takes part in one network.
type attachment struct {
	Network
	mac    uint64 // MAC as a number
	slot   uint16
	neigh  *neigh.Table
	v4, v6 netip.Addr      // ours on the network
	nat    [2][]netip.Addr // that clients are masqueraded behind, by family
	routes routeTable
	casts  []netip.Addr  // broadcast addresses of its subnets
	fwd    *pathCounters // kept when the network's configuration changes
}

// side is where packets come from that came by the attachment; by none, it is the
// VPC.
func (at *attachment) side() Side {
	if at == nil {
		return VPCSide
	}
	return OverlaySide
}

// address returns our address of a family on the network.
func (at *attachment) address(v6 bool) netip.Addr {
	if v6 {
		return at.v6
	}
	return at.v4
}

// masks are the addresses of a family that clients are masqueraded behind; there may be
// none.
func (at *attachment) masks(v6 bool) []netip.Addr {
	if v6 {
		return at.nat[1]
	}
	return at.nat[0]
}

// isMask reports an address that clients of a family are masqueraded behind.
func (at *attachment) isMask(a netip.Addr) bool { return slices.Contains(at.masks(a.Is6()), a) }

// conflicts counts the routes of networks that were left out because they overlap
// the VPC or a route of the kernel.
func (s *netSet) conflicts() (n int) {
	for _, at := range s.attachments {
		n += at.Conflicts
	}
	return n
}

// surroundings is what the neighbours on a network need of the engine.
type surroundings func(Network) neigh.Config

// build makes a snapshot from settings. It changes nothing: what goes on from the
// snapshot before, neighbours and counters, is shared with it.
func build(in settings, old *netSet, around surroundings) (*netSet, error) {
	s := &netSet{settings: in, attachments: make(map[uint64]*attachment), numbers: make(map[uint64]uint16),
		own: make(map[netip.Addr]*attachment), broadcasts: make(map[netip.Addr]struct{})}
	if old != nil {
		s.generation = old.generation + 1
		maps.Copy(s.numbers, old.numbers)
	}
	if err := checkMTU("the VPC device", in.vpc.MTU, in.vpc.Addresses); err != nil {
		return nil, err
	}
	s.addVPC()
	for _, n := range in.networks {
		if err := s.addNetwork(n, old, around); err != nil {
			return nil, err
		}
	}
	s.routes.sort()
	s.slots = make([]*attachment, len(s.numbers))
	for _, at := range s.attachments {
		s.slots[at.slot] = at
	}
	s.addForwards()
	return s, nil
}

// change puts edited settings into force. Without a difference it does nothing: each new
// snapshot makes all flows be judged again.
func (e *Engine) change(edit func(*settings)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.set.Load()
	in := old.settings
	edit(&in)
	if e.settled && in.translatesAs(&old.settings) {
		return nil
	}
	err := e.swap(in, old)
	e.settled = err == nil
	return err
}

// translatesAs reports whether networks, forwards, maps and masquerades are the same.
func (in *settings) translatesAs(o *settings) bool {
	return slices.EqualFunc(in.networks, o.networks, func(a, b Network) bool { return reflect.DeepEqual(a, b) }) &&
		slices.Equal(in.forwards, o.forwards) && slices.Equal(in.maps, o.maps) &&
		slices.EqualFunc(in.masquerade, o.masquerade, func(a, b Masquerade) bool { return a.equal(&b) })
}

// swap puts settings into force. e.mu is held, unless nobody knows the engine yet.
func (e *Engine) swap(in settings, old *netSet) error {
	s, err := build(in, old, e.surroundings)
	if err != nil {
		return err
	}
	if err := e.local.setAddresses(s.local()); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	e.table.SetGroups(s.groups())
	if e.handovers != nil {
		if err := e.handovers.local.setAddresses(s.handoverNICs()); err != nil {
			return fmt.Errorf("netstack: %w", err)
		}
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
		for _, p := range at.Addresses { // in a subnet: to others, members have a route through one that is
			if a := p.Addr(); !p.IsSingleIP() && !slices.Contains(had, a) {
				at.neigh.Announce(a)
			}
		}
	}
	return nil
}

// addVPC adds what belongs to the VPC side.
func (s *netSet) addVPC() {
	add := func(a netip.Addr) {
		s.own[a] = nil
		if a.Is4() && !s.vpc4.IsValid() {
			s.vpc4 = a
		} else if a.Is6() && !s.vpc6.IsValid() {
			s.vpc6 = a
		}
	}
	for _, a := range s.vpc.Addresses {
		add(a.Addr())
		s.addBroadcast(a)
	}
	for _, m := range s.masquerade {
		if m.Address.IsValid() {
			add(m.Address)
		}
	}
	for _, p := range s.vpc.Sources {
		s.addBroadcast(p)
	}
}

// local lists the addresses of the gateway's own stack by its interfaces.
func (s *netSet) local() map[tcpip.NICID][]netip.Addr {
	inVPC := slices.Collect(maps.Keys(s.own))
	for i := range s.forwards {
		if f, a := &s.forwards[i], s.forwards[i].Listen.Addr(); f.Relayed && !a.IsUnspecified() && !slices.Contains(inVPC, a) {
			inVPC = append(inVPC, a)
		}
	}
	out := map[tcpip.NICID][]netip.Addr{vpcNIC: inVPC}
	for _, at := range s.attachments {
		out[at.nic()] = at.own()
	}
	return out
}

// addNetwork attaches a network.
func (s *netSet) addNetwork(n Network, old *netSet, around surroundings) error {
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
	at := newAttachment(n, slot, old, around)
	for _, a := range n.NAT {
		if !at.isOwn(a) {
			return fmt.Errorf("netstack: %s isn't ours on network %s: clients can't be masqueraded behind it", a, networkLabel(n.ID))
		}
	}
	s.attachments[n.ID] = at
	// What the VPC has at an address is the VPC's, for the VPC, and an alias is whose it is.
	taken := func(a netip.Addr) bool { return s.inSources(a) || s.isAlias(a) }
	for _, a := range n.Addresses {
		at.routes = append(at.routes, overlayRoute{target: a.Masked(), at: at})
		if _, ok := s.own[a.Addr()]; !ok && !taken(a.Addr()) {
			s.own[a.Addr()] = at
		}
		if b := broadcastOf(a); b.IsValid() {
			at.casts = append(at.casts, b)
			if !taken(b) {
				s.broadcasts[b] = struct{}{}
			}
		}
	}
	for _, r := range n.Routes {
		if !at.isOwn(r.Via) {
			at.routes = append(at.routes, overlayRoute{r.Target.Masked(), r.Via, at})
		}
	}
	s.routes = append(s.routes, at.routes...)
	at.routes.sort()
	return nil
}

func (s *netSet) addBroadcast(p netip.Prefix) {
	if b := broadcastOf(p); b.IsValid() {
		s.broadcasts[b] = struct{}{}
	}
}

// broadcastOf returns the broadcast address of a subnet, invalid if it has none.
func broadcastOf(p netip.Prefix) netip.Addr {
	if !p.Addr().Is4() || p.Bits() >= 31 || p.Bits() == 0 {
		return netip.Addr{}
	}
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// addForwards fills the tables of forwards.
func (s *netSet) addForwards() {
	s.listeners, s.backwards = make(map[forwardKey]*PortForward), make(map[forwardKey]*PortForward)
	for side := range s.served {
		s.served[side] = make(map[netip.Addr]struct{})
	}
	for i := range s.forwards {
		f := &s.forwards[i]
		s.listeners[f.listens()] = f
		if !f.Listen.Addr().IsUnspecified() {
			s.served[f.From][f.Listen.Addr()] = struct{}{}
		}
		if !f.Masquerade {
			s.backwards[f.target()] = f
		}
	}
}

// reserved lists the ports that flows don't get because forwards listen there.
func (s *netSet) reserved(proto uint8) (out []netip.AddrPort) {
	for i := range s.forwards {
		f := &s.forwards[i]
		if f.Proto != proto {
			continue
		}
		add := func(a netip.Addr) {
			if l := f.Listen.Addr(); l == a || l.IsUnspecified() && l.Is4() == a.Is4() {
				out = append(out, netip.AddrPortFrom(a, f.Listen.Port()))
			}
		}
		if f.From == VPCSide {
			for a := range s.own {
				add(a)
			}
			if !f.Listen.Addr().IsUnspecified() && !s.isOwn(f.Listen.Addr()) {
				add(f.Listen.Addr())
			}
			continue
		}
		for _, at := range s.attachments {
			for _, a := range at.own() {
				add(a)
			}
		}
	}
	return out
}

// groups lists the networks and families with several addresses for clients.
func (s *netSet) groups() (out []nat.Group) {
	for _, at := range s.slots {
		if at == nil {
			continue
		}
		for _, list := range at.nat {
			if len(list) > 1 {
				out = append(out, nat.Group{Slot: at.slot, Addresses: list})
			}
		}
	}
	return out
}

// forward returns the forward that clients on a network, or in the VPC if at is nil,
// reach at an address and port. An address that a forward names needn't be one of the
// gateway's: whoever sends to it has a route to the gateway.
func (s *netSet) forward(at *attachment, proto uint8, a netip.Addr, port uint16) *PortForward {
	if len(s.forwards) == 0 {
		return nil
	}
	if f := s.listeners[forwardKey{a, port, proto, at.side()}]; f != nil && s.mayServe(at, a) {
		return f
	}
	if !s.isOwnOn(at, a) {
		return nil
	}
	any := netip.IPv4Unspecified()
	if a.Is6() {
		any = netip.IPv6Unspecified()
	}
	return s.listeners[forwardKey{any, port, proto, at.side()}]
}

// mayServe reports whether a forward may listen at an address there: not at what the
// gateway is on another network only.
func (s *netSet) mayServe(at *attachment, a netip.Addr) bool {
	if s.isOwnOn(at, a) {
		return true
	}
	return at == nil || !s.isOwn(a) && !slices.ContainsFunc(s.slots, func(other *attachment) bool { return other != nil && other.isOwn(a) })
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
func newAttachment(n Network, slot uint16, old *netSet, around surroundings) *attachment {
	at := &attachment{Network: n, mac: macNumber(n.MAC), slot: slot}
	for _, a := range n.NAT {
		family := 0
		if a.Is6() {
			family = 1
		}
		at.nat[family] = append(at.nat[family], a)
	}
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
	at.neigh = neigh.New(around(n), at.own())
	return at
}

// own lists our addresses on the network.
func (at *attachment) own() (out []netip.Addr) {
	for _, a := range at.Addresses {
		out = append(out, a.Addr())
	}
	return out
}
