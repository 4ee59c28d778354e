package gateway

import (
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"ztgate/internal/disk"
	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/host"
	"ztgate/router/plan"
	"ztgate/zerotier/ztnode"
)

// Machine is the computer that a gateway runs on.
type Machine struct {
	Device  netstack.Device // to the VPC; a stepped gateway only writes to it
	Netlink host.Netlink
	Disk    disk.FS
	Sysctl  func(key string) string // as [host.Sysctl]
	Now     func() time.Time
}

// Stepped is a gateway that somebody else moves: it has no goroutines, timers and
// servers of its own. Otherwise it is the same, so that simulations try the real one.
type Stepped struct {
	g       *gateway
	engine  *netstack.Stepped
	keeper  *keeper
	now     func() time.Time
	changes <-chan struct{}
	last    map[ztnode.NetworkID]ztnode.Network
	probes  []*probing
}

// probing is what [prober.loop] is for one target.
type probing struct {
	of    *target
	up    bool // it answered once
	wait  time.Duration
	next  time.Time // of the next probe, or the end of this one
	began time.Time
	ping  *netstack.Ping // nil = not now
}

// NewStepped starts a gateway on a machine. Its targets are icmp:// ones.
func NewStepped(cfg *config.Config, log *slog.Logger, m Machine, newNode NewNode) (*Stepped, error) {
	if err := plan.Check(cfg); err != nil {
		return nil, err
	}
	g := &gateway{disk: m.Disk, sysctl: m.Sysctl, table: host.OpenTableOf(m.Netlink)}
	node, err := newNode(NodeConfig{Home: cfg.Home, Logger: log, OnFrames: g.receive})
	if err != nil {
		return nil, fmt.Errorf("start node: %w", err)
	}
	g.service = newService(cfg, log, node, m.Now())
	g.now = m.Now
	g.mode = control.ModeGateway
	link, err := host.OpenLinkOf(m.Netlink, cfg.VPC.TUN, log)
	if err != nil {
		return nil, err
	}
	g.in = &tunIngress{g: g, dev: m.Device, link: link,
		proxy: host.OpenProxyOf(m.Netlink, m.Sysctl, func(string, string) error { return nil })}
	if err := g.begin(netstack.Config{Registerer: prometheus.NewRegistry(), Now: m.Now}); err != nil {
		return nil, err
	}
	s := &Stepped{g: g, engine: netstack.NewStepped(g.plane.Engine), keeper: newKeeper(g.kept, g.plane.Mappings, log), now: m.Now,
		last: map[ztnode.NetworkID]ztnode.Network{}}
	s.changes, _ = node.Watch()
	if err := g.joinConfigured(); err != nil {
		s.engine.Close()
		return nil, err
	}
	s.Sync()
	return s, nil
}

// Sync is what [service.follow] does after a change.
func (s *Stepped) Sync() {
	nets := s.g.networks()
	s.g.logChanges(s.last, nets)
	s.g.sync(nets)
	s.look(true)
	s.engine.Flush()
}

// Changed reports whether Sync should be called now.
func (s *Stepped) Changed() bool {
	select {
	case <-s.changes:
		return true
	case <-s.g.resync:
		return true
	default:
		return false
	}
}

// Look is what is done every second. It returns whether clients are served.
func (s *Stepped) Look() control.Health { return s.look(false) }

func (s *Stepped) look(changed bool) control.Health {
	now := s.now()
	s.g.look(now, changed)
	return s.g.observe(now)
}

// Tick is what the plane does every 500 ms.
func (s *Stepped) Tick() { s.engine.Tick() }

// FromVPC takes packets that the kernel sends to the interface.
func (s *Stepped) FromVPC(packets ...[]byte) { s.engine.FromVPC(packets...) }

// Flush sends what frames made the plane's own host send.
func (s *Stepped) Flush() { s.engine.Flush() }

// Plane is the forwarding plane.
func (s *Stepped) Plane() *netstack.Engine { return s.g.plane.Engine }

// Health says whether clients are served.
func (s *Stepped) Health() control.Health { return s.g.health() }

// Plan is the plan in force.
func (s *Stepped) Plan() *plan.Plan { return s.g.planned() }

// Reload puts a configuration into force. With an error the old one stays.
func (s *Stepped) Reload(next *config.Config) error { return s.g.apply(next) }

// Keep saves the mappings if they changed, and returns when to do so again.
func (s *Stepped) Keep() time.Duration { return s.keeper.keep() }

// Probe moves the probes of the targets, and returns when to do so again, or after an
// answer.
func (s *Stepped) Probe() (next time.Time) {
	p, now := s.g.targets, s.now()
	select {
	case <-p.change:
		s.endProbes()
		for _, t := range p.targets() {
			s.probes = append(s.probes, &probing{of: t, wait: probeHurry})
		}
	default:
	}
	next = now.Add(probeEvery)
	for _, x := range s.probes {
		switch {
		case x.ping != nil && x.ping.Answered():
			x.up, x.wait = true, probeEvery
			s.probed(x, nil)
		case now.Before(x.next):
		case x.ping != nil:
			s.probed(x, netstack.ErrNoAnswer)
		default:
			x.began = now
			var err error
			if x.ping, err = s.engine.Ping(x.of.Addr.Addr()); err != nil {
				s.probed(x, err)
			} else {
				x.next = now.Add(probeTimeout)
			}
		}
		if x.next.Before(next) {
			next = x.next
		}
	}
	return next
}

// Probing reports whether an answer is waited for.
func (s *Stepped) Probing() bool {
	return slices.ContainsFunc(s.probes, func(x *probing) bool { return x.ping != nil })
}

func (s *Stepped) probed(x *probing, err error) {
	now := s.now()
	if err != nil && x.up {
		x.wait = probeAgain
	}
	s.g.targets.record(x.of, err, probed{took: now.Sub(x.began), through: throughPlane}, now)
	if x.ping != nil {
		x.ping.Close()
	}
	x.ping, x.next = nil, now.Add(x.wait)
}

func (s *Stepped) endProbes() {
	for _, x := range s.probes {
		if x.ping != nil {
			x.ping.Close()
		}
	}
	s.probes = nil
}

// Stop ends the gateway in good order.
func (s *Stepped) Stop() error {
	err := s.g.kept.save(s.g.plane.Mappings(), noPause)
	s.g.close(false)
	s.Abandon()
	return err
}

// Abandon frees what a killed gateway held in this process, and touches nothing else.
func (s *Stepped) Abandon() {
	s.endProbes()
	s.engine.Close()
}
