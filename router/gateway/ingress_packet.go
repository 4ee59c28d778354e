package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/host/packet"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// packetIngress is the VPC's interface itself, past the kernel's routing. The kernel has
// a copy of each packet that is read, and mustn't do anything with it.
type packetIngress struct {
	g      *gateway
	dev    *packet.Device
	inside *netstack.Client // sends probes as a client, from vpc.address
	proxy  *packet.Proxy    // of addresses that the kernel doesn't have; nil = there are none

	// Whoever holds gateway.planning uses:
	mtu      int // that the plane has
	host     *plan.Host
	prefixes []netip.Prefix // that are taken
	begun    bool

	guarded [2]atomic.Bool // by family: the kernel would forward its copies, and discards them
}

func openPacket(g *gateway, name string) (ingress, error) {
	dev, err := packet.Open(name)
	if err != nil {
		return nil, err
	}
	var own []netip.Addr
	for _, p := range g.config().VPC.Address {
		own = append(own, p.Addr())
	}
	inside, err := netstack.NewClient(own, func(ip []byte) { _ = dev.Inject(ip) }) // what is lost is sent again
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	dev.SetInside(own, inside.Deliver)
	i := &packetIngress{g: g, dev: dev, inside: inside}
	if len(g.config().VPC.NAT.Addresses) > 0 {
		if i.proxy, err = packet.OpenProxy(name); err != nil {
			inside.Close()
			return nil, errors.Join(err, dev.Close())
		}
	}
	return i, nil
}

func (i *packetIngress) device() netstack.Device { return i.dev }
func (i *packetIngress) name() string            { return i.dev.Name() }
func (*packetIngress) through() string           { return throughIngress }

func (i *packetIngress) parts() []func(context.Context) error {
	parts := []func(context.Context) error{i.inside.Run}
	if i.proxy != nil {
		parts = append(parts, i.proxy.Run)
	}
	return parts
}

// prepare implements [ingress]: there is no firewall on the way.
func (*packetIngress) prepare(*netstack.Config) error { return nil }

// state implements [ingress].
func (i *packetIngress) state() (_ *plan.Host, err error) {
	if i.host, err = i.g.table.StateBehind(i.g.config().VPC.TUN); err != nil {
		return nil, err
	}
	i.host.MTU, err = i.dev.MTU()
	return i.host, err
}

// begin implements [ingress].
func (i *packetIngress) begin(p *plan.Plan) error {
	i.mtu = p.MTU
	return nil
}

