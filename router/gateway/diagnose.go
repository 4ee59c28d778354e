package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

const (
	// diagnosisTimeout bounds a walk, and maxWalks how many targets are walked to at a
	// time.
	diagnosisTimeout = 9 * time.Second
	maxWalks         = 16
	maxTargets       = 64
	// resolvePatience is how long a member may take to say that it has an address.
	resolvePatience = 1500 * time.Millisecond
)

// walk goes along links until one is broken.
type walk struct {
	target string
	links  []control.Link
	broken bool
}

// step tries a link; found is what it finds.
func (w *walk) step(name string, found func() control.Link) {
	l := control.Link{State: control.LinkNotReached}
	if !w.broken {
		l = found()
	}
	l.Name, l.Target = name, w.target
	w.broken = w.broken || l.State == control.LinkBroken
	w.links = append(w.links, l)
}

func holds(detail string) control.Link { return control.Link{State: control.LinkOK, Detail: detail} }

func breaks(detail, remedy string) control.Link {
	return control.Link{State: control.LinkBroken, Detail: detail, Remedy: remedy}
}

func skips(detail string) control.Link {
	return control.Link{State: control.LinkSkipped, Detail: detail}
}

// linkOfChecks is the link that checks of health are about: as bad as the worst of them.
func linkOfChecks(checks []control.Check, about func(name string) bool) control.Link {
	l := holds("")
	var details, remedies []string
	for _, c := range control.NewHealth(true, checks).Failed() {
		if !about(c.Name) {
			continue
		}
		state := control.LinkDegraded
		if c.Severity == control.Down {
			state = control.LinkBroken
		}
		if l.State == control.LinkBroken && state != l.State {
			continue // isn't why it is broken
		}
		l.State, details = state, append(details, c.Reason)
		if c.Remedy != "" {
			remedies = append(remedies, c.Remedy)
		}
	}
	l.Detail, l.Remedy = strings.Join(details, "; "), strings.Join(remedies, "; ")
	return l
}

// named reports names that are given or begin with one that ends in "_".
func named(names ...string) func(string) bool {
	return func(name string) bool {
		return slices.ContainsFunc(names, func(n string) bool {
			return n == name || strings.HasSuffix(n, "_") && strings.HasPrefix(name, n)
		})
	}
}

// diagnose walks from the host's settings to targets.
func (s *service) diagnose(ctx context.Context, req control.DiagnosisRequest) (control.Diagnosis, error) {
	if s.mode == control.ModeNode {
		return control.Diagnosis{}, fault.Usagef("this process is in no network and has no targets: ask a gateway or a member")
	}
	targets := s.config().Targets
	if len(req.Targets) > 0 {
		targets = nil
	}
	if len(req.Targets) > maxTargets {
		return control.Diagnosis{}, fault.Usagef("%d targets: give at most %d", len(req.Targets), maxTargets)
	}
	ctx, cancel := context.WithTimeout(ctx, diagnosisTimeout)
	defer cancel()
	for _, text := range req.Targets {
		t, err := config.ParseTarget(text)
		if err != nil {
			return control.Diagnosis{}, fault.Usage(err)
		}
		if !t.Addr.Addr().IsValid() {
			if a, err := s.lookup(ctx, t.Host); err == nil {
				t.Addr = netip.AddrPortFrom(a, t.Addr.Port())
			}
		}
		targets = append(targets, t)
	}
	for _, t := range targets {
		if a := t.Addr.Addr(); len(req.Targets) > 0 && req.Client.IsValid() && a.IsValid() && a.Is6() != req.Client.Is6() {
			return control.Diagnosis{}, fault.Usagef("client %s and target %s are of different families", req.Client, t)
		}
	}
	checks := s.health().Checks
	w := &walk{}
	for _, l := range []struct {
		name  string
		about func(string) bool
	}{
		{"configuration", named("configuration", "names", "dns")},
		{"host settings", named("ip_forward", "ipv6_forward", "rp_filter", checkCopies, "clock")},
		{"links", named("tun", "interface_")},
		{"data path", named("data_path", "flows")},
		{"node", named("online", "identity")},
		{"routes", named("routes", "kernel_routes", checkNAT)}, // before the networks, which complain of them too
		{"firewall", named("firewall")},
		{"networks", named("networks", "controller", "certificate")},
	} {
		w.step(l.name, func() control.Link { return linkOfChecks(checks, l.about) })
	}
	d := control.Diagnosis{Schema: control.Schema, Running: true}
	d.Links = append([]control.Link{{Name: control.LinkGateway, State: control.LinkOK, Detail: "runs and answers"}}, w.links...)
	if len(targets) == 0 {
		d.Links = append(d.Links, control.Link{Name: "target", State: control.LinkSkipped, Detail: "none is configured: give HOST[:PORT]"})
		return d, nil
	}
	ways := make([]*walk, len(targets))
	var walks errgroup.Group
	walks.SetLimit(maxWalks)
	for i, t := range targets {
		ways[i] = &walk{target: t.String(), broken: w.broken}
		walks.Go(func() error { s.walkTo(ctx, ways[i], t, req.Client); return nil })
	}
	_ = walks.Wait() // none fails
	for _, way := range ways {
		d.Links = append(d.Links, way.links...)
	}
	return d, nil
}

