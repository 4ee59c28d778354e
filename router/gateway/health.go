package gateway

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

const (
	// flowsNear is the share of the flow table, in percent, from which it is nearly
	// full.
	flowsNear = 80
	// certificateNear is how long before its end a certificate is about to end. One
	// that lives shorter than three times as long has a third of its life.
	certificateNear = 15 * time.Minute
	// controllerPatience is how long a controller may be silent. It is asked every
	// minute, with low_bandwidth about every hour.
	controllerPatience    = 10 * time.Minute
	controllerPatienceLow = 3 * time.Hour
	// manyUnanswered is how many requests a controller leaves unanswered until it isn't just
	// slow: in the first half minute.
	manyUnanswered = 8
	// collisionPatience is how long a root's word counts that our address is another's.
	collisionPatience = 10 * time.Minute
	// clockSettles is how long after the clock was set certificates may be off.
	clockSettles = 10 * time.Minute
)

// health says whether clients are served and what is wrong. Everything that tells of
// health asks here: the control API, /readyz, the metrics, the log and systemd.
func (s *service) health() control.Health { return s.healthWith(s.peers()) }

func (s *service) healthWith(peers []ztnode.Peer) control.Health {
	now := s.now()
	info, nets := s.node.Info(), s.networks()
	// A root is itself where others get online.
	online := info.Online || info.Root
	checks := []control.Check{s.onlineCheck(online, info.Address, peers, now)}
	if s.mode == control.ModeNode {
		return control.NewHealth(online, checks)
	}
	checks = append(checks, s.networkCheck(nets, info.Address, peers, now), identityCheck(info, nets, now), s.routeCheck())
	checks = append(checks, s.targetChecks(peers)...)
	if list := s.hostChecks.Load(); list != nil {
		checks = append(checks, *list...)
	}
	checks = append(checks, s.controllerCheck(nets, peers, now), s.certificateCheck(nets, now))
	if s.plane != nil {
		checks = append(checks, s.flowCheck())
	}
	checks = append(checks, s.names.checks()...)
	checks = append(checks, s.dns.checks()...)
	checks = append(checks, s.configurationCheck(), clockCheck(info, now))
	return control.NewHealth(online, checks)
}

func (s *service) onlineCheck(online bool, address string, peers []ztnode.Peer, now time.Time) control.Check {
	const name = "online"
	if online {
		return control.Passed(name)
	}
	severity, reason := control.Down, "node "+address+" is OFFLINE: no root answers"
	if s.mode != control.ModeNode && s.serves(peers, now) {
		severity = control.Degraded
		reason += ", and members that aren't known yet can't be found"
	}
	return control.Failed(name, severity, reason, "it needs UDP to the internet or to the roots of its planet")
}

// serves reports whether hosts of the overlay are reached: the targets, or without any
// some member by a direct path.
func (s *service) serves(peers []ztnode.Peer, now time.Time) bool {
	if states := s.targets.states(); len(states) > 0 {
		return slices.ContainsFunc(states, func(t control.TargetState) bool { return t.Up })
	}
	return slices.ContainsFunc(peers, func(p ztnode.Peer) bool {
		return p.Role == ztnode.RoleLeaf && p.Link == linkDirect && now.Sub(p.LastReceive) < memberPatience
	})
}

