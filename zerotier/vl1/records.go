package vl1

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/budget"
	"ztgate/zerotier/internal/wire"
	"ztgate/zerotier/packet"
)

// PeerRecord is what the peer cache in the directory peers.d of a home keeps of a
// peer (chapter 02 §4.11).
type PeerRecord struct {
	Identity        *identity.Identity
	ProtocolVersion int
	Version         [3]int // software
	Endpoints       []netip.AddrPort
}

// PeerRecordLifetime is how old a file of the cache may be.
const PeerRecordLifetime = 30 * 24 * time.Hour

const (
	peerRecordType = 2
	peerSuffix     = ".peer"
)

// ErrPeerRecord is wrapped by the errors of [ParsePeerRecord].
var ErrPeerRecord = errors.New("malformed peer record")

// Append appends the binary form, as on disk.
func (r *PeerRecord) Append(b []byte) []byte {
	b = r.Identity.Public().AppendBinary(append(b, peerRecordType))
	for _, v := range [...]int{r.ProtocolVersion, r.Version[0], r.Version[1], r.Version[2], len(r.Endpoints)} {
		b = binary.BigEndian.AppendUint16(b, uint16(v))
	}
	for _, ep := range r.Endpoints {
		b = packet.AppendEndpoint(b, ep)
	}
	return b
}

// ParsePeerRecord reads a file of the peer cache.
func ParsePeerRecord(b []byte) (*PeerRecord, error) {
	r := reader{Reader: wire.Reader{Buf: b}}
	if r.U8() != peerRecordType {
		return nil, fmt.Errorf("%w: unknown type", ErrPeerRecord)
	}
	rec := &PeerRecord{Identity: r.identity()}
	rec.ProtocolVersion = int(r.U16())
	for i := range rec.Version {
		rec.Version[i] = int(r.U16())
	}
	for range min(int(r.U16()), maxPathsInRecord) {
		if ep := r.endpoint(); ep.IsValid() && ep.Port() != 0 {
			rec.Endpoints = append(rec.Endpoints, ep)
		}
	}
	if r.Failed {
		return nil, fmt.Errorf("%w: too short", ErrPeerRecord)
	}
	return rec, nil
}

// maxPathsInRecord is what the reference writes at most.
const maxPathsInRecord = 64

// PeerFile returns the name of a peer's file in the cache.
func PeerFile(a identity.Address) string { return a.String() + peerSuffix }

// ParsePeerFile is the inverse of [PeerFile].
func ParsePeerFile(name string) (a identity.Address, ok bool) {
	v, ok := parseFileName(name, peerSuffix, 10)
	return identity.Address(v), ok
}

func parseFileName(name, suffix string, digits int) (uint64, bool) {
	hex, ok := strings.CutSuffix(name, suffix)
	if !ok || len(hex) != digits || strings.ToLower(hex) != hex {
		return 0, false
	}
	v, err := strconv.ParseUint(hex, 16, 64)
	return v, err == nil
}

// PeerRecords returns what is worth keeping of the peers, e.g. when the node ends.
func (c *Core) PeerRecords() (out []PeerRecord) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.eachPeer(func(p *Peer) {
		if r, ok := c.recordLocked(p); ok {
			out = append(out, r)
		}
	})
	return out
}

// recordLocked describes p for the cache, if it is worth it: not peers that never told their
// version, such as those only relayed, nor strangers, who could fill the disk by saying
// HELLO.
func (c *Core) recordLocked(p *Peer) (PeerRecord, bool) {
	v := p.version.Load()
	ours := p.stored.Load() || p.lastTrust.Load() != 0 || p.lastAsked.Load() != 0 || c.staysLocked(p) || c.IsRoot() && len(p.paths) > 0
	if v == 0 || !ours {
		return PeerRecord{}, false
	}
	r := PeerRecord{
		Identity: p.id, ProtocolVersion: p.ProtocolVersion(),
		Version: [3]int{int(v >> 24 & 0xff), int(v >> 16 & 0xff), int(v & 0xffff)},
	}
	for _, pa := range p.paths {
		r.Endpoints = append(r.Endpoints, pa.ep)
	}
	return r, true
}

// recall looks an unknown peer up in the cache and tries its old endpoints.
// Nothing is assumed about its paths. It returns nil without a record.
func (c *Core) recall(w *Worker, a identity.Address) *Peer {
	p, endpoints := c.fromCache(w.t, a, maxRecalled)
	if p == nil {
		return nil
	}
	c.mu.Lock()
	c.tryEndpointsLocked(w, p, endpoints)
	c.mu.Unlock()
	c.peerLearned(w, p)
	return p
}

