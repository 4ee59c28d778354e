package vl1

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/packet"
)

// Reject is the reason why a datagram or packet was refused.
type Reject uint8

const (
	RejectShort Reject = iota
	RejectOwnAddress
	RejectFragment
	RejectMAC
	RejectSuite
	RejectCompression
	RejectMalformed
	RejectVersion
	RejectIdentity
	RejectCollision
	RejectRate
	RejectUnexpectedReply
	RejectNotUpstream
	RejectUnknownSender
	RejectNotRelayed
	RejectHops
	RejectQueueFull
	RejectTooLong
	RejectPeerLimit
	RejectRelayRate
	RejectBudget
	RejectUnproven
	RejectReplay
	RejectSealed
	RejectSealedRate
	numRejects
)

var rejectNames = [numRejects]string{
	"short", "own_address", "fragment", "mac", "suite", "compression", "malformed", "version", "identity",
	"collision", "rate", "unexpected_reply", "not_upstream", "unknown_sender", "not_relayed", "hops", "queue_full", "too_long", "peer_limit", "relay_rate",
	"budget", "unproven", "replay", "sealed_hello", "sealed_hello_rate",
}

// String returns the label used in metrics.
func (r Reject) String() string { return rejectNames[r] }

// Rejects lists all reasons.
func Rejects() []Reject {
	out := make([]Reject, numRejects)
	for i := range out {
		out[i] = Reject(i)
	}
	return out
}

const numSuites = 4

// workerStats are counters that only the worker's goroutine adds to.
type workerStats struct {
	rxPackets, rxBytes, txPackets   atomic.Uint64
	sealed, opened                  [numSuites]carried
	fragmentsIn, fragmentsOut       atomic.Uint64
	sealedHellosIn, sealedHellosOut atomic.Uint64
	rejects                         [numRejects]atomic.Uint64

	_ [64]byte // keeps another worker's counters off the cache line
}

// carried are bytes of packets by the way that they take or took.
type carried struct{ direct, relayed atomic.Uint64 }

func (c *carried) add(relay bool, n int) {
	if relay {
		c.relayed.Add(uint64(n))
	} else {
		c.direct.Add(uint64(n))
	}
}

func (sum *carried) addAll(c *carried) {
	sum.direct.Add(c.direct.Load())
	sum.relayed.Add(c.relayed.Load())
}

// add adds the counters of st.
func (sum *workerStats) add(st *workerStats) {
	sum.rxPackets.Add(st.rxPackets.Load())
	sum.rxBytes.Add(st.rxBytes.Load())
	sum.txPackets.Add(st.txPackets.Load())
	sum.fragmentsIn.Add(st.fragmentsIn.Load())
	sum.fragmentsOut.Add(st.fragmentsOut.Load())
	sum.sealedHellosIn.Add(st.sealedHellosIn.Load())
	sum.sealedHellosOut.Add(st.sealedHellosOut.Load())
	for i := range sum.sealed {
		sum.sealed[i].addAll(&st.sealed[i])
		sum.opened[i].addAll(&st.opened[i])
	}
	for i := range sum.rejects {
		sum.rejects[i].Add(st.rejects[i].Load())
	}
}

type coreStats struct {
	relayed    atomic.Uint64
	blackHoles atomic.Uint64
}

// Stats is a snapshot of counters.
type Stats struct {
	RxDatagrams, RxBytes, TxPackets, TxBytes                   uint64
	SealedBytes, OpenedBytes                                   [numSuites]uint64 // by suite
	FragmentsIn, FragmentsOut                                  uint64
	SealedHellosIn, SealedHellosOut                            uint64
	Reassembled, FragmentsExpired, FragmentsDisplaced, TooLong uint64
	Rejected                                                   [numRejects]uint64
	Relayed                                                    uint64
	BlackHoles                                                 uint64    // found on paths, for large datagrams
	DirectBytes, RelayBytes                                    [2]uint64 // of encrypted packets for us and from us, received and sent, by the way
	OutQueue, HeldQueue, RetryQueue                            int
	OutQueueLimit, HeldQueueLimit, RetryQueueLimit             int
	Peers                                                      int
	Tables                                                     []TableStats
}

// TableStats says how full a bounded table is.
type TableStats struct {
	Name       string // label used in metrics
	Len, Limit int
}

// tablesLocked lists the bounded tables.
func (c *Core) tablesLocked() []TableStats {
	return []TableStats{
		{"out_queue", len(c.queue.list), maxOutQueue},
		{"held_queue", len(c.held.list), maxHeld},
		{"retry_queue", len(c.retries.list), maxRetry},
		{"expected_replies", len(c.replies.m), maxExpected},
		{"configuration_requests", len(c.requests.m), maxRequests},
		{"pending_whois", len(c.whois.m), maxWhois},
		{"rendezvous_hints", len(c.hints.m), maxHints},
		{"introductions", len(c.intros.m), maxIntroductions},
		{"surface", len(c.surface.m), maxSurface},
		{"recalled_peers", len(c.recalled), maxRecalled},
		{"moons", len(c.worlds.Load().moons), maxMoons},
		{"awaited_moons", len(c.waiting), maxMoons},
		{"contacts", len(c.contacts), maxContacts},
		{"peers", int(c.count.Load()), maxPeers},
	}
}

