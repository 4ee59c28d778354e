// Package plan judges addresses: which prefixes, addresses, forwards and maps may
// be used, and where packets to them go. It is pure: what it knows of networks and
// of the host is told to it, and what it returns is carried out by others.
// Whoever needs such a judgement asks here: the gateway, a member, a reload,
// `ztgate config check` and `ztgate explain`.
//
// A prefix that a network brings (a managed route, the subnet of an assigned
// address) is used or refused as a whole, by what it covers after masking. Refused
// are
//
//   - default routes, but those that a member takes as its exits;
//   - what overlaps addresses that no router forwards (loopback, link-local,
//     multicast, 0/8, 240/4), or a cloud's metadata service;
//   - what isn't private as a whole, unless the network has allow_global;
//   - what overlaps vpc.sources, in either direction, unless a map gives its hosts
//     other addresses on the VPC side;
//   - what covers an address of this host, a next hop of the underlay or the
//     endpoint of a root;
//   - what is or covers a route of somebody else in the kernel, lies inside a subnet
//     that this host is attached to, or, where vpc.sources doesn't say who the VPC
//     is, inside any such route;
//   - what overlaps a prefix of another network that was named first.
//
// Clients are masqueraded behind addresses of nat.addresses that the network's controller
// has assigned to us, or whose longest route leads through us.
//
// Aliases of maps and addresses of forwards are the operator's own words: the same
// function judges them, but for the question whether they are private.
package plan

import (
	"cmp"
	"net/netip"
	"slices"

	"ztgate/router/config"
	"ztgate/zerotier/ztnode"
)

// Host is the state of the host that judgements depend on.
type Host struct {
	Routes    []KernelRoute // unicast routes of the main table that are not ours
	Addresses []HostAddress // of all interfaces but ours
	// Underlay are addresses that the overlay itself is carried to: next hops and
	// endpoints of roots.
	Underlay []netip.Addr
	// Roots are those of Underlay that are endpoints of roots.
	Roots []netip.Addr
	MTU   int // of the VPC's interface, which isn't ours to change; 0 = it is ours
}

// KernelRoute is a route that somebody else put into the kernel.
type KernelRoute struct {
	Target netip.Prefix
	Via    netip.Addr // invalid = the subnet is attached to the device
	Device string
}

// HostAddress is an address of this host.
type HostAddress struct {
	Addr   netip.Addr
	Device string
}

// Role says what a process does with networks. The zero value is a gateway.
type Role uint8

// A gateway forwards for a VPC; a member is itself a host of its networks.
const (
	Gateway Role = iota
	Member
)

// Input is all that a plan depends on.
type Input struct {
	Role     Role
	Config   *config.Config
	Networks []ztnode.Network
	// Joined are networks in the order in which they were joined by command.
	Joined []ztnode.NetworkID
	Host   *Host // nil = not known
	// Held are the prefixes that networks had when they last worked. A network that
	// doesn't work now keeps them from others.
	Held Held
}

// Held are prefixes by the network that has them.
type Held map[ztnode.NetworkID][]netip.Prefix

// Plan says what to do.
type Plan struct {
	Routes     []Route   // for the kernel, to our interfaces; masked
	Networks   []Network // that carry traffic
	Forwards   []config.Forward
	Maps       []config.AddressMap
	MTU        int  // of the VPC's interface, in bytes
	KeepGuards bool // of targets that are in no route now: a network may come back
	Problems   []Problem
	Held       Held // for the next plan
	// Masquerade is how VPC hosts see overlay hosts that they get no alias for; by the first
	// that fits.
	Masquerade []Masquerade
	Announced  []Announcement // addresses of Masquerade
	// HostForwards are served on the host's own addresses, where packets end in the
	// kernel.
	HostForwards []config.Forward
	// Exits are the managed default routes that are used, at most one of each family.
	Exits []Exit
}

// Route is a route of the kernel.
type Route struct {
	ztnode.Route
	Network ztnode.NetworkID // 0 = of the operator's own configuration
}

// Network is what may be used of a network.
type Network struct {
	ID        ztnode.NetworkID
	MAC       ztnode.MAC
	MTU       int            // bytes
	Addresses []netip.Prefix // ours
	Routes    []ztnode.Route // subnets of Addresses and managed routes; masked
	NAT       []netip.Addr   // those of Addresses that clients are masqueraded behind; none = the first of a family
	Refused   int            // prefixes that are left out
}

// Make judges everything.
func Make(in Input) *Plan {
	b := &builder{in: in, cfg: in.Config, out: &Plan{MTU: in.Config.VPC.MTU, Held: Held{}}}
	if b.out.MTU == 0 {
		b.out.MTU = config.DefaultMTU
	}
	if in.Role == Gateway {
		b.maps()
		b.natAddresses()
	}
	for _, n := range Order(in.Config, in.Networks, in.Joined) {
		if n.Status == ztnode.StatusOK {
			b.network(n)
		} else {
			b.hold(n.ID)
		}
	}
	if in.Host != nil && in.Host.MTU > 0 {
		b.out.MTU = in.Host.MTU
		if own := in.Config.VPC.MTU; own > 0 {
			b.out.MTU = min(b.out.MTU, own)
		}
	}
	if in.Role == Gateway {
		b.strangeMasks()
		b.masquerade()
		b.forwards()
		b.targets()
		b.noExits()
	}
	return b.out
}

// Check judges a configuration by itself, without networks and host. Its error
// names everything that can never work, one line each.
func Check(cfg *config.Config) error {
	return fatalError(Make(Input{Config: cfg}).Problems)
}

