package vl1

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// Peer is another node whose identity is known.
type Peer struct {
	id   *identity.Identity
	addr identity.Address
	keys *packet.Keys

	removed        atomic.Bool
	stored         atomic.Bool   // in the cache already
	version        atomic.Uint64 // packed; 0 = unknown
	route          atomic.Pointer[route]
	lastPath       atomic.Pointer[path] // on which the last direct packet came
	lastReceive    atomic.Int64
	lastNontrivial atomic.Int64
	lastData       atomic.Int64 // sent
	lastTrust      atomic.Int64
	lastRelayed    atomic.Int64
	lastAsked      atomic.Int64 // by us, for something that it answers
	nextPush       atomic.Int64
	nextDoubt      atomic.Int64

	// Guarded by Core.mu.
	paths         []*path
	lastFullHello int64
	lastWhois     int64
	echoes        rate.Bucket // answered
	lastRedirect  int64
	lastTry       int64
	owed          *owedWorlds
	owedEcho      owedEcho
	lastWorlds    int64
	whoisBytes    rate.Bucket // that may be asked for
	pushes        rate.Bucket
	pushed        []netip.AddrPort // told by the peer, to be probed once it is trusted
	confirms      rate.Bucket
	sealed        rate.Bucket // HELLOs opened that came on its paths
	envelope      *packet.Envelope
	envelopeMade  int64
	unanswered    unanswered
	confirmed     map[netip.AddrPort]int64 // endpoints probed lately
}

// A path is one way to reach a peer directly. It is in the peer's list from the
// moment an answer to a probe arrived on it.
//
//	new --answer to a probe--> alive --sent to, 3 s silence--> suspect --3 s of probes--> dead
//	                             ^------------- any packet --------------'                 |
//	                             ^------------- any packet --------------------------------+--243 s--> removed
//
// Only an alive or suspect path is used while there is another way.
type path struct {
	sock     SocketID
	ep       netip.AddrPort
	scope    packet.Scope
	patience time.Duration // silence that is too long
	lastIn   atomic.Int64
	lastOut  atomic.Int64
	latency  atomic.Int64 // ns, 0 = unknown
	dead     atomic.Bool  // probes stay unanswered
	size     datagramSize

	// Guarded by Core.mu.
	probed  int64 // last probe
	suspect int64 // first probe since the last sign of life, 0 = none
}

// noteProbeLocked remembers that a probe was sent.
func (pa *path) noteProbeLocked(t int64) {
	pa.probed = t
	touch(&pa.lastOut, t)
	if pa.suspect == 0 {
		pa.suspect = t
	}
}

// checkLocked brings the state up to date and reports whether a probe is due. A path of a
// peer that isn't active is not doubted without cause.
func (pa *path) checkLocked(t int64, active bool) (probe bool) {
	in, out := pa.lastIn.Load(), pa.lastOut.Load()
	if pa.suspect != 0 && in >= pa.suspect {
		pa.suspect = 0
		pa.dead.Store(false)
	}
	switch {
	case pa.suspect == 0:
		return active && (since(t, in) >= pa.patience-pathProbeBefore || out > in && since(t, in) >= pathSuspectAfter)
	case pa.dead.Load():
		return active && since(t, pa.probed) >= pathDeadProbe
	}
	pa.dead.Store(since(t, pa.suspect) >= pathDeadAfter)
	return since(t, pa.probed) >= pathProbeEvery
}

// aliveLocked notes a packet that came on the path.
func (pa *path) aliveLocked(t int64) {
	pa.lastIn.Store(t)
	pa.suspect = 0
	pa.dead.Store(false)
}

// route is where packets for a peer go right now. It is immutable.
type route struct {
	path  *path
	relay bool // the path is a root's
}

// way is where a packet goes.
type way struct {
	sock  SocketID
	ep    netip.AddrPort
	size  int  // of the largest datagram
	relay bool // a root is to pass it on
}

func (r *route) way() way {
	return way{sock: r.path.sock, ep: r.path.ep, size: r.path.size.get(), relay: r.relay}
}

// Address returns the peer's address.
func (p *Peer) Address() identity.Address { return p.addr }

// Identity returns the peer's public identity.
func (p *Peer) Identity() *identity.Identity { return p.id }

// ProtocolVersion returns what the peer announced, 0 if nothing yet.
func (p *Peer) ProtocolVersion() int { return int(p.version.Load() >> 32 & 0xff) }