// walkTo goes on where the ways to targets part.
func (s *service) walkTo(ctx context.Context, w *walk, t config.Target, client netip.Addr) {
	dst := t.Addr.Addr()
	w.step("name", func() control.Link {
		if !dst.IsValid() {
			return breaks("the name "+t.Host+" has no address yet", "see NAMES in ztgate status")
		}
		return holds(dst.String())
	})
	if s.plane != nil {
		s.walkPlane(ctx, w, t, client)
	}
	w.step("path", func() control.Link { return s.pathLink(t) })
	w.step("mtu", func() control.Link { return s.mtuLink(ctx, t) })
	w.step("target", func() control.Link { return s.targetLink(ctx, t) })
}

// walkPlane follows a client's packet through the host and the forwarding plane.
func (s *service) walkPlane(ctx context.Context, w *walk, t config.Target, client netip.Addr) {
	var x control.Explanation
	w.step("vpc", func() control.Link {
		if client.IsValid() && client.Is6() != t.Addr.Addr().Is6() {
			client = netip.Addr{}
		}
		if !client.IsValid() && s.aClient != nil {
			client = s.aClient(t.Addr.Addr().Is6())
		}
		if s.ways == nil {
			return skips("this process has no interface of its own")
		}
		x, done, err := s.ways.throughHost(control.Question{Protocol: t.Scheme, Source: netip.AddrPortFrom(client, probePort), Destination: t.Addr})
		switch {
		case err != nil:
			return breaks(err.Error(), "")
		case done && x.Verdict != "local":
			return breaks(x.Detail, "see ip route and ip rule")
		case done:
			return breaks("the target is an address of this host", "name a host of the overlay")
		case !client.IsValid():
			return holds("as this host itself: no client is known (vpc.sources, --from)")
		}
		return holds("as client " + client.String())
	})
	w.step("policy", func() control.Link {
		if !client.IsValid() {
			return skips("no client is known: give one with --from")
		}
		if x = s.ask(t, client); x.Reason == reasonPolicy || x.Reason == "source_not_allowed" {
			return breaks(fmt.Sprintf("%s is refused to %s: %s", t, client, s.ruleText(x)), "change policy or vpc.sources, if it shall pass")
		}
		return holds(s.ruleText(x))
	})
	w.step("route", func() control.Link {
		if !client.IsValid() {
			client = firstOf(s.config().VPC.Address, t.Addr.Addr().Is6())
			x = s.ask(t, client)
		}
		if x.Reason == reasonUnresolved { // a question of the member
			return holds(x.Route.String() + " in " + x.Network.String())
		}
		if x.Verdict != "forward" {
			return breaks(fmt.Sprintf("the packet is lost here: %s, %s", x.Verdict, x.Reason), "see section 7 of the manual")
		}
		return holds(fmt.Sprintf("%s in %s, next hop %s, translated to %s", x.Route, x.Network, x.NextHop, x.Source.Addr()))
	})
	w.step("member", func() control.Link {
		x := s.resolved(ctx, t, client)
		if x.Member == "" {
			return breaks(fmt.Sprintf("nobody answers for %s in %s", x.NextHop, x.Network), "is the host on, in the network, authorised, and the address right?")
		}
		return holds(x.Member + " has " + x.NextHop.String())
	})
}

