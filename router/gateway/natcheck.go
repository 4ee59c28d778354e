package gateway

import (
	"net/netip"
	"slices"
	"strings"

	"ztgate/router/control"
	"ztgate/router/plan"
)

// natCheck tells of addresses that overlay hosts should be masqueraded as and can't be.
func (g *gateway) natCheck(p *plan.Plan) control.Check {
	const name = "nat_address"
	var reasons, remedies []string
	add := func(reason, remedy string) {
		reasons = append(reasons, reason)
		if remedy != "" {
			remedies = append(remedies, remedy)
		}
	}
	for _, a := range g.config().VPC.NAT.Addresses {
		if slices.ContainsFunc(p.Announced, func(o plan.Announcement) bool { return o.Addr == a }) {
			continue
		}
		for _, q := range p.Problems {
			if q.Refused && q.Network == 0 && q.Prefix == netip.PrefixFrom(a, a.BitLen()) {
				add("overlay hosts don't reach the VPC as "+a.String()+": "+q.Reason, q.Remedy)
				break
			}
		}
	}
	if why, remedy := g.in.unannounced(p); why != nil {
		add("hosts of the VPC don't find us: "+why.Error(), remedy)
	}
	if len(reasons) == 0 && g.inbound != nil {
		if err := g.inbound.CantPing(); err != nil {
			return control.Failed(name, control.Degraded, "pings of overlay hosts go nowhere: "+err.Error(), "")
		}
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, control.Down, strings.Join(reasons, "; "), strings.Join(remedies, "; "))
}
