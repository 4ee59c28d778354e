// Package network is the state machine of the networks a node has joined
// (chapter 03): it asks controllers for configurations, exchanges credentials
// with other members, decides which frames pass, and resolves multicasts. It is
// the upper layer of package vl1 and opens no sockets, reads no clock, and starts
// no goroutines.
package network

import (
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/internal/rate"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// Peers is what the layer needs of the peer layer. [*vl1.Core] implements it.
type Peers interface {
	Peer(a identity.Address) *vl1.Peer
	Lookup(w *vl1.Worker, a identity.Address)
	Send(w *vl1.Worker, dst identity.Address, v packet.Verb, payload []byte, opts vl1.SendOpts)
	SendData(w *vl1.Worker, p *vl1.Peer, v packet.Verb, buf []byte) bool
	SendOK(w *vl1.Worker, to *vl1.Peer, src vl1.Source, inRe packet.Verb, id packet.ID, payload []byte)
	SendError(w *vl1.Worker, to *vl1.Peer, src vl1.Source, inRe packet.Verb, id packet.ID, code packet.ErrorCode, payload []byte)
	Upstreams() []identity.Address
	BestUpstream() identity.Address
	IsUpstream(a identity.Address) bool
	IsRoot() bool
	Reachable(a identity.Address) bool
	KeepContact(list []identity.Address) (refused int)
	// Afford begins dear work for a peer; false if the peer may cause no more now.
	Afford(w *vl1.Worker, from *vl1.Peer, k budget.Kind, pieces int) (budget.Work, bool)
	NewWorker() *vl1.Worker
}

// Controller answers configuration requests. It must not block.
type Controller interface {
	HandleRequest(from *identity.Identity, id packet.ID, nwid vl2.NetworkID, metadata []byte)
	// Authorized reports whether a member was sent a configuration lately: such
	// members may register and ask for multicast groups.
	Authorized(nwid vl2.NetworkID, a identity.Address, now time.Time) bool
}

// Config says how a Layer works.
type Config struct {
	Identity   *identity.Identity
	Deliver    func(nwid vl2.NetworkID, frames [][]byte) // frames are valid until it returns
	OnChange   func(nwid vl2.NetworkID, s Snapshot)      // must not join or leave networks
	Controller Controller                                // nil: requests are refused
	Wake       func()                                    // asks for Tick soon; nil = it comes by itself
	Logger     *slog.Logger
	// LowBandwidth asks and announces less often, see [pace].
	LowBandwidth bool
}

// pace is how often the layer speaks by itself.
type pace struct{ check, refresh, announce, gather time.Duration }

// paceOf returns the pace of a network whose credentials agree within delta. In
// low-bandwidth mode the chapter's times (03 §1.3, §5.6) are kept within what works:
// a certificate must stay near those of members who renew theirs every minute, and
// without any announcement others forget our groups.
func (c *Config) paceOf(delta time.Duration) pace {
	p := pace{checkEvery, configRefresh, announceEvery, gatherEvery}
	if c.LowBandwidth {
		p = pace{5 * p.check, max(p.refresh, min(64*p.refresh, delta/4)), groupExpiry / 2, 3 * p.gather}
	}
	return p
}

// Snapshot describes a joined network at one moment.
type Snapshot struct {
	ID      vl2.NetworkID
	MAC     vl2.MAC
	Status  Status
	Config  *vl2.NetworkConfig // nil while there is none; immutable
	Stored  bool               // worth keeping on disk: from a controller, not made up
	SSO     vl2.SSO            // how to log in, of networks that want it
	AuthURL string             // where, to be shown to the user

	LastController time.Time // when the controller spoke last; zero = not since we joined
	Unanswered     int       // requests since then
	Duplicate      time.Time // when another node with our identity was noticed last; zero = not lately
}

// Status is the state of a membership (chapter 03 §1.2).
//
//	requesting --config--> ok --refusal--> denied / not found / authentication
//	      ^------------------ join             |--config--> ok
type Status uint8

const (
	StatusRequesting Status = iota
	StatusOK
	StatusAccessDenied
	StatusNotFound
	StatusPortError
	StatusClientTooOld
	StatusAuthenticationRequired
)

// String returns the word ZeroTier uses.
func (s Status) String() string { return ztnode.Statuses()[s] }

// Limits.
const (
	maxMembers = 10000 // records per network
	maxPending = 1024  // members with credentials in several packets, per network
	maxGreets  = 256   // members to be told our groups, per network
	maxLimited = 8192  // nodes per limiter
)

// Times (chapter 03 §10 unless said otherwise).
const (
	checkEvery       = 5 * time.Second
	configRefresh    = 60 * time.Second
	pushRefresh      = 500 * time.Second
	pushOnRequest    = time.Second
	pushInterval     = 1100 * time.Millisecond // receivers look at one packet a second
	announceEvery    = 60 * time.Second
	announceAgain    = 3 * time.Second // a first announcement may be lost, or overtake our certificate
	announceGap      = 5 * time.Second // between announcements that others cause
	needCertGate     = time.Second
	recordLifetime   = 15 * time.Minute
	requestBackOff   = 60 * time.Second
	requestPatience  = time.Minute // refusals before backing off
	requestFirstWait = 1100 * time.Millisecond
	behindLifetime   = 1200 * time.Second
	memberCheck      = 5 * time.Second
)

// How often one peer's credentials are looked at. The chapter has one packet a second
// (§3.9), with which the reference loses all but the first packet of its own larger
// pushes (§3.10), every time: tags and capabilities that rules ask for never arrive.
// Three at once take in nearly all such pushes, and in the long run it stays at
// one a second, which is what the limit is for: signatures are dear. That a packet ends
// at its fourth bad one makes forgeries cheaper than the chapter's rule alone.
const (
	credentialGate   = time.Second
	credentialBurst  = 3
	maxBadSignatures = 4 // of a packet
)

// Layer holds the joined networks. Its methods are safe for concurrent use.
type Layer struct {
	cfg   Config
	id    *identity.Identity
	self  identity.Address
	log   *slog.Logger
	peers Peers

	nets   atomic.Pointer[map[vl2.NetworkID]*joined]
	groups groupTable
	stats  stats
	start  atomic.Pointer[time.Time] // of the first call: what instants reckon from
	look   atomic.Pointer[time.Time] // of the latest tick: what times that are shown reckon from

	creds   rate.Map[identity.Address] // credentials looked at, per sender
	needs   rate.Map[identity.Address] // certificates asked for, per member
	shows   rate.Map[identity.Address] // credentials shown to those without a record, per asker
	gathers rate.Map[identity.Address] // gathers answered, per asker
	spreads rate.Map[identity.Address] // multicasts replicated, per origin
	diverts rate.Map[identity.Address] // copies and redirections, per source

	contactMu sync.Mutex // held while contacts are collected

	mu        sync.Mutex // guards joining and leaving, and control
	control   *vl1.Worker
	lastHouse time.Time
}

// New makes a layer without networks. SetPeers must be called before anything
// else.
func New(cfg Config) *Layer {
	l := &Layer{cfg: cfg, id: cfg.Identity, self: cfg.Identity.Address(), log: cfg.Logger}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	l.nets.Store(&map[vl2.NetworkID]*joined{})
	l.groups.init(l.cfg.paceOf(0).gather)
	limit := func(m *rate.Map[identity.Address], every time.Duration, burst int) {
		m.Every, m.Burst, m.Max = every, burst, maxLimited
	}
	limit(&l.creds, credentialGate, credentialBurst)
	limit(&l.needs, needCertGate, 1)
	limit(&l.shows, pushOnRequest, 1)
	limit(&l.gathers, 5*time.Millisecond, 400)
	limit(&l.spreads, time.Millisecond, 1000)
	limit(&l.diverts, 50*time.Microsecond, 4096)
	return l
}

// wake asks for Tick soon.
func (l *Layer) wake() {
	if l.cfg.Wake != nil {
		l.cfg.Wake()
	}
}

// SetPeers connects the layer to the peer layer, which needs the layer first.
func (l *Layer) SetPeers(p Peers) {
	l.peers = p
	l.control = p.NewWorker()
}

// instant turns a time into nanoseconds above 0, which a set clock does not move.
func (l *Layer) instant(t time.Time) int64 {
	start := l.start.Load()
	if start == nil {
		first := t // what escapes is this
		l.start.CompareAndSwap(nil, &first)
		start = l.start.Load()
	}
	return int64(t.Sub(*start)) + int64(24*time.Hour)
}

// timeOf is the inverse of instant by the wall clock as it is now; the zero time for 0.
func (l *Layer) timeOf(at int64) time.Time {
	look := l.look.Load()
	if at == 0 || look == nil {
		return time.Time{}
	}
	return look.Add(time.Duration(at - l.instant(*look)))
}

// afford begins dear work for a peer, nil for our own controller.
func (l *Layer) afford(w *vl1.Worker, from *vl1.Peer, pieces int) (budget.Work, bool) {
	if from == nil {
		return budget.Work{}, true
	}
	work, ok := l.peers.Afford(w, from, budget.Signature, pieces)
	if !ok {
		l.stats.budget.Add(1)
	}
	return work, ok
}

func (l *Layer) net(id vl2.NetworkID) *joined { return (*l.nets.Load())[id] }

// Join joins a network; joining twice does nothing. cached is a configuration
// kept from before, or nil.
func (l *Layer) Join(out vl1.Out, now time.Time, id vl2.NetworkID, cached *vl2.NetworkConfig) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := *l.nets.Load()
	if old[id] != nil {
		return nil
	}
	if len(old) >= ztnode.MaxNetworks {
		return ztnode.ErrTooManyNetworks
	}
	n := &joined{l: l, id: id, mac: vl2.MACOf(id, l.self), members: make(map[identity.Address]*member)}
	if cached != nil && cached.Member == l.self {
		n.snap.Store(n.newStateLocked(cached, StatusOK, time.Time{}))
	} else {
		n.snap.Store(n.newStateLocked(nil, StatusRequesting, time.Time{}))
	}
	next := maps.Clone(old)
	next[id] = n
	l.nets.Store(&next)
	l.updateContacts()
	n.tick(l.control.Begin(out, now))
	return nil
}

