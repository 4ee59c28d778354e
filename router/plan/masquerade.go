package plan

import (
	"net/netip"
	"slices"

	"ztgate/router/config"
	"ztgate/zerotier/ztnode"
)

// Masquerade is how VPC hosts see overlay hosts that reach them.
type Masquerade struct {
	To      netip.Prefix   // VPC hosts that see them so
	Except  []netip.Prefix // of those, whom nobody reaches
	Address netip.Addr     // by which; invalid = none can be used now
	Host    bool           // by this host's own address
	Invites bool           // the policy needs no rule that accepts them
	Routed  bool           // not at all: they have a way back; what follows isn't asked
}

// Announcement is an address of ours that hosts of a link ask for, and which the kernel
// doesn't have.
type Announcement struct {
	Addr   netip.Addr
	Device string // the link; "" = none is known
}

// natAddresses judges the addresses that overlay hosts are masqueraded as, before networks
// are judged, which mustn't take them.
func (b *builder) natAddresses() {
	for _, a := range b.cfg.VPC.NAT.Addresses {
		if why := b.natFault(a); why != nil {
			b.refuse(0, single(a), "nat address "+a.String(), why)
			continue
		}
		b.nat = append(b.nat, a)
	}
}

func (b *builder) natFault(a netip.Addr) *objection {
	const another = "choose another with vpc.nat_address"
	if why := never(single(a)); why != nil {
		return fatally(why)
	}
	for _, p := range b.cfg.VPC.Address {
		if p.Addr() == a {
			return fatally(object(another, "it is our own address on the VPC's interface (vpc.address), which the kernel has"))
		}
	}
	for _, m := range b.out.Maps {
		if m.Alias.Contains(a) && m.Hosts == config.SideOverlay {
			return fatally(object(another, "it lies inside the alias %s of a map", m.Alias))
		}
	}
	for _, s := range b.sources() {
		if why := unusable(netip.PrefixFrom(a, s.Bits())); why != nil && s.Contains(a) {
			return fatally(object(another, "%s", why.reason))
		}
	}
	if b.in.Host == nil {
		return nil
	}
	for _, h := range b.in.Host.Addresses {
		if h.Addr == a {
			return object("run ip address del "+a.String()+" dev "+h.Device+", and keep what sets the host up from adding it again",
				"this host's kernel has it on %s, and keeps what comes for it", h.Device)
		}
	}
	if slices.Contains(b.in.Host.Underlay, a) {
		return object(another, "this host sends the overlay's own packets to it")
	}
	for _, k := range b.in.Host.Routes {
		switch {
		case k.Target == single(a):
			return object("remove that route", "the kernel already has a route to it on %s", k.Device)
		case !k.Via.IsValid() && k.Target.Contains(a):
			if why := unusable(netip.PrefixFrom(a, k.Target.Bits())); why != nil {
				return object(another, "%s", why.reason)
			}
		}
	}
	return nil
}

// masquerade says how the VPC sees overlay hosts, once networks and maps are judged.
func (b *builder) masquerade() {
	for _, a := range b.nat {
		b.out.Routes = append(b.out.Routes, Route{Route: ztnode.Route{Target: single(a)}})
		b.out.Announced = append(b.out.Announced, Announcement{a, b.attachedTo(a)})
	}
	nat := b.cfg.VPC.NAT
	for _, v6 := range []bool{false, true} {
		wanted := slices.ContainsFunc(nat.Addresses, func(a netip.Addr) bool { return a.Is6() == v6 })
		if !wanted && !nat.Host {
			if b.cfg.Exit && len(nat.Addresses) == 0 {
				for _, to := range b.vpcOf(v6) { // as without an exit, whatever addresses it has
					b.out.Masquerade = append(b.out.Masquerade, Masquerade{To: to, Routed: true})
				}
				b.out.Masquerade = append(b.out.Masquerade, b.internet(v6, Masquerade{Host: true}))
			}
			continue
		}
		m := Masquerade{Except: b.except(v6, !wanted), Host: !wanted}
		for _, a := range b.nat {
			if a.Is6() == v6 {
				m.Address = a
			}
		}
		to := b.vpcOf(v6)
		if len(to) == 0 && wanted && !b.cfg.Exit {
			b.warn("vpc.nat_address", object("add the VPC's prefix to vpc.sources, or remove the address", "vpc.sources has no prefix of the family of %s", m.Address))
		}
		for _, m.To = range to {
			b.out.Masquerade = append(b.out.Masquerade, m)
		}
		if b.cfg.Exit {
			b.out.Masquerade = append(b.out.Masquerade, b.internet(v6, m))
		}
	}
}

// vpcOf lists the prefixes of a family that are the VPC.
func (b *builder) vpcOf(v6 bool) []netip.Prefix {
	switch {
	case len(b.sources()) > 0:
		return slices.DeleteFunc(b.sources(), func(p netip.Prefix) bool { return p.Addr().Is6() != v6 })
	case b.cfg.Exit: // what is beyond isn't the VPC
		return noInternet(v6)
	}
	return []netip.Prefix{everything(v6)}
}

// except lists what overlay hosts don't get to: roots of the overlay, and, where we connect
// as this host, this host itself.
func (b *builder) except(v6, host bool) (out []netip.Prefix) {
	if b.in.Host == nil {
		return nil
	}
	list := slices.Clone(b.in.Host.Roots)
	if host {
		for _, h := range b.in.Host.Addresses {
			list = append(list, h.Addr)
		}
		for _, p := range b.cfg.VPC.Address {
			list = append(list, p.Addr())
		}
		list = append(list, b.in.Host.everybody()...)
	}
	for _, a := range list {
		if p := single(a); a.Is6() == v6 && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// everybody lists the addresses in the host's subnets that stand for all hosts there, or for
// all routers, and so for this one: broadcast and anycast addresses.
func (h *Host) everybody() (out []netip.Addr) {
	for _, k := range h.Routes {
		t := k.Target.Masked()
		if k.Via.IsValid() || t.Bits() >= t.Addr().BitLen()-1 {
			continue
		}
		out = append(out, t.Addr())
		if t.Addr().Is4() {
			out = append(out, last(t))
		}
	}
	return out
}

// attachedTo returns the interface in whose subnet an address lies, "" if it is routed here.
func (b *builder) attachedTo(a netip.Addr) (device string) {
	if b.in.Host == nil {
		return ""
	}
	bits := -1
	for _, k := range b.in.Host.Routes {
		if !k.Via.IsValid() && k.Target.Contains(a) && k.Target.Bits() > bits {
			device, bits = k.Device, k.Target.Bits()
		}
	}
	return device
}

func everything(v6 bool) netip.Prefix {
	if v6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}
