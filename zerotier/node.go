// Package zerotier is a ZeroTier node in pure Go: a leaf of any ZeroTier
// network, and, when a planet names it, a root of a custom planet; on request
// also a network controller. It speaks the wire protocol of ZeroTier 1.10 to
// 1.14 (docs/protocol) and hands whole Ethernet frames in and out, in batches.
//
// The package joins the parts: identity and packet (formats and ciphers), vl1
// (peers and paths), vl2 and network (joined networks), controller, transport
// (UDP sockets), portmap (routers in front of the host). What it says about itself
// is in the words of ztnode. It needs no privileges
// and creates no interfaces.
package zerotier

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

	"ztgate/internal/disk"
	"ztgate/internal/watch"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/clock"
	"ztgate/zerotier/network"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/transport"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
	"ztgate/zerotier/ztnode/home"
)

// Headroom is the room, in bytes, that [Node.WriteFrames] needs before each
// frame.
const Headroom = 64

// Software version announced to peers. ZeroTier uses it for display only.
const (
	VersionMajor, VersionMinor, VersionRevision = 1, 16, 0
)

// Config says how a node runs.
type Config struct {
	Home            string // directory of identity, planet and networks; created if missing
	Port            int    // primary UDP port, 0 = any free one
	NoSecondaryPort bool
	// Bind are the local addresses to use; none = those of all interfaces. Only a node
	// on loopback addresses alone takes them for paths to peers.
	Bind       []netip.Addr
	Logger     *slog.Logger // nil = no log
	Controller bool         // also act as a network controller, state in Home/controller.d
	Planet     []byte       // custom planet; replaces an older or another one in Home
	// Networks are joined before those that Home remembers, where there are more than
	// [ztnode.MaxNetworks].
	Networks []ztnode.NetworkID
	Disk     disk.FS          // of Home; nil = the machine's
	Now      func() time.Time // nil = time.Now

	// Local settings (chapter 02 §8.6).
	Physical     []vl1.PhysicalNetwork
	Virtual      map[identity.Address]vl1.VirtualPeer
	LowBandwidth bool
	SealedHello  ztnode.SealedHello // chapter 06 §3.6

	// TCPRelay carries datagrams over TCP while no root answers over UDP. The zero
	// value means none, or with DefaultTCPRelay ZeroTier's own server if the planet
	// is theirs.
	TCPRelay        netip.AddrPort
	DefaultTCPRelay bool
	ForceTCPRelay   bool // never use UDP

	// Mark is that of the overlay's own packets, on Linux, so that the host's policy
	// routing can tell them from those that the overlay carries; 0 = none.
	Mark int

	// PortMapping asks routers in front of this host to map a UDP port to it
	// (chapter 02 §8.3).
	PortMapping bool

	// OnMember takes the news of members of our controller's networks, see
	// [controller.Config]. Nil = nobody wants to know.
	OnMember func(ztnode.MemberEvent) bool

	// OnFrames receives Ethernet frames (14-byte header and payload) of a joined
	// network, in batches. Frames are valid until it returns and may be changed
	// in place. Several goroutines call it at the same time. Nil drops them.
	OnFrames func(nwid uint64, frames [][]byte)
}

// Node is one ZeroTier node. Its methods are safe for concurrent use.
type Node struct {
	cfg   Config
	log   *slog.Logger
	home  *store
	id    *identity.Identity
	core  *vl1.Core
	layer *network.Layer
	udp   sockets
	ctl   *controller.Controller

	mapper portMapper // nil = none

	tx    txPool
	now   func() time.Time
	ready chan struct{}
	wake  chan struct{} // makes the timer goroutine look again

	overlay atomic.Pointer[[]netip.Prefix] // masked; see SetOverlayPrefixes

	mu       sync.Mutex
	clock    *clock.Watch
	watchers watch.Watchers
	online   bool
	offline  time.Time          // since when, or since the last remedy
	left     []ztnode.NetworkID // out, since there are too many

	joining sync.Mutex // what is joined, and home's memory of it, change together

	background sync.WaitGroup
}

// txWorker is what one goroutine needs to send.
type txWorker struct {
	vw  *vl1.Worker
	out sender
}

func (n *Node) newTxWorker() any {
	return &txWorker{vw: n.core.NewWorker(), out: n.udp.NewSender()}
}

