package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/host/tuntap"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// tunIngress is a TUN that the kernel routes packets to.
type tunIngress struct {
	g    *gateway
	dev  netstack.Device
	link *host.Link

	redirect *host.Redirect // nil = nothing is measured
	proxy    *host.Proxy    // of addresses that the kernel doesn't have
}

func openTUN(g *gateway, name string) (ingress, error) {
	dev, err := tuntap.OpenTUN(name, g.chooseWrites())
	if err != nil {
		return nil, err
	}
	link, err := host.OpenLink(name, g.log)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	link.Quiet()
	proxy, err := host.OpenProxy(g.sysctl)
	if err != nil {
		link.Undo()
		return nil, errors.Join(err, dev.Close())
	}
	return &tunIngress{g: g, dev: dev, link: link, proxy: proxy}, nil
}

func (t *tunIngress) device() netstack.Device { return t.dev }
func (t *tunIngress) name() string            { return t.g.config().VPC.TUN }
func (*tunIngress) through() string           { return throughKernel }

func (*tunIngress) parts() []func(context.Context) error { return nil }

func (t *tunIngress) state() (*plan.Host, error) { return t.g.table.State(t.link) }

// deviceOffset is in front of packets that are written to the device, for it to use.
const deviceOffset = 14

// prepare implements [ingress]: the plane takes the packets by which the host's firewall is
// measured.
func (t *tunIngress) prepare(base *netstack.Config) (err error) {
	if t.redirect, err = host.OpenRedirect(t.name()); err != nil {
		return err
	}
	p := newPassage()
	p.lay, p.from, p.read, p.log, p.flows = t.redirect.Lay, t.comesBy, host.ReadFirewall, t.g.log.Info, t.flowsTo
	p.write = func(packet []byte) error {
		_, err := t.dev.Write([][]byte{append(make([]byte, deviceOffset, deviceOffset+len(packet)), packet...)}, deviceOffset)
		return err
	}
	t.g.passage, base.Ours = p, p.take
	return nil
}

// flowsTo lists the flows to an address, all if it is invalid.
func (t *tunIngress) flowsTo(a netip.Addr) []netstack.FlowInfo {
	q := netstack.FlowFilter{}
	if a.IsValid() {
		q.To = netip.PrefixFrom(a, a.BitLen())
	}
	return t.g.plane.Engine.Flows(q)
}

// begin implements [ingress].
func (t *tunIngress) begin(p *plan.Plan) error {
	if err := t.link.Up(p.MTU); err != nil {
		return err
	}
	return t.link.SetAddresses(t.g.config().VPC.Address)
}

// enforce implements [ingress].
func (t *tunIngress) enforce(cfg *config.Config, p *plan.Plan) error {
	errs := []error{t.setMTU(p.MTU), t.link.SetAddresses(cfg.VPC.Address)}
	routes := make([]ztnode.Route, len(p.Routes))
	for i, r := range p.Routes {
		routes[i] = r.Route
	}
	// The guards first: a route that goes leaves no gap.
	return errors.Join(append(errs, t.link.Guard(routes, p.KeepGuards), t.link.SetRoutes(routes), t.proxy.Set(p.Announced))...)
}

// announces implements [ingress].
func (t *tunIngress) announces(*plan.Plan) control.Check {
	if remedy, why := t.proxy.Missing(); why != nil {
		return control.Failed(checkNAT, control.Down, "hosts of the VPC don't find us: "+why.Error(), remedy)
	}
	return control.Passed(checkNAT)
}

// setMTU makes the interface and the plane agree on the largest packet.
func (t *tunIngress) setMTU(mtu int) error {
	if have, err := t.link.MTU(); err != nil || have == mtu {
		return err
	}
	return errors.Join(t.link.SetMTU(mtu), t.g.plane.SetMTU(mtu))
}

