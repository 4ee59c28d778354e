package gateway

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/plan"
)

const (
	// lookEvery is how often the host is looked at without a reason: not all settings of
	// the kernel announce their changes.
	lookEvery = time.Second
	// settle is how long a change of the host may be followed by others before it is
	// looked at, and settleEvery how often it is at most while they go on.
	settle      = 100 * time.Millisecond
	settleEvery = 500 * time.Millisecond
	// maxWays bounds how many ways the kernel is asked for in one look.
	maxWays = 128
	// maxReasons bounds what is told of them.
	maxReasons = 4
	// waysEvery is how often ways are asked for without a change of routes or rules.
	waysEvery = 5 * time.Second
)

// checkHost looks for host settings that keep a gateway with a TUN from working; sysctl
// reads those of the kernel.
func checkHost(vpc config.VPCConfig, sysctl func(key string) string) []control.Check {
	tun := vpc.TUN
	var out []control.Check
	add := func(name string, ok bool, severity control.State, reason, remedy string) {
		out = append(out, checked(name, ok, severity, reason, remedy))
	}
	v4 := control.Down
	if len(vpc.Sources) > 0 && !sends(vpc, netip.Addr.Is4) {
		v4 = control.Degraded // nobody there needs it
	}
	add("ip_forward", host.Forwards(sysctl, false), v4,
		"net.ipv4.ip_forward is 0, and the kernel doesn't pass VPC packets on to "+tun, "run sysctl -w net.ipv4.ip_forward=1")
	if sends(vpc, netip.Addr.Is6) {
		add("ipv6_forward", host.Forwards(sysctl, true), control.Down,
			"net.ipv6.conf.all.forwarding is 0, and the kernel doesn't pass IPv6 packets of the VPC on to "+tun, "run sysctl -w net.ipv6.conf.all.forwarding=1")
	}
	strict := func(name string) bool {
		// The kernel uses the larger of the two; 1 is strict, 2 loose.
		return max(sysctl("ipv4/conf/all/rp_filter"), sysctl("ipv4/conf/"+name+"/rp_filter")) == "1"
	}
	add("rp_filter", !strict(tun), control.Degraded,
		"net.ipv4.conf."+tun+".rp_filter is strict, and errors from routers inside the office get lost", "run sysctl -w net.ipv4.conf."+tun+".rp_filter=2")
	return append(out, interfaceChecks(vpc)...)
}

func checked(name string, ok bool, severity control.State, reason, remedy string) control.Check {
	if ok {
		return control.Passed(name)
	}
	return control.Failed(name, severity, reason, remedy)
}

// interfaceChecks looks for the VPC's interfaces.
func interfaceChecks(vpc config.VPCConfig) (out []control.Check) {
	bad := map[string]string{}
	for _, name := range vpc.Interfaces {
		if i, err := net.InterfaceByName(name); err != nil {
			bad[name] = "doesn't exist"
		} else if i.Flags&net.FlagUp == 0 {
			bad[name] = "is down"
		}
	}
	severity := control.Degraded
	if len(bad) == len(vpc.Interfaces) {
		severity = control.Down // nobody's packets arrive
	}
	for _, name := range vpc.Interfaces {
		remedy := "correct the name"
		if bad[name] == "is down" {
			remedy = "run ip link set " + name + " up"
		}
		out = append(out, checked("interface_"+name, bad[name] == "", severity, "interface "+name+" of vpc.interfaces "+bad[name], remedy))
	}
	return out
}

// sends reports whether the VPC is said to have addresses of a family.
func sends(vpc config.VPCConfig, is func(netip.Addr) bool) bool {
	return slices.ContainsFunc(vpc.Sources, func(p netip.Prefix) bool { return is(p.Addr()) })
}

// hostLooker looks at the host of a gateway.
type hostLooker struct {
	asked time.Time     // when the kernel was last asked for ways
	ways  control.Check // what it said

	// clients are hosts of the VPC, one of each family, as their addresses may be.
	clients [2]atomic.Pointer[netip.Addr]
}

// look makes known what is wrong with the host and with the data path. changed says
// that routes or rules may have changed since the last time. Only the goroutine of
// run calls it.
func (g *gateway) look(now time.Time, changed bool) {
	p := g.planned()
	checks := g.in.checks(p)
	working := !slices.ContainsFunc(checks, func(c control.Check) bool { return c.Severity == control.Down })
	switch {
	case !working: // that explains the ways too
		g.looker.ways, g.looker.asked = control.Passed("kernel_routes"), time.Time{}
	case changed || now.Sub(g.looker.asked) >= waysEvery:
		g.looker.ways, g.looker.asked = g.in.wayCheck(p), now
	}
	checks = append(checks, g.looker.ways, g.pulse.check())
	checks = append(checks, g.natCheck(p), g.exitCheck(p))
	if g.passage != nil {
		firewall := control.Passed("firewall")
		if working && g.looker.ways.OK && g.pulse.alive() { // else packets are lost for another reason
			firewall = g.passage.check(now, g.config().VPC, g.passages(p))
		}
		checks = append(checks, firewall)
	}
	g.hostChecks.Store(&checks)
}

