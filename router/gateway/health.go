package gateway

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"ztgate/router/control"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// advise logs and remembers what is wrong with the host's settings.
func (s *service) advise(checks []control.Check) {
	for i := range checks {
		if checks[i].OK {
			checks[i].Reason = ""
		} else {
			s.log.Warn("host setting", "problem", checks[i].Reason)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.advice = checks
}

// health finds out what is missing for readiness.
func (s *service) health() control.Health {
	info := s.node.Info()
	// A root is itself where others get online.
	h := control.Health{Schema: control.Schema, Online: info.Online || info.Root, Reasons: []string{}}
	add := func(name string, ok bool, reason string) {
		if ok {
			reason = ""
		} else {
			h.Reasons = append(h.Reasons, reason)
		}
		h.Checks = append(h.Checks, control.Check{Name: name, OK: ok, Reason: reason})
	}
	add("online", h.Online,
		"node "+info.Address+" is OFFLINE: no root answers yet; it needs UDP to the internet or to the roots of its planet")
	if s.mode != control.ModeNode {
		ok, reason := s.networkHealth(info.Address)
		add("networks", ok, reason)
	}
	if len(s.config().Targets) > 0 {
		ok, reason := s.targets.health()
		add("targets", ok, reason)
	}
	h.Ready = len(h.Reasons) == 0
	s.mu.Lock()
	defer s.mu.Unlock()
	h.Checks = append(h.Checks, s.advice...)
	return h
}

func (s *service) networkHealth(address string) (bool, string) {
	nets := s.networks()
	if len(nets) == 0 {
		return false, "no network is joined: give --network NWID or run ztgate join NWID"
	}
	var reasons []string
	for _, n := range nets {
		switch n.Status {
		case ztnode.StatusOK:
			if why := s.noAddress(n, address); why != "" {
				reasons = append(reasons, why)
			}
		case ztnode.StatusRequesting:
			reasons = append(reasons, fmt.Sprintf("network %s: waiting for its controller %s to answer", n.ID, n.ID.Controller()))
		case ztnode.StatusDenied:
			reasons = append(reasons, fmt.Sprintf("network %s: ACCESS_DENIED: authorise member %s at its controller", n.ID, address))
		case ztnode.StatusNotFound:
			reasons = append(reasons, fmt.Sprintf("network %s: NOT_FOUND: its controller does not know it; check the ID", n.ID))
		case ztnode.StatusAuth:
			reasons = append(reasons, fmt.Sprintf("network %s: AUTHENTICATION_REQUIRED: sign in at %s", n.ID, n.AuthURL))
		default:
			reasons = append(reasons, fmt.Sprintf("network %s: %s", n.ID, n.Status))
		}
	}
	return len(reasons) == 0, strings.Join(reasons, "; ")
}

// noAddress says why a network that works left us without an address, "" if it
// didn't.
func (s *service) noAddress(n ztnode.Network, address string) string {
	if len(n.Addresses) == 0 {
		return fmt.Sprintf("network %s gave no address: assign one to member %s at its controller", n.ID, address)
	}
	st := s.state.Load()
	if st == nil || slices.ContainsFunc(st.plan.Networks, func(p plan.Network) bool { return p.ID == n.ID && len(p.Addresses) > 0 }) {
		return ""
	}
	return fmt.Sprintf("network %s: %s", n.ID, cmp.Or(strings.Join(st.problems[n.ID], "; "), "not set up yet"))
}

// observe logs changes of readiness and what the process is waiting for.
func (s *service) observe(now time.Time) {
	h := s.health()
	s.mu.Lock()
	was, waiting := s.ready, s.waiting
	first := s.readyAt.IsZero()
	s.ready, s.waiting = h.Ready, strings.Join(h.Reasons, "; ")
	if h.Ready && first {
		s.readyAt = now
	}
	changed := s.waiting != waiting
	s.mu.Unlock()
	switch {
	case h.Ready && !was && first:
		s.log.Info("ready", "after", now.Sub(s.start).Round(time.Millisecond))
	case h.Ready && !was:
		s.log.Info("ready again")
	case !h.Ready && (changed || was):
		level, msg := slog.LevelInfo, "waiting"
		if was {
			level, msg = slog.LevelWarn, "no longer ready"
		}
		for _, r := range h.Reasons {
			s.log.Log(context.Background(), level, msg, "for", r)
		}
	}
}
