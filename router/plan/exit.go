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
		b.out.Problems[len(b.out.Problems)-1].gateway = true
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

// maxKept bounds the addresses of a host that have a rule each, which all packets pass. The
// overlay has no more sockets either.
const maxKept = 256

// KeptOut returns what keeps its own way: the underlay and answers to whoever came to
// an address of the host, addresses that no exit forwards, and what vpc.sources names.
func KeptOut(cfg *config.Config, h *Host) (d Detour) {
	for _, a := range h.Addresses[:min(len(h.Addresses), maxKept)] {
		d.From = append(d.From, a.Addr)
	}
	for _, u := range unroutable {
		if !u.prefix.Addr().Is4In6() { // of which the kernel knows none
			d.To = append(d.To, u.prefix)
		}
	}
	d.To = append(d.To, special.Metadata()...)
	for _, p := range cfg.VPC.Sources {
		if p.Bits() > 0 {
			d.To = append(d.To, p)
		}
	}
	return d
}

// internet is how the internet sees overlay hosts that this gateway is the exit of: as the
// VPC does. They reach neither this host nor anything that isn't the internet.
func (b *builder) internet(v6 bool, m Masquerade) Masquerade {
	m.To, m.Invites, m.Except = everything(v6), true, noInternet(v6)
	own := slices.Clone(b.cfg.VPC.Address)
	if b.in.Host != nil {
		for _, h := range b.in.Host.Addresses {
			own = append(own, single(h.Addr))
		}
		for _, a := range b.in.Host.everybody() {
			own = append(own, single(a))
		}
	}
	for _, p := range own {
		if p.Addr().Is6() == v6 {
			m.Except = append(m.Except, single(p.Addr()))
		}
	}
	return m
}

// noInternet are the prefixes of a family whose addresses mean something else on every
// network. Those that hold addresses of IPv4 in IPv6 (NAT64, 6to4) are among them.
func noInternet(v6 bool) (out []netip.Prefix) {
	for _, p := range notInternet {
		if p.Addr().Is6() == v6 {
			out = append(out, p)
		}
	}
	return out
}

var notInternet = [...]netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.0.0.0/24"), netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fec0::/10"),
}
