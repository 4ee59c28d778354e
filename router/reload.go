package router

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// reloadable are the settings that a running gateway can change, by key or
// section. Flows that are still allowed go on.
var reloadable = []string{"networks", "nat.masquerade", "nat.masquerade6", "nat.exempt", "policy.default", "targets"}

// Reloaded says what a reload did.
type Reloaded struct {
	Schema  int      `json:"schema"`
	Changed []string `json:"changed"` // keys in force now
	Restart []string `json:"restart"` // keys that wait for a restart
}

// Reload reads the configuration again from where it came from.
func (c *Config) Reload() (*Config, error) { return Load(c.sources) }

// reloadConfig reads and applies the configuration. A faulty one changes nothing.
func (s *service) reloadConfig() (any, error) {
	if s.reload == nil {
		return nil, usagef("this process is a %s: restart it to change its configuration", s.mode)
	}
	s.reloading.Lock()
	defer s.reloading.Unlock()
	old := s.config()
	next, err := old.Reload()
	if err != nil {
		return nil, err
	}
	r := Reloaded{Schema: Schema, Changed: []string{}, Restart: []string{}}
	for _, set := range settings {
		was, is := set.get(old), set.get(next)
		if slices.Equal(was, is) {
			continue
		}
		if slices.Contains(reloadable, set.key) {
			r.Changed = append(r.Changed, set.key)
			continue
		}
		r.Restart = append(r.Restart, set.key)
		if err := set.set(next, was); err != nil { // the old value stays in force
			return nil, err
		}
	}
	next.Underlay = old.Underlay
	for _, part := range []struct {
		key     string
		changed bool
	}{
		{"policy.rules", !slices.EqualFunc(old.Policy.Rules, next.Policy.Rules, func(a, b PolicyRule) bool { return a.String() == b.String() })},
		{"forwards", !slices.Equal(old.Forwards, next.Forwards)},
		{"maps", !slices.Equal(old.Maps, next.Maps)},
	} {
		if part.changed {
			r.Changed = append(r.Changed, part.key)
		}
	}
	if err := s.reload(next); err != nil {
		return nil, err
	}
	s.log.Info("configuration reloaded", "changed", strings.Join(r.Changed, ","), "restart", strings.Join(r.Restart, ","))
	return r, nil
}

// apply puts a configuration into force.
func (g *gateway) apply(next *Config) error {
	if err := g.relays.set(next.Forwards); err != nil {
		return Usage(err)
	}
	if err := g.plane.SetTranslation(next.Forwards, next.Maps); err != nil {
		return errors.Join(Usage(err), g.relays.set(g.config().Forwards))
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
