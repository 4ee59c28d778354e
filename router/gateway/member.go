package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/host/tuntap"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// MemberTUN is the name of a member's first interface unless configured.
const MemberTUN = "ztm0"

// member is itself a host of its networks.
type member struct {
	*service
	method   tuntap.Method
	attached atomic.Pointer[map[uint64]*host.TAP] // for the node's workers

	// Only the goroutine of run uses the rest.
	table   *host.Table
	taps    map[ztnode.NetworkID]*host.TAP
	readers errgroup.Group
	out     *exits // nil = no default route may be taken
}

func newMember() *member {
	m := &member{taps: map[ztnode.NetworkID]*host.TAP{}}
	m.attached.Store(&map[uint64]*host.TAP{})
	return m
}

// check implements [role].
func (*member) check(cfg *config.Config) error { return plan.CheckMember(cfg) }

// mark implements [role].
func (*member) mark(cfg *config.Config) int {
	if cfg.AllowsDefault() {
		return host.ExitMark
	}
	return 0
}

// settle implements [role].
func (*member) settle(cfg *config.Config, _ *slog.Logger) *config.Config { return cfg }

// receive implements [role].
func (m *member) receive(nwid uint64, frames [][]byte) {
	if t := (*m.attached.Load())[nwid]; t != nil {
		t.Deliver(frames)
	}
}

// setUp implements [role].
func (m *member) setUp(s *service, _ *prometheus.Registry) (err error) {
	m.service = s
	s.mode = control.ModeMember
	if cfg := s.config(); cfg.Controller && len(cfg.Networks) == 0 && len(s.node.Networks()) == 0 {
		s.mode = control.ModeNode
	}
	if s.mode != control.ModeNode {
		m.method = s.chooseWrites()
	}
	s.neighbours = m
	s.names = newNames(s.config().Names(), nameServers{networks: s.networks, allowed: s.allowsDNS, dial: dialHost}.lookup, m.renamed, s.log)
	if m.table, err = host.OpenTable(); err != nil || s.mode == control.ModeNode {
		return err
	}
	if !s.config().AllowsDefault() {
		return host.TidyExits(s.log)
	}
	m.out, err = openExits(s)
	return err
}

// parts implements [role].
func (m *member) parts() []func(context.Context) error {
	parts := []func(context.Context) error{m.run, m.names.run}
	if m.out != nil {
		parts = append(parts, m.out.parts()...)
	}
	return parts
}

// close implements [role].
func (m *member) close(bool) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if m.out != nil {
		m.out.close()
	}
	for id := range m.taps {
		m.detach(ctx, id)
	}
	if m.table != nil {
		m.table.Close()
	}
}

func (m *member) run(ctx context.Context) error {
	f := follower{sync: m.sync}
	if m.out != nil {
		f.look, f.changed = m.out.look, m.out.watch.Changed()
	}
	err := m.follow(ctx, f)
	if m.out != nil {
		err = errors.Join(err, m.out.routes.Set(host.ExitState{}))
	}
	for id := range m.taps {
		m.detach(context.Background(), id)
	}
	return errors.Join(err, m.readers.Wait())
}

func (m *member) detach(ctx context.Context, id ztnode.NetworkID) {
	t := m.taps[id]
	delete(m.taps, id)
	m.publish()
	if err := t.Close(ctx); err != nil && !errors.Is(err, os.ErrClosed) {
		m.log.Warn("close interface", "interface", t.Name, "error", err)
	}
}

func (m *member) publish() {
	list := make(map[uint64]*host.TAP, len(m.taps))
	for id, t := range m.taps {
		list[uint64(id)] = t
	}
	m.attached.Store(&list)
}

// sync makes the interfaces agree with the networks.
func (m *member) sync(nets []ztnode.Network) {
	for id, t := range m.taps {
		joined := slices.ContainsFunc(nets, func(n ztnode.Network) bool { return n.ID == id })
		if !joined || t.Broken.Load() {
			m.detach(context.Background(), id)
		}
	}
	p, h, err := m.plan(nets)
	if err != nil {
		m.log.Error("read the host's routes: nothing is changed", "error", err)
		return
	}
	m.node.SetOverlayPrefixes(p.Targets())
	errs := map[ztnode.NetworkID]error{}
	for _, n := range nets {
		i := slices.IndexFunc(p.Networks, func(x plan.Network) bool { return x.ID == n.ID })
		if i < 0 {
			errs[n.ID] = m.idle(n.ID)
		} else {
			errs[n.ID] = m.enforce(&p.Networks[i])
		}
	}
	if m.out != nil {
		errs[0] = m.out.enforce(p, h, m.taps)
	}
	st := &state{plan: p, devices: map[ztnode.NetworkID]string{}}
	for id, t := range m.taps {
		st.devices[id] = t.Name
	}
	m.use(st, errs)
}

