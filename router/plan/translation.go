package plan

import (
	"net/netip"
	"slices"

	"ztgate/router/config"
	"ztgate/zerotier/ztnode"
)

// maps judges the address maps.
func (b *builder) maps() {
	for _, m := range b.cfg.Maps {
		if why := b.mapFault(m); why != nil {
			b.refuse(0, m.Alias, "map "+m.String(), why)
			continue
		}
		b.out.Maps = append(b.out.Maps, m)
		if m.Hosts == config.SideOverlay {
			b.out.Routes = append(b.out.Routes, Route{Route: ztnode.Route{Target: m.Alias}, Network: m.Network})
		}
	}
}

func (b *builder) mapFault(m config.AddressMap) *objection {
	for _, p := range []netip.Prefix{m.Real, m.Alias} {
		if why := never(p); why != nil {
			return fatally(why)
		}
	}
	for _, o := range b.out.Maps {
		if o.Hosts != m.Hosts {
			continue
		}
		together := o.Network == 0 || m.Network == 0 || o.Network == m.Network
		// The VPC knows overlay hosts of all networks by their aliases alone.
		if o.Alias.Overlaps(m.Alias) && (together || m.Hosts == config.SideOverlay) || o.Real.Overlaps(m.Real) && together {
			return fatally(object("remove one of the two, or say by network where each holds", "it overlaps the map %s", o))
		}
	}
	if m.Hosts == config.SideVPC {
		if s := b.sources(); len(s) > 0 && !slices.ContainsFunc(s, func(s netip.Prefix) bool { return covers(s, m.Real) }) {
			return fatally(object("add it to vpc.sources", "%s lies outside vpc.sources, so that its hosts may not send", m.Real))
		}
		return nil
	}
	why := fatally(b.configured(m.Alias))
	if why == nil {
		why = b.astray(m.Alias)
	}
	if why != nil {
		why.remedy = "choose another alias"
	}
	return why
}

// forwards judges the port forwards. Those that are used are served by the
// forwarding plane, on the host's own addresses, or on both.
func (b *builder) forwards() {
	type key struct {
		side   config.Side
		proto  string
		listen netip.AddrPort
	}
	seen := map[key]bool{}
	for _, f := range b.cfg.Forwards {
		thing := "forward " + f.String()
		k := key{f.Side, f.Proto, f.Listen}
		why := b.forwardFault(f)
		if seen[k] {
			why = object("remove one of the two", "another one listens there")
		}
		seen[k] = true
		switch {
		case why != nil:
			b.refuse(0, single(f.Listen.Addr()), thing, fatally(why))
		case f.Side == config.SideOverlay:
			b.fromOverlay(thing, f)
		default:
			b.fromVPC(thing, f)
		}
		if why == nil {
			b.refused(thing, f)
		}
	}
}

// forwardFault finds what is wrong with a forward by itself.
func (b *builder) forwardFault(f config.Forward) *objection {
	to, listen := f.To.Addr(), f.Listen.Addr()
	named := []netip.Addr{to}
	if !listen.IsUnspecified() {
		named = append(named, listen)
	}
	for _, a := range named {
		if why := never(single(a)); why != nil {
			why.remedy = "name another address"
			return why
		}
	}
	source, inside := b.inSources(to)
	if f.Side == config.SideOverlay {
		switch s, ok := b.inSources(listen); {
		case ok:
			return object("name our address on the overlay, or only a port", "it listens for the overlay at an address of the VPC (vpc.sources %s)", s)
		case len(b.sources()) > 0 && !inside:
			return object("add it to vpc.sources", "%s is outside vpc.sources, and overlay hosts are only forwarded into the VPC", to)
		}
		return nil
	}
	switch {
	case f.Relayed() && inside:
		return object("name a host of the overlay", "proxy_protocol and accept_proxy are for hosts of the overlay, and %s is in the VPC (%s)", to, source)
	case f.Masquerade:
		return nil
	case inside:
		return object("set masquerade: true", "client and host are both in the VPC (%s), where answers would not pass the gateway", source)
	case listen.IsUnspecified():
		return object("set proxy_protocol: v2 if the host reads it, or listen at an address that the VPC routes to this host",
			"on this host's own addresses connections end here, so that the overlay can't see clients' addresses")
	}
	return nil
}

