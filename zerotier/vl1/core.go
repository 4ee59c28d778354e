// Package vl1 is the ZeroTier peer layer: messages between nodes, planets and
// moons, and [Core], the state machine of peers and paths of a leaf or a root
// (chapter 02). It opens no sockets and reads no clock: callers pass datagrams
// and the time in, and an [Out] that takes datagrams out, so that a whole network
// of nodes runs inside one test.
package vl1

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	crand "crypto/rand"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/ztnode"
)

// SocketID names a local UDP socket; 0 means all sockets of the address family.
type SocketID uint32

// Out collects the datagrams of one worker. Data is copied before a method
// returns. An Out belongs to one goroutine.
type Out interface {
	// Send sends head followed by data as one datagram.
	Send(sock SocketID, to netip.AddrPort, head, data []byte)
	// SendTTL sends a datagram with a small time to live, to open the own NAT.
	SendTTL(sock SocketID, to netip.AddrPort, data []byte, ttl int)
}

// Source tells where a packet came from.
type Source struct {
	Socket   SocketID
	Endpoint netip.AddrPort
	Hops     uint8 // 0 = direct
	Unasked  bool  // of an answer: to a request that this process never sent

	size int // bytes of the datagram, the last one of several
}

// Result is what the network layer found out about a packet.
type Result struct {
	Trust bool // the sender proved to be a member of a common network
	Skip  bool // don't count the packet as a sign of life
	Retry bool // keep the packet and hand it over again for some seconds
}

// Upper is the network layer. It is called without Core's locks, by several
// workers at the same time. p is authentic, decrypted and decompressed; it is
// valid during the call and may be modified.
type Upper interface {
	HandlePacket(w *Worker, from *Peer, p packet.Packet, src Source) Result
	// PeerLearned tells that a peer became known or said HELLO, as one does that knows
	// nothing of us any more.
	PeerLearned(w *Worker, p *Peer)
}

// Worker is the work space of one goroutine that receives or sends. Each batch of work
// starts with [Worker.Begin].
type Worker struct {
	User any // for the network layer

	clock *clock // the core's
	out   Out    // of this batch, like what follows
	now   time.Time
	t     int64 // now, in the core's nanoseconds, see clock

	last     *Peer           // of the latest packet
	scratch  *packet.Scratch // by itself: without pointers beside it, it begins with a cache line
	hdr      [packet.FragmentHeaderLen]byte
	random   *rand.ChaCha8
	joined   []byte // reassembled packet
	inflated []byte // decompressed packet
	build    []byte // control packet in the making
	packed   []byte // the same, compressed
	stats    *workerStats
}

// Config says how a Core works.
type Config struct {
	Identity *identity.Identity
	Planet   *World // nil = the built-in one
	Moons    []*World
	Upper    Upper
	Logger   *slog.Logger
	Start    time.Time // the time of the first call

	SoftwareVersion [3]int                  // announced; not 1.1.0
	LocalEndpoints  func() []netip.AddrPort // advertised to trusted peers
	SocketOpen      func(s SocketID) bool   // false: it was closed; asked when LocalEndpoints changed, nil = none ever is
	PathAllowed     func(a netip.Addr) bool // false: the address lies inside an overlay network
	Loopback        bool                    // peers may be on this host's loopback addresses
	OnWorld         func(w *World)          // a newer planet or moon was accepted

	// The peer cache, optional: looks up a peer that isn't known, and takes one that
	// is forgotten. All are called without locks.
	StoredPeer  func(a identity.Address) *PeerRecord
	StoredPeers func(most int) []identity.Address // the newest records; asked once if no root answers at the start
	OnForgotten func(r PeerRecord)

	// Validate checks that the address of a stranger's identity follows from its
	// keys; nil = [identity.Identity.Validate], which takes some 15 ms. Callers that
	// know identities already may be quicker.
	Validate func(id *identity.Identity) error
	// Background runs f on another goroutine. With it, identity checks that strangers
	// cause in numbers do not hold up a receiving worker; one f at a time is run.
	Background func(f func())
	// Clock tells how long dear work takes; nil = each kind takes a fixed time.
	Clock func() time.Duration

	// Local settings (chapter 02 §8.6).
	Physical     []PhysicalNetwork // at most 32
	Virtual      map[identity.Address]VirtualPeer
	LowBandwidth bool // fewer probes and announcements (§4.12)
	SealedHello  ztnode.SealedHello
}

