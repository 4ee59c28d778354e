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

	"ztgate/netstack/internal/ipkt"
	"ztgate/netstack/internal/nat"
	"ztgate/netstack/internal/neigh"
	"ztgate/netstack/policy"
)

const (
	ethernetLen = 14
	// vpcOffset is where IP packets lie in read buffers: Ethernet header and the
	// overlay's headers are put in front in place.
	vpcOffset  = 96
	readSize   = 16 << 10 // largest packet read
	writeStart = 16       // room for the virtio header
	writeSize  = 64 << 10 // so that segments can be merged into the first one
	maxBatch   = 128

	hopLifetime = int64(5 * time.Second)
	sweepEvery  = 500 * time.Millisecond
)

// Engine is the forwarding plane. Its methods are safe for concurrent use.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	dev     Device
	table   *nat.Table
	local   *localStack
	stats   counters
	vpcMTU  int
	start   time.Time
	set     atomic.Pointer[netSet]
	pol     atomic.Pointer[policy.Policy]
	writers sync.Pool // of *writer
	errors  limiter

	mu         sync.Mutex // guards changes of set
	generation uint64
}

// netSet is everything a packet's way is judged by. It is immutable.
type netSet struct {
	generation uint64
	ports      map[uint64]*port
	routes     []overlayRoute          // longest prefix first
	own        map[netip.Addr]struct{} // addresses of the gateway on any side
	vpc4, vpc6 netip.Addr              // of the gateway on the VPC side
}

type overlayRoute struct {
	target netip.Prefix
	via    netip.Addr
	port   *port
}

// port is the attachment to one network.
type port struct {
	Network
	neigh  *neigh.Table
	v4, v6 netip.Addr // ours on the network
	fwd    *forwarded // kept when the network's configuration changes
}

// New makes an engine; nothing runs before Run.
func New(cfg Config) (*Engine, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	e := &Engine{cfg: cfg, log: cfg.Logger, dev: cfg.Device, start: cfg.Now(),
		table: nat.New(nat.Config{MaxFlows: cfg.MaxFlows, Timeouts: cfg.Timeouts})}
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
	pol := cfg.Policy
	if pol == nil {
		pol = policy.New(policy.Accept, nil)
	}
	e.pol.Store(pol)
	e.writers.New = func() any { return &writer{} }
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
	for _, p := range e.set.Load().ports {
		for _, packet := range p.neigh.Tick(now) {
			e.unresolved(p, packet)
		}
	}
}

// unresolved tells the sender of a packet that its next hop doesn't answer.
func (e *Engine) unresolved(p *port, packet []byte) {
	e.drop(legOverlay, dropUnresolved)
	var v ipkt.View
	if ipkt.Parse(packet, &v) != ipkt.OK {
		return
	}
	// The packet is translated already: turn the translation back for the sender.
	if f, _ := e.table.Lookup(e.clock(), nat.Overlay, turned(&v)); f != nil && f.FromVPC && f.Masquerade {
		f.Restore(&v)
	}
	e.sendError(legVPC, ipkt.HostUnreachable, &v, 0)
}

// turned returns the view of the reply to v.
func turned(v *ipkt.View) *ipkt.View {
	r := *v
	r.Src, r.Dst, r.SPort, r.DPort = v.Dst, v.Src, v.DPort, v.SPort
	switch r.ICMPType {
	case 8:
		r.ICMPType = 0
	case 128:
		r.ICMPType = 129
	}
	return &r
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

// SetNetworks replaces the networks. Flows whose network, route or own address
// is gone end with their next packet; neighbours and counters are kept.
func (e *Engine) SetNetworks(nets []Network) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.set.Load()
	e.generation++
	s := &netSet{generation: e.generation, ports: make(map[uint64]*port), own: make(map[netip.Addr]struct{})}
	var local []netip.Prefix
	for _, a := range e.cfg.VPC.Addresses {
		s.own[a.Addr()] = struct{}{}
		local = append(local, a)
		if a.Addr().Is4() && !s.vpc4.IsValid() {
			s.vpc4 = a.Addr()
		} else if a.Addr().Is6() && !s.vpc6.IsValid() {
			s.vpc6 = a.Addr()
		}
	}
	for _, n := range nets {
		p := e.newPort(old, n)
		s.ports[n.ID] = p
		for _, a := range n.Addresses {
			s.own[a.Addr()] = struct{}{}
			local = append(local, a)
			s.routes = append(s.routes, overlayRoute{target: a.Masked(), port: p})
		}
		for _, r := range n.Routes {
			if _, mine := s.own[r.Via]; !mine {
				s.routes = append(s.routes, overlayRoute{r.Target.Masked(), r.Via, p})
			}
		}
	}
	slices.SortStableFunc(s.routes, func(a, b overlayRoute) int { return b.target.Bits() - a.target.Bits() })
	if err := e.local.setAddresses(local); err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	e.set.Store(s)
	return nil
}

