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
	"sync"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/gateway/hostproxy"
	"ztgate/router/host"
	"ztgate/router/host/tuntap"
)

// Run is the gateway: it works until ctx ends or something fails, and has undone
// its changes to the host when it returns.
func Run(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	return RunWith(ctx, cfg, log, DefaultParts())
}

// RunWith is [Run] with other parts than the default ones.
func RunWith(ctx context.Context, cfg *config.Config, log *slog.Logger, parts Parts) (err error) {
	start := time.Now()
	for _, w := range cfg.Warnings {
		log.Warn("configuration", "warning", w)
	}
	planet, err := prepare(cfg)
	if err != nil {
		return err
	}
	reg := newRegistry(cfg)

	g := &gateway{log: log}
	node, err := parts.NewNode(NodeConfig{
		Make: cfg.Node, Home: cfg.Home, Port: cfg.Port, Planet: planet, Controller: cfg.Controller, Underlay: cfg.Underlay, Logger: log, Registerer: reg,
		OnFrames: func(nwid uint64, frames [][]byte) { g.plane.Deliver(nwid, frames) }, // the node runs only once plane is set
	})
	if err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	started := false
	defer func() {
		if !started {
			err = errors.Join(err, node.Close())
		}
	}()
	dev, err := tuntap.OpenTUN(cfg.VPC.TUN)
	if err != nil {
		return err
	}
	defer func() { _ = dev.Close() }() // the plane closes it too; closing twice is harmless
	if g.link, err = host.OpenLink(cfg.VPC.TUN, log); err != nil {
		return err
	}
	defer g.link.Undo()
	g.link.Failed = true // until it has ended as it was asked to
	if err := g.setUpLink(cfg.VPC); err != nil {
		return err
	}
	if g.plane, err = parts.NewPlane(PlaneConfig{
		Device: dev, Overlay: node, VPC: cfg.VPC, NAT: cfg.NAT, Forwards: cfg.Forwards, Maps: cfg.Maps, Policy: cfg.Policy,
		Seed: natSeed(cfg.Home), Mappings: loadMappings(cfg.Home, log), Logger: log, Registerer: reg,
	}); err != nil {
		return fmt.Errorf("start forwarding plane: %w", err)
	}
	g.service = newService(cfg, control.ModeGateway, log, node, g.plane, start)
	g.reload = g.apply
	g.Proxy = hostproxy.New(g.plane, reg, log)
	defer g.Proxy.Close()
	if err := g.Proxy.Set(cfg.Forwards); err != nil {
		return err
	}
	g.advise(checkHost(cfg.VPC))
	srv, err := listen(g.service, reg)
	if err != nil {
		return err
	}
	defer srv.close()
	info := node.Info()
	log.Info("starting", "version", control.Version, "address", info.Address, "node", cfg.Node, "home", cfg.Home, "socket", srv.socket(),
		"listen", cfg.Listen, "tun", cfg.VPC.TUN, "controller", info.Controller)
	started = true
	err = runAll(ctx, log,
		node.Run,
		g.runPlane,
		srv.run,
		g.targets.Run,
		g.reloadOnHangup,
		g.Proxy.Run,
		g.watch)
	g.link.Failed = err != nil
	return err
}

type gateway struct {
	*service
	log   *slog.Logger
	plane Plane
	link  *host.Link
	Proxy *hostproxy.Proxy
}

func (g *gateway) setUpLink(vpc config.VPCConfig) error {
	g.link.Quiet()
	if err := g.link.Up(cmp.Or(vpc.MTU, config.DefaultMTU)); err != nil {
		return err
	}
	return g.link.SetAddresses(vpc.Address)
}

// runPlane runs the plane and keeps its mappings for the next run, also for one
// after this was killed.
func (g *gateway) runPlane(ctx context.Context) error {
	home := g.config().Home
	keeping, stop := context.WithCancel(ctx)
	var keeper sync.WaitGroup
	keeper.Go(func() { keepMappings(keeping, home, g.plane.Mappings, g.log) })
	err := g.plane.Run(ctx)
	stop()
	keeper.Wait()
	if err := saveMappings(home, g.plane.Mappings()); err != nil {
		g.log.Warn("save mappings for the next run", "error", err)
	}
	if errors.Is(err, os.ErrClosed) && ctx.Err() == nil {
		err = fmt.Errorf("interface %q is gone: somebody deleted it: %w", g.config().VPC.TUN, err)
	}
	return err
}

// watch carries changes of the networks to the kernel and the plane.
func (g *gateway) watch(ctx context.Context) error {
	select {
	case <-g.node.Ready():
	case <-ctx.Done():
		return nil
	}
	changes, stop := g.node.Watch()
	defer stop()
	if err := g.joinConfigured(); err != nil {
		return err
	}
	return g.follow(ctx, changes, g.sync, g.link.Toggled)
}
