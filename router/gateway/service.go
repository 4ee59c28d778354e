package gateway

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/internal/rate"
	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/router/gateway/hostproxy"
	"ztgate/zerotier/ztnode"
)

// service is what the control API and the HTTP server show of a running
// process, whatever its role.
type service struct {
	conf       atomic.Pointer[config.Config] // replaced by a reload
	state      atomic.Pointer[state]         // nil before the first plan is in force
	mode       string
	log        *slog.Logger
	now        func() time.Time
	start      time.Time
	node       clean
	memory     int64            // limit, bytes; 0 = none
	writes     *control.Writes  // nil = there are no interfaces
	plane      *plane           // nil unless a gateway
	ingress    *control.Ingress // of a gateway
	targets    *prober
	names      *names                        // nil = no names are looked up
	find       lookupFunc                    // of names that somebody asks about; nil = by the networks' name servers, else this host's
	dns        *clientNames                  // nil = clients' questions for names aren't answered
	neighbours neighbours                    // who knows which MAC an address has; nil = nobody
	ways       hostWays                      // the host's kernel; nil = nothing of it matters
	resync     chan struct{}                 // a value makes the networks be looked at again
	reload     func(*config.Config) error    // puts a configuration into force; nil = this process can't
	remembered *homeMemory                   // nil = what was in force last isn't remembered
	limited    func() []control.Limited      // clients that limits refuse, the greediest first; nil = there are none
	relays     func() []hostproxy.Connection // what is carried by the host proxy; nil = there is none
	exits      func() []control.Exit         // of a member; nil = it has none
	reloading  sync.Mutex

	hostChecks atomic.Pointer[[]control.Check] // of the host and the data path; nil = nobody looks
	lastReload reloadResult
	rtt        *rtts                                                                 // nil = nobody asks
	notifier   *notifier                                                             // nil = no service manager
	aClient    func(v6 bool) netip.Addr                                              // how clients' addresses are; nil or invalid = unknown
	echo       func(ctx context.Context, dst netip.Addr) (full, fits int, err error) // see [gateway.echoes]; nil = there is no interface
	alive      func() bool                                                           // whether the data path goes on; nil = there is none

	// served are the prefixes that were in use, by network, until the configuration
	// changes. Whoever makes plans known uses it.
	served map[netip.Prefix]ztnode.NetworkID

	said   rate.Shared   // problems in the log
	unsaid atomic.Uint64 // since the last one that was

	mu        sync.Mutex
	lifetimes map[ztnode.NetworkID]time.Duration // longest seen of the certificates
	logged    []control.Check                    // failed ones, last logged
	seen      control.State                      // then
	readyAt   time.Time
}

func newService(cfg *config.Config, log *slog.Logger, node Node, start time.Time) *service {
	s := &service{now: time.Now, resync: make(chan struct{}, 1), log: log, start: start, node: clean{node}, seen: control.Down,
		lifetimes: map[ztnode.NetworkID]time.Duration{}, served: map[netip.Prefix]ztnode.NetworkID{}}
	s.conf.Store(cfg)
	s.targets = newProber(cfg.Targets, hostDialer{}, log)
	s.targets.failure, s.targets.answer = s.probeFailure, s.whoAnswers
	return s
}

// usePlane makes the service that of a gateway.
func (s *service) usePlane(e *netstack.Engine) {
	s.plane = &plane{e}
	s.neighbours, s.targets.dialer = s.plane, e
}

func (s *service) config() *config.Config { return s.conf.Load() }

func (s *service) networks() []ztnode.Network {
	nets := s.node.Networks()
	slices.SortFunc(nets, func(a, b ztnode.Network) int { return cmp.Compare(a.ID, b.ID) })
	return nets
}

func (s *service) networkViews() []control.NetworkView {
	nets, st := s.networks(), s.state.Load()
	if st == nil {
		st = &state{}
	}
	out := make([]control.NetworkView, len(nets))
	for i, n := range nets {
		out[i] = control.NetworkView{Network: n, Device: st.devices[n.ID], Problems: st.problems[n.ID]}
	}
	return out
}

func (s *service) info() control.Info {
	b := control.BuildInfo()
	b.Node = s.config().Node
	return control.Info{Schema: control.Schema, Info: s.node.Info(), Mode: s.mode, Home: s.config().Home, Started: s.start, Build: b}
}

func (s *service) peers() []ztnode.Peer {
	peers, now := s.node.Peers(), s.now()
	slices.SortFunc(peers, func(a, b ztnode.Peer) int { return strings.Compare(a.Address, b.Address) })
	for i := range peers {
		peers[i].Link = linkOf(peers[i], now)
	}
	return peers
}