// fromVPC uses a forward for VPC clients.
func (b *builder) fromVPC(thing string, f config.Forward) {
	listen := f.Listen.Addr()
	_, inside := b.inSources(f.To.Addr())
	_, overlay := b.out.Route(listen)
	why := b.noHost(listen)
	if !inside && why == nil {
		if why = b.noHost(f.To.Addr()); why == nil && b.ours(f.To.Addr()) {
			why = object("name another host", "%s is this gateway's own address on the overlay", f.To.Addr())
		}
	}
	switch {
	case why != nil:
		b.refuse(0, single(listen), thing, why)
		return
	case listen.IsUnspecified():
		b.out.Forwards = append(b.out.Forwards, f)
		if !inside {
			b.out.HostForwards = append(b.out.HostForwards, f)
		}
	case b.hostOwns(listen):
		if inside || !f.Masquerade {
			b.refuse(0, single(f.Listen.Addr()), thing, object("name a host of the overlay, and set masquerade: true",
				"it listens at this host's own address, where connections end and are made anew into the overlay"))
			return
		}
		if b.everywhere(f) != nil {
			b.refuse(0, single(listen), thing, object("choose another port for one of the two", "another forward listens at all of this host's addresses on that port"))
			return
		}
		b.out.HostForwards = append(b.out.HostForwards, f)
	case f.Relayed() && b.everywhere(f) != nil && b.everywhere(f).Relayed():
		b.refuse(0, single(listen), thing, object("choose another port for one of the two", "another forward with a PROXY header listens at all of our addresses on that port"))
		return
	default:
		if !overlay && !slices.Contains(b.nat, listen) {
			if why := b.astray(single(listen)); why != nil {
				why.remedy = "give this host the address, or leave it out: " + f.Proto + "/PORT listens at all of this host's"
				if b.in.Host != nil { // else it may be the host's own
					b.refuse(0, single(f.Listen.Addr()), thing, why)
				}
				return
			}
			b.out.Routes = append(b.out.Routes, Route{Route: ztnode.Route{Target: single(listen)}})
		}
		b.out.Forwards = append(b.out.Forwards, f)
	}
	if _, ok := b.out.Route(f.To.Addr()); !ok && !inside && b.settled() {
		b.warn(thing, object("see ztgate networks", "no joined network has a route to %s", f.To.Addr()))
	}
}

// everywhere returns the forward that listens at all addresses on the port of another
// one, nil if there is none.
func (b *builder) everywhere(f config.Forward) *config.Forward {
	i := slices.IndexFunc(b.cfg.Forwards, func(o config.Forward) bool {
		l := o.Listen
		return o.Side == f.Side && o.Proto == f.Proto && l.Addr().IsUnspecified() && l.Port() == f.Listen.Port() && l.Addr().Is4() == f.Listen.Addr().Is4()
	})
	if i < 0 {
		return nil
	}
	return &b.cfg.Forwards[i]
}

// fromOverlay uses a forward for overlay hosts.
func (b *builder) fromOverlay(thing string, f config.Forward) {
	if r, ok := b.out.Route(f.To.Addr()); ok {
		b.refuse(0, single(f.Listen.Addr()), thing, object("let them reach it over the overlay itself",
			"%s is on the overlay (network %s), and overlay hosts are only forwarded into the VPC", f.To.Addr(), r.Network))
		return
	}
	b.out.Forwards = append(b.out.Forwards, f)
	listen := f.Listen.Addr()
	if !listen.IsUnspecified() && !b.ours(listen) && b.settled() {
		b.warn(thing, object("assign it to this node at the network's controller, or name only a port", "no network has given us the address %s", listen))
	}
}

// ours reports an address that a network has given us.
func (b *builder) ours(a netip.Addr) bool {
	return slices.ContainsFunc(b.out.Networks, func(n Network) bool {
		return slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Addr() == a })
	})
}

// noHost refuses an address that means a whole subnet of a network.
func (b *builder) noHost(a netip.Addr) *objection {
	for _, n := range b.out.Networks {
		for _, p := range n.Addresses {
			if why := unusable(netip.PrefixFrom(a, p.Bits())); why != nil && p.Contains(a) {
				why.remedy = "name a host"
				return why
			}
		}
	}
	return nil
}

// settled reports that all networks work, so that what isn't there won't come.
func (b *builder) settled() bool { return len(b.in.Networks) > 0 && !b.out.KeepGuards }

// hostOwns reports an address at which packets end in this host's kernel.
func (b *builder) hostOwns(a netip.Addr) bool {
	if slices.ContainsFunc(b.cfg.VPC.Address, func(p netip.Prefix) bool { return p.Addr() == a }) {
		return true
	}
	return b.in.Host != nil && slices.ContainsFunc(b.in.Host.Addresses, func(h HostAddress) bool { return h.Addr == a })
}

// targets warns of targets that no probe can reach.
func (b *builder) targets() {
	for _, t := range b.cfg.Targets {
		if s, ok := b.inSources(t.Addr.Addr()); ok {
			b.warn("target "+t.String(), object("name a host of the overlay, by its alias if a map gives it one",
				"it lies in the VPC (vpc.sources %s), and targets are probed through the overlay", s))
		}
	}
}
