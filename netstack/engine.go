package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.zx2c4.com/wireguard/tun"

	"ztgate/netstack/internal/frag"
	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
	"ztgate/netstack/policy"
)

const (
	ethernetLen = 14
	// vpcOffset is where IP packets lie in read buffers: Ethernet header and the
	// overlay's headers are put in front in place.
	vpcOffset = 96
	readSize  = 16 << 10 // largest packet read
	maxBatch  = 128

	sweepEvery = 500 * time.Millisecond
	// refusalsEvery is how often the log says that flows are refused.
	refusalsEvery = int64(10 * time.Second)
)

// Engine is the forwarding plane. Its methods are safe for concurrent use.
type Engine struct {
	cfg    Config
	log    *slog.Logger
	dev    Device
	table  *nat.Table
	frags  *frag.Store
	local  *localStack
	stats  counters
	vpcMTU int
	start  time.Time
	set    atomic.Pointer[netSet]
	pol    atomic.Pointer[policy.Policy]
	errors limiter
	ids    idTable
	logged atomic.Int64 // when refused flows were last logged, ns

	idleMu sync.Mutex
	idle   []*worker

	mu         sync.Mutex // guards changes of set
	generation uint32
	slots      map[uint64]uint16 // numbers of networks, for as long as the engine lives
	forwards   []Forward
	maps       []AddressMap
}

// netSet is everything a packet's way is judged by. It is immutable.
type netSet struct {
	generation uint32
	ports      map[uint64]*port
	slots      []*port                 // by number; nil = not joined
	routes     []overlayRoute          // longest prefix first
	own        map[netip.Addr]struct{} // addresses of the gateway on any side
	broadcasts map[netip.Addr]struct{} // of attached subnets
	forwards   map[forwardKey]*Forward
	backwards  map[forwardKey]*Forward // by target, those without masquerading
	maps       []AddressMap
	vpc4, vpc6 netip.Addr // of the gateway on the VPC side
	conflicts  int        // overlay routes that would lead VPC traffic astray
}

type forwardKey struct {
	addr  netip.Addr
	port  uint16
	proto uint8
}

type overlayRoute struct {
	target netip.Prefix
	via    netip.Addr
	port   *port // nil = the VPC side
}

// port is the attachment to one network.
type port struct {
	Network
	mac    uint64 // MAC as a number
	slot   uint16
	neigh  *neigh.Table
	v4, v6 netip.Addr // ours on the network
	fwd    *forwarded // kept when the network's configuration changes
}

// address returns our address of a family on the network.
func (p *port) address(v6 bool) netip.Addr {
	if v6 {
		return p.v6
	}
	return p.v4
}

// New makes an engine; nothing runs before Run.
func New(cfg Config) (*Engine, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.NAT.MaxFlows == 0 {
		cfg.NAT.MaxFlows = cfg.MaxFlows
	}
	if cfg.NAT.Timeouts == (Timeouts{}) {
		cfg.NAT.Timeouts = cfg.Timeouts
	}
	e := &Engine{cfg: cfg, log: cfg.Logger, dev: cfg.Device, start: cfg.Now(), table: nat.New(cfg.NAT),
		slots: make(map[uint64]uint16), forwards: slices.Clone(cfg.Forwards), maps: slices.Clone(cfg.Maps)}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.vpcMTU = cfg.VPC.MTU; e.vpcMTU == 0 {
		mtu, err := cfg.Device.MTU()
		if err != nil {
			return nil, fmt.Errorf("netstack: MTU of the VPC device: %w", err)
		}
		e.vpcMTU = mtu
	}
	if err := checkMTU("the VPC device", e.vpcMTU, cfg.VPC.Addresses); err != nil {
		return nil, err
	}
	if n := e.table.Import(e.clock(), cfg.Mappings); len(cfg.Mappings) > 0 {
		e.log.Info("kept ports for earlier mappings", "mappings", n, "left_out", len(cfg.Mappings)-n)
	}
	e.cfg.Mappings = nil
	pol := cfg.Policy
	if pol == nil {
		pol = policy.New(policy.Accept, nil)
	}
	e.pol.Store(pol)
	e.errors.init()
	e.frags = frag.New(func(side uint8, n int) { e.dropN(legOf(Side(side)), dropFragment, n) })
	local, err := newLocalStack(e.sendLocal)
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	e.local = local
	if err := e.SetNetworks(nil); err != nil {
		return nil, err
	}
	if cfg.Registerer != nil {
		if err := cfg.Registerer.Register(&collector{e}); err != nil {
			return nil, fmt.Errorf("netstack: %w", err)
		}
	}
	return e, nil
}