func (e *Engine) newPort(old *netSet, n Network) *port {
	p := &port{Network: n}
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
		return p
	}
	p.fwd = &forwarded{}
	p.neigh = neigh.New(n.MAC, own, func(frame []byte) { e.writeFrame(n.ID, frame) })
	return p
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

// route finds the network and next hop of an address.
func (s *netSet) route(a netip.Addr) (p *port, hop netip.Addr) {
	for i := range s.routes {
		r := &s.routes[i]
		if r.target.Contains(a) {
			if r.via.IsValid() {
				return r.port, r.via
			}
			return r.port, a
		}
	}
	return nil, netip.Addr{}
}

// readDevice is the way of packets from the VPC side.
func (e *Engine) readDevice(ctx context.Context) error {
	n := min(e.dev.BatchSize(), maxBatch)
	store := make([]byte, n*(vpcOffset+readSize))
	bufs, sizes := make([][]byte, n), make([]int, n)
	for i := range bufs {
		bufs[i] = store[i*(vpcOffset+readSize):][: vpcOffset+readSize : vpcOffset+readSize]
	}
	out := &outBatch{e: e, bufs: make([][]byte, 0, n), sizes: make([]int, 0, n)}
	var v ipkt.View
	for {
		got, err := e.dev.Read(bufs, sizes, vpcOffset)
		e.vpcBatch(out, &v, bufs[:got], sizes[:got])
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !retryable(err) {
			return fmt.Errorf("read VPC device: %w", err)
		}
	}
}

// vpcBatch handles packets from the VPC side, which lie at vpcOffset.
func (e *Engine) vpcBatch(out *outBatch, v *ipkt.View, bufs [][]byte, sizes []int) {
	now := e.clock()
	e.stats.batches[legVPC].observe(len(bufs))
	for i := range bufs {
		e.fromVPC(now, out, v, bufs[i], sizes[i])
	}
	out.flush()
}

// retryable reports errors of the device after which reading goes on.
func retryable(err error) bool { return errors.Is(err, errTooManySegments) }

// outBatch collects frames for one network.
type outBatch struct {
	e     *Engine
	nwid  uint64
	bufs  [][]byte
	sizes []int
}

// add appends the packet at vpcOffset in buf with its Ethernet header.
func (b *outBatch) add(nwid uint64, buf []byte, size int, header *[ethernetLen]byte) {
	if nwid != b.nwid && len(b.bufs) > 0 {
		b.flush()
	}
	b.nwid = nwid
	copy(buf[vpcOffset-ethernetLen:], header[:])
	b.bufs = append(b.bufs, buf)
	b.sizes = append(b.sizes, ethernetLen+size)
}

func (b *outBatch) flush() {
	if len(b.bufs) == 0 {
		return
	}
	for _, n := range b.sizes {
		b.e.stats.count(legOverlay, tx, n-ethernetLen)
	}
	ok, err := b.e.cfg.Overlay.WriteFrames(b.nwid, b.bufs, b.sizes, vpcOffset-ethernetLen)
	if err != nil {
		ok = 0
	}
	for range len(b.bufs) - ok {
		b.e.drop(legOverlay, dropOverlay)
	}
	b.bufs, b.sizes = b.bufs[:0], b.sizes[:0]
}

