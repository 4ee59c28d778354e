package gateway

import (
	"cmp"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/netstack"
	"ztgate/router/config"
	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// service is what the control API and the HTTP server show of a running
// process, whatever its role.
type service struct {
	conf       atomic.Pointer[config.Config] // replaced by a reload
	state      atomic.Pointer[state]         // nil before the first plan is in force
	mode       string
	log        *slog.Logger
	start      time.Time
	node       Node
	plane      *plane // nil unless a gateway
	targets    *prober
	names      *names                     // nil = no names are looked up
	neighbours neighbours                 // who knows which MAC an address has; nil = nobody
	ways       hostWays                   // the host's kernel; nil = nothing of it matters
	resync     chan struct{}              // a value makes the networks be looked at again
	reload     func(*config.Config) error // puts a configuration into force; nil = this process can't
	reloading  sync.Mutex

	mu      sync.Mutex
	advice  []control.Check // on the host's settings; they don't decide readiness
	waiting string          // last logged
	ready   bool
	readyAt time.Time
}

func newService(cfg *config.Config, log *slog.Logger, node Node, start time.Time) *service {
	s := &service{resync: make(chan struct{}, 1), log: log, start: start, node: node}
	s.conf.Store(cfg)
	s.targets = newProber(cfg.Targets, hostDialer{}, log)
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
	peers := s.node.Peers()
	slices.SortFunc(peers, func(a, b ztnode.Peer) int { return strings.Compare(a.Address, b.Address) })
	for i := range peers {
		peers[i].Link = linkOf(peers[i])
	}
	return peers
}

func linkOf(p ztnode.Peer) string {
	if _, ok := bestPath(p); ok && !p.Relayed {
		return "DIRECT"
	}
	return "RELAY"
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

// pathLabel is the value of the metric label "path".
func pathLabel(p ztnode.Peer) string {
	path, ok := bestPath(p)
	switch {
	case ok && !p.Relayed && path.Endpoint.Addr().Unmap().Is4():
		return "direct_ipv4"
	case ok && !p.Relayed:
		return "direct_ipv6"
	case p.Relayed:
		return "relay"
	}
	return "none"
}

func (s *service) status() control.Status {
	st := control.Status{Schema: control.Schema, Info: s.info(), Health: s.health(), Networks: s.networkViews(),
		Targets: s.targets.states(), Limit: s.config().NAT.MaxFlows, Names: s.names.list()}
	if now := s.state.Load(); now != nil {
		st.Problems = now.problems[0]
	}
	for _, p := range s.node.Peers() {
		st.Peers.Total++
		switch pathLabel(p) {
		case "direct_ipv4", "direct_ipv6":
			st.Peers.Direct++
		case "relay":
			st.Peers.Relay++
		default:
			st.Peers.None++
		}
	}
	if s.plane != nil {
		st.Flows = len(s.plane.Flows(control.FlowFilter{}))
		st.Drops = s.plane.drops(dropsInStatus)
	} else {
		st.Limit = 0
	}
	return st
}

// dropsInStatus is how many refusals one screen shows.
const dropsInStatus = 5

func (s *service) drops() (control.Drops, error) {
	if s.plane == nil {
		return control.Drops{}, fault.Usagef("this process is a %s and forwards nothing: ask a gateway", s.mode)
	}
	return control.Drops{Schema: control.Schema, Drops: s.plane.drops(-1)}, nil
}

// maxFlowsShown bounds an answer; the table itself may be far larger.
const maxFlowsShown = 10000

func (s *service) flows(f control.FlowFilter) (control.Flows, error) {
	if s.plane == nil {
		return control.Flows{}, fault.Usagef("this process is a %s and has no flows: ask a gateway", s.mode)
	}
	top := f.Top
	f.Top = 0
	list := s.plane.Flows(f)
	out := control.Flows{Schema: control.Schema, Total: len(list), Limit: s.config().NAT.MaxFlows}
	slices.SortStableFunc(list, func(a, b control.Flow) int {
		return cmp.Compare(b.BytesIn+b.BytesOut, a.BytesIn+a.BytesOut)
	})
	limit := maxFlowsShown
	if top > 0 {
		limit = min(limit, top)
	}
	out.Flows = list[:min(limit, len(list))]
	return out, nil
}