// Limits.
const (
	maxPeers          = 65536
	maxUntrustedPeers = 8192 // of them
	maxPaths          = 16   // per peer
	maxOutQueue       = 64
	maxOutQueuePeer   = 16
	maxHeld           = 32 // packets of unknown senders
	maxHeldSource     = 2
	maxRetry          = 64 // packets the network layer wants again
	maxRetryPeer      = 4
	maxExpected       = 8192
	maxRequests       = 4096
	maxWhois          = 256
	maxHints          = 64
	maxIntroductions  = 4096
	maxSurface        = 64
	maxContacts       = 64
	contactAskBurst   = 4
	echoBurst         = 16
)

// Times (chapter 02 §11 unless said otherwise).
const (
	queueTimeout    = 5 * time.Second
	whoisPacing     = 500 * time.Millisecond
	expectTimeout   = 10 * time.Second
	pathSilent      = 19 * time.Second
	pathExpiry      = 243 * time.Second
	pathHeartbeat   = 14 * time.Second
	peerAlive       = 500 * time.Second
	peerActive      = 500 * time.Second
	trustLifetime   = 600 * time.Second
	fullHelloEvery  = 60 * time.Second
	pingCheckEvery  = 5 * time.Second
	rootProbeEvery  = 25 * time.Second // §4.6, what a client should do
	contactEvery    = 28 * time.Second // §4.6
	contactAskEvery = 250 * time.Millisecond
	reviveAfter     = 5 * time.Second // without a root
	onlineWindow    = 60 * time.Second
	housekeeping    = 30 * time.Second
	introduceEvery  = 30 * time.Second
	pushRelayed     = 15 * time.Second
	pushDirect      = 120 * time.Second
	pushAgain       = time.Second           // to where it was refused
	echoEvery       = 40 * time.Millisecond // answered, of one peer
	whoisGate       = 100 * time.Millisecond
	surfaceLifetime = 600 * time.Second
	tickEvery       = 500 * time.Millisecond
	unknownLatency  = 65535 * time.Millisecond
)

// Times of noticing dead paths. The reference black-holes for minutes; what is
// here is invisible on the wire but for some more ECHO.
const (
	pathSilentLow    = 60 * time.Second // in low bandwidth mode
	pathProbeBefore  = 7 * time.Second  // before the path counts as silent, even if idle
	pathSuspectAfter = 3 * time.Second  // we send and hear nothing
	pathProbeEvery   = time.Second      // while suspect
	pathDeadAfter    = 3 * time.Second  // of unanswered probes
	pathDeadProbe    = 5 * time.Second
	doubtEvery       = time.Second
	localEvery       = time.Second // between reactions to changed addresses
)

// Core is the peer layer of one node. Its methods are safe for concurrent use;
// Receive and SendData take no lock that all peers share. A worker that they are given
// must be in a batch.
type Core struct {
	cfg     Config
	id      *identity.Identity
	self    identity.Address
	log     *slog.Logger
	clock   *clock
	version version
	seed    [32]byte

	peers  [peerShards]peerShard
	count  atomic.Int64 // of peers
	frags  packet.Reassembler
	relays relayGates
	budget *budget.Budget
	credit credit
	repeat repeats
	stats  coreStats
	worlds atomic.Pointer[worldSet]
	best   atomic.Pointer[Peer] // best upstream with a path, nil without
	online atomic.Bool
	seals  atomic.Int32 // a ztnode.SealedHello

	saidTooLong atomic.Int64

	mu        sync.Mutex // guards what follows and the mutable part of peers; methods named …Locked need it
	workers   []*workerStats
	retired   workerStats // sums of workers that are no more
	tick      *Worker
	queue     outQueue
	held      heldQueue
	retries   retryQueue
	replies   replies
	requests  requests
	whois     questions
	hints     hints
	intros    introductions
	surface   surface
	strangers strangers
	waiting   map[uint64]identity.Address // moons we wait for, with their seeds
	contacts  map[identity.Address]bool   // kept in contact though no traffic wants it
	strange   []identity.Address          // of them, to be looked up
	asks      rate.Bucket                 // for them
	recalled  map[identity.Address]int64  // looked up in the peer cache
	forgotten []PeerRecord                // to be handed to OnForgotten
	revive    reviving
	newcomers []*Peer
	met       rate.Bucket // RENDEZVOUS followed
	twin      twin
	roots     map[identity.Address]*rootState
	local     []netip.AddrPort // endpoints of the sockets as last looked at
	lastLocal int64
	nextSize  int64 // when an answer about a path's size is due, of this tick
	untrusted int   // peers, as of the last count
	lastEvict int64
	lastPing  int64
	lastHouse int64
}