func (s *service) networkCheck(nets []ztnode.Network, address string, peers []ztnode.Peer, now time.Time) control.Check {
	const name = "networks"
	if len(nets) == 0 {
		return control.Failed(name, control.Down, "no network is joined", "give --network NWID or run ztgate join NWID")
	}
	var reasons []string
	remedy := ""
	for _, n := range nets {
		switch n.Status {
		case ztnode.StatusOK:
			if why := s.noAddress(n, address); why != "" {
				reasons = append(reasons, why)
			}
		case ztnode.StatusRequesting:
			reason := fmt.Sprintf("network %s: waiting for its controller %s to answer", n.ID, n.ID.Controller())
			if n.Unanswered >= manyUnanswered {
				remedy = "see that the controller runs; " + duplicateRemedy
				if hears(peers, n.ID.Controller().String(), now) {
					reason += ", which is within reach but answers no request from here"
				}
			}
			reasons = append(reasons, reason)
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
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, control.Down, strings.Join(reasons, "; "), remedy)
}

// duplicateRemedy is for a node whose answers may go to another one.
const duplicateRemedy = "if it answers others, another node may use this identity (a copied home), and get the answers: its own status says so"

// hears reports whether something came from a node lately.
func hears(peers []ztnode.Peer, node string, now time.Time) bool {
	return slices.ContainsFunc(peers, func(p ztnode.Peer) bool { return p.Address == node && now.Sub(p.LastReceive) < time.Minute })
}

// identityCheck tells of other nodes in our place.
func identityCheck(info ztnode.Info, nets []ztnode.Network, now time.Time) control.Check {
	const name = "identity"
	for _, n := range nets {
		if !n.Duplicate.IsZero() {
			return control.Failed(name, control.Degraded,
				fmt.Sprintf("another node uses identity %s: controller %s of network %s answers requests that this node never sent", info.Address, n.ID.Controller(), n.ID),
				"give each node an identity of its own (an empty home): a home must not be copied")
		}
	}
	if !info.Collision.IsZero() && now.Sub(info.Collision) < collisionPatience {
		return control.Failed(name, control.Degraded, "a root knows address "+info.Address+" by another identity, so that this node is not reachable",
			"give this node a new identity (an empty home)")
	}
	return control.Passed(name)
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

// routeCheck tells of prefixes of networks that aren't used. One that was in use takes
// its clients with it.
func (s *service) routeCheck() control.Check {
	const name = "routes"
	st := s.state.Load()
	if st == nil {
		return control.Passed(name)
	}
	severity := control.Degraded
	var reasons, remedies []string
	for _, p := range st.plan.Problems {
		if p.Network == 0 || !p.Refused || p.Declined {
			continue
		}
		if slices.Contains(st.lost, p.Prefix) {
			severity = control.Down
		}
		reasons = append(reasons, fmt.Sprintf("network %s: %s is not used: %s", p.Network, p.Thing, p.Reason))
		if p.Remedy != "" && !slices.Contains(remedies, p.Remedy) {
			remedies = append(remedies, p.Remedy)
		}
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, severity, strings.Join(reasons, "; "), strings.Join(remedies, "; "))
}

// targetChecks tell of targets that don't answer, that are reached by a detour, and
// that clients may not use.
func (s *service) targetChecks(peers []ztnode.Peer) []control.Check {
	states := s.targetStates(peers)
	if len(states) == 0 {
		return nil
	}
	var down, relayed, refused []string
	for _, t := range states {
		if !t.Up {
			down = append(down, fmt.Sprintf("target %s: %s", t.Target, t.Error))
		}
		if t.Up && t.Path == linkRelay {
			relayed = append(relayed, fmt.Sprintf("target %s is reached through a root: there is no direct path to member %s", t.Target, t.Member))
		}
		if t.PolicyNote != "" {
			refused = append(refused, fmt.Sprintf("target %s: %s", t.Target, t.PolicyNote))
		}
	}
	check := func(name string, severity control.State, reasons []string, remedy string) control.Check {
		if len(reasons) == 0 {
			return control.Passed(name)
		}
		return control.Failed(name, severity, strings.Join(reasons, "; "), remedy)
	}
	return []control.Check{
		check("targets", control.Down, down, ""),
		check("paths", control.Degraded, relayed, "let UDP 9993 in on one of the two sides"),
		check("policy", control.Degraded, refused, "see ztgate explain"),
	}
}

func (s *service) controllerCheck(nets []ztnode.Network, peers []ztnode.Peer, now time.Time) control.Check {
	const name = "controller"
	if s.config().Node == config.NodeLibzt { // it doesn't tell
		return control.Passed(name)
	}
	patience := controllerPatience
	if s.config().Underlay.LowBandwidth {
		patience = controllerPatienceLow
	}
	var reasons []string
	remedy := "start it, or open the way to it"
	for _, n := range nets {
		since := n.LastController
		if n.Status != ztnode.StatusOK || n.ID.AdHoc() {
			continue
		}
		how := "has been silent since " + clockTime(since)
		if since.IsZero() {
			since, how = s.start, "hasn't spoken since the start at "+clockTime(s.start)
		}
		near := n.Unanswered >= manyUnanswered && hears(peers, n.ID.Controller().String(), now)
		if near {
			how += ", though it is within reach"
			remedy = "see its log; " + duplicateRemedy
		} else if now.Sub(since) < patience {
			continue
		}
		reason := fmt.Sprintf("network %s: its controller %s %s", n.ID, n.ID.Controller(), how)
		if !n.Certificate.IsZero() {
			reason += ", and the certificate ends at " + clockTime(n.Certificate)
		}
		reasons = append(reasons, reason)
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, control.Degraded, strings.Join(reasons, "; "), remedy)
}

func (s *service) certificateCheck(nets []ztnode.Network, now time.Time) control.Check {
	const name = "certificate"
	var reasons []string
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range nets {
		if n.Certificate.IsZero() || n.Status != ztnode.StatusOK {
			continue
		}
		left := n.Certificate.Sub(now)
		s.lifetimes[n.ID] = max(s.lifetimes[n.ID], left)
		switch {
		case left <= 0:
			reasons = append(reasons, fmt.Sprintf("network %s: the certificate ended at %s: members refuse what comes from here", n.ID, clockTime(n.Certificate)))
		case left < min(certificateNear, s.lifetimes[n.ID]/3):
			reasons = append(reasons, fmt.Sprintf("network %s: the certificate ends at %s and isn't renewed", n.ID, clockTime(n.Certificate)))
		}
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, control.Degraded, strings.Join(reasons, "; "), "the network's controller must be reached to renew it; check this host's clock too")
}

func (s *service) flowCheck() control.Check {
	const name = "flows"
	if flows, limit := s.plane.Load(); flows*100 >= limit*flowsNear {
		return control.Failed(name, control.Degraded, fmt.Sprintf("the flow table is more than %d %% full, of %d flows", flowsNear, limit),
			"see ztgate flows --top 20, nat.max_flows and the limits per client")
	}
	return control.Passed(name)
}

func (s *service) configurationCheck() control.Check {
	const name = "configuration"
	var reasons []string
	if err := s.lastReload.failure(); err != nil {
		reasons = append(reasons, fmt.Sprintf("the last reload failed, and what ran before is in force: %v", err))
	}
	if st := s.state.Load(); st != nil {
		reasons = append(reasons, st.problems[0]...)
		reasons = append(reasons, st.failures...)
	}
	if len(reasons) == 0 {
		return control.Passed(name)
	}
	return control.Failed(name, control.Degraded, strings.Join(reasons, "; "), "")
}

// clockCheck tells that the clock was set. A host that slept isn't told.
func clockCheck(info ztnode.Info, now time.Time) control.Check {
	const name = "clock"
	if info.ClockSet.IsZero() || now.Sub(info.ClockSet).Abs() >= clockSettles {
		return control.Passed(name)
	}
	by := time.Duration(info.ClockSetBy * float64(time.Second)).Round(time.Second)
	return control.Failed(name, control.Degraded, fmt.Sprintf("the clock was set by %+v at %s", by, clockTime(info.ClockSet)),
		"members may refuse certificates of another time: see that a time service keeps the clock")
}

// clockTime writes a time so that it doesn't change from one look to the next.
func clockTime(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// How often the log takes problems. A controller that changes its mind all the time
// must not fill the disk.
const (
	sayEvery = 5 * time.Second
	sayBurst = 50
	maxSaid  = 2000 // bytes of a text
)

// say logs a problem, unless there were many lately; the next one tells how many were
// left out.
func (s *service) say(level slog.Level, msg string, args ...any) {
	if !s.said.Take(max(0, int64(s.now().Sub(s.start))), 1, sayEvery, sayBurst) {
		s.unsaid.Add(1)
		return
	}
	if n := s.unsaid.Swap(0); n > 0 {
		args = append(args, "left_out", n)
	}
	for i, a := range args {
		if text, ok := a.(string); ok && len(text) > maxSaid {
			args[i] = text[:maxSaid] + "…"
		}
	}
	s.log.Log(context.Background(), level, msg, args...)
}

// observe logs changes of health and what the process is waiting for. It returns what
// health is.
func (s *service) observe(now time.Time) control.Health {
	peers := s.peers()
	s.rtt.observe(peers, now)
	h := s.healthWith(peers)
	s.mu.Lock()
	was, seen, first := s.seen, s.logged, s.readyAt.IsZero()
	s.seen, s.logged = h.State, h.Failed()
	if h.Ready && first {
		s.readyAt = now
	}
	s.mu.Unlock()
	level, msg := slog.LevelWarn, "degraded"
	switch {
	case h.Ready && first:
		s.log.Info("ready", "after", now.Sub(s.start).Round(time.Millisecond))
	case h.Ready && was == control.Down:
		s.log.Info("ready again")
	case h.State == control.Ready && was == control.Degraded:
		s.log.Info("no longer degraded")
	case h.State == control.Down && !first && was != control.Down:
		msg = "no longer ready"
	case h.State == control.Down && !first:
		msg = "not ready"
	case h.State == control.Down:
		level, msg = slog.LevelInfo, "waiting"
	}
	for _, c := range h.Failed() {
		if !slices.Contains(seen, c) {
			s.say(level, msg, "check", c.Name, "severity", string(c.Severity), "for", c.String())
		}
	}
	s.notifier.status(h)
	if s.alive == nil || s.alive() {
		s.notifier.alive(now)
	}
	return h
}
