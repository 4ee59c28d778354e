// Package controller is a small network controller (chapter 04): it decides who is
// a member of a network, issues signed configurations and certificates, assigns
// addresses, and revokes memberships. Records are files in the reference's format.
//
// Packets come in by [Controller.HandleRequest] and go out by Config.Send; the
// administrator uses the methods for networks and members. [Controller.Run] owns the
// only goroutine.
package controller

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"ztgate/internal/disk"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
	"ztgate/zerotier/vl2"
	"ztgate/zerotier/ztnode"
)

// Errors of the administrator's methods.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists already")
	ErrInvalid  = errors.New("invalid")
)

// Bounds and intervals (chapter 04 §2, §10, §13).
const (
	requestInterval     = 1000 * time.Millisecond // between requests of one member
	onlineFor           = 120 * time.Second       // after a member's last request, or what was pushed to it
	authorizedFor       = 180 * time.Second       // after a configuration was sent
	sweepInterval       = 30 * time.Second
	credentialsInterval = 1100 * time.Millisecond // receivers look at one packet per 1000 ms
	pushInterval        = 100 * time.Millisecond
	pushBatch           = 32

	maxQueue         = 1024 // requests
	maxGates         = 65536
	unknownGates     = 15 // mask: requests per second and node for networks there aren't
	maxUnauthorized  = 1000
	maxMembers       = 65536 // records that requests may cause, per network
	maxRevocations   = 1000  // kept per network
	maxOutbox        = 512   // revocations waiting for one node
	maxPerPacket     = 62    // revocations of 152 bytes
	timestampReserve = 60000 // ms; a restart goes on so far ahead of the clock at most
)

// Config says how a Controller works.
type Config struct {
	Identity *identity.Identity // with secret
	Dir      string             // of the records; created if missing
	Disk     disk.FS            // of Dir; nil = the machine's

	// Send sends or queues one packet. It may be called with our own address as dst.
	// It is called without locks, by one goroutine at a time.
	Send func(dst identity.Address, v packet.Verb, payload []byte, compress bool)

	// PacketLimit returns the size of the largest packet that reaches a node; nil = any size
	// does.
	PacketLimit func(dst identity.Address) int

	// OnMember takes the news of members. False means that it couldn't: then the same is
	// told again when the node asks again. It must neither block nor call the controller.
	// Nil = nobody wants to know.
	OnMember func(ztnode.MemberEvent) bool

	Logger *slog.Logger     // nil = none
	Now    func() time.Time // nil = time.Now
}

// Controller serves the networks whose ID starts with its address. All methods may
// be called by several goroutines.
type Controller struct {
	cfg   Config
	self  identity.Address
	store store
	log   *slog.Logger
	now   func() time.Time
	wake  chan struct{}
	stats counters

	known atomic.Pointer[map[vl2.NetworkID]bool] // IDs of networks

	// gate is for packet workers: never held during I/O.
	gate    sync.RWMutex
	queue   []request
	asked   map[memberKey]time.Time // last request let through
	granted map[memberKey]time.Time // last configuration sent

	working sync.Mutex // one work at a time

	mu        sync.Mutex // held while records are written
	networks  map[vl2.NetworkID]*network
	broken    map[vl2.NetworkID]bool // record can't be read: left alone
	pushes    []memberKey
	lastPush  time.Time
	outboxes  map[identity.Address]*outbox
	lastSweep time.Time
	lastWork  time.Time
	out       []message
}

type memberKey struct {
	network vl2.NetworkID
	address identity.Address
}

// network is a network and what belongs to it.
type network struct {
	rec         Network
	members     map[identity.Address]*member
	broken      map[identity.Address]bool // record can't be read: left alone
	taken       map[netip.Addr]int        // how many records list an address
	strangers   int                       // unauthorised records
	last        int64                     // time stamp given out
	reserved    int64                     // on disk: none above was given out
	revocations []*vl2.Revocation         // ascending threshold
	warned      time.Time                 // of time stamps that run ahead
}

// member is a member record and what is known of the node, if it is online.
type member struct {
	rec      Member
	session  *session
	queued   bool      // for a push
	mismatch time.Time // last warning about another identity
}

// session is what a node's requests told; it lives while the node is online.
type session struct {
	identity *identity.Identity
	metadata []byte
	last     time.Time // request
	sent     time.Time // configuration
	served   bool      // got a configuration
	told     told
}

// online reports whether changes are pushed to the node. A reference node puts its next
// request off for each configuration that is pushed to it.
func (s *session) online(now time.Time) bool {
	return s != nil && (now.Sub(s.last) < onlineFor || now.Sub(s.sent) < onlineFor)
}

type request struct {
	from     *identity.Identity
	id       packet.ID
	network  vl2.NetworkID
	metadata []byte
}

type message struct {
	to       identity.Address
	verb     packet.Verb
	payload  []byte
	compress bool
}

// New loads the records in cfg.Dir. Records that can't be read are reported to the
// log and left alone; their networks or members are not served.
func New(cfg Config) (*Controller, error) {
	if cfg.Identity == nil || !cfg.Identity.HasSecret() {
		return nil, errors.New("start controller: the identity has no secret")
	}
	c := &Controller{
		cfg: cfg, self: cfg.Identity.Address(), store: store{disk.Or(cfg.Disk), cfg.Dir}, log: cfg.Logger, now: cfg.Now,
		wake:  make(chan struct{}, 1),
		asked: map[memberKey]time.Time{}, granted: map[memberKey]time.Time{},
		networks: map[vl2.NetworkID]*network{}, broken: map[vl2.NetworkID]bool{},
		outboxes: map[identity.Address]*outbox{},
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		c.now = time.Now
	}
	if err := c.load(); err != nil {
		return nil, err
	}
	c.publish()
	return c, nil
}