// check looks at the interface.
func (t *tunIngress) check(p *plan.Plan) control.Check {
	const name = "tun"
	tun := t.name()
	s, err := t.link.State()
	switch {
	case err != nil && host.Gone(err):
		return control.Failed(name, control.Down, "interface "+tun+" is gone: somebody deleted it", "ztgate makes it again when it is restarted")
	case err != nil:
		return control.Failed(name, control.Down, fmt.Sprintf("interface %s can't be looked at: %v", tun, err), "")
	case !s.Up:
		return control.Failed(name, control.Down, tun+" is down, and packets of clients don't arrive", "run ip link set "+tun+" up")
	case p.MTU != 0 && s.MTU != p.MTU:
		return control.Failed(name, control.Degraded, fmt.Sprintf("the MTU of %s is %d, and not %d", tun, s.MTU, p.MTU), "leave it to ztgate: vpc.mtu sets it")
	}
	return control.Passed(name)
}

// destinations are addresses that packets of clients go to: the targets, and of our
// routes one each. There are at most maxWays.
func (g *gateway) destinations(p *plan.Plan) (out []netip.Addr) {
	for _, t := range g.config().Targets {
		if _, ours := p.Route(t.Addr.Addr()); ours {
			out = append(out, t.Addr.Addr())
		}
	}
	for _, r := range p.Routes {
		a := r.Target.Addr()
		if next := a.Next(); r.Target.Contains(next) {
			a = next
		}
		out = append(out, a)
	}
	if vpc := g.config().VPC; !sends(vpc, netip.Addr.Is6) {
		out = slices.DeleteFunc(out, netip.Addr.Is6)
	} else if !sends(vpc, netip.Addr.Is4) {
		out = slices.DeleteFunc(out, netip.Addr.Is4)
	}
	return out[:min(len(out), maxWays)]
}

// clientAddress returns an address as hosts of the VPC have it, invalid if none is known. It
// stays the same when the VPC's interface goes down.
func (g *gateway) clientAddress(v6 bool) netip.Addr {
	if c := g.looker.clients[family(v6)].Load(); c != nil {
		return *c
	}
	return netip.Addr{}
}

func family(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

// findClients looks for clients next to this host: addresses of neighbours in subnets
// of the VPC. Where everybody may send, those are the subnets of its interfaces.
func (g *gateway) findClients(h *plan.Host) {
	vpc := g.config().VPC
	for f := range g.looker.clients {
		if c := g.looker.clients[f].Load(); c != nil && !vpc.Sends(*c) {
			g.looker.clients[f].Store(nil) // vpc.sources has changed
		}
	}
	sources, behind := vpc.Sources, func(string) bool { return true }
	if len(sources) == 0 {
		sources = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}
		behind = vpcInterfaces(vpc, h)
	}
	for _, r := range h.Routes {
		if r.Via.IsValid() || !behind(r.Device) {
			continue
		}
		for _, p := range sources {
			if !p.Overlaps(r.Target) {
				continue
			}
			subnet := r.Target
			if p.Bits() > subnet.Bits() {
				subnet = p
			}
			a := subnet.Addr().Next()
			for slices.ContainsFunc(h.Addresses, func(own plan.HostAddress) bool { return own.Addr == a }) {
				a = a.Next()
			}
			if subnet.Contains(a) {
				g.looker.clients[family(a.Is6())].Store(&a)
			}
		}
	}
}

// vpcInterfaces tells which interfaces clients are behind where vpc.sources doesn't: those
// of vpc.interfaces, else the only one that has a subnet.
func vpcInterfaces(vpc config.VPCConfig, h *plan.Host) func(device string) bool {
	names := vpc.Interfaces
	if len(names) == 0 {
		for _, r := range h.Routes {
			if !r.Via.IsValid() && r.Target.Addr().Is4() && !slices.Contains(names, r.Device) {
				names = append(names, r.Device)
			}
		}
		if len(names) > 1 {
			names = nil
		}
	}
	return func(device string) bool { return slices.Contains(names, device) }
}

func (g *gateway) forwards(v6 bool) bool { return host.Forwards(g.sysctl, v6) }
