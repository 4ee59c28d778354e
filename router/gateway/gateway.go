// Package gateway puts a gateway or a member together and runs it: it joins a
// forwarding plane and an overlay node, which don't know each other, follows the
// networks, and answers the control API.
package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"ztgate/internal/disk"
	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway/hostproxy"
	"ztgate/router/host"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// gateway forwards for a VPC.
type gateway struct {
	*service
	disk    disk.FS // of home
	sysctl  func(key string) string
	in      ingress
	table   *host.Table
	proxy   *hostproxy.Proxy
	inbound *hostproxy.Inbound // nil = the VPC doesn't see overlay hosts by this host's address
	kept    mappingFile
	watch   *host.Watch
	looker  hostLooker
	pulse   *pulse
	passage *passage // nil = nothing is measured

	planning sync.Mutex // one plan at a time is made and put into force
}

// check implements [role].
func (*gateway) check(cfg *config.Config) error { return plan.Check(cfg) }

// mark implements [role].
func (*gateway) mark(*config.Config) int { return 0 }

// settle implements [role].
func (*gateway) settle(cfg *config.Config, log *slog.Logger) *config.Config {
	return pickIngress(cfg, log)
}

// receive implements [role].
func (g *gateway) receive(nwid uint64, frames [][]byte) { g.plane.Deliver(nwid, frames) }

// setUp implements [role].
func (g *gateway) setUp(s *service, reg *prometheus.Registry) (err error) {
	g.service = s
	s.mode = control.ModeGateway
	cfg := s.config()
	g.disk, g.sysctl = disk.OS{}, host.Sysctl
	if cfg.VPC.Ingress == config.IngressPacket {
		g.in, err = openPacket(g, cfg.VPC.Interfaces[0])
	} else {
		g.in, err = openTUN(g, cfg.VPC.TUN)
	}
	if err != nil {
		return err
	}
	s.ingress = &control.Ingress{Kind: cfg.VPC.Ingress, Interface: g.in.name(), From: cfg.Origin("vpc.ingress")}
	if g.table, err = host.OpenTable(); err != nil {
		return err
	}
	if g.watch, err = host.OpenWatch(); err != nil {
		return err
	}
	base := netstack.Config{Registerer: reg}
	if err := g.in.prepare(&base); err != nil {
		return err
	}
	return g.begin(base)
}

// begin sets up the interface and makes the plane, whose other settings are in base.
func (g *gateway) begin(base netstack.Config) error {
	s, cfg := g.service, g.config()
	g.kept = newMappingFile(g.disk, cfg.Home)
	p, err := g.plan(cfg, nil)
	if err != nil {
		return err
	}
	if err := g.in.begin(p); err != nil {
		return err
	}
	base.PathMTU = pathMTU(s.node.Node)
	base.Mappings, base.Logger, base.NAT.Seed = g.kept.load(s.log), s.log, natSeed(g.disk, cfg.Home)
	if c, ok := s.node.Node.(certifier); ok {
		base.Owns = c.Owns
	}
	forwards, inbound := proxyLimits(cfg, s.log)
	if cfg.ByHost() {
		g.inbound = hostproxy.NewInbound(inbound, base.Registerer, s.log)
		base.Host = g.inbound
	}
	engine, err := newEngine(cfg, p, g.in.device(), s.node.Node, base)
	if err != nil {
		return fmt.Errorf("start forwarding plane: %w", err)
	}
	s.usePlane(engine)
	if g.inbound != nil {
		g.inbound.Use(engine)
	}
	s.reload, s.ways = g.apply, g.in
	s.dns = newClientNames(s, g.dial, base.Registerer, s.log)
	s.find = nameServers{hosts: s.dns.hosts, networks: s.networks, allowed: s.allowsDNS, dial: g.dial, seen: s.plane.SeenByVPC}.lookup
	s.names = newNames(cfg.Names(), s.find, g.renamed, s.log)
	g.proxy = hostproxy.New(s.plane, forwards, base.Registerer, s.log)
	s.limited, s.relays = g.limitedClients, g.proxy.Connections
	if err := errors.Join(g.proxy.Set(p.HostForwards), g.proxy.SetInside(p.Relayed())); err != nil {
		return err
	}
	s.targets.send = g.sendProbe
	g.pulse = &pulse{read: engine.Pulse, knock: g.knock}
	s.alive, s.aClient, s.echo = g.pulse.alive, g.clientAddress, g.echoes
	return nil
}

// maxLimited clients are shown.
const maxLimited = 10