// txPool has the txWorkers that nobody uses.
type txPool interface {
	Get() any
	Put(any)
}

// rxWorker is what one receiving goroutine needs.
type rxWorker struct {
	vw  *vl1.Worker
	nw  *network.Worker
	out sender
	now time.Time // of this batch, zero between batches
}

// New opens home and the UDP sockets; what an operator can remedy is an error of
// [ztnode]. Run must be called to make the node work,
// Close if it is not.
func New(cfg Config) (*Node, error) { return newNode(cfg, (*Node).openUDP) }

// newNode makes a node whose sockets are opened by open.
func newNode(cfg Config, open func(*Node) (sockets, error)) (_ *Node, err error) {
	n := &Node{
		cfg: cfg, log: cfg.Logger, now: cfg.Now,
		ready: make(chan struct{}),
		wake:  make(chan struct{}, 1),
	}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if n.now == nil {
		n.now = time.Now
	}
	n.clock = clock.NewWatch(n.clocks(), n.log)
	dir, err := home.OpenOn(cfg.Disk, cfg.Home)
	if err != nil {
		return nil, err
	}
	n.home = newStore(dir, n.now)
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if n.id, err = n.home.identity(); err != nil {
		return nil, err
	}
	if err := n.home.tidyPeers(n.now()); err != nil {
		n.log.Warn("tidy the peer cache", "error", err)
	}
	planet, err := n.home.planet(cfg.Planet)
	if err != nil {
		return nil, err
	}
	if cfg.DefaultTCPRelay && !cfg.TCPRelay.IsValid() && planet.ID == vl1.DefaultPlanet().ID {
		n.cfg.TCPRelay = transport.DefaultTCPRelay
	}
	if n.udp, err = open(n); err != nil {
		return nil, err
	}
	if err := n.newLayers(planet); err != nil {
		return nil, err
	}
	n.tx = &sync.Pool{New: n.newTxWorker}
	return n, n.joinStored()
}

func (n *Node) openUDP() (sockets, error) {
	cfg := &n.cfg
	if cfg.PortMapping && !cfg.ForceTCPRelay {
		n.mapper = n.newPortMapper()
	}
	u, err := transport.Open(transport.Config{
		Port: cfg.Port, NoSecondary: cfg.NoSecondaryPort, Bind: cfg.Bind, Logger: n.log,
		// Peers send to the path that they used last: after a quick restart it should lead
		// somewhere.
		WantSecondary: n.ownPort(1),
		TCPRelay:      cfg.TCPRelay, ForceTCPRelay: cfg.ForceTCPRelay, Mark: cfg.Mark,
		Version: [3]int{VersionMajor, VersionMinor, VersionRevision},
		Exclude: func(_ string, a netip.Addr) bool { return n.insideNetwork(a) },
		OnRescan: func() {
			if n.mapper != nil {
				n.mapper.NetworkChanged()
			}
		},
	})
	if err != nil {
		return nil, err
	}
	return udpSockets{u}, nil
}

func (n *Node) newLayers(planet *vl1.World) (err error) {
	lcfg := network.Config{
		Identity: n.id,
		Deliver:  n.deliver,
		OnChange: n.networkChanged,
		Wake:     n.kick,
		Logger:   n.log,

		LowBandwidth: n.cfg.LowBandwidth,
	}
	if n.cfg.Controller {
		n.ctl, err = controller.New(controller.Config{
			Identity: n.id, Dir: n.home.Path("controller.d"), Disk: n.cfg.Disk, Send: n.controllerSend, Logger: n.log, Now: n.now,
			OnMember:    n.cfg.OnMember,
			PacketLimit: func(a identity.Address) int { return n.core.PacketLimit(a) },
		})
		if err != nil {
			return err
		}
		lcfg.Controller = n.ctl
	}
	n.layer = network.New(lcfg)
	moons, err := n.home.moons()
	if err != nil {
		n.log.Warn("some moons were not read", "error", err)
	}
	start := n.now()
	n.core, err = vl1.New(vl1.Config{
		Identity: n.id, Planet: planet, Moons: moons, Upper: n.layer, Logger: n.log,
		LocalEndpoints:  n.localEndpoints,
		SocketOpen:      n.udp.HasSocket,
		Background:      n.inBackground,
		StoredPeer:      n.home.peer,
		StoredPeers:     n.home.peers,
		OnForgotten:     n.storePeer,
		Physical:        n.cfg.Physical,
		Virtual:         n.cfg.Virtual,
		LowBandwidth:    n.cfg.LowBandwidth,
		SealedHello:     n.cfg.SealedHello,
		PathAllowed:     func(a netip.Addr) bool { return !n.insideNetwork(a) },
		Loopback:        onLoopback(n.cfg.Bind),
		SoftwareVersion: [3]int{VersionMajor, VersionMinor, VersionRevision},
		Start:           start,
		Clock:           func() time.Duration { return n.now().Sub(start) },
		OnWorld:         n.worldChanged,
	})
	if err != nil {
		return err
	}
	n.layer.SetPeers(n.core)
	return nil
}

