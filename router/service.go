package router

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// service is what the control API and the HTTP server show of a running
// process, whatever its mode.
type service struct {
	conf       atomic.Pointer[Config] // replaced by a reload
	mode       string
	log        *slog.Logger
	start      time.Time
	node       Node
	plane      Plane // nil unless a gateway
	targets    *prober
	neighbours neighbours          // nil = the plane's, if it knows them
	resync     chan struct{}       // a value makes the networks be looked at again
	reload     func(*Config) error // applies a configuration; nil = this process can't
	reloading  sync.Mutex

	mu       sync.Mutex
	devices  map[NetworkID]string
	problems map[NetworkID][]string
	advice   []Check // on the host's settings; they don't decide readiness
	waiting  string  // last logged
	ready    bool
	readyAt  time.Time
}

func newService(cfg *Config, mode string, log *slog.Logger, node Node, plane Plane, start time.Time) *service {
	s := &service{resync: make(chan struct{}, 1), mode: mode, log: log, start: start, node: node, plane: plane,
		devices: map[NetworkID]string{}, problems: map[NetworkID][]string{}}
	s.conf.Store(cfg)
	var d dialer = hostDialer{}
	if plane != nil {
		d = plane
	}
	s.targets = newProber(cfg.Targets, d, log)
	return s
}

func (s *service) config() *Config { return s.conf.Load() }

// advise logs and remembers what is wrong with the host's settings.
func (s *service) advise(checks []Check) {
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

// setNetwork remembers what the kernel set-up of a network led to.
func (s *service) setNetwork(id NetworkID, device string, problems []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devices[id], s.problems[id] = device, problems
}

func (s *service) forgetNetworks(keep []Network) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.devices {
		if !slices.ContainsFunc(keep, func(n Network) bool { return n.ID == id }) {
			delete(s.devices, id)
			delete(s.problems, id)
		}
	}
}

func (s *service) networks() []Network {
	nets := s.node.Networks()
	slices.SortFunc(nets, func(a, b Network) int { return cmp.Compare(a.ID, b.ID) })
	return nets
}

func (s *service) networkViews() []NetworkView {
	nets := s.networks()
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]NetworkView, len(nets))
	for i, n := range nets {
		out[i] = NetworkView{n, s.devices[n.ID], s.problems[n.ID]}
	}
	return out
}

func (s *service) info() Info {
	b := BuildInfo()
	b.Node = s.config().Node
	return Info{Schema: Schema, NodeInfo: s.node.Info(), Mode: s.mode, Home: s.config().Home, Started: s.start, Build: b}
}

func (s *service) peers() []Peer {
	peers := s.node.Peers()
	slices.SortFunc(peers, func(a, b Peer) int { return strings.Compare(a.Address, b.Address) })
	for i := range peers {
		peers[i].Link = linkOf(peers[i])
	}
	return peers
}

func linkOf(p Peer) string {
	if _, ok := bestPath(p); ok && !p.Relayed {
		return "DIRECT"
	}
	return "RELAY"
}

// bestPath returns the path in use.
func bestPath(p Peer) (Path, bool) {
	for _, path := range p.Paths {
		if path.Preferred && !path.Expired {
			return path, true
		}
	}
	return Path{}, false
}