// Run moves packets until ctx ends, which is not an error. When it returns all
// goroutines have ended and the device is closed.
func (e *Engine) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return e.readDevice(ctx) })
	g.Go(func() error { e.timers(ctx); return nil })
	g.Go(func() error { e.local.run(ctx); return nil })
	g.Go(func() error {
		<-ctx.Done() // the reader sits in a system call: only Close wakes it
		return e.dev.Close()
	})
	return g.Wait()
}

// clock returns nanoseconds that only grow and are never 0.
func (e *Engine) clock() int64 { return int64(e.cfg.Now().Sub(e.start)) + 1 }

func (e *Engine) timers(ctx context.Context) {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			e.tick(e.clock())
		}
	}
}

func (e *Engine) tick(now int64) {
	e.table.Sweep(now)
	e.frags.Expire(now)
	for _, p := range e.set.Load().ports {
		for _, packet := range p.neigh.Tick(now) {
			e.unresolved(now, packet)
		}
	}
}

// SetPolicy replaces the policy. Flows that it doesn't allow end with their next
// packet.
func (e *Engine) SetPolicy(p *policy.Policy) {
	e.pol.Store(p)
	e.mu.Lock()
	defer e.mu.Unlock()
	next := *e.set.Load()
	e.generation++
	next.generation = e.generation
	e.set.Store(&next)
}

// SetTranslation replaces forwards and address maps. Flows that go on as they are
// stay.
func (e *Engine) SetTranslation(forwards []Forward, maps []AddressMap) error {
	if err := checkTranslation(forwards, maps); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forwards, e.maps = slices.Clone(forwards), slices.Clone(maps)
	var nets []Network
	for _, p := range e.set.Load().ports {
		nets = append(nets, p.Network)
	}
	return e.setNetworks(nets)
}

// SetNetworks replaces the networks. Flows whose network, route or own address
// is gone end with their next packet; neighbours and counters are kept.
func (e *Engine) SetNetworks(nets []Network) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.setNetworks(nets)
}

func (e *Engine) setNetworks(nets []Network) error {
	old := e.set.Load()
	e.generation++
	s := &netSet{generation: e.generation, ports: make(map[uint64]*port), own: make(map[netip.Addr]struct{}),
		broadcasts: make(map[netip.Addr]struct{}), maps: e.maps}
	var local []netip.Prefix
	own := func(a netip.Prefix) {
		s.own[a.Addr()] = struct{}{}
		local = append(local, a)
		s.addBroadcast(a)
	}
	for _, a := range e.cfg.VPC.Addresses {
		own(a)
		if a.Addr().Is4() && !s.vpc4.IsValid() {
			s.vpc4 = a.Addr()
		} else if a.Addr().Is6() && !s.vpc6.IsValid() {
			s.vpc6 = a.Addr()
		}
	}
	for _, p := range e.cfg.VPC.Sources {
		s.addBroadcast(p)
		if p.Bits() > 0 {
			s.routes = append(s.routes, overlayRoute{target: p.Masked()})
		}
	}
	for _, n := range nets {
		p, err := e.newPort(old, n)
		if err != nil {
			return err
		}
		s.ports[n.ID] = p
		s.conflicts += n.Conflicts
		for _, a := range n.Addresses {
			own(a)
			e.addRoute(s, overlayRoute{target: a.Masked(), port: p})
		}
		for _, r := range n.Routes {
			if _, mine := s.own[r.Via]; !mine {
				e.addRoute(s, overlayRoute{r.Target.Masked(), r.Via, p})
			}
		}
	}
	// Stable: where prefixes are equal, the VPC's come first.
	slices.SortStableFunc(s.routes, func(a, b overlayRoute) int { return b.target.Bits() - a.target.Bits() })
	s.slots = make([]*port, len(e.slots))
	for _, p := range s.ports {
		s.slots[p.slot] = p
		p.neigh.SetProxy(s.aliases(p.ID))
	}
	e.setForwards(s)
	if err := e.local.setAddresses(local); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	e.set.Store(s)
	for _, p := range s.ports {
		for _, a := range p.Addresses {
			if _, had := old.ownOn(p.ID)[a.Addr()]; !had {
				p.neigh.Announce(a.Addr())
			}
		}
	}
	return nil
}