// Leave leaves a network; nothing is sent.
func (l *Layer) Leave(id vl2.NetworkID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := maps.Clone(*l.nets.Load())
	delete(next, id)
	l.nets.Store(&next)
	l.updateContacts()
}

// Networks describes the joined networks, ordered by ID.
func (l *Layer) Networks() []Snapshot {
	var out []Snapshot
	for _, n := range *l.nets.Load() {
		out = append(out, n.snapshot())
	}
	slices.SortFunc(out, func(a, b Snapshot) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return out
}

// Network describes one joined network.
func (l *Layer) Network(id vl2.NetworkID) (Snapshot, bool) {
	n := l.net(id)
	if n == nil {
		return Snapshot{}, false
	}
	return n.snapshot(), true
}

// SetGroups replaces the host's multicast subscriptions in a network. The groups
// for address resolution of the assigned addresses are always subscribed.
func (l *Layer) SetGroups(id vl2.NetworkID, groups []vl2.MulticastGroup) {
	if n := l.net(id); n != nil {
		n.mu.Lock()
		n.hostGroups = slices.Clone(groups)
		n.groupsChanged = true
		n.mu.Unlock()
	}
}

// Tick does what is due and returns when it wants to be called next.
func (l *Layer) Tick(out vl1.Out, now time.Time) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.control.Begin(out, now)
	l.look.Store(&now)
	next := now.Add(time.Second)
	nets := *l.nets.Load()
	for _, id := range slices.Sorted(maps.Keys(nets)) { // an order that simulations can repeat
		if t := nets[id].tick(w); t.Before(next) {
			next = t
		}
	}
	if l.lastHouse.IsZero() || now.Sub(l.lastHouse) >= 30*time.Second {
		l.lastHouse = now
		l.groups.expire(now)
		for _, x := range []*rate.Map[identity.Address]{&l.creds, &l.needs, &l.gathers, &l.spreads, &l.diverts} {
			x.Expire(now)
		}
		for _, n := range *l.nets.Load() {
			n.expire(now)
		}
	}
	return next
}

