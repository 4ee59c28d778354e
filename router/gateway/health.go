package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"ztgate/router/control"
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
			if len(n.Addresses) == 0 {
				reasons = append(reasons, fmt.Sprintf("network %s gave no address: assign one to member %s at its controller", n.ID, address))
			}
		case ztnode.StatusRequesting:
			reasons = append(reasons, fmt.Sprintf("network %s: waiting for its controller %010x to answer", n.ID, uint64(n.ID)>>24))
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

// observe logs changes of readiness and what is waited for.
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
