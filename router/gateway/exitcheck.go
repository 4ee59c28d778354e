package gateway

import (
	"fmt"
	"net/netip"
	"strings"

	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/plan"
)

// exitCheck asks whether this host sends packets of overlay hosts to the internet.
func (g *gateway) exitCheck(p *plan.Plan) control.Check {
	const name = "exit"
	var reasons, remedies []string
	for _, m := range p.Masquerade {
		if !m.Invites {
			continue
		}
		dst := anywhere(m.To.Addr().Is6())
		switch w, err := g.in.beyond(m, dst); {
		case err != nil:
			reasons = append(reasons, err.Error())
		case w.Refused != nil, w.Local, w.Device == g.config().VPC.TUN:
			reasons = append(reasons, fmt.Sprintf("the kernel has no way to the internet for overlay hosts, as to %s", dst))
			remedies = append(remedies, "see ip route and ip rule")
		}
		if m.Address.Is6() && g.in.through() == throughKernel && !g.forwards(true) {
			reasons = append(reasons, "net.ipv6.conf.all.forwarding is 0, and the kernel doesn't pass on what overlay hosts send to the internet")
			remedies = append(remedies, "run sysctl -w net.ipv6.conf.all.forwarding=1")
		}
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, control.Down, strings.Join(reasons, "; "), strings.Join(remedies, "; "))
}

// anywhere is some host of the internet, which the kernel is asked the way to.
func anywhere(v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr("2001:500:88:200::8") // www.iana.org
	}
	return netip.MustParseAddr("192.0.43.8")
}

// beyond implements [ingress].
func (t *tunIngress) beyond(m plan.Masquerade, dst netip.Addr) (host.Way, error) {
	if m.Address.IsValid() {
		return t.toVPC(m.Address, dst)
	}
	return t.g.table.Way(netip.Addr{}, dst, "")
}

// beyond implements [ingress].
func (i *packetIngress) beyond(_ plan.Masquerade, dst netip.Addr) (host.Way, error) {
	return i.g.table.Way(netip.Addr{}, dst, "")
}