// fromVPC handles one packet from the VPC side.
func (e *Engine) fromVPC(now int64, out *outBatch, v *ipkt.View, buf []byte, size int) {
	e.stats.count(legVPC, rx, size)
	if r := ipkt.Parse(buf[vpcOffset:vpcOffset+size], v); r != ipkt.OK {
		e.drop(legVPC, drop(r))
		return
	}
	set := e.set.Load()
	f, forward := e.table.Lookup(now, nat.VPC, v)
	if f != nil && f.Generation.Load() != set.generation && !e.stillAllowed(set, f) {
		e.table.Remove(f)
		f = nil
	}
	if f == nil {
		e.stats.misses.Add(1)
		if f, forward = e.openFromVPC(now, set, v); f == nil {
			return
		}
	} else {
		e.stats.hits.Add(1)
	}
	e.toOverlay(now, set, out, f, forward, v, buf)
}

// openFromVPC judges a packet that belongs to no flow. It returns the flow it
// opens, nil if the packet goes no further.
func (e *Engine) openFromVPC(now int64, set *netSet, v *ipkt.View) (*nat.Flow, bool) {
	src, dst := v.Source(), v.Destination()
	if v.IsICMPError() {
		e.errorFromVPC(now, set, v)
		return nil, false
	}
	if _, own := set.own[dst]; own {
		e.local.inject(v.B)
		e.stats.local.Add(1)
		return nil, false
	}
	if d := e.checkVPC(set, src, dst); d != 0 {
		e.drop(legVPC, d)
		return nil, false
	}
	if !v.First {
		e.drop(legVPC, dropFragment)
		return nil, false
	}
	p, hop := set.route(dst)
	if p == nil {
		e.refuse(legVPC, dropNoRoute, ipkt.NoRoute, v)
		return nil, false
	}
	if v.TTL <= 1 { // before the policy: traceroute shows this hop
		e.refuse(legVPC, dropTTL, ipkt.TimeExceeded, v)
		return nil, false
	}
	switch action, _ := e.pol.Load().Decide(v.Proto, src, dst, v.DPort); action {
	case policy.Drop:
		e.drop(legVPC, dropPolicy)
		return nil, false
	case policy.Reject:
		e.reject(v)
		return nil, false
	}
	n := nat.NewFlow{Network: p.ID, NextHop: hop, MTU: p.MTU, Generation: set.generation}
	if p.Masquerade && !v.V6 {
		if n.External = p.v4; !n.External.IsValid() {
			e.refuse(legVPC, dropNoAddress, ipkt.NoRoute, v)
			return nil, false
		}
	}
	f, err := e.table.Open(now, nat.VPC, v, n)
	if err != nil {
		e.refused(v, err)
		return nil, false
	}
	e.table.NoteFragment(now, nat.VPC, v, f, true)
	return f, true
}

// checkVPC applies the rules for addresses of packets from the VPC side.
func (e *Engine) checkVPC(set *netSet, src, dst netip.Addr) drop {
	if _, own := set.own[src]; own {
		return dropSpoofed
	}
	if !forwardable(dst) {
		return dropForbidden
	}
	if !forwardable(src) {
		return dropSource
	}
	if len(e.cfg.VPC.Sources) > 0 {
		if !slices.ContainsFunc(e.cfg.VPC.Sources, func(p netip.Prefix) bool { return p.Contains(src) }) {
			return dropSource
		}
	} else if p, _ := set.route(src); p != nil {
		return dropSpoofed
	}
	return 0
}

// forwardable reports addresses that a router may forward from or to: link-local
// ones, and with them cloud metadata services, are not among them.
func forwardable(a netip.Addr) bool {
	if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return false
	}
	if a.Is4() {
		b := a.As4()
		return b[0] != 0 && b[0] < 240
	}
	return a != awsMetadata6
}

var awsMetadata6 = netip.MustParseAddr("fd00:ec2::254")

// refused counts why a flow couldn't be opened and tells the sender (decision D3).
func (e *Engine) refused(v *ipkt.View, err error) {
	switch {
	case errors.Is(err, nat.ErrTableFull):
		e.refuse(legVPC, dropTableFull, ipkt.Prohibited, v)
	case errors.Is(err, nat.ErrNoPort):
		e.refuse(legVPC, dropNoPort, ipkt.Prohibited, v)
	case errors.Is(err, nat.ErrNotFirst):
		e.drop(legVPC, dropNotFirst)
	default:
		e.drop(legVPC, dropProtocol)
	}
}