// limitedClients lists who was refused for what he has already.
func (g *gateway) limitedClients() (out []control.Limited) {
	for _, r := range g.proxy.Refused() {
		out = append(out, control.Limited{Client: r.Client, What: "connections to the host's own addresses", Refused: r.Count})
	}
	if g.inbound != nil {
		for _, r := range g.inbound.Refused() {
			out = append(out, control.Limited{Client: r.Client, What: "connections to the VPC", Refused: r.Count})
		}
	}
	clients, _ := g.plane.Greedy(maxLimited)
	for _, c := range clients {
		if c.Refused > 0 {
			out = append(out, control.Limited{Client: c.Prefix, What: "flows", Refused: c.Refused})
		}
	}
	slices.SortStableFunc(out, func(a, b control.Limited) int { return cmp.Compare(b.Refused, a.Refused) })
	return out[:min(len(out), maxLimited)]
}

// parts implements [role].
func (g *gateway) parts() []func(context.Context) error {
	return append(g.in.parts(), g.runTogether, g.reloadOnHangup, g.names.run, g.dns.run, g.watch.Run, g.pulse.run)
}

// close implements [role]. Guards stay behind after a failure.
func (g *gateway) close(failed bool) {
	if g.proxy != nil {
		g.proxy.Close()
	}
	if g.in != nil {
		g.in.close(failed)
	}
	if g.table != nil {
		g.table.Close()
	}
	if g.watch != nil {
		g.watch.Close()
	}
}

// runTogether runs the plane and the host proxy until the networks are followed and the
// host is looked at no more: the plane takes its interface with it, and that must not be
// mistaken for somebody's deed.
func (g *gateway) runTogether(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	longer, stop := context.WithCancel(context.WithoutCancel(ctx))
	eg.Go(func() error { defer stop(); return g.run(ctx) })
	eg.Go(func() error { return g.runPlane(longer) })
	eg.Go(func() error { return g.proxy.Run(longer) })
	if g.inbound != nil {
		eg.Go(func() error { return g.inbound.Run(longer) })
	}
	return eg.Wait()
}

// runPlane runs the plane and keeps its mappings for the next run, also for one
// after this was killed.
func (g *gateway) runPlane(ctx context.Context) error {
	keeping, stop := context.WithCancel(ctx)
	var saving sync.WaitGroup
	saving.Go(func() { newKeeper(g.kept, g.plane.Mappings, g.log).run(keeping) })
	err := g.plane.Run(ctx)
	stop()
	saving.Wait()
	if err := g.kept.save(g.plane.Mappings(), noPause); err != nil {
		g.log.Warn("save mappings for the next run", "error", err)
	}
	if errors.Is(err, os.ErrClosed) && ctx.Err() == nil {
		err = fmt.Errorf("interface %q is gone: somebody deleted it: %w", g.in.name(), err)
	}
	return err
}

// run carries changes of the networks to the kernel and the plane, and puts right what
// others change there.
func (g *gateway) run(ctx context.Context) error {
	return g.follow(ctx, follower{sync: g.sync, look: g.look, changed: g.watch.Changed()})
}

// plan judges networks by a configuration and by the host as it is now.
func (g *gateway) plan(cfg *config.Config, nets []ztnode.Network) (*plan.Plan, error) {
	h, err := g.in.state()
	if err != nil {
		return nil, err
	}
	g.findClients(h)
	h.Roots = g.rootEndpoints()
	h.Underlay = append(h.Underlay, h.Roots...)
	return plan.Make(plan.Input{Config: cfg, Networks: nets, Joined: g.remembered.joined(), Host: h, Held: g.planned().Held}), nil
}

// sync makes everything agree with the networks.
func (g *gateway) sync(nets []ztnode.Network) {
	g.planning.Lock()
	defer g.planning.Unlock()
	p, err := g.plan(g.config(), nets)
	if err != nil {
		g.log.Error("read the host's routes: nothing is changed", "error", err)
		return
	}
	err = errors.Join(g.enforce(p), g.proxy.Set(p.HostForwards))
	g.usePlan(p, g.in.name(), err)
	g.dns.changed()
}

// enforce carries a plan to the kernel and the plane.
func (g *gateway) enforce(p *plan.Plan) error {
	cfg := g.config()
	g.node.SetOverlayPrefixes(p.Targets())
	fs, ms := translation(p.Forwards, p.Maps)
	err := errors.Join(g.plane.SetTranslation(fs, ms), g.plane.SetNetworks(planeNetworks(cfg, p)),
		g.plane.SetMasquerade(masquerades(p)), g.in.enforce(cfg, p), g.proxy.SetInside(p.Relayed()))
	for _, n := range p.Networks {
		g.node.SetMulticastGroups(n.ID, g.plane.multicastGroups(n.ID))
	}
	return err
}
