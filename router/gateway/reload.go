package gateway

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strings"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
)

// reloadConfig reads and applies the configuration. A faulty one changes nothing.
func (s *service) reloadConfig() (any, error) {
	if s.reload == nil {
		return nil, fault.Usagef("this process is a %s: restart it to change its configuration", s.mode)
	}
	s.reloading.Lock()
	defer s.reloading.Unlock()
	next, changed, restart, err := s.config().Reload()
	if err != nil {
		return nil, err
	}
	r := control.Reloaded{Schema: control.Schema, Changed: changed, Restart: restart}
	if err := s.reload(next); err != nil {
		return nil, err
	}
	s.log.Info("configuration reloaded", "changed", strings.Join(r.Changed, ","), "restart", strings.Join(r.Restart, ","))
	return r, nil
}

// apply puts a configuration into force.
func (g *gateway) apply(next *config.Config) error {
	if err := g.Proxy.Set(next.Forwards); err != nil {
		return fault.Usage(err)
	}
	if err := g.plane.SetTranslation(next.Forwards, next.Maps); err != nil {
		return errors.Join(fault.Usage(err), g.Proxy.Set(g.config().Forwards))
	}
	g.plane.SetPolicy(next.Policy)
	g.conf.Store(next)
	g.targets.set(next.Targets)
	if err := g.joinConfigured(); err != nil {
		return err
	}
	select {
	case g.resync <- struct{}{}:
	default:
	}
	return nil
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
