package plan

import (
	"net/netip"
	"slices"

	"ztgate/internal/special"
	"ztgate/router/config"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

// unroutable are prefixes that no router forwards, with what they are.
var unroutable = [...]struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "addresses of this host"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback addresses"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local addresses"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast addresses"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved addresses"},
	{netip.MustParsePrefix("::/127"), "the unspecified and the loopback address"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4 addresses in IPv6 form"},
	{netip.MustParsePrefix("fe80::/10"), "link-local addresses"},
	{netip.MustParsePrefix("ff00::/8"), "multicast addresses"},
}

// judge decides whether packets to a prefix, which is masked, may go to a network.
// hidden means that they may only by the alias that a map gives.
func (b *builder) judge(p netip.Prefix, id ztnode.NetworkID) (hidden bool, why *objection) {
	if p.Bits() == 0 {
		return false, object("route single prefixes through the network", "default routes are not taken")
	}
	if why = never(p); why != nil {
		return false, why
	}
	if !b.cfg.Network(id).AllowGlobal && !packet.Private(p) {
		return false, object("narrow it, or set allow_global for the network", "it isn't private address space as a whole")
	}
	maps := b.mapsOf(p, id)
	// Behind an alias that means hosts of all networks.
	common := len(maps) > 0 && !slices.ContainsFunc(maps, func(m config.AddressMap) bool { return m.Network != 0 })
	switch why = b.astray(p); {
	case why != nil && len(maps) == 0:
		return false, why
	case why != nil && !common:
		return true, nil
	case why == nil && !common:
		return false, overlapping(b.taken, p, id)
	}
	hidden = why != nil
	if why = overlapping(b.hidden, p, id); why == nil {
		why = overlapping(b.taken, p, id)
	}
	return hidden, why
}

// never refuses what may lead nowhere, whoever asks for it.
func never(p netip.Prefix) *objection {
	for _, u := range unroutable {
		if u.prefix.Overlaps(p) {
			return object("remove or narrow it", "%s are %s, which are never forwarded", u.prefix, u.what)
		}
	}
	for _, m := range special.Metadata() {
		if m.Overlaps(p) {
			return object("remove or narrow it", "%s is a cloud's metadata service, which is never forwarded", m)
		}
	}
	if special.IsMetadata(p.Addr()) { // as IPv6 writes it
		return object("remove or narrow it", "%s is a cloud's metadata service, which is never forwarded", p.Addr())
	}
	return nil
}

// mapsOf returns the maps that give the VPC other addresses for all hosts of a prefix.
func (b *builder) mapsOf(p netip.Prefix, id ztnode.NetworkID) []config.AddressMap {
	return slices.DeleteFunc(slices.Clone(b.out.Maps), func(m config.AddressMap) bool {
		return m.Hosts != config.SideOverlay || m.Network != 0 && m.Network != id || !covers(m.Real, p)
	})
}

// astray refuses what would lead packets of the VPC or of this host astray.
func (b *builder) astray(p netip.Prefix) *objection {
	if why := b.configured(p); why != nil || b.in.Host == nil {
		return why
	}
	for _, a := range b.in.Host.Addresses {
		if p.Contains(a.Addr) {
			return object("give one of them another subnet", "it covers this host's own address %s on %s", a.Addr, a.Device)
		}
	}
	for _, a := range b.in.Host.Underlay {
		if p.Contains(a) {
			return object("narrow it", "it covers %s, which this host sends the overlay's own packets to", a)
		}
	}
	return b.kernel(p)
}

// configured refuses what the configuration alone speaks against.
func (b *builder) configured(p netip.Prefix) *objection {
	if b.in.Role == Member {
		return nil
	}
	for _, s := range b.sources() {
		if s.Overlaps(p) {
			return object("give one of them another subnet, or give the overlay's hosts other addresses by maps",
				"it %s the VPC's own %s (vpc.sources)", relation(p, s), s)
		}
	}
	for _, a := range b.cfg.VPC.Address {
		if p.Contains(a.Addr()) {
			return object("choose another with vpc.address", "it covers our own address %s on the VPC's interface", a.Addr())
		}
	}
	for _, a := range b.nat {
		if p.Contains(a) {
			return object("choose another with vpc.nat_address", "it covers our own address %s in the VPC", a)
		}
	}
	for _, m := range b.out.Maps {
		if m.Hosts == config.SideOverlay && m.Alias.Overlaps(p) {
			return object("choose another alias", "it %s the alias %s of a map", relation(p, m.Alias), m.Alias)
		}
	}
	return nil
}

// kernel compares a prefix with the routes of others.
func (b *builder) kernel(p netip.Prefix) *objection {
	for _, k := range b.in.Host.Routes {
		switch {
		case k.Target.Bits() == 0 || !k.Target.Overlaps(p):
		case p == k.Target:
			return object("remove that route (another program for the same network?) or narrow this one", "the kernel already has it on %s", k.Device)
		case covers(p, k.Target):
			return object("remove that route or narrow this one", "it covers %s, which the kernel has on %s", k.Target, k.Device)
		case !k.Via.IsValid():
			return object("give one of them another subnet", "it lies inside %s, which is attached to %s", k.Target, k.Device)
		case b.in.Role == Gateway && len(b.sources()) == 0:
			return object("say in vpc.sources who the VPC is", "it lies inside the kernel's route %s on %s, and without vpc.sources that may be the VPC", k.Target, k.Device)
		}
	}
	return nil
}

// overlapping refuses what another network has.
func overlapping(list []claim, p netip.Prefix, id ztnode.NetworkID) *objection {
	for _, c := range list {
		if c.network != id && c.prefix.Overlaps(p) {
			return object("leave one of the networks, narrow one of the routes, or list this network first",
				"it %s %s of network %s, which was named first", relation(p, c.prefix), c.prefix, c.network)
		}
	}
	return nil
}

// sources are the prefixes that say who the VPC is. A member has none.
func (b *builder) sources() []netip.Prefix {
	if b.in.Role == Member {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(b.cfg.VPC.Sources), func(p netip.Prefix) bool { return p.Bits() == 0 })
}

// inSources returns the prefix of vpc.sources that an address lies in.
func (b *builder) inSources(a netip.Addr) (netip.Prefix, bool) {
	for _, s := range b.sources() {
		if s.Contains(a) {
			return s, true
		}
	}
	return netip.Prefix{}, false
}

// covers reports whether q lies in p, or is p.
func covers(p, q netip.Prefix) bool { return p.Bits() <= q.Bits() && p.Overlaps(q) }

// relation says how p overlaps q.
func relation(p, q netip.Prefix) string {
	switch {
	case p == q:
		return "is"
	case covers(p, q):
		return "covers"
	}
	return "lies inside"
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