func (e *Engine) refuse(l leg, d drop, kind ipkt.ErrorKind, v *ipkt.View) {
	e.drop(l, d)
	e.sendError(l, kind, v, 0)
}

// reject refuses a new flow as its sender understands it best.
func (e *Engine) reject(v *ipkt.View) {
	e.drop(legVPC, dropPolicy)
	if v.Proto == ipkt.TCP && v.Flags&ipkt.RST == 0 {
		if e.errors.allow(e.clock()) {
			e.writeVPC(ipkt.AppendReset(nil, v))
		}
		return
	}
	e.sendError(legVPC, ipkt.Prohibited, v, 0)
}

// stillAllowed judges a flow again after policy or routes changed.
func (e *Engine) stillAllowed(set *netSet, f *nat.Flow) bool {
	p, hop := set.route(ipkt.Addr(f.Server))
	if p == nil || p.ID != f.Network || hop != f.NextHop {
		return false
	}
	if f.Masquerade && (!p.Masquerade || ipkt.Addr(f.External) != p.v4) || !f.Masquerade && p.Masquerade && !f.V6 {
		return false
	}
	if a, _ := e.pol.Load().Decide(f.Proto, ipkt.Addr(f.Client), ipkt.Addr(f.Server), f.ServerPort); a != policy.Accept {
		return false
	}
	f.Generation.Store(set.generation)
	return true
}

// toOverlay sends a packet of a flow into its network.
func (e *Engine) toOverlay(now int64, set *netSet, out *outBatch, f *nat.Flow, forward bool, v *ipkt.View, buf []byte) {
	p := set.ports[f.Network]
	switch {
	case p == nil:
		e.drop(legVPC, dropNetwork)
		return
	case v.TTL <= 1:
		e.refuse(legVPC, dropTTL, ipkt.TimeExceeded, v)
		return
	case len(v.B) > p.MTU && v.DontFrag:
		e.drop(legVPC, dropTooBig)
		e.sendError(legVPC, ipkt.TooBig, v, p.MTU)
		return
	}
	if v.Proto == ipkt.TCP && v.Flags&ipkt.SYN != 0 {
		e.clamp(legVPC, p, v)
	}
	f.Apply(now, forward, v)
	v.DecrementTTL()
	p.fwd.count(vpcToOverlay, v)
	dir := &f.Reverse
	if forward {
		dir = &f.Forward
	}
	hop := dir.Hop.Load()
	if hop == nil || now >= hop.Until {
		if hop = e.resolve(now, p, f.NextHop, v); hop == nil {
			p.neigh.Resolve(now, f.NextHop, v.B)
			return
		}
		dir.Hop.Store(hop)
	}
	if len(v.B) > p.MTU {
		out.flush()
		ipkt.Fragment4(v, p.MTU, func(b []byte) { e.writeFrame(p.ID, append(hop.Ethernet[:], b...)) })
		return
	}
	out.add(p.ID, buf, len(v.B), &hop.Ethernet)
}

// resolve makes the Ethernet header towards a next hop, nil if its MAC isn't
// known.
func (e *Engine) resolve(now int64, p *port, a netip.Addr, v *ipkt.View) *nat.Hop {
	mac, ok := p.neigh.Lookup(now, a)
	if !ok {
		return nil
	}
	return &nat.Hop{Ethernet: ethernetHeader(mac, p.MAC, v.V6), Until: now + hopLifetime}
}

func ethernetHeader(dst, src [6]byte, v6 bool) (h [ethernetLen]byte) {
	copy(h[:], dst[:])
	copy(h[6:], src[:])
	h[12], h[13] = 0x08, 0x00
	if v6 {
		h[12], h[13] = 0x86, 0xdd
	}
	return h
}

// jumboMSS is what a VPC client with a large MTU announces: its segments then
// fill the overlay's MTU, which is two full datagrams.
const jumboMSS = 2760