func packVersion(v version) uint64 {
	return uint64(v.protocol)<<32 | uint64(v.major)<<24 | uint64(v.minor)<<16 | uint64(v.revision)
}

// suite is what we send the peer (chapter 01 §5.1).
func (p *Peer) suite() packet.Suite {
	if p.ProtocolVersion() >= packet.AESProtocolVersion {
		return packet.SuiteAES
	}
	return packet.SuiteSalsa
}

// Trusted reports whether the peer proved membership in a common network lately.
func (p *Peer) trusted(t int64) bool {
	l := p.lastTrust.Load()
	return l != 0 && since(t, l) < trustLifetime
}

// addPeer returns the peer with the identity, creating it if its address isn't
// known yet; its lifetime begins at t. The caller has checked the identity.
func (c *Core) addPeer(id *identity.Identity, t int64) (*Peer, error) {
	if p := c.Peer(id.Address()); p != nil {
		return p, nil
	}
	session, err := c.id.Agree(id)
	if err != nil {
		return nil, err
	}
	fresh := &Peer{id: id.Public(), addr: id.Address(), keys: packet.NewKeys(session), confirmed: make(map[netip.AddrPort]int64)}
	fresh.lastReceive.Store(t)
	s := &c.peers[fresh.addr%peerShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.m[fresh.addr]; p != nil {
		return p, nil
	}
	s.m[fresh.addr] = fresh
	s.n.Add(1)
	c.count.Add(1)
	return fresh, nil
}

func (c *Core) removePeer(p *Peer) {
	s := &c.peers[p.addr%peerShards]
	s.mu.Lock()
	if s.m[p.addr] == p {
		delete(s.m, p.addr)
		s.n.Add(-1)
		c.count.Add(-1)
	}
	s.mu.Unlock()
	p.removed.Store(true)
}

// allowed is the path admission test (chapter 02 §4.3).
func (c *Core) allowed(p *Peer, ep netip.AddrPort) bool {
	a := ep.Addr()
	switch packet.ScopeOf(a) {
	case packet.ScopePrivate, packet.ScopePseudoPrivate, packet.ScopeShared, packet.ScopeGlobal:
	case packet.ScopeLoopback:
		if !c.cfg.Loopback {
			return false
		}
	default:
		return false
	}
	if ep.Port() == 0 || a.Is6() && tunnelBroker.Contains(a) {
		return false
	}
	if u, ok := c.worlds.Load().upstreams[p.addr]; ok && len(u.endpoints) > 0 {
		if !slices.ContainsFunc(u.endpoints, func(e netip.AddrPort) bool { return e.Addr() == a }) {
			return false
		}
	}
	return !c.blacklisted(p, a) && (c.cfg.PathAllowed == nil || c.cfg.PathAllowed(a))
}

var tunnelBroker = netip.MustParsePrefix("2001:470::/32")

// qualityLocked is smaller for a better path (chapter 02 §4.5).
func (pa *path) qualityLocked(t int64) int64 {
	l := time.Duration(pa.latency.Load())
	if l == 0 {
		l = unknownLatency
	}
	switch {
	case pa.silent(t):
		l += unknownLatency + min(since(t, pa.lastIn.Load()), 140*time.Second)
	case pa.doubtedLocked(t):
		l += unknownLatency / 2
	}
	return int64(l/time.Microsecond) * int64(8-pa.scope)
}

// doubtedLocked reports a path with a probe that should have been answered by now.
func (pa *path) doubtedLocked(t int64) bool {
	return pa.suspect != 0 && since(t, pa.suspect) >= pathProbeEvery
}

func (pa *path) silent(t int64) bool {
	return pa.dead.Load() || since(t, pa.lastIn.Load()) >= pa.patience
}
func (pa *path) expired(t int64) bool { return since(t, pa.lastIn.Load()) >= pathExpiry }

// bestPathLocked returns the best path that isn't expired. The one in use stays while
// no other is clearly better, so that packets are not reordered for nothing.
func (p *Peer) bestPathLocked(t int64) (best *path) {
	var used *path
	if r := p.route.Load(); r != nil && !r.relay {
		used = r.path
	}
	var bestScore int64
	for _, pa := range p.paths {
		if pa.expired(t) {
			continue
		}
		score := pa.qualityLocked(t)
		if pa == used {
			score -= score / 4
		}
		if best == nil || score < bestScore {
			best, bestScore = pa, score
		}
	}
	return best
}

// updateRouteLocked decides anew where packets for p go: a direct path that is heard,
// else the best root, else a silent direct path (chapter 02 §4.5, §4.8). Of a peer that
// itself sends by a root, one missing answer is enough.
func (c *Core) updateRouteLocked(p *Peer, t int64) {
	direct := p.bestPathLocked(t)
	heard := direct != nil && !direct.silent(t)
	if l := p.lastRelayed.Load(); heard && l != 0 && direct.doubtedLocked(t) && since(t, l) < 2*doubtEvery {
		heard = false
	}
	var want route
	switch relay := c.best.Load(); {
	case direct != nil && (heard || c.IsUpstream(p.addr)):
		want = route{path: direct}
	case relay != nil && relay != p && relay.directPath() != nil:
		want = route{path: relay.directPath(), relay: true}
	case direct != nil:
		want = route{path: direct}
	}
	cur := p.route.Load()
	if want.relay && cur != nil && !cur.relay {
		p.nextPush.Store(0) // tell the peer at once where else we may be reached
	}
	switch {
	case want.path == nil:
		if cur != nil {
			p.route.Store(nil)
		}
	case cur == nil || *cur != want:
		p.route.Store(&want)
	}
}

// directPath returns the path of a root's own direct route.
func (p *Peer) directPath() *path {
	if r := p.route.Load(); r != nil && !r.relay {
		return r.path
	}
	return nil
}

// updateBestLocked chooses the root to relay through and whether we are online.
func (c *Core) updateBestLocked(t int64) {
	var best *Peer
	var bestScore int64
	heard := false
	for a := range c.worlds.Load().upstreams {
		p := c.Peer(a)
		if p == nil {
			continue
		}
		last := p.lastReceive.Load()
		if last != 0 && since(t, last) < onlineWindow {
			heard = true
		}
		c.updateRouteLocked(p, t)
		pa := p.bestPathLocked(t)
		if pa == nil {
			continue
		}
		score := pa.qualityLocked(t)
		if p == c.best.Load() {
			score -= score / 4 // stays while no other is clearly better
		}
		if best == nil || score < bestScore || score == bestScore && a > best.addr {
			best, bestScore = p, score
		}
	}
	c.best.Store(best)
	c.online.Store(heard || c.IsRoot())
}

// learnPathLocked adds or refreshes a confirmed path.
func (c *Core) learnPathLocked(p *Peer, sock SocketID, ep netip.AddrPort, t int64) *path {
	for _, pa := range p.paths {
		if pa.sock == sock && pa.ep == ep {
			pa.aliveLocked(t)
			return pa
		}
	}
	pa := &path{sock: sock, ep: ep, scope: packet.ScopeOf(ep.Addr()), patience: pathSilent}
	if c.cfg.LowBandwidth {
		pa.patience = pathSilentLow
	}
	pa.size.begin(c.mtu(ep.Addr()))
	pa.aliveLocked(t)
	if i := slices.IndexFunc(p.paths, func(o *path) bool {
		return o.sock == sock && o.ep.Addr() == ep.Addr() && o.silent(t)
	}); i >= 0 {
		p.paths[i] = pa // a silent path to another port of the same host
	} else if len(p.paths) < maxPaths {
		p.paths = append(p.paths, pa)
	} else {
		oldest := 0
		for i, o := range p.paths {
			if o.lastIn.Load() < p.paths[oldest].lastIn.Load() {
				oldest = i
			}
		}
		p.paths[oldest] = pa
	}
	p.forgetLastLocked()
	c.log.Debug("learned path", "peer", p.addr, "endpoint", ep)
	return pa
}

// DirectLatency returns the latency of the direct path in use; false without one
// or while it is unknown.
func (p *Peer) DirectLatency() (time.Duration, bool) {
	r := p.route.Load()
	if r == nil || r.relay {
		return 0, false
	}
	l := time.Duration(r.path.latency.Load())
	return l, l > 0
}

// NewPeer makes a peer that belongs to no [Core]: for tests of the layer above.
func NewPeer(id *identity.Identity) *Peer { return &Peer{id: id.Public(), addr: id.Address()} }

// forgetLastLocked forgets the path on which the last packet came if it was removed.
func (p *Peer) forgetLastLocked() {
	if pa := p.lastPath.Load(); pa != nil && !slices.Contains(p.paths, pa) {
		p.lastPath.Store(nil)
	}
}