// close implements [ingress]. Guards stay behind after a failure.
func (t *tunIngress) close(failed bool) {
	t.link.Failed = failed
	if err := t.proxy.Close(); err != nil {
		t.g.log.Warn("clean up answers for addresses", "error", err)
	}
	t.link.Undo()
	if t.redirect != nil {
		t.redirect.Close()
	}
	_ = t.dev.Close() // the plane closes it too; closing twice is harmless
}

// client implements [ingress].
func (t *tunIngress) client(src netip.Addr) clientDialer {
	return hostDialer{device: t.name(), source: src}
}

// knock implements [ingress]: through the kernel and the interface.
func (t *tunIngress) knock(dst netip.AddrPort) error {
	cfg := t.g.config()
	d := net.Dialer{Control: hostDialer{device: cfg.VPC.TUN}.bind}
	src := t.g.vpcAddress(dst.Addr().Is6())
	if src.IsValid() {
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
	}
	c, err := d.Dial("udp", dst.String())
	if err != nil {
		return err
	}
	defer c.Close()
	if !src.IsValid() { // the kernel chose
		from, err := netip.ParseAddrPort(c.LocalAddr().String())
		if err != nil || !cfg.VPC.Sends(from.Addr()) {
			return errNoKnock
		}
	}
	_, err = c.Write([]byte("ztgate"))
	return err
}

// checks implements [ingress].
func (t *tunIngress) checks(p *plan.Plan) []control.Check {
	return append(checkHost(t.g.config().VPC, t.g.sysctl), t.check(p))
}