// enforce implements [ingress].
func (i *packetIngress) enforce(_ *config.Config, p *plan.Plan) error {
	var own []netip.Addr
	for _, a := range i.host.Addresses {
		own = append(own, a.Addr)
	}
	i.dev.SetOwn(own)
	var errs []error
	if p.MTU != i.mtu {
		errs = append(errs, i.g.plane.SetMTU(p.MTU))
		i.mtu = p.MTU
	}
	errs = append(errs, i.guard(p), i.announce(p))
	if prefixes := p.Targets(); !i.begun || !slices.Equal(prefixes, i.prefixes) {
		err := i.dev.SetPrefixes(prefixes)
		i.prefixes, i.begun = prefixes, err == nil
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// announce answers for our addresses in the VPC, as far as they are on the interface's link
// or nobody knows on which.
func (i *packetIngress) announce(p *plan.Plan) error {
	if i.proxy == nil {
		return nil
	}
	var addrs []netip.Addr
	for _, a := range p.Announced {
		if a.Device == "" || a.Device == i.name() {
			addrs = append(addrs, a.Addr)
		}
	}
	return i.proxy.Set(addrs)
}

// rivalPatience is how long another host's claim of an address of ours counts.
const rivalPatience = 10 * time.Minute

// announces implements [ingress].
func (i *packetIngress) announces(p *plan.Plan) control.Check {
	for _, a := range p.Announced {
		if a.Device != "" && a.Device != i.name() {
			return control.Failed(checkNAT, control.Down, fmt.Sprintf("hosts of the VPC don't find us: %s is on the link of %s, and ztgate takes packets from %s alone", a.Addr, a.Device, i.name()),
				"choose an address of the subnet on "+i.name())
		}
	}
	if i.proxy != nil {
		if r := i.proxy.Rival(); r != nil && time.Since(r.Seen) < rivalPatience {
			return control.Failed(checkNAT, control.Degraded, fmt.Sprintf("another host, %s on %s, says that it has %s", r.MAC, i.name(), r.Addr), "give one of the two another address")
		}
	}
	return control.Passed(checkNAT)
}

// guard makes the kernel discard its copies where it would forward them, if we may: else
// kernelCheck tells of it.
func (i *packetIngress) guard(p *plan.Plan) error {
	var routes []ztnode.Route
	for _, r := range p.Routes {
		if i.kernelForwards(r.Target.Addr().Is6()) {
			routes = append(routes, r.Route)
		}
	}
	err := i.g.table.Guard(i.g.config().VPC.TUN, routes, p.KeepGuards && len(routes) > 0)
	for _, v6 := range []bool{false, true} {
		i.guarded[family(v6)].Store(err == nil && i.kernelForwards(v6))
	}
	if errors.Is(err, os.ErrPermission) {
		return nil
	}
	return err
}

func (i *packetIngress) kernelForwards(v6 bool) bool {
	return host.ForwardsFrom(i.g.sysctl, i.name(), v6)
}

// close implements [ingress]. Guards stay behind after a failure.
func (i *packetIngress) close(failed bool) {
	if !failed && i.g.table != nil {
		if err := i.g.table.Guard(i.g.config().VPC.TUN, nil, false); err != nil && !errors.Is(err, os.ErrPermission) {
			i.g.log.Warn("clean up guard routes", "error", err)
		}
	}
	if i.proxy != nil {
		_ = i.proxy.Close()
	}
	_ = i.dev.Close() // the plane closes it too; closing twice is harmless
	i.inside.Close()
}

// client implements [ingress].
func (i *packetIngress) client(netip.Addr) clientDialer { return insideDialer{i.inside} }

// insideDialer sends from inside of this process.
type insideDialer struct{ *netstack.Client }

func (d insideDialer) pathMTU(ctx context.Context, dst netip.Addr, first int) (int, error) {
	return d.PathMTU(ctx, dst, first)
}

// knock implements [ingress].
func (i *packetIngress) knock(dst netip.AddrPort) error { return i.inside.Knock(dst) }

// checks implements [ingress].
func (i *packetIngress) checks(p *plan.Plan) []control.Check {
	checks := interfaceChecks(i.g.config().VPC)
	if _, err := i.dev.MTU(); err != nil { // the plane ends, and with it we
		_ = i.dev.Close()
		return checks
	}
	return append(checks, i.kernelCheck(p))
}

// kernelCheck tells when the kernel forwards its copies too, or answers that it can't.
func (i *packetIngress) kernelCheck(p *plan.Plan) control.Check {
	for _, v6 := range []bool{false, true} {
		wanted := slices.ContainsFunc(p.Routes, func(r plan.Route) bool { return r.Target.Addr().Is6() == v6 })
		if wanted && i.kernelForwards(v6) && !i.guarded[family(v6)].Load() {
			return copyCheck(i.name(), v6)
		}
	}
	return control.Passed(checkCopies)
}

// checkCopies is the check of what the kernel does with its copies of packets.
const checkCopies = "kernel_copies"

// copyCheck says that the kernel forwards its copies.
func copyCheck(name string, v6 bool) control.Check {
	key := "net.ipv4.conf." + name + ".forwarding"
	if v6 {
		key = "net.ipv6.conf.all.forwarding"
	}
	return control.Failed(checkCopies, control.Down,
		fmt.Sprintf("%s is 1, so that the kernel also forwards the packets that come by %s for the overlay, or tells clients that it can't", key, name),
		"run sysctl -w "+key+"=0, give ztgate NET_ADMIN for routes that discard them, or use vpc.ingress: tun")
}

// wayCheck implements [ingress].
func (i *packetIngress) wayCheck(*plan.Plan) control.Check {
	const name = "kernel_routes"
	for _, v6 := range []bool{false, true} {
		client := i.g.clientAddress(v6)
		if !client.IsValid() {
			continue
		}
		switch w, err := i.g.table.Way(netip.Addr{}, client, ""); {
		case err != nil:
			return control.Failed(name, control.Degraded, err.Error(), "")
		case w.Refused != nil:
			return control.Failed(name, control.Degraded, fmt.Sprintf("the kernel has no way to clients as %s (%v), which is needed until they are heard", client, w.Refused),
				"see ip route and ip rule")
		}
	}
	return control.Passed(name)
}

// throughHost implements [hostWays].
func (i *packetIngress) throughHost(q control.Question) (x control.Explanation, done bool, err error) {
	src, dst := q.Source.Addr(), q.Destination.Addr()
	w, err := i.g.table.Way(netip.Addr{}, dst, "")
	if err != nil {
		return x, false, err
	}
	if w.Local {
		return i.g.throughProxy(q), true, nil
	}
	name := i.name()
	_, ours := i.g.planned().Route(dst)
	held := i.g.heldBy(dst)
	if l, err := i.g.table.Link(name); (ours || held != 0) && (err != nil || !l.Up) {
		return unasked(q, "drop", reasonInterface, fmt.Sprintf("%s is down: run ip link set %s up", name, name)), true, nil
	}
	switch {
	case held != 0:
		return withNetworkDown(q, held, "aren't taken"), true, nil
	case !ours:
		return unasked(q, "elsewhere", reasonKernelRoute, fmt.Sprintf("it isn't taken from %s and left to the kernel: %s", name, i.g.whyNotRouted(dst))), true, nil
	case !src.IsValid():
		return x, false, nil
	}
	switch in, err := i.g.table.Way(netip.Addr{}, src, ""); {
	case err != nil:
		return x, false, err
	case in.Local && !slices.ContainsFunc(i.g.config().VPC.Address, func(p netip.Prefix) bool { return p.Addr() == src }):
		return unasked(q, "drop", reasonKernelRoute, "this host itself has no way to the overlay with vpc.ingress: packet"), true, nil
	case !in.Local && in.Refused == nil && in.Device != name && !in.Via.IsValid():
		return unasked(q, "drop", reasonKernelRoute, fmt.Sprintf("hosts as %s are on %s, and ztgate takes packets from %s alone", src, in.Device, name)), true, nil
	}
	return x, false, nil
}

// intoVPC implements [hostWays].
func (i *packetIngress) intoVPC(x control.Explanation) (control.Explanation, error) {
	dst := x.Destination.Addr()
	w, err := i.g.table.Way(netip.Addr{}, dst, "")
	if err != nil {
		return x, err
	}
	mac, heard := i.dev.Heard(dst)
	switch {
	case w.Local:
		x.Verdict, x.Reason, x.Detail = "drop", reasonKernelRoute, "it is for this host, which has no way to the overlay with vpc.ingress: packet"
	case heard:
		x.Detail = fmt.Sprintf("it goes to %s on %s, where %s was heard from", mac, i.name(), dst)
	case w.Refused != nil:
		x.Verdict, x.Reason = "drop", reasonKernelRoute
		x.Detail = fmt.Sprintf("%s hasn't been heard lately, and the kernel has no way to it (%v)", dst, w.Refused)
	default:
		x.Detail = "the kernel sends it to " + where(w)
	}
	return x, nil
}
