package plan

import (
	"net/netip"
	"slices"

	"ztgate/router/config"
)

// refused warns of a forward that the policy refuses whoever comes.
func (b *builder) refused(thing string, f config.Forward) {
	direction := "out"
	if f.Side == config.SideOverlay {
		direction = "in"
	}
	if !mayAccept(b.cfg.Policy, f.Proto, direction, f.To) {
		b.warn(thing, object("add to policy.rules: {action: accept, direction: "+direction+", proto: "+f.Proto+", to: "+f.To.Addr().String()+
			", ports: ["+config.PortRange{First: f.To.Port(), Last: f.To.Port()}.String()+"]}", "the policy refuses whatever comes for it"))
	}
}

// mayAccept reports whether a policy accepts some flow to an address and port, from
// anywhere.
func mayAccept(p config.PolicyConfig, proto, direction string, to netip.AddrPort) bool {
	for _, r := range p.Rules {
		unknown := slices.ContainsFunc(r.ToNames, func(n config.Named) bool { return len(n.Addresses) == 0 })
		switch {
		case r.Proto != "" && r.Proto != proto, r.Direction != "" && r.Direction != direction,
			len(r.Ports) > 0 && !slices.ContainsFunc(r.Ports, func(q config.PortRange) bool { return q.First <= to.Port() && to.Port() <= q.Last }):
		case r.Action == "accept":
			if unknown || len(r.To) == 0 || slices.ContainsFunc(r.To, func(q netip.Prefix) bool { return q.Contains(to.Addr()) }) {
				return true
			}
		case len(r.From) > 0 || r.Network != 0 || unknown: // refuses some only, or some until the name has an address
		case len(r.To) == 0 || slices.ContainsFunc(r.To, func(q netip.Prefix) bool { return q.Contains(to.Addr()) }):
			return false
		}
	}
	return p.Default == "accept"
}