// pathLabel is the value of the metric label "path".
func pathLabel(p Peer) string {
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

// health finds out what is missing for readiness.
func (s *service) health() Health {
	info := s.node.Info()
	// A root is itself where others get online.
	h := Health{Schema: Schema, Online: info.Online || info.Root, Reasons: []string{}}
	add := func(name string, ok bool, reason string) {
		if ok {
			reason = ""
		} else {
			h.Reasons = append(h.Reasons, reason)
		}
		h.Checks = append(h.Checks, Check{name, ok, reason})
	}
	add("online", h.Online,
		"node "+info.Address+" is OFFLINE: no root answers yet; it needs UDP to the internet or to the roots of its planet")
	if s.mode != ModeNode {
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
		case StatusOK:
			if len(n.Addresses) == 0 {
				reasons = append(reasons, fmt.Sprintf("network %s gave no address: assign one to member %s at its controller", n.ID, address))
			}
		case StatusRequesting:
			reasons = append(reasons, fmt.Sprintf("network %s: waiting for its controller %010x to answer", n.ID, uint64(n.ID)>>24))
		case StatusDenied:
			reasons = append(reasons, fmt.Sprintf("network %s: ACCESS_DENIED: authorise member %s at its controller", n.ID, address))
		case StatusNotFound:
			reasons = append(reasons, fmt.Sprintf("network %s: NOT_FOUND: its controller does not know it; check the ID", n.ID))
		case StatusAuth:
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

func (s *service) status() Status {
	st := Status{Schema: Schema, Info: s.info(), Health: s.health(), Networks: s.networkViews(),
		Targets: s.targets.states(), Limit: s.config().NAT.MaxFlows}
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
		st.Flows = len(s.plane.Flows(FlowFilter{}))
	} else {
		st.Limit = 0
	}
	return st
}

// maxFlowsShown bounds an answer; the table itself may be far larger.
const maxFlowsShown = 10000

func (s *service) flows(f FlowFilter) (Flows, error) {
	if s.plane == nil {
		return Flows{}, usagef("this process is a %s and has no flows: ask a gateway", s.mode)
	}
	top := f.Top
	f.Top = 0
	list := s.plane.Flows(f)
	out := Flows{Schema: Schema, Total: len(list), Limit: s.config().NAT.MaxFlows}
	slices.SortStableFunc(list, func(a, b Flow) int {
		return cmp.Compare(b.BytesIn+b.BytesOut, a.BytesIn+a.BytesOut)
	})
	limit := maxFlowsShown
	if top > 0 {
		limit = min(limit, top)
	}
	out.Flows = list[:min(limit, len(list))]
	return out, nil
}

// dialer reaches overlay addresses.
type dialer interface {
	Ping(ctx context.Context, dst netip.Addr) (time.Duration, error)
	DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error)
}

// pingTimeout bounds one ping; maxPingTimeout what a caller may ask for, less
// than what the server gives a request.
const (
	pingTimeout    = 5 * time.Second
	maxPingTimeout = 25 * time.Second
)

func (s *service) ping(ctx context.Context, req PingRequest) (Ping, error) {
	if s.mode == ModeNode {
		return Ping{}, usagef("this process is in no network: ask a gateway or a member")
	}
	if req.Port < 0 || req.Port > 65535 {
		return Ping{}, usagef("port %d: give a number from 1 to 65535", req.Port)
	}
	timeout := pingTimeout
	if req.TimeoutMS > 0 {
		timeout = min(time.Duration(req.TimeoutMS)*time.Millisecond, maxPingTimeout)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	addr, err := lookup(ctx, req.Host)
	if err != nil {
		return Ping{}, err
	}
	p := Ping{Schema: Schema, Address: addr, Port: req.Port}
	network, hop, ok := s.networkOf(addr)
	if !ok {
		return Ping{}, fmt.Errorf("ping %s: no joined network has a route to it: see ztgate networks", addr)
	}
	p.Network = network.String()
	began := time.Now()
	if req.Port == 0 {
		d, err := s.targets.dialer.Ping(ctx, addr)
		if err != nil {
			return Ping{}, fmt.Errorf("ping %s: %w", addr, err)
		}
		p.MS = milliseconds(d)
	} else {
		c, err := s.targets.dialer.DialTCP(ctx, netip.AddrPortFrom(addr, uint16(req.Port)))
		if err != nil {
			return Ping{}, fmt.Errorf("connect to %s: %w", netip.AddrPortFrom(addr, uint16(req.Port)), err)
		}
		p.MS = milliseconds(time.Since(began))
		_ = c.Close()
	}
	s.addPath(&p, network, hop)
	return p, nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func lookup(ctx context.Context, host string) (netip.Addr, error) {
	if a, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return a.Unmap(), nil
	}
	list, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil || len(list) == 0 {
		return netip.Addr{}, fmt.Errorf("look up %q: %w", host, err)
	}
	return list[0].Unmap(), nil
}

// networkOf returns the network with the most specific route to an address, and
// the next hop on it.
func (s *service) networkOf(a netip.Addr) (id NetworkID, hop netip.Addr, ok bool) {
	bits := -1
	for _, n := range s.networks() {
		for _, r := range wantedRoutes(n, s.config().Network(n.ID)) {
			if !r.Target.Contains(a) || r.Target.Bits() <= bits {
				continue
			}
			id, hop, bits = n.ID, a, r.Target.Bits()
			if r.Via.IsValid() {
				hop = r.Via
			}
		}
	}
	return id, hop, bits >= 0
}

// neighbours is implemented by what can say which MAC an address has.
type neighbours interface {
	Neighbour(id NetworkID, a netip.Addr) (MAC, bool)
}

// addPath says which peer the frames to a next hop go to, and how.
func (s *service) addPath(p *Ping, id NetworkID, hop netip.Addr) {
	who := s.neighbours
	if who == nil {
		who, _ = s.plane.(neighbours)
	}
	if who == nil {
		return
	}
	mac, ok := who.Neighbour(id, hop)
	if !ok {
		return
	}
	p.Peer = addressOfMAC(mac, id)
	for _, peer := range s.peers() {
		if peer.Address == p.Peer {
			p.Path = peer.Link
		}
	}
}

// addressOfMAC inverts the derivation of a MAC from a node's address (chapter
// 03 §2): the lower 40 bits are the address, mixed with the network ID.
func addressOfMAC(m MAC, id NetworkID) string {
	var a uint64
	for i := 1; i < len(m); i++ {
		a = a<<8 | uint64(m[i])
	}
	n := uint64(id)
	a ^= (n >> 8 & 0xff) << 32
	a ^= (n >> 16 & 0xff) << 24
	a ^= (n >> 24 & 0xff) << 16
	a ^= (n >> 32 & 0xff) << 8
	a ^= n >> 40 & 0xff
	return fmt.Sprintf("%010x", a)
}