// RejectedBy returns how many packets were refused for a reason.
func (s Stats) RejectedBy(r Reject) uint64 { return s.Rejected[r] }

// Stats sums the counters of all workers.
func (c *Core) Stats() (s Stats) {
	c.mu.Lock()
	var sum workerStats
	sum.add(&c.retired)
	for _, st := range c.workers {
		sum.add(st)
	}
	s.OutQueue, s.HeldQueue, s.RetryQueue = len(c.queue.list), len(c.held.list), len(c.retries.list)
	s.Tables = c.tablesLocked()
	c.mu.Unlock()
	s.OutQueueLimit, s.HeldQueueLimit, s.RetryQueueLimit = maxOutQueue, maxHeld, maxRetry
	s.RxDatagrams, s.RxBytes = sum.rxPackets.Load(), sum.rxBytes.Load()
	s.TxPackets = sum.txPackets.Load()
	s.SealedHellosIn, s.SealedHellosOut = sum.sealedHellosIn.Load(), sum.sealedHellosOut.Load()
	s.FragmentsIn, s.FragmentsOut = sum.fragmentsIn.Load(), sum.fragmentsOut.Load()
	s.OpenedBytes, s.DirectBytes[0], s.RelayBytes[0] = bytesOf(&sum.opened)
	s.SealedBytes, s.DirectBytes[1], s.RelayBytes[1] = bytesOf(&sum.sealed)
	for _, n := range s.SealedBytes {
		s.TxBytes += n
	}
	for i := range s.Rejected {
		s.Rejected[i] = sum.rejects[i].Load()
	}
	s.Reassembled, s.FragmentsExpired = c.frags.Completed.Load(), c.frags.Expired.Load()
	s.FragmentsDisplaced, s.TooLong = c.frags.Displaced.Load(), c.frags.TooLong.Load()
	s.Relayed, s.BlackHoles = c.stats.relayed.Load(), c.stats.blackHoles.Load()
	s.Peers = int(c.count.Load())
	return s
}

// bytesOf returns what was carried with each suite, and of what is encrypted how much
// directly and by relays.
func bytesOf(suites *[numSuites]carried) (all [numSuites]uint64, direct, relayed uint64) {
	for i := range suites {
		d, r := suites[i].direct.Load(), suites[i].relayed.Load()
		all[i] = d + r
		if packet.Suite(i) != packet.SuitePoly1305 {
			direct += d
			relayed += r
		}
	}
	return all, direct, relayed
}

// PeerInfo describes a peer.
type PeerInfo struct {
	Address         identity.Address
	Role            Role
	ProtocolVersion int    // 0 = unknown
	Version         [3]int // software, meaningless without ProtocolVersion
	Suite           packet.Suite
	Latency         time.Duration // of the preferred path, < 0 = unknown
	Relayed         bool
	LastReceive     time.Time
	LastRelayed     time.Time // received through a root
	Paths           []PathInfo
}

// PathInfo describes a path.
type PathInfo struct {
	Endpoint              netip.AddrPort
	Preferred, Expired    bool
	LastSend, LastReceive time.Time
	Latency               time.Duration // < 0 = unknown
	MTU                   int           // largest datagram that is known to arrive, 0 = unknown
}

// Peers describes all peers, ordered by address.
func (c *Core) Peers() []PeerInfo {
	var out []PeerInfo
	c.mu.Lock()
	defer c.mu.Unlock()
	c.eachPeer(func(p *Peer) { out = append(out, c.peerInfoLocked(p)) })
	slices.SortFunc(out, func(a, b PeerInfo) int { return int(int64(a.Address) - int64(b.Address)) })
	return out
}

func (c *Core) peerInfoLocked(p *Peer) PeerInfo {
	v := p.version.Load()
	info := PeerInfo{
		Address: p.addr, Role: c.role(p.addr), ProtocolVersion: p.ProtocolVersion(),
		Version: [3]int{int(v >> 24 & 0xff), int(v >> 16 & 0xff), int(v & 0xffff)},
		Suite:   p.suite(), Latency: -1, LastReceive: c.timeOf(p.lastReceive.Load()), LastRelayed: c.timeOf(p.lastRelayed.Load()),
	}
	r := p.route.Load()
	info.Relayed = r == nil || r.relay
	for _, pa := range p.paths {
		pi := PathInfo{
			Endpoint: pa.ep, Preferred: r != nil && r.path == pa,
			LastSend: c.timeOf(pa.lastOut.Load()), LastReceive: c.timeOf(pa.lastIn.Load()), Latency: -1,
		}
		pi.Expired = pi.LastReceive.IsZero()
		if l := pa.latency.Load(); l > 0 {
			pi.Latency = time.Duration(l)
		}
		pi.MTU = int(pa.size.known.Load())
		if pi.Preferred {
			info.Latency = pi.Latency
		}
		info.Paths = append(info.Paths, pi)
	}
	return info
}

// Surface lists the own external addresses as roots and trusted peers report
// them.
func (c *Core) Surface() []netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.surface.list()
}