// SetSealedHello changes which HELLOs are sealed.
func (n *Node) SetSealedHello(s ztnode.SealedHello) { n.core.SetSealedHello(s) }

// onLoopback reports whether a node can be reached from this host alone.
func onLoopback(bind []netip.Addr) bool {
	return len(bind) > 0 && !slices.ContainsFunc(bind, func(a netip.Addr) bool { return !a.IsLoopback() })
}

func (n *Node) joinStored() error {
	stored, err := n.home.networks()
	if err != nil {
		return err
	}
	rank := func(s storedNetwork) int { // the configured ones first
		if i := slices.Index(n.cfg.Networks, s.id); i >= 0 {
			return i
		}
		return len(n.cfg.Networks)
	}
	slices.SortStableFunc(stored, func(a, b storedNetwork) int { return rank(a) - rank(b) })
	room := ztnode.MaxNetworks
	for _, id := range n.cfg.Networks {
		if !slices.ContainsFunc(stored, func(s storedNetwork) bool { return s.id == id }) {
			room--
		}
	}
	room = min(max(room, 0), len(stored))
	for _, s := range stored[room:] {
		n.left = append(n.left, s.id)
	}
	if len(n.left) > 0 {
		n.log.Error("home remembers more networks than a node can join: the rest is not joined", "limit", ztnode.MaxNetworks, "left_out", n.left,
			"remedy", "leave some and restart")
	}
	return n.send(func(t *txWorker, now time.Time) error {
		for _, s := range stored[:room] {
			if err := n.layer.Join(t.out, now, s.id, s.config); err != nil {
				return err
			}
		}
		return nil
	})
}

// LeftOut lists the networks that Home remembers but that are not joined, since
// there are too many.
func (n *Node) LeftOut() []ztnode.NetworkID {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.left)
}

// Close frees what New opened. Run does it too.
func (n *Node) Close() error {
	var errs []error
	if n.udp != nil {
		errs = append(errs, n.udp.Close())
	}
	if n.home != nil {
		errs = append(errs, n.home.Close())
	}
	return errors.Join(errs...)
}

// Run works until ctx ends, which is not an error, or something fails. When it
// returns all goroutines have ended and the sockets are closed.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.receive(ctx) })
	g.Go(func() error { n.timers(ctx); return nil })
	g.Go(func() error { (&keeper{store: n.storePeer}).run(ctx, n.core.PeerRecords); return nil })
	if n.ctl != nil {
		g.Go(func() error { return n.ctl.Run(ctx) })
	}
	if n.mapper != nil {
		g.Go(func() error { n.mapper.Run(ctx); return nil })
	}
	close(n.ready)
	err := g.Wait()
	n.background.Wait()
	for _, r := range n.core.PeerRecords() {
		n.storePeer(r)
	}
	return errors.Join(err, n.Close())
}

// Ready is closed when the node has begun to work.
func (n *Node) Ready() <-chan struct{} { return n.ready }

func (n *Node) receive(ctx context.Context) error {
	var mu sync.Mutex // guards growth of the table only
	var table atomic.Pointer[[]*rxWorker]
	table.Store(&[]*rxWorker{})
	worker := func(w int) *rxWorker {
		if t := *table.Load(); w < len(t) && t[w] != nil {
			return t[w]
		}
		mu.Lock()
		defer mu.Unlock()
		t := append([]*rxWorker(nil), *table.Load()...)
		for len(t) <= w {
			t = append(t, nil)
		}
		if t[w] == nil {
			rx := &rxWorker{vw: n.core.NewWorker(), nw: n.layer.NewWorker(), out: n.udp.NewSender()}
			rx.vw.User = rx.nw
			t[w] = rx
			table.Store(&t)
		}
		return t[w]
	}
	return n.udp.Run(ctx,
		func(w int, sock vl1.SocketID, from netip.AddrPort, datagram []byte) {
			rx := worker(w)
			if rx.now.IsZero() {
				rx.now = n.now()
				rx.vw.Begin(rx.out, rx.now)
			}
			n.core.Receive(rx.vw, sock, from, datagram)
		},
		func(w int) {
			rx := worker(w)
			n.layer.Flush(rx.nw)
			rx.out.Flush()
			rx.now = time.Time{}
		})
}