const peerShards = 64

type peerShard struct {
	mu sync.RWMutex
	m  map[identity.Address]*Peer
	n  atomic.Int32 // len(m): most shards of most nodes are empty
}

// worldSet is the current planet with the moons.
type worldSet struct {
	planet    *World
	moons     []*World
	upstreams map[identity.Address]upstream
	root      bool // we are listed ourselves
}

type upstream struct {
	role      Role
	endpoints []netip.AddrPort // none = any
}

// Role is what a peer is to us.
type Role uint8

const (
	RoleLeaf Role = iota
	RoleMoon
	RolePlanet
)

// String returns the word that ZeroTier uses.
func (r Role) String() string { return ztnode.Roles()[r] }

// New makes the peer layer of a node. It sends nothing before the first Tick.
func New(cfg Config) (*Core, error) {
	if cfg.Identity == nil || !cfg.Identity.HasSecret() {
		return nil, errors.New("vl1: an identity with a secret key is needed")
	}
	if cfg.Upper == nil {
		return nil, errors.New("vl1: a network layer is needed")
	}
	c := &Core{
		cfg: cfg, id: cfg.Identity, self: cfg.Identity.Address(), log: cfg.Logger, clock: &clock{start: cfg.Start},
		version: version{
			protocol: packet.ProtocolVersion,
			major:    uint8(cfg.SoftwareVersion[0]), minor: uint8(cfg.SoftwareVersion[1]), revision: uint16(cfg.SoftwareVersion[2]),
		},
		replies:   replies{m: make(map[packet.ID]*expectation)},
		requests:  requests{m: make(map[packet.ID]struct{})},
		whois:     questions{m: make(map[identity.Address]question)},
		hints:     hints{m: make(map[identity.Address]hint)},
		intros:    introductions{m: make(map[pair]int64)},
		surface:   surface{m: make(map[surfaceKey]surfaceEntry)},
		roots:     make(map[identity.Address]*rootState),
		waiting:   make(map[uint64]identity.Address),
		recalled:  make(map[identity.Address]int64),
		strangers: strangers{answers: rate.NewTable[netip.Addr](answerSources)},
		relays:    newRelayGates(),
		budget:    budget.New(cfg.Clock),
		credit:    newCredit(),
		repeat:    newRepeats(),
	}
	if len(cfg.Physical) > maxPhysical {
		return nil, fmt.Errorf("vl1: %d physical networks configured, %d are possible", len(cfg.Physical), maxPhysical)
	}
	if len(cfg.Moons) > maxMoons {
		return nil, ErrTooManyMoons
	}
	if c.cfg.Validate == nil {
		c.cfg.Validate = (*identity.Identity).Validate
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	for i := range c.peers {
		c.peers[i].m = make(map[identity.Address]*Peer)
	}
	if _, err := crand.Read(c.seed[:]); err != nil {
		return nil, err
	}
	c.SetSealedHello(cfg.SealedHello)
	c.tick = c.NewWorker()
	planet := cfg.Planet
	if d := DefaultPlanet(); planet == nil || planet.ID == d.ID && d.Replaces(planet) {
		planet = d // a stored revision may be older (chapter 02 §3.4)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setWorldsLocked(planet, cfg.Moons)
	return c, nil
}

// NewWorker makes the work space for one more goroutine. When it is garbage its
// counters are kept.
func (c *Core) NewWorker() *Worker {
	var seed [32]byte
	if _, err := crand.Read(seed[:]); err != nil {
		panic(err) // crypto/rand does not fail
	}
	w := &Worker{
		clock:    c.clock,
		random:   rand.NewChaCha8(seed),
		joined:   make([]byte, 0, packet.MaxPacket),
		inflated: make([]byte, 0, packet.MaxPacket),
		build:    make([]byte, 0, packet.MaxPacket),
		packed:   make([]byte, 0, packet.MaxPacket),
		stats:    new(workerStats),
		scratch:  new(packet.Scratch),
	}
	c.mu.Lock()
	c.workers = append(c.workers, w.stats)
	c.mu.Unlock()
	// The core refers to workers itself and by its upper layer: with more than a weak
	// pointer back, none of them would ever be garbage.
	core := weak.Make(c)
	runtime.AddCleanup(w, func(st *workerStats) {
		if c := core.Value(); c != nil {
			c.retire(st)
		}
	}, w.stats)
	return w
}

// retire keeps the counters of a worker that is garbage.
func (c *Core) retire(st *workerStats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.workers = slices.DeleteFunc(c.workers, func(x *workerStats) bool { return x == st })
	c.retired.add(st)
}

// Begin starts a batch: what the worker sends goes to out, and it is now. It
// returns the worker.
func (w *Worker) Begin(out Out, now time.Time) *Worker {
	w.out, w.now, w.t = out, now, w.clock.at(now)
	return w
}

// Now returns the time of the batch.
func (w *Worker) Now() time.Time { return w.now }

// clock is what a core reckons time by: it goes on by itself, whatever the wall clock is set
// to, and goes on while the host sleeps.
type clock struct {
	start time.Time
	slept atomic.Int64
	look  atomic.Pointer[look] // the latest
}

// look is a time in both reckonings.
type look struct {
	now time.Time
	t   int64
}

// at turns a time into nanoseconds that are never 0, so that 0 can mean never. A worker
// of a test may have no clock.
func (c *clock) at(now time.Time) int64 {
	if c == nil {
		return 0
	}
	return int64(now.Sub(c.start)) + c.slept.Load() + int64(time.Hour)
}

// stamp is a time for packets: of the wall clock as it was at the start, and never going
// back since, nor ahead by itself.
func (c *clock) stamp(t int64) int64 { return c.start.Add(time.Duration(t) - time.Hour).UnixMilli() }

// timeOf is the inverse of at by the wall clock as it is now; the zero time for never.
func (c *Core) timeOf(t int64) time.Time {
	l := c.clock.look.Load()
	if t == 0 || l == nil {
		return time.Time{}
	}
	return l.now.Add(time.Duration(t - l.t))
}

// Slept says that the host slept for so long, of which the clock that times come from knows
// nothing.
func (c *Core) Slept(d time.Duration) { c.clock.slept.Add(int64(d)) }

// touch notes t. Packets of a batch have the same time, and workers on several
// processors hear the same peer: what is noted already isn't written again.
func touch(at *atomic.Int64, t int64) {
	if at.Load() != t {
		at.Store(t)
	}
}

func since(t, then int64) time.Duration { return time.Duration(t - then) }

// Identity returns the own identity.
func (c *Core) Identity() *identity.Identity { return c.id }

// Planet returns the current planet.
func (c *Core) Planet() *World { return c.worlds.Load().planet }

// IsRoot reports whether the planet or a moon lists us.
func (c *Core) IsRoot() bool { return c.worlds.Load().root }

// IsUpstream reports whether a is a root.
func (c *Core) IsUpstream(a identity.Address) bool {
	_, ok := c.worlds.Load().upstreams[a]
	return ok
}

// Upstreams lists the roots, without ourselves.
func (c *Core) Upstreams() []identity.Address {
	set := c.worlds.Load()
	out := make([]identity.Address, 0, len(set.upstreams))
	for a := range set.upstreams {
		out = append(out, a)
	}
	return out
}

// BestUpstream returns the root through which we relay, 0 if none is reachable.
func (c *Core) BestUpstream() identity.Address {
	if p := c.best.Load(); p != nil {
		return p.addr
	}
	return 0
}

// Online reports whether a root was heard from lately, or we are one.
func (c *Core) Online() bool { return c.online.Load() }

// Peer returns the peer with the address, nil if its identity isn't known.
func (c *Core) Peer(a identity.Address) *Peer {
	s := &c.peers[a%peerShards]
	s.mu.RLock()
	p := s.m[a]
	s.mu.RUnlock()
	return p
}

// sender returns the peer with the address, like Peer, but without a lock if the
// worker's previous packet came from it too.
func (c *Core) sender(w *Worker, a identity.Address) *Peer {
	if p := w.last; p != nil && p.addr == a && !p.removed.Load() {
		return p
	}
	p := c.Peer(a)
	w.last = p
	return p
}

// eachPeer calls f for a snapshot of all peers.
func (c *Core) eachPeer(f func(*Peer)) {
	list := make([]*Peer, 0, 16)
	for i := range c.peers {
		s := &c.peers[i]
		if s.n.Load() == 0 {
			continue
		}
		s.mu.RLock()
		list = list[:0]
		for _, p := range s.m {
			list = append(list, p)
		}
		s.mu.RUnlock()
		for _, p := range list {
			f(p)
		}
	}
}

// setWorldsLocked installs planet and moons and derives the upstreams.
func (c *Core) setWorldsLocked(planet *World, moons []*World) {
	set := &worldSet{planet: planet, moons: moons, upstreams: make(map[identity.Address]upstream)}
	add := func(w *World, role Role) {
		for _, r := range w.Roots {
			if r.Identity.Equal(c.id) {
				set.root = true
				continue
			}
			p, err := c.addPeer(r.Identity, 0) // never forgotten
			if err != nil || !p.id.Equal(r.Identity) {
				c.log.Warn("root has an unusable identity", "peer", r.Identity.Address())
				continue
			}
			u := set.upstreams[p.addr]
			u.role = max(u.role, role)
			u.endpoints = append(u.endpoints, r.Endpoints...)
			set.upstreams[p.addr] = u
			if c.roots[p.addr] == nil {
				c.roots[p.addr] = &rootState{}
			}
		}
	}
	add(planet, RolePlanet)
	for _, m := range moons {
		add(m, RoleMoon)
	}
	for a := range c.roots {
		if _, ok := set.upstreams[a]; !ok {
			delete(c.roots, a)
		}
	}
	c.worlds.Store(set)
	if set.root {
		c.online.Store(true)
	}
}

// OfferWorld installs a newer revision of the planet or of a moon that is held, as
// from the operator. It reports false if the signature or the timestamp is wrong.
func (c *Core) OfferWorld(w *World) bool { return c.offer(w) }

// offer considers a world from an upstream (chapter 02 §3.4).
func (c *Core) offer(w *World) bool {
	c.mu.Lock()
	set := c.worlds.Load()
	accepted := false
	if w.IsPlanet() {
		if accepted = w.Replaces(set.planet); accepted {
			c.setWorldsLocked(w, set.moons)
		}
	} else if m := c.moon(w.ID); m != nil && w.Replaces(m) || m == nil && c.awaitedLocked(w) {
		accepted = c.addMoonLocked(w) == nil
	}
	c.mu.Unlock()
	if accepted {
		c.log.Info("accepted a new revision of a world", "moon", w.Moon, "id", w.ID, "timestamp", w.Timestamp)
		if c.cfg.OnWorld != nil {
			c.cfg.OnWorld(w)
		}
	}
	return accepted
}

func (c *Core) role(a identity.Address) Role { return c.worlds.Load().upstreams[a].role }

// Reachable reports whether a packet for a could be sent now, directly or through a
// root.
func (c *Core) Reachable(a identity.Address) bool {
	p := c.Peer(a)
	return p != nil && p.route.Load() != nil
}
