package router

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"ztgate/internal/atomicfile"
	"ztgate/router/tuntap"
	"ztgate/zerotier/identity"
)

const (
	stopTimeout = 5 * time.Second
	// resyncEvery bounds how long a route that somebody else removed is missing.
	resyncEvery  = 15 * time.Second
	observeEvery = time.Second
)

// Run is the gateway: it works until ctx ends or something fails, and has undone
// its changes to the host when it returns.
func Run(ctx context.Context, cfg *Config, log *slog.Logger) error {
	return RunWith(ctx, cfg, log, DefaultParts())
}

// RunWith is [Run] with other parts than the default ones.
func RunWith(ctx context.Context, cfg *Config, log *slog.Logger, parts Parts) (err error) {
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
	if g.link, err = openLink(cfg.VPC.TUN, log); err != nil {
		return err
	}
	defer g.link.undo()
	g.link.failed = true // until it has ended as it was asked to
	if err := g.setUpLink(cfg.VPC); err != nil {
		return err
	}
	if g.plane, err = parts.NewPlane(PlaneConfig{
		Device: dev, Overlay: node, VPC: cfg.VPC, NAT: cfg.NAT, Forwards: cfg.Forwards, Maps: cfg.Maps, Policy: cfg.Policy,
		Seed: natSeed(cfg.Home), Mappings: loadMappings(cfg.Home, log), Logger: log, Registerer: reg,
	}); err != nil {
		return fmt.Errorf("start forwarding plane: %w", err)
	}
	g.service = newService(cfg, ModeGateway, log, node, g.plane, start)
	g.reload = g.apply
	g.relays = newRelays(g.plane, reg, log)
	defer g.relays.close()
	if err := g.relays.set(cfg.Forwards); err != nil {
		return err
	}
	g.advise(checkHost(cfg.VPC))
	srv, err := listen(g.service, reg)
	if err != nil {
		return err
	}
	defer srv.close()
	info := node.Info()
	log.Info("starting", "version", Version, "address", info.Address, "node", cfg.Node, "home", cfg.Home, "socket", srv.socket(),
		"listen", cfg.Listen, "tun", cfg.VPC.TUN, "controller", info.Controller)
	started = true
	err = runAll(ctx, log,
		node.Run,
		g.runPlane,
		srv.run,
		g.targets.Run,
		g.reloadOnHangup,
		g.relays.run,
		g.watch)
	g.link.failed = err != nil
	return err
}

// runAll runs the parts until one fails or ctx ends, and then waits for them, but
// not for ever.
func runAll(ctx context.Context, log *slog.Logger, parts ...func(context.Context) error) error {
	eg, gctx := errgroup.WithContext(ctx)
	for _, p := range parts {
		eg.Go(func() error { return p(gctx) })
	}
	done := make(chan error, 1)
	go func() { done <- eg.Wait() }()
	select {
	case err := <-done:
		return err
	case <-gctx.Done():
	}
	if ctx.Err() != nil {
		log.Info("stopping")
	}
	select {
	case err := <-done:
		return err
	case <-time.After(stopTimeout):
		return errors.Join(ctxError(gctx), fmt.Errorf("stop: some parts still ran after %v", stopTimeout))
	}
}

// ctxError returns why a group ended, unless it was asked to.
func ctxError(ctx context.Context) error {
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// prepare makes home and puts a configured identity there. It returns the
// configured planet.
func prepare(cfg *Config) (planet []byte, err error) {
	if err := os.MkdirAll(cfg.Home, 0o700); err != nil {
		return nil, usagef("home %q: %w: choose another with --home", cfg.Home, err)
	}
	if err := storeIdentity(cfg); err != nil {
		return nil, err
	}
	if cfg.Planet == "" {
		return nil, nil
	}
	if planet, err = os.ReadFile(cfg.Planet); err != nil {
		return nil, usagef("planet (from %s): %w", cfg.Origin("planet"), err)
	}
	return planet, nil
}

// storeIdentity puts the configured identity into home. One that is there
// already is never replaced.
func storeIdentity(cfg *Config) error {
	if cfg.IdentitySecret == "" {
		return nil
	}
	from := cfg.Origin("identity.secret")
	id, err := identity.Parse(cfg.IdentitySecret)
	switch {
	case err != nil:
		return usagef("identity.secret (from %s): %w", from, err)
	case !id.HasSecret():
		return usagef("identity.secret (from %s): holds no secret key: give the content of identity.secret", from)
	}
	if cfg.IdentityPublic != "" {
		if pub, err := identity.Parse(cfg.IdentityPublic); err != nil || !pub.Public().Equal(id.Public()) {
			return usagef("identity.public (from %s): does not belong to identity.secret", cfg.Origin("identity.public"))
		}
	}
	path := filepath.Join(cfg.Home, "identity.secret")
	old, err := os.ReadFile(path)
	switch {
	case err == nil && strings.TrimSpace(string(old)) == id.SecretString():
		return nil
	case err == nil:
		return usagef("identity.secret (from %s): %s holds another identity: remove one of the two", from, path)
	case !errors.Is(err, os.ErrNotExist):
		return usagef("identity.secret: %w", err)
	}
	if err := atomicfile.Write(path, []byte(id.SecretString()), 0o600); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(cfg.Home, "identity.public"), []byte(id.String()), 0o644)
}