// timers runs the periodic work of the layers at the times they ask for.
func (n *Node) timers(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-t.C:
		}
		t.Reset(max(n.tick().Sub(n.now()), minTick))
	}
}

// tick does what is due, and returns when to do so again.
func (n *Node) tick() (next time.Time) {
	n.checkClock()
	_ = n.send(func(tx *txWorker, now time.Time) error {
		next = n.core.Tick(tx.out, now)
		if l := n.layer.Tick(tx.out, now); l.Before(next) {
			next = l
		}
		return nil
	})
	n.checkOnline()
	return next
}

// clocks looks at the host's clocks.
func (n *Node) clocks() clock.Reading {
	if n.cfg.Now != nil {
		return clock.Reading{Now: n.cfg.Now()}
	}
	return clock.Read()
}

// checkClock notices that the host slept, when all that others know of us is old, and that
// the wall clock was set.
func (n *Node) checkClock() {
	n.mu.Lock()
	slept, set := n.clock.Look(n.clocks())
	n.mu.Unlock()
	if slept > 0 {
		n.core.Slept(slept)
		n.layer.Slept()
		if n.mapper != nil {
			n.mapper.NetworkChanged()
		}
	}
	if slept > 0 || set {
		n.notify()
	}
}

// minTick keeps a layer that always wants to run now from spinning.
const minTick = 5 * time.Millisecond

// rebindAfter is how long a node is offline before it tries another port.
const rebindAfter = 120 * time.Second

func (n *Node) inBackground(f func()) { n.background.Go(f) }

func (n *Node) checkOnline() {
	online := n.core.Online()
	n.mu.Lock()
	changed := online != n.online
	n.online = online
	now := n.now()
	if online || n.offline.IsZero() {
		n.offline = now
	}
	rebind := now.Sub(n.offline) >= rebindAfter
	if rebind {
		n.offline = now
	}
	n.mu.Unlock()
	if rebind { // a NAT may have lost its mind about the port (chapter 02 §8.2)
		if err := n.udp.RebindSecondary(); err != nil {
			n.log.Warn("move secondary port", "error", err)
		}
	}
	if changed {
		n.log.Info("node state changed", "online", online)
		n.notify()
	}
}

// send lends f a worker and sends what f put into it.
func (n *Node) send(f func(*txWorker, time.Time) error) error {
	t := n.tx.Get().(*txWorker)
	err := f(t, n.now())
	t.out.Flush()
	n.tx.Put(t)
	return err
}

// WriteFrames sends Ethernet frames into a network. Frame i is
// bufs[i][offset:offset+sizes[i]]; offset is at least [Headroom]. Headroom and
// frame are overwritten; the buffers are free again when it returns. It returns
// how many frames were accepted; the others are counted by the network layer.
func (n *Node) WriteFrames(nwid uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	if offset < Headroom {
		return 0, fmt.Errorf("write frames: offset %d is below the headroom of %d", offset, Headroom)
	}
	t := n.tx.Get().(*txWorker)
	ok := n.layer.WriteFrames(t.vw.Begin(t.out, n.now()), vl2.NetworkID(nwid), bufs, sizes, offset)
	t.out.Flush()
	n.tx.Put(t)
	return ok, nil
}

// Owns reports whether an address of a network is proven to be that of the member with
// a MAC.
func (n *Node) Owns(nwid uint64, mac [6]byte, a netip.Addr) bool {
	return n.layer.Owns(vl2.NetworkID(nwid), mac, a)
}

func (n *Node) deliver(nwid vl2.NetworkID, frames [][]byte) {
	if n.cfg.OnFrames != nil {
		n.cfg.OnFrames(uint64(nwid), frames)
	}
}

