package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/zerotier/ztnode"
)

// MemberTUN is the name of a member's first interface unless configured.
const MemberTUN = "ztm0"

// RunMember joins this machine to networks, one interface each, as zerotier-one
// does. A controller that joins no network needs no interface and no privileges.
func RunMember(ctx context.Context, cfg *config.Config, log *slog.Logger) error {
	return RunMemberWith(ctx, cfg, log, DefaultParts())
}

// RunMemberWith is [RunMember] with other parts than the default ones.
func RunMemberWith(ctx context.Context, cfg *config.Config, log *slog.Logger, parts Parts) (err error) {
	start := time.Now()
	for _, w := range cfg.Warnings {
		log.Warn("configuration", "warning", w)
	}
	planet, err := prepare(cfg)
	if err != nil {
		return err
	}
	reg := newRegistry(cfg)
	m := &member{taps: map[ztnode.NetworkID]*host.Tap{}, failed: map[ztnode.NetworkID]string{}}
	m.ports.Store(&map[uint64]*host.Tap{})
	node, err := parts.NewNode(NodeConfig{Make: cfg.Node, Home: cfg.Home, Port: cfg.Port, Planet: planet, Controller: cfg.Controller,
		Underlay: cfg.Underlay, Logger: log, Registerer: reg, OnFrames: m.onFrames})
	if err != nil {
		return fmt.Errorf("start node: %w", err)
	}
	started := false
	defer func() {
		if !started {
			err = errors.Join(err, node.Close())
		}
	}()
	mode := control.ModeMember
	if cfg.Controller && len(cfg.Networks) == 0 && len(node.Networks()) == 0 {
		mode = control.ModeNode
	}
	m.service = newService(cfg, mode, log, node, nil, start)
	m.neighbours = m
	srv, err := listen(m.service, reg)
	if err != nil {
		return err
	}
	defer srv.close()
	info := node.Info()
	log.Info("starting", "version", control.Version, "address", info.Address, "node", cfg.Node, "mode", mode, "home", cfg.Home,
		"socket", srv.socket(), "controller", info.Controller)
	started = true
	defer m.closeAll()
	return runAll(ctx, log, node.Run, srv.run, m.targets.Run, m.run)
}

type member struct {
	*service
	ports atomic.Pointer[map[uint64]*host.Tap] // for the node's workers

	// Only the goroutine of run uses the rest.
	taps    map[ztnode.NetworkID]*host.Tap
	failed  map[ztnode.NetworkID]string // last error, so that it is logged once
	readers errgroup.Group
	once    sync.Once
}

func (m *member) onFrames(nwid uint64, frames [][]byte) {
	if t := (*m.ports.Load())[nwid]; t != nil {
		t.Deliver(frames)
	}
}

func (m *member) run(ctx context.Context) error {
	select {
	case <-m.node.Ready():
	case <-ctx.Done():
		return nil
	}
	changes, stop := m.node.Watch()
	defer stop()
	if err := m.joinConfigured(); err != nil {
		return err
	}
	err := m.follow(ctx, changes, m.sync, undisturbed)
	m.closeAll()
	return errors.Join(err, m.readers.Wait())
}

func (m *member) closeAll() {
	m.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		for id := range m.taps {
			m.drop(ctx, id)
		}
	})
}

func (m *member) drop(ctx context.Context, id ztnode.NetworkID) {
	t := m.taps[id]
	delete(m.taps, id)
	m.publish()
	if err := t.Close(ctx); err != nil && !errors.Is(err, os.ErrClosed) {
		m.log.Warn("close interface", "interface", t.Name, "error", err)
	}
}

func (m *member) publish() {
	ports := make(map[uint64]*host.Tap, len(m.taps))
	for id, t := range m.taps {
		ports[uint64(id)] = t
	}
	m.ports.Store(&ports)
}

// sync makes the interfaces agree with the networks.
func (m *member) sync(nets []ztnode.Network) {
	for id := range m.taps {
		gone := !slices.ContainsFunc(nets, func(n ztnode.Network) bool { return n.ID == id })
		if gone || m.taps[id].Broken.Load() {
			m.drop(context.Background(), id)
		}
	}
	for _, n := range nets {
		if err := m.syncOne(n); err != nil {
			if m.failed[n.ID] != err.Error() {
				m.log.Error("set up interface", "network", n.ID, "error", err)
			}
			m.failed[n.ID] = err.Error()
			m.setNetwork(n.ID, m.device(n.ID), []string{err.Error()})
			continue
		}
		delete(m.failed, n.ID)
	}
}

func (m *member) device(id ztnode.NetworkID) string {
	if t := m.taps[id]; t != nil {
		return t.Name
	}
	return ""
}

func (m *member) syncOne(n ztnode.Network) error {
	t := m.taps[n.ID]
	if t == nil {
		if n.Status != ztnode.StatusOK {
			return nil
		}
		var err error
		if t, err = host.OpenTAP(n.ID, m.freeName(), n.MAC, m.log); err != nil {
			return err
		}
		t.Link.QuietMember()
		m.taps[n.ID] = t
		m.publish()
		m.readers.Go(func() error {
			if err := t.Read(m.node); err != nil {
				m.log.Error("interface failed", "network", t.Id, "error", err)
				t.Broken.Store(true)
			}
			return nil
		})
	}
	nc := m.config().Network(n.ID)
	problems := refusedRoutes(n, nc)
	var addrs []netip.Prefix
	var routes []ztnode.Route
	if n.Status == ztnode.StatusOK { // otherwise the addresses are no longer ours
		addrs = allowedAddresses(n, nc)
		kernel, err := t.Link.Others()
		if err != nil {
			return err
		}
		for _, r := range wantedRoutes(n, nc) {
			if slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Masked() == r.Target }) {
				continue // the kernel makes this one from the address
			}
			fatal := false
			for _, c := range conflicts(r.Target, nil, kernel, t.Name) {
				fatal = fatal || c.fatal
				problems = append(problems, c.text)
			}
			if !fatal {
				routes = append(routes, r)
			}
		}
		if err := t.Link.Up(n.MTU); err != nil {
			return err
		}
	}
	m.report(n.ID, problems)
	m.setNetwork(n.ID, t.Name, problems)
	if err := errors.Join(t.Link.SetAddresses(addrs), t.Link.SetRoutes(routes)); err != nil {
		return err
	}
	m.node.SetMulticastGroups(n.ID, t.Link.Groups())
	return nil
}

// Neighbour looks into the kernel's table.
func (m *member) Neighbour(id ztnode.NetworkID, a netip.Addr) (ztnode.MAC, bool) {
	t := (*m.ports.Load())[uint64(id)]
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
