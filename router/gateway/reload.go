package gateway

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// reloadConfig reads and applies the configuration. A faulty one changes nothing.
func (s *service) reloadConfig() (any, error) {
	if s.reload == nil {
		return nil, fault.Usagef("this process is a %s: restart it to change its configuration", s.mode)
	}
	s.reloading.Lock()
	defer s.reloading.Unlock()
	s.notifier.reloading()
	defer s.notifier.started()
	r, err := s.reloadNow()
	s.lastReload.note(s.now(), err)
	if err != nil {
		return nil, err
	}
	s.log.Info("configuration reloaded", "changed", strings.Join(r.Changed, ","), "restart", strings.Join(r.Restart, ","))
	return r, nil
}

func (s *service) reloadNow() (r control.Reloaded, err error) {
	next, changed, restart, err := s.config().Reload()
	if err != nil {
		return r, err
	}
	return control.Reloaded{Schema: control.Schema, Changed: changed, Restart: restart}, s.reload(next)
}

// reloadResult remembers how the last reload ended.
type reloadResult struct {
	mu  sync.Mutex
	at  time.Time // of the last one that was put into force; zero = none
	err error     // of the last one
}

func (r *reloadResult) note(now time.Time, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err = err; err == nil {
		r.at = now
	}
}

// failure returns why what is in force isn't what the file says, nil if it is.
func (r *reloadResult) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// succeeded returns when a configuration was last put into force by a reload, the zero
// time if none was.
func (r *reloadResult) succeeded() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.at
}

// apply puts a configuration into force. With an error the old one stays.
func (g *gateway) apply(next *config.Config) error {
	if err := plan.Check(next); err != nil {
		return err
	}
	g.planning.Lock()
	defer g.planning.Unlock()
	clear(g.served)                        // what the operator himself gives up isn't lost
	next = next.Resolve(g.names.answers()) // which may have come since next was read
	stay := g.staying(next)
	if err := checkRoom(next, stay); err != nil {
		return err
	}
	node, seals := g.node.Node.(sealer)
	if !seals && next.Underlay.SealedHello != ztnode.SealedHelloOff {
		return fault.Usagef("sealed_hello (from %s): this implementation of the node can't seal HELLOs: remove it or use --node go", next.Origin("sealed_hello"))
	}
	if err := g.enact(next, stay); err != nil {
		return err
	}
	if seals {
		node.SetSealedHello(next.Underlay.SealedHello)
	}
	g.names.set(next.Names())
	return errors.Join(g.leaveGone(next), g.joinConfigured(), g.remembered.keep(next))
}

// staying lists the networks without those that a configuration doesn't name any more.
func (s *service) staying(next *config.Config) []ztnode.Network {
	gone := s.remembered.gone(next)
	return slices.DeleteFunc(s.networks(), func(n ztnode.Network) bool { return slices.Contains(gone, n.ID) })
}

// checkRoom says whether a node that is in some networks can join the configured ones.
func checkRoom(next *config.Config, in []ztnode.Network) error {
	all := len(in)
	for _, id := range next.NetworkIDs() {
		if !slices.ContainsFunc(in, func(n ztnode.Network) bool { return n.ID == id }) {
			all++
		}
	}
	if all > ztnode.MaxNetworks {
		return fault.Usagef("networks (from %s): with those that were joined by command they are %d, and a node can be in %d: leave some with ztgate leave NWID",
			next.Origin("networks"), all, ztnode.MaxNetworks)
	}
	return nil
}

// renamed takes the addresses of names.
func (g *gateway) renamed(answers map[string][]netip.Addr) error {
	g.planning.Lock()
	defer g.planning.Unlock()
	return g.enact(g.config().Resolve(answers), g.networks())
}

// enact makes a configuration that of the process, for these networks, with planning
// held.
func (g *gateway) enact(next *config.Config, nets []ztnode.Network) error {
	p, err := g.plan(next, nets)
	if err != nil {
		return err
	}
	if err := g.proxy.Set(p.HostForwards); err != nil {
		return fault.Usage(err)
	}
	g.conf.Store(next)
	g.plane.SetPolicy(compilePolicy(next.Policy))
	g.targets.set(next.Targets)
	err = g.enforce(p)
	g.usePlan(p, g.in.name(), err)
	return err
}

// reloadOnHangup reloads at each SIGHUP until ctx ends.
func (s *service) reloadOnHangup(ctx context.Context) error {
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, unix.SIGHUP)
	defer signal.Stop(ch)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ch:
			if _, err := s.reloadConfig(); err != nil {
				s.log.Error("configuration not reloaded, the running one stays in force", "error", err)
			}
		}
	}
}