func firstOf(list []netip.Prefix, v6 bool) netip.Addr {
	for _, p := range list {
		if p.Addr().Is6() == v6 {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// ask asks the plane about a packet to a target.
func (s *service) ask(t config.Target, src netip.Addr) control.Explanation {
	port := uint16(probePort)
	if t.Scheme == "icmp" {
		port = 0
	}
	return s.plane.Explain(control.Question{Protocol: t.Scheme, Source: netip.AddrPortFrom(src, port), Destination: t.Addr})
}

func (s *service) ruleText(x control.Explanation) string {
	p := s.config().Policy
	switch {
	case x.Rule >= 0 && x.Rule < len(p.Rules):
		return "rule " + p.Rules[x.Rule].String()
	case x.Rule == -1:
		return "default " + p.Default
	}
	return x.Reason
}

// resolved asks for the member behind a target until one is known, but not for long.
func (s *service) resolved(ctx context.Context, t config.Target, client netip.Addr) control.Explanation {
	x := s.ask(t, client)
	if x.Member != "" && x.Reason != reasonUnresolved {
		return x
	}
	ctx, cancel := context.WithTimeout(ctx, resolvePatience)
	defer cancel()
	var asking sync.WaitGroup
	asking.Go(func() { _, _ = s.plane.Ping(ctx, t.Addr.Addr()) }) // whatever it says
	defer asking.Wait()
	defer cancel()
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for ctx.Err() == nil {
		if x = s.ask(t, client); x.Member != "" && x.Reason != reasonUnresolved {
			return x
		}
		select {
		case <-ctx.Done():
		case <-look.C:
		}
	}
	if x.Reason == reasonUnresolved {
		x.Member = "" // the one that had it once
	}
	return x
}

// pathLink tells how packets get to the member behind a target.
func (s *service) pathLink(t config.Target) control.Link {
	at := s.whoAnswers(t)
	if at.member == "" {
		return skips("which member it is isn't known")
	}
	for _, p := range s.peers() {
		if p.Address != at.member {
			continue
		}
		switch now := time.Now(); {
		case dead(p, now):
			return breaks(lastHeard(p, now), "start it, or open UDP between the two")
		case p.Link == linkRelay:
			return control.Link{State: control.LinkDegraded, Detail: "member " + p.Address + " is reached through a root: there is no direct path",
				Remedy: "let UDP 9993 in on one of the two sides"}
		}
		return holds(strings.TrimSpace(p.Link + " " + at.over + latency(p)))
	}
	return holds("member " + at.member + " isn't among our peers now: the first packet looks for it")
}

func latency(p ztnode.Peer) string {
	if p.Latency < 0 {
		return ""
	}
	return fmt.Sprintf(", %.1f ms", p.Latency)
}

// mtuLink sends the largest packets of the network to a target and gets them back.
func (s *service) mtuLink(ctx context.Context, t config.Target) control.Link {
	if s.echo == nil {
		return skips("this process has no interface of its own")
	}
	full, fits, err := s.echo(ctx, t.Addr.Addr())
	small := errors.Is(err, netstack.ErrNoAnswer)
	switch {
	case err == nil && fits == full:
		return holds(fmt.Sprintf("packets of %d bytes pass both ways", fits))
	case err == nil:
		return holds(fmt.Sprintf("packets of %d bytes pass both ways, and larger ones are told so", fits))
	case small && fits > 0:
		return breaks(fmt.Sprintf("packets of %d bytes vanish, and those of %d pass", full, fits),
			"let ICMP \"fragmentation needed\" pass everywhere, or set the network's MTU to what passes")
	case small:
		return skips("the target doesn't answer echo requests, of any size")
	}
	return skips("echo requests can't be sent: " + err.Error())
}

// targetLink asks the target itself.
func (s *service) targetLink(ctx context.Context, t config.Target) control.Link {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var got probed
	var err error
	if s.targets.send != nil {
		got, err = s.targets.send(ctx, t)
	} else {
		got, err = dialProbe(ctx, s.targets.dialer, t)
	}
	if err != nil {
		return breaks(s.probeFailure(t, s.whoAnswers(t), err), "")
	}
	l := holds(fmt.Sprintf("answers in %v, probed through the %s", got.took.Round(10*time.Microsecond), got.through))
	if got.policy != "" {
		l.State, l.Detail = control.LinkDegraded, l.Detail+"; "+got.policy
	}
	return l
}

// Sizes of packets that are tried where the largest vanish, in bytes. Below the last
// one, which every path of IPv6 passes, it isn't a question of size.
var echoSizes = [...]int{1500, 1420, 1280, 128}

// echoes finds out how large a packet gets to an overlay host and back, on the whole
// way of a client's. An error goes with the largest size that passes, 0 = none.
func (g *gateway) echoes(ctx context.Context, dst netip.Addr) (full, fits int, err error) {
	full = g.planned().MTU
	if id, _, ok := g.networkOf(dst); ok {
		for _, n := range g.planned().Networks {
			if n.ID == id {
				full = min(full, n.MTU)
			}
		}
	}
	src := g.vpcAddress(dst.Is6())
	if !src.IsValid() || !g.treatsAsClient(config.Target{Scheme: "icmp", Addr: netip.AddrPortFrom(dst, 0)}, src) {
		return full, 0, errors.New("the policy, the translation or vpc.address keep them from going a client's way")
	}
	d := g.in.client(src)
	fits, err = d.pathMTU(ctx, dst, full)
	if !errors.Is(err, netstack.ErrNoAnswer) {
		return full, fits, err
	}
	for _, size := range echoSizes {
		if size >= full {
			continue
		}
		if passed, perr := d.pathMTU(ctx, dst, size); perr == nil {
			return full, passed, err
		}
	}
	return full, 0, err
}