// wayCheck implements [ingress]: it asks the kernel for the ways of clients' packets to the
// overlay and back.
func (t *tunIngress) wayCheck(p *plan.Plan) control.Check {
	const name = "kernel_routes"
	reasons := map[string]bool{}
	for _, dst := range t.g.destinations(p) {
		x, done, err := t.throughHost(control.Question{Source: netip.AddrPortFrom(t.g.clientAddress(dst.Is6()), 0), Destination: netip.AddrPortFrom(dst, 0)})
		switch {
		case err != nil:
			reasons[err.Error()] = true
		case done && x.Verdict != "local":
			reasons[fmt.Sprintf("packets to %s: %s", dst, x.Detail)] = true
		default:
			if why := t.noWayBack(dst); why != "" {
				reasons[why] = true
			}
		}
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	list := slices.Sorted(maps.Keys(reasons))
	if more := len(list) - maxReasons; more > 0 { // most likely of the same cause
		list = append(list[:maxReasons], fmt.Sprintf("and %d more", more))
	}
	return control.Failed(name, control.Down, strings.Join(list, "; "), "see ip route and ip rule")
}

// noWayBack says why answers of an overlay host don't get to clients, "" if they do.
func (t *tunIngress) noWayBack(from netip.Addr) string {
	client := t.g.clientAddress(from.Is6())
	if !client.IsValid() {
		return ""
	}
	w, err := t.toVPC(from, client)
	switch {
	case err != nil:
		return err.Error()
	case w.Refused != nil:
		return fmt.Sprintf("answers from the overlay: the kernel has no way to clients as %s (%v)", client, w.Refused)
	case w.Device == t.name() && !w.Local:
		return fmt.Sprintf("answers from the overlay: the kernel sends those for %s back to %s", client, w.Device)
	}
	return ""
}

// throughHost implements [hostWays].
func (t *tunIngress) throughHost(q control.Question) (x control.Explanation, done bool, err error) {
	src, dst := q.Source.Addr(), q.Destination.Addr()
	w, err := t.fromClient(src, dst)
	if err != nil {
		return x, false, err
	}
	if w.Local {
		x := t.g.throughProxy(q)
		return x, true, nil
	}
	tun := t.g.config().VPC.TUN
	r, ours := t.g.planned().Route(dst)
	held := t.g.heldBy(dst)
	switch {
	case !t.g.forwards(dst.Is6()):
		key := "net.ipv4.ip_forward"
		if dst.Is6() {
			key = "net.ipv6.conf.all.forwarding"
		}
		return unasked(q, "drop", reasonForwarding, fmt.Sprintf("%s is 0, so that the kernel doesn't pass packets on to %s: run sysctl -w %s=1", key, tun, key)), true, nil
	case (ours || held != 0) && !t.link.IsUp():
		return unasked(q, "drop", reasonInterface, fmt.Sprintf("%s is down: run ip link set %s up", tun, tun)), true, nil
	case w.Refused == nil && w.Device == tun:
		return x, false, nil
	case held != 0:
		return withNetworkDown(q, held, "go nowhere else"), true, nil
	case w.Refused != nil && !ours:
		return unasked(q, "reject", reasonKernelRoute, fmt.Sprintf("the kernel has no way to %s (%v), and no network has a route to it: see ztgate networks", dst, w.Refused)), true, nil
	case w.Refused != nil:
		return unasked(q, "drop", reasonKernelRoute, fmt.Sprintf("the kernel refuses it (%v), although %s is routed to %s: see ip route get %s from %s", w.Refused, r.Target, tun, dst, src)), true, nil
	}
	detail := fmt.Sprintf("the kernel sends it to %s and not to %s", where(w), tun)
	if ours {
		detail += fmt.Sprintf(", although %s is ours: remove the more specific route", r.Target)
	} else {
		detail += ": " + t.g.whyNotRouted(dst)
	}
	return unasked(q, "elsewhere", reasonKernelRoute, detail), true, nil
}

// intoVPC implements [hostWays].
func (t *tunIngress) intoVPC(x control.Explanation) (control.Explanation, error) {
	tun := t.g.config().VPC.TUN
	w, err := t.toVPC(x.Source.Addr(), x.Destination.Addr())
	switch {
	case err != nil:
		return x, err
	case !w.Local && !t.g.forwards(x.Destination.Addr().Is6()):
		x.Verdict, x.Reason, x.Detail = "drop", reasonForwarding, "the kernel forwards nothing from "+tun+": switch ip_forward on"
	case w.Refused != nil:
		x.Verdict, x.Reason = "drop", reasonKernelRoute
		x.Detail = fmt.Sprintf("the kernel has no way to %s from %s (%v)", x.Destination.Addr(), tun, w.Refused)
		if errors.Is(w.Refused, unix.EXDEV) {
			x.Detail += ": rp_filter refuses the source"
		}
	case w.Device == tun && !w.Local:
		x.Verdict, x.Reason, x.Detail = "drop", reasonKernelRoute, "the kernel sends it back to "+tun
	case w.Local:
		x.Detail = "it ends in this host"
	default:
		x.Detail = "the kernel sends it to " + where(w)
	}
	return x, nil
}

func (t *tunIngress) fromClient(src, dst netip.Addr) (host.Way, error) {
	if !src.IsValid() { // nobody in particular: as this host itself
		return t.g.table.Way(src, dst, "")
	}
	in, err := t.comesBy(src)
	if err != nil || in == "" {
		return host.Way{}, err
	}
	if in == local {
		return t.g.table.Way(netip.Addr{}, dst, "")
	}
	w, err := t.g.table.Way(src, dst, in)
	// With forwarding off the kernel says no more than that.
	if w.Refused != nil && !t.g.forwards(dst.Is6()) {
		return t.g.table.Way(netip.Addr{}, dst, "")
	}
	return w, err
}

// comesBy returns the interface that packets of a source come in by.
func (t *tunIngress) comesBy(src netip.Addr) (string, error) {
	w, err := t.g.table.Way(netip.Addr{}, src, "")
	switch {
	case err != nil:
		return "", err
	case w.Local:
		return local, nil
	case w.Device == t.g.config().VPC.TUN || w.Refused != nil:
		return firstInterface(t.g.config().VPC), nil
	}
	return w.Device, nil
}

func (t *tunIngress) toVPC(src, dst netip.Addr) (host.Way, error) {
	return t.g.table.Way(src, dst, t.name())
}
