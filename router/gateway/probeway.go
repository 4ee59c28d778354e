package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
)

// sendProbe sends a probe on the whole way of a client's packet. Into a TUN the kernel
// routes it; the plane translates it, and the answer comes back to the kernel the same
// way. Past the kernel's routing, packets are made here and read as those that came by the
// interface. It comes from our address towards the VPC, which counts as a source there.
// What only clients meet, forwarding and the rules for packets that come in, is asked of
// the kernel first.
//
// Where the policy, the translation or the kernel treats that address otherwise than a
// client's, the probe starts behind the interface instead.
func (g *gateway) sendProbe(ctx context.Context, t config.Target) (probed, error) {
	dst := t.Addr
	q := control.Question{Protocol: t.Scheme, Source: netip.AddrPortFrom(g.clientAddress(dst.Addr().Is6()), 0), Destination: dst}
	_, routed := g.planned().Route(dst.Addr())
	if routed {
		x, done, err := g.in.throughHost(q)
		if err == nil && done && x.Verdict != "local" {
			err = errors.New(x.Detail)
		}
		if err != nil {
			return probed{through: g.in.through()}, err
		}
	}
	note := g.policyNote(t)
	src := g.vpcAddress(dst.Addr().Is6())
	if routed && note == "" && src.IsValid() && g.treatsAsClient(t, src) {
		got, err := dialProbe(ctx, g.in.client(src), t)
		got.through = g.in.through()
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
			return got, err
		}
	}
	got, err := dialProbe(ctx, g.plane, t)
	got.policy = note
	return got, err
}

// probePort stands for the ports that connections come from.
const probePort = 49152

// treatsAsClient reports whether the plane does with packets from an address of ours
// what it does with clients'. An address that isn't translated nobody answers.
func (g *gateway) treatsAsClient(t config.Target, src netip.Addr) bool {
	x := g.ask(t, src)
	return x.Verdict == "forward" && x.Translation == "masquerade"
}

// reasonPolicy is the plane's reason for what the policy refuses.
const reasonPolicy = "policy"

// policyNote says that the policy lets no client have a target, "" if it lets some. It
// asks for a neighbour, and for somebody that each rule names.
func (g *gateway) policyNote(t config.Target) string {
	v6 := t.Addr.Addr().Is6()
	clients := []netip.Addr{g.clientAddress(v6)}
	for _, r := range g.config().Policy.Rules {
		for _, p := range r.From {
			clients = append(clients, p.Addr())
		}
	}
	note := ""
	for _, c := range clients {
		if !c.IsValid() || c.Is6() != v6 || !g.config().VPC.Sends(c) {
			continue
		}
		x := g.ask(t, c)
		if x.Reason != reasonPolicy {
			return ""
		}
		note = fmt.Sprintf("the policy (%s) refuses it to clients as %s", g.ruleText(x), c)
	}
	return note
}