func (m *member) plan(nets []ztnode.Network) (*plan.Plan, *plan.Host, error) {
	var ours []*host.Link
	for _, t := range m.taps {
		ours = append(ours, t.Link)
	}
	h, err := m.table.State(ours...)
	if err != nil {
		return nil, nil, err
	}
	h.Underlay = append(h.Underlay, m.rootEndpoints()...)
	return plan.Make(plan.Input{Role: plan.Member, Config: m.config(), Networks: nets, Joined: m.remembered.joined(), Host: h, Held: m.planned().Held}), h, nil
}

// renamed takes the addresses of names.
func (m *member) renamed(answers map[string][]netip.Addr) error {
	next := m.config().Resolve(answers)
	m.conf.Store(next)
	m.targets.set(next.Targets)
	return nil
}

// idle takes the addresses from the interface of a network that doesn't work:
// they are no longer ours.
func (m *member) idle(id ztnode.NetworkID) error {
	t := m.taps[id]
	if t == nil {
		return nil
	}
	return errors.Join(t.Link.SetAddresses(nil), t.Link.SetRoutes(nil))
}

// enforce carries the plan of a network to its interface.
func (m *member) enforce(n *plan.Network) error {
	t := m.taps[n.ID]
	if t == nil {
		var err error
		if t, err = m.attach(n); err != nil {
			return err
		}
	}
	if err := t.Link.Up(n.MTU); err != nil {
		return err
	}
	var routes []ztnode.Route
	for _, r := range n.Routes {
		// The kernel makes those of the addresses itself.
		if !slices.ContainsFunc(n.Addresses, func(p netip.Prefix) bool { return p.Masked() == r.Target }) {
			routes = append(routes, r)
		}
	}
	if err := errors.Join(t.Link.SetAddresses(n.Addresses), t.Link.SetRoutes(routes)); err != nil {
		return err
	}
	m.node.SetMulticastGroups(n.ID, t.Link.Groups())
	return nil
}

// attach makes the interface of a network.
func (m *member) attach(n *plan.Network) (*host.TAP, error) {
	t, err := host.OpenTAP(n.ID, m.freeName(), n.MAC, m.method, m.log)
	if err != nil {
		return nil, err
	}
	t.Link.QuietMember()
	m.taps[n.ID] = t
	m.publish()
	m.readers.Go(func() error {
		if err := t.Read(m.node); err != nil {
			m.log.Error("interface failed", "network", t.ID, "error", err)
			t.Broken.Store(true)
		}
		return nil
	})
	return t, nil
}

// Neighbour looks into the kernel's table.
func (m *member) Neighbour(id ztnode.NetworkID, a netip.Addr) (ztnode.MAC, bool) {
	t := (*m.attached.Load())[uint64(id)]
	if t == nil {
		return ztnode.MAC{}, false
	}
	return t.Link.Neighbour(a)
}

// freeName returns the name of the next interface: the configured one, with its
// number counted up.
func (m *member) freeName() string {
	name := m.config().VPC.TUN
	for i := 0; ; i++ {
		if i > 0 {
			name = numbered(m.config().VPC.TUN, i)
		}
		used := false
		for _, t := range m.taps {
			used = used || t.Name == name
		}
		if !used {
			return name
		}
	}
}

// numbered adds i to the number a name ends with; without one, it appends i.
func numbered(name string, i int) string {
	end := len(name)
	for end > 0 && name[end-1] >= '0' && name[end-1] <= '9' {
		end--
	}
	base := 0
	if end < len(name) {
		if _, err := fmt.Sscan(name[end:], &base); err != nil {
			base = 0
		}
	}
	suffix := fmt.Sprint(base + i)
	return name[:min(end, 15-len(suffix))] + suffix
}
