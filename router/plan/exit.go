package plan

import (
	"net/netip"
	"slices"

	"ztgate/internal/special"
	"ztgate/router/config"
	"ztgate/zerotier/ztnode"
)

// Exit is a member that carries what has no other way, of one family.
type Exit struct {
	Network ztnode.NetworkID
	Via     netip.Addr
}

// exit uses a managed default route, or says why not.
func (b *builder) exit(n *Network, r ztnode.Route) *objection {
	switch {
	case b.in.Role == Gateway:
		return decline("route single prefixes through the network", "default routes are not taken by a gateway")
	case !b.cfg.Network(n.ID).AllowDefault:
		return decline("set allow_default for the network if this host shall use it", "default routes are not taken unless they are allowed")
	case !r.Via.IsValid():
		return object("name the member that is the exit at the network's controller", "it names no member")
	case !slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Contains(r.Via) }):
		return object("assign this member an address there at the network's controller", "%s is in no subnet that this host has an address of", r.Via)
	}
	for _, x := range b.out.Exits {
		if x.Via.Is4() == r.Via.Is4() && x != (Exit{n.ID, r.Via}) {
			return object("allow it for one network, and give this one one such route", "that of network %s through %s is used, which was named first", x.Network, x.Via)
		}
	}
	if x := (Exit{n.ID, r.Via}); !slices.Contains(b.out.Exits, x) {
		b.out.Exits = append(b.out.Exits, x)
	}
	return nil
}

// noExits refuses what only a member can do.
func (b *builder) noExits() {
	for _, n := range b.cfg.Networks {
		if !n.AllowDefault {
			continue
		}
		why := fatally(object("remove it and route single prefixes through the network, or run ztgate member",
			"a gateway takes no default route, since it would lose its own way to the internet"))
		b.refuse(n.ID, netip.Prefix{}, "allow_default of network "+n.ID.String(), why)
		b.out.Problems[len(b.out.Problems)-1].member = true
	}
}

// Exit returns the exit of a family.
func (p *Plan) Exit(v6 bool) (Exit, bool) {
	for _, x := range p.Exits {
		if x.Via.Is6() == v6 {
			return x, true
		}
	}
	return Exit{}, false
}

// Detour says what of a host goes on along its own way although there is an exit.
type Detour struct {
	From []netip.Addr   // what comes from these addresses of the host
	To   []netip.Prefix // and what goes there
}

// KeptOut returns what keeps its own way: the underlay and answers to whoever came to
// an address of the host, addresses that no exit forwards, and what vpc.sources names.
func KeptOut(cfg *config.Config, h *Host) (d Detour) {
	for _, a := range h.Addresses {
		d.From = append(d.From, a.Addr)
	}
	for _, u := range unroutable {
		d.To = append(d.To, u.prefix)
	}
	d.To = append(d.To, special.Metadata()...)
	for _, p := range cfg.VPC.Sources {
		if p.Bits() > 0 {
			d.To = append(d.To, p)
		}
	}
	return d
}
