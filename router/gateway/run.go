package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"ztgate/router/config"
	"ztgate/router/control"
)

const stopTimeout = 5 * time.Second

// NewNode makes a node.
type NewNode func(NodeConfig) (Node, error)

// Run is the gateway: it works until ctx ends or something fails, and has undone
// its changes to the host when it returns.
func Run(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	return RunWith(ctx, cfg, log, newNode)
}

// RunWith is [Run] with another node.
func RunWith(ctx context.Context, cfg *config.Config, log *slog.Logger, node NewNode) error {
	return start(ctx, cfg, log, node, &gateway{})
}

// RunMember joins this machine to networks, one interface each, as zerotier-one
// does. A controller that joins no network needs no interface and no privileges.
func RunMember(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	return RunMemberWith(ctx, cfg, log, newNode)
}

// RunMemberWith is [RunMember] with another node.
func RunMemberWith(ctx context.Context, cfg *config.Config, log *slog.Logger, node NewNode) error {
	return start(ctx, cfg, log, node, newMember())
}

// role is what a process does with its node.
type role interface {
	// check judges the configuration by itself.
	check(cfg *config.Config) error
	// mark is that of the overlay's own packets, 0 = none.
	mark(cfg *config.Config) int
	// settle decides what the configuration leaves to be decided at the start.
	settle(cfg *config.Config, log *slog.Logger) *config.Config
	// receive takes frames from the node's workers, once setUp has returned.
	receive(nwid uint64, frames [][]byte)
	// setUp prepares all that run needs. When it fails, close is called too.
	setUp(s *service, reg *prometheus.Registry) error
	// parts work until ctx ends, which is not an error.
	parts() []func(ctx context.Context) error
	// close undoes what setUp did; failed says that somebody will start us again.
	close(failed bool)
}

// start is the life of a process.
func start(ctx context.Context, cfg *config.Config, log *slog.Logger, newNode NewNode, r role) (err error) {
	begun := time.Now()
	for _, w := range cfg.Warnings {
		log.Warn("configuration", "warning", w)
	}
	if err := r.check(cfg); err != nil {
		return err
	}
	cfg, memory := limitMemory(r.settle(cfg, log), log)
	planet, err := prepare(cfg)
	if err != nil {
		return err
	}
	mem, err := remember(cfg.Home)
	if err != nil {
		return err
	}
	if err := mem.missing(cfg); err != nil {
		return err
	}
	reg := newRegistry(cfg)
	var s *service
	hook, err := newWebhook(cfg, log, func() *service { return s })
	if err != nil {
		return err
	}
	nc := NodeConfig{Implementation: cfg.Node, Home: cfg.Home, Port: cfg.Port, Planet: planet, Controller: cfg.Controller, Networks: cfg.NetworkIDs(),
		Underlay: cfg.Underlay, Mark: r.mark(cfg), Logger: log, Registerer: reg, OnFrames: r.receive}
	var parts []func(context.Context) error
	if hook != nil {
		nc.OnMember, parts = hook.Send, append(parts, hook.Run)
		registerWebhook(reg, hook)
	}
	node, err := newNode(nc)
	if err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	runs := false
	defer func() {
		if !runs {
			err = errors.Join(err, node.Close())
		}
	}()
	s = newService(cfg, log, node, begun)
	s.notifier, s.memory, s.remembered = newNotifier(log), memory, mem
	if err := s.leaveGone(cfg); err != nil {
		return err
	}
	defer func() { r.close(err != nil) }()
	if err := r.setUp(s, reg); err != nil {
		return err
	}
	srv, err := listen(s, reg)
	if err != nil {
		return err
	}
	defer srv.close()
	if err := mem.keep(cfg); err != nil {
		log.Warn("a configuration file that is gone at the next start won't be missed", "error", err)
	}
	info := node.Info()
	log.Info("starting", "version", control.Version, "address", info.Address, "node", cfg.Node, "mode", s.mode, "home", cfg.Home,
		"socket", srv.socket(), "listen", cfg.Listen, "api", cfg.API.Listen, "controller", info.Controller)
	runs = true
	return runAll(ctx, log, slices.Concat(parts, []func(context.Context) error{node.Run, srv.run, s.targets.Run}, r.parts())...)
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

// newRegistry returns the process's own registry with the standard collectors.
func newRegistry(cfg *config.Config) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	registerStandard(reg, cfg)
	return reg
}
