package gateway

import (
	"net/netip"
	"slices"
	"strings"

	"ztgate/router/control"
	"ztgate/router/plan"
)

// checkNAT is the check of how the VPC sees overlay hosts.
const checkNAT = "nat_address"

// natCheck tells when overlay hosts don't reach the VPC as they should be seen there.
func (g *gateway) natCheck(p *plan.Plan) control.Check {
	var reasons, remedies []string
	for _, a := range g.config().VPC.NAT.Addresses {
		if slices.ContainsFunc(p.Announced, func(o plan.Announcement) bool { return o.Addr == a }) {
			continue
		}
		for _, q := range p.Problems {
			if q.Refused && q.Network == 0 && q.Prefix == netip.PrefixFrom(a, a.BitLen()) {
				reasons, remedies = append(reasons, "overlay hosts don't reach the VPC as "+a.String()+": "+q.Reason), append(remedies, q.Remedy)
				break
			}
		}
	}
	if len(reasons) > 0 {
		return control.Failed(checkNAT, control.Down, strings.Join(reasons, "; "), strings.Join(remedies, "; "))
	}
	if c := g.in.announces(p); !c.OK || g.inbound == nil {
		return c
	}
	if err := g.inbound.CantPing(); err != nil {
		return control.Failed(checkNAT, control.Degraded, "pings of overlay hosts go nowhere: "+err.Error(), "")
	}
	return control.Passed(checkNAT)
}