// controllerSend sends a packet of our own controller; it also reaches our own
// node, which may be a member.
func (n *Node) controllerSend(dst identity.Address, v packet.Verb, payload []byte, compress bool) {
	_ = n.send(func(t *txWorker, now time.Time) error {
		if dst == n.id.Address() {
			n.layer.HandleSelf(t.out, now, v, payload)
			return nil
		}
		n.core.Send(t.vw.Begin(t.out, now), dst, v, payload, vl1.SendOpts{Compress: compress})
		return nil
	})
}

func (n *Node) worldChanged(w *vl1.World) {
	store := n.home.StorePlanet
	if w.Moon {
		store = n.home.storeMoon
	}
	if err := store(w); err != nil {
		n.log.Error("store world", "world", w.ID, "error", err)
	}
	n.notify()
}

func (n *Node) storePeer(r vl1.PeerRecord) {
	if err := n.home.storePeer(r, n.now()); err != nil {
		n.log.Warn("store peer", "peer", r.Identity.Address(), "error", err)
	}
}

// Orbit makes the node use the roots of a moon besides those of the planet. seed
// is one of them, which is asked for the others; 0 = the moon's ID. Home remembers
// the moon once it is known.
func (n *Node) Orbit(id uint64, seed identity.Address) error {
	if seed == 0 {
		seed = identity.Address(id)
	}
	err := n.core.Orbit(id, seed)
	n.kick()
	return err
}

// Deorbit ends the use of a moon and forgets it. It reports whether it was used.
func (n *Node) Deorbit(id uint64) (bool, error) {
	used := n.core.Deorbit(id)
	n.kick()
	return used, n.home.removeMoon(id)
}

func (n *Node) networkChanged(id vl2.NetworkID, s network.Snapshot) {
	if s.Config != nil && s.Stored {
		if err := n.home.storeNetwork(id, s.Config); err != nil {
			n.log.Error("store network configuration", "network", id, "error", err)
		}
	}
	n.notify()
}

// SetOverlayPrefixes says which addresses lie in overlay networks, by the judgement of
// whoever sets up interfaces and routes: no socket is opened there and no path leads
// there, since a datagram would be carried by what it carries (docs/protocol/02
// §4.3). What networks say of themselves doesn't count: an assigned address could
// take the node its own sockets.
func (n *Node) SetOverlayPrefixes(list []netip.Prefix) {
	list = slices.Clone(list)
	n.overlay.Store(&list)
}

func (n *Node) insideNetwork(a netip.Addr) bool {
	list := n.overlay.Load()
	return list != nil && slices.ContainsFunc(*list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Watch returns a channel that gets a value after any change of a network's
// status or configuration or of the online state, and a function that ends it.
func (n *Node) Watch() (<-chan struct{}, func()) { return n.watchers.Watch() }

func (n *Node) notify() { n.watchers.Notify() }

// Join joins a network and remembers it in home.
func (n *Node) Join(id ztnode.NetworkID) error {
	n.joining.Lock()
	defer n.joining.Unlock()
	_, joined := n.layer.Network(id)
	err := n.send(func(t *txWorker, now time.Time) error { return n.layer.Join(t.out, now, id, nil) })
	if err != nil {
		return err
	}
	if err := n.home.rememberNetwork(id); err != nil {
		if !joined {
			n.layer.Leave(id)
		}
		return err
	}
	n.noLongerLeftOut(id)
	n.kick()
	n.notify()
	return nil
}

func (n *Node) noLongerLeftOut(id ztnode.NetworkID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.left = slices.DeleteFunc(n.left, func(x ztnode.NetworkID) bool { return x == id })
}

// Leave leaves a network and forgets it.
func (n *Node) Leave(id ztnode.NetworkID) error {
	n.joining.Lock()
	defer n.joining.Unlock()
	n.layer.Leave(id)
	n.noLongerLeftOut(id)
	n.notify()
	return n.home.removeNetwork(id)
}

func (n *Node) kick() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Controller returns the network controller, nil if the node is none.
func (n *Node) Controller() *controller.Controller { return n.ctl }

// SetMulticastGroups replaces the port's subscriptions in a network. The groups
// for address resolution of the assigned addresses need not be listed.
func (n *Node) SetMulticastGroups(id ztnode.NetworkID, groups []ztnode.Group) {
	n.layer.SetGroups(id, groups)
	n.kick()
}