// tryEndpointsLocked says HELLO to old endpoints of a peer.
func (c *Core) tryEndpointsLocked(w *Worker, p *Peer, endpoints []netip.AddrPort) {
	for _, ep := range endpoints[:min(len(endpoints), maxPaths)] {
		if c.allowed(p, ep) {
			c.sendHelloLocked(w, p, 0, ep)
		}
	}
}

// reviving is the way back to peers in the cache if no root answers after the start:
// else nobody could tell who shares networks with us, nor where they are. One HELLO
// may be lost, or come too soon behind one from before the restart, so there are
// several rounds for who wasn't reached.
type reviving struct {
	done   bool               // a root answered, or all rounds are over
	rounds int                // begun
	last   int64              // when the latest one began
	all    []identity.Address // newest in the cache
	list   []identity.Address // left of a round
}

// Peers revived in all, at a time, and how often.
const (
	maxRevived   = 64
	revivedOnce  = 8
	reviveRounds = 5 // 5, 10, 20, 40 and 80 s apart
)

// reviveDueLocked reports whether peers are to be revived.
func (c *Core) reviveDueLocked(t int64) bool {
	r := &c.revive
	switch {
	case r.done:
		return false
	case len(r.list) > 0:
		return true
	case c.cfg.StoredPeers == nil || c.online.Load() || r.rounds == reviveRounds:
		r.done, r.all = true, nil
		return false
	case r.rounds == 0:
		return since(t, int64(time.Hour)) >= reviveAfter
	}
	return since(t, r.last) >= reviveAfter<<r.rounds
}

// revivePeers says HELLO to some of the peers in the cache.
func (c *Core) revivePeers(w *Worker) {
	r := &c.revive
	c.mu.Lock()
	first := r.rounds == 0
	c.mu.Unlock()
	var all []identity.Address
	if first {
		all = c.cfg.StoredPeers(maxRevived)
		c.log.Info("no root answers, trying peers as last seen", "peers", len(all))
	}
	c.mu.Lock()
	if first {
		r.all = all
	}
	if len(r.list) == 0 {
		r.list, r.last = r.all, w.t
		r.rounds++
	}
	list := r.list[:min(len(r.list), revivedOnce)]
	r.list = r.list[len(list):]
	c.mu.Unlock()
	for _, a := range list {
		if p := c.Peer(a); p == nil {
			c.recall(w, a)
		} else {
			c.greetAgain(w, p)
		}
	}
}

// greetAgain says HELLO to the old endpoints of a known peer without a path.
func (c *Core) greetAgain(w *Worker, p *Peer) {
	c.mu.Lock()
	reached := len(p.paths) > 0
	c.mu.Unlock()
	if reached {
		return
	}
	if rec := c.cfg.StoredPeer(p.id.Address()); rec != nil {
		c.mu.Lock()
		c.tryEndpointsLocked(w, p, rec.Endpoints)
		c.mu.Unlock()
	}
}

// recallSender looks the unknown sender of a packet up in the cache: after a restart
// it needs no new HELLO, which real nodes send to a root only every 225 s (chapter 02
// §4.6). The packet may be forged, so that nothing is sent; and strangers
// can't use up all of the table.
func (c *Core) recallSender(w *Worker, a identity.Address) *Peer {
	if c.cfg.StoredPeer == nil {
		return nil
	}
	work, ok := c.budget.Take(w.t, budget.Sender{}, budget.Agreement, 1)
	if !ok {
		return nil
	}
	p, _ := c.fromCache(w.t, a, maxRecalled/2)
	if p == nil {
		work.Cancel()
		return nil
	}
	work.Done()
	c.peerLearned(w, p)
	return p
}

// fromCache adds a peer that the cache has, at most once per recallEvery and
// address, unless limit addresses were looked up lately.
func (c *Core) fromCache(t int64, a identity.Address, limit int) (*Peer, []netip.AddrPort) {
	if c.cfg.StoredPeer == nil || a.Reserved() {
		return nil, nil
	}
	c.mu.Lock()
	last, tried := c.recalled[a]
	if tried && since(t, last) < recallEvery || !tried && len(c.recalled) >= limit {
		c.mu.Unlock()
		return nil, nil
	}
	c.recalled[a] = t
	c.mu.Unlock()
	rec := c.cfg.StoredPeer(a)
	if rec == nil || rec.Identity.Address() != a {
		return nil, nil
	}
	p, err := c.addPeer(rec.Identity, t)
	if err != nil {
		return nil, nil
	}
	p.stored.Store(true)
	if rec.ProtocolVersion >= packet.MinProtocolVersion && rec.ProtocolVersion <= 0xff {
		p.version.CompareAndSwap(0, packVersion(version{
			protocol: uint8(rec.ProtocolVersion), major: uint8(rec.Version[0]), minor: uint8(rec.Version[1]), revision: uint16(rec.Version[2]),
		}))
	}
	return p, rec.Endpoints
}

const (
	recallEvery = time.Minute
	maxRecalled = 1024
)