// clamp lowers the MSS of a SYN so that segments of both directions fit the
// overlay: one datagram on the wire, unless the client's MTU allows whole frames.
func (e *Engine) clamp(l leg, p *port, v *ipkt.View) {
	headers := 40
	if v.V6 {
		headers = 60
	}
	limit := p.MTU - headers
	if p.Direct > headers && v.MSS() < jumboMSS {
		limit = min(limit, p.Direct-headers)
	}
	if v.ClampMSS(uint16(min(limit, 65535))) {
		e.stats.clamped[l].Add(1)
	}
}

// errorFromVPC translates an ICMP error of a VPC host about overlay packets.
func (e *Engine) errorFromVPC(now int64, set *netSet, v *ipkt.View) {
	if d := e.checkVPC(set, v.Source(), v.Source()); d != 0 {
		e.drop(legVPC, d)
		return
	}
	if v.TTL <= 1 {
		e.drop(legVPC, dropTTL)
		return
	}
	f, _ := e.table.TranslateError(nat.VPC, v)
	if f == nil {
		if _, own := set.own[v.Destination()]; own {
			e.local.inject(v.B)
			e.stats.local.Add(1)
			return
		}
		e.drop(legVPC, dropNoFlow)
		return
	}
	if _, own := set.own[v.Source()]; !own && f.Masquerade {
		e.drop(legVPC, dropNoFlow) // from a router behind the client: its address stays inside
		return
	}
	v.DecrementTTL()
	if p := set.ports[f.Network]; p != nil {
		p.fwd.count(vpcToOverlay, v)
		e.sendIP(now, set, v)
	}
}

// sendIP sends a packet that exists on its own, by its destination.
func (e *Engine) sendIP(now int64, set *netSet, v *ipkt.View) {
	p, hop := set.route(v.Destination())
	if p == nil {
		e.writeVPC(v.B)
		return
	}
	h := e.resolve(now, p, hop, v)
	if h == nil {
		p.neigh.Resolve(now, hop, v.B)
		return
	}
	e.writeFrame(p.ID, append(h.Ethernet[:], v.B...))
}

// writeFrame sends one frame; for everything but established flows.
func (e *Engine) writeFrame(nwid uint64, frame []byte) {
	buf := append(make([]byte, vpcOffset-ethernetLen, vpcOffset+len(frame)), frame...)
	e.stats.count(legOverlay, tx, len(frame)-ethernetLen)
	if n, err := e.cfg.Overlay.WriteFrames(nwid, [][]byte{buf}, []int{len(frame)}, vpcOffset-ethernetLen); err != nil || n == 0 {
		e.drop(legOverlay, dropOverlay)
	}
}

// sendLocal takes packets of the local stack.
func (e *Engine) sendLocal(b []byte) {
	var v ipkt.View
	if ipkt.Parse(b, &v) == ipkt.OK {
		e.sendIP(e.clock(), e.set.Load(), &v)
	}
}

// sendError sends an ICMP error about a packet from a leg back to its sender.
func (e *Engine) sendError(l leg, kind ipkt.ErrorKind, v *ipkt.View, mtu int) {
	now := e.clock()
	if !v.MayAnswer() || kind != ipkt.TooBig && !e.errors.allow(now) {
		return
	}
	set := e.set.Load()
	src := set.vpc4
	if v.V6 {
		src = set.vpc6
	}
	if p, _ := set.route(v.Source()); l == legOverlay && p != nil {
		if src = p.v4; v.V6 {
			src = p.v6
		}
	}
	if !src.IsValid() {
		for _, p := range set.ports {
			if src = p.v4; v.V6 {
				src = p.v6
			}
			if src.IsValid() {
				break
			}
		}
	}
	if !src.IsValid() {
		return
	}
	e.stats.errors[l][kind].Add(1)
	b := ipkt.AppendError(nil, kind, ipkt.Bytes(src), v, mtu)
	if l == legVPC {
		e.writeVPC(b)
		return
	}
	var ev ipkt.View
	if ipkt.Parse(b, &ev) == ipkt.OK {
		e.sendIP(now, set, &ev)
	}
}
