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
	"ztgate/netstack/internal/nat"
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
	cfg   Config
	log   *slog.Logger
	dev   Device
	table *nat.Table
	frags *frag.Store
	local *localStack
	// handovers is nil unless there is a Host.
	handovers *handovers
	stats     counters
	start     time.Time
	set       atomic.Pointer[netSet]
	errors    limiter
	claims    claims // of addresses that are others'
	kept      keptFlows
	ring      refusals
	ids       idTable
	lost      atomic.Uint64 // packets that the device lost, as it last said
	logged    atomic.Int64  // when refused flows were last logged, ns
	rounds    atomic.Uint64 // of the timers

	idleMu sync.Mutex
	idle   []*worker

	mu      sync.Mutex // guards changes of set, and settled
	settled bool       // the last change went well
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
	e := &Engine{cfg: cfg, log: cfg.Logger, dev: cfg.Device, start: cfg.Now(), table: nat.New(cfg.NAT)}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	in := settings{vpc: cfg.VPC, forwards: slices.Clone(cfg.Forwards), maps: slices.Clone(cfg.Maps), policy: cfg.Policy,
		masquerade: slices.Clone(cfg.Masquerade)}
	if in.vpc.MTU == 0 {
		mtu, err := cfg.Device.MTU()
		if err != nil {
			return nil, fmt.Errorf("netstack: MTU of the VPC device: %w", err)
		}
		in.vpc.MTU = mtu
	}
	if in.policy == nil {
		in.policy = policy.New(policy.Accept, nil)
	}
	if len(cfg.Mappings) > 0 {
		flows := e.kept.init(e.clock(), cfg.Mappings, &cfg.NAT.Timeouts)
		n := e.table.Import(e.clock(), cfg.Mappings)
		e.log.Info("kept ports and flows of the last run", "mappings", n, "flows", flows, "left_out", len(cfg.Mappings)-n-flows)
	}
	e.cfg.Mappings = nil
	e.errors.init()
	e.claims.init()
	e.ring.init()
	e.frags = frag.New(func(from uint32, n int) {
		side := OverlaySide
		if from == uint32(vpcNIC) {
			side = VPCSide
		}
		e.dropN(side, dropFragment, n)
	})
	local, err := newLocalStack(e.sendLocal)
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	e.local = local
	if cfg.Host != nil {
		if e.handovers, err = newHandovers(e); err != nil {
			return nil, fmt.Errorf("netstack: %w", err)
		}
	}
	if err := e.swap(in, nil); err != nil {
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
	if e.handovers != nil {
		g.Go(func() error { e.handovers.local.run(ctx); return nil })
	}
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
			e.rounds.Add(1)
		}
	}
}

func (e *Engine) tick(now int64) {
	e.countLost()
	e.table.Sweep(now)
	e.frags.Expire(now)
	e.kept.expire(now)
	for _, at := range e.set.Load().attachments {
		failed, ready := at.neigh.Tick(now)
		for _, packet := range failed {
			e.unresolved(now, at, packet)
		}
		for _, r := range ready {
			e.sendReady(now, at, r.Packets, r.Address)
		}
	}
}

// lossy is a device that knows how many packets came and were lost before they could be
// read.
type lossy interface{ Lost() uint64 }

// countLost counts what the device lost since the last time.
func (e *Engine) countLost() {
	d, ok := e.dev.(lossy)
	if !ok {
		return
	}
	lost := d.Lost()
	n := lost - e.lost.Load()
	e.stats.traffic[VPCSide][rx].add(n, 0)
	e.dropN(VPCSide, dropBacklog, int(n))
	e.lost.Store(lost)
}

// SetPolicy replaces the policy. Flows that it doesn't allow end with their next
// packet.
func (e *Engine) SetPolicy(p *policy.Policy) {
	e.amend(func(s *netSet) { s.policy = p })
}

// SetMTU says that the VPC device has another MTU now. It holds from the next batch
// on: for packets of known flows, and for the segments that new ones agree on.
func (e *Engine) SetMTU(mtu int) error {
	if err := checkMTU("the VPC device", mtu, e.cfg.VPC.Addresses); err != nil {
		return err
	}
	e.amend(func(s *netSet) { s.vpc.MTU = mtu })
	return nil
}

// amend puts a copy of the snapshot into force in which something is changed that
// nothing else in it depends on.
func (e *Engine) amend(edit func(*netSet)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := *e.set.Load()
	next.generation++
	edit(&next)
	e.set.Store(&next)
}

// SetTranslation replaces forwards and address maps. Flows that go on as they are
// stay.
func (e *Engine) SetTranslation(forwards []PortForward, maps []AddressMap) error {
	if err := checkTranslation(forwards, maps); err != nil {
		return err
	}
	return e.change(func(in *settings) { in.forwards, in.maps = slices.Clone(forwards), slices.Clone(maps) })
}

// SetNetworks replaces the networks. Flows whose network, route or own address
// is gone end with their next packet; neighbours and counters are kept.
func (e *Engine) SetNetworks(nets []Network) error {
	return e.change(func(in *settings) { in.networks = slices.Clone(nets) })
}

// MulticastGroups lists the groups in which others look for our IPv6 addresses.
func (e *Engine) MulticastGroups(nwid uint64) (out []Group) {
	at := e.set.Load().attachments[nwid]
	if at == nil {
		return nil
	}
	for _, a := range at.Addresses {
		if a.Addr().Is6() {
			b := a.Addr().As16()
			out = append(out, Group{MAC: [6]byte{0x33, 0x33, 0xff, b[13], b[14], b[15]}})
		}
	}
	return out
}

// Neighbour returns the MAC of a host of a network, by its address there or its alias
// in the VPC, if it is known.
func (e *Engine) Neighbour(nwid uint64, a netip.Addr) ([6]byte, bool) {
	s := e.set.Load()
	at := s.attachments[nwid]
	if at == nil {
		return [6]byte{}, false
	}
	if h := s.byAlias(a); h.at == at {
		a = h.addr
	}
	return at.neigh.Lookup(e.clock(), a)
}

// readDevice reads packets from the VPC side.
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
			e.drop(VPCSide, dropDevice)
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