// ownOn returns our addresses on a network.
func (s *netSet) ownOn(network uint64) map[netip.Addr]struct{} {
	if s == nil || s.ports[network] == nil {
		return nil
	}
	out := make(map[netip.Addr]struct{})
	for _, a := range s.ports[network].Addresses {
		out[a.Addr()] = struct{}{}
	}
	return out
}

// addRoute adds a route of a network, unless it is one to a part of the VPC: its
// traffic keeps its own way (RFC 4787 REQ-7). An address map is the remedy.
func (e *Engine) addRoute(s *netSet, r overlayRoute) {
	for _, p := range e.cfg.VPC.Sources {
		if p.Bits() > 0 && r.target.Bits() >= p.Bits() && p.Overlaps(r.target) {
			s.conflicts++
			e.log.Warn("overlay route overlaps the VPC and is not used", "network", networkLabel(r.port.ID), "route", r.target, "vpc", p)
			return
		}
		if r.target.Bits() > 0 && p.Bits() > 0 && p.Overlaps(r.target) {
			s.conflicts++
			e.log.Warn("overlay route surrounds the VPC, whose own traffic doesn't use it", "network", networkLabel(r.port.ID), "route", r.target, "vpc", p)
		}
	}
	s.routes = append(s.routes, r)
}

func (s *netSet) addBroadcast(p netip.Prefix) {
	if !p.Addr().Is4() || p.Bits() >= 31 || p.Bits() == 0 {
		return
	}
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	s.broadcasts[netip.AddrFrom4(b)] = struct{}{}
}

// setForwards fills the tables of forwards and keeps their ports free of others.
func (e *Engine) setForwards(s *netSet) {
	s.forwards, s.backwards = make(map[forwardKey]*Forward), make(map[forwardKey]*Forward)
	reserved := map[uint8][]netip.AddrPort{}
	for i := range e.forwards {
		f := &e.forwards[i]
		s.forwards[forwardKey{f.Listen.Addr(), f.Listen.Port(), f.Proto}] = f
		if !f.Masquerade {
			s.backwards[forwardKey{f.To.Addr(), f.To.Port(), f.Proto}] = f
		}
		for a := range s.own {
			if l := f.Listen.Addr(); l == a || l.IsUnspecified() && l.Is4() == a.Is4() {
				reserved[f.Proto] = append(reserved[f.Proto], netip.AddrPortFrom(a, f.Listen.Port()))
			}
		}
	}
	for _, proto := range []uint8{ipkt.TCP, ipkt.UDP} {
		e.table.Reserve(proto, reserved[proto])
	}
}

// forward returns the forward that listens on an address of ours.
func (s *netSet) forward(proto uint8, a netip.Addr, port uint16) *Forward {
	if len(s.forwards) == 0 {
		return nil
	}
	if f := s.forwards[forwardKey{a, port, proto}]; f != nil {
		return f
	}
	any := netip.IPv4Unspecified()
	if a.Is6() {
		any = netip.IPv6Unspecified()
	}
	return s.forwards[forwardKey{any, port, proto}]
}

// minMTU6 is what every link must carry where IPv6 is used (RFC 8200 §5).
const minMTU6 = 1280

func checkMTU(what string, mtu int, addresses []netip.Prefix) error {
	least := 68 // RFC 791 §3.2
	for _, a := range addresses {
		if a.Addr().Is6() {
			least = minMTU6
		}
	}
	if mtu < least {
		return fmt.Errorf("netstack: MTU %d of %s: want at least %d", mtu, what, least)
	}
	return nil
}

