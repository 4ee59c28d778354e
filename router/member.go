package router

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
)

// MemberTUN is the name of a member's first interface unless configured.
const MemberTUN = "ztm0"

// RunMember joins this machine to networks, one interface each, as zerotier-one
// does. A controller that joins no network needs no interface and no privileges.
func RunMember(ctx context.Context, cfg *Config, log *slog.Logger) error {
	return RunMemberWith(ctx, cfg, log, DefaultParts())
}

// RunMemberWith is [RunMember] with other parts than the default ones.
func RunMemberWith(ctx context.Context, cfg *Config, log *slog.Logger, parts Parts) (err error) {
	start := time.Now()
	for _, w := range cfg.Warnings {
		log.Warn("configuration", "warning", w)
	}
	planet, err := prepare(cfg)
	if err != nil {
		return err
	}
	reg := newRegistry(cfg)
	m := &member{taps: map[NetworkID]*tap{}, failed: map[NetworkID]string{}}
	m.ports.Store(&map[uint64]*tap{})
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
	mode := ModeMember
	if cfg.Controller && len(cfg.Networks) == 0 && len(node.Networks()) == 0 {
		mode = ModeNode
	}
	m.service = newService(cfg, mode, log, node, nil, start)
	m.neighbours = m
	srv, err := listen(m.service, reg)
	if err != nil {
		return err
	}
	defer srv.close()
	info := node.Info()
	log.Info("starting", "version", Version, "address", info.Address, "node", cfg.Node, "mode", mode, "home", cfg.Home,
		"socket", srv.socket(), "controller", info.Controller)
	started = true
	defer m.closeAll()
	return runAll(ctx, log, node.Run, srv.run, m.targets.Run, m.run)
}

type member struct {
	*service
	ports atomic.Pointer[map[uint64]*tap] // for the node's workers

	// Only the goroutine of run uses the rest.
	taps    map[NetworkID]*tap
	failed  map[NetworkID]string // last error, so that it is logged once
	readers errgroup.Group
	once    sync.Once
}

func (m *member) onFrames(nwid uint64, frames [][]byte) {
	if t := (*m.ports.Load())[nwid]; t != nil {
		t.deliver(frames)
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

func (m *member) drop(ctx context.Context, id NetworkID) {
	t := m.taps[id]
	delete(m.taps, id)
	m.publish()
	if err := t.close(ctx); err != nil && !errors.Is(err, os.ErrClosed) {
		m.log.Warn("close interface", "interface", t.name, "error", err)
	}
}

func (m *member) publish() {
	ports := make(map[uint64]*tap, len(m.taps))
	for id, t := range m.taps {
		ports[uint64(id)] = t
	}
	m.ports.Store(&ports)
}

// sync makes the interfaces agree with the networks.
func (m *member) sync(nets []Network) {
	for id := range m.taps {
		gone := !slices.ContainsFunc(nets, func(n Network) bool { return n.ID == id })
		if gone || m.taps[id].broken.Load() {
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

func (m *member) device(id NetworkID) string {
	if t := m.taps[id]; t != nil {
		return t.name
	}
	return ""
}

func (m *member) syncOne(n Network) error {
	t := m.taps[n.ID]
	if t == nil {
		if n.Status != StatusOK {
			return nil
		}
		var err error
		if t, err = openTAP(n.ID, m.freeName(), n.MAC, m.log); err != nil {
			return err
		}
		t.link.quietMember()
		m.taps[n.ID] = t
		m.publish()
		m.readers.Go(func() error {
			if err := t.read(m.node); err != nil {
				m.log.Error("interface failed", "network", t.id, "error", err)
				t.broken.Store(true)
			}
			return nil
		})
	}
	nc := m.config().Network(n.ID)
	problems := refusedRoutes(n, nc)
	var addrs []netip.Prefix
	var routes []Route
	if n.Status == StatusOK { // otherwise the addresses are no longer ours
		addrs = allowedAddresses(n, nc)
		kernel, err := t.link.others()
		if err != nil {
			return err
		}
		for _, r := range wantedRoutes(n, nc) {
			if slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Masked() == r.Target }) {
				continue // the kernel makes this one from the address
			}
			fatal := false
			for _, c := range conflicts(r.Target, nil, kernel, t.name) {
				fatal = fatal || c.fatal
				problems = append(problems, c.text)
			}
			if !fatal {
				routes = append(routes, r)
			}
		}
		if err := t.link.up(n.MTU); err != nil {
			return err
		}
	}
	m.report(n.ID, problems)
	m.setNetwork(n.ID, t.name, problems)
	if err := errors.Join(t.link.setAddresses(addrs), t.link.setRoutes(routes)); err != nil {
		return err
	}
	m.node.SetMulticastGroups(n.ID, t.link.groups())
	return nil
}

// Neighbour looks into the kernel's table.
func (m *member) Neighbour(id NetworkID, a netip.Addr) (MAC, bool) {
	t := (*m.ports.Load())[uint64(id)]
	if t == nil {
		return MAC{}, false
	}
	return t.link.neighbour(a)
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
			used = used || t.name == name
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