type gateway struct {
	*service
	log    *slog.Logger
	plane  Plane
	link   *link
	relays *relays
}

func (g *gateway) setUpLink(vpc VPCConfig) error {
	g.link.quiet()
	if err := g.link.up(vpc.MTU); err != nil {
		return err
	}
	return g.link.setAddresses(vpc.Address)
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
	return g.follow(ctx, changes, g.sync, g.link.toggled)
}

// natSeed keys the choice of external ports, so that it is the same after a
// restart and nobody else can guess it.
func natSeed(home string) [32]byte {
	secret, err := os.ReadFile(filepath.Join(home, "identity.secret"))
	if err != nil {
		return [32]byte{} // the plane then takes a random one
	}
	return sha256.Sum256(append([]byte("ztgate nat ports\n"), secret...))
}

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
func (s *service) follow(ctx context.Context, changes <-chan struct{}, sync func([]Network), disturbed func() bool) error {
	last := map[NetworkID]Network{}
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
func (s *service) logChanges(last map[NetworkID]Network, nets []Network) {
	now := map[NetworkID]Network{}
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
func (g *gateway) sync(nets []Network) {
	kernel, err := g.link.others()
	if err != nil {
		g.log.Error("read kernel routes", "error", err)
	}
	cfg := g.config()
	var planes []PlaneNetwork
	var install []Route
	for _, f := range cfg.Forwards { // an address of its own has to lead to the TUN
		if a := f.Listen.Addr(); f.Side == SideVPC && !a.IsUnspecified() && !ownsAddress(nets, a) {
			install = append(install, Route{Target: netip.PrefixFrom(a, a.BitLen())})
		}
	}
	for _, m := range cfg.Maps {
		if m.Hosts == SideOverlay {
			install = append(install, Route{Target: m.Alias})
		}
	}
	for _, n := range nets {
		nc := cfg.Network(n.ID)
		problems := refusedRoutes(n, nc)
		var routes []Route
		left := 0
		for _, r := range wantedRoutes(n, nc) {
			fatal := false
			for _, c := range conflicts(r.Target, cfg.VPC.Sources, kernel, cfg.VPC.TUN) {
				fatal = fatal || c.fatal
				problems = append(problems, c.text)
			}
			if slices.ContainsFunc(install, func(o Route) bool { return o.Target == r.Target }) {
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
		if n.Status == StatusOK {
			planes = append(planes, PlaneNetwork{ID: n.ID, MAC: n.MAC, MTU: n.MTU, Addresses: allowedAddresses(n, nc),
				Routes: routes, Masquerade: cfg.Masquerade(n.ID), Masquerade6: cfg.NAT.Masquerade6, Exempt: cfg.NAT.Exempt, Direct: directLimit, Conflicts: left})
		}
	}
	if err := g.plane.SetNetworks(planes); err != nil {
		g.log.Error("set networks of the forwarding plane", "error", err)
	}
	// A network that doesn't work now says nothing of the routes it had.
	waiting := slices.ContainsFunc(nets, func(n Network) bool { return n.Status != StatusOK })
	if err := g.link.guard(install, waiting); err != nil {
		g.log.Error("set guard routes", "error", err)
	}
	if err := g.link.setRoutes(install); err != nil {
		g.log.Error("set kernel routes", "error", err)
	}
	for _, n := range planes {
		g.node.SetMulticastGroups(n.ID, g.plane.MulticastGroups(n.ID))
	}
}

func ownsAddress(nets []Network, a netip.Addr) bool {
	return slices.ContainsFunc(nets, func(n Network) bool {
		return slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// report logs problems of a network that are new.
func (s *service) report(id NetworkID, problems []string) {
	s.mu.Lock()
	old := s.problems[id]
	s.mu.Unlock()
	for _, p := range problems {
		if !slices.Contains(old, p) {
			s.log.Warn("route problem", "network", id, "problem", p)
		}
	}
}

// newRegistry returns the process's own registry with the standard collectors.
func newRegistry(cfg *Config) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	registerStandard(reg, cfg)
	return reg
}