func (e *Engine) newPort(old *netSet, n Network) (*port, error) {
	if err := checkMTU("network "+networkLabel(n.ID), n.MTU, n.Addresses); err != nil {
		return nil, err
	}
	slot, ok := e.slots[n.ID]
	if !ok {
		const maxSlots = 1 << 12
		if len(e.slots) == maxSlots {
			return nil, fmt.Errorf("netstack: more than %d networks", maxSlots)
		}
		slot = uint16(len(e.slots))
		e.slots[n.ID] = slot
	}
	p := &port{Network: n, mac: macNumber(n.MAC), slot: slot}
	var own []netip.Addr
	for _, a := range n.Addresses {
		own = append(own, a.Addr())
		if a.Addr().Is4() && !p.v4.IsValid() {
			p.v4 = a.Addr()
		} else if a.Addr().Is6() && !p.v6.IsValid() {
			p.v6 = a.Addr()
		}
	}
	if old != nil && old.ports[n.ID] != nil && old.ports[n.ID].MAC == n.MAC {
		p.neigh, p.fwd = old.ports[n.ID].neigh, old.ports[n.ID].fwd
		p.neigh.SetOwn(own)
		return p, nil
	}
	p.fwd = &forwarded{}
	p.neigh = neigh.New(n.MAC, own, func(frame []byte) { e.writeFrame(n.ID, frame) })
	return p, nil
}

// MulticastGroups lists the groups in which others look for our IPv6 addresses.
func (e *Engine) MulticastGroups(nwid uint64) (out []Group) {
	p := e.set.Load().ports[nwid]
	if p == nil {
		return nil
	}
	for _, a := range p.Addresses {
		if a.Addr().Is6() {
			b := a.Addr().As16()
			out = append(out, Group{MAC: [6]byte{0x33, 0x33, 0xff, b[13], b[14], b[15]}})
		}
	}
	return out
}

// Neighbour returns the MAC of an address on a network if it is known.
func (e *Engine) Neighbour(nwid uint64, a netip.Addr) ([6]byte, bool) {
	p := e.set.Load().ports[nwid]
	if p == nil {
		return [6]byte{}, false
	}
	return p.neigh.Lookup(e.clock(), a)
}

// route finds the network and next hop of an address; nil if it isn't on the
// overlay.
func (s *netSet) route(a netip.Addr) (p *port, hop netip.Addr) {
	if r := s.lookup(a); r != nil && r.port != nil {
		if r.via.IsValid() {
			return r.port, r.via
		}
		return r.port, a
	}
	return nil, netip.Addr{}
}

func (s *netSet) lookup(a netip.Addr) *overlayRoute {
	for i := range s.routes {
		if s.routes[i].target.Contains(a) {
			return &s.routes[i]
		}
	}
	return nil
}

// readDevice is the way of packets from the VPC side.
func (e *Engine) readDevice(ctx context.Context) error {
	n := min(e.dev.BatchSize(), maxBatch)
	store := make([]byte, n*(vpcOffset+readSize))
	bufs, sizes := make([][]byte, n), make([]int, n)
	for i := range bufs {
		bufs[i] = store[i*(vpcOffset+readSize):][: vpcOffset+readSize : vpcOffset+readSize]
	}
	for {
		got, err := e.dev.Read(bufs, sizes, vpcOffset)
		e.vpcBatch(bufs[:got], sizes[:got])
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
		case lostOne(err):
			e.drop(legVPC, dropDevice)
		default:
			return fmt.Errorf("read VPC device: %w", err)
		}
	}
}

// lostOne reports errors of the device that are about one packet.
func lostOne(err error) bool {
	var t interface{ Temporary() bool }
	return errors.Is(err, tun.ErrTooManySegments) || errors.As(err, &t) && t.Temporary()
}

// logRefusals says from time to time that flows are refused; the counters say how
// many (RFC 6888 REQ-11 C).
func (e *Engine) logRefusals(now int64, d drop) {
	if at := e.logged.Load(); (at == 0 || now-at >= refusalsEvery) && e.logged.CompareAndSwap(at, now) {
		e.log.Warn("new flows are refused", "reason", d.String(), "flows", e.table.Len(), "limit", e.table.Limit())
	}
}