// Slept says that the host slept for long: what we have may be outdated, so that all
// networks ask for configurations at once.
func (l *Layer) Slept() {
	for _, n := range *l.nets.Load() {
		n.mu.Lock()
		n.lastRequest = time.Time{}
		n.mu.Unlock()
	}
}

// PeerLearned implements [vl1.Upper]: who says HELLO may have been started anew and
// forgotten our groups.
func (l *Layer) PeerLearned(w *vl1.Worker, p *vl1.Peer) {
	for _, n := range *l.nets.Load() {
		n.inVain(p.Address(), w.Now())
	}
}

// updateContacts tells the peer layer whom the networks want to be kept in contact:
// of every network the first, then the second, and so on.
func (l *Layer) updateContacts() {
	l.contactMu.Lock()
	defer l.contactMu.Unlock()
	var lists [][]identity.Address
	for _, n := range *l.nets.Load() {
		if s := n.snap.Load(); s.open {
			lists = append(lists, s.contacts)
		}
	}
	var all []identity.Address
	for i, more := 0, true; more; i++ {
		more = false
		for _, list := range lists {
			if i < len(list) {
				more = true
				if !slices.Contains(all, list[i]) {
					all = append(all, list[i])
				}
			}
		}
	}
	l.stats.refusedRecords.Add(uint64(l.peers.KeepContact(all)))
}

func (l *Layer) changed(n *joined) {
	l.updateContacts()
	if l.cfg.OnChange != nil {
		l.cfg.OnChange(n.id, n.snapshot())
	}
}

// HandlePacket implements [vl1.Upper].
func (l *Layer) HandlePacket(w *vl1.Worker, from *vl1.Peer, p packet.Packet, src vl1.Source) vl1.Result {
	b := p.Payload()
	switch p.Verb() {
	case packet.VerbFrame:
		return l.receiveFrame(w, from, p, src)
	case packet.VerbExtFrame:
		return l.receiveExtFrame(w, from, p, src)
	case packet.VerbMulticastFrame:
		return l.receiveMulticast(w, from, p, src)
	case packet.VerbMulticastLike:
		return l.receiveLike(w, from, p, src)
	case packet.VerbMulticastGather:
		return l.receiveGather(w, from, p, src)
	case packet.VerbNetworkCredentials:
		return l.receiveCredentials(w, from, b, src)
	case packet.VerbNetworkConfigRequest:
		return l.receiveConfigRequest(w, from, p, src)
	case packet.VerbNetworkConfig:
		return l.receiveConfig(w, from, p, src, b, false)
	case packet.VerbOK:
		return l.receiveOK(w, from, p, src)
	case packet.VerbError:
		return l.receiveError(w, from, p, src)
	}
	return vl1.Result{}
}