// Run answers requests and pushes changes until ctx ends, which is not an error.
func (c *Controller) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-timer.C:
		}
		now := c.now()
		timer.Reset(max(c.Work(now).Sub(now), time.Millisecond))
	}
}

// HandleRequest takes a NETWORK_CONFIG_REQUEST of an authenticated node. It does not
// block. id is the packet ID as received; metadata is copied.
func (c *Controller) HandleRequest(from *identity.Identity, id packet.ID, nwid vl2.NetworkID, metadata []byte) {
	if nwid.Controller() != c.self {
		return
	}
	c.stats.requests.Add(1)
	key := memberKey{nwid, from.Address()}
	if !(*c.known.Load())[nwid] {
		key.network &= unknownGates // else one node could ask for 2^24 networks
	}
	now := c.now()
	c.gate.Lock()
	defer c.gate.Unlock()
	last, ok := c.asked[key]
	if d := now.Sub(last); ok && d >= 0 && d <= requestInterval {
		c.stats.tooSoon.Add(1)
		return
	}
	if len(c.queue) >= maxQueue || !ok && len(c.asked) >= maxGates {
		c.stats.overflow.Add(1)
		return
	}
	c.asked[key] = now
	metadata = slices.Clone(metadata[:min(len(metadata), vl2.MaxMetadata)])
	c.queue = append(c.queue, request{from, id, nwid, metadata})
	c.kick()
}

// Authorized reports whether a member was sent a configuration within the last
// 180 s: it may then use us as multicast registry (chapter 04 §1).
func (c *Controller) Authorized(nwid vl2.NetworkID, a identity.Address, now time.Time) bool {
	c.gate.RLock()
	defer c.gate.RUnlock()
	t, ok := c.granted[memberKey{nwid, a}]
	return ok && now.Sub(t) <= authorizedFor
}

func (c *Controller) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// publish tells HandleRequest which networks there are.
func (c *Controller) publish() {
	known := make(map[vl2.NetworkID]bool, len(c.networks))
	for id := range c.networks {
		known[id] = true
	}
	c.known.Store(&known)
}

// Work does everything that is due and returns when to be called again. Run does it
// at those times; without Run somebody else must.
func (c *Controller) Work(now time.Time) (next time.Time) {
	c.working.Lock()
	defer c.working.Unlock()
	c.gate.Lock()
	queue := c.queue
	c.queue = nil
	c.gate.Unlock()
	for _, r := range queue { // one at a time, so that the administrator isn't kept waiting
		c.mu.Lock()
		c.answer(r, now)
		c.unlockAndSend()
	}
	c.mu.Lock()
	c.watchClock(now)
	next = now.Add(sweepInterval)
	if t := c.push(now); t.Before(next) {
		next = t
	}
	if t := c.flush(now); t.Before(next) {
		next = t
	}
	if now.Sub(c.lastSweep) >= sweepInterval {
		c.lastSweep = now
		c.sweep(now)
	}
	c.unlockAndSend()
	return next
}

// unlockAndSend sends what was decided under the lock.
func (c *Controller) unlockAndSend() {
	out := c.out
	c.out = nil
	c.mu.Unlock()
	for _, m := range out {
		c.cfg.Send(m.to, m.verb, m.payload, m.compress)
	}
}

// watchClock notices jumps of the wall clock: members served before and after one
// can't talk to each other until both have renewed (chapter 04 §4).
func (c *Controller) watchClock(now time.Time) {
	if !c.lastWork.IsZero() {
		wall := time.Duration(now.UnixMilli()-c.lastWork.UnixMilli()) * time.Millisecond
		if jump := wall - now.Sub(c.lastWork); jump.Abs() > minTimeDelta/4*time.Millisecond {
			c.log.Warn("the clock jumped: all members get new certificates", "by", jump)
			for _, id := range slices.Sorted(maps.Keys(c.networks)) {
				c.changedAll(c.networks[id], now)
			}
		}
	}
	c.lastWork = now
}

// sweep forgets what is too old to matter.
func (c *Controller) sweep(now time.Time) {
	for _, n := range c.networks {
		for _, m := range n.members {
			if !m.session.online(now) {
				m.session = nil
			}
		}
		n.expireRevocations(now)
	}
	c.gate.Lock()
	defer c.gate.Unlock()
	maps.DeleteFunc(c.asked, func(_ memberKey, t time.Time) bool { return now.Sub(t) > requestInterval })
	maps.DeleteFunc(c.granted, func(_ memberKey, t time.Time) bool { return now.Sub(t) > authorizedFor })
}

// timestamp returns the next time stamp of a network, greater than all before, also
// those before a restart (chapter 04 §4).
func (c *Controller) timestamp(n *network, now time.Time) (int64, error) {
	ts := max(now.UnixMilli(), n.last+1)
	if ts > n.reserved {
		old := n.reserved
		n.reserved = ts + timestampReserve
		if err := c.writeState(n); err != nil {
			n.reserved = old
			return 0, err
		}
	}
	n.last = ts
	ahead := time.Duration(ts-now.UnixMilli()) * time.Millisecond
	if ahead > minTimeDelta/4*time.Millisecond && (n.warned.IsZero() || now.Sub(n.warned) > time.Hour) {
		n.warned = now
		c.log.Warn("the clock is behind the time stamps already given out", "network", n.rec.ID, "by", ahead)
	}
	return ts, nil
}

func randomUint64() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return binary.BigEndian.Uint64(b[:])
}

func wrap(err error, kind error) error { return fmt.Errorf("%w: %w", kind, err) }
