package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztgate/router/config"
	"ztgate/router/plan"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

const (
	// resyncEvery bounds how long a route that somebody else removed is missing.
	resyncEvery = 15 * time.Second
)

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

// leaveGone leaves the networks that the configuration file doesn't name any more.
func (s *service) leaveGone(cfg *config.Config) error {
	for _, id := range s.remembered.gone(cfg) {
		if err := s.node.Leave(id); err != nil {
			return fmt.Errorf("leave network %s, which isn't configured any more: %w", id, err)
		}
		s.log.Info("network is not configured any more", "network", id)
	}
	return nil
}

// follower is what a process does while it follows its networks.
type follower struct {
	// sync carries the networks to the host and the plane.
	sync func([]ztnode.Network)
	// look looks at the host, at least once a second; changed says that it may have
	// changed. nil = nothing is looked at.
	look func(now time.Time, changed bool)
	// changed gets a value when somebody may have changed the host; nil = never.
	changed <-chan struct{}
}

// follow joins the configured networks, keeps the host in step with them, and logs what
// the process is waiting for.
func (s *service) follow(ctx context.Context, f follower) error {
	select {
	case <-s.node.Ready():
	case <-ctx.Done():
		return nil
	}
	changes, stop := s.node.Watch()
	defer stop()
	if err := s.joinConfigured(); err != nil {
		return err
	}
	last := map[ztnode.NetworkID]ztnode.Network{}
	look := func(changed bool) {
		now := time.Now()
		if f.look != nil {
			f.look(now, changed)
		}
		s.observe(now)
	}
	stepped := time.Time{}
	step := func() {
		stepped = time.Now()
		nets := s.networks()
		s.logChanges(last, nets)
		f.sync(nets)
		look(true)
	}
	step()
	s.notifier.started()
	resync := time.NewTicker(resyncEvery)
	defer resync.Stop()
	looks := time.NewTicker(lookEvery)
	defer looks.Stop()
	var settled <-chan time.Time // nil = nobody has changed the host
	for {
		select {
		case <-ctx.Done():
			s.notifier.stopping()
			return nil
		case <-changes:
			step()
		case <-s.resync:
			step()
		case <-resync.C:
			step()
		case <-f.changed:
			if settled == nil {
				settled = time.After(max(settle, settleEvery-time.Since(stepped)))
			}
		case <-settled:
			settled = nil
			step()
		case <-looks.C:
			look(false)
		}
	}
}

// logChanges logs what changed in the networks since last, which it updates.
func (s *service) logChanges(last map[ztnode.NetworkID]ztnode.Network, nets []ztnode.Network) {
	now := map[ztnode.NetworkID]ztnode.Network{}
	for _, n := range nets {
		now[n.ID] = n
		old, known := last[n.ID]
		if !known || old.Status != n.Status || !slices.Equal(old.Addresses, n.Addresses) || !slices.Equal(old.Routes, n.Routes) || old.MTU != n.MTU {
			s.names.retry() // its name servers may know more
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

// state is what became of the networks on this host.
type state struct {
	plan     *plan.Plan
	devices  map[ztnode.NetworkID]string
	problems map[ztnode.NetworkID][]string // 0 = of the configuration
	failures []string                      // of putting the plan into force
	lost     []netip.Prefix                // were in use, are wanted, and aren't used now
}

// usePlan makes a plan known that was put into force on one interface, as far as
// err doesn't say otherwise.
func (s *service) usePlan(p *plan.Plan, device string, err error) {
	st := &state{plan: p, devices: map[ztnode.NetworkID]string{}}
	for _, n := range p.Networks {
		st.devices[n.ID] = device
	}
	s.use(st, map[ztnode.NetworkID]error{0: err})
}

// use makes a state known, and logs problems that are new.
func (s *service) use(st *state, errs map[ztnode.NetworkID]error) {
	st.problems = map[ztnode.NetworkID][]string{}
	for _, p := range st.plan.Problems {
		st.problems[p.Network] = append(st.problems[p.Network], p.String())
	}
	st.problems[0] = append(st.problems[0], s.config().Unresolved...)
	if left := s.node.leftOut(); len(left) > 0 {
		st.problems[0] = append(st.problems[0], fmt.Sprintf("%d networks that home remembers are not joined, since a node can be in %d: leave some and restart: %s",
			len(left), ztnode.MaxNetworks, joinIDs(left)))
	}
	for id, err := range errs {
		if err != nil {
			st.problems[id] = append(st.problems[id], err.Error())
			if id != 0 {
				st.failures = append(st.failures, err.Error())
			}
		}
	}
	st.lost = s.lost(st.plan)
	old := s.state.Swap(st)
	for id, list := range st.problems {
		for _, p := range list {
			switch {
			case old != nil && slices.Contains(old.problems[id], p):
			case id == 0:
				s.say(slog.LevelWarn, "problem", "problem", p)
			default:
				s.say(slog.LevelWarn, "problem", "network", id, "problem", p)
			}
		}
	}
}

// lost returns the prefixes that a plan refuses although they were in use before.
// Callers take turns.
func (s *service) lost(p *plan.Plan) (out []netip.Prefix) {
	refused := map[netip.Prefix]bool{}
	for _, problem := range p.Problems {
		if id, was := s.served[problem.Prefix]; was && problem.Refused && problem.Network == id {
			refused[problem.Prefix] = true
			out = append(out, problem.Prefix)
		}
	}
	for prefix, id := range s.served {
		works := slices.ContainsFunc(p.Networks, func(n plan.Network) bool { return n.ID == id })
		if works && !refused[prefix] {
			delete(s.served, prefix) // given up by the network
		}
	}
	for _, r := range p.Routes {
		if r.Network != 0 {
			s.served[r.Target] = r.Network
		}
	}
	return out
}

func joinIDs(list []ztnode.NetworkID) string {
	out := make([]string, len(list))
	for i, id := range list {
		out[i] = id.String()
	}
	return strings.Join(out, ", ")
}

// planned returns the plan in force, an empty one before the first.
func (s *service) planned() *plan.Plan {
	if st := s.state.Load(); st != nil {
		return st.plan
	}
	return &plan.Plan{}
}

// rootEndpoints are where the overlay's roots are reached, or should be. A private
// address that leads to none from here may be that of a root in the office, whose
// network is wanted.
func (s *service) rootEndpoints() (out []netip.Addr) {
	for _, ep := range s.node.RootEndpoints() {
		if a := ep.Addr().Unmap(); packet.ScopeOf(a) == packet.ScopeGlobal {
			out = append(out, a)
		}
	}
	for _, p := range s.node.Peers() {
		if p.Role == "LEAF" {
			continue
		}
		for _, path := range p.Paths {
			out = append(out, path.Endpoint.Addr().Unmap())
		}
	}
	return out
}