// CheckMember is [Check] for a member, which may take a default route.
func CheckMember(cfg *config.Config) error {
	return fatalError(slices.DeleteFunc(Make(Input{Config: cfg}).Problems, func(p Problem) bool { return p.gateway }))
}

// Order sorts networks by who was named first: in the configuration, then by
// command (joined, in the order of that), then by ID.
func Order(cfg *config.Config, nets []ztnode.Network, joined []ztnode.NetworkID) []ztnode.Network {
	named := slices.Concat(cfg.NetworkIDs(), joined)
	place := func(id ztnode.NetworkID) int {
		if i := slices.Index(named, id); i >= 0 {
			return i
		}
		return len(named)
	}
	return slices.SortedStableFunc(slices.Values(nets), func(a, b ztnode.Network) int {
		return cmp.Or(cmp.Compare(place(a.ID), place(b.ID)), cmp.Compare(a.ID, b.ID))
	})
}

// builder makes one plan.
type builder struct {
	in     Input
	cfg    *config.Config
	out    *Plan
	taken  []claim      // prefixes by which the VPC knows overlay hosts
	hidden []claim      // those that it knows by an alias only
	blamed []netip.Addr // of nat.addresses, which are refused already
	nat    []netip.Addr // that overlay hosts are masqueraded as
}

// claim is a prefix and whose it is.
type claim struct {
	prefix  netip.Prefix
	network ztnode.NetworkID
}

func (b *builder) take(p netip.Prefix, id ztnode.NetworkID) {
	b.taken = append(b.taken, claim{p, id})
	b.out.Held[id] = append(b.out.Held[id], p)
}

// hold keeps what a network had for as long as it doesn't work.
func (b *builder) hold(id ztnode.NetworkID) {
	b.out.KeepGuards = true
	for _, p := range b.in.Held[id] {
		if _, why := b.judge(p, id); why == nil {
			b.take(p, id)
		}
	}
}

// network judges what a network brings.
func (b *builder) network(n ztnode.Network) {
	out := Network{ID: n.ID, MAC: n.MAC, MTU: n.MTU}
	if b.cfg.VPC.MTU == 0 {
		b.out.MTU = max(b.out.MTU, n.MTU)
	}
	for _, a := range n.Addresses {
		why := unusable(a)
		if why == nil {
			why = b.add(&out, ztnode.Route{Target: a})
		}
		if why == nil {
			out.Addresses = append(out.Addresses, a)
			continue
		}
		out.Refused++
		b.refuse(n.ID, a, "assigned address "+a.String(), why)
	}
	for _, r := range n.Routes {
		if r.Via.IsValid() && slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Addr() == r.Via }) {
			continue // through ourselves: for the other members
		}
		why := malformed(r)
		switch {
		case why != nil:
		case r.Target.Bits() == 0:
			why = b.exit(&out, r)
		default:
			why = b.add(&out, r)
		}
		if why != nil {
			if !why.declined {
				out.Refused++
			}
			b.refuse(n.ID, r.Target, "managed route "+r.Target.String(), why)
		}
	}
	if b.in.Role == Gateway {
		b.ownMasks(n, &out)
	}
	b.out.Networks = append(b.out.Networks, out)
}

// add uses a route of a network, or says why not.
func (b *builder) add(n *Network, r ztnode.Route) *objection {
	r.Target = r.Target.Masked()
	if slices.ContainsFunc(n.Routes, func(o ztnode.Route) bool { return o.Target == r.Target }) {
		return nil
	}
	hidden, why := b.judge(r.Target, n.ID)
	if why != nil {
		return why
	}
	n.Routes = append(n.Routes, r)
	if hidden {
		b.hidden = append(b.hidden, claim{r.Target, n.ID})
		return nil
	}
	b.take(r.Target, n.ID)
	b.out.Routes = append(b.out.Routes, Route{r, n.ID})
	return nil
}

// unusable says why an assigned address can't be a host's.
func unusable(p netip.Prefix) *objection {
	const remedy = "assign another at the network's controller"
	a := p.Addr()
	switch {
	case !p.IsValid() || a.Is4In6() || a.Zone() != "":
		return object(remedy, "it is malformed")
	case a.Is4() && p.Bits() < 31 && a == p.Masked().Addr():
		return object(remedy, "it is the address of the subnet itself")
	case a.Is4() && p.Bits() < 31 && a == last(p):
		return object(remedy, "it is the broadcast address of its subnet")
	}
	return nil
}

// last returns the last address of an IPv4 prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

func malformed(r ztnode.Route) *objection {
	if !r.Target.IsValid() || r.Target.Addr().Is4In6() || r.Via.IsValid() && r.Via.Is4() != r.Target.Addr().Is4() {
		return object("correct it at the network's controller", "it is malformed")
	}
	return nil
}

// Route returns the kernel's route by which packets to an address come to us.
func (p *Plan) Route(a netip.Addr) (best Route, ok bool) {
	for _, r := range p.Routes {
		if r.Target.Contains(a) && (!ok || r.Target.Bits() > best.Target.Bits()) {
			best, ok = r, true
		}
	}
	return best, ok
}

// Relayed lists the forwards whose connections end at the forwarding plane's own host.
func (p *Plan) Relayed() []config.Forward {
	return slices.DeleteFunc(slices.Clone(p.Forwards), func(f config.Forward) bool { return !f.Relayed() })
}

// Targets are the prefixes of the kernel's routes.
func (p *Plan) Targets() []netip.Prefix {
	out := make([]netip.Prefix, len(p.Routes))
	for i, r := range p.Routes {
		out[i] = r.Target
	}
	return out
}