// Words for the way to a peer.
const (
	linkDirect = "DIRECT"
	linkRelay  = "RELAY"
	linkNone   = "NONE" // nothing comes from it
)

func linkOf(p ztnode.Peer, now time.Time) string {
	if dead(p, now) {
		return linkNone
	}
	if _, ok := bestPath(p); ok && !p.Relayed {
		return linkDirect
	}
	return linkRelay
}

// bestPath returns the path in use.
func bestPath(p ztnode.Peer) (ztnode.Path, bool) {
	for _, path := range p.Paths {
		if path.Preferred && !path.Expired {
			return path, true
		}
	}
	return ztnode.Path{}, false
}

// pathLabels are the values of the metric label "path".
var pathLabels = [...]string{"direct_ipv4", "direct_ipv6", "relay", "none"}

func pathLabel(p ztnode.Peer, now time.Time) string {
	switch linkOf(p, now) {
	case linkRelay:
		return pathLabels[2]
	case linkNone:
		return pathLabels[3]
	}
	if path, _ := bestPath(p); path.Endpoint.Addr().Unmap().Is4() {
		return pathLabels[0]
	}
	return pathLabels[1]
}

func (s *service) status() control.Status {
	peers := s.peers()
	st := control.Status{Schema: control.Schema, Info: s.info(), Health: s.health(), Networks: s.networkViews(),
		Targets: s.targetStates(peers), Names: s.names.list(), Writes: s.writes, MemoryLimit: s.memory}
	if now := s.state.Load(); now != nil {
		st.Problems = now.problems[0]
	}
	for _, p := range peers {
		st.Peers.Total++
		switch p.Link {
		case linkDirect:
			st.Peers.Direct++
		case linkRelay:
			st.Peers.Relay++
		default:
			st.Peers.None++
		}
	}
	if s.limited != nil {
		st.Limited = s.limited()
	}
	if s.dns != nil {
		st.DNS = s.dns.view()
	}
	if s.relays != nil {
		st.Relayed = relayedClients(s.relays())
	}
	if s.exits != nil {
		st.Exits = s.exits()
	}
	if s.plane != nil {
		st.Ingress, st.SeenAs = s.ingress, s.seenAs()
		st.Flows, st.Limit = s.plane.Load()
		st.Drops = s.plane.drops(dropsInStatus)
	}
	return st
}

// seenAs lists what overlay hosts are masqueraded as in the VPC now.
func (s *service) seenAs() (out []string) {
	for _, m := range s.planned().Masquerade {
		as := "host"
		if m.Address.IsValid() {
			as = m.Address.String()
		} else if !m.Host {
			continue
		}
		if !slices.Contains(out, as) {
			out = append(out, as)
		}
	}
	return out
}

// dropsInStatus is how many refusals one screen shows.
const dropsInStatus = 5

func (s *service) drops() (control.Drops, error) {
	if s.plane == nil {
		return control.Drops{}, fault.Usagef("this process is a %s and forwards nothing: ask a gateway", s.mode)
	}
	return control.Drops{Schema: control.Schema, Drops: s.plane.drops(-1)}, nil
}

func (s *service) flows(f control.FlowFilter) (control.Flows, error) {
	if s.plane == nil {
		return control.Flows{}, fault.Usagef("this process is a %s and has no flows: ask a gateway", s.mode)
	}
	if states := netstack.FlowStates(); f.State != "" && !slices.Contains(states, f.State) {
		if near := config.Nearest(f.State, states); near != "" {
			return control.Flows{}, fault.Usagef("--state %q: did you mean %s?", f.State, near)
		}
		return control.Flows{}, fault.Usagef("--state %q: use one of %s", f.State, strings.Join(states, ", "))
	}
	if f.Network != 0 && len(s.only(f.Network)) == 0 {
		return control.Flows{}, s.notJoined(f.Network)
	}
	top := f.Top
	f.Top = 0
	list := append(s.plane.Flows(f), s.relayedFlows(f)...)
	out := control.Flows{Schema: control.Schema, Total: len(list), Limit: s.config().NAT.MaxFlows}
	slices.SortStableFunc(list, func(a, b control.Flow) int {
		return cmp.Compare(b.BytesIn+b.BytesOut, a.BytesIn+a.BytesOut)
	})
	limit := control.MaxFlows
	if top > 0 {
		limit = min(limit, top)
	}
	out.Flows = list[:min(limit, len(list))]
	return out, nil
}
