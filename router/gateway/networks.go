package gateway

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"ztgate/router/config"
	"ztgate/zerotier/ztnode"
)

const // resyncEvery bounds how long a route that somebody else removed is missing.
resyncEvery = 15 * time.Second

const observeEvery = time.Second

// joinConfigured joins the networks of the configuration that home does not
// remember.
func (s *service) joinConfigured() error {
	for _, n := range s.config().Networks {
		if err := s.node.Join(n.ID); err != nil {
			return fmt.Errorf("join network %s: %w", n.ID, err)
		}
	}
	return nil
}

// follow calls sync after changes and from time to time, and logs what is
// waited for. disturbed tells once a second whether somebody undid something.
func (s *service) follow(ctx context.Context, changes <-chan struct{}, sync func([]ztnode.Network), disturbed func() bool) error {
	last := map[ztnode.NetworkID]ztnode.Network{}
	step := func() {
		nets := s.networks()
		s.logChanges(last, nets)
		sync(nets)
		s.forgetNetworks(nets)
		s.observe(time.Now())
	}
	step()
	again := s.resync
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	look := time.NewTicker(observeEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
			step()
		case <-again:
			step()
		case <-resync.C:
			step()
		case <-look.C:
			if disturbed() {
				step()
			}
			s.observe(time.Now())
		}
	}
}

func undisturbed() bool { return false }

// logChanges logs what changed in the networks since last, which it updates.
func (s *service) logChanges(last map[ztnode.NetworkID]ztnode.Network, nets []ztnode.Network) {
	now := map[ztnode.NetworkID]ztnode.Network{}
	for _, n := range nets {
		now[n.ID] = n
		old, known := last[n.ID]
		if !known || old.Status != n.Status || !slices.Equal(old.Addresses, n.Addresses) || !slices.Equal(old.Routes, n.Routes) || old.MTU != n.MTU {
			s.log.Info("network", "network", n.ID, "name", n.Name, "status", n.Status, "addresses", n.Addresses, "routes", len(n.Routes), "mtu", n.MTU)
		}
		last[n.ID] = n
	}
	for id := range last {
		if _, ok := now[id]; !ok {
			s.log.Info("network left", "network", id)
			delete(last, id)
		}
	}
}

// directLimit is the largest IP packet that a FRAME carries in one datagram of
// the default size (chapter 01 §4.2, chapter 03 §4.2).
const directLimit = 1432 - 28 - 8 - 2

// sync makes the kernel and the plane agree with the networks.
func (g *gateway) sync(nets []ztnode.Network) {
	kernel, err := g.link.Others()
	if err != nil {
		g.log.Error("read kernel routes", "error", err)
	}
	cfg := g.config()
	var planes []PlaneNetwork
	var install []ztnode.Route
	for _, f := range cfg.Forwards { // an address of its own has to lead to the TUN
		if a := f.Listen.Addr(); f.Side == config.SideVPC && !a.IsUnspecified() && !ownsAddress(nets, a) {
			install = append(install, ztnode.Route{Target: netip.PrefixFrom(a, a.BitLen())})
		}
	}
	for _, m := range cfg.Maps {
		if m.Hosts == config.SideOverlay {
			install = append(install, ztnode.Route{Target: m.Alias})
		}
	}
	for _, n := range nets {
		nc := cfg.Network(n.ID)
		problems := refusedRoutes(n, nc)
		var routes []ztnode.Route
		left := 0
		for _, r := range wantedRoutes(n, nc) {
			fatal := false
			for _, c := range conflicts(r.Target, cfg.VPC.Sources, kernel, cfg.VPC.TUN) {
				fatal = fatal || c.fatal
				problems = append(problems, c.text)
			}
			if slices.ContainsFunc(install, func(o ztnode.Route) bool { return o.Target == r.Target }) {
				fatal = true
				problems = append(problems, fmt.Sprintf("route %s is in another network too and is not used here: leave one of them", r.Target))
			}
			if fatal {
				left++
				continue
			}
			routes = append(routes, r)
			install = append(install, r)
		}
		g.report(n.ID, problems)
		g.setNetwork(n.ID, cfg.VPC.TUN, problems)
		if n.Status == ztnode.StatusOK {
			planes = append(planes, PlaneNetwork{ID: n.ID, MAC: n.MAC, MTU: n.MTU, Addresses: allowedAddresses(n, nc),
				Routes: routes, Masquerade: cfg.Masquerade(n.ID), Masquerade6: cfg.NAT.Masquerade6, Exempt: cfg.NAT.Exempt, Direct: directLimit, Conflicts: left})
		}
	}
	if err := g.plane.SetNetworks(planes); err != nil {
		g.log.Error("set networks of the forwarding plane", "error", err)
	}
	// A network that doesn't work now says nothing of the routes it had.
	waiting := slices.ContainsFunc(nets, func(n ztnode.Network) bool { return n.Status != ztnode.StatusOK })
	if err := g.link.Guard(install, waiting); err != nil {
		g.log.Error("set guard routes", "error", err)
	}
	if err := g.link.SetRoutes(install); err != nil {
		g.log.Error("set kernel routes", "error", err)
	}
	for _, n := range planes {
		g.node.SetMulticastGroups(n.ID, g.plane.MulticastGroups(n.ID))
	}
}

func ownsAddress(nets []ztnode.Network, a netip.Addr) bool {
	return slices.ContainsFunc(nets, func(n ztnode.Network) bool {
		return slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// report logs problems of a network that are new.
func (s *service) report(id ztnode.NetworkID, problems []string) {
	s.mu.Lock()
	old := s.problems[id]
	s.mu.Unlock()
	for _, p := range problems {
		if !slices.Contains(old, p) {
			s.log.Warn("route problem", "network", id, "problem", p)
		}
	}
}
