package gateway

import (
	"context"
	"fmt"
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
	resyncEvery  = 15 * time.Second
	observeEvery = time.Second
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
	for _, id := range s.memory.gone(cfg) {
		if err := s.node.Leave(id); err != nil {
			return fmt.Errorf("leave network %s, which isn't configured any more: %w", id, err)
		}
		s.log.Info("network is not configured any more", "network", id)
	}
	return nil
}

// follow joins the configured networks, calls sync after changes and from time to
// time, and logs what the process is waiting for. disturbed tells once a second
// whether somebody undid something.
func (s *service) follow(ctx context.Context, sync func([]ztnode.Network), disturbed func() bool) error {
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
	step := func() {
		nets := s.networks()
		s.logChanges(last, nets)
		sync(nets)
		s.observe(time.Now())
	}
	step()
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
		case <-s.resync:
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
		}
	}
	old := s.state.Swap(st)
	for id, list := range st.problems {
		for _, p := range list {
			switch {
			case old != nil && slices.Contains(old.problems[id], p):
			case id == 0:
				s.log.Warn("problem", "problem", p)
			default:
				s.log.Warn("problem", "network", id, "problem", p)
			}
		}
	}
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
